// Package rpc carries messages with descriptors between berth-runner and its clients.
//
// A message is one packet of a SOCK_SEQPACKET unix socket: a byte that says where the JSON is
// ('J': behind it; 'M': in a memory file, the first attached descriptor, which lets messages be
// larger than a socket's buffer), then the JSON. A request has Seq and Op and gets exactly one
// answer with the same Seq, in any order; a message with Seq 0 is an event.
// A Conn takes any number of senders and one receiver at a time.
package rpc

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// Limits of the protocol.
const (
	maxInline  = 32 << 10 // bytes of JSON in the packet itself
	MaxMessage = 16 << 20 // bytes of JSON
	maxFDs     = 4

	// sendTimeout is for a receiver that does not take its messages.
	sendTimeout = 20 * time.Second
)

// Operations.
const (
	OpCreate     = "create"
	OpStart      = "start"
	OpExec       = "exec"
	OpKill       = "kill"
	OpResize     = "resize"
	OpOpenStdin  = "openstdin"
	OpCloseStdin = "closestdin"
	OpPause      = "pause"
	OpResume     = "resume"
	OpUpdate     = "update"
	OpDelete     = "delete"
	OpList       = "list"
	OpInfo       = "info"
	OpWait       = "wait"
	OpCancel     = "cancel" // Body: the Seq of a wait that nobody wants any more; not answered
)

// Message is a request, an answer or an event.
type Message struct {
	Seq   uint64          `json:",omitempty"`
	Op    string          `json:",omitempty"` // of a request
	Kind  string          `json:",omitempty"` // of a failure: the name of an errdefs kind
	Error string          `json:",omitempty"` // of a failure; an answer without is good
	Body  json.RawMessage `json:",omitempty"`

	// FDs came with the message and are the receiver's, or go with it and stay the sender's.
	FDs []int `json:"-"`
}

// Fail makes m the answer that says err.
func (m *Message) Fail(err error) {
	m.Kind, m.Error = errdefs.Name(err), err.Error()
	if m.Error == "" {
		m.Error = "failed without a word"
	}
}

// Err is the error that an answer carries, of its kind; nil for a good one.
func (m *Message) Err() error {
	if m.Error == "" {
		return nil
	}
	return errdefs.FromName(m.Kind, m.Error)
}

// Decode reads the body into v.
func (m *Message) Decode(v any) error {
	if err := json.Unmarshal(m.Body, v); err != nil {
		return errdefs.New(errdefs.ErrInvalid, "runner: %s: the message is not understood: %w", m.Op, err)
	}
	return nil
}

// Conn is one end of a connection.
type Conn struct {
	socket *net.UnixConn
	send   sync.Mutex
	buf    []byte
	oob    []byte
}

// NewConn takes over a unixpacket socket.
func NewConn(socket *net.UnixConn) *Conn {
	return &Conn{socket: socket, buf: make([]byte, 1+maxInline), oob: make([]byte, unix.CmsgSpace((1+maxFDs)*4))}
}

// Close ends the connection; a waiting Recv returns.
func (c *Conn) Close() error { return c.socket.Close() }

// PeerGone tells whether the other side has closed, even if not all it sent is received yet.
func (c *Conn) PeerGone() bool {
	gone := true
	raw, err := c.socket.SyscallConn()
	if err == nil {
		_ = raw.Control(func(fd uintptr) {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			n, err := unix.Poll(poll, 0)
			gone = err == nil && n > 0 && poll[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
		})
	}
	return gone
}

// Send sends one message.
func (c *Conn) Send(m *Message) error {
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(raw) > MaxMessage {
		return errdefs.New(errdefs.ErrInvalid, "runner: %s: the message has %d bytes; at most %d are taken", m.Op, len(raw), MaxMessage)
	}
	packet, fds := append([]byte{'J'}, raw...), m.FDs
	if len(raw) > maxInline {
		file, err := memoryFile(raw)
		if err != nil {
			return err
		}
		defer file.Close()
		packet, fds = []byte{'M'}, append([]int{int(file.Fd())}, m.FDs...)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	c.send.Lock()
	defer c.send.Unlock()
	if err := c.socket.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, _, err = c.socket.WriteMsgUnix(packet, rights, nil)
	return err
}

func memoryFile(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("berth-message", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "message")
	if _, err := file.Write(content); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// Recv waits for the next message. io.EOF: the other side is gone.
func (c *Conn) Recv() (*Message, error) {
	n, oobn, flags, _, err := c.socket.ReadMsgUnix(c.buf, c.oob)
	if err != nil {
		return nil, err
	}
	fds, err := rights(c.oob[:oobn])
	if err != nil {
		return nil, err
	}
	m, err := decode(c.buf[:n], flags, &fds)
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	m.FDs = fds
	return m, nil
}

// decode reads a packet; it takes the memory file, if there is one, from fds.
func decode(packet []byte, flags int, fds *[]int) (*Message, error) {
	if len(packet) == 0 {
		return nil, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, errdefs.New(errdefs.ErrInvalid, "runner: a packet is too long")
	}
	raw := packet[1:]
	switch packet[0] {
	case 'J':
	case 'M':
		if len(*fds) == 0 {
			return nil, errdefs.New(errdefs.ErrInvalid, "runner: a message without its memory file")
		}
		file := os.NewFile(uintptr((*fds)[0]), "message")
		*fds = (*fds)[1:]
		defer file.Close()
		var err error
		if raw, err = readAll(file); err != nil {
			return nil, err
		}
	default:
		return nil, errdefs.New(errdefs.ErrInvalid, "runner: packet type %q is not known", packet[0])
	}
	m := new(Message)
	if err := json.Unmarshal(raw, m); err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "runner: a message is not understood: %w", err)
	}
	return m, nil
}

func readAll(file *os.File) ([]byte, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > MaxMessage {
		return nil, errdefs.New(errdefs.ErrInvalid, "runner: a message has more than %d bytes", MaxMessage)
	}
	raw := make([]byte, info.Size())
	if _, err := file.ReadAt(raw, 0); err != nil {
		return nil, fmt.Errorf("runner: read a message: %w", err)
	}
	return raw, nil
}

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range messages {
		got, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			return fds, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}
