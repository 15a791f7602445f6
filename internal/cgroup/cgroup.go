// Package cgroup knows the machine's control group hierarchies: which version, where a group's
// files are, what its counters say, which processes are in it, and how to remove it.
//
// A group is named by its path from the root of every hierarchy, as in the OCI runtime
// specification's cgroupsPath ("/berth/0123…"). Making groups and setting limits is
// libcontainer's work. Systems is immutable; its methods may be used concurrently.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount is where the hierarchies are.
const Mount = "/sys/fs/cgroup"

// Mode is how a machine's control groups are set up.
type Mode string

// The modes.
const (
	V1     Mode = "v1"
	Hybrid Mode = "hybrid" // v1 controllers, and a v2 hierarchy without any
	V2     Mode = "v2"
)

// Systems is the set of hierarchies of the machine.
type Systems struct {
	Mode Mode
	// Controllers maps a controller (v1: also name=… and, for a hybrid's v2, "") to its mount
	// point. On v2 every available controller maps to Mount.
	Controllers map[string]string
}

// Detect looks at what is mounted.
func Detect() (Systems, error) {
	var fsinfo unix.Statfs_t
	if err := unix.Statfs(Mount, &fsinfo); err != nil {
		return Systems{}, fmt.Errorf("control groups at %s: %w", Mount, err)
	}
	if fsinfo.Type == unix.CGROUP2_SUPER_MAGIC {
		return detectV2(Mount)
	}
	return detectV1("/proc/self/mountinfo")
}

func detectV2(mount string) (Systems, error) {
	raw, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers"))
	if err != nil {
		return Systems{}, err
	}
	s := Systems{Mode: V2, Controllers: map[string]string{}}
	for _, c := range strings.Fields(string(raw)) {
		s.Controllers[c] = mount
	}
	return s, nil
}

func detectV1(mountinfo string) (Systems, error) {
	f, err := os.Open(mountinfo)
	if err != nil {
		return Systems{}, err
	}
	defer f.Close()
	s := Systems{Mode: V1, Controllers: map[string]string{}}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// proc_pid_mountinfo(5): id parent dev root point options [optional…] - type source super
		head, tail, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(head), strings.Fields(tail)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		switch right[0] {
		case "cgroup2":
			s.Mode = Hybrid
			s.Controllers[""] = left[4]
		case "cgroup":
			for _, option := range strings.Split(right[2], ",") {
				if option == "rw" || option == "ro" || option == "xattr" || strings.HasPrefix(option, "release_agent=") {
					continue
				}
				if _, seen := s.Controllers[option]; !seen {
					s.Controllers[option] = left[4]
				}
			}
		}
	}
	if len(s.Controllers) == 0 {
		return Systems{}, errors.New("no control group hierarchy is mounted")
	}
	return s, lines.Err()
}

// Parent is the group below which an instance keeps its containers: "/" and the name of its
// root (package state).
func Parent(root interface{ Name() string }) string { return "/" + root.Name() }

// Path is the directory of the group in the controller's hierarchy; "" if there is none. On v2
// the controller may be "".
func (s Systems) Path(controller, group string) string {
	mount, ok := s.Controllers[controller]
	if !ok && s.Mode == V2 && controller == "" {
		mount, ok = Mount, true
	}
	if !ok {
		return ""
	}
	return filepath.Join(mount, group)
}

// Paths are the directories of the group in all hierarchies, each once, whether they exist or not.
func (s Systems) Paths(group string) []string {
	if s.Mode == V2 {
		return []string{s.Path("", group)}
	}
	var out []string
	for c := range s.Controllers {
		if p := s.Path(c, group); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	slices.Sort(out)
	return out
}

// freezer and process lists are read in one hierarchy that every container is in.
func (s Systems) main(group string) string {
	for _, c := range []string{"", "devices", "memory", "pids"} {
		if s.Mode != V2 && c == "" {
			continue
		}
		if p := s.Path(c, group); p != "" {
			return p
		}
	}
	for _, p := range s.Paths(group) {
		return p
	}
	return ""
}

// Pids returns the processes in the group and in those below it. A group that is not there has none.
func (s Systems) Pids(group string) ([]int, error) {
	var out []int
	err := filepath.WalkDir(s.main(group), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // went away while we looked
		}
		if err != nil || !d.IsDir() {
			return err
		}
		pids, err := procs(path)
		out = append(out, pids...)
		return err
	})
	return out, err
}

func procs(dir string) ([]int, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []int
	for _, line := range strings.Fields(string(raw)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
			out = append(out, pid)
		}
	}
	return out, nil
}

// Kill sends SIGKILL to every process in the group and those below it, frozen ones too.
func (s Systems) Kill(group string) error {
	if s.Mode == V2 {
		err := os.WriteFile(filepath.Join(s.main(group), "cgroup.kill"), []byte("1"), 0)
		if err == nil || errors.Is(err, unix.ENODEV) {
			return nil
		}
		// Before Linux 5.14 there is no such file; without the group there is nothing to kill.
	}
	pids, err := s.Pids(group)
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if freezer := s.Path("freezer", group); freezer != "" && s.Mode != V2 && len(pids) > 0 {
		_ = os.WriteFile(filepath.Join(freezer, "freezer.state"), []byte("THAWED"), 0)
	}
	return err
}

// KillEverywhere is Kill that looks into every v1 hierarchy: a process that was caught while it
// was put into a group is in some of them only.
func (s Systems) KillEverywhere(group string) error {
	errs := []error{s.Kill(group)}
	if s.Mode == V2 {
		return errs[0]
	}
	for _, path := range s.Paths(group) {
		pids, err := procs(path)
		errs = append(errs, err)
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	return errors.Join(errs...)
}

// Frozen tells whether the group is frozen. One that is not there is not.
func (s Systems) Frozen(group string) bool {
	if s.Mode == V2 {
		return strings.TrimSpace(read(filepath.Join(s.main(group), "cgroup.freeze"))) == "1"
	}
	freezer := s.Path("freezer", group)
	return freezer != "" && strings.TrimSpace(read(filepath.Join(freezer, "freezer.state"))) != "THAWED" && exists(freezer)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func read(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(raw)
}

// Remove removes the group and all below it from every hierarchy. Its processes must be gone:
// unix.EBUSY says that one is still there, if only as a zombie.
func (s Systems) Remove(group string) error {
	if filepath.Clean("/"+group) == "/" {
		return errors.New("remove control group: the root cannot be removed")
	}
	var errs []error
	for _, path := range s.Paths(group) {
		errs = append(errs, removeTree(path))
	}
	return errors.Join(errs...)
}

func removeTree(path string) error {
	err := unix.Rmdir(path)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	entries, readErr := os.ReadDir(path)
	if errors.Is(readErr, fs.ErrNotExist) {
		return nil
	}
	if readErr != nil {
		return readErr
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(path); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "rmdir", Path: path, Err: err}
	}
	return nil
}

// leaf is where Prepare moves processes out of the way to.
const leaf = "berth-host"

// Prepare makes the instance's parent group on v2 and passes the controllers down to it. Where
// the hierarchy's visible root is itself a group with processes in it (Berth inside a
// container), which the kernel's rule "no processes in inner groups" forbids, those move to a
// leaf. On v1 there is nothing to prepare.
func (s Systems) Prepare(parent string) error {
	if s.Mode != V2 {
		return nil
	}
	dir := s.Path("", parent)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, inner := range ancestors(dir) {
		err := s.enable(inner)
		if errors.Is(err, unix.EBUSY) {
			if err := evacuate(inner); err != nil {
				return err
			}
			err = s.enable(inner)
		}
		if err != nil {
			return fmt.Errorf("pass controllers down in %s: %w", inner, err)
		}
	}
	return nil
}

// ancestors lists the directories from the mount to dir, dir included.
func ancestors(dir string) []string {
	var out []string
	for d := dir; strings.HasPrefix(d, Mount); d = filepath.Dir(d) {
		out = append(out, d)
	}
	slices.Reverse(out)
	return out
}

// enable passes on every controller that the group has.
func (s Systems) enable(dir string) error {
	var errs []error
	have := strings.Fields(read(filepath.Join(dir, "cgroup.controllers")))
	on := strings.Fields(read(filepath.Join(dir, "cgroup.subtree_control")))
	for _, c := range have {
		if slices.Contains(on, c) {
			continue
		}
		err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
		// Some controllers cannot be had everywhere (cpu beside real-time processes, say); a limit
		// that needs one fails by its name later. EBUSY is about processes in the way.
		if errors.Is(err, unix.EBUSY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func evacuate(dir string) error {
	to := filepath.Join(dir, leaf)
	if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	pids, err := procs(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %d to %s: %w", pid, to, err)
		}
	}
	return nil
}
