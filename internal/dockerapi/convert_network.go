package dockerapi

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	containertypes "github.com/moby/moby/api/types/container"
	networktypes "github.com/moby/moby/api/types/network"

	"berth/internal/engine"
	"berth/internal/network"
)

// hostGateway in an extra host stands for the node's address as containers see it.
const hostGateway = "host-gateway"

// maxEndpoints bounds the networks of one container.
const maxEndpoints = 64

// checkNetworkMode refuses settings that do not go with where the network comes from, in
// docker's words. user is the request before the image was merged in.
func checkNetworkMode(user *containertypes.Config, h *hostConfigRequest, macAddress string) error {
	mode := h.NetworkMode
	shared := mode.IsContainer()
	switch {
	case h.UTSMode.IsHost() && user.Hostname != "":
		return invalid("conflicting options: hostname and the UTS mode")
	case shared && mode.ConnectedContainer() == "":
		return invalid("Invalid network mode: invalid container format container:<name|id>")
	case shared && user.Hostname != "":
		return invalid("conflicting options: hostname and the network mode")
	case (shared || mode.IsHost()) && macAddress != "":
		return invalid("conflicting options: mac-address and the network mode")
	case shared && len(h.DNS) > 0:
		return invalid("conflicting options: dns and the network mode")
	case shared && len(h.ExtraHosts) > 0:
		return invalid("conflicting options: custom host-to-IP mapping and the network mode")
	case shared && (len(h.PortBindings) > 0 || h.PublishAllPorts):
		return invalid("conflicting options: port publishing and the container type network mode")
	case shared && len(user.ExposedPorts) > 0:
		return invalid("conflicting options: port exposing and the container type network mode")
	}
	for _, s := range []struct {
		name string
		set  bool
	}{
		// These belong to the sandbox, which is another container's.
		{"IpcMode private", h.IpcMode.IsPrivate()},
		{"UTSMode", h.UTSMode != ""},
		{"ShmSize", h.ShmSize != 0},
		{"CgroupParent", h.CgroupParent != ""},
	} {
		if shared && s.set {
			return unsupported("HostConfig.%s together with the network of another container is not supported by Berth: such containers share their IPC and UTS namespaces too", s.name)
		}
	}
	if mode.IsHost() {
		for name := range h.Sysctls {
			if strings.HasPrefix(name, "net.") {
				return invalid("sysctl '%s' not allowed in host network namespace", name)
			}
		}
	}
	return nil
}

// endpointSettings is what a request says about one network.
type endpointSettings struct {
	ref      string
	settings *networktypes.EndpointSettings
}

// wishedEndpoints orders the networks of a request: that of the network mode first, which
// carries the default route and the published ports, then the others by name.
func wishedEndpoints(mode containertypes.NetworkMode, n *networktypes.NetworkingConfig, same func(a, b string) bool) ([]endpointSettings, error) {
	first := endpointSettings{ref: string(mode)}
	var rest []endpointSettings
	if n != nil {
		for ref, settings := range n.EndpointsConfig {
			if ref == string(mode) || ref == networktypes.NetworkDefault && mode.IsBridge() || same(ref, string(mode)) {
				first.settings = settings
				continue
			}
			rest = append(rest, endpointSettings{ref, settings})
		}
	}
	slices.SortFunc(rest, func(a, b endpointSettings) int { return cmp.Compare(a.ref, b.ref) })
	all := append([]endpointSettings{first}, rest...)
	if len(all) > maxEndpoints {
		return nil, invalid("a container can be on at most %d networks", maxEndpoints)
	}
	return all, nil
}

// portsOf translates published ports.
func portsOf(h *hostConfigRequest, exposed networktypes.PortSet) ([]network.Port, error) {
	var out []network.Port
	for port, bindings := range h.PortBindings {
		if err := checkPort(port); err != nil {
			return nil, err
		}
		if len(bindings) == 0 {
			bindings = []networktypes.PortBinding{{}}
		}
		for _, b := range bindings {
			p := network.Port{Protocol: string(port.Proto()), HostIP: b.HostIP, Port: port.Num()}
			if b.HostPort != "" {
				if strings.Contains(b.HostPort, "-") {
					return nil, unsupported("HostConfig.PortBindings: a range of host ports (%s) for one port is not supported by Berth; give one port, or none for any", b.HostPort)
				}
				n, err := strconv.ParseUint(b.HostPort, 10, 16)
				if err != nil {
					return nil, invalid("invalid port specification: %q", b.HostPort)
				}
				p.HostPort = uint16(n)
			}
			out = append(out, p)
		}
	}
	if h.PublishAllPorts {
		for port := range exposed {
			if _, ok := h.PortBindings[port]; ok {
				continue
			}
			if err := checkPort(port); err != nil {
				return nil, err
			}
			out = append(out, network.Port{Protocol: string(port.Proto()), Port: port.Num()})
		}
	}
	slices.SortFunc(out, comparePorts)
	return out, nil
}

func comparePorts(a, b network.Port) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol),
		a.HostIP.Compare(b.HostIP), cmp.Compare(a.HostPort, b.HostPort))
}

func checkPort(p networktypes.Port) error {
	if !p.IsValid() || p.Num() == 0 {
		return invalid("invalid port specification: %q", p.String())
	}
	switch p.Proto() {
	case networktypes.TCP, networktypes.UDP, networktypes.SCTP:
		return nil
	}
	return invalid("invalid port specification: %q: protocol must be tcp, udp or sctp", p.String())
}

// extraHosts checks and resolves additional names; gateway stands for host-gateway.
func extraHosts(hosts []string, gateway netip.Addr) ([]string, error) {
	var out []string
	for _, h := range hosts {
		i := strings.IndexAny(h, ":=")
		if i <= 0 || i == len(h)-1 {
			return nil, invalid("bad format for add-host: %q", h)
		}
		name, address := h[:i], h[i+1:]
		if address == hostGateway {
			if !gateway.IsValid() {
				return nil, invalid("unable to derive the IP value for host-gateway: the container is on no network with a gateway")
			}
			out = append(out, name+":"+gateway.String())
			continue
		}
		addr, err := netip.ParseAddr(strings.Trim(address, "[]"))
		if err != nil {
			return nil, invalid("invalid IP address in add-host: %q", address)
		}
		out = append(out, name+":"+addr.String())
	}
	return out, nil
}

// gatewayOf is the address under which containers on the first of the networks reach the node.
func gatewayOf(networks []network.Network) netip.Addr {
	for _, n := range networks {
		for _, subnet := range n.Config.Subnets {
			if subnet.Gateway.IsValid() {
				return subnet.Gateway
			}
			if subnet.Prefix.IsValid() {
				return subnet.Prefix.Masked().Addr().Next()
			}
		}
	}
	return netip.Addr{}
}

// dnsOf translates resolver settings.
func dnsOf(h *hostConfigRequest) engine.DNSConfig {
	d := engine.DNSConfig{Searches: h.DNSSearch, Options: h.DNSOptions}
	for _, a := range h.DNS {
		d.Servers = append(d.Servers, a.String())
	}
	return d
}
