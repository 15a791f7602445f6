package server

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/runner/hold/wire"
	"berth/internal/runner/launch"
)

// create makes a container, or leaves nothing of it.
func (s *Server) create(c *client, r runner.CreateRequest) (_ runner.Process, err error) {
	if err := checkIO(r.ID, r.IO); err != nil {
		return runner.Process{}, err
	}
	spec, err := launch.ReadSpec(r.Bundle)
	if err != nil {
		return runner.Process{}, err
	}
	s.starts <- struct{}{}
	defer func() { <-s.starts }()
	p := newProc(s.newRecord(r.ID, r.ID, r.IO))
	p.made = make(chan struct{})
	defer close(p.made)
	p.Terminal, p.Group = spec.Process.Terminal, spec.Linux.CgroupsPath
	if err := s.reserve(p); err != nil {
		return runner.Process{}, err
	}
	defer func() { <-p.op }()
	defer func() {
		if err != nil {
			s.abort(p)
		}
	}()
	if err := c.stillThere(); err != nil { // asked now that a list shows p: no moment is between
		return runner.Process{}, err
	}
	// The record comes first: whatever we leave half made when killed, it leads to.
	if err := s.save(p.record); err != nil {
		return runner.Process{}, err
	}
	err = s.launchInto(p, func(e launch.Stdio) (int, error) { return s.launcher.Create(p.ID, spec, e) })
	if err != nil {
		return runner.Process{}, err
	}
	s.mu.Lock()
	p.created = true
	s.mu.Unlock()
	if err := s.register(p); err != nil {
		return runner.Process{}, err
	}
	if r.Start {
		if err := s.begin(p); err != nil {
			return runner.Process{}, err
		}
	}
	return p.process(), nil
}

// exec starts one more process in a running container.
func (s *Server) exec(c *client, r runner.ExecRequest) (_ runner.Process, err error) {
	if err := checkIO(r.ID, r.IO); err != nil {
		return runner.Process{}, err
	}
	if err := launch.CheckProcess(r.Process); err != nil {
		return runner.Process{}, err
	}
	s.starts <- struct{}{}
	defer func() { <-s.starts }()
	first, err := s.lock(r.Container)
	if err != nil {
		return runner.Process{}, err
	}
	defer func() { <-first.op }()
	if err := s.mustRun(first); err != nil {
		return runner.Process{}, err
	}
	p := newProc(s.newRecord(r.ID, r.Container, r.IO))
	p.made = make(chan struct{})
	defer close(p.made)
	p.Terminal, p.Group = r.Process.Terminal, first.Group
	p.OOMKills = s.groups.OOMKills(p.Group)
	if err := s.reserve(p); err != nil {
		return runner.Process{}, err
	}
	defer func() { <-p.op }()
	defer func() {
		if err != nil {
			s.abort(p)
			if s.mustRun(first) != nil && errdefs.Kind(err) != errdefs.ErrExists {
				err = errdefs.New(errdefs.ErrConflict, "container %s ended while the process was started: %w", r.Container, err)
			}
		}
	}()
	if err := c.stillThere(); err != nil {
		return runner.Process{}, err
	}
	if err := s.save(p.record); err != nil {
		return runner.Process{}, err
	}
	err = s.launchInto(p, func(e launch.Stdio) (int, error) { return s.launcher.Exec(r.Container, r.Process, e) })
	if err != nil {
		return runner.Process{}, err
	}
	return p.process(), s.register(p)
}

func checkIO(id string, streams runner.IO) error {
	if err := checkID(id); err != nil {
		return err
	}
	if streams.Spool != "" && !filepath.IsAbs(streams.Spool) || streams.SpoolBytes < 0 {
		return errdefs.New(errdefs.ErrInvalid, "process %s: its spool %q of %d bytes: an absolute path and no negative size are needed", id, streams.Spool, streams.SpoolBytes)
	}
	return nil
}

func (s *Server) newRecord(id, container string, streams runner.IO) record {
	return record{
		Version: recordVersion, Boot: s.boot, ID: id, Container: container,
		Nonce: strconv.FormatInt(time.Now().UnixNano(), 36),
		Spool: streams.Spool, SpoolBytes: streams.SpoolBytes, Stdin: streams.Stdin,
	}
}

// reserve takes the ID for p, with p's operation under way.
func (s *Server) reserve(p *proc) error {
	p.op <- struct{}{}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.procs[p.ID] != nil {
		return errdefs.New(errdefs.ErrExists, "process %s exists already", p.ID)
	}
	s.procs[p.ID] = p
	return nil
}

// launchInto makes p's streams, starts it, and puts what must not close into the holder: the
// pipes before the program runs, the rest right after it is there.
func (s *Server) launchInto(p *proc, start func(launch.Stdio) (int, error)) error {
	ends, err := s.openStdio(p)
	if err != nil {
		return err
	}
	defer ends.close()
	keeping := s.goKeepStreams(p)
	if !p.first() { // an exec'd program runs when start returns, a container's waits
		if err := <-keeping; err != nil {
			return err
		}
	}
	pid, err := start(ends.Stdio)
	var keepErr error
	if p.first() {
		keepErr = <-keeping
	}
	if err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(pid, 0) // our child: it cannot be another's yet
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	unix.CloseOnExec(pidfd)
	startTime, err := wire.StartTime(pid)
	s.mu.Lock()
	p.pidfd = pidfd
	s.mu.Unlock()
	if err := errors.Join(err, keepErr); err != nil {
		return err
	}
	if p.Terminal {
		if err := ends.receivePty(p); err != nil {
			return err
		}
		if err := s.keepStreams(p); err != nil {
			return err
		}
	}
	_, err = s.update(p, func(r *record) { r.PID, r.StartTime = pid, startTime })
	return errors.Join(err, s.keepPidfd(p))
}

// goKeepStreams is keepStreams beside other work.
func (s *Server) goKeepStreams(p *proc) <-chan error {
	done := make(chan error, 1)
	go func() { done <- s.keepStreams(p) }()
	return done
}

// begin lets a created container's program start.
func (s *Server) begin(p *proc) error {
	if err := s.launcher.Start(p.ID, p.PID, p.pidfd); err != nil {
		return err
	}
	s.mu.Lock()
	p.created = false
	s.mu.Unlock()
	return nil
}

// abort takes back a process whose start failed. What is registered with the loop ends there;
// what is not is closed here.
func (s *Server) abort(p *proc) {
	s.mu.Lock()
	pidfd, registered := p.pidfd, false
	for _, src := range s.sources {
		registered = registered || src.proc == p
	}
	s.mu.Unlock()
	if pidfd >= 0 {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}
	var err error
	if registered {
		err = s.waitGone(p)
	} else {
		if pidfd >= 0 {
			err = waitDead(pidfd)
			reap(pidfd)
		}
		s.mu.Lock()
		p.ended, p.Exit = true, &runner.Exit{Code: -1, At: time.Now()} // for a deletion that waits
		p.closeFDs()
		s.mu.Unlock()
		s.letGo(p.record)
		close(p.cleaned)
	}
	if err := errors.Join(err, s.sweep(p.record)); err != nil {
		s.log.Error("remove a process that did not start", "process", p.ID, "err", err)
	}
	s.mu.Lock()
	delete(s.procs, p.ID)
	s.mu.Unlock()
}
