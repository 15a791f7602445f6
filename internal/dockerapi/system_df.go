package dockerapi

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/moby/moby/api/types/build"
	containertypes "github.com/moby/moby/api/types/container"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/system"
	volumetypes "github.com/moby/moby/api/types/volume"

	"berth/internal/errdefs"
	"berth/internal/image"
)

// API versions at which the shape of disk usage changed.
const (
	versionUsageTypes  = 42 // the parameter "type"
	versionUsageObject = 52 // a summary per type of object; details with "verbose" only
	versionUsageOnly   = 53 // the old lists are gone
)

// legacyDiskUsage is GET /system/df before API 1.52: everything in lists.
type legacyDiskUsage struct {
	LayersSize  int64
	Images      []versionedSummary
	Containers  []containertypes.Summary
	Volumes     []volumetypes.Volume
	BuildCache  []build.CacheRecord
	BuilderSize int64
}

// usage is what disk usage found out, before it gets the shape of an API version.
type usage struct {
	images     *imagetypes.DiskUsage
	containers *containertypes.DiskUsage
	volumes    *volumetypes.DiskUsage
	buildCache bool
}

func (s *Server) diskUsage(w http.ResponseWriter, r *request) error {
	wanted := []string{"container", "image", "volume", "build-cache"}
	if types := r.URL.Query()["type"]; len(types) > 0 && r.version >= versionUsageTypes {
		for _, one := range types {
			if !slices.Contains(wanted, one) {
				return invalid("unknown object type: %s", one)
			}
		}
		wanted = types
	}
	u, err := s.measure(r.Context(), wanted)
	if err != nil {
		return err
	}
	if r.version < versionUsageObject {
		return writeJSON(w, http.StatusOK, u.legacy(r.version))
	}
	verbose := r.boolQuery("verbose")
	current := u.current(verbose)
	if verbose || r.version >= versionUsageOnly {
		return writeJSON(w, http.StatusOK, current)
	}
	return writeJSON(w, http.StatusOK, struct { // 1.52 speaks both
		system.DiskUsage
		legacyDiskUsage
	}{current, u.legacy(r.version)})
}

func (s *Server) measure(ctx context.Context, wanted []string) (usage, error) {
	var u usage
	var err error
	if slices.Contains(wanted, "image") {
		if u.images, err = s.imageUsage(ctx); err != nil {
			return u, err
		}
	}
	if slices.Contains(wanted, "container") {
		if u.containers, err = s.containerUsage(ctx); err != nil {
			return u, err
		}
	}
	if slices.Contains(wanted, "volume") {
		if u.volumes, err = s.volumeUsage(ctx); err != nil {
			return u, err
		}
	}
	u.buildCache = slices.Contains(wanted, "build-cache")
	return u, nil
}

func (s *Server) imageUsage(ctx context.Context) (*imagetypes.DiskUsage, error) {
	images, err := s.images.List(ctx)
	if err != nil {
		return nil, err
	}
	images = slices.Clone(images)
	sortImages(images)
	shared, _, err := s.sharedSizes(ctx, images)
	if err != nil {
		return nil, err
	}
	total, err := s.images.DiskUsage(ctx)
	if err != nil {
		return nil, err
	}
	return summarizeImages(images, shared, total, s.imageUsers()), nil
}

// summarizeImages adds up: what no container uses is reclaimable, except layers that it shares
// with an image in use.
func summarizeImages(images []image.Image, shared []int64, total int64, users imageUsers) *imagetypes.DiskUsage {
	du := &imagetypes.DiskUsage{Items: []imagetypes.Summary{}, TotalSize: total, Reclaimable: total}
	for i, img := range images {
		summary := imageSummary(img, users)
		summary.SharedSize = shared[i]
		du.Items = append(du.Items, summary)
		du.TotalCount++
		if summary.Containers > 0 {
			du.ActiveCount++
			du.Reclaimable -= summary.Size - summary.SharedSize
		}
	}
	du.Reclaimable = max(du.Reclaimable, 0)
	return du
}

func (s *Server) containerUsage(ctx context.Context) (*containertypes.DiskUsage, error) {
	du := &containertypes.DiskUsage{Items: []containertypes.Summary{}}
	for _, c := range s.engine.Containers() {
		size, err := s.engine.WritableBytes(ctx, c.Config.ID)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			continue // removed meanwhile
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil: // one damaged container must not hide the others
			s.log.Warn("container's size unknown", "container", c.Config.Name, "error", err)
			size = 0
		}
		summary := s.containerSummary(c)
		summary.SizeRw = size
		du.Items = append(du.Items, summary)
		du.TotalCount++
		du.TotalSize += size
		switch summary.State {
		case containertypes.StateRunning, containertypes.StatePaused, containertypes.StateRestarting:
			du.ActiveCount++
		default:
			du.Reclaimable += size
		}
	}
	return du, nil
}

func (s *Server) volumeUsage(ctx context.Context) (*volumetypes.DiskUsage, error) {
	du := &volumetypes.DiskUsage{Items: []volumetypes.Volume{}}
	users := volumeUsers(s.engine.Containers())
	for _, v := range s.sortedVolumes() {
		size, err := s.volumes.SizeBytes(ctx, v.Name)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			continue // removed meanwhile
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			s.log.Warn("volume's size unknown", "volume", v.Name, "error", err)
			size = -1 // docker's "not available"
		}
		shown := volumeJSON(v)
		shown.UsageData = &volumetypes.UsageData{Size: size, RefCount: int64(len(users[v.Name]))}
		du.Items = append(du.Items, shown)
		du.TotalCount++
		du.TotalSize += max(size, 0)
		if shown.UsageData.RefCount > 0 {
			du.ActiveCount++
		} else {
			du.Reclaimable += max(size, 0)
		}
	}
	return du, nil
}

// legacy is the answer to API 1.minor below 1.53. What was not asked for is null.
func (u usage) legacy(minor int) legacyDiskUsage {
	var out legacyDiskUsage
	if u.images != nil {
		out.LayersSize = u.images.TotalSize
		out.Images = []versionedSummary{}
		for _, one := range u.images.Items {
			out.Images = append(out.Images, atVersion(one, minor))
		}
	}
	if u.containers != nil {
		out.Containers = u.containers.Items
	}
	if u.volumes != nil {
		out.Volumes = u.volumes.Items
	}
	if u.buildCache {
		out.BuildCache = []build.CacheRecord{}
	}
	return out
}

// current is the answer from API 1.52 on.
func (u usage) current(verbose bool) system.DiskUsage {
	out := system.DiskUsage{ImageUsage: u.images, ContainerUsage: u.containers, VolumeUsage: u.volumes}
	if u.buildCache {
		out.BuildCacheUsage = &build.DiskUsage{}
	}
	if verbose {
		return out
	}
	if u.images != nil {
		short := *u.images
		short.Items = nil
		out.ImageUsage = &short
	}
	if u.containers != nil {
		short := *u.containers
		short.Items = nil
		out.ContainerUsage = &short
	}
	if u.volumes != nil {
		short := *u.volumes
		short.Items = nil
		out.VolumeUsage = &short
	}
	return out
}
