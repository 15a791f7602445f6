package volume_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"berth/internal/errdefs"
	"berth/internal/volume"
)

type records map[string]json.RawMessage

func (r records) Put(kind, key string, v any) error {
	b, err := json.Marshal(v)
	r[kind+"/"+key] = b
	return err
}
func (r records) Delete(kind, key string) error { delete(r, kind+"/"+key); return nil }
func (r records) Each(kind string, f func(string, json.RawMessage) error) error {
	for k, v := range r {
		if name, ok := strings.CutPrefix(k, kind+"/"); ok {
			if err := f(name, v); err != nil {
				return err
			}
		}
	}
	return nil
}

func open(t *testing.T, dir string, r records) *volume.Store {
	t.Helper()
	s, err := volume.Open(dir, r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestLifeOfAVolume(t *testing.T) {
	ctx, dir, r := context.Background(), t.TempDir(), records{}
	s := open(t, dir, r)
	v, err := s.Create(ctx, volume.Config{Name: "data", Labels: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(v.Path, "f"), []byte("123"), 0o600); err != nil {
		t.Fatal(err)
	}
	anon, err := s.Create(ctx, volume.Config{})
	if err != nil || len(anon.Name) != 64 || !anon.Anonymous {
		t.Fatalf("anonymous volume %+v, %v", anon, err)
	}
	s = open(t, dir, r) // after a restart
	again, err := s.Create(ctx, volume.Config{Name: "data"})
	if err != nil || again.Labels["a"] != "b" {
		t.Fatalf("asked again: %+v, %v", again, err)
	}
	if n, err := s.SizeBytes(ctx, "data"); n != 3 || err != nil {
		t.Fatalf("size %d, %v", n, err)
	}
	if err := s.Remove(ctx, "data"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("data"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatalf("after removal: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "data")); !os.IsNotExist(err) {
		t.Fatalf("the directory is still there: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	s := open(t, t.TempDir(), records{})
	for _, c := range []struct {
		cfg  volume.Config
		kind error
	}{
		{volume.Config{Name: "a/b"}, errdefs.ErrInvalid},
		{volume.Config{Name: ".."}, errdefs.ErrInvalid},
		{volume.Config{Name: "x"}, errdefs.ErrInvalid},
		{volume.Config{Name: "ok", Driver: "nfs"}, errdefs.ErrUnsupported},
		{volume.Config{Name: "ok", Options: map[string]string{"type": "tmpfs"}}, errdefs.ErrUnsupported},
	} {
		if _, err := s.Create(context.Background(), c.cfg); !errors.Is(err, c.kind) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
}

func TestCrashLeftoversAreSwept(t *testing.T) {
	dir, r := t.TempDir(), records{}
	s := open(t, dir, r)
	if _, err := s.Create(context.Background(), volume.Config{Name: "data"}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"stray/_data", "data/_data.new/half"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir, r)
	for _, p := range []string{"stray", "data/_data.new"} {
		if _, err := os.Stat(filepath.Join(dir, p)); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", p, err)
		}
	}
}

func TestCopyUp(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give files away")
	}
	ctx, root := context.Background(), t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(secret, []byte("host"), 0o600))
	must(os.MkdirAll(filepath.Join(root, "var/lib/db"), 0o750))
	must(os.Chown(filepath.Join(root, "var/lib/db"), 99, 98))
	must(os.WriteFile(filepath.Join(root, "var/lib/db/f"), []byte("x"), 0o640))
	must(os.Link(filepath.Join(root, "var/lib/db/f"), filepath.Join(root, "var/lib/db/g")))
	must(os.Symlink(secret, filepath.Join(root, "var/lib/db/link")))
	must(os.Symlink(filepath.Dir(secret), filepath.Join(root, "escape")))
	s := open(t, t.TempDir(), records{})
	v, err := s.Create(ctx, volume.Config{Name: "data"})
	must(err)
	must(s.CopyUp(ctx, "data", root, "/var/lib/db"))
	st, err := os.Stat(v.Path)
	must(err)
	if sys := st.Sys().(*syscall.Stat_t); sys.Uid != 99 || sys.Gid != 98 || st.Mode().Perm() != 0o750 {
		t.Errorf("owner %d:%d mode %o", sys.Uid, sys.Gid, st.Mode().Perm())
	}
	f, err := os.Stat(filepath.Join(v.Path, "f"))
	must(err)
	if f.Sys().(*syscall.Stat_t).Nlink != 2 {
		t.Error("the hard link was copied as a file of its own")
	}
	if to, err := os.Readlink(filepath.Join(v.Path, "link")); err != nil || to != secret {
		t.Errorf("the symbolic link became %q, %v", to, err)
	}
	must(os.WriteFile(filepath.Join(v.Path, "f"), []byte("changed"), 0o640))
	must(s.CopyUp(ctx, "data", root, "/var/lib/db"))
	if b, _ := os.ReadFile(filepath.Join(v.Path, "f")); string(b) != "changed" {
		t.Error("a volume in use was filled again")
	}
	esc, err := s.Create(ctx, volume.Config{Name: "esc"})
	must(err)
	must(s.CopyUp(ctx, "esc", root, "/escape"))
	if _, err := os.Stat(filepath.Join(esc.Path, "secret")); !os.IsNotExist(err) {
		t.Errorf("a link in the image led to the host's files: %v", err)
	}
}
