package runner_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/cgroup"
	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/spool"
)

func TestRunToExit(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "echo out; echo err >&2; echo re > /dev/stdout; exit 7")
	p := n.create(c, r)
	if p.ID != "a" || p.Container != "a" || p.PID <= 1 || p.StartTime == 0 {
		t.Errorf("Create gave %+v", p)
	}
	if e := n.wait(c, "a"); !e.Known || e.Code != 7 || e.Signal != 0 || e.OOMKilled {
		t.Errorf("exit %+v; want code 7", e)
	}
	if got := n.output(r.IO.Spool, spool.Stdout); got != "out\nre\n" {
		t.Errorf("stdout %q", got)
	}
	if got := n.output(r.IO.Spool, spool.Stderr); got != "err\n" {
		t.Errorf("stderr %q", got)
	}
	if _, err := c.Create(n.ctx(), r); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("second create: %v", err)
	}
	list, err := c.List(n.ctx())
	if err != nil || len(list) != 1 || list[0].State != runner.Stopped || list[0].Exit.Code != 7 {
		t.Errorf("list %+v, %v", list, err)
	}
	if err := c.Kill(n.ctx(), "a", 15, false); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("kill of a dead one: %v", err)
	}
	for range 2 {
		if err := c.Delete(n.ctx(), "a"); err != nil {
			t.Error(err)
		}
	}
	n.wantNoTraces("a")
	if _, err := c.Wait(n.ctx(), "a"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("wait for a deleted one: %v", err)
	}
}

func TestEvents(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	p := n.create(c, n.sh("a", "echo hello; exit 3"))
	output := false
	for e := range c.Events() {
		if e.Kind == runner.EventOutput {
			output = true
			continue
		}
		if e.ID != "a" || e.PID != p.PID || e.Exit.Code != 3 || !output {
			t.Errorf("event %+v, output told: %v", e, output)
		}
		return
	}
	t.Error("events ended")
}

// A client that comes after one which died in a start must see what becomes of that: nothing, or
// a container that runs, in the first list already.
func TestStartOfOneThatLeft(t *testing.T) {
	n := newNode(t)
	second := n.dial()
	for i := range 20 {
		id := fmt.Sprint("left", i)
		first := n.dial()
		request := n.sh(id, "sleep 1000")
		asked := make(chan error, 1)
		go func() {
			_, err := first.Create(n.ctx(), request)
			asked <- err
		}()
		<-time.After(time.Duration(i) * time.Millisecond)
		_ = first.Close()
		at, err := n.state(second, id)
		if err != nil || at != "" && at != runner.Running {
			t.Errorf("%s: first seen as %q, %v", id, at, err)
		}
		<-asked
		<-time.After(10 * time.Millisecond) // it must not come later
		if later, err := n.state(second, id); err != nil || later != at {
			t.Errorf("%s: first seen as %q, then as %q, %v", id, at, later, err)
		}
		if err := second.Delete(n.ctx(), id); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			t.Error(err)
		}
		n.wantNoTraces(id)
	}
}

// state is what the runner lists a process as; "" when it does not.
func (n *node) state(c *runner.Client, id string) (runner.State, error) {
	list, err := c.List(n.ctx())
	for _, st := range list {
		if st.ID == id {
			return st.State, err
		}
	}
	return "", err
}

func TestProgramsThatCannotStart(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	if err := os.WriteFile(n.rootfs+"/tmp/plain", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.create(c, n.sh("base", "sleep 1000"))
	for i, test := range []struct {
		args []string
		cwd  string
		kind error
		text string
	}{
		{[]string{"nosuch"}, "/", errdefs.ErrNoProgram, `exec: "nosuch": executable file not found in $PATH`},
		{[]string{"/no/such"}, "/", errdefs.ErrNoProgram, `exec: "/no/such": stat /no/such: no such file or directory`},
		{[]string{"/tmp/plain"}, "/", errdefs.ErrInvocation, `exec: "/tmp/plain": permission denied`},
		{[]string{"/tmp"}, "/", errdefs.ErrInvocation, `exec: "/tmp": is a directory`},
		{[]string{"true"}, "/tmp/plain", errdefs.ErrInvocation, "not a directory"},
		{nil, "/", errdefs.ErrInvalid, "no command"},
	} {
		id := fmt.Sprint("x", i)
		spec := n.spec(id, test.args...)
		spec.Process.Cwd = test.cwd
		_, err := c.Create(n.ctx(), n.request(id, spec))
		if !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("create %v: %v; want %v: %s", test.args, err, test.kind, test.text)
		}
		n.wantNoTraces(id)
		_, err = c.Exec(n.ctx(), runner.ExecRequest{ID: "e" + id, Container: "base", Process: spec.Process})
		if !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("exec %v: %v; want %v: %s", test.args, err, test.kind, test.text)
		}
		if left := n.traces("e" + id); len(left) > 0 {
			t.Errorf("left of exec %v: %v", test.args, left)
		}
	}
	if list, err := c.List(n.ctx()); err != nil || len(list) != 1 || list[0].State != runner.Running {
		t.Errorf("list %+v, %v", list, err)
	}
}

func TestExec(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "sleep 1000")
	n.create(c, r)
	p := n.spec("a", "sh", "-c", "id -u; echo user > /dev/stdout; exit 5").Process
	p.User = specs.User{UID: 1000, GID: 1000}
	dir := r.Bundle + "/exec-spool"
	got, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "e", Container: "a", Process: p, IO: runner.IO{Spool: dir}})
	if err != nil || got.Container != "a" || got.ID != "e" {
		t.Fatalf("exec: %+v, %v", got, err)
	}
	if e := n.wait(c, "e"); e.Code != 5 {
		t.Errorf("exit %+v", e)
	}
	if out := n.output(dir, 0); out != "1000\nuser\n" {
		t.Errorf("output %q", out)
	}
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "f", Container: "none", Process: p}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("exec in nothing: %v", err)
	}
	p.Args = []string{"sleep", "1000"}
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "g", Container: "a", Process: p}); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(n.ctx(), "a", 9, false); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "a"); e.Code != 137 || e.Signal != 9 || e.OOMKilled {
		t.Errorf("exit %+v", e)
	}
	if e := n.wait(c, "g"); e.Code != 137 {
		t.Errorf("exec's exit %+v", e)
	}
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "h", Container: "a", Process: p}); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("exec in a dead container: %v", err)
	}
	if err := c.Delete(n.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "e", "g"} {
		n.wantNoTraces(id)
	}
	if list, err := c.List(n.ctx()); err != nil || len(list) != 0 {
		t.Errorf("list %+v, %v", list, err)
	}
}

func TestStdin(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "cat; echo end")
	r.IO.Stdin = true
	n.create(c, r)
	in, err := c.OpenStdin(n.ctx(), "a")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("0123456789abcdef\n", 20000)
	if _, err := io.WriteString(in, text); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.CloseStdin(n.ctx(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "a"); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	if got := n.output(r.IO.Spool, 0); got != text+"end\n" {
		t.Errorf("%d bytes of output; want %d", len(got), len(text)+4)
	}
	if _, err := c.OpenStdin(n.ctx(), "a"); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("stdin of a dead one: %v", err)
	}
}

func TestNoStdinIsNull(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	n.create(c, n.sh("a", "cat"))
	if e := n.wait(c, "a"); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	if _, err := c.OpenStdin(n.ctx(), "a"); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("stdin of one without: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	spec := n.spec("a", "sh", "-c", "stty size; read x; stty size; echo got $x; exit 4")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Height: 11, Width: 22}
	r := n.request("a", spec)
	n.create(c, r)
	n.eventually("the first size is printed", func() bool { return strings.Contains(n.output(r.IO.Spool, 0), "11 22\r\n") })
	if err := c.Resize(n.ctx(), "a", 33, 44); err != nil {
		t.Fatal(err)
	}
	in, err := c.OpenStdin(n.ctx(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := io.WriteString(in, "word\n"); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "a"); e.Code != 4 {
		t.Errorf("exit %+v", e)
	}
	if got, want := n.output(r.IO.Spool, spool.Stdout), "11 22\r\nword\r\n33 44\r\ngot word\r\n"; got != want {
		t.Errorf("output %q; want %q", got, want)
	}
	if err := c.Resize(n.ctx(), "a", 1, 1); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("resize of a dead one: %v", err)
	}
}

func TestTerminalOutputIsWhole(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	spec := n.spec("a", "seq", "1", "30000")
	spec.Process.Terminal = true
	r := n.request("a", spec)
	n.create(c, r)
	n.wait(c, "a")
	wantLines(t, strings.ReplaceAll(n.output(r.IO.Spool, 0), "\r", ""), 30000)
}

func wantLines(t *testing.T, got string, upTo int) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	for i := range min(len(lines), upTo) {
		if lines[i] != fmt.Sprint(i+1) {
			t.Fatalf("line %d is %q", i+1, lines[i])
		}
	}
	if len(lines) != upTo {
		t.Errorf("%d lines; want %d", len(lines), upTo)
	}
}

func TestCreateThenStart(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "exit 9")
	r.Start = false
	n.create(c, r)
	list, err := c.List(n.ctx())
	if err != nil || len(list) != 1 || list[0].State != runner.Created {
		t.Fatalf("list %+v, %v", list, err)
	}
	if err := c.Start(n.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(n.ctx(), "a"); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("second start: %v", err)
	}
	if e := n.wait(c, "a"); e.Code != 9 {
		t.Errorf("exit %+v", e)
	}
	r = n.sh("b", "exit 9")
	r.Start = false
	n.create(c, r)
	if err := c.Delete(n.ctx(), "b"); err != nil {
		t.Fatal(err)
	}
	n.wantNoTraces("b")
}

func TestPauseUpdateKill(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	n.create(c, n.sh("a", "trap 'exit 6' USR1; while true; do sleep 0.01; done"))
	if err := c.Resume(n.ctx(), "a"); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("resume of one that runs: %v", err)
	}
	if err := c.Pause(n.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	if list, err := c.List(n.ctx()); err != nil || list[0].State != runner.Paused {
		t.Errorf("list %+v, %v", list, err)
	}
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "e", Container: "a", Process: n.spec("a", "true").Process}); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("exec in a paused one: %v", err)
	}
	if err := c.Resume(n.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	n.testUpdate(c, "a")
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "e", Container: "a", Process: n.spec("a", "true").Process}); err != nil {
		t.Errorf("exec after an update: %v", err)
	}
	if err := c.Kill(n.ctx(), "a", int(syscall.SIGUSR1), false); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "a"); e.Code != 6 {
		t.Errorf("exit %+v", e)
	}
	n.create(c, n.sh("b", "sleep 1000"))
	if err := c.Pause(n.ctx(), "b"); err != nil {
		t.Fatal(err)
	}
	if err := c.Kill(n.ctx(), "b", 9, true); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "b"); e.Code != 137 {
		t.Errorf("exit %+v", e)
	}
}

func (n *node) testUpdate(c *runner.Client, id string) {
	t := n.t
	t.Helper()
	if n.groups.Path("memory", "/") == "" || n.groups.Path("pids", "/") == "" {
		t.Log("limits are not changed: the kernel has no memory or no pids controller")
		return
	}
	memory, pids := int64(64<<20), int64(77)
	err := c.Update(n.ctx(), id, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}, Pids: &specs.LinuxPids{Limit: &pids}})
	if err != nil {
		t.Fatal(err)
	}
	stats, err := n.groups.Read(cgroup.Parent(n.root) + "/" + id)
	if err != nil || stats.MemoryLimit != uint64(memory) || stats.PidsLimit != uint64(pids) || stats.Pids == 0 || stats.CPUNanos == 0 {
		t.Errorf("stats %+v, %v", stats, err)
	}
}

func TestOutOfMemory(t *testing.T) {
	n := newNode(t)
	if n.groups.Path("memory", "/") == "" {
		t.Skip("the kernel has no memory controller")
	}
	c := n.dial()
	spec := n.spec("a", "sh", "-c", "x=0123456789abcdef; while true; do x=$x$x; done")
	limit := int64(32 << 20)
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	n.create(c, n.request("a", spec))
	if e := n.wait(c, "a"); e.Code != 137 || !e.OOMKilled {
		t.Errorf("exit %+v; want an out-of-memory kill", e)
	}
}

func TestInit(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(bin + "/berth-init")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.rootfs+"/bin/berth-init", raw, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, test := range []struct {
		script string
		signal int
		code   int
	}{
		{"exit 8", 0, 8},
		{"kill -9 $$", 0, 137},
		{"trap 'exit 44' TERM; echo up; while true; do sleep 0.01; done", 15, 44},
		{"echo up; sleep 1000", 15, 143},
	} {
		id := fmt.Sprint("i", i)
		n.create(c, n.request(id, n.spec(id, "berth-init", "--", "sh", "-c", test.script)))
		if test.signal != 0 {
			n.eventually("it is up", func() bool { return n.output(n.root.State+"/bundles/"+id+"/spool", 0) != "" })
			if err := c.Kill(n.ctx(), id, test.signal, false); err != nil {
				t.Fatal(err)
			}
		}
		if e := n.wait(c, id); e.Code != test.code {
			t.Errorf("%s: exit %+v; want %d", test.script, e, test.code)
		}
	}
}

// TestExecLeavesWriterBehind: a process that an exec'd shell leaves behind must neither be
// waited for nor come to a halt when nobody reads what it writes.
func TestExecLeavesWriterBehind(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "sleep 1000")
	n.create(c, r)
	dir := r.Bundle + "/exec-spool"
	// Three MiB are more than any pipe holds.
	script := "(while [ ! -e /tmp/go ]; do sleep 0.01; done; seq 1 500000; echo done > /tmp/done) & echo first"
	p := n.spec("a", "sh", "-c", script).Process
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "e", Container: "a", Process: p, IO: runner.IO{Spool: dir}}); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "e"); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	if got := n.output(dir, 0); got != "first\n" {
		t.Errorf("output %q", got)
	}
	if err := c.Delete(n.ctx(), "e"); err != nil {
		t.Fatal(err)
	}
	n.killRunner()
	<-c.Closed()
	n.dial()
	if err := os.WriteFile(n.rootfs+"/tmp/go", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	n.eventually("the writer is done", func() bool {
		_, err := os.Stat(n.rootfs + "/tmp/done")
		return err == nil
	})
	n.eventually("the holder has let go", func() bool {
		keys, err := n.holder().List("rest/")
		return err == nil && len(keys) == 0
	})
}
