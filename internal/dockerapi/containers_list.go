package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	containertypes "github.com/moby/moby/api/types/container"
	networktypes "github.com/moby/moby/api/types/network"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/network"
	"berth/internal/state"
)

// API versions at which listing containers changed.
const (
	versionListAnnotations  = 46
	versionListHealth       = 52
	versionAnnotationFilter = 56
)

func containerFilters(version int) []string {
	keys := []string{"ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label", "name", "network", "publish", "since", "status", "volume"}
	if version >= versionAnnotationFilter {
		keys = append(keys, "annotation")
	}
	return keys
}

// listQuery is one listing being made.
type listQuery struct {
	filters       filters
	all           bool
	limit         int
	names         []*regexp.Regexp
	exited        []int
	ancestors     map[string]bool // image IDs; nil: any
	before, since time.Time       // zero: no bound
	publish       map[string]bool // "80/tcp"
	expose        map[string]bool
	version       int
}

func (s *Server) listContainers(w http.ResponseWriter, r *request) error {
	q, err := s.newListQuery(r)
	if err != nil {
		return err
	}
	ctx := r.Context()
	images := map[string]string{}
	out := []containertypes.Summary{}
	for _, c := range s.engine.Containers() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if q.limit > 0 && len(out) == q.limit {
			break
		}
		if !q.quick(c) {
			continue
		}
		v := s.newView(c)
		sum := v.summary(time.Now(), r.version)
		if !q.slow(v, &sum) {
			continue
		}
		sum.Image = s.currentImage(ctx, c, images)
		if r.boolQuery("size") {
			s.addSizes(ctx, c, &sum)
		}
		out = append(out, sum)
	}
	return writeJSON(w, http.StatusOK, out)
}

// newListQuery reads and checks what is asked for.
func (s *Server) newListQuery(r *request) (*listQuery, error) {
	f, err := r.filters(containerFilters(r.version)...)
	if err != nil {
		return nil, err
	}
	q := &listQuery{filters: f, all: r.boolQuery("all"), version: r.version}
	if q.limit, err = r.intQuery("limit", 0); err != nil {
		return nil, err
	}
	if q.limit > 0 || f.has("status") {
		q.all = true
	}
	for _, name := range f["name"] {
		re, err := regexp.Compile(name)
		if err != nil {
			re = regexp.MustCompile(regexp.QuoteMeta(name))
		}
		q.names = append(q.names, re)
	}
	for _, text := range f["exited"] {
		code, err := strconv.Atoi(text)
		if err != nil {
			return nil, invalid("invalid filter 'exited=%s'", text)
		}
		q.exited = append(q.exited, code)
	}
	for _, st := range f["status"] {
		if err := containertypes.ValidateContainerState(containertypes.ContainerState(st)); err != nil {
			return nil, invalid("invalid filter 'status=%s': %w", st, err)
		}
	}
	for _, h := range f["health"] {
		if err := containertypes.ValidateHealthStatus(containertypes.HealthStatus(h)); err != nil {
			return nil, invalid("invalid filter 'health=%s': %w", h, err)
		}
	}
	if _, err := f.boolean("is-task", false); err != nil {
		return nil, err
	}
	if q.publish, err = portFilter("publish", f["publish"]); err != nil {
		return nil, err
	}
	if q.expose, err = portFilter("expose", f["expose"]); err != nil {
		return nil, err
	}
	return q, s.resolveListQuery(r.Context(), q, r)
}

// resolveListQuery looks up the containers and images that filters name.
func (s *Server) resolveListQuery(ctx context.Context, q *listQuery, r *request) error {
	for _, b := range []struct {
		key string
		to  *time.Time
	}{{"before", &q.before}, {"since", &q.since}} {
		refs := q.filters[b.key]
		if old := r.query(b.key); old != "" { // before there were filters
			refs = append(slices.Clone(refs), old)
		}
		for _, ref := range refs {
			c, err := s.engine.Container(strings.TrimPrefix(ref, "/"))
			if err != nil {
				return err
			}
			*b.to = c.State.Created
		}
	}
	for _, ref := range q.filters["ancestor"] {
		if q.ancestors == nil {
			q.ancestors = map[string]bool{}
		}
		img, err := s.images.Resolve(ctx, ref)
		switch {
		case err == nil:
			q.ancestors[img.ID.String()] = true
		case errors.Is(err, errdefs.ErrNotFound), errors.Is(err, errdefs.ErrInvalid):
		default:
			return err
		}
	}
	return nil
}

// portFilter reads 80, 80/udp, 8000-8010/tcp.
func portFilter(key string, values []string) (map[string]bool, error) {
	if len(values) == 0 {
		return nil, nil
	}
	set := map[string]bool{}
	for _, v := range values {
		if strings.Contains(v, ":") {
			return nil, invalid("filter for '%s' should not contain ':': %s", key, v)
		}
		ports, err := networktypes.ParsePortRange(v)
		if err != nil {
			return nil, invalid("error while looking up for %s %s: %w", key, v, err)
		}
		for p := range ports.All() {
			set[p.String()] = true
		}
	}
	return set, nil
}

// quick judges by the engine's record alone.
func (q *listQuery) quick(c engine.Container) bool {
	f := q.filters
	running := false
	switch c.State.Status {
	case engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting:
		running = true
	}
	switch {
	case !running && !q.all,
		!q.before.IsZero() && !c.State.Created.Before(q.before),
		!q.since.IsZero() && !c.State.Created.After(q.since),
		!f.prefix("id", c.Config.ID),
		!f.exact("status", string(c.State.Status)),
		!f.labels("label", c.Config.Labels),
		!f.labels("annotation", c.Config.Annotations),
		!f.exact("health", healthWord(c)),
		f.has("is-task") && f["is-task"][0] != "0" && f["is-task"][0] != "false",
		q.ancestors != nil && !q.ancestors[c.Config.ImageID]:
		return false
	}
	if len(q.exited) > 0 && (running || c.State.StartedAt.IsZero() || !slices.Contains(q.exited, c.State.ExitCode)) {
		return false
	}
	if len(q.names) == 0 {
		return true
	}
	return slices.ContainsFunc(q.names, func(re *regexp.Regexp) bool {
		return re.MatchString(c.Config.Name) || re.MatchString("/"+c.Config.Name)
	})
}

// slow judges by what is shown.
func (q *listQuery) slow(v view, sum *containertypes.Summary) bool {
	f := q.filters
	if f.has("volume") && !slices.ContainsFunc(sum.Mounts, func(m containertypes.MountPoint) bool {
		return slices.Contains(f["volume"], m.Destination) || m.Name != "" && slices.Contains(f["volume"], m.Name) ||
			m.Name == "" && slices.Contains(f["volume"], m.Source)
	}) {
		return false
	}
	if f.has("network") {
		found := false
		for name, es := range sum.NetworkSettings.Networks {
			found = found || slices.Contains(f["network"], name) || es.NetworkID != "" && f.prefix("network", es.NetworkID)
		}
		if !found {
			return false
		}
	}
	if q.publish == nil && q.expose == nil {
		return true
	}
	return slices.ContainsFunc(sum.Ports, func(p containertypes.PortSummary) bool {
		return q.publish[fmt.Sprintf("%d/%s", p.PublicPort, p.Type)] || q.expose[fmt.Sprintf("%d/%s", p.PrivatePort, p.Type)]
	})
}

// healthWord is the health of c as filters name it.
func healthWord(c engine.Container) string {
	if c.State.Health == nil || c.Config.Health == nil {
		return string(containertypes.NoHealthcheck)
	}
	return c.State.Health.Status
}

// summary is one line of docker ps.
func (v view) summary(now time.Time, version int) containertypes.Summary {
	c := v.c
	out := containertypes.Summary{
		ID: c.Config.ID, Names: []string{"/" + c.Config.Name}, Image: c.Config.Image, ImageID: c.Config.ImageID,
		Command: commandLine(c.Config.Args), Created: c.State.Created.Unix(), Ports: v.portSummaries(),
		Labels: orEmpty(c.Config.Labels), State: containertypes.ContainerState(c.State.Status), Status: statusLine(c, now),
		NetworkSettings: &containertypes.NetworkSettingsSummary{Networks: v.endpoints(version)}, Mounts: v.mountPoints(),
	}
	out.HostConfig.NetworkMode = string(v.dialect.HostConfig.NetworkMode)
	if version >= versionListAnnotations {
		out.HostConfig.Annotations = c.Config.Annotations
	}
	if version >= versionListHealth {
		out.Health = &containertypes.HealthSummary{Status: containertypes.HealthStatus(healthWord(c))}
		if c.State.Health != nil {
			out.Health.FailingStreak = c.State.Health.FailingStreak
		}
	}
	return out
}

// containerSummary is c as a listing of the newest version shows it, without sizes.
func (s *Server) containerSummary(c engine.Container) containertypes.Summary {
	return s.newView(c).summary(time.Now(), MaxVersion)
}

// commandLine shows a command as docker does: words with spaces are quoted, the program is not.
func commandLine(args []string) string {
	words := slices.Clone(args)
	for i := 1; i < len(words); i++ {
		if strings.Contains(words[i], " ") {
			words[i] = "'" + words[i] + "'"
		}
	}
	return strings.Join(words, " ")
}

// statusLine is docker's sentence on a container's state.
func statusLine(c engine.Container, now time.Time) string {
	st := c.State
	ago := func(t time.Time) string { return units.HumanDuration(now.Sub(t)) }
	switch st.Status {
	case engine.StatusRunning:
		if c.Config.Health != nil && st.Health != nil && st.Health.Status != "" {
			word := st.Health.Status
			if word == engine.HealthStarting {
				word = "health: starting"
			}
			return fmt.Sprintf("Up %s (%s)", ago(st.StartedAt), word)
		}
		return "Up " + ago(st.StartedAt)
	case engine.StatusPaused:
		return fmt.Sprintf("Up %s (Paused)", ago(st.StartedAt))
	case engine.StatusRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", st.ExitCode, ago(st.FinishedAt))
	case engine.StatusRemoving:
		return "Removal In Progress"
	case engine.StatusDead:
		return "Dead"
	case engine.StatusCreated:
		return "Created"
	}
	if st.FinishedAt.IsZero() {
		return ""
	}
	return fmt.Sprintf("Exited (%d) %s ago", st.ExitCode, ago(st.FinishedAt))
}

// portSummaries are the ports of docker ps.
func (v view) portSummaries() []containertypes.PortSummary {
	out := []containertypes.PortSummary{}
	if !v.running() {
		return out
	}
	published := map[string]bool{}
	for _, p := range v.box.State.Ports {
		published[portKey(p)] = true
		out = append(out, containertypes.PortSummary{IP: hostIP(p), PrivatePort: p.Port, PublicPort: p.HostPort, Type: p.Protocol})
	}
	for p := range v.dialect.Config.ExposedPorts {
		if !published[p.String()] {
			out = append(out, containertypes.PortSummary{IP: netip.Addr{}, PrivatePort: p.Num(), Type: string(p.Proto())})
		}
	}
	slices.SortFunc(out, func(a, b containertypes.PortSummary) int {
		return comparePorts(
			network.Port{Protocol: a.Type, HostIP: a.IP, HostPort: a.PublicPort, Port: a.PrivatePort},
			network.Port{Protocol: b.Type, HostIP: b.IP, HostPort: b.PublicPort, Port: b.PrivatePort})
	})
	return out
}

func portKey(p network.Port) string { return strconv.Itoa(int(p.Port)) + "/" + p.Protocol }

// currentImage is the name of c's image, or its ID once the name stands for another image.
func (s *Server) currentImage(ctx context.Context, c engine.Container, known map[string]string) string {
	name := c.Config.Image
	id, ok := known[name]
	if !ok {
		if img, err := s.images.Resolve(ctx, name); err == nil {
			id = img.ID.String()
		}
		known[name] = id
	}
	if id != c.Config.ImageID && c.Config.ImageID != "" {
		return c.Config.ImageID
	}
	return name
}

// addSizes fills in the sizes; what cannot be measured stays out.
func (s *Server) addSizes(ctx context.Context, c engine.Container, sum *containertypes.Summary) {
	sum.SizeRw, sum.SizeRootFs = s.sizes(ctx, c)
}

// sizes are the bytes of a container's own layer, and with its image's.
func (s *Server) sizes(ctx context.Context, c engine.Container) (own, all int64) {
	own, err := s.engine.WritableBytes(ctx, c.Config.ID)
	if err != nil {
		return 0, 0 // it is being removed, or never started
	}
	all = own
	if img, err := s.images.Resolve(ctx, c.Config.ImageID); err == nil {
		all += img.SizeBytes
	}
	return own, all
}

func (s *Server) inspectContainer(w http.ResponseWriter, r *request) error {
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	out := s.newView(c).inspect(state.Root{State: s.info.StateDir}, s.engine.Execs(c.Config.ID), r.version)
	if r.boolQuery("size") {
		own, all := s.sizes(r.Context(), c)
		out.SizeRw, out.SizeRootFs = &own, &all
	}
	return writeJSON(w, http.StatusOK, out)
}
