package server

import (
	"context"
	"errors"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/spool"
)

// Bounds of the loop.
const (
	eventsAtOnce = 64
	// lastOutput bounds the wait for the end of a dead container's output: nobody is left to
	// write, unless something outside its pid namespace has its FIFO open.
	lastOutput = time.Second
	// spoolFull is how often a spool at its limit is tried again; its reader trims it meanwhile.
	spoolFull = 10 * time.Millisecond
	// lookAgain is the time to the next look at a process whose status the kernel does not tell
	// yet, or at a spool that refused output.
	lookAgain = 20 * time.Millisecond
	ptyChunk  = 64 << 10 // bytes moved from a terminal at once
	// turnBytes bounds what one process may move before others have their turn.
	turnBytes = 4 << 20
)

// source is what a descriptor in the epoll set stands for.
type source struct {
	proc *proc
	kind sourceKind
	at   *stream // with fromStream
	rest *rest   // with fromRest
}

type sourceKind uint8

const (
	fromPidfd sourceKind = iota
	fromStream
	fromPty
	fromRest
)

// register puts a process's descriptors into the loop's hands.
func (s *Server) register(p *proc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	add := func(fd int, events uint32, src source) {
		if fd >= 0 && err == nil {
			s.sources[fd] = src
			err = s.watch(fd, events)
		}
	}
	for _, st := range p.streams {
		add(st.fd, unix.EPOLLIN, source{proc: p, kind: fromStream, at: st})
	}
	// Edge-triggered: a terminal whose other side nobody has open now hangs up all the time.
	add(p.pty, unix.EPOLLIN|unix.EPOLLET, source{proc: p, kind: fromPty})
	add(p.pidfd, unix.EPOLLIN, source{proc: p, kind: fromPidfd})
	if p.pidfd < 0 {
		s.dieLocked(p)
	}
	return err
}

// unregister takes a descriptor out of the loop's hands.
func (s *Server) unregister(fd int) {
	if fd < 0 {
		return
	}
	s.mu.Lock()
	delete(s.sources, fd)
	s.mu.Unlock()
	_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_DEL, fd, nil)
}

// poke makes the loop look around.
func (s *Server) poke() {
	_, _ = unix.Write(s.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// loop moves output and notices ends until ctx does.
func (s *Server) loop(ctx context.Context) {
	events := make([]unix.EpollEvent, eventsAtOnce)
	for ctx.Err() == nil {
		n, err := unix.EpollWait(s.epoll, events, s.finishDying())
		if err != nil && !errors.Is(err, unix.EINTR) {
			s.log.Error("epoll_wait", "err", err)
			return
		}
		for i := range max(n, 0) {
			fd := int(events[i].Fd)
			if fd == s.wake {
				var b [8]byte
				_, _ = unix.Read(s.wake, b[:])
				continue
			}
			s.mu.Lock()
			src, ok := s.sources[fd]
			s.mu.Unlock()
			// A descriptor closed a moment ago and used again gives one look too many, no more.
			if ok {
				s.look(fd, src)
			}
		}
	}
}

func (s *Server) look(fd int, src source) {
	switch src.kind {
	case fromStream:
		if src.proc.Terminal {
			s.pumpPty(src.proc, turnBytes) // through its pipe
			return
		}
		s.pump(src.proc, src.at, turnBytes)
	case fromPty:
		s.pumpPty(src.proc, turnBytes)
	case fromRest:
		s.discardRest(fd, src.rest)
	case fromPidfd:
		if !dead(fd) {
			return
		}
		s.unregister(fd) // it stays readable
		s.mu.Lock()
		s.dieLocked(src.proc)
		s.mu.Unlock()
	}
}

// dead tells whether the process behind a pidfd has ended.
func dead(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// dieLocked notes that the process is dead; its output is read to the end first.
func (s *Server) dieLocked(p *proc) {
	if p.dying || p.ended {
		return
	}
	p.dying, p.deadline = true, time.Now().Add(lastOutput)
	s.ending[p] = struct{}{}
	s.poke()
}

// finishDying lets dead processes end whose output is complete. It returns the time until it
// wants to be called again, in milliseconds, -1 for never.
func (s *Server) finishDying() int {
	s.mu.Lock()
	list := make([]*proc, 0, len(s.ending))
	for p := range s.ending {
		list = append(list, p)
	}
	s.mu.Unlock()
	timeout := -1
	for _, p := range list {
		if s.finish(p) {
			continue
		}
		if timeout < 0 {
			timeout = int(lookAgain / time.Millisecond)
		}
	}
	return timeout
}

// pump moves what is in a stream to the spool, at most about limit bytes, and tells whether
// nothing is left for now.
func (s *Server) pump(p *proc, st *stream, limit int64) (empty bool) {
	if st.eof {
		return true
	}
	var moved int64
	for moved < limit {
		n, err := s.store(p, st)
		moved += n
		if err == io.EOF {
			st.eof = true
			s.unregister(st.fd)
			empty = true
			break
		}
		if errors.Is(err, errdefs.ErrExhausted) { // the reader is slower than the process
			s.publish(runner.Event{Kind: runner.EventOutput, ID: p.ID})
			s.mute(p, st, spoolFull)
			break
		}
		if err != nil {
			s.log.Error("store output", "process", p.ID, "err", err)
			s.mute(p, st, lastOutput)
			break
		}
		if n == 0 {
			empty = true
			break
		}
	}
	if moved > 0 {
		s.publish(runner.Event{Kind: runner.EventOutput, ID: p.ID})
	}
	return empty
}

// store moves once.
func (s *Server) store(p *proc, st *stream) (int64, error) {
	if p.Spool == "" {
		return discard(st.fd)
	}
	if p.writer == nil {
		w, err := spool.OpenWriter(p.Spool, p.SpoolBytes)
		if err != nil {
			return 0, err
		}
		p.writer = w
	}
	if p.dying {
		p.writer.Last()
	}
	return p.writer.SpliceFrom(st.fd, st.number)
}

// mute takes a stream out of the loop for a moment: its spool refuses it, and it stays readable.
func (s *Server) mute(p *proc, st *stream, pause time.Duration) {
	if p.dying {
		return // finish tries again
	}
	s.unregister(st.fd)
	time.AfterFunc(pause, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, have := range p.streams { // still open, and the same
			if have == st {
				s.sources[st.fd] = source{proc: p, kind: fromStream, at: st}
				_ = s.watch(st.fd, unix.EPOLLIN)
			}
		}
	})
}

// discard throws away what is in a pipe.
func discard(fd int) (int64, error) {
	null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(null)
	n, err := unix.Splice(fd, nil, null, nil, turnBytes, unix.SPLICE_F_NONBLOCK)
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return 0, nil
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// pumpPty moves what the terminal has to its pipe and on to the spool. It tells whether the
// terminal has nothing more for now; eof, that nobody has its other side open.
func (s *Server) pumpPty(p *proc, limit int64) (empty, eof bool) {
	if p.pty < 0 {
		return true, true
	}
	var moved int64
	for {
		if !s.pump(p, p.streams[0], limit) {
			return false, false
		}
		if moved >= limit {
			// Edge-triggered: nothing tells us of what is left there, so make an edge.
			_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_MOD, p.pty, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(p.pty)})
			return false, false
		}
		n, err := unix.Splice(p.pty, nil, p.ptyIn, nil, ptyChunk, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return true, false
		case err == unix.EIO || err == nil && n == 0:
			return true, true
		case err != nil:
			s.log.Error("read a terminal", "process", p.ID, "err", err)
			return true, true
		default:
			moved += n
		}
	}
}

// drained moves what a dead process left behind and tells whether that was all.
func (s *Server) drained(p *proc) bool {
	if p.Terminal {
		empty, eof := s.pumpPty(p, turnBytes)
		// Others may have the terminal of an exec'd process open; the container's own is closed.
		return empty && (eof || !p.first())
	}
	all := true
	for _, st := range p.streams {
		if !p.first() {
			// What others that it left behind write from now on is not its output any more.
			s.pump(p, st, 2*pipeBytes)
			continue
		}
		all = s.pump(p, st, turnBytes) && st.eof && all
	}
	return all
}

// finish ends a dead process if all its output is in the spool and its status is known, or the
// time for both is over.
func (s *Server) finish(p *proc) bool {
	late := time.Now().After(p.deadline)
	if !s.drained(p) && !late {
		return false
	}
	exit, known := s.exitOf(p)
	if !known && !late {
		return false
	}
	if p.writer != nil {
		if err := p.writer.Close(); err != nil {
			s.log.Error("close spool", "process", p.ID, "err", err)
		}
		p.writer = nil
	}
	// On record before the process is reaped: killed in between, the next runner finds either.
	r, err := s.update(p, func(r *record) { r.Exit = &exit })
	if err != nil {
		s.log.Error("record exit", "process", p.ID, "err", err)
	}
	reap(p.pidfd)
	for _, st := range p.streams {
		s.unregister(st.fd)
	}
	s.unregister(p.pty)
	s.unregister(p.pidfd)
	s.leaveRest(p)
	s.mu.Lock()
	p.ended, p.created = true, false
	p.closeFDs()
	waiters := p.waiters
	p.waiters = nil
	delete(s.ending, p)
	s.mu.Unlock()
	s.publish(runner.Event{Kind: runner.EventExit, ID: p.ID, PID: r.PID, Exit: exit})
	go func() { // bounded by the time a client has to take an answer, and the holder to give one
		for _, w := range waiters {
			w.client.answer(w.seq, exit, nil, nil)
		}
	}()
	go func() {
		defer close(p.cleaned)
		s.letGo(r)
	}()
	return true
}

// letGo makes the holder forget an ended process.
func (s *Server) letGo(r record) {
	holder := s.holderNow()
	errs := []error{holder.Drop(holderKey(r.ID, r.Nonce)), holder.Drop(pidfdKey(r.ID, r.Nonce))}
	if r.PID > 0 && r.Boot == s.boot {
		errs = append(errs, holder.Forget(r.PID, r.StartTime))
	}
	if err := errors.Join(errs...); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
		s.log.Error("let the holder forget a process", "process", r.ID, "err", err)
	}
}

// publish sends an event to all clients. It never waits.
func (s *Server) publish(e runner.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.queue(e)
	}
}
