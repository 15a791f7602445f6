package dockerapi

import (
	"net/http"

	"berth/internal/errdefs"
)

// notSwarmManager is what docker says on a node that is in no swarm; clients know it.
const notSwarmManager = `This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`

// lacks answers 501 with a sentence that names what is asked for.
func lacks(sentence string) func(http.ResponseWriter, *request) error {
	return func(http.ResponseWriter, *request) error { return unsupported("%s", sentence) }
}

func noSwarm(http.ResponseWriter, *request) error {
	return errdefs.New(errdefs.ErrUnavailable, "%s", notSwarmManager)
}

// unsupportedRoutes are the endpoints that docker has and Berth lacks. Each says so by name.
func (s *Server) unsupportedRoutes() []route {
	const get, post, put, head, del = http.MethodGet, http.MethodPost, http.MethodPut, http.MethodHead, http.MethodDelete
	table := []struct{ method, pattern, sentence string }{
		{post, "/build", "docker build is not supported yet by Berth: build the image elsewhere and use docker load or docker pull"},
		{post, "/build/cancel", "docker build is not supported yet by Berth: there is no build to cancel"},
		{post, "/session", "build sessions (docker buildx) are not supported yet by Berth"},
		{post, "/grpc", "build sessions over gRPC (docker buildx) are not supported yet by Berth"},
		{post, "/commit", "docker commit is not supported yet by Berth"},
		{head, "/containers/{id}/archive", "docker cp is not supported yet by Berth: use docker exec with tar, or a volume"},
		{get, "/containers/{id}/archive", "docker cp is not supported yet by Berth: use docker exec with tar, or a volume"},
		{put, "/containers/{id}/archive", "docker cp is not supported yet by Berth: use docker exec with tar, or a volume"},
		{get, "/containers/{id}/changes", "docker diff is not supported yet by Berth"},
		{get, "/containers/{id}/export", "docker export is not supported yet by Berth"},
		{get, "/containers/{id}/attach/ws", "attaching over a websocket is not supported yet by Berth: use POST /containers/{id}/attach"},
		{get, "/containers/{id}/checkpoints", "checkpoints are not supported by Berth"},
		{post, "/containers/{id}/checkpoints", "checkpoints are not supported by Berth"},
		{del, "/containers/{id}/checkpoints/{checkpoint}", "checkpoints are not supported by Berth"},
		{get, "/plugins/privileges", "plugins are not supported by Berth"},
		{post, "/plugins/pull", "plugins are not supported by Berth"},
		{post, "/plugins/create", "plugins are not supported by Berth"},
		{get, "/plugins/{name...}/json", "plugins are not supported by Berth"},
		{del, "/plugins/{name...}", "plugins are not supported by Berth"},
		{post, "/plugins/{name...}/enable", "plugins are not supported by Berth"},
		{post, "/plugins/{name...}/disable", "plugins are not supported by Berth"},
		{post, "/plugins/{name...}/upgrade", "plugins are not supported by Berth"},
		{post, "/plugins/{name...}/push", "plugins are not supported by Berth"},
		{post, "/plugins/{name...}/set", "plugins are not supported by Berth"},
	}
	var routes []route
	for _, e := range table {
		routes = append(routes, route{method: e.method, pattern: e.pattern, handler: lacks(e.sentence)})
	}
	routes = append(routes,
		route{method: get, pattern: "/plugins", handler: func(w http.ResponseWriter, _ *request) error {
			return writeJSON(w, http.StatusOK, []struct{}{}) // there are none: true as it stands
		}},
		route{method: post, pattern: "/swarm/init", handler: lacks("docker swarm init is not supported yet by Berth")},
		route{method: post, pattern: "/swarm/join", handler: lacks("docker swarm join is not supported yet by Berth")},
	)
	for _, e := range []struct{ method, pattern string }{
		{get, "/swarm"}, {post, "/swarm/leave"}, {post, "/swarm/update"}, {get, "/swarm/unlockkey"}, {post, "/swarm/unlock"},
		{get, "/nodes"}, {get, "/nodes/{id}"}, {del, "/nodes/{id}"}, {post, "/nodes/{id}/update"},
		{get, "/services"}, {post, "/services/create"}, {get, "/services/{id}"}, {del, "/services/{id}"},
		{post, "/services/{id}/update"}, {get, "/services/{id}/logs"},
		{get, "/tasks"}, {get, "/tasks/{id}"}, {get, "/tasks/{id}/logs"},
		{get, "/secrets"}, {post, "/secrets/create"}, {get, "/secrets/{id}"}, {del, "/secrets/{id}"}, {post, "/secrets/{id}/update"},
		{get, "/configs"}, {post, "/configs/create"}, {get, "/configs/{id}"}, {del, "/configs/{id}"}, {post, "/configs/{id}/update"},
	} {
		routes = append(routes, route{method: e.method, pattern: e.pattern, handler: noSwarm})
	}
	return routes
}
