package criapi

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// unlimited: memory limits from here on are the kernel's way to say "none".
const unlimited = math.MaxInt64 - 1<<20

// defaultInterface is the pod's own on the default network.
const defaultInterface = "eth0"

func value(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

func (r *runtimeService) ContainerStats(ctx context.Context, req *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	c, d, err := r.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	st, _, err := r.stats(ctx, c, d)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerStatsResponse{Stats: st}, nil
}

func (r *runtimeService) ListContainerStats(ctx context.Context, req *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	f := req.GetFilter()
	resp := &runtimeapi.ListContainerStatsResponse{}
	for _, c := range r.Engine.Containers() {
		var d containerDialect
		if c.Config.Owner != engine.OwnerCRI || !matches(f.GetId(), c.Config.ID) || !matches(f.GetPodSandboxId(), c.Config.Sandbox) ||
			!selects(f.GetLabelSelector(), c.Config.Labels) || json.Unmarshal(c.Config.Dialect, &d) != nil {
			continue
		}
		st, _, err := r.stats(ctx, c, d)
		if gone(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		resp.Stats = append(resp.Stats, st)
	}
	return resp, nil
}

// stats of one container; raw is nil when it does not run. Its layer's size is told in any case.
func (s *Server) stats(ctx context.Context, c engine.Container, d containerDialect) (st *runtimeapi.ContainerStats, raw *engine.Stats, err error) {
	size, err := s.Engine.WritableBytes(ctx, c.Config.ID)
	if err != nil {
		return nil, nil, err
	}
	st = &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{Id: c.Config.ID, Metadata: d.metadata(), Labels: c.Config.Labels, Annotations: c.Config.Annotations},
		WritableLayer: &runtimeapi.FilesystemUsage{
			Timestamp: time.Now().UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.ImageDir}, UsedBytes: value(uint64(size)),
		},
	}
	g, err := s.Engine.Stats(ctx, c.Config.ID)
	if errors.Is(err, errdefs.ErrConflict) {
		return st, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	st.Cpu, st.Memory = cpuUsage(g), memoryUsage(g)
	return st, &g, nil
}

func cpuUsage(g engine.Stats) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{Timestamp: nanos(g.Time), UsageCoreNanoSeconds: value(g.CPUNanos)}
}

func memoryUsage(g engine.Stats) *runtimeapi.MemoryUsage {
	working := g.MemoryBytes - min(g.MemoryBytes, g.MemoryCache)
	out := &runtimeapi.MemoryUsage{Timestamp: nanos(g.Time), UsageBytes: value(g.MemoryBytes), WorkingSetBytes: value(working)}
	if g.MemoryLimit > 0 && g.MemoryLimit < unlimited {
		out.AvailableBytes = value(g.MemoryLimit - min(g.MemoryLimit, working))
	}
	return out
}

func (r *runtimeService) PodSandboxStats(ctx context.Context, req *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	b, d, err := r.sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	st, err := r.podStats(ctx, b, d)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: st}, nil
}

func (r *runtimeService) ListPodSandboxStats(ctx context.Context, req *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	f := req.GetFilter()
	resp := &runtimeapi.ListPodSandboxStatsResponse{}
	for _, b := range r.Engine.Sandboxes() {
		var d sandboxDialect
		if b.Config.Owner != engine.OwnerCRI || !b.State.Ready || !matches(f.GetId(), b.Config.ID) ||
			!selects(f.GetLabelSelector(), b.Config.Labels) || json.Unmarshal(b.Config.Dialect, &d) != nil {
			continue
		}
		st, err := r.podStats(ctx, b, d)
		if err != nil {
			return nil, err
		}
		resp.Stats = append(resp.Stats, st)
	}
	return resp, nil
}

// podStats adds up what a pod's running containers use: a sandbox has no process of its own.
func (s *Server) podStats(ctx context.Context, b engine.Sandbox, d sandboxDialect) (*runtimeapi.PodSandboxStats, error) {
	linux := &runtimeapi.LinuxPodSandboxStats{}
	sum := engine.Stats{Time: time.Now()}
	for _, c := range s.inSandbox(b.Config.ID) {
		var cd containerDialect
		if err := json.Unmarshal(c.Config.Dialect, &cd); err != nil {
			return nil, err
		}
		st, raw, err := s.stats(ctx, c, cd)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		linux.Containers = append(linux.Containers, st)
		if raw == nil {
			continue
		}
		sum.CPUNanos += raw.CPUNanos
		sum.MemoryBytes += raw.MemoryBytes
		sum.MemoryCache += raw.MemoryCache
		sum.Pids += raw.Pids
		sum.Networks = raw.Networks // the same for all of them
	}
	linux.Cpu, linux.Memory, linux.Network = cpuUsage(sum), memoryUsage(sum), networkUsage(sum)
	linux.Process = &runtimeapi.ProcessUsage{Timestamp: nanos(sum.Time), ProcessCount: value(sum.Pids)}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{Id: b.Config.ID, Metadata: d.metadata(), Labels: b.Config.Labels, Annotations: b.Config.Annotations},
		Linux:      linux,
	}, nil
}

// networkUsage is nil when nobody could count: no container runs, or the network is the node's.
func networkUsage(g engine.Stats) *runtimeapi.NetworkUsage {
	if len(g.Networks) == 0 {
		return nil
	}
	out := &runtimeapi.NetworkUsage{Timestamp: nanos(g.Time)}
	names := make([]string, 0, len(g.Networks))
	for name := range g.Networks {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		n := g.Networks[name]
		u := &runtimeapi.NetworkInterfaceUsage{Name: name, RxBytes: value(n.RxBytes), RxErrors: value(n.RxErrors), TxBytes: value(n.TxBytes), TxErrors: value(n.TxErrors)}
		if name == defaultInterface {
			out.DefaultInterface = u
			continue
		}
		out.Interfaces = append(out.Interfaces, u)
	}
	return out
}
