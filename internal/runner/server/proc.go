package server

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/runner"
	"berth/internal/spool"
)

// proc is a process. Its fields are guarded by Server.mu, except that the loop alone uses the
// writer and moves what is in the streams.
type proc struct {
	record
	created bool // waits for Start
	pidfd   int  // -1: none

	streams []*stream
	pty     int // master; -1: none
	ptyIn   int // write end of the pipe that the terminal's output takes; -1: none
	stdin   int // write end; -1: none
	writer  *spool.Writer

	dying    bool // the process is dead, its output is still read
	deadline time.Time
	ended    bool // record.Exit is set
	waiters  []waitFor
	cleaned  chan struct{} // closed when the holder has let go of an ended process
	made     chan struct{} // closed when its creation succeeded or failed; nil: it is adopted

	// op has room for one: the operation that changes the container (its first process's is used).
	op chan struct{}
	// saving orders changes of the record; it is taken before Server.mu.
	saving sync.Mutex
}

// stream is a pipe that output comes through.
type stream struct {
	fd     int
	number uint8 // spool.Stdout or spool.Stderr
	eof    bool
}

// waitFor is a client's wait for the end of a process.
type waitFor struct {
	client *client
	seq    uint64
}

func newProc(r record) *proc {
	return &proc{
		record: r, pidfd: -1, pty: -1, ptyIn: -1, stdin: -1,
		cleaned: make(chan struct{}), op: make(chan struct{}, 1),
	}
}

// streamFDs lists what the holder keeps for the process, in the order that adoptFDs expects.
func (p *proc) streamFDs() []int {
	var out []int
	if p.Terminal {
		if p.pty < 0 {
			return nil
		}
		return []int{p.pty, p.streams[0].fd, p.ptyIn}
	}
	for _, st := range p.streams {
		out = append(out, st.fd)
	}
	if p.stdin >= 0 {
		out = append(out, p.stdin)
	}
	return out
}

// takeFDs is the inverse of streamFDs. It tells whether fds fit.
func (p *proc) takeFDs(fds []int) bool {
	outputs := 2
	if p.Spool == "" {
		outputs = 0
	}
	if p.Terminal {
		if len(fds) != 3 {
			return false
		}
		p.pty, p.ptyIn = fds[0], fds[2]
		p.streams = []*stream{{fd: fds[1], number: spool.Stdout}}
		return true
	}
	if n := len(fds); n != outputs && n != outputs+1 {
		return false
	}
	for i := range outputs {
		p.streams = append(p.streams, &stream{fd: fds[i], number: spool.Stdout + uint8(i)})
	}
	if len(fds) > outputs {
		p.stdin = fds[outputs]
	}
	return true
}

// closeFDs closes everything but the spool's writer, which is the loop's.
func (p *proc) closeFDs() {
	for _, st := range p.streams {
		_ = unix.Close(st.fd)
	}
	for _, fd := range []int{p.pty, p.ptyIn, p.stdin, p.pidfd} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	p.streams, p.pty, p.ptyIn, p.stdin, p.pidfd = nil, -1, -1, -1, -1
}

func (p *proc) status() runner.Status {
	s := runner.Status{Process: p.process(), State: runner.Running, Terminal: p.Terminal}
	switch {
	case p.ended:
		s.State, s.Exit = runner.Stopped, *p.Exit
	case p.created:
		s.State = runner.Created
	case p.Paused:
		s.State = runner.Paused
	}
	return s
}

func (p *proc) process() runner.Process {
	return runner.Process{ID: p.ID, Container: p.Container, PID: p.PID, StartTime: p.StartTime}
}
