// Package nodeapi serves Berth's own routes under /berth/v1/: what the Docker API has no words
// for. The shapes are in package nodeapi/wire.
//
//	GET  /berth/v1/explain/{name}   why a container is as it is, in words
//	GET  /berth/v1/status           facts of the node
//	POST /berth/v1/down             stop all containers and give the network back
//
// It owns routing and conversion and no state. The handler may be used concurrently.
package nodeapi

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
	"berth/internal/nodeapi/wire"
)

// Engine is what this package needs of the node's engine.
type Engine interface {
	Containers() []engine.Container
	Sandboxes() []engine.Sandbox
	Explain(ctx context.Context, ref string) (engine.Explanation, error)
	// Drain stops every container and tears the network down; Undrain takes that back when it
	// failed and the node goes on.
	Drain(ctx context.Context) error
	Undrain()
}

// Images is what this package needs of the image store.
type Images interface {
	List(ctx context.Context) ([]image.Image, error)
}

// Options are what the handler is made of. Processes, Sockets and Logger may be missing.
type Options struct {
	Engine Engine
	Images Images
	// Processes returns the instance's processes; nil: only what is known of this one.
	Processes func() ([]wire.Process, error)
	// Sockets returns the paths at which this process serves.
	Sockets func() []string

	Node    string // name
	Version string
	Root    string // state directory
	Run     string // run directory
	Started time.Time
	Ready   time.Duration // from the process's start until it served
	Logger  *slog.Logger
}

type server struct {
	Options
	draining chan struct{} // holds a token while a POST down is at work
}

// New returns the handler of all routes.
func New(o Options) http.Handler {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &server{Options: o, draining: make(chan struct{}, 1)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.Prefix+"/explain/{name...}", s.explain)
	mux.HandleFunc("GET "+wire.Prefix+"/status", s.status)
	mux.HandleFunc("POST "+wire.Prefix+"/down", s.down)
	mux.HandleFunc(wire.Prefix+"/", func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, errdefs.New(errdefs.ErrNotFound, "%s %s: no such route; does this daemon have the version of its client?", r.Method, r.URL.Path))
	})
	return mux
}

func (s *server) explain(w http.ResponseWriter, r *http.Request) {
	e, err := s.Engine.Explain(r.Context(), r.PathValue("name"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, wire.Explanation(e))
}

func (s *server) status(w http.ResponseWriter, r *http.Request) {
	images, err := s.Images.List(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	out := wire.Status{
		Node: s.Node, Version: s.Version, PID: os.Getpid(), Root: s.Root, Run: s.Run, Started: s.Started,
		ReadyMS: float64(s.Ready.Microseconds()) / 1000, Sockets: []string{},
		Containers: count(s.Engine.Containers()), Sandboxes: len(s.Engine.Sandboxes()), Images: len(images),
	}
	if s.Sockets != nil {
		out.Sockets = append(out.Sockets, s.Sockets()...)
	}
	if s.Processes != nil {
		if out.Processes, err = s.Processes(); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	s.answer(w, out)
}

// count sorts containers by what they do.
func count(list []engine.Container) wire.Containers {
	c := wire.Containers{Total: len(list)}
	for i := range list {
		switch list[i].State.Status {
		case engine.StatusRunning:
			c.Running++
		case engine.StatusPaused:
			c.Paused++
		case engine.StatusRestarting:
			c.Restarting++
		default:
			c.Stopped++
		}
	}
	return c
}

// down answers when everything has stopped. When something could not be stopped, or the
// client went away, the node goes on as before with what still runs.
func (s *server) down(w http.ResponseWriter, r *http.Request) {
	select {
	case s.draining <- struct{}{}:
		defer func() { <-s.draining }()
	default:
		s.fail(w, r, errdefs.New(errdefs.ErrConflict, "down: the node is already going down"))
		return
	}
	before := count(s.Engine.Containers())
	if err := s.Engine.Drain(r.Context()); err != nil {
		s.Engine.Undrain()
		s.fail(w, r, fmt.Errorf("down: %w", err))
		return
	}
	s.answer(w, wire.Down{Stopped: before.Running + before.Paused + before.Restarting})
}

func (s *server) answer(w http.ResponseWriter, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		s.Logger.Error("encode an answer", "error", err)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(raw, '\n')) // the client's connection is its own affair
}

func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	if status == http.StatusInternalServerError {
		s.Logger.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	raw, err := json.Marshal(wire.Error{Kind: errdefs.Name(err), Message: err.Error()})
	if err != nil {
		return // two strings always encode
	}
	_, _ = w.Write(append(raw, '\n'))
}

// statusOf is the one place where kinds of error become HTTP statuses.
func statusOf(err error) int {
	switch errdefs.Kind(err) {
	case errdefs.ErrNotFound:
		return http.StatusNotFound
	case errdefs.ErrExists, errdefs.ErrConflict, errdefs.ErrNotModified:
		return http.StatusConflict
	case errdefs.ErrInvalid, errdefs.ErrInvocation, errdefs.ErrNoProgram:
		return http.StatusBadRequest
	case errdefs.ErrUnauthorized:
		return http.StatusUnauthorized
	case errdefs.ErrForbidden:
		return http.StatusForbidden
	case errdefs.ErrUnsupported:
		return http.StatusNotImplemented
	case errdefs.ErrUnavailable:
		return http.StatusServiceUnavailable
	case errdefs.ErrExhausted:
		return http.StatusInsufficientStorage
	}
	return http.StatusInternalServerError
}
