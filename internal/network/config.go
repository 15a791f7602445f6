package network

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"berth/internal/errdefs"
)

// Options of the bridge driver, in docker's words.
const (
	OptionBridgeName      = "com.docker.network.bridge.name"
	OptionMTU             = "com.docker.network.driver.mtu"
	OptionICC             = "com.docker.network.bridge.enable_icc"
	OptionMasquerade      = "com.docker.network.bridge.enable_ip_masquerade"
	OptionHostBinding     = "com.docker.network.bridge.host_binding_ipv4"
	OptionDefaultBridge   = "com.docker.network.bridge.default_bridge"
	OptionInterfacePrefix = "com.docker.network.container_iface_prefix"
	OptionEnableIPv4      = "com.docker.network.enable_ipv4"
)

const (
	defaultMTU          = 1500
	minMTU, maxMTU      = 68, 65535
	maxInterfaceName    = 15
	maxNetworkName      = 255
	maxPrefixBits       = 30 // a network address, a gateway, a container, a broadcast address
	minPrefixBits       = 8
	maxInterfacePrefix  = 10 // leaves digits for the number
	defaultPrefix       = "eth"
	maxNetworks         = 4096
	maxSandboxEndpoints = 64
)

// driverOptions are the options of a bridge network, parsed.
type driverOptions struct {
	bridge     string
	mtu        int
	icc        bool
	masquerade bool
	hostIP     netip.Addr // zero: any
	prefix     string     // of interface names inside
}

var networkName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// parseOptions reads the driver's options; one that it does not know is refused by name.
func parseOptions(o map[string]string) (driverOptions, error) {
	d := driverOptions{mtu: defaultMTU, icc: true, masquerade: true, prefix: defaultPrefix}
	for _, k := range slices.Sorted(maps.Keys(o)) {
		var err error
		v := o[k]
		switch k {
		case OptionBridgeName:
			d.bridge, err = v, checkInterfaceName(v)
		case OptionMTU:
			if v == "" || v == "0" {
				continue
			}
			if d.mtu, err = strconv.Atoi(v); err == nil && (d.mtu < minMTU || d.mtu > maxMTU) {
				err = fmt.Errorf("must be %d to %d", minMTU, maxMTU)
			}
		case OptionICC:
			d.icc, err = strconv.ParseBool(v)
		case OptionMasquerade:
			d.masquerade, err = strconv.ParseBool(v)
		case OptionHostBinding:
			if d.hostIP, err = netip.ParseAddr(v); err == nil && !d.hostIP.Is4() {
				err = fmt.Errorf("must be an IPv4 address")
			} else if err == nil && d.hostIP.IsUnspecified() {
				d.hostIP = netip.Addr{}
			}
		case OptionInterfacePrefix:
			if d.prefix, err = v, checkInterfaceName(v); err == nil && len(v) > maxInterfacePrefix {
				err = fmt.Errorf("must have at most %d characters", maxInterfacePrefix)
			}
		case OptionDefaultBridge:
			var yes bool
			if yes, err = strconv.ParseBool(v); err == nil && yes {
				err = fmt.Errorf("there is one already")
			}
		case OptionEnableIPv4:
			var yes bool
			if yes, err = strconv.ParseBool(v); err == nil && !yes {
				return d, errdefs.New(errdefs.ErrUnsupported, "network option %s=%s: networks without IPv4 are not supported", k, v)
			}
		default:
			return d, errdefs.New(errdefs.ErrUnsupported, "network option %s is not supported by driver bridge", k)
		}
		if err != nil {
			return d, errdefs.New(errdefs.ErrInvalid, "network option %s=%q: %w", k, v, err)
		}
	}
	return d, nil
}

func checkInterfaceName(s string) error {
	if s == "" || len(s) > maxInterfaceName || s == "." || s == ".." || strings.ContainsAny(s, "/:% \t\n\x00") {
		return fmt.Errorf("not a name of an interface: 1 to %d characters without spaces, slashes, colons and percent signs", maxInterfaceName)
	}
	if s == "all" || s == "default" { // their settings are those of every interface
		return fmt.Errorf("not a name for an interface: the kernel means every interface by it")
	}
	return nil
}

// checkConfig validates what can be said without the rest of the world and fills in defaults.
func checkConfig(c *Config) error {
	if c.Name == "" || len(c.Name) > maxNetworkName || !networkName.MatchString(c.Name) {
		return errdefs.New(errdefs.ErrInvalid, "invalid network name %q: only [a-zA-Z0-9][a-zA-Z0-9_.-]* is allowed", c.Name)
	}
	switch c.Name {
	case DefaultNetwork, "host", "none":
		return errdefs.New(errdefs.ErrForbidden, "operation is not permitted on predefined %s network", c.Name)
	case "default", "container":
		return errdefs.New(errdefs.ErrForbidden, "network name %q is reserved for network modes", c.Name)
	}
	switch c.Driver {
	case "":
		c.Driver = DriverBridge
	case DriverBridge:
	case DriverHost, DriverNull:
		return errdefs.New(errdefs.ErrForbidden, "only one instance of %q network is allowed", c.Driver)
	default:
		return errdefs.New(errdefs.ErrUnsupported, "network driver %q is not supported; use bridge", c.Driver)
	}
	if len(c.Subnets) > 1 {
		return errdefs.New(errdefs.ErrUnsupported, "network %s: %d subnets: driver bridge has one IPv4 subnet per network", c.Name, len(c.Subnets))
	}
	for i := range c.Subnets {
		if err := checkSubnet(&c.Subnets[i]); err != nil {
			return err
		}
	}
	return nil
}

// checkSubnet validates a subnet and fills in its gateway. A subnet without a prefix is left
// for the address plan to fill in; it may then name nothing else.
func checkSubnet(s *Subnet) error {
	if !s.Prefix.IsValid() {
		if s.Gateway.IsValid() || s.Range.IsValid() || len(s.Aux) > 0 {
			return errdefs.New(errdefs.ErrInvalid, "invalid network config: a gateway, range or auxiliary address needs a subnet")
		}
		return nil
	}
	p := s.Prefix
	if !p.Addr().Is4() {
		return errdefs.New(errdefs.ErrUnsupported, "subnet %s: IPv6 networks are not supported", p)
	}
	if p.Masked() != p {
		return errdefs.New(errdefs.ErrInvalid, "invalid network config: invalid subnet %s: it should be %s", p, p.Masked())
	}
	if p.Bits() > maxPrefixBits || p.Bits() < minPrefixBits {
		return errdefs.New(errdefs.ErrInvalid, "invalid network config: invalid subnet %s: its length must be %d to %d", p, minPrefixBits, maxPrefixBits)
	}
	if p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Addr().IsUnspecified() || p.Addr().As4()[0] >= 224 {
		return errdefs.New(errdefs.ErrInvalid, "invalid network config: subnet %s is not for hosts", p)
	}
	if s.Range.IsValid() {
		if !s.Range.Addr().Is4() || s.Range.Bits() < p.Bits() || !p.Contains(s.Range.Addr()) {
			return errdefs.New(errdefs.ErrInvalid, "invalid network config: invalid ip-range %s: it is not in subnet %s", s.Range, p)
		}
		s.Range = s.Range.Masked()
	}
	if !s.Gateway.IsValid() {
		s.Gateway = p.Addr().Next()
		if s.Range.IsValid() {
			s.Gateway = s.Range.Addr()
			if s.Gateway == p.Addr() {
				s.Gateway = s.Gateway.Next()
			}
		}
	}
	low, high := bounds(p)
	inside := func(what string, a netip.Addr) error {
		if !a.Is4() || !p.Contains(a) || toUint(a) == low || toUint(a) == high {
			return errdefs.New(errdefs.ErrInvalid, "invalid network config: invalid %s %s: it is no host address of subnet %s", what, a, p)
		}
		return nil
	}
	if err := inside("gateway", s.Gateway); err != nil {
		return err
	}
	for name, a := range s.Aux {
		if err := inside("auxiliary address "+name, a); err != nil {
			return err
		}
	}
	return nil
}

// bridgeName is the name of the interface of a network whose user did not choose one.
func bridgeName(tag, id string, isDefault bool) string {
	switch {
	case tag == "" && isDefault:
		return "berth0"
	case tag == "":
		return "br-" + id[:12]
	case isDefault:
		return "b" + tag + "-0"
	default:
		return "b" + tag + "-" + id[:7]
	}
}

// peerPrefix begins the names of the host's ends of all veth pairs of an instance. No tag
// spells "berth", so no instance's prefix begins another's.
func peerPrefix(tag string) string {
	if tag == "" {
		return "vberth"
	}
	return "v" + tag
}

func (n Network) clone() Network {
	n.Config = n.Config.clone()
	return n
}

func (c Config) clone() Config {
	c.Labels = maps.Clone(c.Labels)
	c.Options = maps.Clone(c.Options)
	c.Subnets = slices.Clone(c.Subnets)
	for i := range c.Subnets {
		c.Subnets[i].Aux = maps.Clone(c.Subnets[i].Aux)
	}
	return c
}

func (e Endpoint) clone() Endpoint {
	e.Aliases = slices.Clone(e.Aliases)
	return e
}
