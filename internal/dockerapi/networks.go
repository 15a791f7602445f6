package dockerapi

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	networktypes "github.com/moby/moby/api/types/network"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/network"
)

func (s *Server) networkRoutes() []route {
	return []route{
		{method: "GET", pattern: "/networks", handler: s.listNetworks},
		{method: "GET", pattern: "/networks/{id}", handler: s.inspectNetwork},
		{method: "POST", pattern: "/networks/create", handler: s.createNetwork},
		{method: "POST", pattern: "/networks/prune", handler: s.pruneNetworks},
		{method: "POST", pattern: "/networks/{id}/connect", handler: s.connectNetwork},
		{method: "POST", pattern: "/networks/{id}/disconnect", handler: s.disconnectNetwork},
		{method: "DELETE", pattern: "/networks/{id}", handler: s.removeNetwork},
	}
}

// network finds a network for a request; what is missing is said in docker's words.
func (s *Server) network(ref string) (network.Network, error) {
	n, err := s.networks.Get(ref)
	if errors.Is(err, errdefs.ErrNotFound) {
		return n, errNoNetwork(ref)
	}
	return n, err
}

func errNoNetwork(ref string) error { return notFound("network %s not found", ref) }

// attached is who is on a network now.
func (s *Server) attached(n network.Network) []attachment {
	return attachments(s.networks.Endpoints(n.ID), s.engine.Containers())
}

func (s *Server) publishNetwork(action string, n network.Network) {
	s.events.Publish(event.Event{Type: "network", Action: action, ID: n.ID,
		Attributes: map[string]string{"name": n.Config.Name, "type": n.Config.Driver}})
}

func (s *Server) listNetworks(w http.ResponseWriter, r *request) error {
	f, err := r.filters(networkListFilters()...)
	if err != nil {
		return err
	}
	filter, err := newNetworkFilter(f)
	if err != nil {
		return err
	}
	networks := slices.Clone(s.networks.List())
	slices.SortFunc(networks, func(a, b network.Network) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Config.Name, b.Config.Name))
	})
	summaries, full := []networktypes.Network{}, []networktypes.Inspect{}
	for _, n := range networks {
		if !filter.matches(n, len(s.networks.Endpoints(n.ID)) > 0) {
			continue
		}
		summaries = append(summaries, networkSummary(n))
		full = append(full, networkInspect(n, nil, 0))
	}
	if r.version < versionNetworkStatus { // older servers listed the empty Containers too
		return writeJSON(w, http.StatusOK, full)
	}
	return writeJSON(w, http.StatusOK, summaries)
}

func (s *Server) inspectNetwork(w http.ResponseWriter, r *request) error {
	switch text := strings.ToLower(r.query("verbose")); text {
	case "", "0", "1", "f", "t", "false", "true":
	default:
		return invalid("invalid value for verbose: %s", text)
	}
	if scope := r.query("scope"); scope != "" && scope != scopeLocal {
		return errNoNetwork(r.vars["id"])
	}
	n, err := s.network(r.vars["id"])
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, networkInspect(n, s.attached(n), r.version))
}

func (s *Server) createNetwork(w http.ResponseWriter, r *request) error {
	var q networkCreateRequest
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	if r.version < versionEnableIPv4 {
		q.EnableIPv4 = nil
	}
	config, err := q.config()
	if err != nil {
		return err
	}
	n, err := s.networks.Create(r.Context(), config)
	if errors.Is(err, errdefs.ErrExists) {
		return conflict("network with name %s already exists", q.Name)
	}
	if err != nil {
		return err
	}
	s.publishNetwork("create", n)
	return writeJSON(w, http.StatusCreated, networktypes.CreateResponse{ID: n.ID})
}

func (s *Server) removeNetwork(w http.ResponseWriter, r *request) error {
	n, err := s.network(r.vars["id"])
	if err != nil {
		return err
	}
	if predefinedNetwork(n.Config.Name) {
		return errdefs.New(errdefs.ErrForbidden, "%s is a pre-defined network and cannot be removed", n.Config.Name)
	}
	if attached := s.attached(n); len(attached) > 0 {
		return errActiveEndpoints(n, attached)
	}
	err = s.networks.Remove(r.Context(), n.ID)
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		return errNoNetwork(r.vars["id"])
	case errors.Is(err, errdefs.ErrConflict): // a container was faster
		return errActiveEndpoints(n, s.attached(n))
	case err != nil:
		return err
	}
	s.publishNetwork("destroy", n)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// errActiveEndpoints is docker's answer when a network that is to go has containers on it.
func errActiveEndpoints(n network.Network, attached []attachment) error {
	who := make([]string, len(attached))
	for i, a := range attached {
		id := networkEndpointID(a.endpoint.Sandbox, n.ID)
		who[i] = fmt.Sprintf("name:%q id:%q", a.name, id[:12])
	}
	return errdefs.New(errdefs.ErrForbidden, "error while removing network: network %s has active endpoints (%s)",
		n.Config.Name, strings.Join(who, ", "))
}

func (s *Server) connectNetwork(w http.ResponseWriter, r *request) error {
	var q networktypes.ConnectRequest
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	c, box, n, err := s.connection(q.Container, r.vars["id"])
	if err != nil {
		return err
	}
	if n.Config.Driver != network.DriverBridge {
		return invalid("container cannot be connected to %s network: it must be created with --network %s", n.Config.Name, n.Config.Name)
	}
	if box.Config.Network != engine.NetworkOwn || box.Config.ID != c.Config.ID {
		return invalid("container sharing network namespace with another container or host cannot be connected to any other network")
	}
	if slices.ContainsFunc(box.Config.Endpoints, func(e engine.EndpointConfig) bool { return e.Network == n.ID || e.Network == n.Config.Name }) {
		return errdefs.New(errdefs.ErrForbidden, "container %s is already attached to network %s", c.Config.Name, n.Config.Name)
	}
	wish, err := endpointWish(n, q.EndpointConfig)
	if err != nil {
		return err
	}
	wish.Aliases = endpointAliases(c, n, wish.Aliases)
	if err := s.engine.ConnectSandbox(r.Context(), box.Config.ID, wish); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// connection finds the three parties of a connect or disconnect.
func (s *Server) connection(containerRef, networkRef string) (engine.Container, engine.Sandbox, network.Network, error) {
	if containerRef == "" {
		return engine.Container{}, engine.Sandbox{}, network.Network{}, invalid("no container given: name or ID must not be empty")
	}
	c, err := s.engine.Container(containerRef)
	if err != nil {
		return c, engine.Sandbox{}, network.Network{}, err
	}
	n, err := s.network(networkRef)
	if err != nil {
		return c, engine.Sandbox{}, n, err
	}
	box, err := s.engine.Sandbox(c.Config.Sandbox)
	return c, box, n, err
}

// endpointWish translates what docker clients say about a place on n. What Berth lacks is
// refused by name; the fields that docker only reports are ignored, as docker does.
func endpointWish(n network.Network, es *networktypes.EndpointSettings) (engine.EndpointConfig, error) {
	wish := engine.EndpointConfig{Network: n.ID}
	if es == nil {
		return wish, nil
	}
	if ipam := es.IPAMConfig; ipam != nil {
		if ipam.IPv6Address.IsValid() || len(ipam.LinkLocalIPs) > 0 {
			return wish, unsupported("IPv6 and link-local addresses of an endpoint are not supported by Berth")
		}
		wish.Address = ipam.IPv4Address
	}
	switch {
	case len(es.Links) > 0:
		return wish, unsupported("links (--link) are not supported by Berth; use names or --network-alias on a user-defined network")
	case es.GwPriority != 0:
		return wish, unsupported("gateway priorities (GwPriority) are not supported by Berth")
	case wish.Address.IsValid() && n.Config.Name == network.DefaultNetwork:
		return wish, invalid("user specified IP address is supported on user defined networks only")
	case len(es.Aliases) > 0 && n.Config.Name == network.DefaultNetwork:
		return wish, invalid("network-scoped aliases are only supported for user-defined networks")
	case wish.Address.IsValid() && !slices.ContainsFunc(n.Config.Subnets, func(s network.Subnet) bool { return s.Prefix.Contains(wish.Address) }):
		return wish, invalid("invalid endpoint settings: no configured subnet contains IP address %s", wish.Address)
	}
	wish.MAC = es.MacAddress.String()
	wish.Aliases = slices.Clone(es.Aliases)
	wish.DriverOptions = es.DriverOpts
	return wish, nil
}

// shortIDLength is how many digits of an ID docker shows.
const shortIDLength = 12

// endpointAliases are the further names under which c is found on n. The engine answers its own
// name, which may change, and its short ID by itself. The default network has no names.
func endpointAliases(c engine.Container, n network.Network, aliases []string) []string {
	if n.Config.Name == network.DefaultNetwork {
		return nil
	}
	names := slices.DeleteFunc(slices.Clone(aliases), func(a string) bool { return a == c.Config.Name })
	seen := map[string]bool{"": true}
	return slices.DeleteFunc(names, func(name string) bool {
		again := seen[name]
		seen[name] = true
		return again
	})
}

func (s *Server) disconnectNetwork(w http.ResponseWriter, r *request) error {
	var q networktypes.DisconnectRequest
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	c, box, n, err := s.connection(q.Container, r.vars["id"])
	if err != nil {
		return err
	}
	if box.Config.ID != c.Config.ID || !slices.ContainsFunc(box.Config.Endpoints, func(e engine.EndpointConfig) bool {
		return e.Network == n.ID || e.Network == n.Config.Name
	}) {
		return errdefs.New(errdefs.ErrForbidden, "container %s is not connected to network %s", c.Config.Name, n.Config.Name)
	}
	if err := s.engine.DisconnectSandbox(r.Context(), box.Config.ID, n.ID, q.Force); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (s *Server) pruneNetworks(w http.ResponseWriter, r *request) error {
	f, err := r.filters("label", "label!", "until")
	if err != nil {
		return err
	}
	until, err := f.until(time.Now())
	if err != nil {
		return err
	}
	report := networktypes.PruneReport{NetworksDeleted: []string{}}
	for _, n := range s.networks.List() {
		if r.Context().Err() != nil {
			break
		}
		if !prunableNetwork(n, len(s.networks.Endpoints(n.ID)) > 0, f, until) {
			continue
		}
		if err := s.networks.Remove(r.Context(), n.ID); err != nil {
			s.log.Info("network not pruned", "network", n.Config.Name, "error", err)
			continue
		}
		s.publishNetwork("destroy", n)
		report.NetworksDeleted = append(report.NetworksDeleted, n.Config.Name)
	}
	s.publishPrune("network", 0)
	return writeJSON(w, http.StatusOK, report)
}
