// Package dns is the node's resolver: it answers the names of containers to the containers that
// may know them, and forwards everything else to name servers outside.
//
// It owns the protocol, not the names: who is called what on which network is told by the
// functions of Config. It opens no listening sockets: package network does, inside each sandbox.
// All methods of Resolver are safe for concurrent use.
package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Limits of a resolver.
const (
	MaxForwards    = 1024            // queries under way to upstreams, of all sandboxes
	MaxConnections = 64              // TCP connections of one sandbox
	maxUpstreams   = 3               // asked for one query, as in resolv.conf
	upstreamWait   = 2 * time.Second // for one upstream's answer
	idleWait       = 10 * time.Second
	maxUDPQuery    = 4096
	maxUDPAnswer   = 4096 // what we promise to take with EDNS, and the most we send
	maxReadErrors  = 16   // in a row, before a socket is given up
	ttlSeconds     = 600  // of local answers, as docker's
	defaultPort    = "53"
)

// Config tells a Resolver what it cannot know. The functions are called concurrently and must
// not block.
type Config struct {
	// Lookup returns the addresses of a name that a sandbox may know: of a container, an alias
	// or an ID on one of its networks. The name is in lower case without a final dot. False:
	// no such name here.
	Lookup func(sandbox, name string) ([]netip.Addr, bool)
	// Reverse is the inverse, for an address of one of the sandbox's networks.
	Reverse func(sandbox string, addr netip.Addr) (string, bool)
	// Upstreams lists the name servers for everything else, "address" or "address:port", best
	// first. None: nothing is forwarded, as for a sandbox on internal networks only.
	Upstreams func(sandbox string) []string
	Log       *slog.Logger // nil: slog.Default
}

// Resolver answers queries of sandboxes.
type Resolver struct {
	config   Config
	log      *slog.Logger
	forwards chan struct{} // a place for each query under way
}

// New returns a resolver.
func New(c Config) *Resolver {
	r := &Resolver{config: c, log: c.Log, forwards: make(chan struct{}, MaxForwards)}
	if r.log == nil {
		r.log = slog.Default()
	}
	return r
}

// session is the service of one sandbox.
type session struct {
	*Resolver
	sandbox string
	udp     net.PacketConn
	tcp     net.Listener
	work    sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	done  bool
}

// Serve answers a sandbox's queries on its sockets until ctx ends (nil) or a socket fails. It
// owns the sockets and closes them. An idle sandbox costs two goroutines.
func (r *Resolver) Serve(ctx context.Context, sandbox string, udp net.PacketConn, tcp net.Listener) error {
	s := &session{Resolver: r, sandbox: sandbox, udp: udp, tcp: tcp, conns: map[net.Conn]struct{}{}}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, s.close)
	defer stop()
	var tcpErr error
	s.work.Go(func() {
		tcpErr = s.serveTCP(ctx)
		cancel()
	})
	udpErr := s.serveUDP(ctx)
	cancel()
	s.close()
	s.work.Wait()
	if err := errors.Join(udpErr, tcpErr); err != nil {
		return fmt.Errorf("resolver of sandbox %.12s: %w", sandbox, err)
	}
	return nil
}

// close makes everything that waits on the sandbox's sockets return.
func (s *session) close() {
	s.udp.Close()
	s.tcp.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = true
	for c := range s.conns {
		c.Close()
	}
}

func (s *session) serveUDP(ctx context.Context) error {
	buf := make([]byte, maxUDPQuery)
	failures := 0
	for {
		n, from, err := s.udp.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if failures++; failures >= maxReadErrors || errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("udp: %w", err)
			}
			continue
		}
		failures = 0
		s.handle(ctx, buf[:n], false, func(answer []byte) {
			// A client that went away misses nothing.
			_, _ = s.udp.WriteTo(answer, from)
		})
	}
}

func (s *session) serveTCP(ctx context.Context) error {
	for {
		c, err := s.tcp.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("tcp: %w", err)
		}
		if !s.admit(c) {
			c.Close()
			continue
		}
		s.work.Go(func() {
			defer s.dismiss(c)
			s.converse(ctx, c)
		})
	}
}

// admit counts a connection in, unless there are too many.
func (s *session) admit(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done || len(s.conns) >= MaxConnections {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *session) dismiss(c net.Conn) {
	c.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// converse answers the queries of one connection, in order (RFC 7766, section 6.2.1.1 allows
// others to wait).
func (s *session) converse(ctx context.Context, c net.Conn) {
	for {
		if c.SetDeadline(time.Now().Add(idleWait)) != nil {
			return
		}
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(c, query); err != nil {
			return
		}
		answered := make(chan []byte, 1)
		if !s.handle(ctx, query, true, func(answer []byte) { answered <- answer }) {
			return
		}
		answer := <-answered
		if answer == nil || c.SetWriteDeadline(time.Now().Add(idleWait)) != nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// handle answers one packet through reply, now or when an upstream answered. False: it was no
// query and there will be no answer.
func (s *session) handle(ctx context.Context, packet []byte, tcp bool, reply func([]byte)) bool {
	query := new(dns.Msg)
	if query.Unpack(packet) != nil || query.Response {
		return false
	}
	size := dns.MaxMsgSize
	if !tcp {
		size = dns.MinMsgSize
		if opt := query.IsEdns0(); opt != nil {
			size = min(max(size, int(opt.UDPSize())), maxUDPAnswer)
		}
	}
	send := func(answer *dns.Msg) { reply(s.pack(query, answer, size)) }
	if answer := s.local(query); answer != nil {
		send(answer)
		return true
	}
	select {
	case s.forwards <- struct{}{}:
	default:
		s.log.Warn("too many DNS queries under way", "limit", MaxForwards, "sandbox", s.sandbox)
		send(failure(query, dns.RcodeServerFailure))
		return true
	}
	s.work.Go(func() {
		defer func() { <-s.forwards }()
		send(s.forward(ctx, query))
	})
	return true
}

// pack renders an answer that fits the client. It returns nil when it cannot be rendered.
func (s *session) pack(query, answer *dns.Msg, size int) []byte {
	if query.IsEdns0() != nil && answer.IsEdns0() == nil {
		answer.SetEdns0(maxUDPAnswer, false) // RFC 6891, section 6.1.1
	}
	answer.Compress = true
	answer.Truncate(size)
	b, err := answer.Pack()
	if err != nil {
		b, err = failure(query, dns.RcodeServerFailure).Pack()
	}
	if err != nil {
		s.log.Debug("an answer could not be packed", "error", err)
		return nil
	}
	return b
}

func failure(query *dns.Msg, code int) *dns.Msg {
	m := new(dns.Msg).SetRcode(query, code)
	m.RecursionAvailable = true
	return m
}

// local answers what needs nobody else; nil when an upstream must be asked.
func (s *session) local(query *dns.Msg) *dns.Msg {
	if query.Opcode != dns.OpcodeQuery {
		return failure(query, dns.RcodeNotImplemented)
	}
	if len(query.Question) != 1 {
		return failure(query, dns.RcodeFormatError)
	}
	q := query.Question[0]
	if q.Qclass == dns.ClassINET {
		name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
		if q.Qtype == dns.TypePTR {
			if answer := s.reverse(query, name); answer != nil {
				return answer
			}
		} else if addrs, ok := s.config.Lookup(s.sandbox, name); ok {
			return found(query, addrs)
		}
	}
	if len(s.upstreams()) > 0 {
		return nil
	}
	if dns.CountLabel(q.Name) <= 1 {
		return failure(query, dns.RcodeNameError) // a container's name, if any
	}
	return failure(query, dns.RcodeServerFailure)
}

// found answers for a known name. It has IPv4 addresses only: other types exist not for it,
// which is no error (RFC 2308, section 2.2).
func found(query *dns.Msg, addrs []netip.Addr) *dns.Msg {
	m := failure(query, dns.RcodeSuccess)
	q := query.Question[0]
	if q.Qtype != dns.TypeA && q.Qtype != dns.TypeANY {
		return m
	}
	for _, a := range addrs {
		if a = a.Unmap(); a.Is4() {
			m.Answer = append(m.Answer, &dns.A{Hdr: header(q.Name, dns.TypeA), A: a.AsSlice()})
		}
	}
	// Clients take the first: a name of several containers spreads their load.
	rand.Shuffle(len(m.Answer), func(i, j int) { m.Answer[i], m.Answer[j] = m.Answer[j], m.Answer[i] })
	return m
}

func header(name string, kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: ttlSeconds}
}

// reverse answers for an address of the sandbox's networks; nil for another.
func (s *session) reverse(query *dns.Msg, name string) *dns.Msg {
	addr, ok := arpaAddr(name)
	if !ok {
		return nil
	}
	host, ok := s.config.Reverse(s.sandbox, addr)
	if !ok {
		return nil
	}
	m := failure(query, dns.RcodeSuccess)
	m.Answer = []dns.RR{&dns.PTR{Hdr: header(query.Question[0].Name, dns.TypePTR), Ptr: dns.Fqdn(host)}}
	return m
}

// arpaAddr reads a name like 4.3.2.1.in-addr.arpa (RFC 1035, section 3.5).
func arpaAddr(name string) (netip.Addr, bool) {
	digits, ok := strings.CutSuffix(name, ".in-addr.arpa")
	parts := strings.Split(digits, ".")
	if !ok || len(parts) != 4 {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(parts[3] + "." + parts[2] + "." + parts[1] + "." + parts[0])
	return a, err == nil
}
