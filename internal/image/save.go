package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"io"
	"slices"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
)

// Save writes an archive that docker load and OCI tools read. A reference by name keeps that name
// in the archive; one without tag stands for all tags of the repository; an ID gives no name. An
// unknown reference is errdefs.ErrNotFound before anything is written.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string) error {
	ctx = s.context(ctx)
	x, err := s.current(ctx)
	if err != nil {
		return err
	}
	saved, err := x.toSave(refs)
	if err != nil {
		return err
	}
	var recs []*record
	for _, one := range saved {
		recs = append(recs, one.rec)
	}
	ctx, end, err := s.hold(ctx, "save", recs...)
	if err != nil {
		return err
	}
	defer func() { end(nil) }()
	out := &saving{s: s, tw: tar.NewWriter(w), done: map[digest.Digest]bool{}}
	if err := out.all(ctx, saved); err != nil {
		return localError("save", err)
	}
	return out.tw.Close()
}

// saveItem is one image to write, with the names it is to have.
type saveItem struct {
	rec   *record
	names []string
}

func (x *index) toSave(refs []string) ([]*saveItem, error) {
	if len(refs) == 0 {
		return nil, errdefs.New(errdefs.ErrInvalid, "save: no image was named")
	}
	var items []*saveItem
	byID := map[digest.Digest]*saveItem{}
	add := func(r *record, name string) {
		it := byID[r.p.id]
		if it == nil {
			it = &saveItem{rec: r}
			byID[r.p.id] = it
			items = append(items, it)
		}
		if name != "" && !isDigestRef(name) && !slices.Contains(it.names, name) {
			it.names = append(it.names, name)
		}
	}
	for _, ref := range refs {
		if tags := x.tagsOf(ref); len(tags) > 0 {
			for _, name := range tags {
				add(x.names[name], name)
			}
			continue
		}
		e, name, err := x.resolve(ref)
		if err != nil {
			return nil, err
		}
		add(x.anyRecord(e, name), name)
	}
	return items, nil
}

// tagsOf lists all tags of a repository when ref is a bare repository.
func (x *index) tagsOf(ref string) []string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil || !reference.IsNameOnly(named) {
		return nil
	}
	var names []string
	for n, r := range x.names {
		if !isHidden(n) && !isDigestRef(n) && r.p != nil && repository(n) == named.Name() {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}

// saving is one Save.
type saving struct {
	s    *Store
	tw   *tar.Writer
	done map[digest.Digest]bool
}

func (o *saving) all(ctx context.Context, items []*saveItem) error {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	var docker []dockerImage
	if err := o.file(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
		return err
	}
	for _, it := range items {
		p := it.rec.p
		one := dockerImage{Config: blobPath(p.config.Digest), RepoTags: []string{}, Layers: []string{}}
		for _, d := range append([]ocispec.Descriptor{p.manifest, p.config}, p.layers...) {
			if err := o.blob(ctx, d); err != nil {
				return err
			}
		}
		for _, l := range p.layers {
			one.Layers = append(one.Layers, blobPath(l.Digest))
		}
		desc := ocispec.Descriptor{MediaType: p.manifest.MediaType, Digest: p.manifest.Digest, Size: p.manifest.Size}
		for _, name := range it.names {
			one.RepoTags = append(one.RepoTags, familiar(name))
			named := desc
			_, tag := Repository(name)
			named.Annotations = map[string]string{nameAnnotation: name, ocispec.AnnotationRefName: tag}
			idx.Manifests = append(idx.Manifests, named)
		}
		if len(it.names) == 0 {
			idx.Manifests = append(idx.Manifests, desc)
		}
		docker = append(docker, one)
	}
	if err := o.json(ociIndex, idx); err != nil {
		return err
	}
	return o.json(dockerManifest, docker)
}

func blobPath(d digest.Digest) string {
	return ociBlobs + d.Algorithm().String() + "/" + d.Encoded()
}

// blob writes a blob, each once.
func (o *saving) blob(ctx context.Context, d ocispec.Descriptor) error {
	if o.done[d.Digest] {
		return nil
	}
	o.done[d.Digest] = true
	r, err := o.s.openBlob(ctx, d)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := o.header(blobPath(d.Digest), d.Size); err != nil {
		return err
	}
	in := &countingReader{ctx: ctx, r: r, report: func(int64) {}}
	_, err = io.CopyBuffer(struct{ io.Writer }{o.tw}, in, make([]byte, copyBuffer))
	return err
}

func (o *saving) json(name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return o.file(name, data)
}

func (o *saving) file(name string, data []byte) error {
	if err := o.header(name, int64(len(data))); err != nil {
		return err
	}
	_, err := o.tw.Write(data)
	return err
}

// header gives every file the same time, so that saving twice gives the same bytes.
func (o *saving) header(name string, size int64) error {
	return o.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o444, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
}
