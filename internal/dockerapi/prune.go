package dockerapi

import (
	"errors"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/build"
	containertypes "github.com/moby/moby/api/types/container"
	imagetypes "github.com/moby/moby/api/types/image"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/image"
)

// publishPrune tells that a prune of one type of object is done, as docker does.
func (s *Server) publishPrune(kind string, reclaimed uint64) {
	s.events.Publish(event.Event{Type: kind, Action: "prune",
		Attributes: map[string]string{"reclaimed": strconv.FormatUint(reclaimed, 10)}})
}

// pruneContainers removes stopped containers: POST /containers/prune.
func (s *Server) pruneContainers(w http.ResponseWriter, r *request) error {
	f, err := r.filters("label", "label!", "until")
	if err != nil {
		return err
	}
	until, err := f.until(time.Now())
	if err != nil {
		return err
	}
	ctx := r.Context()
	report := containertypes.PruneReport{ContainersDeleted: []string{}}
	for _, c := range s.engine.Containers() {
		if ctx.Err() != nil {
			break
		}
		if !prunableContainer(c, f, until) {
			continue
		}
		size, err := s.engine.WritableBytes(ctx, c.Config.ID)
		if err != nil {
			size = 0 // removed meanwhile, or never started
		}
		if err := s.engine.RemoveContainer(ctx, c.Config.ID, engine.RemoveOptions{}); err != nil {
			s.log.Info("container not pruned", "container", c.Config.Name, "error", err)
			continue
		}
		report.ContainersDeleted = append(report.ContainersDeleted, c.Config.ID)
		report.SpaceReclaimed += uint64(max(size, 0))
	}
	s.publishPrune("container", report.SpaceReclaimed)
	return writeJSON(w, http.StatusOK, report)
}

// prunableContainer tells whether a prune takes c. Containers of other dialects belong to their
// own managers.
func prunableContainer(c engine.Container, f filters, until time.Time) bool {
	switch c.State.Status {
	case engine.StatusCreated, engine.StatusExited, engine.StatusDead:
	default:
		return false
	}
	return c.Config.Owner == engine.OwnerDocker && (until.IsZero() || !c.State.Created.After(until)) &&
		f.matchLabels(c.Config.Labels)
}

// pruneImages removes unused images: POST /images/prune.
func (s *Server) pruneImages(w http.ResponseWriter, r *request) error {
	f, err := r.filters(imagePruneFilters()...)
	if err != nil {
		return err
	}
	danglingOnly, err := f.boolean("dangling", true)
	if err != nil {
		return err
	}
	delete(f, "dangling") // here it says how much to remove, not what to match
	if _, err := f.until(time.Now()); err != nil {
		return err
	}
	filter, err := newImageFilter(f, time.Now(), nil)
	if err != nil {
		return err
	}
	ctx := r.Context()
	known, err := s.imagesByName(r)
	if err != nil {
		return err
	}
	users := s.imageUsers()
	keep := func(img image.Image) bool { return len(users[img.ID]) > 0 || !filter.apply(&img) }
	results, reclaimed, err := s.images.Prune(ctx, !danglingOnly, keep)
	s.publishRemovals(results, known)
	if err != nil {
		return err
	}
	report := imagetypes.PruneReport{ImagesDeleted: deleteResponses(results), SpaceReclaimed: uint64(max(reclaimed, 0))}
	s.publishPrune("image", report.SpaceReclaimed)
	return writeJSON(w, http.StatusOK, report)
}

// pruneBuildCache answers POST /build/prune, which docker system prune sends too: Berth keeps no
// build cache, so there is nothing to remove.
func (s *Server) pruneBuildCache(w http.ResponseWriter, _ *request) error {
	return writeJSON(w, http.StatusOK, build.CachePruneReport{CachesDeleted: []string{}})
}

// imagesByName indexes all images by their names, digest references and IDs.
func (s *Server) imagesByName(r *request) (map[string]image.Image, error) {
	images, err := s.images.List(r.Context())
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return nil, err
	}
	known := map[string]image.Image{}
	for _, img := range images {
		known[img.ID.String()] = img
		for _, name := range slices.Concat(img.Names, img.Digests) {
			known[name] = img
			known[familiar(name)] = img
		}
	}
	return known, nil
}
