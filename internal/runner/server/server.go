// Package server is berth-runner: it starts containers (package launch), moves their output to
// spools, notices their ends, and answers package runner's clients.
//
// It keeps nothing that its death loses. Every process has a record, a small file below
// Root.Run that is replaced in one step; its descriptors have copies in berth-holder before it
// starts. A runner that comes up adopts what the records say and sweeps away what a kill left
// half made (adopt.go).
//
// One goroutine (loop.go) waits on pidfds, FIFOs and terminals of all processes, and is the
// only one that moves output and declares a process ended. Requests run in goroutines of their
// own, of a bounded number; the lock of a container keeps them from each other.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/cgroup"
	"berth/internal/errdefs"
	"berth/internal/runner/hold"
	"berth/internal/runner/launch"
	"berth/internal/state"
)

// Limits of a runner.
const (
	maxRequests = 64 // under way at once, and as many of those that must get through when others hang
	maxStarts   = 16 // of them, creates and execs
	maxConns    = 64
	lastWords   = 5 * time.Second // for requests under way when it is told to end
	reviveAgain = time.Second     // between tries to bring up a new holder
)

// Config says what to run for.
type Config struct {
	Root    state.Root
	Version string
}

// Server is a running berth-runner.
type Server struct {
	Config
	boot     string // this boot's ID: pids of another mean nothing
	groups   cgroup.Systems
	launcher launch.Launcher
	log      *slog.Logger

	epoll int
	wake  int // eventfd that makes the loop look around

	requests chan struct{} // a place for each request under way
	urgent   chan struct{} // of those that must get through
	starts   chan struct{}
	work     sync.WaitGroup

	mu      sync.Mutex
	holder  *hold.Client
	procs   map[string]*proc
	sources map[int]source // by descriptor
	ending  map[*proc]struct{}
	rests   int
	conns   map[*client]struct{}
	closing bool // no more requests are taken
}

// Run serves until ctx ends or the holder dies; in the latter case it first brings up a new
// holder and parks everything there. What runs is not touched.
func Run(ctx context.Context, c Config) error {
	s, err := newServer(c)
	if err != nil {
		return err
	}
	if err := hold.Claim(c.Root.Run, hold.Runner); err != nil {
		return err
	}
	if s.holder, err = hold.Dial(c.Root.Socket("holder")); err != nil {
		return err
	}
	if err := s.holder.Hello(hold.Runner, c.Version); err != nil {
		return err
	}
	if err := s.adopt(); err != nil {
		return err
	}
	listener, err := listen(c.Root.Socket("runner"))
	if err != nil {
		return err
	}
	s.serve(ctx, listener)
	return nil
}

// serve runs the parts until ctx ends or the holder is lost and replaced.
func (s *Server) serve(ctx context.Context, listener *net.UnixListener) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The loop goes on while the last requests are: they may wait for a process's end.
	looping, stopLoop := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { s.loop(looping) })
	parts.Go(func() {
		<-ctx.Done()
		_ = listener.Close()
	})
	parts.Go(func() {
		s.survive(ctx)
		cancel()
	})
	s.accept(listener)
	cancel()
	s.finishRequests()
	stopLoop()
	s.poke()
	parts.Wait()
	if len(s.procs) == 0 {
		_ = s.groups.Remove(cgroup.Parent(s.Root)) // made anew when it is needed
	}
}

// survive returns when everything is parked in a new holder, or ctx ends. Without a holder we
// are the only one who holds what must not close: giving up is no choice.
func (s *Server) survive(ctx context.Context) {
	err := hold.Survive(ctx, s.Root, s.holder, s.park)
	for err != nil && ctx.Err() == nil {
		s.log.Error("bring up a new holder; trying again", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(reviveAgain):
		}
		err = hold.Revive(ctx, s.Root, s.park)
	}
}

func newServer(c Config) (*Server, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	groups, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	s := &Server{
		Config: c, boot: strings.TrimSpace(string(boot)), groups: groups,
		launcher: launch.Launcher{Dir: filepath.Join(c.Root.Run, "libcontainer"), Programs: new(launch.Programs)},
		log:      slog.New(slog.NewTextHandler(os.Stderr, nil)),
		requests: make(chan struct{}, maxRequests), urgent: make(chan struct{}, maxRequests), starts: make(chan struct{}, maxStarts),
		procs: map[string]*proc{}, sources: map[int]source{}, ending: map[*proc]struct{}{}, conns: map[*client]struct{}{},
	}
	for _, dir := range []string{c.Root.Run, s.recordsDir(), s.ioDir(), s.launcher.Dir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, err
		}
	}
	if err := groups.Prepare(cgroup.Parent(c.Root)); err != nil {
		return nil, err
	}
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create", err)
	}
	if s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return s, s.watch(s.wake, unix.EPOLLIN)
}

func (s *Server) recordsDir() string     { return filepath.Join(s.Root.Run, "procs") }
func (s *Server) ioDir() string          { return filepath.Join(s.Root.Run, "io") }
func (s *Server) fifos(id string) string { return filepath.Join(s.ioDir(), id) }
func holderKey(id, nonce string) string  { return "proc/" + id + "/" + nonce }
func restKey(id, nonce string) string    { return restPrefix + id + "/" + nonce }
func pidfdKey(id, nonce string) string   { return "pidfd/" + id + "/" + nonce }
func (s *Server) watch(fd int, events uint32) error {
	err := unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
	if err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// listen makes the socket, for the owner only.
func listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	// Bound under a name nobody connects to until its mode is right.
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: temp}); err != nil {
		return nil, fmt.Errorf("bind %s: %w", temp, err)
	}
	if err := os.Chmod(temp, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Listen(fd, maxConns); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return nil, err
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// accept serves clients until the listener is closed.
func (s *Server) accept(l *net.UnixListener) {
	for {
		socket, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Error("accept a client", "err", err)
			time.Sleep(acceptPause) // out of descriptors or memory: the client tries again
			continue
		}
		if err := s.admit(socket); err != nil {
			s.log.Error("client refused", "err", err)
			_ = socket.Close()
		}
	}
}

const acceptPause = 50 * time.Millisecond

// admit takes a client of our own user.
func (s *Server) admit(socket *net.UnixConn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if int(cred.Uid) != os.Geteuid() {
		return errdefs.New(errdefs.ErrForbidden, "user %d may not use the runner", cred.Uid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) >= maxConns {
		return errdefs.New(errdefs.ErrExhausted, "%d clients are connected already", maxConns)
	}
	c := newClient(s, socket)
	s.conns[c] = struct{}{}
	go c.read()
	go c.write()
	return nil
}

// finishRequests gives requests under way a moment, then ends the connections.
func (s *Server) finishRequests() {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(lastWords):
		s.log.Warn("ending with requests under way")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.conn.Close()
	}
}

// park puts a copy of all that must not close into a new holder.
func (s *Server) park(*hold.Client) error {
	next, err := hold.Dial(s.Root.Socket("holder")) // one that stays for requests under way
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.holder = next
	all := make([]*proc, 0, len(s.procs))
	for _, p := range s.procs {
		all = append(all, p)
	}
	s.mu.Unlock()
	var errs []error
	for _, p := range all {
		errs = append(errs, s.keep(p))
	}
	return errors.Join(errs...)
}

// keep puts copies of a process's descriptors into the holder and has its exit watched.
func (s *Server) keep(p *proc) error {
	return errors.Join(s.keepStreams(p), s.keepPidfd(p))
}

// keepStreams must be done before the process starts: what it writes has a reader from then on,
// whatever becomes of us.
func (s *Server) keepStreams(p *proc) error {
	return s.keepAs(p, holderKey, (*proc).streamFDs)
}

func (s *Server) keepPidfd(p *proc) error {
	s.mu.Lock()
	holder, pid, start := s.holder, p.PID, p.StartTime
	ended := p.ended || p.dying
	s.mu.Unlock()
	watched := make(chan error, 1)
	go func() { // its answer need not be waited for before the other question
		if pid > 0 && !ended {
			watched <- holder.Watch(pid, start)
			return
		}
		watched <- nil
	}()
	err := s.keepAs(p, pidfdKey, func(p *proc) []int { return []int{p.pidfd} })
	return errors.Join(err, <-watched)
}

func (s *Server) keepAs(p *proc, key func(id, nonce string) string, which func(*proc) []int) error {
	s.mu.Lock()
	holder := s.holder
	if p.ended || p.dying {
		s.mu.Unlock()
		return nil
	}
	// Duplicates: the loop may close the originals meanwhile, and their numbers be used again.
	fds, err := duplicate(which(p))
	s.mu.Unlock()
	if err != nil || len(fds) == 0 {
		return err
	}
	defer closeAll(fds)
	return holder.Put(key(p.ID, p.Nonce), fds...)
}

// duplicate returns close-on-exec duplicates of those descriptors that are there.
func duplicate(fds []int) ([]int, error) {
	var out []int
	for _, fd := range fds {
		if fd < 0 {
			continue
		}
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			closeAll(out)
			return nil, os.NewSyscallError("dup", err)
		}
		out = append(out, d)
	}
	return out, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
