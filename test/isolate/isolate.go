// Package isolate prepares network, mount and PID namespaces for tests and benchmarks: whoever
// runs in them can touch neither the host's network nor its mounts, and leaves no process behind.
// Cgroups are the host's; their removal is the caller's.
package isolate

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Attributes for the process that becomes process 1 of new namespaces. It dies with the thread
// that starts it: lock that.
func Attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
}

// Prepare makes the namespaces of process 1 fit for use: private mounts, an own /proc and /sys
// (with the host's cgroups), and the loopback link up.
func Prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := remountSysfs(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// remountSysfs mounts a sysfs, which shows the network namespace of who mounts it, and moves the
// cgroup mounts onto it.
func remountSysfs() error {
	const cgroups, fresh = "/sys/fs/cgroup", "/sys"
	tree, err := unix.OpenTree(unix.AT_FDCWD, cgroups, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("clone %s: %w", cgroups, err)
	}
	defer unix.Close(tree)
	if err := unix.Mount("sysfs", fresh, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, cgroups, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move %s: %w", cgroups, err)
	}
	return nil
}

// Run starts a program as the namespaces' only child of process 1, reaps what is orphaned, and
// returns the program's exit code (128 plus the signal when it was killed). What still runs is
// killed by the kernel when the caller, process 1, exits.
func Run(program string, args, env []string) (int, error) {
	pid, err := syscall.ForkExec(program, args, &syscall.ProcAttr{Env: env, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return 1, fmt.Errorf("%s: %w", program, err)
	}
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case got == pid && status.Signaled():
			return 128 + int(status.Signal()), nil
		case got == pid:
			return status.ExitStatus(), nil
		}
	}
}
