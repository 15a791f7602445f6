package nodeapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
	"berth/internal/nodeapi"
	"berth/internal/nodeapi/wire"
)

type fakeEngine struct {
	containers []engine.Container
	drainErr   error
	undrained  bool
}

func (f *fakeEngine) Containers() []engine.Container { return f.containers }
func (f *fakeEngine) Sandboxes() []engine.Sandbox    { return nil }
func (f *fakeEngine) Drain(context.Context) error    { return f.drainErr }
func (f *fakeEngine) Undrain()                       { f.undrained = true }
func (f *fakeEngine) Explain(_ context.Context, ref string) (engine.Explanation, error) {
	if ref != "web" {
		return engine.Explanation{}, errdefs.New(errdefs.ErrNotFound, "No such container: %s", ref)
	}
	return engine.Explanation{Subject: `container "web"`, Summary: "it runs", Details: []string{"since now"}}, nil
}

type fakeImages int

func (n fakeImages) List(context.Context) ([]image.Image, error) { return make([]image.Image, n), nil }

func ask(t *testing.T, h http.Handler, method, path string, out any) int {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	if err := json.Unmarshal(w.Body.Bytes(), out); err != nil {
		t.Fatalf("%s %s: %v in %q", method, path, err, w.Body)
	}
	return w.Code
}

func TestRoutes(t *testing.T) {
	at := func(s engine.Status) engine.Container {
		return engine.Container{State: engine.ContainerState{Status: s}}
	}
	f := &fakeEngine{containers: []engine.Container{
		at(engine.StatusRunning), at(engine.StatusRunning), at(engine.StatusPaused), at(engine.StatusRestarting), at(engine.StatusExited)}}
	h := nodeapi.New(nodeapi.Options{
		Engine: f, Images: fakeImages(3), Node: "n1", Version: "v", Root: "/r", Ready: 120 * time.Millisecond,
		Sockets: func() []string { return []string{"/r/run/docker.sock"} },
		Logger:  slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	var s wire.Status
	if code := ask(t, h, "GET", "/berth/v1/status", &s); code != 200 {
		t.Errorf("status: %d", code)
	}
	want := wire.Status{Node: "n1", Version: "v", Root: "/r", ReadyMS: 120, Sockets: []string{"/r/run/docker.sock"}, Images: 3,
		Containers: wire.Containers{Total: 5, Running: 2, Paused: 1, Restarting: 1, Stopped: 1}}
	if diff := cmp.Diff(want, s, cmpopts.IgnoreFields(wire.Status{}, "PID")); diff != "" {
		t.Error(diff)
	}
	var e wire.Explanation
	if code := ask(t, h, "GET", "/berth/v1/explain/web", &e); code != 200 || e.Summary != "it runs" || len(e.Details) != 1 {
		t.Errorf("explain: %d %+v", code, e)
	}
	var fail wire.Error
	for path, want := range map[string]int{"/berth/v1/explain/nope": 404, "/berth/v1/nope": 404} {
		if code := ask(t, h, "GET", path, &fail); code != want || fail.Kind != "not found" || fail.Message == "" {
			t.Errorf("%s: %d %+v", path, code, fail)
		}
	}
	var d wire.Down
	if code := ask(t, h, "POST", "/berth/v1/down", &d); code != 200 || d.Stopped != 4 || f.undrained {
		t.Errorf("down: %d %+v", code, d)
	}
	f.drainErr = errors.New("container x will not die")
	if code := ask(t, h, "POST", "/berth/v1/down", &fail); code != 500 || !f.undrained || fail.Message != "down: container x will not die" {
		t.Errorf("failing down: %d %+v", code, fail)
	}
}
