package cli

import (
	"encoding/csv"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// maxPortRange bounds the ports that one -p publishes.
const maxPortRange = 1000

// storage translates -v, --mount, --tmpfs and --device.
func (o *runFlags) storage(r *createRequest) error {
	h := &r.HostConfig
	for _, v := range o.volumes {
		source, _, ok := strings.Cut(v, ":")
		if !ok {
			if !filepath.IsAbs(v) {
				return fmt.Errorf("-v %s: the target must be an absolute path", v)
			}
			if r.Volumes == nil {
				r.Volumes = map[string]struct{}{}
			}
			r.Volumes[v] = struct{}{}
			continue
		}
		if strings.HasPrefix(source, ".") { // names cannot begin with a dot: a path from here
			abs, err := filepath.Abs(source)
			if err != nil {
				return err
			}
			v = abs + v[len(source):]
		}
		h.Binds = append(h.Binds, v)
	}
	for _, text := range o.mounts {
		m, err := parseMount(text)
		if err != nil {
			return err
		}
		h.Mounts = append(h.Mounts, m)
	}
	for _, t := range o.tmpfs {
		target, options, _ := strings.Cut(t, ":")
		if h.Tmpfs == nil {
			h.Tmpfs = map[string]string{}
		}
		h.Tmpfs[target] = options
	}
	for _, d := range o.devices {
		m, err := parseDevice(d)
		if err != nil {
			return err
		}
		h.Devices = append(h.Devices, m)
	}
	return nil
}

// mountFlag is a --mount being read.
type mountFlag struct {
	mount
	bind   bindOptions
	volume volumeOptions
	tmpfs  tmpfsOptions
	used   map[string]string // type → an option that belongs to it
}

// parseMount reads the value of --mount.
func parseMount(text string) (mount, error) {
	wrong := func(err error) (mount, error) { return mount{}, fmt.Errorf("--mount %s: %w", text, err) }
	fields, err := csv.NewReader(strings.NewReader(text)).Read()
	if err != nil {
		return wrong(errors.New("malformed"))
	}
	m := mountFlag{mount: mount{Type: "volume"}, used: map[string]string{}}
	for _, f := range fields {
		key, value, hasValue := strings.Cut(f, "=")
		if err := m.set(strings.ToLower(key), value, !hasValue || value == "true" || value == "1"); err != nil {
			return wrong(err)
		}
	}
	for typ, option := range m.used {
		if typ != m.Type {
			return wrong(fmt.Errorf("%s does not belong to type=%s", option, m.Type))
		}
	}
	if m.used["bind"] != "" {
		m.BindOptions = &m.bind
	}
	if m.used["volume"] != "" {
		m.VolumeOptions = &m.volume
	}
	if m.used["tmpfs"] != "" {
		m.TmpfsOptions = &m.tmpfs
	}
	switch {
	case m.Type != "bind" && m.Type != "volume" && m.Type != "tmpfs":
		return wrong(fmt.Errorf("type %q is not supported; use bind, volume or tmpfs", m.Type))
	case m.Target == "":
		return wrong(errors.New("a target is missing"))
	}
	return m.mount, nil
}

// set takes one option; on is its value as a switch.
func (m *mountFlag) set(key, value string, on bool) (err error) {
	if typ, _, ok := strings.Cut(key, "-"); ok {
		m.used[typ] = key
	}
	switch key {
	case "type":
		m.Type = strings.ToLower(value)
	case "source", "src":
		m.Source = value
		if value == "." || strings.HasPrefix(value, "./") || strings.HasPrefix(value, "../") {
			m.Source, err = filepath.Abs(value)
		}
	case "target", "dst", "destination":
		m.Target = value
	case "readonly", "ro":
		m.ReadOnly = on
	case "bind-propagation":
		m.bind.Propagation = value
	case "bind-nonrecursive":
		m.bind.NonRecursive = on
	case "bind-create-src":
		m.bind.CreateMountpoint = on
	case "volume-nocopy":
		m.volume.NoCopy = on
	case "volume-label":
		if m.volume.Labels == nil {
			m.volume.Labels = map[string]string{}
		}
		k, v, _ := strings.Cut(value, "=")
		m.volume.Labels[k] = v
	case "tmpfs-size":
		if m.tmpfs.SizeBytes, err = units.RAMInBytes(value); err != nil {
			return fmt.Errorf("%s is not a size", value)
		}
	case "tmpfs-mode":
		mode, err := strconv.ParseUint(value, 8, 32)
		if err != nil {
			return fmt.Errorf("%s is not a mode in octal digits", value)
		}
		m.tmpfs.Mode = uint32(mode)
	default:
		return fmt.Errorf("option %q is not supported", key)
	}
	return err
}

func parseDevice(text string) (deviceMapping, error) {
	parts := strings.Split(text, ":")
	m := deviceMapping{PathOnHost: parts[0], PathInContainer: parts[0], CgroupPermissions: "rwm"}
	isMode := func(s string) bool { return s != "" && strings.Trim(s, "rwm") == "" }
	switch {
	case len(parts) == 1:
	case len(parts) == 2 && isMode(parts[1]):
		m.CgroupPermissions = parts[1]
	case len(parts) == 2:
		m.PathInContainer = parts[1]
	case len(parts) == 3 && isMode(parts[2]):
		m.PathInContainer, m.CgroupPermissions = parts[1], parts[2]
	default:
		return m, fmt.Errorf("--device %s: write it as PATH[:PATH[:rwm]]", text)
	}
	return m, nil
}

// network translates --network and all that belongs to an endpoint, and the ports.
func (o *runFlags) network(r *createRequest) error {
	r.NetworkingConfig.EndpointsConfig = map[string]*endpointSettings{}
	for i, n := range o.networks {
		if n == "" || strings.Contains(n, "=") {
			return fmt.Errorf("--network %s: only names are supported; use --network-alias, --ip and --mac-address", n)
		}
		if i == 0 {
			r.HostConfig.NetworkMode = n
		}
		if n != "host" && n != "none" && n != "default" && !strings.HasPrefix(n, "container:") {
			r.NetworkingConfig.EndpointsConfig[n] = &endpointSettings{}
		} else if len(o.networks) > 1 {
			return fmt.Errorf("--network %s cannot be combined with other networks", n)
		}
	}
	if len(o.aliases) > 0 || o.ip != "" || o.mac != "" {
		name := "bridge"
		if len(o.networks) > 0 {
			name = o.networks[0]
		}
		e := r.NetworkingConfig.EndpointsConfig[name]
		if e == nil {
			if len(o.networks) > 0 {
				return fmt.Errorf("--network-alias, --ip and --mac-address need a network; --network %s is none", name)
			}
			e = &endpointSettings{}
			r.NetworkingConfig.EndpointsConfig[name] = e
		}
		e.Aliases, e.MacAddress = o.aliases, o.mac
		if o.ip != "" {
			if addr, err := netip.ParseAddr(o.ip); err != nil || !addr.Is4() {
				return fmt.Errorf("--ip %s: not an IPv4 address", o.ip)
			}
			e.IPAMConfig = &ipamConfig{IPv4Address: o.ip}
		}
	}
	for _, p := range o.publish {
		if err := publishPort(r, p); err != nil {
			return fmt.Errorf("-p %s: %w", p, err)
		}
	}
	for _, p := range o.expose {
		if err := exposePort(r, p); err != nil {
			return fmt.Errorf("--expose %s: %w", p, err)
		}
	}
	return nil
}

func exposePort(r *createRequest, text string) error {
	ports, proto, _ := strings.Cut(text, "/")
	if proto == "" {
		proto = "tcp"
	}
	first, last, err := parseRange(ports)
	if err != nil {
		return err
	}
	for p := first; p <= last; p++ {
		expose(r, p, proto)
	}
	return nil
}

func expose(r *createRequest, port int, proto string) string {
	key := strconv.Itoa(port) + "/" + proto
	if r.ExposedPorts == nil {
		r.ExposedPorts = map[string]struct{}{}
	}
	r.ExposedPorts[key] = struct{}{}
	return key
}

// publishPort reads [[ADDRESS:]PORT[-PORT]:]PORT[-PORT][/PROTOCOL].
func publishPort(r *createRequest, text string) error {
	rest, proto, ok := strings.Cut(text, "/")
	if !ok {
		proto = "tcp"
	}
	proto = strings.ToLower(proto)
	if proto != "tcp" && proto != "udp" && proto != "sctp" {
		return fmt.Errorf("protocol %q is unknown; use tcp, udp or sctp", proto)
	}
	var host, hostPorts string
	inside := rest
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		host, inside = rest[:i], rest[i+1:]
		hostPorts, host = host, ""
		if j := strings.LastIndexByte(hostPorts, ':'); j >= 0 {
			host, hostPorts = hostPorts[:j], hostPorts[j+1:]
			addr := strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
			if _, err := netip.ParseAddr(addr); err != nil {
				return fmt.Errorf("%q is not an address", host)
			}
			host = addr
		}
	}
	first, last, err := parseRange(inside)
	if err != nil {
		return err
	}
	hostFirst, hostLast := 0, 0
	if hostPorts != "" {
		if hostFirst, hostLast, err = parseRange(hostPorts); err != nil {
			return err
		}
		if hostLast-hostFirst != last-first && !(first == last) {
			return errors.New("the two ranges differ in length")
		}
	}
	if r.HostConfig.PortBindings == nil {
		r.HostConfig.PortBindings = map[string][]portBinding{}
	}
	for p := first; p <= last; p++ {
		b := portBinding{HostIP: host}
		switch {
		case hostPorts == "":
		case first == last && hostFirst != hostLast:
			b.HostPort = hostPorts // any free one of the range: the daemon chooses
		default:
			b.HostPort = strconv.Itoa(hostFirst + p - first)
		}
		key := expose(r, p, proto)
		r.HostConfig.PortBindings[key] = append(r.HostConfig.PortBindings[key], b)
	}
	return nil
}

func parseRange(text string) (first, last int, err error) {
	a, b, ranged := strings.Cut(text, "-")
	if !ranged {
		b = a
	}
	f, err1 := strconv.ParseUint(a, 10, 16)
	l, err2 := strconv.ParseUint(b, 10, 16)
	switch {
	case err1 != nil || err2 != nil || f == 0 || l < f:
		return 0, 0, fmt.Errorf("%q is not a port or a range of ports", text)
	case l-f >= maxPortRange:
		return 0, 0, fmt.Errorf("%q: at most %d ports can be published at once", text, maxPortRange)
	}
	return int(f), int(l), nil
}
