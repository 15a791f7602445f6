package network_test

import (
	"errors"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"berth/internal/errdefs"
	"berth/internal/network"
)

// TestPool: no address is out twice, all are of the range, none is reserved; the pool is
// exhausted exactly when every address is out.
func TestPool(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.IntRange(24, 30).Draw(t, "bits")
		subnet := network.Subnet{Prefix: netip.PrefixFrom(netip.MustParseAddr("10.1.2.0"), bits)}
		size := 1 << (32 - bits)
		if rapid.Bool().Draw(t, "aux") {
			subnet.Aux = map[string]netip.Addr{"x": netip.AddrFrom4([4]byte{10, 1, 2, byte(rapid.IntRange(2, size-2).Draw(t, "aux address"))})}
		}
		pool, err := network.NewPool(subnet)
		if err != nil {
			t.Fatal(err)
		}
		free := size - 3 - len(subnet.Aux) // network, gateway, broadcast
		gateway, last := netip.MustParseAddr("10.1.2.1"), netip.AddrFrom4([4]byte{10, 1, 2, byte(size - 1)})
		out := map[netip.Addr]bool{}
		var order []netip.Addr // out, oldest first
		check := func(a netip.Addr) {
			if out[a] || !subnet.Prefix.Contains(a) || a == gateway || a == last || a == subnet.Prefix.Addr() || a == subnet.Aux["x"] {
				t.Fatalf("handed out %v; out: %v", a, out)
			}
			out[a] = true
			order = append(order, a)
		}
		t.Repeat(map[string]func(*rapid.T){
			"take": func(t *rapid.T) {
				a, err := pool.Take()
				if len(out) == free {
					if !errors.Is(err, errdefs.ErrExhausted) {
						t.Fatalf("took %v, %v from an exhausted pool", a, err)
					}
					return
				}
				if err != nil {
					t.Fatalf("%d of %d are out: %v", len(out), free, err)
				}
				check(a)
			},
			"claim": func(t *rapid.T) {
				a := netip.AddrFrom4([4]byte{10, 1, 2, byte(rapid.IntRange(0, 255).Draw(t, "address"))})
				err := pool.Claim(a)
				switch {
				case !subnet.Prefix.Contains(a):
					if !errors.Is(err, errdefs.ErrInvalid) {
						t.Fatalf("claim %v: %v", a, err)
					}
				case out[a] || a == gateway || a == last || a == subnet.Prefix.Addr() || a == subnet.Aux["x"]:
					if !errors.Is(err, errdefs.ErrConflict) {
						t.Fatalf("claim %v: %v", a, err)
					}
				case err != nil:
					t.Fatalf("claim %v: %v", a, err)
				default:
					check(a)
				}
			},
			"release": func(t *rapid.T) {
				if len(order) == 0 {
					t.Skip("nothing is out")
				}
				i := rapid.IntRange(0, len(order)-1).Draw(t, "which")
				a := order[i]
				order = append(order[:i:i], order[i+1:]...)
				pool.Release(a)
				delete(out, a)
			},
		})
	})
}

func TestReleasedAddressComesLast(t *testing.T) {
	pool, err := network.NewPool(network.Subnet{Prefix: netip.MustParsePrefix("10.1.2.0/28")})
	must(t, err)
	first, err := pool.Take()
	must(t, err)
	pool.Release(first)
	for i := range 12 {
		if a, err := pool.Take(); err != nil || a == first {
			t.Fatalf("address %d: %v, %v", i, a, err)
		}
	}
	if a, err := pool.Take(); err != nil || a != first {
		t.Errorf("the last address: %v, %v; want %v", a, err, first)
	}
}

func TestPlan(t *testing.T) {
	order := network.PlanOrder("/var/lib/berth")
	if len(order) != 81 || order[0] == network.PlanOrder("/other")[0] && order[1] == network.PlanOrder("/third")[1] {
		t.Errorf("order of %d: %v…", len(order), order[:3])
	}
	base, ok := network.ChooseBase(order, []netip.Prefix{netip.PrefixFrom(order[0].Addr(), 24), order[1]})
	if !ok || base != order[2] {
		t.Errorf("base %v, want %v", base, order[2])
	}
	if base, ok := network.ChooseBase(order, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); !ok || base.Addr().As4()[0] != 172 {
		t.Errorf("base %v where 10.0.0.0/8 is in use", base)
	}
	// Subnets never overlap each other nor the default network's; a full /16 is followed by another.
	taken := []netip.Prefix{netip.PrefixFrom(order[0].Addr(), 18)}
	for i := range 120 {
		p, ok := network.ChooseSubnet(order[0], order, taken)
		if !ok {
			t.Fatalf("nothing is free after %d", i)
		}
		for _, other := range taken {
			if p.Overlaps(other) {
				t.Fatalf("%v overlaps %v", p, other)
			}
		}
		taken = append(taken, p)
	}
	for i, p := range taken[1:49] {
		if !order[0].Overlaps(p) {
			t.Fatalf("subnet %d is %v, outside of %v", i, p, order[0])
		}
	}
	if order[0].Overlaps(taken[49]) {
		t.Errorf("subnet 49 is %v", taken[49])
	}
}
