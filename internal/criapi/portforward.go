package criapi

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// forwardDialTimeout bounds the connection to a port inside a sandbox.
const forwardDialTimeout = 10 * time.Second

// PortForward connects a client's stream with a port that something in the sandbox listens on at
// its loopback address.
func (s *streamRuntime) PortForward(ctx context.Context, sandbox string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	b, err := s.engine.Sandbox(sandbox)
	if err != nil {
		return err
	}
	if !b.State.Ready {
		return errdefs.New(errdefs.ErrConflict, "pod sandbox %s is not ready", sandbox)
	}
	conn, err := dialInside(ctx, b.State.NetNS, port)
	if err != nil {
		return errdefs.New(errdefs.ErrUnavailable, "port-forward to port %d of pod sandbox %s: %w", port, sandbox, err)
	}
	return splice(ctx, conn, stream)
}

// splice copies both ways until the sandbox's side has nothing more to say. The client's end of
// file is passed on, since its peer may answer only then.
func splice(ctx context.Context, conn net.Conn, stream io.ReadWriteCloser) error {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	go func() {
		_, _ = io.Copy(conn, stream) // the other direction tells what went wrong
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	}()
	_, err := io.Copy(stream, conn)
	if errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	return err
}

// dialInside dials in another network namespace ("" is the node's): first IPv4, then IPv6.
func dialInside(ctx context.Context, netns string, port int32) (net.Conn, error) {
	dial := func() (net.Conn, error) {
		d := net.Dialer{Timeout: forwardDialTimeout}
		p := strconv.Itoa(int(port))
		conn, err := d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", p))
		if err != nil {
			var err6 error
			if conn, err6 = d.DialContext(ctx, "tcp6", net.JoinHostPort("::1", p)); err6 == nil {
				return conn, nil
			}
		}
		return conn, err
	}
	if netns == "" {
		return dial()
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread is in the wrong namespace and ends with this goroutine. The
		// dialer makes the socket of a literal address in the goroutine that calls it.
		runtime.LockOSThread()
		if err := enter(netns); err != nil {
			done <- result{err: err}
			return
		}
		conn, err := dial()
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func enter(netns string) error {
	f, err := os.Open(netns)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("setns", unix.Setns(int(f.Fd()), unix.CLONE_NEWNET))
}
