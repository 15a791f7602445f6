package cgroup_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"berth/internal/cgroup"
)

type named string

func (n named) Name() string { return string(n) }

func TestGroupLife(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes control groups")
	}
	s, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	group := cgroup.Parent(named("berth-test-" + strconv.Itoa(os.Getpid())))
	if err := s.Prepare(group); err != nil {
		t.Fatal(err)
	}
	sleep := exec.Command("/bin/sleep", "100")
	t.Cleanup(func() {
		_ = sleep.Process.Kill()
		_ = s.Remove(group)
	})
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	inner := filepath.Join(group, "a", "b")
	for _, path := range s.Paths(inner) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(path)))) == "cpuset" {
			continue // wants cpus and mems first
		}
		if err := os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(sleep.Process.Pid)), 0); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	pids, err := s.Pids(group)
	if err != nil || !slices.Equal(pids, []int{sleep.Process.Pid}) {
		t.Fatalf("Pids(%s) = %v, %v; want %d", group, pids, err, sleep.Process.Pid)
	}
	stats, err := s.Read(inner)
	if s.Path("pids", "") == "" || s.Path("memory", "") == "" {
		t.Log("counters are not looked at: the kernel has no memory or no pids controller")
	} else if err != nil || stats.Pids != 1 || stats.MemoryLimit != cgroup.Unlimited || stats.PidsLimit != cgroup.Unlimited {
		t.Errorf("Read(%s) = %+v, %v; want 1 process and no limits", inner, stats, err)
	}
	if s.Frozen(inner) {
		t.Error("group is frozen")
	}
	if err := s.Kill(group); err != nil {
		t.Fatal(err)
	}
	if err := sleep.Wait(); err == nil {
		t.Error("process survived Kill")
	}
	if err := s.Remove(group); err != nil {
		t.Fatal(err)
	}
	for _, path := range s.Paths(group) {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there", path)
		}
	}
	if _, err := s.Read(group); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Read of a removed group: %v", err)
	}
	if pids, err := s.Pids(group); err != nil || len(pids) != 0 {
		t.Errorf("Pids of a removed group: %v, %v", pids, err)
	}
	if s.OOMKills(group) != 0 || s.Frozen(group) {
		t.Error("a removed group has counters")
	}
}

func TestRemoveRootIsRefused(t *testing.T) {
	s := cgroup.Systems{Mode: cgroup.V1, Controllers: map[string]string{"memory": t.TempDir()}}
	for _, group := range []string{"", "/", "..", "/a/.."} {
		if err := s.Remove(group); err == nil {
			t.Errorf("Remove(%q) was not refused", group)
		}
	}
}
