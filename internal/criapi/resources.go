package criapi

import (
	"context"
	"strconv"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
)

const (
	maxOOMScore = 1000
	pidsKey     = "pids.max" // in the unified map
)

// applyResources puts what is set over what there is: a zero field means no change. Entries of
// hugepage_limits that are zero are passed over, because kubelets send one for every page size of
// the node and every container.
func applyResources(out *engine.Resources, oom *int, field string, r *runtimeapi.LinuxContainerResources) error {
	if r == nil {
		return nil
	}
	for _, h := range r.GetHugepageLimits() {
		if h.GetLimit() > 0 {
			return unsupported(field+".hugepage_limits "+h.GetPageSize(), "Berth sets no limits on huge pages")
		}
	}
	for k, v := range r.GetUnified() {
		if k != pidsKey {
			return unsupported(field+".unified "+k, "only "+pidsKey+" is")
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if v == "max" {
			n, err = -1, nil
		}
		if err != nil || n == 0 || n < -1 {
			return invalid("%s.unified %s=%q: must be a positive number or max", field, k, v)
		}
		out.PidsLimit = n
	}
	if s := r.GetOomScoreAdj(); s < -maxOOMScore || s > maxOOMScore {
		return invalid("%s.oom_score_adj %d: must be from -%d to %d", field, s, maxOOMScore, maxOOMScore)
	} else if s != 0 {
		*oom = int(s)
	}
	for _, v := range []struct {
		to *int64
		is int64
	}{
		{&out.CPUPeriod, r.GetCpuPeriod()}, {&out.CPUQuota, r.GetCpuQuota()}, {&out.CPUShares, r.GetCpuShares()},
		{&out.MemoryBytes, r.GetMemoryLimitInBytes()},
	} {
		if v.is != 0 {
			*v.to = v.is
		}
	}
	if r.GetCpusetCpus() != "" {
		out.CpusetCPUs = r.GetCpusetCpus()
	}
	if r.GetCpusetMems() != "" {
		out.CpusetMems = r.GetCpusetMems()
	}
	switch swap := r.GetMemorySwapLimitInBytes(); {
	case swap != 0:
		out.MemorySwapBytes = swap
	case r.GetMemoryLimitInBytes() != 0:
		out.MemorySwapBytes = r.GetMemoryLimitInBytes() // a pod that asks for no swap has none
	}
	return nil
}

// criResources is what a status tells.
func criResources(r engine.Resources, oom int) *runtimeapi.ContainerResources {
	out := &runtimeapi.LinuxContainerResources{
		CpuPeriod: r.CPUPeriod, CpuQuota: r.CPUQuota, CpuShares: r.CPUShares, MemoryLimitInBytes: r.MemoryBytes,
		MemorySwapLimitInBytes: r.MemorySwapBytes, OomScoreAdj: int64(oom), CpusetCpus: r.CpusetCPUs, CpusetMems: r.CpusetMems,
	}
	if r.PidsLimit != 0 {
		out.Unified = map[string]string{pidsKey: strconv.FormatInt(r.PidsLimit, 10)}
		if r.PidsLimit < 0 {
			out.Unified[pidsKey] = "max"
		}
	}
	return &runtimeapi.ContainerResources{Linux: out}
}

func (r *runtimeService) UpdateContainerResources(ctx context.Context, req *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	c, _, err := r.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if req.GetWindows() != nil {
		return nil, unsupported("windows", "this is a Linux node")
	}
	if len(req.GetAnnotations()) > 0 {
		return nil, unsupported("annotations", "Berth knows no experimental resources")
	}
	res, oom := c.Config.Resources, c.Config.OOMScoreAdj
	if err := applyResources(&res, &oom, "linux", req.GetLinux()); err != nil {
		return nil, err
	}
	if oom != c.Config.OOMScoreAdj {
		return nil, unsupported("linux.oom_score_adj", "it is set when a container starts")
	}
	if err := r.Engine.UpdateContainer(ctx, c.Config.ID, &res, nil); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}
