// Package holder is berth-holder: the parent of berth-runner and berthd. It respawns them,
// keeps what must not close (read ends of output FIFOs, pty masters, listening sockets, …)
// while one of them is away, and records the exit of every container whose runner died.
//
// It is one thread of control around epoll and knows nothing of what it holds. DESIGN.md in
// package hold tells how it is replaced, in place and after its own death. Only the standard
// library and the raw system calls are used: the budget is 4 MB of resident memory.
package holder

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

// Limits of a holder.
const (
	maxConns    = 64
	spareFDs    = 128 // of RLIMIT_NOFILE, never given away to keys
	maxWatched  = 1 << 16
	logCheck    = 30 * time.Second
	stopGrace   = 10 * time.Second // between SIGTERM and SIGKILL
	prSubreaper = 36               // PR_SET_CHILD_SUBREAPER
)

// Config says what to hold for.
type Config struct {
	Root       state.Root
	Version    string
	Executable string   // the holder's own absolute path; its children are beside it
	Daemon     []string // arguments for berthd beyond --root
}

type holder struct {
	Config
	mode     string
	epoll    int
	lock     int // Run/holder.lock, locked
	listener int
	signals  int // read end of the pipe that SIGCHLD and SIGTERM are written to
	kept     map[string][]int
	keptFDs  int
	maxFDs   int
	watched  map[int]uint64  // pid → start time
	unsaved  map[string]exit // records that could not be written
	conns    map[int]struct{}
	children [2]*child // runner, daemon
	waiters  []waiter
	nextLog  time.Time
	ended    bool
	packet   []byte
}

// waiter is a client whose answer is given once done says so.
type waiter struct {
	conn int
	done func() bool
}

// Run holds until it is told to stop. A second holder on the same root is refused with
// errdefs.ErrConflict.
func Run(c Config) error {
	h := &holder{
		Config: c, mode: wire.ModeRunning, kept: map[string][]int{}, watched: map[int]uint64{},
		unsaved: map[string]exit{}, conns: map[int]struct{}{}, packet: make([]byte, wire.MaxPacket),
	}
	h.maxFDs = raiseFiles() - spareFDs
	again, err := h.setUp()
	if err == nil {
		if _, _, errno := syscall.Syscall6(syscall.SYS_PRCTL, prSubreaper, 1, 0, 0, 0, 0); errno != 0 {
			err = errno
		}
	}
	if err != nil {
		_ = ready(err) // whoever launched us is told, or is gone
		return err
	}
	if !again {
		h.findPredecessors()
	}
	// Launched by one that died meanwhile: whoever still wants a holder launches one, and maybe
	// nobody does any more.
	if err := ready(nil); err != nil {
		_ = syscall.Unlink(h.Root.Socket("holder"))
		return fmt.Errorf("tell the launcher: %w", err)
	}
	return h.loop()
}

// setUp takes the lock and the socket, from the program before this one if it was replaced in
// place, which again tells.
func (h *holder) setUp() (again bool, err error) {
	if h.epoll, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return false, err
	}
	if err := h.catchSignals(); err != nil {
		return false, err
	}
	h.children = [2]*child{
		{name: wire.Runner, log: filepath.Join(h.Root.State, "log", "berth-runner.log")},
		{name: wire.Daemon, log: filepath.Join(h.Root.State, "log", "berthd.log"), args: h.Daemon},
	}
	again, err = h.restore()
	if err != nil {
		return again, err
	}
	if !again {
		if err := h.makePlaces(); err != nil {
			return false, err
		}
	}
	for _, fd := range append([]int{h.signals, h.listener}, keys(h.conns)...) {
		if err := h.poll(fd); err != nil {
			return again, err
		}
	}
	return again, nil
}

// makePlaces locks the root and makes the directories and the socket.
func (h *holder) makePlaces() error {
	for _, dir := range []string{h.Root.State, filepath.Join(h.Root.State, "log"), h.Root.Run, filepath.Join(h.Root.Run, wire.ExitsDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	var err error
	h.lock, err = syscall.Open(filepath.Join(h.Root.Run, wire.LockFile), syscall.O_RDWR|syscall.O_CREAT|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	if err := syscall.Flock(h.lock, syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return errdefs.New(errdefs.ErrConflict, "berth-holder: another one already holds %s; use it, or end it with: berth down", h.Root.Run)
	}
	if err := writeFile(filepath.Join(h.Root.Run, wire.ArgsFile), wire.Encode(h.Daemon...)); err != nil {
		return err
	}
	path := h.Root.Socket("holder")
	if err := syscall.Unlink(path); err != nil && err != syscall.ENOENT {
		return err
	}
	h.listener, err = syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	old := syscall.Umask(0o177)
	err = syscall.Bind(h.listener, &syscall.SockaddrUnix{Name: path})
	syscall.Umask(old)
	if err != nil {
		return err
	}
	return syscall.Listen(h.listener, maxConns)
}

// catchSignals turns SIGCHLD and SIGTERM into bytes of a pipe.
func (h *holder) catchSignals() error {
	var p [2]int
	if err := syscall.Pipe2(p[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK); err != nil {
		return err
	}
	h.signals = p[0]
	c := make(chan os.Signal, 16)
	// SIGHUP and SIGPIPE only so that they do not kill. Ignoring them instead would pass on to
	// the children, and from berth-runner to containers.
	signal.Notify(c, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	go func() { // lives as long as the process
		for s := range c {
			b := []byte{'c'}
			if s == syscall.SIGTERM || s == syscall.SIGINT {
				b[0] = 't'
			}
			_, _ = syscall.Write(p[1], b) // full: a wake-up is already waiting
		}
	}()
	return nil
}

func (h *holder) poll(fd int) error {
	return syscall.EpollCtl(h.epoll, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(fd)})
}

// loop is level-driven: whatever woke it, it reaps, advances the children and answers who can
// be answered.
func (h *holder) loop() error {
	events := make([]syscall.EpollEvent, 32)
	h.nextLog = time.Now().Add(logCheck)
	for {
		h.reap()
		now := time.Now()
		h.advance(now)
		h.answerWaiters()
		if h.ended {
			_ = syscall.Unlink(h.Root.Socket("holder"))
			return nil
		}
		if now.After(h.nextLog) {
			h.rotateLogs()
			h.nextLog = now.Add(logCheck)
		}
		n, err := syscall.EpollWait(h.epoll, events, h.timeout(now))
		if err != nil && err != syscall.EINTR {
			return err
		}
		for i := 0; i < n; i++ {
			fd := int(events[i].Fd)
			switch {
			case fd == h.signals:
				h.drainSignals()
			case fd == h.listener:
				h.accept()
			default:
				if !h.predecessorLeft(fd) {
					h.serve(fd)
				}
			}
		}
	}
}

// timeout is the time until something is due, in milliseconds.
func (h *holder) timeout(now time.Time) int {
	due := h.nextLog
	for _, c := range h.children {
		if t := c.due(h.mode); !t.IsZero() && t.Before(due) {
			due = t
		}
	}
	return int(max(due.Sub(now).Milliseconds()+1, 0))
}

func (h *holder) drainSignals() {
	var b [64]byte
	for {
		n, err := syscall.Read(h.signals, b[:])
		if n <= 0 || err != nil {
			return
		}
		if strings.IndexByte(string(b[:n]), 't') >= 0 && h.mode != wire.ModeEnding {
			// A signal from an init system: it restarts the machine or this service. What runs
			// goes on; only the managers end.
			h.mode = wire.ModeEnding
		}
	}
}

func (h *holder) accept() {
	for {
		fd, _, err := syscall.Accept4(h.listener, syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK)
		if err != nil {
			return
		}
		cred, err := syscall.GetsockoptUcred(fd, syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		if err != nil || int(cred.Uid) != os.Geteuid() || len(h.conns) >= maxConns || h.poll(fd) != nil {
			_ = syscall.Close(fd)
			continue
		}
		h.conns[fd] = struct{}{}
	}
}

// hangUp ends a connection. Closing the descriptor takes it out of epoll too.
func (h *holder) hangUp(fd int) {
	delete(h.conns, fd)
	_ = syscall.Close(fd)
	left := h.waiters[:0]
	for _, w := range h.waiters {
		if w.conn != fd {
			left = append(left, w)
		}
	}
	h.waiters = left
}

// reply sends an answer. A client that does not read its answers is cut off.
func (h *holder) reply(fd int, fds []int, fields ...string) {
	if err := wire.Send(fd, wire.Encode(fields...), fds); err != nil {
		h.hangUp(fd)
	}
}

func (h *holder) answerWaiters() {
	for i := 0; i < len(h.waiters); {
		w := h.waiters[i]
		if !w.done() {
			i++
			continue
		}
		h.waiters = append(h.waiters[:i], h.waiters[i+1:]...)
		h.reply(w.conn, nil, wire.OK) // may shorten waiters again
		i = 0
	}
}

// raiseFiles raises the soft limit of open files to the hard one and returns it.
func raiseFiles() int {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
		return 1024
	}
	l.Cur = l.Max
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l)
	_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l)
	return int(min(l.Cur, 1<<20))
}

// ready tells whoever launched this holder, if it asked, that it is, or why it is not. It fails
// when the launcher is gone.
func ready(err error) error {
	n, convErr := wire.ParseUint(os.Getenv(wire.ReadyEnv))
	if convErr != nil {
		return nil // nobody asked: started from a unit or by hand, or replaced in place
	}
	_ = os.Unsetenv(wire.ReadyEnv)
	text := wire.Encode(wire.OK)
	if err != nil {
		text = wire.Encode(wire.Failed, errdefs.Name(err), err.Error())
	}
	_, writeErr := syscall.Write(int(n), text)
	_ = syscall.Close(int(n))
	return writeErr
}

// writeFile replaces a file in one step. It is not fsynced: it need not survive a power cut.
func writeFile(path string, data []byte) error {
	temp := path + ".tmp"
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return os.Rename(temp, path)
}

func keys[V any](m map[int]V) []int {
	out := make([]int, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Ints(out)
	return out
}
