package runner_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/cgroup"
	"berth/internal/runner"
	"berth/internal/runner/hold"
	"berth/internal/spool"
	"berth/internal/state"
)

// patience bounds every wait in these tests.
const patience = 20 * time.Second

// programs builds the real executables once, and a daemon that does nothing.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "berth-bin-")
	if err != nil {
		return "", err
	}
	build := func(env string, args ...string) error {
		cmd := exec.Command("go", append([]string{"build"}, args...)...)
		cmd.Env = append(os.Environ(), env)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build %v: %w\n%s", args, err, out)
		}
		return nil
	}
	if err := build("CGO_ENABLED=0", "-ldflags", "-s -w", "-o", dir+"/", "berth/cmd/berth-holder", "berth/cmd/berth-init"); err != nil {
		return dir, err
	}
	err = build("CGO_ENABLED=1", "-tags", "runc_nocriu seccomp netgo osusergo",
		"-ldflags", "-s -w -linkmode external -extldflags -static", "-o", dir+"/", "berth/cmd/berth-runner")
	if err != nil {
		return dir, err
	}
	return dir, os.WriteFile(filepath.Join(dir, "berthd"), []byte("#!/bin/sh\nexec sleep 1000000\n"), 0o755)
})

func TestMain(m *testing.M) {
	code := m.Run()
	if os.Geteuid() == 0 {
		if dir, _ := programs(); dir != "" {
			_ = os.RemoveAll(dir)
		}
	}
	os.Exit(code)
}

// node is a holder with its runner on a root of its own.
type node struct {
	t      testing.TB
	root   state.Root
	groups cgroup.Systems
	rootfs string
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: starts containers")
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs /bin/busybox, from the package busybox-static")
	}
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "bt")
	if err != nil {
		t.Fatal(err)
	}
	root, err := state.NewRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, root: root, groups: groups, rootfs: filepath.Join(dir, "rootfs")}
	t.Cleanup(n.clean)
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(n.rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.rootfs, "bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "cat", "sleep", "echo", "true", "seq", "stty", "id", "ps", "kill"} {
		if err := os.Symlink("busybox", filepath.Join(n.rootfs, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	if err := hold.Launch(context.Background(), root, bin, nil); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) clean() {
	group := cgroup.Parent(n.root)
	if h, err := hold.Dial(n.root.Socket("holder")); err == nil {
		if c, err := n.tryDial(); err == nil {
			if list, err := c.List(context.Background()); err == nil {
				for _, p := range list {
					if err := c.Delete(context.Background(), p.ID); err != nil {
						n.t.Errorf("delete %s: %v", p.ID, err)
					}
				}
			}
			_ = c.Close()
		}
		if err := h.Stop(false); err != nil {
			n.t.Errorf("stop the holder: %v", err)
		}
		_ = h.Close()
	}
	_ = n.groups.Kill(group)
	n.eventually("the control group is removed", func() bool { return n.groups.Remove(group) == nil })
	if log, _ := os.ReadFile(filepath.Join(n.root.State, "log", "berth-runner.log")); strings.Contains(string(log), "DATA RACE") {
		n.t.Error("the runner has a data race")
	}
	if n.t.Failed() {
		for _, name := range []string{"berth-runner", "berth-holder"} {
			log, _ := os.ReadFile(filepath.Join(n.root.State, "log", name+".log"))
			n.t.Logf("log of %s:\n%s", name, log)
		}
	}
	_ = os.RemoveAll(n.root.State)
}

func (n *node) eventually(what string, done func() bool) {
	n.t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

func (n *node) tryDial() (*runner.Client, error) {
	return runner.Dial(context.Background(), n.root.Socket("runner"))
}

func (n *node) dial() *runner.Client {
	n.t.Helper()
	var c *runner.Client
	n.eventually("the runner answers", func() bool {
		var err error
		if c, err = n.tryDial(); err != nil {
			return false
		}
		if _, err := c.Info(context.Background()); err != nil { // the socket of one that was killed
			_ = c.Close()
			return false
		}
		return true
	})
	n.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (n *node) holder() *hold.Client {
	n.t.Helper()
	var h *hold.Client
	n.eventually("the holder answers", func() (ok bool) {
		var err error
		h, err = hold.Dial(n.root.Socket("holder"))
		return err == nil
	})
	n.t.Cleanup(func() { _ = h.Close() })
	return h
}

// child returns what the holder says of one of its children, once that runs.
func (n *node) child(name string) hold.Child {
	n.t.Helper()
	var child hold.Child
	h := n.holder()
	n.eventually(name+" runs", func() bool {
		s, err := h.Status()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, c := range s.Children {
			if c.Name == name {
				child = c
			}
		}
		return child.PID != 0
	})
	return child
}

func (n *node) killRunner() {
	n.t.Helper()
	if err := syscall.Kill(n.child(hold.Runner).PID, syscall.SIGKILL); err != nil {
		n.t.Fatal(err)
	}
}

// spec is a container like docker's, without a network.
func (n *node) spec(id string, args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	return &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Root:     &specs.Root{Path: n.rootfs},
		Hostname: "test",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroup.Parent(n.root) + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace},
			},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			Resources: &specs.LinuxResources{},
		},
	}
}

// request writes a bundle and asks for a container that is started at once.
func (n *node) request(id string, spec *specs.Spec) runner.CreateRequest {
	n.t.Helper()
	bundle := filepath.Join(n.root.State, "bundles", id)
	raw, err := json.Marshal(spec)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.MkdirAll(bundle, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o644); err != nil {
		n.t.Fatal(err)
	}
	return runner.CreateRequest{ID: id, Bundle: bundle, IO: runner.IO{Spool: filepath.Join(bundle, "spool")}, Start: true}
}

func (n *node) sh(id, script string) runner.CreateRequest {
	n.t.Helper()
	return n.request(id, n.spec(id, "sh", "-c", script))
}

// output is what one stream of a process wrote, 0 for all; it fails on gaps.
func (n *node) output(spoolDir string, stream uint8) string {
	n.t.Helper()
	r := spool.OpenReader(spoolDir)
	defer r.Close()
	var out strings.Builder
	buf := make([]byte, 64<<10)
	for pos := uint64(0); ; {
		c, err := r.Next(pos, buf)
		if err != nil {
			return out.String()
		}
		if c.Dropped > 0 {
			n.t.Fatalf("%d bytes were dropped at %d", c.Dropped, c.Pos)
		}
		if stream == 0 || c.Stream == stream {
			out.Write(c.Data)
		}
		pos = c.End()
	}
}

func (n *node) create(c *runner.Client, r runner.CreateRequest) runner.Process {
	n.t.Helper()
	p, err := c.Create(n.ctx(), r)
	if err != nil {
		n.t.Fatalf("create %s: %v", r.ID, err)
	}
	return p
}

func (n *node) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	n.t.Cleanup(cancel)
	return ctx
}

func (n *node) wait(c *runner.Client, id string) runner.Exit {
	n.t.Helper()
	e, err := c.Wait(n.ctx(), id)
	if err != nil {
		n.t.Fatalf("wait for %s: %v", id, err)
	}
	return e
}

// traces lists what is left of a process anywhere.
func (n *node) traces(id string) []string {
	var out []string
	for _, path := range append(n.groups.Paths(cgroup.Parent(n.root)+"/"+id),
		filepath.Join(n.root.Run, "io", id), filepath.Join(n.root.Run, "procs", id+".json"), filepath.Join(n.root.Run, "libcontainer", id)) {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			out = append(out, path)
		}
	}
	for _, prefix := range []string{"proc/", "pidfd/"} {
		keys, err := n.holder().List(prefix + id)
		if err != nil {
			n.t.Fatal(err)
		}
		out = append(out, keys...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		n.t.Fatal(err)
	}
	if strings.Contains(string(mounts), n.root.State) {
		out = append(out, "a mount")
	}
	return out
}

func (n *node) wantNoTraces(id string) {
	n.t.Helper()
	if left := n.traces(id); len(left) > 0 {
		n.t.Errorf("left of %s: %v", id, left)
	}
}
