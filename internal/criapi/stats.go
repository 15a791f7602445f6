package criapi

import (
	"context"
	"errors"
	"sort"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// unlimited is above every real limit of memory; kernels say "none" with numbers near 2^63.
const unlimited = 1 << 60

func (s *runtimeService) ContainerStats(ctx context.Context, req *runtime.ContainerStatsRequest) (*runtime.ContainerStatsResponse, error) {
	c, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	out, _, err := s.statsOf(ctx, c)
	if err != nil {
		return nil, err
	}
	used, err := s.Engine.WritableBytes(ctx, c.Config.ID)
	if err != nil {
		return nil, err
	}
	out.WritableLayer = &runtime.FilesystemUsage{
		Timestamp: out.GetCpu().GetTimestamp(), FsId: &runtime.FilesystemIdentifier{Mountpoint: s.ImageDir},
		UsedBytes: value(uint64(max(used, 0))), InodesUsed: value(0),
	}
	return &runtime.ContainerStatsResponse{Stats: out}, nil
}

// ListContainerStats leaves writable layers out: counting them means walking their files.
func (s *runtimeService) ListContainerStats(ctx context.Context, req *runtime.ListContainerStatsRequest) (*runtime.ListContainerStatsResponse, error) {
	f := req.GetFilter()
	resp := &runtime.ListContainerStatsResponse{}
	for _, c := range s.containersOf("") {
		if !strings.HasPrefix(c.Config.ID, f.GetId()) || !strings.HasPrefix(c.Config.Sandbox, f.GetPodSandboxId()) || !labelsMatch(c.Config.Labels, f.GetLabelSelector()) {
			continue
		}
		out, running, err := s.statsOf(ctx, c)
		if err != nil {
			return nil, err
		}
		if running {
			resp.Stats = append(resp.Stats, out)
		}
	}
	return resp, nil
}

// statsOf reads a container's counters. One that does not run has none.
func (s *Server) statsOf(ctx context.Context, c engine.Container) (out *runtime.ContainerStats, running bool, err error) {
	var said runtime.ContainerConfig
	decodeDialect(c.Config.Dialect, &said)
	out = &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{
		Id: c.Config.ID, Metadata: said.GetMetadata(), Labels: c.Config.Labels, Annotations: c.Config.Annotations,
	}}
	st, err := s.Engine.Stats(ctx, c.Config.ID)
	if errors.Is(err, errdefs.ErrConflict) || errors.Is(err, errdefs.ErrNotFound) {
		return out, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	out.Cpu, out.Memory = cpuUsage(st), memoryUsage(st)
	return out, true, nil
}

func value(n uint64) *runtime.UInt64Value { return &runtime.UInt64Value{Value: n} }

func cpuUsage(st engine.Stats) *runtime.CpuUsage {
	return &runtime.CpuUsage{Timestamp: st.Time.UnixNano(), UsageCoreNanoSeconds: value(st.CPUNanos)}
}

func memoryUsage(st engine.Stats) *runtime.MemoryUsage {
	working := st.MemoryBytes - min(st.MemoryCache, st.MemoryBytes)
	m := &runtime.MemoryUsage{Timestamp: st.Time.UnixNano(), UsageBytes: value(st.MemoryBytes), WorkingSetBytes: value(working)}
	if st.MemoryLimit > 0 && st.MemoryLimit < unlimited {
		m.AvailableBytes = value(st.MemoryLimit - min(working, st.MemoryLimit))
	}
	return m
}

func (s *runtimeService) PodSandboxStats(ctx context.Context, req *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	box, err := s.sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	out, err := s.podStats(ctx, box)
	if err != nil {
		return nil, err
	}
	return &runtime.PodSandboxStatsResponse{Stats: out}, nil
}

func (s *runtimeService) ListPodSandboxStats(ctx context.Context, req *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	f := req.GetFilter()
	resp := &runtime.ListPodSandboxStatsResponse{}
	for _, box := range s.Engine.Sandboxes() {
		if box.Config.Owner != engine.OwnerCRI || !box.State.Ready || !strings.HasPrefix(box.Config.ID, f.GetId()) || !labelsMatch(box.Config.Labels, f.GetLabelSelector()) {
			continue
		}
		out, err := s.podStats(ctx, box)
		if err != nil {
			return nil, err
		}
		resp.Stats = append(resp.Stats, out)
	}
	return resp, nil
}

// podStats adds up the containers of a pod. Its network's counters are seen from any of them.
func (s *Server) podStats(ctx context.Context, box engine.Sandbox) (*runtime.PodSandboxStats, error) {
	var said runtime.PodSandboxConfig
	decodeDialect(box.Config.Dialect, &said)
	linux := &runtime.LinuxPodSandboxStats{}
	var sum engine.Stats
	for _, c := range s.containersOf(box.Config.ID) {
		st, err := s.Engine.Stats(ctx, c.Config.ID)
		if errors.Is(err, errdefs.ErrConflict) || errors.Is(err, errdefs.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		sum.Time, sum.Networks = st.Time, st.Networks
		sum.CPUNanos += st.CPUNanos
		sum.MemoryBytes += st.MemoryBytes
		sum.MemoryCache += st.MemoryCache
		sum.Pids += st.Pids
		var conf runtime.ContainerConfig
		decodeDialect(c.Config.Dialect, &conf)
		linux.Containers = append(linux.Containers, &runtime.ContainerStats{
			Attributes: &runtime.ContainerAttributes{Id: c.Config.ID, Metadata: conf.GetMetadata(), Labels: c.Config.Labels, Annotations: c.Config.Annotations},
			Cpu:        cpuUsage(st), Memory: memoryUsage(st),
		})
	}
	if len(linux.Containers) > 0 {
		linux.Cpu, linux.Memory = cpuUsage(sum), memoryUsage(sum)
		linux.Process = &runtime.ProcessUsage{Timestamp: sum.Time.UnixNano(), ProcessCount: value(sum.Pids)}
		linux.Network = networkUsage(sum)
	}
	return &runtime.PodSandboxStats{
		Attributes: &runtime.PodSandboxAttributes{Id: box.Config.ID, Metadata: said.GetMetadata(), Labels: box.Config.Labels, Annotations: box.Config.Annotations},
		Linux:      linux,
	}, nil
}

func networkUsage(st engine.Stats) *runtime.NetworkUsage {
	out := &runtime.NetworkUsage{Timestamp: st.Time.UnixNano()}
	names := make([]string, 0, len(st.Networks))
	for name := range st.Networks {
		if name != "lo" {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for i, name := range names {
		n := st.Networks[name]
		u := &runtime.NetworkInterfaceUsage{
			Name: name, RxBytes: value(n.RxBytes), RxErrors: value(n.RxErrors), TxBytes: value(n.TxBytes), TxErrors: value(n.TxErrors),
		}
		out.Interfaces = append(out.Interfaces, u)
		if i == 0 {
			out.DefaultInterface = u
		}
	}
	return out
}
