package image_test

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mountOverlay mounts directories read-only on mnt until the test ends.
func mountOverlay(t *testing.T, mnt string, lower []string) {
	t.Helper()
	if len(lower) == 1 {
		lower = append(lower, t.TempDir()) // overlayfs wants two without an upper directory
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	if err := unix.Mount("overlay", mnt, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
		t.Fatal(err)
	}
}

// mountTmpfs mounts a small file system on dir until the test ends.
func mountTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	needRoot(t)
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
}
