package criapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	goruntime "runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// Bounds of streams.
const (
	dialTimeout   = 10 * time.Second
	headerTimeout = 10 * time.Second
)

// ExecSync runs a program to its end.
func (s *runtimeService) ExecSync(ctx context.Context, req *runtime.ExecSyncRequest) (*runtime.ExecSyncResponse, error) {
	c, err := s.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("exec in container %s: no command", c.Config.ID)
	}
	timeout := time.Duration(max(req.GetTimeout(), 0)) * time.Second
	stdout, stderr, code, err := s.Engine.ExecSync(ctx, c.Config.ID, req.GetCmd(), timeout)
	if err != nil {
		return nil, err
	}
	return &runtime.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: int32(code)}, nil
}

// running returns a container of ours that runs.
func (s *Server) running(ref string) (engine.Container, error) {
	c, err := s.container(ref)
	if err == nil && c.State.Status != engine.StatusRunning {
		err = errdefs.New(errdefs.ErrConflict, "container %s does not run: it is %s", c.Config.ID, c.State.Status)
	}
	return c, err
}

func (s *runtimeService) Exec(_ context.Context, req *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	c, err := s.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("exec in container %s: no command", c.Config.ID)
	}
	st, err := s.streams()
	if err != nil {
		return nil, err
	}
	return st.server.GetExec(req)
}

func (s *runtimeService) Attach(_ context.Context, req *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	if _, err := s.running(req.GetContainerId()); err != nil {
		return nil, err
	}
	st, err := s.streams()
	if err != nil {
		return nil, err
	}
	return st.server.GetAttach(req)
}

func (s *runtimeService) PortForward(_ context.Context, req *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	box, err := s.sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !box.State.Ready {
		return nil, errdefs.New(errdefs.ErrConflict, "forward a port of pod sandbox %s: it is not ready", box.Config.ID)
	}
	st, err := s.streams()
	if err != nil {
		return nil, err
	}
	return st.server.GetPortForward(req)
}

// streamServer serves streams over HTTP. It is made with the first one: a node that nobody
// execs into through CRI listens nowhere.
type streamServer struct {
	server streaming.Server
	http   *http.Server
	ended  chan struct{}
	cancel context.CancelFunc
}

func (t *streamServer) ServeHTTP(w http.ResponseWriter, r *http.Request) { t.server.ServeHTTP(w, r) }

func (s *Server) streams() (*streamServer, error) {
	s.streamMu.Lock()
	defer s.streamMu.Unlock()
	if s.stopped {
		return nil, errdefs.New(errdefs.ErrUnavailable, "the daemon is stopping; try again")
	}
	if s.stream != nil {
		return s.stream, nil
	}
	l, err := net.Listen("tcp", s.StreamAddr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	cfg := streaming.DefaultConfig
	cfg.Addr = l.Addr().String()
	cfg.BaseURL = &url.URL{Scheme: "http", Host: l.Addr().String(), Path: "/"}
	server, err := streaming.NewServer(cfg, &streamRuntime{Server: s})
	if err != nil {
		cancel()
		l.Close()
		return nil, err
	}
	t := &streamServer{server: server, ended: make(chan struct{}), cancel: cancel}
	t.http = &http.Server{Handler: t, ReadHeaderTimeout: headerTimeout, BaseContext: func(net.Listener) context.Context { return ctx }}
	go func() { // until stopStreams
		defer close(t.ended)
		if err := t.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.Logger.Error("the server of CRI streams ended", "error", err)
		}
	}()
	s.stream = t
	return t, nil
}

// stopStreams ends the stream server, if there is one, with its streams.
func (s *Server) stopStreams() {
	s.streamMu.Lock()
	s.stopped = true
	t := s.stream
	s.streamMu.Unlock()
	if t == nil {
		return
	}
	t.cancel()
	_ = t.http.Close() // its listener is all that could fail to close
	<-t.ended
}

// streamRuntime is what the stream server drives.
type streamRuntime struct{ *Server }

// Exec runs a program with its streams and returns its exit code as a CodeExitError.
func (r *streamRuntime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errs io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := r.running(id)
	if err != nil {
		return err
	}
	x, err := r.Engine.CreateExec(ctx, engine.ExecConfig{Container: c.Config.ID, Args: cmd, Terminal: tty, OpenStdin: in != nil})
	if err != nil {
		return err
	}
	a, err := r.Engine.AttachExec(ctx, x.ID, engine.AttachOptions{Stdin: in != nil, Stdout: out != nil, Stderr: errs != nil})
	if err != nil {
		return err
	}
	defer a.Close()
	if err := r.Engine.StartExec(ctx, x.ID); err != nil {
		return err
	}
	stop := follow(resize, func(h, w uint16) error { return r.Engine.ResizeExec(ctx, x.ID, h, w) })
	defer stop()
	if err := converse(ctx, a, in, out, errs); err != nil {
		return err
	}
	done, err := r.Engine.WaitExec(ctx, x.ID)
	if err != nil {
		return err
	}
	if done.ExitCode != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", done.ExitCode), Code: done.ExitCode}
	}
	return nil
}

// Attach connects to the streams of a container.
func (r *streamRuntime) Attach(ctx context.Context, id string, in io.Reader, out, errs io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := r.running(id)
	if err != nil {
		return err
	}
	if !c.Config.OpenStdin {
		in = nil // the container has none: what is typed goes nowhere, as in other runtimes
	}
	a, err := r.Engine.Attach(ctx, c.Config.ID, engine.AttachOptions{Stdin: in != nil, Stdout: out != nil, Stderr: errs != nil})
	if err != nil {
		return err
	}
	defer a.Close()
	stop := follow(resize, func(h, w uint16) error { return r.Engine.ResizeContainer(ctx, c.Config.ID, h, w) })
	defer stop()
	return converse(ctx, a, in, out, errs)
}

// follow passes sizes on until the channel or stop ends it.
func follow(sizes <-chan remotecommand.TerminalSize, resize func(height, width uint16) error) (stop func()) {
	if sizes == nil {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-done:
				return
			case size, open := <-sizes:
				if !open {
					return
				}
				_ = resize(size.Height, size.Width) // the program may just have ended
			}
		}
	}()
	return sync.OnceFunc(func() { close(done) })
}

// converse copies both ways until the process's output ends. The copy of input ends with the
// client's stream, which the stream server closes once this returns.
func converse(ctx context.Context, a *engine.Attachment, in io.Reader, out, errs io.WriteCloser) error {
	if in != nil && a.Stdin != nil {
		go func() {
			_, _ = io.Copy(a.Stdin, in) // a process that reads no more is no error of ours
			_ = a.Stdin.Close()
		}()
	}
	// A nil *T in an interface is not nil: writers are passed on only when they are there.
	var o, e io.Writer
	if out != nil {
		o = out
	}
	if errs != nil {
		e = errs
	}
	return a.Copy(ctx, o, e)
}

// PortForward connects a stream with a port inside the sandbox.
func (r *streamRuntime) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	box, err := r.sandbox(id)
	if err != nil {
		return err
	}
	if port < 1 || port > 65535 {
		return invalid("forward port %d: not a port", port)
	}
	conn, err := dialInside(ctx, box.State.NetNS, uint16(port))
	if err != nil {
		return errdefs.New(errdefs.ErrUnavailable, "forward port %d of pod sandbox %s: %w", port, box.Config.ID, err)
	}
	defer conn.Close()
	stopped := context.AfterFunc(ctx, func() { conn.Close() })
	defer stopped()
	out := make(chan error, 1)
	in := make(chan error, 1)
	go func() {
		_, err := io.Copy(stream, conn)
		out <- err
	}()
	go func() { // ends with the stream, which the stream server closes once this returns
		_, err := io.Copy(conn, stream)
		if t, ok := conn.(*net.TCPConn); ok {
			_ = t.CloseWrite()
		}
		in <- err
	}()
	select {
	case err = <-out: // the server inside has said all
	case err = <-in:
		if err == nil {
			err = <-out
		}
	}
	return err
}

// dialInside connects to a loopback port in a network namespace ("": the node's). A socket
// belongs to the namespace of the thread that makes it.
func dialInside(ctx context.Context, netns string, port uint16) (net.Conn, error) {
	dial := func() (net.Conn, error) {
		d := net.Dialer{Timeout: dialTimeout}
		p := strconv.Itoa(int(port))
		conn, err := d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", p))
		if err != nil {
			if c6, err6 := d.DialContext(ctx, "tcp6", net.JoinHostPort("::1", p)); err6 == nil {
				return c6, nil
			}
		}
		return conn, err
	}
	if netns == "" {
		return dial()
	}
	ns, err := os.Open(netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread, which is in another namespace now, ends with the goroutine.
		goruntime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{err: err}
			return
		}
		conn, err := dial()
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}
