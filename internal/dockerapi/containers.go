package dockerapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	containertypes "github.com/moby/moby/api/types/container"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// versionStopSignal is from when stop and restart take a signal.
const versionStopSignal = 42

func (s *Server) containerRoutes() []route {
	const get, post, del = http.MethodGet, http.MethodPost, http.MethodDelete
	return []route{
		{method: get, pattern: "/containers/json", handler: s.listContainers},
		{method: post, pattern: "/containers/create", handler: s.createContainer},
		{method: get, pattern: "/containers/{id}/json", handler: s.inspectContainer},
		{method: get, pattern: "/containers/{id}/top", handler: s.topContainer},
		{method: get, pattern: "/containers/{id}/stats", handler: s.containerStats},
		{method: post, pattern: "/containers/{id}/start", handler: s.startContainer},
		{method: post, pattern: "/containers/{id}/stop", handler: s.stopContainer},
		{method: post, pattern: "/containers/{id}/restart", handler: s.restartContainer},
		{method: post, pattern: "/containers/{id}/kill", handler: s.killContainer},
		{method: post, pattern: "/containers/{id}/pause", handler: s.pauseContainer},
		{method: post, pattern: "/containers/{id}/unpause", handler: s.unpauseContainer},
		{method: post, pattern: "/containers/{id}/rename", handler: s.renameContainer},
		{method: post, pattern: "/containers/{id}/update", handler: s.updateContainer},
		{method: post, pattern: "/containers/{id}/wait", handler: s.waitContainer},
		{method: post, pattern: "/containers/{id}/resize", handler: s.resizeContainer},
		{method: del, pattern: "/containers/{id}", handler: s.removeContainer},
	}
}

// noContent answers 204 unless err.
func noContent(w http.ResponseWriter, err error) error {
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

// maxStartBody is the largest body of a start that says nothing: docker takes "{}" and "null".
const maxStartBody = 7

func (s *Server) startContainer(w http.ResponseWriter, r *request) error {
	if r.ContentLength > maxStartBody || r.ContentLength == -1 {
		return invalid("starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24")
	}
	if r.query("checkpoint") != "" {
		return unsupported("starting from a checkpoint is not supported by Berth")
	}
	err := s.engine.StartContainer(r.Context(), r.vars["id"])
	if err != nil {
		err = invocation("failed to create task for container", err)
	}
	return noContent(w, err)
}

// stopArguments reads how a container is to be stopped.
func stopArguments(r *request) (timeout *time.Duration, signal string, err error) {
	if r.version >= versionStopSignal {
		signal = r.query("signal")
	}
	if text := r.query("t"); text != "" {
		seconds, err := strconv.Atoi(text)
		if err != nil {
			return nil, "", invalid("invalid value for t: %q is not a number of seconds", text)
		}
		d := time.Duration(min(seconds, int(maxStopTimeout/time.Second))) * time.Second
		timeout = &d
	}
	return timeout, signal, nil
}

// maxStopTimeout keeps a number of seconds within a time.Duration.
const maxStopTimeout = 10 * 365 * 24 * time.Hour

func (s *Server) stopContainer(w http.ResponseWriter, r *request) error {
	timeout, signal, err := stopArguments(r)
	if err != nil {
		return err
	}
	return noContent(w, s.engine.StopContainer(r.Context(), r.vars["id"], timeout, signal))
}

func (s *Server) restartContainer(w http.ResponseWriter, r *request) error {
	timeout, signal, err := stopArguments(r)
	if err != nil {
		return err
	}
	if err := s.engine.RestartContainer(r.Context(), r.vars["id"], timeout, signal); err != nil {
		return invocation("Cannot restart container "+r.vars["id"]+": failed to create task for container", err)
	}
	return noContent(w, nil)
}

func (s *Server) killContainer(w http.ResponseWriter, r *request) error {
	err := s.engine.KillContainer(r.Context(), r.vars["id"], r.query("signal"))
	if err != nil && errdefs.Kind(err) != errdefs.ErrNotFound {
		err = fmt.Errorf("cannot kill container: %s: %w", r.vars["id"], err)
	}
	return noContent(w, err)
}

func (s *Server) pauseContainer(w http.ResponseWriter, r *request) error {
	return noContent(w, s.engine.PauseContainer(r.Context(), r.vars["id"]))
}

func (s *Server) unpauseContainer(w http.ResponseWriter, r *request) error {
	return noContent(w, s.engine.UnpauseContainer(r.Context(), r.vars["id"]))
}

func (s *Server) renameContainer(w http.ResponseWriter, r *request) error {
	name := r.query("name")
	if name == "" {
		return invalid("Neither old nor new names may be empty")
	}
	return noContent(w, s.engine.RenameContainer(r.Context(), r.vars["id"], name))
}

func (s *Server) removeContainer(w http.ResponseWriter, r *request) error {
	if r.boolQuery("link") {
		return unsupported("removing links (docker rm --link) is not supported by Berth")
	}
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	err = s.engine.RemoveContainer(r.Context(), c.Config.ID, engine.RemoveOptions{Force: r.boolQuery("force"), Volumes: r.boolQuery("v")})
	if errors.Is(err, errdefs.ErrNotFound) {
		err = nil // it was there: its own --rm, or another client, was faster
	}
	return noContent(w, err)
}

func (s *Server) resizeContainer(w http.ResponseWriter, r *request) error {
	h, width, err := r.terminalSize()
	if err != nil {
		return err
	}
	if err := s.engine.ResizeContainer(r.Context(), r.vars["id"], h, width); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// waitContainer sends the head of its answer before it waits: clients start the container only
// once they know that they are waiting for it.
func (s *Server) waitContainer(w http.ResponseWriter, r *request) error {
	condition := engine.WaitCondition(r.query("condition"))
	switch condition {
	case "":
		condition = engine.WaitNotRunning
	case engine.WaitNotRunning, engine.WaitNextExit, engine.WaitRemoved:
	default:
		return invalid("invalid condition: %q", condition)
	}
	ctx, cancel := streamContext(r)
	defer cancel()
	results, err := s.engine.Wait(ctx, r.vars["id"], condition)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	_ = http.NewResponseController(w).Flush() // the next write tells
	select {
	case result := <-results:
		return json.NewEncoder(w).Encode(containertypes.WaitResponse{StatusCode: int64(result.ExitCode)})
	case <-ctx.Done():
		return ctx.Err()
	}
}

// updateContainer changes the limits that the request names and leaves the others.
func (s *Server) updateContainer(w http.ResponseWriter, r *request) error {
	var q struct {
		containertypes.Resources
		RestartPolicy   *containertypes.RestartPolicy
		KernelMemory    int64
		KernelMemoryTCP int64
	}
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	h := &hostConfigRequest{KernelMemory: q.KernelMemory, KernelMemoryTCP: q.KernelMemoryTCP}
	h.Resources = q.Resources
	if err := refuseUnsupported(h, r.version); err != nil {
		return err
	}
	if len(q.Devices) > 0 || len(q.Ulimits) > 0 || q.CgroupParent != "" {
		return invalid("Devices, Ulimits and CgroupParent of a container cannot be updated")
	}
	if q.OomKillDisable != nil && *q.OomKillDisable != c.Config.Resources.OOMKillDisable {
		return unsupported("updating OomKillDisable is not supported by Berth")
	}
	merged, changed, err := mergeResources(c.Config.Resources, &q.Resources, s.info.SwapLimit)
	if err != nil {
		return err
	}
	var limits *engine.Resources
	if changed {
		limits = &merged
	}
	var policy *engine.RestartPolicy
	if p := q.RestartPolicy; p != nil && p.Name != "" {
		if err := containertypes.ValidateRestartPolicy(*p); err != nil {
			return invalid("%w", err)
		}
		if c.Config.AutoRemove && !p.IsNone() {
			return invalid("Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
		policy = &engine.RestartPolicy{Name: string(p.Name), MaxRetries: p.MaximumRetryCount}
	}
	if limits != nil || policy != nil {
		if err := s.engine.UpdateContainer(r.Context(), c.Config.ID, limits, policy); err != nil {
			return err
		}
	}
	return writeJSON(w, http.StatusOK, containertypes.UpdateResponse{Warnings: []string{}})
}
