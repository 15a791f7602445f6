package dockerapi

import (
	"cmp"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	containertypes "github.com/moby/moby/api/types/container"
	mounttypes "github.com/moby/moby/api/types/mount"
	networktypes "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"berth/internal/engine"
	"berth/internal/network"
	"berth/internal/state"
)

// API versions at which inspecting a container changed.
const (
	versionNoAliasBackfill   = 45
	versionNoLegacyAddresses = 52
)

// view is a container with what belongs to it, for conversion.
type view struct {
	c        engine.Container
	box      engine.Sandbox
	dialect  dialect
	networks func(ref string) (network.Network, error)
	volume   func(name string) (Volume, error)
}

// newView gathers what is known about c. A container of another dialect gets docker's words
// made up from the engine's.
func (s *Server) newView(c engine.Container) view {
	v := view{c: c, networks: s.networks.Get, volume: s.volumes.Get}
	v.box, _ = s.engine.Sandbox(c.Config.Sandbox) // gone with its container, meanwhile: shown without
	d, ok := dialectOf(c)
	if !ok {
		d = foreignDialect(c, v.box)
	}
	v.dialect = d
	return v
}

// foreignDialect describes a container that another dialect made.
func foreignDialect(c engine.Container, box engine.Sandbox) dialect {
	e := c.Config
	conf := &containertypes.Config{
		Hostname: box.Config.Hostname, Domainname: box.Config.Domainname, User: e.User, Tty: e.Terminal,
		OpenStdin: e.OpenStdin, StdinOnce: e.StdinOnce, Env: e.Env, Image: e.Image, WorkingDir: e.Cwd,
		Labels: e.Labels, StopSignal: e.StopSignal, Cmd: e.Args,
	}
	h := &containertypes.HostConfig{
		NetworkMode: networktypes.NetworkBridge, AutoRemove: e.AutoRemove, Privileged: e.Security.Privileged,
		ReadonlyRootfs: e.ReadOnlyRootfs, CapAdd: e.Security.CapAdd, CapDrop: e.Security.CapDrop,
		OomScoreAdj: e.OOMScoreAdj, Annotations: e.Annotations, GroupAdd: e.Groups, ShmSize: box.Config.ShmBytes,
		LogConfig: containertypes.LogConfig{Type: e.Log.Driver, Config: map[string]string{}},
		Runtime:   runtimeName, IpcMode: containertypes.IPCModePrivate,
	}
	switch {
	case box.Config.Network == engine.NetworkHost:
		h.NetworkMode = networktypes.NetworkHost
	case box.Config.Network == engine.NetworkNone:
		h.NetworkMode = networktypes.NetworkNone
	case box.Config.ID != "" && box.Config.ID != c.Config.ID:
		h.NetworkMode = containertypes.NetworkMode("container:" + box.Config.ID)
	}
	if e.HostPID {
		h.PidMode = "host"
	}
	return dialect{Config: conf, HostConfig: h}
}

// joined tells whether the container is in another container's network.
func (v view) joined() bool { return v.dialect.HostConfig.NetworkMode.IsContainer() }

// hostConfig is what docker said, with what was updated since.
func (v view) hostConfig() *containertypes.HostConfig {
	h, e := *v.dialect.HostConfig, v.c.Config
	r := e.Resources
	if h.NanoCPUs > 0 && r.CPUPeriod > 0 {
		h.NanoCPUs = r.CPUQuota * 1e9 / r.CPUPeriod
	} else {
		h.CPUQuota, h.CPUPeriod = r.CPUQuota, r.CPUPeriod
	}
	h.Memory, h.MemoryReservation, h.CPUShares = r.MemoryBytes, r.MemoryReservation, r.CPUShares
	h.CpusetCpus, h.CpusetMems = r.CpusetCPUs, r.CpusetMems
	if r.MemorySwapBytes != 0 {
		h.MemorySwap = r.MemorySwapBytes
	}
	h.PidsLimit = nil
	if r.PidsLimit != 0 {
		h.PidsLimit = &r.PidsLimit
	}
	h.RestartPolicy = containertypes.RestartPolicy{
		Name:              containertypes.RestartPolicyMode(cmp.Or(e.Restart.Name, "no")),
		MaximumRetryCount: e.Restart.MaxRetries,
	}
	if v.joined() {
		h.NetworkMode = v.dialect.HostConfig.NetworkMode
	}
	return &h
}

// dockerTime formats a time as docker's State does; the zero time has its own form.
func dockerTime(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func containerState(c engine.Container) *containertypes.State {
	st := c.State
	out := &containertypes.State{
		Status: containertypes.ContainerState(st.Status), Pid: st.PID, ExitCode: st.ExitCode, Error: st.Error,
		OOMKilled: st.OOMKilled, StartedAt: dockerTime(st.StartedAt), FinishedAt: dockerTime(st.FinishedAt),
	}
	switch st.Status {
	case engine.StatusRunning:
		out.Running = true
	case engine.StatusPaused:
		out.Running, out.Paused = true, true
	case engine.StatusRestarting:
		out.Running, out.Restarting = true, true
	case engine.StatusDead:
		out.Dead = true
	}
	if st.Health != nil && c.Config.Health != nil {
		out.Health = &containertypes.Health{
			Status: containertypes.HealthStatus(st.Health.Status), FailingStreak: st.Health.FailingStreak,
			Log: []*containertypes.HealthcheckResult{},
		}
		for _, l := range st.Health.Log {
			out.Health.Log = append(out.Health.Log, &containertypes.HealthcheckResult{
				Start: l.Start, End: l.End, ExitCode: l.ExitCode, Output: l.Output,
			})
		}
	}
	return out
}

// endpoints are the networks of the container by name: what is wished for, and what is there.
func (v view) endpoints(version int) map[string]*networktypes.EndpointSettings {
	out := map[string]*networktypes.EndpointSettings{}
	if v.joined() {
		return out
	}
	switch v.box.Config.Network {
	case engine.NetworkHost, engine.NetworkNone:
		name := string(v.box.Config.Network)
		es := &networktypes.EndpointSettings{}
		if n, err := v.networks(name); err == nil {
			es.NetworkID = n.ID
			if v.box.State.Ready {
				es.EndpointID = networkEndpointID(v.box.Config.ID, n.ID)
			}
		}
		out[name] = es
		return out
	}
	for _, wish := range v.box.Config.Endpoints {
		name, id := wish.Network, wish.Network
		if n, err := v.networks(wish.Network); err == nil {
			name, id = n.Config.Name, n.ID
		}
		es := &networktypes.EndpointSettings{NetworkID: id, DriverOpts: wish.DriverOptions}
		if name != network.DefaultNetwork {
			es.DNSNames = v.dnsNames(wish.Aliases)
			es.Aliases = v.userAliases(wish.Aliases, version)
		}
		if wish.Address.IsValid() {
			es.IPAMConfig = &networktypes.EndpointIPAMConfig{IPv4Address: wish.Address}
		}
		if mac, err := net.ParseMAC(wish.MAC); err == nil {
			es.MacAddress = networktypes.HardwareAddr(mac)
		}
		i := slices.IndexFunc(v.box.State.Endpoints, func(e network.Endpoint) bool { return e.NetworkID == id })
		if i >= 0 && v.box.State.Ready {
			fillEndpoint(es, v.box.State.Endpoints[i])
		}
		out[name] = es
	}
	return out
}

// dnsNames are all names that are answered: the container's own, its aliases, its short ID.
func (v view) dnsNames(aliases []string) []string {
	id := v.c.Config.ID
	names := append([]string{v.c.Config.Name}, aliases...)
	return append(names, id[:min(len(id), shortIDLength)])
}

// userAliases takes the container's own names, which docker shows elsewhere, off its aliases.
func (v view) userAliases(names []string, version int) []string {
	id := v.c.Config.ID
	own := []string{v.c.Config.Name, id[:min(len(id), shortIDLength)]}
	out := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return slices.Contains(own, n) })
	if version < versionNoAliasBackfill {
		out = append(out, own[1])
		if h := v.dialect.Config.Hostname; h != "" && !slices.Contains(out, h) {
			out = append(out, h)
		}
	}
	return out
}

func fillEndpoint(es *networktypes.EndpointSettings, e network.Endpoint) {
	es.EndpointID = networkEndpointID(e.Sandbox, e.NetworkID)
	es.Gateway, es.IPAddress, es.IPPrefixLen = e.Gateway, e.Address.Addr(), e.Address.Bits()
	if mac, err := net.ParseMAC(e.MAC); err == nil {
		es.MacAddress = networktypes.HardwareAddr(mac)
	}
}

// running tells whether the container's ports are published now.
func (v view) running() bool {
	switch v.c.State.Status {
	case engine.StatusRunning, engine.StatusPaused:
		return v.box.State.Ready && !v.joined()
	}
	return false
}

// hostIP is the address of a published port as docker shows it.
func hostIP(p network.Port) netip.Addr {
	if p.HostIP.IsValid() {
		return p.HostIP
	}
	return netip.IPv4Unspecified()
}

// portMap is what is published now, with what is only exposed.
func (v view) portMap() networktypes.PortMap {
	out := networktypes.PortMap{}
	if !v.running() {
		return out
	}
	for p := range v.dialect.Config.ExposedPorts {
		out[p] = nil
	}
	for _, p := range v.box.State.Ports {
		if key, ok := networktypes.PortFrom(p.Port, networktypes.IPProtocol(p.Protocol)); ok {
			out[key] = append(out[key], networktypes.PortBinding{HostIP: hostIP(p), HostPort: strconv.Itoa(int(p.HostPort))})
		}
	}
	return out
}

// mountPoints are the mounts that docker shows: all but those of --tmpfs.
func (v view) mountPoints() []containertypes.MountPoint {
	out := []containertypes.MountPoint{}
	for _, m := range v.c.Config.Mounts {
		p := containertypes.MountPoint{
			Type: mounttypes.Type(m.Kind), Source: m.Source, Destination: m.Target, RW: !m.ReadOnly,
			Mode: v.dialect.MountModes[m.Target],
		}
		switch m.Kind {
		case engine.MountBind:
			p.Propagation = mounttypes.Propagation(cmp.Or(m.Propagation, "rprivate"))
		case engine.MountVolume:
			p.Name, p.Driver, p.Source = m.Source, driverLocal, ""
			if vol, err := v.volume(m.Source); err == nil {
				p.Source = vol.Path
			}
			if p.Mode == "" {
				p.Mode = "z" // docker's default on Linux
			}
		case engine.MountTmpfs:
			if _, old := v.dialect.HostConfig.Tmpfs[m.Target]; old {
				continue
			}
		}
		out = append(out, p)
	}
	return out
}

// inspectResponse is docker's, with what older versions showed besides.
type inspectResponse struct {
	containertypes.InspectResponse
	NetworkSettings any
}

// legacyNetworkSettings is NetworkSettings until API 1.51, with the default network's addresses
// at the top.
type legacyNetworkSettings struct {
	containertypes.NetworkSettings
	Bridge                 string
	HairpinMode            bool
	LinkLocalIPv6Address   string
	LinkLocalIPv6PrefixLen int
	SecondaryIPAddresses   []struct{}
	SecondaryIPv6Addresses []struct{}
	EndpointID             string
	Gateway                netip.Addr
	GlobalIPv6Address      string
	GlobalIPv6PrefixLen    int
	IPAddress              netip.Addr
	IPPrefixLen            int
	IPv6Gateway            string
	MacAddress             networktypes.HardwareAddr
}

// inspect is the whole container in docker's shape.
func (v view) inspect(root state.Root, execs []string, version int) inspectResponse {
	c := v.c
	box := root.Sandbox(c.Config.Sandbox)
	slices.Sort(execs)
	out := inspectResponse{InspectResponse: containertypes.InspectResponse{
		ID: c.Config.ID, Created: dockerTime(c.State.Created), Args: []string{}, State: containerState(c), Image: c.Config.ImageID,
		ResolvConfPath: filepath.Join(box, "resolv.conf"), HostnamePath: filepath.Join(box, "hostname"),
		HostsPath: filepath.Join(box, "hosts"), LogPath: c.State.LogPath, Name: "/" + c.Config.Name,
		RestartCount: c.State.RestartCount, Driver: storageDriver, Platform: "linux",
		AppArmorProfile: c.Config.Security.AppArmor, ExecIDs: execs, HostConfig: v.hostConfig(),
		GraphDriver: &storage.DriverData{Name: storageDriver},
		Mounts:      v.mountPoints(), Config: v.dialect.Config,
	}}
	if len(c.Config.Args) > 0 {
		out.Path = c.Config.Args[0]
		out.Args = append(out.Args, c.Config.Args[1:]...)
	}
	if out.Config.Volumes == nil || out.Config.Labels == nil {
		conf := *out.Config
		conf.Labels = orEmpty(conf.Labels)
		out.Config = &conf
	}
	settings := containertypes.NetworkSettings{Ports: v.portMap(), Networks: v.endpoints(version)}
	if v.running() || v.joined() && v.box.State.Ready {
		settings.SandboxID, settings.SandboxKey = v.box.Config.ID, v.box.State.NetNS
	}
	if version >= versionNoLegacyAddresses {
		out.NetworkSettings = settings
		return out
	}
	old := legacyNetworkSettings{NetworkSettings: settings}
	if es := settings.Networks[network.DefaultNetwork]; es != nil {
		old.EndpointID, old.Gateway, old.IPAddress, old.IPPrefixLen, old.MacAddress = es.EndpointID, es.Gateway, es.IPAddress, es.IPPrefixLen, es.MacAddress
	}
	out.NetworkSettings = old
	return out
}
