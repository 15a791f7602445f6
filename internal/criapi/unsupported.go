package criapi

import (
	"context"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The calls that Berth does not serve, each with the reason. Clients fall back from the streaming
// lists to the plain ones by themselves.

const useList = "use the call that returns one list"

func (r *runtimeService) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return nil, unsupported("CheckpointContainer", "Berth does not freeze containers into files")
}

func (r *runtimeService) UpdatePodSandboxResources(context.Context, *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return nil, unsupported("UpdatePodSandboxResources", "a sandbox has no process of its own; its limits are those of its cgroup parent")
}

func (r *runtimeService) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return nil, unsupported("ListMetricDescriptors", "use ListContainerStats and ListPodSandboxStats")
}

func (r *runtimeService) ListPodSandboxMetrics(context.Context, *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return nil, unsupported("ListPodSandboxMetrics", "use ListPodSandboxStats")
}

func (r *runtimeService) StreamPodSandboxMetrics(*runtimeapi.StreamPodSandboxMetricsRequest, grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxMetricsResponse]) error {
	return unsupported("StreamPodSandboxMetrics", "use ListPodSandboxStats")
}

func (r *runtimeService) StreamPodSandboxes(*runtimeapi.StreamPodSandboxesRequest, grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxesResponse]) error {
	return unsupported("StreamPodSandboxes", useList)
}

func (r *runtimeService) StreamContainers(*runtimeapi.StreamContainersRequest, grpc.ServerStreamingServer[runtimeapi.StreamContainersResponse]) error {
	return unsupported("StreamContainers", useList)
}

func (r *runtimeService) StreamContainerStats(*runtimeapi.StreamContainerStatsRequest, grpc.ServerStreamingServer[runtimeapi.StreamContainerStatsResponse]) error {
	return unsupported("StreamContainerStats", useList)
}

func (r *runtimeService) StreamPodSandboxStats(*runtimeapi.StreamPodSandboxStatsRequest, grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxStatsResponse]) error {
	return unsupported("StreamPodSandboxStats", useList)
}

func (s *imageService) StreamImages(*runtimeapi.StreamImagesRequest, grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	return unsupported("StreamImages", useList)
}
