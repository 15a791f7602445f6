package runner

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/runner/rpc"
)

// Client is one connection to berth-runner. Its methods may be used concurrently. Once Closed
// is closed every call fails with errdefs.ErrUnavailable: dial again, call List, and read
// spools from the last offsets.
type Client struct {
	conn   *rpc.Conn
	closed chan struct{}
	events chan Event
	queue  eventQueue

	mu      sync.Mutex
	seq     uint64
	pending map[uint64]chan *rpc.Message
	dead    bool
}

// Dial connects to the runner's socket. errdefs.ErrUnavailable: nobody listens there.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	socket, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, errdefs.New(errdefs.ErrUnavailable, "berth-runner at %s does not answer: %w", path, err)
	}
	c := &Client{
		conn: rpc.NewConn(socket.(*net.UnixConn)), closed: make(chan struct{}), events: make(chan Event),
		pending: map[uint64]chan *rpc.Message{},
	}
	c.queue.init()
	go c.read()
	go c.deliver()
	return c, nil
}

// Close ends the connection. Nothing happens to processes.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.closed
	return err
}

// Closed is closed when the connection has ended.
func (c *Client) Closed() <-chan struct{} { return c.closed }

// Events tells of every exit and of new output since Dial, the latter coalesced: a reader that
// is slow gets one event for many, and never makes the runner wait. It is closed with the
// connection.
func (c *Client) Events() <-chan Event { return c.events }

func (c *Client) read() {
	for {
		m, err := c.conn.Recv()
		if err != nil {
			break
		}
		if m.Seq == 0 {
			var e Event
			if json.Unmarshal(m.Body, &e) == nil {
				c.queue.add(e)
			}
			continue
		}
		c.mu.Lock()
		to := c.pending[m.Seq]
		delete(c.pending, m.Seq)
		c.mu.Unlock()
		if to == nil {
			closeAll(m.FDs) // nobody waits for it any more
			continue
		}
		to <- m // never blocks: room for one
	}
	_ = c.conn.Close()
	c.mu.Lock()
	c.dead = true
	for _, to := range c.pending {
		close(to)
	}
	c.pending = nil
	c.mu.Unlock()
	close(c.closed)
}

func (c *Client) deliver() {
	defer close(c.events)
	for {
		e, ok := c.queue.take(c.closed)
		if !ok {
			return
		}
		select {
		case c.events <- e:
		case <-c.closed:
			return
		}
	}
}

// call sends a request and waits for its answer, whose body goes to result unless that is nil.
// An operation under way in the runner is not undone when ctx ends.
func (c *Client) call(ctx context.Context, op string, body, result any) ([]int, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	to := make(chan *rpc.Message, 1)
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return nil, lost(op)
	}
	c.seq++
	seq := c.seq
	c.pending[seq] = to
	c.mu.Unlock()
	if err := c.conn.Send(&rpc.Message{Seq: seq, Op: op, Body: raw}); err != nil {
		c.forget(seq)
		if errdefs.Kind(err) != nil {
			return nil, err
		}
		return nil, errdefs.New(errdefs.ErrUnavailable, "berth-runner: %s: %w", op, err)
	}
	select {
	case m, ok := <-to:
		if !ok {
			return nil, lost(op)
		}
		err := m.Err()
		if err == nil && result != nil {
			err = m.Decode(result)
		}
		if err != nil {
			closeAll(m.FDs)
			return nil, err
		}
		return m.FDs, nil
	case <-ctx.Done():
		if !c.forget(seq) { // it came in the meantime: its descriptors must not leak
			if m := <-to; m != nil {
				closeAll(m.FDs)
			}
			return nil, ctx.Err()
		}
		if op == rpc.OpWait {
			raw, _ := json.Marshal(seq) // a number always is JSON
			_ = c.conn.Send(&rpc.Message{Seq: seq, Op: rpc.OpCancel, Body: raw})
		}
		return nil, ctx.Err()
	}
}

// forget tells whether the answer had not been taken off the connection yet; it never will be.
func (c *Client) forget(seq uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, waiting := c.pending[seq]
	delete(c.pending, seq)
	return waiting
}

func lost(op string) error {
	return errdefs.New(errdefs.ErrUnavailable, "berth-runner: %s: the connection is lost", op)
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// Create makes a container, and starts it if the request says so.
//
// errdefs.ErrExists: the ID is taken. errdefs.ErrNoProgram and errdefs.ErrInvocation: the
// program cannot be started. After any error nothing of the container is left.
func (c *Client) Create(ctx context.Context, r CreateRequest) (Process, error) {
	var p Process
	_, err := c.call(ctx, rpc.OpCreate, r, &p)
	return p, err
}

// Start lets a created container's program begin. errdefs.ErrConflict: it has begun or ended.
func (c *Client) Start(ctx context.Context, id string) error {
	_, err := c.call(ctx, rpc.OpStart, IDRequest{id}, nil)
	return err
}

// Exec starts one more process in a running container, with Create's errors for programs that
// cannot be started; errdefs.ErrConflict: the container does not run or is paused.
func (c *Client) Exec(ctx context.Context, r ExecRequest) (Process, error) {
	var p Process
	_, err := c.call(ctx, rpc.OpExec, r, &p)
	return p, err
}

// Kill sends a signal to a process, or with all to every process in its container.
// errdefs.ErrConflict: it has ended.
func (c *Client) Kill(ctx context.Context, id string, signal int, all bool) error {
	_, err := c.call(ctx, rpc.OpKill, KillRequest{ID: id, Signal: signal, All: all}, nil)
	return err
}

// Resize sets the size of a process's terminal in characters. errdefs.ErrConflict: it has none.
func (c *Client) Resize(ctx context.Context, id string, height, width uint16) error {
	_, err := c.call(ctx, rpc.OpResize, ResizeRequest{ID: id, Height: height, Width: width}, nil)
	return err
}

// OpenStdin returns a writer of the process's standard input: the end of a FIFO, or its
// terminal, which must not be read. The caller closes it; the process sees the end of its input
// only after CloseStdin, when all writers are closed. errdefs.ErrConflict: it has no standard
// input, or that is closed.
func (c *Client) OpenStdin(ctx context.Context, id string) (*os.File, error) {
	fds, err := c.call(ctx, rpc.OpOpenStdin, IDRequest{id}, nil)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		closeAll(fds)
		return nil, errdefs.New(errdefs.ErrInvalid, "berth-runner: standard input of %s: %d descriptors came", id, len(fds))
	}
	return os.NewFile(uintptr(fds[0]), "stdin of "+id), nil
}

// CloseStdin lets go of the process's standard input: once other writers are closed too, it
// reads the end of file. For a terminal it does nothing.
func (c *Client) CloseStdin(ctx context.Context, id string) error {
	_, err := c.call(ctx, rpc.OpCloseStdin, IDRequest{id}, nil)
	return err
}

// Pause freezes all processes of a container. errdefs.ErrConflict: it is not running.
func (c *Client) Pause(ctx context.Context, id string) error {
	_, err := c.call(ctx, rpc.OpPause, IDRequest{id}, nil)
	return err
}

// Resume lets them go on. errdefs.ErrConflict: it is not paused.
func (c *Client) Resume(ctx context.Context, id string) error {
	_, err := c.call(ctx, rpc.OpResume, IDRequest{id}, nil)
	return err
}

// Update changes a container's limits; what is nil or empty stays as it is.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	_, err := c.call(ctx, rpc.OpUpdate, UpdateRequest{ID: id, Resources: r}, nil)
	return err
}

// Delete removes a container with all its processes, killing those that run, or one exec'd
// process. It is idempotent: what does not exist is deleted. The spool is the caller's.
func (c *Client) Delete(ctx context.Context, id string) error {
	_, err := c.call(ctx, rpc.OpDelete, IDRequest{id}, nil)
	return err
}

// List returns all processes that are not deleted.
func (c *Client) List(ctx context.Context) ([]Status, error) {
	var out []Status
	_, err := c.call(ctx, rpc.OpList, struct{}{}, &out)
	return out, err
}

// Info describes the runner.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var out Info
	_, err := c.call(ctx, rpc.OpInfo, struct{}{}, &out)
	return out, err
}

// Wait waits until the process has ended and all its output is in its spool.
func (c *Client) Wait(ctx context.Context, id string) (Exit, error) {
	var out Exit
	_, err := c.call(ctx, rpc.OpWait, IDRequest{id}, &out)
	return out, err
}

// eventQueue holds what the reader of events has not taken yet: at most one output event and
// one exit per process.
type eventQueue struct {
	mu     sync.Mutex
	order  []Event
	output map[string]bool
	wake   chan struct{} // room for one
}

func (q *eventQueue) init() {
	q.output, q.wake = map[string]bool{}, make(chan struct{}, 1)
}

func (q *eventQueue) add(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e.Kind == EventOutput {
		if q.output[e.ID] {
			return
		}
		q.output[e.ID] = true
	}
	q.order = append(q.order, e)
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *eventQueue) take(closed <-chan struct{}) (Event, bool) {
	for {
		q.mu.Lock()
		if len(q.order) > 0 {
			e := q.order[0]
			q.order = q.order[1:]
			if e.Kind == EventOutput {
				delete(q.output, e.ID)
			}
			q.mu.Unlock()
			return e, true
		}
		q.mu.Unlock()
		select {
		case <-q.wake:
		case <-closed:
			return Event{}, false
		}
	}
}

// Unavailable tells whether err means that the runner could not be asked, so that asking a new
// connection may help.
func Unavailable(err error) bool {
	return errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed)
}
