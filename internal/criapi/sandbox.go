package criapi

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// sandbox finds a sandbox that was made through the CRI.
func (s *Server) sandbox(id string) (engine.Sandbox, sandboxDialect, error) {
	var d sandboxDialect
	if id == "" {
		return engine.Sandbox{}, d, invalid("pod_sandbox_id is missing")
	}
	b, err := s.Engine.Sandbox(id)
	if err != nil {
		return b, d, err
	}
	if b.Config.Owner != engine.OwnerCRI || json.Unmarshal(b.Config.Dialect, &d) != nil {
		return b, d, missing("pod sandbox", id)
	}
	return b, d, nil
}

// RunPodSandbox makes a sandbox and starts it; one that cannot start is removed again.
func (r *runtimeService) RunPodSandbox(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	if h := req.GetRuntimeHandler(); h != "" {
		return nil, unsupported("runtime_handler "+h, "Berth has one runtime, named by the empty string")
	}
	cfg, err := sandboxConfig(req.GetConfig())
	if err != nil {
		return nil, err
	}
	b, err := r.Engine.CreateSandbox(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := r.Engine.StartSandbox(ctx, b.Config.ID); err != nil {
		if err := r.Engine.RemoveSandbox(context.WithoutCancel(ctx), b.Config.ID); err != nil && !gone(err) {
			r.log.Warn("sandbox that could not start is not removed", "sandbox", b.Config.ID, "error", err)
		}
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: b.Config.ID}, nil
}

// StopPodSandbox kills what still runs in the sandbox, as the CRI asks, and frees its network.
func (r *runtimeService) StopPodSandbox(ctx context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	resp := &runtimeapi.StopPodSandboxResponse{}
	b, _, err := r.sandbox(req.GetPodSandboxId())
	if gone(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	for _, c := range r.inSandbox(b.Config.ID) {
		if err := r.stop(ctx, c.Config.ID, 0); err != nil {
			return nil, err
		}
	}
	if err := r.Engine.StopSandbox(ctx, b.Config.ID); err != nil && !gone(err) {
		return nil, err
	}
	return resp, nil
}

// stop ends a container; one that is gone or does not run is as it should be.
func (s *Server) stop(ctx context.Context, id string, timeout time.Duration) error {
	err := s.Engine.StopContainer(ctx, id, &timeout, "")
	if gone(err) || errors.Is(err, errdefs.ErrNotModified) {
		return nil
	}
	return err
}

func (r *runtimeService) RemovePodSandbox(ctx context.Context, req *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	resp := &runtimeapi.RemovePodSandboxResponse{}
	b, _, err := r.sandbox(req.GetPodSandboxId())
	if gone(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.Engine.RemoveSandbox(ctx, b.Config.ID); err != nil && !gone(err) {
		return nil, err
	}
	return resp, nil
}

func (r *runtimeService) PodSandboxStatus(_ context.Context, req *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	b, d, err := r.sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	now := time.Now()
	st, err := sandboxStatus(b, d)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.PodSandboxStatusResponse{Status: st, Timestamp: now.UnixNano()}
	if resp.ContainersStatuses, err = r.statuses(b.Config.ID); err != nil {
		return nil, err
	}
	if req.GetVerbose() {
		resp.Info, err = infoJSON(map[string]any{"name": b.Config.Name, "netns": b.State.NetNS, "config": d.Config})
	}
	return resp, err
}

// statuses of all containers in a sandbox.
func (s *Server) statuses(sandbox string) ([]*runtimeapi.ContainerStatus, error) {
	var out []*runtimeapi.ContainerStatus
	for _, c := range s.inSandbox(sandbox) {
		var d containerDialect
		if err := json.Unmarshal(c.Config.Dialect, &d); err != nil {
			return nil, err
		}
		st, err := containerStatus(c, d)
		if err != nil {
			return nil, err
		}
		out = append(out, st)
	}
	return out, nil
}

// inSandbox are the containers of a sandbox that were made through the CRI.
func (s *Server) inSandbox(id string) []engine.Container {
	var out []engine.Container
	for _, c := range s.Engine.Containers() {
		if c.Config.Sandbox == id && c.Config.Owner == engine.OwnerCRI {
			out = append(out, c)
		}
	}
	return out
}

func sandboxState(b engine.Sandbox) runtimeapi.PodSandboxState {
	if b.State.Ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func sandboxStatus(b engine.Sandbox, d sandboxDialect) (*runtimeapi.PodSandboxStatus, error) {
	c, err := d.config()
	if err != nil {
		return nil, err
	}
	ns := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns == nil {
		ns = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	}
	out := &runtimeapi.PodSandboxStatus{
		Id: b.Config.ID, Metadata: d.metadata(), State: sandboxState(b), CreatedAt: nanos(b.State.Created),
		Labels: b.Config.Labels, Annotations: b.Config.Annotations,
		Linux:   &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: ns}},
		Network: &runtimeapi.PodSandboxNetworkStatus{},
	}
	for i, ep := range b.State.Endpoints {
		ip := ep.Address.Addr().String()
		if i == 0 {
			out.Network.Ip = ip
			continue
		}
		out.Network.AdditionalIps = append(out.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
	}
	return out, nil
}

func (r *runtimeService) ListPodSandbox(_ context.Context, req *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	f := req.GetFilter()
	resp := &runtimeapi.ListPodSandboxResponse{}
	for _, b := range r.Engine.Sandboxes() {
		var d sandboxDialect
		if b.Config.Owner != engine.OwnerCRI || !matches(f.GetId(), b.Config.ID) || !selects(f.GetLabelSelector(), b.Config.Labels) ||
			f.GetState() != nil && f.State.State != sandboxState(b) || json.Unmarshal(b.Config.Dialect, &d) != nil {
			continue
		}
		resp.Items = append(resp.Items, &runtimeapi.PodSandbox{
			Id: b.Config.ID, Metadata: d.metadata(), State: sandboxState(b), CreatedAt: nanos(b.State.Created),
			Labels: b.Config.Labels, Annotations: b.Config.Annotations,
		})
	}
	return resp, nil
}
