package criapi

import (
	"encoding/json"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
)

// GetContainerEvents tells what happens to containers from now on, until the client leaves. A client
// that is too slow is cut off with ResourceExhausted and lists everything anew.
func (r *runtimeService) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	ctx := stream.Context()
	_, sub := r.Engine.Events().Subscribe(ctx, time.Time{})
	sandboxes := map[string]string{} // of the CRI's containers: the event of a removal comes too late to ask
	for _, c := range r.Engine.Containers() {
		if c.Config.Owner == engine.OwnerCRI {
			sandboxes[c.Config.ID] = c.Config.Sandbox
		}
	}
	for {
		select {
		case <-r.serving.Done():
			return errdefs.New(errdefs.ErrUnavailable, "the server is closing; try again")
		case e, ok := <-sub.C:
			if !ok {
				if sub.Lagged() {
					return errdefs.New(errdefs.ErrExhausted, "events came faster than they were read; list everything anew")
				}
				return ctx.Err()
			}
			if msg := r.eventMessage(e, sandboxes); msg != nil {
				if err := stream.Send(msg); err != nil {
					return err
				}
			}
		}
	}
}

// eventMessage is nil for events that the CRI has no word for.
func (s *Server) eventMessage(e event.Event, sandboxes map[string]string) *runtimeapi.ContainerEventResponse {
	if e.Type != "container" {
		return nil
	}
	var kind runtimeapi.ContainerEventType
	switch e.Action {
	case "create":
		kind = runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT
		if c, err := s.Engine.Container(e.ID); err == nil && c.Config.Owner == engine.OwnerCRI {
			sandboxes[e.ID] = c.Config.Sandbox
		}
	case "start":
		kind = runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT
	case "die":
		kind = runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT
	case "destroy":
		kind = runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT
	default:
		return nil
	}
	box, ours := sandboxes[e.ID]
	if !ours {
		return nil
	}
	if e.Action == "destroy" {
		delete(sandboxes, e.ID)
	}
	msg := &runtimeapi.ContainerEventResponse{ContainerId: e.ID, ContainerEventType: kind, CreatedAt: nanos(e.Time)}
	b, err := s.Engine.Sandbox(box)
	var d sandboxDialect
	if err != nil || json.Unmarshal(b.Config.Dialect, &d) != nil {
		return msg // it is gone as well
	}
	if msg.PodSandboxStatus, err = sandboxStatus(b, d); err != nil {
		return msg
	}
	if msg.ContainersStatuses, err = s.statuses(box); err != nil {
		s.log.Warn("event without containers' statuses", "sandbox", box, "error", err)
	}
	return msg
}
