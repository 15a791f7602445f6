package criapi

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	criStreaming "k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

const (
	streamingAddress        = "127.0.0.1:0" // only the node's own kubelet comes here
	streamingHeaderTimeout  = 30 * time.Second
	streamingMaxHeaderBytes = 1 << 20
)

// streaming is the HTTP server behind Exec, Attach and PortForward, with Kubernetes' own protocols.
// It listens from the first such request on: a node that needs none pays nothing. Each URL that it
// hands out carries a random token, good for one request within a minute.
type streaming struct {
	ctx    context.Context // ends all connections
	engine Engine

	mu     sync.Mutex
	server criStreaming.Server
	http   *http.Server
	closed bool
	served sync.WaitGroup
}

func newStreaming(ctx context.Context, e Engine) *streaming {
	return &streaming{ctx: ctx, engine: e}
}

// urls opens the server at the first call and returns what hands out URLs.
func (s *streaming) urls() (criStreaming.Server, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errdefs.New(errdefs.ErrUnavailable, "the streaming server is closing; try again")
	}
	if s.server != nil {
		return s.server, nil
	}
	l, err := net.Listen("tcp", streamingAddress)
	if err != nil {
		return nil, errdefs.New(errdefs.ErrUnavailable, "streaming server: %w", err)
	}
	config := criStreaming.DefaultConfig
	config.Addr = l.Addr().String()
	config.BaseURL = &url.URL{Scheme: "http", Host: config.Addr}
	server, err := criStreaming.NewServer(config, &streamRuntime{engine: s.engine})
	if err != nil {
		l.Close()
		return nil, err
	}
	s.server = server
	s.http = &http.Server{
		Handler: server, ReadHeaderTimeout: streamingHeaderTimeout, MaxHeaderBytes: streamingMaxHeaderBytes,
		BaseContext: func(net.Listener) context.Context { return s.ctx },
	}
	s.served.Add(1)
	go func() {
		defer s.served.Done()
		_ = s.http.Serve(l) // it ends with close only; a listener on loopback does not fail
	}()
	return server, nil
}

// close ends the server. Connections in use end with the context.
func (s *streaming) close() {
	s.mu.Lock()
	s.closed = true
	h := s.http
	s.mu.Unlock()
	if h != nil {
		h.Close()
	}
	s.served.Wait()
}

// Exec answers with the URL at which a client finds the streams.
func (r *runtimeService) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := r.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	req.ContainerId = c.Config.ID
	s, err := r.streams.urls()
	if err != nil {
		return nil, err
	}
	return s.GetExec(req)
}

// Attach answers with the URL at which a client finds the streams.
func (r *runtimeService) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := r.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	req.ContainerId = c.Config.ID
	s, err := r.streams.urls()
	if err != nil {
		return nil, err
	}
	return s.GetAttach(req)
}

// PortForward answers with the URL at which a client finds the streams.
func (r *runtimeService) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	b, _, err := r.readySandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	req.PodSandboxId = b.Config.ID
	s, err := r.streams.urls()
	if err != nil {
		return nil, err
	}
	return s.GetPortForward(req)
}

// streamRuntime is what the streaming server calls once a client has connected.
type streamRuntime struct{ engine Engine }

// Exec runs a program on a client's streams; another exit code than 0 is the error that the
// protocol wants for it.
func (s *streamRuntime) Exec(ctx context.Context, container string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x, err := s.engine.CreateExec(ctx, engine.ExecConfig{Container: container, Args: cmd, Terminal: tty, OpenStdin: in != nil})
	if err != nil {
		return err
	}
	a, err := s.engine.AttachExec(ctx, x.ID, engine.AttachOptions{Stdin: in != nil, Stdout: out != nil, Stderr: errw != nil})
	if err != nil {
		return err
	}
	defer a.Close()
	if err := s.engine.StartExec(ctx, x.ID); err != nil {
		return err
	}
	feed(a, in)
	go follow(ctx, resize, func(size remotecommand.TerminalSize) {
		_ = s.engine.ResizeExec(ctx, x.ID, size.Height, size.Width) // it may have ended
	})
	if err := a.Copy(ctx, writer(out), writer(errw)); err != nil {
		return err
	}
	x, err = s.engine.WaitExec(ctx, x.ID)
	if err == nil && x.ExitCode != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("exit code %d", x.ExitCode), Code: x.ExitCode}
	}
	return err
}

// Attach connects a client to a container's streams from now on.
func (s *streamRuntime) Attach(ctx context.Context, container string, in io.Reader, out, errw io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a, err := s.engine.Attach(ctx, container, engine.AttachOptions{Stdin: in != nil, Stdout: out != nil, Stderr: errw != nil})
	if err != nil {
		return err
	}
	defer a.Close()
	feed(a, in)
	go follow(ctx, resize, func(size remotecommand.TerminalSize) {
		_ = s.engine.ResizeContainer(ctx, container, size.Height, size.Width) // it may have ended
	})
	return a.Copy(ctx, writer(out), writer(errw))
}

// feed copies the client's input in the background. It ends with the client's connection, which the
// streaming server closes once the call has returned.
func feed(a *engine.Attachment, in io.Reader) {
	if in == nil || a.Stdin == nil {
		return
	}
	stdin := a.Stdin
	go func() {
		_, _ = io.Copy(stdin, in) // the client left or the process ended: the output's end tells
		_ = stdin.Close()
	}()
}

// follow passes sizes of the client's terminal on until ctx ends.
func follow(ctx context.Context, resize <-chan remotecommand.TerminalSize, f func(remotecommand.TerminalSize)) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-resize:
			if !ok {
				return
			}
			if size.Height > 0 && size.Width > 0 {
				f(size)
			}
		}
	}
}

// writer keeps an absent stream a nil interface.
func writer(w io.WriteCloser) io.Writer {
	if w == nil {
		return nil
	}
	return w
}
