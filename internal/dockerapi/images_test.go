package dockerapi_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
)

type summary struct {
	ID          string `json:"Id"`
	RepoTags    []string
	RepoDigests []string
	Containers  int
	Size        int64
	SharedSize  int64
	VirtualSize int64
	Descriptor  *struct{ Digest string }
	Manifests   []struct{ Kind string }
}

func TestImageList(t *testing.T) {
	n := newNode(t)
	web := n.images.add("web:1", epoch, map[string]string{"tier": "front"}, 100, 20)
	n.images.add("db:2", epoch.Add(time.Hour), nil, 100, 7)
	n.images.add("", epoch.Add(-time.Hour), nil, 50)
	n.engine.run(hexID("a"), "front", engine.StatusRunning, web.ID)

	var all []summary
	n.get("/v1.51/images/json?shared-size=1&manifests=1", &all)
	tags := func(list []summary) (out []string) {
		for _, one := range list {
			out = append(out, strings.Join(one.RepoTags, " "))
		}
		return out
	}
	if diff := cmp.Diff([]string{"db:2", "web:1", ""}, tags(all)); diff != "" {
		t.Errorf("newest first: %s", diff)
	}
	got := all[1]
	if got.ID != web.ID.String() || got.Containers != 1 || got.Size != 120 || got.SharedSize != 100 || got.VirtualSize != 0 ||
		got.Descriptor.Digest != web.Target.Digest.String() || got.RepoDigests[0] != "web@"+web.Target.Digest.String() ||
		len(got.Manifests) != 1 || got.Manifests[0].Kind != "image" {
		t.Errorf("web is %+v", got)
	}
	var old []summary
	n.get("/v1.40/images/json?filter=web", &old)
	if len(old) != 1 || old[0].VirtualSize != 120 || old[0].Containers != -1 || old[0].SharedSize != -1 || old[0].Descriptor != nil {
		t.Errorf("in API 1.40: %+v", old)
	}
	for filter, want := range map[string][]string{
		`{"dangling":["true"]}`:                  {"<none>:<none>"},
		`{"dangling":["false"]}`:                 {"db:2", "web:1"},
		`{"label":["tier=front"]}`:               {"web:1"},
		`{"label!":["tier"]}`:                    {"db:2", "<none>:<none>"},
		`{"reference":["w*"]}`:                   {"web:1"},
		`{"reference":["*:2","nothing"]}`:        {"db:2"},
		`{"before":["web:1"]}`:                   {"<none>:<none>"},
		`{"since":["web:1"]}`:                    {"db:2"},
		`{"until":["2026-03-01T12:30:00Z"]}`:     {"web:1", "<none>:<none>"},
		`{"reference":["web"],"since":["db:2"]}`: nil,
	} {
		var list []summary
		n.get("/v1.42/images/json?filters="+urlEscape(filter), &list)
		if diff := cmp.Diff(want, tags(list)); diff != "" {
			t.Errorf("%s: %s", filter, diff)
		}
	}
	n.refused("GET", "/images/json?filters="+urlEscape(`{"colour":["red"]}`), "", 400, "invalid filter 'colour'")
	n.refused("GET", "/images/json?filters="+urlEscape(`{"before":["nope"]}`), "", 404, "No such image: nope:latest")
	n.refused("GET", "/images/json?filters="+urlEscape(`{"reference":["["]}`), "", 400, "invalid filter 'reference=['")
	n.refused("GET", "/images/json?filters="+urlEscape(`{"dangling":["maybe"]}`), "", 400, "invalid filter 'dangling=maybe'")
}

func urlEscape(s string) string {
	return strings.NewReplacer("%", "%25", " ", "%20", "\"", "%22", "{", "%7B", "}", "%7D", "[", "%5B", "]", "%5D", "!", "%21", "+", "%2B").Replace(s)
}

func TestImageInspectShapes(t *testing.T) {
	n := newNode(t)
	img := n.images.add("web:1", epoch, map[string]string{"tier": "front"}, 100, 20)
	shape := func(target string) map[string]any {
		var m map[string]any
		n.get(target, &m)
		return m
	}
	now := shape("/v1.52/images/web:1/json")
	for _, key := range []string{"Parent", "DockerVersion", "VirtualSize", "Container"} {
		if _, ok := now[key]; ok {
			t.Errorf("API 1.52 has %s", key)
		}
	}
	want := map[string]any{
		"Cmd": []any{"sh"}, "Env": []any{"PATH=/bin"}, "Labels": map[string]any{"tier": "front"}, "OnBuild": []any{"RUN true"},
		"Healthcheck": map[string]any{"Test": []any{"CMD", "true"}, "Interval": 1e9},
	}
	if diff := cmp.Diff(want, now["Config"]); diff != "" {
		t.Errorf("config in 1.52: %s", diff)
	}
	if now["Id"] != img.ID.String() || now["Created"] != "2026-03-01T12:00:00Z" || now["Comment"] != "made" || now["Os"] != "linux" ||
		now["GraphDriver"].(map[string]any)["Name"] != "overlayfs" || len(now["RootFS"].(map[string]any)["Layers"].([]any)) != 2 ||
		now["Metadata"].(map[string]any)["LastTagTime"] != "2026-03-01T13:00:00Z" || now["Descriptor"] == nil {
		t.Errorf("inspect in 1.52: %v", now)
	}
	mid := shape("/v1.50/images/web:1/json")["Config"].(map[string]any)
	if v, ok := mid["Entrypoint"]; !ok || v != nil {
		t.Errorf("API 1.50 must show an empty entrypoint: %v", mid)
	}
	if _, ok := mid["Hostname"]; ok {
		t.Error("API 1.50 shows a host name")
	}
	old := shape("/v1.40/images/web:1/json")
	if c := old["Config"].(map[string]any); c["Hostname"] != "" || c["Tty"] != false || old["VirtualSize"] != 120.0 || old["Parent"] != "" || old["Descriptor"] != nil {
		t.Errorf("inspect in 1.40: %v", old)
	}
	if m := shape("/v1.48/images/" + img.ID.Encoded()[:12] + "/json?manifests=1"); len(m["Manifests"].([]any)) != 1 {
		t.Errorf("manifests: %v", m["Manifests"])
	}
	if status, body := n.do("GET", "/v1.49/images/web:1/json?platform="+urlEscape(`{"os":"linux","architecture":"amd64"}`), ""); status != 200 {
		t.Errorf("own platform: %d %s", status, body)
	}
	n.refused("GET", "/v1.49/images/web:1/json?platform="+urlEscape(`{"os":"linux","architecture":"arm64"}`), "", 404, "does not provide the specified platform (linux/arm64)")
	n.refused("GET", "/v1.49/images/web:1/json?platform=arm64", "", 400, "invalid platform")
	n.refused("GET", "/images/nope/json", "", 404, "No such image: nope:latest")
	n.refused("GET", "/images/registry.test:5000/a/b:c/json", "", 404, "No such image: registry.test:5000/a/b:c")
	n.refused("GET", "/images/UPPER/json", "", 400, "invalid reference format: repository name (library/UPPER) must be lowercase")
	n.refused("GET", "/images/a:b:c/json", "", 400, "invalid reference format")
}

func TestImageHistory(t *testing.T) {
	n := newNode(t)
	img := n.images.add("web:1", epoch, nil, 100, 20)
	var got []struct {
		ID        string `json:"Id"`
		CreatedBy string
		Comment   string
		Size      int64
		Created   int64
		Tags      []string
	}
	n.get("/v1.50/images/web:1/history", &got)
	if len(got) != 4 {
		t.Fatalf("history has %d lines: %v", len(got), got)
	}
	if got[0].ID != img.ID.String() || got[0].Tags[0] != "web:1" || got[0].Size != 0 || got[1].ID != "<missing>" ||
		got[1].Size != 20 || got[3].Size != 100 || got[3].CreatedBy != "COPY layer" || got[3].Created != epoch.Unix() {
		t.Errorf("history: %+v", got)
	}
}

// stream splits a progress stream into its lines.
func stream(t *testing.T, body string) (out []map[string]any) {
	t.Helper()
	for line := range strings.SplitSeq(strings.TrimSpace(body), "\r\n") {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v in %q of %q", err, line, body)
		}
		out = append(out, m)
	}
	return out
}

func TestPull(t *testing.T) {
	n := newNode(t)
	var asked string
	n.images.pull = func(_ context.Context, ref string, o image.PullOptions) (image.Image, error) {
		asked = ref
		o.Progress(image.Status{ID: "latest", Action: "Pulling from library/busybox"})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Pulling fs layer"})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Downloading", Current: 1 << 20, Total: 2 << 20})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Downloading", Current: 2 << 20, Total: 2 << 20})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Pull complete"})
		return n.images.add("busybox:latest", epoch, nil, 10), nil
	}
	auth := base64.URLEncoding.EncodeToString([]byte(`{"username":"jo","password":"secret"}`))
	status, body := n.do("POST", "/v1.50/images/create?fromImage=busybox&tag=latest&platform=linux/amd64", "", "X-Registry-Auth", auth)
	if status != 200 || asked != "docker.io/library/busybox:latest" || n.images.creds.Password != "secret" || n.images.platform != "linux/amd64" {
		t.Fatalf("%d %s %v: %s", status, asked, n.images.creds, body)
	}
	lines := stream(t, body)
	if lines[0]["status"] != "Pulling from library/busybox" || lines[0]["id"] != "latest" {
		t.Errorf("first line: %v", lines[0])
	}
	var moving map[string]any
	for _, l := range lines {
		if l["status"] == "Downloading" {
			moving = l
		}
	}
	want := map[string]any{
		"id": "aabbccddeeff", "status": "Downloading", "progressDetail": map[string]any{"current": 2097152.0, "total": 2097152.0},
		"progress": "[==================================================>]  2.097MB/2.097MB",
	}
	if diff := cmp.Diff(want, moving); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"image pull busybox"}, n.happened()); diff != "" {
		t.Error(diff)
	}
}

func TestPullRefusals(t *testing.T) {
	n := newNode(t)
	n.refused("POST", "/images/create?fromImage=nope&tag=latest", "", 404, "pull access denied for docker.io/library/nope:latest")
	n.refused("POST", "/images/create?fromImage=nope", "", 501, "docker pull -a")
	n.refused("POST", "/images/create?fromSrc=-&repo=x", "", 501, "docker import")
	n.refused("POST", "/images/create?fromImage=Nope&tag=x", "", 400, "invalid reference format")
	n.refused("POST", "/images/create?fromImage=nope&tag=a%20b", "", 400, "invalid tag format")
	n.refused("POST", "/images/create?fromImage=scratch&tag=latest", "", 403, "'scratch' is a reserved name")
	n.refused("POST", "/images/create?fromImage=nope&tag=x&platform=a/b/c/d", "", 400, "invalid platform")
	for kind, status := range map[error]int{errdefs.ErrUnauthorized: 401, errdefs.ErrUnavailable: 503, errdefs.ErrDataLoss: 500} {
		n.images.pull = func(context.Context, string, image.PullOptions) (image.Image, error) {
			return image.Image{}, errdefs.New(kind, "because")
		}
		n.refused("POST", "/images/create?fromImage=nope&tag=x", "", status, "because")
	}
	// Once something was said, the failure goes into the stream.
	began := make(chan struct{})
	n.images.pull = func(_ context.Context, _ string, o image.PullOptions) (image.Image, error) {
		o.Progress(image.Status{ID: "x", Action: "Pulling from library/nope"})
		<-began
		return image.Image{}, errdefs.New(errdefs.ErrDataLoss, "layer is corrupt")
	}
	w := &flushed{began: began, header: http.Header{}}
	r, _ := http.NewRequestWithContext(t.Context(), "POST", "/images/create?fromImage=nope&tag=x", nil)
	n.server.ServeHTTP(w, r)
	lines := stream(t, w.String())
	last := lines[len(lines)-1]
	if w.status != 200 || last["error"] != "layer is corrupt" || last["errorDetail"].(map[string]any)["message"] != "layer is corrupt" {
		t.Errorf("%d %v", w.status, lines)
	}
}

// flushed is a ResponseWriter that says when its first bytes went out.
type flushed struct {
	strings.Builder
	header http.Header
	began  chan struct{}
	status int
}

func (f *flushed) Header() http.Header { return f.header }
func (f *flushed) WriteHeader(s int)   { f.status = s }
func (f *flushed) Flush() {
	if f.began != nil {
		close(f.began)
		f.began = nil
	}
}

// gone is a client that has hung up.
type gone struct{ flushed }

func (g *gone) Write([]byte) (int, error) { return 0, errors.New("connection reset") }

func TestPullEndsWithItsClient(t *testing.T) {
	n := newNode(t)
	ended := make(chan error, 1)
	n.images.pull = func(ctx context.Context, _ string, o image.PullOptions) (image.Image, error) {
		o.Progress(image.Status{ID: "x", Action: "Pulling from library/nope"})
		<-ctx.Done()
		ended <- ctx.Err()
		return image.Image{}, ctx.Err()
	}
	r, _ := http.NewRequestWithContext(t.Context(), "POST", "/images/create?fromImage=nope&tag=x", nil)
	n.server.ServeHTTP(&gone{flushed{header: http.Header{}}}, r)
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestPush(t *testing.T) {
	n := newNode(t)
	img := n.images.add("busybox:latest", epoch, nil, 10)
	if err := n.images.Tag(t.Context(), "busybox", "docker.io/library/busybox:two"); err != nil {
		t.Fatal(err)
	}
	auth := base64.URLEncoding.EncodeToString([]byte(`{"username":"jo","password":"secret"}`))
	status, body := n.do("POST", "/v1.50/images/busybox/push?tag=latest", "", "X-Registry-Auth", auth)
	lines := stream(t, body)
	want := map[string]any{"progressDetail": map[string]any{}, "aux": map[string]any{"Tag": "latest", "Digest": img.Manifest.Digest.String(), "Size": 527.0}}
	if diff := cmp.Diff(want, lines[len(lines)-1]); status != 200 || diff != "" || n.images.creds.Username != "jo" {
		t.Errorf("%d %s: %s", status, body, diff)
	}
	_, body = n.do("POST", "/v1.50/images/busybox/push", `{"username":"old"}`)
	if strings.Count(body, `"aux"`) != 2 || n.images.creds.Username != "old" {
		t.Errorf("all tags with credentials in the body: %s", body)
	}
	if diff := cmp.Diff([]string{"image push busybox", "image push busybox", "image push busybox"}, n.happened()); diff != "" {
		t.Error(diff)
	}
	n.refused("POST", "/images/nope/push?tag=x", "", 404, "An image does not exist locally with the tag: nope")
	n.refused("POST", "/images/nope/push", "", 404, "An image does not exist locally with the tag: nope")
	n.refused("POST", "/images/No/push?tag=x", "", 400, "invalid reference format")
	n.refused("POST", "/images/busybox/push?tag=latest&platform="+urlEscape(`{"os":"linux","architecture":"s390x"}`), "", 404, "does not provide the specified platform")
}

func TestTagRemovePrune(t *testing.T) {
	n := newNode(t)
	img := n.images.add("busybox:latest", epoch, nil, 10)
	used := n.images.add("used:1", epoch, nil, 10)
	n.images.add("", epoch, nil, 30)
	n.engine.run(hexID("a"), "front", engine.StatusRunning, used.ID)

	if status, body := n.do("POST", "/images/busybox/tag?repo=registry.test:5000/team/bb&tag=v2", ""); status != 201 {
		t.Errorf("tag: %d %s", status, body)
	}
	n.refused("POST", "/images/nope/tag?repo=x", "", 404, "No such image: nope:latest")
	n.refused("POST", "/images/busybox/tag?repo=Bad", "", 400, "must be lowercase")
	n.refused("POST", "/images/busybox/tag?repo=x&tag=-", "", 400, "invalid tag format")
	n.refused("POST", "/images/busybox/tag?repo=sha256", "", 400, "refusing to create an ambiguous tag")
	n.refused("POST", "/images/busybox/tag?repo=x@"+digest.FromString("x").String(), "", 400, "digest reference")
	n.refused("DELETE", "/images/nope", "", 404, "No such image: nope:latest")
	n.refused("DELETE", "/images/used:1?force=1", "", 409, "container aaaaaaaaaaaa is using its referenced image")
	n.refused("DELETE", "/v1.50/images/busybox?platforms=x", "", 501, "platforms")

	status, body := n.do("DELETE", "/images/busybox", "")
	var removed []struct{ Untagged, Deleted string }
	if err := json.Unmarshal([]byte(body), &removed); err != nil || status != 200 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	if len(removed) != 3 || removed[0].Untagged != "busybox:latest" || removed[1].Untagged != "registry.test:5000/team/bb:v2" || removed[2].Deleted != img.ID.String() {
		t.Errorf("removed: %v", removed)
	}
	status, body = n.do("POST", "/images/prune", "")
	if status != 200 || !strings.Contains(body, `"SpaceReclaimed":30`) {
		t.Errorf("prune: %d %s", status, body)
	}
	status, body = n.do("POST", "/images/prune?filters="+urlEscape(`{"dangling":["false"]}`), "")
	if status != 200 || body != `{"ImagesDeleted":[],"SpaceReclaimed":0}`+"\n" {
		t.Errorf("prune -a must keep what is used: %d %s", status, body)
	}
	n.refused("POST", "/images/prune?filters="+urlEscape(`{"since":["x"]}`), "", 400, "invalid filter 'since'")
	events := n.happened()
	if diff := cmp.Diff([]string{"image tag registry.test:5000/team/bb:v2", "image untag busybox:latest",
		"image untag registry.test:5000/team/bb:v2", "image delete " + img.ID.String()}, events[:4]); diff != "" {
		t.Error(diff)
	}
	if !slices.Contains(events, "image prune") {
		t.Errorf("no prune event in %v", events)
	}
}

func TestSaveLoad(t *testing.T) {
	n := newNode(t)
	n.images.add("busybox:latest", epoch, nil, 10)
	w := n.exchange("GET", "/images/get?names=busybox", nil)
	if w.Code != 200 || w.Header().Get("Content-Type") != "application/x-tar" || w.Body.String() != "archive of busybox" {
		t.Errorf("save: %d %v %s", w.Code, w.Header(), w.Body)
	}
	if status, body := n.do("GET", "/images/busybox:latest/get", ""); status != 200 || body != "archive of busybox:latest" {
		t.Errorf("save one: %d %s", status, body)
	}
	n.refused("GET", "/images/get?names=busybox&names=nope", "", 404, "No such image: nope:latest")
	n.refused("GET", "/images/get", "", 400, "no images given")

	status, body := n.do("POST", "/images/load?quiet=1", "a tar", "Content-Type", "application/x-tar")
	lines := stream(t, body)
	if status != 200 || n.images.loaded != "a tar" || len(lines) != 2 || lines[0]["stream"] != "Loaded image: loaded:1\n" ||
		!strings.HasPrefix(lines[1]["stream"].(string), "Loaded image ID: sha256:") {
		t.Errorf("load: %d %s", status, body)
	}
	n.refused("POST", "/images/load", "bad archive", 400, "archive: unrecognised format")
	n.refused("POST", "/images/load?platform=x", "", 501, "platform")
	n.refused("GET", "/images/search?term=x", "", 501, "docker search")
	n.refused("GET", "/distribution/busybox/json", "", 501, "busybox")
}

func TestLoadTellsProgressWhileItReads(t *testing.T) {
	n := newNode(t)
	server := httptest.NewServer(n.server)
	defer server.Close()
	const half = 1 << 20
	body := bytes.Repeat([]byte("0123456789abcdef"), 2*half/16)
	n.images.load = func(r io.Reader, p image.Progress) ([]image.Image, error) {
		first := make([]byte, half)
		if _, err := io.ReadFull(r, first); err != nil {
			return nil, err
		}
		p(image.Status{ID: "aabbccddeeff", Action: "Loading layer"})
		rest, err := io.ReadAll(r)
		if !bytes.Equal(append(first, rest...), body) {
			return nil, errors.New("the archive arrived changed")
		}
		return []image.Image{n.images.add("loaded:1", epoch, nil, 5)}, err
	}
	// The second half is sent only when the answer has begun.
	pr, pw := io.Pipe()
	answered := make(chan struct{})
	go func() {
		pw.Write(body[:half])
		<-answered
		pw.Write(body[half:])
		pw.Close()
	}()
	resp, err := http.Post(server.URL+"/images/load?quiet=0", "application/x-tar", pr)
	close(answered)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	lines := stream(t, string(raw))
	if err != nil || len(lines) != 2 || lines[0]["status"] != "Loading layer" || lines[1]["stream"] != "Loaded image: loaded:1\n" {
		t.Errorf("%v %s", err, raw)
	}
}

func TestImageOfBrokenConfig(t *testing.T) {
	n := newNode(t)
	n.images.add("web:1", epoch, nil, 10)
	n.images.list[0].DockerConfig = []byte(`{"Healthcheck":7}`)
	n.refused("GET", "/images/web:1/json", "", 500, "config of image")
}
