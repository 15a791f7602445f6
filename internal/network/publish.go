package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// maxSandboxPorts bounds the ports of one sandbox.
const maxSandboxPorts = 4096

// publishedPort is a port of the host that leads into a sandbox.
type publishedPort struct {
	Port           // HostPort is never 0; HostIP is 0.0.0.0 for every address
	Sandbox string // whose it is
	Addr    netip.Addr

	fd    int  // the socket that keeps the port from others, -1 for none
	ready bool // the kernel is to have it
	kept  bool // the keeper has the socket too
}

// hostPort groups what can conflict.
type hostPort struct {
	protocol string
	port     uint16
}

func (p *publishedPort) any() bool { return p.HostIP.IsUnspecified() }

func (p *publishedPort) key() hostPort { return hostPort{p.Protocol, p.HostPort} }

// socketKey names the port's socket to the keeper.
func (p *publishedPort) socketKey() string {
	return fmt.Sprintf("port/%s/%s/%d", p.Protocol, p.HostIP, p.HostPort)
}

func (p *publishedPort) closeSocket() {
	if p.fd >= 0 {
		unix.Close(p.fd)
		p.fd = -1
	}
}

func protocolNumber(name string) int {
	switch name {
	case "tcp":
		return unix.IPPROTO_TCP
	case "udp":
		return unix.IPPROTO_UDP
	case "sctp":
		return unix.IPPROTO_SCTP
	}
	return 0
}

// Publish makes ports of the host lead to addr, an address of one of the sandbox's endpoints:
// all of them or, after an error, none. It returns them with host address and port filled in,
// in the same order. A socket bound to each keeps other programs from taking it and finds out
// who has: ErrConflict. The rules in the kernel carry the traffic; the socket sees none.
func (s *Service) Publish(ctx context.Context, sandbox string, addr netip.Addr, ports []Port) ([]Port, error) {
	e, err := s.publishable(sandbox, addr, len(ports))
	if err != nil {
		return nil, err
	}
	var done []*publishedPort
	undo := func(err error) ([]Port, error) {
		return nil, errors.Join(err, s.withdraw(done))
	}
	for _, p := range ports {
		pp := &publishedPort{Port: p, Sandbox: sandbox, Addr: addr, fd: -1}
		if err := normalize(pp, e.options.hostIP); err != nil {
			return undo(err)
		}
		if err := s.reserve(pp); err != nil {
			return undo(err)
		}
		done = append(done, pp)
	}
	if len(done) == 0 {
		return nil, nil
	}
	s.mu.Lock()
	for _, p := range done {
		p.ready = true
	}
	s.mu.Unlock()
	err = s.edit(ctx, func(conn *nftables.Conn, sets map[string]*nftables.Set) error {
		for _, p := range done {
			name, el := p.element()
			if err := conn.SetAddElements(sets[name], []nftables.SetElement{el}); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = s.keep(done)
	}
	if err == nil {
		err = s.storePorts(sandbox)
	}
	if err = errors.Join(err, ctx.Err()); err != nil {
		return undo(fmt.Errorf("publish ports of %s: %w", s.describe(sandbox), err))
	}
	s.forgetFlows(done)
	result := make([]Port, len(done))
	for i, p := range done {
		result[i] = p.Port
	}
	return result, nil
}

// publishable finds the network that addr belongs to and says whether ports may lead there.
func (s *Service) publishable(sandbox string, addr netip.Addr, count int) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ports[sandbox])+count > maxSandboxPorts {
		return nil, errdefs.New(errdefs.ErrExhausted, "sandbox %s: more than %d published ports", shortID(sandbox), maxSandboxPorts)
	}
	for _, ep := range s.endpoints[sandbox] {
		if ep.ready && ep.Address.Addr() == addr {
			e := s.nets[ep.NetworkID]
			if e.Config.Internal && count > 0 {
				return nil, errdefs.New(errdefs.ErrInvalid, "cannot publish ports on network %s: it is internal and has no way in", e.Config.Name)
			}
			return e, nil
		}
	}
	return nil, errdefs.New(errdefs.ErrNotFound, "publish ports: sandbox %s has no address %s", shortID(sandbox), addr)
}

// normalize checks one port and fills in its host address.
func normalize(p *publishedPort, bindTo netip.Addr) error {
	if p.Protocol == "" {
		p.Protocol = "tcp"
	}
	if protocolNumber(p.Protocol) == 0 {
		return errdefs.New(errdefs.ErrInvalid, "invalid protocol %q of port %d: it must be tcp, udp or sctp", p.Protocol, p.Port.Port)
	}
	if p.Port.Port == 0 {
		return errdefs.New(errdefs.ErrInvalid, "invalid container port 0/%s", p.Protocol)
	}
	if !p.HostIP.IsValid() {
		p.HostIP = bindTo
	}
	if !p.HostIP.IsValid() {
		p.HostIP = netip.IPv4Unspecified()
	}
	p.HostIP = p.HostIP.Unmap()
	if !p.HostIP.Is4() {
		return errdefs.New(errdefs.ErrUnsupported, "publish on host address %s: IPv6 host addresses are not supported; use an IPv4 address or none", p.HostIP)
	}
	return nil
}

// reserve enters a port in the registry and binds its socket.
func (s *Service) reserve(p *publishedPort) error {
	chosen := p.HostPort != 0
	if chosen {
		if err := s.register(p); err != nil {
			return err
		}
	}
	err := s.bind(p)
	if errors.Is(err, unix.EADDRINUSE) && chosen && s.dropStale(p) {
		err = s.bind(p)
	}
	if err == nil && !chosen {
		if err := s.register(p); err != nil { // the kernel chose one that is free
			p.closeSocket()
			return err
		}
	}
	if err == nil {
		return nil
	}
	if chosen {
		s.mu.Lock()
		s.dropPort(p)
		s.mu.Unlock()
	}
	return bindError(p, err)
}

// register enters a port in the registry, or tells which of our own sandboxes has it.
func (s *Service) register(p *publishedPort) error {
	owner := s.tryRegister(p)
	if owner == "" {
		return nil
	}
	return errdefs.New(errdefs.ErrConflict, "Bind for %s:%d failed: port is already allocated (by %s)", p.HostIP, p.HostPort, s.describe(owner))
}

// tryRegister returns the sandbox that has the port, "" when p has it now.
func (s *Service) tryRegister(p *publishedPort) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.hostPorts[p.key()] {
		if other.any() || p.any() || other.HostIP == p.HostIP {
			return other.Sandbox
		}
	}
	s.addPort(p)
	return ""
}

// bindError puts a failed bind in docker's words.
func bindError(p *publishedPort, err error) error {
	what := fmt.Sprintf("failed to bind host port for %s:%d:%s:%d/%s", p.HostIP, p.HostPort, p.Addr, p.Port.Port, p.Protocol)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return errdefs.New(errdefs.ErrConflict, "%s: address already in use", what)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return errdefs.New(errdefs.ErrInvalid, "%s: cannot assign requested address", what)
	case errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT):
		return errdefs.New(errdefs.ErrUnsupported, "%s: this kernel does not support %s", what, p.Protocol)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// bind opens the socket that occupies the port, and learns the port when any will do.
func (s *Service) bind(p *publishedPort) error {
	return s.inHost(func() error {
		kind := unix.SOCK_STREAM
		if p.Protocol == "udp" {
			kind = unix.SOCK_DGRAM
		}
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, protocolNumber(p.Protocol))
		if err != nil {
			return err
		}
		err = occupy(fd, p)
		if err != nil {
			unix.Close(fd)
			return err
		}
		p.fd = fd
		return nil
	})
}

func occupy(fd int, p *publishedPort) error {
	if p.Protocol == "tcp" {
		// Connections of a former user that linger in TIME_WAIT are no conflict. A listener is.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(p.HostPort), Addr: p.HostIP.As4()}); err != nil {
		return err
	}
	if p.Protocol != "udp" {
		if err := unix.Listen(fd, 0); err != nil {
			return err
		}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	in, ok := sa.(*unix.SockaddrInet4)
	if !ok {
		return fmt.Errorf("socket of an unexpected family")
	}
	p.HostPort = uint16(in.Port)
	return nil
}

// dropStale frees a port that the keeper still holds for nobody.
func (s *Service) dropStale(p *publishedPort) bool {
	if s.sockets == nil {
		return false
	}
	fds, err := s.sockets.Take(p.socketKey())
	if err != nil || len(fds) == 0 {
		return false
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return s.sockets.Drop(p.socketKey()) == nil
}

// keep hands the sockets to the keeper.
func (s *Service) keep(ports []*publishedPort) error {
	if s.sockets == nil {
		return nil
	}
	for _, p := range ports {
		p.kept = true
		if err := s.sockets.Keep(p.socketKey(), p.fd); err != nil {
			return fmt.Errorf("keep the socket of port %d/%s: %w", p.HostPort, p.Protocol, err)
		}
	}
	return nil
}

// storePorts records the ports a sandbox has now.
func (s *Service) storePorts(sandbox string) error {
	s.mu.Lock()
	ports := slices.Clone(s.ports[sandbox])
	s.mu.Unlock()
	if len(ports) == 0 {
		return s.store.Delete(kindPorts, sandbox)
	}
	return s.store.Put(kindPorts, sandbox, ports)
}

// Published lists a sandbox's published ports.
func (s *Service) Published(sandbox string) []Port {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Port
	for _, p := range s.ports[sandbox] {
		if p.ready {
			list = append(list, p.Port)
		}
	}
	return list
}

// Unpublish takes back all published ports of a sandbox.
func (s *Service) Unpublish(ctx context.Context, sandbox string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.unpublish(sandbox, func(*publishedPort) bool { return true })
}

func (s *Service) unpublish(sandbox string, which func(*publishedPort) bool) error {
	s.mu.Lock()
	var list []*publishedPort
	for _, p := range s.ports[sandbox] {
		if which(p) {
			list = append(list, p)
		}
	}
	s.mu.Unlock()
	if len(list) == 0 {
		return nil
	}
	err := s.withdraw(list)
	if err == nil {
		err = s.storePorts(sandbox)
	}
	if err != nil {
		return fmt.Errorf("unpublish ports of %s: %w", s.describe(sandbox), err)
	}
	if slices.ContainsFunc(list, func(p *publishedPort) bool { return p.Protocol == "udp" }) {
		s.reap(remains{done: func() { s.forgetFlows(list) }})
	}
	return nil
}

// withdraw removes ports from the kernel, the registry and the keeper.
func (s *Service) withdraw(list []*publishedPort) error {
	if len(list) == 0 {
		return nil
	}
	s.mu.Lock()
	var inKernel []*publishedPort
	for _, p := range list {
		if p.ready {
			inKernel = append(inKernel, p)
		}
		p.ready = false
	}
	s.mu.Unlock()
	var err error
	if len(inKernel) > 0 {
		err = s.edit(context.Background(), func(conn *nftables.Conn, sets map[string]*nftables.Set) error {
			for _, p := range inKernel {
				name, el := p.element()
				if err := conn.SetDeleteElements(sets[name], []nftables.SetElement{el}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	for _, p := range list {
		p.closeSocket()
		if p.kept {
			err = errors.Join(err, s.sockets.Drop(p.socketKey()))
		}
	}
	// Only now that the socket is closed may another sandbox have the port.
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range list {
		s.dropPort(p)
	}
	return err
}

// addPort enters a port in the registry. The caller holds mu.
func (s *Service) addPort(p *publishedPort) {
	s.ports[p.Sandbox] = append(s.ports[p.Sandbox], p)
	s.hostPorts[p.key()] = append(s.hostPorts[p.key()], p)
}

// dropPort is the inverse of addPort.
func (s *Service) dropPort(p *publishedPort) {
	same := func(q *publishedPort) bool { return p == q }
	if s.ports[p.Sandbox] = slices.DeleteFunc(s.ports[p.Sandbox], same); len(s.ports[p.Sandbox]) == 0 {
		delete(s.ports, p.Sandbox)
	}
	if s.hostPorts[p.key()] = slices.DeleteFunc(s.hostPorts[p.key()], same); len(s.hostPorts[p.key()]) == 0 {
		delete(s.hostPorts, p.key())
	}
}

// udpFlows matches tracked flows of published UDP ports: by where they were sent and by where
// they were led.
type udpFlows struct {
	ports map[uint16]bool
	addrs map[netip.Addr]bool
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (u udpFlows) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	if f.Forward.Protocol != unix.IPPROTO_UDP || !u.ports[f.Forward.DstPort] {
		return false
	}
	from, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
	to, _ := netip.AddrFromSlice(f.Forward.DstIP)
	return u.addrs[from.Unmap()] || from.Unmap() == to.Unmap()
}

// forgetFlows makes the kernel look at the rules again for clients that kept sending to a UDP
// port while it changed hands: their flow, tracked as it once went, would go on for ever.
func (s *Service) forgetFlows(ports []*publishedPort) {
	u := udpFlows{ports: map[uint16]bool{}, addrs: map[netip.Addr]bool{}}
	for _, p := range ports {
		if p.Protocol == "udp" {
			u.ports[p.HostPort] = true
			u.addrs[p.Addr] = true
		}
	}
	if len(u.ports) == 0 {
		return
	}
	ns := netns.None()
	if s.hostNS != nil {
		ns = netns.NsHandle(s.hostNS.Fd())
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_NETFILTER)
	if err == nil {
		defer h.Close()
		_, err = h.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.FAMILY_V4, u)
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		s.log.Warn("forget tracked flows of UDP ports", "error", err)
	}
}
