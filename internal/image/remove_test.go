package image_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"berth/internal/errdefs"
	"berth/internal/image"
)

// loadOne loads an image with the given layers and names.
func loadOne(t *testing.T, s *image.Store, img testImage, tags ...string) image.Image {
	t.Helper()
	all, err := s.Load(t.Context(), bytes.NewReader(dockerArchive(t, []archived{{img: img, tags: tags}})), nil)
	if err != nil {
		t.Fatal(err)
	}
	return all[0]
}

func usedBy(running bool, names ...string) image.Users {
	return func(digest.Digest) ([]string, bool) { return names, running }
}

func results(untagged []string, deleted ...string) (out []image.RemoveResult) {
	for _, u := range untagged {
		out = append(out, image.RemoveResult{Untagged: u})
	}
	for _, d := range deleted {
		out = append(out, image.RemoveResult{Deleted: d})
	}
	return out
}

func TestRemove(t *testing.T) {
	container := strings.Repeat("c0ffee", 11)[:64]
	type step struct {
		ref   string
		force bool
		users image.Users
		want  func(id string, chains []string) []image.RemoveResult
		kind  error
		text  string
		left  []string // names afterwards; nil: the image is gone
	}
	all := func(names ...string) func(string, []string) []image.RemoveResult {
		return func(id string, chains []string) []image.RemoveResult {
			return results(names, append([]string{id}, chains...)...)
		}
	}
	only := func(names ...string) func(string, []string) []image.RemoveResult {
		return func(string, []string) []image.RemoveResult { return results(names) }
	}
	for _, c := range []struct {
		name  string
		tags  []string
		steps []step
	}{
		{"last name", []string{"a:1"}, []step{{ref: "a:1", want: all("a:1")}}},
		{"names one after the other", []string{"a:1", "b:1"}, []step{
			{ref: "a:1", want: only("a:1"), left: []string{"docker.io/library/b:1"}},
			{ref: "b:1", want: all("b:1")},
		}},
		{"by ID", []string{"a:1"}, []step{{ref: "ID", want: all("a:1")}}},
		{"by short ID", []string{"a:1"}, []step{{ref: "SHORT", want: all("a:1")}}},
		{"by ID with several names", []string{"a:1", "b:1"}, []step{
			{ref: "ID", kind: errdefs.ErrConflict, text: "(must be forced) - image is referenced in multiple repositories", left: []string{"docker.io/library/a:1", "docker.io/library/b:1"}},
			{ref: "ID", force: true, want: all("a:1", "b:1")},
		}},
		{"used by a running container", []string{"a:1"}, []step{
			{ref: "a:1", users: usedBy(true, container), kind: errdefs.ErrConflict, text: `conflict: unable to remove repository reference "a:1" (must force) - container c0ffeec0ffee is using its referenced image`, left: []string{"docker.io/library/a:1"}},
			{ref: "ID", force: true, users: usedBy(true, container), kind: errdefs.ErrConflict, text: "(cannot be forced) - image is being used by running container c0ffeec0ffee", left: []string{"docker.io/library/a:1"}},
			{ref: "a:1", force: true, users: usedBy(true, container), want: only("a:1"), left: []string{}},
			{ref: "ID", want: all()},
		}},
		{"used by a stopped container", []string{"a:1"}, []step{
			{ref: "ID", users: usedBy(false, "web"), kind: errdefs.ErrConflict, text: "(must be forced) - image is being used by stopped container web", left: []string{"docker.io/library/a:1"}},
			{ref: "a:1", users: usedBy(false, "web"), kind: errdefs.ErrConflict, text: "(must force)", left: []string{"docker.io/library/a:1"}},
			{ref: "a:1", force: true, users: usedBy(false, "web"), want: func(id string, _ []string) []image.RemoveResult { return results([]string{"a:1"}, id) }},
		}},
		{"unknown", []string{"a:1"}, []step{
			{ref: "b", kind: errdefs.ErrNotFound, text: "No such image: b:latest", left: []string{"docker.io/library/a:1"}},
			{ref: "UPPER", kind: errdefs.ErrInvalid, text: "invalid reference format", left: []string{"docker.io/library/a:1"}},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, dir := newStore(t)
			img := loadOne(t, s, threeLayers(t), c.tags...)
			var chains []string
			for i := range img.Config.RootFS.DiffIDs {
				chains = append([]string{chainID(img.Config.RootFS.DiffIDs[:i+1]).String()}, chains...)
			}
			for _, st := range c.steps {
				ref := strings.NewReplacer("ID", img.ID.String(), "SHORT", img.ID.Encoded()[:8]).Replace(st.ref)
				if st.users == nil {
					st.users = nobody
				}
				got, err := s.Remove(t.Context(), ref, st.force, true, st.users)
				if st.kind != nil {
					wantKind(t, err, st.kind, st.text)
				} else if err != nil {
					t.Fatal(err)
				} else if diff := cmp.Diff(st.want(img.ID.String(), chains), got); diff != "" {
					t.Error(diff)
				}
				after, err := s.Resolve(t.Context(), img.ID.String())
				switch {
				case st.left == nil && err == nil:
					t.Error("the image is still there")
				case st.left != nil && err != nil:
					t.Error(err)
				case len(st.left) > 0:
					if diff := cmp.Diff(st.left, after.Names); diff != "" {
						t.Error(diff)
					}
				}
			}
			if c.name == "used by a stopped container" {
				// The layers stay for the container, also over a collection, until it is gone.
				gc(t, s)
				if len(tree(t, s, img.ID)) == 0 {
					t.Error("the container lost its layers")
				}
				if l, err := s.List(t.Context()); err != nil || len(l) != 0 {
					t.Errorf("a removed image is listed: %v, %v", l, err)
				}
				if err := s.Release(t.Context(), img.ID); err != nil {
					t.Fatal(err)
				}
			}
			gc(t, s)
			if c.name != "unknown" {
				wantEmpty(t, dir)
			}
		})
	}
}

func chainID(diffs []digest.Digest) digest.Digest {
	chain := diffs[0]
	for _, d := range diffs[1:] {
		chain = digest.FromString(chain.String() + " " + d.String())
	}
	return chain
}

func TestRemoveKeepsSharedLayers(t *testing.T) {
	s, _ := newStore(t)
	base := threeLayers(t)
	a := loadOne(t, s, testImage{layers: base.layers[:2]}, "a:1")
	b := loadOne(t, s, base, "b:1")
	got, err := s.Remove(t.Context(), "b:1", false, true, nobody)
	if err != nil {
		t.Fatal(err)
	}
	want := results([]string{"b:1"}, b.ID.String(), chainID(b.Config.RootFS.DiffIDs).String())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	gc(t, s)
	if diff := cmp.Diff(map[string]string{"bin/a": "a2", "etc/x": "x"}, tree(t, s, a.ID)); diff != "" {
		t.Error(diff)
	}
	before, err := s.DiskUsage(t.Context())
	if err != nil || before != a.SizeBytes {
		t.Errorf("disk usage %d, %v; the image has %d", before, err, a.SizeBytes)
	}
}

func TestResolve(t *testing.T) {
	s, _ := newStore(t)
	img := loadOne(t, s, threeLayers(t), "busybox:latest", "localhost:5000/x/y:z")
	for i := range 20 { // so that one digit is ambiguous
		loadOne(t, s, testImage{config: `{"Labels":{"n":"` + strings.Repeat("x", i) + `"}}`})
	}
	for _, ref := range []string{
		"busybox", "busybox:latest", "docker.io/busybox", "library/busybox", "index.docker.io/library/busybox:latest", "localhost:5000/x/y:z",
		img.ID.String(), img.ID.Encoded(), img.ID.Encoded()[:12], "sha256:" + img.ID.Encoded()[:20], "busybox@" + img.Target.Digest.String(),
	} {
		if got, err := s.Resolve(t.Context(), ref); err != nil || got.ID != img.ID {
			t.Errorf("%s: %s, %v", ref, got.ID, err)
		}
	}
	ambiguous := ""
	seen := map[byte]bool{}
	all, err := s.List(t.Context())
	if err != nil || len(all) != 21 {
		t.Fatalf("%d images, %v", len(all), err)
	}
	for _, i := range all {
		d := i.ID.Encoded()[0]
		if seen[d] {
			ambiguous = string(d)
		}
		seen[d] = true
	}
	_, err = s.Resolve(t.Context(), ambiguous)
	wantKind(t, err, errdefs.ErrInvalid, "ambiguous")
	_, err = s.Resolve(t.Context(), "busybox@"+digest.FromString("x").String())
	wantKind(t, err, errdefs.ErrNotFound, "No such image")
	_, err = s.Resolve(t.Context(), digest.FromString("x").String())
	wantKind(t, err, errdefs.ErrNotFound, "No such image")
	_, err = s.RootFS(t.Context(), digest.FromString("x"))
	wantKind(t, err, errdefs.ErrNotFound, "No such image")
}

func TestTag(t *testing.T) {
	s, _ := newStore(t)
	a := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 1, 1000)}}, "a:1")
	b := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 2, 1000)}}, "b:1")
	if err := s.Tag(t.Context(), "a:1", "b:1"); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Resolve(t.Context(), "b:1"); err != nil || got.ID != a.ID {
		t.Errorf("b:1 is %s, %v", got.ID, err)
	}
	gc(t, s)
	if got, err := s.Resolve(t.Context(), b.ID.String()); err != nil || len(got.Names) != 0 {
		t.Errorf("the former b:1: %v, %v", got.Names, err)
	}
	// Naming a dangling image again makes it an ordinary one.
	if err := s.Tag(t.Context(), b.ID.Encoded()[:12], "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), "c", false, true, nobody); err != nil {
		t.Fatal(err)
	}
	_, err := s.Resolve(t.Context(), b.ID.String())
	wantKind(t, err, errdefs.ErrNotFound, "No such image")
	wantKind(t, s.Tag(t.Context(), "nope", "x"), errdefs.ErrNotFound, "No such image: nope:latest")
	wantKind(t, s.Tag(t.Context(), "a:1", "BAD"), errdefs.ErrInvalid, "must be lowercase")
	wantKind(t, s.Tag(t.Context(), "a:1", "x@"+a.Target.Digest.String()), errdefs.ErrInvalid, "refusing to create a tag with a digest reference")
	wantKind(t, s.Tag(t.Context(), "a:1", "sha256:abc"), errdefs.ErrInvalid, "refusing to create an ambiguous tag")
}

func TestPrune(t *testing.T) {
	s, dir := newStore(t)
	named := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 1, 100<<10)}}, "a:1")
	dangling := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 2, 100<<10)}})
	used := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 3, 100<<10)}})
	pinned := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 4, 100<<10)}}, "p:1")
	if _, err := s.Remove(t.Context(), "p:1", true, true, usedBy(false, "c")); err != nil {
		t.Fatal(err)
	}
	keep := func(img image.Image) bool { return img.ID == used.ID || img.ID == pinned.ID }
	got, freed, err := s.Prune(t.Context(), false, keep)
	if err != nil {
		t.Fatal(err)
	}
	want := results(nil, dangling.ID.String(), dangling.Config.RootFS.DiffIDs[0].String())
	if diff := cmp.Diff(want, got); diff != "" || freed < 100<<10 {
		t.Errorf("freed %d: %s", freed, diff)
	}
	gc(t, s)
	if len(tree(t, s, pinned.ID)) == 0 {
		t.Error("pinned layers are gone")
	}
	got, _, err = s.Prune(t.Context(), true, func(image.Image) bool { return false })
	if err != nil || len(got) != 5 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := s.Resolve(t.Context(), named.ID.String()); err == nil {
		t.Error("prune all left a named image")
	}
	gc(t, s)
	wantEmpty(t, dir)
}
