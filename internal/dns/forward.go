package dns

import (
	"context"
	"net"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// resolverAddr is where sandboxes reach this resolver; it is never an upstream of itself.
const resolverAddr = "127.0.0.11"

// upstreams lists the servers to ask, as "address:port". What is no address is left out.
func (s *session) upstreams() []string {
	var list []string
	for _, u := range s.config.Upstreams(s.sandbox) {
		addr, err := netip.ParseAddr(u)
		if err != nil {
			ap, err := netip.ParseAddrPort(u)
			if err != nil {
				continue
			}
			addr, u = ap.Addr(), ap.String()
		} else {
			u = net.JoinHostPort(u, defaultPort)
		}
		if addr.String() == resolverAddr {
			continue
		}
		if list = append(list, u); len(list) == maxUpstreams {
			break
		}
	}
	return list
}

// forward asks the upstreams one after the other and returns the first answer that is none of
// their own failures, else the last failure.
//
// The queries leave from the node's network namespace, not from the sandbox's as docker's do:
// the node's resolv.conf often names a server on its own loopback address (systemd-resolved's
// 127.0.0.53), which no sandbox can reach, and a sandbox then needs no way out for names alone.
// Sandboxes on internal networks only have no upstreams, so that names are no way out for data.
func (s *session) forward(ctx context.Context, query *dns.Msg) *dns.Msg {
	var last *dns.Msg
	for _, server := range s.upstreams() {
		answer := exchange(ctx, server, query)
		if answer == nil {
			continue
		}
		if answer.Rcode != dns.RcodeServerFailure && answer.Rcode != dns.RcodeRefused {
			return answer
		}
		last = answer
	}
	if last != nil {
		return last
	}
	return failure(query, dns.RcodeServerFailure)
}

// exchange asks one server, over TCP when its answer does not fit a datagram. Nil: no answer.
func exchange(ctx context.Context, server string, query *dns.Msg) *dns.Msg {
	ask := query.Copy()
	ask.Id = dns.Id() // an answer cannot be forged by who knows the client's
	var answer *dns.Msg
	for _, network := range []string{"udp", "tcp"} {
		m, err := exchangeOver(ctx, network, server, ask)
		if err != nil || m == nil || !sameQuestion(m, query) {
			break // what UDP said, if anything, must do
		}
		answer = m
		if !m.Truncated {
			break
		}
	}
	if answer == nil {
		return nil
	}
	answer.Id = query.Id
	return answer
}

// exchangeOver asks over one transport. It returns at once when ctx ends.
func exchangeOver(ctx context.Context, network, server string, ask *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamWait)
	defer cancel()
	c := &dns.Client{Net: network, Timeout: upstreamWait, UDPSize: maxUDPAnswer}
	conn, err := c.DialContext(ctx, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	m, _, err := c.ExchangeWithConnContext(ctx, ask, conn)
	return m, err
}

func sameQuestion(answer, query *dns.Msg) bool {
	if len(answer.Question) != 1 {
		return len(answer.Question) == 0 && answer.Rcode != dns.RcodeSuccess
	}
	a, q := answer.Question[0], query.Question[0]
	return a.Qtype == q.Qtype && a.Qclass == q.Qclass && strings.EqualFold(a.Name, q.Name)
}
