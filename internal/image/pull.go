package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
)

// Pull fetches an image by tag or digest and unpacks it. Two pulls of one reference take turns; the
// second finds all there. A pull whose process was killed is resumed by the next of the same
// reference; one that failed leaves nothing. Errors are in docker's words: errdefs.ErrInvalid,
// ErrNotFound, ErrUnauthorized, ErrUnavailable, ErrDataLoss, ErrExhausted, ErrUnsupported.
func (s *Store) Pull(ctx context.Context, ref string, o PullOptions) (Image, error) {
	named, err := parseTarget(ref)
	if err != nil {
		return Image{}, err
	}
	if _, _, err := matcher(o.Platform); err != nil {
		return Image{}, err
	}
	ctx = s.context(ctx)
	unlock, err := s.locks.lock(ctx, "pull:"+named.String())
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	r, err := s.connect(ctx, named, o.Credentials, false)
	if err != nil {
		return Image{}, err
	}
	defer r.close()

	var root ocispec.Descriptor
	err = s.retry(ctx, o.Progress, "", func() (err error) {
		_, root, err = r.resolver.Resolve(ctx, named.String())
		return err
	})
	if err != nil {
		return Image{}, r.translate(opPull, err)
	}
	o.Progress.say(tagOrDigest(named), "Pulling from "+reference.Path(named))
	leaseID := pullLeasePrefix + digest.FromString(named.String()).Encoded()
	p, err := s.upToDate(ctx, named, root, o.Platform)
	if err != nil {
		return Image{}, err
	}
	status := "Status: Image is up to date for "
	if p == nil {
		status = "Status: Downloaded newer image for "
		if p, err = s.download(ctx, r, root, leaseID, o); err != nil {
			return Image{}, err
		}
	} else {
		s.dropStale(ctx, leaseID)
	}
	o.Progress.say("", "Digest: "+root.Digest.String())
	o.Progress.say("", status+reference.FamiliarString(named))
	img, err := s.Resolve(ctx, p.id.String())
	if err != nil {
		return Image{}, err
	}
	return img, nil
}

// upToDate returns the image when the name has what the registry has, whole and for the platform.
func (s *Store) upToDate(ctx context.Context, named reference.Named, root ocispec.Descriptor, platform string) (*parsed, error) {
	x, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	rec := x.names[named.String()]
	if rec == nil || rec.p == nil || rec.target.Digest != root.Digest || x.names[byDigest(named, root.Digest)] == nil {
		return nil, nil
	}
	// Without a wish, a single image of whatever platform is what the name means.
	if !fits(rec.p, platform) && (platform != "" || rec.manifest.Digest != rec.target.Digest) {
		return nil, nil
	}
	for _, l := range rec.p.layers {
		if ok, err := s.blobPresent(ctx, l); err != nil || !ok {
			return nil, localError("look up layers", err)
		}
	}
	if _, err := s.lowerDirs(ctx, rec.p); err != nil {
		return nil, nil // not unpacked or damaged: pull again
	}
	return rec.p, nil
}

// fits tells whether an image is for the platform, by its own configuration.
func fits(p *parsed, platform string) bool {
	m, _, err := matcher(platform)
	return err == nil && m.Match(p.image.Platform)
}

// download fetches and unpacks all of an image and names it, or leaves nothing.
func (s *Store) download(ctx context.Context, r *remote, root ocispec.Descriptor, leaseID string, o PullOptions) (_ *parsed, err error) {
	ctx, end, err := s.lease(ctx, leaseID)
	if err != nil {
		return nil, err
	}
	defer func() { end(err) }()
	f, err := r.resolver.Fetcher(ctx, r.named.String())
	if err != nil {
		return nil, r.translate(opPull, err)
	}
	t := &transfer{s: s, r: r, fetcher: f, progress: o.Progress, lease: leaseID}
	root, p, err := t.manifests(ctx, root, o.Platform, 0)
	if err != nil {
		return nil, r.translate(opPull, err)
	}
	if o.Platform != "" && !fits(p, o.Platform) {
		_, wanted, _ := matcher(o.Platform)
		return nil, errdefs.New(errdefs.ErrNotFound, "image with reference %s was found but does not match the specified platform: wanted %s, actual: %s/%s",
			reference.FamiliarString(r.named), wanted, p.image.OS, p.image.Architecture)
	}
	if err := t.layers(ctx, p); err != nil {
		return nil, localError("pull "+reference.FamiliarString(r.named), r.translate(opPull, err))
	}
	name := r.named.String()
	set := map[string]*record{name: newRecord(name, root, p)}
	digestName := byDigest(r.named, root.Digest)
	set[digestName] = newRecord(digestName, root, p)
	return p, s.apply(ctx, change{set: set})
}

// transfer is one download.
type transfer struct {
	s        *Store
	r        *remote
	fetcher  remotes.Fetcher
	progress Progress
	lease    string
}

// manifests fetches the manifest of the platform, through an index when there is one, and its
// config. The returned root has the media type that its bytes show.
func (t *transfer) manifests(ctx context.Context, root ocispec.Descriptor, platform string, depth int) (ocispec.Descriptor, *parsed, error) {
	if depth > maxIndexDepth {
		return root, nil, errdefs.New(errdefs.ErrInvalid, "manifest lists are nested more than %d deep", maxIndexDepth)
	}
	if err := checkDescriptor("manifest", root, maxManifestBytes); err != nil {
		return root, nil, err
	}
	ask := root
	ask.URLs, ask.Data = nil, nil
	if !images.IsManifestType(ask.MediaType) && !images.IsIndexType(ask.MediaType) {
		ask.MediaType = ocispec.MediaTypeImageManifest // decides only where it is fetched from
	}
	if err := t.blob(ctx, ask, "", nil); err != nil {
		return root, nil, err
	}
	data, err := t.s.readBlob(ctx, root, maxManifestBytes)
	if err != nil {
		return root, nil, err
	}
	mediaType, kind, err := sniff(root.MediaType, data)
	if err != nil {
		return root, nil, err
	}
	root.MediaType = mediaType
	switch kind {
	case kindSchema1:
		return root, nil, t.r.schema1()
	case kindIndex:
		child, err := choose(data, platform, func(ocispec.Descriptor) bool { return true })
		if err != nil {
			return root, nil, err
		}
		_, p, err := t.manifests(ctx, child, platform, depth+1)
		if err != nil {
			return root, nil, err
		}
		return root, p, t.s.setLabels(ctx, root.Digest, refLabels("m", child))
	}
	p, err := t.image(ctx, root, data)
	return root, p, err
}

// image fetches the config of a manifest and puts both together.
func (t *transfer) image(ctx context.Context, desc ocispec.Descriptor, data []byte) (*parsed, error) {
	m, err := decodeManifest(data)
	if err != nil {
		return nil, err
	}
	if err := t.blob(ctx, m.Config, "", nil); err != nil {
		return nil, err
	}
	config, err := t.s.readBlob(ctx, m.Config, maxConfigBytes)
	if err != nil {
		return nil, err
	}
	p, err := decodeConfig(desc, m, config)
	if err != nil {
		return nil, err
	}
	return p, t.s.linkManifest(ctx, p)
}

// linkManifest lets a manifest's config and layers live as long as itself.
func (s *Store) linkManifest(ctx context.Context, p *parsed) error {
	labels := refLabels("l", p.layers...)
	labels[labelRefContent+"config"] = p.config.Digest.String()
	return s.setLabels(ctx, p.manifest.Digest, labels)
}

// layers downloads what is missing, some layers at a time, and unpacks in order while the others
// still arrive.
func (t *transfer) layers(ctx context.Context, p *parsed) error {
	unpacked, err := t.s.unpackedBelow(ctx, p, t.lease)
	if err != nil {
		return err
	}
	present := make([]bool, len(p.layers))
	for i, l := range p.layers {
		if present[i], err = t.s.blobPresent(ctx, l); err != nil {
			return err
		}
		if present[i] && i < unpacked {
			t.progress.say(shortID(l.Digest), "Already exists")
		} else {
			t.progress.say(shortID(l.Digest), "Pulling fs layer")
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel(nil)
	arrived := t.fetchLayers(ctx, cancel, &workers, p, present)

	fresh := false
	for i, l := range p.layers {
		select {
		case <-arrived[i]:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		id := shortID(l.Digest)
		m := t.progress.meter(id, "Extracting", l.Size)
		made, err := t.s.unpackLayer(ctx, p, i, m.at)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		fresh = fresh || made
		if made || !present[i] {
			t.progress.say(id, "Pull complete")
		}
	}
	return t.s.finishUnpack(ctx, p, fresh)
}

// fetchLayers starts the downloads. Each channel is closed when its layer is there; the first
// failure cancels the context with its reason.
func (t *transfer) fetchLayers(ctx context.Context, cancel context.CancelCauseFunc, workers *sync.WaitGroup, p *parsed, present []bool) []chan struct{} {
	slots := make(chan struct{}, t.s.cfg.Parallel)
	arrived := make([]chan struct{}, len(p.layers))
	for i := range p.layers {
		arrived[i] = make(chan struct{})
	}
	workers.Go(func() {
		for i, l := range p.layers {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			workers.Go(func() {
				defer func() { <-slots }()
				var say Progress
				if !present[i] {
					say = t.progress
				}
				// Also for what is present: it comes under our lease that way.
				if err := t.blob(ctx, l, shortID(l.Digest), say); err != nil {
					cancel(err)
					return
				}
				close(arrived[i])
			})
		}
	})
	return arrived
}

// blob brings a blob into the store and under the lease, with retries, resuming what a broken
// connection or a killed process left.
func (t *transfer) blob(ctx context.Context, desc ocispec.Descriptor, id string, say Progress) error {
	unlock, err := t.s.locks.lock(ctx, "fetch:"+desc.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := t.s.blobPresent(ctx, desc); err != nil {
		return err
	}
	ref := "fetch-" + desc.Digest.String()
	err = t.s.retry(ctx, say, id, func() error { return t.attempt(ctx, ref, desc, id, say) })
	if err != nil && ctx.Err() == nil {
		if abortErr := t.s.content.Abort(ctx, ref); abortErr != nil && !cerrdefs.IsNotFound(abortErr) {
			return errors.Join(err, abortErr)
		}
	}
	return err
}

// attempt continues the download of a blob where the last attempt ended.
func (t *transfer) attempt(ctx context.Context, ref string, desc ocispec.Descriptor, id string, say Progress) error {
	w, err := content.OpenWriter(ctx, t.s.content, content.WithRef(ref), content.WithDescriptor(desc))
	if cerrdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return err
	}
	if st.Offset > desc.Size {
		if err := w.Truncate(0); err != nil {
			return err
		}
		st.Offset = 0
	}
	if st.Offset < desc.Size || desc.Size == 0 {
		m := say.meter(id, "Downloading", desc.Size)
		if err := t.receive(ctx, w, desc, st.Offset, m); err != nil {
			return err
		}
	}
	say.say(id, "Verifying Checksum")
	key, repo := sourceLabel(t.r.named)
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(map[string]string{key: repo}))
	switch {
	case err == nil, cerrdefs.IsAlreadyExists(err):
		say.say(id, "Download complete")
		return nil
	case !cerrdefs.IsFailedPrecondition(err):
		return err
	}
	w.Close()
	if abortErr := t.s.content.Abort(ctx, ref); abortErr != nil && !cerrdefs.IsNotFound(abortErr) {
		return abortErr
	}
	if st.Offset > 0 {
		return fmt.Errorf("what an earlier attempt left is damaged: %w", io.ErrUnexpectedEOF) // once more, from the start
	}
	what := "filesystem layer verification failed for digest %s"
	if images.IsManifestType(desc.MediaType) || images.IsIndexType(desc.MediaType) {
		what = "manifest verification failed for digest %s"
	}
	return errdefs.New(errdefs.ErrDataLoss, what+": the registry sent other content", desc.Digest)
}

// receive appends the bytes from offset to the writer, no more than the descriptor promises.
func (t *transfer) receive(ctx context.Context, w content.Writer, desc ocispec.Descriptor, offset int64, m *meter) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(t.s.cfg.Stall, func() { cancel(errStalled) })
	defer watchdog.Stop()
	body, err := t.fetcher.Fetch(ctx, desc)
	if err != nil {
		return stallCause(ctx, err)
	}
	defer body.Close()
	if offset > 0 {
		seeker, ok := body.(io.Seeker)
		if !ok {
			return fmt.Errorf("cannot resume the download of %s", desc.Digest)
		}
		if _, err := seeker.Seek(offset, io.SeekStart); err != nil {
			return err
		}
	}
	in := &countingReader{ctx: ctx, r: io.LimitReader(body, desc.Size-offset+1), report: func(n int64) {
		watchdog.Reset(t.s.cfg.Stall)
		m.at(min(offset+n, desc.Size))
	}}
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, in, make([]byte, copyBuffer))
	switch {
	case err != nil:
		return stallCause(ctx, err)
	case offset+n > desc.Size:
		return errdefs.New(errdefs.ErrDataLoss, "blob %s: the registry sent more than the %d bytes of its descriptor", desc.Digest, desc.Size)
	case offset+n < desc.Size:
		return fmt.Errorf("blob %s ends after %d of %d bytes: %w", desc.Digest, offset+n, desc.Size, io.ErrUnexpectedEOF)
	}
	return nil
}

// stallCause is errStalled when the watchdog, not the caller, cancelled.
func stallCause(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStalled) {
		return errStalled
	}
	return err
}

// sourceLabel says on a blob which repository of a registry has it, so that a push to another
// repository there need not send it. The name is containerd's.
func sourceLabel(named reference.Named) (key, repo string) {
	host, _, _ := strings.Cut(reference.Domain(named), ":")
	return labels.LabelDistributionSource + "." + host, reference.Path(named)
}
