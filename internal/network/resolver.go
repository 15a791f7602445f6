package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ResolverAddr is where a sandbox's programs reach the node's resolver.
var ResolverAddr = netip.AddrFrom4([4]byte{127, 0, 0, 11})

const (
	resolverTable = "berth-resolver"
	dnsPort       = 53
)

func resolverKey(sandbox string) string { return "dns/" + sandbox }

// OpenResolver returns the sockets on which the node's resolver serves a sandbox: on 127.0.0.11
// inside its network namespace, at ports of their own, to which rules inside the namespace lead
// port 53; so a name server in the sandbox may take port 53 of every address. The sockets are
// kept across restarts of the daemon: queries then wait instead of failing. The caller closes
// its copies.
func (s *Service) OpenResolver(sandbox, netNS string) (net.PacketConn, net.Listener, error) {
	if udp, tcp, err := s.takeResolver(sandbox); err == nil && udp != nil {
		return udp, tcp, nil
	}
	udp, tcp, err := s.makeResolver(sandbox, netNS)
	if err != nil {
		return nil, nil, fmt.Errorf("resolver of sandbox %s: %w", shortID(sandbox), err)
	}
	return udp, tcp, nil
}

// takeResolver takes the sockets back from the keeper; nil when it has none.
func (s *Service) takeResolver(sandbox string) (net.PacketConn, net.Listener, error) {
	if s.sockets == nil {
		return nil, nil, nil
	}
	fds, err := s.sockets.Take(resolverKey(sandbox))
	if err != nil || len(fds) != 2 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, nil, err
	}
	return wrapResolver(fds[0], fds[1])
}

func (s *Service) makeResolver(sandbox, netNS string) (net.PacketConn, net.Listener, error) {
	ns, err := openNetNS(netNS)
	if err != nil {
		return nil, nil, err
	}
	defer ns.Close()
	udpFD, tcpFD := -1, -1
	var ports [2]uint16
	err = inNetNS(int(ns.Fd()), func() error {
		var err error
		if udpFD, ports[0], err = resolverSocket(unix.SOCK_DGRAM); err == nil {
			tcpFD, ports[1], err = resolverSocket(unix.SOCK_STREAM)
		}
		return err
	})
	if err == nil {
		err = redirectResolver(int(ns.Fd()), ports[0], ports[1])
	}
	if err == nil && s.sockets != nil {
		err = s.sockets.Keep(resolverKey(sandbox), udpFD, tcpFD)
	}
	if err != nil {
		for _, fd := range []int{udpFD, tcpFD} {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
		return nil, nil, err
	}
	return wrapResolver(udpFD, tcpFD)
}

// resolverSocket opens a socket at a free port of ResolverAddr in the thread's namespace.
func resolverSocket(kind int) (fd int, port uint16, err error) {
	fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, 0, err
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Addr: ResolverAddr.As4()})
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	var sa unix.Sockaddr
	if err == nil {
		sa, err = unix.Getsockname(fd)
	}
	in, ok := sa.(*unix.SockaddrInet4)
	if err != nil || !ok {
		unix.Close(fd)
		return -1, 0, errors.Join(err, fmt.Errorf("bind to %s", ResolverAddr))
	}
	return fd, uint16(in.Port), nil
}

// wrapResolver makes Go connections of the descriptors, which it consumes.
func wrapResolver(udpFD, tcpFD int) (net.PacketConn, net.Listener, error) {
	uf, tf := os.NewFile(uintptr(udpFD), "resolver-udp"), os.NewFile(uintptr(tcpFD), "resolver-tcp")
	defer uf.Close()
	defer tf.Close()
	udp, err := net.FilePacketConn(uf)
	if err != nil {
		return nil, nil, err
	}
	tcp, err := net.FileListener(tf)
	if err != nil {
		udp.Close()
		return nil, nil, err
	}
	return udp, tcp, nil
}

// redirectResolver leads port 53 of ResolverAddr to the resolver's own ports, inside a sandbox:
//
//	chain output  nat, output
//	    ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:UDP
//	    ip daddr 127.0.0.11 tcp dport 53 dnat to 127.0.0.11:TCP
func redirectResolver(nsFD int, udpPort, tcpPort uint16) error {
	conn, err := nftables.New(nftables.WithNetNSFd(nsFD))
	if err != nil {
		return err
	}
	t := newTable(resolverTable)
	tables, err := conn.ListTablesOfFamily(t.Family)
	if err != nil {
		return fmt.Errorf("list tables: %w", err)
	}
	if slices.ContainsFunc(tables, func(have *nftables.Table) bool { return have.Name == t.Name }) {
		conn.DelTable(t) // of an earlier resolver in this namespace
	}
	conn.AddTable(t)
	c := conn.AddChain(&nftables.Chain{Name: "output", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest})
	addr := ResolverAddr.AsSlice()
	for proto, port := range map[byte]uint16{unix.IPPROTO_UDP: udpPort, unix.IPPROTO_TCP: tcpPort} {
		conn.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: []expr.Any{
			payload(daddr, reg1),
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: addr},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{proto}},
			dport(reg1),
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{0, dnsPort}},
			&expr.Immediate{Register: reg1, Data: addr},
			&expr.Immediate{Register: word1, Data: []byte{byte(port >> 8), byte(port)}},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg1, RegProtoMin: word1},
		}})
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("lead port %d to the resolver: %w", dnsPort, err)
	}
	return nil
}

// CloseResolver forgets the kept sockets of a sandbox's resolver.
func (s *Service) CloseResolver(sandbox string) error {
	if s.sockets == nil {
		return nil
	}
	return s.sockets.Drop(resolverKey(sandbox))
}
