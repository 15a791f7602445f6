package dockerapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/dockerapi"
	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/image"
	"berth/internal/network"
)

// node is a Docker API over things in memory: what the tests of images, networks, volumes and
// system need of the real ones.
type node struct {
	t        *testing.T
	server   *dockerapi.Server
	engine   *memEngine
	images   *memImages
	networks *memNetworks
	volumes  *memVolumes
	events   *event.Hub
	began    time.Time
}

// The real ones fit.
var (
	_ dockerapi.EngineAPI  = (*engine.Engine)(nil)
	_ dockerapi.ImageAPI   = (*image.Store)(nil)
	_ dockerapi.NetworkAPI = (*network.Service)(nil)
)

var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func newNode(t *testing.T, change ...func(*dockerapi.Options)) *node {
	t.Helper()
	n := &node{
		t: t, engine: &memEngine{}, images: &memImages{layers: map[digest.Digest][]int64{}},
		networks: &memNetworks{}, volumes: &memVolumes{}, events: event.NewHub(), began: time.Now(),
	}
	n.networks.add("bridge", network.DriverBridge, "172.17.0.0/16")
	n.networks.add("host", network.DriverHost, "")
	n.networks.add("none", network.DriverNull, "")
	o := dockerapi.Options{
		Engine: n.engine, Images: n.images, Networks: n.networks, Volumes: n.volumes, Events: n.events,
		Info: dockerapi.Info{
			Version: "0.1.0", Commit: "abcdef0", Built: epoch, ID: "node-id", Name: "harbour", StateDir: t.TempDir(),
			CgroupVersion: "1", RunnerVersion: "0.1.0", SecurityOptions: []string{"name=seccomp,profile=builtin", "name=cgroupns"},
			InsecureRegistries: []string{"registry.test:5000", "10.0.0.0/8"}, Mirrors: []string{"https://mirror.test/"},
		},
	}
	for _, f := range change {
		f(&o)
	}
	n.server = dockerapi.New(o)
	return n
}

// do sends one request and returns status and body.
func (n *node) do(method, target, body string, headers ...string) (int, string) {
	n.t.Helper()
	resp := n.exchange(method, target, strings.NewReader(body), headers...)
	return resp.Code, resp.Body.String()
}

func (n *node) exchange(method, target string, body io.Reader, headers ...string) *httptest.ResponseRecorder {
	n.t.Helper()
	r := httptest.NewRequest(method, target, body)
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	n.server.ServeHTTP(w, r)
	return w
}

// get decodes the answer to a GET into v.
func (n *node) get(target string, v any) {
	n.t.Helper()
	status, body := n.do("GET", target, "")
	if status != http.StatusOK {
		n.t.Fatalf("GET %s: %d %s", target, status, body)
	}
	if err := json.Unmarshal([]byte(body), v); err != nil {
		n.t.Fatalf("GET %s: %v in %s", target, err, body)
	}
}

// refused checks that a request fails with a status and a message that contains text.
func (n *node) refused(method, target, body string, status int, text string) {
	n.t.Helper()
	got, answer := n.do(method, target, body)
	var e struct{ Message string }
	if err := json.Unmarshal([]byte(answer), &e); err != nil || got != status || !strings.Contains(e.Message, text) {
		n.t.Errorf("%s %s %s: %d %s; want %d with %q", method, target, body, got, answer, status, text)
	}
	if strings.Contains(e.Message, "\n") {
		n.t.Errorf("%s %s: more than one line: %q", method, target, e.Message)
	}
}

// happened lists what was published, as "type action name-or-id".
func (n *node) happened() []string {
	ctx, cancel := context.WithCancel(n.t.Context())
	defer cancel()
	past, _ := n.events.Subscribe(ctx, n.began.Add(-time.Second))
	var out []string
	for _, e := range past {
		who := e.Attributes["name"]
		if who == "" {
			who = e.ID
		}
		out = append(out, strings.TrimSpace(e.Type+" "+e.Action+" "+who))
	}
	return out
}

func hexID(c string) string { return strings.Repeat(c, 64) }

// memEngine has containers and sandboxes; all else that the engine does is not asked for here.
type memEngine struct {
	dockerapi.EngineAPI
	mu         sync.Mutex
	containers []engine.Container
	sandboxes  []engine.Sandbox
	connects   []engine.EndpointConfig
	writable   int64
}

// run adds a container in a sandbox of its own.
func (e *memEngine) run(id, name string, status engine.Status, imageID digest.Digest, mounts ...engine.Mount) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers = append(e.containers, engine.Container{
		Config: engine.ContainerConfig{
			ID: id, Name: name, Sandbox: id, Owner: engine.OwnerDocker, Image: "busybox", ImageID: imageID.String(),
			Args: []string{"sh"}, Mounts: mounts, Labels: map[string]string{"role": name}, Dialect: json.RawMessage("{}"),
		},
		State: engine.ContainerState{Status: status, Created: epoch},
	})
	e.sandboxes = append(e.sandboxes, engine.Sandbox{Config: engine.SandboxConfig{ID: id, Name: name}})
}

func (e *memEngine) Containers() []engine.Container {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.containers)
}

// clear removes all containers.
func (e *memEngine) clear() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers, e.sandboxes = nil, nil
}

func (e *memEngine) Sandboxes() []engine.Sandbox {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.sandboxes)
}

func (e *memEngine) NetworkUsers(string) []engine.Sandbox { return nil }

func (e *memEngine) Container(ref string) (engine.Container, error) {
	for _, c := range e.Containers() {
		if c.Config.Name == ref || strings.HasPrefix(c.Config.ID, ref) {
			return c, nil
		}
	}
	return engine.Container{}, errdefs.New(errdefs.ErrNotFound, "No such container: %s", ref)
}

func (e *memEngine) Sandbox(ref string) (engine.Sandbox, error) {
	for _, b := range e.Sandboxes() {
		if b.Config.ID == ref {
			return b, nil
		}
	}
	return engine.Sandbox{}, errdefs.New(errdefs.ErrNotFound, "no such sandbox: %s", ref)
}

func (e *memEngine) ConnectSandbox(_ context.Context, ref string, c engine.EndpointConfig) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.sandboxes {
		if e.sandboxes[i].Config.ID == ref {
			e.sandboxes[i].Config.Endpoints = append(e.sandboxes[i].Config.Endpoints, c)
			e.connects = append(e.connects, c)
			return nil
		}
	}
	return errdefs.ErrNotFound
}

func (e *memEngine) DisconnectSandbox(_ context.Context, ref, net string, _ bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.sandboxes {
		if e.sandboxes[i].Config.ID == ref {
			e.sandboxes[i].Config.Endpoints = slices.DeleteFunc(e.sandboxes[i].Config.Endpoints,
				func(c engine.EndpointConfig) bool { return c.Network == net })
			return nil
		}
	}
	return errdefs.ErrNotFound
}

func (e *memEngine) WritableBytes(context.Context, string) (int64, error) { return e.writable, nil }

func (e *memEngine) RemoveContainer(_ context.Context, ref string, _ engine.RemoveOptions) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers = slices.DeleteFunc(e.containers, func(c engine.Container) bool { return c.Config.ID == ref })
	return nil
}

// memImages is an image store in memory.
type memImages struct {
	mu       sync.Mutex
	list     []image.Image
	layers   map[digest.Digest][]int64
	pull     func(ctx context.Context, ref string, o image.PullOptions) (image.Image, error)
	creds    image.Credentials
	platform string
	loaded   string
	load     func(r io.Reader, p image.Progress) ([]image.Image, error)
}

// add keeps an image with layers of the given sizes; name "" is dangling.
func (m *memImages) add(name string, created time.Time, labels map[string]string, layers ...int64) image.Image {
	id := digest.FromString(name + created.String())
	img := image.Image{
		ID:      id,
		Target:  ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("manifest" + name), Size: 527},
		Created: created, Tagged: created.Add(time.Hour),
		Config: ocispec.Image{
			Created: &created, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Author: "them",
			Config: ocispec.ImageConfig{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}, Labels: labels},
			RootFS: ocispec.RootFS{Type: "layers"},
		},
		DockerConfig: []byte(`{"Healthcheck":{"Test":["CMD","true"],"Interval":1000000000},"OnBuild":["RUN true"]}`),
	}
	img.Manifest = img.Target
	if name != "" {
		img.Names = []string{"docker.io/library/" + name}
		img.Digests = []string{"docker.io/library/" + strings.Split(name, ":")[0] + "@" + img.Target.Digest.String()}
	}
	for i, size := range layers {
		// The lowest layer is the same in all images.
		diff := digest.FromString(strings.Repeat("base", 1))
		if i > 0 {
			diff = digest.FromString(name + string(rune('a'+i)))
		}
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, diff)
		img.Config.History = append(img.Config.History, ocispec.History{Created: &created, CreatedBy: "COPY layer"},
			ocispec.History{Created: &created, CreatedBy: "ENV x", EmptyLayer: true, Comment: "made"})
		img.SizeBytes += size
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = append(m.list, img)
	m.layers[id] = layers
	return img
}

// onPull says what Pull does; nil refuses.
func (m *memImages) onPull(f func(ctx context.Context, ref string, o image.PullOptions) (image.Image, error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pull = f
}

func (m *memImages) List(context.Context) ([]image.Image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.list), nil
}

func (m *memImages) Resolve(_ context.Context, ref string) (image.Image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, img := range m.list {
		for _, name := range img.Names {
			short := strings.TrimPrefix(name, "docker.io/library/")
			if ref == name || ref == short || ref+":latest" == short || ref+":latest" == name {
				return img, nil
			}
		}
		if len(ref) >= 4 && strings.HasPrefix(img.ID.Encoded(), strings.TrimPrefix(ref, "sha256:")) {
			return img, nil
		}
	}
	return image.Image{}, errdefs.New(errdefs.ErrNotFound, "no such image: %s", ref)
}

func (m *memImages) LayerSizes(_ context.Context, id digest.Digest) ([]int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.layers[id], nil
}

func (m *memImages) Pull(ctx context.Context, ref string, o image.PullOptions) (image.Image, error) {
	m.mu.Lock()
	m.creds, m.platform = o.Credentials, o.Platform
	pull := m.pull
	m.mu.Unlock()
	if pull == nil {
		return image.Image{}, errdefs.New(errdefs.ErrNotFound, "pull access denied for %s, repository does not exist or may require 'docker login'", ref)
	}
	return pull(ctx, ref, o)
}

func (m *memImages) Push(ctx context.Context, ref string, c image.Credentials, p image.Progress) (digest.Digest, error) {
	m.mu.Lock()
	m.creds = c
	m.mu.Unlock()
	img, err := m.Resolve(ctx, ref)
	if err != nil {
		return "", err
	}
	p(image.Status{Action: "The push refers to repository [docker.io/library/busybox]"})
	p(image.Status{ID: "aabbccddeeff", Action: "Pushing", Current: 5, Total: 10})
	p(image.Status{ID: "aabbccddeeff", Action: "Pushed"})
	return img.Manifest.Digest, nil
}

func (m *memImages) Tag(ctx context.Context, source, target string) error {
	img, err := m.Resolve(ctx, source)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.list {
		if m.list[i].ID == img.ID {
			m.list[i].Names = append(slices.Clone(m.list[i].Names), target)
		}
	}
	return nil
}

func (m *memImages) Remove(ctx context.Context, ref string, force, _ bool, users func(digest.Digest) ([]string, bool)) ([]image.RemoveResult, error) {
	img, err := m.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	if names, running := users(img.ID); len(names) > 0 && (running || !force) {
		return nil, errdefs.New(errdefs.ErrConflict, "conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
			ref, names[0][:12], img.ID.Encoded()[:12])
	}
	return m.drop(img), nil
}

func (m *memImages) drop(img image.Image) []image.RemoveResult {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = slices.DeleteFunc(m.list, func(one image.Image) bool { return one.ID == img.ID })
	var out []image.RemoveResult
	for _, name := range img.Names {
		out = append(out, image.RemoveResult{Untagged: name})
	}
	return append(out, image.RemoveResult{Deleted: img.ID.String()})
}

func (m *memImages) Prune(_ context.Context, all bool, keep func(image.Image) bool) (out []image.RemoveResult, freed int64, err error) {
	list, _ := m.List(context.Background())
	for _, img := range list {
		if (all || len(img.Names) == 0) && !keep(img) {
			out = append(out, m.drop(img)...)
			freed += img.SizeBytes
		}
	}
	return out, freed, nil
}

func (m *memImages) Load(_ context.Context, r io.Reader, p image.Progress) ([]image.Image, error) {
	if m.load != nil {
		return m.load(r, p)
	}
	raw, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.loaded = string(raw)
	m.mu.Unlock()
	if bytes.HasPrefix(raw, []byte("bad")) {
		return nil, errdefs.New(errdefs.ErrInvalid, "archive: unrecognised format")
	}
	p(image.Status{ID: "aabbccddeeff", Action: "Loading layer", Current: 10, Total: 10})
	return []image.Image{m.add("loaded:1", epoch, nil, 5), m.add("", epoch.Add(time.Minute), nil, 5)}, nil
}

func (m *memImages) Save(_ context.Context, w io.Writer, refs []string) error {
	_, err := io.WriteString(w, "archive of "+strings.Join(refs, " "))
	return err
}

func (m *memImages) RootFS(context.Context, digest.Digest) ([]string, error) { return nil, nil }

func (m *memImages) CheckLogin(_ context.Context, host string, c image.Credentials) (string, error) {
	if c.Password != "right" {
		return "", errdefs.New(errdefs.ErrUnauthorized, "Get \"https://%s/v2/\": unauthorized: incorrect username or password", host)
	}
	return "Login Succeeded", nil
}

func (m *memImages) DiskUsage(context.Context) (int64, error) { return 12345, nil }

// memNetworks is a network service in memory.
type memNetworks struct {
	mu        sync.Mutex
	list      []network.Network
	endpoints []network.Endpoint
}

func (m *memNetworks) add(name, driver, subnet string) network.Network {
	n := network.Network{
		ID: digest.FromString(name).Encoded(), Created: epoch.Add(time.Duration(len(m.list)) * time.Minute),
		Config: network.Config{Name: name, Driver: driver},
	}
	if subnet != "" {
		p := netip.MustParsePrefix(subnet)
		n.Config.Subnets = []network.Subnet{{Prefix: p, Gateway: p.Addr().Next()}}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = append(m.list, n)
	return n
}

// attach says who is on networks.
func (m *memNetworks) attach(endpoints ...network.Endpoint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.endpoints = endpoints
}

func (m *memNetworks) Create(_ context.Context, c network.Config) (network.Network, error) {
	if _, err := m.Get(c.Name); err == nil {
		return network.Network{}, errdefs.New(errdefs.ErrExists, "taken")
	}
	n := network.Network{ID: digest.FromString(c.Name).Encoded(), Created: epoch, Config: c}
	if len(c.Subnets) == 0 {
		p := netip.MustParsePrefix("172.18.0.0/16")
		n.Config.Subnets = []network.Subnet{{Prefix: p, Gateway: p.Addr().Next()}}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = append(m.list, n)
	return n, nil
}

func (m *memNetworks) Get(ref string) (network.Network, error) {
	for _, n := range m.List() {
		if n.Config.Name == ref || n.ID == ref || len(ref) >= 6 && strings.HasPrefix(n.ID, ref) {
			return n, nil
		}
	}
	return network.Network{}, errdefs.New(errdefs.ErrNotFound, "no network %s", ref)
}

func (m *memNetworks) List() []network.Network {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.list)
}

func (m *memNetworks) Remove(_ context.Context, ref string) error {
	n, err := m.Get(ref)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = slices.DeleteFunc(m.list, func(one network.Network) bool { return one.ID == n.ID })
	return nil
}

func (m *memNetworks) Endpoints(ref string) []network.Endpoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []network.Endpoint
	for _, e := range m.endpoints {
		if e.NetworkID == ref {
			out = append(out, e)
		}
	}
	return out
}

// memVolumes is a volume store in memory.
type memVolumes struct {
	mu   sync.Mutex
	list []dockerapi.Volume
}

func (m *memVolumes) Create(_ context.Context, c dockerapi.VolumeConfig) (dockerapi.Volume, error) {
	if c.Name == "" {
		c.Name = hexID("e")
	}
	if v, err := m.Get(c.Name); err == nil {
		return v, nil
	}
	v := dockerapi.Volume{VolumeConfig: c, Path: "/state/volumes/" + c.Name, Created: epoch}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = append(m.list, v)
	return v, nil
}

func (m *memVolumes) Get(name string) (dockerapi.Volume, error) {
	for _, v := range m.List() {
		if v.Name == name {
			return v, nil
		}
	}
	return dockerapi.Volume{}, errdefs.New(errdefs.ErrNotFound, "no volume %s", name)
}

func (m *memVolumes) List() []dockerapi.Volume {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.list)
}

func (m *memVolumes) Remove(_ context.Context, name string) error {
	if _, err := m.Get(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.list = slices.DeleteFunc(m.list, func(v dockerapi.Volume) bool { return v.Name == name })
	return nil
}

func (m *memVolumes) SizeBytes(context.Context, string) (int64, error) { return 1000, nil }
