package dns_test

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	mdns "github.com/miekg/dns"
	"go.uber.org/goleak"

	"berth/internal/dns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	return udp, tcp
}

// serve runs a resolver until the test ends and returns its address.
func serve(t testing.TB, c dns.Config) string {
	t.Helper()
	udp, tcp := listen(t)
	addr := udp.LocalAddr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- dns.New(c).Serve(ctx, "box", udp, tcp) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return addr
}

func names(upstreams ...string) dns.Config {
	addrs := map[string][]netip.Addr{
		"web": {netip.MustParseAddr("10.64.0.2"), netip.MustParseAddr("10.64.0.3")},
		"db":  {netip.MustParseAddr("10.64.0.4")},
	}
	for i := range 60 {
		addrs["many"] = append(addrs["many"], netip.AddrFrom4([4]byte{10, 64, 1, byte(i)}))
	}
	return dns.Config{
		Lookup: func(sandbox, name string) ([]netip.Addr, bool) {
			a, ok := addrs[name]
			return a, ok && sandbox == "box"
		},
		Reverse: func(_ string, a netip.Addr) (string, bool) {
			return "db.app", a == netip.MustParseAddr("10.64.0.4")
		},
		Upstreams: func(string) []string { return upstreams },
	}
}

// upstream is a name server outside.
func upstream(t testing.TB, h mdns.HandlerFunc) string {
	t.Helper()
	udp, tcp := listen(t)
	for _, s := range []*mdns.Server{{PacketConn: udp, Handler: h}, {Listener: tcp, Handler: h}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan struct{})
		go func() { s.ActivateAndServe(); close(done) }()
		<-started
		t.Cleanup(func() { s.Shutdown(); <-done })
	}
	return udp.LocalAddr().String()
}

// outside answers everything with one address; big.example with many.
func outside(w mdns.ResponseWriter, r *mdns.Msg) {
	m := new(mdns.Msg).SetReply(r)
	count := 1
	if strings.HasPrefix(r.Question[0].Name, "big.") {
		count = 200
	}
	if strings.HasPrefix(r.Question[0].Name, "none.") {
		m.Rcode, count = mdns.RcodeNameError, 0
	}
	for i := range count {
		rr, _ := mdns.NewRR(fmt.Sprintf("%s 60 IN A 203.0.113.%d", r.Question[0].Name, i))
		m.Answer = append(m.Answer, rr)
	}
	if w.RemoteAddr().Network() == "udp" {
		size := mdns.MinMsgSize
		if o := r.IsEdns0(); o != nil {
			size = int(o.UDPSize())
		}
		m.Truncate(size)
	}
	w.WriteMsg(m)
}

func ask(t *testing.T, network, addr, name string, kind uint16, edns uint16) *mdns.Msg {
	t.Helper()
	m := new(mdns.Msg).SetQuestion(name, kind)
	if edns > 0 {
		m.SetEdns0(edns, false)
	}
	c := &mdns.Client{Net: network, Timeout: 8 * time.Second}
	got, _, err := c.Exchange(m, addr)
	if err != nil {
		t.Fatalf("%s %s: %v", name, network, err)
	}
	return got
}

func TestAnswers(t *testing.T) {
	up := upstream(t, outside)
	broken := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) { w.WriteMsg(new(mdns.Msg).SetRcode(r, mdns.RcodeRefused)) })
	closedUDP, closedTCP := listen(t)
	closedUDP.Close()
	closedTCP.Close()
	open := serve(t, names("not an address", "127.0.0.11", closedUDP.LocalAddr().String(), broken, up))
	alone := serve(t, names())
	refused := serve(t, names(broken))
	tests := []struct {
		name, addr, network, question string
		kind                          uint16
		edns                          uint16
		code                          int
		answers                       int
		truncated                     bool
		contains                      string
	}{
		{"local", open, "udp", "db.", mdns.TypeA, 0, 0, 1, false, "600\tIN\tA\t10.64.0.4"},
		{"local over tcp", open, "tcp", "db.", mdns.TypeA, 0, 0, 1, false, "10.64.0.4"},
		{"case is kept and ignored", open, "udp", "Db.", mdns.TypeA, 0, 0, 1, false, "Db."},
		{"several", open, "udp", "web.", mdns.TypeA, 0, 0, 2, false, "10.64.0.3"},
		{"no IPv6", open, "udp", "db.", mdns.TypeAAAA, 0, 0, 0, false, ""},
		{"no mail", open, "udp", "db.", mdns.TypeMX, 0, 0, 0, false, ""},
		{"many do not fit", open, "udp", "many.", mdns.TypeA, 0, 0, -1, true, ""},
		{"many fit with EDNS", open, "udp", "many.", mdns.TypeA, 4096, 0, 60, false, ""},
		{"many fit tcp", open, "tcp", "many.", mdns.TypeA, 0, 0, 60, false, ""},
		{"reverse", open, "udp", "4.0.64.10.in-addr.arpa.", mdns.TypePTR, 0, 0, 1, false, "PTR\tdb.app."},
		{"reverse of others", open, "udp", "5.0.64.10.in-addr.arpa.", mdns.TypePTR, 0, 0, -1, false, "203.0.113.0"},
		{"outside", open, "udp", "example.com.", mdns.TypeA, 0, 0, 1, false, "203.0.113.0"},
		{"single label outside", open, "udp", "intranet.", mdns.TypeA, 0, 0, 1, false, "203.0.113.0"},
		{"no such name", open, "udp", "none.example.", mdns.TypeA, 0, mdns.RcodeNameError, 0, false, ""},
		{"big over udp", open, "udp", "big.example.", mdns.TypeA, 0, 0, -1, true, ""},
		{"big over tcp", open, "tcp", "big.example.", mdns.TypeA, 0, 0, 200, false, ""},
		{"big with EDNS", open, "udp", "big.example.", mdns.TypeA, 4096, 0, 200, false, ""},
		{"no upstream", alone, "udp", "example.com.", mdns.TypeA, 0, mdns.RcodeServerFailure, 0, false, ""},
		{"no upstream, single label", alone, "udp", "nobody.", mdns.TypeA, 0, mdns.RcodeNameError, 0, false, ""},
		{"upstream refuses", refused, "udp", "example.com.", mdns.TypeA, 0, mdns.RcodeRefused, 0, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := ask(t, tt.network, tt.addr, tt.question, tt.kind, tt.edns)
			if m.Rcode != tt.code || m.Truncated != tt.truncated || !m.RecursionAvailable && tt.addr == alone {
				t.Errorf("code %d, truncated %v: %v", m.Rcode, m.Truncated, m)
			}
			if tt.answers >= 0 && len(m.Answer) != tt.answers {
				t.Errorf("%d answers, want %d", len(m.Answer), tt.answers)
			}
			if !strings.Contains(m.String(), tt.contains) {
				t.Errorf("no %q in %v", tt.contains, m)
			}
			if (m.IsEdns0() != nil) != (tt.edns > 0) {
				t.Errorf("EDNS in the answer: %v", m.IsEdns0())
			}
		})
	}
}

func TestLoadIsSpread(t *testing.T) {
	addr := serve(t, names())
	first := map[string]bool{}
	for range 64 {
		first[ask(t, "udp", addr, "web.", mdns.TypeA, 0).Answer[0].(*mdns.A).A.String()] = true
	}
	if len(first) != 2 {
		t.Errorf("first answers: %v", first)
	}
}

func TestOddPackets(t *testing.T) {
	addr := serve(t, names())
	c, err := net.Dial("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	response := new(mdns.Msg).SetReply(new(mdns.Msg).SetQuestion("db.", mdns.TypeA))
	packed, _ := response.Pack()
	for _, junk := range [][]byte{{}, {1, 2, 3}, make([]byte, 3000), packed, []byte(strings.Repeat("\xc0\x0c", 100))} {
		c.Write(junk)
	}
	update := new(mdns.Msg).SetUpdate("example.")
	m, _, err := new(mdns.Client).Exchange(update, addr)
	if err != nil || m.Rcode != mdns.RcodeNotImplemented {
		t.Errorf("update: %v, %v", m, err)
	}
	// Ten connections too many are closed; the others and datagrams are served.
	var conns []net.Conn
	for range dns.MaxConnections + 10 {
		tc, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer tc.Close()
		conns = append(conns, tc)
	}
	conns[len(conns)-1].SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conns[len(conns)-1].Read(make([]byte, 1)); err == nil {
		t.Error("a connection beyond the limit was served")
	}
	if m := ask(t, "udp", addr, "db.", mdns.TypeA, 0); len(m.Answer) != 1 {
		t.Errorf("after junk: %v", m)
	}
}

func TestForwardsAreBounded(t *testing.T) {
	var seen atomic.Int32
	release := make(chan struct{})
	up := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		seen.Add(1)
		<-release
		outside(w, r)
	})
	addr := serve(t, names(up))
	c, err := net.Dial("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// Answers come late or as failures; each query gets one.
	const sent = 50
	for i := range sent {
		b, _ := new(mdns.Msg).SetQuestion(fmt.Sprintf("n%d.example.", i), mdns.TypeA).Pack()
		c.Write(b)
	}
	deadline := time.Now().Add(5 * time.Second)
	for seen.Load() < sent && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	close(release)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	var got []string
	for range sent {
		b := make([]byte, 512)
		n, err := c.Read(b)
		if err != nil {
			t.Fatalf("after %d answers: %v", len(got), err)
		}
		m := new(mdns.Msg)
		if err := m.Unpack(b[:n]); err != nil {
			t.Fatal(err)
		}
		got = append(got, m.Question[0].Name)
	}
	slices.Sort(got)
	if n := len(slices.Compact(got)); n != sent {
		t.Errorf("%d different answers, want %d", n, sent)
	}
}

func TestEndsWithContext(t *testing.T) {
	block := make(chan struct{})
	up := upstream(t, func(mdns.ResponseWriter, *mdns.Msg) { <-block })
	t.Cleanup(func() { close(block) })
	udp, tcp := listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- dns.New(names(up)).Serve(ctx, "box", udp, tcp) }()
	c, err := net.Dial("tcp4", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, _ := new(mdns.Msg).SetQuestion("slow.example.", mdns.TypeA).Pack()
	c.Write(append([]byte{0, byte(len(b))}, b...))
	cancel()
	select {
	case err := <-done:
		if diff := cmp.Diff(error(nil), err); diff != "" {
			t.Error(diff)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Serve goes on after its context ended")
	}
}

// FuzzPacket sends arbitrary datagrams; a good query behind each must still be answered.
func FuzzPacket(f *testing.F) {
	q, _ := new(mdns.Msg).SetQuestion("db.", mdns.TypeA).Pack()
	f.Add(q)
	e, _ := new(mdns.Msg).SetQuestion("many.", mdns.TypeANY).SetEdns0(65535, true).Pack()
	f.Add(e)
	p, _ := new(mdns.Msg).SetQuestion("4.0.64.10.in-addr.arpa.", mdns.TypePTR).Pack()
	f.Add(p)
	odd, _ := hex.DecodeString("000101000001000000000000c00c00010001")
	f.Add(odd)
	addr := serve(f, names())
	f.Fuzz(func(t *testing.T, packet []byte) {
		c, err := net.Dial("udp4", addr)
		if err != nil {
			t.Skip(err)
		}
		defer c.Close()
		if len(packet) > 60000 {
			packet = packet[:60000]
		}
		c.Write(packet)
		check := new(mdns.Msg).SetQuestion("web.", mdns.TypeA)
		check.Id = 4711
		b, _ := check.Pack()
		c.Write(b)
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 65535)
		for {
			n, err := c.Read(buf)
			if err != nil {
				t.Fatalf("no answer after %x: %v", packet, err)
			}
			m := new(mdns.Msg)
			if err := m.Unpack(buf[:n]); err != nil {
				t.Fatalf("a malformed answer to %x: %v", packet, err)
			}
			if m.Id == 4711 && len(m.Answer) == 2 {
				return
			}
		}
	})
}
