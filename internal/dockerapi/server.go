// Package dockerapi serves the Docker Engine API: it translates docker's requests to the
// engine, the image store, the networks and the volumes, and their answers back.
//
// It owns docker's wire shapes and words, and nothing else: it keeps no state of its own
// beyond open connections. What docker said when it made a container is kept, opaque, in the
// engine's Dialect field. What docker has and Berth lacks is refused by name, never ignored.
// All methods of Server are safe for concurrent use.
package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"berth/internal/event"
)

// API versions, as minor numbers of major version 1.
const (
	// MaxVersion is the newest version spoken: the one that moby/moby/api v1.56 declares.
	MaxVersion = 56
	// MinVersion is the oldest version spoken.
	MinVersion = 40
)

// Limits of the server.
const (
	readHeaderTimeout = 30 * time.Second
	idleTimeout       = 3 * time.Minute
	maxHeaderBytes    = 1 << 20
	// shutdownGrace is how long answers under way may take once the server is told to stop.
	shutdownGrace = 2 * time.Second
)

// fallbackPrefix is where Berth's own routes live on the same socket.
const fallbackPrefix = "/berth/v1/"

// Options are what a Server is made of. All but Fallback and Logger are needed.
type Options struct {
	Engine   EngineAPI
	Images   ImageAPI
	Networks NetworkAPI
	Volumes  VolumeAPI
	Info     Info
	Events   *event.Hub
	Logger   *slog.Logger // nil discards
	Fallback http.Handler // serves /berth/v1/; nil: not found
}

// Server is the HTTP handler of the Docker Engine API.
type Server struct {
	engine   EngineAPI
	images   ImageAPI
	networks NetworkAPI
	volumes  VolumeAPI
	info     Info
	events   *event.Hub
	log      *slog.Logger
	fallback http.Handler
	routes   routeTable

	hijackMu  sync.Mutex
	hijacked  map[net.Conn]struct{}
	stopping  bool
	hijackers sync.WaitGroup
}

// New returns a server for o.
func New(o Options) *Server {
	s := &Server{
		engine: o.Engine, images: o.Images, networks: o.Networks, volumes: o.Volumes,
		info: o.Info, events: o.Events, log: o.Logger, fallback: o.Fallback,
		hijacked: map[net.Conn]struct{}{},
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.routes.add(s.containerRoutes())
	s.routes.add(s.execRoutes())
	s.routes.add(s.streamRoutes())
	s.routes.add(s.eventRoutes())
	s.routes.add(s.imageRoutes())
	s.routes.add(s.networkRoutes())
	s.routes.add(s.volumeRoutes())
	s.routes.add(s.systemRoutes())
	s.routes.add(s.unsupportedRoutes())
	return s
}

// Serve answers requests from l until ctx ends, then closes l, gives answers under way a
// moment, and ends every connection. It returns nil after ctx ended, else why it stopped.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), stopKey{}, ctx))
	defer cancel()
	h := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.closeHijacked()
		grace, done := context.WithTimeout(base, shutdownGrace)
		defer done()
		if h.Shutdown(grace) != nil {
			h.Close()
		}
	})
	err := h.Serve(l)
	if !stop() {
		<-stopped
		cancel()
		s.hijackers.Wait()
		return nil
	}
	cancel()
	s.closeHijacked()
	h.Close()
	s.hijackers.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// stopKey finds in a request's context the one that ends when the server is told to stop.
type stopKey struct{}

// streamContext is a context for answers without an end of their own: it ends with the client,
// and at once when the server is told to stop, while short answers are still finished.
func streamContext(r *request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	stop, ok := ctx.Value(stopKey{}).(context.Context)
	if !ok {
		return ctx, cancel
	}
	release := context.AfterFunc(stop, cancel)
	return ctx, func() {
		release()
		cancel()
	}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(rw http.ResponseWriter, hr *http.Request) {
	if s.fallback != nil && strings.HasPrefix(hr.URL.Path, fallbackPrefix) {
		s.fallback.ServeHTTP(rw, hr)
		return
	}
	w := &responseWriter{ResponseWriter: rw}
	began := time.Now()
	h := w.Header()
	h.Set("Api-Version", formatVersion(MaxVersion))
	h.Set("Docker-Experimental", "false")
	h.Set("Ostype", runtime.GOOS)
	h.Set("Server", "Berth/"+s.info.Version+" ("+runtime.GOOS+")")
	err := s.dispatch(w, hr)
	if err != nil {
		s.fail(w, hr, err)
	}
	s.log.Debug("docker request", "method", hr.Method, "path", hr.URL.Path, "status", w.status, "took", time.Since(began))
}

// dispatch finds the handler of hr and runs it, turning a panic into an error.
func (s *Server) dispatch(w http.ResponseWriter, hr *http.Request) (err error) {
	version, path, err := splitVersion(hr.URL.Path)
	if err != nil {
		return err
	}
	rt, vars := s.routes.find(hr.Method, path)
	if rt == nil {
		return errPageNotFound
	}
	if version < rt.minVersion {
		return errPageNotFound
	}
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		if v == http.ErrAbortHandler {
			panic(v)
		}
		s.log.Error("docker request panicked", "method", hr.Method, "path", hr.URL.Path, "panic", v, "stack", string(debug.Stack()))
		err = fmt.Errorf("internal error while serving %s %s: %v", hr.Method, hr.URL.Path, v)
	}()
	return rt.handler(w, &request{Request: hr, version: version, vars: vars})
}

// fail answers with err, unless the answer has begun: then all that can be said is said by
// ending the connection.
func (s *Server) fail(w *responseWriter, hr *http.Request, err error) {
	if w.status != 0 {
		if hr.Context().Err() == nil {
			s.log.Debug("docker answer cut short", "method", hr.Method, "path", hr.URL.Path, "error", err)
		}
		return
	}
	status := statusOf(err)
	if status >= http.StatusInternalServerError && status != http.StatusNotImplemented {
		s.log.Warn("docker request failed", "method", hr.Method, "path", hr.URL.Path, "error", err)
	}
	writeError(w, status, err.Error())
}

// splitVersion takes the version prefix off a path. Without one the newest version is meant.
func splitVersion(path string) (minor int, rest string, err error) {
	if len(path) < 3 || path[0] != '/' || path[1] != 'v' || path[2] < '0' || path[2] > '9' {
		return MaxVersion, path, nil
	}
	word, tail, _ := strings.Cut(path[2:], "/")
	majorText, minorText, ok := strings.Cut(word, ".")
	major, err1 := strconv.Atoi(majorText)
	minor, err2 := strconv.Atoi(minorText)
	if !ok || err1 != nil || err2 != nil || minor < 0 {
		return 0, "", errPageNotFound
	}
	switch {
	case major < 1 || major == 1 && minor < MinVersion:
		return 0, "", invalid("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", word, formatVersion(MinVersion))
	case major > 1 || minor > MaxVersion:
		return 0, "", invalid("client version %s is too new. Maximum supported API version is %s", word, formatVersion(MaxVersion))
	}
	return minor, "/" + tail, nil
}

func formatVersion(minor int) string { return "1." + strconv.Itoa(minor) }

// responseWriter remembers whether the answer has begun.
type responseWriter struct {
	http.ResponseWriter
	status int
}

func (w *responseWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *responseWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

// Flush sends what was written so far.
func (w *responseWriter) Flush() {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// Unwrap lets http.ResponseController reach Hijack.
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
