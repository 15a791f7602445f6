package isolate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroups returns the directories called name at the top of every hierarchy, and one below.
func Cgroups(name string) []string {
	var dirs []string
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/", "/sys/fs/cgroup/*/*/"} {
		found, err := filepath.Glob(pattern + name)
		if err != nil {
			continue
		}
		for _, dir := range found {
			if info, err := os.Lstat(dir); err == nil && info.IsDir() {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs
}

// RemoveCgroups removes the cgroups called name with what is below them, children first. It tries
// until timeout, because a cgroup is busy for a moment after its last process died.
func RemoveCgroups(name string, timeout time.Duration) error {
	const pause = 20 * time.Millisecond
	deadline := time.Now().Add(timeout)
	for {
		var last error
		for _, dir := range Cgroups(name) {
			last = errors.Join(last, removeTree(dir))
		}
		if last == nil || time.Now().After(deadline) {
			return last
		}
		time.Sleep(pause)
	}
}

func removeTree(dir string) error {
	var all []string
	_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			all = append(all, path)
		}
		return nil // what cannot be read is gone
	})
	slices.Reverse(all)
	for _, path := range all {
		if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// Thaw lets the frozen (paused) processes in the cgroups called name go on: on cgroup v1 a frozen
// process does not even die of SIGKILL, and would keep its namespaces from ending.
func Thaw(name string) {
	for _, dir := range Cgroups(name) {
		_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				// One of the two files exists, in the freezer's hierarchy or on v2.
				thaw(filepath.Join(path, "freezer.state"), "THAWED")
				thaw(filepath.Join(path, "cgroup.freeze"), "0")
			}
			return nil // what cannot be read is gone
		})
	}
}

func thaw(file, word string) {
	if f, err := os.OpenFile(file, os.O_WRONLY, 0); err == nil {
		_, _ = f.WriteString(word)
		_ = f.Close()
	}
}
