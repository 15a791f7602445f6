package holder

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth/internal/runner/hold/wire"
)

// Bounds of respawning and of the children's logs.
const (
	backoffFirst = 50 * time.Millisecond
	backoffMax   = 5 * time.Second
	backoffUp    = 250 * time.Millisecond // at most, for one that was up: somebody killed it
	steadyAfter  = 10 * time.Second       // of life: the next death is respawned at once
	logBytes     = 10 << 20
	// Predecessors leave by themselves once they have parked what they hold.
	parkGrace = 10 * time.Second
	killGrace = 5 * time.Second
)

// Numbers of system calls that package syscall does not name, the same on every architecture.
const (
	pidfdSendSignal = 424
	pidfdOpen       = 434
)

// child is one of the two programs that the holder keeps running.
type child struct {
	name, log string
	args      []string

	pid      int // 0: not running
	start    uint64
	since    time.Time
	version  string
	restarts int
	everRan  bool
	wanted   bool // a restart was asked for and is not done

	backoff time.Duration
	next    time.Time // when to spawn
	killAt  time.Time // SIGTERM was sent; zero: not

	// A process of this name that another, dead holder started: its pidfd, or 0.
	old       int
	oldTerm   time.Time
	oldTermed bool
}

func (h *holder) child(name string) *child {
	for _, c := range h.children {
		if c.name == name {
			return c
		}
	}
	return nil
}

func (h *holder) childless() bool {
	for _, c := range h.children {
		if c.pid != 0 || c.old > 0 {
			return false
		}
	}
	return true
}

// advance is the children's control loop: it looks at what is and at what is asked for, and
// takes the next step of each.
func (h *holder) advance(now time.Time) {
	for _, c := range h.children {
		c.advanceOld(now)
		switch {
		case c.pid != 0:
			c.pressKill(now)
		case c.old > 0 || h.mode != wire.ModeRunning || now.Before(c.next):
		default:
			h.spawn(c, now)
		}
	}
	if h.mode == wire.ModeRunning {
		return
	}
	// The daemon ends first: its last words may need the runner.
	for i := len(h.children) - 1; i >= 0; i-- {
		c := h.children[i]
		if c.pid == 0 && c.old <= 0 {
			continue
		}
		if c.pid != 0 {
			c.term(now)
		} else if !c.oldTermed {
			c.oldTerm = now
		}
		return
	}
	h.ended = h.mode == wire.ModeEnding
}

// due is when advance must look at the child again; zero: only when something happens.
func (c *child) due(mode string) time.Time {
	switch {
	case c.old > 0:
		return c.oldTerm
	case c.pid != 0:
		return c.killAt
	case mode == wire.ModeRunning:
		return c.next
	}
	return time.Time{}
}

func (c *child) term(now time.Time) {
	if c.killAt.IsZero() {
		c.killAt = now.Add(stopGrace)
		_ = syscall.Kill(c.pid, syscall.SIGTERM)
	}
}

func (c *child) pressKill(now time.Time) {
	if !c.killAt.IsZero() && !now.Before(c.killAt) {
		logf("%s (process %d) did not end by itself; killing it", c.name, c.pid)
		_ = syscall.Kill(c.pid, syscall.SIGKILL)
		c.killAt = now.Add(stopGrace)
	}
}

// restart ends the child; advance starts the new one.
func (c *child) restart() {
	c.wanted = true
	if c.pid != 0 {
		c.term(time.Now())
	}
	c.next = time.Time{}
}

// ended notes the child's death and decides when the next one starts.
func (c *child) ended(now time.Time, status syscall.WaitStatus) {
	switch {
	case c.wanted || now.Sub(c.since) >= steadyAfter:
		c.backoff, c.next = 0, now
	default:
		limit := backoffMax
		if c.version != "" { // it said hello
			limit = backoffUp
		}
		c.backoff = min(c.backoff, limit)
		c.next = now.Add(c.backoff)
		c.backoff = min(max(2*c.backoff, backoffFirst), backoffMax)
	}
	if c.killAt.IsZero() {
		logf("%s (process %d) ended: status %#x; next start in %s", c.name, c.pid, int(status), c.next.Sub(now))
	}
	c.pid, c.start, c.version, c.killAt = 0, 0, "", time.Time{}
}

// spawn starts the program that lies beside the holder's own now: after an upgrade, the new one.
func (h *holder) spawn(c *child, now time.Time) {
	argv := []string{filepath.Join(filepath.Dir(h.Executable), c.name)}
	if !h.Root.Default() {
		argv = append(argv, "--root", h.Root.Arg)
	}
	argv = append(argv, c.args...)
	pid, err := forkExec(argv, c.log)
	if err != nil {
		c.backoff = min(max(2*c.backoff, backoffFirst), backoffMax)
		c.next = now.Add(c.backoff)
		logf("start %s: %v; next try in %s", argv[0], err, c.backoff)
		return
	}
	if c.everRan {
		c.restarts++
	}
	c.pid, c.since, c.everRan, c.wanted, c.killAt = pid, now, true, false, time.Time{}
	c.start, _ = wire.StartTime(pid)
}

func forkExec(argv []string, log string) (int, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		out = os.Stderr // a full disk must not keep the node down
	} else {
		defer out.Close()
	}
	return syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []uintptr{null.Fd(), out.Fd(), out.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

// findPredecessors looks for children that another holder, which is dead, left running. Each
// parks what it holds here and leaves by itself; one that does not is made to.
func (h *holder) findPredecessors() {
	for _, c := range h.children {
		pid := lockedBy(filepath.Join(h.Root.Run, c.name+".pid"))
		if pid <= 0 {
			continue
		}
		fd, _, errno := syscall.Syscall(pidfdOpen, uintptr(pid), 0, 0)
		if errno != 0 {
			continue
		}
		syscall.CloseOnExec(int(fd))
		c.old, c.oldTerm = int(fd), time.Now().Add(parkGrace)
		_ = h.poll(c.old)
	}
}

// predecessorLeft tells whether fd is the pidfd of a predecessor: it is readable because that ended.
func (h *holder) predecessorLeft(fd int) bool {
	for _, c := range h.children {
		if c.old > 0 && c.old == fd {
			_ = syscall.Close(c.old)
			c.old, c.everRan = 0, true
			return true
		}
	}
	return false
}

// advanceOld makes a predecessor leave that does not do so by itself.
func (c *child) advanceOld(now time.Time) {
	if c.old <= 0 || now.Before(c.oldTerm) {
		return
	}
	signal := syscall.SIGTERM
	if c.oldTermed {
		signal = syscall.SIGKILL
	}
	c.oldTermed, c.oldTerm = true, now.Add(killGrace)
	_, _, _ = syscall.Syscall6(pidfdSendSignal, uintptr(c.old), uintptr(signal), 0, 0, 0, 0)
}

// lockedBy returns the pid in a pid file whose lock is taken, 0 if it is free.
func lockedBy(path string) int {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		return 0
	}
	raw, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(raw), " ")
	pid, _ := strconv.Atoi(first)
	return pid
}

// rotateLogs bounds the children's logs. The children keep their descriptors, so the content
// moves, not the file; what they write in between is lost, which a diagnostic log can bear.
func (h *holder) rotateLogs() {
	logs := []string{filepath.Join(h.Root.State, "log", "berth-holder.log")}
	for _, c := range h.children {
		logs = append(logs, c.log)
	}
	for _, path := range logs {
		info, err := os.Stat(path)
		if err != nil || info.Size() <= logBytes {
			continue
		}
		if err := moveContent(path, path+".1"); err != nil {
			logf("rotate %s: %v", path, err)
		}
	}
}

func moveContent(from, to string) error {
	in, err := os.OpenFile(from, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	// When the copy fails, for want of room, truncating frees some; the bound comes first.
	_, copyErr := io.Copy(out, io.LimitReader(in, 2*logBytes))
	if err := out.Close(); copyErr == nil {
		copyErr = err
	}
	if err := in.Truncate(0); err != nil {
		return err
	}
	return copyErr
}
