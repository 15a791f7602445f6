package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

// converge brings a running instance to what is on disk: processes whose executable was
// replaced are restarted, and a holder that was told to rest goes on. It says what it does.
func (a *app) converge(ctx context.Context, r state.Root, h *hold.Client, args []string) error {
	if err := sameArgs(r, args); err != nil {
		return fmt.Errorf("%w; end it first with '%s'", err, a.hint("down"))
	}
	status, err := h.Status()
	if err != nil {
		return err
	}
	done := false
	say := func(format string, words ...any) {
		done = true
		fmt.Fprintf(a.Err, format+"\n", words...)
	}
	dir, stale, err := staleExecutable(status.PID, "", "berth-holder")
	if err != nil {
		return err
	}
	if stale {
		if err := h.Reexec(); err != nil {
			return err
		}
		say("berth-holder: replaced in place by the new executable")
	}
	switch status.Mode {
	case wire.ModeKept:
		if err := h.Start(); err != nil {
			return err
		}
		say("the instance was resting: started again")
	case wire.ModeEnding:
		return fmt.Errorf("up: the instance on %s is just ending; try again when it is gone", r.State)
	default:
		for _, child := range status.Children {
			if child.PID == 0 {
				continue // the holder is about to start what is on disk
			}
			_, stale, err := staleExecutable(child.PID, dir, child.Name)
			if err != nil {
				return err
			}
			if !stale {
				continue
			}
			if err := h.Restart(child.Name); err != nil {
				return err
			}
			say("%s: restarted with the new executable", child.Name)
		}
	}
	if err := a.waitReady(ctx, h); err != nil {
		return fmt.Errorf("%w%s", err, marks{filepath.Join(r.State, "log", wire.Daemon+".log"): 0}.reason())
	}
	if !done {
		fmt.Fprintln(a.Err, "already running and up to date")
	}
	return nil
}

// sameArgs refuses flags that differ from those the instance was started with: they would be
// without effect. No flags are always right.
func sameArgs(r state.Root, args []string) error {
	if len(args) == 0 {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join(r.Run, wire.ArgsFile))
	if err != nil {
		return fmt.Errorf("up: the flags of the running instance are unknown: %w", err)
	}
	if string(raw) == string(wire.Encode(args...)) {
		return nil
	}
	had := strings.Join(wire.Decode(raw), " ")
	if had == "" {
		had = "none"
	}
	return fmt.Errorf("up: the instance already runs with other flags (%s)", had)
}

// staleExecutable tells whether process pid runs another program than the file of that name that
// is on disk now, in dir ("": where its own executable was). The content decides: a program may
// run from a sealed copy of itself in memory. A process that has just gone is not stale.
func staleExecutable(pid int, dir, name string) (foundDir string, stale bool, err error) {
	link := fmt.Sprintf("/proc/%d/exe", pid)
	if dir == "" {
		path, err := os.Readlink(link)
		if err != nil {
			return "", false, err
		}
		dir = filepath.Dir(strings.TrimSuffix(path, " (deleted)"))
	}
	running, err := os.Open(link)
	if err != nil {
		return dir, false, nil
	}
	defer running.Close()
	onDisk, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return dir, false, fmt.Errorf("up: the executable of %s is gone: %w", name, err)
	}
	defer onDisk.Close()
	same, err := sameContent(running, onDisk)
	return dir, !same, err
}

// sameContent compares two files from their beginning.
func sameContent(a, b *os.File) (bool, error) {
	infoA, err := a.Stat()
	if err != nil {
		return false, err
	}
	infoB, err := b.Stat()
	if err != nil {
		return false, err
	}
	if os.SameFile(infoA, infoB) {
		return true, nil
	}
	if infoA.Size() != infoB.Size() {
		return false, nil
	}
	var bufA, bufB [128 << 10]byte
	for {
		n, errA := io.ReadFull(a, bufA[:])
		m, errB := io.ReadFull(b, bufB[:])
		if n != m || !bytes.Equal(bufA[:n], bufB[:m]) {
			return false, nil
		}
		for _, err := range []error{errA, errB} {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return true, nil
			} else if err != nil {
				return false, err
			}
		}
	}
}
