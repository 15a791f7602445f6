package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
)

// Labels on content, by which containerd's garbage collection follows references.
const (
	labelRefContent  = "containerd.io/gc.ref.content."
	labelRefSnapshot = "containerd.io/gc.ref.snapshot." + snapshotterName
	labelRefView     = labelRefSnapshot + "/view"
	labelSize        = "berth.io/size" // unpacked bytes of the image, on its config
)

const (
	dockerLayerTar  = "application/vnd.docker.image.rootfs.diff.tar"
	dockerLayerZstd = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	attestationType = "vnd.docker.reference.type" // annotation of what is not an image in an index
	maxIndexDepth   = 3                           // indexes inside indexes
)

// parsed is one platform's image: manifest and config, checked and decoded. It never changes.
type parsed struct {
	id           digest.Digest // of the config
	manifest     ocispec.Descriptor
	config       ocispec.Descriptor
	layers       []ocispec.Descriptor // bottom first
	image        ocispec.Image
	dockerConfig []byte          // the config's "config" object, raw
	chains       []digest.Digest // chain ID of each layer; image-spec, config.md, "Layer ChainID"
}

// chain is the key of the topmost snapshot; "" for an image without layers.
func (p *parsed) chain() string {
	if len(p.chains) == 0 {
		return ""
	}
	return p.chains[len(p.chains)-1].String()
}

// viewKey names the view that keeps the chain and tells its directories.
func (p *parsed) viewKey() string { return "view-" + p.chain() }

// descriptorOf describes data.
func descriptorOf(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// checkDescriptor refuses what a hostile manifest might say of a blob.
func checkDescriptor(what string, d ocispec.Descriptor, limit int64) error {
	if err := d.Digest.Validate(); err != nil {
		return errdefs.New(errdefs.ErrInvalid, "%s has the invalid digest %q", what, clip(string(d.Digest)))
	}
	if d.Size < 0 || (limit > 0 && d.Size > limit) {
		return errdefs.New(errdefs.ErrInvalid, "%s has %d bytes; at most %d are accepted", what, d.Size, limit)
	}
	return nil
}

// clip bounds foreign text in an error.
func clip(s string) string {
	const most = 100
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// readBlob reads a small blob of known size from the store and checks its digest.
func (s *Store) readBlob(ctx context.Context, d ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := checkDescriptor("blob "+string(d.Digest), d, limit); err != nil {
		return nil, err
	}
	r, err := s.content.ReaderAt(ctx, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() != d.Size {
		return nil, errdefs.New(errdefs.ErrDataLoss, "blob %s has %d bytes, not %d", d.Digest, r.Size(), d.Size)
	}
	data := make([]byte, d.Size)
	if n, err := r.ReadAt(data, 0); int64(n) < d.Size {
		return nil, fmt.Errorf("read blob %s: %w", d.Digest, err)
	}
	if d.Digest.Algorithm().FromBytes(data) != d.Digest {
		return nil, errdefs.New(errdefs.ErrDataLoss, "blob %s is damaged on the disk", d.Digest)
	}
	return data, nil
}

// blobPresent tells whether the store has the blob, in its database and on the disk. A blob that
// only the database knows (a disk repaired after a power cut) is forgotten, to be fetched again.
func (s *Store) blobPresent(ctx context.Context, d ocispec.Descriptor) (bool, error) {
	if _, err := s.content.Info(ctx, d.Digest); err != nil {
		if cerrdefs.IsNotFound(err) {
			return false, nil
		}
		return false, err
	}
	r, err := s.content.ReaderAt(ctx, d)
	if err == nil {
		size := r.Size()
		r.Close()
		if d.Size == 0 || size == d.Size {
			return true, nil
		}
	} else if !cerrdefs.IsNotFound(err) && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := s.content.Delete(ctx, d.Digest); err != nil && !cerrdefs.IsNotFound(err) {
		return false, err
	}
	s.sweep.Store(true)
	return false, nil
}

// manifestKind is what a manifest's bytes are.
type manifestKind int

const (
	kindUnknown manifestKind = iota
	kindManifest
	kindIndex
	kindSchema1
)

// sniff decides what a manifest is by its own words first and by the declared type second, and
// refuses documents that can be read as two things (CVE-2021-41190).
func sniff(declared string, data []byte) (mediaType string, kind manifestKind, err error) {
	var doc struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return "", kindUnknown, errdefs.New(errdefs.ErrInvalid, "manifest is not valid JSON: %s", oneLine(err))
	}
	mediaType = doc.MediaType
	if mediaType == "" {
		mediaType = declared
	}
	isIndex, isManifest := len(doc.Manifests) > 0, len(doc.Config) > 0 || len(doc.Layers) > 0
	switch {
	case doc.SchemaVersion == 1 || len(doc.FSLayers) > 0:
		return mediaType, kindSchema1, nil
	case isIndex && isManifest:
		return "", kindUnknown, errdefs.New(errdefs.ErrInvalid, "manifest is ambiguous: it has both manifests and layers")
	case isIndex:
		if !images.IsIndexType(mediaType) {
			mediaType = ocispec.MediaTypeImageIndex
		}
		return mediaType, kindIndex, nil
	case isManifest:
		if !images.IsManifestType(mediaType) {
			mediaType = ocispec.MediaTypeImageManifest
		}
		return mediaType, kindManifest, nil
	}
	return "", kindUnknown, errdefs.New(errdefs.ErrInvalid, "unsupported manifest of media type %q", clip(mediaType))
}

// decodeManifest checks a manifest. The config is not read.
func decodeManifest(data []byte) (m ocispec.Manifest, err error) {
	if err := json.Unmarshal(data, &m); err != nil {
		return m, errdefs.New(errdefs.ErrInvalid, "manifest is not valid: %s", oneLine(err))
	}
	switch m.Config.MediaType {
	case images.MediaTypeDockerSchema2Config, ocispec.MediaTypeImageConfig:
	default:
		return m, errdefs.New(errdefs.ErrUnsupported, "not a container image: its configuration has the media type %q", clip(m.Config.MediaType))
	}
	if err := checkDescriptor("image configuration", m.Config, maxConfigBytes); err != nil {
		return m, err
	}
	if m.Config.Digest.Algorithm() != digest.SHA256 {
		return m, errdefs.New(errdefs.ErrUnsupported, "image configurations with %s digests are not supported", m.Config.Digest.Algorithm())
	}
	if len(m.Layers) > maxLayers {
		return m, errdefs.New(errdefs.ErrInvalid, "image has %d layers; at most %d are supported", len(m.Layers), maxLayers)
	}
	for i := range m.Layers {
		l := &m.Layers[i]
		if err := checkDescriptor("layer "+strconv.Itoa(i), *l, 0); err != nil {
			return m, err
		}
		if !layerType(l.MediaType) {
			return m, errdefs.New(errdefs.ErrUnsupported, "layer %d has the unsupported media type %q", i, clip(l.MediaType))
		}
		// Addresses inside a manifest would make this host fetch what a stranger chose.
		l.URLs, l.Data = nil, nil
	}
	m.Config.URLs, m.Config.Data = nil, nil
	return m, nil
}

// layerType tells the media types of layers that can be unpacked; how one is compressed is found
// out from its first bytes.
func layerType(mediaType string) bool {
	for _, base := range []string{
		dockerLayerTar, images.MediaTypeDockerSchema2LayerForeign, ocispec.MediaTypeImageLayer,
		"application/vnd.oci.image.layer.nondistributable.v1.tar",
	} {
		switch rest, ok := strings.CutPrefix(mediaType, base); {
		case !ok:
		case rest == "", rest == "+gzip", rest == "+zstd", rest == ".gzip", rest == ".zstd":
			return true
		}
	}
	return false
}

// decodeConfig checks an image config against its manifest and puts both together.
func decodeConfig(desc ocispec.Descriptor, m ocispec.Manifest, data []byte) (*parsed, error) {
	p := &parsed{id: m.Config.Digest, manifest: desc, config: m.Config, layers: m.Layers}
	var raw struct {
		Config json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(data, &p.image); err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "image configuration is not valid: %s", oneLine(err))
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "image configuration is not valid: %s", oneLine(err))
	}
	if !bytes.Equal(raw.Config, []byte("null")) {
		p.dockerConfig = raw.Config
	}
	diffs := p.image.RootFS.DiffIDs
	if len(diffs) != len(m.Layers) {
		return nil, errdefs.New(errdefs.ErrInvalid, "invalid manifest, layers length mismatch: expected %d, got %d", len(diffs), len(m.Layers))
	}
	for i, d := range diffs {
		if err := d.Validate(); err != nil {
			return nil, errdefs.New(errdefs.ErrInvalid, "layer %d has the invalid diff ID %q", i, clip(string(d)))
		}
		p.chains = append(p.chains, identity.ChainID(append([]digest.Digest(nil), diffs[:i+1]...)))
	}
	return p, nil
}

// parse reads manifest and config of one platform from the store.
func (s *Store) parse(ctx context.Context, desc ocispec.Descriptor) (*parsed, error) {
	data, err := s.readBlob(ctx, desc, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	mediaType, kind, err := sniff(desc.MediaType, data)
	if err != nil {
		return nil, err
	}
	if kind != kindManifest {
		return nil, errdefs.New(errdefs.ErrInvalid, "%s is not an image manifest", desc.Digest)
	}
	m, err := decodeManifest(data)
	if err != nil {
		return nil, err
	}
	config, err := s.readBlob(ctx, m.Config, maxConfigBytes)
	if err != nil {
		return nil, err
	}
	return decodeConfig(ocispec.Descriptor{MediaType: mediaType, Digest: desc.Digest, Size: desc.Size, Platform: desc.Platform}, m, config)
}

// matcher is for a platform as the user wrote it; "" is the host's.
func matcher(platform string) (platforms.MatchComparer, string, error) {
	if platform == "" {
		spec := platforms.DefaultSpec()
		return platforms.Only(spec), platforms.Format(spec), nil
	}
	spec, err := platforms.Parse(platform)
	if err != nil {
		return nil, "", errdefs.New(errdefs.ErrInvalid, "invalid platform %q: %s", clip(platform), oneLine(err))
	}
	return platforms.Only(spec), platforms.Format(spec), nil
}

// choose picks from an index what suits the platform best, among those that available accepts.
func choose(data []byte, platform string, available func(ocispec.Descriptor) bool) (ocispec.Descriptor, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(data, &idx); err != nil {
		return ocispec.Descriptor{}, errdefs.New(errdefs.ErrInvalid, "manifest list is not valid: %s", oneLine(err))
	}
	match, wanted, err := matcher(platform)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var fitting, unlabelled []ocispec.Descriptor
	for _, d := range idx.Manifests {
		if d.Annotations[attestationType] != "" || checkDescriptor("manifest", d, maxManifestBytes) != nil || !available(d) {
			continue
		}
		d.URLs, d.Data = nil, nil
		switch {
		case d.Platform == nil:
			unlabelled = append(unlabelled, d)
		case match.Match(*d.Platform):
			fitting = append(fitting, d)
		}
	}
	if len(fitting) == 0 && len(idx.Manifests) == 1 {
		fitting = unlabelled
	}
	if len(fitting) == 0 {
		return ocispec.Descriptor{}, errdefs.New(errdefs.ErrNotFound, "no matching manifest for %s in the manifest list entries", wanted)
	}
	sort.SliceStable(fitting, func(i, j int) bool {
		a, b := fitting[i].Platform, fitting[j].Platform
		return a != nil && b != nil && match.Less(*a, *b)
	})
	return fitting[0], nil
}

// refLabels are the labels of an index or a manifest for what it refers to.
func refLabels(kind string, children ...ocispec.Descriptor) map[string]string {
	labels := make(map[string]string, len(children))
	for i, d := range children {
		labels[fmt.Sprintf("%s%s.%d", labelRefContent, kind, i)] = d.Digest.String()
	}
	return labels
}

// setLabels adds labels to a blob. Nothing is written when it has them.
func (s *Store) setLabels(ctx context.Context, d digest.Digest, labels map[string]string) error {
	info, err := s.content.Info(ctx, d)
	if err != nil {
		return err
	}
	var fields []string
	for k, v := range labels {
		if info.Labels[k] != v {
			fields = append(fields, "labels."+k)
		}
	}
	if len(fields) == 0 {
		return nil
	}
	_, err = s.content.Update(ctx, content.Info{Digest: d, Labels: labels}, fields...)
	return err
}

// putBlob stores small data with labels; it may be there already.
func (s *Store) putBlob(ctx context.Context, desc ocispec.Descriptor, data []byte, labels map[string]string) error {
	if _, err := s.blobPresent(ctx, desc); err != nil {
		return err
	}
	ref := "blob-" + desc.Digest.String()
	unlock, err := s.locks.lock(ctx, ref)
	if err != nil {
		return err
	}
	defer unlock()
	err = content.WriteBlob(ctx, s.content, ref, bytes.NewReader(data), desc, content.WithLabels(labels))
	if err != nil && !cerrdefs.IsAlreadyExists(err) {
		_ = s.content.Abort(ctx, ref) // frees what was written; the error says the rest
		return err
	}
	return s.setLabels(ctx, desc.Digest, labels)
}

// openBlob streams a blob; size is checked, the digest is not.
func (s *Store) openBlob(ctx context.Context, desc ocispec.Descriptor) (io.ReadSeekCloser, error) {
	r, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	if r.Size() != desc.Size {
		r.Close()
		return nil, errdefs.New(errdefs.ErrDataLoss, "blob %s has %d bytes, not %d", desc.Digest, r.Size(), desc.Size)
	}
	return &blobReader{SectionReader: io.NewSectionReader(r, 0, desc.Size), c: r}, nil
}

type blobReader struct {
	*io.SectionReader
	c io.Closer
}

func (b *blobReader) Close() error { return b.c.Close() }
