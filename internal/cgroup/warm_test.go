package cgroup_test

import (
	"os"
	"testing"

	"berth/internal/cgroup"
)

func TestWarmMovesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: writes to control groups")
	}
	groups, err := cgroup.Detect()
	if err != nil {
		t.Skip("no control groups: ", err)
	}
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var w cgroup.Warmer
	for range 2 {
		if err := w.Warm(groups); err != nil {
			t.Fatal(err)
		}
	}
	after, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if string(before) != string(after) {
		t.Errorf("the process was moved from\n%sto\n%s", before, after)
	}
}
