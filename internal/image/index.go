package image

import (
	"context"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"berth/internal/errdefs"
)

// Labels on image records.
const (
	labelManifest     = "berth.io/manifest"      // digest of the chosen platform's manifest
	labelManifestSize = "berth.io/manifest-size" // its size
	labelManifestType = "berth.io/manifest-type" // its media type
	labelPinned       = "berth.io/pinned"        // only containers still need it
)

// record is one name of an image. It never changes.
type record struct {
	name     string
	target   ocispec.Descriptor
	manifest ocispec.Descriptor
	pinned   bool
	updated  time.Time
	p        *parsed // nil when the image is damaged
}

// entry is one image with all its names. It never changes.
type entry struct {
	image  Image
	p      *parsed
	names  []string // tagged and by digest, sorted; hidden ones not
	pinned bool     // has no name and was removed: only containers need it
}

// index is all that the store has, at one moment. It never changes.
type index struct {
	names map[string]*record
	byID  map[digest.Digest]*entry
	list  []*entry // visible ones, newest first
	ids   []string // encoded IDs of the visible ones, sorted
}

// current returns the index, built anew after a change.
func (s *Store) current(ctx context.Context) (*index, error) {
	if x := s.index.Load(); x != nil {
		return x, nil
	}
	s.buildMu.Lock()
	defer s.buildMu.Unlock()
	if x := s.index.Load(); x != nil {
		return x, nil
	}
	x, err := s.buildIndex(s.context(ctx))
	if err != nil {
		return nil, localError("read the image database", err)
	}
	s.index.Store(x)
	return x, nil
}

// changed drops the index; callers hold namesMu.
func (s *Store) changed() {
	s.buildMu.Lock()
	s.index.Store(nil)
	s.buildMu.Unlock()
}

func (s *Store) buildIndex(ctx context.Context) (*index, error) {
	found, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	x := &index{names: make(map[string]*record, len(found)), byID: map[digest.Digest]*entry{}}
	used := make(map[digest.Digest]*parsed, len(found))
	for _, img := range found {
		r := recordOf(img)
		x.names[r.name] = r
		p := used[r.manifest.Digest]
		if p == nil {
			p = s.parsed[r.manifest.Digest]
		}
		if p == nil {
			if p, err = s.parse(ctx, r.manifest); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				s.log.Warn("image is damaged; pull or load it again", "image", r.name, "error", err)
				continue
			}
		}
		used[r.manifest.Digest] = p
		r.p = p
		if err := s.addToIndex(ctx, x, r); err != nil {
			return nil, err
		}
	}
	s.parsed = used
	x.finish()
	return x, nil
}

func recordOf(img images.Image) *record {
	r := &record{name: img.Name, target: img.Target, manifest: img.Target, updated: img.UpdatedAt, pinned: img.Labels[labelPinned] != ""}
	if d := img.Labels[labelManifest]; d != "" && d != img.Target.Digest.String() {
		size, _ := strconv.ParseInt(img.Labels[labelManifestSize], 10, 64) // written by us
		r.manifest = ocispec.Descriptor{MediaType: img.Labels[labelManifestType], Digest: digest.Digest(d), Size: size}
	}
	return r
}

func (s *Store) addToIndex(ctx context.Context, x *index, r *record) error {
	e := x.byID[r.p.id]
	if e == nil {
		e = &entry{p: r.p, pinned: true, image: Image{
			ID: r.p.id, Target: r.target, Manifest: r.p.manifest, Config: r.p.image, DockerConfig: r.p.dockerConfig, Tagged: r.updated,
		}}
		if r.p.image.Created != nil {
			e.image.Created = *r.p.image.Created
		}
		info, err := s.content.Info(ctx, r.p.config.Digest)
		if err != nil && !cerrdefs.IsNotFound(err) {
			return err
		}
		e.image.SizeBytes, _ = strconv.ParseInt(info.Labels[labelSize], 10, 64) // absent: not unpacked yet
		x.byID[r.p.id] = e
	}
	if !r.pinned {
		e.pinned = false
	}
	if !isHidden(r.name) {
		e.names = append(e.names, r.name)
	}
	if r.updated.After(e.image.Tagged) {
		// The newest name decides which of several manifests with one config is shown.
		e.image.Tagged, e.image.Target, e.image.Manifest, e.p = r.updated, r.target, r.p.manifest, r.p
	}
	return nil
}

func (x *index) finish() {
	for id, e := range x.byID {
		sort.Strings(e.names)
		for _, n := range e.names {
			if isDigestRef(n) {
				e.image.Digests = append(e.image.Digests, n)
			} else {
				e.image.Names = append(e.image.Names, n)
			}
		}
		if e.pinned {
			continue
		}
		x.list = append(x.list, e)
		x.ids = append(x.ids, id.Encoded())
	}
	sort.Strings(x.ids)
	sort.Slice(x.list, func(i, j int) bool {
		a, b := x.list[i].image, x.list[j].image
		if !a.Created.Equal(b.Created) {
			return a.Created.After(b.Created)
		}
		return a.ID < b.ID
	})
}

// copyImage gives a caller an Image whose slices are its own.
func copyImage(img Image) Image {
	img.Names = slices.Clone(img.Names)
	img.Digests = slices.Clone(img.Digests)
	img.DockerConfig = slices.Clone(img.DockerConfig)
	return img
}

// List returns the images, newest first. Images without a name are among them. The Config's maps
// and slices are shared and must not be changed.
func (s *Store) List(ctx context.Context) ([]Image, error) {
	x, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	all := make([]Image, 0, len(x.list))
	for _, e := range x.list {
		all = append(all, copyImage(e.image))
	}
	return all, nil
}

// Resolve finds an image by name, name@digest, ID or unambiguous ID prefix. It touches no disk
// unless images have changed since it was last called. Errors: errdefs.ErrInvalid for what is no
// reference or an ambiguous prefix, errdefs.ErrNotFound, errdefs.ErrDataLoss.
func (s *Store) Resolve(ctx context.Context, ref string) (Image, error) {
	x, err := s.current(ctx)
	if err != nil {
		return Image{}, err
	}
	e, _, err := x.resolve(ref)
	if err != nil {
		return Image{}, err
	}
	return copyImage(e.image), nil
}

// idPattern is what may be an ID or its beginning.
var idPattern = regexp.MustCompile(`^(sha256:)?[0-9a-f]{1,64}$`)

// resolve finds an image; name is the record by which it was found, "" when by ID.
func (x *index) resolve(ref string) (e *entry, name string, err error) {
	maybeID := idPattern.MatchString(ref)
	hex := strings.TrimPrefix(ref, "sha256:")
	if maybeID && len(hex) == 64 {
		if e, ok := x.byID[digest.NewDigestFromEncoded(digest.SHA256, hex)]; ok && !e.pinned {
			return e, "", nil
		}
		return nil, "", errdefs.New(errdefs.ErrNotFound, "No such image: %s", ref)
	}
	named, nameErr := parseName(ref)
	if nameErr == nil {
		if name, err := x.byName(named); err != nil || name != "" {
			if err != nil {
				return nil, "", err
			}
			r := x.names[name]
			if r.p == nil {
				return nil, "", errdefs.New(errdefs.ErrDataLoss, "image %s is damaged on the disk; pull or load it again", familiar(name))
			}
			return x.byID[r.p.id], name, nil
		}
	}
	if maybeID {
		i := sort.SearchStrings(x.ids, hex)
		if i < len(x.ids) && strings.HasPrefix(x.ids[i], hex) {
			if i+1 < len(x.ids) && strings.HasPrefix(x.ids[i+1], hex) {
				return nil, "", errdefs.New(errdefs.ErrInvalid, "image ID prefix %s is ambiguous: several images begin with it", ref)
			}
			return x.byID[digest.NewDigestFromEncoded(digest.SHA256, x.ids[i])], "", nil
		}
	}
	if nameErr != nil {
		return nil, "", nameErr
	}
	return nil, "", errdefs.New(errdefs.ErrNotFound, "No such image: %s", reference.FamiliarString(reference.TagNameOnly(named)))
}

// byName finds the record that a reference means, "" for none.
func (x *index) byName(named reference.Named) (string, error) {
	d, ok := named.(reference.Digested)
	if !ok {
		if name := reference.TagNameOnly(named).String(); x.names[name] != nil {
			return name, nil
		}
		return "", nil
	}
	name := byDigest(named, d.Digest())
	if x.names[name] != nil {
		return name, nil
	}
	// A loaded image has no record by digest; its tags know the digest all the same.
	for n, r := range x.names {
		if repository(n) == named.Name() && (r.target.Digest == d.Digest() || r.manifest.Digest == d.Digest()) {
			return n, nil
		}
	}
	return "", nil
}

// fate is what becomes of an image that loses its last name.
type fate int

const (
	fateDangling fate = iota // stays, without a name
	fatePinned               // disappears, but its layers stay for containers
	fateGone
)

// change is one atomic change of image records.
type change struct {
	set   map[string]*record // by name; a hidden name is the image's ID
	unset []string
	fates map[digest.Digest]fate // of images that lose their last name; default fateDangling
}

// apply makes the change in one transaction. Images that lose their last name meet their fate,
// also those from which the change takes a name away by giving it to another image.
func (s *Store) apply(ctx context.Context, c change) error {
	s.namesMu.Lock()
	defer s.namesMu.Unlock()
	x, err := s.current(ctx)
	if err != nil {
		return err
	}
	ctx = s.context(ctx)
	set, unset := x.consequences(c)
	err = s.db.Update(func(tx *bolt.Tx) error {
		ctx := boltutil.WithTransaction(ctx, tx)
		for _, name := range unset {
			if err := s.images.Delete(ctx, name); err != nil && !cerrdefs.IsNotFound(err) {
				return err
			}
		}
		for _, r := range set {
			img := r.toImage()
			_, err := s.images.Create(ctx, img)
			if cerrdefs.IsAlreadyExists(err) {
				_, err = s.images.Update(ctx, img)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return localError("record the image", err)
	}
	s.changed()
	if len(unset) > 0 {
		s.forgetRemoved(ctx)
		s.wakeCollector()
	}
	return nil
}

func (r *record) toImage() images.Image {
	img := images.Image{Name: r.name, Target: r.target, Labels: map[string]string{
		labelManifest:     r.manifest.Digest.String(),
		labelManifestSize: strconv.FormatInt(r.manifest.Size, 10),
		labelManifestType: r.manifest.MediaType,
	}}
	if r.pinned {
		img.Labels[labelPinned] = "1"
	}
	return img
}

// consequences completes a change: hidden records come and go with an image's last name.
func (x *index) consequences(c change) (set []*record, unset []string) {
	owner := make(map[string]digest.Digest, len(x.names)) // of every name after the change
	some := map[digest.Digest]*record{}                   // any record of each image
	for name, r := range x.names {
		if r.p != nil {
			owner[name] = r.p.id
			some[r.p.id] = r
		}
	}
	gone := map[string]bool{}
	for _, name := range c.unset {
		if x.names[name] != nil {
			gone[name] = true
			delete(owner, name)
		}
	}
	for name, r := range c.set {
		owner[name] = r.p.id
		some[r.p.id] = r
		delete(gone, name)
	}
	named := map[digest.Digest]bool{}
	for name, id := range owner {
		if !isHidden(name) {
			named[id] = true
		}
	}
	for id, r := range some {
		hidden := id.String()
		switch f, stated := c.fates[id]; {
		case named[id], stated && f == fateGone:
			delete(c.set, hidden)
			if x.names[hidden] != nil {
				gone[hidden] = true
			}
		case stated, x.names[hidden] == nil && c.set[hidden] == nil:
			h := *r
			h.name, h.pinned = hidden, f == fatePinned
			set = append(set, &h)
			delete(c.set, hidden)
			delete(gone, hidden)
		}
	}
	for _, r := range c.set {
		set = append(set, r)
	}
	for name := range gone {
		unset = append(unset, name)
	}
	return set, unset
}

// forgetRemoved drops the cached directories of images that are no more.
func (s *Store) forgetRemoved(ctx context.Context) {
	x, err := s.current(ctx)
	if err != nil {
		s.lowers.Clear()
		return
	}
	s.lowers.Range(func(k, _ any) bool {
		if x.byID[k.(digest.Digest)] == nil {
			s.lowers.Delete(k)
		}
		return true
	})
}

// newRecord describes a name of a parsed image. root is what the name points to.
func newRecord(name string, root ocispec.Descriptor, p *parsed) *record {
	return &record{
		name:     name,
		target:   ocispec.Descriptor{MediaType: root.MediaType, Digest: root.Digest, Size: root.Size},
		manifest: ocispec.Descriptor{MediaType: p.manifest.MediaType, Digest: p.manifest.Digest, Size: p.manifest.Size},
		p:        p,
	}
}
