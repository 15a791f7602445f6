package engine

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/network"
	"berth/internal/runner"
)

// What the engine needs of the lower tiers. Each is implemented by one concrete type of the
// package it names; tests use fakes.

// Store is the node's journal (package state).
type Store interface {
	Put(kind, key string, v any) error
	Delete(kind, key string) error
	Each(kind string, f func(key string, raw json.RawMessage) error) error
}

// Runner starts processes (package runner). The engine reconnects by itself; see link.go.
type Runner interface {
	Create(ctx context.Context, r runner.CreateRequest) (runner.Process, error)
	Exec(ctx context.Context, r runner.ExecRequest) (runner.Process, error)
	Kill(ctx context.Context, id string, signal int, all bool) error
	Resize(ctx context.Context, id string, height, width uint16) error
	OpenStdin(ctx context.Context, id string) (*os.File, error)
	CloseStdin(ctx context.Context, id string) error
	Pause(ctx context.Context, id string) error
	Resume(ctx context.Context, id string) error
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	Delete(ctx context.Context, id string) error
	List(ctx context.Context) ([]runner.Status, error)
	Events() <-chan runner.Event
	Closed() <-chan struct{}
	Close() error
}

// Images gives root file systems (package image).
type Images interface {
	RootFS(ctx context.Context, id digest.Digest) ([]string, error)
	// Release says that no container uses the image any more: if it was removed by force
	// meanwhile, its layers go now.
	Release(ctx context.Context, id digest.Digest) error
}

// Networks gives namespaces, addresses and ports (package network).
type Networks interface {
	Get(ref string) (network.Network, error)
	NewNamespaces(sandbox, hostname, domainname string, own network.NS, sysctls map[string]string) error
	Stats(netns string) (map[string]network.Counters, error)
	RemoveNamespaces(sandbox string) error
	Attach(ctx context.Context, r network.AttachRequest) (network.Endpoint, error)
	Detach(ctx context.Context, sandbox, network string) error
	Release(ctx context.Context, sandbox string) error
	Publish(ctx context.Context, sandbox string, addr netip.Addr, ports []network.Port) ([]network.Port, error)
	Restore(ctx context.Context, live map[string]bool) error
	Teardown(ctx context.Context) error
}

// Volumes gives named volumes (package volume).
type Volumes interface {
	Path(name string) (string, error)
	CopyUp(ctx context.Context, name, rootfs, path string) error
	Remove(ctx context.Context, name string) error
	// Teardown unmounts what volumes have mounted.
	Teardown() error
}

// Resolvers answers names in sandboxes (package dns on sockets of package network).
type Resolvers interface {
	// Serve answers queries of the sandbox until Stop.
	Serve(sandbox, netns string) error
	Stop(sandbox string)
}
