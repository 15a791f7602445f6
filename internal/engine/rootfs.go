package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

func (e *Engine) rootfsPath(id string) string { return filepath.Join(e.Root.Container(id), "rootfs") }

// mountRootfs mounts the container's overlay: the image's layers below its own directory. No
// database takes part in it. Mounting again after a restart of the container is free.
func (e *Engine) mountRootfs(ctx context.Context, cfg ContainerConfig) (string, error) {
	target := e.rootfsPath(cfg.ID)
	lower, err := e.Images.RootFS(ctx, digest.Digest(cfg.ImageID))
	if err != nil {
		return "", err
	}
	dir := e.Root.Container(cfg.ID)
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{upper, work, target} {
		if err := os.Mkdir(d, 0o755); err != nil && !os.IsExist(err) {
			return "", storageError("container directory", err)
		}
	}
	if mounted(target, dir) {
		return target, nil
	}
	// Left by a volatile mount that a crash or reboot cut; the kernel refuses to mount while it is there.
	if cfg.AutoRemove || cfg.Owner == OwnerCRI {
		if err := os.RemoveAll(filepath.Join(work, "work", "incompat")); err != nil {
			return "", err
		}
	}
	if err := mountOverlay(lower, upper, work, target, cfg.AutoRemove || cfg.Owner == OwnerCRI); err != nil {
		return "", storageError("mount the container's files", err)
	}
	return target, nil
}

// mounted tells whether target is on another file system than its parent.
func mounted(target, parent string) bool {
	var a, b unix.Stat_t
	return unix.Stat(target, &a) == nil && unix.Stat(parent, &b) == nil && a.Dev != b.Dev
}

// mountOverlay takes the classic form, which every kernel knows, where its one page of options
// suffices. Many layers go through the new mount API, one at a time; kernels before 6.5, which
// have no such option there, get the short names of their open directories.
func mountOverlay(lower []string, upper, work, target string, volatile bool) error {
	special := strings.ContainsAny(upper+strings.Join(lower, ""), `:,\`)
	if opts := overlayOptions(lower, upper, work, volatile); !special && len(opts) < os.Getpagesize() {
		return classicOverlay(target, opts)
	}
	err := fsmountOverlay(lower, upper, work, target, volatile)
	if errors.Is(err, unix.EINVAL) {
		return openOverlay(lower, upper, work, target, volatile)
	}
	return err
}

func overlayOptions(lower []string, upper, work string, volatile bool) string {
	opts := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + upper + ",workdir=" + work
	if volatile {
		opts += ",volatile"
	}
	return opts
}

func classicOverlay(target, opts string) error {
	if err := unix.Mount("overlay", target, "overlay", 0, opts); err != nil {
		return fmt.Errorf("overlay on %s: %w", target, err)
	}
	return nil
}

// openOverlay names the directories by descriptors: 125 layers fit into a page.
func openOverlay(lower []string, upper, work, target string, volatile bool) error {
	names := make([]string, 0, len(lower)+2)
	for _, dir := range append([]string{upper, work}, lower...) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("overlay on %s: %s: %w", target, dir, err)
		}
		defer unix.Close(fd)
		names = append(names, "/proc/self/fd/"+strconv.Itoa(fd))
	}
	opts := overlayOptions(names[2:], names[0], names[1], volatile)
	if len(opts) >= os.Getpagesize() {
		return fmt.Errorf("overlay on %s: %d layers are too many for this kernel: %w", target, len(lower), unix.E2BIG)
	}
	return classicOverlay(target, opts)
}

func fsmountOverlay(lower []string, upper, work, target string, volatile bool) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fs)
	set := [][2]string{{"source", "overlay"}}
	for _, l := range lower {
		set = append(set, [2]string{"lowerdir+", l})
	}
	set = append(set, [2]string{"upperdir", upper}, [2]string{"workdir", work})
	for _, kv := range set {
		if err := unix.FsconfigSetString(fs, kv[0], kv[1]); err != nil {
			return err
		}
	}
	if volatile {
		if err := unix.FsconfigSetFlag(fs, "volatile"); err != nil {
			return err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return err
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(m)
	return unix.MoveMount(m, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// unmountRootfs is idempotent, and takes away one mount above another as well.
func (e *Engine) unmountRootfs(id string) error {
	for {
		err := unix.Unmount(e.rootfsPath(id), unix.MNT_DETACH)
		if err == unix.EINVAL || err == unix.ENOENT {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount the files of container %s: %w", id, err)
		}
	}
}

// maxPasswdBytes bounds what is read of a container's passwd and group files.
const maxPasswdBytes = 4 << 20

// openInRoot opens a file of a container for reading; links in it lead nowhere outside.
func openInRoot(rootfs, name string) (*os.File, error) {
	dir, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, os.ErrNotExist // a FIFO or device here is an attack
	}
	return f, nil
}

func readInRoot(rootfs, name string) io.Reader {
	f, err := openInRoot(rootfs, name)
	if err != nil {
		return strings.NewReader("") // no such file: only numbers resolve
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPasswdBytes))
	if err != nil {
		return strings.NewReader("")
	}
	return strings.NewReader(string(b))
}

// resolveUser looks a user up in the container's own passwd and group files.
func resolveUser(rootfs, spec string, groups []string) (specs.User, string, error) {
	u, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, readInRoot(rootfs, "etc/passwd"), readInRoot(rootfs, "etc/group"))
	if err != nil {
		return specs.User{}, "", errdefs.New(errdefs.ErrInvalid, "unable to find user %s: %w", spec, err)
	}
	extra, err := user.GetAdditionalGroups(groups, readInRoot(rootfs, "etc/group"))
	if err != nil {
		return specs.User{}, "", errdefs.New(errdefs.ErrInvalid, "unable to find groups %s: %w", strings.Join(groups, ", "), err)
	}
	out := specs.User{UID: uint32(u.Uid), GID: uint32(u.Gid)}
	seen := map[int]bool{}
	for _, g := range append(append([]int{u.Gid}, u.Sgids...), extra...) {
		if !seen[g] {
			seen[g] = true
			out.AdditionalGids = append(out.AdditionalGids, uint32(g))
		}
	}
	return out, u.Home, nil
}

// WritableBytes implements ContainerAPI.
func (e *Engine) WritableBytes(ctx context.Context, ref string) (int64, error) {
	c, err := e.find(ref)
	if err != nil {
		return 0, err
	}
	var total int64
	err = filepath.WalkDir(filepath.Join(e.Root.Container(c.Config.ID), "upper"), func(_ string, d os.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			if os.IsNotExist(err) {
				return nil
			}
			return err
		}
		if d.Type().IsRegular() {
			if fi, err := d.Info(); err == nil {
				total += fi.Size()
			}
		}
		return nil
	})
	return total, err
}

// ParseSignal reads a signal by number or name, with or without SIG, as docker does.
func ParseSignal(s string) (int, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n <= 0 || n > 64 {
			return 0, errdefs.New(errdefs.ErrInvalid, "invalid signal: %s", s)
		}
		return n, nil
	}
	up := strings.ToUpper(s)
	name := strings.TrimPrefix(up, "SIG")
	if n := unix.SignalNum("SIG" + name); n != 0 {
		return int(n), nil
	}
	base, rest := 0, ""
	switch {
	case strings.HasPrefix(name, "RTMIN"):
		base, rest = 34, strings.TrimPrefix(name, "RTMIN")
	case strings.HasPrefix(name, "RTMAX"):
		base, rest = 64, strings.TrimPrefix(name, "RTMAX")
	}
	if base != 0 {
		if rest == "" {
			return base, nil
		}
		if n, err := strconv.Atoi(rest); err == nil && base+n >= 34 && base+n <= 64 {
			return base + n, nil
		}
	}
	return 0, errdefs.New(errdefs.ErrInvalid, "invalid signal: %s", s)
}
