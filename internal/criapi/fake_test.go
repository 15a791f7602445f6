package criapi_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/image"
	"berth/internal/network"
)

// fakeEngine keeps what it is told; its programs are "echo", "cat" and "exit N".
type fakeEngine struct {
	engine.SandboxAPI
	engine.ContainerAPI
	engine.ExecAPI
	engine.StreamAPI
	hub *event.Hub

	mu         sync.Mutex
	sandboxes  map[string]*engine.Sandbox
	containers map[string]*engine.Container
	execs      map[string]*engine.Exec
	started    map[string]chan struct{}
	netns      string
	startErr   error
	reopened   int
	sizes      []string // that terminals were set to
}

func newFakeEngine() *fakeEngine {
	return &fakeEngine{
		hub: event.NewHub(), sandboxes: map[string]*engine.Sandbox{}, containers: map[string]*engine.Container{},
		execs: map[string]*engine.Exec{}, started: map[string]chan struct{}{},
	}
}

func (f *fakeEngine) Events() *event.Hub { return f.hub }

func notFound(ref string) error { return errdefs.New(errdefs.ErrNotFound, "no such object: %s", ref) }

func (f *fakeEngine) CreateSandbox(_ context.Context, c engine.SandboxConfig) (engine.Sandbox, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range f.sandboxes {
		if b.Config.Name == c.Name {
			return engine.Sandbox{}, errdefs.New(errdefs.ErrConflict, "name %s is taken", c.Name)
		}
	}
	c.ID = fmt.Sprintf("box%d", len(f.sandboxes)+1)
	b := &engine.Sandbox{Config: c, State: engine.SandboxState{Created: time.Unix(100, 0)}}
	f.sandboxes[c.ID] = b
	return *b, nil
}

func (f *fakeEngine) StartSandbox(_ context.Context, ref string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.startErr != nil {
		return f.startErr
	}
	b := f.sandboxes[ref]
	b.State.Ready, b.State.NetNS = true, f.netns
	if b.Config.Network == engine.NetworkOwn {
		b.State.Endpoints = []network.Endpoint{{Address: netip.MustParsePrefix("10.9.0.2/24")}}
	}
	return nil
}

func (f *fakeEngine) StopSandbox(_ context.Context, ref string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sandboxes[ref].State = engine.SandboxState{}
	return nil
}

func (f *fakeEngine) RemoveSandbox(_ context.Context, ref string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sandboxes, ref)
	return nil
}

func (f *fakeEngine) Sandbox(ref string) (engine.Sandbox, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b := f.sandboxes[ref]; b != nil {
		return *b, nil
	}
	return engine.Sandbox{}, notFound(ref)
}

func (f *fakeEngine) Sandboxes() []engine.Sandbox {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []engine.Sandbox
	for _, b := range f.sandboxes {
		out = append(out, *b)
	}
	return out
}

func (f *fakeEngine) CreateContainer(_ context.Context, c engine.ContainerConfig) (engine.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c.ID = fmt.Sprintf("con%d", len(f.containers)+1)
	f.containers[c.ID] = &engine.Container{Config: c, State: engine.ContainerState{Status: engine.StatusCreated, Created: time.Unix(200, 0)}}
	f.hub.Publish(event.Event{Type: "container", Action: "create", ID: c.ID})
	return *f.containers[c.ID], nil
}

func (f *fakeEngine) StartContainer(_ context.Context, ref string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[ref]
	c.State.Status, c.State.PID, c.State.StartedAt = engine.StatusRunning, 77, time.Unix(201, 0)
	f.hub.Publish(event.Event{Type: "container", Action: "start", ID: ref})
	return nil
}

func (f *fakeEngine) StopContainer(_ context.Context, ref string, timeout *time.Duration, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.containers[ref]
	if c.State.Status != engine.StatusRunning {
		return errdefs.New(errdefs.ErrNotModified, "already stopped")
	}
	c.State.Status, c.State.ExitCode, c.State.ExitKnown, c.State.FinishedAt = engine.StatusExited, 143, true, time.Unix(202, 0)
	if *timeout == 0 {
		c.State.ExitCode = 137
	}
	return nil
}

func (f *fakeEngine) RemoveContainer(_ context.Context, ref string, _ engine.RemoveOptions) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.containers, ref)
	return nil
}

func (f *fakeEngine) Container(ref string) (engine.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[ref]; c != nil {
		return *c, nil
	}
	return engine.Container{}, notFound(ref)
}

func (f *fakeEngine) Containers() []engine.Container {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []engine.Container
	for _, c := range f.containers {
		out = append(out, *c)
	}
	return out
}

func (f *fakeEngine) UpdateContainer(_ context.Context, ref string, r *engine.Resources, _ *engine.RestartPolicy) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.containers[ref].Config.Resources = *r
	return nil
}

func (f *fakeEngine) Stats(_ context.Context, ref string) (engine.Stats, error) {
	c, err := f.Container(ref)
	if err == nil && c.State.Status != engine.StatusRunning {
		err = errdefs.New(errdefs.ErrConflict, "not running")
	}
	return engine.Stats{Time: time.Unix(300, 0), CPUNanos: 5, MemoryBytes: 1000, MemoryCache: 300, MemoryLimit: 2000, Pids: 2,
		Networks: map[string]engine.NetworkStats{"lo": {}, "eth0": {RxBytes: 9}}}, err
}

func (f *fakeEngine) WritableBytes(context.Context, string) (int64, error) { return 4096, nil }

func (f *fakeEngine) ReopenLog(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reopened++
	return nil
}

func (f *fakeEngine) ExecSync(ctx context.Context, _ string, args []string, timeout time.Duration) ([]byte, []byte, int, error) {
	if args[0] == "sleep" {
		return nil, nil, 0, errdefs.New(errdefs.ErrUnavailable, "timed out after %s: %w", timeout, context.DeadlineExceeded)
	}
	return []byte(strings.Join(args[1:], " ")), []byte("words"), 3, nil
}

func (f *fakeEngine) CreateExec(_ context.Context, c engine.ExecConfig) (engine.Exec, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := fmt.Sprintf("exec%d", len(f.execs)+1)
	f.execs[id] = &engine.Exec{ID: id, Config: c}
	f.started[id] = make(chan struct{})
	return *f.execs[id], nil
}

func (f *fakeEngine) StartExec(_ context.Context, id string) error {
	close(f.started[id])
	return nil
}

func (f *fakeEngine) WaitExec(_ context.Context, id string) (engine.Exec, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := *f.execs[id]
	x.ExitCode = 7
	return x, nil
}

// pipeEnd is a stdin that remembers what was written until it is closed.
type pipeEnd struct {
	bytes.Buffer
	closed chan struct{}
}

func (p *pipeEnd) Close() error { close(p.closed); return nil }

func (f *fakeEngine) AttachExec(_ context.Context, id string, o engine.AttachOptions) (*engine.Attachment, error) {
	in := &pipeEnd{closed: make(chan struct{})}
	copyAll := func(_ context.Context, stdout, stderr io.Writer) error {
		<-f.started[id]
		if o.Stdin {
			<-in.closed
			_, err := stdout.Write(in.Bytes())
			return err
		}
		_, err := io.WriteString(stdout, "output")
		return err
	}
	var stdin io.WriteCloser
	if o.Stdin {
		stdin = in
	}
	return engine.NewAttachment(stdin, false, copyAll, func() {}), nil
}

// fakeImages has one image.
type fakeImages struct {
	image.API
	removed []string
	creds   image.Credentials
}

var boxImage = image.Image{
	ID: digest.FromString("box"), Names: []string{"docker.io/library/box:1"}, SizeBytes: 10,
	Config: ocispec.Image{Config: ocispec.ImageConfig{
		Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, Env: []string{"PATH=/bin", "A=image"}, WorkingDir: "/srv", User: "1000:1000",
	}},
}

func (f *fakeImages) Resolve(_ context.Context, ref string) (image.Image, error) {
	if ref == "box" || ref == boxImage.ID.String() {
		return boxImage, nil
	}
	return image.Image{}, notFound(ref)
}

func (f *fakeImages) List(context.Context) ([]image.Image, error) {
	return []image.Image{boxImage}, nil
}

func (f *fakeImages) Pull(_ context.Context, _ string, o image.PullOptions) (image.Image, error) {
	f.creds = o.Credentials
	return boxImage, nil
}

func (f *fakeImages) Remove(_ context.Context, ref string, _, _ bool, _ func(digest.Digest) ([]string, bool)) ([]image.RemoveResult, error) {
	f.removed = append(f.removed, ref)
	return nil, nil
}

func (f *fakeImages) DiskUsage(context.Context) (int64, error) { return 123, nil }

func (f *fakeEngine) resized(id string, height, width uint16) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sizes = append(f.sizes, fmt.Sprintf("%s %dx%d", id, height, width))
	return nil
}

func (f *fakeEngine) ResizeExec(_ context.Context, id string, height, width uint16) error {
	return f.resized(id, height, width)
}

func (f *fakeEngine) ResizeContainer(_ context.Context, id string, height, width uint16) error {
	return f.resized(id, height, width)
}

// Attach finds a program that answers with its input once that has ended.
func (f *fakeEngine) Attach(context.Context, string, engine.AttachOptions) (*engine.Attachment, error) {
	in := &pipeEnd{closed: make(chan struct{})}
	answer := func(ctx context.Context, stdout, _ io.Writer) error {
		select {
		case <-in.closed:
		case <-ctx.Done():
			return ctx.Err()
		}
		_, err := stdout.Write(in.Bytes())
		return err
	}
	return engine.NewAttachment(in, true, answer, func() {}), nil
}
