// Package image keeps container images: references, registry transfer, unpacking and garbage
// collection over containerd's content, metadata and overlay snapshot stores, in one directory.
//
// It does not know containers: who uses an image is told by a function given to Remove and Prune.
// All methods of Store are safe for concurrent use.
package image

import (
	"context"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image as its users see it.
type Image struct {
	ID       digest.Digest      // of the config: docker's image ID
	Target   ocispec.Descriptor // what the names point to: a manifest or an index
	Manifest ocispec.Descriptor // this platform's manifest
	Names    []string           // familiar full references with tags: docker.io/library/busybox:latest
	Digests  []string           // references by digest: docker.io/library/busybox@sha256:…
	Config   ocispec.Image
	// Healthcheck and other fields of the Docker image config that OCI lacks, raw.
	DockerConfig []byte
	SizeBytes    int64 // unpacked snapshots, as docker counts
	Created      time.Time
	Tagged       time.Time // last time a name was set
}

// Credentials log in to one registry. Zero is anonymous. Never logged.
type Credentials struct {
	Username, Password string
	IdentityToken      string
	RegistryToken      string
}

// Progress reports the state of a transfer; called from several goroutines, must not block.
type Progress func(Status)

// Status is one line of progress.
type Status struct {
	ID      string // short layer digest, or "" for a statement on the whole
	Action  string // docker's words: "Pulling fs layer", "Downloading", "Extracting", "Pull complete", "Already exists", "Pushed", …
	Current int64
	Total   int64
}

// PullOptions tune Pull.
type PullOptions struct {
	Credentials Credentials
	Platform    string // "" is the host's
	Progress    Progress
}

// RemoveResult tells what Remove and Prune did, in order, in docker's two kinds.
type RemoveResult struct {
	Untagged string
	Deleted  string
}

// API lists what Store offers; it documents the contract and the compiler checks it.
type API interface {
	// Resolve finds an image by reference, ID or unambiguous ID prefix.
	Resolve(ctx context.Context, ref string) (Image, error)
	List(ctx context.Context) ([]Image, error)
	Pull(ctx context.Context, ref string, o PullOptions) (Image, error)
	Push(ctx context.Context, ref string, c Credentials, p Progress) (digest.Digest, error)
	Tag(ctx context.Context, source, target string) error
	// Remove untags ref, or removes the image when ref was its last name or is its ID.
	// users returns the names of containers using an image and whether any of them runs.
	Remove(ctx context.Context, ref string, force, prune bool, users func(id digest.Digest) (names []string, running bool)) ([]RemoveResult, error)
	// Prune removes unused images: dangling ones, or all when all is set.
	Prune(ctx context.Context, all bool, keep func(Image) bool) (results []RemoveResult, reclaimedBytes int64, err error)
	// Load reads a docker or OCI archive (plain, gzip, zstd) and returns its images.
	Load(ctx context.Context, r io.Reader, p Progress) ([]Image, error)
	// Save writes one archive that both docker and OCI tools read.
	Save(ctx context.Context, w io.Writer, refs []string) error
	// RootFS returns the overlay lower directories of an image, top layer first, unpacking it
	// when that has not been done. For an unpacked image it touches no database: it is on the
	// start path.
	RootFS(ctx context.Context, id digest.Digest) ([]string, error)
	// CheckLogin tries credentials against a registry and returns its status line.
	CheckLogin(ctx context.Context, host string, c Credentials) (string, error)
	// DiskUsage is the bytes of layers (each once) on disk.
	DiskUsage(ctx context.Context) (layersBytes int64, err error)
}
