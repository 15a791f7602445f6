package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// handleAt opens a netlink socket in a namespace; the caller closes it.
func handleAt(ns *os.File) (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", ns.Name(), err)
	}
	return h, nil
}

// Attach connects a sandbox to a network. When it returns, the interface is up with its
// address, and with the default route when the request carries Gateway and the network is not
// internal. ErrExists when it is attached already, ErrExhausted when no address is free. After
// an error nothing is left.
func (s *Service) Attach(ctx context.Context, r AttachRequest) (Endpoint, error) {
	e, ep, err := s.beginAttach(r)
	if err != nil {
		return Endpoint{}, err
	}
	err = s.attach(ctx, e, ep, r)
	s.mu.Lock()
	e.pending--
	if err != nil {
		s.dropEndpoint(ep)
		if ep.Address.IsValid() {
			e.pool.release(ep.Address.Addr())
		}
	}
	ep.ready = err == nil
	close(ep.done)
	result := ep.Endpoint.clone()
	s.mu.Unlock()
	if err != nil {
		return Endpoint{}, fmt.Errorf("attach sandbox %s to network %s: %w", shortID(r.Sandbox), e.Config.Name, err)
	}
	return result, nil
}

// beginAttach checks a request and reserves the place and the interface's name.
func (s *Service) beginAttach(r AttachRequest) (*entry, *endpoint, error) {
	s.reaper.touch()
	if r.Sandbox == "" || r.NetNS == "" {
		return nil, nil, errdefs.New(errdefs.ErrInvalid, "attach: a sandbox and its network namespace must be named")
	}
	if r.MAC != "" {
		mac, err := net.ParseMAC(r.MAC)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			return nil, nil, errdefs.New(errdefs.ErrInvalid, "invalid MAC address %q", r.MAC)
		}
		r.MAC = mac.String()
	}
	if r.Interface != "" {
		if err := checkInterfaceName(r.Interface); err != nil {
			return nil, nil, errdefs.New(errdefs.ErrInvalid, "interface %q: %w", r.Interface, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.find(r.Network)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case e.pool == nil:
		return nil, nil, errdefs.New(errdefs.ErrInvalid, "network %s is not for attaching: driver %s has no endpoints", e.Config.Name, e.Config.Driver)
	case e.removing:
		return nil, nil, errdefs.New(errdefs.ErrNotFound, "network %s not found: it is being removed", r.Network)
	case s.endpoints[r.Sandbox][e.ID] != nil:
		return nil, nil, errdefs.New(errdefs.ErrExists, "endpoint of sandbox %s already exists in network %s", shortID(r.Sandbox), e.Config.Name)
	case len(s.endpoints[r.Sandbox]) >= maxSandboxEndpoints:
		return nil, nil, errdefs.New(errdefs.ErrExhausted, "sandbox %s is on %d networks already, the most it may be", shortID(r.Sandbox), maxSandboxEndpoints)
	}
	name, err := s.freeInterface(r, e.options.prefix)
	if err != nil {
		return nil, nil, err
	}
	ep := &endpoint{done: make(chan struct{}), Endpoint: Endpoint{
		Sandbox: r.Sandbox, NetworkID: e.ID, NetNS: r.NetNS, Interface: name, MAC: r.MAC,
		Peer: peerPrefix(s.root.Tag()) + randomHex(4), Aliases: slices.Clone(r.Aliases),
	}}
	e.pending++
	s.addEndpoint(ep)
	return e, ep, nil
}

// freeInterface returns the wished name, or prefix and the first free number. The caller holds mu.
func (s *Service) freeInterface(r AttachRequest, prefix string) (string, error) {
	used := map[string]bool{"lo": true}
	numbers := map[int]bool{}
	for _, ep := range s.endpoints[r.Sandbox] {
		used[ep.Interface] = true
		numbers[interfaceNumber(ep.Interface, prefix)] = true
	}
	if r.Interface != "" {
		if used[r.Interface] {
			return "", errdefs.New(errdefs.ErrConflict, "sandbox %s has an interface %s already", shortID(r.Sandbox), r.Interface)
		}
		return r.Interface, nil
	}
	n := 0
	for numbers[n] {
		n++
	}
	return fmt.Sprintf("%s%d", prefix, n), nil
}

// attach does the work between reserving the place and announcing it.
func (s *Service) attach(ctx context.Context, e *entry, ep *endpoint, r AttachRequest) error {
	if err := s.ensureBridge(ctx, e); err != nil {
		return err
	}
	plan, err := s.allocate(ctx, e, ep, r)
	if err != nil {
		return err
	}
	if err := s.plugAgain(ctx, e, &plan); err != nil {
		return err
	}
	err = errors.Join(s.store.Put(kindEndpoint, endpointKey(plan), plan), ctx.Err())
	if err != nil {
		return errors.Join(err, s.unplug(plan.Peer), s.store.Delete(kindEndpoint, endpointKey(plan)))
	}
	return nil
}

// plugAgain plugs an endpoint in; when the bridge was deleted behind our back it makes it anew.
func (s *Service) plugAgain(ctx context.Context, e *entry, ep *Endpoint) error {
	err := s.plug(e, ep)
	if err == nil {
		return nil
	}
	if _, gone := s.host.LinkByName(e.Bridge); !isNoLink(gone) {
		return err
	}
	e.bridgeMu.Lock()
	e.up = false
	e.bridgeMu.Unlock()
	if err := s.ensureBridge(ctx, e); err != nil {
		return err
	}
	return s.plug(e, ep)
}

// allocate gives the endpoint the wished address, or any, with all that follows from it. An
// address whose interface is just being deleted is waited for.
func (s *Service) allocate(ctx context.Context, e *entry, ep *endpoint, r AttachRequest) (Endpoint, error) {
	for {
		plan, drain, err := s.tryAllocate(e, ep, r)
		if drain == nil {
			return plan, err
		}
		s.reapNow()
		if err := wait(ctx, drain); err != nil {
			return Endpoint{}, err
		}
	}
}

// tryAllocate is one try of allocate. Its channel says what to wait for before the next.
func (s *Service) tryAllocate(e *entry, ep *endpoint, r AttachRequest) (Endpoint, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	addr := r.Address
	var err error
	if addr.IsValid() {
		err = e.pool.claim(addr)
	} else if addr, err = e.pool.take(); err != nil {
		err = fmt.Errorf("%w: %s (%s)", err, e.Config.Name, shortID(e.ID))
	}
	if err != nil {
		return Endpoint{}, s.drainOf(e.ID, r.Address), err
	}
	subnet := e.Config.Subnets[0]
	ep.Address, ep.Gateway = netip.PrefixFrom(addr, subnet.Prefix.Bits()), subnet.Gateway
	ep.DefaultRoute = r.Gateway && !e.Config.Internal
	if ep.MAC == "" {
		ep.MAC = macOf(addr).String()
	}
	return ep.Endpoint, nil, nil
}

// drainOf returns the channel of an address that is about to become free: of the wished one,
// or of any of the network. The caller holds mu.
func (s *Service) drainOf(networkID string, wish netip.Addr) chan struct{} {
	if wish.IsValid() {
		return s.draining[drainKey{networkID, wish}]
	}
	for k, c := range s.draining {
		if k.network == networkID {
			return c
		}
	}
	return nil
}

// Detach disconnects a sandbox from a network, with the ports published on that endpoint. The
// default route moves to another of its networks. ErrNotFound when it is not attached.
func (s *Service) Detach(ctx context.Context, sandbox, networkRef string) error {
	s.mu.Lock()
	e, err := s.find(networkRef)
	var ep *endpoint
	if err == nil {
		if ep = s.endpoints[sandbox][e.ID]; ep == nil {
			err = errdefs.New(errdefs.ErrNotFound, "sandbox %s is not connected to network %s", shortID(sandbox), e.Config.Name)
		}
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := wait(ctx, ep.done); err != nil {
		return err
	}
	s.mu.Lock()
	still := s.endpoints[sandbox][e.ID] == ep
	addr := ep.Address.Addr()
	s.mu.Unlock()
	if !still {
		return errdefs.New(errdefs.ErrNotFound, "sandbox %s is not connected to network %s", shortID(sandbox), e.Config.Name)
	}
	err = s.unpublish(sandbox, func(p *publishedPort) bool { return p.Addr == addr })
	if err == nil {
		err = s.unplug(ep.Peer)
	}
	if err == nil {
		err = s.store.Delete(kindEndpoint, endpointKey(ep.Endpoint))
	}
	if err != nil {
		return fmt.Errorf("detach sandbox %s from network %s: %w", shortID(sandbox), e.Config.Name, err)
	}
	s.mu.Lock()
	s.dropEndpoint(ep)
	e.pool.release(addr)
	s.mu.Unlock()
	if ep.DefaultRoute {
		return s.moveDefaultRoute(sandbox)
	}
	return nil
}

// moveDefaultRoute gives the default route to the sandbox's first network that has a way out.
func (s *Service) moveDefaultRoute(sandbox string) error {
	s.mu.Lock()
	var next *endpoint
	for _, ep := range s.endpoints[sandbox] {
		if e := s.nets[ep.NetworkID]; ep.ready && !e.Config.Internal && (next == nil || ep.Interface < next.Interface) {
			next = ep
		}
	}
	var plan Endpoint
	if next != nil {
		next.DefaultRoute = true
		plan = next.Endpoint
	}
	s.mu.Unlock()
	if next == nil {
		return nil
	}
	ns, err := openNetNS(plan.NetNS)
	if err != nil {
		return fmt.Errorf("default route of sandbox %s: %w", shortID(sandbox), err)
	}
	defer ns.Close()
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(plan.Interface)
	if err == nil {
		err = setDefaultRoute(h, link, plan.Gateway)
	}
	if err != nil {
		return fmt.Errorf("default route of sandbox %s: %w", shortID(sandbox), err)
	}
	return s.store.Put(kindEndpoint, endpointKey(plan), plan)
}

// Release takes a sandbox off the network: its ports, endpoints and resolver sockets. What the
// kernel takes long for is done behind the answer; the addresses are handed out again after
// that. Releasing what has nothing is no error.
func (s *Service) Release(ctx context.Context, sandbox string) error {
	s.mu.Lock()
	var list []*endpoint
	for _, ep := range s.endpoints[sandbox] {
		list = append(list, ep)
	}
	s.mu.Unlock()
	for _, ep := range list {
		if err := wait(ctx, ep.done); err != nil {
			return err
		}
	}
	errs := []error{s.Unpublish(ctx, sandbox), s.CloseResolver(sandbox)}
	for _, ep := range list {
		s.mu.Lock()
		e := s.nets[ep.NetworkID]
		if s.endpoints[sandbox][ep.NetworkID] != ep {
			s.mu.Unlock()
			continue
		}
		s.dropEndpoint(ep)
		done := make(chan struct{})
		key := drainKey{ep.NetworkID, ep.Address.Addr()}
		s.draining[key] = done
		// The network stays while its interfaces are being deleted.
		s.mu.Unlock()
		errs = append(errs, s.store.Delete(kindEndpoint, endpointKey(ep.Endpoint)))
		s.reap(remains{peer: ep.Peer, done: func() {
			s.mu.Lock()
			e.pool.release(key.addr)
			delete(s.draining, key)
			s.mu.Unlock()
			close(done)
		}})
	}
	return errors.Join(errs...)
}

// Endpoints lists who is on a network, by address.
func (s *Service) Endpoints(networkID string) []Endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Endpoint
	for _, eps := range s.endpoints {
		if ep := eps[networkID]; ep != nil && ep.ready {
			list = append(list, ep.Endpoint.clone())
		}
	}
	slices.SortFunc(list, func(a, b Endpoint) int { return a.Address.Addr().Compare(b.Address.Addr()) })
	return list
}

// SandboxEndpoints lists a sandbox's endpoints, the one with the default route first, then by
// interface.
func (s *Service) SandboxEndpoints(sandbox string) []Endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Endpoint
	for _, ep := range s.endpoints[sandbox] {
		if ep.ready {
			list = append(list, ep.Endpoint.clone())
		}
	}
	slices.SortFunc(list, func(a, b Endpoint) int {
		if a.DefaultRoute != b.DefaultRoute {
			if a.DefaultRoute {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Interface, b.Interface)
	})
	return list
}

func (s *Service) addEndpoint(ep *endpoint) {
	if s.endpoints[ep.Sandbox] == nil {
		s.endpoints[ep.Sandbox] = map[string]*endpoint{}
	}
	s.endpoints[ep.Sandbox][ep.NetworkID] = ep
}

func (s *Service) dropEndpoint(ep *endpoint) {
	delete(s.endpoints[ep.Sandbox], ep.NetworkID)
	if len(s.endpoints[ep.Sandbox]) == 0 {
		delete(s.endpoints, ep.Sandbox)
	}
}

func endpointKey(ep Endpoint) string { return ep.Sandbox + "/" + ep.NetworkID }

func wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
