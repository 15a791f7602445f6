package launch_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/cgroup"
	"berth/internal/runner/launch"
)

func TestMain(m *testing.M) {
	launch.Init() // the test binary is what libcontainer executes in new containers
	os.Exit(m.Run())
}

// BenchmarkLibcontainer is what of a start is libcontainer's own, to compare BenchmarkRun of
// package runner with:
// go test -tags 'runc_nocriu seccomp' -run XXX -bench . ./internal/runner/launch
func BenchmarkLibcontainer(b *testing.B) {
	st := newStage(b)
	l := launch.Launcher{Dir: filepath.Join(st.dir, "state")}
	for _, with := range []string{"plain", "seccomp", "program"} {
		if with == "program" {
			l.Programs = new(launch.Programs)
		}
		b.Run(with, func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprint(with, i)
				spec := benchSpec(b, filepath.Join(st.dir, "rootfs"), st.parent+"/"+id, with != "plain")
				pid, err := l.Create(id, spec, st.stdio())
				if err != nil {
					b.Fatal(err)
				}
				startAndReap(b, l, id, pid)
				b.StopTimer()
				if err := st.groups.Remove(st.parent + "/" + id); err != nil {
					b.Fatal(err)
				}
				if err := l.Remove(id); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// stage is what containers of a test need.
type stage struct {
	dir    string // with rootfs
	groups cgroup.Systems
	parent string // control group
	null   *os.File
}

func newStage(t testing.TB) *stage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: starts containers")
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs /bin/busybox, from the package busybox-static")
	}
	s := &stage{dir: t.TempDir(), parent: fmt.Sprint("/berth-launch-", os.Getpid())}
	for _, d := range []string{"bin", "proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(s.dir, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"true", "sh"} {
		if err := os.WriteFile(filepath.Join(s.dir, "rootfs/bin", name), busybox, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if s.groups, err = cgroup.Detect(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.groups.Remove(s.parent) })
	if s.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.null.Close() })
	return s
}

func (s *stage) stdio() launch.Stdio {
	return launch.Stdio{Stdin: s.null, Stdout: s.null, Stderr: s.null}
}

func startAndReap(b *testing.B, l launch.Launcher, id string, pid int) {
	b.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := l.Start(id, pid, pidfd); err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, int(10*time.Second/time.Millisecond)); err != nil && err != unix.EINTR {
		b.Fatal(err)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, 0, nil); err != nil || status.ExitStatus() != 0 {
		b.Fatalf("%v, status %#x", err, status)
	}
	b.StartTimer()
}

func benchSpec(b testing.TB, rootfs, group string, filtered bool) *specs.Spec {
	b.Helper()
	spec := &specs.Spec{
		Version:  specs.Version,
		Process:  &specs.Process{Args: []string{"true"}, Cwd: "/", Env: []string{"PATH=/bin"}, Capabilities: &specs.LinuxCapabilities{}},
		Root:     &specs.Root{Path: rootfs},
		Hostname: "bench",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: group, Resources: &specs.LinuxResources{},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace},
			},
		},
	}
	if filtered {
		profile, err := seccomp.GetDefaultProfile(spec)
		if err != nil {
			b.Fatal(err)
		}
		spec.Linux.Seccomp = profile
	}
	return spec
}
