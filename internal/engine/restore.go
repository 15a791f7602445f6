package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner"
)

// bootMarker is in the run directory while the instance has not been through a reboot: the
// directory is lost with one, and `berth down` removes the file.
const bootMarker = "up"

// restore brings what outlived the last daemon, or did not outlive a reboot, in line with the
// records, before any request is served: networks first, because ports and names depend on them.
//
// It holds no locks: nothing else runs yet.
func (e *Engine) restore(ctx context.Context, list []runner.Status) error {
	alive := map[string]bool{}
	for _, st := range list {
		if st.State != runner.Stopped {
			alive[st.Container] = true
		}
	}
	// A sandbox is live when something in it runs or it exists by itself and its namespaces do.
	live := map[string]bool{}
	for id, b := range e.sandboxes {
		used := false
		for _, c := range e.containers {
			used = used || c.Config.Sandbox == id && (alive[c.Config.ID] || c.State.Status == StatusRestarting && !e.rebooted())
		}
		if b.State.Ready && e.namespacesExist(id) && (used || !b.Config.Private) {
			live[id] = true
		}
	}
	if err := e.Networks.Restore(ctx, live); err != nil {
		return err
	}
	// The last daemon may have died between recording an exit and cleaning up behind it.
	for id := range e.containers {
		if alive[id] {
			continue
		}
		if err := e.unmountRootfs(id); err != nil {
			e.log.Warn("container's files stay mounted", "error", err)
		}
	}
	for id, b := range e.sandboxes {
		if !live[id] {
			if b.State.Ready {
				if err := e.unreadyLocked(ctx, b); err != nil {
					e.log.Warn("sandbox of another time not cleaned", "sandbox", id, "error", err)
				}
			}
			if err := e.dropAbandoned(ctx, b); err != nil {
				e.log.Warn("sandbox without a container not removed", "sandbox", id, "error", err)
			}
			continue
		}
		if e.usesResolver(b.State.Endpoints) {
			if err := e.Resolvers.Serve(id, b.State.NetNS); err != nil {
				e.log.Warn("names are not answered in a sandbox", "sandbox", id, "error", err)
			}
		}
	}
	return e.removeStrays(list)
}

// dropAbandoned removes a sandbox that was made for a container when there is none: a creation or
// removal was cut. Only docker's containers bring theirs along; others are pods of their own.
func (e *Engine) dropAbandoned(ctx context.Context, b *sandbox) error {
	if !b.Config.Private && b.Config.Owner != OwnerDocker || len(e.inSandbox(b.Config.ID)) > 0 {
		return nil
	}
	return e.dropSandbox(ctx, b)
}

func (e *Engine) namespacesExist(id string) bool {
	b := e.sandboxes[id]
	for _, n := range []struct {
		name string
		want bool
	}{{"net", b.Config.Network != NetworkHost}, {"ipc", !b.Config.HostIPC}, {"uts", !b.Config.HostUTS}} {
		p := filepath.Join(e.Root.Namespaces(id), n.name)
		if n.want && !mounted(p, filepath.Dir(p)) {
			return false
		}
	}
	return true
}

// removeStrays deletes directories of containers and sandboxes that have no record: a creation
// or removal was cut.
func (e *Engine) removeStrays(list []runner.Status) error {
	sweep := func(dir string, known func(id string) bool, unmount func(id string) error) error {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		for _, d := range entries {
			if known(d.Name()) || strings.HasPrefix(d.Name(), ".") {
				continue
			}
			if unmount != nil {
				if err := unmount(d.Name()); err != nil {
					return err
				}
			}
			if err := os.RemoveAll(filepath.Join(dir, d.Name())); err != nil {
				return err
			}
		}
		return nil
	}
	isContainer := func(id string) bool { return e.containers[id] != nil }
	isSandbox := func(id string) bool { return e.sandboxes[id] != nil }
	if err := sweep(e.Root.Containers(), isContainer, e.unmountRootfs); err != nil {
		return err
	}
	if err := sweep(filepath.Join(e.Root.Run, "bundles"), isContainer, nil); err != nil {
		return err
	}
	isProcess := func(id string) bool {
		return slices.ContainsFunc(list, func(st runner.Status) bool { return st.ID == id })
	}
	if err := sweep(filepath.Dir(e.execDir("x")), isProcess, nil); err != nil { // of an earlier daemon
		return err
	}
	return sweep(filepath.Dir(e.Root.Sandbox("x")), isSandbox, nil)
}

func (e *Engine) rebooted() bool {
	_, err := os.Stat(filepath.Join(e.Root.Run, bootMarker))
	return err != nil
}

// reconcile compares every container with what the runner says. It runs at each connection: the
// same path serves start-up, adoption after the runner's death, and repair.
//
// before is what the records said ahead of the list: what was started behind it is not in it, and
// none of our business.
func (e *Engine) reconcile(list []runner.Status, before []Container, first bool) {
	views := map[string]Container{}
	for _, v := range before {
		views[v.Config.ID] = v
	}
	byID := map[string]runner.Status{}
	for _, st := range list {
		byID[st.ID] = st
	}
	boot := first && e.rebooted()
	if first {
		e.markUp()
	}
	slots := make(chan struct{}, parallelRestores)
	var adopting sync.WaitGroup
	e.mu.RLock()
	for id, c := range e.containers {
		st, found := byID[id]
		delete(byID, id)
		if found && st.State == runner.Created {
			if first {
				e.goWork(func(ctx context.Context) { e.undoStart(ctx, c, boot) })
			} // else a start is under way, which knows what to do
			continue
		}
		if found && st.State != runner.Stopped && first {
			adopting.Go(func() { e.adopt(c, st) })
			continue
		}
		e.goWork(func(ctx context.Context) {
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
			case <-ctx.Done():
				return
			}
			if v, old := views[id]; old {
				e.reconcileOne(ctx, c, v, st, found, first, boot)
			}
		})
	}
	for id, st := range byID {
		x := e.execs[id]
		switch {
		case x != nil && st.State == runner.Stopped:
			e.goWork(func(ctx context.Context) { e.execEnded(ctx, x, st.Exit) })
		case x == nil && (e.containers[st.Container] == nil || st.State == runner.Stopped):
			// Nobody's: an exec of an earlier daemon that ended, or a container whose record is gone.
			e.goWork(func(ctx context.Context) { e.dropStray(ctx, id) })
		}
	}
	for id, x := range e.execs {
		if _, still := byID[id]; !still && !first && x.view().PID != 0 {
			e.goWork(func(ctx context.Context) { e.execEnded(ctx, x, runner.Exit{Code: -1, At: time.Now()}) })
		}
	}
	e.mu.RUnlock()
	adopting.Wait()
}

// undoStart removes what an earlier daemon's start came to when the runner was killed in it: the
// program has not begun and never will.
func (e *Engine) undoStart(ctx context.Context, c *container, boot bool) {
	if err := e.link.delete(ctx, c.Config.ID); err != nil {
		e.log.Warn("half-made container not removed", "container", c.Config.ID, "error", err)
	}
	e.reconcileOne(ctx, c, c.view(), runner.Status{}, false, true, boot)
}

// adopt takes over a container that runs, whatever its record says: a daemon may have died
// between the start and its record.
func (e *Engine) adopt(c *container, st runner.Status) {
	c.mu.Lock()
	status := StatusRunning
	if st.State == runner.Paused {
		status = StatusPaused
	}
	changed := c.State.Status != status || c.State.PID != st.PID
	if !c.running() { // its start was not recorded
		c.State.StoppedByUser, c.State.Error, c.State.NextRestart = false, "", time.Time{}
	}
	c.countRestart()
	c.State.Status, c.State.PID = status, st.PID
	if c.exited == nil {
		c.exited = make(chan struct{})
	}
	if changed && c.State.StartedAt.Before(c.State.FinishedAt) || c.State.StartedAt.IsZero() {
		c.State.StartedAt = time.Now()
	}
	var err error
	if changed {
		err = e.save(c)
	}
	c.mu.Unlock()
	if err != nil {
		e.log.Error("record of an adopted container not written", "container", c.Config.ID, "error", err)
	}
	c.out.beginRun()
	c.out.grew(e)
	e.startHealth(c)
}

// reconcileOne settles one container that the runner does not have running.
// v is its record as it was ahead of the list.
func (e *Engine) reconcileOne(ctx context.Context, c *container, v Container, st runner.Status, found, first, boot bool) {
	ran := v.State.Status == StatusRunning || v.State.Status == StatusPaused
	switch {
	case v.State.Status == StatusRemoving:
		if c.op.lock(ctx) == nil {
			defer c.op.unlock()
			if err := e.removeLocked(ctx, c, v.Config.AutoRemove); err != nil {
				e.log.Warn("interrupted removal not finished", "container", v.Config.ID, "error", err)
			}
		}
	case found && st.State == runner.Stopped && first:
		e.foundEnded(ctx, c, st)
	case found && st.State == runner.Stopped:
		e.ended(ctx, c, st.PID, st.Exit) // ignores another run's; waits for a start that is under way
		e.dropUnrecorded(ctx, c)
	case found && st.State != runner.Stopped:
		c.out.grew(e) // output may have come while nobody told us
		if !ran {
			e.dropUnrecorded(ctx, c)
		}
	case ran && (first || !found):
		// The runner knows nothing of it: the machine was restarted, or worse.
		e.ended(ctx, c, v.State.PID, runner.Exit{Code: -1, At: time.Now()})
	case first && v.State.Status == StatusRestarting && !boot:
		e.scheduleRestart(c, max(0, time.Until(v.State.NextRestart)))
	case boot && startsAtBoot(v):
		c.mu.Lock()
		c.State.Status = StatusExited
		c.mu.Unlock()
		if err := e.StartContainer(ctx, v.Config.ID); err != nil {
			e.log.Warn("container not started after a reboot", "container", v.Config.ID, "error", err)
		}
	case first && v.Config.AutoRemove && v.State.Status == StatusExited:
		if err := e.RemoveContainer(ctx, v.Config.ID, RemoveOptions{Volumes: true}); err != nil {
			e.log.Warn("container with automatic removal not removed", "container", v.Config.ID, "error", err)
		}
	}
}

// dropUnrecorded has the runner forget a container that does not run by its record: the start was
// given up while the runner was away, or it could not be told of an end.
func (e *Engine) dropUnrecorded(ctx context.Context, c *container) {
	if c.op.lock(ctx) != nil {
		return
	}
	defer c.op.unlock()
	c.mu.Lock()
	running := c.running()
	c.mu.Unlock()
	if running {
		return
	}
	if err := e.link.delete(ctx, c.Config.ID); err != nil {
		e.log.Warn("runner did not forget an ended container", "container", c.Config.ID, "error", err)
	}
}

// dropStray removes a process that nobody knows: an exec of an earlier daemon, or what is left of a
// container whose record is gone.
func (e *Engine) dropStray(ctx context.Context, id string) {
	if err := e.link.delete(ctx, id); err != nil {
		e.log.Warn("stray process not removed", "process", id, "error", err)
	}
	_ = os.RemoveAll(e.execDir(id)) // in the run directory: gone at the next reboot at the latest
}

// recheck looks for the exit of a run whose connection to the runner broke while it was recorded.
func (e *Engine) recheck(ctx context.Context, c *container, pid int) {
	st, found, err := e.link.status(ctx, c.Config.ID)
	switch {
	case err != nil:
		e.log.Warn("container not found in the runner; the next connection tells", "container", c.Config.ID, "error", err)
	case !found:
		e.ended(ctx, c, pid, runner.Exit{Code: -1, At: time.Now()})
	case st.State == runner.Stopped:
		e.ended(ctx, c, st.PID, st.Exit)
	}
}

// startsAtBoot is docker's rule for a container that did not run when the node went down.
// One that did run is handled as an exit.
func startsAtBoot(v Container) bool {
	switch v.Config.Restart.Name {
	case "always":
		return v.State.Status != StatusCreated
	case "unless-stopped":
		return v.State.Status != StatusCreated && !v.State.StoppedByUser
	case "on-failure":
		return v.State.Status == StatusRestarting
	}
	return false
}

// Drain stops every container as the instance goes down; restart policies take them up again
// when it comes back. Networks go too.
func (e *Engine) Drain(ctx context.Context) error {
	e.draining.Store(true)
	if err := os.Remove(filepath.Join(e.Root.Run, bootMarker)); err != nil && !os.IsNotExist(err) {
		return err
	}
	list := e.Containers()
	errs := make(chan error, len(list))
	for _, v := range list {
		go func() {
			var limit *time.Duration
			if v.Config.StopTimeout < 0 { // waits for ever, which the instance as a whole must not
				within := defaultStopTimeout
				limit = &within
			}
			c, err := e.find(v.Config.ID)
			if err == nil {
				err = e.settle(ctx, c)
			}
			if err == nil {
				err = e.stop(ctx, c, limit, "", "stop")
			}
			if errorIs(err, errdefs.ErrNotModified) || errorIs(err, errdefs.ErrNotFound) {
				err = nil
			}
			errs <- err
		}()
	}
	var first error
	for range list {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	for _, b := range e.Sandboxes() {
		if b.State.Ready {
			if err := e.StopSandbox(ctx, b.Config.ID); err != nil && first == nil {
				first = err
			}
		}
	}
	if first != nil {
		return first
	}
	return errors.Join(e.Volumes.Teardown(), e.Networks.Teardown(ctx))
}

// settle waits for the operation under way on a container, such as its start.
func (e *Engine) settle(ctx context.Context, c *container) error {
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	c.op.unlock()
	return nil
}

// goingDown is what is answered to those who would start something meanwhile.
func (e *Engine) goingDown() error {
	if !e.draining.Load() {
		return nil
	}
	return errdefs.New(errdefs.ErrUnavailable, "the instance is going down; start it again once it is back")
}

// Undrain takes Drain back when going down failed and the instance stays: the next daemon is then
// not the first after a reboot.
func (e *Engine) Undrain() {
	e.draining.Store(false)
	e.markUp()
}

func (e *Engine) markUp() {
	if err := os.WriteFile(filepath.Join(e.Root.Run, bootMarker), nil, 0o600); err != nil {
		e.log.Warn("boot marker not written", "error", err)
	}
}
