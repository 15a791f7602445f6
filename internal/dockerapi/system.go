package dockerapi

import (
	"context"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"

	"berth/internal/engine"
)

// Names that info and version show.
const (
	productName   = "Berth"
	runtimeName   = "berth"
	runnerProgram = "berth-runner"
)

// API versions at which the shape of info changed.
const (
	versionNoBridgeNF       = 50
	versionNoExpectedCommit = 49
	versionFirewall         = 49
	versionNoKernelMemory   = 42
	versionNoKMemTCP        = 52
)

func (s *Server) systemRoutes() []route {
	return []route{
		{method: "GET", pattern: "/_ping", handler: s.ping},
		{method: "HEAD", pattern: "/_ping", handler: s.ping},
		{method: "GET", pattern: "/version", handler: s.showVersion},
		{method: "GET", pattern: "/info", handler: s.showInfo},
		{method: "GET", pattern: "/system/df", handler: s.diskUsage},
		{method: "POST", pattern: "/auth", handler: s.login},
		{method: "POST", pattern: "/containers/prune", handler: s.pruneContainers},
		{method: "POST", pattern: "/build/prune", handler: s.pruneBuildCache},
	}
}

// ping tells clients which version to speak. Builder-Version 1 keeps them from opening BuildKit
// sessions, which Berth does not have.
func (s *Server) ping(w http.ResponseWriter, r *request) error {
	h := w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Builder-Version", "1")
	h.Set("Swarm", string(swarm.LocalNodeStateInactive))
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
		return nil
	}
	_, err := w.Write([]byte("OK"))
	return err
}

func (s *Server) showVersion(w http.ResponseWriter, _ *request) error {
	kernel := kernelRelease()
	built := ""
	if !s.info.Built.IsZero() {
		built = s.info.Built.Format(time.RFC3339Nano)
	}
	v := system.VersionResponse{
		Platform: system.PlatformInfo{Name: productName},
		Version:  s.info.Version, APIVersion: formatVersion(MaxVersion), MinAPIVersion: formatVersion(MinVersion),
		GitCommit: s.info.Commit, GoVersion: runtime.Version(), Os: runtime.GOOS, Arch: runtime.GOARCH,
		KernelVersion: kernel, BuildTime: built,
		Components: []system.ComponentVersion{{
			Name: "Engine", Version: s.info.Version,
			Details: map[string]string{
				"ApiVersion": formatVersion(MaxVersion), "MinAPIVersion": formatVersion(MinVersion),
				"GitCommit": s.info.Commit, "GoVersion": runtime.Version(), "Os": runtime.GOOS, "Arch": runtime.GOARCH,
				"KernelVersion": kernel, "BuildTime": built, "Experimental": "false",
			},
		}},
	}
	if s.info.RunnerVersion != "" {
		v.Components = append(v.Components, system.ComponentVersion{Name: runnerProgram, Version: s.info.RunnerVersion})
	}
	return writeJSON(w, http.StatusOK, v)
}

func (s *Server) showInfo(w http.ResponseWriter, r *request) error {
	images, err := s.images.List(r.Context())
	if err != nil {
		return err
	}
	host := readHost(os.DirFS("/"), s.info.CgroupVersion)
	info := nodeInfo(s.info, host, s.engine.Containers(), len(images))
	out, err := infoAtVersion(info, host, r.version)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, out)
}

// nodeInfo puts together what docker info prints.
func nodeInfo(node Info, host hostFacts, containers []engine.Container, images int) system.Info {
	c := host.cgroup
	info := system.Info{
		ID: node.ID, Images: images, Name: node.Name, ServerVersion: node.Version,
		Driver: storageDriver, DriverStatus: [][2]string{},
		Plugins: system.PluginsInfo{
			Volume: []string{driverLocal}, Network: []string{"bridge", "host", "null"},
			Log: []string{engine.LogJSONFile, engine.LogNone},
		},
		MemoryLimit: c.memory, SwapLimit: c.swap, OomKillDisable: c.oomKillDisable,
		CPUCfsPeriod: c.cfsPeriod, CPUCfsQuota: c.cfsQuota, CPUShares: c.shares, CPUSet: c.cpuset, PidsLimit: c.pids,
		IPv4Forwarding: host.ipv4Forwarding, NGoroutines: runtime.NumGoroutine(),
		SystemTime: time.Now().Format(time.RFC3339Nano), LoggingDriver: engine.LogJSONFile,
		CgroupDriver: "cgroupfs", CgroupVersion: node.CgroupVersion,
		KernelVersion: host.kernel, OperatingSystem: host.operatingSystem, OSVersion: host.osVersion,
		OSType: runtime.GOOS, Architecture: architecture(), NCPU: runtime.NumCPU(), MemTotal: host.memoryBytes,
		IndexServerAddress: hubIndexAddress, RegistryConfig: registryConfig(node),
		DockerRootDir: node.StateDir, Labels: []string{},
		HTTPProxy: proxyEnv("HTTP_PROXY", "http_proxy"), HTTPSProxy: proxyEnv("HTTPS_PROXY", "https_proxy"),
		NoProxy:            proxyEnv("NO_PROXY", "no_proxy"),
		Runtimes:           map[string]system.RuntimeWithStatus{runtimeName: {Runtime: system.Runtime{Path: runnerProgram}}},
		DefaultRuntime:     runtimeName,
		Swarm:              swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive, RemoteManagers: []swarm.Peer{}},
		LiveRestoreEnabled: true, SecurityOptions: slices.Clone(node.SecurityOptions),
		FirewallBackend: &system.FirewallInfo{Driver: "nftables"},
		CDISpecDirs:     []string{}, Warnings: host.warnings(node.CgroupVersion),
	}
	info.ContainerdCommit.ID = linkedVersion("github.com/containerd/containerd/v2")
	info.RuncCommit.ID = linkedVersion("github.com/opencontainers/runc")
	info.InitCommit.ID = notAvailable
	if info.SecurityOptions == nil {
		info.SecurityOptions = []string{}
	}
	if name := backingFilesystem(node.StateDir); name != "" {
		info.DriverStatus = append(info.DriverStatus, [2]string{"Backing Filesystem", name})
	}
	for _, one := range containers {
		info.Containers++
		switch one.State.Status {
		case engine.StatusRunning, engine.StatusRestarting:
			info.ContainersRunning++
		case engine.StatusPaused:
			info.ContainersPaused++
		default:
			info.ContainersStopped++
		}
	}
	return info
}

// notAvailable stands for a version that there is none of, as in dockerd.
const notAvailable = "N/A"

// linkedVersion is the version of a library in this program: Berth has containerd's stores and
// runc's parts in it and not beside it.
func linkedVersion(module string) string {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return notAvailable
	}
	for _, dep := range build.Deps {
		if dep.Path == module {
			return dep.Version
		}
	}
	return notAvailable
}

// infoAtVersion gives info the shape that API 1.minor has.
func infoAtVersion(info system.Info, host hostFacts, minor int) (any, error) {
	if minor < versionFirewall {
		info.FirewallBackend = nil
	}
	if minor >= versionNoKMemTCP {
		return info, nil
	}
	fields, err := asMap(info)
	if err != nil {
		return nil, err
	}
	addMissing(fields, map[string]any{"KernelMemoryTCP": host.cgroup.kernelMemoryTCP})
	if minor < versionNoBridgeNF {
		addMissing(fields, map[string]any{"BridgeNfIptables": host.bridgeNFIPv4, "BridgeNfIp6tables": host.bridgeNFIPv6})
	}
	if minor < versionNoExpectedCommit {
		for _, key := range []string{"ContainerdCommit", "RuncCommit", "InitCommit"} {
			if commit, ok := fields[key].(map[string]any); ok {
				commit["Expected"] = commit["ID"]
			}
		}
	}
	if minor < versionNoKernelMemory {
		addMissing(fields, map[string]any{"KernelMemory": host.cgroup.kernelMemory})
	}
	return fields, nil
}

// architecture is the machine's name for its kind of processor, as uname -m says it.
func architecture() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return runtime.GOARCH
}

// proxyEnv is a proxy setting of the daemon without the password it may carry.
func proxyEnv(names ...string) string {
	for _, name := range names {
		value := os.Getenv(name)
		if value == "" {
			continue
		}
		if u, err := url.Parse(value); err == nil && u.User != nil {
			u.User = url.UserPassword("xxxxx", "xxxxx")
			return u.String()
		}
		return value
	}
	return ""
}

// registryConfig tells which registries are trusted how.
func registryConfig(node Info) *registry.ServiceConfig {
	mirrors := node.Mirrors
	if mirrors == nil {
		mirrors = []string{}
	}
	out := &registry.ServiceConfig{
		Mirrors:               mirrors,
		InsecureRegistryCIDRs: []netip.Prefix{netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("127.0.0.0/8")},
		IndexConfigs: map[string]*registry.IndexInfo{
			hubHost: {Name: hubHost, Mirrors: mirrors, Secure: true, Official: true},
		},
	}
	for _, name := range node.InsecureRegistries {
		if prefix, err := netip.ParsePrefix(name); err == nil {
			if !slices.Contains(out.InsecureRegistryCIDRs, prefix) {
				out.InsecureRegistryCIDRs = append(out.InsecureRegistryCIDRs, prefix)
			}
			continue
		}
		out.IndexConfigs[name] = &registry.IndexInfo{Name: name, Mirrors: []string{}}
	}
	return out
}

// login checks credentials against their registry: POST /auth.
func (s *Server) login(w http.ResponseWriter, r *request) error {
	if err := r.checkJSON(); err != nil {
		return err
	}
	auth, err := decodeAuthBody(r.Body)
	if err != nil {
		return err
	}
	host, err := registryHost(auth.ServerAddress)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), loginTimeout)
	defer cancel()
	status, err := s.images.CheckLogin(ctx, host, credentials(auth))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, registry.AuthResponse{Status: status})
}

// loginTimeout bounds a login check: a registry that does not answer must not hold the user.
const loginTimeout = 30 * time.Second
