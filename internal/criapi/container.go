package criapi

import (
	"context"
	"encoding/json"
	"math"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// container finds a container that was made through the CRI.
func (s *Server) container(id string) (engine.Container, containerDialect, error) {
	var d containerDialect
	if id == "" {
		return engine.Container{}, d, invalid("container_id is missing")
	}
	c, err := s.Engine.Container(id)
	if err != nil {
		return c, d, err
	}
	if c.Config.Owner != engine.OwnerCRI || json.Unmarshal(c.Config.Dialect, &d) != nil {
		return c, d, missing("container", id)
	}
	return c, d, nil
}

// running finds a container that runs.
func (s *Server) running(id string) (engine.Container, error) {
	c, _, err := s.container(id)
	if err == nil && containerState(c) != runtimeapi.ContainerState_CONTAINER_RUNNING {
		err = errdefs.New(errdefs.ErrConflict, "container %s is not running", c.Config.ID)
	}
	return c, err
}

func (r *runtimeService) CreateContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	var p pod
	var err error
	if p.box, p.dialect, err = r.readySandbox(req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if p.config, err = p.dialect.config(); err != nil {
		return nil, err
	}
	ref := req.GetConfig().GetImage().GetImage()
	if ref == "" {
		return nil, invalid("config.image.image is missing")
	}
	img, err := r.Images.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	cfg, err := containerConfig(req.GetConfig(), p, img)
	if err != nil {
		return nil, err
	}
	if cfg.PIDOf != "" {
		target, err := r.running(cfg.PIDOf)
		if err != nil {
			return nil, err
		}
		if target.Config.Sandbox != cfg.Sandbox {
			return nil, invalid("%s.namespace_options.target_id %s: that container is in another pod", securityField, cfg.PIDOf)
		}
	}
	c, err := r.Engine.CreateContainer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: c.Config.ID}, nil
}

// readySandbox finds a sandbox that has not been stopped: a start in a stopped one would bring it
// back to life with another address.
func (s *Server) readySandbox(id string) (engine.Sandbox, sandboxDialect, error) {
	b, d, err := s.sandbox(id)
	if err == nil && !b.State.Ready {
		err = errdefs.New(errdefs.ErrConflict, "pod sandbox %s is not ready: it was stopped, make a new one", b.Config.ID)
	}
	return b, d, err
}

// StartContainer starts a container for the only time in its life: the kubelet makes a new one for
// each attempt.
func (r *runtimeService) StartContainer(ctx context.Context, req *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, _, err := r.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if state := containerState(c); state != runtimeapi.ContainerState_CONTAINER_CREATED {
		return nil, errdefs.New(errdefs.ErrConflict, "container %s is in state %s: only a new container can be started", c.Config.ID, state)
	}
	if _, _, err := r.readySandbox(c.Config.Sandbox); err != nil {
		return nil, err
	}
	if err := r.Engine.StartContainer(ctx, c.Config.ID); err != nil {
		return nil, err
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

func (r *runtimeService) StopContainer(ctx context.Context, req *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	resp := &runtimeapi.StopContainerResponse{}
	c, _, err := r.container(req.GetContainerId())
	if gone(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	seconds := req.GetTimeout()
	if seconds < 0 || seconds > math.MaxInt64/int64(time.Second) {
		return nil, invalid("timeout %d: must be a number of seconds that is not negative", seconds)
	}
	if err := r.stop(ctx, c.Config.ID, time.Duration(seconds)*time.Second); err != nil {
		return nil, err
	}
	return resp, nil
}

func (r *runtimeService) RemoveContainer(ctx context.Context, req *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	resp := &runtimeapi.RemoveContainerResponse{}
	c, _, err := r.container(req.GetContainerId())
	if gone(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.Engine.RemoveContainer(ctx, c.Config.ID, engine.RemoveOptions{Force: true, Volumes: true}); err != nil && !gone(err) {
		return nil, err
	}
	return resp, nil
}

// containerState in the CRI's words. A container whose start failed has ended: it is not started again.
func containerState(c engine.Container) runtimeapi.ContainerState {
	switch c.State.Status {
	case engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	case engine.StatusCreated:
		if c.State.FinishedAt.IsZero() {
			return runtimeapi.ContainerState_CONTAINER_CREATED
		}
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case engine.StatusExited, engine.StatusRemoving, engine.StatusDead:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	}
	return runtimeapi.ContainerState_CONTAINER_UNKNOWN
}

func (r *runtimeService) ListContainers(_ context.Context, req *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	f := req.GetFilter()
	resp := &runtimeapi.ListContainersResponse{}
	for _, c := range r.Engine.Containers() {
		var d containerDialect
		if c.Config.Owner != engine.OwnerCRI || !matches(f.GetId(), c.Config.ID) || !matches(f.GetPodSandboxId(), c.Config.Sandbox) ||
			!selects(f.GetLabelSelector(), c.Config.Labels) || f.GetState() != nil && f.State.State != containerState(c) ||
			json.Unmarshal(c.Config.Dialect, &d) != nil {
			continue
		}
		resp.Containers = append(resp.Containers, &runtimeapi.Container{
			Id: c.Config.ID, PodSandboxId: c.Config.Sandbox, Metadata: d.metadata(), Image: &runtimeapi.ImageSpec{Image: d.Image, UserSpecifiedImage: c.Config.Image},
			ImageRef: d.ImageRef, ImageId: c.Config.ImageID, State: containerState(c), CreatedAt: nanos(c.State.Created),
			Labels: c.Config.Labels, Annotations: c.Config.Annotations,
		})
	}
	return resp, nil
}

func (r *runtimeService) ContainerStatus(_ context.Context, req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, d, err := r.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{}
	if resp.Status, err = containerStatus(c, d); err != nil {
		return nil, err
	}
	if req.GetVerbose() {
		resp.Info, err = infoJSON(map[string]any{"name": c.Config.Name, "sandboxID": c.Config.Sandbox, "pid": c.State.PID, "config": d.Config})
	}
	return resp, err
}

func containerStatus(c engine.Container, d containerDialect) (*runtimeapi.ContainerStatus, error) {
	cfg, err := d.config()
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.ContainerStatus{
		Id: c.Config.ID, Metadata: d.metadata(), State: containerState(c), CreatedAt: nanos(c.State.Created), StartedAt: nanos(c.State.StartedAt),
		Image: &runtimeapi.ImageSpec{Image: c.Config.Image, UserSpecifiedImage: c.Config.Image}, ImageRef: d.ImageRef, ImageId: c.Config.ImageID,
		Labels: c.Config.Labels, Annotations: c.Config.Annotations, Mounts: cfg.GetMounts(), LogPath: c.Config.Log.Path,
		Resources: criResources(c.Config.Resources, c.Config.OOMScoreAdj), StopSignal: criSignal(c.Config.StopSignal),
	}
	if out.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		out.FinishedAt, out.ExitCode = nanos(c.State.FinishedAt), int32(c.State.ExitCode)
		out.Reason, out.Message = reason(c.State), c.State.Error
		if out.StartedAt == 0 && out.Reason != reasonStart {
			out.StartedAt = out.CreatedAt
		}
	}
	return out, nil
}

// Reasons that the kubelet shows.
const (
	reasonDone    = "Completed"
	reasonFailed  = "Error"
	reasonOOM     = "OOMKilled"
	reasonStart   = "StartError"
	reasonUnknown = "ContainerStatusUnknown"
)

func reason(s engine.ContainerState) string {
	switch {
	case s.OOMKilled:
		return reasonOOM
	case s.StartedAt.IsZero() || s.Error != "":
		return reasonStart
	case !s.ExitKnown:
		return reasonUnknown
	case s.ExitCode == 0:
		return reasonDone
	}
	return reasonFailed
}

// ExecSync runs a program to its end; its output is cut to what fits into one message.
func (r *runtimeService) ExecSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	c, err := r.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	seconds := req.GetTimeout()
	if seconds < 0 || seconds > math.MaxInt64/int64(time.Second) {
		return nil, invalid("timeout %d: must be a number of seconds that is not negative", seconds)
	}
	stdout, stderr, code, err := r.Engine.ExecSync(ctx, c.Config.ID, req.GetCmd(), time.Duration(seconds)*time.Second)
	if err != nil {
		return nil, err
	}
	stdout = stdout[:min(len(stdout), maxExecSyncBytes)]
	stderr = stderr[:min(len(stderr), maxExecSyncBytes-len(stdout))]
	return &runtimeapi.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: int32(code)}, nil
}

func (r *runtimeService) ReopenContainerLog(ctx context.Context, req *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := r.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := r.Engine.ReopenLog(ctx, c.Config.ID); err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}
