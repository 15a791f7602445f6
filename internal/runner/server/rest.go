package server

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// An exec'd process may leave others behind that go on writing to its FIFOs: a server that was
// started from a shell, say. Nobody wants to read that once the process has ended, but the
// writers must not come to a halt when the pipe is full: it is read on and thrown away, until
// they close it.

const (
	restPrefix = "rest/"
	maxRests   = 1024
)

// rest is what is left of one ended process's output pipes. The loop alone changes it.
type rest struct {
	key  string // in the holder
	open int    // of its descriptors
}

// leaveRest takes over those output pipes of an ending process that others have open, before
// its descriptors are closed.
func (s *Server) leaveRest(p *proc) {
	if p.first() || p.Terminal {
		return // nobody is left; who has a dead terminal open is told by SIGHUP
	}
	var open []int
	for _, st := range p.streams {
		if !st.eof {
			open = append(open, st.fd)
		}
	}
	if len(open) == 0 || s.rests >= maxRests {
		return
	}
	fds, err := duplicate(open)
	if err == nil {
		err = s.holderNow().Put(restKey(p.ID, p.Nonce), fds...)
	}
	if err == nil {
		err = s.watchRest(restKey(p.ID, p.Nonce), fds)
	}
	if err != nil {
		closeAll(fds)
		s.log.Error("read on behind an ended process", "process", p.ID, "err", err)
	}
}

// watchRest owns fds unless it fails.
func (s *Server) watchRest(key string, fds []int) error {
	r := &rest{key: key, open: len(fds)}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, fd := range fds {
		if err := s.watch(fd, unix.EPOLLIN); err != nil {
			for _, added := range fds[:i] {
				delete(s.sources, added)
			}
			return err
		}
		s.sources[fd] = source{kind: fromRest, rest: r}
	}
	s.rests++
	return nil
}

// discardRest throws away what came, and lets go at the end.
func (s *Server) discardRest(fd int, r *rest) {
	_, err := discard(fd)
	if err == nil {
		return
	}
	if err != io.EOF {
		s.log.Error("throw output away", "err", err)
	}
	s.unregister(fd)
	_ = unix.Close(fd)
	if r.open--; r.open > 0 {
		return
	}
	s.mu.Lock()
	s.rests--
	s.mu.Unlock()
	if err := s.holderNow().Drop(r.key); err != nil {
		s.log.Error("let the holder forget a rest", "key", r.key, "err", err)
	}
}

// adoptRests goes on where the runner before us was.
func (s *Server) adoptRests() error {
	keys, err := s.holder.List(restPrefix)
	if err != nil {
		return err
	}
	for _, key := range keys {
		fds, err := s.holder.Get(key)
		if err != nil {
			return err
		}
		if len(fds) == 0 {
			continue
		}
		if err := s.watchRest(key, fds); err != nil {
			closeAll(fds)
			return os.NewSyscallError("adopt "+key, err)
		}
	}
	return nil
}
