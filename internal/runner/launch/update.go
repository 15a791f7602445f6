package launch

import (
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/errdefs"
)

// Update changes a container's limits. What is nil, or empty, stays as it is.
func (l Launcher) Update(id string, r *specs.LinuxResources) error {
	if err := refuseUpdate(r); err != nil {
		return err
	}
	c, err := l.load(id)
	if err != nil {
		return err
	}
	config := c.Config()
	merge(config.Cgroups.Resources, r)
	// Devices may have been allowed by others meanwhile; the field is not saved.
	config.Cgroups.Resources.SkipDevices = true
	if err := stateError(id, c.Set(config)); err != nil {
		if errdefs.Kind(err) != nil {
			return err
		}
		return errdefs.New(errdefs.ErrInvalid, "update container %s: %w", id, err)
	}
	return nil
}

// refuseUpdate names what cannot be changed while a container runs.
func refuseUpdate(r *specs.LinuxResources) error {
	switch {
	case r == nil:
		return errdefs.New(errdefs.ErrInvalid, "update: no resources are given")
	case len(r.Devices) > 0:
		return errdefs.New(errdefs.ErrUnsupported, "update: allowed devices cannot be changed while a container runs; create it anew")
	case len(r.HugepageLimits) > 0 || len(r.Rdma) > 0 || r.Network != nil:
		return errdefs.New(errdefs.ErrUnsupported, "update: hugepage, rdma and network class limits cannot be changed while a container runs; create it anew")
	case r.BlockIO != nil && (len(r.BlockIO.WeightDevice) > 0 || len(r.BlockIO.ThrottleReadBpsDevice) > 0 ||
		len(r.BlockIO.ThrottleWriteBpsDevice) > 0 || len(r.BlockIO.ThrottleReadIOPSDevice) > 0 || len(r.BlockIO.ThrottleWriteIOPSDevice) > 0):
		return errdefs.New(errdefs.ErrUnsupported, "update: block limits per device cannot be changed while a container runs; create it anew")
	}
	return nil
}

// merge puts what is set in r into the limits that are.
func merge(to *cgroups.Resources, r *specs.LinuxResources) {
	if m := r.Memory; m != nil {
		set(&to.Memory, m.Limit)
		set(&to.MemoryReservation, m.Reservation)
		set(&to.MemorySwap, m.Swap)
		set(&to.OomKillDisable, m.DisableOOMKiller)
		if m.Swappiness != nil {
			to.MemorySwappiness = m.Swappiness
		}
		if m.Limit != nil && *m.Limit == -1 && m.Swap == nil {
			to.MemorySwap = 0 // a limit of swap without one of memory is an error
		}
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil {
			to.CpuShares = *c.Shares
			to.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*c.Shares)
		}
		set(&to.CpuQuota, c.Quota)
		set(&to.CpuPeriod, c.Period)
		set(&to.CpuRtRuntime, c.RealtimeRuntime)
		set(&to.CpuRtPeriod, c.RealtimePeriod)
		if c.Burst != nil {
			to.CpuBurst = c.Burst
		}
		if c.Idle != nil {
			to.CPUIdle = c.Idle
		}
		if c.Cpus != "" {
			to.CpusetCpus = c.Cpus
		}
		if c.Mems != "" {
			to.CpusetMems = c.Mems
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil {
		to.PidsLimit = r.Pids.Limit
	}
	if b := r.BlockIO; b != nil {
		set(&to.BlkioWeight, b.Weight)
		set(&to.BlkioLeafWeight, b.LeafWeight)
	}
	for k, v := range r.Unified {
		if to.Unified == nil {
			to.Unified = map[string]string{}
		}
		to.Unified[k] = v
	}
}

func set[T any](to *T, value *T) {
	if value != nil {
		*to = *value
	}
}
