package network

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
)

// The node's address plan: one /16 per instance, its first /18 for the default network, /22s
// of the rest for the networks that users make without naming a subnet.
const (
	planBits    = 16
	defaultBits = 18
	networkBits = 22
)

// planOrder returns every /16 that an instance may use, best first. The order depends on the
// instance, so that several on one machine rarely want the same; whether one is free is checked
// against the host when it is used.
func planOrder(instance string) []netip.Prefix {
	sum := sha256.Sum256([]byte(instance))
	start := binary.BigEndian.Uint32(sum[:4])
	const tens, privates = 64, 16 // 10.64.0.0/10 and 172.16.0.0/12
	order := make([]netip.Prefix, 0, tens+privates+1)
	for i := range uint32(tens) {
		order = append(order, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + (start+i)%tens), 0, 0}), planBits))
	}
	for i := range uint32(privates) {
		order = append(order, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(16 + (start+i)%privates), 0, 0}), planBits))
	}
	return append(order, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, 0, 0}), planBits))
}

// chooseBase returns the first /16 of the order that overlaps nothing taken.
func chooseBase(order, taken []netip.Prefix) (netip.Prefix, bool) {
	for _, p := range order {
		if !overlapsAny(p, taken) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// chooseSubnet returns a free /22, first from base, then from the others of the order.
func chooseSubnet(base netip.Prefix, order, taken []netip.Prefix) (netip.Prefix, bool) {
	for _, b := range append([]netip.Prefix{base}, order...) {
		first, last := bounds(b)
		step := uint32(1) << (32 - networkBits)
		// The first /18 belongs to the default network.
		for n := first + 1<<(32-defaultBits); n < last && n > first; n += step {
			p := netip.PrefixFrom(toAddr(n), networkBits)
			if !overlapsAny(p, taken) {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// defaultSubnet is the default network's part of a /16.
func defaultSubnet(base netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(base.Addr(), defaultBits)
}

func overlapsAny(p netip.Prefix, taken []netip.Prefix) bool {
	for _, t := range taken {
		if p.Overlaps(t) {
			return true
		}
	}
	return false
}
