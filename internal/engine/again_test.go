package engine_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/runner"
)

func TestBackOff(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("always", 0))
		for i := range 5 {
			r.exit(id, 1)
			s := r.state(id)
			want := 100 * time.Millisecond << i
			if s.Status != engine.StatusRestarting || time.Until(s.NextRestart) != want {
				t.Fatalf("exit %d: %s, next in %s, want in %s", i, s.Status, time.Until(s.NextRestart), want)
			}
			time.Sleep(want - time.Millisecond)
			synctest.Wait()
			r.is(id, engine.StatusRestarting)
			time.Sleep(2 * time.Millisecond)
			synctest.Wait()
			if s = r.state(id); s.Status != engine.StatusRunning || s.RestartCount != i+1 {
				t.Fatalf("exit %d: %+v", i, s)
			}
		}
		time.Sleep(11 * time.Second)
		r.exit(id, 1)
		if d := time.Until(r.state(id).NextRestart); d != 100*time.Millisecond {
			t.Errorf("a long run did not make the back-off forgotten: %s", d)
		}
		must(t, r.e.StopContainer(bg, id, nil, ""))
		r.is(id, engine.StatusExited)
		time.Sleep(time.Hour)
		synctest.Wait()
		r.is(id, engine.StatusExited)
		r.idle()
		r.remove(id)
		r.empty()
	})
}

func TestOnFailure(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("on-failure", 2))
		for range 2 {
			r.exit(id, 1)
			time.Sleep(time.Second)
			synctest.Wait()
			r.is(id, engine.StatusRunning)
		}
		r.exit(id, 1)
		r.is(id, engine.StatusExited)
		must(t, r.e.StartContainer(bg, id)) // by hand: counted anew
		r.exit(id, 1)
		r.is(id, engine.StatusRestarting)
		wantKind(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{}), errdefs.ErrConflict)
		must(t, r.e.StartContainer(bg, id)) // not waiting for the back-off
		r.is(id, engine.StatusRunning)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := r.node.creates; n != 5 {
			t.Errorf("%d starts, want 5: the back-off went on beside the start by hand", n)
		}
		r.exit(id, 0)
		r.is(id, engine.StatusExited)
		r.remove(id)
		r.empty()
	})
}

// A back-off that a start by hand made void must not shorten the next one.
func TestVoidBackOff(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("always", 0))
		r.exit(id, 1)
		time.Sleep(60 * time.Millisecond)
		must(t, r.e.StartContainer(bg, id))
		r.exit(id, 1)
		time.Sleep(60 * time.Millisecond)
		synctest.Wait()
		r.is(id, engine.StatusRestarting)
		time.Sleep(60 * time.Millisecond)
		synctest.Wait()
		r.is(id, engine.StatusRunning)
		r.remove(id)
		r.empty()
	})
}

func TestKillAgainstPolicy(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("always", 0))
		must(t, r.e.KillContainer(bg, id, "SIGUSR1"))
		r.is(id, engine.StatusRunning)
		must(t, r.e.KillContainer(bg, id, ""))
		synctest.Wait()
		if s := r.state(id); s.Status != engine.StatusExited || s.ExitCode != 137 {
			t.Errorf("killed: %+v", s)
		}
		must(t, r.e.StartContainer(bg, id))
		r.exit(id, 1)
		must(t, r.e.KillContainer(bg, id, ""))
		r.is(id, engine.StatusExited)
		must(t, r.e.StartContainer(bg, id))
		r.exit(id, 137) // by somebody else, as the out-of-memory killer
		r.is(id, engine.StatusRestarting)
		r.remove(id)
		r.empty()
	})
}

// A restart that fails is tried again, unless the program is at fault; nothing is held in between.
func TestRestartThatFails(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web", restartPolicy("always", 0), publishing(80))
		r.networks.set(func(f *fakeNetworks) { f.refuseAttach = errdefs.New(errdefs.ErrExhausted, "no address left") })
		r.images.refuseWith(errdefs.New(errdefs.ErrExhausted, "disk full"))
		r.exit(id, 1)
		time.Sleep(250 * time.Millisecond)
		synctest.Wait()
		if s := r.state(id); s.Status != engine.StatusRestarting || s.Error == "" {
			t.Errorf("state %+v", s)
		}
		r.images.refuseWith(nil)
		r.networks.set(func(f *fakeNetworks) { f.refuseAttach = nil })
		time.Sleep(time.Second)
		synctest.Wait()
		r.is(id, engine.StatusRunning)
		r.refuseCreate(errdefs.ErrNoProgram, errdefs.ErrNoProgram)
		r.exit(id, 1)
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := r.state(id); s.Status != engine.StatusExited || s.ExitCode != 127 {
			t.Errorf("state %+v", s)
		}
		r.idle()
		r.remove(id)
		r.empty()
	})
}

func TestRunnerDiesInAStart(t *testing.T) {
	for _, c := range []struct {
		name string
		// before the process exists; after it does
		before, after func(n *node, c *conn, id string)
		want          engine.Status
		code          int
		creates       int
	}{
		{"before the process exists", func(n *node, _ *conn, _ string) { n.die(false) }, nil, engine.StatusRunning, 0, 2},
		{"before, and stays away for a while", func(n *node, _ *conn, _ string) {
			n.die(true)
			time.AfterFunc(3*time.Second, n.rise)
		}, nil, engine.StatusRunning, 0, 2},
		{"behind it", nil, func(n *node, _ *conn, _ string) { n.die(false) }, engine.StatusRunning, 0, 1},
		{"behind it, and the process ends unseen", nil, func(n *node, _ *conn, id string) {
			n.die(true)
			n.exit(id, 9)
			time.AfterFunc(time.Second, n.rise)
		}, engine.StatusExited, 9, 1},
		{"behind it, and the process is lost", nil, func(n *node, _ *conn, id string) { n.lose(id); n.die(false) }, engine.StatusRunning, 0, 2},
		{"half made", nil, func(n *node, _ *conn, id string) {
			n.set(func(n *node) { n.procs[id].state = runner.Created })
			n.die(false)
		}, engine.StatusRunning, 0, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				first := true
				r.node.set(func(n *node) {
					n.onCreate = func(cn *conn, q runner.CreateRequest) error {
						if first && c.before != nil {
							first = false
							c.before(n, cn, q.ID)
							return errdefs.New(errdefs.ErrUnavailable, "the connection is lost")
						}
						return nil
					}
					n.afterCreate = func(cn *conn, id string) {
						if first && c.after != nil {
							first = false
							c.after(n, cn, id)
						}
					}
				})
				id := r.container("web")
				must(t, r.e.StartContainer(bg, id))
				synctest.Wait()
				if s := r.state(id); s.Status != c.want || s.ExitCode != c.code {
					t.Errorf("state %+v", s)
				}
				if r.node.creates != c.creates {
					t.Errorf("%d creations, want %d", r.node.creates, c.creates)
				}
				if c.want == engine.StatusRunning {
					r.exit(id, 2)
					r.is(id, engine.StatusExited)
				}
				r.idle()
				r.remove(id)
				r.empty()
			})
		})
	}
}

// The answer to a start arrives; before it is recorded the runner dies and the process with it.
func TestRunnerDiesBeforeTheRecord(t *testing.T) {
	for _, lost := range []bool{false, true} {
		bubble(t, func(t *testing.T, r *rig) {
			r.node.set(func(n *node) {
				n.answered = true
				n.afterCreate = func(_ *conn, id string) {
					n.die(true)
					if lost {
						n.lose(id)
					} else {
						n.exit(id, 3)
					}
					n.rise()
					time.Sleep(time.Second) // the next connection has seen all there is
				}
			})
			id := r.container("web")
			must(t, r.e.StartContainer(bg, id))
			synctest.Wait()
			r.is(id, engine.StatusExited)
			r.idle()
			r.remove(id)
			r.empty()
		})
	}
}

func TestRunnerStaysAway(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		running, id := r.started("running"), r.container("web")
		r.node.die(true)
		wantKind(t, r.e.StartContainer(bg, id), errdefs.ErrUnavailable)
		r.is(id, engine.StatusCreated)
		r.is(running, engine.StatusRunning)
		r.node.rise()
		time.Sleep(time.Second)
		synctest.Wait()
		r.is(running, engine.StatusRunning)
		must(t, r.e.StartContainer(bg, id))
		// A start that was given up, though the process came to be.
		must(t, r.e.StopContainer(bg, id, nil, ""))
		r.node.set(func(n *node) {
			n.afterCreate = func(*conn, string) { n.die(true); n.set(func(n *node) { n.afterCreate = nil }) }
		})
		wantKind(t, r.e.StartContainer(bg, id), errdefs.ErrUnavailable)
		r.node.rise()
		time.Sleep(time.Second)
		synctest.Wait()
		if got := r.node.running(); !slices.Equal(got, []string{running}) {
			t.Errorf("running: %v; the process of a failed start was not ended", got)
		}
		must(t, r.e.StartContainer(bg, id))
		r.remove(id)
		r.remove(running)
		r.empty()
	})
}

func TestExitsWhileTheRunnerIsAway(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		a, b, c := r.started("a"), r.started("b"), r.started("c")
		next := r.wait(a, engine.WaitNextExit)
		r.node.die(true)
		r.node.exit(a, 6)
		r.node.lose(b)
		r.node.rise()
		time.Sleep(time.Second)
		if w := r.result(next); w.ExitCode != 6 {
			t.Errorf("got %+v", w)
		}
		if s := r.state(b); s.Status != engine.StatusExited || s.ExitKnown || s.ExitCode != 255 {
			t.Errorf("lost: %+v", s)
		}
		r.is(c, engine.StatusRunning)
		// Exits of earlier runs are nobody's.
		r.node.send(runner.Event{Kind: runner.EventExit, ID: c, PID: 1, Exit: runner.Exit{Known: true, Code: 1}})
		r.node.send(runner.Event{Kind: runner.EventExit, ID: "unknown", PID: 1})
		synctest.Wait()
		r.is(c, engine.StatusRunning)
		for _, id := range []string{a, b, c} {
			r.remove(id)
		}
		r.empty()
	})
}

func TestStopWhileTheRunnerIsAway(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web")
		r.node.die(true)
		time.AfterFunc(2*time.Second, r.node.rise)
		must(t, r.e.StopContainer(bg, id, nil, ""))
		r.is(id, engine.StatusExited)
		r.remove(id)
		r.empty()
	})
}

func TestUpdateOfThePolicy(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web")
		must(t, r.e.UpdateContainer(bg, id, &engine.Resources{MemoryBytes: 1 << 20}, &engine.RestartPolicy{Name: "always"}))
		r.exit(id, 0)
		r.is(id, engine.StatusRestarting)
		time.Sleep(time.Second)
		synctest.Wait()
		must(t, r.e.UpdateContainer(bg, id, nil, &engine.RestartPolicy{Name: "no"}))
		r.exit(id, 0)
		r.is(id, engine.StatusExited)
		r.remove(id)
		r.empty()
	})
}
