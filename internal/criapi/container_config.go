package criapi

import (
	"encoding/json"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/image"
)

// containerDialect is what the engine keeps for us with a container. Lists need all but Config.
type containerDialect struct {
	Name     string          `json:"name"`
	Attempt  uint32          `json:"attempt,omitempty"`
	Image    string          `json:"image"`    // as the request named it
	ImageRef string          `json:"imageRef"` // by digest where it has one
	Config   json.RawMessage `json:"config"`   // runtimeapi.ContainerConfig
}

func (d containerDialect) metadata() *runtimeapi.ContainerMetadata {
	return &runtimeapi.ContainerMetadata{Name: d.Name, Attempt: d.Attempt}
}

func (d containerDialect) config() (*runtimeapi.ContainerConfig, error) {
	var c runtimeapi.ContainerConfig
	err := protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(d.Config, &c)
	return &c, err
}

// pod is the sandbox that a container is made for.
type pod struct {
	box     engine.Sandbox
	dialect sandboxDialect
	config  *runtimeapi.PodSandboxConfig
}

// containerConfig translates a container, with its image's config merged into it.
func containerConfig(c *runtimeapi.ContainerConfig, p pod, img image.Image) (engine.ContainerConfig, error) {
	var out engine.ContainerConfig
	m := c.GetMetadata()
	if err := checkContainer(c); err != nil {
		return out, err
	}
	raw, err := protojson.Marshal(c)
	if err != nil {
		return out, err
	}
	d := containerDialect{Name: m.Name, Attempt: m.GetAttempt(), Image: c.GetImage().GetImage(), ImageRef: imageRef(img), Config: raw}
	dialect, err := json.Marshal(d)
	if err != nil {
		return out, err
	}
	named := c.GetImage().GetUserSpecifiedImage()
	if named == "" {
		named = d.Image
	}
	out = engine.ContainerConfig{
		Name: objectName(m.Name, p.dialect.Name, p.dialect.Namespace, p.dialect.UID, m.GetAttempt()), Owner: engine.OwnerCRI, Sandbox: p.box.Config.ID,
		Labels: c.GetLabels(), Annotations: c.GetAnnotations(), Image: named, ImageID: string(img.ID),
		Args: command(c, img), Env: environment(c, img), Cwd: c.GetWorkingDir(), User: img.Config.Config.User,
		Terminal: c.GetTty(), OpenStdin: c.GetStdin(), StdinOnce: c.GetStdin() && c.GetStdinOnce(),
		Restart: engine.RestartPolicy{Name: "no"}, Dialect: dialect,
	}
	if out.Cwd == "" {
		out.Cwd = img.Config.Config.WorkingDir
	}
	if out.StopSignal, err = stopSignal(c.GetStopSignal(), img); err != nil {
		return out, err
	}
	if out.Log, err = logConfig(p.box.Config.LogDirectory, c.GetLogPath()); err != nil {
		return out, err
	}
	if out.Mounts, err = mounts(c.GetMounts()); err != nil {
		return out, err
	}
	for _, dev := range c.GetDevices() {
		out.Devices = append(out.Devices, engine.Device{HostPath: dev.GetHostPath(), Path: dev.GetContainerPath(), Permissions: dev.GetPermissions()})
	}
	if err := applyResources(&out.Resources, &out.OOMScoreAdj, "config.linux.resources", c.GetLinux().GetResources()); err != nil {
		return out, err
	}
	return out, applySecurity(&out, c.GetLinux().GetSecurityContext(), p)
}

func checkContainer(c *runtimeapi.ContainerConfig) error {
	switch {
	case c.GetMetadata().GetName() == "":
		return invalid("config.metadata.name of a container is missing")
	case c.GetWindows() != nil:
		return unsupported("config.windows", "this is a Linux node")
	case len(c.GetCDIDevices()) > 0:
		return unsupported("config.CDI_devices", "Berth reads no CDI specifications; name the device nodes in config.devices")
	case c.GetImage().GetRuntimeHandler() != "":
		return unsupported("config.image.runtime_handler", "Berth has one runtime, named by the empty string")
	}
	return nil
}

// imageRef names an image by a digest reference where it has one, else by its ID.
func imageRef(img image.Image) string {
	if len(img.Digests) > 0 {
		return img.Digests[0]
	}
	return string(img.ID)
}

// command merges as the CRI says: a command replaces the image's entrypoint and its arguments,
// args alone replace the image's arguments only.
func command(c *runtimeapi.ContainerConfig, img image.Image) []string {
	entry, args := c.GetCommand(), c.GetArgs()
	if len(entry) == 0 {
		entry = img.Config.Config.Entrypoint
		if len(args) == 0 {
			args = img.Config.Config.Cmd
		}
	}
	return append(append([]string(nil), entry...), args...)
}

// environment is the image's with the container's over it, in order.
func environment(c *runtimeapi.ContainerConfig, img image.Image) []string {
	var out []string
	at := map[string]int{}
	set := func(key, entry string) {
		if i, ok := at[key]; ok {
			out[i] = entry
			return
		}
		at[key] = len(out)
		out = append(out, entry)
	}
	for _, e := range img.Config.Config.Env {
		key, _, _ := strings.Cut(e, "=")
		set(key, e)
	}
	for _, kv := range c.GetEnvs() {
		set(kv.GetKey(), kv.GetKey()+"="+string(kv.GetValue()))
	}
	return out
}

// sameSignal are names for signals that have another name too.
func sameSignal(s runtimeapi.Signal) runtimeapi.Signal {
	switch s {
	case runtimeapi.Signal_SIGCLD:
		return runtimeapi.Signal_SIGCHLD
	case runtimeapi.Signal_SIGIOT:
		return runtimeapi.Signal_SIGABRT
	case runtimeapi.Signal_SIGPOLL:
		return runtimeapi.Signal_SIGIO
	}
	return s
}

// stopSignal is the container's signal in the engine's words: SIGRTMINPLUS3 is SIGRTMIN+3 there.
func stopSignal(s runtimeapi.Signal, img image.Image) (string, error) {
	if s == runtimeapi.Signal_RUNTIME_DEFAULT {
		return img.Config.Config.StopSignal, nil
	}
	s = sameSignal(s)
	if _, ok := runtimeapi.Signal_name[int32(s)]; !ok {
		return "", invalid("config.stop_signal %d: no such signal", s)
	}
	return strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(s.String()), nil
}

// criSignal is the opposite of stopSignal; RUNTIME_DEFAULT for a number.
func criSignal(name string) runtimeapi.Signal {
	if name == "" {
		return runtimeapi.Signal_SIGTERM
	}
	name = "SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG")
	return runtimeapi.Signal(runtimeapi.Signal_value[strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(name)])
}

// logConfig places the log; a container without a path for it has none, as the CRI says.
func logConfig(dir, path string) (engine.LogConfig, error) {
	if dir == "" || path == "" {
		return engine.LogConfig{Driver: engine.LogNone}, nil
	}
	if !filepath.IsLocal(path) {
		return engine.LogConfig{}, invalid("config.log_path %q: must be a path below the sandbox's log_directory", path)
	}
	return engine.LogConfig{Driver: engine.LogCRI, Path: filepath.Join(dir, path)}, nil
}

func mounts(list []*runtimeapi.Mount) ([]engine.Mount, error) {
	var out []engine.Mount
	for _, m := range list {
		field := "mount " + m.GetContainerPath() + ": "
		switch {
		case m.GetSelinuxRelabel():
			return nil, unsupported(field+"selinux_relabel", "Berth sets no SELinux labels")
		case len(m.GetUidMappings()) > 0 || len(m.GetGidMappings()) > 0:
			return nil, unsupported(field+"uidMappings and gidMappings", "Berth does not map owners of mounts")
		case m.GetRecursiveReadOnly():
			return nil, unsupported(field+"recursive_read_only", "Berth makes only the mount itself read-only")
		case m.GetImage().GetImage() != "" || m.GetImageSubPath() != "":
			return nil, unsupported(field+"image", "Berth mounts host paths only")
		case !filepath.IsAbs(m.GetHostPath()):
			return nil, invalid("%shost_path %q: must be an absolute path", field, m.GetHostPath())
		}
		e := engine.Mount{Kind: engine.MountBind, Source: m.GetHostPath(), Target: m.GetContainerPath(), ReadOnly: m.GetReadonly()}
		switch m.GetPropagation() {
		case runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
			e.Propagation = "rprivate"
		case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
			e.Propagation = "rslave"
		case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			e.Propagation = "rshared"
		default:
			return nil, invalid("%spropagation %d: no such propagation", field, m.GetPropagation())
		}
		out = append(out, e)
	}
	return out, nil
}
