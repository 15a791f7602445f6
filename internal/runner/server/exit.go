package server

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"berth/internal/runner"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
)

// exitOf finds out how a dead process ended. known is false when nothing tells, or not yet.
func (s *Server) exitOf(p *proc) (exit runner.Exit, known bool) {
	exit = runner.Exit{Code: -1, At: time.Now()}
	status, at, known := s.waitStatus(p)
	if !known {
		return exit, false
	}
	if !at.IsZero() {
		exit.At = at
	}
	exit.Known = true
	switch {
	case status.Signaled():
		exit.Signal = int(status.Signal())
		exit.Code = 128 + exit.Signal
	default:
		exit.Code = status.ExitStatus()
	}
	kills := s.groups.OOMKills(p.Group)
	// The first process of a container is told of any kill in it, as docker does; another one
	// only if it may have been the victim.
	exit.OOMKilled = kills > p.OOMKills && (p.first() || exit.Signal == int(unix.SIGKILL))
	return exit, true
}

// waitStatus asks, in this order: our own wait; what the holder recorded; the kernel, by the
// pidfd of a reaped process (Linux 6.15); and by /proc, of a zombie that somebody else must reap.
func (s *Server) waitStatus(p *proc) (status syscall.WaitStatus, at time.Time, known bool) {
	if p.pidfd >= 0 {
		var info siginfo
		if err := waitPidfd(p.pidfd, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT); err == nil && info.pid != 0 {
			return info.waitStatus(), time.Time{}, true
		}
	}
	if p.PID == 0 || p.Boot != s.boot {
		return 0, time.Time{}, false
	}
	if status, at, err := s.holderNow().ExitOf(p.PID, p.StartTime); err == nil {
		return status, at, true
	}
	if p.pidfd >= 0 {
		if status, ok := pidfdStatus(p.pidfd); ok {
			return status, time.Time{}, true
		}
	}
	if status, ok := wire.ZombieStatus(p.PID, p.StartTime); ok {
		return syscall.WaitStatus(status), time.Time{}, true
	}
	return 0, time.Time{}, false
}

func (s *Server) holderNow() *hold.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holder
}

// reap takes the process off the kernel's list if it is our child.
func reap(pidfd int) {
	if pidfd >= 0 {
		var info siginfo
		_ = waitPidfd(pidfd, &info, unix.WEXITED|unix.WNOHANG)
	}
}

// siginfo is the kernel's siginfo_t as waitid(2) fills it on 64-bit machines.
type siginfo struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [100]byte
}

// Values of siginfo.code, and the bit of a wait status that says "core dumped".
const (
	cldExited = 1
	cldDumped = 3
	coreFlag  = 0x80
)

func (i *siginfo) waitStatus() syscall.WaitStatus {
	switch i.code {
	case cldExited:
		return syscall.WaitStatus(i.status&0xff) << 8
	case cldDumped:
		return syscall.WaitStatus(i.status&0x7f | coreFlag)
	}
	return syscall.WaitStatus(i.status & 0x7f)
}

func waitPidfd(pidfd int, info *siginfo, options int) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_PIDFD, uintptr(pidfd), uintptr(unsafe.Pointer(info)), uintptr(options), 0, 0)
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// pidfdInfo is struct pidfd_info of linux/pidfd.h as Linux 6.15 has it.
type pidfdInfo struct {
	mask     uint64
	cgroupID uint64
	_        [11]uint32 // pid, tgid, ppid, and eight user and group IDs
	exitCode int32
}

// The request PIDFD_GET_INFO, _IOWR(0xFF, 11, struct pidfd_info), in its first published size
// of 64 bytes, and the bit that asks for the exit status.
const (
	pidfdGetInfo  = 3<<30 | 64<<16 | 0xFF<<8 | 11
	pidfdInfoExit = 1 << 3
)

// pidfdStatus asks the kernel for the status of a process that has been reaped.
func pidfdStatus(pidfd int) (syscall.WaitStatus, bool) {
	info := pidfdInfo{mask: pidfdInfoExit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.mask&pidfdInfoExit == 0 {
		return 0, false
	}
	return syscall.WaitStatus(info.exitCode), true
}
