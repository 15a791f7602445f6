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
	if os.Geteuid() != 0 {
		b.Skip("needs root: starts containers")
	}
	dir := b.TempDir()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		b.Skip("needs /bin/busybox, from the package busybox-static")
	}
	for _, d := range []string{"bin", "proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(dir, "rootfs", d), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "rootfs/bin/true"), busybox, 0o755); err != nil {
		b.Fatal(err)
	}
	groups, err := cgroup.Detect()
	if err != nil {
		b.Fatal(err)
	}
	parent := fmt.Sprint("/berth-bench-", os.Getpid())
	b.Cleanup(func() { _ = groups.Remove(parent) })
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	l := launch.Launcher{Dir: filepath.Join(dir, "state")}
	for _, with := range []string{"plain", "seccomp"} {
		b.Run(with, func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprint(with, i)
				spec := benchSpec(b, filepath.Join(dir, "rootfs"), parent+"/"+id, with == "seccomp")
				pid, err := l.Create(id, spec, launch.Stdio{Stdin: null, Stdout: null, Stderr: null})
				if err != nil {
					b.Fatal(err)
				}
				startAndReap(b, l, id, pid)
				b.StopTimer()
				if err := groups.Remove(parent + "/" + id); err != nil {
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

func benchSpec(b *testing.B, rootfs, group string, filtered bool) *specs.Spec {
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
