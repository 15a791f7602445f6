package image_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registry is a small registry of the OCI distribution specification: pull, push in one piece,
// cross-repository mount, ranges, basic and bearer login, and faults.
type registry struct {
	server *httptest.Server

	mu        sync.Mutex
	blobs     map[digest.Digest][]byte
	owned     map[string]bool // repository + digest
	manifests map[string]manifestEntry
	log       []string
	uploads   int

	auth           string // "", "basic", "bearer"
	user, password string
	refresh        string // identity token that is accepted
	fault          func(w http.ResponseWriter, r *http.Request) bool
	hideRanges     bool
}

type manifestEntry struct {
	mediaType string
	data      []byte
}

func newRegistry(t *testing.T) *registry {
	t.Helper()
	g := &registry{blobs: map[digest.Digest][]byte{}, owned: map[string]bool{}, manifests: map[string]manifestEntry{}}
	g.server = httptest.NewServer(g)
	t.Cleanup(g.server.Close)
	return g
}

func (g *registry) host() string { return strings.TrimPrefix(g.server.URL, "http://") }

func (g *registry) requests(prefix string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, l := range g.log {
		if strings.HasPrefix(l, prefix) {
			n++
		}
	}
	return n
}

func (g *registry) setFault(f func(w http.ResponseWriter, r *http.Request) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fault = f
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	entry := r.Method + " " + r.URL.Path
	if rng := r.Header.Get("Range"); rng != "" {
		entry += " " + rng
	}
	g.log = append(g.log, entry)
	fault := g.fault
	g.mu.Unlock()
	if r.URL.Path == "/token" {
		g.token(w, r)
		return
	}
	if !g.authorized(r) {
		g.challenge(w, r)
		return
	}
	if fault != nil && fault(w, r) {
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	switch {
	case path == "":
		w.WriteHeader(http.StatusOK)
	case strings.Contains(path, "/manifests/"):
		repo, ref, _ := strings.Cut(path, "/manifests/")
		g.manifest(w, r, repo, ref)
	case strings.Contains(path, "/blobs/uploads/"):
		repo, id, _ := strings.Cut(path, "/blobs/uploads/")
		g.upload(w, r, repo, id)
	case strings.Contains(path, "/blobs/"):
		repo, d, _ := strings.Cut(path, "/blobs/")
		g.blob(w, r, repo, digest.Digest(d))
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}

func (g *registry) authorized(r *http.Request) bool {
	switch g.auth {
	case "basic":
		u, p, ok := r.BasicAuth()
		return ok && u == g.user && p == g.password
	case "bearer":
		return r.Header.Get("Authorization") == "Bearer good"
	}
	return true
}

func (g *registry) challenge(w http.ResponseWriter, r *http.Request) {
	if g.auth == "basic" {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
	} else {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test"`, g.server.URL))
	}
	fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
}

// token serves both the OAuth form and the older one with basic credentials.
func (g *registry) token(w http.ResponseWriter, r *http.Request) {
	good := false
	if r.Method == http.MethodPost {
		_ = r.ParseForm()
		switch r.PostForm.Get("grant_type") {
		case "password":
			good = r.PostForm.Get("username") == g.user && r.PostForm.Get("password") == g.password
		case "refresh_token":
			good = r.PostForm.Get("refresh_token") == g.refresh
		}
	} else if u, p, ok := r.BasicAuth(); ok {
		good = u == g.user && p == g.password
	}
	if !good {
		fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "incorrect username or password")
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"token": "good", "access_token": "good", "expires_in": 300})
}

func (g *registry) manifest(w http.ResponseWriter, r *http.Request, repo, ref string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Method == http.MethodPut {
		data, _ := io.ReadAll(r.Body)
		e := manifestEntry{mediaType: r.Header.Get("Content-Type"), data: data}
		d := digest.FromBytes(data)
		g.manifests[repo+"@"+d.String()], g.manifests[repo+"@"+ref] = e, e
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusCreated)
		return
	}
	e, ok := g.manifests[repo+"@"+ref]
	if !ok {
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
		return
	}
	w.Header().Set("Content-Type", e.mediaType)
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(e.data).String())
	w.Header().Set("Content-Length", strconv.Itoa(len(e.data)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(e.data)
	}
}

func (g *registry) blob(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) {
	g.mu.Lock()
	data, ok := g.blobs[d]
	ok = ok && g.owned[repo+string(d)]
	hide := g.hideRanges
	g.mu.Unlock()
	if !ok {
		fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown")
		return
	}
	if hide {
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
		_, _ = w.Write(data)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", zeroTime, bytes.NewReader(data))
}

func (g *registry) upload(w http.ResponseWriter, r *http.Request, repo, id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch r.Method {
	case http.MethodPost:
		if d := r.URL.Query().Get("mount"); d != "" && g.owned[r.URL.Query().Get("from")+d] {
			g.owned[repo+d] = true
			w.WriteHeader(http.StatusCreated)
			return
		}
		g.uploads++
		w.Header().Set("Location", fmt.Sprintf("/v2/%s/blobs/uploads/%d", repo, g.uploads))
		w.WriteHeader(http.StatusAccepted)
	case http.MethodPut:
		data, err := io.ReadAll(r.Body)
		d := digest.Digest(r.URL.Query().Get("digest"))
		if err != nil || digest.FromBytes(data) != d {
			fail(w, http.StatusBadRequest, "DIGEST_INVALID", "provided digest did not match uploaded content")
			return
		}
		g.blobs[d], g.owned[repo+string(d)] = data, true
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

// put stores an image of the given layers directly and returns its manifest's descriptor.
func (g *registry) put(t *testing.T, repo, tag string, img testImage) ocispec.Descriptor {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	config, layers, manifest := img.build(t)
	for _, b := range append(layers, config) {
		d := digest.FromBytes(b)
		g.blobs[d], g.owned[repo+string(d)] = b, true
	}
	return g.putManifestLocked(repo, tag, ocispec.MediaTypeImageManifest, manifest)
}

func (g *registry) putManifest(repo, tag, mediaType string, data []byte) ocispec.Descriptor {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.putManifestLocked(repo, tag, mediaType, data)
}

func (g *registry) putManifestLocked(repo, tag, mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	e := manifestEntry{mediaType: mediaType, data: data}
	g.manifests[repo+"@"+d.String()] = e
	if tag != "" {
		g.manifests[repo+"@"+tag] = e
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}
