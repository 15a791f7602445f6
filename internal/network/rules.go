package network

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The instance's rules are one table whose chains never change; all that changes are elements
// of its sets and maps, so that an update costs what the change costs and a packet one lookup.
//
//	chain guard        filter, prerouting, before connection tracking
//	    iifname @bridges ip daddr 127.0.0.0/8 drop
//	chain prerouting   nat              fib daddr type local jump publish
//	chain output       nat              fib daddr type local jump publish
//	chain publish
//	    dnat to ip daddr . meta l4proto . th dport map @ports_at
//	    dnat to meta l4proto . th dport map @ports
//	chain postrouting  nat
//	    oifname lo return
//	    iifname @masquerade oifname != @bridges masquerade
//	    ip saddr 127.0.0.0/8 oifname @bridges masquerade
//	    ct status dnat oifname . ip saddr @hairpin masquerade
//	chain forward      filter           iifname @bridges goto leaving; oifname @bridges goto entering
//	chain leaving
//	    ct state established,related accept
//	    iifname . oifname @same accept
//	    iifname @internal drop
//	    oifname @internal drop
//	    ct status dnat accept
//	    oifname @bridges drop
//	    accept
//	chain entering
//	    ct state established,related accept
//	    oifname @internal drop
//	    ct status dnat accept
//	    drop
//
// An accept ends these chains only: the host's own rules still judge the packet.

// Names of sets and maps.
const (
	setBridges    = "bridges"    // interface
	setMasquerade = "masquerade" // interface of a network that hides behind the host
	setInternal   = "internal"   // interface of a network without a way out
	setSame       = "same"       // interface . interface: traffic within a network
	setHairpin    = "hairpin"    // interface . subnet: a network and its own addresses
	setPorts      = "ports"      // protocol . port : address . port
	setPortsAt    = "ports_at"   // host address . protocol . port : address . port
	layoutPrefix  = "layout_"    // an empty set whose name tells which rules these are
)

// Registers: the four of 16 bytes are also reachable as sixteen of 4 bytes.
const (
	reg1    = unix.NFT_REG_1
	reg2    = unix.NFT_REG_2
	word1   = unix.NFT_REG32_01 // the second 4 bytes of reg1
	word2   = unix.NFT_REG32_02
	ctNAT   = 0x20 // IPS_DST_NAT: the destination was translated
	nameLen = unix.IFNAMSIZ
)

// ruleset is what the kernel is to hold: a pure function of networks and ports.
type ruleset struct {
	bridges []bridgeRule
	ports   []*publishedPort
}

// bridgeRule is what the rules must know of a network.
type bridgeRule struct {
	name       string
	subnet     netip.Prefix
	masquerade bool
	icc        bool
	internal   bool
}

type chainRules struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

func newTable(name string) *nftables.Table {
	return &nftables.Table{Name: name, Family: nftables.TableFamilyIPv4}
}

// sets describes the table's sets, without elements.
func sets(t *nftables.Table) map[string]*nftables.Set {
	pair := func(types ...nftables.SetDatatype) nftables.SetDatatype { return nftables.MustConcatSetType(types...) }
	target := pair(nftables.TypeIPAddr, nftables.TypeInetService)
	list := []*nftables.Set{
		{Name: setBridges, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		{Name: setMasquerade, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		{Name: setInternal, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		{Name: setSame, KeyType: pair(nftables.TypeIFName, nftables.TypeIFName), Concatenation: true, KeyByteOrder: binaryutil.NativeEndian},
		{Name: setHairpin, KeyType: pair(nftables.TypeIFName, nftables.TypeIPAddr), Concatenation: true, Interval: true},
		{Name: setPorts, KeyType: pair(nftables.TypeInetProto, nftables.TypeInetService), Concatenation: true, IsMap: true, DataType: target},
		{Name: setPortsAt, KeyType: pair(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService), Concatenation: true, IsMap: true, DataType: target},
	}
	m := make(map[string]*nftables.Set, len(list))
	for _, s := range list {
		s.Table = t
		m[s.Name] = s
	}
	return m
}

// chains returns the table's chains with their rules, in the order to add them.
func chains(t *nftables.Table) []chainRules {
	base := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return &nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: prio}
	}
	toLocal := [][]expr.Any{{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		verdict(expr.VerdictJump, "publish"),
	}}
	return []chainRules{
		// Chains that are jumped to come first.
		{&nftables.Chain{Name: "publish", Table: t}, publishRules()},
		{&nftables.Chain{Name: "leaving", Table: t}, leavingRules()},
		{&nftables.Chain{Name: "entering", Table: t}, enteringRules()},
		{base("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw), [][]expr.Any{
			rule(inSet(expr.MetaKeyIIFNAME, setBridges, false), loopback(daddr), drop()),
		}},
		{base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), toLocal},
		{base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest), toLocal},
		{base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), postroutingRules()},
		{base("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter), [][]expr.Any{
			rule(inSet(expr.MetaKeyIIFNAME, setBridges, false), []expr.Any{verdict(expr.VerdictGoto, "leaving")}),
			rule(inSet(expr.MetaKeyOIFNAME, setBridges, false), []expr.Any{verdict(expr.VerdictGoto, "entering")}),
		}},
	}
}

func publishRules() [][]expr.Any {
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg1, RegProtoMin: word1}
	return [][]expr.Any{
		{
			payload(daddr, reg1), &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: word1}, dport(word2),
			&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: setPortsAt}, nat,
		},
		{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, dport(word1),
			&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: setPorts}, nat,
		},
	}
}

func postroutingRules() [][]expr.Any {
	masquerade := []expr.Any{&expr.Masq{}}
	return [][]expr.Any{
		{
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: ifname("lo")},
			verdict(expr.VerdictReturn, ""),
		},
		rule(inSet(expr.MetaKeyIIFNAME, setMasquerade, false), inSet(expr.MetaKeyOIFNAME, setBridges, true), masquerade),
		rule(loopback(saddr), inSet(expr.MetaKeyOIFNAME, setBridges, false), masquerade),
		rule(destinationTranslated(), []expr.Any{
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, payload(saddr, reg2),
			&expr.Lookup{SourceRegister: reg1, SetName: setHairpin},
		}, masquerade),
	}
}

func leavingRules() [][]expr.Any {
	return [][]expr.Any{
		rule(established(), accept()),
		rule([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg2},
			&expr.Lookup{SourceRegister: reg1, SetName: setSame},
		}, accept()),
		rule(inSet(expr.MetaKeyIIFNAME, setInternal, false), drop()),
		rule(inSet(expr.MetaKeyOIFNAME, setInternal, false), drop()),
		rule(destinationTranslated(), accept()),
		rule(inSet(expr.MetaKeyOIFNAME, setBridges, false), drop()),
		accept(),
	}
}

func enteringRules() [][]expr.Any {
	return [][]expr.Any{
		rule(established(), accept()),
		rule(inSet(expr.MetaKeyOIFNAME, setInternal, false), drop()),
		rule(destinationTranslated(), accept()),
		drop(),
	}
}

// Offsets of addresses in the IPv4 header.
const (
	saddr = 12
	daddr = 16
)

func rule(parts ...[]expr.Any) []expr.Any {
	var r []expr.Any
	for _, p := range parts {
		r = append(r, p...)
	}
	return r
}

func verdict(kind expr.VerdictKind, chain string) expr.Any {
	return &expr.Verdict{Kind: kind, Chain: chain}
}

func accept() []expr.Any { return []expr.Any{verdict(expr.VerdictAccept, "")} }
func drop() []expr.Any   { return []expr.Any{verdict(expr.VerdictDrop, "")} }

func payload(offset, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}
}

func dport(register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

func inSet(key expr.MetaKey, set string, invert bool) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: reg1}, &expr.Lookup{SourceRegister: reg1, SetName: set, Invert: invert}}
}

func loopback(offset uint32) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{127}},
	}
}

func established() []expr.Any {
	return ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

func destinationTranslated() []expr.Any { return ctBits(expr.CtKeySTATUS, ctNAT) }

func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: make([]byte, 4)},
	}
}

// layout names the rules: any change of them gives another name.
func layout(t *nftables.Table) (string, error) {
	h := sha256.New()
	for _, c := range chains(t) {
		h.Write([]byte(c.chain.Name))
		for _, r := range c.rules {
			for _, e := range r {
				b, err := expr.Marshal(byte(t.Family), e)
				if err != nil {
					return "", err
				}
				h.Write(b)
			}
		}
	}
	return layoutPrefix + hex.EncodeToString(h.Sum(nil)[:6]), nil
}

// elements are the members of all sets.
func (r ruleset) elements() map[string][]nftables.SetElement {
	m := map[string][]nftables.SetElement{}
	for _, b := range r.bridges {
		for set, el := range b.elements() {
			m[set] = append(m[set], el)
		}
	}
	for _, p := range r.ports {
		set, el := p.element()
		m[set] = append(m[set], el)
	}
	return m
}

// elements are a network's members of the sets, at most one in each.
func (b bridgeRule) elements() map[string]nftables.SetElement {
	name := ifname(b.name)
	first, last := bounds(b.subnet)
	m := map[string]nftables.SetElement{
		setBridges: {Key: name},
		setHairpin: {Key: append(ifname(b.name), be32(first)...), KeyEnd: append(ifname(b.name), be32(last)...)},
	}
	if b.internal {
		m[setInternal] = nftables.SetElement{Key: name}
	} else if b.masquerade {
		m[setMasquerade] = nftables.SetElement{Key: name}
	}
	if b.icc {
		m[setSame] = nftables.SetElement{Key: append(ifname(b.name), name...)}
	}
	return m
}

// element is a published port's member, and the map it belongs to.
func (p *publishedPort) element() (string, nftables.SetElement) {
	proto := []byte{byte(protocolNumber(p.Protocol)), 0, 0, 0}
	port := func(n uint16) []byte { return []byte{byte(n >> 8), byte(n), 0, 0} }
	el := nftables.SetElement{Key: append(proto, port(p.HostPort)...), Val: append(p.Addr.AsSlice(), port(p.Port.Port)...)}
	if p.any() {
		return setPorts, el
	}
	el.Key = append(p.HostIP.AsSlice(), el.Key...)
	return setPortsAt, el
}

func ifname(s string) []byte {
	b := make([]byte, nameLen)
	copy(b, s)
	return b
}

func be32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
