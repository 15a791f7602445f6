// Package unixhttp is a small HTTP/1.1 client (RFC 9112) for one unix socket.
//
// It owns framing only: requests, responses with a length, in chunks or until the end of the
// connection, and upgraded connections. It exists because linking net/http doubles the size of
// a command line program and adds half a millisecond to each of its executions. It does not
// know TLS, proxies, redirects, compression or cookies, and trusts the server it speaks to.
//
// A Client may be used by several goroutines at once; each request in flight has a connection
// of its own, and one idle connection is kept for the next.
package unixhttp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits.
const (
	bufferBytes   = 16 << 10         // read buffer of a connection; also the longest line of a response head
	drainBytes    = 64 << 10         // unread rest of a body that is read away to keep the connection
	dialTimeout   = 10 * time.Second // a full accept queue makes connect wait
	maxInterim    = 8                // 1xx responses before the real one
	maxChunkBytes = 1 << 40
)

// Client speaks to the server behind Socket.
type Client struct {
	Socket string // path

	mu   sync.Mutex
	idle *conn
}

// Request is one request. Body and Stream exclude each other.
type Request struct {
	Method string
	Path   string   // with its query, escaped
	Header []string // name, value, name, value…
	Body   []byte
	// Stream is sent in chunks, or with Length when that is positive.
	Stream io.Reader
	Length int64
}

// Response is an answer. Close its Body, whatever it says.
type Response struct {
	Status int
	Header textproto.MIMEHeader
	Body   io.ReadCloser
}

// conn is one connection with its buffered reader.
type conn struct {
	net.Conn
	r *bufio.Reader
}

// Do sends req and returns the answer's head; the body is read from the connection while the
// caller reads it. The end of ctx closes the connection, also under a body being read.
func (c *Client) Do(ctx context.Context, req Request) (*Response, error) {
	nc, reused, err := c.take(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := c.exchange(ctx, nc, req)
	// A server that restarted in between leaves a dead idle connection behind. Only what is
	// safe to repeat is repeated.
	if err != nil && reused && req.Method == "GET" && ctx.Err() == nil {
		if nc, err = c.dial(ctx); err != nil {
			return nil, err
		}
		return c.exchange(ctx, nc, req)
	}
	return resp, err
}

// CloseIdle closes the connection that waits for the next request.
func (c *Client) CloseIdle() {
	c.mu.Lock()
	nc := c.idle
	c.idle = nil
	c.mu.Unlock()
	if nc != nil {
		nc.Close()
	}
}

func (c *Client) take(ctx context.Context) (nc *conn, reused bool, err error) {
	c.mu.Lock()
	nc, c.idle = c.idle, nil
	c.mu.Unlock()
	if nc != nil {
		return nc, true, nil
	}
	nc, err = c.dial(ctx)
	return nc, false, err
}

func (c *Client) put(nc *conn) {
	c.mu.Lock()
	if c.idle == nil {
		c.idle, nc = nc, nil
	}
	c.mu.Unlock()
	if nc != nil {
		nc.Close()
	}
}

func (c *Client) dial(ctx context.Context) (*conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	nc, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return nil, err
	}
	return &conn{Conn: nc, r: bufio.NewReaderSize(nc, bufferBytes)}, nil
}

// exchange owns nc: it ends up in the response's body, or closed. A streamed body is sent while
// the answer is read: a server may answer as it reads.
func (c *Client) exchange(ctx context.Context, nc *conn, req Request) (*Response, error) {
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	var sent chan error
	var sendErr error
	if req.Stream == nil {
		// When this fails the server may still have answered, as it does with a body that it
		// refuses to read.
		sendErr = send(nc, req, "")
	} else {
		sent = make(chan error, 1)
		go func() {
			// Ends with the connection, but a source that blocks keeps it until that returns.
			err := send(nc, req, "")
			sent <- err
			var broken *sourceError
			if errors.As(err, &broken) {
				nc.Close() // or the server waits for the rest
			}
		}()
	}
	resp, err := head(nc)
	var b *body
	if err == nil {
		b, err = frame(nc, req.Method, resp)
	}
	if err != nil {
		stop()
		nc.Close()
		select {
		case sendErr = <-sent:
		default:
		}
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case sendErr != nil:
			return nil, fmt.Errorf("send %s %s: %w", req.Method, req.Path, sendErr)
		}
		return nil, fmt.Errorf("read the answer to %s %s: %w", req.Method, req.Path, err)
	}
	b.ctx, b.stop, b.sent = ctx, stop, sent
	if sendErr == nil {
		b.client = c
	}
	resp.Body = b
	return resp, nil
}

// sourceError says that the body to send could not be read.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// send writes one request. upgrade, when not empty, asks for that protocol.
func send(nc *conn, req Request, upgrade string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: berth\r\nUser-Agent: berth\r\n", req.Method, req.Path)
	for i := 0; i+1 < len(req.Header); i += 2 {
		if strings.ContainsAny(req.Header[i]+req.Header[i+1], "\r\n") {
			return fmt.Errorf("header %s: value has a line break", req.Header[i])
		}
		fmt.Fprintf(&b, "%s: %s\r\n", req.Header[i], req.Header[i+1])
	}
	if upgrade != "" {
		fmt.Fprintf(&b, "Connection: Upgrade\r\nUpgrade: %s\r\n", upgrade)
	}
	chunked := req.Stream != nil && req.Length <= 0
	switch {
	case chunked:
		b.WriteString("Transfer-Encoding: chunked\r\n")
	case req.Stream != nil:
		fmt.Fprintf(&b, "Content-Length: %d\r\n", req.Length)
	case len(req.Body) > 0 || req.Method != "GET" && req.Method != "HEAD":
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(req.Body))
	}
	b.WriteString("\r\n")
	b.Write(req.Body)
	if _, err := nc.Write(b.Bytes()); err != nil {
		return err
	}
	switch {
	case chunked:
		return sendChunks(nc, req.Stream)
	case req.Stream != nil:
		n, err := io.Copy(nc, io.LimitReader(req.Stream, req.Length))
		var onWire *net.OpError
		if err == nil && n < req.Length {
			err = &sourceError{io.ErrUnexpectedEOF}
		} else if err != nil && !errors.As(err, &onWire) {
			err = &sourceError{err}
		}
		return err
	}
	return nil
}

func sendChunks(w io.Writer, r io.Reader) error {
	buf := make([]byte, 128<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			chunk := net.Buffers{fmt.Appendf(nil, "%x\r\n", n), buf[:n], []byte("\r\n")}
			if _, werr := chunk.WriteTo(w); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			_, err = io.WriteString(w, "0\r\n\r\n")
			return err
		}
		if err != nil {
			return &sourceError{err}
		}
	}
}

// head reads the status line and the header, skipping interim answers.
func head(nc *conn) (*Response, error) {
	for range maxInterim {
		tr := textproto.NewReader(nc.r)
		line, err := tr.ReadLine()
		if err != nil {
			return nil, noEOF(err)
		}
		proto, rest, _ := strings.Cut(line, " ")
		code, _, _ := strings.Cut(rest, " ")
		status, err := strconv.Atoi(code)
		if err != nil || !strings.HasPrefix(proto, "HTTP/1.") {
			return nil, fmt.Errorf("malformed status line %q", line)
		}
		h, err := tr.ReadMIMEHeader()
		if err != nil {
			return nil, noEOF(err)
		}
		if status >= 200 || status == 101 {
			return &Response{Status: status, Header: h}, nil
		}
	}
	return nil, errors.New("too many interim answers")
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// body is a response's body; reading it to its end gives the connection back.
type body struct {
	io.Reader
	nc     *conn
	client *Client         // nil: the connection cannot be used again
	ctx    context.Context // of the request
	stop   func() bool
	sent   chan error // of a streamed request; nil: all was sent
	closed bool
}

// frame finds out how the body ends (RFC 9112, section 6.3).
func frame(nc *conn, method string, resp *Response) (*body, error) {
	b := &body{nc: nc}
	switch length := resp.Header.Get("Content-Length"); {
	case method == "HEAD" || resp.Status == 204 || resp.Status == 304:
		b.Reader = eof{}
	case strings.EqualFold(resp.Header.Get("Transfer-Encoding"), "chunked"):
		b.Reader = &chunks{r: nc.r}
	case length != "":
		n, err := strconv.ParseInt(length, 10, 64)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("malformed Content-Length %q", length)
		}
		b.Reader = &exactly{r: nc.r, n: n}
	default:
		b.Reader = untilClose{nc.r}
	}
	return b, nil
}

// Close reads a small rest away and keeps the connection for the next request.
func (b *body) Close() error {
	if b.closed {
		return nil
	}
	b.closed = true
	reusable := false
	if _, endless := b.Reader.(untilClose); !endless && b.client != nil && b.ctx.Err() == nil {
		_ = b.nc.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := io.CopyN(io.Discard, b.Reader, drainBytes)
		reusable = errors.Is(err, io.EOF)
		_ = b.nc.SetReadDeadline(time.Time{})
	}
	if !b.stop() {
		reusable = false // the context ended and has closed the connection
	}
	if b.sent != nil {
		select {
		case err := <-b.sent:
			reusable = reusable && err == nil
		default:
			reusable = false // the rest of the request is still on its way
		}
	}
	if reusable {
		b.client.put(b.nc)
		return nil
	}
	return b.nc.Close()
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// untilClose is a body that ends with its connection.
type untilClose struct{ io.Reader }

// exactly reads n bytes and complains about fewer.
type exactly struct {
	r io.Reader
	n int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.n == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > e.n {
		p = p[:e.n]
	}
	n, err := e.r.Read(p)
	e.n -= int64(n)
	if e.n > 0 {
		err = noEOF(err)
	} else if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// chunks reads a chunked body (RFC 9112, section 7.1).
type chunks struct {
	r     *bufio.Reader
	left  int64
	begun bool
	err   error
}

func (c *chunks) Read(p []byte) (int, error) {
	if c.err == nil && c.left == 0 {
		c.err = c.next()
	}
	if c.err != nil {
		return 0, c.err
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := c.r.Read(p)
	c.left -= int64(n)
	if err != nil {
		c.err = noEOF(err)
	}
	return n, c.err
}

func (c *chunks) next() error {
	if c.begun {
		if line, err := c.line(); err != nil || line != "" {
			return errors.Join(err, fmt.Errorf("malformed chunk end %q", line))
		}
	}
	c.begun = true
	line, err := c.line()
	if err != nil {
		return err
	}
	size, _, _ := strings.Cut(line, ";")
	n, err := strconv.ParseInt(strings.TrimSpace(size), 16, 64)
	if err != nil || n < 0 || n > maxChunkBytes {
		return fmt.Errorf("malformed chunk size %q", line)
	}
	c.left = n
	for n == 0 { // trailer
		line, err := c.line()
		if err != nil {
			return err
		}
		if line == "" {
			return io.EOF
		}
	}
	return nil
}

func (c *chunks) line() (string, error) {
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return "", noEOF(err)
	}
	return strings.TrimRight(string(line), "\r\n"), nil
}
