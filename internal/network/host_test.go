package network_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"berth/internal/network"
	"berth/internal/state"
)

const dialTimeout = 2 * time.Second

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes network namespaces: needs root")
	}
}

// memStore is a Store that round-trips records like the journal does.
type memStore struct {
	mu   sync.Mutex
	data map[string]map[string]json.RawMessage
	fail error // returned by Put when set
}

func newStore() *memStore { return &memStore{data: map[string]map[string]json.RawMessage{}} }

func (m *memStore) Put(kind, key string, v any) error {
	raw, err := json.Marshal(v)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		err = m.fail
	}
	if err != nil {
		return err
	}
	if m.data[kind] == nil {
		m.data[kind] = map[string]json.RawMessage{}
	}
	m.data[kind][key] = raw
	return nil
}

func (m *memStore) Delete(kind, key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.data[kind], key)
	return nil
}

func (m *memStore) Each(kind string, f func(string, json.RawMessage) error) error {
	m.mu.Lock()
	entries := maps.Clone(m.data[kind])
	m.mu.Unlock()
	for _, k := range slices.Sorted(maps.Keys(entries)) {
		if err := f(k, entries[k]); err != nil {
			return err
		}
	}
	return nil
}

// keeper is a Sockets that outlives services, as the holder does.
type keeper struct {
	mu  sync.Mutex
	fds map[string][]int
}

func newKeeper(t testing.TB) *keeper {
	k := &keeper{fds: map[string][]int{}}
	t.Cleanup(func() {
		for key := range k.fds {
			k.Drop(key)
		}
	})
	return k
}

func (k *keeper) Keep(key string, fds ...int) error {
	k.Drop(key)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, fd := range fds {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		k.fds[key] = append(k.fds[key], d)
	}
	return nil
}

func (k *keeper) Take(key string) ([]int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []int
	for _, fd := range k.fds[key] {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func (k *keeper) Drop(key string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, fd := range k.fds[key] {
		unix.Close(fd)
	}
	delete(k.fds, key)
	return nil
}

func (k *keeper) len() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.fds)
}

// host is a network namespace that plays a machine.
type host struct {
	t    testing.TB
	path string
	ns   *os.File
	nl   *netlink.Handle
}

// onThread runs f on a thread of its own, in the namespace unless it is nil.
func onThread(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if ns != nil {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				done <- err
				return
			}
		}
		done <- f()
	}()
	return <-done
}

func newHost(t testing.TB) *host {
	t.Helper()
	needRoot(t)
	path := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := onThread(nil, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	return openHost(t, path)
}

// openHost opens an existing namespace; the sandboxes of tests are such, too.
func openHost(t testing.TB, path string) *host {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(f.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close(); f.Close() })
	if lo, err := h.LinkByName("lo"); err == nil {
		h.LinkSetUp(lo)
	}
	return &host{t: t, path: path, ns: f, nl: h}
}

func (h *host) do(f func() error) error { return onThread(h.ns, f) }

// connect joins hosts by a switch in a namespace of its own: host n has 198.51.100.n+1/24.
func connect(t testing.TB, hosts ...*host) []netip.Addr {
	t.Helper()
	lan := newHost(t)
	br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	br.Name = "switch"
	must(t, lan.nl.LinkAdd(br))
	must(t, lan.nl.LinkSetUp(br))
	var addrs []netip.Addr
	for i, h := range hosts {
		veth := netlink.NewVeth(netlink.NewLinkAttrs())
		veth.Name, veth.MasterIndex, veth.Flags = fmt.Sprintf("port%d", i), br.Index, net.FlagUp
		veth.PeerName, veth.PeerNamespace = "uplink", netlink.NsFd(h.ns.Fd())
		must(t, lan.nl.LinkAdd(veth))
		link, err := h.nl.LinkByName("uplink")
		must(t, err)
		a := netip.AddrFrom4([4]byte{198, 51, 100, byte(i + 1)})
		must(t, h.nl.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}))
		must(t, h.nl.LinkSetUp(link))
		addrs = append(addrs, a)
	}
	return addrs
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// instance is one Berth on a host.
type instance struct {
	t     testing.TB
	host  *host
	root  state.Root
	store *memStore
	keep  *keeper
	*network.Service
}

func newInstance(t testing.TB, h *host) *instance {
	t.Helper()
	dir, err := os.MkdirTemp("", "bn")
	must(t, err)
	root, err := state.NewRoot(dir)
	must(t, err)
	i := &instance{t: t, host: h, root: root, store: newStore(), keep: newKeeper(t)}
	t.Cleanup(func() {
		// Whatever a failed test left mounted.
		paths, _ := filepath.Glob(filepath.Join(root.Run, "ns", "*", "*"))
		for _, p := range paths {
			unix.Unmount(p, unix.MNT_DETACH)
		}
		unix.Unmount(filepath.Join(root.Run, "ns"), unix.MNT_DETACH)
		os.RemoveAll(dir)
	})
	i.open()
	t.Cleanup(func() { i.Close() })
	return i
}

func (i *instance) open() {
	i.t.Helper()
	s, err := network.Open(context.Background(), network.Options{Root: i.root, Store: i.store, Sockets: i.keep, HostNS: i.host.path})
	must(i.t, err)
	i.Service = s
}

// crash replaces the service as a killed daemon is replaced: only store, keeper and kernel stay.
func (i *instance) crash(live ...string) {
	i.t.Helper()
	i.Close()
	i.open()
	m := map[string]bool{}
	for _, l := range live {
		m[l] = true
	}
	must(i.t, i.Restore(context.Background(), m))
}

func sandboxID(n int) string { return fmt.Sprintf("%064x", 0xabc000+n) }

// sandbox makes namespaces and attaches them to networks, the first with the default route.
func (i *instance) sandbox(n int, networks ...string) (*host, []network.Endpoint) {
	i.t.Helper()
	id := sandboxID(n)
	must(i.t, i.NewNamespaces(id, fmt.Sprintf("box%d", n), "", network.NS{Net: true, IPC: true, UTS: true}, nil))
	var eps []network.Endpoint
	for k, name := range networks {
		ep, err := i.Attach(context.Background(), network.AttachRequest{Sandbox: id, NetNS: i.NetNS(id), Network: name, Gateway: k == 0})
		must(i.t, err)
		eps = append(eps, ep)
	}
	return openHost(i.t, i.NetNS(id)), eps
}

// serveTCP answers every connection with the peer's address and echoes what it reads then.
func (h *host) serveTCP(addr string) {
	h.t.Helper()
	var l net.Listener
	must(h.t, h.do(func() (err error) { l, err = net.Listen("tcp4", addr); return err }))
	var conns sync.WaitGroup
	h.t.Cleanup(func() { l.Close(); conns.Wait() })
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(30 * time.Second))
				fmt.Fprintf(c, "%s\n", c.RemoteAddr().(*net.TCPAddr).IP)
				io.Copy(c, c)
			})
		}
	})
}

func (h *host) serveUDP(addr string) {
	h.t.Helper()
	var c net.PacketConn
	must(h.t, h.do(func() (err error) { c, err = net.ListenPacket("udp4", addr); return err }))
	h.t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo([]byte(from.(*net.UDPAddr).IP.String()+" "+string(b[:n])), from)
		}
	}()
}

func (h *host) dial(network, addr string) (net.Conn, error) {
	var c net.Conn
	err := h.do(func() (err error) { c, err = net.DialTimeout(network, addr, dialTimeout); return err })
	return c, err
}

// ask connects and returns the address the server saw.
func (h *host) ask(addr string) (string, error) {
	c, err := h.dial("tcp4", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(dialTimeout))
	b := make([]byte, 64)
	n, err := c.Read(b)
	return strings.TrimSpace(string(b[:n])), err
}

func (h *host) askUDP(addr string) (string, error) {
	c, err := h.dial("udp4", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(dialTimeout))
	if _, err := c.Write([]byte("hello")); err != nil {
		return "", err
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	return strings.TrimSuffix(string(b[:n]), " hello"), err
}

// wantSeen asserts that addr answers and saw the caller as from ("" is anybody).
func (h *host) wantSeen(addr, from string) {
	h.t.Helper()
	got, err := h.ask(addr)
	if err != nil {
		h.t.Errorf("tcp %s: %v", addr, err)
	} else if from != "" && got != from {
		h.t.Errorf("tcp %s: the server saw %s, want %s", addr, got, from)
	}
}

// wantShut asserts that no answer comes from addr, within a short time when it is dropped.
func (h *host) wantShut(addr string) {
	h.t.Helper()
	var c net.Conn
	err := h.do(func() (err error) { c, err = net.DialTimeout("tcp4", addr, 300*time.Millisecond); return err })
	if err == nil {
		c.Close()
		h.t.Errorf("tcp %s: connected, want no way there", addr)
	}
}

// snapshot lists links, and rules through the nft command where there is one, of a host.
func (h *host) snapshot() string {
	h.t.Helper()
	links, err := h.nl.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		h.t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Type()+" "+l.Attrs().Name)
	}
	slices.Sort(names)
	var forward []byte
	must(h.t, h.do(func() (err error) { forward, err = os.ReadFile("/proc/sys/net/ipv4/ip_forward"); return err }))
	return strings.Join(names, "\n") + "\ntables " + strings.Join(h.tables(), " ") + "\nip_forward " + string(forward)
}
