package server

import (
	"encoding/json"
	"net"
	"sync"

	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/runner/rpc"
)

// client is one connection. A goroutine reads requests, one writes events; answers are written
// by whoever has them.
type client struct {
	server *Server
	conn   *rpc.Conn
	gone   chan struct{}
	wake   chan struct{} // room for one

	mu     sync.Mutex
	exits  []runner.Event // at most one per process
	output []string       // IDs of processes with new output, each once
	marked map[string]bool
}

func newClient(s *Server, socket *net.UnixConn) *client {
	return &client{
		server: s, conn: rpc.NewConn(socket), gone: make(chan struct{}), wake: make(chan struct{}, 1),
		marked: map[string]bool{},
	}
}

// queue takes an event for the client; the same news is told once.
func (c *client) queue(e runner.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.Kind == runner.EventOutput {
		if c.marked[e.ID] {
			return
		}
		c.marked[e.ID] = true
		c.output = append(c.output, e.ID)
	} else {
		c.exits = append(c.exits, e)
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// write sends events until the connection ends.
func (c *client) write() {
	for {
		select {
		case <-c.gone:
			return
		case <-c.wake:
		}
		c.mu.Lock()
		var events []runner.Event
		for _, id := range c.output {
			events = append(events, runner.Event{Kind: runner.EventOutput, ID: id})
		}
		events = append(events, c.exits...)
		c.exits, c.output = nil, nil
		clear(c.marked)
		c.mu.Unlock()
		for _, e := range events {
			raw, err := json.Marshal(e)
			if err == nil {
				err = c.conn.Send(&rpc.Message{Body: raw})
			}
			if err != nil {
				_ = c.conn.Close() // read notices
				return
			}
		}
	}
}

// read handles requests until the connection ends. A request waits here for its place.
func (c *client) read() {
	s := c.server
	defer func() {
		close(c.gone)
		_ = c.conn.Close()
		s.mu.Lock()
		delete(s.conns, c)
		for _, p := range s.procs {
			p.dropWaits(c, 0)
		}
		s.mu.Unlock()
	}()
	for {
		m, err := c.conn.Recv()
		if err != nil {
			return
		}
		closeAll(m.FDs) // no request has any
		switch m.Op {
		case rpc.OpWait:
			s.wait(c, m)
		case rpc.OpCancel:
			s.mu.Lock()
			for _, p := range s.procs {
				p.dropWaits(c, m.Seq)
			}
			s.mu.Unlock()
		default:
			c.begin(m)
		}
	}
}

// begin handles a request in a goroutine of its own once there is a place for it.
func (c *client) begin(m *rpc.Message) {
	s := c.server
	place := s.requests
	switch m.Op {
	case rpc.OpCreate, rpc.OpStart, rpc.OpExec, rpc.OpPause, rpc.OpResume, rpc.OpUpdate:
	default:
		place = s.urgent // they do not wait for another operation, or end it
	}
	place <- struct{}{}
	s.mu.Lock()
	closing := s.closing
	if !closing {
		s.work.Add(1)
	}
	s.mu.Unlock()
	if closing {
		<-place
		c.answer(m.Seq, nil, nil, errdefs.New(errdefs.ErrUnavailable, "berth-runner: %s: it is ending; try again", m.Op))
		return
	}
	go func() {
		defer func() {
			<-place
			s.work.Done()
		}()
		result, fds, err := s.handle(c, m)
		c.answer(m.Seq, result, fds, err)
		closeAll(fds)
	}()
}

// answer sends the result of a request, or why there is none. fds stay the caller's.
func (c *client) answer(seq uint64, result any, fds []int, err error) {
	m := &rpc.Message{Seq: seq, FDs: fds}
	if err == nil && result != nil {
		m.Body, err = json.Marshal(result)
	}
	if err != nil {
		m.FDs = nil
		m.Fail(err)
	}
	if c.conn.Send(m) != nil {
		_ = c.conn.Close() // read notices
	}
}

// dropWaits forgets waits of a client, all of them or the one numbered seq. Server.mu is held.
func (p *proc) dropWaits(c *client, seq uint64) {
	left := p.waiters[:0]
	for _, w := range p.waiters {
		if w.client != c || seq != 0 && w.seq != seq {
			left = append(left, w)
		}
	}
	p.waiters = left
}

// maxWaits bounds the clients that wait for one process.
const maxWaits = 1024

// wait answers once the process has ended.
func (s *Server) wait(c *client, m *rpc.Message) {
	var r runner.IDRequest
	if err := m.Decode(&r); err != nil {
		c.answer(m.Seq, nil, nil, err)
		return
	}
	s.mu.Lock()
	p := s.procs[r.ID]
	var exit *runner.Exit
	var err error
	switch {
	case p == nil:
		err = errNoProcess(r.ID)
	case p.ended:
		exit = p.Exit
	case len(p.waiters) >= maxWaits:
		err = errdefs.New(errdefs.ErrExhausted, "wait for %s: %d others wait already", r.ID, maxWaits)
	default:
		p.waiters = append(p.waiters, waitFor{client: c, seq: m.Seq})
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	c.answer(m.Seq, exit, nil, err)
}

func errNoProcess(id string) error {
	return errdefs.New(errdefs.ErrNotFound, "process %s does not exist", id)
}

// stillThere refuses to begin what a client that is gone asked for: whoever comes after it asks
// what there is, and must not be surprised by more.
func (c *client) stillThere() error {
	if c.conn.PeerGone() {
		return errdefs.New(errdefs.ErrUnavailable, "berth-runner: whoever asked for the start is gone")
	}
	return nil
}

// handle does one request.
func (s *Server) handle(c *client, m *rpc.Message) (result any, fds []int, err error) {
	switch m.Op {
	case rpc.OpCreate:
		var r runner.CreateRequest
		if err := m.Decode(&r); err != nil {
			return nil, nil, err
		}
		result, err = s.create(c, r)
		return result, nil, err
	case rpc.OpExec:
		var r runner.ExecRequest
		if err := m.Decode(&r); err != nil {
			return nil, nil, err
		}
		result, err = s.exec(c, r)
		return result, nil, err
	case rpc.OpKill:
		var r runner.KillRequest
		if err := m.Decode(&r); err != nil {
			return nil, nil, err
		}
		return nil, nil, s.kill(r)
	case rpc.OpResize:
		var r runner.ResizeRequest
		if err := m.Decode(&r); err != nil {
			return nil, nil, err
		}
		return nil, nil, s.resize(r)
	case rpc.OpUpdate:
		var r runner.UpdateRequest
		if err := m.Decode(&r); err != nil {
			return nil, nil, err
		}
		return nil, nil, s.updateLimits(r)
	case rpc.OpList:
		return s.list(), nil, nil
	case rpc.OpInfo:
		return s.info(), nil, nil
	}
	return s.handleByID(m)
}

func (s *Server) handleByID(m *rpc.Message) (result any, fds []int, err error) {
	var r runner.IDRequest
	if err := m.Decode(&r); err != nil {
		return nil, nil, err
	}
	switch m.Op {
	case rpc.OpStart:
		return nil, nil, s.start(r.ID)
	case rpc.OpOpenStdin:
		fds, err = s.openStdin(r.ID)
		return nil, fds, err
	case rpc.OpCloseStdin:
		return nil, nil, s.closeStdin(r.ID)
	case rpc.OpPause:
		return nil, nil, s.pause(r.ID)
	case rpc.OpResume:
		return nil, nil, s.resume(r.ID)
	case rpc.OpDelete:
		return nil, nil, s.remove(r.ID)
	}
	return nil, nil, errdefs.New(errdefs.ErrUnsupported, "berth-runner: no operation %q; is it older than its client?", m.Op)
}
