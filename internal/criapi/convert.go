package criapi

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/image"
)

// maxProfileBytes bounds a seccomp profile on disk.
const maxProfileBytes = 1 << 20

// containerConfig translates a container's configuration and fills in what its image says.
func containerConfig(c *runtime.ContainerConfig, box engine.Sandbox, img image.Image) (engine.ContainerConfig, error) {
	var pod runtime.PodSandboxConfig
	decodeDialect(box.Config.Dialect, &pod)
	name := c.GetMetadata().GetName()
	if name == "" {
		return engine.ContainerConfig{}, invalid("container: metadata needs a name")
	}
	if err := checkContainer(name, c); err != nil {
		return engine.ContainerConfig{}, err
	}
	keep := proto.Clone(c).(*runtime.ContainerConfig)
	keep.Envs = nil // the engine has them, and they may be secret
	raw, err := encodeDialect(keep, img.ID.String())
	if err != nil {
		return engine.ContainerConfig{}, err
	}
	oci := img.Config.Config
	out := engine.ContainerConfig{
		Name: objectName(name, pod.GetMetadata(), c.GetMetadata().GetAttempt()), Owner: engine.OwnerCRI, Sandbox: box.Config.ID,
		Labels: c.GetLabels(), Annotations: c.GetAnnotations(), Image: imageName(c.GetImage()), ImageID: img.ID.String(),
		Args: arguments(c, oci.Entrypoint, oci.Cmd), Env: environment(c.GetEnvs(), oci.Env), Cwd: c.GetWorkingDir(),
		User: oci.User, Terminal: c.GetTty(), OpenStdin: c.GetStdin(), StdinOnce: c.GetStdinOnce(),
		StopSignal: oci.StopSignal, Dialect: raw,
		Log: engine.LogConfig{Driver: engine.LogNone},
	}
	if out.Cwd == "" {
		out.Cwd = oci.WorkingDir
	}
	if sig := c.GetStopSignal(); sig != runtime.Signal_RUNTIME_DEFAULT {
		out.StopSignal = signalName(sig)
	}
	if box.Config.LogDirectory != "" && c.GetLogPath() != "" {
		out.Log = engine.LogConfig{Driver: engine.LogCRI, Path: filepath.Join(box.Config.LogDirectory, c.GetLogPath())}
	}
	if out.Resources, out.OOMScoreAdj, err = resources(c.GetLinux().GetResources()); err != nil {
		return out, err
	}
	if out.Mounts, err = mounts(c.GetMounts()); err != nil {
		return out, err
	}
	for _, d := range c.GetDevices() {
		out.Devices = append(out.Devices, engine.Device{HostPath: d.GetHostPath(), Path: d.GetContainerPath(), Permissions: d.GetPermissions()})
	}
	if err := applySecurity(&out, c.GetLinux().GetSecurityContext()); err != nil {
		return out, err
	}
	if out.ReadOnlyRootfs {
		coverVolumes(&out, oci.Volumes)
	}
	return out, nil
}

func checkContainer(name string, c *runtime.ContainerConfig) error {
	switch {
	case c.GetWindows() != nil:
		return unsupported("container %s: windows is not supported", name)
	case len(c.GetCDIDevices()) > 0:
		return unsupported("container %s: CDI devices are not supported", name)
	case filepath.IsAbs(c.GetLogPath()) || c.GetLogPath() != "" && !filepath.IsLocal(c.GetLogPath()):
		return invalid("container %s: log path %q leaves the pod's log directory", name, c.GetLogPath())
	case c.GetImage().GetRuntimeHandler() != "":
		return unsupported("container %s: runtime handler %q of an image is not supported", name, c.GetImage().GetRuntimeHandler())
	}
	return nil
}

func imageName(i *runtime.ImageSpec) string { return i.GetImage() }

// arguments follows Kubernetes: command replaces the image's entrypoint and with it its
// arguments, args replaces its arguments.
func arguments(c *runtime.ContainerConfig, entrypoint, cmd []string) []string {
	program, args := c.GetCommand(), c.GetArgs()
	if len(program) == 0 {
		program = entrypoint
		if len(args) == 0 {
			args = cmd
		}
	}
	return slices.Concat(program, args)
}

// environment puts the client's variables over the image's.
func environment(said []*runtime.KeyValue, of []string) []string {
	out := slices.Clone(of)
	for _, kv := range said {
		entry := kv.GetKey() + "=" + string(kv.GetValue())
		i := slices.IndexFunc(out, func(e string) bool { return strings.HasPrefix(e, kv.GetKey()+"=") })
		if i >= 0 {
			out[i] = entry
		} else {
			out = append(out, entry)
		}
	}
	return out
}

// signalName turns the enumeration's names into the usual ones: SIGRTMINPLUS3 is SIGRTMIN+3.
func signalName(s runtime.Signal) string {
	return strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(s.String())
}

func mounts(list []*runtime.Mount) ([]engine.Mount, error) {
	var out []engine.Mount
	for _, m := range list {
		at := m.GetContainerPath()
		switch {
		case m.GetImage() != nil || m.GetImageSubPath() != "":
			return nil, unsupported("mount %s: mounting images is not supported", at)
		case m.GetSelinuxRelabel():
			return nil, unsupported("mount %s: selinux_relabel is not supported", at)
		case m.GetRecursiveReadOnly():
			return nil, unsupported("mount %s: recursive_read_only is not supported", at)
		case len(m.GetUidMappings())+len(m.GetGidMappings()) > 0:
			return nil, unsupported("mount %s: ID-mapped mounts are not supported", at)
		case m.GetHostPath() == "":
			return nil, invalid("mount %s: host_path is missing", at)
		}
		e := engine.Mount{Kind: engine.MountBind, Source: m.GetHostPath(), Target: at, ReadOnly: m.GetReadonly(), CreateSource: true}
		switch m.GetPropagation() {
		case runtime.MountPropagation_PROPAGATION_PRIVATE:
			e.Propagation = "rprivate"
		case runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			e.Propagation = "rslave"
		case runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			e.Propagation = "rshared"
		default:
			return nil, invalid("mount %s: propagation %s is unknown", at, m.GetPropagation())
		}
		out = append(out, e)
	}
	return out, nil
}

// coverVolumes makes the volumes that an image declares writable in a container whose root is
// not. Elsewhere they are plain directories of the container's own layer, which lives as long.
func coverVolumes(c *engine.ContainerConfig, volumes map[string]struct{}) {
	for path := range volumes {
		if !slices.ContainsFunc(c.Mounts, func(m engine.Mount) bool { return filepath.Clean(m.Target) == filepath.Clean(path) }) {
			c.Mounts = append(c.Mounts, engine.Mount{Kind: engine.MountTmpfs, Target: path})
		}
	}
	slices.SortStableFunc(c.Mounts, func(a, b engine.Mount) int { return strings.Compare(a.Target, b.Target) })
}

// resources translates limits; zero is none.
func resources(r *runtime.LinuxContainerResources) (engine.Resources, int, error) {
	for _, h := range r.GetHugepageLimits() {
		if h.GetLimit() > 0 {
			return engine.Resources{}, 0, unsupported("resources: a limit of huge pages (%s) is not supported", h.GetPageSize())
		}
	}
	for key := range r.GetUnified() {
		return engine.Resources{}, 0, unsupported("resources: unified cgroup setting %s is not supported", key)
	}
	return engine.Resources{
		MemoryBytes: r.GetMemoryLimitInBytes(), MemorySwapBytes: r.GetMemorySwapLimitInBytes(),
		CPUQuota: r.GetCpuQuota(), CPUPeriod: r.GetCpuPeriod(), CPUShares: r.GetCpuShares(),
		CpusetCPUs: r.GetCpusetCpus(), CpusetMems: r.GetCpusetMems(),
	}, int(r.GetOomScoreAdj()), nil
}

// merge puts the limits that change has over r.
func merge(r *engine.Resources, change engine.Resources) {
	for _, f := range []struct{ to, from *int64 }{
		{&r.MemoryBytes, &change.MemoryBytes}, {&r.MemorySwapBytes, &change.MemorySwapBytes}, {&r.CPUQuota, &change.CPUQuota},
		{&r.CPUPeriod, &change.CPUPeriod}, {&r.CPUShares, &change.CPUShares},
	} {
		if *f.from != 0 {
			*f.to = *f.from
		}
	}
	if change.CpusetCPUs != "" {
		r.CpusetCPUs = change.CpusetCPUs
	}
	if change.CpusetMems != "" {
		r.CpusetMems = change.CpusetMems
	}
}

func resourcesStatus(c engine.ContainerConfig) *runtime.LinuxContainerResources {
	r := c.Resources
	return &runtime.LinuxContainerResources{
		CpuPeriod: r.CPUPeriod, CpuQuota: r.CPUQuota, CpuShares: r.CPUShares, MemoryLimitInBytes: r.MemoryBytes,
		MemorySwapLimitInBytes: r.MemorySwapBytes, CpusetCpus: r.CpusetCPUs, CpusetMems: r.CpusetMems, OomScoreAdj: int64(c.OOMScoreAdj),
	}
}

// applySecurity translates a security context.
func applySecurity(out *engine.ContainerConfig, sec *runtime.LinuxContainerSecurityContext) error {
	if err := checkSELinux(sec.GetSelinuxOptions()); err != nil {
		return err
	}
	if sec.GetSupplementalGroupsPolicy() != runtime.SupplementalGroupsPolicy_Merge {
		return unsupported("supplemental_groups_policy %s is not supported; use Merge", sec.GetSupplementalGroupsPolicy())
	}
	if len(sec.GetCapabilities().GetAddAmbientCapabilities()) > 0 {
		return unsupported("ambient capabilities are not supported")
	}
	if err := checkNamespaces(sec.GetNamespaceOptions()); err != nil {
		return err
	}
	if err := applyUser(out, sec); err != nil {
		return err
	}
	out.ReadOnlyRootfs = sec.GetReadonlyRootfs()
	out.Security = engine.Security{
		Privileged: sec.GetPrivileged(), NoNewPrivileges: sec.GetNoNewPrivs(),
		CapAdd: sec.GetCapabilities().GetAddCapabilities(), CapDrop: sec.GetCapabilities().GetDropCapabilities(),
		MaskedPaths: sec.GetMaskedPaths(), ReadOnlyPaths: sec.GetReadonlyPaths(),
	}
	switch ns := sec.GetNamespaceOptions(); ns.GetPid() {
	case runtime.NamespaceMode_NODE:
		out.HostPID = true
	case runtime.NamespaceMode_TARGET:
		out.PIDOf = ns.GetTargetId()
	}
	var err error
	if out.Security.Seccomp, err = seccompProfile(sec); err != nil {
		return err
	}
	out.Security.AppArmor, err = appArmorProfile(sec)
	return err
}

func applyUser(out *engine.ContainerConfig, sec *runtime.LinuxContainerSecurityContext) error {
	switch {
	case sec.GetRunAsUser() != nil:
		out.User = strconv.FormatInt(sec.GetRunAsUser().GetValue(), 10)
	case sec.GetRunAsUsername() != "":
		out.User = sec.GetRunAsUsername()
	case sec.GetRunAsGroup() != nil:
		return invalid("run_as_group is set without a user; set run_as_user or run_as_username")
	}
	if g := sec.GetRunAsGroup(); g != nil {
		out.User += ":" + strconv.FormatInt(g.GetValue(), 10)
	}
	for _, g := range sec.GetSupplementalGroups() {
		out.Groups = append(out.Groups, strconv.FormatInt(g, 10))
	}
	return nil
}

func checkSELinux(o *runtime.SELinuxOption) error {
	if o.GetUser()+o.GetRole()+o.GetType()+o.GetLevel() != "" {
		return unsupported("selinux_options are not supported")
	}
	return nil
}

// seccompProfile returns the engine's words for a profile. No profile at all is the default one.
func seccompProfile(sec *runtime.LinuxContainerSecurityContext) (string, error) {
	p := sec.GetSeccomp()
	if p == nil {
		return "", nil
	}
	switch p.GetProfileType() {
	case runtime.SecurityProfile_RuntimeDefault:
		return "", nil
	case runtime.SecurityProfile_Unconfined:
		return "unconfined", nil
	case runtime.SecurityProfile_Localhost:
		path := p.GetLocalhostRef()
		if !filepath.IsAbs(path) {
			return "", invalid("seccomp profile %q: an absolute path is needed", path)
		}
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() || info.Size() > maxProfileBytes {
			return "", invalid("seccomp profile %s: not a readable file of at most %d bytes", path, maxProfileBytes)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return "", invalid("seccomp profile: %w", err)
		}
		return string(raw), nil
	}
	return "", invalid("seccomp profile type %s is unknown", p.GetProfileType())
}

func appArmorProfile(sec *runtime.LinuxContainerSecurityContext) (string, error) {
	p := sec.GetApparmor()
	if p == nil {
		return "", nil
	}
	switch p.GetProfileType() {
	case runtime.SecurityProfile_RuntimeDefault:
		return "", nil
	case runtime.SecurityProfile_Unconfined:
		return "unconfined", nil
	}
	return "", unsupported("apparmor profile %q: only RuntimeDefault and Unconfined are supported", p.GetLocalhostRef())
}
