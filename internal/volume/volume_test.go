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
		{volume.Config{Name: "ok", Options: map[string]string{"type": "tmpfs"}}, errdefs.ErrInvalid},
		{volume.Config{Name: "ok", Options: map[string]string{"device": "tmpfs"}}, errdefs.ErrInvalid},
		{volume.Config{Name: "ok", Options: map[string]string{"colour": "red"}}, errdefs.ErrInvalid},
		{volume.Config{Name: "ok", Options: map[string]string{"size": "1g"}}, errdefs.ErrUnsupported},
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
	for _, p := range []string{"stray/_data", "data/_data.new/half", ".removed-old/_data/f", "kept/_data/f"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, dir, r)
	if _, err := s.Get("kept"); err != nil {
		t.Errorf("data without a record: %v", err)
	}
	for _, p := range []string{"stray", "data/_data.new", ".removed-old"} {
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

func TestMountedVolumes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	ctx, dir, host, r := context.Background(), t.TempDir(), t.TempDir(), records{}
	s := open(t, dir, r)
	t.Cleanup(func() {
		for _, v := range s.List() {
			_ = syscall.Unmount(v.Path, syscall.MNT_DETACH)
		}
	})
	if err := os.WriteFile(filepath.Join(host, "precious"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	bind := map[string]string{"type": "none", "o": "bind,ro", "device": host}
	for name, options := range map[string]map[string]string{
		"bound": bind, "memory": {"type": "tmpfs", "o": "size=1m,mode=0700,noexec", "device": "tmpfs"},
		"broken": {"type": "none", "o": "bind", "device": filepath.Join(host, "missing")},
	} {
		if _, err := s.Create(ctx, volume.Config{Name: name, Options: options}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Create(ctx, volume.Config{Name: "memory", Options: bind}); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("other options: %v", err)
	}
	path, err := s.Path("bound")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(path, "precious")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(path, "f"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write to a read-only bind: %v", err)
	}
	if path, err = s.Path("memory"); err != nil {
		t.Fatal(err)
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil || st.Type != 0x01021994 || st.Blocks*uint64(st.Bsize) != 1<<20 {
		t.Errorf("tmpfs: %+v, %v", st, err)
	}
	s = open(t, dir, r) // a restart mounts nothing twice
	if _, err := s.Path("memory"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Path("broken"); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "failed to mount local volume: mount "+host+"/missing") {
		t.Errorf("missing device: %v", err)
	}
	// Removing the volume leaves what is bound there alone.
	if err := s.Remove(ctx, "bound"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(host, "precious")); err != nil {
		t.Fatalf("the bound directory lost its files: %v", err)
	}
	if err := s.Teardown(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Statfs(path, &st); err != nil || st.Type == 0x01021994 {
		t.Errorf("still mounted: %v", err)
	}
	// What somebody mounted deeper is not removed either.
	v, err := s.Create(ctx, volume.Config{Name: "deep"})
	if err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(v.Path, "sub")
	if err := errors.Join(os.Mkdir(sub, 0o700), syscall.Mount(host, sub, "", syscall.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	err = s.Remove(ctx, "deep")
	if !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("remove with a mount inside: %v", err)
	}
	if err := syscall.Unmount(sub, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ctx, "deep"); err != nil {
		t.Error(err)
	}
}
