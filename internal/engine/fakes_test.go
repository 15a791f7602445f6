package engine_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/network"
	"berth/internal/runner"
	"berth/internal/state"

	"berth/internal/engine"
)

// memStore is a journal in memory. It keeps JSON, so that what a record loses on its way is lost
// here too.
type memStore struct {
	mu      sync.Mutex
	records map[string]map[string][]byte // kind, key
	refuse  error                        // of Put
}

func newMemStore() *memStore { return &memStore{records: map[string]map[string][]byte{}} }

func (s *memStore) Put(kind, key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse != nil {
		return s.refuse
	}
	if s.records[kind] == nil {
		s.records[kind] = map[string][]byte{}
	}
	s.records[kind][key] = raw
	return nil
}

func (s *memStore) Delete(kind, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records[kind], key)
	return nil
}

func (s *memStore) Each(kind string, f func(key string, raw json.RawMessage) error) error {
	s.mu.Lock()
	all := maps.Clone(s.records[kind])
	s.mu.Unlock()
	for key, raw := range all {
		if err := f(key, raw); err != nil {
			return err
		}
	}
	return nil
}

// snapshot and reset take the journal back to what it was: the daemon was killed in between.
func (s *memStore) snapshot() map[string]map[string][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]map[string][]byte{}
	for kind, keys := range s.records {
		out[kind] = maps.Clone(keys)
	}
	return out
}

func (s *memStore) reset(to map[string]map[string][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = to
}

func (s *memStore) count(kind string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records[kind])
}

// node simulates berth-runner and the processes it keeps.
type node struct {
	mu      sync.Mutex
	procs   map[string]*proc
	lastPID int
	conns   map[*conn]struct{}
	down    bool
	// onCreate and onExec, when set, may refuse or disturb; a nil error goes on as usual.
	onCreate func(c *conn, r runner.CreateRequest) error
	onExec   func(c *conn, r runner.ExecRequest) error
	// afterCreate runs once the process exists and before the answer is sent.
	afterCreate func(c *conn, id string)
	onPause     func() error
	keepDeleted bool // Delete is not heard
	answered    bool // the answer to Create arrives whatever happens then
	creates     int
}

type proc struct {
	runner.Process
	state    runner.State
	exit     runner.Exit
	deaf     bool  // acts upon SIGKILL only
	pending  []int // signals that wait for the end of a pause
	received []int
}

func newNode() *node {
	return &node{procs: map[string]*proc{}, conns: map[*conn]struct{}{}, lastPID: 1000}
}

func (n *node) dial(context.Context) (engine.Runner, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down {
		return nil, errdefs.New(errdefs.ErrUnavailable, "nobody listens")
	}
	c := &conn{n: n, events: make(chan runner.Event, 1024), closed: make(chan struct{})}
	n.conns[c] = struct{}{}
	return c, nil
}

// die ends all connections; with stay set nobody answers until rise.
func (n *node) die(stay bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = stay
	for c := range n.conns {
		c.closeLocked()
	}
}

func (n *node) rise() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = false
}

// lose makes a process vanish without a trace.
func (n *node) lose(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.procs, id)
}

// loseAll is a reboot of the machine.
func (n *node) loseAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.procs)
}

func (n *node) exit(id string, code int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.exitLocked(n.procs[id], runner.Exit{Known: true, Code: code})
}

func (n *node) exitLocked(p *proc, exit runner.Exit) {
	if p == nil || p.state == runner.Stopped {
		return
	}
	if exit.At.IsZero() {
		exit.At = time.Now()
	}
	p.state, p.exit = runner.Stopped, exit
	n.sendLocked(runner.Event{Kind: runner.EventExit, ID: p.ID, PID: p.PID, Exit: exit})
	if p.ID == p.Container { // the end of a PID namespace's first process
		for _, q := range n.procs {
			if q.Container == p.ID && q != p {
				n.exitLocked(q, runner.Exit{Known: true, Code: 137, Signal: 9})
			}
		}
	}
}

func (n *node) send(e runner.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sendLocked(e)
}

func (n *node) sendLocked(e runner.Event) {
	for c := range n.conns {
		c.events <- e
	}
}

// running returns the IDs of containers whose first process lives.
func (n *node) running() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var ids []string
	for id, p := range n.procs {
		if id == p.Container && p.state != runner.Stopped {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (n *node) known() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.procs)
}

func (n *node) signals(id string) []int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.procs[id]; p != nil {
		return slices.Clone(p.received)
	}
	return nil
}

func (n *node) deafen(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.procs[id].deaf = true
}

func (n *node) pid(id string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.procs[id]; p != nil {
		return p.PID
	}
	return 0
}

// set changes the hooks.
func (n *node) set(f func(n *node)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n)
}

// conn is one connection to the node.
type conn struct {
	n      *node
	events chan runner.Event
	closed chan struct{}
}

func (c *conn) closeLocked() {
	if _, open := c.n.conns[c]; open {
		delete(c.n.conns, c)
		close(c.events)
		close(c.closed)
	}
}

func (c *conn) Close() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.closeLocked()
	return nil
}

func (c *conn) Events() <-chan runner.Event { return c.events }
func (c *conn) Closed() <-chan struct{}     { return c.closed }

// lock takes the node, unless the connection is broken.
func (c *conn) lock() error {
	c.n.mu.Lock()
	if _, open := c.n.conns[c]; !open {
		c.n.mu.Unlock()
		return errdefs.New(errdefs.ErrUnavailable, "the connection is lost")
	}
	return nil
}

// with finds a process and acts on it.
func (c *conn) with(id string, f func(p *proc) error) error {
	if err := c.lock(); err != nil {
		return err
	}
	defer c.n.mu.Unlock()
	p := c.n.procs[id]
	if p == nil {
		return errdefs.New(errdefs.ErrNotFound, "no process %s", id)
	}
	if p.state == runner.Stopped {
		return errdefs.New(errdefs.ErrConflict, "process %s has ended", id)
	}
	return f(p)
}

func (c *conn) Create(_ context.Context, r runner.CreateRequest) (runner.Process, error) {
	c.n.mu.Lock()
	c.n.creates++
	on, after := c.n.onCreate, c.n.afterCreate
	c.n.mu.Unlock()
	if on != nil {
		if err := on(c, r); err != nil {
			return runner.Process{}, err
		}
	}
	if _, err := os.Stat(filepath.Join(r.Bundle, "config.json")); err != nil {
		return runner.Process{}, errdefs.New(errdefs.ErrInvalid, "bundle: %w", err)
	}
	p, err := c.spawn(r.ID, r.ID)
	if err != nil {
		return p, err
	}
	if after != nil {
		after(c, r.ID)
	}
	if c.n.hasAnswered() {
		return p, nil
	}
	if err := c.lock(); err != nil {
		return runner.Process{}, err
	}
	c.n.mu.Unlock()
	return p, nil
}

func (n *node) hasAnswered() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.answered
}

func (c *conn) spawn(id, container string) (runner.Process, error) {
	if err := c.lock(); err != nil {
		return runner.Process{}, err
	}
	defer c.n.mu.Unlock()
	if c.n.procs[id] != nil {
		return runner.Process{}, errdefs.New(errdefs.ErrExists, "process %s exists", id)
	}
	if o := c.n.procs[container]; id != container && (o == nil || o.state != runner.Running) {
		return runner.Process{}, errdefs.New(errdefs.ErrConflict, "container %s does not run", container)
	}
	c.n.lastPID++
	p := &proc{Process: runner.Process{ID: id, Container: container, PID: c.n.lastPID}, state: runner.Running}
	c.n.procs[id] = p
	return p.Process, nil
}

func (c *conn) Exec(_ context.Context, r runner.ExecRequest) (runner.Process, error) {
	c.n.mu.Lock()
	on := c.n.onExec
	c.n.mu.Unlock()
	p, err := c.spawn(r.ID, r.Container)
	if err == nil && on != nil {
		if err = on(c, r); err != nil {
			return runner.Process{}, err
		}
	}
	return p, err
}

func (c *conn) Kill(_ context.Context, id string, signal int, _ bool) error {
	return c.with(id, func(p *proc) error {
		p.received = append(p.received, signal)
		if p.state == runner.Paused {
			p.pending = append(p.pending, signal)
			return nil
		}
		c.n.strike(p, signal)
		return nil
	})
}

func (n *node) strike(p *proc, signal int) {
	if signal == int(unix.SIGKILL) || signal == int(unix.SIGTERM) && !p.deaf {
		n.exitLocked(p, runner.Exit{Known: true, Code: 128 + signal, Signal: signal})
	}
}

func (c *conn) Resize(_ context.Context, id string, _, _ uint16) error {
	return c.with(id, func(*proc) error { return nil })
}

func (c *conn) OpenStdin(context.Context, string) (*os.File, error) {
	return nil, errdefs.New(errdefs.ErrUnsupported, "the fake has no input")
}

func (c *conn) CloseStdin(context.Context, string) error { return nil }

func (c *conn) Pause(_ context.Context, id string) error {
	return c.with(id, func(p *proc) error {
		if c.n.onPause != nil {
			if err := c.n.onPause(); err != nil {
				return err
			}
		}
		if p.state != runner.Running {
			return errdefs.New(errdefs.ErrConflict, "process %s is %s", id, p.state)
		}
		p.state = runner.Paused
		return nil
	})
}

func (c *conn) Resume(_ context.Context, id string) error {
	return c.with(id, func(p *proc) error {
		if p.state != runner.Paused {
			return errdefs.New(errdefs.ErrConflict, "process %s is %s", id, p.state)
		}
		p.state = runner.Running
		for _, s := range p.pending {
			c.n.strike(p, s)
		}
		p.pending = nil
		return nil
	})
}

func (c *conn) Update(_ context.Context, id string, _ *specs.LinuxResources) error {
	return c.with(id, func(*proc) error { return nil })
}

func (c *conn) Delete(_ context.Context, id string) error {
	if err := c.lock(); err != nil {
		return err
	}
	defer c.n.mu.Unlock()
	p := c.n.procs[id]
	if p == nil || c.n.keepDeleted {
		return nil
	}
	c.n.exitLocked(p, runner.Exit{Known: true, Code: 137, Signal: 9})
	maps.DeleteFunc(c.n.procs, func(_ string, q *proc) bool { return q == p || id == p.Container && q.Container == id })
	return nil
}

func (c *conn) List(context.Context) ([]runner.Status, error) {
	if err := c.lock(); err != nil {
		return nil, err
	}
	defer c.n.mu.Unlock()
	var out []runner.Status
	for _, p := range c.n.procs {
		out = append(out, runner.Status{Process: p.Process, State: p.state, Exit: p.exit})
	}
	return out, nil
}

// fakeImages has one image.
type fakeImages struct {
	mu       sync.Mutex
	layer    string
	refuse   error
	released []digest.Digest
}

func (f *fakeImages) RootFS(context.Context, digest.Digest) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []string{f.layer}, f.refuse
}

// refuseWith sets the error of RootFS.
func (f *fakeImages) refuseWith(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse = err
}

func (f *fakeImages) Release(_ context.Context, id digest.Digest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = append(f.released, id)
	return nil
}

// fakeNetworks makes real mounts of the test's own namespaces, and nothing else.
type fakeNetworks struct {
	root state.Root

	mu        sync.Mutex
	spaces    map[string]network.NS
	endpoints map[string][]network.Endpoint
	ports     map[string][]network.Port
	last      int
	live      map[string]bool // of the last Restore
	torn      int             // Teardowns
	// Errors of the steps.
	refuseSpaces, refuseAttach, refusePublish, refuseTeardown error
}

func newFakeNetworks(root state.Root) *fakeNetworks {
	return &fakeNetworks{root: root, spaces: map[string]network.NS{}, endpoints: map[string][]network.Endpoint{}, ports: map[string][]network.Port{}}
}

var fakeNets = map[string]string{"bridge": "b0", "b0": "bridge", "mynet": "n1", "n1": "mynet"}

func (f *fakeNetworks) Get(ref string) (network.Network, error) {
	other, ok := fakeNets[ref]
	if !ok {
		return network.Network{}, errdefs.New(errdefs.ErrNotFound, "network %s not found", ref)
	}
	id, name := ref, other
	if len(id) > 2 {
		id, name = name, id
	}
	return network.Network{ID: id, Config: network.Config{Name: name, Driver: network.DriverBridge}}, nil
}

func nsFiles(own network.NS) []string {
	var out []string
	for name, want := range map[string]bool{"net": own.Net, "ipc": own.IPC, "uts": own.UTS} {
		if want {
			out = append(out, name)
		}
	}
	return out
}

func (f *fakeNetworks) NewNamespaces(sandbox, _, _ string, own network.NS, _ map[string]string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, have := f.spaces[sandbox]; have {
		return errdefs.New(errdefs.ErrExists, "namespaces of %s exist", sandbox)
	}
	if f.refuseSpaces != nil {
		return f.refuseSpaces
	}
	dir := f.root.Namespaces(sandbox)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, name := range nsFiles(own) {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			return err
		}
		if err := unix.Mount("/proc/self/ns/"+name, p, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	f.spaces[sandbox] = own
	return nil
}

func (f *fakeNetworks) RemoveNamespaces(sandbox string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.removeLocked(sandbox)
}

func (f *fakeNetworks) removeLocked(sandbox string) error {
	dir := f.root.Namespaces(sandbox)
	for _, name := range nsFiles(f.spaces[sandbox]) {
		if err := unix.Unmount(filepath.Join(dir, name), unix.MNT_DETACH); err != nil {
			return fmt.Errorf("namespace %s of %s: %w", name, sandbox, err)
		}
	}
	delete(f.spaces, sandbox)
	return os.RemoveAll(dir)
}

func (f *fakeNetworks) Stats(string) (map[string]network.Counters, error) { return nil, nil }

func (f *fakeNetworks) Attach(_ context.Context, r network.AttachRequest) (network.Endpoint, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuseAttach != nil {
		return network.Endpoint{}, f.refuseAttach
	}
	f.last++
	ep := network.Endpoint{Sandbox: r.Sandbox, NetworkID: r.Network, NetNS: r.NetNS, Interface: "eth0",
		Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(f.last >> 8), byte(f.last)}), 16), Aliases: r.Aliases}
	f.endpoints[r.Sandbox] = append(f.endpoints[r.Sandbox], ep)
	return ep, nil
}

func (f *fakeNetworks) Detach(_ context.Context, sandbox, net string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.endpoints[sandbox] = slices.DeleteFunc(f.endpoints[sandbox], func(e network.Endpoint) bool { return e.NetworkID == net })
	return nil
}

func (f *fakeNetworks) Release(_ context.Context, sandbox string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.endpoints, sandbox)
	delete(f.ports, sandbox)
	return nil
}

func (f *fakeNetworks) Publish(_ context.Context, sandbox string, _ netip.Addr, ports []network.Port) ([]network.Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refusePublish != nil {
		return nil, f.refusePublish
	}
	for other, taken := range f.ports {
		for _, p := range taken {
			if other != sandbox && slices.ContainsFunc(ports, func(q network.Port) bool { return q.HostPort == p.HostPort }) {
				return nil, errdefs.New(errdefs.ErrForbidden, "port %d is already allocated", p.HostPort)
			}
		}
	}
	f.ports[sandbox] = slices.Clone(ports)
	return ports, nil
}

// Restore forgets what is not live, as the real one does, but keeps the namespaces.
func (f *fakeNetworks) Restore(_ context.Context, live map[string]bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live = maps.Clone(live)
	maps.DeleteFunc(f.endpoints, func(id string, _ []network.Endpoint) bool { return !live[id] })
	maps.DeleteFunc(f.ports, func(id string, _ []network.Port) bool { return !live[id] })
	return nil
}

func (f *fakeNetworks) Teardown(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.torn++
	return f.refuseTeardown
}

// reboot loses the namespaces.
func (f *fakeNetworks) reboot() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range maps.Clone(f.spaces) {
		if err := f.removeLocked(id); err != nil {
			return err
		}
	}
	clear(f.endpoints)
	clear(f.ports)
	return nil
}

func (f *fakeNetworks) set(change func(f *fakeNetworks)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// held counts what is in use.
func (f *fakeNetworks) held() (spaces, endpoints, ports int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.spaces), len(f.endpoints), len(f.ports)
}

func (f *fakeNetworks) hasSpaces(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.spaces[id]
	return ok
}

// fakeVolumes remembers removals.
type fakeVolumes struct {
	dir     string
	mu      sync.Mutex
	removed []string
}

func (f *fakeVolumes) Path(name string) (string, error) {
	if name == "missing" {
		return "", errdefs.New(errdefs.ErrNotFound, "no such volume: %s", name)
	}
	return filepath.Join(f.dir, name), nil
}

func (f *fakeVolumes) CopyUp(context.Context, string, string, string) error { return nil }

func (f *fakeVolumes) Remove(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.removed = append(f.removed, name)
	return nil
}

func (f *fakeVolumes) Teardown() error { return nil }

// fakeResolvers remembers who is served.
type fakeResolvers struct {
	mu     sync.Mutex
	served map[string]string
	refuse error
}

func (f *fakeResolvers) Serve(sandbox, netns string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return f.refuse
	}
	f.served[sandbox] = netns
	return nil
}

func (f *fakeResolvers) Stop(sandbox string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.served, sandbox)
}

func (f *fakeResolvers) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.served)
}
