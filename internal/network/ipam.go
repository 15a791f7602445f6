package network

import (
	"encoding/binary"
	"net/netip"

	"berth/internal/errdefs"
)

// pool hands out the addresses of one subnet. It is next-fit: an address that was given back
// is the last to be handed out again, so that stale caches elsewhere have time to forget it.
// A pool is not safe for concurrent use.
type pool struct {
	subnet      netip.Prefix
	first, last uint32 // of the range that automatic addresses come from
	next        uint32
	used        map[uint32]struct{}
	reserved    map[uint32]struct{} // gateway, aux, network and broadcast address
}

// newPool returns the pool of a subnet whose fields are all filled in.
func newPool(s Subnet) *pool {
	p := &pool{subnet: s.Prefix, used: map[uint32]struct{}{}, reserved: map[uint32]struct{}{}}
	r := s.Range
	if !r.IsValid() {
		r = s.Prefix
	}
	p.first, p.last = bounds(r)
	p.next = p.first
	low, high := bounds(s.Prefix)
	p.reserved[low], p.reserved[high] = struct{}{}, struct{}{}
	p.reserved[toUint(s.Gateway)] = struct{}{}
	for _, a := range s.Aux {
		p.reserved[toUint(a)] = struct{}{}
	}
	return p
}

// take returns a free address of the range. ErrExhausted when there is none.
func (p *pool) take() (netip.Addr, error) {
	size := uint64(p.last) - uint64(p.first) + 1
	// Each step that does not end the search meets a used or reserved address.
	for range min(size, uint64(len(p.used)+len(p.reserved)+1)) {
		n := p.next
		if n == p.last {
			p.next = p.first
		} else {
			p.next++
		}
		if !p.taken(n) {
			p.used[n] = struct{}{}
			return toAddr(n), nil
		}
	}
	return netip.Addr{}, errdefs.New(errdefs.ErrExhausted, "no available IPv4 addresses on this network's address pools")
}

// claim takes the given address.
func (p *pool) claim(a netip.Addr) error {
	if !a.Is4() || !p.subnet.Contains(a) {
		return errdefs.New(errdefs.ErrInvalid, "Invalid address %s: It does not belong to any of this network's subnets", a)
	}
	n := toUint(a)
	if p.taken(n) {
		return errdefs.New(errdefs.ErrConflict, "Address already in use")
	}
	p.used[n] = struct{}{}
	return nil
}

// resume makes take go on behind the highest address in use, after the records of an earlier
// process were claimed again.
func (p *pool) resume() {
	for n := range p.used {
		if n >= p.next && n < p.last {
			p.next = n + 1
		}
	}
}

// release gives an address back. One that is not in use is ignored.
func (p *pool) release(a netip.Addr) {
	if a.Is4() {
		delete(p.used, toUint(a))
	}
}

func (p *pool) taken(n uint32) bool {
	if _, ok := p.used[n]; ok {
		return true
	}
	_, ok := p.reserved[n]
	return ok
}

// bounds returns the first and the last address of an IPv4 prefix.
func bounds(p netip.Prefix) (first, last uint32) {
	first = toUint(p.Masked().Addr())
	return first, first | uint32(uint64(1)<<(32-p.Bits())-1)
}

func toUint(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func toAddr(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n)))
}
