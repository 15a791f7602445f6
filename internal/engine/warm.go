package engine

import "context"

// expectStart has the kernel prepared for a container's control groups while the way to its start
// is still being gone: the wait is as long as the rest of it (cgroup.Warmer). One at a time is
// enough for all.
func (e *Engine) expectStart() {
	if !e.warming.CompareAndSwap(false, true) {
		return
	}
	e.goWork(func(context.Context) {
		defer e.warming.Store(false)
		_ = e.warmer.Warm(e.cgroups) // without it the start takes longer
	})
}
