package unixhttp

import (
	"context"
	"fmt"
	"io"
	"net"
)

// Stream is an upgraded connection: raw bytes both ways.
type Stream struct {
	nc   *conn
	stop func() bool
	// ContentType is what the server said of the bytes it sends.
	ContentType string
}

// Hijack sends req and asks to upgrade the connection to raw TCP, as Docker's attach does. When
// the server refuses, the stream is nil and the response tells why; close its body.
func (c *Client) Hijack(ctx context.Context, req Request) (*Stream, *Response, error) {
	nc, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	fail := func(err error) (*Stream, *Response, error) {
		stop()
		nc.Close()
		return nil, nil, fmt.Errorf("%s %s: %w", req.Method, req.Path, err)
	}
	if err := send(nc, req, "tcp"); err != nil {
		return fail(err)
	}
	resp, err := head(nc)
	if err != nil {
		return fail(err)
	}
	// Docker answers 101, or 200 with the stream right behind to clients that did not ask.
	if resp.Status == 101 || resp.Status == 200 {
		return &Stream{nc: nc, stop: stop, ContentType: resp.Header.Get("Content-Type")}, nil, nil
	}
	b, err := frame(nc, req.Method, resp)
	if err != nil {
		return fail(err)
	}
	b.ctx, b.stop = ctx, stop
	resp.Body = b
	return nil, resp, nil
}

// Read reads what the server sends.
func (s *Stream) Read(p []byte) (int, error) { return s.nc.r.Read(p) }

// WriteTo copies what the server sends to w.
func (s *Stream) WriteTo(w io.Writer) (int64, error) { return s.nc.r.WriteTo(w) }

// Write sends to the server.
func (s *Stream) Write(p []byte) (int, error) { return s.nc.Write(p) }

// CloseWrite tells the server that no more input comes.
func (s *Stream) CloseWrite() error {
	if u, ok := s.nc.Conn.(*net.UnixConn); ok {
		return u.CloseWrite()
	}
	return nil
}

// Close ends the connection.
func (s *Stream) Close() error {
	s.stop()
	return s.nc.Close()
}
