package dockerapi_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/dockerapi"
	"berth/internal/engine"
	"berth/internal/image"
)

// storeClient is a docker client against a node with a real image store.
func storeClient(t *testing.T) *client {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers needs root: owners and overlay attributes")
	}
	store, err := image.Open(t.Context(), image.Config{Dir: t.TempDir(), RetryDelay: time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return newClient(t, func(o *dockerapi.Options) { o.Images = store })
}

// archive is what docker save makes of an image with the given tag and one layer per text.
func archive(t *testing.T, tag string, texts ...string) []byte {
	t.Helper()
	created := epoch
	config := ocispec.Image{
		Created: &created, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Config: ocispec.ImageConfig{Cmd: []string{"/hello"}, Labels: map[string]string{"made": "here"}},
		RootFS: ocispec.RootFS{Type: "layers"},
	}
	files := map[string][]byte{}
	var names []string
	for i, text := range texts {
		name := fmt.Sprintf("layer%d/layer.tar", i)
		files[name] = tarFile(t, map[string][]byte{fmt.Sprintf("file%d", i): []byte(text)})
		names = append(names, name)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(files[name]))
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: "COPY " + text[:1]})
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	configName := digest.FromBytes(raw).Encoded() + ".json"
	files[configName] = raw
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": []string{tag}, "Layers": names}})
	if err != nil {
		t.Fatal(err)
	}
	files["manifest.json"] = manifest
	return tarFile(t, files)
}

func tarFile(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestDockerClientRealStore(t *testing.T) {
	c := storeClient(t)
	dir := t.TempDir()
	first := filepath.Join(dir, "first.tar")
	if err := os.WriteFile(first, archive(t, "hello:1", strings.Repeat("a", 1<<20), "b"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.says("load -i "+first, "Loaded image: hello:1")
	c.says("images", "hello        1")
	c.says("history hello:1", "COPY a", "COPY b", "1.0")
	c.says("image inspect hello:1 -f {{.Config.Labels.made}}{{.RootFS.Type}}", "herelayers")
	id := c.run(true, "images", "-q", "--no-trunc", "hello:1")
	c.says("tag hello:1 registry.test/team/hello:2")
	second := filepath.Join(dir, "second.tar")
	c.says("save -o " + second + " hello:1 registry.test/team/hello:2")

	c.node.engine.run(hexID("a"), "front", engine.StatusExited, digest.Digest(strings.TrimSpace(id)))
	c.says("rmi hello:1", "Untagged: hello:1")
	c.fails("rmi registry.test/team/hello:2", "conflict: unable to remove repository reference", "container aaaaaaaaaaaa is using its referenced image")
	c.node.engine.clear()
	c.says("system df", "Images          1")
	c.says("rmi registry.test/team/hello:2", "Untagged: registry.test/team/hello:2", "Deleted: "+strings.TrimSpace(id))
	if out := c.run(true, "images", "-q"); out != "" {
		t.Errorf("left: %s", out)
	}
	c.says("load -q -i "+second, "Loaded image: hello:1", "Loaded image: registry.test/team/hello:2")
	if again := c.run(true, "images", "-q", "--no-trunc", "hello:1"); again != id {
		t.Errorf("the ID is %s, was %s", again, id)
	}
	c.fails("image inspect nope:1", "No such image: nope:1")
	c.fails("rmi sha256:"+hexID("0"), "No such image: sha256:"+hexID("0"))
	if err := os.WriteFile(second, []byte(strings.Repeat("not a tar", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	c.fails("load -i " + second)
	c.says("image prune -a -f", "Deleted", "Total reclaimed space: 1.0")
}

func TestDockerClientRegistry(t *testing.T) {
	c := storeClient(t)
	r := &registryServer{blobs: map[string][]byte{}, types: map[string]string{}, uploads: map[string][]byte{}}
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	host := strings.TrimPrefix(server.URL, "http://")
	file := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(file, archive(t, host+"/team/hello:1", "a", "b"), 0o600); err != nil {
		t.Fatal(err)
	}
	name := host + "/team/hello:1"
	c.says("load -i " + file)
	c.fails("push "+name, "unauthorized: authentication required")
	c.fails("login -u jo -p wrong "+host, "unauthorized")
	c.says("login -u jo -p right "+host, "Login Succeeded")
	c.says("push "+name, "The push refers to repository ["+host+"/team/hello]", "Pushed", "1: digest: sha256:")
	c.says("rmi "+name, "Deleted: sha256:")
	c.says("pull "+name, "1: Pulling from team/hello", "Digest: sha256:", "Status: Downloaded newer image for "+name, name)
	c.says("pull "+name, "Status: Image is up to date for "+name)
	c.says("images --digests "+host+"/team/hello", "sha256:")
	c.fails("pull "+host+"/team/hello:2", "manifest", "not found")
	c.says("logout " + host)
	c.fails("pull " + name)
	server.Close()
	c.fails("pull "+name, "connection refused")
}

// registryServer is an OCI distribution registry in memory for user jo with password "right".
type registryServer struct {
	mu      sync.Mutex
	blobs   map[string][]byte // by digest, and manifests also by tag
	types   map[string]string
	uploads map[string][]byte
}

func (s *registryServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if user, password, ok := r.BasicAuth(); !ok || user != "jo" || password != "right" {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ref, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/team/hello/"), "/")
	kind, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/team/hello/"), "/")
	switch {
	case r.URL.Path == "/v2/":
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		s.read(w, r, ref)
	case r.Method == http.MethodPost:
		w.Header().Set("Location", "/v2/team/hello/blobs/uploads/u"+fmt.Sprint(len(s.uploads)))
		s.uploads["uploads/u"+fmt.Sprint(len(s.uploads))] = nil
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPut || r.Method == http.MethodPatch:
		s.write(w, r, kind, ref)
	}
}

func (s *registryServer) read(w http.ResponseWriter, r *http.Request, ref string) {
	body, ok := s.blobs[ref]
	if !ok {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)
		return
	}
	w.Header().Set("Content-Type", s.types[ref])
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(body).String())
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	if r.Method == http.MethodGet {
		w.Write(body)
	}
}

func (s *registryServer) write(w http.ResponseWriter, r *http.Request, kind, ref string) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if kind == "blobs" {
		body = append(s.uploads[ref], body...)
		s.uploads[ref] = body
		if r.Method == http.MethodPatch {
			w.Header().Set("Location", r.URL.Path)
			w.WriteHeader(http.StatusAccepted)
			return
		}
	}
	d := digest.FromBytes(body).String()
	for _, key := range []string{d, ref} {
		s.blobs[key], s.types[key] = body, r.Header.Get("Content-Type")
	}
	w.Header().Set("Docker-Content-Digest", d)
	w.WriteHeader(http.StatusCreated)
}
