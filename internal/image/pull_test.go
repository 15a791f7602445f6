package image_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
	"berth/internal/image"
)

func TestPullUnpacks(t *testing.T) {
	g := newRegistry(t)
	s, dir := newStore(t)
	root := g.put(t, "library/app", "v1", testImage{
		layers: threeLayers(t).layers, compress: threeLayers(t).compress,
		config: `{"Cmd":["/bin/sh"],"Healthcheck":{"Test":["CMD","true"]}}`,
	})
	ref := g.host() + "/library/app:v1"
	var rec recorder
	img, err := s.Pull(t.Context(), ref, image.PullOptions{Progress: rec.progress})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{ref}, img.Names); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{g.host() + "/library/app@" + root.Digest.String()}, img.Digests); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(string(img.DockerConfig), "Healthcheck") || img.SizeBytes == 0 || img.Config.Config.Cmd[0] != "/bin/sh" {
		t.Errorf("image is incomplete: %+v", img)
	}
	want := map[string]string{"bin/a": "a2", "etc/y": "y"}
	if diff := cmp.Diff(want, tree(t, s, img.ID)); diff != "" {
		t.Error(diff)
	}
	for action, n := range map[string]int{
		"Pulling from library/app": 1, "Pulling fs layer": 3, "Verifying Checksum": 3, "Download complete": 3, "Pull complete": 3,
		"Digest: " + root.Digest.String(): 1, "Status: Downloaded newer image for " + ref: 1,
	} {
		if got := rec.count(action); got != n {
			t.Errorf("%q was reported %d times, want %d", action, got, n)
		}
	}

	// The second time nothing is fetched.
	blobs := g.requests("GET /v2/library/app/blobs")
	var again recorder
	if _, err := s.Pull(t.Context(), ref, image.PullOptions{Progress: again.progress}); err != nil {
		t.Fatal(err)
	}
	if again.count("Status: Image is up to date for "+ref) != 1 || g.requests("GET /v2/library/app/blobs") != blobs {
		t.Error("an up-to-date image was pulled again")
	}

	// Garbage collection leaves the image alone, and a new process finds it.
	gc(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s2 := openStore(t, config(dir))
	if diff := cmp.Diff(want, tree(t, s2, img.ID)); diff != "" {
		t.Error(diff)
	}
	_, ingests, _ := leftovers(t, dir)
	if len(ingests) > 0 {
		t.Errorf("ingests left: %v", ingests)
	}
}

func TestPullSharedLayersAndPlatforms(t *testing.T) {
	g := newRegistry(t)
	s, _ := newStore(t)
	base := threeLayers(t)
	a := g.put(t, "multi", "", base)
	other := base
	other.arch = "s390x"
	b := g.put(t, "multi", "", other)
	a.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	b.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	idx, _ := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{b, a}})
	root := g.putManifest("multi", "latest", ocispec.MediaTypeImageIndex, idx)

	img, err := s.Pull(t.Context(), g.host()+"/multi", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if img.Manifest.Digest != a.Digest || img.Target.Digest != root.Digest {
		t.Errorf("pulled manifest %s of %s, want %s of %s", img.Manifest.Digest, img.Target.Digest, a.Digest, root.Digest)
	}
	var rec recorder
	foreign, err := s.Pull(t.Context(), g.host()+"/multi", image.PullOptions{Platform: "linux/s390x", Progress: rec.progress})
	if err != nil {
		t.Fatal(err)
	}
	if foreign.Config.Architecture != "s390x" || rec.count("Already exists") != 3 {
		t.Errorf("got %s, %d layers already there", foreign.Config.Architecture, rec.count("Already exists"))
	}
	// The name moved: the first image is dangling, not lost.
	if first, err := s.Resolve(t.Context(), img.ID.String()); err != nil || len(first.Names) != 0 {
		t.Errorf("first image: %v, names %v", err, first.Names)
	}
	_, err = s.Pull(t.Context(), g.host()+"/multi", image.PullOptions{Platform: "windows/amd64"})
	wantKind(t, err, errdefs.ErrNotFound, "no matching manifest for windows/amd64 in the manifest list entries")
	_, err = s.Pull(t.Context(), g.host()+"/multi", image.PullOptions{Platform: "a/b/c/d"})
	wantKind(t, err, errdefs.ErrInvalid, "invalid platform")
	// By digest there is a name by digest only.
	byDigest, err := s.Pull(t.Context(), g.host()+"/multi@"+a.Digest.String(), image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(byDigest.Names) != 0 || len(byDigest.Digests) != 1 {
		t.Errorf("names %v, digests %v", byDigest.Names, byDigest.Digests)
	}
}

func TestPullRefusals(t *testing.T) {
	g := newRegistry(t)
	s, dir := newStore(t)
	good := g.put(t, "good", "latest", threeLayers(t))
	wrong := threeLayers(t)
	wrong.diffs = []digest.Digest{digest.FromString("1"), digest.FromString("2"), digest.FromString("3")}
	g.put(t, "wrongdiff", "latest", wrong)
	junk := testImage{layers: [][]byte{[]byte(strings.Repeat("this is no tar ", 1000))}}
	g.put(t, "junk", "latest", junk)
	many := testImage{}
	for i := range 129 {
		many.layers = append(many.layers, tarOf(t, entry{name: fmt.Sprint(i)}))
	}
	g.put(t, "many", "latest", many)
	short := threeLayers(t)
	short.diffs = []digest.Digest{digest.FromString("1")}
	g.put(t, "short", "latest", short)
	g.putManifest("schema1", "latest", "application/vnd.docker.distribution.manifest.v1+prettyjws", []byte(`{"schemaVersion":1,"fsLayers":[]}`))
	g.putManifest("html", "latest", "text/html", []byte(`<html>`))
	g.putManifest("odd", "latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2}`))
	g.putManifest("both", "latest", ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[],"layers":[]}`))
	g.putManifest("helm", "latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":"`+good.Digest.String()+`","size":2},"layers":[]}`))
	g.putManifest("evil", "latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../etc","size":2},"layers":[]}`))
	g.putManifest("huge", "latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"x":"`+strings.Repeat("x", 5<<20)+`"}`))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()

	h := g.host()
	missing := digest.FromString("missing").String()
	for _, c := range []struct {
		name, ref string
		kind      error
		text      string
	}{
		{"uppercase", "Busybox", errdefs.ErrInvalid, "invalid reference format: repository name (library/Busybox) must be lowercase"},
		{"malformed", "a//b:::", errdefs.ErrInvalid, "invalid reference format"},
		{"empty", "", errdefs.ErrInvalid, "invalid reference format"},
		{"unknown tag", h + "/good:nope", errdefs.ErrNotFound, "manifest for " + h + "/good:nope not found: manifest unknown"},
		{"unknown digest", h + "/good@" + missing, errdefs.ErrNotFound, "not found: manifest unknown"},
		{"unreachable", closed + "/x", errdefs.ErrUnavailable, "dial tcp " + closed + ": connect: connection refused"},
		{"diff id", h + "/wrongdiff", errdefs.ErrDataLoss, "invalid diffID for layer 0"},
		{"junk layer", h + "/junk", errdefs.ErrInvalid, "failed to register layer"},
		{"too many layers", h + "/many", errdefs.ErrInvalid, "129 layers"},
		{"length mismatch", h + "/short", errdefs.ErrInvalid, "layers length mismatch: expected 1, got 3"},
		{"schema 1", h + "/schema1", errdefs.ErrUnsupported, "schema 1"},
		{"html", h + "/html", errdefs.ErrInvalid, "not valid JSON"},
		{"no manifest", h + "/odd", errdefs.ErrInvalid, "unsupported manifest"},
		{"ambiguous", h + "/both", errdefs.ErrInvalid, "ambiguous"},
		{"no image", h + "/helm", errdefs.ErrUnsupported, "not a container image"},
		{"bad digest", h + "/evil", errdefs.ErrInvalid, "invalid digest"},
		{"big manifest", h + "/huge", errdefs.ErrInvalid, "bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.Pull(t.Context(), c.ref, image.PullOptions{})
			wantKind(t, err, c.kind, c.text)
			wantEmpty(t, dir)
		})
	}
}

// blobFault lets f answer the first n requests for blobs larger than a config.
func blobFault(n int32, f func(w http.ResponseWriter, r *http.Request)) (*atomic.Int32, func(http.ResponseWriter, *http.Request) bool) {
	var hits atomic.Int32
	return &hits, func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") || r.Method != http.MethodGet || hits.Add(1) > n {
			return false
		}
		f(w, r)
		return true
	}
}

func TestPullSurvivesPassingFaults(t *testing.T) {
	big := testImage{layers: [][]byte{bigLayer(t, 1, 3<<20)}, compress: []string{""}}
	drop := func(g *registry) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			g.mu.Lock()
			data := g.blobs[digest.Digest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])]
			g.mu.Unlock()
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			_, _ = w.Write(data[:len(data)/2])
			panic(http.ErrAbortHandler)
		}
	}
	for _, c := range []struct {
		name  string
		fault func(g *registry) func(http.ResponseWriter, *http.Request)
		times int32
		hide  bool
	}{
		{"dropped in the middle", drop, 2, false},
		{"dropped without ranges", drop, 2, true},
		{"500 then well", func(*registry) func(http.ResponseWriter, *http.Request) {
			return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }
		}, 3, false},
		{"stalls", func(*registry) func(http.ResponseWriter, *http.Request) {
			return func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", "1000000")
				_, _ = w.Write([]byte("x"))
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
		}, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRegistry(t)
			g.hideRanges = c.hide
			cfg := config(t.TempDir())
			cfg.Stall = 100 * time.Millisecond
			s := openStore(t, cfg)
			g.put(t, "app", "latest", big)
			hits, f := blobFault(c.times, c.fault(g))
			g.setFault(f)
			img, err := s.Pull(t.Context(), g.host()+"/app", image.PullOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if n := hits.Load(); n <= c.times {
				t.Errorf("the fault was met %d times only", n)
			}
			if len(tree(t, s, img.ID)["big1"]) != 3<<20 {
				t.Error("the layer is incomplete")
			}
		})
	}
}

func TestPullLastingFaults(t *testing.T) {
	big := testImage{layers: [][]byte{bigLayer(t, 1, 1<<20), bigLayer(t, 2, 1<<20)}}
	for _, c := range []struct {
		name  string
		fault func(w http.ResponseWriter, r *http.Request) bool
		kind  error
		text  string
	}{
		{"500 for ever", func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				w.WriteHeader(http.StatusInternalServerError)
				return true
			}
			return false
		}, errdefs.ErrUnavailable, "received unexpected HTTP status: 500"},
		{"other content", func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				_, _ = w.Write(make([]byte, 2<<20))
				return true
			}
			return false
		}, errdefs.ErrDataLoss, "more than"},
		{"no blob", func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown")
				return true
			}
			return false
		}, errdefs.ErrNotFound, "not found"},
		{"other manifest", func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/") {
				_, _ = w.Write([]byte(`{}`))
				return true
			}
			return false
		}, errdefs.ErrUnavailable, "unexpected EOF"},
		{"too many requests", func(w http.ResponseWriter, r *http.Request) bool {
			fail(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", "slow down")
			return true
		}, errdefs.ErrUnavailable, "toomanyrequests"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRegistry(t)
			s, dir := newStore(t)
			g.put(t, "app", "latest", big)
			g.setFault(c.fault)
			_, err := s.Pull(t.Context(), g.host()+"/app", image.PullOptions{})
			wantKind(t, err, c.kind, c.text)
			wantEmpty(t, dir)
		})
	}
	t.Run("corrupt layer of the right size", func(t *testing.T) {
		g := newRegistry(t)
		s, dir := newStore(t)
		g.put(t, "app", "latest", big)
		g.mu.Lock()
		for d, b := range g.blobs {
			if len(b) > 1<<19 {
				g.blobs[d] = make([]byte, len(b))
			}
		}
		g.mu.Unlock()
		_, err := s.Pull(t.Context(), g.host()+"/app", image.PullOptions{})
		wantKind(t, err, errdefs.ErrDataLoss, "filesystem layer verification failed for digest sha256:")
		wantEmpty(t, dir)
	})
	t.Run("cancelled", func(t *testing.T) {
		g := newRegistry(t)
		s, dir := newStore(t)
		g.put(t, "app", "latest", big)
		ctx, cancel := context.WithCancel(t.Context())
		g.setFault(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				cancel()
			}
			return false
		})
		if _, err := s.Pull(ctx, g.host()+"/app", image.PullOptions{}); err == nil {
			t.Error("a cancelled pull succeeded")
		}
		wantEmpty(t, dir)
	})
}

func TestPullLogin(t *testing.T) {
	for _, c := range []struct {
		name  string
		auth  string
		creds image.Credentials
		kind  error
		text  string
	}{
		{"basic", "basic", image.Credentials{Username: "u", Password: "p"}, nil, ""},
		{"basic, wrong", "basic", image.Credentials{Username: "u", Password: "x"}, errdefs.ErrUnauthorized, "unauthorized"},
		{"basic, none", "basic", image.Credentials{}, errdefs.ErrNotFound, "pull access denied for"},
		{"bearer", "bearer", image.Credentials{Username: "u", Password: "p"}, nil, ""},
		{"bearer, wrong", "bearer", image.Credentials{Username: "u", Password: "x"}, errdefs.ErrUnauthorized, "unauthorized: incorrect username or password"},
		{"bearer, none", "bearer", image.Credentials{}, errdefs.ErrNotFound, "repository does not exist or may require 'docker login'"},
		{"identity token", "bearer", image.Credentials{IdentityToken: "idt"}, nil, ""},
		{"registry token", "bearer", image.Credentials{RegistryToken: "good"}, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newRegistry(t)
			s, _ := newStore(t)
			g.put(t, "app", "latest", threeLayers(t))
			g.auth, g.user, g.password, g.refresh = c.auth, "u", "p", "idt"
			_, err := s.Pull(t.Context(), g.host()+"/app", image.PullOptions{Credentials: c.creds})
			line, loginErr := s.CheckLogin(t.Context(), g.host(), c.creds)
			if c.kind == nil {
				if err != nil || loginErr != nil || line != "Login Succeeded" {
					t.Errorf("pull: %v; login: %q, %v", err, line, loginErr)
				}
				return
			}
			wantKind(t, err, c.kind, c.text)
			wantKind(t, loginErr, errdefs.ErrUnauthorized, "unauthorized")
			if strings.Contains(err.Error(), "password\":") {
				t.Error("a secret is in the message")
			}
		})
	}
}

func TestPullMirror(t *testing.T) {
	g := newRegistry(t)
	g.put(t, "library/app", "latest", threeLayers(t))
	hosts := t.TempDir()
	if err := os.MkdirAll(filepath.Join(hosts, "docker.io"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(hosts, "docker.io", "hosts.toml")
	if err := os.WriteFile(file, []byte("server = \"http://127.0.0.1:1\"\n[host.\""+g.server.URL+"\"]\ncapabilities = [\"pull\", \"resolve\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := config(t.TempDir())
	c.Registries = hosts
	s := openStore(t, c)
	img, err := s.Pull(t.Context(), "app", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"docker.io/library/app:latest"}, img.Names); diff != "" {
		t.Error(diff)
	}
	if err := os.WriteFile(file, []byte("server = ["), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = s.Pull(t.Context(), "app:2", image.PullOptions{})
	wantKind(t, err, errdefs.ErrInvalid, "hosts.toml")
}

func TestPullsAtOnce(t *testing.T) {
	g := newRegistry(t)
	s, dir := newStore(t)
	shared := bigLayer(t, 7, 1<<20)
	for i := range 3 {
		g.put(t, fmt.Sprintf("app%d", i), "latest", testImage{layers: [][]byte{shared, bigLayer(t, uint64(i), 1<<16)}})
	}
	var wg sync.WaitGroup
	for i := range 9 {
		wg.Go(func() {
			if _, err := s.Pull(t.Context(), fmt.Sprintf("%s/app%d", g.host(), i%3), image.PullOptions{}); err != nil {
				t.Error(err)
			}
			if err := s.GC(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	d := digest.FromBytes(squeeze(t, "gzip", shared))
	n := 0
	for i := range 3 {
		n += g.requests(fmt.Sprintf("GET /v2/app%d/blobs/%s", i, d))
	}
	if n != 1 {
		t.Errorf("the shared layer was fetched %d times", n)
	}
	all, err := s.List(t.Context())
	if err != nil || len(all) != 3 {
		t.Fatalf("%d images, %v", len(all), err)
	}
	for _, img := range all {
		if got := tree(t, s, img.ID); len(got) != 2 {
			t.Errorf("image %s has %d files", img.Names, len(got))
		}
	}
	_, ingests, _ := leftovers(t, dir)
	if len(ingests) > 0 {
		t.Errorf("ingests left: %v", ingests)
	}
}
