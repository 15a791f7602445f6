package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
)

// Push sends the image that has the name ref to the registry in that name and returns the digest
// of its manifest. A multi-platform image of which all parts are here goes whole, otherwise this
// platform's part alone. Errors are in docker's words: errdefs.ErrNotFound, ErrUnauthorized,
// ErrForbidden, ErrUnavailable.
func (s *Store) Push(ctx context.Context, ref string, c Credentials, p Progress) (digest.Digest, error) {
	named, err := parseTag(ref)
	if err != nil {
		return "", err
	}
	ctx = s.context(ctx)
	x, err := s.current(ctx)
	if err != nil {
		return "", err
	}
	rec := x.names[named.String()]
	if rec == nil || rec.p == nil {
		return "", errdefs.New(errdefs.ErrNotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	ctx, end, err := s.hold(ctx, "push", rec)
	if err != nil {
		return "", err
	}
	defer func() { end(nil) }()
	r, err := s.connect(ctx, named, c, true)
	if err != nil {
		return "", err
	}
	defer r.close()
	u := &upload{s: s, r: r, progress: p}
	root, err := u.send(ctx, rec)
	if err != nil {
		return "", localError("push "+reference.FamiliarString(named), r.translate(opPush, err))
	}
	p.say("", fmt.Sprintf("%s: digest: %s size: %d", tagOrDigest(named), root.Digest, root.Size))
	s.noteSource(ctx, named, rec.p)
	name := byDigest(named, root.Digest)
	if x.names[name] == nil {
		err = s.apply(ctx, change{set: map[string]*record{name: newRecord(name, root, rec.p)}})
	}
	return root.Digest, err
}

// hold keeps the content of images on the disk until end is called, whatever becomes of their names.
func (s *Store) hold(ctx context.Context, what string, recs ...*record) (_ context.Context, end func(error), _ error) {
	id := tempLease(what)
	ctx, end, err := s.lease(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range recs {
		for _, d := range []digest.Digest{r.target.Digest, r.manifest.Digest} {
			if err := s.leases.AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: d.String(), Type: "content"}); err != nil {
				end(nil)
				return nil, nil, localError(what, err)
			}
		}
	}
	return ctx, end, nil
}

// noteSource remembers that a repository has an image's blobs. It only saves later pushes work, so
// a failure is none of the push.
func (s *Store) noteSource(ctx context.Context, named reference.Named, p *parsed) {
	key, repo := sourceLabel(named)
	for _, d := range append([]ocispec.Descriptor{p.config}, p.layers...) {
		info, err := s.content.Info(ctx, d.Digest)
		if err != nil {
			return
		}
		var known []string
		if v := info.Labels[key]; v != "" {
			known = strings.Split(v, ",")
		}
		if slices.Contains(known, repo) || len(known) == maxSources {
			continue
		}
		if err := s.setLabels(ctx, d.Digest, map[string]string{key: strings.Join(append(known, repo), ",")}); err != nil {
			return
		}
	}
}

// maxSources bounds the repositories remembered per blob; a label has at most 4096 bytes.
const maxSources = 8

// upload is one push.
type upload struct {
	s        *Store
	r        *remote
	progress Progress
	pusher   remotes.Pusher
	tracker  docker.StatusTracker
}

// send uploads layers and configs, then manifests, the named one last.
func (u *upload) send(ctx context.Context, rec *record) (ocispec.Descriptor, error) {
	root := rec.p.manifest
	parts := []*parsed{rec.p}
	if rec.target.Digest != rec.manifest.Digest {
		whole, err := u.s.wholeIndex(ctx, rec.target)
		if err != nil {
			return root, err
		}
		if whole != nil {
			root, parts = rec.target, whole
		}
	}
	u.tracker = docker.NewInMemoryTracker()
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts:   func(string) ([]docker.RegistryHost, error) { return u.r.hosts, nil },
		Tracker: u.tracker,
	})
	var err error
	// With the digest in the reference only the manifest of that digest gets the tag.
	if u.pusher, err = resolver.Pusher(ctx, u.r.named.String()+"@"+root.Digest.String()); err != nil {
		return root, err
	}
	u.progress.say("", fmt.Sprintf("The push refers to repository [%s]", u.r.named.Name()))
	for _, p := range parts {
		if err := u.blobs(ctx, p); err != nil {
			return root, err
		}
		if err := u.blob(ctx, p.config, "", nil); err != nil {
			return root, err
		}
		if p.manifest.Digest != root.Digest {
			if err := u.blob(ctx, p.manifest, "", nil); err != nil {
				return root, err
			}
		}
	}
	return root, u.blob(ctx, root, "", nil)
}

// wholeIndex returns all images of an index, or nil when some are not here.
func (s *Store) wholeIndex(ctx context.Context, root ocispec.Descriptor) ([]*parsed, error) {
	data, err := s.readBlob(ctx, root, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(data, &idx); err != nil {
		return nil, errdefs.New(errdefs.ErrDataLoss, "manifest list %s is damaged", root.Digest)
	}
	var all []*parsed
	for _, d := range idx.Manifests {
		p, err := s.parse(ctx, d)
		if err != nil {
			return nil, nil // a part that is not here or is no image
		}
		for _, l := range p.layers {
			if ok, err := s.blobPresent(ctx, l); err != nil || !ok {
				return nil, err
			}
		}
		all = append(all, p)
	}
	return all, nil
}

// blobs sends the layers of one image, each once, some at a time.
func (u *upload) blobs(ctx context.Context, p *parsed) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	seen := map[digest.Digest]bool{}
	slots := make(chan struct{}, u.s.cfg.Parallel)
	var workers sync.WaitGroup
	for _, l := range p.layers {
		if !seen[l.Digest] {
			seen[l.Digest] = true
			u.progress.say(shortID(l.Digest), "Preparing")
		}
	}
	for _, l := range p.layers {
		if !seen[l.Digest] {
			continue
		}
		seen[l.Digest] = false
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		workers.Go(func() {
			defer func() { <-slots }()
			if err := u.blob(ctx, l, shortID(l.Digest), u.progress); err != nil {
				cancel(err)
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// blob sends one blob or manifest, with retries.
func (u *upload) blob(ctx context.Context, desc ocispec.Descriptor, id string, say Progress) error {
	info, err := u.s.content.Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	desc.URLs, desc.Data, desc.Annotations = nil, nil, map[string]string{}
	for k, v := range info.Labels {
		if strings.HasPrefix(k, labels.LabelDistributionSource+".") {
			desc.Annotations[k] = v // lets the registry take it from another repository
		}
	}
	return u.s.retry(ctx, say, id, func() error { return u.attempt(ctx, desc, id, say) })
}

func (u *upload) attempt(ctx context.Context, desc ocispec.Descriptor, id string, say Progress) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w, err := u.pusher.Push(ctx, desc)
	if cerrdefs.IsAlreadyExists(err) {
		action := "Layer already exists"
		if st, err := u.tracker.GetStatus(remotes.MakeRefKey(ctx, desc)); err == nil && st.MountedFrom != "" {
			action = "Mounted from " + familiar(st.MountedFrom)
		}
		say.say(id, action)
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	blob, err := u.s.openBlob(ctx, desc)
	if err != nil {
		return err
	}
	defer blob.Close()
	watchdog := time.AfterFunc(u.s.cfg.Stall, func() { cancel(errStalled) })
	m := say.meter(id, "Pushing", desc.Size)
	src := &pushReader{blob: blob, size: desc.Size, report: func(n int64) {
		if n < desc.Size {
			watchdog.Reset(u.s.cfg.Stall)
		} else {
			watchdog.Stop() // from here the registry has pushResponseTimeout
		}
		m.at(n)
	}}
	if desc.Size == 0 {
		watchdog.Stop()
	}
	err = content.Copy(ctx, w, src, desc.Size, desc.Digest)
	watchdog.Stop()
	if err != nil {
		return stallCause(ctx, err)
	}
	say.say(id, "Pushed")
	return nil
}

// pushReader reads a blob, again from the start when the connection demands it, and counts. It has
// no other methods, so that io.Copy cannot go around it.
type pushReader struct {
	blob   io.ReadSeekCloser
	size   int64
	n      int64
	report func(int64)
}

func (p *pushReader) Read(b []byte) (int, error) {
	n, err := p.blob.Read(b)
	p.n += int64(n)
	p.report(p.n)
	return n, err
}

func (p *pushReader) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekStart {
		return 0, errors.New("push: only absolute positions")
	}
	n, err := p.blob.Seek(offset, io.SeekStart)
	p.n = n
	return n, err
}
