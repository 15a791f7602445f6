package hold_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/errdefs"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

const patience = 20 * time.Second

// sockets is what package network asks for.
type sockets interface {
	Keep(key string, fds ...int) error
	Take(key string) ([]int, error)
	Drop(key string) error
}

var _ sockets = (*hold.Client)(nil)

// start runs a holder with children that only sleep, the daemon with an argument.
func start(t *testing.T) (state.Root, *hold.Client, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "bh")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	bin := filepath.Join(dir, "bin")
	if out, err := exec.Command("go", "build", "-o", bin+"/berth-holder", "berth/cmd/berth-holder").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{hold.Runner, hold.Daemon} {
		script := fmt.Sprintf("#!/bin/sh\necho \"$@\" >> %s/%s.args\nexec sleep 1000000\n", dir, name)
		if err := os.WriteFile(filepath.Join(bin, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root, err := state.NewRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Launch(context.Background(), root, bin, []string{"--word", "two words"}); err != nil {
		t.Fatal(err)
	}
	c, err := hold.Dial(root.Socket("holder"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if again, err := hold.Dial(root.Socket("holder")); err == nil { // not stopped by the test
			_ = again.Stop(false)
			_ = again.Close()
		}
		_ = c.Close()
	})
	for _, name := range []string{hold.Runner, hold.Daemon} {
		eventually(t, name+" is up", func() bool {
			raw, _ := os.ReadFile(filepath.Join(dir, name+".args"))
			return len(raw) > 0
		})
	}
	return root, c, bin
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

func child(t *testing.T, c *hold.Client, name string) hold.Child {
	t.Helper()
	s, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, child := range s.Children {
		if child.Name == name {
			return child
		}
	}
	t.Fatalf("no %s in %+v", name, s)
	return hold.Child{}
}

func TestKeepsDescriptors(t *testing.T) {
	_, c, _ := start(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := c.Keep("a/1", int(r.Fd()), int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	for range 2 { // what is taken stays
		fds, err := c.Take("a/1")
		if err != nil || len(fds) != 2 {
			t.Fatalf("Take: %v, %v", fds, err)
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fds[0]), syscall.F_GETFD, 0)
		if errno != 0 || flags&syscall.FD_CLOEXEC == 0 {
			t.Errorf("a taken descriptor has the flags %#x, %v; want close-on-exec", flags, errno)
		}
		if _, err := syscall.Write(fds[1], []byte("x")); err != nil {
			t.Error(err)
		}
		wire.CloseAll(fds)
	}
	if fds, err := c.Take("a/2"); err != nil || fds != nil {
		t.Errorf("Take of nothing: %v, %v", fds, err)
	}
	if err := c.Drop("a/1"); err != nil {
		t.Fatal(err)
	}
	// All writers are closed now: after the two bytes comes the end.
	buf := make([]byte, 10)
	if n, err := r.Read(buf); n != 2 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
	if n, _ := r.Read(buf); n != 0 {
		t.Errorf("read %d bytes behind the end", n)
	}
	for _, key := range []string{"", strings.Repeat("k", wire.MaxKey+1)} {
		if err := c.Keep(key, 0); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("Keep(%.10q…): %v", key, err)
		}
	}
	if err := c.Keep("none"); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("Keep without descriptors: %v", err)
	}
}

func TestListIsWhole(t *testing.T) {
	_, c, _ := start(t)
	var want []string
	for i := range 1000 { // more than fit into a packet
		key := fmt.Sprintf("list/%0200d", i)
		want = append(want, key)
		if err := c.Put(key, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Put("other", 0); err != nil {
		t.Fatal(err)
	}
	got, err := c.List("list/")
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
}

func TestChildren(t *testing.T) {
	root, c, bin := start(t)
	eventually(t, "the daemon got its arguments", func() bool {
		raw, _ := os.ReadFile(filepath.Join(root.State, "berthd.args"))
		return string(raw) == "--root "+root.Arg+" --word two words\n"
	})
	first := child(t, c, hold.Daemon)
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is respawned", func() bool {
		now := child(t, c, hold.Daemon)
		return now.PID != 0 && now.PID != first.PID && now.Restarts == 1
	})
	if err := c.Restart(hold.Runner); err != nil {
		t.Fatal(err)
	}
	if now := child(t, c, hold.Runner); now.Restarts != 1 || now.PID == 0 {
		t.Errorf("after a restart: %+v", now)
	}
	if err := c.Restart("nobody"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("restart of nobody: %v", err)
	}
	if err := c.Hello(hold.Daemon, "1.2.3"); err != nil || child(t, c, hold.Daemon).Version != "1.2.3" {
		t.Errorf("hello: %v", err)
	}
	if err := c.Stop(true); err != nil {
		t.Fatal(err)
	}
	s, err := c.Status()
	if err != nil || s.Mode != wire.ModeKept || s.Children[0].PID != 0 || s.Children[1].PID != 0 {
		t.Errorf("after stop keep: %+v, %v", s, err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both run again", func() bool {
		return child(t, c, hold.Daemon).PID != 0 && child(t, c, hold.Runner).PID != 0
	})
	if err := hold.Launch(context.Background(), root, bin, nil); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("a second holder: %v", err)
	}
	if err := c.Stop(false); err != nil {
		t.Fatal(err)
	}
	<-c.Lost()
	if _, err := hold.Dial(root.Socket("holder")); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("dial after the end: %v", err)
	}
}

func TestReexecKeepsAll(t *testing.T) {
	_, c, _ := start(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	key := "odd \n\"key\""
	if err := c.Put(key, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	before, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := c.Reexec(); err != nil {
			t.Fatal(err)
		}
	}
	after, err := c.Status()
	if diff := cmp.Diff(before, after); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	fds, err := c.Get(key)
	if err != nil || len(fds) != 1 {
		t.Fatalf("Get: %v, %v", fds, err)
	}
	wire.CloseAll(fds)
	// A death after it is noticed as before.
	if err := syscall.Kill(after.Children[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child is respawned", func() bool {
		now := child(t, c, after.Children[0].Name)
		return now.PID != 0 && now.PID != after.Children[0].PID
	})
}

// TestSurvive plays berthd: it has claimed the name, sees the holder die, and parks.
func TestSurvive(t *testing.T) {
	root, c, bin := start(t)
	if err := c.Stop(true); err != nil { // the sleeping children are not wanted here
		t.Fatal(err)
	}
	s, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	// Revive looks for the holder beside this program.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"berth-holder", hold.Runner, hold.Daemon} {
		link := filepath.Join(filepath.Dir(self), name)
		if err := os.Symlink(filepath.Join(bin, name), link); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(link) })
	}
	parked := false
	done := make(chan error, 1)
	go func() {
		done <- hold.Survive(context.Background(), root, c, func(next *hold.Client) error {
			parked = true
			return next.Put("mine", 0)
		})
	}()
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || !parked {
		t.Fatalf("Survive: %v, parked: %v", err, parked)
	}
	next, err := hold.Dial(root.Socket("holder"))
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if keys, err := next.List(""); err != nil || len(keys) != 1 {
		t.Errorf("kept: %q, %v", keys, err)
	}
	eventually(t, "the new holder gives the daemon its arguments", func() bool {
		raw, _ := os.ReadFile(filepath.Join(root.State, "berthd.args"))
		return strings.Count(string(raw), "--word two words\n") == 2
	})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := hold.Survive(ctx, root, next, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Survive with an ended context: %v", err)
	}
}

func TestExitOfOrphanIsRecorded(t *testing.T) {
	_, c, bin := start(t)
	// A child of the runner's place that leaves an orphan behind, as a killed runner does.
	dir := filepath.Dir(bin)
	script := fmt.Sprintf("#!/bin/sh\nif [ ! -e %[1]s/once ]; then touch %[1]s/once; (while [ ! -e %[1]s/go ]; do sleep 0.01; done; exit 42) & echo $! > %[1]s/orphan.tmp; mv %[1]s/orphan.tmp %[1]s/orphan; fi\nexec sleep 1000000\n", dir)
	if err := os.WriteFile(filepath.Join(bin, hold.Runner), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := c.Restart(hold.Runner); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "the orphan is there", func() bool {
		raw, _ := os.ReadFile(filepath.Join(dir, "orphan"))
		_, err := fmt.Sscan(string(raw), &pid)
		return err == nil
	})
	startTime, err := wire.StartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Watch(pid, startTime); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ExitOf(pid, startTime); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("exit of one that lives: %v", err)
	}
	if err := syscall.Kill(child(t, c, hold.Runner).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its exit is recorded", func() bool {
		status, at, err := c.ExitOf(pid, startTime)
		return err == nil && status.ExitStatus() == 42 && time.Since(at) < patience
	})
	if err := c.Reexec(); err != nil {
		t.Fatal(err)
	}
	if status, _, err := c.ExitOf(pid, startTime); err != nil || status.ExitStatus() != 42 {
		t.Errorf("after a reexec: %v, %v", status, err)
	}
	if err := c.Forget(pid, startTime); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.ExitOf(pid, startTime); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("exit of a forgotten one: %v", err)
	}
}
