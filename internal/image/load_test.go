package image_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
	"berth/internal/image"
	"berth/internal/image/archive"
)

// archived is an image in a docker archive.
type archived struct {
	img  testImage
	tags []string
}

// dockerArchive is what docker save wrote before version 25.
func dockerArchive(t *testing.T, all []archived) []byte {
	t.Helper()
	var entries []entry
	var index []map[string]any
	for n, a := range all {
		config, _, _ := a.img.build(t)
		name := digest.FromBytes(config).Encoded() + ".json"
		entries = append(entries, entry{name: name, data: string(config)})
		layers := []string{}
		for i, l := range a.img.layers {
			p := fmt.Sprintf("%d-%d/layer.tar", n, i)
			entries = append(entries, entry{name: p, data: string(l)})
			layers = append(layers, p)
		}
		index = append(index, map[string]any{"Config": name, "RepoTags": a.tags, "Layers": layers})
	}
	m, _ := json.Marshal(index)
	return tarOf(t, append(entries, entry{name: "manifest.json", data: string(m)})...)
}

func TestLoadDockerArchive(t *testing.T) {
	s, dir := newStore(t)
	data := dockerArchive(t, []archived{
		{img: threeLayers(t), tags: []string{"app:1", "app:2", "example.com/x/y:z"}},
		{img: testImage{layers: [][]byte{bigLayer(t, 1, 200<<10)}}},
		{img: testImage{}, tags: []string{"empty:latest"}},
	})
	var rec recorder
	images, err := s.Load(t.Context(), bytes.NewReader(data), rec.progress)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"docker.io/library/app:1", "docker.io/library/app:2", "example.com/x/y:z"}
	if diff := cmp.Diff(want, images[0].Names); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"bin/a": "a2", "etc/y": "y"}, tree(t, s, images[0].ID)); diff != "" {
		t.Error(diff)
	}
	if len(images[1].Names) != 0 || rec.count("Loaded image ID: "+images[1].ID.String()) != 1 || rec.count("Loaded image: app:1") != 1 {
		t.Errorf("unnamed image: %v", images[1].Names)
	}
	if lower, err := s.RootFS(t.Context(), images[2].ID); err != nil || len(lower) != 1 {
		t.Errorf("empty image: %v, %v", lower, err)
	}
	gc(t, s)
	for _, how := range []string{"gzip", "zstd"} {
		again, err := s.Load(t.Context(), bytes.NewReader(squeeze(t, how, data)), nil)
		if err != nil || again[0].ID != images[0].ID {
			t.Errorf("%s: %v", how, err)
		}
	}
	_, ingests, _ := leftovers(t, dir)
	if len(ingests) > 0 {
		t.Errorf("ingests left: %v", ingests)
	}
}

// TestLoadOCIIndex loads a layout whose index leads to another index, of which one platform is
// missing, as builders export it.
func TestLoadOCIIndex(t *testing.T) {
	config, layers, manifest := threeLayers(t).build(t)
	desc := func(mt string, b []byte, p *ocispec.Platform) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mt, Digest: digest.FromBytes(b), Size: int64(len(b)), Platform: p}
	}
	inner, _ := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{
		desc(ocispec.MediaTypeImageManifest, []byte("absent"), &ocispec.Platform{OS: "linux", Architecture: "s390x"}),
		desc(ocispec.MediaTypeImageManifest, manifest, &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}),
	}})
	root := desc(ocispec.MediaTypeImageIndex, inner, nil)
	root.Annotations = map[string]string{"org.opencontainers.image.ref.name": "team/app:3"}
	outer, _ := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{root}})
	entries := []entry{{name: "oci-layout", data: `{"imageLayoutVersion":"1.0.0"}`}, {name: "index.json", data: string(outer)}}
	for _, b := range append(layers, config, manifest, inner) {
		entries = append(entries, entry{name: "./blobs/sha256/" + digest.FromBytes(b).Encoded(), data: string(b)})
	}
	s, _ := newStore(t)
	images, err := s.Load(t.Context(), bytes.NewReader(tarOf(t, entries...)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(images) != 1 || images[0].Names[0] != "docker.io/team/app:3" || images[0].Target.Digest != root.Digest || images[0].Manifest.Digest != digest.FromBytes(manifest) {
		t.Errorf("%+v", images)
	}
	gc(t, s)
	if diff := cmp.Diff(map[string]string{"bin/a": "a2", "etc/y": "y"}, tree(t, s, images[0].ID)); diff != "" {
		t.Error(diff)
	}
	// Pushing an index of which a part is not here sends this platform's part.
	g := newRegistry(t)
	if err := s.Tag(t.Context(), "team/app:3", g.host()+"/app:3"); err != nil {
		t.Fatal(err)
	}
	if d, err := s.Push(t.Context(), g.host()+"/app:3", image.Credentials{}, nil); err != nil || d != images[0].Manifest.Digest {
		t.Errorf("pushed %s, %v", d, err)
	}
}

func TestLoadLinkedLayers(t *testing.T) {
	s, _ := newStore(t)
	img := testImage{layers: [][]byte{bigLayer(t, 1, 100<<10), bigLayer(t, 1, 100<<10)}}
	config, _, _ := img.build(t)
	data := tarOf(t,
		entry{name: "c.json", data: string(config)},
		entry{name: "a/layer.tar", data: string(img.layers[0])},
		entry{name: "b/layer.tar", link: "../a/layer.tar"},
		entry{name: "manifest.json", data: `[{"Config":"c.json","RepoTags":["l:1"],"Layers":["a/layer.tar","b/layer.tar"]}]`},
	)
	if _, err := s.Load(t.Context(), bytes.NewReader(data), nil); err != nil {
		t.Fatal(err)
	}
}

func TestLoadRefusals(t *testing.T) {
	s, dir := newStore(t)
	good := dockerArchive(t, []archived{{img: testImage{layers: [][]byte{bigLayer(t, 1, 300<<10), threeLayers(t).layers[0]}}, tags: []string{"a:1"}}})
	wrong := threeLayers(t)
	wrong.diffs = []digest.Digest{digest.FromString("1"), digest.FromString("2"), digest.FromString("3")}
	big := string(bigLayer(t, 1, 200<<10))
	idx := func(d digest.Digest, size int) string {
		b, _ := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageManifest, Digest: d, Size: int64(size)}}})
		return string(b)
	}
	for _, c := range []struct {
		name string
		data []byte
		kind error
		text string
	}{
		{"nothing", nil, errdefs.ErrInvalid, "empty"},
		{"junk", []byte(strings.Repeat("junk", 1000)), errdefs.ErrInvalid, "cannot be read"},
		{"truncated", good[:200<<10], errdefs.ErrInvalid, "truncated"},
		{"truncated gzip", squeeze(t, "gzip", good)[:100<<10], errdefs.ErrInvalid, "truncated"},
		{"no manifest", tarOf(t, entry{name: "x", data: "y"}), errdefs.ErrInvalid, "not an image archive"},
		{"old format", tarOf(t, entry{name: "repositories", data: "{}"}), errdefs.ErrUnsupported, "before 1.10"},
		{"bad JSON", tarOf(t, entry{name: "manifest.json", data: "{"}), errdefs.ErrInvalid, "not valid"},
		{"no images", tarOf(t, entry{name: "manifest.json", data: "[]"}), errdefs.ErrInvalid, "names no image"},
		{"missing config", tarOf(t, entry{name: "manifest.json", data: `[{"Config":"x"}]`}), errdefs.ErrInvalid, "lacks"},
		{"link out", tarOf(t, entry{name: "c", link: "../../../../etc/passwd"}, entry{name: "manifest.json", data: `[{"Config":"c"}]`}), errdefs.ErrInvalid, "lacks"},
		{"link loop", tarOf(t, entry{name: "c", link: "c"}, entry{name: "manifest.json", data: `[{"Config":"c"}]`}), errdefs.ErrInvalid, "lacks"},
		{"wrong diff IDs", dockerArchive(t, []archived{{img: wrong, tags: []string{"a:1"}}}), errdefs.ErrDataLoss, "invalid diffID"},
		{"bad name", dockerArchive(t, []archived{{img: threeLayers(t), tags: []string{"UPPER:1"}}}), errdefs.ErrInvalid, "must be lowercase"},
		{"blob of other digest", tarOf(t, entry{name: "blobs/sha256/" + digest.FromString("x").Encoded(), data: "y"}), errdefs.ErrDataLoss, "does not match its digest"},
		{"big blob of other digest", tarOf(t, entry{name: "blobs/sha256/" + digest.FromString("x").Encoded(), data: big}), errdefs.ErrDataLoss, "does not match its digest"},
		{"blob path", tarOf(t, entry{name: "blobs/sha256/abc", data: "y"}), errdefs.ErrInvalid, "is no blob"},
		{"missing blob", tarOf(t, entry{name: "index.json", data: idx(digest.FromString("x"), 1)}), errdefs.ErrInvalid, "lacks blob"},
		{"bad digest", tarOf(t, entry{name: "index.json", data: idx("sha256:..", 1)}), errdefs.ErrInvalid, "invalid digest"},
		{"unknown algorithm", tarOf(t, entry{name: "index.json", data: idx("md5:abc", 1)}), errdefs.ErrInvalid, "invalid digest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.Load(t.Context(), bytes.NewReader(c.data), nil)
			wantKind(t, err, c.kind, c.text)
			wantEmpty(t, dir)
			if all, err := s.List(t.Context()); err != nil || len(all) > 0 {
				t.Errorf("%d images, %v", len(all), err)
			}
		})
	}
}

// TestLoadHostileLayers unpacks layers that try to write outside of their directory.
func TestLoadHostileLayers(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	rel := strings.Repeat("../", 20)
	for name, layers := range map[string][][]byte{
		"dots":               {tarOf(t, entry{name: rel + victim, data: "evil"})},
		"absolute":           {tarOf(t, entry{name: victim, data: "evil"})},
		"symlink to dir":     {tarOf(t, entry{name: "d", link: filepath.Dir(victim)}, entry{name: "d/victim", data: "evil"})},
		"relative symlink":   {tarOf(t, entry{name: "d", link: rel + filepath.Dir(victim)}, entry{name: "d/victim", data: "evil"})},
		"symlink to file":    {tarOf(t, entry{name: "f", link: victim}, entry{name: "f", data: "evil"})},
		"symlink layer 2":    {tarOf(t, entry{name: "d", link: filepath.Dir(victim)}), tarOf(t, entry{name: "d/victim", data: "evil"})},
		"hard link":          {tarOf(t, entry{name: "h", link: victim, hard: true}, entry{name: "h", data: "evil"})},
		"whiteout":           {tarOf(t, entry{name: "d", link: filepath.Dir(victim)}, entry{name: "d/.wh.victim"})},
		"whiteout layer 2":   {tarOf(t, entry{name: "d", link: filepath.Dir(victim)}), tarOf(t, entry{name: "d/.wh.victim"})},
		"whiteout of parent": {tarOf(t, entry{name: "x"}), tarOf(t, entry{name: ".wh..."})},
		"opaque":             {tarOf(t, entry{name: "d", link: filepath.Dir(victim)}, entry{name: "d/.wh..wh..opq"})},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := newStore(t)
			data := dockerArchive(t, []archived{{img: testImage{layers: layers}, tags: []string{"evil:1"}}})
			_, err := s.Load(t.Context(), bytes.NewReader(data), nil)
			t.Log(err)
			if got, err := os.ReadFile(victim); err != nil || string(got) != "untouched" {
				t.Fatalf("the victim was changed: %q, %v", got, err)
			}
		})
	}
}

// FuzzLoad flips, cuts and repeats parts of archives; whatever happens, nothing may remain of a
// refused archive, and nothing may panic.
func FuzzLoad(f *testing.F) {
	for seed := range uint64(6) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 2))
		var b bytes.Buffer
		if err := archive.Write(&b, archive.Spec{Name: "fuzz:1", Layers: []archive.Layer{{Files: []archive.File{{Path: "a/b", Data: []byte("c")}}}}}); err != nil {
			t.Fatal(err)
		}
		data := b.Bytes()
		if seed%2 == 0 {
			data = dockerArchive(t, []archived{{img: threeLayers(t), tags: []string{"fuzz:1"}}})
		}
		s, dir := newStore(t)
		for range 15 {
			bad := bytes.Clone(data)
			switch rng.IntN(3) {
			case 0:
				for range 1 + rng.IntN(8) {
					bad[rng.IntN(len(bad))] ^= byte(1 << rng.IntN(8))
				}
			case 1:
				bad = bad[:rng.IntN(len(bad))]
			case 2:
				at := rng.IntN(len(bad)) &^ 511
				bad = append(bad[:at:at], bad[rng.IntN(len(bad))&^511:]...)
			}
			images, err := s.Load(t.Context(), bytes.NewReader(bad), nil)
			if err != nil {
				if errdefs.Kind(err) == nil || strings.Contains(err.Error(), "\n") {
					t.Errorf("seed %d: error without kind or of several lines: %q", seed, err)
				}
				continue
			}
			for _, img := range images {
				if _, err := s.Remove(t.Context(), img.ID.String(), true, true, nobody); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
					t.Fatal(err)
				}
			}
			gc(t, s)
		}
		wantEmpty(t, dir)
	})
}

func TestSaveRoundTrip(t *testing.T) {
	s, _ := newStore(t)
	g := newRegistry(t)
	g.put(t, "app", "latest", threeLayers(t))
	pulled, err := s.Pull(t.Context(), g.host()+"/app", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"my/app:1", "my/app:2", "other:x"} {
		if err := s.Tag(t.Context(), pulled.ID.String(), n); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		refs []string
		want []string
	}{
		{[]string{"my/app"}, []string{"docker.io/my/app:1", "docker.io/my/app:2"}},
		{[]string{"my/app:1", "other:x", "my/app:1"}, []string{"docker.io/library/other:x", "docker.io/my/app:1"}},
		{[]string{pulled.ID.Encoded()[:12]}, nil},
	} {
		var b bytes.Buffer
		if err := s.Save(t.Context(), &b, c.refs); err != nil {
			t.Fatal(err)
		}
		other, _ := newStore(t)
		images, err := other.Load(t.Context(), &b, nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, images[0].Names); diff != "" || len(images) != 1 || images[0].ID != pulled.ID {
			t.Errorf("%v: %s", c.refs, diff)
		}
		if diff := cmp.Diff(tree(t, s, pulled.ID), tree(t, other, images[0].ID)); diff != "" {
			t.Error(diff)
		}
	}
	wantKind(t, s.Save(t.Context(), &bytes.Buffer{}, []string{"nope"}), errdefs.ErrNotFound, "No such image: nope:latest")
}

func TestBuiltArchive(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "from-dir"), []byte("d"), 0o640); err != nil {
		t.Fatal(err)
	}
	spec := archive.Spec{
		Name:        "built:1",
		Config:      ocispec.ImageConfig{Cmd: []string{"/x"}, Env: []string{"A=b"}},
		Healthcheck: &archive.Healthcheck{Test: []string{"CMD", "/x"}, Interval: time.Second},
		Layers: []archive.Layer{
			{Comment: "files", Files: []archive.File{{Path: "/usr/bin/x", Mode: 0o755, Data: []byte("x")}, {Path: "bin", Symlink: "usr/bin"}}},
			{Directory: dir},
			{Tar: bytes.NewReader(tarOf(t, entry{name: "from-tar", data: "t"}))},
		},
	}
	var b bytes.Buffer
	if err := archive.Write(&b, spec); err != nil {
		t.Fatal(err)
	}
	first := bytes.Clone(b.Bytes())
	b.Reset()
	spec.Layers[2].Tar = bytes.NewReader(tarOf(t, entry{name: "from-tar", data: "t"}))
	if err := archive.Write(&b, spec); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, b.Bytes()) {
		t.Error("the same spec gave different bytes")
	}
	s, _ := newStore(t)
	images, err := s.Load(t.Context(), &b, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"docker.io/library/built:1"}, images[0].Names); diff != "" {
		t.Error(diff)
	}
	want := map[string]string{"usr/bin/x": "x", "from-dir": "d", "from-tar": "t"}
	if diff := cmp.Diff(want, tree(t, s, images[0].ID)); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(string(images[0].DockerConfig), `"Interval":1000000000`) {
		t.Errorf("config %s", images[0].DockerConfig)
	}
	if err := archive.Write(&b, archive.Spec{Name: "Bad Name"}); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("bad name: %v", err)
	}
}

// slowAfter serves blobs up to limit bytes, says so, and then waits until the client goes away.
func slowAfter(g *registry, limit int, reached chan<- struct{}) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		d := digest.Digest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
		g.mu.Lock()
		data := g.blobs[d]
		g.mu.Unlock()
		if !strings.Contains(r.URL.Path, "/blobs/") || len(data) < limit || r.Header.Get("Range") != "" {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		_, _ = w.Write(data[:limit])
		w.(http.Flusher).Flush()
		select {
		case reached <- struct{}{}:
		default:
		}
		<-r.Context().Done()
		return true
	}
}

// partialSize is the size of the largest partial download below dir.
func partialSize(dir string) int64 {
	files, _ := filepath.Glob(filepath.Join(dir, "content/ingest/*/data"))
	var most int64
	for _, f := range files {
		if st, err := os.Stat(f); err == nil {
			most = max(most, st.Size())
		}
	}
	return most
}
