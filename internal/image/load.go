package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
)

// Bounds of an archive.
const (
	maxArchiveEntries = 16384
	maxArchiveImages  = 1024
	maxLinkHops       = 8        // links to links inside an archive
	smallFileBytes    = 64 << 10 // files up to here are kept in memory while reading …
	maxSmallBytes     = 8 << 20  // … up to so many bytes altogether
)

// The files that tell what an archive is.
const (
	dockerManifest = "manifest.json" // docker save
	ociIndex       = "index.json"    // image-spec, image-layout.md
	legacyIndex    = "repositories"  // docker before 1.10
	ociBlobs       = "blobs/"        // blobs/<algorithm>/<digest>
	nameAnnotation = images.AnnotationImageName
)

// Load reads an archive of docker save or an OCI layout, plain, gzip or zstd, unpacks its images
// and names them all at once. A damaged, truncated or hostile archive is refused with
// errdefs.ErrInvalid or ErrDataLoss and leaves nothing. The images are returned in the archive's
// order; one without a name in it is found by ID.
func (s *Store) Load(ctx context.Context, r io.Reader, p Progress) (_ []Image, err error) {
	ctx, end, err := s.lease(s.context(ctx), tempLease("load"))
	if err != nil {
		return nil, err
	}
	defer func() { end(err) }()
	l := &loading{s: s, progress: p, id: randomID(), files: map[string]file{}}
	loaded, err := l.run(ctx, r)
	if err != nil {
		return nil, localError("load", err)
	}
	var out []Image
	for _, one := range loaded {
		img, err := s.Resolve(ctx, one.p.id.String())
		if err != nil {
			return nil, err
		}
		out = append(out, img)
		for _, n := range one.names {
			p.say("", "Loaded image: "+familiar(n))
		}
		if len(one.names) == 0 {
			p.say("", "Loaded image ID: "+one.p.id.String())
		}
	}
	return out, nil
}

// loading is one Load.
type loading struct {
	s        *Store
	progress Progress
	id       string
	files    map[string]file
	small    int64 // bytes in memory
}

// file is one entry of the archive: in memory, in the store, or a link.
type file struct {
	data   []byte
	digest digest.Digest // set when in the store
	size   int64
	magic  []byte // first bytes
	link   string // what it is another name of
}

// found is one image of the archive.
type found struct {
	p     *parsed
	root  ocispec.Descriptor
	names []string // canonical
}

func (l *loading) run(ctx context.Context, r io.Reader) ([]*found, error) {
	if err := l.scan(ctx, r); err != nil {
		return nil, err
	}
	loaded, err := l.images(ctx)
	if err != nil {
		return nil, err
	}
	set := map[string]*record{}
	for _, one := range loaded {
		if err := l.unpack(ctx, one.p); err != nil {
			return nil, err
		}
		for _, n := range one.names {
			set[n] = newRecord(n, one.root, one.p)
		}
		if len(one.names) == 0 {
			id := one.p.id.String()
			set[id] = newRecord(id, one.root, one.p)
		}
	}
	return loaded, l.s.apply(ctx, change{set: set})
}

// archiveError is for what is wrong with the archive itself.
func archiveError(format string, args ...any) error {
	return errdefs.New(errdefs.ErrInvalid, "load: "+format, args...)
}

// scan reads the whole archive: layers go to the store, small files to memory.
func (l *loading) scan(ctx context.Context, r io.Reader) error {
	stream, err := decompress(&countingReader{ctx: ctx, r: r, report: func(int64) {}})
	if err != nil {
		return readError(err)
	}
	defer stream.Close()
	tr := tar.NewReader(stream)
	for n := 0; ; n++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return archiveError("the archive is empty")
			}
			break
		}
		if err != nil {
			return readError(err)
		}
		if n == maxArchiveEntries {
			return archiveError("the archive has more than %d entries", maxArchiveEntries)
		}
		name := path.Clean("/" + hdr.Name)[1:]
		switch hdr.Typeflag {
		case tar.TypeReg:
			f, err := l.store(ctx, name, hdr.Size, tr)
			if err != nil {
				return err
			}
			l.files[name] = f
		case tar.TypeSymlink:
			l.files[name] = file{link: path.Clean("/" + path.Join(path.Dir(name), hdr.Linkname))[1:]}
		case tar.TypeLink:
			l.files[name] = file{link: path.Clean("/" + hdr.Linkname)[1:]}
		}
	}
	// The rest is padding; reading it checks the compression's own checksum.
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return readError(err)
	}
	return nil
}

// readError is a failure of reading the archive; the client may also have gone away.
func readError(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return archiveError("the archive is truncated: unexpected EOF")
	}
	return archiveError("the archive cannot be read: %s", oneLine(err))
}

// sourceError marks errors of reading, to tell them from those of our disk.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

type sourceReader struct{ r io.Reader }

func (s sourceReader) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		err = sourceError{err}
	}
	return n, err
}

// store keeps one file and checks its digest when its path says one.
func (l *loading) store(ctx context.Context, name string, size int64, r io.Reader) (file, error) {
	want, err := blobDigest(name)
	if err != nil {
		return file{}, err
	}
	if size <= smallFileBytes && l.small+size <= maxSmallBytes {
		data, err := io.ReadAll(r)
		if err != nil {
			return file{}, readError(err)
		}
		l.small += int64(len(data))
		if want != "" && want.Algorithm().FromBytes(data) != want {
			return file{}, errdefs.New(errdefs.ErrDataLoss, "load: blob %s does not match its digest", want)
		}
		return file{data: data, size: int64(len(data)), magic: data[:min(4, len(data))]}, nil
	}
	return l.ingest(ctx, name, want, size, r)
}

// ingest streams a file into the content store.
func (l *loading) ingest(ctx context.Context, name string, want digest.Digest, size int64, r io.Reader) (file, error) {
	f := file{digest: want, size: size}
	ref := fmt.Sprintf("load-%s-%d", l.id, len(l.files))
	desc := ocispec.Descriptor{Size: size}
	if want != "" {
		desc.Digest = want
		if _, err := l.s.blobPresent(ctx, desc); err != nil {
			return f, err
		}
	}
	src := &headReader{r: sourceReader{r}}
	w, err := content.OpenWriter(ctx, l.s.content, content.WithRef(ref), content.WithDescriptor(desc))
	if cerrdefs.IsAlreadyExists(err) {
		if _, err := io.CopyN(io.Discard, src, size); err != nil {
			return f, readError(err)
		}
		f.magic = src.head
		return f, nil
	}
	if err != nil {
		return f, err
	}
	defer w.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, src, make([]byte, copyBuffer))
	if err != nil || n != size {
		w.Close()
		_ = l.s.content.Abort(ctx, ref) // makes room; the lease's end removes the rest
		var source sourceError
		if errors.As(err, &source) || err == nil {
			return f, readError(errors.Join(err, io.ErrUnexpectedEOF))
		}
		return f, err
	}
	f.magic = src.head
	err = w.Commit(ctx, size, want)
	f.digest = w.Digest()
	if cerrdefs.IsFailedPrecondition(err) {
		return f, errdefs.New(errdefs.ErrDataLoss, "load: %s does not match its digest: it has %s", name, f.digest)
	}
	if err != nil && !cerrdefs.IsAlreadyExists(err) {
		return f, err
	}
	return f, nil
}

// headReader remembers the first bytes.
type headReader struct {
	r    io.Reader
	head []byte
}

func (h *headReader) Read(b []byte) (int, error) {
	n, err := h.r.Read(b)
	if room := 4 - len(h.head); room > 0 {
		h.head = append(h.head, b[:min(room, n)]...)
	}
	return n, err
}

// blobDigest is the digest that a path of an OCI layout states, "" for other paths.
func blobDigest(name string) (digest.Digest, error) {
	rest, ok := strings.CutPrefix(name, ociBlobs)
	if !ok {
		return "", nil
	}
	algorithm, hex, ok := strings.Cut(rest, "/")
	if !ok {
		return "", nil
	}
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
	if err := d.Validate(); err != nil {
		return "", archiveError("%q is no blob: %s", clip(name), oneLine(err))
	}
	return d, nil
}

// file finds an entry through links.
func (l *loading) file(name string) (file, bool) {
	name = path.Clean("/" + name)[1:]
	for range maxLinkHops {
		f, ok := l.files[name]
		if !ok || f.link == "" {
			return f, ok
		}
		name = f.link
	}
	return file{}, false
}

// read returns the contents of a small file.
func (l *loading) read(ctx context.Context, f file, limit int64) ([]byte, error) {
	if f.digest == "" {
		return f.data, nil
	}
	return l.s.readBlob(ctx, ocispec.Descriptor{Digest: f.digest, Size: f.size}, limit)
}

// images decides what the archive is and checks everything its images consist of.
func (l *loading) images(ctx context.Context) ([]*found, error) {
	if _, ok := l.file(ociIndex); ok {
		return l.ociImages(ctx)
	}
	if _, ok := l.file(dockerManifest); ok {
		return l.dockerImages(ctx)
	}
	if _, ok := l.file(legacyIndex); ok {
		return nil, errdefs.New(errdefs.ErrUnsupported, "load: the archive has the format of docker before 1.10, which is not supported; save it again with a newer docker")
	}
	return nil, archiveError("not an image archive: it has neither %s nor %s", dockerManifest, ociIndex)
}

// unpack makes the snapshots of a loaded image.
func (l *loading) unpack(ctx context.Context, p *parsed) error {
	fresh := false
	for i, layer := range p.layers {
		m := l.progress.meter(shortID(p.image.RootFS.DiffIDs[i]), "Loading layer", layer.Size)
		made, err := l.s.unpackLayer(ctx, p, i, m.at)
		if err != nil {
			return err
		}
		fresh = fresh || made
	}
	return l.s.finishUnpack(ctx, p, fresh)
}

// names checks the names an archive gives an image.
func (l *loading) names(raw []string) ([]string, error) {
	var out []string
	for _, n := range raw {
		named, err := parseTag(n)
		if err != nil {
			return nil, archiveError("image name %q: %s", clip(n), oneLine(err))
		}
		out = append(out, named.String())
	}
	return out, nil
}

// dockerImage is an element of manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (l *loading) dockerIndex(ctx context.Context) ([]dockerImage, error) {
	f, ok := l.file(dockerManifest)
	if !ok {
		return nil, nil
	}
	data, err := l.read(ctx, f, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	var all []dockerImage
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, archiveError("%s is not valid: %s", dockerManifest, oneLine(err))
	}
	if len(all) > maxArchiveImages {
		return nil, archiveError("the archive has more than %d images", maxArchiveImages)
	}
	return all, nil
}

// dockerImages reads manifest.json and writes a manifest for each image, which docker archives
// have not.
func (l *loading) dockerImages(ctx context.Context) ([]*found, error) {
	all, err := l.dockerIndex(ctx)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, archiveError("%s names no image", dockerManifest)
	}
	var out []*found
	for _, one := range all {
		f, err := l.dockerImage(ctx, one)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

func (l *loading) dockerImage(ctx context.Context, one dockerImage) (*found, error) {
	f, ok := l.file(one.Config)
	if !ok {
		return nil, archiveError("the archive lacks %q, an image's configuration", clip(one.Config))
	}
	config, err := l.read(ctx, f, maxConfigBytes)
	if err != nil {
		return nil, err
	}
	if len(one.Layers) > maxLayers {
		return nil, archiveError("image has %d layers; at most %d are supported", len(one.Layers), maxLayers)
	}
	m := ocispec.Manifest{MediaType: images.MediaTypeDockerSchema2Manifest, Config: descriptorOf(images.MediaTypeDockerSchema2Config, config)}
	m.SchemaVersion = 2
	m.Layers = []ocispec.Descriptor{}
	for _, name := range one.Layers {
		layer, ok := l.file(name)
		if !ok {
			return nil, archiveError("the archive lacks %q, a layer", clip(name))
		}
		desc, err := l.keep(ctx, layer, dockerLayerType(layer.magic))
		if err != nil {
			return nil, err
		}
		m.Layers = append(m.Layers, desc)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	desc := descriptorOf(m.MediaType, data)
	p, err := decodeConfig(desc, m, config)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	if err := l.s.putBlob(ctx, m.Config, config, nil); err != nil {
		return nil, err
	}
	if err := l.s.putBlob(ctx, desc, data, nil); err != nil {
		return nil, err
	}
	names, err := l.names(one.RepoTags)
	if err != nil {
		return nil, err
	}
	return &found{p: p, root: desc, names: names}, l.s.linkManifest(ctx, p)
}

func dockerLayerType(magic []byte) string {
	switch compressionOf(magic) {
	case "gzip":
		return images.MediaTypeDockerSchema2LayerGzip
	case "zstd":
		return dockerLayerZstd
	}
	return dockerLayerTar
}

// keep makes sure that a file is a blob of the store.
func (l *loading) keep(ctx context.Context, f file, mediaType string) (ocispec.Descriptor, error) {
	if f.digest != "" {
		return ocispec.Descriptor{MediaType: mediaType, Digest: f.digest, Size: f.size}, nil
	}
	desc := descriptorOf(mediaType, f.data)
	return desc, l.s.putBlob(ctx, desc, f.data, nil)
}

// ociImages reads index.json. Names come from its annotations, or from manifest.json where the
// archive has both.
func (l *loading) ociImages(ctx context.Context) ([]*found, error) {
	f, _ := l.file(ociIndex)
	data, err := l.read(ctx, f, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(data, &idx); err != nil {
		return nil, archiveError("%s is not valid: %s", ociIndex, oneLine(err))
	}
	if len(idx.Manifests) > maxArchiveImages {
		return nil, archiveError("the archive has more than %d images", maxArchiveImages)
	}
	both, err := l.dockerNames(ctx)
	if err != nil {
		return nil, err
	}
	match, wanted, err := matcher("")
	if err != nil {
		return nil, err
	}
	var out []*found
	byRoot := map[digest.Digest]*found{}
	for _, d := range idx.Manifests {
		foreign := len(idx.Manifests) > 1 && d.Platform != nil && d.Platform.OS != "" && !match.Match(*d.Platform)
		if d.Annotations[attestationType] != "" || foreign {
			continue
		}
		names, err := l.names(ociNames(d.Annotations))
		if err != nil {
			return nil, err
		}
		one := byRoot[d.Digest]
		if one == nil {
			root, p, err := l.ociImage(ctx, d, 0)
			if err != nil {
				return nil, err
			}
			one = &found{p: p, root: root, names: both[p.config.Digest]}
			byRoot[d.Digest] = one
			out = append(out, one)
		}
		one.names = union(one.names, names)
	}
	if len(out) == 0 {
		return nil, archiveError("the archive has no image for %s", wanted)
	}
	return out, nil
}

// dockerNames are the names in manifest.json by config, of an archive that has both formats.
func (l *loading) dockerNames(ctx context.Context) (map[digest.Digest][]string, error) {
	all, err := l.dockerIndex(ctx)
	if err != nil {
		return nil, err
	}
	out := map[digest.Digest][]string{}
	for _, one := range all {
		f, ok := l.file(one.Config)
		if !ok {
			continue
		}
		names, err := l.names(one.RepoTags)
		if err != nil {
			return nil, err
		}
		d := f.digest
		if d == "" {
			d = digest.FromBytes(f.data)
		}
		out[d] = union(out[d], names)
	}
	return out, nil
}

// ociNames are the names that annotations give. A bare word is a tag of a repository that the
// archive does not name, so it is none.
func ociNames(a map[string]string) []string {
	if n := a[nameAnnotation]; n != "" {
		return []string{n}
	}
	if n := a[ocispec.AnnotationRefName]; strings.ContainsAny(n, ":/") {
		if named, err := reference.ParseNormalizedNamed(n); err == nil && reference.IsNameOnly(named) {
			return []string{n}
		} else if _, tagged := named.(reference.Tagged); err == nil && tagged {
			return []string{n}
		}
	}
	return nil
}

func union(a, b []string) []string {
	for _, s := range b {
		known := false
		for _, t := range a {
			known = known || s == t
		}
		if !known {
			a = append(a, s)
		}
	}
	return a
}

// blob finds what a descriptor means, in the archive or already in the store, and keeps it.
func (l *loading) blob(ctx context.Context, d ocispec.Descriptor, limit int64) error {
	if err := checkDescriptor("blob", d, limit); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	f, ok := l.file(ociBlobs + d.Digest.Algorithm().String() + "/" + d.Digest.Encoded())
	if !ok {
		return archiveError("the archive lacks blob %s", d.Digest)
	}
	if f.size != d.Size {
		return errdefs.New(errdefs.ErrDataLoss, "load: blob %s has %d bytes, not %d", d.Digest, f.size, d.Size)
	}
	if f.digest == "" {
		if d.Digest.Algorithm().FromBytes(f.data) != d.Digest {
			return errdefs.New(errdefs.ErrDataLoss, "load: blob %s does not match its digest", d.Digest)
		}
		return l.s.putBlob(ctx, d, f.data, nil)
	}
	if f.digest != d.Digest {
		return errdefs.New(errdefs.ErrDataLoss, "load: blob %s does not match its digest", d.Digest)
	}
	return nil
}

// ociImage follows a descriptor of index.json to this host's image.
func (l *loading) ociImage(ctx context.Context, d ocispec.Descriptor, depth int) (ocispec.Descriptor, *parsed, error) {
	if depth > maxIndexDepth {
		return d, nil, archiveError("indexes are nested more than %d deep", maxIndexDepth)
	}
	d = ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Platform: d.Platform}
	if err := l.blob(ctx, d, maxManifestBytes); err != nil {
		return d, nil, err
	}
	data, err := l.s.readBlob(ctx, d, maxManifestBytes)
	if err != nil {
		return d, nil, err
	}
	mediaType, kind, err := sniff(d.MediaType, data)
	if err != nil {
		return d, nil, fmt.Errorf("load: %w", err)
	}
	d.MediaType = mediaType
	switch kind {
	case kindSchema1:
		return d, nil, errdefs.New(errdefs.ErrUnsupported, "load: the archive has a Docker schema 1 manifest, which is not supported")
	case kindIndex:
		child, err := choose(data, "", func(c ocispec.Descriptor) bool {
			_, ok := l.file(ociBlobs + c.Digest.Algorithm().String() + "/" + c.Digest.Encoded())
			return ok
		})
		if err != nil {
			return d, nil, fmt.Errorf("load: %w", err)
		}
		_, p, err := l.ociImage(ctx, child, depth+1)
		if err != nil {
			return d, nil, err
		}
		return d, p, l.s.setLabels(ctx, d.Digest, refLabels("m", child))
	}
	m, err := decodeManifest(data)
	if err != nil {
		return d, nil, fmt.Errorf("load: %w", err)
	}
	for i, part := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		limit := int64(0)
		if i == 0 {
			limit = maxConfigBytes
		}
		if err := l.blob(ctx, part, limit); err != nil {
			return d, nil, err
		}
	}
	config, err := l.s.readBlob(ctx, m.Config, maxConfigBytes)
	if err != nil {
		return d, nil, err
	}
	p, err := decodeConfig(d, m, config)
	if err != nil {
		return d, nil, fmt.Errorf("load: %w", err)
	}
	return d, p, l.s.linkManifest(ctx, p)
}
