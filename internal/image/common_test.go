package image_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"berth/internal/errdefs"
	"berth/internal/image"
)

var zeroTime time.Time

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		childPull(dir) // never returns
	}
	goleak.VerifyTestMain(m)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers needs root: owners and overlay attributes")
	}
}

func config(dir string) image.Config {
	return image.Config{Dir: dir, RetryDelay: 5 * time.Millisecond, Stall: 2 * time.Second, Log: slog.New(slog.DiscardHandler)}
}

func openStore(t *testing.T, c image.Config) *image.Store {
	t.Helper()
	needRoot(t)
	s, err := image.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newStore(t *testing.T) (*image.Store, string) {
	t.Helper()
	dir := t.TempDir()
	return openStore(t, config(dir)), dir
}

// entry is a file of a layer; a trailing slash makes a directory, link a symbolic link.
type entry struct {
	name, data, link string
	hard             bool
}

func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o755, Size: int64(len(e.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
		switch {
		case e.hard:
			h.Typeflag, h.Linkname = tar.TypeLink, e.link
		case e.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// testImage is an image to be served or archived.
type testImage struct {
	layers   [][]byte // uncompressed
	compress []string // per layer: "", gzip, zstd; missing is gzip
	arch     string
	config   string // the config object
	diffs    []digest.Digest
}

func squeeze(t *testing.T, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	switch how {
	case "gzip":
		w = gzip.NewWriter(&b)
	case "zstd":
		z, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	default:
		return data
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (i testImage) how(n int) string {
	if n < len(i.compress) {
		return i.compress[n]
	}
	return "gzip"
}

func (i testImage) build(t *testing.T) (config []byte, layers [][]byte, manifest []byte) {
	t.Helper()
	diffs := i.diffs
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	for n, l := range i.layers {
		if i.diffs == nil {
			diffs = append(diffs, digest.FromBytes(l))
		}
		blob := squeeze(t, i.how(n), l)
		layers = append(layers, blob)
		mt := ocispec.MediaTypeImageLayer
		if h := i.how(n); h != "" {
			mt += "+" + h
		}
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(blob), Size: int64(len(blob))})
	}
	config = i.configJSON(t, diffs)
	m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	manifest, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return config, layers, manifest
}

func (i testImage) configJSON(t *testing.T, diffs []digest.Digest) []byte {
	t.Helper()
	arch, cfg := i.arch, i.config
	if arch == "" {
		arch = runtime.GOARCH
	}
	if cfg == "" {
		cfg = `{"Cmd":["/bin/sh"]}`
	}
	if diffs == nil {
		diffs = []digest.Digest{}
	}
	d, err := json.Marshal(diffs)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(fmt.Sprintf(`{"created":"2020-01-02T03:04:05Z","architecture":%q,"os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":%s}}`, arch, cfg, d))
}

// threeLayers is an image whose layers add, replace and remove.
func threeLayers(t *testing.T) testImage {
	t.Helper()
	return testImage{
		layers: [][]byte{
			tarOf(t, entry{name: "bin/"}, entry{name: "bin/a", data: "a1"}, entry{name: "bin/b", data: "b1"}, entry{name: "etc/"}, entry{name: "etc/x", data: "x"}),
			tarOf(t, entry{name: "bin/a", data: "a2"}, entry{name: "bin/.wh.b"}),
			tarOf(t, entry{name: "etc/"}, entry{name: "etc/.wh..wh..opq"}, entry{name: "etc/y", data: "y"}),
		},
		compress: []string{"gzip", "zstd", ""},
	}
}

// bigLayer is an incompressible layer of some size, the same for the same seed.
func bigLayer(t *testing.T, seed uint64, size int) []byte {
	t.Helper()
	data := make([]byte, size)
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = src.Read(data)
	return tarOf(t, entry{name: fmt.Sprintf("big%d", seed), data: string(data)})
}

// recorder collects progress.
type recorder struct {
	mu  sync.Mutex
	all []image.Status
}

func (r *recorder) progress(s image.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, s)
}

func (r *recorder) count(action string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, s := range r.all {
		if strings.HasPrefix(s.Action, action) {
			n++
		}
	}
	return n
}

// leftovers lists what the content and snapshot directories hold: blobs, ingests, snapshots.
func leftovers(t *testing.T, dir string) (blobs, ingests, snapshots []string) {
	t.Helper()
	list := func(p string) []string {
		es, err := os.ReadDir(filepath.Join(dir, p))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		var out []string
		for _, e := range es {
			out = append(out, e.Name())
		}
		sort.Strings(out)
		return out
	}
	return list("content/blobs/sha256"), list("content/ingest"), list("snapshots/snapshots")
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	b, i, s := leftovers(t, dir)
	if len(b)+len(i)+len(s) > 0 {
		t.Errorf("left behind: blobs %v, ingests %v, snapshots %v", b, i, s)
	}
}

// wantKind checks an error's kind, that it is one line, and that it contains a text.
func wantKind(t *testing.T, err, kind error, text string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want %v: %s", kind, text)
	}
	if got := errdefs.Kind(err); got != kind {
		t.Errorf("error %q is of kind %v, want %v", err, got, kind)
	}
	if !strings.Contains(err.Error(), text) {
		t.Errorf("error %q lacks %q", err, text)
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q has several lines", err)
	}
}

// tree reads the image's files through its lower directories as overlayfs would show them.
func tree(t *testing.T, s *image.Store, id digest.Digest) map[string]string {
	t.Helper()
	lower, err := s.RootFS(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	mountOverlay(t, mnt, lower)
	out := map[string]string{}
	err = filepath.WalkDir(mnt, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(p)
		rel, _ := filepath.Rel(mnt, p)
		out[rel] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func gc(t *testing.T, s *image.Store) {
	t.Helper()
	if err := s.GC(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func nobody(digest.Digest) ([]string, bool) { return nil, false }
