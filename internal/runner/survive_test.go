package runner_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/cgroup"
	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/runner/hold"
)

const numbered = `i=0; while [ $i -lt 10000 ]; do i=$((i+1)); echo $i; done; exit 3`

// lines waits until a spool has at least so many.
func (n *node) lines(dir string, atLeast int) {
	n.t.Helper()
	n.eventually(fmt.Sprint(atLeast, " lines"), func() bool { return strings.Count(n.output(dir, 0), "\n") >= atLeast })
}

func TestRunnerKilledWhileContainerWrites(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", numbered)
	p := n.create(c, r)
	for i := range 5 {
		n.lines(r.IO.Spool, 1+1000*i)
		n.killRunner()
		<-c.Closed()
		c = n.dial()
	}
	if e := n.wait(c, "a"); !e.Known || e.Code != 3 {
		t.Errorf("exit %+v; want 3", e)
	}
	wantLines(t, n.output(r.IO.Spool, 0), 10000)
	list, err := c.List(n.ctx())
	if err != nil || len(list) != 1 || list[0].Process != p {
		t.Errorf("list %+v, %v; want %+v", list, err, p)
	}
	if err := c.Delete(n.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	n.wantNoTraces("a")
}

func TestTerminalOutlivesRunner(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	spec := n.spec("a", "sh", "-c", numbered)
	spec.Process.Terminal = true
	r := n.request("a", spec)
	n.create(c, r)
	spec = n.spec("b", "sh", "-c", "read x; echo got $x")
	spec.Process.Terminal = true
	r2 := n.request("b", spec)
	n.create(c, r2)
	for i := range 4 {
		n.lines(r.IO.Spool, 1+1000*i)
		n.killRunner()
		<-c.Closed()
		c = n.dial()
	}
	if e := n.wait(c, "a"); e.Code != 3 {
		t.Errorf("exit %+v; want 3", e)
	}
	wantLines(t, strings.ReplaceAll(n.output(r.IO.Spool, 0), "\r", ""), 10000)
	in, err := c.OpenStdin(n.ctx(), "b")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := io.WriteString(in, "word\n"); err != nil {
		t.Fatal(err)
	}
	n.wait(c, "b")
	if got := n.output(r2.IO.Spool, 0); !strings.HasSuffix(got, "got word\r\n") {
		t.Errorf("output %q", got)
	}
}

func TestExitsInTheGap(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	// Both wait for the file, which appears while no runner lives.
	script := "while [ ! -e /tmp/go ]; do sleep 0.01; done; echo last; exit "
	r := n.sh("a", script+"21")
	n.create(c, r)
	n.create(c, n.sh("b", "sleep 1000"))
	p := n.spec("b", "sh", "-c", script+"22").Process
	if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: "e", Container: "b", Process: p}); err != nil {
		t.Fatal(err)
	}
	h := n.holder()
	if err := h.Stop(true); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.rootfs+"/tmp/go", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	n.eventually("the holder records two exits", func() bool {
		entries, err := os.ReadDir(filepath.Join(n.root.Run, "exits"))
		return err == nil && len(entries) == 2
	})
	if err := h.Start(); err != nil {
		t.Fatal(err)
	}
	c = n.dial()
	if e := n.wait(c, "a"); !e.Known || e.Code != 21 {
		t.Errorf("exit %+v; want 21", e)
	}
	if e := n.wait(c, "e"); !e.Known || e.Code != 22 {
		t.Errorf("exit of the exec %+v; want 22", e)
	}
	if got := n.output(r.IO.Spool, 0); got != "last\n" {
		t.Errorf("output %q", got)
	}
	if entries, err := os.ReadDir(filepath.Join(n.root.Run, "exits")); err != nil || len(entries) > 0 {
		n.eventually("records are removed", func() bool {
			entries, err := os.ReadDir(filepath.Join(n.root.Run, "exits"))
			return err == nil && len(entries) == 0
		})
	}
}

func TestHolderKilled(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", numbered)
	p := n.create(c, r)
	in := n.request("cat", n.spec("cat", "cat"))
	in.IO.Stdin = true
	n.create(c, in)
	spec := n.spec("tty", "sh", "-c", "read x; echo got $x; exit 12")
	spec.Process.Terminal = true
	tty := n.request("tty", spec)
	n.create(c, tty)
	for i := range 2 {
		n.lines(r.IO.Spool, 1+1000*i)
		before := n.child(hold.Runner)
		status, err := n.holder().Status()
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(status.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-c.Closed() // the old runner has parked all and ended
		c = n.dial()
		after := n.child(hold.Runner)
		if after.PID == before.PID {
			t.Error("the runner is still the old one")
		}
	}
	list, err := c.List(n.ctx())
	if err != nil || len(list) != 3 || list[0].Process != p {
		t.Errorf("list %+v, %v; want %+v first", list, err, p)
	}
	if e := n.wait(c, "a"); !e.Known && kernelTells() || e.Known && e.Code != 3 || !e.Known && e.Code != -1 {
		t.Errorf("exit %+v; want 3", e)
	}
	wantLines(t, n.output(r.IO.Spool, 0), 10000)

	stdin, err := c.OpenStdin(n.ctx(), "cat")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "word"); err != nil {
		t.Fatal(err)
	}
	_ = stdin.Close()
	if err := c.CloseStdin(n.ctx(), "cat"); err != nil {
		t.Fatal(err)
	}
	n.wait(c, "cat")
	if got := n.output(in.IO.Spool, 0); got != "word" {
		t.Errorf("output of cat %q", got)
	}
	stdin, err = c.OpenStdin(n.ctx(), "tty")
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if _, err := io.WriteString(stdin, "word\n"); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "tty"); !e.Known && kernelTells() || e.Known && e.Code != 12 {
		t.Errorf("exit of tty %+v; want 12", e)
	}
	if got := n.output(tty.IO.Spool, 0); !strings.HasSuffix(got, "got word\r\n") {
		t.Errorf("output of tty %q", got)
	}
}

// kernelTells: PIDFD_GET_INFO gives exit codes since Linux 6.15.
func kernelTells() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	_, _ = fmt.Sscanf(string(bytes.TrimRight(u.Release[:], "\x00")), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 15
}

func TestHolderAndRunnerKilledTogether(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "while [ ! -e /tmp/go ]; do sleep 0.01; done; echo last; exit 21")
	n.create(c, r)
	child := n.child(hold.Runner)
	status, err := n.holder().Status()
	if err != nil {
		t.Fatal(err)
	}
	daemon := n.child(hold.Daemon)
	for _, pid := range []int{child.PID, status.PID, daemon.PID} {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	<-c.Closed()
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	n.eventually("a new holder starts", func() bool {
		// A runner that was respawned in between may have started one, and may not live any more.
		err := hold.Launch(context.Background(), n.root, bin, nil)
		if err != nil && !errors.Is(err, errdefs.ErrConflict) {
			t.Fatal(err)
		}
		h, err := hold.Dial(n.root.Socket("holder"))
		if err != nil {
			return false // the one that has the lock is about to die
		}
		defer h.Close()
		_, err = h.Status()
		return err == nil
	})
	c = n.dial()
	if err := os.WriteFile(n.rootfs+"/tmp/go", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "a"); !e.Known && kernelTells() || e.Known && e.Code != 21 {
		t.Errorf("exit %+v; want 21", e)
	}
	if got := n.output(r.IO.Spool, 0); got != "last\n" {
		t.Errorf("output %q", got)
	}
}

func TestCreatedOutlivesRunner(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "echo hello; exit 9")
	r.Start = false
	n.create(c, r)
	n.killRunner()
	<-c.Closed()
	c = n.dial()
	list, err := c.List(n.ctx())
	if err != nil || len(list) != 1 || list[0].State != runner.Created {
		t.Fatalf("list %+v, %v", list, err)
	}
	if err := c.Start(n.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	if e := n.wait(c, "a"); e.Code != 9 {
		t.Errorf("exit %+v", e)
	}
	if got := n.output(r.IO.Spool, 0); got != "hello\n" {
		t.Errorf("output %q", got)
	}
}

// TestRunnerKilledInMidStart kills the runner at many instants of a start: the container is
// then either there as a whole or not at all.
func TestRunnerKilledInMidStart(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	for i := range 20 {
		id := fmt.Sprint("k", i)
		r := n.sh(id, "echo hello; sleep 1000")
		child := n.child(hold.Runner)
		timer := time.AfterFunc(time.Duration(i)*time.Millisecond, func() { _ = syscall.Kill(child.PID, syscall.SIGKILL) })
		_, createErr := c.Create(n.ctx(), r)
		<-c.Closed()
		timer.Stop()
		c = n.dial()
		list, err := c.List(n.ctx())
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case len(list) == 1 && list[0].ID == id && list[0].State != runner.Stopped:
			if list[0].State == runner.Created {
				if err := c.Start(n.ctx(), id); err != nil {
					t.Errorf("%s: start: %v", id, err)
				}
			}
			n.lines(r.IO.Spool, 1)
			if err := c.Delete(n.ctx(), id); err != nil {
				t.Errorf("delete %s: %v", id, err)
			}
		case len(list) != 0 || createErr == nil:
			t.Errorf("%s: list %+v, create: %v", id, list, createErr)
		}
		n.wantNoTraces(id)
	}
}

// TestRunnerKilledInMidExec: an exec'd process is then either known or gone.
func TestRunnerKilledInMidExec(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", "while true; do sleep 1000; done")
	n.create(c, r)
	for i := range 15 {
		id := fmt.Sprint("e", i)
		child := n.child(hold.Runner)
		timer := time.AfterFunc(time.Duration(i)*time.Millisecond, func() { _ = syscall.Kill(child.PID, syscall.SIGKILL) })
		_, execErr := c.Exec(n.ctx(), runner.ExecRequest{
			ID: id, Container: "a", Process: n.spec("a", "sleep", "77777").Process,
			IO: runner.IO{Spool: r.Bundle + "/" + id},
		})
		<-c.Closed()
		timer.Stop()
		c = n.dial()
		list, err := c.List(n.ctx())
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 1 && execErr == nil {
			t.Errorf("%s: it was answered and is not known: %+v", id, list)
		}
		if err := c.Delete(n.ctx(), id); err != nil {
			t.Fatal(err)
		}
		n.eventually(id+" is gone", func() bool {
			pids, err := n.groups.Pids(cgroup.Parent(n.root) + "/a")
			if err != nil {
				t.Fatal(err)
			}
			return len(pids) <= 2 // the container's own
		})
	}
}

func TestRunnerUpgraded(t *testing.T) {
	n := newNode(t)
	c := n.dial()
	r := n.sh("a", numbered)
	n.create(c, r)
	h := n.holder()
	before := n.child(hold.Runner)
	if err := h.Restart(hold.Runner); err != nil {
		t.Fatal(err)
	}
	<-c.Closed()
	after := n.child(hold.Runner)
	if after.PID == before.PID || after.Restarts != before.Restarts+1 {
		t.Errorf("before %+v, after %+v", before, after)
	}
	c = n.dial()
	if v := n.child(hold.Runner).Version; v != "dev" {
		t.Errorf("version %q", v)
	}
	status, err := h.Status()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Reexec(); err != nil {
		t.Fatal(err)
	}
	again, err := h.Status() // on the same connection
	if err != nil || again.PID != status.PID || again.Children[0] != status.Children[0] {
		t.Errorf("status %+v, %v; want %+v", again, err, status)
	}
	select {
	case <-c.Closed():
		t.Error("the runner noticed that the holder was replaced")
	default:
	}
	n.killRunner() // what the holder held before it was replaced is there
	<-c.Closed()
	c = n.dial()
	if e := n.wait(c, "a"); e.Code != 3 {
		t.Errorf("exit %+v", e)
	}
	wantLines(t, n.output(r.IO.Spool, 0), 10000)
}
