package holder

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"berth/internal/runner/hold/wire"
)

// exit is the end of a watched process.
type exit struct {
	status int // as wait(2) gives it
	nanos  int64
}

// siginfo is the kernel's siginfo_t as waitid(2) fills it on 64-bit machines.
type siginfo struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [100]byte
}

// Arguments and results of waitid(2).
const (
	pAll      = 0
	wExited   = 4
	wNoWait   = 0x01000000
	cldExited = 1
	cldDumped = 3
	coreFlag  = 0x80
)

// waitStatus builds what wait(2) would have said.
func (s *siginfo) waitStatus() int {
	switch s.code {
	case cldExited:
		return int(s.status&0xff) << 8
	case cldDumped:
		return int(s.status&0x7f) | coreFlag
	}
	return int(s.status & 0x7f)
}

// reap takes every dead child. The exit of a watched one is on record before it is reaped, so
// that a kill of the holder in between loses nothing.
func (h *holder) reap() {
	for {
		var info siginfo
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, pAll, 0, uintptr(unsafe.Pointer(&info)), wExited|syscall.WNOHANG|wNoWait, 0, 0)
		if errno == syscall.EINTR {
			continue
		}
		if errno != 0 || info.pid == 0 {
			return
		}
		pid := int(info.pid)
		if start, ok := h.watched[pid]; ok {
			if now, err := wire.StartTime(pid); err == nil && now == start {
				h.record(pid, start, exit{status: info.waitStatus(), nanos: time.Now().UnixNano()})
			}
			delete(h.watched, pid)
		}
		var status syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &status, 0, nil); err != syscall.EINTR {
				break
			}
		}
		for _, c := range h.children {
			if c.pid == pid {
				c.ended(time.Now(), status)
			}
		}
	}
}

// record writes the exit down; where the disk refuses it is kept in memory.
func (h *holder) record(pid int, start uint64, e exit) {
	name := wire.ExitFile(pid, start)
	text := fmt.Sprintf("{\"pid\":%d,\"starttime\":%d,\"status\":%d,\"time\":%d}\n", pid, start, e.status, e.nanos)
	if err := writeFile(filepath.Join(h.Root.Run, wire.ExitsDir, name), []byte(text)); err != nil {
		h.unsaved[name] = e
		logf("record exit of process %d: %v", pid, err)
	}
}

// readExit reads what record wrote: the two numbers that the name of the file does not say.
func readExit(path string) (exit, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return exit{}, err
	}
	number := func(key string) (int64, error) {
		_, rest, _ := strings.Cut(string(raw), "\""+key+"\":")
		end := strings.IndexAny(rest, ",}")
		if end < 0 {
			return 0, syscall.EINVAL
		}
		return strconv.ParseInt(rest[:end], 10, 64)
	}
	status, err := number("status")
	if err != nil {
		return exit{}, err
	}
	nanos, err := number("time")
	return exit{status: int(status), nanos: nanos}, err
}

// logf writes a line to standard error, which the launcher has pointed to the holder's log.
func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().UTC().Format(time.RFC3339)+" berth-holder: "+format+"\n", args...)
}
