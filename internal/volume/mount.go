package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// Options of the local driver: what mount(8) would be told.
const (
	optionType   = "type"
	optionMount  = "o"
	optionDevice = "device"
	optionSize   = "size"
)

// resolveTimeout bounds looking up the name of a file server.
const resolveTimeout = 10 * time.Second

// checkOptions validates the local driver's options, in docker's words.
func checkOptions(o map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(o)) {
		switch k {
		case optionType, optionMount, optionDevice:
		case optionSize:
			return errdefs.New(errdefs.ErrUnsupported, "option \"size\" is not supported: it needs a file system with project quotas; use type=tmpfs with o=size=…")
		default:
			return errdefs.New(errdefs.ErrInvalid, "invalid option: %q", k)
		}
	}
	needs := map[string][]string{optionDevice: {optionType}, optionType: {optionDevice}, optionMount: {optionDevice, optionType}}
	for _, k := range slices.Sorted(maps.Keys(needs)) {
		for _, other := range needs[k] {
			if o[k] != "" && o[other] == "" {
				return errdefs.New(errdefs.ErrInvalid, "missing required option: %q", other)
			}
		}
	}
	return nil
}

// mountOptions mounts what a volume's options describe, unless it is mounted: a reboot takes
// mounts away, so that this is looked at before each start of a container. The kernel's refusal
// is ErrInvalid.
func (s *Store) mountOptions(v Volume) error {
	if v.Options[optionDevice] == "" {
		return nil
	}
	lock := s.fillLock(v.Name)
	lock.Lock()
	defer lock.Unlock()
	mounted, err := mountinfo.Mounted(v.Path)
	if err != nil {
		return fmt.Errorf("mount volume %s: %w", v.Name, err)
	}
	if mounted {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
	defer cancel()
	m, err := parseMount(ctx, v.Options)
	if err != nil {
		return errdefs.New(errdefs.ErrInvalid, "mount volume %s: %w", v.Name, err)
	}
	if err := m.apply(v.Path); err != nil {
		return errdefs.New(errdefs.ErrInvalid, "failed to mount local volume: mount %s:%s, flags: %#x: %w", m.device, v.Path, m.flags, err)
	}
	return nil
}

// Teardown unmounts the volumes that have options. Call it when no container runs any more:
// what was in a tmpfs is lost then. The volumes stay on record.
func (s *Store) Teardown() error {
	var errs []error
	for _, v := range s.List() {
		if v.Options[optionDevice] == "" {
			continue
		}
		if err := unmount(v.Path); err != nil {
			errs = append(errs, fmt.Errorf("unmount volume %s: %w", v.Name, err))
		}
	}
	return errors.Join(errs...)
}

// mount is the arguments of mount(2).
type mount struct {
	device, fstype string
	flags          uintptr
	data           string
}

func mountFlag(option string) (set, clear uintptr, ok bool) {
	flags := map[string][2]uintptr{
		"defaults": {}, "rw": {0, unix.MS_RDONLY}, "ro": {unix.MS_RDONLY, 0},
		"bind": {unix.MS_BIND, 0}, "rbind": {unix.MS_BIND | unix.MS_REC, 0},
		"suid": {0, unix.MS_NOSUID}, "nosuid": {unix.MS_NOSUID, 0}, "dev": {0, unix.MS_NODEV}, "nodev": {unix.MS_NODEV, 0},
		"exec": {0, unix.MS_NOEXEC}, "noexec": {unix.MS_NOEXEC, 0}, "sync": {unix.MS_SYNCHRONOUS, 0}, "async": {0, unix.MS_SYNCHRONOUS},
		"dirsync": {unix.MS_DIRSYNC, 0}, "atime": {0, unix.MS_NOATIME}, "noatime": {unix.MS_NOATIME, 0},
		"diratime": {0, unix.MS_NODIRATIME}, "nodiratime": {unix.MS_NODIRATIME, 0}, "relatime": {unix.MS_RELATIME, 0},
		"norelatime": {0, unix.MS_RELATIME}, "strictatime": {unix.MS_STRICTATIME, 0}, "nostrictatime": {0, unix.MS_STRICTATIME},
	}
	f, ok := flags[option]
	return f[0], f[1], ok
}

// parseMount turns the driver's options into what the kernel takes.
func parseMount(ctx context.Context, o map[string]string) (mount, error) {
	m := mount{device: o[optionDevice], fstype: o[optionType]}
	var data []string
	for opt := range strings.SplitSeq(o[optionMount], ",") {
		if opt == "" {
			continue
		}
		if set, clear, ok := mountFlag(opt); ok {
			m.flags = m.flags&^clear | set
			continue
		}
		// The kernel's NFS client takes addresses only.
		if host, ok := strings.CutPrefix(opt, "addr="); ok && strings.HasPrefix(m.fstype, "nfs") {
			addrs, err := new(net.Resolver).LookupHost(ctx, host)
			if err != nil {
				return m, fmt.Errorf("option %s: %w", opt, err)
			}
			opt = "addr=" + addrs[0]
		}
		data = append(data, opt)
	}
	m.data = strings.Join(data, ",")
	return m, nil
}

func (m mount) apply(target string) error {
	if err := unix.Mount(m.device, target, m.fstype, m.flags, m.data); err != nil {
		return err
	}
	// The kernel ignores other flags when it makes a bind mount.
	const bind = unix.MS_BIND | unix.MS_REC
	if m.flags&unix.MS_BIND != 0 && m.flags&^bind != 0 {
		if err := unix.Mount("", target, "", m.flags&^unix.MS_REC|unix.MS_REMOUNT, ""); err != nil {
			return errors.Join(err, unmount(target))
		}
	}
	return nil
}

// unmount takes away all that is mounted on path, at most a few layers.
func unmount(path string) error {
	const layers = 16
	for range layers {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil // nothing is mounted there
		}
		if err != nil {
			return err
		}
	}
	return errdefs.New(errdefs.ErrConflict, "%s: more than %d mounts on top of each other", path, layers)
}

// checkNoMounts makes sure that removing the tree at path removes nothing of another one.
func checkNoMounts(path string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return errdefs.New(errdefs.ErrConflict, "%s is mounted inside it; unmount that first", mounts[0].Mountpoint)
	}
	return nil
}
