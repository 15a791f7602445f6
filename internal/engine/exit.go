package engine

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner"
)

// Restart back-off: doubled at each restart, forgotten after a run of restartReset.
const (
	restartFirst = 100 * time.Millisecond
	restartMax   = time.Minute
	restartReset = 10 * time.Second
	restartAway  = time.Second // to try again when the runner is away
	pastKept     = 8
	unknownCode  = 255 // shown when nobody could observe the exit; ExitKnown says so
)

// handle takes one event of the runner. It must not block: it is the connection's only reader.
func (e *Engine) handle(ev runner.Event) {
	e.mu.RLock()
	c, x := e.containers[ev.ID], e.execs[ev.ID]
	e.mu.RUnlock()
	switch {
	case ev.Kind == runner.EventOutput && c != nil:
		c.out.grew(e)
	case ev.Kind == runner.EventOutput && x != nil:
		x.out.grew(e)
	case ev.Kind == runner.EventExit && c != nil:
		e.goWork(func(ctx context.Context) { e.ended(ctx, c, ev.PID, ev.Exit) })
	case ev.Kind == runner.EventExit && x != nil:
		e.goWork(func(ctx context.Context) { e.execEnded(ctx, x, ev.Exit) })
	case ev.Kind == runner.EventExit:
		e.goWork(func(ctx context.Context) { e.dropStray(ctx, ev.ID) })
	}
}

// decision is what happens to a container after an exit.
type decision struct {
	restart bool
	delay   time.Duration
}

// decideRestart is the restart policy: a pure function of the policy and the past.
// attempts counts restarts in a row before this exit.
func decideRestart(p RestartPolicy, exit runner.Exit, ran time.Duration, attempts int, stoppedByUser, draining bool) decision {
	if stoppedByUser || draining {
		return decision{}
	}
	switch p.Name {
	case "always", "unless-stopped":
	case "on-failure":
		if exit.Known && exit.Code == 0 || p.MaxRetries > 0 && attempts >= p.MaxRetries {
			return decision{}
		}
	default:
		return decision{}
	}
	if ran >= restartReset {
		attempts = 0
	}
	delay := restartMax
	if attempts < 10 {
		delay = min(restartFirst<<attempts, restartMax)
	}
	return decision{restart: true, delay: delay}
}

// ended handles the exit of a container's first process. A stale pid is ignored: the exit of an
// earlier run may be reported twice, by an event and by a list.
func (e *Engine) ended(ctx context.Context, c *container, pid int, exit runner.Exit) {
	if err := c.op.lock(ctx); err != nil {
		return // the daemon ends; the next one finds the exit
	}
	defer c.op.unlock()
	c.mu.Lock()
	if !c.running() || pid != 0 && c.State.PID != pid {
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	e.stopHealth(c)
	c.out.finish(e)

	c.mu.Lock()
	d := e.recordExit(c, exit)
	err := e.save(c)
	waiters := c.takeWaiters(WaitNotRunning, WaitNextExit)
	exited, code, cfg := c.exited, c.State.ExitCode, c.Config
	c.exited = nil
	c.mu.Unlock()
	if err != nil {
		e.log.Error("record of an exit not written", "container", cfg.ID, "error", err)
	}
	v := c.view()
	if exit.OOMKilled {
		e.publish(v, "oom")
	}
	e.publish(v, "die", "exitCode", strconv.Itoa(code), "execDuration", strconv.Itoa(int(v.State.FinishedAt.Sub(v.State.StartedAt).Seconds())))
	for _, w := range waiters {
		w.ch <- WaitResult{ExitCode: code}
	}
	c.out.endRun(d.restart)
	if exited != nil {
		close(exited)
	}
	c.stdin.drop()
	e.afterExit(ctx, c, d)
}

// afterExit does what follows from a recorded exit; the container's op is held.
func (e *Engine) afterExit(ctx context.Context, c *container, d decision) {
	e.cleanupRun(ctx, c, !d.restart)
	switch {
	case d.restart:
		e.scheduleRestart(c, d.delay)
	case c.view().Config.AutoRemove && !c.keep():
		if err := e.removeLocked(context.WithoutCancel(ctx), c, true); err != nil {
			e.log.Warn("container with automatic removal not removed", "container", c.Config.ID, "error", err)
		}
	}
}

// foundEnded settles what the runner knows as ended when the daemon comes. Its exit may be
// recorded already: the daemon before this one died before the runner forgot.
func (e *Engine) foundEnded(ctx context.Context, c *container, st runner.Status) {
	s := c.view().State
	if s.Status == StatusRunning || s.Status == StatusPaused || !s.FinishedAt.Equal(st.Exit.At) {
		e.adopt(c, runner.Status{Process: st.Process, State: runner.Running})
		e.ended(ctx, c, st.PID, st.Exit)
		return
	}
	if err := c.op.lock(ctx); err != nil {
		return // the daemon ends; the next one finds it
	}
	defer c.op.unlock()
	e.afterExit(ctx, c, decision{restart: s.Status == StatusRestarting, delay: max(0, time.Until(s.NextRestart))})
}

// recordExit moves the record to its next state; c.mu is held.
func (e *Engine) recordExit(c *container, exit runner.Exit) decision {
	s := &c.State
	s.FinishedAt = exit.At
	if s.FinishedAt.IsZero() {
		s.FinishedAt = time.Now()
	}
	ran := s.FinishedAt.Sub(s.StartedAt)
	s.ExitCode, s.ExitKnown, s.OOMKilled, s.PID = exit.Code, exit.Known, exit.OOMKilled, 0
	if !exit.Known {
		s.ExitCode = unknownCode
	}
	s.Restarts = append(s.Restarts, Past{At: s.FinishedAt, ExitCode: s.ExitCode, OOMKilled: s.OOMKilled, Ran: ran})
	if n := len(s.Restarts); n > pastKept {
		s.Restarts = slices.Clone(s.Restarts[n-pastKept:])
	}
	if ran >= restartReset {
		s.Attempts = 0
	}
	d := decideRestart(c.Config.Restart, exit, ran, s.Attempts, s.StoppedByUser, e.draining.Load() || c.manual > 0)
	s.Status = StatusExited
	if d.restart {
		s.Status, s.NextRestart = StatusRestarting, time.Now().Add(d.delay)
	}
	return d
}

// cleanupRun frees what one run held: the runner's record and, when leave is set, the place in
// the sandbox and the mounted files. Its failures are retried at the next start or removal.
func (e *Engine) cleanupRun(ctx context.Context, c *container, leave bool) {
	ctx = context.WithoutCancel(ctx)
	id := c.Config.ID
	var forgetting sync.WaitGroup
	forgetting.Go(func() { // beside the rest: a client waits for the end of a --rm container
		if err := e.link.delete(ctx, id); err != nil {
			e.log.Warn("runner did not forget an ended container", "container", id, "error", err)
		}
	})
	defer forgetting.Wait()
	if !leave {
		return
	}
	if b, err := e.findSandbox(c.Config.Sandbox); err == nil {
		e.leave(ctx, b)
	}
	if err := e.unmountRootfs(id); err != nil {
		e.log.Warn("container's files stay mounted", "error", err)
	}
}

// takeWaiters removes and returns the waiters with one of the conditions; c.mu is held.
func (c *container) takeWaiters(conds ...WaitCondition) []waiter {
	var taken []waiter
	c.waiters = slices.DeleteFunc(c.waiters, func(w waiter) bool {
		if slices.Contains(conds, w.cond) {
			taken = append(taken, w)
			return true
		}
		return false
	})
	return taken
}

// scheduleRestart starts the container again after delay, unless somebody else acts before.
func (e *Engine) scheduleRestart(c *container, delay time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restart = time.AfterFunc(delay, func() {
		e.goWork(func(ctx context.Context) { e.restartNow(ctx, c) })
	})
}

func (e *Engine) restartNow(ctx context.Context, c *container) {
	if err := c.op.lock(ctx); err != nil {
		return
	}
	defer c.op.unlock()
	c.mu.Lock()
	if c.State.Status != StatusRestarting || e.draining.Load() {
		c.mu.Unlock()
		return
	}
	policy := c.Config.Restart
	c.mu.Unlock()
	err := e.start(ctx, c)
	switch {
	case err == nil || ctx.Err() != nil:
		return
	case errorIs(err, errdefs.ErrUnavailable):
		e.scheduleRestart(c, restartAway)
		return
	}
	// A start that fails is an exit like any other, but for a program that does not exist.
	if errorIs(err, errdefs.ErrNoProgram) || errorIs(err, errdefs.ErrInvocation) {
		return
	}
	d := decideRestart(policy, runner.Exit{Known: true, Code: 128}, 0, c.view().State.Attempts, false, e.draining.Load())
	if !d.restart {
		return
	}
	c.mu.Lock()
	c.State.Status, c.State.NextRestart = StatusRestarting, time.Now().Add(d.delay)
	saveErr := e.save(c)
	c.mu.Unlock()
	if saveErr != nil {
		e.log.Error("record of a restarting container not written", "container", c.Config.ID, "error", saveErr)
	}
	e.scheduleRestart(c, d.delay)
}

// countRestart counts a start that a policy asked for, when it is recorded that it happened (or
// failed): a daemon that dies between the two leaves a record that says "restarting". c.mu is held.
func (c *container) countRestart() {
	if c.State.Status == StatusRestarting {
		c.State.RestartCount++
		c.State.Attempts++
	}
}

// cancelRestart stops a pending restart; c.mu is held.
func (c *container) cancelRestart() {
	if c.restart != nil {
		c.restart.Stop()
		c.restart = nil
	}
	c.State.NextRestart = time.Time{}
}

// keep tells whether automatic removal is suspended, as during docker restart.
func (c *container) keep() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.manual > 0
}

// Wait implements ContainerAPI.
func (e *Engine) Wait(ctx context.Context, ref string, cond WaitCondition) (<-chan WaitResult, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	switch cond {
	case "":
		cond = WaitNotRunning
	case WaitNotRunning, WaitNextExit, WaitRemoved:
	default:
		return nil, errdefs.New(errdefs.ErrInvalid, "invalid condition: %q", cond)
	}
	ch := make(chan WaitResult, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if cond == WaitNotRunning && !c.running() && c.State.Status != StatusRestarting {
		ch <- WaitResult{ExitCode: c.State.ExitCode}
		return ch, nil
	}
	select {
	case <-c.removed:
		return nil, errdefs.New(errdefs.ErrNotFound, "No such container: %s", ref)
	default:
	}
	c.waiters = append(c.waiters, waiter{cond: cond, ch: ch})
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.waiters = slices.DeleteFunc(c.waiters, func(w waiter) bool { return w.ch == ch })
	})
	return ch, nil
}
