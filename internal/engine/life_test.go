package engine_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/runner"
)

var bg = context.Background()

func TestLifeOfAContainer(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.container("web", publishing(80))
		r.is(id, engine.StatusCreated)
		must(t, r.e.StartContainer(bg, "web"))
		r.is(id, engine.StatusRunning)
		if s := r.state(id); s.PID != r.node.pid(id) || s.StartedAt.IsZero() {
			t.Errorf("state %+v", s)
		}
		wantKind(t, r.e.StartContainer(bg, "web"), errdefs.ErrNotModified)
		wantKind(t, r.e.RemoveContainer(bg, "web", engine.RemoveOptions{}), errdefs.ErrConflict)
		box, err := r.e.Sandbox(id)
		must(t, err)
		if !box.State.Ready || !box.Config.Private || len(box.State.Ports) != 1 || len(box.State.Endpoints) != 1 {
			t.Errorf("sandbox %+v", box)
		}
		r.exit(id, 3)
		if s := r.state(id); s.Status != engine.StatusExited || s.ExitCode != 3 || !s.ExitKnown || s.PID != 0 {
			t.Errorf("state %+v", s)
		}
		r.idle()
		wantKind(t, r.e.StopContainer(bg, "web", nil, ""), errdefs.ErrNotModified)
		wantKind(t, r.e.KillContainer(bg, "web", ""), errdefs.ErrConflict)
		must(t, r.e.StartContainer(bg, "web"))
		must(t, r.e.StopContainer(bg, "web", nil, ""))
		if s := r.state(id); s.ExitCode != 143 || !s.StoppedByUser {
			t.Errorf("state %+v", s)
		}
		must(t, r.e.RemoveContainer(bg, "web", engine.RemoveOptions{}))
		r.gone(id)
		r.empty()
		got := r.actions(id)
		if i := slices.Index(got, "kill"); i > 0 && got[i-1] == "die" {
			got[i-1], got[i] = got[i], got[i-1] // the signal is announced once it was sent: either may be first
		}
		want := []string{"create", "start", "die", "start", "kill", "die", "stop", "destroy"}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("events (-want +got):\n%s", d)
		}
		if !slices.Contains(r.images.released, "sha256:1") {
			t.Error("the image was not released")
		}
	})
}

func TestWaits(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.container("web")
		if w := r.result(r.wait(id, engine.WaitNotRunning)); w.ExitCode != 0 {
			t.Errorf("not running yet: %+v", w)
		}
		early := r.wait(id, engine.WaitNextExit)
		removed := r.wait(id, engine.WaitRemoved)
		must(t, r.e.StartContainer(bg, id))
		r.pending(early)
		var all []<-chan engine.WaitResult
		for range 3 {
			all = append(all, r.wait(id, engine.WaitNotRunning), r.wait(id, engine.WaitNextExit))
		}
		ctx, cancel := context.WithCancel(bg)
		left, err := r.e.Wait(ctx, id, engine.WaitNextExit)
		must(t, err)
		cancel()
		synctest.Wait()
		if n := r.e.Waiters(id); n != 8 {
			t.Errorf("%d waiters, want 8: the cancelled one left something", n)
		}
		r.exit(id, 7)
		for _, ch := range append(all, early) {
			if w := r.result(ch); w.ExitCode != 7 {
				t.Errorf("got %+v", w)
			}
		}
		r.pending(left)
		r.pending(removed)
		must(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{}))
		if w := r.result(removed); w.ExitCode != 7 {
			t.Errorf("removed: %+v", w)
		}
		if _, err := r.e.Wait(bg, id, engine.WaitRemoved); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("wait for what is gone: %v", err)
		}
	})
}

// A client that waits for the next exit must hear of it whatever the restart policy does then; docker
// tells those who wait for "not running" too.
func TestWaitWithRestartPolicy(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("always", 0))
		next, not := r.wait(id, engine.WaitNextExit), r.wait(id, engine.WaitNotRunning)
		r.exit(id, 5)
		if a, b := r.result(next), r.result(not); a.ExitCode != 5 || b.ExitCode != 5 {
			t.Errorf("got %+v, %+v", a, b)
		}
		waiting := r.wait(id, engine.WaitNotRunning)
		r.pending(waiting) // restarting counts as running
		r.remove(id)
		r.result(waiting)
		r.empty()
	})
}

func TestNames(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		a, b := r.container("a"), r.container("b")
		if _, err := r.tryContainer("a"); !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("a second a: %v", err)
		}
		wantKind(t, r.e.RenameContainer(bg, "b", "a"), errdefs.ErrConflict)
		wantKind(t, r.e.RenameContainer(bg, "b", "b"), errdefs.ErrInvalid)
		wantKind(t, r.e.RenameContainer(bg, "b", "-"), errdefs.ErrInvalid)
		r.store.refuse = errdefs.New(errdefs.ErrExhausted, "disk full")
		wantKind(t, r.e.RenameContainer(bg, "b", "c"), errdefs.ErrExhausted)
		if _, err := r.tryContainer("c"); !errors.Is(err, errdefs.ErrExhausted) {
			t.Errorf("creation on a full disk: %v", err)
		}
		r.store.refuse = nil
		c := r.container("c") // neither the rename nor the creation took the name
		r.remove(c)
		must(t, r.e.RenameContainer(bg, a, "/c"))
		must(t, r.e.RenameContainer(bg, b, "a"))
		if v, err := r.e.Container("a"); err != nil || v.Config.ID != b {
			t.Errorf("a is %s, %v", v.Config.ID, err)
		}
		r.remove(a)
		r.remove(b)
		r.empty()
	})
}

func TestRacesForOneName(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		var ids []string
		for i := range 8 {
			ids = append(ids, r.container(fmt.Sprintf("n%d", i)))
		}
		var wg sync.WaitGroup
		won := make(chan string, 16)
		for i, id := range ids {
			wg.Go(func() {
				if err := r.e.RenameContainer(bg, id, "x"); err == nil {
					won <- id
				}
			})
			wg.Go(func() {
				if i%2 == 0 {
					if made, err := r.tryContainer("x"); err == nil {
						won <- made
					}
				}
			})
		}
		wg.Wait()
		close(won)
		if n := len(won); n != 1 {
			t.Errorf("%d got the name", n)
		}
		for _, v := range r.e.Containers() {
			if got, err := r.e.Container(v.Config.Name); err != nil || got.Config.ID != v.Config.ID {
				t.Errorf("%s leads to %s, %v", v.Config.Name, got.Config.ID, err)
			}
			r.remove(v.Config.ID)
		}
		r.empty()
	})
}

func TestFailedStartsLeaveNothing(t *testing.T) {
	broken := errdefs.New(errdefs.ErrUnavailable, "it is broken")
	for _, c := range []struct {
		name  string
		alter alter
		set   func(r *rig, err error)
		code  int
		kind  error
	}{
		{"namespaces", nil, func(r *rig, err error) { r.networks.set(func(f *fakeNetworks) { f.refuseSpaces = err }) }, 128, errdefs.ErrUnavailable},
		{"network", nil, func(r *rig, err error) { r.networks.set(func(f *fakeNetworks) { f.refuseAttach = err }) }, 128, errdefs.ErrUnavailable},
		{"ports", publishing(80), func(r *rig, err error) { r.networks.set(func(f *fakeNetworks) { f.refusePublish = err }) }, 128, errdefs.ErrUnavailable},
		{"files", nil, func(r *rig, err error) { r.images.refuseWith(err) }, 128, errdefs.ErrUnavailable},
		{"user", asUser("nobody-here"), nil, 128, errdefs.ErrInvalid},
		{"volume", func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
			c.Mounts = []engine.Mount{{Kind: engine.MountVolume, Source: "missing", Target: "/v"}}
		}, nil, 128, errdefs.ErrNotFound},
		{"resolver", func(_ *engine.ContainerConfig, s *engine.SandboxConfig) {
			s.Endpoints = []engine.EndpointConfig{{Network: "mynet"}}
		}, func(r *rig, err error) { r.resolvers.refuse = err }, 128, errdefs.ErrUnavailable},
		{"no program", nil, func(r *rig, err error) { r.refuseCreate(err, errdefs.ErrNoProgram) }, 127, errdefs.ErrNoProgram},
		{"no permission", nil, func(r *rig, err error) { r.refuseCreate(err, errdefs.ErrInvocation) }, 126, errdefs.ErrInvocation},
		{"runner", nil, func(r *rig, err error) { r.refuseCreate(err, errdefs.ErrExhausted) }, 128, errdefs.ErrExhausted},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				if c.alter == nil {
					c.alter = func(*engine.ContainerConfig, *engine.SandboxConfig) {}
				}
				id := r.container("web", c.alter)
				if c.set != nil {
					c.set(r, broken)
				}
				not := r.wait(id, engine.WaitNextExit)
				wantKind(t, r.e.StartContainer(bg, id), c.kind)
				s := r.state(id)
				if s.Status != engine.StatusCreated || s.ExitCode != c.code || s.Error == "" || s.PID != 0 {
					t.Errorf("state %+v", s)
				}
				if w := r.result(not); w.ExitCode != c.code {
					t.Errorf("waited for %+v", w)
				}
				r.idle()
				if box, err := r.e.Sandbox(id); err != nil || box.State.Ready || len(box.State.Endpoints) > 0 {
					t.Errorf("sandbox %+v, %v", box.State, err)
				}
				if c.set != nil { // it can be started once the cause is gone
					c.set(r, nil)
					must(t, r.e.StartContainer(bg, id))
					if s := r.state(id); s.Error != "" {
						t.Errorf("old error stays: %s", s.Error)
					}
				}
				r.remove(id)

				// The same with automatic removal.
				if c.set != nil {
					c.set(r, broken)
				}
				id = r.container("web", c.alter, autoRemove)
				removed := r.wait(id, engine.WaitRemoved)
				wantKind(t, r.e.StartContainer(bg, id), c.kind)
				if w := r.result(removed); w.ExitCode != c.code {
					t.Errorf("removed: %+v", w)
				}
				r.gone(id)
				r.empty()
			})
		})
	}
}

// refuseCreate has the runner refuse with the kind; a nil err takes it back.
func (r *rig) refuseCreate(err, kind error) {
	r.node.set(func(n *node) {
		n.onCreate = nil
		if err != nil {
			n.onCreate = func(*conn, runner.CreateRequest) error { return errdefs.New(kind, "cannot start") }
		}
	})
}

func TestAutomaticRemoval(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.container("job", autoRemove, func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
			c.Mounts = []engine.Mount{{Kind: engine.MountVolume, Source: "anon", Target: "/v", Anonymous: true}, {Kind: engine.MountVolume, Source: "named", Target: "/n"}}
		})
		must(t, r.e.StartContainer(bg, id))
		removed := r.wait(id, engine.WaitRemoved)
		r.exit(id, 4)
		if w := r.result(removed); w.ExitCode != 4 {
			t.Errorf("removed: %+v", w)
		}
		if d := cmp.Diff([]string{"anon"}, r.volumes.removed); d != "" {
			t.Errorf("volumes removed:\n%s", d)
		}
		r.empty()
		id = r.started("job", autoRemove)
		must(t, r.e.RestartContainer(bg, id, nil, ""))
		r.is(id, engine.StatusRunning)
		var wg sync.WaitGroup // two at a time must not let the container go between stop and start
		for range 2 {
			wg.Go(func() { must(t, r.e.RestartContainer(bg, id, nil, "")) })
		}
		wg.Wait()
		r.is(id, engine.StatusRunning)
		must(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{Force: true}))
		r.empty()
	})
}

func TestStopThenKill(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("deaf")
		r.node.deafen(id)
		began, two := time.Now(), 2*time.Second
		done := make(chan error, 1)
		go func() { done <- r.e.StopContainer(bg, id, &two, "") }()
		time.Sleep(time.Second)
		synctest.Wait()
		if d := cmp.Diff([]int{15}, r.node.signals(id)); d != "" {
			t.Errorf("signals so far:\n%s", d)
		}
		must(t, <-done)
		if took := time.Since(began); took != two {
			t.Errorf("it took %s", took)
		}
		if s := r.state(id); s.ExitCode != 137 {
			t.Errorf("state %+v", s)
		}
		must(t, r.e.StartContainer(bg, id))
		r.node.deafen(id)
		ctx, cancel := context.WithTimeout(bg, time.Minute)
		defer cancel()
		never := -time.Second
		wantKind(t, r.e.StopContainer(ctx, id, &never, "SIGUSR1"), errdefs.ErrUnavailable)
		r.is(id, engine.StatusRunning)
		zero := time.Duration(0)
		must(t, r.e.StopContainer(bg, id, &zero, ""))
		r.remove(id)
		r.empty()
	})
}

func TestPause(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.container("web")
		wantKind(t, r.e.PauseContainer(bg, id), errdefs.ErrConflict)
		wantKind(t, r.e.UnpauseContainer(bg, id), errdefs.ErrConflict)
		must(t, r.e.StartContainer(bg, id))
		r.node.set(func(n *node) { n.onPause = func() error { return errdefs.New(errdefs.ErrUnavailable, "stuck") } })
		wantKind(t, r.e.PauseContainer(bg, id), errdefs.ErrUnavailable)
		r.is(id, engine.StatusRunning)
		r.node.set(func(n *node) { n.onPause = nil })
		must(t, r.e.PauseContainer(bg, id))
		wantKind(t, r.e.PauseContainer(bg, id), errdefs.ErrConflict)
		wantKind(t, r.e.StartContainer(bg, id), errdefs.ErrConflict)
		wantKind(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{}), errdefs.ErrConflict)
		if _, err := r.e.CreateExec(bg, engine.ExecConfig{Container: id, Args: []string{"x"}}); !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("exec: %v", err)
		}
		must(t, r.e.UnpauseContainer(bg, id))
		must(t, r.e.PauseContainer(bg, id))
		must(t, r.e.StopContainer(bg, id, nil, ""))
		if s := r.state(id); s.ExitCode != 143 {
			t.Errorf("a paused container was stopped: %+v", s)
		}
		must(t, r.e.StartContainer(bg, id))
		must(t, r.e.PauseContainer(bg, id))
		r.remove(id)
		r.empty()
	})
}

func TestSharedSandbox(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		a := r.started("a", publishing(80))
		b := r.started("b", inSandboxOf(a))
		r.exit(a, 0)
		if !r.networks.hasSpaces(a) {
			t.Fatal("the sandbox went with a, though b runs in it")
		}
		r.remove(a)
		if !r.networks.hasSpaces(a) {
			t.Fatal("the sandbox was removed with a, though b runs in it")
		}
		r.exit(b, 0)
		r.idle()
		must(t, r.e.StartContainer(bg, b))
		if !r.networks.hasSpaces(a) {
			t.Fatal("b was started without namespaces")
		}
		r.remove(b)
		r.empty()
	})
}

func TestPods(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		box, err := r.e.CreateSandbox(bg, engine.SandboxConfig{Name: "pod", Owner: engine.OwnerCRI, Endpoints: []engine.EndpointConfig{{Network: "mynet"}}})
		must(t, err)
		pod := box.Config.ID
		if _, err := r.e.CreateSandbox(bg, engine.SandboxConfig{Name: "pod"}); !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("a second pod: %v", err)
		}
		must(t, r.e.StartSandbox(bg, "pod"))
		must(t, r.e.StartSandbox(bg, "pod"))
		c := r.started("c", inSandboxOf(pod))
		r.exit(c, 0)
		if !r.networks.hasSpaces(pod) || r.resolvers.count() != 1 {
			t.Fatal("the pod ended with its container")
		}
		r.reopen()
		if !r.networks.live[pod] || r.resolvers.count() != 1 {
			t.Fatal("the pod was not adopted")
		}
		must(t, r.e.StartContainer(bg, c))
		must(t, r.e.StopSandbox(bg, pod))
		r.is(c, engine.StatusExited)
		r.idle()
		must(t, r.e.StartSandbox(bg, pod))
		must(t, r.e.StartContainer(bg, c))
		must(t, r.e.RemoveSandbox(bg, pod))
		r.gone(c)
		r.empty()
	})
}

func TestForcedRemovalDuringAStart(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		for _, alter := range [][]alter{{}, {autoRemove}, {restartPolicy("always", 0)}} {
			r.node.set(func(n *node) {
				n.onCreate = func(*conn, runner.CreateRequest) error { time.Sleep(time.Second); return nil }
			})
			id := r.container("web", alter...)
			done := make(chan error, 1)
			go func() { done <- r.e.StartContainer(bg, id) }()
			synctest.Wait()
			must(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{Force: true}))
			must(t, <-done)
			r.gone(id)
			r.empty()
		}
	})
}
