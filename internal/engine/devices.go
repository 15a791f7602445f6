package engine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

func errorIs(err, target error) bool { return errors.Is(err, target) }

// nodeName is the machine's host name.
func nodeName() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "localhost"
	}
	return string(bytes.TrimRight(u.Nodename[:], "\x00"))
}

// maxHostDevices bounds what --privileged copies from /dev.
const maxHostDevices = 4096

// hostDevices resolves the devices a container asks for; a privileged one gets all of the node's.
func hostDevices(cfg ContainerConfig) ([]specs.LinuxDevice, []specs.LinuxDeviceCgroup, error) {
	if cfg.Security.Privileged {
		d, err := allDevices()
		return d, nil, err
	}
	var (
		nodes []specs.LinuxDevice
		rules []specs.LinuxDeviceCgroup
	)
	for _, d := range cfg.Devices {
		n, err := deviceNode(d.HostPath, d.Path)
		if err != nil {
			return nil, nil, errdefs.New(errdefs.ErrInvalid, "error gathering device information while adding custom device %q: %w", d.HostPath, err)
		}
		access := d.Permissions
		if access == "" {
			access = "rwm"
		}
		nodes = append(nodes, n)
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: n.Type, Major: &n.Major, Minor: &n.Minor, Access: access})
	}
	return nodes, rules, nil
}

func deviceNode(host, inside string) (specs.LinuxDevice, error) {
	if inside == "" {
		inside = host
	}
	var st unix.Stat_t
	if err := unix.Stat(host, &st); err != nil {
		return specs.LinuxDevice{}, err
	}
	typ := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		typ = "c"
	case unix.S_IFBLK:
		typ = "b"
	default:
		return specs.LinuxDevice{}, fmt.Errorf("not a device node")
	}
	mode := os.FileMode(st.Mode & 0o7777)
	return specs.LinuxDevice{
		Path: inside, Type: typ, Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
	}, nil
}

func allDevices() ([]specs.LinuxDevice, error) {
	var out []specs.LinuxDevice
	skip := map[string]bool{"/dev/pts": true, "/dev/shm": true, "/dev/fd": true, "/dev/mqueue": true, "/dev/console": true, "/dev/.lxc": true, "/dev/.udev": true}
	err := filepath.WalkDir("/dev", func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return nil // devices come and go
		}
		if skip[p] {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type()&os.ModeDevice == 0 || strings.HasPrefix(p, "/dev/tty") && p == "/dev/tty" {
			return nil
		}
		if n, err := deviceNode(p, p); err == nil && len(out) < maxHostDevices {
			out = append(out, n)
		}
		return nil
	})
	return out, err
}
