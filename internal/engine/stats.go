package engine

import (
	"context"
	"os"
	"time"

	"berth/internal/errdefs"
)

// running returns a copy of a container that runs, else ErrConflict.
func (e *Engine) runningView(ref string) (Container, Sandbox, error) {
	c, err := e.find(ref)
	if err != nil {
		return Container{}, Sandbox{}, err
	}
	v := c.view()
	if v.State.PID == 0 {
		return Container{}, Sandbox{}, errdefs.New(errdefs.ErrConflict, "container %s is not running", v.Config.ID)
	}
	b, err := e.Sandbox(v.Config.Sandbox)
	return v, b, err
}

// Stats implements ContainerAPI.
func (e *Engine) Stats(_ context.Context, ref string) (Stats, error) {
	v, b, err := e.runningView(ref)
	if err != nil {
		return Stats{}, err
	}
	g, err := e.cgroups.Read(e.cgroupPath(v.Config, b.Config))
	if os.IsNotExist(err) {
		return Stats{}, errdefs.New(errdefs.ErrConflict, "container %s is not running", v.Config.ID)
	}
	if err != nil {
		return Stats{}, err
	}
	s := Stats{
		Time: time.Now(), CPUNanos: g.CPUNanos, CPUUserNanos: g.CPUUserNanos, CPUSysNanos: g.CPUSysNanos,
		ThrottledNanos: g.ThrottledNanos, ThrottledPeriods: g.ThrottledPeriods, Periods: g.Periods,
		MemoryBytes: g.MemoryBytes, MemoryCache: g.MemoryCache, MemoryLimit: g.MemoryLimit, MemoryPeak: g.MemoryPeak,
		Pids: g.Pids, PidsLimit: g.PidsLimit, ReadBytes: g.ReadBytes, WriteBytes: g.WriteBytes,
		Networks: map[string]NetworkStats{},
	}
	if b.State.NetNS == "" {
		return s, nil
	}
	nets, err := e.Networks.Stats(b.State.NetNS)
	for name, n := range nets {
		if name != "lo" {
			s.Networks[name] = NetworkStats(n)
		}
	}
	return s, err
}

// PIDs implements ContainerAPI.
func (e *Engine) PIDs(_ context.Context, ref string) ([]int, error) {
	v, b, err := e.runningView(ref)
	if err != nil {
		return nil, err
	}
	return e.cgroups.Pids(e.cgroupPath(v.Config, b.Config))
}
