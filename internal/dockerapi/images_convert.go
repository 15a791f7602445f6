package dockerapi

import (
	"cmp"
	"encoding/json"
	"maps"
	"path"
	"slices"
	"time"

	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"berth/internal/errdefs"
	"berth/internal/image"
)

// storageDriver is the name that docker gives to the snapshotter that holds the layers.
const storageDriver = "overlayfs"

// API versions at which the shape of images changed.
const (
	versionNoNone           = 43 // untagged images have empty lists instead of "<none>:<none>"
	versionNoVirtualSize    = 44
	versionNoParentInspect  = 45 // Container and ContainerConfig are gone
	versionDescriptor       = 48
	versionSlimConfig       = 50 // Config has no container fields any more
	versionImageContainers  = 51 // GET /images/json counts containers
	versionOmitEmptyConfig  = 52 // empty Config fields are omitted
	versionManifests        = 47
	versionPlatformInspect  = 49
	versionPlatformTransfer = 48
	versionPlatformPush     = 46
	versionPlatformDelete   = 50
)

// familiar shortens a full reference for people: docker.io/library/busybox:latest is
// busybox:latest. What is not a reference stays as it is.
func familiar(ref string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	return reference.FamiliarString(named)
}

// familiarAll shortens all refs, sorted, never nil.
func familiarAll(refs []string) []string {
	out := make([]string, 0, len(refs))
	for _, ref := range refs {
		out = append(out, familiar(ref))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// imageUsers maps an image ID to the IDs of the containers made from it.
type imageUsers map[digest.Digest][]string

// imageSummary is an image as GET /images/json shows it. RepoTags and RepoDigests are never nil.
func imageSummary(img image.Image, users imageUsers) imagetypes.Summary {
	target := img.Target
	return imagetypes.Summary{
		Containers:  int64(len(users[img.ID])),
		Created:     unixOrZero(img.Created),
		ID:          img.ID.String(),
		Labels:      img.Config.Config.Labels,
		Descriptor:  &target,
		RepoTags:    familiarAll(img.Names),
		RepoDigests: familiarAll(img.Digests),
		SharedSize:  -1,
		Size:        img.SizeBytes,
	}
}

func unixOrZero(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// imageManifests is the list of manifests of an image: the one of its platform, which is the
// only one that the store keeps.
func imageManifests(img image.Image, users imageUsers) []imagetypes.ManifestSummary {
	m := imagetypes.ManifestSummary{
		ID: img.Manifest.Digest.String(), Descriptor: img.Manifest, Available: true, Kind: imagetypes.ManifestKindImage,
		ImageData: &imagetypes.ImageProperties{Platform: img.Config.Platform, Containers: users[img.ID]},
	}
	if m.ImageData.Containers == nil {
		m.ImageData.Containers = []string{}
	}
	m.Size.Content = img.Manifest.Size
	m.Size.Total = img.SizeBytes
	m.ImageData.Size.Unpacked = img.SizeBytes
	return []imagetypes.ManifestSummary{m}
}

// versionedSummary is a summary in the shape of one API version.
type versionedSummary struct {
	imagetypes.Summary
	VirtualSize int64 `json:"VirtualSize,omitempty"`
}

// atVersion gives a summary the shape that API 1.minor has.
func atVersion(s imagetypes.Summary, minor int) versionedSummary {
	v := versionedSummary{Summary: s}
	if minor < versionNoNone && len(s.RepoTags) == 0 && len(s.RepoDigests) == 0 {
		v.RepoTags, v.RepoDigests = []string{"<none>:<none>"}, []string{"<none>@<none>"}
	}
	if minor < versionNoVirtualSize {
		v.VirtualSize = s.Size
	}
	if minor < versionDescriptor {
		v.Descriptor = nil
	}
	if minor < versionManifests {
		v.Manifests = nil
	}
	return v
}

// sharedSizes returns for each image the bytes of its layers that another image has too, and the
// bytes of all layers, each once. layers are the sizes of each image's layers, lowest first.
func sharedSizes(images []image.Image, layers [][]int64) (shared []int64, total int64) {
	users := map[digest.Digest]int{}
	chains := make([][]digest.Digest, len(images))
	for i, img := range images {
		chains[i] = identity.ChainIDs(slices.Clone(img.Config.RootFS.DiffIDs))
		for n, chain := range chains[i] {
			if users[chain]++; users[chain] == 1 && n < len(layers[i]) {
				total += layers[i][n]
			}
		}
	}
	shared = make([]int64, len(images))
	for i := range images {
		for n, chain := range chains[i] {
			if users[chain] > 1 && n < len(layers[i]) {
				shared[i] += layers[i][n]
			}
		}
	}
	return shared, total
}

// imageInspect is an image as GET /images/{name}/json shows it to API 1.minor.
func imageInspect(img image.Image, minor int) (any, error) {
	config, err := dockerConfig(img)
	if err != nil {
		return nil, err
	}
	target := img.Target
	out := imagetypes.InspectResponse{
		ID:           img.ID.String(),
		RepoTags:     familiarAll(img.Names),
		RepoDigests:  familiarAll(img.Digests),
		Author:       img.Config.Author,
		Config:       &config,
		Architecture: img.Config.Architecture,
		Variant:      img.Config.Variant,
		Os:           img.Config.OS,
		OsVersion:    img.Config.OSVersion,
		Size:         img.SizeBytes,
		GraphDriver:  &storage.DriverData{Name: storageDriver},
		RootFS:       imagetypes.RootFS{Type: img.Config.RootFS.Type},
		Metadata:     imagetypes.Metadata{LastTagTime: img.Tagged},
		Descriptor:   &target,
	}
	if n := len(img.Config.History); n > 0 {
		out.Comment = img.Config.History[n-1].Comment
	}
	if !img.Created.IsZero() {
		out.Created = img.Created.Format(time.RFC3339Nano)
	}
	for _, layer := range img.Config.RootFS.DiffIDs {
		out.RootFS.Layers = append(out.RootFS.Layers, layer.String())
	}
	if minor < versionDescriptor {
		out.Descriptor = nil
	}
	if minor >= versionOmitEmptyConfig {
		return out, nil
	}
	return legacyInspect(out, minor)
}

// dockerConfig is the run configuration of an image with the fields that OCI lacks.
func dockerConfig(img image.Image) (dockerspec.DockerOCIImageConfig, error) {
	config := dockerspec.DockerOCIImageConfig{ImageConfig: img.Config.Config}
	if len(img.DockerConfig) == 0 {
		return config, nil
	}
	if err := json.Unmarshal(img.DockerConfig, &config.DockerOCIImageConfigExt); err != nil {
		return config, errdefs.New(errdefs.ErrDataLoss, "config of image %s: %w", img.ID, err)
	}
	return config, nil
}

// legacyInspect adds what the API showed before 1.52: fields that are empty, and below 1.50
// those of a container, which meant nothing there.
func legacyInspect(out imagetypes.InspectResponse, minor int) (any, error) {
	fields, err := asMap(out)
	if err != nil {
		return nil, err
	}
	config, err := asMap(out.Config)
	if err != nil {
		return nil, err
	}
	addMissing(config, map[string]any{
		"Cmd": nil, "Entrypoint": nil, "Env": nil, "Labels": nil, "OnBuild": nil,
		"User": "", "Volumes": nil, "WorkingDir": "",
	})
	if minor < versionSlimConfig {
		addMissing(config, map[string]any{
			"Hostname": "", "Domainname": "", "AttachStdin": false, "AttachStdout": false, "AttachStderr": false,
			"Tty": false, "OpenStdin": false, "StdinOnce": false, "Image": "",
		})
	}
	fields["Config"] = config
	addMissing(fields, map[string]any{"Parent": "", "Comment": "", "DockerVersion": "", "Author": ""})
	if minor < versionNoVirtualSize {
		fields["VirtualSize"] = out.Size
		addMissing(fields, map[string]any{"Created": time.Time{}.Format(time.RFC3339Nano)})
	}
	if minor < versionNoParentInspect {
		addMissing(fields, map[string]any{"Container": "", "ContainerConfig": nil})
	}
	return fields, nil
}

// asMap is v as its JSON object.
func asMap(v any) (map[string]any, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var m map[string]any
	return m, json.Unmarshal(raw, &m)
}

func addMissing(m, defaults map[string]any) {
	for key, value := range defaults {
		if _, ok := m[key]; !ok {
			m[key] = value
		}
	}
}

// imageHistory is an image's history, newest first. layers are the sizes of its layers, lowest
// first; a history that names more layers than there are ends with sizes of 0.
func imageHistory(img image.Image, layers []int64) []imagetypes.HistoryResponseItem {
	history := img.Config.History
	out := make([]imagetypes.HistoryResponseItem, 0, max(len(history), len(layers)))
	for _, h := range history {
		item := imagetypes.HistoryResponseItem{ID: "<missing>", Comment: h.Comment, CreatedBy: h.CreatedBy}
		if h.Created != nil {
			item.Created = unixOrZero(*h.Created)
		}
		if !h.EmptyLayer && len(layers) > 0 {
			item.Size, layers = layers[0], layers[1:]
		}
		out = append(out, item)
	}
	for _, size := range layers { // layers that the history does not tell of
		out = append(out, imagetypes.HistoryResponseItem{ID: "<missing>", Size: size, Created: unixOrZero(img.Created)})
	}
	slices.Reverse(out)
	if len(out) > 0 {
		out[0].ID, out[0].Tags = img.ID.String(), familiarAll(img.Names)
	}
	return out
}

// imageFilter decides which images a list shows.
type imageFilter struct {
	filters  filters
	dangling *bool
	before   []time.Time
	since    []time.Time
	until    []time.Time
}

// imageListFilters and imagePruneFilters are the keys that docker knows for images.
func imageListFilters() []string {
	return []string{"dangling", "label", "label!", "before", "since", "reference", "until"}
}

func imagePruneFilters() []string { return []string{"dangling", "label", "label!", "until"} }

// newImageFilter prepares f; created finds the creation time of the images that before and since name.
func newImageFilter(f filters, now time.Time, created func(ref string) (time.Time, error)) (imageFilter, error) {
	out := imageFilter{filters: f}
	if f.has("dangling") {
		dangling, err := f.boolean("dangling", false)
		if err != nil {
			return out, err
		}
		out.dangling = &dangling
	}
	for key, times := range map[string]*[]time.Time{"before": &out.before, "since": &out.since} {
		for _, ref := range f.get(key) {
			t, err := created(ref)
			if err != nil {
				return out, err
			}
			*times = append(*times, t)
		}
	}
	for _, text := range f.get("until") {
		t, err := parseFilterTime(text, now)
		if err != nil {
			return out, err
		}
		out.until = append(out.until, t)
	}
	for _, pattern := range f.get("reference") {
		if _, err := path.Match(pattern, ""); err != nil {
			return out, invalid("invalid filter 'reference=%s': %w", pattern, err)
		}
	}
	return out, nil
}

// apply tells whether img passes. With a reference filter the image is reduced to the names
// that match.
func (f imageFilter) apply(img *image.Image) bool {
	if f.dangling != nil && *f.dangling != (len(img.Names) == 0) {
		return false
	}
	if !f.filters.matchLabels(img.Config.Config.Labels) {
		return false
	}
	if slices.ContainsFunc(f.before, func(t time.Time) bool { return !img.Created.Before(t) }) ||
		slices.ContainsFunc(f.since, func(t time.Time) bool { return !img.Created.After(t) }) ||
		slices.ContainsFunc(f.until, func(t time.Time) bool { return !img.Created.Before(t) }) {
		return false
	}
	patterns := f.filters.get("reference")
	if len(patterns) == 0 {
		return true
	}
	img.Names = matchingReferences(img.Names, patterns)
	img.Digests = matchingReferences(img.Digests, patterns)
	return len(img.Names)+len(img.Digests) > 0
}

func matchingReferences(refs, patterns []string) []string {
	return slices.DeleteFunc(slices.Clone(refs), func(ref string) bool {
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			return true
		}
		return !slices.ContainsFunc(patterns, func(pattern string) bool {
			ok, err := reference.FamiliarMatch(pattern, named)
			return err == nil && ok
		})
	})
}

// sortImages puts the newest first, as docker does; equal times by ID.
func sortImages(images []image.Image) {
	slices.SortFunc(images, func(a, b image.Image) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
}

// imageAttributes are what docker attaches to an event of an image.
func imageAttributes(name string, labels map[string]string) map[string]string {
	out := maps.Clone(labels)
	if out == nil {
		out = map[string]string{}
	}
	out["name"] = name
	return out
}
