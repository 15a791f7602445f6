package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"berth/internal/errdefs"
)

// Warmer makes moves of processes into groups fast for some milliseconds to come. The first move
// after a pause waits until the kernel has told every processor, 4 to 18 ms, those behind it do
// not (percpu_down_write, rcu_sync_enter). Who knows that a container is about to start has a
// Warmer take that wait upon itself meanwhile.
//
// The zero value is ready. It must not be used concurrently.
type Warmer struct {
	own string // /proc/self/cgroup when dir was found
	dir string // of our own group, in one hierarchy
}

// Warm moves the calling process to where it is. errdefs.ErrUnavailable: its group is not
// reachable below Mount.
func (w *Warmer) Warm(s Systems) error {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	if own := string(raw); own != w.own {
		w.own, w.dir = own, s.find(own)
	}
	if w.dir == "" {
		return errdefs.New(errdefs.ErrUnavailable, "the process's own control group is not below %s", Mount)
	}
	return os.WriteFile(filepath.Join(w.dir, "cgroup.procs"), []byte("0"), 0)
}

// find returns a directory of the process's own group, or "". own is /proc/self/cgroup.
func (s Systems) find(own string) string {
	for line := range strings.Lines(own) {
		// cgroups(7): hierarchy:controllers:path
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		controller, _, _ := strings.Cut(fields[1], ",")
		dir := s.Path(controller, fields[2])
		if dir == "" {
			continue
		}
		// Where namespaces hide a part of the path it may be another group's.
		if pids, err := procs(dir); err == nil && slices.Contains(pids, os.Getpid()) {
			return dir
		}
	}
	return ""
}
