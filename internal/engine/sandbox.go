package engine

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/network"
)

// sandbox is the engine's own view of a sandbox.
//
// A sandbox with the ID of a container is private: it becomes ready with a container's start,
// is stopped when nothing in it runs any more, and is removed with the last container in it.
// Others (pods) live by StartSandbox, StopSandbox and RemoveSandbox alone.
type sandbox struct {
	op opLock
	mu sync.Mutex
	Sandbox
}

func (b *sandbox) view() Sandbox {
	b.mu.Lock()
	defer b.mu.Unlock()
	v := b.Sandbox
	v.State.Endpoints = slices.Clone(v.State.Endpoints)
	v.State.Ports = slices.Clone(v.State.Ports)
	v.Config.Endpoints = slices.Clone(v.Config.Endpoints)
	return v
}

func (e *Engine) saveSandbox(b *sandbox) error {
	return e.Store.Put(kindSandbox, b.Config.ID, &b.Sandbox)
}

// CreateSandbox implements SandboxAPI.
func (e *Engine) CreateSandbox(_ context.Context, cfg SandboxConfig) (Sandbox, error) {
	if cfg.ID == "" {
		cfg.ID = NewID()
	}
	if cfg.Name == "" {
		cfg.Name = cfg.ID
	}
	if err := checkCgroupParent(cfg.CgroupParent); err != nil {
		return Sandbox{}, err
	}
	if cfg.Network == NetworkOwn {
		for i, ep := range cfg.Endpoints {
			n, err := e.Networks.Get(ep.Network)
			if err != nil {
				return Sandbox{}, err
			}
			if n.Config.Driver != network.DriverBridge {
				return Sandbox{}, errdefs.New(errdefs.ErrInvalid, "network %s cannot be attached with driver %s", n.Config.Name, n.Config.Driver)
			}
			cfg.Endpoints[i].Network = n.ID
		}
	}
	b := &sandbox{op: newOpLock(), Sandbox: Sandbox{Config: cfg, State: SandboxState{Created: time.Now()}}}
	e.mu.Lock()
	if id, taken := e.boxNames[cfg.Name]; taken {
		e.mu.Unlock()
		return Sandbox{}, errdefs.New(errdefs.ErrConflict, "the sandbox name %q is already in use by sandbox %q", cfg.Name, id)
	}
	if e.sandboxes[cfg.ID] != nil {
		e.mu.Unlock()
		return Sandbox{}, errdefs.New(errdefs.ErrExists, "sandbox %s already exists", cfg.ID)
	}
	e.boxNames[cfg.Name] = cfg.ID
	e.sandboxes[cfg.ID] = b
	e.mu.Unlock()
	if err := e.saveSandbox(b); err != nil {
		e.forgetSandbox(b)
		return Sandbox{}, storageError("create sandbox", err)
	}
	return b.view(), nil
}

// maxCgroupParent leaves a path of the kernel's length room for the mount point and the container.
const maxCgroupParent = 2048

// checkCgroupParent refuses what no directory can be named, before a start is half made with it.
func checkCgroupParent(parent string) error {
	bad := len(parent) > maxCgroupParent || strings.ContainsAny(parent, "\x00\n")
	for name := range strings.SplitSeq(parent, "/") {
		bad = bad || len(name) > unix.NAME_MAX
	}
	if bad {
		return errdefs.New(errdefs.ErrInvalid, "invalid cgroup parent %.64q: it is no path", parent)
	}
	return nil
}

func (e *Engine) forgetSandbox(b *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.boxNames[b.Config.Name] == b.Config.ID {
		delete(e.boxNames, b.Config.Name)
	}
	delete(e.sandboxes, b.Config.ID)
}

// Sandbox implements SandboxAPI.
func (e *Engine) Sandbox(ref string) (Sandbox, error) {
	b, err := e.findSandbox(ref)
	if err != nil {
		return Sandbox{}, err
	}
	return b.view(), nil
}

// Sandboxes implements SandboxAPI; newest first.
func (e *Engine) Sandboxes() []Sandbox {
	e.mu.RLock()
	list := make([]*sandbox, 0, len(e.sandboxes))
	for _, b := range e.sandboxes {
		list = append(list, b)
	}
	e.mu.RUnlock()
	out := make([]Sandbox, len(list))
	for i, b := range list {
		out[i] = b.view()
	}
	slices.SortFunc(out, func(a, b Sandbox) int { return b.State.Created.Compare(a.State.Created) })
	return out
}

// StartSandbox implements SandboxAPI.
func (e *Engine) StartSandbox(ctx context.Context, ref string) error {
	b, err := e.findSandbox(ref)
	if err != nil {
		return err
	}
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	if err := e.goingDown(); err != nil {
		return err
	}
	return e.readyLocked(ctx, b)
}

// enter makes the sandbox ready for a container that is about to start in it.
func (e *Engine) enter(ctx context.Context, b *sandbox) error {
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	return e.readyLocked(ctx, b)
}

// leave stops a private sandbox in which nothing runs, starts or waits for a restart.
func (e *Engine) leave(ctx context.Context, b *sandbox) {
	if err := b.op.lock(ctx); err != nil {
		return
	}
	defer b.op.unlock()
	if !e.private(b.Config.ID) || e.occupied(b.Config.ID) {
		return
	}
	if err := e.unreadyLocked(ctx, b); err != nil {
		e.log.Warn("sandbox not stopped cleanly", "sandbox", b.Config.ID, "error", err)
	}
}

func (e *Engine) occupied(id string) bool {
	for _, c := range e.inSandbox(id) {
		c.mu.Lock()
		in := c.starting || c.running() || c.State.Status == StatusRestarting
		c.mu.Unlock()
		if in {
			return true
		}
	}
	return false
}

// makePrivate notes that the sandbox lives and ends with the containers in it.
func (e *Engine) makePrivate(b *sandbox) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Config.Private = true
	return e.saveSandbox(b)
}

func (e *Engine) private(id string) bool {
	b, err := e.findSandbox(id)
	if err != nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Config.Private
}

// readyLocked makes namespaces, endpoints, ports and files. On failure nothing of it is left.
func (e *Engine) readyLocked(ctx context.Context, b *sandbox) (err error) {
	if b.State.Ready {
		return nil
	}
	cfg := b.Config
	st := SandboxState{Created: b.State.Created, Ready: true}
	defer func() {
		if err != nil {
			e.undoReady(b)
		}
	}()
	own := network.NS{Net: cfg.Network != NetworkHost, IPC: !cfg.HostIPC, UTS: !cfg.HostUTS}
	if err = e.makeNamespaces(cfg, own); err != nil {
		return err
	}
	if own.Net {
		st.NetNS = filepath.Join(e.Root.Namespaces(cfg.ID), "net")
	}
	if cfg.Network == NetworkOwn {
		if st.Endpoints, err = e.attachAll(ctx, cfg, st.NetNS); err != nil {
			return err
		}
	}
	if len(cfg.Ports) > 0 && len(st.Endpoints) > 0 {
		if st.Ports, err = e.Networks.Publish(ctx, cfg.ID, e.publishedAt(st.Endpoints), cfg.Ports); err != nil {
			return errdefs.Wrap("driver failed programming external connectivity", err)
		}
	}
	if err = e.writeSandboxFiles(cfg, st); err != nil {
		return storageError("sandbox files", err)
	}
	if !e.private(cfg.ID) && !cfg.HostIPC {
		if err = e.mountShm(cfg); err != nil {
			return err
		}
	}
	b.mu.Lock()
	b.State = st
	err = e.saveSandbox(b)
	b.mu.Unlock()
	if err != nil {
		return err
	}
	if e.usesResolver(st.Endpoints) {
		if err = e.Resolvers.Serve(cfg.ID, st.NetNS); err != nil {
			return err
		}
	}
	return nil
}

// makeNamespaces takes what a killed daemon left half-made out of the way first.
func (e *Engine) makeNamespaces(cfg SandboxConfig, own network.NS) error {
	name := hostname(cfg)
	if cfg.Network == NetworkHost && cfg.Hostname == "" {
		name = nodeName()
	}
	err := e.Networks.NewNamespaces(cfg.ID, name, cfg.Domainname, own, cfg.Sysctls)
	if errorIs(err, errdefs.ErrExists) {
		if err = e.Networks.RemoveNamespaces(cfg.ID); err == nil {
			err = e.Networks.NewNamespaces(cfg.ID, name, cfg.Domainname, own, cfg.Sysctls)
		}
	}
	return err
}

func (e *Engine) attachAll(ctx context.Context, cfg SandboxConfig, netns string) ([]network.Endpoint, error) {
	var eps []network.Endpoint
	for i, w := range cfg.Endpoints {
		ep, err := e.Networks.Attach(ctx, network.AttachRequest{
			Sandbox: cfg.ID, NetNS: netns, Network: w.Network, Address: w.Address, MAC: w.MAC,
			Aliases: w.Aliases, Gateway: i == 0,
		})
		if err != nil {
			return eps, err
		}
		eps = append(eps, ep)
		e.publishNetwork(w.Network, "connect", cfg.ID)
	}
	return eps, nil
}

// publishedAt is the address that published ports lead to: on the first network that has a way
// in, or else the first, for the network to refuse it in its own words.
func (e *Engine) publishedAt(eps []network.Endpoint) netip.Addr {
	for _, ep := range eps {
		if n, err := e.Networks.Get(ep.NetworkID); err == nil && !n.Config.Internal {
			return ep.Address.Addr()
		}
	}
	return eps[0].Address.Addr()
}

func (e *Engine) publishNetwork(netID, action, sandboxID string) {
	n, err := e.Networks.Get(netID)
	if err != nil {
		return
	}
	e.Options.Events.Publish(event.Event{Type: "network", Action: action, ID: n.ID,
		Attributes: map[string]string{"name": n.Config.Name, "type": n.Config.Driver, "container": sandboxID}})
}

// undoReady removes what a failed readyLocked made.
func (e *Engine) undoReady(b *sandbox) {
	if err := e.unreadyLocked(context.WithoutCancel(e.ctx), b); err != nil {
		e.log.Warn("half-made sandbox not cleaned", "sandbox", b.Config.ID, "error", err)
	}
}

// unreadyLocked is the opposite of readyLocked; every step may find its work done already.
func (e *Engine) unreadyLocked(ctx context.Context, b *sandbox) error {
	id := b.Config.ID
	e.Resolvers.Stop(id)
	eps := b.State.Endpoints
	err := e.Networks.Release(ctx, id)
	_ = unix.Unmount(e.shmPath(id), unix.MNT_DETACH) // EINVAL when it was never mounted
	if e2 := e.Networks.RemoveNamespaces(id); err == nil {
		err = e2
	}
	b.mu.Lock()
	b.State.Ready, b.State.Endpoints, b.State.Ports, b.State.NetNS = false, nil, nil, ""
	if e2 := e.saveSandbox(b); err == nil {
		err = e2
	}
	b.mu.Unlock()
	for _, ep := range eps {
		e.publishNetwork(ep.NetworkID, "disconnect", id)
	}
	return err
}

func (e *Engine) shmPath(id string) string { return filepath.Join(e.Root.Namespaces(id), "shm") }

func (e *Engine) mountShm(cfg SandboxConfig) error {
	size := cfg.ShmBytes
	if size == 0 {
		size = 64 << 20
	}
	p := e.shmPath(cfg.ID)
	if err := os.MkdirAll(p, 0o755); err != nil {
		return err
	}
	return unix.Mount("shm", p, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("mode=1777,size=%d", size))
}

// StopSandbox implements SandboxAPI.
func (e *Engine) StopSandbox(ctx context.Context, ref string) error {
	b, err := e.findSandbox(ref)
	if err != nil {
		return err
	}
	for _, c := range e.inSandbox(b.Config.ID) {
		if err := e.stop(ctx, c, nil, "", "stop"); err != nil && !errorIs(err, errdefs.ErrNotModified) {
			return err
		}
	}
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	return e.unreadyLocked(ctx, b)
}

// RemoveSandbox implements SandboxAPI.
func (e *Engine) RemoveSandbox(ctx context.Context, ref string) error {
	b, err := e.findSandbox(ref)
	if err != nil {
		return err
	}
	for _, c := range e.inSandbox(b.Config.ID) {
		if err := e.RemoveContainer(ctx, c.Config.ID, RemoveOptions{Force: true, Volumes: true}); err != nil && !errorIs(err, errdefs.ErrNotFound) {
			return err
		}
	}
	return e.dropSandbox(ctx, b)
}

func (e *Engine) dropSandbox(ctx context.Context, b *sandbox) error {
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	if err := e.unreadyLocked(ctx, b); err != nil {
		return err
	}
	if err := os.RemoveAll(e.Root.Sandbox(b.Config.ID)); err != nil {
		return err
	}
	if err := e.Store.Delete(kindSandbox, b.Config.ID); err != nil {
		return err
	}
	e.forgetSandbox(b)
	return nil
}

// removeSandboxIfEmpty removes a private sandbox after the last container in it.
func (e *Engine) removeSandboxIfEmpty(ctx context.Context, id string) error {
	b, err := e.findSandbox(id)
	if err != nil || !e.private(id) || len(e.inSandbox(id)) > 0 {
		return nil
	}
	return e.dropSandbox(ctx, b)
}

func (e *Engine) inSandbox(id string) []*container {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var out []*container
	for _, c := range e.containers {
		if c.Config.Sandbox == id {
			out = append(out, c)
		}
	}
	return out
}

// ConnectSandbox implements SandboxAPI.
func (e *Engine) ConnectSandbox(ctx context.Context, ref string, w EndpointConfig) error {
	b, err := e.findSandbox(ref)
	if err != nil {
		return err
	}
	n, err := e.Networks.Get(w.Network)
	if err != nil {
		return err
	}
	if n.Config.Driver != network.DriverBridge {
		return errdefs.New(errdefs.ErrInvalid, "container cannot be connected to network %s: its driver %q takes no endpoints", n.Config.Name, n.Config.Driver)
	}
	w.Network = n.ID
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	if b.Config.Network != NetworkOwn {
		return errdefs.New(errdefs.ErrInvalid, "container sharing network namespace with another container or host cannot be connected to any other network")
	}
	for _, have := range b.Config.Endpoints {
		if have.Network == n.ID {
			return errdefs.New(errdefs.ErrForbidden, "endpoint with name %s already exists in network %s", b.Config.Name, n.Config.Name)
		}
	}
	st := b.view().State
	if st.Ready {
		ep, err := e.Networks.Attach(ctx, network.AttachRequest{Sandbox: b.Config.ID, NetNS: st.NetNS,
			Network: n.ID, Address: w.Address, MAC: w.MAC, Aliases: w.Aliases, Gateway: len(st.Endpoints) == 0})
		if err != nil {
			return err
		}
		st.Endpoints = append(st.Endpoints, ep)
		e.publishNetwork(n.ID, "connect", b.Config.ID)
	}
	return e.changeEndpoints(b, append(slices.Clone(b.Config.Endpoints), w), st)
}

// DisconnectSandbox implements SandboxAPI.
func (e *Engine) DisconnectSandbox(ctx context.Context, ref, netRef string, force bool) error {
	b, err := e.findSandbox(ref)
	if err != nil {
		return err
	}
	n, err := e.Networks.Get(netRef)
	if err != nil {
		return err
	}
	if err := b.op.lock(ctx); err != nil {
		return err
	}
	defer b.op.unlock()
	is := func(w EndpointConfig) bool { return w.Network == n.ID }
	if !slices.ContainsFunc(b.Config.Endpoints, is) {
		return errdefs.New(errdefs.ErrForbidden, "container %s is not connected to network %s", b.Config.ID, n.Config.Name)
	}
	st := b.view().State
	if st.Ready {
		if err := e.Networks.Detach(ctx, b.Config.ID, n.ID); err != nil && !force {
			return err
		}
		st.Endpoints = slices.DeleteFunc(st.Endpoints, func(ep network.Endpoint) bool { return ep.NetworkID == n.ID })
		e.publishNetwork(n.ID, "disconnect", b.Config.ID)
	}
	return e.changeEndpoints(b, slices.DeleteFunc(slices.Clone(b.Config.Endpoints), is), st)
}

// changeEndpoints records new endpoints and brings files and resolver in line with them.
func (e *Engine) changeEndpoints(b *sandbox, want []EndpointConfig, st SandboxState) error {
	b.mu.Lock()
	b.Config.Endpoints, b.State = want, st
	err := e.saveSandbox(b)
	cfg := b.Config
	b.mu.Unlock()
	if err != nil || !st.Ready {
		return err
	}
	if err := e.writeSandboxFiles(cfg, st); err != nil {
		return err
	}
	if e.usesResolver(st.Endpoints) {
		return e.Resolvers.Serve(cfg.ID, st.NetNS)
	}
	return nil
}

// NetworkUsers implements SandboxAPI.
func (e *Engine) NetworkUsers(networkID string) []Sandbox {
	var out []Sandbox
	for _, b := range e.Sandboxes() {
		for _, w := range b.Config.Endpoints {
			if w.Network == networkID {
				out = append(out, b)
				break
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Sandbox) int {
		switch {
		case a.State.Ready == b.State.Ready:
			return 0
		case a.State.Ready:
			return -1
		}
		return 1
	})
	return out
}

// usesResolver tells whether names are answered by the embedded resolver: on every network but
// the default one, as docker does.
func (e *Engine) usesResolver(eps []network.Endpoint) bool {
	for _, ep := range eps {
		if n, err := e.Networks.Get(ep.NetworkID); err == nil && n.Config.Name != network.DefaultNetwork {
			return true
		}
	}
	return false
}

// ResolverAddress is where containers on user-defined networks find the embedded resolver.
const ResolverAddress = "127.0.0.11"

// writeSandboxFiles writes hosts, hostname and resolv.conf in place: containers have them bind-mounted.
func (e *Engine) writeSandboxFiles(cfg SandboxConfig, st SandboxState) error {
	dir := e.Root.Sandbox(cfg.ID)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	name := hostname(cfg)
	if cfg.Network == NetworkHost && cfg.Hostname == "" {
		name = nodeName()
	}
	conf := hostResolv(cfg.Network == NetworkHost)
	files := map[string][]byte{
		"hostname":    []byte(name + "\n"),
		"hosts":       hostsFile(cfg, st.Endpoints, name),
		"resolv.conf": resolvConf(conf, cfg.DNS, e.usesResolver(st.Endpoints)),
	}
	for f, content := range files {
		p := filepath.Join(dir, f)
		if old, err := os.ReadFile(p); err == nil && bytes.Equal(old, content) {
			continue
		}
		if err := os.WriteFile(p, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func hostsFile(cfg SandboxConfig, eps []network.Endpoint, name string) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, h := range cfg.ExtraHosts {
		host, addr, ok := cutHost(h)
		if ok {
			fmt.Fprintf(&b, "%s\t%s\n", addr, host)
		}
	}
	full := name
	if cfg.Domainname != "" {
		full = name + "." + cfg.Domainname + " " + name
	}
	if cfg.Network == NetworkHost {
		fmt.Fprintf(&b, "127.0.1.1\t%s\n", full)
	}
	for _, ep := range eps {
		fmt.Fprintf(&b, "%s\t%s\n", ep.Address.Addr(), full)
	}
	return b.Bytes()
}

// cutHost splits "name:address"; addresses may have colons themselves.
func cutHost(h string) (host string, addr netip.Addr, ok bool) {
	for i := range h {
		if h[i] != ':' && h[i] != '=' {
			continue
		}
		a := h[i+1:]
		if len(a) > 2 && a[0] == '[' {
			a = a[1 : len(a)-1]
		}
		addr, err := netip.ParseAddr(a)
		return h[:i], addr, err == nil && i > 0
	}
	return "", netip.Addr{}, false
}
