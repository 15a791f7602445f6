package dockerapi

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"berth/internal/engine"
	"berth/internal/image"
	"berth/internal/network"
)

// EngineAPI is what this package needs of the node's engine.
type EngineAPI interface {
	engine.SandboxAPI
	engine.ContainerAPI
	engine.ExecAPI
	engine.StreamAPI
}

// ImageAPI is what this package needs of the image store.
type ImageAPI interface {
	image.API
	// LayerSizes returns the unpacked bytes of an image's layers, lowest first.
	LayerSizes(ctx context.Context, id digest.Digest) ([]int64, error)
}

// NetworkAPI is what this package needs of the network service. A ref is an ID, an
// unambiguous prefix of one, or a name.
type NetworkAPI interface {
	// Create makes a network. ErrExists when the name is taken.
	Create(ctx context.Context, c network.Config) (network.Network, error)
	Get(ref string) (network.Network, error)
	List() []network.Network
	// Remove deletes a network. ErrConflict while endpoints are on it, ErrForbidden for a
	// predefined one.
	Remove(ctx context.Context, ref string) error
	// Endpoints returns who is attached now.
	Endpoints(ref string) []network.Endpoint
}

// VolumeConfig asks for a named volume.
type VolumeConfig struct {
	Name      string // "": a generated one of 64 hexadecimal digits, and the volume is anonymous
	Driver    string // "" is local
	Options   map[string]string
	Labels    map[string]string
	Anonymous bool
}

// Volume is a named volume as it is.
type Volume struct {
	VolumeConfig
	Path    string // directory on the node
	Created time.Time
}

// VolumeAPI is what this package needs of the volume store.
type VolumeAPI interface {
	// Create makes a volume, or returns the existing one of that name and driver.
	Create(ctx context.Context, c VolumeConfig) (Volume, error)
	Get(name string) (Volume, error)
	List() []Volume
	// Remove deletes it with its data. Who uses it is this package's to check.
	Remove(ctx context.Context, name string) error
	// SizeBytes walks the volume.
	SizeBytes(ctx context.Context, name string) (int64, error)
}

// Info is what the node says about itself, fixed while it runs.
type Info struct {
	Version            string // of Berth
	Commit             string
	Built              time.Time
	ID                 string // stable identity of the node
	Name               string // host name
	StateDir           string
	CgroupVersion      string   // "1" or "2"
	SwapLimit          bool     // memory plus swap can be limited
	RunnerVersion      string   // of berth-runner
	SecurityOptions    []string // name=seccomp,profile=builtin …
	InsecureRegistries []string
	Mirrors            []string
	// NodeAddress is where published ports of the node answer, for host-gateway on networks
	// without a bridge; "" is 127.0.0.1.
	NodeAddress string
}
