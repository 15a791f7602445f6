package cli

// The shapes below are the parts of the Docker API, version 1.47, that this program reads and
// writes; github.com/moby/moby/api has them in full but compiles regular expressions at each
// execution.

type createRequest struct {
	Hostname         string              `json:",omitempty"`
	Domainname       string              `json:",omitempty"`
	User             string              `json:",omitempty"`
	AttachStdin      bool                `json:",omitempty"`
	AttachStdout     bool                `json:",omitempty"`
	AttachStderr     bool                `json:",omitempty"`
	ExposedPorts     map[string]struct{} `json:",omitempty"`
	Tty              bool                `json:",omitempty"`
	OpenStdin        bool                `json:",omitempty"`
	StdinOnce        bool                `json:",omitempty"`
	Env              []string            `json:",omitempty"`
	Cmd              []string            `json:",omitempty"`
	Entrypoint       []string            `json:",omitempty"`
	Healthcheck      *healthConfig       `json:",omitempty"`
	Image            string
	Volumes          map[string]struct{} `json:",omitempty"`
	WorkingDir       string              `json:",omitempty"`
	Labels           map[string]string   `json:",omitempty"`
	StopSignal       string              `json:",omitempty"`
	StopTimeout      *int                `json:",omitempty"`
	HostConfig       hostConfig
	NetworkingConfig networkingConfig
}

type healthConfig struct {
	Test          []string `json:",omitempty"`
	Interval      int64    `json:",omitempty"` // ns
	Timeout       int64    `json:",omitempty"`
	StartPeriod   int64    `json:",omitempty"`
	StartInterval int64    `json:",omitempty"`
	Retries       int      `json:",omitempty"`
}

type hostConfig struct {
	Binds             []string                 `json:",omitempty"`
	NetworkMode       string                   `json:",omitempty"`
	PortBindings      map[string][]portBinding `json:",omitempty"`
	PublishAllPorts   bool                     `json:",omitempty"`
	RestartPolicy     *restartPolicy           `json:",omitempty"`
	AutoRemove        bool                     `json:",omitempty"`
	ConsoleSize       *[2]uint                 `json:",omitempty"`
	CapAdd            []string                 `json:",omitempty"`
	CapDrop           []string                 `json:",omitempty"`
	DNS               []string                 `json:"Dns,omitempty"`
	DNSOptions        []string                 `json:"DnsOptions,omitempty"`
	DNSSearch         []string                 `json:"DnsSearch,omitempty"`
	ExtraHosts        []string                 `json:",omitempty"`
	GroupAdd          []string                 `json:",omitempty"`
	IpcMode           string                   `json:",omitempty"`
	PidMode           string                   `json:",omitempty"`
	UTSMode           string                   `json:",omitempty"`
	OomScoreAdj       int                      `json:",omitempty"`
	Privileged        bool                     `json:",omitempty"`
	ReadonlyRootfs    bool                     `json:",omitempty"`
	SecurityOpt       []string                 `json:",omitempty"`
	Tmpfs             map[string]string        `json:",omitempty"`
	ShmSize           int64                    `json:",omitempty"`
	Sysctls           map[string]string        `json:",omitempty"`
	Memory            int64                    `json:",omitempty"`
	MemorySwap        int64                    `json:",omitempty"`
	MemoryReservation int64                    `json:",omitempty"`
	NanoCPUs          int64                    `json:"NanoCpus,omitempty"`
	CPUShares         int64                    `json:"CpuShares,omitempty"`
	CpusetCpus        string                   `json:",omitempty"`
	CpusetMems        string                   `json:",omitempty"`
	PidsLimit         *int64                   `json:",omitempty"`
	Ulimits           []ulimit                 `json:",omitempty"`
	Devices           []deviceMapping          `json:",omitempty"`
	Mounts            []mount                  `json:",omitempty"`
	LogConfig         *logConfig               `json:",omitempty"`
	Init              *bool                    `json:",omitempty"`
}

type portBinding struct {
	HostIP   string `json:"HostIp"`
	HostPort string
}

type restartPolicy struct {
	Name              string
	MaximumRetryCount int
}

type ulimit struct {
	Name       string
	Soft, Hard int64
}

type deviceMapping struct{ PathOnHost, PathInContainer, CgroupPermissions string }

type logConfig struct {
	Type   string
	Config map[string]string
}

type mount struct {
	Type          string
	Source        string         `json:",omitempty"`
	Target        string         `json:",omitempty"`
	ReadOnly      bool           `json:",omitempty"`
	BindOptions   *bindOptions   `json:",omitempty"`
	VolumeOptions *volumeOptions `json:",omitempty"`
	TmpfsOptions  *tmpfsOptions  `json:",omitempty"`
}

type bindOptions struct {
	Propagation      string `json:",omitempty"`
	NonRecursive     bool   `json:",omitempty"`
	CreateMountpoint bool   `json:",omitempty"`
}

type volumeOptions struct {
	NoCopy bool              `json:",omitempty"`
	Labels map[string]string `json:",omitempty"`
}

type tmpfsOptions struct {
	SizeBytes int64  `json:",omitempty"`
	Mode      uint32 `json:",omitempty"`
}

type networkingConfig struct {
	EndpointsConfig map[string]*endpointSettings `json:",omitempty"`
}

type endpointSettings struct {
	IPAMConfig *ipamConfig `json:",omitempty"`
	Aliases    []string    `json:",omitempty"`
	MacAddress string      `json:",omitempty"`
}

type ipamConfig struct {
	IPv4Address string `json:",omitempty"`
}

type createResponse struct {
	ID       string `json:"Id"`
	Warnings []string
}

type waitResponse struct {
	StatusCode int
	Error      *struct{ Message string }
}

type containerSummary struct {
	ID              string `json:"Id"`
	Names           []string
	Image           string
	ImageID         string
	Command         string
	Created         int64
	State           string
	Status          string
	Ports           []portSummary
	Labels          map[string]string
	SizeRw          int64
	Mounts          []struct{ Name, Source, Destination string }
	NetworkSettings struct {
		Networks map[string]struct{ IPAddress string }
	}
}

type portSummary struct {
	IP          string
	PrivatePort uint16
	PublicPort  uint16
	Type        string
}

type containerInspect struct {
	ID     string `json:"Id"`
	Name   string
	Config struct{ Tty bool }
	State  struct {
		Running  bool
		ExitCode int
	}
}

type execInspect struct {
	Running  bool
	ExitCode *int
}

type imageSummary struct {
	ID          string `json:"Id"`
	RepoTags    []string
	RepoDigests []string
	Created     int64
	Size        int64
	Containers  int64
}

// transfer is one line of progress, docker's JSON stream.
type transfer struct {
	Stream      string          `json:"stream"`
	Status      string          `json:"status"`
	ID          string          `json:"id"`
	Progress    *transferDetail `json:"progressDetail"`
	Error       string          `json:"error"`
	ErrorDetail *transferError  `json:"errorDetail"`
	Aux         any             `json:"aux"`
}

type transferDetail struct {
	Current int64 `json:"current"`
	Total   int64 `json:"total"`
}

type transferError struct {
	Message string `json:"message"`
	Kind    string `json:"kind"`
}
