package dockerapi

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/distribution/reference"
	containertypes "github.com/moby/moby/api/types/container"
	networktypes "github.com/moby/moby/api/types/network"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
	"berth/internal/network"
)

// API versions at which creating a container changed.
const (
	versionManyEndpoints    = 44 // several networks, and addresses of hardware per network
	versionNoContainerMAC   = 52
	versionImagePlatform    = 41
	versionHealthStartEvery = 44
)

// creation is one container being created.
type creation struct {
	server  *Server
	version int
	id      string
	request createRequest
	img     image.Image

	container engine.ContainerConfig
	sandbox   *engine.SandboxConfig // nil: another container's is joined
	dialect   dialect
	warnings  []string
	undo      []func(ctx context.Context)
}

func (s *Server) createContainer(w http.ResponseWriter, r *request) error {
	var q createRequest
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	name := strings.TrimPrefix(r.query("name"), "/")
	if name == "" && r.query("name") != "" || name != "" && !validContainerName(name) {
		return invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", r.query("name"))
	}
	if q.Config == nil {
		return invalid("config cannot be empty in order to create a container")
	}
	if q.HostConfig == nil {
		q.HostConfig = &hostConfigRequest{}
	}
	if name != "" {
		if c, err := s.engine.Container(name); err == nil && c.Config.Name == name {
			return nameConflict(name, c.Config.ID)
		}
	}
	cr := &creation{server: s, version: r.version, id: engine.NewID(), request: q}
	c, err := cr.run(r.Context(), name, r.query("platform"))
	if err != nil {
		for _, f := range slices.Backward(cr.undo) {
			f(context.WithoutCancel(r.Context()))
		}
		return err
	}
	if cr.warnings == nil {
		cr.warnings = []string{}
	}
	return writeJSON(w, http.StatusCreated, containertypes.CreateResponse{ID: c.Config.ID, Warnings: cr.warnings})
}

func validContainerName(name string) bool {
	ok, err := regexp.MatchString(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`, name)
	return ok && err == nil
}

func nameConflict(name, id string) error {
	return conflict("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, id)
}

// run makes the container. What it made before a failure is in c.undo.
func (c *creation) run(ctx context.Context, name, platform string) (engine.Container, error) {
	if err := c.check(); err != nil {
		return engine.Container{}, err
	}
	if err := c.findImage(ctx, platform); err != nil {
		return engine.Container{}, err
	}
	user := *c.request.Config // what the network's rules look at, before the image is merged in
	conf, err := dockerConfig(c.img)
	if err != nil {
		return engine.Container{}, err
	}
	if err := mergeImage(c.request.Config, conf); err != nil {
		return engine.Container{}, err
	}
	if c.container, err = containerOf(c.id, name, c.request, c.img); err != nil {
		return engine.Container{}, err
	}
	var more []string
	c.container.Resources, more = resourcesOf(c.request.HostConfig, c.server.info.SwapLimit)
	c.warnings = append(c.warnings, more...)
	if err := c.joinPID(); err != nil {
		return engine.Container{}, err
	}
	if name == "" {
		c.container.Name = c.server.freeName(c.id)
	}
	if err := c.planSandbox(&user); err != nil {
		return engine.Container{}, err
	}
	if err := c.mounts(ctx); err != nil {
		return engine.Container{}, err
	}
	return c.commit(ctx)
}

// check looks at everything that can be judged without the rest of the node.
func (c *creation) check() error {
	h, conf := c.request.HostConfig, c.request.Config
	if err := refuseUnsupported(h, c.version); err != nil {
		return err
	}
	if err := checkResources(&h.Resources, runtime.NumCPU()); err != nil {
		return err
	}
	if h.CgroupnsMode != "" && h.CgroupnsMode != cgroupnsDefault(h.Privileged, c.server.info.CgroupVersion) {
		return unsupported("HostConfig.CgroupnsMode %s is not supported by Berth on this node with cgroup v%s", h.CgroupnsMode, c.server.info.CgroupVersion)
	}
	if conf.Healthcheck != nil && c.version < versionHealthStartEvery {
		conf.Healthcheck.StartInterval = 0
	}
	if err := checkHealth(conf.Healthcheck); err != nil {
		return err
	}
	if conf.StopSignal != "" {
		if _, err := engine.ParseSignal(conf.StopSignal); err != nil {
			return err
		}
	}
	if conf.ArgsEscaped {
		return unsupported("Config.ArgsEscaped is not supported by Berth: it is of Windows")
	}
	if conf.NetworkDisabled {
		h.NetworkMode = networktypes.NetworkNone
	}
	if c.request.MacAddress != "" && c.version >= versionNoContainerMAC {
		return invalid("Config.MacAddress is not supported since API version %s; set MacAddress of an endpoint in NetworkingConfig", formatVersion(versionNoContainerMAC))
	}
	n := c.request.NetworkingConfig
	if n != nil && len(n.EndpointsConfig) > 1 && c.version < versionManyEndpoints {
		return invalid("Container cannot be created with multiple network endpoints: %s", strings.Join(slices.Sorted(maps.Keys(n.EndpointsConfig)), ", "))
	}
	return nil
}

// findImage resolves the image in docker's words: clients pull one that is not found.
func (c *creation) findImage(ctx context.Context, platform string) error {
	ref := c.request.Config.Image
	if ref == "" {
		return invalid("no image specified: Config.Image is empty")
	}
	img, err := c.server.images.Resolve(ctx, ref)
	if errors.Is(err, errdefs.ErrNotFound) {
		return notFound("No such image: %s", familiarTagged(ref))
	}
	if err != nil {
		return err
	}
	if platform != "" && c.version >= versionImagePlatform {
		if have := img.Config.OS + "/" + img.Config.Architecture; !samePlatform(platform, have, img.Config.Variant) {
			return notFound("image with reference %s was found but its platform (%s) does not match the specified platform (%s)", ref, have, platform)
		}
	}
	c.img = img
	return nil
}

// familiarTagged is a reference as docker shows it, with its tag.
func familiarTagged(ref string) string {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(named)
}

// samePlatform compares os[/arch[/variant]] with what an image has.
func samePlatform(want, have, variant string) bool {
	want = strings.ToLower(want)
	alias := map[string]string{"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}
	parts := strings.Split(want, "/")
	os, arch, _ := strings.Cut(have, "/")
	for i, p := range parts {
		if a, ok := alias[p]; ok {
			parts[i] = a
		}
	}
	switch len(parts) {
	case 1:
		return parts[0] == os || parts[0] == arch
	case 2:
		return parts[0] == os && parts[1] == arch
	}
	return parts[0] == os && parts[1] == arch && (parts[2] == variant || variant == "" && parts[2] == "v8")
}

// joinPID resolves --pid container:X.
func (c *creation) joinPID() error {
	mode := c.request.HostConfig.PidMode
	if !mode.IsContainer() {
		return nil
	}
	other, err := c.server.engine.Container(mode.Container())
	if err != nil {
		return invalid("cannot join the PID namespace of another container: %v", err) // see joinSandbox
	}
	c.container.PIDOf = other.Config.ID
	c.request.HostConfig.PidMode = containertypes.PidMode("container:" + other.Config.ID)
	return nil
}

// freeName picks a name that nobody has; should it be taken before it is used, creating fails
// with a conflict.
func (s *Server) freeName(id string) string {
	for try := range nameTries {
		name := randomName(try)
		if c, err := s.engine.Container(name); err != nil || c.Config.Name != name {
			return name
		}
	}
	return id[:shortIDLength]
}

// planSandbox decides where network, IPC and UTS namespaces come from.
func (c *creation) planSandbox(user *containertypes.Config) error {
	h := c.request.HostConfig
	if h.NetworkMode == "" || h.NetworkMode.IsDefault() {
		h.NetworkMode = networktypes.NetworkBridge
	}
	if err := checkNetworkMode(user, h, c.request.MacAddress); err != nil {
		return err
	}
	if h.NetworkMode.IsContainer() {
		return c.joinSandbox()
	}
	if h.IpcMode.IsContainer() {
		return unsupported("HostConfig.IpcMode container:… is not supported by Berth without the same NetworkMode: the two namespaces are shared together")
	}
	conf := c.request.Config
	box := &engine.SandboxConfig{
		ID: c.id, Owner: engine.OwnerDocker, Hostname: conf.Hostname, Domainname: conf.Domainname,
		HostIPC: h.IpcMode.IsHost(), HostUTS: h.UTSMode.IsHost(), DNS: dnsOf(h),
		CgroupParent: h.CgroupParent, ShmBytes: h.ShmSize,
	}
	c.sandbox = box
	var networks []network.Network
	var err error
	switch {
	case h.NetworkMode.IsHost():
		box.Network = engine.NetworkHost
		if box.Hostname == "" && !box.HostUTS {
			box.Hostname = c.server.info.Name
		}
		conf.Hostname = box.Hostname
	case h.NetworkMode.IsNone():
		box.Network = engine.NetworkNone
	default:
		if networks, err = c.planEndpoints(); err != nil {
			return err
		}
		if box.Ports, err = portsOf(h, conf.ExposedPorts); err != nil {
			return err
		}
	}
	if box.Network != engine.NetworkOwn {
		if err := c.refuseEndpoints(string(h.NetworkMode)); err != nil {
			return err
		}
	}
	if conf.Hostname == "" {
		conf.Hostname = c.id[:shortIDLength]
	}
	gateway := gatewayOf(networks)
	if box.Network == engine.NetworkHost {
		gateway = c.nodeAddress()
	}
	box.ExtraHosts, err = extraHosts(h.ExtraHosts, gateway)
	return err
}

func (c *creation) nodeAddress() netip.Addr {
	if a, err := netip.ParseAddr(c.server.info.NodeAddress); err == nil {
		return a
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// refuseEndpoints is for the modes host and none, which go with no other network.
func (c *creation) refuseEndpoints(mode string) error {
	if len(c.request.HostConfig.PortBindings) > 0 || c.request.HostConfig.PublishAllPorts {
		c.warnings = append(c.warnings, "Published ports are discarded when using "+mode+" network mode")
	}
	if n := c.request.NetworkingConfig; n != nil {
		for ref := range n.EndpointsConfig {
			if ref != mode {
				return invalid("container sharing network namespace with another container or host cannot be connected to any other network")
			}
		}
	}
	return nil
}

// joinSandbox resolves --network container:X.
func (c *creation) joinSandbox() error {
	h := c.request.HostConfig
	other, err := c.server.engine.Container(h.NetworkMode.ConnectedContainer())
	if err != nil {
		// A client takes "not found" in the answer to a creation for a missing image.
		return invalid("cannot join the network of another container: %v", err)
	}
	box, err := c.server.engine.Sandbox(other.Config.Sandbox)
	if err != nil {
		return err
	}
	if h.IpcMode.IsContainer() {
		ipc, err := c.server.engine.Container(h.IpcMode.Container())
		if err != nil || ipc.Config.Sandbox != box.Config.ID {
			return unsupported("HostConfig.IpcMode container:… is not supported by Berth without the same NetworkMode: the two namespaces are shared together")
		}
		h.IpcMode = containertypes.IpcMode("container:" + ipc.Config.ID)
	} else if h.IpcMode.IsHost() != box.Config.HostIPC {
		return unsupported("HostConfig.IpcMode %s is not supported by Berth together with the network of container %s, which has another", h.IpcMode, other.Config.Name)
	}
	if n := c.request.NetworkingConfig; n != nil && len(n.EndpointsConfig) > 0 {
		return invalid("container sharing network namespace with another container or host cannot be connected to any other network")
	}
	h.NetworkMode = containertypes.NetworkMode("container:" + other.Config.ID)
	c.container.Sandbox = box.Config.ID
	c.request.Config.Hostname = box.Config.Hostname
	if c.request.Config.Hostname == "" {
		c.request.Config.Hostname = box.Config.ID[:min(len(box.Config.ID), shortIDLength)]
	}
	return nil
}

// planEndpoints resolves the networks and what is wished for on each.
func (c *creation) planEndpoints() ([]network.Network, error) {
	s, h := c.server, c.request.HostConfig
	same := func(a, b string) bool {
		n1, err1 := s.networks.Get(a)
		n2, err2 := s.networks.Get(b)
		return err1 == nil && err2 == nil && n1.ID == n2.ID
	}
	wishes, err := wishedEndpoints(h.NetworkMode, c.request.NetworkingConfig, same)
	if err != nil {
		return nil, err
	}
	var networks []network.Network
	self := engine.Container{Config: c.container}
	for i, wish := range wishes {
		n, err := s.networks.Get(wish.ref)
		if err != nil {
			return nil, invalid("network %s not found", wish.ref) // see joinSandbox
		}
		if n.Config.Driver != "" && n.Config.Driver != network.DriverBridge {
			return nil, invalid("container cannot be connected to network %s together with others", n.Config.Name)
		}
		if wish.settings != nil && len(wish.settings.DriverOpts) > 0 {
			return nil, unsupported("DriverOpts of an endpoint are not supported by Berth (network %s)", n.Config.Name)
		}
		ep, err := endpointWish(n, wish.settings)
		if err != nil {
			return nil, err
		}
		if i == 0 && c.request.MacAddress != "" {
			if ep.MAC != "" && ep.MAC != c.request.MacAddress {
				return nil, invalid("the container-wide MAC address must match the endpoint-specific MAC address for the main network, or be left empty")
			}
			ep.MAC = c.request.MacAddress
		}
		ep.Aliases = endpointAliases(self, n, ep.Aliases)
		c.sandbox.Endpoints = append(c.sandbox.Endpoints, ep)
		networks = append(networks, n)
	}
	return networks, nil
}

// mounts makes the volumes that are missing and completes the mounts.
func (c *creation) mounts(ctx context.Context) error {
	plans, err := planMounts(c.request.HostConfig, c.request.Config.Volumes, c.version, c.server.engine.Container)
	if err != nil {
		return err
	}
	for _, p := range plans {
		if p.words != "" {
			if c.dialect.MountModes == nil {
				c.dialect.MountModes = map[string]string{}
			}
			c.dialect.MountModes[p.Target] = p.words
		}
		if p.Kind == engine.MountVolume {
			if err := c.volume(ctx, &p); err != nil {
				return err
			}
		}
		c.container.Mounts = append(c.container.Mounts, p.Mount)
	}
	return nil
}

// volume finds or makes the volume of a mount.
func (c *creation) volume(ctx context.Context, p *mountPlan) error {
	s := c.server
	if p.Source != "" {
		_, err := s.volumes.Get(p.Source)
		if err == nil {
			return nil
		}
		if !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
	}
	v, err := s.volumes.Create(ctx, VolumeConfig{
		Name: p.Source, Driver: driverLocal, Labels: p.volumeLabels, Options: p.volumeOptions, Anonymous: p.Source == "",
	})
	if err != nil {
		return err
	}
	p.Source = v.Name
	s.publishVolume("create", v)
	c.undo = append(c.undo, func(ctx context.Context) {
		if len(volumeUsers(s.engine.Containers())[v.Name]) > 0 {
			return // somebody else took it meanwhile
		}
		if err := s.volumes.Remove(ctx, v.Name); err != nil {
			s.log.Warn("volume of a container that was not created", "volume", v.Name, "error", err)
			return
		}
		s.publishVolume("destroy", v)
	})
	return nil
}

// commit makes the sandbox and the container.
func (c *creation) commit(ctx context.Context) (engine.Container, error) {
	s := c.server
	adaptHostConfig(c.request.HostConfig, s.info.SwapLimit, s.info.CgroupVersion)
	c.dialect.Config, c.dialect.HostConfig = c.request.Config, &c.request.HostConfig.HostConfig
	c.dialect.NetworkingConfig = c.request.NetworkingConfig
	var err error
	if c.container.Dialect, err = json.Marshal(c.dialect); err != nil {
		return engine.Container{}, err
	}
	if c.sandbox != nil {
		box, err := s.engine.CreateSandbox(ctx, *c.sandbox)
		if err != nil {
			return engine.Container{}, err
		}
		c.container.Sandbox = box.Config.ID
		c.undo = append(c.undo, func(ctx context.Context) {
			if err := s.engine.RemoveSandbox(ctx, box.Config.ID); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				s.log.Warn("sandbox of a container that was not created", "sandbox", box.Config.ID, "error", err)
			}
		})
	}
	made, err := s.engine.CreateContainer(ctx, c.container)
	if errors.Is(err, errdefs.ErrExists) {
		return made, conflict("%w", err)
	}
	return made, err
}
