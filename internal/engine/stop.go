package engine

import (
	"context"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

const (
	defaultStopTimeout = 10 * time.Second
	killWait           = 30 * time.Second // for a process to vanish after SIGKILL
)

// StopContainer implements ContainerAPI.
func (e *Engine) StopContainer(ctx context.Context, ref string, timeout *time.Duration, signal string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	return e.stop(ctx, c, timeout, signal, "stop")
}

// stop ends a container for good. It holds no op while it waits: the exit is handled meanwhile.
func (e *Engine) stop(ctx context.Context, c *container, timeout *time.Duration, signal, event string) error {
	if done, err := e.stopRestarting(ctx, c); done || err != nil {
		return err
	}
	sig, limit, err := stopPlan(c.view().Config, timeout, signal)
	if err != nil {
		return err
	}
	c.mu.Lock()
	if !c.running() {
		name := c.Config.Name
		c.mu.Unlock()
		return errdefs.New(errdefs.ErrNotModified, "container %s is already stopped", name)
	}
	if !e.draining.Load() && c.manual == 0 {
		c.State.StoppedByUser = true
	}
	exited := c.exited
	err = e.save(c)
	c.mu.Unlock()
	if err != nil && !isNoSpace(err) && !errorIs(err, errdefs.ErrExhausted) {
		return err
	}
	if err := e.signalAndWait(ctx, c, sig, limit, exited); err != nil {
		return err
	}
	e.publish(c.view(), event)
	return nil
}

func stopPlan(cfg ContainerConfig, timeout *time.Duration, signal string) (int, time.Duration, error) {
	if signal == "" {
		signal = cfg.StopSignal
	}
	sig := int(unix.SIGTERM)
	if signal != "" {
		n, err := ParseSignal(signal)
		if err != nil {
			return 0, 0, err
		}
		sig = n
	}
	limit := cfg.StopTimeout
	if limit == 0 {
		limit = defaultStopTimeout
	}
	if timeout != nil {
		limit = *timeout
	}
	return sig, limit, nil
}

// stopRestarting ends a pending restart: the container does not run, so it is stopped at once.
func (e *Engine) stopRestarting(ctx context.Context, c *container) (bool, error) {
	c.mu.Lock()
	restarting := c.State.Status == StatusRestarting
	c.mu.Unlock()
	if !restarting {
		return false, nil
	}
	if err := c.op.lock(ctx); err != nil {
		return false, err
	}
	defer c.op.unlock()
	c.mu.Lock()
	if c.State.Status != StatusRestarting { // it was started meanwhile
		c.mu.Unlock()
		return false, nil
	}
	c.cancelRestart()
	c.State.Status = StatusExited
	if !e.draining.Load() && c.manual == 0 {
		c.State.StoppedByUser = true
	}
	err := e.save(c)
	waiters := c.takeWaiters(WaitNotRunning)
	code := c.State.ExitCode
	c.mu.Unlock()
	for _, w := range waiters {
		w.ch <- WaitResult{ExitCode: code}
	}
	c.out.endRun(false)
	e.cleanupRun(ctx, c, true)
	e.publish(c.view(), "stop")
	if err == nil && c.view().Config.AutoRemove && !c.keep() {
		err = e.removeLocked(ctx, c, true)
	}
	return true, err
}

// signalAndWait sends the stop signal, then SIGKILL after limit, and waits for the end.
func (e *Engine) signalAndWait(ctx context.Context, c *container, sig int, limit time.Duration, exited <-chan struct{}) error {
	if exited == nil {
		return nil
	}
	if limit != 0 {
		if err := e.signal(ctx, c, sig, false); err != nil {
			return err
		}
		var expired <-chan time.Time
		if limit > 0 {
			t := time.NewTimer(limit)
			defer t.Stop()
			expired = t.C
		}
		select {
		case <-exited:
			return nil
		case <-ctx.Done():
			return errdefs.New(errdefs.ErrUnavailable, "waiting for container %s to stop: %w", c.Config.ID, ctx.Err())
		case <-expired:
		}
	}
	if err := e.signal(ctx, c, int(unix.SIGKILL), true); err != nil {
		return err
	}
	t := time.NewTimer(killWait)
	defer t.Stop()
	select {
	case <-exited:
		return nil
	case <-ctx.Done():
		return errdefs.New(errdefs.ErrUnavailable, "waiting for container %s to stop: %w", c.Config.ID, ctx.Err())
	case <-t.C:
		return errdefs.New(errdefs.ErrUnavailable, "tried to kill container, but did not receive an exit event after %s: a process in it may be stuck in the kernel", killWait)
	}
}

// signal sends one signal; a container that ended meanwhile is no error. A paused one is resumed
// so that the signal is acted upon.
func (e *Engine) signal(ctx context.Context, c *container, sig int, all bool) error {
	c.mu.Lock()
	paused := c.State.Status == StatusPaused
	c.mu.Unlock()
	err := e.link.do(ctx, func(r Runner) error { return r.Kill(ctx, c.Config.ID, sig, all) })
	if err != nil && !errorIs(err, errdefs.ErrNotFound) && !errorIs(err, errdefs.ErrConflict) {
		return err
	}
	e.publish(c.view(), "kill", "signal", strconv.Itoa(sig))
	if paused {
		err := e.link.do(ctx, func(r Runner) error { return r.Resume(ctx, c.Config.ID) })
		if err != nil && !errorIs(err, errdefs.ErrNotFound) && !errorIs(err, errdefs.ErrConflict) {
			return err
		}
		c.mu.Lock()
		if c.State.Status == StatusPaused {
			c.State.Status = StatusRunning
		}
		c.mu.Unlock()
	}
	return nil
}

// KillContainer implements ContainerAPI. SIGKILL and the stop signal count as being stopped by
// the user: the restart policy leaves the container alone.
func (e *Engine) KillContainer(ctx context.Context, ref, signal string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	sig := int(unix.SIGKILL)
	if signal != "" {
		if sig, err = ParseSignal(signal); err != nil {
			return err
		}
	}
	stopSig, _, err := stopPlan(c.view().Config, nil, "")
	if err != nil {
		return err
	}
	if sig == int(unix.SIGKILL) || sig == stopSig {
		if done, err := e.stopRestarting(ctx, c); done || err != nil {
			return err
		}
	}
	c.mu.Lock()
	if !c.running() {
		c.mu.Unlock()
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", c.Config.ID)
	}
	exited := c.exited
	if sig == int(unix.SIGKILL) || sig == stopSig {
		c.State.StoppedByUser = true
		err = e.save(c)
	}
	c.mu.Unlock()
	if err != nil && !isNoSpace(err) && !errorIs(err, errdefs.ErrExhausted) {
		return err
	}
	if sig == int(unix.SIGKILL) { // docker returns when it is dead
		return e.signalAndWait(ctx, c, sig, 0, exited)
	}
	return e.signal(ctx, c, sig, false)
}

// RestartContainer implements ContainerAPI.
func (e *Engine) RestartContainer(ctx context.Context, ref string, timeout *time.Duration, signal string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.manual++
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.manual--
		c.mu.Unlock()
	}()
	if err := e.stop(ctx, c, timeout, signal, "stop"); err != nil && !errorIs(err, errdefs.ErrNotModified) {
		return err
	}
	if err := e.StartContainer(ctx, c.Config.ID); err != nil && !errorIs(err, errdefs.ErrNotModified) {
		return err
	}
	e.publish(c.view(), "restart")
	return nil
}

// PauseContainer implements ContainerAPI.
func (e *Engine) PauseContainer(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, StatusRunning, StatusPaused, "pause", func(r Runner, id string) error { return r.Pause(ctx, id) })
}

// UnpauseContainer implements ContainerAPI.
func (e *Engine) UnpauseContainer(ctx context.Context, ref string) error {
	return e.freeze(ctx, ref, StatusPaused, StatusRunning, "unpause", func(r Runner, id string) error { return r.Resume(ctx, id) })
}

func (e *Engine) freeze(ctx context.Context, ref string, from, to Status, action string, f func(Runner, string) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	c.mu.Lock()
	status, id := c.State.Status, c.Config.ID
	c.mu.Unlock()
	switch {
	case status == to && to == StatusPaused:
		return errdefs.New(errdefs.ErrConflict, "container %s is already paused", id)
	case status != from && from == StatusPaused:
		return errdefs.New(errdefs.ErrConflict, "container %s is not paused", id)
	case status != from:
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", id)
	}
	if err := e.link.do(ctx, func(r Runner) error { return f(r, id) }); err != nil {
		return err
	}
	c.mu.Lock()
	c.State.Status = to
	err = e.save(c)
	c.mu.Unlock()
	e.publish(c.view(), action)
	return err
}

// ResizeContainer implements ContainerAPI.
func (e *Engine) ResizeContainer(ctx context.Context, ref string, height, width uint16) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	v := c.view()
	if v.State.Status != StatusRunning && v.State.Status != StatusPaused {
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", v.Config.ID)
	}
	err = e.link.do(ctx, func(r Runner) error { return r.Resize(ctx, v.Config.ID, height, width) })
	if err == nil {
		e.publish(v, "resize", "height", strconv.Itoa(int(height)), "width", strconv.Itoa(int(width)))
	}
	return err
}

// UpdateContainer implements ContainerAPI.
func (e *Engine) UpdateContainer(ctx context.Context, ref string, res *Resources, p *RestartPolicy) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	c.mu.Lock()
	running, id := c.running(), c.Config.ID
	c.mu.Unlock()
	if res != nil && running {
		lr := linuxResources(*res)
		if err := e.link.do(ctx, func(r Runner) error { return r.Update(ctx, id, lr) }); err != nil {
			return err
		}
	}
	c.mu.Lock()
	if res != nil {
		c.Config.Resources = *res
	}
	if p != nil {
		c.Config.Restart = *p
	}
	err = e.save(c)
	c.mu.Unlock()
	e.publish(c.view(), "update")
	return err
}
