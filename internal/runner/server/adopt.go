package server

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/runner"
	"berth/internal/runner/hold/wire"
	"berth/internal/spool"
)

// adopt takes over what earlier runners started, and sweeps away what they left half made. It
// runs before any client is served.
func (s *Server) adopt() error {
	records, err := s.loadRecords()
	if err != nil {
		return err
	}
	known := map[string]record{}
	for _, r := range records {
		if r.PID == 0 {
			// The runner was killed in the midst of a start that it never answered.
			s.killHalfMade(r)
			s.letGo(r)
			if err := s.sweep(r); err != nil {
				s.log.Error("sweep away a process that was half made", "process", r.ID, "err", err)
			}
			continue
		}
		known[r.ID] = r
		p := newProc(r)
		s.procs[r.ID] = p
		if err := s.adoptProc(p); err != nil {
			s.log.Error("adopt a process", "process", r.ID, "err", err)
		}
	}
	return s.adoptRest(known)
}

// killHalfMade kills an exec'd process whose start nobody was told of. Its pid is not known; what
// it writes to is. (A container's first process is killed with its group; one on a terminal is
// hung up when that is closed.)
func (s *Server) killHalfMade(r record) {
	if r.first() {
		return
	}
	pids, err := s.groups.Pids(r.Group)
	if err != nil {
		s.log.Error("look for a process that was half made", "process", r.ID, "err", err)
	}
	prefix := s.fifos(r.ID) + string(filepath.Separator)
	for _, pid := range pids {
		for _, fd := range []string{"0", "1", "2"} {
			to, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "fd", fd))
			if err == nil && strings.HasPrefix(to, prefix) {
				_ = unix.Kill(pid, unix.SIGKILL)
				break
			}
		}
	}
}

// adoptProc takes one process over. A process whose parts are partly lost is adopted all the
// same: an end is noticed, by its pid if need be.
func (s *Server) adoptProc(p *proc) error {
	if p.Exit != nil {
		p.ended = true
		close(p.cleaned)
		s.letGo(p.record)
		return nil
	}
	if p.Boot != s.boot {
		exit := runner.Exit{Code: -1, At: time.Now()}
		_, err := s.update(p, func(r *record) { r.Exit = &exit })
		p.ended = true
		close(p.cleaned)
		return err
	}
	errs := []error{s.adoptStreams(p), s.adoptPidfd(p)}
	p.created = p.first() && s.launcher.Created(p.ID, p.PID)
	if p.Paused && p.first() && !s.groups.Frozen(p.Group) {
		_, err := s.update(p, func(r *record) { r.Paused = false })
		errs = append(errs, err)
	}
	// A holder that is new does not have all of it.
	errs = append(errs, s.keep(p), s.register(p))
	return errors.Join(errs...)
}

// adoptStreams gets the descriptors back from the holder or, when that is a new one that nobody
// parked them in, opens the FIFOs again. A terminal cannot be opened again.
func (s *Server) adoptStreams(p *proc) error {
	fds, err := s.holder.Get(holderKey(p.ID, p.Nonce))
	if err != nil {
		return err
	}
	if len(fds) > 0 && p.takeFDs(fds) {
		return nil
	}
	closeAll(fds)
	if p.Terminal {
		return errors.New("its terminal is lost: neither the holder nor the runner lived to hand it on")
	}
	dir := s.fifos(p.ID)
	if p.Spool != "" {
		for i, name := range []string{"stdout", "stderr"} {
			fd, err := openReader(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			p.streams = append(p.streams, &stream{fd: fd, number: spool.Stdout + uint8(i)})
		}
	}
	if p.Stdin && !p.StdinClosed {
		fd, err := openWriter(filepath.Join(dir, "stdin"))
		if err != nil {
			return err
		}
		p.stdin = fd
	}
	return nil
}

// adoptPidfd gets the pidfd back, or makes one if the pid still is the process's.
func (s *Server) adoptPidfd(p *proc) error {
	fds, err := s.holder.Get(pidfdKey(p.ID, p.Nonce))
	if err != nil {
		return err
	}
	if len(fds) == 1 {
		p.pidfd = fds[0]
		return nil
	}
	closeAll(fds)
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err == unix.ESRCH {
		return nil // dead and reaped: without a pidfd, register has it end
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	unix.CloseOnExec(fd)
	if start, err := wire.StartTime(p.PID); err != nil || start != p.StartTime {
		_ = unix.Close(fd) // the pid is another's by now
		return nil
	}
	p.pidfd = fd
	return nil
}

// adoptRest removes what no record leads to.
func (s *Server) adoptRest(known map[string]record) error {
	for _, prefix := range []string{"proc/", "pidfd/"} {
		keys, err := s.holder.List(prefix)
		if err != nil {
			return err
		}
		for _, key := range keys {
			id, nonce, _ := strings.Cut(strings.TrimPrefix(key, prefix), "/")
			if r, ok := known[id]; ok && r.Nonce == nonce {
				continue
			}
			if err := s.holder.Drop(key); err != nil {
				return err
			}
		}
	}
	if err := s.adoptRests(); err != nil {
		return err
	}
	ids, err := s.launcher.IDs()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if _, ok := known[id]; !ok {
			if err := s.launcher.Remove(id); err != nil {
				s.log.Error("remove the state of an unknown container", "id", id, "err", err)
			}
		}
	}
	entries, err := os.ReadDir(s.ioDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, ok := known[e.Name()]; !ok {
			if err := os.RemoveAll(s.fifos(e.Name())); err != nil {
				s.log.Error("remove the FIFOs of an unknown process", "id", e.Name(), "err", err)
			}
		}
	}
	return nil
}
