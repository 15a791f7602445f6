package network_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/network"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func jsonRaw(s string) json.RawMessage { return json.RawMessage(s) }

func netlinkUnmount(path string) error { return unix.Unmount(path, unix.MNT_DETACH) }

// insideNamespaces looks around in a sandbox's namespaces.
func insideNamespaces(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := onThread(nil, func() error {
		for name, flag := range map[string]int{"net": unix.CLONE_NEWNET, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS} {
			f, err := os.Open(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			err = unix.Setns(int(f.Fd()), flag)
			f.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return err
		}
		got["hostname"] = unix.ByteSliceToString(u.Nodename[:])
		got["domainname"] = unix.ByteSliceToString(u.Domainname[:])
		for key, path := range map[string]string{"ip_forward": "net/ipv4/ip_forward", "shmmni": "kernel/shmmni", "unprivileged": "net/ipv4/ip_unprivileged_port_start"} {
			b, err := os.ReadFile("/proc/sys/" + path)
			if err != nil {
				return err
			}
			got[key] = strings.TrimSpace(string(b))
		}
		lo, err := net.InterfaceByName("lo")
		if err == nil && lo.Flags&net.FlagUp != 0 {
			got["lo"] = "up"
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestCreate(t *testing.T) {
	ctx := context.Background()
	berth := newInstance(t, newHost(t))
	subnet := func(s string) []network.Subnet { return []network.Subnet{{Prefix: netip.MustParsePrefix(s)}} }
	n, err := berth.Create(ctx, network.Config{Name: "app", Subnets: subnet("10.201.0.0/16"), Labels: map[string]string{"a": "b"}})
	must(t, err)
	if len(n.ID) != 64 || len(n.Bridge) > 15 || n.Config.Subnets[0].Gateway.String() != "10.201.0.1" || n.Config.Driver != "bridge" {
		t.Errorf("created %+v", n)
	}
	_, err = berth.Create(ctx, network.Config{Name: "named", Options: map[string]string{network.OptionBridgeName: "mybr"}})
	must(t, err)
	opt := func(k, v string) map[string]string { return map[string]string{k: v} }
	tests := []struct {
		name string
		c    network.Config
		kind error
		text string
	}{
		{"twice", network.Config{Name: "app"}, errdefs.ErrConflict, "network with name app already exists"},
		{"overlap", network.Config{Name: "x", Subnets: subnet("10.201.4.0/24")}, errdefs.ErrForbidden, "Pool overlaps with other one on this address space"},
		{"bridge", network.Config{Name: "x", Options: opt(network.OptionBridgeName, "mybr")}, errdefs.ErrConflict, "same bridge name"},
		{"no name", network.Config{}, errdefs.ErrInvalid, "invalid network name"},
		{"bad name", network.Config{Name: "a b"}, errdefs.ErrInvalid, "invalid network name"},
		{"predefined", network.Config{Name: "host"}, errdefs.ErrForbidden, "operation is not permitted on predefined host network"},
		{"driver", network.Config{Name: "x", Driver: "overlay"}, errdefs.ErrUnsupported, "overlay"},
		{"host driver", network.Config{Name: "x", Driver: "host"}, errdefs.ErrForbidden, "only one instance of"},
		{"option", network.Config{Name: "x", Options: opt("com.example.magic", "1")}, errdefs.ErrUnsupported, "com.example.magic"},
		{"mtu", network.Config{Name: "x", Options: opt(network.OptionMTU, "12")}, errdefs.ErrInvalid, "mtu"},
		{"long bridge", network.Config{Name: "x", Options: opt(network.OptionBridgeName, "0123456789abcdef")}, errdefs.ErrInvalid, "interface"},
		{"somebody's interface", network.Config{Name: "x", Options: opt(network.OptionBridgeName, "lo")}, errdefs.ErrConflict, "an interface lo already that is not its bridge"},
		{"every interface", network.Config{Name: "x", Options: opt(network.OptionBridgeName, "all")}, errdefs.ErrInvalid, "every interface"},
		{"bridge pattern", network.Config{Name: "x", Options: opt(network.OptionBridgeName, "br%d")}, errdefs.ErrInvalid, "interface"},
		{"host bits", network.Config{Name: "x", Subnets: subnet("10.202.0.1/16")}, errdefs.ErrInvalid, "it should be 10.202.0.0/16"},
		{"IPv6", network.Config{Name: "x", Subnets: subnet("fd00::/64")}, errdefs.ErrUnsupported, "IPv6"},
		{"tiny", network.Config{Name: "x", Subnets: subnet("10.202.0.0/31")}, errdefs.ErrInvalid, "length"},
		{"loopback", network.Config{Name: "x", Subnets: subnet("127.0.0.0/24")}, errdefs.ErrInvalid, "not for hosts"},
		{"two", network.Config{Name: "x", Subnets: append(subnet("10.202.0.0/16"), subnet("10.203.0.0/16")...)}, errdefs.ErrUnsupported, "one IPv4 subnet"},
		{"gateway", network.Config{Name: "x", Subnets: []network.Subnet{{Prefix: netip.MustParsePrefix("10.202.0.0/16"), Gateway: netip.MustParseAddr("10.3.0.1")}}}, errdefs.ErrInvalid, "gateway"},
		{"gateway alone", network.Config{Name: "x", Subnets: []network.Subnet{{Gateway: netip.MustParseAddr("10.3.0.1")}}}, errdefs.ErrInvalid, "needs a subnet"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := berth.Create(ctx, tt.c)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %q", err, tt.text)
			}
		})
	}
	for _, name := range []string{"bridge", "host", "none"} {
		if err := berth.Remove(ctx, name); !errors.Is(err, errdefs.ErrForbidden) || err.Error() != name+" is a pre-defined network and cannot be removed" {
			t.Errorf("remove %s: %v", name, err)
		}
	}
	must(t, berth.Remove(ctx, "app"))
	if _, err := berth.Get("app"); !errors.Is(err, errdefs.ErrNotFound) || err.Error() != "network app not found" {
		t.Errorf("get what is removed: %v", err)
	}
	if got := len(berth.List()); got != 4 {
		t.Errorf("%d networks, want 4", got)
	}
	berth.crash()
	if got := len(berth.List()); got != 4 {
		t.Errorf("%d networks after a restart, want 4", got)
	}
}

// TestConcurrent has many sandboxes come and go on several networks at once.
func TestConcurrent(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	before := h.snapshot()
	berth := newInstance(t, h)
	names := []string{network.DefaultNetwork, "n1", "n2"}
	for _, n := range names[1:] {
		_, err := berth.Create(ctx, network.Config{Name: n})
		must(t, err)
	}
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			id := sandboxID(i)
			for round := range 2 {
				if err := berth.NewNamespaces(id, "h", "", network.NS{Net: true}, nil); err != nil {
					t.Error(err)
					return
				}
				for k := range 2 {
					ep, err := berth.Attach(ctx, network.AttachRequest{Sandbox: id, NetNS: berth.NetNS(id), Network: names[(i+k)%3], Gateway: k == 0})
					if err != nil {
						t.Error(err)
						return
					}
					if k == 0 {
						if _, err := berth.Publish(ctx, id, ep.Address.Addr(), []network.Port{port("tcp", "", 0, 80), port("tcp", "", uint16(20000+i), 80)}); err != nil {
							t.Error(err)
						}
					}
				}
				if round == 0 && i%5 == 0 {
					if err := berth.Repair(ctx); err != nil {
						t.Error(err)
					}
				}
				if err := errors.Join(berth.Release(ctx, id), berth.RemoveNamespaces(id)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	must(t, berth.Teardown(ctx))
	berth.Close()
	if left, _ := os.ReadDir(filepath.Join(berth.root.Run, "ns")); len(left) > 0 {
		t.Errorf("namespaces left: %v", left)
	}
	if after := h.snapshot(); after != before {
		t.Errorf("left behind:\n%s", after)
	}
}

// BenchmarkSandbox times the steps of a sandbox's life: first many are made, then all removed,
// because the kernel's slow end of a namespace would otherwise stand in the way of the next.
func BenchmarkSandbox(b *testing.B) {
	ctx := context.Background()
	berth := newInstance(b, newHost(b))
	berth.sandbox(0, network.DefaultNetwork)
	number := 0
	id := func() string { return sandboxID(number) }
	times := stepTimes{}
	for b.Loop() {
		number++
		times.run(b, "1-namespaces", func() error {
			return berth.NewNamespaces(id(), "h", "", network.NS{Net: true, IPC: true, UTS: true}, nil)
		})
		times.run(b, "2-attach", func() error {
			_, err := berth.Attach(ctx, network.AttachRequest{Sandbox: id(), NetNS: berth.NetNS(id()), Network: network.DefaultNetwork, Gateway: true})
			return err
		})
		times.run(b, "3-publish", func() error {
			_, err := berth.Publish(ctx, id(), berth.SandboxEndpoints(id())[0].Address.Addr(), []network.Port{port("tcp", "", uint16(1000+number), 80)})
			return err
		})
		times.run(b, "4-resolver", func() error {
			u, l, err := berth.OpenResolver(id(), berth.NetNS(id()))
			if err == nil {
				u.Close()
				l.Close()
			}
			return err
		})
	}
	for ; number > 0; number-- {
		times.run(b, "5-release", func() error { return berth.Release(ctx, id()) })
		times.run(b, "6-remove", func() error { return berth.RemoveNamespaces(id()) })
	}
	times.report(b)
	must(b, berth.Teardown(ctx))
}
