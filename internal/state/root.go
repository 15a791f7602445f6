// Package state keeps what a node must remember: the layout of an instance's directories,
// atomic versioned files, and a small journalled database.
//
// It owns how things are written, not what: records are opaque to it.
package state

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
)

// Default locations of an instance without an explicit --root.
const (
	DefaultState = "/var/lib/berth"
	DefaultRun   = "/run/berth"
)

// maxSocketPath is the longest path sockaddr_un takes, less its terminating zero.
const maxSocketPath = 107

// Root names the directories of one instance. It is a value; copy it freely.
type Root struct {
	Arg   string // what the user said ("" for the default root)
	State string // survives a reboot
	Run   string // sockets, FIFOs, namespaces: rebuilt after a reboot
}

// NewRoot returns the layout for the --root argument dir; "" is the default root.
// The directory need not exist. Paths are absolute.
func NewRoot(dir string) (Root, error) {
	if dir == "" || dir == DefaultState {
		return Root{State: DefaultState, Run: DefaultRun}, nil
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return Root{}, err
	}
	r := Root{Arg: abs, State: abs, Run: filepath.Join(abs, "run")}
	if n := len(r.Socket("holder")) + len(".new"); n > maxSocketPath {
		return Root{}, fmt.Errorf("--root %s: socket paths below it would have %d bytes, the kernel takes %d; choose a shorter directory", dir, n, maxSocketPath)
	}
	return r, nil
}

// Default tells whether this is the default root.
func (r Root) Default() bool { return r.Arg == "" }

// Tag is a short name for the instance that no other root has, for bridges, tables and
// cgroups: "" for the default root, else six hexadecimal digits.
func (r Root) Tag() string {
	if r.Default() {
		return ""
	}
	sum := sha256.Sum256([]byte(r.Arg))
	return hex.EncodeToString(sum[:3])
}

// Name is "berth" for the default root, else "berth-" and the tag: the name of the
// instance's nftables table and of its cgroup.
func (r Root) Name() string {
	if r.Default() {
		return "berth"
	}
	return "berth-" + r.Tag()
}

// Socket is the path of the named unix socket: docker, cri, runner, holder.
func (r Root) Socket(name string) string { return filepath.Join(r.Run, name+".sock") }

// Containers holds a directory per container: its writable layer, logs, spool, hosts files.
func (r Root) Containers() string { return filepath.Join(r.State, "containers") }

// Container is the state directory of one container.
func (r Root) Container(id string) string { return filepath.Join(r.Containers(), id) }

// Sandbox is the state directory of one sandbox: hosts, hostname, resolv.conf.
func (r Root) Sandbox(id string) string { return filepath.Join(r.State, "sandboxes", id) }

// Bundle is the directory with config.json of one container or sandbox, lost at reboot.
func (r Root) Bundle(id string) string { return filepath.Join(r.Run, "bundles", id) }

// Namespaces holds the bind-mounted namespaces of a sandbox: net, ipc, uts.
func (r Root) Namespaces(sandbox string) string { return filepath.Join(r.Run, "ns", sandbox) }

// Images is containerd's part: content, metadata, snapshots.
func (r Root) Images() string { return filepath.Join(r.State, "images") }

// Volumes holds the named volumes.
func (r Root) Volumes() string { return filepath.Join(r.State, "volumes") }

// Registries holds containerd's hosts.toml directories, one per registry host.
func (r Root) Registries() string { return filepath.Join(r.State, "registries") }

// Journal is the node's database.
func (r Root) Journal() string { return filepath.Join(r.State, "node.journal") }
