package dockerapi

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	containertypes "github.com/moby/moby/api/types/container"
	networktypes "github.com/moby/moby/api/types/network"

	"berth/internal/engine"
	"berth/internal/image"
)

// Defaults of docker that the wire shows.
const (
	defaultShmBytes       = 64 << 20
	defaultHealthInterval = 30 * time.Second
	defaultHealthTimeout  = 30 * time.Second
	defaultHealthRetries  = 3
	defaultStartInterval  = 5 * time.Second
)

// dialect is what docker said about a container, kept with it to be given back.
type dialect struct {
	Config           *containertypes.Config
	HostConfig       *containertypes.HostConfig
	NetworkingConfig *networktypes.NetworkingConfig `json:",omitempty"`
	MountModes       map[string]string              `json:",omitempty"` // by target, as written behind -v
}

// dialectOf reads what docker said about c; false when another dialect made it.
func dialectOf(c engine.Container) (dialect, bool) {
	var d dialect
	if c.Config.Owner != engine.OwnerDocker || json.Unmarshal(c.Config.Dialect, &d) != nil || d.Config == nil || d.HostConfig == nil {
		return dialect{}, false
	}
	return d, true
}

// mergeImage fills what the user left open from the image's configuration, with docker's rules.
func mergeImage(user *containertypes.Config, img dockerspec.DockerOCIImageConfig) error {
	for port := range img.ExposedPorts {
		p, err := networktypes.ParsePort(port)
		if err != nil {
			return invalid("image exposes %q, which is not a port: %w", port, err)
		}
		if user.ExposedPorts == nil {
			user.ExposedPorts = networktypes.PortSet{}
		}
		user.ExposedPorts[p] = struct{}{}
	}
	user.Env = mergeEnv(user.Env, img.Env)
	if len(img.Labels) > 0 {
		labels := maps.Clone(img.Labels)
		maps.Copy(labels, user.Labels)
		user.Labels = labels
	}
	if len(user.Entrypoint) == 0 {
		if len(user.Cmd) == 0 {
			user.Cmd = img.Cmd
		}
		if user.Entrypoint == nil {
			user.Entrypoint = img.Entrypoint
		}
	} else if len(user.Entrypoint) == 1 && user.Entrypoint[0] == "" {
		user.Entrypoint = nil // --entrypoint "" takes the image's away, and its command with it
	}
	user.Healthcheck = mergeHealth(user.Healthcheck, img.Healthcheck)
	if user.WorkingDir == "" {
		user.WorkingDir = img.WorkingDir
	}
	if user.User == "" {
		user.User = img.User
	}
	if user.StopSignal == "" {
		user.StopSignal = img.StopSignal
	}
	if len(user.Shell) == 0 {
		user.Shell = img.Shell
	}
	if len(img.Volumes) > 0 {
		volumes := maps.Clone(img.Volumes)
		maps.Copy(volumes, user.Volumes)
		user.Volumes = volumes
	}
	return nil
}

// mergeEnv puts the image's variables behind the user's, less those that the user sets or, with
// a name alone, takes away.
func mergeEnv(user, img []string) []string {
	set := map[string]bool{}
	out := make([]string, 0, len(user)+len(img))
	for _, e := range user {
		name, _, hasValue := strings.Cut(e, "=")
		set[name] = true
		if hasValue {
			out = append(out, e)
		}
	}
	for _, e := range img {
		if name, _, _ := strings.Cut(e, "="); !set[name] {
			out = append(out, e)
		}
	}
	return out
}

func mergeHealth(user, img *dockerspec.HealthcheckConfig) *dockerspec.HealthcheckConfig {
	if user == nil || img == nil {
		if user == nil {
			return img
		}
		return user
	}
	out := *user
	if len(out.Test) == 0 {
		out.Test = img.Test
	}
	for _, d := range []struct{ to, from *time.Duration }{
		{&out.Interval, &img.Interval}, {&out.Timeout, &img.Timeout},
		{&out.StartPeriod, &img.StartPeriod}, {&out.StartInterval, &img.StartInterval},
	} {
		if *d.to == 0 {
			*d.to = *d.from
		}
	}
	if out.Retries == 0 {
		out.Retries = img.Retries
	}
	return &out
}

// healthOf translates a health check; nil for none.
func healthOf(h *containertypes.HealthConfig, shell []string) *engine.HealthCheck {
	if h == nil || len(h.Test) < 2 || h.Test[0] == "NONE" {
		return nil
	}
	out := &engine.HealthCheck{
		Args: h.Test[1:], Interval: h.Interval, Timeout: h.Timeout,
		StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries,
	}
	if h.Test[0] == "CMD-SHELL" {
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		out.Args = append(slices.Clone(shell), strings.Join(h.Test[1:], " "))
	}
	if out.Interval == 0 {
		out.Interval = defaultHealthInterval
	}
	if out.Timeout == 0 {
		out.Timeout = defaultHealthTimeout
	}
	if out.StartInterval == 0 {
		out.StartInterval = defaultStartInterval
	}
	if out.Retries == 0 {
		out.Retries = defaultHealthRetries
	}
	return out
}

// adaptHostConfig fills docker's defaults in, as its inspect shows them.
func adaptHostConfig(h *hostConfigRequest, swapLimit bool, cgroupVersion string) {
	if h.NetworkMode.IsDefault() || h.NetworkMode == "" {
		h.NetworkMode = networktypes.NetworkBridge
	}
	if h.ShmSize == 0 {
		h.ShmSize = defaultShmBytes
	}
	if h.IpcMode == "" {
		h.IpcMode = containertypes.IPCModePrivate
	}
	if h.CgroupnsMode == "" {
		h.CgroupnsMode = cgroupnsDefault(h.Privileged, cgroupVersion)
	}
	if h.Memory > 0 && h.MemorySwap == 0 && swapLimit {
		h.MemorySwap = 2 * h.Memory
	}
	if h.PidsLimit != nil && *h.PidsLimit <= 0 {
		h.PidsLimit = nil
	}
	if h.OomKillDisable == nil {
		h.OomKillDisable = new(bool)
	}
	if h.RestartPolicy.Name == "" {
		h.RestartPolicy.Name = containertypes.RestartPolicyDisabled
	}
	if h.LogConfig.Type == "" {
		h.LogConfig.Type = engine.LogJSONFile
	}
	if h.LogConfig.Config == nil {
		h.LogConfig.Config = map[string]string{}
	}
	h.Runtime = runtimeName
}

// cgroupnsDefault is the cgroup namespace that the engine gives.
func cgroupnsDefault(privileged bool, cgroupVersion string) containertypes.CgroupnsMode {
	if cgroupVersion == "2" && !privileged {
		return containertypes.CgroupnsModePrivate
	}
	return containertypes.CgroupnsModeHost
}

// containerOf translates a checked and merged request. Mounts and sandbox are the caller's.
func containerOf(id, name string, q createRequest, img image.Image) (engine.ContainerConfig, error) {
	c, h := q.Config, q.HostConfig
	out := engine.ContainerConfig{
		ID: id, Name: name, Owner: engine.OwnerDocker,
		Labels: c.Labels, Annotations: h.Annotations, Image: c.Image, ImageID: img.ID.String(),
		Args: slices.Concat(c.Entrypoint, c.Cmd), Env: c.Env, Cwd: c.WorkingDir, User: c.User, Groups: h.GroupAdd,
		Terminal: c.Tty, OpenStdin: c.OpenStdin, StdinOnce: c.StdinOnce, Init: h.Init != nil && *h.Init,
		ReadOnlyRootfs: h.ReadonlyRootfs, HostPID: h.PidMode.IsHost(),
		OOMScoreAdj: h.OomScoreAdj, Sysctls: h.Sysctls,
		StopSignal: c.StopSignal, StopTimeout: stopTimeout(c.StopTimeout),
		Restart: engine.RestartPolicy{Name: string(h.RestartPolicy.Name), MaxRetries: h.RestartPolicy.MaximumRetryCount},
		Health:  healthOf(c.Healthcheck, c.Shell), AutoRemove: h.AutoRemove,
	}
	if len(out.Args) == 0 || out.Args[0] == "" && len(out.Args) == 1 {
		return out, invalid("no command specified")
	}
	if c.WorkingDir != "" && !strings.HasPrefix(c.WorkingDir, "/") {
		return out, invalid("the working directory '%s' is invalid, it needs to be an absolute path", c.WorkingDir)
	}
	var err error
	if c.Tty {
		if out.ConsoleSize, err = consoleSize(h.ConsoleSize); err != nil {
			return out, err
		}
	}
	if out.Security, err = securityOf(h); err != nil {
		return out, err
	}
	if out.Devices, err = devicesOf(h); err != nil {
		return out, err
	}
	out.Log.Driver, out.Log.MaxBytes, out.Log.MaxFiles, err = logOptions(h.LogConfig)
	return out, err
}

// stopTimeout translates seconds: nil is the default, negative never.
func stopTimeout(seconds *int) time.Duration {
	switch {
	case seconds == nil:
		return 0
	case *seconds == 0:
		return time.Nanosecond // the engine's zero is the default
	case *seconds < 0:
		return -1
	}
	return time.Duration(min(*seconds, int(maxStopTimeout/time.Second))) * time.Second
}
