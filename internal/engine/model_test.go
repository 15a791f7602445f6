package engine_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/runner"
)

// checked runs a property in a bubble, with a rig for each case. What rapid prints on failure
// repeats the case.
func checked(t *testing.T, prop func(rt *rapid.T, r *rig)) {
	needRoot(t)
	synctest.Test(t, func(t *testing.T) {
		hidden := struct{ rapid.TB }{t} // rapid would ask for the deadline, which a bubble has not
		rapid.Check(hidden, func(rt *rapid.T) {
			r := newRig(rt)
			defer r.close()
			r.open()
			prop(rt, r)
			for _, c := range r.e.Containers() {
				r.remove(c.Config.ID)
			}
			r.empty()
		})
	})
}

// actor does random things to few containers with few names.
type actor struct {
	rt    *rapid.T
	r     *rig
	names []string
}

func (a *actor) draw(label string, n int) int { return rapid.IntRange(0, n-1).Draw(a.rt, label) }

// some picks a container; nil when there is none. The order is that of names, to be repeatable.
func (a *actor) some() *engine.Container {
	all := a.r.e.Containers()
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(x, y engine.Container) int { return strings.Compare(x.Config.Name, y.Config.Name) })
	return &all[a.draw("which", len(all))]
}

func live(s engine.Status) bool { return s == engine.StatusRunning || s == engine.StatusPaused }

// expect fails unless err is of the kind; nil means success.
func (a *actor) expect(what string, c *engine.Container, err, kind error) {
	if kind == nil && err != nil || kind != nil && errdefs.Kind(err) != kind {
		a.rt.Fatalf("%s %s (%s): got %v, want kind %v", what, c.Config.Name, c.State.Status, err, kind)
	}
}

func when(cond bool, kind error) error {
	if cond {
		return kind
	}
	return nil
}

func (a *actor) create() {
	alter := []alter{restartPolicy([]string{"no", "always", "on-failure", "unless-stopped"}[a.draw("policy", 4)], 2)}
	if a.draw("rm", 4) == 0 {
		alter = []func(*engine.ContainerConfig, *engine.SandboxConfig){autoRemove}
	}
	if c := a.some(); c != nil && a.draw("shared", 4) == 0 {
		alter = append(alter, inSandboxOf(c.Config.Sandbox))
	}
	name := a.names[a.draw("name", len(a.names))]
	_, held := a.r.e.Container(name)
	_, err := a.r.tryContainer(name, alter...)
	a.expect("create", &engine.Container{Config: engine.ContainerConfig{Name: name}}, err, when(held == nil, errdefs.ErrConflict))
}

// act does one thing and checks what the present state says about its success.
func (a *actor) act() {
	c := a.some()
	op := a.draw("op", 16)
	if c == nil || op == 0 {
		a.create()
		return
	}
	id, st, e := c.Config.ID, c.State.Status, a.r.e
	switch op {
	case 1, 2, 3:
		kind := when(st == engine.StatusRunning, errdefs.ErrNotModified)
		if st == engine.StatusPaused {
			kind = errdefs.ErrConflict
		}
		a.expect("start", c, e.StartContainer(bg, id), kind)
	case 4:
		a.expect("stop", c, e.StopContainer(bg, id, nil, ""), when(!live(st) && st != engine.StatusRestarting, errdefs.ErrNotModified))
	case 5:
		a.expect("kill", c, e.KillContainer(bg, id, ""), when(!live(st) && st != engine.StatusRestarting, errdefs.ErrConflict))
	case 6:
		a.r.node.exit(id, a.draw("code", 2))
	case 7:
		a.expect("pause", c, e.PauseContainer(bg, id), when(st != engine.StatusRunning, errdefs.ErrConflict))
	case 8:
		a.expect("unpause", c, e.UnpauseContainer(bg, id), when(st != engine.StatusPaused, errdefs.ErrConflict))
	case 9:
		name := a.names[a.draw("name", len(a.names))]
		_, held := e.Container(name)
		kind := when(held == nil, errdefs.ErrConflict)
		if name == c.Config.Name {
			kind = errdefs.ErrInvalid
		}
		a.expect("rename", c, e.RenameContainer(bg, id, name), kind)
	case 10:
		force := a.draw("force", 2) == 0
		kind := when(!force && (live(st) || st == engine.StatusRestarting), errdefs.ErrConflict)
		a.expect("remove", c, e.RemoveContainer(bg, id, engine.RemoveOptions{Force: force}), kind)
	case 11:
		a.expect("restart", c, e.RestartContainer(bg, id, nil, ""), nil)
	case 12:
		a.breakRunner(id)
	case 13, 14:
		a.troubledStart(id)
	case 15:
		a.r.stop()
		a.disturb(id)
		if a.draw("reboot", 3) == 0 {
			a.r.open()
			a.r.reboot()
		} else {
			a.r.open()
		}
	}
}

// troubledStart starts with something going wrong. It may fail, but only in one piece.
func (a *actor) troubledStart(id string) {
	n, trouble := a.r.node, a.draw("trouble", 5)
	var once sync.Once
	n.set(func(n *node) {
		n.onCreate = func(*conn, runner.CreateRequest) (err error) {
			once.Do(func() {
				switch trouble {
				case 0:
					err = errdefs.New(errdefs.ErrExhausted, "no memory")
				case 1:
					err = errdefs.New(errdefs.ErrNoProgram, "no such program")
				case 2:
					n.die(false)
				}
			})
			return err
		}
		n.afterCreate = func(_ *conn, id string) {
			once.Do(func() {
				n.die(false)
				if trouble == 4 {
					n.exit(id, 1)
				}
			})
		}
	})
	if err := a.r.e.StartContainer(bg, id); err != nil && errdefs.Kind(err) == nil {
		a.rt.Fatalf("a start gave %v", err)
	}
	synctest.Wait()
	n.set(func(n *node) { n.onCreate, n.afterCreate = nil, nil })
	time.Sleep(time.Second) // a restart policy may have come to it as well
}

func (a *actor) breakRunner(id string) {
	a.r.node.die(true)
	a.disturb(id)
	a.r.node.rise()
	time.Sleep(time.Second)
}

// disturb changes what runs while nobody looks.
func (a *actor) disturb(id string) {
	switch a.draw("meanwhile", 3) {
	case 0:
		a.r.node.exit(id, a.draw("code", 2))
	case 1:
		a.r.node.lose(id)
	}
}

// invariants hold whenever nothing is under way.
func (a *actor) invariants() {
	synctest.Wait()
	a.r.consistent(a.rt)
}

func (r *rig) consistent(t tester) {
	t.Helper()
	var run []string
	names := map[string]bool{}
	occupied := map[string]bool{}
	for _, c := range r.e.Containers() {
		id, st := c.Config.ID, c.State
		if names[c.Config.Name] {
			t.Errorf("two containers are named %s", c.Config.Name)
		}
		names[c.Config.Name] = true
		if v, err := r.e.Container(c.Config.Name); err != nil || v.Config.ID != id {
			t.Errorf("name %s leads to %s, %v", c.Config.Name, v.Config.ID, err)
		}
		_, err := os.Stat(r.root.Container(id) + "/rootfs/etc/passwd")
		switch {
		case live(st.Status):
			run = append(run, id)
			if st.PID != r.node.pid(id) {
				t.Errorf("%s: pid %d, the process has %d", c.Config.Name, st.PID, r.node.pid(id))
			}
			if err != nil {
				t.Errorf("%s runs without files", c.Config.Name)
			}
		case st.Status == engine.StatusRestarting:
			if time.Until(st.NextRestart) < 0 {
				t.Errorf("%s was to be restarted %s ago", c.Config.Name, time.Since(st.NextRestart))
			}
		case err == nil:
			t.Errorf("%s is %s with its files mounted", c.Config.Name, st.Status)
		case st.PID != 0 || !st.NextRestart.IsZero() || st.Status == engine.StatusRemoving:
			t.Errorf("%s: %+v", c.Config.Name, st)
		}
		if live(st.Status) || st.Status == engine.StatusRestarting {
			occupied[c.Config.Sandbox] = occupied[c.Config.Sandbox] || live(st.Status)
		}
	}
	slices.Sort(run)
	if got := r.node.running(); !slices.Equal(got, run) {
		t.Errorf("running by the records: %v\nby the runner: %v", run, got)
	}
	for _, b := range r.e.Sandboxes() {
		lively, some := occupied[b.Config.ID]
		if b.State.Ready != r.networks.hasSpaces(b.Config.ID) || lively && !b.State.Ready || !some && b.State.Ready {
			t.Errorf("sandbox %s: ready %v, namespaces %v, occupied %v, by what runs %v", b.Config.ID, b.State.Ready, r.networks.hasSpaces(b.Config.ID), some, lively)
		}
	}
	if n, m := r.store.count("container"), len(names); n != m {
		t.Errorf("%d records of %d containers", n, m)
	}
	if n, m := r.store.count("sandbox"), len(r.e.Sandboxes()); n != m {
		t.Errorf("%d records of %d sandboxes", n, m)
	}
}

// Whatever is done in whatever order: each step succeeds or is refused as the state says, and
// records, processes, sandboxes and mounts agree.
func TestLifeProperty(t *testing.T) {
	checked(t, func(rt *rapid.T, r *rig) {
		a := &actor{rt: rt, r: r, names: []string{"w", "x", "y", "z"}}
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			a.act()
			a.invariants()
			if a.draw("pass", 3) == 0 {
				time.Sleep(time.Duration(a.draw("seconds", 20)) * time.Second)
				a.invariants()
			}
		}
	})
}

// Several clients at once, with a runner that dies and delays under them: errors are of a kind,
// nothing hangs, and what is left agrees.
func TestConcurrentLifeProperty(t *testing.T) {
	checked(t, func(rt *rapid.T, r *rig) {
		for i := range 3 {
			r.container(fmt.Sprintf("n%d", i), []alter{autoRemove, restartPolicy("always", 0), restartPolicy("on-failure", 1)}[i])
		}
		slow := rapid.SliceOfN(rapid.IntRange(0, 3), 1, 4).Draw(rt, "delays")
		var mu sync.Mutex
		at := 0
		r.node.set(func(n *node) {
			n.onCreate = func(*conn, runner.CreateRequest) error {
				mu.Lock()
				at++
				d := slow[at%len(slow)]
				mu.Unlock()
				time.Sleep(time.Duration(d) * 50 * time.Millisecond)
				return nil
			}
		})
		var wg sync.WaitGroup
		for k := range 3 {
			script := rapid.SliceOfN(rapid.IntRange(0, 29), 1, 8).Draw(rt, fmt.Sprintf("client %d", k))
			wg.Go(func() {
				for _, s := range script {
					r.concurrent(rt, s/3, fmt.Sprintf("n%d", s%3))
					time.Sleep(time.Duration(s) * 7 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		r.consistent(rt)
	})
}

// concurrent does one thing, whatever comes of it.
func (r *rig) concurrent(t tester, op int, name string) {
	var err error
	two := time.Second
	switch op {
	case 0, 1:
		err = r.e.StartContainer(bg, name)
	case 2:
		err = r.e.StopContainer(bg, name, &two, "")
	case 3:
		err = r.e.KillContainer(bg, name, "")
	case 4:
		err = r.e.RestartContainer(bg, name, &two, "")
	case 5:
		if err = r.e.PauseContainer(bg, name); err == nil {
			err = r.e.UnpauseContainer(bg, name)
		}
	case 6:
		if err = r.e.RenameContainer(bg, name, "tmp"); err == nil {
			err = r.e.RenameContainer(bg, "tmp", name)
		}
	case 7:
		err = r.e.RemoveContainer(bg, name, engine.RemoveOptions{Force: true})
	case 8:
		if c, found := r.e.Container(name); found == nil {
			r.node.exit(c.Config.ID, 1)
		}
	case 9:
		r.node.die(true)
		if c, found := r.e.Container(name); found == nil {
			r.node.exit(c.Config.ID, 1)
		}
		time.Sleep(300 * time.Millisecond)
		r.node.rise()
	}
	if err != nil && errdefs.Kind(err) == nil {
		t.Errorf("operation %d on %s: %v", op, name, err)
	}
}
