// Package criapi serves the engine as the Kubernetes Container Runtime Interface, version v1
// (k8s.io/cri-api), so that a kubelet, or anything that speaks CRI, can use it.
//
// It owns the translation both ways and the server of exec, attach and port-forward streams,
// and no other state: what a client said is kept with the engine's objects, in their Dialect.
// It shows only objects that CRI clients made. A field that it cannot honour is refused by name
// with Unimplemented, as are calls that it lacks. All methods may be used concurrently.
package criapi

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/image"
	"berth/internal/network"
)

// Bounds of the server.
const (
	maxMessageBytes = 16 << 20 // of a request or an answer, as the kubelet's own
	stopGrace       = 2 * time.Second
)

// runtimeName is what CRI clients see as the name of the engine.
const runtimeName = "berth"

// Engine is what this package needs of the node's engine.
type Engine interface {
	engine.SandboxAPI
	engine.ContainerAPI
	engine.ExecAPI
	engine.StreamAPI
	Events() *event.Hub
}

// Options are what a Server is made of. Engine, Images and Version are needed.
type Options struct {
	Engine  Engine
	Images  image.API
	Version string // of Berth

	// Network is the network that pods are attached to; "" is the node's default bridge.
	Network string
	// NetworkReady tells why pods could not be attached now; nil function or nil error: they could.
	NetworkReady func() error
	// ImageDir is where images are kept, for file system statistics.
	ImageDir string
	// StreamAddr is where exec, attach and port-forward streams are served, from the first one
	// on; "" is a free port of 127.0.0.1. The URLs carry one-time tokens.
	StreamAddr string
	Logger     *slog.Logger
}

// Server serves CRI.
type Server struct {
	Options
	grpc *grpc.Server

	streamMu sync.Mutex
	stream   *streamServer // nil before the first stream
	stopped  bool
}

// New returns a server; call Serve.
func New(o Options) *Server {
	if o.Network == "" {
		o.Network = network.DefaultNetwork
	}
	if o.StreamAddr == "" {
		o.StreamAddr = "127.0.0.1:0"
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Server{Options: o}
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessageBytes), grpc.MaxSendMsgSize(maxMessageBytes),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.streaming),
		grpc.WaitForHandlers(true),
	)
	runtime.RegisterRuntimeServiceServer(s.grpc, &runtimeService{Server: s})
	runtime.RegisterImageServiceServer(s.grpc, &imageService{Server: s})
	return s
}

// Serve answers on l until ctx ends, and closes l. It may be called for several listeners; the
// end of one context ends all.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		force := time.AfterFunc(stopGrace, s.grpc.Stop)
		defer force.Stop()
		s.stopStreams()
		s.grpc.GracefulStop()
	})
	err := s.grpc.Serve(l)
	if stop() { // it ended by itself
		return err
	}
	<-done
	return nil
}

// unary turns errors of handlers into gRPC's.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		err = toStatus(err)
		if status.Code(err) == codes.Internal {
			s.Logger.Error("CRI call failed", "method", info.FullMethod, "error", err)
		}
		return nil, err
	}
	return resp, nil
}

func (s *Server) streaming(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return toStatus(handler(srv, ss))
}

// toStatus is the one place where kinds of error become gRPC's codes.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codeOf(err), err.Error())
}

func codeOf(err error) codes.Code {
	switch errdefs.Kind(err) {
	case errdefs.ErrNotFound:
		return codes.NotFound
	case errdefs.ErrExists:
		return codes.AlreadyExists
	case errdefs.ErrInvalid, errdefs.ErrInvocation, errdefs.ErrNoProgram:
		return codes.InvalidArgument
	case errdefs.ErrConflict, errdefs.ErrNotModified:
		return codes.FailedPrecondition
	case errdefs.ErrUnauthorized:
		return codes.Unauthenticated
	case errdefs.ErrForbidden:
		return codes.PermissionDenied
	case errdefs.ErrUnsupported:
		return codes.Unimplemented
	case errdefs.ErrExhausted:
		return codes.ResourceExhausted
	case errdefs.ErrDataLoss:
		return codes.DataLoss
	}
	switch { // a wait that was cut short is also unavailable
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, errdefs.ErrUnavailable):
		return codes.Unavailable
	}
	return codes.Internal
}

// unsupported names a field that is set and cannot be honoured.
func unsupported(format string, args ...any) error {
	return errdefs.New(errdefs.ErrUnsupported, format, args...)
}

func invalid(format string, args ...any) error {
	return errdefs.New(errdefs.ErrInvalid, format, args...)
}

// gone tells whether err says that the object of a call does not exist, which is what calls
// that remove things want.
func gone(err error) bool { return errors.Is(err, errdefs.ErrNotFound) }

var _ http.Handler = (*streamServer)(nil)
