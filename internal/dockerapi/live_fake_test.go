package dockerapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"berth/internal/dockerapi"
	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/network"
)

// liveEngine runs Go functions in place of programs.
type liveEngine struct {
	dockerapi.EngineAPI
	hub     *event.Hub
	program func(args []string, in io.Reader, stdout, stderr io.Writer) int

	mu         sync.Mutex
	changed    *sync.Cond
	containers []*liveContainer
	sandboxes  []engine.Sandbox
	execs      map[string]*liveExec
	running    sync.WaitGroup
	resized    [][2]uint16
	logs       []engine.LogEntry
	failCreate error
}

type liveContainer struct {
	engine.Container
	liveStreams
	waiters []liveWaiter
}

type liveExec struct {
	engine.Exec
	liveStreams
}

type liveWaiter struct {
	c    chan engine.WaitResult
	cond engine.WaitCondition
}

// liveStreams fans a process's output out and its input in.
type liveStreams struct {
	taps  []*tap
	input *io.PipeReader
	stdin *io.PipeWriter
	ended bool
}

type tap struct {
	pieces []piece
	ended  bool
}

type piece struct {
	stream string
	data   []byte
}

func newLiveEngine(hub *event.Hub) *liveEngine {
	e := &liveEngine{hub: hub, execs: map[string]*liveExec{}, program: shell}
	e.changed = sync.NewCond(&e.mu)
	return e
}

// shell knows a few programs.
func shell(args []string, in io.Reader, stdout, stderr io.Writer) int {
	switch args[0] {
	case "echo":
		io.WriteString(stdout, strings.Join(args[1:], " ")+"\n")
	case "both":
		io.WriteString(stdout, "out\n")
		io.WriteString(stderr, "err\n")
		return 3
	case "cat":
		io.Copy(stdout, in)
	case "big":
		stdout.Write(bytes.Repeat([]byte("x"), 1<<20))
	case "sleep":
		io.Copy(io.Discard, in)
	}
	return 0
}

func (e *liveEngine) publish(c engine.Container, action string) {
	e.hub.Publish(event.Event{Type: "container", Action: action, ID: c.Config.ID,
		Attributes: map[string]string{"name": c.Config.Name, "image": c.Config.Image}})
}

func (e *liveEngine) find(ref string) (*liveContainer, error) {
	for _, c := range e.containers {
		if c.Config.Name == ref || c.Config.ID == ref || len(ref) >= 4 && strings.HasPrefix(c.Config.ID, ref) {
			return c, nil
		}
	}
	return nil, errdefs.New(errdefs.ErrNotFound, "No such container: %s", ref)
}

func (e *liveEngine) Container(ref string) (engine.Container, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return engine.Container{}, err
	}
	return c.Container, nil
}

func (e *liveEngine) Containers() []engine.Container {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []engine.Container
	for _, c := range slices.Backward(e.containers) {
		out = append(out, c.Container)
	}
	return out
}

func (e *liveEngine) Sandbox(ref string) (engine.Sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, b := range e.sandboxes {
		if b.Config.ID == ref {
			return b, nil
		}
	}
	return engine.Sandbox{}, errdefs.New(errdefs.ErrNotFound, "No such sandbox: %s", ref)
}

func (e *liveEngine) CreateSandbox(_ context.Context, c engine.SandboxConfig) (engine.Sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b := engine.Sandbox{Config: c}
	e.sandboxes = append(e.sandboxes, b)
	return b, nil
}

func (e *liveEngine) RemoveSandbox(_ context.Context, ref string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sandboxes = slices.DeleteFunc(e.sandboxes, func(b engine.Sandbox) bool { return b.Config.ID == ref })
	return nil
}

func (e *liveEngine) CreateContainer(_ context.Context, c engine.ContainerConfig) (engine.Container, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failCreate != nil {
		return engine.Container{}, e.failCreate
	}
	for _, other := range e.containers {
		if other.Config.Name == c.Name {
			return engine.Container{}, errdefs.New(errdefs.ErrConflict, "Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+c.Name, other.Config.ID)
		}
	}
	made := &liveContainer{Container: engine.Container{Config: c, State: engine.ContainerState{Status: engine.StatusCreated, Created: time.Now()}}}
	e.containers = append(e.containers, made)
	e.publish(made.Container, "create")
	return made.Container, nil
}

// open makes the streams of a process and returns its ends.
func (e *liveEngine) open(s *liveStreams) (stdout, stderr io.Writer) {
	s.input, s.stdin = io.Pipe()
	s.ended = false
	return liveWriter{e, s, engine.Stdout}, liveWriter{e, s, engine.Stderr}
}

type liveWriter struct {
	e      *liveEngine
	s      *liveStreams
	stream string
}

func (w liveWriter) Write(p []byte) (int, error) {
	w.e.mu.Lock()
	defer w.e.mu.Unlock()
	for _, t := range w.s.taps {
		t.pieces = append(t.pieces, piece{w.stream, bytes.Clone(p)})
	}
	w.e.changed.Broadcast()
	return len(p), nil
}

func (e *liveEngine) StartContainer(_ context.Context, ref string) error {
	e.mu.Lock()
	c, err := e.find(ref)
	if err != nil {
		e.mu.Unlock()
		return err
	}
	if c.State.Status == engine.StatusRunning {
		e.mu.Unlock()
		return errdefs.New(errdefs.ErrNotModified, "already started")
	}
	if strings.HasPrefix(c.Config.Args[0], "missing") || strings.HasPrefix(c.Config.Args[0], "locked") {
		err := errdefs.New(errdefs.ErrNoProgram, "exec: %q: executable file not found in $PATH", c.Config.Args[0])
		c.State.ExitCode = 127
		if strings.HasPrefix(c.Config.Args[0], "locked") {
			err = errdefs.New(errdefs.ErrInvocation, "exec: %q", c.Config.Args[0])
			c.State.ExitCode = 126
		}
		c.State.FinishedAt = time.Now()
		e.finish(c)
		e.mu.Unlock()
		return err
	}
	stdout, stderr := e.open(&c.liveStreams)
	c.State.Status, c.State.StartedAt, c.State.PID = engine.StatusRunning, time.Now(), 4242
	for i := range e.sandboxes {
		if b := &e.sandboxes[i]; b.Config.ID == c.Config.Sandbox {
			b.State = engine.SandboxState{Ready: true, Ports: b.Config.Ports, NetNS: "/run/ns/" + b.Config.ID[:6]}
			for _, ep := range b.Config.Endpoints {
				b.State.Endpoints = append(b.State.Endpoints, network.Endpoint{
					Sandbox: b.Config.ID, NetworkID: ep.Network, Interface: "eth0", MAC: "02:42:ac:11:00:02",
					Address: netip.MustParsePrefix("172.17.0.2/16"), Gateway: netip.MustParseAddr("172.17.0.1"), Aliases: ep.Aliases,
				})
			}
		}
	}
	in := c.input
	e.mu.Unlock()
	e.publish(c.Container, "start")
	e.running.Go(func() {
		code := e.program(c.Config.Args, in, stdout, stderr)
		in.Close()
		e.mu.Lock()
		defer e.mu.Unlock()
		c.State.Status, c.State.ExitCode, c.State.FinishedAt, c.State.PID = engine.StatusExited, code, time.Now(), 0
		e.finish(c)
		e.publish(c.Container, "die")
	})
	return nil
}

// finish ends a run: taps, waiters, automatic removal.
func (e *liveEngine) finish(c *liveContainer) {
	c.ended = true
	for _, t := range c.taps {
		t.ended = true
	}
	c.taps = nil
	keep := c.waiters[:0]
	for _, w := range c.waiters {
		if w.cond == engine.WaitRemoved && !c.Config.AutoRemove {
			keep = append(keep, w)
			continue
		}
		w.c <- engine.WaitResult{ExitCode: c.State.ExitCode}
	}
	c.waiters = keep
	if c.Config.AutoRemove {
		e.containers = slices.DeleteFunc(e.containers, func(o *liveContainer) bool { return o == c })
		e.publish(c.Container, "destroy")
	}
	e.changed.Broadcast()
}

func (e *liveEngine) Wait(_ context.Context, ref string, cond engine.WaitCondition) (<-chan engine.WaitResult, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	w := liveWaiter{make(chan engine.WaitResult, 1), cond}
	if cond == engine.WaitNotRunning && c.State.Status != engine.StatusRunning {
		w.c <- engine.WaitResult{ExitCode: c.State.ExitCode}
		return w.c, nil
	}
	c.waiters = append(c.waiters, w)
	return w.c, nil
}

func (e *liveEngine) KillContainer(_ context.Context, ref, _ string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if c.State.Status != engine.StatusRunning {
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", c.Config.ID)
	}
	c.stdin.Close()
	return nil
}

func (e *liveEngine) StopContainer(ctx context.Context, ref string, _ *time.Duration, _ string) error {
	if err := e.KillContainer(ctx, ref, ""); errors.Is(err, errdefs.ErrConflict) {
		return errdefs.New(errdefs.ErrNotModified, "container %s is already stopped", ref)
	} else if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for c, err := e.find(ref); err == nil && c.State.Status == engine.StatusRunning; {
		e.changed.Wait()
	}
	return nil
}

func (e *liveEngine) RemoveContainer(_ context.Context, ref string, o engine.RemoveOptions) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if c.State.Status == engine.StatusRunning {
		if !o.Force {
			return errdefs.New(errdefs.ErrConflict, "cannot remove container %q: container is running: stop the container before removing or force remove", "/"+c.Config.Name)
		}
		c.stdin.Close()
	}
	e.containers = slices.DeleteFunc(e.containers, func(o *liveContainer) bool { return o == c })
	return nil
}

func (e *liveEngine) UpdateContainer(_ context.Context, ref string, r *engine.Resources, p *engine.RestartPolicy) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	c, err := e.find(ref)
	if err == nil && r != nil {
		c.Config.Resources = *r
	}
	if err == nil && p != nil {
		c.Config.Restart = *p
	}
	return err
}

func (e *liveEngine) ResizeContainer(_ context.Context, _ string, h, w uint16) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.resized = append(e.resized, [2]uint16{h, w})
	return nil
}

func (e *liveEngine) WritableBytes(context.Context, string) (int64, error) { return 42, nil }
func (e *liveEngine) Execs(string) []string                                { return nil }

// attach taps streams from now on; start tells whether the process may yet come.
func (e *liveEngine) attach(s *liveStreams, terminal, stdin, once bool) *engine.Attachment {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := &tap{}
	s.taps = append(s.taps, t)
	var in io.WriteCloser
	if stdin {
		in = liveStdin{e, s, once}
	}
	copyOut := func(ctx context.Context, stdout, stderr io.Writer) error {
		stop := context.AfterFunc(ctx, func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.changed.Broadcast()
		})
		defer stop()
		for {
			e.mu.Lock()
			for len(t.pieces) == 0 && !t.ended && ctx.Err() == nil {
				e.changed.Wait()
			}
			pieces, ended := t.pieces, t.ended
			t.pieces = nil
			e.mu.Unlock()
			for _, p := range pieces {
				w := stdout
				if p.stream == engine.Stderr && !terminal {
					w = stderr
				}
				if w == nil {
					continue
				}
				if _, err := w.Write(p.data); err != nil {
					return err
				}
			}
			switch {
			case ended:
				return nil
			case ctx.Err() != nil:
				return ctx.Err()
			}
		}
	}
	return engine.NewAttachment(in, terminal, copyOut, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		s.taps = slices.DeleteFunc(s.taps, func(o *tap) bool { return o == t })
	})
}

type liveStdin struct {
	e    *liveEngine
	s    *liveStreams
	once bool
}

func (i liveStdin) pipe() *io.PipeWriter {
	i.e.mu.Lock()
	defer i.e.mu.Unlock()
	return i.s.stdin
}

func (i liveStdin) Write(p []byte) (int, error) {
	w := i.pipe()
	if w == nil {
		return 0, errdefs.New(errdefs.ErrConflict, "not running")
	}
	return w.Write(p)
}

func (i liveStdin) Close() error {
	if w := i.pipe(); w != nil && i.once {
		return w.Close()
	}
	return nil
}

func (e *liveEngine) Attach(_ context.Context, ref string, o engine.AttachOptions) (*engine.Attachment, error) {
	e.mu.Lock()
	c, err := e.find(ref)
	e.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return e.attach(&c.liveStreams, c.Config.Terminal, o.Stdin && c.Config.OpenStdin, c.Config.StdinOnce), nil
}

// Logs gives e.logs, then with Follow waits for ctx.
func (e *liveEngine) Logs(ctx context.Context, _ string, o engine.LogOptions, f func(engine.LogEntry) error) error {
	entries := e.logs
	if o.Tail >= 0 && o.Tail < len(entries) {
		entries = entries[len(entries)-o.Tail:]
	}
	for _, l := range entries {
		if l.Stream == engine.Stdout && !o.Stdout || l.Stream == engine.Stderr && !o.Stderr {
			continue
		}
		if !o.Since.IsZero() && l.Time.Before(o.Since) || !o.Until.IsZero() && l.Time.After(o.Until) {
			continue
		}
		if err := f(l); err != nil {
			return err
		}
	}
	if o.Follow {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (e *liveEngine) CreateExec(_ context.Context, c engine.ExecConfig) (engine.Exec, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	of, err := e.find(c.Container)
	if err != nil {
		return engine.Exec{}, err
	}
	if of.State.Status != engine.StatusRunning {
		return engine.Exec{}, errdefs.New(errdefs.ErrConflict, "container %s is not running", of.Config.ID)
	}
	c.Container = of.Config.ID
	x := &liveExec{Exec: engine.Exec{ID: engine.NewID(), Config: c}}
	e.execs[x.ID] = x
	return x.Exec, nil
}

func (e *liveEngine) Exec(id string) (engine.Exec, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if x := e.execs[id]; x != nil {
		return x.Exec, nil
	}
	return engine.Exec{}, errdefs.New(errdefs.ErrNotFound, "No such exec instance: %s", id)
}

func (e *liveEngine) AttachExec(_ context.Context, id string, o engine.AttachOptions) (*engine.Attachment, error) {
	e.mu.Lock()
	x := e.execs[id]
	e.mu.Unlock()
	return e.attach(&x.liveStreams, x.Config.Terminal, o.Stdin, true), nil
}

func (e *liveEngine) StartExec(_ context.Context, id string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.execs[id]
	x.Started = true
	if strings.HasPrefix(x.Config.Args[0], "missing") {
		x.ExitCode = 127
		for _, t := range x.taps {
			t.ended = true
		}
		return errdefs.New(errdefs.ErrNoProgram, "exec: %q: executable file not found in $PATH", x.Config.Args[0])
	}
	x.Running, x.PID = true, 4343
	stdout, stderr := e.open(&x.liveStreams)
	e.running.Go(func() {
		code := e.program(x.Config.Args, x.input, stdout, stderr)
		x.input.Close()
		e.mu.Lock()
		defer e.mu.Unlock()
		x.Running, x.ExitCode = false, code
		for _, t := range x.taps {
			t.ended = true
		}
		e.changed.Broadcast()
	})
	return nil
}

func (e *liveEngine) ResizeExec(ctx context.Context, id string, h, w uint16) error {
	return e.ResizeContainer(ctx, id, h, w)
}

func (e *liveEngine) Stats(_ context.Context, ref string) (engine.Stats, error) {
	c, err := e.Container(ref)
	if err != nil {
		return engine.Stats{}, err
	}
	if c.State.Status != engine.StatusRunning {
		return engine.Stats{}, errdefs.New(errdefs.ErrConflict, "container is not running")
	}
	return engine.Stats{Time: time.Now(), CPUNanos: 5e9, MemoryBytes: 1 << 20, MemoryCache: 1 << 10, Pids: 3,
		Networks: map[string]engine.NetworkStats{"eth0": {RxBytes: 7}}}, nil
}

// liveNode is a Docker API over a liveEngine, served on a unix socket.
type liveNode struct {
	t        *testing.T
	server   *dockerapi.Server
	engine   *liveEngine
	images   *memImages
	networks *memNetworks
	volumes  *memVolumes
	hub      *event.Hub
	socket   string
	client   *http.Client
	stop     context.CancelFunc // tells the server to stop
	stopped  chan struct{}      // closed once Serve has returned
}

func newLiveNode(t *testing.T) *liveNode {
	t.Helper()
	hub := event.NewHub()
	n := &liveNode{
		t: t, engine: newLiveEngine(hub), images: &memImages{layers: map[digest.Digest][]int64{}},
		networks: &memNetworks{}, volumes: &memVolumes{}, hub: hub, socket: filepath.Join(t.TempDir(), "d.sock"),
	}
	n.networks.add("bridge", network.DriverBridge, "172.17.0.0/16")
	n.networks.add("host", network.DriverHost, "")
	n.networks.add("none", network.DriverNull, "")
	n.networks.add("shop", network.DriverBridge, "172.20.0.0/16")
	img := n.images.add("busybox:latest", epoch, map[string]string{"from": "image"}, 100)
	_ = img
	n.server = dockerapi.New(dockerapi.Options{
		Engine: n.engine, Images: n.images, Networks: n.networks, Volumes: n.volumes, Events: hub,
		Info: dockerapi.Info{Version: "0.1.0", Name: "harbour", StateDir: "/state", CgroupVersion: "1", SwapLimit: true},
	})
	l, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.stop, n.stopped = cancel, make(chan struct{})
	var served error
	go func() {
		defer close(n.stopped)
		served = n.server.Serve(ctx, l)
	}()
	n.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.socket)
	}}}
	t.Cleanup(func() {
		n.client.CloseIdleConnections()
		cancel()
		if <-n.stopped; served != nil {
			t.Errorf("Serve: %v", served)
		}
		n.engine.mu.Lock()
		for _, c := range n.engine.containers {
			if c.stdin != nil {
				c.stdin.Close()
			}
		}
		for _, x := range n.engine.execs {
			if x.stdin != nil {
				x.stdin.Close()
			}
		}
		n.engine.mu.Unlock()
		n.engine.running.Wait()
	})
	return n
}

// call sends a request with a JSON body ("" for none) and returns status and answer.
func (n *liveNode) call(method, path, body string) (int, string) {
	n.t.Helper()
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "http://docker"+path, r)
	if err != nil {
		n.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := n.client.Do(req)
	if err != nil {
		n.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode, string(data)
}

// must is call with an expected status; it decodes the answer into out unless nil.
func (n *liveNode) must(status int, method, path, body string, out any) string {
	n.t.Helper()
	got, text := n.call(method, path, body)
	if got != status {
		n.t.Fatalf("%s %s: %d %s; want %d", method, path, got, text, status)
	}
	if out != nil {
		if err := json.Unmarshal([]byte(text), out); err != nil {
			n.t.Fatalf("%s %s: %v in %s", method, path, err, text)
		}
	}
	return text
}

// refuse expects an error with a message that contains text.
func (n *liveNode) refuse(status int, text, method, path, body string) {
	n.t.Helper()
	got, answer := n.call(method, path, body)
	var e struct{ Message string }
	if err := json.Unmarshal([]byte(answer), &e); err != nil || got != status || !strings.Contains(e.Message, text) {
		n.t.Errorf("%s %s %s: %d %s; want %d with %q", method, path, body, got, answer, status, text)
	}
}

// create makes a container and returns what the engine got.
func (n *liveNode) create(name, body string) engine.Container {
	n.t.Helper()
	var out struct{ ID string }
	n.must(201, "POST", "/containers/create?name="+name, body, &out)
	c, err := n.engine.Container(out.ID)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// eventually polls until ok or a deadline.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not in time: %s", what)
		}
	}
}

// newServerOver is the API over an engine, without a socket.
func newServerOver(n *node, e dockerapi.EngineAPI) *dockerapi.Server {
	n.images.add("busybox:latest", epoch, nil, 100)
	return dockerapi.New(dockerapi.Options{
		Engine: e, Images: n.images, Networks: n.networks, Volumes: n.volumes, Events: n.events,
		Info: dockerapi.Info{Version: "0.1.0", CgroupVersion: "1"},
	})
}

func serve(s http.Handler, method, path, body string) (int, string) {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}
