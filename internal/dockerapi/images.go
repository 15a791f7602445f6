package dockerapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/image"
)

// maxSaveNames bounds the images of one archive.
const maxSaveNames = 4096

func (s *Server) imageRoutes() []route {
	return []route{
		{method: "GET", pattern: "/images/json", handler: s.listImages},
		{method: "GET", pattern: "/images/search", handler: s.searchImages},
		{method: "GET", pattern: "/images/get", handler: s.saveImages},
		{method: "GET", pattern: "/images/{name...}/get", handler: s.saveImages},
		{method: "GET", pattern: "/images/{name...}/json", handler: s.inspectImage},
		{method: "GET", pattern: "/images/{name...}/history", handler: s.imageHistory},
		{method: "GET", pattern: "/images/{name...}/attestations", handler: lacks("attestations of images are not supported by Berth")},
		{method: "POST", pattern: "/images/create", handler: s.pullImage},
		{method: "POST", pattern: "/images/load", handler: s.loadImages},
		{method: "POST", pattern: "/images/prune", handler: s.pruneImages},
		{method: "POST", pattern: "/images/{name...}/push", handler: s.pushImage},
		{method: "POST", pattern: "/images/{name...}/tag", handler: s.tagImage},
		{method: "DELETE", pattern: "/images/{name...}", handler: s.removeImage},
		{method: "GET", pattern: "/distribution/{name...}/json", handler: s.inspectDistribution},
	}
}

func (s *Server) searchImages(http.ResponseWriter, *request) error {
	return unsupported("docker search is not supported by Berth; name the image with its registry: docker pull HOST/NAME")
}

func (s *Server) inspectDistribution(_ http.ResponseWriter, r *request) error {
	return unsupported("inspecting %s in its registry is not supported by Berth; pull it and use docker image inspect", r.vars["name"])
}

// parseImageName reads a name or an ID as docker's commands take it.
func parseImageName(name string) error {
	if strings.TrimSpace(name) == "" {
		return invalid("image name cannot be blank")
	}
	if _, err := reference.ParseAnyReference(name); err != nil {
		return invalid("%w", err)
	}
	return nil
}

// resolveImage finds an image for a request; what is missing is said in docker's words.
func (s *Server) resolveImage(ctx context.Context, name string) (image.Image, error) {
	if err := parseImageName(name); err != nil {
		return image.Image{}, err
	}
	img, err := s.images.Resolve(ctx, name)
	if errors.Is(err, errdefs.ErrNotFound) {
		return image.Image{}, errNoImage(name)
	}
	return img, err
}

// errNoImage is docker's answer for a name that no image has.
func errNoImage(name string) error {
	shown := name
	if named, err := reference.ParseNormalizedNamed(name); err == nil {
		shown = reference.FamiliarString(reference.TagNameOnly(named))
	}
	return notFound("No such image: %s", shown)
}

// imageUsers finds the containers of every image.
func (s *Server) imageUsers() imageUsers {
	users := imageUsers{}
	for _, c := range s.engine.Containers() {
		id := digest.Digest(c.Config.ImageID)
		users[id] = append(users[id], c.Config.ID)
	}
	return users
}

// imageInUse is the function that the store asks before it removes an image.
func (s *Server) imageInUse(id digest.Digest) (names []string, running bool) {
	for _, c := range s.engine.Containers() {
		if digest.Digest(c.Config.ImageID) != id {
			continue
		}
		names = append(names, c.Config.ID)
		switch c.State.Status {
		case engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting:
			running = true
		}
	}
	return names, running
}

func (s *Server) publishImage(action, id, name string, labels map[string]string) {
	s.events.Publish(event.Event{Type: "image", Action: action, ID: id, Attributes: imageAttributes(name, labels)})
}

func (s *Server) listImages(w http.ResponseWriter, r *request) error {
	f, err := r.filters(imageListFilters()...)
	if err != nil {
		return err
	}
	if old := r.query("filter"); old != "" && r.version < 41 {
		if f == nil {
			f = filters{}
		}
		f["reference"] = append(f["reference"], old)
	}
	ctx := r.Context()
	filter, err := newImageFilter(f, time.Now(), func(ref string) (time.Time, error) {
		img, err := s.resolveImage(ctx, ref)
		return img.Created, err
	})
	if err != nil {
		return err
	}
	images, err := s.images.List(ctx)
	if err != nil {
		return err
	}
	images = slices.Clone(images)
	sortImages(images)
	var shared []int64
	if r.version >= 42 && r.boolQuery("shared-size") {
		if shared, _, err = s.sharedSizes(ctx, images); err != nil {
			return err
		}
	}
	users := s.imageUsers()
	out := []versionedSummary{}
	for i, img := range images {
		if !filter.apply(&img) {
			continue
		}
		summary := imageSummary(img, users)
		if r.version < versionImageContainers {
			summary.Containers = -1
		}
		if shared != nil {
			summary.SharedSize = shared[i]
		}
		if r.boolQuery("manifests") {
			summary.Manifests = imageManifests(img, users)
		}
		out = append(out, atVersion(summary, r.version))
	}
	return writeJSON(w, http.StatusOK, out)
}

// sharedSizes asks the store for the sizes of all layers; see the function of the same name.
// An image that is removed meanwhile counts as empty.
func (s *Server) sharedSizes(ctx context.Context, images []image.Image) (shared []int64, total int64, err error) {
	layers := make([][]int64, len(images))
	for i, img := range images {
		layers[i], err = s.images.LayerSizes(ctx, img.ID)
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return nil, 0, err
		}
	}
	shared, total = sharedSizes(images, layers)
	return shared, total, nil
}

func (s *Server) inspectImage(w http.ResponseWriter, r *request) error {
	img, err := s.resolveImage(r.Context(), r.vars["name"])
	if err != nil {
		return err
	}
	manifests := r.version >= versionDescriptor && r.boolQuery("manifests")
	if r.version >= versionPlatformInspect && r.query("platform") != "" {
		if manifests {
			return invalid("conflicting options: manifests and platform options cannot both be set")
		}
		if err := checkPlatform(img, r.vars["name"], r.query("platform")); err != nil {
			return err
		}
	}
	out, err := imageInspect(img, r.version)
	if err != nil {
		return err
	}
	if manifests {
		fields, err := asMap(out)
		if err != nil {
			return err
		}
		fields["Manifests"] = imageManifests(img, s.imageUsers())
		out = fields
	}
	return writeJSON(w, http.StatusOK, out)
}

// checkPlatform refuses a request for another platform (JSON, as OCI describes one) than the
// one that the store has of img.
func checkPlatform(img image.Image, name, wanted string) error {
	var p ocispec.Platform
	if err := json.Unmarshal([]byte(wanted), &p); err != nil || p.OS == "" && p.Architecture == "" {
		return invalid("invalid platform %q: want a JSON object with os and architecture", wanted)
	}
	if !platforms.OnlyStrict(p).Match(img.Config.Platform) {
		return notFound("image with reference %s was found but does not provide the specified platform (%s)", name, platforms.FormatAll(p))
	}
	return nil
}

func (s *Server) imageHistory(w http.ResponseWriter, r *request) error {
	ctx := r.Context()
	img, err := s.resolveImage(ctx, r.vars["name"])
	if err != nil {
		return err
	}
	if r.version >= versionPlatformTransfer && r.query("platform") != "" {
		if err := checkPlatform(img, r.vars["name"], r.query("platform")); err != nil {
			return err
		}
	}
	layers, err := s.images.LayerSizes(ctx, img.ID)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, imageHistory(img, layers))
}

// pullReference puts together what POST /images/create names.
func pullReference(name, tag string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(strings.TrimSuffix(name, ":"))
	if err != nil {
		return nil, invalid("%w", err)
	}
	if tag != "" {
		if d, bad := digest.Parse(tag); bad == nil {
			named, err = reference.WithDigest(reference.TrimNamed(named), d)
		} else {
			named, err = reference.WithTag(reference.TrimNamed(named), tag)
		}
		if err != nil {
			return nil, invalid("%w", err)
		}
	}
	if reference.FamiliarName(named) == "scratch" {
		return nil, errdefs.New(errdefs.ErrForbidden, "'scratch' is a reserved name")
	}
	if reference.IsNameOnly(named) {
		return nil, unsupported("pulling all tags of %s (docker pull -a) is not supported by Berth; name a tag", reference.FamiliarName(named))
	}
	return named, nil
}

func (s *Server) pullImage(w http.ResponseWriter, r *request) error {
	if r.query("fromImage") == "" {
		return unsupported("docker import (fromSrc) is not supported by Berth; use docker load")
	}
	named, err := pullReference(r.query("fromImage"), r.query("tag"))
	if err != nil {
		return err
	}
	platform := r.query("platform")
	if platform != "" {
		if _, err := platforms.Parse(platform); err != nil {
			return invalid("invalid platform: %w", err)
		}
	}
	// As in docker, a pull does not fail because of a header that is not understood.
	auth, _ := decodeAuthHeader(r.Header.Get(registry.AuthHeader))
	stream := newProgressStream(w)
	return stream.run(r.Context(), func(ctx context.Context) error {
		img, err := s.images.Pull(ctx, named.String(), image.PullOptions{
			Credentials: credentials(auth), Platform: platform, Progress: stream.report,
		})
		if err != nil {
			return err
		}
		s.publishImage("pull", reference.FamiliarString(named), reference.FamiliarName(named), img.Config.Config.Labels)
		return nil
	})
}

// pushTargets are the full references that a push sends: one, or with no tag all of the repository.
func (s *Server) pushTargets(ctx context.Context, name, tag string) ([]reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, invalid("%w", err)
	}
	if tag != "" {
		tagged, err := reference.WithTag(reference.TrimNamed(named), tag)
		if err != nil {
			return nil, invalid("%w", err)
		}
		return []reference.Named{tagged}, nil
	}
	if !reference.IsNameOnly(named) {
		return []reference.Named{named}, nil
	}
	images, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []reference.Named
	for _, img := range images {
		for _, ref := range img.Names {
			if candidate, err := reference.ParseNormalizedNamed(ref); err == nil && candidate.Name() == named.Name() {
				out = append(out, candidate)
			}
		}
	}
	if len(out) == 0 {
		return nil, notFound("An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	slices.SortFunc(out, func(a, b reference.Named) int { return strings.Compare(a.String(), b.String()) })
	return out, nil
}

func (s *Server) pushImage(w http.ResponseWriter, r *request) error {
	targets, err := s.pushTargets(r.Context(), r.vars["name"], r.query("tag"))
	if err != nil {
		return err
	}
	var auth registry.AuthConfig
	if header := r.Header.Get(registry.AuthHeader); header != "" {
		auth, _ = decodeAuthHeader(header) // as for a pull
	} else if r.hasBody() {
		if auth, err = decodeAuthBody(r.Body); err != nil {
			return err
		}
	}
	images := make([]image.Image, len(targets))
	for i, target := range targets {
		images[i], err = s.images.Resolve(r.Context(), target.String())
		if errors.Is(err, errdefs.ErrNotFound) {
			return notFound("An image does not exist locally with the tag: %s", reference.FamiliarName(target))
		}
		if err != nil {
			return err
		}
		if platform := r.query("platform"); platform != "" && r.version >= versionPlatformPush {
			if err := checkPlatform(images[i], reference.FamiliarString(target), platform); err != nil {
				return err
			}
		}
	}
	stream := newProgressStream(w)
	return stream.run(r.Context(), func(ctx context.Context) error {
		for i, target := range targets {
			if err := s.pushOne(ctx, stream, target, images[i], credentials(auth)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Server) pushOne(ctx context.Context, stream *progressStream, target reference.Named, img image.Image, c image.Credentials) error {
	pushed, err := s.images.Push(ctx, target.String(), c, stream.report)
	if err != nil {
		return err
	}
	size := img.Target.Size
	if pushed == img.Manifest.Digest {
		size = img.Manifest.Size
	}
	tag := pushed.String()
	if tagged, ok := target.(reference.Tagged); ok {
		tag = tagged.Tag()
	}
	aux, err := json.Marshal(struct {
		Tag    string
		Digest string
		Size   int64
	}{tag, pushed.String(), size})
	if err != nil {
		return err
	}
	stream.aux(aux)
	s.publishImage("push", reference.FamiliarString(target), reference.FamiliarName(target), img.Config.Config.Labels)
	return nil
}

func (s *Server) tagImage(w http.ResponseWriter, r *request) error {
	named, err := reference.ParseNormalizedNamed(r.query("repo"))
	if err != nil {
		return invalid("%w", err)
	}
	if _, digested := named.(reference.Digested); digested {
		return invalid("refusing to create a tag with a digest reference")
	}
	if tag := r.query("tag"); tag != "" {
		if named, err = reference.WithTag(reference.TrimNamed(named), tag); err != nil {
			return invalid("%w", err)
		}
	}
	named = reference.TagNameOnly(named)
	if reference.FamiliarName(named) == string(digest.Canonical) {
		return invalid("refusing to create an ambiguous tag using digest algorithm as name")
	}
	ctx := r.Context()
	img, err := s.resolveImage(ctx, r.vars["name"])
	if err != nil {
		return err
	}
	if err := s.images.Tag(ctx, r.vars["name"], named.String()); err != nil {
		return err
	}
	s.publishImage("tag", img.ID.String(), reference.FamiliarString(named), img.Config.Config.Labels)
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (s *Server) removeImage(w http.ResponseWriter, r *request) error {
	name := r.vars["name"]
	if r.version >= versionPlatformDelete && r.has("platforms") {
		return unsupported("removing single platforms of an image (platforms) is not supported by Berth; remove the image")
	}
	ctx := r.Context()
	img, err := s.resolveImage(ctx, name)
	if err != nil && !errors.Is(err, errdefs.ErrDataLoss) { // what is damaged can still be removed
		return err
	}
	results, err := s.images.Remove(ctx, name, r.boolQuery("force"), !r.boolQuery("noprune"), s.imageInUse)
	s.publishRemovals(results, map[string]image.Image{"": img})
	if errors.Is(err, errdefs.ErrNotFound) {
		return errNoImage(name)
	}
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, deleteResponses(results))
}

// deleteResponses is what was removed in docker's shape, with familiar names; never nil.
func deleteResponses(results []image.RemoveResult) []imagetypes.DeleteResponse {
	out := make([]imagetypes.DeleteResponse, 0, len(results))
	for _, one := range results {
		d := imagetypes.DeleteResponse{Deleted: one.Deleted}
		if one.Untagged != "" {
			d.Untagged = familiar(one.Untagged)
		}
		out = append(out, d)
	}
	return out
}

// publishRemovals tells of names and images that are gone. images are those that there were,
// by name and by ID; the one under "" stands for all that is not found.
func (s *Server) publishRemovals(results []image.RemoveResult, images map[string]image.Image) {
	find := func(key string) (image.Image, bool) {
		if img, ok := images[key]; ok {
			return img, true
		}
		img, ok := images[""]
		return img, ok
	}
	for _, one := range results {
		if one.Untagged != "" {
			if img, ok := find(one.Untagged); ok {
				s.publishImage("untag", img.ID.String(), familiar(one.Untagged), img.Config.Config.Labels)
			}
		}
		// Layers are listed as deleted too; only images have events.
		if img, ok := find(one.Deleted); ok && one.Deleted != "" && one.Deleted == img.ID.String() {
			s.publishImage("delete", one.Deleted, one.Deleted, img.Config.Config.Labels)
		}
	}
}

func (s *Server) saveImages(w http.ResponseWriter, r *request) error {
	names := r.URL.Query()["names"]
	if name, ok := r.vars["name"]; ok {
		names = []string{name}
	}
	if len(names) == 0 {
		return invalid("no images given: name what to save")
	}
	if len(names) > maxSaveNames {
		return invalid("cannot save more than %d images at once", maxSaveNames)
	}
	ctx := r.Context()
	images := make([]image.Image, len(names))
	for i, name := range names {
		img, err := s.resolveImage(ctx, name)
		if err != nil {
			return err
		}
		if r.version >= versionPlatformTransfer {
			for _, platform := range r.URL.Query()["platform"] {
				if err := checkPlatform(img, name, platform); err != nil {
					return err
				}
			}
		}
		images[i] = img
	}
	w.Header().Set("Content-Type", "application/x-tar")
	if err := s.images.Save(ctx, w, names); err != nil {
		return err
	}
	for _, img := range images {
		s.publishImage("save", img.ID.String(), img.ID.String(), img.Config.Config.Labels)
	}
	return nil
}

func (s *Server) loadImages(w http.ResponseWriter, r *request) error {
	if r.version >= versionPlatformTransfer && r.has("platform") {
		return unsupported("loading single platforms (platform) is not supported by Berth; load the archive as it is")
	}
	stream := newProgressStream(w)
	report := stream.report
	if r.boolQueryOr("quiet", true) {
		report = func(image.Status) {}
	}
	// Progress is written while the archive is still read. A connection that cannot do both
	// gets its progress at the end.
	if http.NewResponseController(w).EnableFullDuplex() != nil {
		report = func(image.Status) {}
	}
	return stream.run(r.Context(), func(ctx context.Context) error {
		images, err := s.images.Load(ctx, r.Body, report)
		if err != nil {
			return err
		}
		for _, img := range images {
			names := familiarAll(img.Names)
			for _, name := range names {
				stream.print(fmt.Sprintf("Loaded image: %s\n", name))
			}
			if len(names) == 0 {
				stream.print(fmt.Sprintf("Loaded image ID: %s\n", img.ID))
			}
			s.publishImage("load", img.ID.String(), img.ID.String(), img.Config.Config.Labels)
		}
		return nil
	})
}
