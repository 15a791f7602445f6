// Package hold is the client of berth-holder: it keeps descriptors there, asks for recorded
// exits, controls the holder's children, and brings up a new holder when the old one is dead.
//
// DESIGN.md beside this file tells who does what when a holder dies or is replaced. The holder
// itself is package hold/holder; what both agree on is hold/wire. A Client may be used
// concurrently.
package hold

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner/hold/wire"
)

// Names of the holder's children, for Restart and Claim.
const (
	Runner = wire.Runner
	Daemon = wire.Daemon
)

// claimTimeout bounds the wait for a dead process's lock.
const claimTimeout = 2 * time.Second

// callTimeout bounds the wait for one answer: restarts and stops take the children's ten
// seconds of grace, twice.
const callTimeout = 40 * time.Second

// Client speaks to the holder at one socket. When the connection is lost the next call makes a
// new one.
type Client struct {
	path string

	mu     sync.Mutex
	conn   *conn
	closed bool
}

// conn is one connection. Answers come in the order of the requests.
type conn struct {
	socket *net.UnixConn
	lost   chan struct{}

	mu      sync.Mutex
	pending []chan answer
	dead    bool
}

type answer struct {
	fields []string
	fds    []int
}

// Dial connects to the holder's socket. errdefs.ErrUnavailable: nobody listens.
func Dial(path string) (*Client, error) {
	c := &Client{path: path}
	if _, err := c.connect(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Client) connect() (*conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errdefs.New(errdefs.ErrUnavailable, "berth-holder: the client is closed")
	}
	if c.conn != nil {
		select {
		case <-c.conn.lost:
		default:
			return c.conn, nil
		}
	}
	socket, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: c.path, Net: "unixpacket"})
	if err != nil {
		return nil, errdefs.New(errdefs.ErrUnavailable, "berth-holder at %s does not answer: %w", c.path, err)
	}
	c.conn = &conn{socket: socket, lost: make(chan struct{})}
	go c.conn.read()
	return c.conn, nil
}

// Lost is closed when the connection of now ends: the holder is dead. A later call may make
// another connection, which has a channel of its own.
func (c *Client) Lost() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn.lost
}

// Close ends the connection for good.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	err := c.conn.socket.Close()
	<-c.conn.lost
	if errors.Is(err, net.ErrClosed) { // the holder was faster
		return nil
	}
	return err
}

// read hands answers to those who wait, until the connection ends.
func (n *conn) read() {
	buf := make([]byte, wire.MaxPacket)
	oob := make([]byte, syscall.CmsgSpace(wire.MaxFDs*4))
	for {
		size, oobSize, _, _, err := n.socket.ReadMsgUnix(buf, oob)
		if err != nil || size == 0 {
			break
		}
		fds, err := wire.Rights(oob[:oobSize])
		if err != nil {
			break
		}
		n.mu.Lock()
		if len(n.pending) == 0 {
			n.mu.Unlock()
			wire.CloseAll(fds)
			break // an answer to nothing: this is no holder
		}
		to := n.pending[0]
		n.pending = n.pending[1:]
		n.mu.Unlock()
		to <- answer{fields: wire.Decode(buf[:size]), fds: fds} // never blocks: room for one
	}
	_ = n.socket.Close()
	n.mu.Lock()
	n.dead = true
	for _, to := range n.pending {
		close(to)
	}
	n.pending = nil
	n.mu.Unlock()
	close(n.lost)
}

// send queues a request; its answer arrives on the channel, which is closed if the connection
// ends before.
func (n *conn) send(fds []int, fields []string) (chan answer, error) {
	to := make(chan answer, 1)
	packet := wire.Encode(fields...)
	if len(packet) > wire.MaxPacket {
		return nil, errdefs.New(errdefs.ErrInvalid, "berth-holder: %s: a request has at most %d bytes", fields[0], wire.MaxPacket)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dead {
		return nil, net.ErrClosed
	}
	if _, _, err := n.socket.WriteMsgUnix(packet, rights, nil); err != nil {
		return nil, err
	}
	n.pending = append(n.pending, to)
	return to, nil
}

// call sends one request and waits for its answer. It does not try again: a put that the dead
// holder took must be parked anew anyway.
func (c *Client) call(fds []int, fields ...string) (answer, error) {
	n, err := c.connect()
	if err != nil {
		return answer{}, err
	}
	to, err := n.send(fds, fields)
	if errdefs.Kind(err) != nil {
		return answer{}, err
	}
	if err != nil {
		return answer{}, errdefs.New(errdefs.ErrUnavailable, "berth-holder: %s: the connection is lost: %w", fields[0], err)
	}
	timer := time.NewTimer(callTimeout)
	defer timer.Stop()
	select {
	case a, ok := <-to:
		if !ok {
			return answer{}, errdefs.New(errdefs.ErrUnavailable, "berth-holder: %s: it went away before it answered", fields[0])
		}
		if a.fields[0] == wire.OK {
			a.fields = a.fields[1:]
			return a, nil
		}
		wire.CloseAll(a.fds)
		if len(a.fields) == 3 {
			return answer{}, errdefs.FromName(a.fields[1], a.fields[2])
		}
		return answer{}, errdefs.New(errdefs.ErrInvalid, "berth-holder: %s: the answer %q is not understood", fields[0], a.fields)
	case <-timer.C:
		_ = n.socket.Close() // answers are in order: a late one would go to the wrong request
		return answer{}, errdefs.New(errdefs.ErrUnavailable, "berth-holder: %s: no answer within %s", fields[0], callTimeout)
	}
}

// Put duplicates the descriptors into the holder under key, replacing what was there.
func (c *Client) Put(key string, fds ...int) error {
	if len(fds) > wire.MaxFDs {
		return errdefs.New(errdefs.ErrInvalid, "put %s: at most %d descriptors under one key, not %d", key, wire.MaxFDs, len(fds))
	}
	_, err := c.call(fds, wire.OpPut, key)
	return err
}

// Get returns duplicates of the descriptors kept under key, owned by the caller and
// close-on-exec; nil if there are none.
func (c *Client) Get(key string) ([]int, error) {
	a, err := c.call(nil, wire.OpGet, key)
	return a.fds, err
}

// Drop makes the holder close what it keeps under key, if anything.
func (c *Client) Drop(key string) error {
	_, err := c.call(nil, wire.OpDrop, key)
	return err
}

// Keep is Put, Take is Get: the names that package network asks for.
func (c *Client) Keep(key string, fds ...int) error { return c.Put(key, fds...) }

// Take is Get.
func (c *Client) Take(key string) ([]int, error) { return c.Get(key) }

// List returns the keys with the prefix, in order.
func (c *Client) List(prefix string) ([]string, error) {
	var out []string
	after := ""
	for {
		a, err := c.call(nil, wire.OpList, prefix, after)
		if err != nil {
			return nil, err
		}
		if len(a.fields) == 0 {
			return out, nil
		}
		out = append(out, a.fields...)
		after = out[len(out)-1]
	}
}

// Watch makes the holder record the exit of a process, should that become its child because
// the process's own parent died.
func (c *Client) Watch(pid int, startTime uint64) error {
	_, err := c.call(nil, wire.OpWatch, strconv.Itoa(pid), strconv.FormatUint(startTime, 10))
	return err
}

// Forget is the opposite of Watch; it also removes the record.
func (c *Client) Forget(pid int, startTime uint64) error {
	_, err := c.call(nil, wire.OpForget, strconv.Itoa(pid), strconv.FormatUint(startTime, 10))
	return err
}

// ExitOf returns the recorded exit of a watched process. errdefs.ErrNotFound: the holder was
// not its parent, or it has not ended.
func (c *Client) ExitOf(pid int, startTime uint64) (syscall.WaitStatus, time.Time, error) {
	a, err := c.call(nil, wire.OpExitOf, strconv.Itoa(pid), strconv.FormatUint(startTime, 10))
	if err != nil {
		return 0, time.Time{}, err
	}
	if len(a.fields) == 2 {
		status, err := strconv.Atoi(a.fields[0])
		nanos, err2 := strconv.ParseInt(a.fields[1], 10, 64)
		if err == nil && err2 == nil {
			return syscall.WaitStatus(status), time.Unix(0, nanos), nil
		}
	}
	return 0, time.Time{}, errdefs.New(errdefs.ErrInvalid, "berth-holder: the exit %q is not understood", a.fields)
}

// Hello tells the holder which version of the named child runs.
func (c *Client) Hello(name, version string) error {
	_, err := c.call(nil, wire.OpHello, name, version)
	return err
}

// Restart ends the named child (SIGTERM, after ten seconds SIGKILL), starts the program that is
// now on disk and returns then.
func (c *Client) Restart(name string) error {
	_, err := c.call(nil, wire.OpRestart, name)
	return err
}

// Stop ends the children and returns when they are gone. With keep the holder stays and holds
// everything; without, it ends too. Containers are not touched.
func (c *Client) Stop(keep bool) error {
	how := wire.StopAll
	if keep {
		how = wire.StopKeep
	}
	_, err := c.call(nil, wire.OpStop, how)
	return err
}

// Start lets the children run again after Stop with keep.
func (c *Client) Start() error {
	_, err := c.call(nil, wire.OpStart)
	return err
}

// Reexec replaces the holder by the program that is now on disk, in place: same pid, children,
// descriptors and connections.
func (c *Client) Reexec() error {
	_, err := c.call(nil, wire.OpReexec)
	return err
}

// Status is what the holder tells of itself.
type Status struct {
	PID      int
	Version  string
	Mode     string // running, kept (after Stop with keep) or ending
	Children []Child
}

// Child is one of the holder's two children.
type Child struct {
	Name      string
	PID       int    // 0: not running
	StartTime uint64 // clock ticks since boot
	Since     time.Time
	Restarts  int
	Version   string // as the child said with Hello
}

// Status asks the holder about itself and its children.
func (c *Client) Status() (Status, error) {
	a, err := c.call(nil, wire.OpStatus)
	if err != nil {
		return Status{}, err
	}
	const head, perChild = 3, 6
	if len(a.fields) < head || (len(a.fields)-head)%perChild != 0 {
		return Status{}, errdefs.New(errdefs.ErrInvalid, "berth-holder: the status %q is not understood", a.fields)
	}
	s := Status{Version: a.fields[1], Mode: a.fields[2]}
	s.PID, _ = strconv.Atoi(a.fields[0]) // a number that is none reads as 0
	for f := a.fields[head:]; len(f) > 0; f = f[perChild:] {
		child := Child{Name: f[0], Version: f[5]}
		child.PID, _ = strconv.Atoi(f[1])
		child.StartTime, _ = strconv.ParseUint(f[2], 10, 64)
		if since, _ := strconv.ParseInt(f[3], 10, 64); since > 0 {
			child.Since = time.Unix(since, 0)
		}
		child.Restarts, _ = strconv.Atoi(f[4])
		s.Children = append(s.Children, child)
	}
	return s, nil
}

// Claim makes the calling process the one of this name below run, until it dies: a second one
// is refused with errdefs.ErrConflict. A new holder finds by it what a dead one left running.
func Claim(run, name string) error {
	path := run + "/" + name + ".pid"
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CREAT|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	// A child that the one before us forked and that has not executed its program yet still has
	// the lock, for a moment.
	for end := time.Now().Add(claimTimeout); ; time.Sleep(dialEvery) {
		if err = syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			break
		}
		if time.Now().After(end) {
			_ = syscall.Close(fd)
			return errdefs.New(errdefs.ErrConflict, "%s: another one already runs on %s", name, run)
		}
	}
	start, err := wire.StartTime(os.Getpid())
	if err != nil {
		return err
	}
	text := strconv.Itoa(os.Getpid()) + " " + strconv.FormatUint(start, 10) + "\n"
	if err := syscall.Ftruncate(fd, 0); err != nil {
		return &os.PathError{Op: "truncate", Path: path, Err: err}
	}
	if _, err := syscall.Pwrite(fd, []byte(text), 0); err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil // fd stays open, and with it the lock
}

// dialUntil dials until it succeeds, the context ends, or again says to do something else.
func dialUntil(ctx context.Context, path string, again func() error) (*Client, error) {
	for {
		c, err := Dial(path)
		if err == nil {
			return c, nil
		}
		if againErr := again(); againErr != nil {
			return nil, againErr
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(dialEvery):
		}
	}
}
