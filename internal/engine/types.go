// Package engine is the life of sandboxes and containers on one node. It knows neither Docker
// nor Kubernetes: dialects translate to and from its types, which have the shape of the CRI.
//
// The engine owns the journal records of sandboxes and containers, their directories, their
// restart policies, health checks and logs. Processes belong to berth-runner, images to package
// image, addresses to package network. All methods of Engine are safe for concurrent use.
// Values that it returns are copies.
package engine

import (
	"encoding/json"
	"net/netip"
	"time"

	"berth/internal/network"
)

// Owner names the dialect that made an object.
type Owner string

// The owners there are.
const (
	OwnerDocker Owner = "docker"
	OwnerCRI    Owner = "cri"
)

// NetworkMode says where a sandbox's network namespace comes from.
type NetworkMode string

// The modes.
const (
	NetworkOwn  NetworkMode = ""     // a namespace of its own with Endpoints attached
	NetworkHost NetworkMode = "host" // the node's
	NetworkNone NetworkMode = "none" // a namespace of its own with a loopback only
)

// SandboxConfig describes what several containers share: network, IPC and UTS namespaces.
type SandboxConfig struct {
	ID          string // "": generated, 64 hexadecimal digits
	Name        string // unique on the node; "": the ID
	Owner       Owner
	Labels      map[string]string
	Annotations map[string]string

	Hostname   string // "": the first 12 digits of the ID
	Domainname string
	HostIPC    bool
	HostUTS    bool
	Sysctls    map[string]string // namespaced kernel parameters of net.* and kernel.*

	Network    NetworkMode
	Endpoints  []EndpointConfig // with NetworkOwn
	Ports      []network.Port   // published on the first endpoint; host port 0 is chosen at start
	DNS        DNSConfig
	ExtraHosts []string // "name:address", for /etc/hosts

	CgroupParent string // "": the instance's own
	LogDirectory string // CRI: where containers' log paths are relative to
	ShmBytes     int64  // size of /dev/shm; 0: 64 MiB

	// Private is set by the engine when a container with the same ID is made: the sandbox then
	// lives and ends with the containers in it.
	Private bool

	Dialect json.RawMessage // the dialect's own words, kept for its inspect; opaque here
}

// EndpointConfig is a wish for a place on a network.
type EndpointConfig struct {
	Network       string // ID or name
	Aliases       []string
	Address       netip.Addr
	MAC           string
	DriverOptions map[string]string
}

// DNSConfig is the content of resolv.conf beyond the node's own.
type DNSConfig struct {
	Servers  []string
	Searches []string
	Options  []string
}

// SandboxState tells what a sandbox is.
type SandboxState struct {
	Ready     bool // namespaces exist, network is attached
	Created   time.Time
	Endpoints []network.Endpoint
	Ports     []network.Port // with the host ports chosen
	NetNS     string         // path; "" for the node's
}

// Sandbox is a sandbox as it is.
type Sandbox struct {
	Config SandboxConfig
	State  SandboxState
}

// ContainerConfig describes a container. The dialect has merged the image's config into it.
type ContainerConfig struct {
	ID          string // "": generated
	Name        string // unique on the node, without a leading slash; "": the ID
	Owner       Owner
	Sandbox     string // ID of an existing sandbox
	Labels      map[string]string
	Annotations map[string]string

	Image   string // as the user named it
	ImageID string // digest of its config

	Args        []string // program and arguments; empty is refused
	Env         []string
	Cwd         string
	User        string   // name or uid, optionally ":" group or gid; resolved in the container's files at start
	Groups      []string // supplementary, names or numbers
	Terminal    bool
	ConsoleSize [2]uint16 // height, width
	OpenStdin   bool
	StdinOnce   bool // stdin closes when the first attached client leaves
	Init        bool // a small init reaps zombies and forwards signals

	ReadOnlyRootfs bool
	Mounts         []Mount
	Resources      Resources
	Security       Security
	Devices        []Device
	HostPID        bool
	PIDOf          string // share the PID namespace of this container
	OOMScoreAdj    int
	Sysctls        map[string]string

	StopSignal  string        // "": SIGTERM
	StopTimeout time.Duration // 0: 10 s
	Restart     RestartPolicy
	Health      *HealthCheck
	AutoRemove  bool
	Log         LogConfig

	Dialect json.RawMessage
}

// Mount kinds.
const (
	MountBind   = "bind"
	MountVolume = "volume"
	MountTmpfs  = "tmpfs"
)

// Mount is one more file system in a container.
type Mount struct {
	Kind         string
	Source       string // host path, or the volume's name
	Target       string // absolute, inside
	ReadOnly     bool
	Propagation  string // private, rprivate, slave, rslave, shared, rshared; "" is rprivate
	NonRecursive bool
	NoCopy       bool     // a new volume is not filled from the image
	Anonymous    bool     // the volume belongs to this container and goes with rm -v and --rm
	SizeBytes    int64    // tmpfs; 0 is unlimited
	Mode         uint32   // tmpfs; 0 is 01777
	Options      []string // tmpfs: noexec, uid=1000, …
	CreateSource bool     // bind: make a missing host directory, as docker's -v does
}

// Resources are limits; zero is none.
type Resources struct {
	MemoryBytes       int64
	MemorySwapBytes   int64 // memory plus swap; -1 unlimited
	MemoryReservation int64
	CPUQuota          int64 // µs per period
	CPUPeriod         int64 // µs; 0 with a quota is 100000
	CPUShares         int64 // v1 shares, 2 to 262144
	CpusetCPUs        string
	CpusetMems        string
	PidsLimit         int64 // -1 unlimited
	OOMKillDisable    bool
	Unified           map[string]string // cgroup v2 files and what to write into them
	Ulimits           []Ulimit
}

// Ulimit is one rlimit.
type Ulimit struct {
	Name       string // nofile, nproc, …
	Soft, Hard int64  // -1 unlimited
}

// Security settings of a container. The zero value is docker's default confinement.
type Security struct {
	Privileged      bool
	CapAdd, CapDrop []string // with or without CAP_; ALL
	NoNewPrivileges bool
	Seccomp         string // "": default profile; "unconfined"; else a profile as JSON
	AppArmor        string // "": default where the host has AppArmor; "unconfined"
	// Masked and ReadOnly paths: nil is the default set, empty is none.
	MaskedPaths   []string
	ReadOnlyPaths []string
}

// Device is one device node.
type Device struct {
	HostPath, Path, Permissions string // rwm
}

// RestartPolicy tells when a container is started again after it ended.
type RestartPolicy struct {
	Name       string // no, on-failure, always, unless-stopped; "" is no
	MaxRetries int    // on-failure; 0 is no bound
}

// HealthCheck probes a running container.
type HealthCheck struct {
	Args          []string // run inside; never empty
	Interval      time.Duration
	Timeout       time.Duration
	StartPeriod   time.Duration
	StartInterval time.Duration
	Retries       int
}

// Log drivers of the engine.
const (
	LogJSONFile = "json-file" // docker's, bounded
	LogCRI      = "cri"       // Kubernetes' text format at Path
	LogNone     = "none"
)

// LogConfig bounds and places a container's rendered log.
type LogConfig struct {
	Driver   string // "" is json-file
	MaxBytes int64  // per file; 0: 10 MB
	MaxFiles int    // 0: 3
	Path     string // cri: absolute file
}

// Status is where in its life a container is.
type Status string

// The statuses, in docker's words.
const (
	StatusCreated    Status = "created"
	StatusRunning    Status = "running"
	StatusPaused     Status = "paused"
	StatusRestarting Status = "restarting"
	StatusExited     Status = "exited"
	StatusRemoving   Status = "removing"
	StatusDead       Status = "dead"
)

// ContainerState is what happened to a container.
type ContainerState struct {
	Status        Status
	Created       time.Time
	StartedAt     time.Time
	FinishedAt    time.Time
	PID           int
	ExitCode      int
	ExitKnown     bool // false after an exit that nobody could observe; ExitCode is then 255
	OOMKilled     bool
	Error         string // why the last start failed
	RestartCount  int
	Attempts      int       `json:",omitempty"` // restarts since the last run that was long enough to forget them
	NextRestart   time.Time // while restarting
	StoppedByUser bool      // unless-stopped looks at it; also always, until the daemon restarts
	Health        *Health
	LogPath       string
	Restarts      []Past // the last few ends, newest last, for explain
}

// Past is one earlier end of a container.
type Past struct {
	At        time.Time
	ExitCode  int
	OOMKilled bool
	Ran       time.Duration
}

// Health statuses.
const (
	HealthStarting  = "starting"
	HealthHealthy   = "healthy"
	HealthUnhealthy = "unhealthy"
)

// Health is the state of the health check.
type Health struct {
	Status        string
	FailingStreak int
	Log           []HealthResult // the last five
}

// HealthResult is one probe.
type HealthResult struct {
	Start, End time.Time
	ExitCode   int
	Output     string // at most 4096 bytes
}

// Container is a container as it is.
type Container struct {
	Config ContainerConfig
	State  ContainerState
}

// ExecConfig describes one more process in a running container.
type ExecConfig struct {
	Container   string // ID or name
	Args        []string
	Env         []string // added to the container's
	Cwd         string   // "": the container's
	User        string   // "": the container's
	Terminal    bool
	ConsoleSize [2]uint16
	OpenStdin   bool
	Privileged  bool
	Dialect     json.RawMessage
}

// Exec is an exec as it is.
type Exec struct {
	ID       string
	Config   ExecConfig
	Running  bool
	Started  bool
	PID      int
	ExitCode int // meaningful when Started and not Running
}
