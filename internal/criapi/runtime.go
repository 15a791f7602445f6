package criapi

import (
	"context"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/event"
)

// kubeAPIVersion is the version of the CRI that clients negotiate about.
const kubeAPIVersion = "0.1.0"

// runtimeService is CRI's RuntimeService. What is not defined answers Unimplemented with the
// name of the method.
type runtimeService struct {
	runtime.UnimplementedRuntimeServiceServer
	*Server
}

func (s *runtimeService) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	return &runtime.VersionResponse{
		Version: kubeAPIVersion, RuntimeName: runtimeName, RuntimeVersion: s.Options.Version, RuntimeApiVersion: "v1",
	}, nil
}

func (s *runtimeService) Status(context.Context, *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	net := &runtime.RuntimeCondition{Type: runtime.NetworkReady, Status: true}
	if s.NetworkReady != nil {
		if err := s.NetworkReady(); err != nil {
			net.Status, net.Reason, net.Message = false, "NetworkNotReady", err.Error()
		}
	}
	return &runtime.StatusResponse{
		Status: &runtime.RuntimeStatus{Conditions: []*runtime.RuntimeCondition{
			{Type: runtime.RuntimeReady, Status: true}, net,
		}},
		RuntimeHandlers: []*runtime.RuntimeHandler{{Features: &runtime.RuntimeHandlerFeatures{}}},
		Features:        &runtime.RuntimeFeatures{},
	}, nil
}

// RuntimeConfig tells that cgroups are made directly, not by systemd.
func (s *runtimeService) RuntimeConfig(context.Context, *runtime.RuntimeConfigRequest) (*runtime.RuntimeConfigResponse, error) {
	return &runtime.RuntimeConfigResponse{Linux: &runtime.LinuxRuntimeConfiguration{CgroupDriver: runtime.CgroupDriver_CGROUPFS}}, nil
}

// UpdateRuntimeConfig takes no pod CIDR: addresses are the node's own affair.
func (s *runtimeService) UpdateRuntimeConfig(_ context.Context, req *runtime.UpdateRuntimeConfigRequest) (*runtime.UpdateRuntimeConfigResponse, error) {
	if cidr := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		return nil, unsupported("pod CIDR %s: Berth gives pods addresses of its own network %q and takes none from its clients", cidr, s.Network)
	}
	return &runtime.UpdateRuntimeConfigResponse{}, nil
}

// GetContainerEvents tells what happens to containers from now on.
func (s *runtimeService) GetContainerEvents(_ *runtime.GetEventsRequest, out runtime.RuntimeService_GetContainerEventsServer) error {
	_, sub := s.Engine.Events().Subscribe(out.Context(), time.Time{})
	for e := range sub.C {
		resp, ok := s.containerEvent(e)
		if !ok {
			continue
		}
		if err := out.Send(resp); err != nil {
			return err
		}
	}
	if sub.Lagged() {
		return unsupported("events: the client reads too slowly and has missed some; list containers and ask again")
	}
	return out.Context().Err()
}

// containerEvent translates an event of a container that CRI made.
func (s *runtimeService) containerEvent(e event.Event) (*runtime.ContainerEventResponse, bool) {
	if e.Type != "container" {
		return nil, false
	}
	resp := &runtime.ContainerEventResponse{ContainerId: e.ID, CreatedAt: e.Time.UnixNano()}
	switch e.Action {
	case "create":
		resp.ContainerEventType = runtime.ContainerEventType_CONTAINER_CREATED_EVENT
	case "start":
		resp.ContainerEventType = runtime.ContainerEventType_CONTAINER_STARTED_EVENT
	case "die":
		resp.ContainerEventType = runtime.ContainerEventType_CONTAINER_STOPPED_EVENT
	case "destroy":
		resp.ContainerEventType = runtime.ContainerEventType_CONTAINER_DELETED_EVENT
	default:
		return nil, false
	}
	c, err := s.Engine.Container(e.ID)
	if err != nil {
		// Destroyed: whose it was cannot be told any more, and a client ignores what is not its own.
		return resp, e.Action == "destroy"
	}
	if c.Config.Owner != engine.OwnerCRI {
		return nil, false
	}
	box, err := s.sandbox(c.Config.Sandbox)
	if err != nil {
		return resp, true
	}
	resp.PodSandboxStatus = sandboxStatus(box)
	for _, other := range s.containersOf(box.Config.ID) {
		resp.ContainersStatuses = append(resp.ContainersStatuses, containerStatus(other))
	}
	return resp, true
}
