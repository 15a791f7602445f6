package network_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/network"
)

func (h *host) tables() []string {
	conn, err := nftables.New(nftables.WithNetNSFd(int(h.ns.Fd())))
	must(h.t, err)
	list, err := conn.ListTables()
	must(h.t, err)
	names := []string{}
	for _, t := range list {
		names = append(names, t.Name)
	}
	return names
}

func port(proto string, ip string, hostPort, inside uint16) network.Port {
	p := network.Port{Protocol: proto, HostPort: hostPort, Port: inside}
	if ip != "" {
		p.HostIP = netip.MustParseAddr(ip)
	}
	return p
}

func TestTraffic(t *testing.T) {
	ctx := context.Background()
	a, b := newHost(t), newHost(t)
	addrs := connect(t, a, b)
	before := a.snapshot()
	berth := newInstance(t, a)
	_, err := berth.Create(ctx, network.Config{Name: "other"})
	must(t, err)
	_, err = berth.Create(ctx, network.Config{Name: "closed", Internal: true})
	must(t, err)
	_, err = berth.Create(ctx, network.Config{Name: "apart", Options: map[string]string{network.OptionICC: "false"}})
	must(t, err)

	one, e1 := berth.sandbox(1, network.DefaultNetwork)
	two, e2 := berth.sandbox(2, network.DefaultNetwork)
	three, e3 := berth.sandbox(3, "other")
	four, e4 := berth.sandbox(4, "closed")
	five, e5 := berth.sandbox(5, "closed")
	six, _ := berth.sandbox(6, "apart")
	seven, e7 := berth.sandbox(7, "apart")
	ip := func(e []network.Endpoint) string { return e[0].Address.Addr().String() }
	for _, h := range []*host{one, three, five, seven, b} {
		h.serveTCP(":80")
	}
	one.serveUDP(":53")
	a.serveTCP(":9000")

	t.Run("containers of a network", func(t *testing.T) {
		two.wantSeen(ip(e1)+":80", ip(e2))
		four.wantSeen(ip(e5)+":80", ip(e4))
	})
	t.Run("the host", func(t *testing.T) {
		a.wantSeen(ip(e1)+":80", e1[0].Gateway.String())
		two.wantSeen(e2[0].Gateway.String()+":9000", ip(e2))
	})
	t.Run("outside is reached behind the host's address", func(t *testing.T) {
		one.wantSeen(addrs[1].String()+":80", addrs[0].String())
		three.wantSeen(addrs[1].String()+":80", addrs[0].String())
	})
	t.Run("networks are apart", func(t *testing.T) {
		one.wantShut(ip(e3) + ":80")
		three.wantShut(ip(e1) + ":80")
		one.wantShut(ip(e5) + ":80")
		four.wantShut(ip(e1) + ":80")
	})
	t.Run("internal has no way out", func(t *testing.T) {
		// Not even for who makes himself a route.
		link, err := four.nl.LinkByName("eth0")
		must(t, err)
		must(t, four.nl.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: e4[0].Gateway.AsSlice()}))
		four.wantShut(addrs[1].String() + ":80")
		if e4[0].DefaultRoute {
			t.Error("endpoint of an internal network has a default route")
		}
	})
	t.Run("no communication within a network", func(t *testing.T) {
		six.wantShut(ip(e7) + ":80")
		// Also where bridged frames do not pass the rules.
		const calls = "/proc/sys/net/bridge/bridge-nf-call-iptables"
		set := func(v string) error {
			return a.do(func() error {
				if err := os.WriteFile(calls, []byte(v), 0); !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				return nil
			})
		}
		must(t, set("0"))
		six.wantShut(ip(e7) + ":80")
		must(t, set("1"))
		six.wantSeen(addrs[1].String()+":80", addrs[0].String())
	})
	t.Run("unpublished ports are shut to outside", func(t *testing.T) {
		link, err := b.nl.LinkByName("uplink")
		must(t, err)
		_, dst, _ := net.ParseCIDR(e1[0].Address.Masked().String())
		must(t, b.nl.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: addrs[0].AsSlice()}))
		b.wantShut(ip(e1) + ":80")
	})
	t.Run("published", func(t *testing.T) {
		got, err := berth.Publish(ctx, sandboxID(1), e1[0].Address.Addr(), []network.Port{
			port("tcp", "", 8080, 80), port("udp", "", 5353, 53), port("tcp", "127.0.0.1", 8081, 80), port("tcp", "", 0, 80),
		})
		must(t, err)
		if got[3].HostPort == 0 {
			t.Fatal("no port was chosen")
		}
		lan := addrs[0].String()
		b.wantSeen(lan+":8080", addrs[1].String())
		b.wantSeen(fmt.Sprintf("%s:%d", lan, got[3].HostPort), addrs[1].String())
		b.wantShut(lan + ":8081")
		a.wantSeen(lan+":8080", lan)
		a.wantSeen("127.0.0.1:8080", e1[0].Gateway.String())
		a.wantSeen("127.0.0.1:8081", e1[0].Gateway.String())
		a.wantShut("127.0.0.2:8081")
		one.wantSeen(lan+":8080", "")       // itself
		two.wantSeen(lan+":8080", "")       // its neighbour
		three.wantSeen(lan+":8080", ip(e3)) // another network
		six.wantSeen(lan+":8080", "")       // where containers are apart
		four.wantShut(lan + ":8080")        // no way out
		two.wantShut("127.0.0.1:8080")      // its own loopback
		two.wantSeen(lan+":9000", ip(e2))   // the host's own server
		for from, to := range map[*host]string{b: lan, a: "127.0.0.1", two: lan} {
			if got, err := from.askUDP(to + ":5353"); err != nil {
				t.Errorf("udp %s: %v (%s)", to, err, got)
			}
		}
		must(t, berth.Unpublish(ctx, sandboxID(1)))
		a.wantShut("127.0.0.1:8080")
		if got := berth.Published(sandboxID(1)); got != nil {
			t.Errorf("still published: %v", got)
		}
	})
	t.Run("the host's loopback is out of reach", func(t *testing.T) {
		var l net.PacketConn
		must(t, a.do(func() (err error) { l, err = net.ListenPacket("udp4", "127.0.0.1:9001"); return err }))
		defer l.Close()
		routes, err := two.nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		must(t, err)
		for _, r := range routes {
			if r.Dst.IP[0] == 127 {
				must(t, two.nl.RouteDel(&r))
			}
		}
		must(t, two.do(func() error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/route_localnet", []byte("1"), 0)
		}))
		send := func(h *host, text string) {
			c, err := h.dial("udp4", "127.0.0.1:9001")
			must(t, err)
			defer c.Close()
			_, err = c.Write([]byte(text))
			must(t, err)
		}
		// What two sent would come before what the host sent.
		send(two, "over the bridge")
		send(a, "from the host")
		b := make([]byte, 64)
		l.SetReadDeadline(time.Now().Add(dialTimeout))
		if n, _, err := l.ReadFrom(b); err != nil || string(b[:n]) != "from the host" {
			t.Errorf("received %q, %v", b[:n], err)
		}
	})
	t.Run("counters", func(t *testing.T) {
		stats, err := berth.Stats(one.path)
		must(t, err)
		if stats["eth0"].RxBytes == 0 || stats["eth0"].TxPackets == 0 || len(stats) != 1 {
			t.Errorf("counters: %+v", stats)
		}
	})
	t.Run("nothing is left", func(t *testing.T) {
		must(t, berth.Teardown(ctx))
		if diff := cmp.Diff(before, a.snapshot()); diff != "" {
			t.Errorf("left behind (-want +got):\n%s", diff)
		}
		if n := berth.keep.len(); n != 0 {
			t.Errorf("%d sockets are still kept", n)
		}
		if left, _ := os.ReadDir(filepath.Join(berth.root.Run, "ns")); len(left) > 0 {
			t.Errorf("namespaces left: %v", left)
		}
	})
}

func TestPortConflicts(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	berth := newInstance(t, h)
	_, e1 := berth.sandbox(1, network.DefaultNetwork)
	_, e2 := berth.sandbox(2, network.DefaultNetwork)
	must(t, h.do(func() error {
		l, err := net.Listen("tcp4", ":7000")
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}))
	publish := func(n int, ports ...network.Port) error {
		_, err := berth.Publish(ctx, sandboxID(n), []network.Endpoint{e1[0], e2[0]}[n-1].Address.Addr(), ports)
		return err
	}
	must(t, publish(1, port("tcp", "", 80, 80), port("udp", "127.0.0.1", 80, 80)))
	tests := []struct {
		name  string
		ports []network.Port
		kind  error
		text  string
	}{
		{"ours", []network.Port{port("tcp", "", 80, 80)}, errdefs.ErrConflict, "Bind for 0.0.0.0:80 failed: port is already allocated (by sandbox 000000000000)"},
		{"ours at one address", []network.Port{port("tcp", "127.0.0.1", 80, 80)}, errdefs.ErrConflict, "Bind for 127.0.0.1:80 failed: port is already allocated"},
		{"ours at every address", []network.Port{port("udp", "", 80, 80)}, errdefs.ErrConflict, "Bind for 0.0.0.0:80 failed"},
		{"all or nothing", []network.Port{port("tcp", "", 81, 80), port("tcp", "", 80, 80)}, errdefs.ErrConflict, "port is already allocated"},
		{"foreign", []network.Port{port("tcp", "", 7000, 80)}, errdefs.ErrConflict, "failed to bind host port for 0.0.0.0:7000:" + e2[0].Address.Addr().String() + ":80/tcp: address already in use"},
		{"not ours to bind", []network.Port{port("tcp", "203.0.113.9", 83, 80)}, errdefs.ErrInvalid, "cannot assign requested address"},
		{"IPv6", []network.Port{port("tcp", "::1", 80, 80)}, errdefs.ErrUnsupported, "IPv6"},
		{"protocol", []network.Port{port("icmp", "", 80, 80)}, errdefs.ErrInvalid, "invalid protocol"},
		{"twice in one request", []network.Port{port("tcp", "", 82, 80), port("tcp", "", 82, 81)}, errdefs.ErrConflict, "already allocated"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := publish(2, tt.ports...)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
			if got := berth.Published(sandboxID(2)); got != nil {
				t.Errorf("published nevertheless: %v", got)
			}
		})
	}
	must(t, publish(2, port("tcp", "", 81, 80), port("udp", "127.0.0.2", 80, 80)))
	must(t, berth.Release(ctx, sandboxID(1)))
	must(t, publish(2, port("tcp", "", 80, 80)))
	// A keeper that holds a port for nobody does not take it from its next user.
	if err := berth.keep.Keep("port/tcp/0.0.0.0/90"); err != nil {
		t.Fatal(err)
	}
	must(t, h.do(func() error {
		l, err := net.Listen("tcp4", ":90")
		if err != nil {
			return err
		}
		defer l.Close()
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			return err
		}
		defer f.Close()
		return berth.keep.Keep("port/tcp/0.0.0.0/90", int(f.Fd()))
	}))
	must(t, publish(2, port("tcp", "", 90, 80)))
}

func TestRestore(t *testing.T) {
	ctx := context.Background()
	a, b := newHost(t), newHost(t)
	addrs := connect(t, a, b)
	berth := newInstance(t, a)
	_, err := berth.Create(ctx, network.Config{Name: "app"})
	must(t, err)
	one, e1 := berth.sandbox(1, "app")
	two, e2 := berth.sandbox(2, "app", network.DefaultNetwork)
	one.serveTCP(":80")
	_, err = berth.Publish(ctx, sandboxID(1), e1[0].Address.Addr(), []network.Port{port("tcp", "", 8080, 80), port("tcp", "127.0.0.1", 8081, 80)})
	must(t, err)
	_, err = berth.Publish(ctx, sandboxID(2), e2[0].Address.Addr(), []network.Port{port("tcp", "", 8082, 80)})
	must(t, err)

	conn, err := b.dial("tcp4", addrs[0].String()+":8080")
	must(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	r := bufio.NewReader(conn)
	_, err = r.ReadString('\n')
	must(t, err)
	n := 0
	alive := func() {
		t.Helper()
		n++
		fmt.Fprintf(conn, "%d\n", n)
		if line, err := r.ReadString('\n'); err != nil || line != fmt.Sprintf("%d\n", n) {
			t.Fatalf("the connection broke: %q, %v", line, err)
		}
		b.wantSeen(addrs[0].String()+":8080", addrs[1].String())
	}
	alive()

	t.Run("the daemon is killed", func(t *testing.T) {
		before := a.snapshot()
		berth.crash(sandboxID(1), sandboxID(2))
		alive()
		if diff := cmp.Diff(before, a.snapshot()); diff != "" {
			t.Errorf("a restart changed the kernel (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(e1, berth.SandboxEndpoints(sandboxID(1)), cmp.Comparer(func(x, y netip.Addr) bool { return x == y }), cmp.Comparer(func(x, y netip.Prefix) bool { return x == y })); diff != "" {
			t.Errorf("endpoints (-want +got):\n%s", diff)
		}
		_, err := berth.Publish(ctx, sandboxID(2), e2[0].Address.Addr(), []network.Port{port("tcp", "", 8080, 80)})
		if !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("a port of before the restart: %v", err)
		}
		// Addresses of before are not given out again.
		_, e3 := berth.sandbox(3, "app")
		if a := e3[0].Address; a == e1[0].Address || a == e2[0].Address {
			t.Errorf("address %v was given out twice", a)
		}
		must(t, berth.Release(ctx, sandboxID(3)))
		must(t, berth.RemoveNamespaces(sandboxID(3)))
	})
	t.Run("a sandbox ended meanwhile", func(t *testing.T) {
		berth.crash(sandboxID(1))
		alive()
		b.wantShut(addrs[0].String() + ":8082")
		if _, err := os.Stat(berth.root.Namespaces(sandboxID(2))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("its namespaces: %v", err)
		}
		if got := berth.SandboxEndpoints(sandboxID(2)); got != nil {
			t.Errorf("its endpoints: %v", got)
		}
		if strings.Contains(a.snapshot(), e2[0].Peer) {
			t.Error("its interface is still there")
		}
		_ = two
	})
	t.Run("somebody flushed the rules", func(t *testing.T) {
		c, err := nftables.New(nftables.WithNetNSFd(int(a.ns.Fd())))
		must(t, err)
		c.FlushRuleset()
		must(t, c.Flush())
		must(t, berth.Repair(ctx))
		alive()
		c.FlushRuleset()
		must(t, c.Flush())
		_, err = berth.Publish(ctx, sandboxID(1), e1[0].Address.Addr(), []network.Port{port("tcp", "", 8083, 80)})
		must(t, err)
		alive()
		b.wantSeen(addrs[0].String()+":8083", addrs[1].String())
	})
	t.Run("somebody deleted the bridge", func(t *testing.T) {
		app, err := berth.Get("app")
		must(t, err)
		link, err := a.nl.LinkByName(app.Bridge)
		must(t, err)
		must(t, a.nl.LinkDel(link))
		berth.crash(sandboxID(1))
		alive()
	})
	t.Run("reboot", func(t *testing.T) {
		must(t, berth.Release(ctx, "nobody"))
		// Links, rules and namespaces are gone; the directory and the store stay.
		berth.Close()
		fresh := newHost(t)
		berth.host = fresh
		berth.keep = newKeeper(t)
		dir := berth.root.Namespaces(sandboxID(1))
		must(t, netlinkUnmount(filepath.Join(dir, "net")))
		berth.open()
		must(t, berth.Restore(ctx, map[string]bool{sandboxID(1): true}))
		if got := berth.SandboxEndpoints(sandboxID(1)); got != nil {
			t.Errorf("endpoints survived a reboot: %v", got)
		}
		again, e := berth.sandbox(1, "app")
		again.serveTCP(":80")
		_, err := berth.Publish(ctx, sandboxID(1), e[0].Address.Addr(), []network.Port{port("tcp", "", 8080, 80)})
		must(t, err)
		fresh.wantSeen("127.0.0.1:8080", "")
		must(t, berth.Teardown(ctx))
	})
}

func TestTwoInstances(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	before := h.snapshot()
	x, y := newInstance(t, h), newInstance(t, h)
	bx, ex := x.sandbox(1, network.DefaultNetwork)
	by, ey := y.sandbox(1, network.DefaultNetwork)
	if ex[0].Address.Masked() == ey[0].Address.Masked() {
		t.Fatalf("both instances use %v", ex[0].Address.Masked())
	}
	bx.serveTCP(":80")
	by.serveTCP(":80")
	publish := func(i *instance, e []network.Endpoint, p uint16) error {
		_, err := i.Publish(ctx, sandboxID(1), e[0].Address.Addr(), []network.Port{port("tcp", "", p, 80)})
		return err
	}
	must(t, publish(x, ex, 8080))
	must(t, publish(y, ey, 8081))
	if err := publish(y, ey, 8080); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("the other's port: %v", err)
	}
	h.wantSeen("127.0.0.1:8080", "")
	h.wantSeen("127.0.0.1:8081", "")
	bx.wantShut(ey[0].Address.Addr().String() + ":80")
	must(t, x.Teardown(ctx))
	h.wantShut("127.0.0.1:8080")
	h.wantSeen("127.0.0.1:8081", "")
	must(t, y.Teardown(ctx))
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		t.Errorf("left behind (-want +got):\n%s", diff)
	}
}

func TestSameSubnetPlanned(t *testing.T) {
	h := newHost(t)
	x, y := newInstance(t, h), newInstance(t, h)
	// Both planned before either bridge was there: the second to make one gives way.
	y.Close()
	y.store = newStore()
	for kind, m := range x.store.data {
		for k, raw := range m {
			text := strings.ReplaceAll(string(raw), "b"+x.root.Tag(), "b"+y.root.Tag())
			must(t, y.store.Put(kind, k, jsonRaw(text)))
		}
	}
	y.open()
	bx, ex := x.sandbox(1, network.DefaultNetwork)
	by, ey := y.sandbox(1, network.DefaultNetwork)
	if ex[0].Address.Overlaps(ey[0].Address) {
		t.Fatalf("both use %v", ex[0].Address)
	}
	bx.serveTCP(":80")
	by.serveTCP(":80")
	h.wantSeen(ex[0].Address.Addr().String()+":80", "")
	h.wantSeen(ey[0].Address.Addr().String()+":80", "")
	n, err := y.Get(network.DefaultNetwork)
	must(t, err)
	if n.Config.Subnets[0].Prefix != ey[0].Address.Masked() {
		t.Errorf("network says %v, endpoint has %v", n.Config.Subnets[0].Prefix, ey[0].Address)
	}
	must(t, x.Teardown(context.Background()))
	must(t, y.Teardown(context.Background()))
}

func TestAttach(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	connect(t, h)
	berth := newInstance(t, h)
	n, err := berth.Create(ctx, network.Config{Name: "fixed", Subnets: []network.Subnet{{
		Prefix: netip.MustParsePrefix("10.200.0.0/24"), Range: netip.MustParsePrefix("10.200.0.128/30"),
		Aux: map[string]netip.Addr{"printer": netip.MustParseAddr("10.200.0.129")}, Gateway: netip.MustParseAddr("10.200.0.1"),
	}}, Options: map[string]string{network.OptionMTU: "1400"}})
	must(t, err)
	box, e := berth.sandbox(1, network.DefaultNetwork)
	id := sandboxID(1)
	attach := func(r network.AttachRequest) (network.Endpoint, error) {
		r.Sandbox, r.NetNS = id, box.path
		return berth.Attach(ctx, r)
	}
	if _, err := attach(network.AttachRequest{Network: network.DefaultNetwork}); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("attached twice: %v", err)
	}
	for addr, want := range map[string]string{
		"10.9.9.9":   "Invalid address 10.9.9.9: It does not belong to any of this network's subnets",
		"10.200.0.1": "Address already in use",
		"::1":        "It does not belong",
	} {
		_, err := attach(network.AttachRequest{Network: "fixed", Address: netip.MustParseAddr(addr)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("address %s: %v, want %q", addr, err, want)
		}
	}
	got, err := attach(network.AttachRequest{Network: n.ID[:10], Address: netip.MustParseAddr("10.200.0.7"), MAC: "02:00:00:00:00:09"})
	must(t, err)
	link, err := box.nl.LinkByName("eth1")
	must(t, err)
	if a := link.Attrs(); a.HardwareAddr.String() != "02:00:00:00:00:09" || a.MTU != 1400 || got.Interface != "eth1" {
		t.Errorf("interface %+v, endpoint %+v", a, got)
	}
	if err := berth.Remove(ctx, "fixed"); !errors.Is(err, errdefs.ErrConflict) || !strings.Contains(err.Error(), "error while removing network: network fixed id "+n.ID+" has active endpoints") {
		t.Errorf("remove in use: %v", err)
	}
	// The default route moves on.
	must(t, berth.Detach(ctx, id, network.DefaultNetwork))
	if _, err := box.nl.LinkByName("eth0"); err == nil {
		t.Error("eth0 is still there")
	}
	routes, err := box.nl.RouteGet(net.IPv4(203, 0, 113, 1))
	must(t, err)
	if routes[0].Gw.String() != "10.200.0.1" {
		t.Errorf("default route by %v", routes[0].Gw)
	}
	if err := berth.Detach(ctx, id, network.DefaultNetwork); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("detached twice: %v", err)
	}
	again, err := attach(network.AttachRequest{Network: network.DefaultNetwork})
	must(t, err)
	if again.Address == e[0].Address || again.Interface != "eth0" {
		t.Errorf("attached again as %+v; want another address than %v", again, e[0].Address)
	}
	must(t, berth.Release(ctx, id))
	must(t, berth.RemoveNamespaces(id))

	// A wish for an address that is just being given up is granted.
	berth.sandbox(1)
	_, err = attach(network.AttachRequest{Network: "fixed", Address: netip.MustParseAddr("10.200.0.7")})
	must(t, err)
	// Of a range of four, the auxiliary address is taken.
	for i := 2; i < 5; i++ {
		_, e := berth.sandbox(i, "fixed")
		if !netip.MustParsePrefix("10.200.0.128/30").Contains(e[0].Address.Addr()) || e[0].Address.Addr().String() == "10.200.0.129" {
			t.Errorf("address %v", e[0].Address)
		}
	}
	must(t, berth.NewNamespaces(sandboxID(5), "x", "", network.NS{Net: true}, nil))
	_, err = berth.Attach(ctx, network.AttachRequest{Sandbox: sandboxID(5), NetNS: berth.NetNS(sandboxID(5)), Network: "fixed"})
	if !errors.Is(err, errdefs.ErrExhausted) || !strings.Contains(err.Error(), "no available IPv4 addresses on this network's address pools: fixed ("+n.ID[:12]+")") {
		t.Errorf("exhausted: %v", err)
	}
	// A failure on the way leaves nothing.
	before := h.snapshot()
	berth.store.fail = errors.New("disk full")
	_, err = berth.Attach(ctx, network.AttachRequest{Sandbox: sandboxID(5), NetNS: berth.NetNS(sandboxID(5)), Network: network.DefaultNetwork})
	berth.store.fail = nil
	if err == nil {
		t.Error("attached without a record")
	}
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		t.Errorf("left behind (-want +got):\n%s", diff)
	}
	if _, err := berth.Attach(ctx, network.AttachRequest{Sandbox: "s", NetNS: "/proc/version", Network: network.DefaultNetwork}); err == nil {
		t.Error("attached what is no namespace")
	}
	must(t, berth.Teardown(ctx))
}

func TestNamespaces(t *testing.T) {
	needRoot(t)
	h := newHost(t)
	berth := newInstance(t, h)
	id := sandboxID(1)
	all := network.NS{Net: true, IPC: true, UTS: true}
	for _, bad := range []map[string]string{{"kernel.panic": "1"}, {"net/../kernel/panic": "1"}, {"net.no.such": "1"}, {"": "1"}} {
		if err := berth.NewNamespaces(id, "h", "", all, bad); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("sysctls %v: %v", bad, err)
		}
		if _, err := os.Stat(berth.root.Namespaces(id)); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("sysctls %v: left %v", bad, err)
		}
	}
	must(t, berth.NewNamespaces(id, "ship", "sea", all, map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmni": "99"}))
	if err := berth.NewNamespaces(id, "ship", "", all, nil); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("made twice: %v", err)
	}
	got := insideNamespaces(t, berth.root.Namespaces(id))
	want := map[string]string{"hostname": "ship", "domainname": "sea", "ip_forward": "1", "shmmni": "99", "unprivileged": "0", "lo": "up"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("namespaces (-want +got):\n%s", diff)
	}
	must(t, berth.RemoveNamespaces(id))
	must(t, berth.RemoveNamespaces(id))
	if err := berth.RemoveNamespaces("../../x"); err == nil {
		t.Error("removed something outside")
	}
	must(t, berth.NewNamespaces(id, "again", "", all, nil))
	must(t, berth.RemoveNamespaces(id))
	berth.Close()
	if left, _ := os.ReadDir(filepath.Join(berth.root.Run, "ns")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestResolverSockets(t *testing.T) {
	h := newHost(t)
	berth := newInstance(t, h)
	box, _ := berth.sandbox(1)
	box.serveTCP("0.0.0.0:53") // its own name server is no obstacle
	udp, tcp, err := berth.OpenResolver(sandboxID(1), box.path)
	must(t, err)
	answer := func(udp net.PacketConn, tcp net.Listener, text string) {
		t.Helper()
		done := make(chan struct{}, 2)
		go func() {
			b := make([]byte, 512)
			if _, from, err := udp.ReadFrom(b); err == nil {
				udp.WriteTo([]byte(text), from)
			}
			done <- struct{}{}
		}()
		go func() {
			if c, err := tcp.Accept(); err == nil {
				c.Write([]byte(text))
				c.Close()
			}
			done <- struct{}{}
		}()
		if got, err := box.askUDP("127.0.0.11:53"); err != nil || got != text {
			t.Errorf("udp: %q, %v", got, err)
		}
		if got, err := box.ask("127.0.0.11:53"); err != nil || got != text {
			t.Errorf("tcp: %q, %v", got, err)
		}
		<-done
		<-done
		udp.Close()
		tcp.Close()
	}
	answer(udp, tcp, "first")
	// While the daemon is away a query waits in the kept socket.
	c, err := box.dial("udp4", "127.0.0.11:53")
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte("waiting"))
	must(t, err)
	berth.crash(sandboxID(1))
	udp, tcp, err = berth.OpenResolver(sandboxID(1), box.path)
	must(t, err)
	b := make([]byte, 64)
	udp.SetReadDeadline(time.Now().Add(dialTimeout))
	n, from, err := udp.ReadFrom(b)
	if err != nil || string(b[:n]) != "waiting" {
		t.Fatalf("the waiting query: %q, %v", b[:n], err)
	}
	_, err = udp.WriteTo([]byte("late"), from)
	must(t, err)
	c.SetReadDeadline(time.Now().Add(dialTimeout))
	if n, err := c.Read(b); err != nil || string(b[:n]) != "late" {
		t.Errorf("its answer: %q, %v", b[:n], err)
	}
	udp.SetReadDeadline(time.Time{})
	answer(udp, tcp, "second")
	must(t, berth.Release(context.Background(), sandboxID(1)))
	must(t, berth.RemoveNamespaces(sandboxID(1)))
	if n := berth.keep.len(); n != 0 {
		t.Errorf("%d sockets are still kept", n)
	}
}
