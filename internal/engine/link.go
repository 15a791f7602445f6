package engine

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner"
)

// link is the engine's connection to the runner. It redials when the runner dies, compares what
// the runner has with the records, and hides the gap from operations: they wait for the next
// connection, and those that can be repeated are.
type link struct {
	e *Engine

	mu      sync.Mutex
	cur     Runner
	changed chan struct{} // closed and replaced when cur changes
}

// Redial delays.
const (
	redialFirst = 5 * time.Millisecond
	redialMax   = 500 * time.Millisecond
)

// maxTries is how often an operation is repeated on another connection.
const maxTries = 3

func newLink(e *Engine) *link { return &link{e: e, changed: make(chan struct{})} }

func (l *link) set(r Runner) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cur = r
	close(l.changed)
	l.changed = make(chan struct{})
}

// get returns the connection, waiting for one for a bounded time.
func (l *link) get(ctx context.Context) (Runner, error) {
	deadline := time.NewTimer(runnerWait)
	defer deadline.Stop()
	for {
		l.mu.Lock()
		r, changed := l.cur, l.changed
		l.mu.Unlock()
		if r != nil {
			return r, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errdefs.New(errdefs.ErrUnavailable, "waiting for berth-runner: %w", ctx.Err())
		case <-l.e.ctx.Done(): // even of what ctx does not end: nobody will dial any more
			return nil, errdefs.New(errdefs.ErrUnavailable, "waiting for berth-runner: the daemon is ending; ask its successor")
		case <-deadline.C:
			return nil, errdefs.New(errdefs.ErrUnavailable, "berth-runner has not answered for %s; see its log in the instance's state directory", runnerWait)
		}
	}
}

// again tells whether an operation failed only because its connection broke, and waits for another.
func (l *link) again(ctx context.Context, r Runner, err error) bool {
	if err == nil {
		return false
	}
	select {
	case <-r.Closed():
	default:
		return false
	}
	l.mu.Lock()
	if l.cur == r {
		l.cur = nil
		close(l.changed)
		l.changed = make(chan struct{})
	}
	l.mu.Unlock()
	_, err = l.get(ctx)
	return err == nil
}

// do runs an operation that may be repeated.
func (l *link) do(ctx context.Context, f func(Runner) error) error {
	for try := 0; ; try++ {
		r, err := l.get(ctx)
		if err != nil {
			return err
		}
		err = f(r)
		if try >= maxTries || !l.again(ctx, r, err) {
			return err
		}
	}
}

// create starts a container. When the runner dies under it, the next one tells how far it came.
// doubt says that the connection has changed since: an exit may have gone unnoticed.
func (l *link) create(ctx context.Context, req runner.CreateRequest) (p runner.Process, doubt func() bool, err error) {
	for try := 0; ; try++ {
		r, err := l.get(ctx)
		if err != nil {
			return p, nil, err
		}
		p, err := r.Create(ctx, req)
		if err == nil {
			return p, func() bool { return !l.is(r) }, nil
		}
		// What it has under this ID is of an earlier run, which it could not be told to forget.
		stale := errorIs(err, errdefs.ErrExists) && try == 0
		if try >= maxTries || !stale && !l.again(ctx, r, err) {
			return p, nil, err
		}
		if !stale {
			st, found, err := l.status(ctx, req.ID)
			if err != nil {
				return p, nil, err
			}
			if found && (st.State == runner.Running || st.State == runner.Paused || st.State == runner.Stopped) {
				return st.Process, func() bool { return true }, nil
			}
		}
		if err := l.delete(ctx, req.ID); err != nil {
			return p, nil, err
		}
	}
}

// is tells whether r is the present connection.
func (l *link) is(r Runner) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cur == r
}

func (l *link) status(ctx context.Context, id string) (st runner.Status, found bool, err error) {
	err = l.do(ctx, func(r Runner) error {
		list, err := r.List(ctx)
		for _, s := range list {
			if s.ID == id {
				st, found = s, true
			}
		}
		return err
	})
	return st, found, err
}

// delete is idempotent.
func (l *link) delete(ctx context.Context, id string) error {
	return l.do(ctx, func(r Runner) error {
		err := r.Delete(ctx, id)
		if errorIs(err, errdefs.ErrNotFound) {
			return nil
		}
		return err
	})
}

// run keeps the connection until ctx ends.
func (l *link) run(ctx context.Context, ready func()) error {
	first := true
	delay := redialFirst
	for {
		r, err := l.e.DialRunner(ctx)
		if err == nil {
			delay = redialFirst
			if err = l.session(ctx, r, first, ready); err == nil {
				first = false
			}
			l.set(nil)
			_ = r.Close() // it is broken or of no more use
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && first && !errorIs(err, errdefs.ErrUnavailable) && !os.IsNotExist(err) {
			return fmt.Errorf("first connection to berth-runner: %w", err)
		}
		if err != nil {
			l.e.log.Debug("berth-runner is away", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
			delay = min(2*delay, redialMax)
		}
	}
}

// session serves one connection. An error means that it never became usable.
func (l *link) session(ctx context.Context, r Runner, first bool, ready func()) error {
	before := l.e.Containers() // what the records say must be older than the list they are compared with
	list, err := r.List(ctx)
	if err != nil {
		return err
	}
	if first {
		if err := l.e.restore(ctx, list); err != nil {
			return err
		}
	}
	l.set(r)
	l.e.reconcile(list, before, first)
	if first && ready != nil {
		ready()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.Closed():
			return nil
		case ev := <-r.Events():
			l.e.handle(ev)
		}
	}
}
