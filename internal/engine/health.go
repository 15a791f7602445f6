package engine

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Defaults of a health check, docker's.
const (
	healthInterval      = 30 * time.Second
	healthTimeout       = 30 * time.Second
	healthStartInterval = 5 * time.Second
	healthRetries       = 3
	healthKept          = 5
	healthOutputBytes   = 4096
)

// healthLoop probes one run of a container. Between probes it is a timer, not a goroutine.
type healthLoop struct {
	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
	cancel  context.CancelFunc
	ctx     context.Context
}

// nextProbe is when to probe again: often while the container starts up, then at the interval.
func nextProbe(h HealthCheck, status string, since time.Duration) time.Duration {
	if status == HealthStarting && h.StartPeriod > 0 && since < h.StartPeriod {
		if h.StartInterval > 0 {
			return h.StartInterval
		}
		return min(healthStartInterval, orDefault(h.Interval, healthInterval))
	}
	return orDefault(h.Interval, healthInterval)
}

// judge is the next health from a probe's result: a pure function. Failures within the start
// period do not count until a probe succeeded.
func judge(h HealthCheck, now Health, r HealthResult, sinceStart time.Duration) Health {
	next := Health{Status: now.Status, FailingStreak: now.FailingStreak, Log: append(slices.Clone(now.Log), r)}
	if n := len(next.Log); n > healthKept {
		next.Log = next.Log[n-healthKept:]
	}
	if r.ExitCode == 0 {
		next.Status, next.FailingStreak = HealthHealthy, 0
		return next
	}
	if now.Status == HealthStarting && sinceStart < h.StartPeriod {
		return next
	}
	next.FailingStreak++
	if next.FailingStreak >= orDefault(h.Retries, healthRetries) {
		next.Status = HealthUnhealthy
	}
	return next
}

func orDefault[T int | time.Duration](v, def T) T {
	if v > 0 {
		return v
	}
	return def
}

// startHealth begins probing; it is called at start and after adoption.
func (e *Engine) startHealth(c *container) {
	c.mu.Lock()
	h := c.Config.Health
	if h == nil {
		c.mu.Unlock()
		return
	}
	adopted := c.State.Health != nil && c.State.Health.Status != HealthStarting
	if !adopted || time.Since(c.State.StartedAt) < time.Second {
		c.State.Health = &Health{Status: HealthStarting}
	}
	l := &healthLoop{}
	l.ctx, l.cancel = context.WithCancel(e.ctx)
	c.probes = l
	delay := nextProbe(*h, c.State.Health.Status, time.Since(c.State.StartedAt))
	c.mu.Unlock()
	l.schedule(delay, func() { e.goWork(func(context.Context) { e.probe(c, l) }) })
}

func (l *healthLoop) schedule(d time.Duration, f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stopped {
		l.timer = time.AfterFunc(d, f)
	}
}

// stopHealth ends probing; a probe under way is cut.
func (e *Engine) stopHealth(c *container) {
	c.mu.Lock()
	l := c.probes
	c.probes = nil
	c.mu.Unlock()
	if l == nil {
		return
	}
	l.mu.Lock()
	l.stopped = true
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	l.cancel()
}

func (e *Engine) probe(c *container, l *healthLoop) {
	v := c.view()
	h := *v.Config.Health
	if v.State.Status == StatusRunning {
		r := HealthResult{Start: time.Now()}
		stdout, stderr, code, err := e.ExecSync(l.ctx, v.Config.ID, h.Args, orDefault(h.Timeout, healthTimeout))
		if l.ctx.Err() != nil {
			return // the container ended, or the daemon
		}
		r.End, r.ExitCode, r.Output = time.Now(), code, string(append(stdout, stderr...))
		if err != nil {
			r.ExitCode, r.Output = -1, err.Error()
			if errorIs(err, context.DeadlineExceeded) {
				r.Output = "Health check exceeded timeout (" + orDefault(h.Timeout, healthTimeout).String() + ")"
			}
		}
		if len(r.Output) > healthOutputBytes {
			r.Output = r.Output[:healthOutputBytes]
		}
		e.recordHealth(c, h, r)
	}
	v = c.view()
	if v.State.Health == nil {
		return
	}
	l.schedule(nextProbe(h, v.State.Health.Status, time.Since(v.State.StartedAt)), func() {
		e.goWork(func(context.Context) { e.probe(c, l) })
	})
}

func (e *Engine) recordHealth(c *container, h HealthCheck, r HealthResult) {
	c.mu.Lock()
	if c.State.Health == nil || !c.running() {
		c.mu.Unlock()
		return
	}
	before := c.State.Health.Status
	next := judge(h, *c.State.Health, r, time.Since(c.State.StartedAt))
	c.State.Health = &next
	err := e.save(c)
	c.mu.Unlock()
	if err != nil {
		e.log.Error("record of a health check not written", "container", c.Config.ID, "error", err)
	}
	if before != next.Status {
		e.publish(c.view(), "health_status: "+next.Status)
	}
}
