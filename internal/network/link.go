package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

const (
	dumpTries     = 5 // of a netlink dump that a change interrupted
	planLockName  = "@berth-address-plan"
	planLockWait  = 2 * time.Second
	planLockRetry = 2 * time.Millisecond
	minRouteBits  = 8 // shorter routes are ways to the world, not networks
)

// dump repeats a netlink dump that was interrupted by a change.
func dump[T any](f func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		list, err := f()
		if err == nil || !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
		if try == dumpTries {
			return list, nil // at worst it misses what changed while it was read
		}
	}
}

// hostPrefixes lists what the host's routes and addresses occupy besides our own bridges, and
// the addresses' part alone.
func (s *Service) hostPrefixes() (all, addrs []netip.Prefix, err error) {
	links, err := dump(s.host.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list links: %w", err)
	}
	names := s.bridgeNames()
	ours := map[int]bool{}
	for _, l := range links {
		if a := l.Attrs(); names[a.Name] && a.Alias == s.alias() {
			ours[a.Index] = true
		}
	}
	list, err := dump(func() ([]netlink.Addr, error) { return s.host.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range list {
		if p, ok := toPrefix(a.IPNet); ok && !ours[a.LinkIndex] {
			addrs = append(addrs, p)
		}
	}
	all = append(all, addrs...)
	routes, err := dump(func() ([]netlink.Route, error) {
		return s.host.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if p, ok := toPrefix(r.Dst); ok && !ours[r.LinkIndex] && p.Bits() >= minRouteBits {
			all = append(all, p)
		}
	}
	return all, addrs, nil
}

func (s *Service) bridgeNames() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := map[string]bool{}
	for _, e := range s.nets {
		if e.Bridge != "" {
			names[e.Bridge] = true
		}
	}
	return names
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || (bits != 32 && bits != 128) || !a.Unmap().Is4() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a.Unmap(), ones).Masked(), true
}

func toIPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// alias marks the instance's bridges, so that one of somebody else's that has the same name is
// never mistaken for ours.
func (s *Service) alias() string { return "network of " + s.root.Name() }

// ensureBridge makes a network's bridge with its rules unless it is there. Several networks are
// made in parallel; the addresses of a chosen subnet are only checked one at a time.
func (s *Service) ensureBridge(ctx context.Context, e *entry) error {
	e.bridgeMu.Lock()
	defer e.bridgeMu.Unlock()
	if e.up {
		return nil
	}
	link, err := s.host.LinkByName(e.Bridge)
	made := false
	switch {
	case err == nil && (link.Type() != "bridge" || link.Attrs().Alias != s.alias()):
		return errdefs.New(errdefs.ErrConflict, "network %s: there is an interface %s already that is not its bridge", e.Config.Name, e.Bridge)
	case err == nil:
	case !isNoLink(err):
		return fmt.Errorf("network %s: %w", e.Config.Name, err)
	default:
		if link, err = s.makeBridge(ctx, e); err != nil {
			return fmt.Errorf("network %s: %w", e.Config.Name, err)
		}
		made = true
	}
	if err := s.setUpBridge(e, link); err != nil {
		err = fmt.Errorf("network %s: bridge %s: %w", e.Config.Name, e.Bridge, err)
		if made {
			err = errors.Join(err, s.host.LinkDel(link))
		}
		return err
	}
	e.up, e.index = true, link.Attrs().Index
	if err := s.addBridgeRules(ctx, e); err != nil {
		e.up = false
		return fmt.Errorf("network %s: %w", e.Config.Name, err)
	}
	return nil
}

// makeBridge creates the interface. While nothing of it is used, a subnet that the plan chose
// gives way to what the host has come to use for itself since.
func (s *Service) makeBridge(ctx context.Context, e *entry) (netlink.Link, error) {
	unlock, err := s.lockPlan(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if e.auto {
		if err := s.replan(e); err != nil {
			return nil, err
		}
	}
	gateway := e.Config.Subnets[0].Gateway
	br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	br.Name, br.MTU, br.HardwareAddr = e.Bridge, e.options.mtu, macOf(gateway)
	if err := s.host.LinkAdd(br); err != nil {
		return nil, fmt.Errorf("make bridge %s: %w", e.Bridge, err)
	}
	err = s.host.LinkSetAlias(br, s.alias())
	if err == nil {
		// The address occupies the range for other instances: before the lock is given up.
		err = s.host.AddrReplace(br, &netlink.Addr{IPNet: toIPNet(netip.PrefixFrom(gateway, e.pool.subnet.Bits()))})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make bridge %s: %w", e.Bridge, err), s.host.LinkDel(br))
	}
	return br, nil
}

// setUpBridge brings a bridge to its wanted state; on one that is, it changes nothing.
func (s *Service) setUpBridge(e *entry, link netlink.Link) error {
	err := s.inHost(func() error {
		// Packets to published ports on 127.0.0.1 leave by the bridge with a loopback source
		// until they are masqueraded; the rules drop what bridges send to loopback addresses.
		if err := writeSysctl("net/ipv4/conf/"+e.Bridge+"/route_localnet", "1"); err != nil {
			return err
		}
		err := writeSysctl("net/ipv6/conf/"+e.Bridge+"/disable_ipv6", "1")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if e.Config.Internal {
			return nil
		}
		return s.enableForwarding()
	})
	if err != nil {
		return err
	}
	gateway := netip.PrefixFrom(e.Config.Subnets[0].Gateway, e.pool.subnet.Bits())
	if err := s.host.AddrReplace(link, &netlink.Addr{IPNet: toIPNet(gateway)}); err != nil {
		return fmt.Errorf("address %s: %w", gateway, err)
	}
	return s.host.LinkSetUp(link)
}

// enableForwarding makes the host a router, remembering that it was none. It runs in the
// host's network namespace.
func (s *Service) enableForwarding() error {
	const key = "net/ipv4/ip_forward"
	was, err := readSysctl(key)
	if err != nil || was == "1" {
		return err
	}
	s.mu.Lock()
	s.plan.Forward = was
	plan := s.plan
	s.mu.Unlock()
	if err := s.store.Put(kindPlan, planKey, plan); err != nil {
		return err
	}
	if err := writeSysctl(key, "1"); err != nil {
		return fmt.Errorf("enable forwarding (net.ipv4.ip_forward): %w", err)
	}
	return nil
}

// replan gives e another subnet when the host uses its own for something else. Endpoints are
// given addresses after their bridge is there, so that none are out yet.
func (s *Service) replan(e *entry) error {
	taken, addrs, err := s.hostPrefixes()
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.addressed(e.ID) || !overlapsAny(e.pool.subnet, taken) {
		s.mu.Unlock()
		return nil
	}
	plan, subnet, ok := s.choose(e, taken)
	if !ok && overlapsAny(e.pool.subnet, addrs) {
		plan, subnet, ok = s.choose(e, addrs)
	}
	if !ok {
		s.mu.Unlock()
		return nil // the host's longer routes win over ours
	}
	old := e.pool.subnet
	e.Config.Subnets = []Subnet{subnet}
	e.pool = newPool(subnet)
	s.plan = plan
	record := networkRecord{Network: e.clone(), Auto: true}
	s.mu.Unlock()
	s.log.Info("the host uses a network's subnet; it gets another", "network", e.Config.Name, "was", old, "is", subnet.Prefix)
	return errors.Join(s.store.Put(kindPlan, planKey, plan), s.store.Put(kindNetwork, e.ID, record))
}

// addressed tells whether an address of a network is out. The caller holds mu.
func (s *Service) addressed(networkID string) bool {
	for _, eps := range s.endpoints {
		if ep := eps[networkID]; ep != nil && ep.Address.IsValid() {
			return true
		}
	}
	return false
}

// choose finds a subnet for e that overlaps nothing taken. The caller holds mu.
func (s *Service) choose(e *entry, taken []netip.Prefix) (planRecord, Subnet, bool) {
	plan, order := s.plan, planOrder(s.root.State)
	taken = append(s.ownSubnets(e), taken...)
	var p netip.Prefix
	var ok bool
	if predefined(e.Config) {
		if plan.Base, ok = chooseBase(order, taken); ok {
			p = defaultSubnet(plan.Base)
		}
	} else {
		p, ok = chooseSubnet(plan.Base, order, taken)
	}
	subnet := Subnet{Prefix: p}
	return plan, subnet, ok && checkSubnet(&subnet) == nil
}

// lockPlan keeps other instances in this network namespace from choosing a subnet meanwhile.
// The lock is the name of an abstract unix socket, which the kernel scopes to the namespace and
// frees with its holder. Whoever holds it longer than planLockWait is not waited for.
func (s *Service) lockPlan(ctx context.Context) (unlock func(), err error) {
	deadline := time.Now().Add(planLockWait)
	for {
		var l *net.UnixListener
		err := s.inHost(func() error {
			var err error
			l, err = net.ListenUnix("unix", &net.UnixAddr{Name: planLockName, Net: "unix"})
			return err
		})
		if err == nil {
			return func() { l.Close() }, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("lock the address plan: %w", err)
		}
		if time.Now().After(deadline) {
			s.log.Warn("the address plan's lock is held too long; going on without it")
			return func() {}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(planLockRetry):
		}
	}
}

// removeBridge takes a network out of the rules and deletes its bridge.
func (s *Service) removeBridge(e *entry) error {
	if e.Bridge == "" {
		return nil
	}
	e.bridgeMu.Lock()
	defer e.bridgeMu.Unlock()
	if err := s.removeBridgeRules(e); err != nil {
		return err
	}
	e.up = false
	link, err := s.host.LinkByName(e.Bridge)
	if isNoLink(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bridge %s: %w", e.Bridge, err)
	}
	if link.Attrs().Alias != s.alias() {
		return nil // somebody else's
	}
	return ignoreNoLink(s.host.LinkDel(link))
}

// plug makes the pair of interfaces of an endpoint: one end a port of the bridge, the other in
// the sandbox, with its address and routes. After an error nothing is left.
func (s *Service) plug(e *entry, ep *Endpoint) (err error) {
	ns, err := openNetNS(ep.NetNS)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	mac, err := net.ParseMAC(ep.MAC)
	if err != nil {
		return err
	}
	veth := netlink.NewVeth(netlink.NewLinkAttrs())
	veth.Name, veth.MTU, veth.Flags = ep.Peer, e.options.mtu, net.FlagUp
	e.bridgeMu.Lock()
	veth.MasterIndex = e.index
	e.bridgeMu.Unlock()
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = ep.Interface, mac, netlink.NsFd(ns.Fd())
	if err := s.host.LinkAdd(veth); err != nil {
		// It may exist without its master.
		if veth.Index != 0 {
			err = errors.Join(err, ignoreNoLink(s.host.LinkDel(veth)))
		}
		return fmt.Errorf("make interface %s: %w", ep.Interface, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignoreNoLink(s.host.LinkDel(veth)))
		}
	}()
	if err := s.setPortFlags(e, veth); err != nil {
		return err
	}
	return configureInside(ns, ep)
}

// setPortFlags sets how the bridge treats an endpoint's port. A container that calls its own
// published port is answered through its own port; where containers must not talk to each
// other, the bridge keeps frames between them from passing.
func (s *Service) setPortFlags(e *entry, port netlink.Link) error {
	if err := s.host.LinkSetHairpin(port, true); err != nil {
		return fmt.Errorf("interface %s: hairpin: %w", port.Attrs().Name, err)
	}
	if e.options.icc {
		return nil
	}
	if err := s.host.LinkSetIsolated(port, true); err != nil {
		return fmt.Errorf("interface %s: isolate: %w", port.Attrs().Name, err)
	}
	return nil
}

// configureInside gives the sandbox's end its address and routes.
func configureInside(ns *os.File, ep *Endpoint) error {
	h, err := handleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(ep.Interface)
	if err != nil {
		return fmt.Errorf("interface %s: %w", ep.Interface, err)
	}
	if err := h.AddrAdd(link, &netlink.Addr{IPNet: toIPNet(ep.Address)}); err != nil {
		return fmt.Errorf("interface %s: address %s: %w", ep.Interface, ep.Address, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("interface %s: %w", ep.Interface, err)
	}
	if !ep.DefaultRoute {
		return nil
	}
	return setDefaultRoute(h, link, ep.Gateway)
}

func setDefaultRoute(h *netlink.Handle, link netlink.Link, gateway netip.Addr) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice()}
	if err := h.RouteReplace(r); err != nil {
		return fmt.Errorf("default route by %s: %w", gateway, err)
	}
	return nil
}

// unplug deletes the host's end of a pair, and the other with it.
func (s *Service) unplug(peer string) error {
	link, err := s.host.LinkByName(peer)
	if err != nil {
		return ignoreNoLink(err)
	}
	return ignoreNoLink(s.host.LinkDel(link))
}

func isNoLink(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}

func ignoreNoLink(err error) error {
	if isNoLink(err) {
		return nil
	}
	return err
}

// macOf derives a hardware address from an IPv4 address, as docker does: an address that comes
// back has the same one, so that no neighbour's cache is wrong.
func macOf(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x42, b[0], b[1], b[2], b[3]}
}
