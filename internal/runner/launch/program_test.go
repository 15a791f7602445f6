//go:build cgo && seccomp

package launch_test

import (
	"bytes"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/runner/launch"
)

// TestProgram looks at what is loaded in the kernel: a program compiled before must be the one
// that libseccomp makes in the container's own init.
func TestProgram(t *testing.T) {
	s := newStage(t)
	plain := launch.Launcher{Dir: filepath.Join(s.dir, "plain")}
	one, errno := uint(1), uint(38)
	profiles := map[string]*specs.LinuxSeccomp{
		"docker": benchSpec(t, "/", "/", true).Linux.Seccomp,
		"small": {DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog}, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mount"}, Action: specs.ActErrno, ErrnoRet: &errno},
			{Names: []string{"personality"}, Action: specs.ActErrno, ErrnoRet: &one, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 8, Op: specs.OpEqualTo}}},
		}},
	}
	for name, profile := range profiles {
		t.Run(name, func(t *testing.T) {
			kept := launch.Launcher{Dir: filepath.Join(s.dir, "kept"), Programs: new(launch.Programs)}
			defer kept.Programs.Wait()
			own := s.loaded(t, plain, profile)
			before := s.loaded(t, kept, profile)
			kept.Programs.Wait()
			calls, program := kept.Programs.Split()
			if len(calls) == 0 || len(program) == 0 {
				t.Fatal("no program was compiled")
			}
			after := s.loaded(t, kept, profile)
			for what, got := range map[string][]byte{"libseccomp's": own, "before": before, "after": after} {
				// In front of it is libcontainer's stub, whose parts have no fixed order.
				if len(got) != len(own) || !bytes.HasSuffix(got, program) {
					t.Errorf("%s: %d bytes loaded; want %d that end in the %d bytes of the compiled program", what, len(got), len(own), len(program))
				}
			}

			// Another program for the same calls is loaded: so the one before was not libseccomp's.
			other := slices.Clone(program)
			other[len(other)-4] ^= 1 // the last instruction's constant: what it returns
			kept.Programs.Join(calls, other)
			if got := s.loaded(t, kept, profile); !bytes.HasSuffix(got, other) {
				t.Error("the kept program was not loaded")
			}
			// A program for other calls is not.
			strange := slices.Clone(calls)
			strange[len(strange)/2] ^= 1
			kept.Programs.Join(strange, other)
			if got := s.loaded(t, kept, profile); !bytes.HasSuffix(got, program) {
				t.Error("a program that other calls made was loaded")
			}
		})
	}
}

// TestProgramIsNotInherited: the container's program has no descriptor of it.
func TestProgramIsNotInherited(t *testing.T) {
	s := newStage(t)
	l := launch.Launcher{Dir: filepath.Join(s.dir, "state"), Programs: new(launch.Programs)}
	for i := range 2 {
		id := fmt.Sprint("fd", i)
		spec := benchSpec(t, filepath.Join(s.dir, "rootfs"), s.parent+"/"+id, true)
		spec.Process.Args = []string{"sh", "-c", `set -- /proc/$$/fd/*; for f; do case $f in */[012]|*/10) ;; *) [ ! -e "$f" ] || exit 9; esac; done`}
		pid, err := l.Create(id, spec, s.stdio())
		if err != nil {
			t.Fatal(err)
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pidfd)
		if err := l.Start(id, pid, pidfd); err != nil {
			t.Fatal(err)
		}
		if status := s.end(t, l, id, pid); status.ExitStatus() != 0 {
			t.Errorf("start %d: status %#x; the program has more than its three streams", i, status)
		}
		l.Programs.Wait()
	}
}

// loaded starts a container and returns the program that the kernel has for it.
func (s *stage) loaded(t *testing.T, l launch.Launcher, profile *specs.LinuxSeccomp) []byte {
	t.Helper()
	const id = "loaded"
	spec := benchSpec(t, filepath.Join(s.dir, "rootfs"), s.parent+"/"+id, false)
	spec.Linux.Seccomp = profile
	pid, err := l.Create(id, spec, s.stdio())
	if err != nil {
		t.Fatal(err)
	}
	defer s.end(t, l, id, pid)
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	return filter(t, pid)
}

// filter reads a process's only seccomp program with ptrace(2).
func filter(t *testing.T, pid int) []byte {
	t.Helper()
	runtime.LockOSThread() // who traces is a thread
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		t.Fatal(err)
	}
	if err := unix.PtraceInterrupt(pid); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	get := func(to unsafe.Pointer) (int, unix.Errno) {
		n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(pid), 0, uintptr(to), 0, 0)
		return int(n), errno
	}
	count, errno := get(nil)
	if errno == unix.EIO || errno == unix.EACCES {
		t.Skip("the kernel does not show programs: it lacks CONFIG_CHECKPOINT_RESTORE, or we CAP_SYS_ADMIN")
	}
	if errno != 0 {
		t.Fatal(errno)
	}
	program := make([]byte, count*int(unsafe.Sizeof(unix.SockFilter{})))
	if _, errno := get(unsafe.Pointer(&program[0])); errno != 0 {
		t.Fatal(errno)
	}
	return program
}

// end waits for a container's end and removes what is left of it.
func (s *stage) end(t *testing.T, l launch.Launcher, id string, pid int) unix.WaitStatus {
	t.Helper()
	var status unix.WaitStatus
	deadline := time.Now().Add(20 * time.Second)
	for {
		got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil)
		if err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		if got == pid && (status.Exited() || status.Signaled()) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the container does not end")
		}
		time.Sleep(time.Millisecond) // nothing else of it can be waited for with a deadline
	}
	if err := s.groups.Remove(s.parent + "/" + id); err != nil {
		t.Error(err)
	}
	if err := l.Remove(id); err != nil {
		t.Error(err)
	}
	return status
}
