// Package criapi serves the engine as Kubernetes' container runtime interface (CRI, runtime/v1,
// k8s.io/cri-api v0.36): what a kubelet asks of a node's engine, over gRPC.
//
// It owns the wire types of the CRI and their translation to the engine's, the streaming server
// for exec, attach and port-forward, and nothing else: it keeps no state beyond open connections.
// What the CRI said when it made a sandbox or a container is kept, opaque, in the engine's Dialect
// field. Only objects made through the CRI show here, because a kubelet removes what it does not
// know. Fields that Berth cannot honour are refused by name when they are set.
// All methods of Server are safe for concurrent use.
package criapi

import (
	"context"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/image"
)

// Limits of the server.
const (
	// maxMessageBytes bounds one message in either direction, as the kubelet's client does.
	maxMessageBytes = 16 << 20
	// maxExecSyncBytes of standard output and error together fit into one message.
	maxExecSyncBytes = maxMessageBytes - 64<<10
	// shutdownGrace is how long calls under way may take once the server is told to stop.
	shutdownGrace = 2 * time.Second
)

// Sandboxes is the life of sandboxes, as package engine describes it.
type Sandboxes interface {
	CreateSandbox(ctx context.Context, c engine.SandboxConfig) (engine.Sandbox, error)
	StartSandbox(ctx context.Context, ref string) error
	StopSandbox(ctx context.Context, ref string) error
	RemoveSandbox(ctx context.Context, ref string) error
	Sandbox(ref string) (engine.Sandbox, error)
	Sandboxes() []engine.Sandbox
}

// Containers is the life of containers, as package engine describes it.
type Containers interface {
	CreateContainer(ctx context.Context, c engine.ContainerConfig) (engine.Container, error)
	StartContainer(ctx context.Context, ref string) error
	StopContainer(ctx context.Context, ref string, timeout *time.Duration, signal string) error
	RemoveContainer(ctx context.Context, ref string, o engine.RemoveOptions) error
	UpdateContainer(ctx context.Context, ref string, r *engine.Resources, p *engine.RestartPolicy) error
	Container(ref string) (engine.Container, error)
	Containers() []engine.Container
}

// Execs runs further processes in containers, as package engine describes it.
type Execs interface {
	CreateExec(ctx context.Context, c engine.ExecConfig) (engine.Exec, error)
	StartExec(ctx context.Context, id string) error
	WaitExec(ctx context.Context, id string) (engine.Exec, error)
	ResizeExec(ctx context.Context, id string, height, width uint16) error
	ExecSync(ctx context.Context, container string, args []string, timeout time.Duration) (stdout, stderr []byte, exitCode int, err error)
}

// Streams connects to processes, as package engine describes it.
type Streams interface {
	Attach(ctx context.Context, ref string, o engine.AttachOptions) (*engine.Attachment, error)
	AttachExec(ctx context.Context, id string, o engine.AttachOptions) (*engine.Attachment, error)
	ResizeContainer(ctx context.Context, ref string, height, width uint16) error
	ReopenLog(ctx context.Context, ref string) error
}

// Observer reads counters and events, as package engine describes it.
type Observer interface {
	Stats(ctx context.Context, ref string) (engine.Stats, error)
	WritableBytes(ctx context.Context, ref string) (int64, error)
	Events() *event.Hub
}

// Engine is what the CRI needs of the engine.
type Engine interface {
	Sandboxes
	Containers
	Execs
	Streams
	Observer
}

// Images is what the CRI needs of the image store, as package image describes it.
type Images interface {
	Resolve(ctx context.Context, ref string) (image.Image, error)
	List(ctx context.Context) ([]image.Image, error)
	Pull(ctx context.Context, ref string, o image.PullOptions) (image.Image, error)
	Remove(ctx context.Context, ref string, force, prune bool, users image.Users) ([]image.RemoveResult, error)
	DiskUsage(ctx context.Context) (layersBytes int64, err error)
}

// Options are what a Server is made of. Engine, Images and Version are needed.
type Options struct {
	Engine  Engine
	Images  Images
	Version string // of Berth
	// ImageDir is where images are kept, on the file system of the containers too; with "" ImageFsInfo is refused.
	ImageDir string
	Logger   *slog.Logger // nil: slog.Default
}

// Server answers the CRI. Make one with New.
type Server struct {
	Options
	log *slog.Logger
}

// New returns a server; nothing is opened before Serve.
func New(o Options) *Server {
	s := &Server{Options: o, log: o.Logger}
	if s.log == nil {
		s.log = slog.Default()
	}
	return s
}

// Serve answers on l until ctx ends, which is no error, and closes l. Calls under way have a short
// while to end; exec, attach and port-forward connections are cut.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	streams := newStreaming(ctx, s.Engine)
	g := grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.UnaryInterceptor(unaryErrors),
		grpc.StreamInterceptor(streamErrors),
	)
	runtimeapi.RegisterRuntimeServiceServer(g, &runtimeService{Server: s, streams: streams, serving: ctx})
	runtimeapi.RegisterImageServiceServer(g, &imageService{Server: s})

	stopped := make(chan struct{})
	disarm := context.AfterFunc(ctx, func() {
		defer close(stopped)
		force := time.AfterFunc(shutdownGrace, g.Stop)
		defer force.Stop()
		g.GracefulStop()
	})
	err := g.Serve(l)
	if disarm() { // the listener failed by itself
		g.Stop()
	} else {
		<-stopped
		err = nil
	}
	cancel()
	streams.close()
	if err != nil {
		return errdefs.Wrap("serve the container runtime interface", err)
	}
	return nil
}

// runtimeService answers the CRI's RuntimeService.
type runtimeService struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	*Server
	streams *streaming
	serving context.Context // ends when the server is told to stop
}

// imageService answers the CRI's ImageService.
type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	*Server
}

// Names and versions that Version answers with.
const (
	runtimeName       = "berth"
	runtimeAPIVersion = "v1"
	kubeletAPIVersion = "0.1.0" // the only one there ever was
)

func (r *runtimeService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version: kubeletAPIVersion, RuntimeName: runtimeName,
		RuntimeVersion: r.Server.Options.Version, RuntimeApiVersion: runtimeAPIVersion,
	}, nil
}

// Status answers that the node is ready: the socket is served only when it is, and Berth's network
// needs no further set-up.
func (r *runtimeService) Status(_ context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			{Type: runtimeapi.RuntimeReady, Status: true},
			{Type: runtimeapi.NetworkReady, Status: true},
		}},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{{Features: &runtimeapi.RuntimeHandlerFeatures{}}},
		Features:        &runtimeapi.RuntimeFeatures{},
	}
	if req.GetVerbose() {
		info, err := infoJSON(map[string]any{"version": r.Server.Options.Version, "imageDir": r.ImageDir})
		if err != nil {
			return nil, err
		}
		resp.Info = info
	}
	return resp, nil
}

// RuntimeConfig tells the kubelet to name cgroup parents as plain paths.
func (r *runtimeService) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{
		Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS},
	}, nil
}

func (r *runtimeService) UpdateRuntimeConfig(_ context.Context, req *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	if cidr := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		return nil, errdefs.New(errdefs.ErrUnsupported, "runtime_config.network_config.pod_cidr %s is not supported: pods get addresses of the node's own plan", cidr)
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}
