package dockerapi

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// Content types of hijacked and log streams.
const (
	contentRaw         = "application/vnd.docker.raw-stream"
	contentMultiplexed = "application/vnd.docker.multiplexed-stream"
)

// versionMultiplexedType is from when streams with frames have a content type of their own.
const versionMultiplexedType = 42

// maxStreams bounds the clients attached at one time (a few more when many come at once).
const maxStreams = 8192

// drainGrace is how long a client may take to end its side of a stream that is over.
const drainGrace = 5 * time.Second

// streamType is the content type of a process's output.
func streamType(terminal bool, version int) string {
	if terminal || version < versionMultiplexedType {
		return contentRaw
	}
	return contentMultiplexed
}

// duplex is a hijacked connection. One goroutine reads it, by pump; any may write.
type duplex struct {
	net.Conn
	server *Server
	input  io.Reader // what the HTTP server had read ahead, then the connection
}

// hijack takes the connection over from the HTTP server and answers with docker's upgrade.
// The caller ends with finish.
func (s *Server) hijack(w http.ResponseWriter, r *request, contentType string) (*duplex, error) {
	s.hijackMu.Lock()
	full := len(s.hijacked) >= maxStreams
	s.hijackMu.Unlock()
	if full {
		return nil, errdefs.New(errdefs.ErrUnavailable, "%d streams are attached, which is the limit; end some first", maxStreams)
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, invalid("this connection cannot carry a stream: %w", err)
	}
	if rec, ok := w.(*responseWriter); ok {
		rec.status = http.StatusSwitchingProtocols // nothing more may be written through it
	}
	_ = conn.SetDeadline(time.Time{}) // fails only on a closed connection, which the next write tells
	ahead, _ := rw.Reader.Peek(rw.Reader.Buffered())
	d := &duplex{Conn: conn, server: s, input: io.MultiReader(bytes.NewReader(bytes.Clone(ahead)), conn)}
	s.hijackMu.Lock()
	if s.stopping {
		s.hijackMu.Unlock()
		conn.Close()
		return nil, errdefs.New(errdefs.ErrUnavailable, "the daemon is stopping; try again")
	}
	s.hijacked[conn] = struct{}{}
	s.hijackers.Add(1)
	s.hijackMu.Unlock()

	var head strings.Builder
	if r.Header.Get("Upgrade") != "" {
		fmt.Fprintf(&head, "HTTP/1.1 101 UPGRADED\r\nContent-Type: %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n", contentType)
	} else {
		fmt.Fprintf(&head, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\n", contentRaw)
	}
	// What a strings.Builder is written to cannot fail.
	_ = w.Header().WriteSubset(&head, map[string]bool{"Content-Type": true})
	head.WriteString("\r\n")
	if _, err := io.WriteString(conn, head.String()); err != nil {
		d.release()
		return nil, err
	}
	return d, nil
}

func (d *duplex) release() {
	d.Close()
	d.server.hijackMu.Lock()
	delete(d.server.hijacked, d.Conn)
	d.server.hijackMu.Unlock()
	d.server.hijackers.Done()
}

// closeHijacked ends all streams, now and to come.
func (s *Server) closeHijacked() {
	s.hijackMu.Lock()
	defer s.hijackMu.Unlock()
	s.stopping = true
	for c := range s.hijacked {
		c.Close()
	}
}

// pump reads the client's input into sink until its end and returns what ended it, nil for
// the end of file. A nil sink discards input.
func (d *duplex) pump(sink io.Writer) error {
	if sink == nil {
		sink = io.Discard
	}
	_, err := io.Copy(keepReading{sink}, d.input)
	return err
}

// keepReading keeps the client's input flowing when the process takes no more of it, so that
// what is left unread does not reset the connection when it closes.
type keepReading struct{ w io.Writer }

func (k keepReading) Write(p []byte) (int, error) {
	_, _ = k.w.Write(p) // the process's own affair: its exit is reported on another way
	return len(p), nil
}

// watch calls gone when the client has closed the connection; its ending of its own input
// alone does not count. It works beside a reader that is stuck, and blocks no thread. The
// returned function ends it.
func (d *duplex) watch(gone func()) (stop func()) {
	c, ok := d.Conn.(interface{ File() (*os.File, error) })
	if !ok {
		return func() {}
	}
	f, err := c.File() // a duplicate: the poller tells its readers apart from the connection's
	if err != nil {
		return func() {}
	}
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The poller calls the function at every change of the socket's state.
		err := raw.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd)}}
			n, err := unix.Poll(p, 0)
			return err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
		})
		if err == nil {
			gone()
		}
	}()
	return func() {
		f.Close()
		<-done
	}
}

// finish ends the stream: the client sees the end of output and may end its own side, then
// the connection is closed. pumped is closed when pump has returned.
func (d *duplex) finish(pumped <-chan struct{}) {
	if c, ok := d.Conn.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		grace := time.NewTimer(drainGrace)
		defer grace.Stop()
		select {
		case <-pumped:
		case <-grace.C:
		}
	}
	d.release()
	<-pumped
}
