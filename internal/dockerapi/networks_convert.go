package dockerapi

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	networktypes "github.com/moby/moby/api/types/network"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/network"
)

// API versions at which the shape of networks changed.
const (
	versionEnableIPv4    = 48
	versionNetworkStatus = 52
)

// scopeLocal is the only scope of Berth's docker networks.
const scopeLocal = "local"

// predefinedNetwork tells whether name is one that docker has from the start.
func predefinedNetwork(name string) bool {
	return name == network.DefaultNetwork || name == "host" || name == "none"
}

// networkCreateRequest is docker's NetworkCreateRequest with addresses as text, so that a bad
// one is refused in docker's words and not in the JSON decoder's.
type networkCreateRequest struct {
	Name       string
	Driver     string
	Scope      string
	EnableIPv4 *bool
	EnableIPv6 *bool
	IPAM       *ipamRequest
	Internal   bool
	Attachable bool
	Ingress    bool
	ConfigOnly bool
	ConfigFrom *networktypes.ConfigReference
	Options    map[string]string
	Labels     map[string]string
}

type ipamRequest struct {
	Driver  string
	Options map[string]string
	Config  []ipamPool
}

type ipamPool struct {
	Subnet             string
	IPRange            string
	Gateway            string
	AuxiliaryAddresses map[string]string
}

// config translates a request to create a network. What Berth lacks is refused by name.
func (q networkCreateRequest) config() (network.Config, error) {
	if err := q.check(); err != nil {
		return network.Config{}, err
	}
	c := network.Config{
		Name: q.Name, Driver: cmp.Or(q.Driver, network.DriverBridge), Internal: q.Internal,
		Labels: q.Labels, Options: q.Options,
	}
	if q.IPAM == nil {
		return c, nil
	}
	if q.IPAM.Driver != "" && q.IPAM.Driver != "default" {
		return c, unsupported("IPAM driver %q is not supported by Berth; use the default driver", q.IPAM.Driver)
	}
	if len(q.IPAM.Options) > 0 {
		return c, unsupported("IPAM option %q is not supported by Berth; leave it out", slices.Min(slices.Collect(maps.Keys(q.IPAM.Options))))
	}
	for _, pool := range q.IPAM.Config {
		subnet, err := pool.subnet()
		if err != nil {
			return c, err
		}
		c.Subnets = append(c.Subnets, subnet)
	}
	return c, nil
}

func (q networkCreateRequest) check() error {
	switch {
	case strings.TrimSpace(q.Name) == "":
		return invalid("invalid name: name is empty")
	case predefinedNetwork(q.Name):
		return errdefs.New(errdefs.ErrForbidden, "operation is not permitted on predefined %s network", q.Name)
	case q.EnableIPv6 != nil && *q.EnableIPv6:
		return unsupported("IPv6 networks (EnableIPv6) are not supported by Berth")
	case q.EnableIPv4 != nil && !*q.EnableIPv4:
		return unsupported("networks without IPv4 (EnableIPv4 false) are not supported by Berth")
	case q.Ingress:
		return unsupported("ingress networks (Ingress) are not supported by Berth")
	case q.Attachable:
		return unsupported("attachable networks (Attachable) are not supported by Berth: they belong to swarm")
	case q.ConfigOnly:
		return unsupported("config-only networks (ConfigOnly) are not supported by Berth")
	case q.ConfigFrom != nil && q.ConfigFrom.Network != "":
		return unsupported("networks configured from another (ConfigFrom) are not supported by Berth")
	case q.Scope != "" && q.Scope != scopeLocal:
		return unsupported("network scope %q is not supported by Berth; use local", q.Scope)
	}
	switch q.Driver {
	case "", network.DriverBridge:
		return nil
	case network.DriverHost, network.DriverNull:
		return errdefs.New(errdefs.ErrForbidden, "only one instance of %q network is allowed", q.Driver)
	case "overlay":
		return errdefs.New(errdefs.ErrForbidden, "network driver \"overlay\" needs a swarm, and this node is not a swarm manager; use the bridge driver")
	case "macvlan", "ipvlan":
		return unsupported("network driver %q is not supported by Berth; use the bridge driver", q.Driver)
	}
	return notFound("could not find plugin %s in v1 plugin registry: plugin %q not found", q.Driver, q.Driver)
}

// subnet checks one address pool as docker does.
func (p ipamPool) subnet() (network.Subnet, error) {
	if p.Subnet == "" {
		if p.IPRange != "" || p.Gateway != "" || len(p.AuxiliaryAddresses) > 0 {
			return network.Subnet{}, invalid("invalid network config: a gateway, an ip-range or an auxiliary address needs a subnet")
		}
		return network.Subnet{}, invalid("invalid subnet : invalid CIDR block notation")
	}
	prefix, err := netip.ParsePrefix(p.Subnet)
	switch {
	case err != nil:
		return network.Subnet{}, invalid("invalid subnet %s: invalid CIDR block notation", p.Subnet)
	case prefix.Addr().Is6():
		return network.Subnet{}, unsupported("IPv6 subnet %s: IPv6 networks are not supported by Berth", p.Subnet)
	case prefix != prefix.Masked():
		return network.Subnet{}, invalid("invalid subnet %s: it should be %s", prefix, prefix.Masked())
	}
	out := network.Subnet{Prefix: prefix}
	if p.IPRange != "" {
		r, err := netip.ParsePrefix(p.IPRange)
		switch {
		case err != nil:
			return out, invalid("invalid ip-range %s: invalid CIDR block notation", p.IPRange)
		case r.Addr().Is6():
			return out, invalid("invalid ip-range %s: parent subnet is an IPv4 block", p.IPRange)
		case r.Bits() < prefix.Bits():
			return out, invalid("invalid ip-range %s: CIDR block is bigger than its parent subnet %s", p.IPRange, prefix)
		case r != r.Masked():
			return out, invalid("invalid ip-range %s: it should be %s", r, r.Masked())
		case !prefix.Overlaps(r):
			return out, invalid("invalid ip-range %s: parent subnet %s doesn't contain ip-range", p.IPRange, prefix)
		}
		out.Range = r
	}
	if p.Gateway != "" {
		if out.Gateway, err = poolAddress(p.Gateway, prefix); err != nil {
			return out, invalid("invalid gateway %s: %w", p.Gateway, err)
		}
	}
	for name, text := range p.AuxiliaryAddresses {
		addr, err := poolAddress(text, prefix)
		if err != nil {
			return out, invalid("invalid auxiliary address %s: %w", name, err)
		}
		if out.Aux == nil {
			out.Aux = map[string]netip.Addr{}
		}
		out.Aux[name] = addr
	}
	return out, nil
}

func poolAddress(text string, subnet netip.Prefix) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return addr, invalid("invalid address")
	case addr.Is6():
		return addr, invalid("parent subnet is an IPv4 block")
	case !subnet.Contains(addr):
		return addr, invalid("parent subnet %s doesn't contain this address", subnet)
	}
	return addr, nil
}

// networkEndpointID is the stable ID that docker clients see for a container's place on a
// network: 64 hexadecimal digits. Berth's endpoints have none of their own.
func networkEndpointID(sandboxID, networkID string) string {
	sum := sha256.Sum256([]byte(sandboxID + "/" + networkID))
	return hex.EncodeToString(sum[:])
}

// attachment is one endpoint with the container that docker shows for it.
type attachment struct {
	id       string // of the container
	name     string
	endpoint network.Endpoint
}

// attachments joins endpoints with the containers in their sandboxes. A shared sandbox is shown
// as the container that made it, else as its oldest.
func attachments(endpoints []network.Endpoint, containers []engine.Container) []attachment {
	owner := map[string]engine.Container{}
	for _, c := range containers {
		have, ok := owner[c.Config.Sandbox]
		own := c.Config.ID == c.Config.Sandbox
		if !ok || own || have.Config.ID != have.Config.Sandbox && c.State.Created.Before(have.State.Created) {
			owner[c.Config.Sandbox] = c
		}
	}
	out := make([]attachment, 0, len(endpoints))
	for _, ep := range endpoints {
		a := attachment{id: "ep-" + networkEndpointID(ep.Sandbox, ep.NetworkID), endpoint: ep}
		if c, ok := owner[ep.Sandbox]; ok {
			a.id, a.name = c.Config.ID, c.Config.Name
		}
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b attachment) int { return cmp.Compare(a.id, b.id) })
	return out
}

// networkSummary is a network as GET /networks lists it.
func networkSummary(n network.Network) networktypes.Network {
	c := n.Config
	out := networktypes.Network{
		Name: c.Name, ID: n.ID, Created: n.Created, Scope: scopeLocal, Driver: c.Driver,
		EnableIPv4: true, Internal: c.Internal,
		IPAM:    networktypes.IPAM{Driver: "default", Config: []networktypes.IPAMConfig{}},
		Options: orEmpty(c.Options), Labels: orEmpty(c.Labels),
	}
	for _, s := range c.Subnets {
		out.IPAM.Config = append(out.IPAM.Config, networktypes.IPAMConfig{
			Subnet: s.Prefix, Gateway: s.Gateway, IPRange: s.Range, AuxAddress: s.Aux,
		})
	}
	return out
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// networkInspect is a network as GET /networks/{id} shows it.
func networkInspect(n network.Network, attached []attachment, minor int) networktypes.Inspect {
	out := networktypes.Inspect{Network: networkSummary(n), Containers: map[string]networktypes.EndpointResource{}}
	for _, a := range attached {
		hardware, _ := net.ParseMAC(a.endpoint.MAC) // what the kernel has is a hardware address
		out.Containers[a.id] = networktypes.EndpointResource{
			Name: a.name, EndpointID: networkEndpointID(a.endpoint.Sandbox, n.ID),
			MacAddress: networktypes.HardwareAddr(hardware), IPv4Address: a.endpoint.Address,
		}
	}
	if minor >= versionNetworkStatus {
		out.Status = networkStatus(n, attached)
	}
	return out
}

// networkStatus counts the addresses of each subnet. The network's own address, the broadcast
// address and the gateway are in use, as docker counts.
func networkStatus(n network.Network, attached []attachment) *networktypes.Status {
	if len(n.Config.Subnets) == 0 {
		return nil
	}
	status := &networktypes.Status{IPAM: networktypes.IPAMStatus{Subnets: networktypes.SubnetStatuses{}}}
	for _, s := range n.Config.Subnets {
		used := uint64(2 + len(s.Aux))
		if s.Gateway.IsValid() {
			used++
		}
		for _, a := range attached {
			if s.Prefix.Contains(a.endpoint.Address.Addr()) {
				used++
			}
		}
		pool := s.Prefix
		if s.Range.IsValid() {
			pool = s.Range
		}
		size := uint64(1) << (32 - pool.Bits())
		status.IPAM.Subnets[s.Prefix] = networktypes.SubnetStatus{IPsInUse: used, DynamicIPsAvailable: size - min(used, size)}
	}
	return status
}

// networkListFilters are the keys that docker knows for GET /networks.
func networkListFilters() []string {
	return []string{"dangling", "driver", "id", "label", "name", "scope", "type"}
}

// networkFilter decides which networks a list shows.
type networkFilter struct {
	filters  filters
	dangling *bool
}

func newNetworkFilter(f filters) (networkFilter, error) {
	out := networkFilter{filters: f}
	if values := f.get("dangling"); len(values) > 0 {
		if len(values) > 1 {
			return out, invalid(`got more than one value for filter key "dangling"`)
		}
		dangling, err := f.boolean("dangling", false)
		if err != nil {
			return out, invalid(`invalid value for filter 'dangling', must be "true" (or "1"), or "false" (or "0")`)
		}
		out.dangling = &dangling
	}
	for _, kind := range f.get("type") {
		if kind != "builtin" && kind != "custom" {
			return out, invalid("invalid filter: 'type'='%s'", kind)
		}
	}
	return out, nil
}

func (nf networkFilter) matches(n network.Network, inUse bool) bool {
	f, c := nf.filters, n.Config
	kind := "custom"
	if predefinedNetwork(c.Name) {
		kind = "builtin"
	}
	if nf.dangling != nil && *nf.dangling == (inUse || kind == "builtin") {
		return false
	}
	return f.exact("driver", c.Driver) && f.match("name", c.Name) && f.match("id", n.ID) &&
		f.exact("scope", scopeLocal) && f.exact("type", kind) && f.matchLabels(c.Labels)
}

// prunableNetwork tells whether a prune takes n: not predefined, unused, old enough, labelled right.
func prunableNetwork(n network.Network, inUse bool, f filters, until time.Time) bool {
	return !predefinedNetwork(n.Config.Name) && !inUse && (until.IsZero() || !n.Created.After(until)) &&
		f.matchLabels(n.Config.Labels)
}
