package main

import (
	"sync"

	"golang.org/x/sys/unix"

	"berth/internal/runner/hold"
)

// sockets keeps descriptors with the holder and remembers a copy of each, so that a new holder
// can be given all of them when the old one dies. It implements network.Sockets.
type sockets struct {
	holder *hold.Client

	mu  sync.Mutex
	fds map[string][]int // duplicates owned by this struct
}

func newSockets(h *hold.Client) *sockets { return &sockets{holder: h, fds: map[string][]int{}} }

// Keep duplicates the descriptors into the holder under key, replacing what was there.
func (s *sockets) Keep(key string, fds ...int) error {
	if err := s.remember(key, fds); err != nil {
		return err
	}
	return s.holder.Put(key, fds...)
}

func (s *sockets) remember(key string, fds []int) error {
	copies := make([]int, 0, len(fds))
	for _, fd := range fds {
		c, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(copies)
			return err
		}
		copies = append(copies, c)
	}
	s.mu.Lock()
	old := s.fds[key]
	s.fds[key] = copies
	s.mu.Unlock()
	closeAll(old)
	return nil
}

// Take returns descriptors kept under key, owned by the caller; none when there are none.
func (s *sockets) Take(key string) ([]int, error) {
	fds, err := s.holder.Get(key)
	if err != nil || len(fds) == 0 {
		return nil, err
	}
	if err := s.remember(key, fds); err != nil {
		closeAll(fds)
		return nil, err
	}
	return fds, nil
}

// Drop forgets key.
func (s *sockets) Drop(key string) error {
	s.mu.Lock()
	old := s.fds[key]
	delete(s.fds, key)
	s.mu.Unlock()
	closeAll(old)
	return s.holder.Drop(key)
}

// park gives all of them to another holder.
func (s *sockets) park(next *hold.Client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, fds := range s.fds {
		if err := next.Put(key, fds...); err != nil {
			return err
		}
	}
	return nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd) // ours alone: nothing to be done about an error
	}
}
