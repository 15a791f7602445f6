package dockerapi

import (
	"cmp"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	volumetypes "github.com/moby/moby/api/types/volume"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/volume"
)

// versionPruneAnonymous is the API version from which a prune takes anonymous volumes only.
const versionPruneAnonymous = 42

// driverLocal is the only driver of volumes.
const driverLocal = "local"

// labelAnonymous is how docker marks a volume that nobody named.
const labelAnonymous = "com.docker.volume.anonymous"

func (s *Server) volumeRoutes() []route {
	return []route{
		{method: "GET", pattern: "/volumes", handler: s.listVolumes},
		{method: "POST", pattern: "/volumes/create", handler: s.createVolume},
		{method: "POST", pattern: "/volumes/prune", handler: s.pruneVolumes},
		{method: "GET", pattern: "/volumes/{name}", handler: s.inspectVolume},
		{method: "PUT", pattern: "/volumes/{name}", handler: s.updateVolume},
		{method: "DELETE", pattern: "/volumes/{name}", handler: s.removeVolume},
	}
}

func (s *Server) updateVolume(http.ResponseWriter, *request) error {
	return unsupported("updating volumes is not supported by Berth: only cluster volumes of a swarm can be updated")
}

// volumeJSON is a volume in docker's shape, without usage.
func volumeJSON(v Volume) volumetypes.Volume {
	out := volumetypes.Volume{
		Name: v.Name, Driver: cmp.Or(v.Driver, driverLocal), Mountpoint: v.Path, Scope: scopeLocal,
		Labels: v.Labels, Options: v.Options,
	}
	if !v.Created.IsZero() {
		out.CreatedAt = v.Created.Format(time.RFC3339)
	}
	if v.Anonymous {
		labels := map[string]string{labelAnonymous: ""}
		for key, value := range v.Labels {
			labels[key] = value
		}
		out.Labels = labels
	}
	return out
}

// volumeUsers maps a volume's name to the IDs of the containers that mount it, running or not.
func volumeUsers(containers []engine.Container) map[string][]string {
	users := map[string][]string{}
	for _, c := range containers {
		for _, m := range c.Config.Mounts {
			if m.Kind == engine.MountVolume && !slices.Contains(users[m.Source], c.Config.ID) {
				users[m.Source] = append(users[m.Source], c.Config.ID)
			}
		}
	}
	return users
}

func (s *Server) publishVolume(action string, v Volume) {
	s.events.Publish(event.Event{Type: "volume", Action: action, ID: v.Name,
		Attributes: map[string]string{"driver": cmp.Or(v.Driver, driverLocal)}})
}

// volume finds a volume for a request; what is missing is said in docker's words.
func (s *Server) volume(name string) (Volume, error) {
	v, err := s.volumes.Get(name)
	if errors.Is(err, errdefs.ErrNotFound) {
		return v, errNoVolume(name)
	}
	return v, err
}

func errNoVolume(name string) error { return notFound("get %s: no such volume", name) }

func (s *Server) sortedVolumes() []Volume {
	volumes := slices.Clone(s.volumes.List())
	slices.SortFunc(volumes, func(a, b Volume) int { return cmp.Compare(a.Name, b.Name) })
	return volumes
}

func (s *Server) listVolumes(w http.ResponseWriter, r *request) error {
	f, err := r.filters("dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	dangling, err := f.boolean("dangling", false)
	if err != nil {
		return err
	}
	users := volumeUsers(s.engine.Containers())
	out := volumetypes.ListResponse{Volumes: []volumetypes.Volume{}}
	for _, v := range s.sortedVolumes() {
		shown := volumeJSON(v)
		if f.has("dangling") && dangling == (len(users[v.Name]) > 0) {
			continue
		}
		if f.exact("driver", shown.Driver) && f.match("name", v.Name) && f.matchLabels(shown.Labels) {
			out.Volumes = append(out.Volumes, shown)
		}
	}
	return writeJSON(w, http.StatusOK, out)
}

func (s *Server) inspectVolume(w http.ResponseWriter, r *request) error {
	v, err := s.volume(r.vars["name"])
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, volumeJSON(v))
}

// checkVolumeName refuses what the volume store would refuse, in the same words.
func checkVolumeName(name string) error {
	if name == "" {
		return nil // one is generated
	}
	if err := volume.CheckName(name); err != nil {
		return invalid("create %s: %w", name, err)
	}
	return nil
}

func (s *Server) createVolume(w http.ResponseWriter, r *request) error {
	var q volumetypes.CreateRequest
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	if q.ClusterVolumeSpec != nil {
		return unsupported("cluster volumes (ClusterVolumeSpec) are not supported by Berth")
	}
	if q.Driver != "" && q.Driver != driverLocal {
		return notFound("error looking up volume plugin %s: plugin %q not found", q.Driver, q.Driver)
	}
	if err := checkVolumeName(q.Name); err != nil {
		return err
	}
	_, missing := s.volumes.Get(q.Name)
	v, err := s.volumes.Create(r.Context(), VolumeConfig{
		Name: q.Name, Driver: driverLocal, Options: q.DriverOpts, Labels: q.Labels, Anonymous: q.Name == "",
	})
	if err != nil {
		return err
	}
	if q.Name == "" || missing != nil {
		s.publishVolume("create", v)
	}
	return writeJSON(w, http.StatusCreated, volumeJSON(v))
}

func (s *Server) removeVolume(w http.ResponseWriter, r *request) error {
	name, force := r.vars["name"], r.boolQuery("force")
	v, err := s.volume(name)
	if err == nil {
		if users := volumeUsers(s.engine.Containers())[v.Name]; len(users) > 0 {
			return conflict("remove %s: volume is in use - [%s]", v.Name, strings.Join(users, ", "))
		}
		err = s.volumes.Remove(r.Context(), v.Name)
	}
	switch {
	case errors.Is(err, errdefs.ErrNotFound) && force:
	case errors.Is(err, errdefs.ErrNotFound):
		return errNoVolume(name)
	case err != nil:
		return err
	default:
		s.publishVolume("destroy", v)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) pruneVolumes(w http.ResponseWriter, r *request) error {
	f, err := r.filters("all", "label", "label!")
	if err != nil {
		return err
	}
	all, err := f.boolean("all", false)
	if err != nil {
		return err
	}
	all = all || r.version < versionPruneAnonymous
	ctx := r.Context()
	users := volumeUsers(s.engine.Containers())
	report := volumetypes.PruneReport{VolumesDeleted: []string{}}
	for _, v := range s.sortedVolumes() {
		if ctx.Err() != nil {
			break
		}
		// A volume with options is a mount of something else: no space would be freed.
		if len(users[v.Name]) > 0 || !all && !v.Anonymous || len(v.Options) > 0 || !f.matchLabels(volumeJSON(v).Labels) {
			continue
		}
		size, err := s.volumes.SizeBytes(ctx, v.Name)
		if err != nil {
			s.log.Info("volume's size unknown", "volume", v.Name, "error", err)
		}
		if err := s.volumes.Remove(ctx, v.Name); err != nil {
			s.log.Info("volume not pruned", "volume", v.Name, "error", err)
			continue
		}
		s.publishVolume("destroy", v)
		report.VolumesDeleted = append(report.VolumesDeleted, v.Name)
		report.SpaceReclaimed += uint64(max(size, 0))
	}
	s.publishPrune("volume", report.SpaceReclaimed)
	return writeJSON(w, http.StatusOK, report)
}
