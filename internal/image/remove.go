package image

import (
	"context"
	"errors"
	"slices"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"berth/internal/errdefs"
)

// Users returns the names or IDs of the containers that use an image and whether any of them runs.
// It is called without locks that concern reading the store; it must not remove images itself.
type Users = func(id digest.Digest) (names []string, running bool)

// Tag gives the image source the further name target, which leaves any image that had it.
func (s *Store) Tag(ctx context.Context, source, target string) error {
	named, err := parseTag(target)
	if err != nil {
		return err
	}
	x, err := s.current(ctx)
	if err != nil {
		return err
	}
	e, from, err := x.resolve(source)
	if err != nil {
		return err
	}
	rec := x.anyRecord(e, from)
	r := newRecord(named.String(), rec.target, rec.p)
	return s.apply(ctx, change{set: map[string]*record{r.name: r}})
}

// anyRecord is the record of that name, or else any of the image.
func (x *index) anyRecord(e *entry, name string) *record {
	if r := x.names[name]; r != nil {
		return r
	}
	if r := x.names[e.image.ID.String()]; r != nil {
		return r
	}
	return x.names[e.names[0]]
}

// Remove untags ref, or removes the image when ref was its last name or is its ID, by docker's
// rules; what it refuses is errdefs.ErrConflict. prune is accepted for docker's sake: it is about
// untagged parents, which images here do not have. Layers of an image that is forced away while
// stopped containers use it stay until Release.
func (s *Store) Remove(ctx context.Context, ref string, force, prune bool, users Users) ([]RemoveResult, error) {
	s.removeMu.Lock()
	defer s.removeMu.Unlock()
	x, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	e, name, err := x.resolve(ref)
	if errors.Is(err, errdefs.ErrDataLoss) {
		return s.removeDamaged(ctx, x, ref)
	}
	if err != nil {
		return nil, err
	}
	using, running := users(e.image.ID)
	d := removal{x: x, e: e, name: name, ref: ref, force: force, using: using, running: running}
	if err := d.decide(); err != nil {
		return nil, err
	}
	if err := s.apply(ctx, change{unset: d.unset, fates: d.fates()}); err != nil {
		return nil, err
	}
	return d.results(), nil
}

// removeDamaged takes the name from an image that cannot be read.
func (s *Store) removeDamaged(ctx context.Context, x *index, ref string) ([]RemoveResult, error) {
	named, err := parseName(ref)
	if err != nil {
		return nil, err
	}
	name, err := x.byName(named)
	if err != nil {
		return nil, err
	}
	s.sweep.Store(true)
	return []RemoveResult{{Untagged: familiar(name)}}, s.apply(ctx, change{unset: []string{name}})
}

// removal decides what a Remove does. It only reads.
type removal struct {
	x       *index
	e       *entry
	name    string // "" when ref was an ID
	ref     string
	force   bool
	using   []string
	running bool

	unset  []string // names to take, in docker's order
	delete bool     // the image goes
}

func (d *removal) decide() error {
	if d.name != "" {
		if !d.force && d.singleReference() && len(d.using) > 0 {
			return errdefs.New(errdefs.ErrConflict, "conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
				d.ref, clipID(d.using[0]), shortID(d.e.image.ID))
		}
		d.unset = []string{d.name}
		rest := slices.DeleteFunc(slices.Clone(d.e.names), func(n string) bool { return n == d.name })
		if !isDigestRef(d.name) {
			rest = d.dropDigests(rest)
		}
		if len(rest) > 0 {
			return nil
		}
		// The name is gone in any case; the image goes with it unless a container needs it.
		d.delete = !d.running && (d.force || len(d.using) == 0)
		return nil
	}
	switch {
	case d.running:
		return d.conflict("cannot be forced", "image is being used by running container "+clipID(d.using[0]))
	case !d.force && !d.singleReference():
		return d.conflict("must be forced", "image is referenced in multiple repositories")
	case !d.force && len(d.using) > 0:
		return d.conflict("must be forced", "image is being used by stopped container "+clipID(d.using[0]))
	}
	d.unset, d.delete = slices.Clone(d.e.names), true
	return nil
}

func (d *removal) conflict(how, why string) error {
	return errdefs.New(errdefs.ErrConflict, "conflict: unable to delete %s (%s) - %s", shortID(d.e.image.ID), how, why)
}

// dropDigests also takes the names by digest of a repository that has no tag left, and returns
// what names remain.
func (d *removal) dropDigests(rest []string) []string {
	repo := repository(d.name)
	for _, n := range rest {
		if !isDigestRef(n) && repository(n) == repo {
			return rest
		}
	}
	var remain []string
	for _, n := range rest {
		if isDigestRef(n) && repository(n) == repo {
			d.unset = append(d.unset, n)
		} else {
			remain = append(remain, n)
		}
	}
	return remain
}

// singleReference tells whether all names are one tag and digests of its repository.
func (d *removal) singleReference() bool {
	names := d.e.names
	if len(names) <= 1 {
		return true
	}
	repos, tags := map[string]bool{}, 0
	for _, n := range names {
		repos[repository(n)] = true
		if !isDigestRef(n) {
			tags++
		}
	}
	return tags <= 1 && len(repos) == 1
}

func (d *removal) fates() map[digest.Digest]fate {
	switch {
	case !d.delete:
		return nil
	case len(d.using) > 0:
		return map[digest.Digest]fate{d.e.image.ID: fatePinned}
	}
	return map[digest.Digest]fate{d.e.image.ID: fateGone}
}

func (d *removal) results() []RemoveResult {
	var out []RemoveResult
	for _, n := range d.unset {
		out = append(out, RemoveResult{Untagged: familiar(n)})
	}
	if !d.delete {
		return out
	}
	out = append(out, RemoveResult{Deleted: d.e.image.ID.String()})
	if len(d.using) > 0 {
		return out
	}
	for _, c := range d.x.chainsOnlyOf(d.e) {
		out = append(out, RemoveResult{Deleted: c.String()})
	}
	return out
}

// chainsOnlyOf are the layers that no other image has, top first.
func (x *index) chainsOnlyOf(gone ...*entry) []digest.Digest {
	shared := map[digest.Digest]bool{}
	for _, e := range x.byID {
		if !slices.Contains(gone, e) {
			for _, c := range e.p.chains {
				shared[c] = true
			}
		}
	}
	var only []digest.Digest
	for _, e := range gone {
		for _, c := range slices.Backward(e.p.chains) {
			if !shared[c] {
				shared[c] = true
				only = append(only, c)
			}
		}
	}
	return only
}

// clipID shortens a container's ID as docker does; names stay.
func clipID(s string) string {
	const full, short = 64, 12
	if len(s) == full {
		return s[:short]
	}
	return s
}

// Prune removes images for which keep says no: without all, only those that have no tag. It
// returns what it did and the bytes of layers that thereby become free. Images that were
// forced away are let go silently once keep does not want them.
func (s *Store) Prune(ctx context.Context, all bool, keep func(Image) bool) ([]RemoveResult, int64, error) {
	s.removeMu.Lock()
	defer s.removeMu.Unlock()
	x, err := s.current(ctx)
	if err != nil {
		return nil, 0, err
	}
	c := change{fates: map[digest.Digest]fate{}}
	var gone []*entry
	for _, e := range x.byID {
		if (!all && !e.pinned && len(e.image.Names) > 0) || keep(copyImage(e.image)) {
			continue
		}
		gone = append(gone, e)
		c.unset = append(c.unset, e.names...)
		c.unset = append(c.unset, e.image.ID.String())
		c.fates[e.image.ID] = fateGone
	}
	if len(gone) == 0 {
		return nil, 0, nil
	}
	slices.SortFunc(gone, func(a, b *entry) int { return b.image.Created.Compare(a.image.Created) })
	var results []RemoveResult
	var freed int64
	shown := map[digest.Digest]bool{}
	for _, e := range gone {
		if e.pinned {
			continue
		}
		for _, n := range e.names {
			results = append(results, RemoveResult{Untagged: familiar(n)})
		}
		results = append(results, RemoveResult{Deleted: e.image.ID.String()})
		for _, chain := range x.chainsOnlyOf(gone...) {
			if slices.Contains(e.p.chains, chain) && !shown[chain] {
				shown[chain] = true
				results = append(results, RemoveResult{Deleted: chain.String()})
			}
		}
	}
	for _, chain := range x.chainsOnlyOf(gone...) {
		if n, err := s.chainSize(s.context(ctx), chain); err == nil { // not unpacked is nothing freed
			freed += n
		}
	}
	if err := s.apply(ctx, c); err != nil {
		return nil, 0, err
	}
	return results, freed, nil
}

// Release is to be called when the last container that used an image is gone: if the image was
// forced away meanwhile, its layers go now. Otherwise it does nothing and costs nothing.
func (s *Store) Release(ctx context.Context, id digest.Digest) error {
	x, err := s.current(ctx)
	if err != nil {
		return err
	}
	e := x.byID[id]
	if e == nil || !e.pinned {
		return nil
	}
	return s.apply(ctx, change{unset: []string{id.String()}, fates: map[digest.Digest]fate{id: fateGone}})
}

// DiskUsage is the bytes of all unpacked layers, each counted once. Compressed blobs, kept for
// push and save, are not in it, as docker has none.
func (s *Store) DiskUsage(ctx context.Context) (int64, error) {
	x, err := s.current(ctx)
	if err != nil {
		return 0, err
	}
	ctx = s.context(ctx)
	seen := map[digest.Digest]bool{}
	var total int64
	for _, e := range x.byID {
		for _, c := range e.p.chains {
			if seen[c] {
				continue
			}
			seen[c] = true
			if n, err := s.chainSize(ctx, c); err == nil { // not unpacked takes nothing
				total += n
			}
		}
	}
	return total, ctx.Err()
}

// SharedSize is the part of an image's layers that other images use too, for docker system df.
func (s *Store) SharedSize(ctx context.Context, id digest.Digest) (int64, error) {
	x, err := s.current(ctx)
	if err != nil {
		return 0, err
	}
	e := x.byID[id]
	if e == nil {
		return 0, errdefs.New(errdefs.ErrNotFound, "No such image: %s", id)
	}
	total := e.image.SizeBytes
	for _, c := range x.chainsOnlyOf(e) {
		if n, err := s.chainSize(s.context(ctx), c); err == nil {
			total -= n
		}
	}
	return total, nil
}

// NormalizeName gives the canonical name of what a user typed: busybox becomes
// docker.io/library/busybox:latest. Errors are errdefs.ErrInvalid in docker's words.
func NormalizeName(ref string) (string, error) {
	named, err := parseTarget(ref)
	if err != nil {
		return "", err
	}
	return named.String(), nil
}

// FamiliarName is the inverse for display: docker.io/library/busybox:latest becomes busybox:latest.
func FamiliarName(name string) string { return familiar(name) }

// Repository returns a canonical name's repository in its familiar form, and its tag or digest.
func Repository(name string) (repo, rest string) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name, ""
	}
	return reference.FamiliarName(named), tagOrDigest(named)
}
