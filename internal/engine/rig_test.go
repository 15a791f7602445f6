package engine_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"berth/internal/engine"
	"berth/internal/event"
	"berth/internal/network"
	"berth/internal/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tester is what the rig needs of a test, or of a property's case.
type tester interface {
	Helper()
	Error(args ...any)
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// rig is an engine with fakes around it, in a bubble of fake time: synctest.Wait is the moment
// when everything that can happen has happened.
type rig struct {
	t         tester
	dir       string
	root      state.Root
	store     *memStore
	node      *node
	images    *fakeImages
	networks  *fakeNetworks
	volumes   *fakeVolumes
	resolvers *fakeResolvers
	hub       *event.Hub
	began     time.Time

	e     *engine.Engine
	end   context.CancelFunc
	ended chan error
}

// bubble runs f with a rig whose engine is ready.
func bubble(t *testing.T, f func(t *testing.T, r *rig)) {
	t.Helper()
	needRoot(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		r.open()
		f(t, r)
	})
}

func needRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("overlay mounts need root")
	}
}

func newRig(t tester) *rig {
	dir, err := os.MkdirTemp("", "engine")
	if err != nil {
		t.Fatal(err)
	}
	root, err := state.NewRoot(filepath.Join(dir, "r"))
	if err != nil {
		t.Fatal(err)
	}
	layer := filepath.Join(dir, "layer")
	must(t, os.MkdirAll(filepath.Join(layer, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(layer, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\nweb:x:7:7::/web:/bin/sh\n"), 0o644))
	return &rig{t: t, dir: dir, root: root, store: newMemStore(), node: newNode(), images: &fakeImages{layer: layer},
		networks: newFakeNetworks(root), volumes: &fakeVolumes{dir: filepath.Join(dir, "volumes")},
		resolvers: &fakeResolvers{served: map[string]string{}}, hub: event.NewHub(), began: time.Now()}
}

func must(t tester, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open starts an engine on what is there and waits until it has settled.
func (r *rig) open() {
	r.t.Helper()
	e, err := engine.Open(engine.Options{Root: r.root, Store: r.store, DialRunner: r.node.dial, Images: r.images, Networks: r.networks,
		Volumes: r.volumes, Resolvers: r.resolvers, Events: r.hub, Logger: slog.New(slog.NewTextHandler(r.logTo(), nil))})
	must(r.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan struct{})
	r.e, r.end, r.ended = e, cancel, make(chan error, 1)
	go func() { r.ended <- e.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-r.ended:
		r.ended <- err
		r.t.Fatalf("the engine ended: %v", err)
	}
	synctest.Wait()
}

func (r *rig) logTo() io.Writer {
	if os.Getenv("ENGINE_TEST_LOG") != "" {
		return os.Stderr
	}
	return io.Discard
}

// stop ends the engine as a stopped daemon does: containers run on. It takes no time to speak of.
func (r *rig) stop() {
	r.t.Helper()
	began := time.Now()
	r.end()
	if err := <-r.ended; err != nil {
		r.t.Errorf("the engine ended with %v", err)
	}
	if took := time.Since(began); took > time.Second {
		r.t.Errorf("the engine took %s to end", took)
	}
	r.e = nil
}

// reopen is a restart of the daemon.
func (r *rig) reopen() {
	r.t.Helper()
	if r.e != nil {
		r.stop()
	}
	r.open()
}

// reboot is a restart of the machine: processes, namespaces and the run directory are gone.
func (r *rig) reboot(before ...func()) {
	r.t.Helper()
	r.stop()
	r.node.loseAll()
	must(r.t, r.networks.reboot())
	r.unmount()
	must(r.t, os.RemoveAll(r.root.Run))
	for _, f := range before {
		f()
	}
	r.open()
}

// close ends the engine and removes all there is.
func (r *rig) close() {
	if r.e != nil {
		r.end()
		<-r.ended
	}
	if err := r.networks.reboot(); err != nil {
		r.t.Error(err)
	}
	r.unmount()
	if err := os.RemoveAll(r.dir); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) unmount() {
	for _, m := range r.mounts() {
		_ = unix.Unmount(m, unix.MNT_DETACH) // one that is in the way of RemoveAll is reported there
	}
}

// mounts are the mounted places below the rig's directory, the latest first.
func (r *rig) mounts() []string {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	must(r.t, err)
	var out []string
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], r.dir) {
			out = append([]string{f[4]}, out...)
		}
	}
	return out
}

// container makes a container with a sandbox of its own on the default network.
func (r *rig) container(name string, alter ...func(c *engine.ContainerConfig, s *engine.SandboxConfig)) string {
	r.t.Helper()
	id, err := r.tryContainer(name, alter...)
	must(r.t, err)
	return id
}

func (r *rig) tryContainer(name string, alter ...func(c *engine.ContainerConfig, s *engine.SandboxConfig)) (string, error) {
	id := engine.NewID()
	box := engine.SandboxConfig{ID: id, Owner: engine.OwnerDocker, Endpoints: []engine.EndpointConfig{{Network: "bridge"}}}
	cfg := engine.ContainerConfig{ID: id, Name: name, Owner: engine.OwnerDocker, Sandbox: id, Image: "image", ImageID: "sha256:1", Args: []string{"sleep"}}
	for _, f := range alter {
		f(&cfg, &box)
	}
	ctx := context.Background()
	if cfg.Sandbox == id {
		if _, err := r.e.CreateSandbox(ctx, box); err != nil {
			return "", err
		}
	}
	if _, err := r.e.CreateContainer(ctx, cfg); err != nil {
		if cfg.Sandbox == id {
			err = errors.Join(err, r.e.RemoveSandbox(ctx, id))
		}
		return "", err
	}
	return id, nil
}

// Alterations of a container.
type alter = func(c *engine.ContainerConfig, s *engine.SandboxConfig)

func autoRemove(c *engine.ContainerConfig, _ *engine.SandboxConfig) { c.AutoRemove = true }

func restartPolicy(name string, max int) alter {
	return func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
		c.Restart = engine.RestartPolicy{Name: name, MaxRetries: max}
	}
}

func inSandboxOf(id string) alter {
	return func(c *engine.ContainerConfig, _ *engine.SandboxConfig) { c.Sandbox = id }
}

func publishing(port uint16) alter {
	return func(_ *engine.ContainerConfig, s *engine.SandboxConfig) {
		s.Ports = []network.Port{{Protocol: "tcp", HostPort: port, Port: 80}}
	}
}

func asUser(u string) alter {
	return func(c *engine.ContainerConfig, _ *engine.SandboxConfig) { c.User = u }
}

// started makes and starts a container.
func (r *rig) started(name string, alter ...alter) string {
	r.t.Helper()
	id := r.container(name, alter...)
	must(r.t, r.e.StartContainer(context.Background(), id))
	return id
}

// exit has the container's process exit and waits until that is dealt with.
func (r *rig) exit(id string, code int) {
	r.node.exit(id, code)
	synctest.Wait()
}

func (r *rig) state(id string) engine.ContainerState {
	r.t.Helper()
	c, err := r.e.Container(id)
	must(r.t, err)
	return c.State
}

// is fails unless the container has this status.
func (r *rig) is(id string, want engine.Status) {
	r.t.Helper()
	if got := r.state(id).Status; got != want {
		r.t.Fatalf("status is %s, want %s", got, want)
	}
}

// gone fails unless the container is removed.
func (r *rig) gone(id string) {
	r.t.Helper()
	if c, err := r.e.Container(id); err == nil {
		r.t.Fatalf("container is still there: %+v", c.State)
	}
}

// wantKind fails unless err is of the kind.
func wantKind(t tester, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got error %v, want one of kind %q", err, kind)
	}
}

// idle fails when something is held though nothing runs.
func (r *rig) idle() {
	r.t.Helper()
	synctest.Wait()
	spaces, endpoints, ports := r.networks.held()
	if m := r.mounts(); spaces+endpoints+ports+len(m) > 0 {
		r.t.Errorf("still held: %d namespaces, %d endpoints, %d ports, mounts %v", spaces, endpoints, ports, m)
	}
	if n := r.resolvers.count(); n > 0 {
		r.t.Errorf("%d resolvers still serve", n)
	}
	if n := r.node.known(); n > 0 {
		r.t.Errorf("the runner still knows %d processes", n)
	}
}

// empty fails unless no trace of any container is left.
func (r *rig) empty() {
	r.t.Helper()
	r.idle()
	if n, m := r.store.count("container"), r.store.count("sandbox"); n+m > 0 {
		r.t.Errorf("%d records of containers and %d of sandboxes are left", n, m)
	}
	for _, dir := range []string{r.root.Containers(), filepath.Dir(r.root.Sandbox("x")), filepath.Join(r.root.Run, "bundles"),
		filepath.Join(r.root.Run, "ns"), filepath.Join(r.root.Run, "execs")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			r.t.Error(err)
		}
		for _, d := range entries {
			r.t.Errorf("left: %s", filepath.Join(dir, d.Name()))
		}
	}
}

// actions are the events since the rig was made, for one container.
func (r *rig) actions(id string) []string {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	past, _ := r.hub.Subscribe(ctx, r.began.Add(-time.Second))
	var out []string
	for _, e := range past {
		if e.ID == id {
			out = append(out, e.Action)
		}
	}
	return out
}

// result takes what a wait delivers; nothing must be outstanding.
func (r *rig) result(ch <-chan engine.WaitResult) engine.WaitResult {
	r.t.Helper()
	synctest.Wait()
	select {
	case w := <-ch:
		return w
	default:
		r.t.Fatal("the wait has not ended")
		return engine.WaitResult{}
	}
}

// pending fails when a wait has ended.
func (r *rig) pending(ch <-chan engine.WaitResult) {
	r.t.Helper()
	synctest.Wait()
	select {
	case w := <-ch:
		r.t.Fatalf("the wait ended: %+v", w)
	default:
	}
}

func (r *rig) wait(id string, c engine.WaitCondition) <-chan engine.WaitResult {
	r.t.Helper()
	ch, err := r.e.Wait(context.Background(), id, c)
	must(r.t, err)
	return ch
}

func (r *rig) remove(id string) {
	r.t.Helper()
	must(r.t, r.e.RemoveContainer(context.Background(), id, engine.RemoveOptions{Force: true}))
}
