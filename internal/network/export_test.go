package network

import "net/netip"

// Pool gives tests the address allocator, and Plan the address plan, both pure.
type Pool struct{ p *pool }

func NewPool(s Subnet) (Pool, error) {
	if err := checkSubnet(&s); err != nil {
		return Pool{}, err
	}
	return Pool{newPool(s)}, nil
}

func (p Pool) Take() (netip.Addr, error)   { return p.p.take() }
func (p Pool) Claim(a netip.Addr) error    { return p.p.claim(a) }
func (p Pool) Release(a netip.Addr)        { p.p.release(a) }
func PlanOrder(seed string) []netip.Prefix { return planOrder(seed) }

func ChooseSubnet(base netip.Prefix, order, taken []netip.Prefix) (netip.Prefix, bool) {
	return chooseSubnet(base, order, taken)
}

func ChooseBase(order, taken []netip.Prefix) (netip.Prefix, bool) { return chooseBase(order, taken) }
