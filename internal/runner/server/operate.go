package server

import (
	"errors"
	"os"
	"sort"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/runner"
)

// Bounds of waiting for processes to die and for operations before ours.
const (
	deathTimeout = 15 * time.Second
	lockTimeout  = time.Minute
	groupPause   = 5 * time.Millisecond
)

// lock takes the operation of a container; the caller gives it back with <-p.op.
func (s *Server) lock(id string) (*proc, error) {
	s.mu.Lock()
	p := s.procs[id]
	s.mu.Unlock()
	if p == nil || !p.first() {
		return nil, errdefs.New(errdefs.ErrNotFound, "container %s does not exist", id)
	}
	timer := time.NewTimer(lockTimeout)
	defer timer.Stop()
	select {
	case p.op <- struct{}{}:
	case <-timer.C:
		return nil, errdefs.New(errdefs.ErrUnavailable, "container %s: another operation on it is not done after %s", id, lockTimeout)
	}
	s.mu.Lock()
	still := s.procs[id] == p
	s.mu.Unlock()
	if !still {
		<-p.op
		return nil, errdefs.New(errdefs.ErrNotFound, "container %s does not exist", id)
	}
	return p, nil
}

// mustRun refuses what needs a running container.
func (s *Server) mustRun(p *proc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case p.ended || p.dying:
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", p.ID)
	case p.created:
		return errdefs.New(errdefs.ErrConflict, "container %s is not started", p.ID)
	case p.Paused:
		return errdefs.New(errdefs.ErrConflict, "container %s is paused; unpause it first", p.ID)
	}
	return nil
}

func (s *Server) start(id string) error {
	p, err := s.lock(id)
	if err != nil {
		return err
	}
	defer func() { <-p.op }()
	s.mu.Lock()
	created := p.created && !p.dying
	s.mu.Unlock()
	if !created {
		return errdefs.New(errdefs.ErrConflict, "container %s is started already, or has ended", id)
	}
	return s.begin(p)
}

// kill needs no lock: it must work when another operation hangs.
func (s *Server) kill(r runner.KillRequest) error {
	if r.Signal < 1 || r.Signal > 64 {
		return errdefs.New(errdefs.ErrInvalid, "signal %d: there are 1 to 64", r.Signal)
	}
	s.mu.Lock()
	p := s.procs[r.ID]
	if p == nil {
		s.mu.Unlock()
		return errNoProcess(r.ID)
	}
	if p.ended || p.dying || p.pidfd < 0 {
		s.mu.Unlock()
		return errdefs.New(errdefs.ErrConflict, "process %s is not running", r.ID)
	}
	err := unix.PidfdSendSignal(p.pidfd, unix.Signal(r.Signal), nil, 0) // under the lock: pidfd stays what it is
	first, group, paused, pid := p.first(), p.Group, p.Paused, p.PID
	s.mu.Unlock()
	if errors.Is(err, unix.ESRCH) {
		return errdefs.New(errdefs.ErrConflict, "process %s is not running", r.ID)
	}
	if err != nil {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	if r.All {
		err = s.killGroup(group, pid, unix.Signal(r.Signal))
	}
	if first && paused && unix.Signal(r.Signal) == unix.SIGKILL {
		_ = s.resume(r.ID) // on v1 a frozen process dies only when it is let go
	}
	return err
}

func (s *Server) killGroup(group string, but int, signal unix.Signal) error {
	if signal == unix.SIGKILL {
		return s.groups.Kill(group)
	}
	pids, err := s.groups.Pids(group)
	for _, pid := range pids {
		if pid != but {
			_ = unix.Kill(pid, signal)
		}
	}
	return err
}

func (s *Server) pause(id string) error {
	p, err := s.lock(id)
	if err != nil {
		return err
	}
	defer func() { <-p.op }()
	if err := s.mustRun(p); err != nil {
		return err
	}
	// On record first: what is frozen is known to be, by whoever comes after us.
	if _, err := s.update(p, func(r *record) { r.Paused = true }); err != nil {
		return err
	}
	if err := s.launcher.Pause(id); err != nil {
		_, saveErr := s.update(p, func(r *record) { r.Paused = false })
		return errors.Join(err, saveErr)
	}
	return nil
}

func (s *Server) resume(id string) error {
	p, err := s.lock(id)
	if err != nil {
		return err
	}
	defer func() { <-p.op }()
	s.mu.Lock()
	paused := p.Paused && !p.ended
	s.mu.Unlock()
	if !paused {
		return errdefs.New(errdefs.ErrConflict, "container %s is not paused", id)
	}
	if err := s.launcher.Resume(id); err != nil {
		return err
	}
	_, err = s.update(p, func(r *record) { r.Paused = false })
	return err
}

func (s *Server) updateLimits(r runner.UpdateRequest) error {
	p, err := s.lock(r.ID)
	if err != nil {
		return err
	}
	defer func() { <-p.op }()
	s.mu.Lock()
	ended := p.ended || p.dying
	s.mu.Unlock()
	if ended {
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", r.ID)
	}
	return s.launcher.Update(r.ID, r.Resources)
}

// list waits for what is being made: a client that comes in the place of one that died must not
// take it for what nobody has begun.
func (s *Server) list() []runner.Status {
	s.mu.Lock()
	var begun []chan struct{}
	for _, p := range s.procs {
		if p.made != nil {
			begun = append(begun, p.made)
		}
	}
	s.mu.Unlock()
	for _, made := range begun {
		<-made
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]runner.Status, 0, len(s.procs))
	for _, p := range s.procs {
		if p.PID != 0 || p.ended { // else it is being made
			out = append(out, p.status())
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

func (s *Server) info() runner.Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	return runner.Info{PID: os.Getpid(), Version: s.Version, Processes: len(s.procs)}
}

// remove deletes a container with all in it, or one exec'd process.
func (s *Server) remove(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	s.mu.Lock()
	p := s.procs[id]
	s.mu.Unlock()
	if p == nil {
		return nil
	}
	// The kill comes before the lock: it ends an operation that hangs.
	s.killHard(p)
	select {
	case p.op <- struct{}{}:
	case <-time.After(deathTimeout):
		return errdefs.New(errdefs.ErrUnavailable, "delete %s: another operation on it does not end", id)
	}
	defer func() { <-p.op }()
	s.mu.Lock()
	gone := s.procs[id] != p
	s.mu.Unlock()
	if gone { // its creation failed, or another deletion was faster
		return nil
	}
	s.killHard(p) // that operation may have been its start
	victims := s.inContainer(p)
	var errs []error
	for _, v := range victims {
		if v != p {
			s.killHard(v)
		}
		errs = append(errs, s.waitGone(v))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, v := range victims {
		if err := s.sweep(v.record); err != nil {
			return err
		}
		s.mu.Lock()
		if s.procs[v.ID] == v {
			delete(s.procs, v.ID)
		}
		s.mu.Unlock()
	}
	return nil
}

// inContainer lists what a deletion of p takes along: p last.
func (s *Server) inContainer(p *proc) []*proc {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*proc
	for _, q := range s.procs {
		if q != p && p.first() && q.Container == p.ID && (q.PID != 0 || q.ended) {
			out = append(out, q)
		}
	}
	return append(out, p)
}

// killHard kills a process, and with a container's first one everything in its group.
func (s *Server) killHard(p *proc) {
	s.mu.Lock()
	if p.pidfd >= 0 && !p.ended {
		_ = unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0) // ESRCH is as good
	}
	s.mu.Unlock()
	if p.first() {
		_ = s.groups.Kill(p.Group) // sweep sees what is left
	}
}

// waitGone waits until the loop has ended a process and the holder has let go of it.
func (s *Server) waitGone(p *proc) error {
	s.mu.Lock()
	never := p.PID == 0 && !p.ended // its creation failed
	s.mu.Unlock()
	if never {
		return nil
	}
	select {
	case <-p.cleaned:
		return nil
	case <-time.After(deathTimeout):
		return errdefs.New(errdefs.ErrUnavailable, "process %s was killed and is not dead after %s", p.ID, deathTimeout)
	}
}

func waitDead(pidfd int) error {
	deadline := time.Now().Add(deathTimeout)
	for !dead(pidfd) {
		if time.Now().After(deadline) {
			return errdefs.New(errdefs.ErrUnavailable, "a process was killed and is not dead after %s", deathTimeout)
		}
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		_, _ = unix.Poll(fds, int(time.Until(deadline).Milliseconds())+1)
	}
	return nil
}

// sweep removes everything that a process left outside of us. Processes that are still in a
// container's group are killed.
func (s *Server) sweep(r record) error {
	if r.first() {
		if err := s.sweepGroup(r.Group); err != nil {
			return err
		}
		if err := s.launcher.Remove(r.ID); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(s.fifos(r.ID)); err != nil {
		return err
	}
	// The record goes last: until then it leads to what is left.
	return s.forgetRecord(r.ID)
}

func (s *Server) sweepGroup(group string) error {
	if group == "" {
		return nil
	}
	deadline := time.Now().Add(deathTimeout)
	if err := s.groups.Kill(group); err != nil {
		return err
	}
	for {
		err := s.groups.Remove(group)
		if err == nil || !errors.Is(err, unix.EBUSY) {
			return err
		}
		if err := s.groups.KillEverywhere(group); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return errdefs.New(errdefs.ErrUnavailable, "control group %s: %w", group, err)
		}
		time.Sleep(groupPause) // nothing tells of the last process's reaping
	}
}
