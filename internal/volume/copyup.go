package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	confs "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// CopyUp fills an empty volume with what the image has at path, as docker does when a container
// first mounts it. rootfs is the container's mounted root, in which nothing runs yet; links in
// it lead nowhere outside. A volume that no container ever had is filled at one stroke: a copy
// that was killed half-way is not seen.
func (s *Store) CopyUp(_ context.Context, name, rootfs, path string) error {
	v, err := s.Get(name)
	if err != nil {
		return err
	}
	lock := s.fillLock(name)
	lock.Lock()
	defer lock.Unlock()
	if empty, err := isEmpty(v.Path); err != nil || !empty {
		return errors.Join(err, s.markPopulated(name))
	}
	src, err := openDir(rootfs, path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return s.markPopulated(name)
	}
	if err != nil {
		return err
	}
	defer src.Close()
	from := "/proc/self/fd/" + strconv.Itoa(int(src.Fd()))
	if v, err = s.Get(name); err != nil {
		return err
	}
	if v.Populated || v.Options[optionDevice] != "" { // not ours to replace
		return copyInto(v.Path, from, src)
	}
	fresh := filepath.Join(s.dir, name, fillName)
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := os.Mkdir(fresh, 0o755); err != nil {
		return err
	}
	if err := copyInto(fresh, from, src); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	if err := unix.Rename(fresh, v.Path); err != nil {
		return errors.Join(err, os.RemoveAll(fresh))
	}
	return s.markPopulated(name)
}

// copyInto copies content, and the directory's own owner and mode.
func copyInto(dst, from string, src *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return err
	}
	if err := confs.CopyDir(dst, from); err != nil {
		return fmt.Errorf("copy the image's files into the volume: %w", err)
	}
	if err := os.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(dst, st.Mode&0o7777)
}

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if err == io.EOF {
		return true, nil
	}
	return false, err
}

func openDir(rootfs, path string) (*os.File, error) {
	root, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: rootfs, Err: err}
	}
	defer unix.Close(root)
	rel := clean(path)
	if rel == "" {
		rel = "."
	}
	fd, err := unix.Openat2(root, rel, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
