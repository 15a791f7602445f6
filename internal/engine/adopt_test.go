package engine_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/runner"
)

func TestAdoption(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", publishing(80), func(_ *engine.ContainerConfig, s *engine.SandboxConfig) {
			s.Endpoints = []engine.EndpointConfig{{Network: "mynet"}}
		})
		paused, ended, lost := r.started("paused"), r.started("ended"), r.started("lost")
		must(t, r.e.PauseContainer(bg, paused))
		before := r.state(id)
		r.stop()
		r.node.exit(ended, 8)
		r.node.lose(lost)
		r.open()
		if now := r.state(id); now.PID != before.PID || !now.StartedAt.Equal(before.StartedAt) || now.Status != engine.StatusRunning {
			t.Errorf("adopted as %+v, was %+v", now, before)
		}
		if !r.networks.live[id] || r.networks.live[ended] || r.resolvers.count() != 1 {
			t.Errorf("live sandboxes: %v, resolvers %d", r.networks.live, r.resolvers.count())
		}
		r.is(paused, engine.StatusPaused)
		if s := r.state(ended); s.Status != engine.StatusExited || s.ExitCode != 8 || !s.ExitKnown {
			t.Errorf("ended in the gap: %+v", s)
		}
		if s := r.state(lost); s.Status != engine.StatusExited || s.ExitKnown {
			t.Errorf("lost in the gap: %+v", s)
		}
		if r.networks.hasSpaces(ended) || r.networks.hasSpaces(lost) {
			t.Error("sandboxes of what ended are still there")
		}
		next := r.wait(id, engine.WaitNextExit)
		must(t, r.e.StopContainer(bg, id, nil, ""))
		if w := r.result(next); w.ExitCode != 143 {
			t.Errorf("%+v", w)
		}
		must(t, r.e.UnpauseContainer(bg, paused))
		for _, id := range []string{id, paused, ended, lost} {
			r.remove(id)
		}
		r.empty()
	})
}

// The daemon was killed between the start and its record.
func TestAdoptionOfWhatIsNotRecorded(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		fresh := r.container("fresh")
		stopped := r.started("stopped", restartPolicy("always", 0))
		must(t, r.e.StopContainer(bg, stopped, nil, ""))
		short := r.container("short", autoRemove)
		old := r.store.snapshot()
		for _, id := range []string{fresh, stopped, short} {
			must(t, r.e.StartContainer(bg, id))
		}
		boxes := r.store.snapshot()["sandbox"] // written before the process was made
		r.stop()
		old["sandbox"] = boxes
		r.store.reset(old)
		r.node.exit(short, 3)
		r.open()
		r.is(fresh, engine.StatusRunning)
		r.is(stopped, engine.StatusRunning)
		r.gone(short)
		r.exit(stopped, 1)
		r.is(stopped, engine.StatusRestarting) // that it had been stopped once is history
		r.remove(fresh)
		r.remove(stopped)
		r.empty()
	})
}

// The daemon was killed between the record of an exit and the runner's forgetting.
func TestRecordedExitIsNotHandledTwice(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("on-failure", 5))
		r.node.set(func(n *node) { n.keepDeleted = true })
		r.exit(id, 1)
		r.is(id, engine.StatusRestarting)
		r.reopen()
		r.node.set(func(n *node) { n.keepDeleted = false })
		if n := len(r.state(id).Restarts); n != 1 {
			t.Errorf("%d ends, want one", n)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if s := r.state(id); s.Status != engine.StatusRunning || s.RestartCount != 1 {
			t.Errorf("state %+v", s)
		}
		var dies int
		for _, a := range r.actions(id) {
			if a == "die" {
				dies++
			}
		}
		if dies != 1 {
			t.Errorf("it died %d times", dies)
		}
		r.remove(id)
		r.empty()
	})
}

func TestPoliciesAcrossARestartOfTheDaemon(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		waiting := r.started("waiting", restartPolicy("on-failure", 2))
		gap := r.started("gap", restartPolicy("always", 0))
		stopped := r.started("stopped", restartPolicy("always", 0))
		job := r.started("job", autoRemove)
		r.exit(waiting, 1)
		must(t, r.e.StopContainer(bg, stopped, nil, ""))
		r.stop()
		r.node.exit(gap, 0)
		r.node.exit(job, 0)
		time.Sleep(time.Hour)
		r.open()
		time.Sleep(time.Second)
		synctest.Wait()
		r.is(waiting, engine.StatusRunning)
		r.is(gap, engine.StatusRunning)
		r.is(stopped, engine.StatusExited)
		r.gone(job)
		r.exit(waiting, 1)
		time.Sleep(time.Second)
		synctest.Wait()
		r.is(waiting, engine.StatusRunning)
		r.reopen()
		r.exit(waiting, 1)
		r.is(waiting, engine.StatusExited) // restarts of all daemons count
		for _, id := range []string{waiting, gap, stopped} {
			r.remove(id)
		}
		r.empty()
	})
}

func TestUnfinishedWorkOfAnEarlierDaemon(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		removing, keep := r.container("removing"), r.container("keep")
		var box engine.SandboxConfig
		box.ID, box.Owner = engine.NewID(), engine.OwnerDocker
		_, err := r.e.CreateSandbox(bg, box) // its container was never made
		must(t, err)
		shared := r.container("shared", inSandboxOf(removing))
		r.remove(shared)
		c, err := r.e.Container(removing)
		must(t, err)
		r.stop()
		c.State.Status = engine.StatusRemoving
		must(t, r.store.Put("container", removing, c))
		strays := []string{r.root.Container("stray"), r.root.Sandbox("stray"), r.root.Bundle("stray"), filepath.Join(r.root.Run, "execs", "stray")}
		for _, d := range strays {
			must(t, os.MkdirAll(d, 0o700))
		}
		r.node.set(func(n *node) {
			n.procs["stray"] = &proc{Process: runner.Process{ID: "stray", Container: "stray", PID: 9}, state: runner.Running}
		})
		r.open()
		r.gone(removing)
		if _, err := r.e.Container(keep); err != nil {
			t.Error(err)
		}
		if n := r.node.known(); n != 0 {
			t.Error("a process without a record is still there")
		}
		for _, d := range strays {
			if _, err := os.Stat(d); !os.IsNotExist(err) {
				t.Errorf("%s: %v", d, err)
			}
		}
		r.remove(keep)
		r.empty()
	})
}

func TestReboot(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		type run struct {
			policy  string
			stop    bool // by the user, before
			running bool // afterwards
		}
		ids := map[string]run{}
		for _, c := range []run{
			{"no", false, false}, {"always", false, true}, {"unless-stopped", false, true}, {"on-failure", false, true},
			{"always", true, true}, {"unless-stopped", true, false}, {"on-failure", true, false},
		} {
			name := c.policy
			if c.stop {
				name += "-stopped"
			}
			id := r.started(name, restartPolicy(c.policy, 0))
			if c.stop {
				must(t, r.e.StopContainer(bg, id, nil, ""))
			}
			ids[id] = c
		}
		created := r.container("created", restartPolicy("always", 0))
		job := r.started("job", autoRemove)
		waiting := r.started("waiting", restartPolicy("on-failure", 0))
		r.exit(waiting, 1)
		r.reboot()
		time.Sleep(time.Second)
		synctest.Wait()
		for id, c := range ids {
			if got := r.state(id).Status == engine.StatusRunning; got != c.running {
				t.Errorf("%+v: %+v", c, r.state(id))
			}
		}
		r.is(created, engine.StatusCreated)
		r.is(waiting, engine.StatusRunning)
		r.gone(job)
		for _, c := range r.e.Containers() {
			r.remove(c.Config.ID)
		}
		r.empty()
	})
}

// What a user does while containers are still being started after a reboot must not be mistaken for
// what was lost in it.
func TestStartsDuringTheReconciliation(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
			r.started(name, restartPolicy("always", 0))
		}
		must(t, r.e.Drain(bg))
		plain := r.container("plain")
		r.reboot(func() {
			r.node.set(func(n *node) {
				n.onCreate = func(_ *conn, q runner.CreateRequest) error {
					if q.ID != plain {
						time.Sleep(time.Second)
					}
					return nil
				}
			})
		})
		must(t, r.e.StartContainer(bg, plain))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		r.is(plain, engine.StatusRunning)
		for _, c := range r.e.Containers() {
			r.is(c.Config.ID, engine.StatusRunning)
			r.remove(c.Config.ID)
		}
		r.empty()
	})
}

func TestDrain(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		always, plain := r.started("always", restartPolicy("always", 0)), r.started("plain")
		waiting := r.started("waiting", restartPolicy("unless-stopped", 0))
		byUser := r.started("by-user", restartPolicy("unless-stopped", 0))
		must(t, r.e.StopContainer(bg, byUser, nil, ""))
		r.exit(waiting, 1)
		starting := r.container("starting")
		r.node.set(func(n *node) {
			n.onCreate = func(*conn, runner.CreateRequest) error { time.Sleep(time.Second); return nil }
		})
		done := make(chan error, 1)
		go func() { done <- r.e.StartContainer(bg, starting) }()
		synctest.Wait()
		must(t, r.e.Drain(bg))
		must(t, <-done)
		synctest.Wait()
		if got := r.node.running(); len(got) > 0 {
			t.Errorf("running behind the end: %v", got)
		}
		wantKind(t, r.e.StartContainer(bg, plain), errdefs.ErrUnavailable)
		time.Sleep(time.Hour)
		r.idle()
		if r.networks.torn != 1 {
			t.Error("networks were not torn down")
		}
		r.reopen()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		want := []string{always, waiting}
		slices.Sort(want)
		if got := r.node.running(); !slices.Equal(got, want) {
			t.Errorf("running: %v, want %v", got, want)
		}
		r.is(plain, engine.StatusExited)
		// It fails, and the instance stays.
		r.networks.set(func(f *fakeNetworks) { f.refuseTeardown = errdefs.New(errdefs.ErrUnavailable, "busy") })
		wantKind(t, r.e.Drain(bg), errdefs.ErrUnavailable)
		r.e.Undrain()
		must(t, r.e.StartContainer(bg, always))
		r.exit(always, 1)
		r.is(always, engine.StatusRestarting)
		for _, c := range r.e.Containers() {
			r.remove(c.Config.ID)
		}
		r.empty()
	})
}

// The daemon ends at once, whatever the runner is doing.
func TestEndOfTheDaemon(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		a, b := r.started("a"), r.started("b", autoRemove)
		r.node.die(true)
		r.node.exit(a, 0)
		r.node.exit(b, 0)
		go func() { _ = r.e.StopContainer(bg, a, nil, "") }()
		synctest.Wait()
		r.stop()
		r.node.rise()
		r.open()
		r.is(a, engine.StatusExited)
		r.gone(b)
		r.remove(a)
		r.empty()
	})
	// A dial that never succeeds.
	bubble(t, func(t *testing.T, r *rig) {
		a, b := r.started("a"), r.started("b")
		r.end()
		r.node.exit(a, 0)
		r.node.exit(b, 0)
		<-r.ended
		r.open()
		r.is(a, engine.StatusExited)
		r.remove(a)
		r.remove(b)
		r.empty()
	})
}
