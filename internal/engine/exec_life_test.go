package engine_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/runner"
)

// execIn makes an exec.
func (r *rig) execIn(id string) string {
	r.t.Helper()
	x, err := r.e.CreateExec(bg, engine.ExecConfig{Container: id, Args: []string{"probe"}})
	must(r.t, err)
	return x.ID
}

func TestLifeOfAnExec(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.container("web")
		if _, err := r.e.CreateExec(bg, engine.ExecConfig{Container: id, Args: []string{"x"}}); !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("before the start: %v", err)
		}
		must(t, r.e.StartContainer(bg, id))
		if _, err := r.e.CreateExec(bg, engine.ExecConfig{Container: id}); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("no program: %v", err)
		}
		x := r.execIn(id)
		must(t, r.e.StartExec(bg, x))
		wantKind(t, r.e.StartExec(bg, x), errdefs.ErrConflict)
		if v, err := r.e.Exec(x); err != nil || !v.Running || v.PID != r.node.pid(x) {
			t.Errorf("%+v, %v", v, err)
		}
		r.exit(x, 4)
		if v, err := r.e.WaitExec(bg, x); err != nil || v.Running || v.ExitCode != 4 || !v.Started {
			t.Errorf("%+v, %v", v, err)
		}
		if r.node.pid(x) != 0 {
			t.Error("the runner was not told to forget it")
		}
		time.Sleep(6 * time.Minute)
		if _, err := r.e.Exec(x); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("an old exec: %v", err)
		}
		// One that cannot start.
		r.node.set(func(n *node) {
			n.onExec = func(c *conn, q runner.ExecRequest) error {
				n.lose(q.ID)
				return errdefs.New(errdefs.ErrNoProgram, "no such program")
			}
		})
		x = r.execIn(id)
		wantKind(t, r.e.StartExec(bg, x), errdefs.ErrNoProgram)
		if v, err := r.e.WaitExec(bg, x); err != nil || v.ExitCode != 127 {
			t.Errorf("%+v, %v", v, err)
		}
		r.node.set(func(n *node) { n.onExec = nil })
		// Those that the container's end takes along.
		x, y := r.execIn(id), r.execIn(id)
		must(t, r.e.StartExec(bg, x))
		r.exit(id, 0)
		if v, err := r.e.WaitExec(bg, x); err != nil || v.ExitCode != 137 {
			t.Errorf("%+v, %v", v, err)
		}
		wantKind(t, r.e.StartExec(bg, y), errdefs.ErrConflict)
		r.remove(id)
		for _, x := range []string{x, y} {
			if _, err := r.e.Exec(x); !errors.Is(err, errdefs.ErrNotFound) {
				t.Errorf("exec of a removed container: %v", err)
			}
		}
		r.empty()
	})
}

// Whoever waits for an exec hears of its end, even when the runner cannot tell any more.
func TestExecsAndTheRunnersDeath(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web")
		ended, lost, kept := r.execIn(id), r.execIn(id), r.execIn(id)
		for _, x := range []string{ended, lost, kept} {
			must(t, r.e.StartExec(bg, x))
		}
		r.node.die(true)
		r.node.exit(ended, 3)
		r.node.lose(lost)
		r.node.rise()
		time.Sleep(time.Second)
		if v, _ := r.e.WaitExec(bg, ended); v.ExitCode != 3 {
			t.Errorf("ended: %+v", v)
		}
		if v, _ := r.e.WaitExec(bg, lost); v.ExitCode != 255 {
			t.Errorf("lost: %+v", v)
		}
		if v, _ := r.e.Exec(kept); !v.Running {
			t.Errorf("kept: %+v", v)
		}
		// The runner dies while it starts one, which runs to its end meanwhile.
		r.node.set(func(n *node) {
			n.onExec = func(_ *conn, q runner.ExecRequest) error {
				n.die(false)
				n.exit(q.ID, 0)
				time.Sleep(time.Second)
				return errdefs.New(errdefs.ErrUnavailable, "the connection is lost")
			}
		})
		x := r.execIn(id)
		_ = r.e.StartExec(bg, x) // may be told either way
		synctest.Wait()
		if v, err := r.e.WaitExec(bg, x); err != nil || v.Running {
			t.Errorf("%+v, %v", v, err)
		}
		// It dies while it starts one that runs on.
		r.node.set(func(n *node) {
			n.onExec = func(_ *conn, q runner.ExecRequest) error {
				n.die(false)
				return errdefs.New(errdefs.ErrUnavailable, "the connection is lost")
			}
		})
		x = r.execIn(id)
		if err := r.e.StartExec(bg, x); err != nil {
			time.Sleep(time.Second)
			synctest.Wait()
			if r.node.pid(x) != 0 {
				t.Error("the runner keeps an exec that nobody knows")
			}
		}
		r.remove(id)
		r.empty()
	})
}

func TestExecSync(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web")
		r.onExec(func(x string) { r.node.exit(x, 5) })
		if _, _, code, err := r.e.ExecSync(bg, id, []string{"probe"}, time.Second); err != nil || code != 5 {
			t.Errorf("%d, %v", code, err)
		}
		r.node.set(func(n *node) { n.onExec = nil })
		began := time.Now()
		_, _, _, err := r.e.ExecSync(bg, id, []string{"probe"}, time.Second)
		wantKind(t, err, context.DeadlineExceeded)
		if took := time.Since(began); took != time.Second {
			t.Errorf("it took %s", took)
		}
		synctest.Wait()
		if n := r.node.known(); n != 1 {
			t.Errorf("%d processes: the probe was not killed", n)
		}
		// Probes come often and for long: none must stay.
		r.onExec(func(x string) { r.node.exit(x, 0) })
		for range 1100 {
			if _, _, _, err := r.e.ExecSync(bg, id, []string{"probe"}, time.Second); err != nil {
				t.Fatal(err)
			}
		}
		r.remove(id)
		r.empty()
	})
}

// onExec lets something happen to each exec once it runs.
func (r *rig) onExec(f func(id string)) {
	r.node.set(func(n *node) {
		n.onExec = func(_ *conn, q runner.ExecRequest) error {
			go f(q.ID)
			return nil
		}
	})
}

func TestHealth(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		var code atomic.Int32
		r.onExec(func(x string) {
			if n := int(code.Load()); n >= 0 {
				r.node.exit(x, n)
			}
		})
		id := r.started("web", func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
			c.Health = &engine.HealthCheck{Args: []string{"probe"}, Interval: 10 * time.Second, Timeout: 2 * time.Second, Retries: 2}
		})
		health := func(want string) {
			t.Helper()
			synctest.Wait()
			if h := r.state(id).Health; h == nil || h.Status != want {
				t.Fatalf("health %+v, want %s", h, want)
			}
		}
		health(engine.HealthStarting)
		time.Sleep(11 * time.Second)
		health(engine.HealthHealthy)
		code.Store(1)
		time.Sleep(10 * time.Second)
		health(engine.HealthHealthy)
		time.Sleep(10 * time.Second)
		health(engine.HealthUnhealthy)
		code.Store(0)
		time.Sleep(10 * time.Second)
		health(engine.HealthHealthy)
		code.Store(-1)
		time.Sleep(30 * time.Second)
		health(engine.HealthUnhealthy)
		if l := r.state(id).Health.Log; !strings.Contains(l[len(l)-1].Output, "exceeded timeout (2s)") {
			t.Errorf("log %+v", l)
		}
		must(t, r.e.PauseContainer(bg, id))
		n := len(r.state(id).Health.Log)
		time.Sleep(time.Minute)
		health(engine.HealthUnhealthy)
		if len(r.state(id).Health.Log) != n {
			t.Error("a paused container was probed")
		}
		must(t, r.e.UnpauseContainer(bg, id))
		code.Store(0)
		r.reopen()
		time.Sleep(11 * time.Second)
		health(engine.HealthHealthy)
		r.exit(id, 0)
		known := r.node.known()
		time.Sleep(time.Minute)
		synctest.Wait()
		if known != 0 || r.node.known() != 0 {
			t.Error("probes went on behind the end")
		}
		must(t, r.e.StartContainer(bg, id))
		health(engine.HealthStarting)
		var changes []string
		for _, a := range r.actions(id) {
			if s, ok := strings.CutPrefix(a, "health_status: "); ok {
				changes = append(changes, s)
			}
		}
		want := []string{"healthy", "unhealthy", "healthy", "unhealthy", "healthy"}
		if !slices.Equal(changes, want) {
			t.Errorf("events %v, want %v", changes, want)
		}
		r.remove(id)
		r.empty()
	})
}

func TestAttachEndsWithTheRun(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.container("web")
		a, err := r.e.Attach(bg, id, engine.AttachOptions{Stdout: true, Stderr: true})
		must(t, err)
		defer a.Close()
		done := make(chan error, 1)
		go func() { done <- a.Copy(bg, io.Discard, io.Discard) }()
		must(t, r.e.StartContainer(bg, id))
		synctest.Wait()
		if len(done) != 0 {
			t.Fatal("it ended at once")
		}
		r.exit(id, 0)
		if len(done) != 1 || <-done != nil {
			t.Fatal("it did not end well with the run")
		}
		r.remove(id)
		r.empty()
	})
}
