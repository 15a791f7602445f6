package criapi

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// Reasons of an end, in the words of other runtimes; the kubelet shows them.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonUnknown    = "Unknown"
)

// exitStartError is the exit code of a container that could not be started.
const exitStartError = 128

// container returns a container that CRI made.
func (s *Server) container(ref string) (engine.Container, error) {
	if ref == "" {
		return engine.Container{}, invalid("no container was named")
	}
	c, err := s.Engine.Container(ref)
	if err != nil {
		return c, err
	}
	if c.Config.Owner != engine.OwnerCRI {
		return c, errdefs.New(errdefs.ErrNotFound, "container %s: not made through CRI", ref)
	}
	return c, nil
}

// containersOf returns the containers of a sandbox; of all for "".
func (s *Server) containersOf(sandbox string) []engine.Container {
	var out []engine.Container
	for _, c := range s.Engine.Containers() {
		if c.Config.Owner == engine.OwnerCRI && (sandbox == "" || c.Config.Sandbox == sandbox) {
			out = append(out, c)
		}
	}
	return out
}

func (s *runtimeService) CreateContainer(ctx context.Context, req *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	box, err := s.sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !box.State.Ready {
		return nil, errdefs.New(errdefs.ErrConflict, "create a container in pod sandbox %s: it is not ready", box.Config.ID)
	}
	img, err := s.Images.Resolve(ctx, imageName(req.GetConfig().GetImage()))
	if err != nil {
		return nil, err
	}
	cfg, err := containerConfig(req.GetConfig(), box, img)
	if err != nil {
		return nil, err
	}
	c, err := s.Engine.CreateContainer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return &runtime.CreateContainerResponse{ContainerId: c.Config.ID}, nil
}

func (s *runtimeService) StartContainer(ctx context.Context, req *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	c, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if c.State.Status != engine.StatusCreated || c.State.Error != "" {
		return nil, errdefs.New(errdefs.ErrConflict, "start container %s: it is %s; CRI starts a container once", c.Config.ID, c.State.Status)
	}
	if err := s.Engine.StartContainer(ctx, c.Config.ID); err != nil {
		return nil, err
	}
	return &runtime.StartContainerResponse{}, nil
}

// StopContainer is idempotent, and a container that does not exist is stopped. A timeout of 0
// kills at once.
func (s *runtimeService) StopContainer(ctx context.Context, req *runtime.StopContainerRequest) (*runtime.StopContainerResponse, error) {
	if req.GetTimeout() < 0 {
		return nil, invalid("stop container %s: a timeout of %d s", req.GetContainerId(), req.GetTimeout())
	}
	c, err := s.container(req.GetContainerId())
	if err == nil {
		timeout := time.Duration(req.GetTimeout()) * time.Second
		err = s.Engine.StopContainer(ctx, c.Config.ID, &timeout, "")
	}
	if err != nil && !gone(err) && !errors.Is(err, errdefs.ErrNotModified) {
		return nil, err
	}
	return &runtime.StopContainerResponse{}, nil
}

// RemoveContainer is idempotent and kills a container that runs.
func (s *runtimeService) RemoveContainer(ctx context.Context, req *runtime.RemoveContainerRequest) (*runtime.RemoveContainerResponse, error) {
	c, err := s.container(req.GetContainerId())
	if err == nil {
		err = s.Engine.RemoveContainer(ctx, c.Config.ID, engine.RemoveOptions{Force: true, Volumes: true})
	}
	if err != nil && !gone(err) {
		return nil, err
	}
	return &runtime.RemoveContainerResponse{}, nil
}

func (s *runtimeService) ListContainers(_ context.Context, req *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	f := req.GetFilter()
	out := &runtime.ListContainersResponse{}
	for _, c := range s.containersOf("") {
		state := containerState(c)
		if !strings.HasPrefix(c.Config.ID, f.GetId()) || !strings.HasPrefix(c.Config.Sandbox, f.GetPodSandboxId()) ||
			f.GetState() != nil && f.GetState().GetState() != state || !labelsMatch(c.Config.Labels, f.GetLabelSelector()) {
			continue
		}
		var said runtime.ContainerConfig
		ref := decodeDialect(c.Config.Dialect, &said)
		out.Containers = append(out.Containers, &runtime.Container{
			Id: c.Config.ID, PodSandboxId: c.Config.Sandbox, Metadata: said.GetMetadata(), Image: said.GetImage(), ImageRef: ref,
			ImageId: c.Config.ImageID, State: state, CreatedAt: c.State.Created.UnixNano(),
			Labels: c.Config.Labels, Annotations: c.Config.Annotations,
		})
	}
	return out, nil
}

func (s *runtimeService) ContainerStatus(_ context.Context, req *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	c, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtime.ContainerStatusResponse{Status: containerStatus(c)}
	if req.GetVerbose() {
		info, err := json.Marshal(map[string]any{"name": c.Config.Name, "sandboxID": c.Config.Sandbox, "pid": c.State.PID, "args": c.Config.Args, "cwd": c.Config.Cwd})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

func containerState(c engine.Container) runtime.ContainerState {
	switch c.State.Status {
	case engine.StatusCreated:
		if c.State.Error != "" {
			return runtime.ContainerState_CONTAINER_EXITED
		}
		return runtime.ContainerState_CONTAINER_CREATED
	case engine.StatusRunning, engine.StatusPaused:
		return runtime.ContainerState_CONTAINER_RUNNING
	}
	return runtime.ContainerState_CONTAINER_EXITED
}

func containerStatus(c engine.Container) *runtime.ContainerStatus {
	var said runtime.ContainerConfig
	ref := decodeDialect(c.Config.Dialect, &said)
	out := &runtime.ContainerStatus{
		Id: c.Config.ID, Metadata: said.GetMetadata(), State: containerState(c), CreatedAt: c.State.Created.UnixNano(),
		Image: said.GetImage(), ImageRef: ref, ImageId: c.Config.ImageID, Labels: c.Config.Labels, Annotations: c.Config.Annotations,
		Mounts: said.GetMounts(), LogPath: c.Config.Log.Path, StopSignal: said.GetStopSignal(),
		Resources: &runtime.ContainerResources{Linux: resourcesStatus(c.Config)},
	}
	if !c.State.StartedAt.IsZero() {
		out.StartedAt = c.State.StartedAt.UnixNano()
	}
	if out.State != runtime.ContainerState_CONTAINER_EXITED {
		return out
	}
	out.FinishedAt = out.CreatedAt
	if !c.State.FinishedAt.IsZero() {
		out.FinishedAt = c.State.FinishedAt.UnixNano()
	}
	out.ExitCode, out.Message = int32(c.State.ExitCode), c.State.Error
	switch {
	case c.State.Status == engine.StatusCreated:
		out.ExitCode, out.Reason = exitStartError, reasonStartError
	case !c.State.ExitKnown:
		out.Reason, out.Message = reasonUnknown, "nobody could observe how it ended"
	case c.State.OOMKilled:
		out.Reason = reasonOOMKilled
	case c.State.ExitCode == 0:
		out.Reason = reasonCompleted
	default:
		out.Reason = reasonError
	}
	return out
}

func (s *runtimeService) UpdateContainerResources(ctx context.Context, req *runtime.UpdateContainerResourcesRequest) (*runtime.UpdateContainerResourcesResponse, error) {
	if req.GetWindows() != nil {
		return nil, unsupported("update container %s: windows is not supported", req.GetContainerId())
	}
	c, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	change, adj, err := resources(req.GetLinux())
	if err != nil {
		return nil, err
	}
	if adj != 0 && adj != c.Config.OOMScoreAdj {
		return nil, unsupported("update container %s: oom_score_adj of a container that exists cannot be changed", c.Config.ID)
	}
	// Zero leaves a limit as it is.
	r := c.Config.Resources
	merge(&r, change)
	if err := s.Engine.UpdateContainer(ctx, c.Config.ID, &r, nil); err != nil {
		return nil, err
	}
	return &runtime.UpdateContainerResourcesResponse{}, nil
}

func (s *runtimeService) ReopenContainerLog(ctx context.Context, req *runtime.ReopenContainerLogRequest) (*runtime.ReopenContainerLogResponse, error) {
	c, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if c.State.Status != engine.StatusRunning && c.State.Status != engine.StatusPaused {
		return nil, errdefs.New(errdefs.ErrConflict, "reopen the log of container %s: it does not run", c.Config.ID)
	}
	if err := s.Engine.ReopenLog(ctx, c.Config.ID); err != nil {
		return nil, err
	}
	return &runtime.ReopenContainerLogResponse{}, nil
}
