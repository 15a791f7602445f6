package hold

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

// Bounds of bringing up a holder.
const (
	readyTimeout   = 10 * time.Second
	surviveTimeout = 30 * time.Second
	dialEvery      = 5 * time.Millisecond
)

// Launch starts a holder from the directory dir, detached from the caller, and returns when its
// socket answers. daemonArgs go to berthd behind --root. A holder that is already there gives
// errdefs.ErrConflict.
func Launch(ctx context.Context, root state.Root, dir string, daemonArgs []string) error {
	if err := os.MkdirAll(filepath.Join(root.State, "log"), 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(root.State, "log", "berth-holder.log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	ours, its, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ours.Close()
	var args []string
	if !root.Default() {
		args = append(args, "--root", root.Arg)
	}
	if len(daemonArgs) > 0 {
		args = append(append(args, "--"), daemonArgs...)
	}
	cmd := exec.Command(filepath.Join(dir, "berth-holder"), args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), wire.ReadyEnv+"=3")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{its}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = its.Close()
	if err != nil {
		return errdefs.New(errdefs.ErrUnavailable, "start berth-holder: %w", err)
	}
	go func() { _ = cmd.Wait() }() // ends with the holder, or with us

	deadline := time.Now().Add(readyTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	_ = ours.SetReadDeadline(deadline)
	word, err := io.ReadAll(io.LimitReader(ours, wire.MaxPacket))
	fields := wire.Decode(word)
	switch {
	case fields[0] == wire.OK:
		return nil
	case fields[0] == wire.Failed && len(fields) == 3:
		return errdefs.FromName(fields[1], fields[2])
	case err != nil:
		return errdefs.New(errdefs.ErrUnavailable, "start berth-holder: it is not ready after %s", readyTimeout)
	}
	return errdefs.New(errdefs.ErrUnavailable, "start berth-holder: it ended at once; its log is %s", log.Name())
}

// Survive blocks until the holder that client speaks to is gone, and then is Revive. It
// returns ctx's error when that ends first.
func Survive(ctx context.Context, root state.Root, client *Client, park func(*Client) error) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-client.Lost():
		return Revive(ctx, root, park)
	}
}

// Revive makes sure that there is a new holder after the caller's died (whoever of the runner
// and the daemon is first starts it; a lock decides), lets park put there a copy of everything
// that must not close, and returns nil: the caller must then exit, the new holder starts its
// successor. After an error the caller still holds all it held: it may go on and try again.
func Revive(ctx context.Context, root state.Root, park func(*Client) error) error {
	dir, err := programDir()
	if err != nil {
		return err
	}
	args, err := daemonArgs(root)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, surviveTimeout)
	defer cancel()
	for {
		next, err := dialUntil(ctx, root.Socket("holder"), func() error {
			err := Launch(ctx, root, dir, args)
			if err == nil || errors.Is(err, errdefs.ErrConflict) {
				return nil
			}
			return err
		})
		if err != nil {
			return err
		}
		if park != nil {
			err = park(next)
		}
		_ = next.Close()
		if err == nil || !errors.Is(err, errdefs.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		// The dead holder's socket takes connections until the kernel has closed it too.
		select {
		case <-ctx.Done():
		case <-time.After(dialEvery):
		}
	}
}

// daemonArgs returns what the dead holder gave to berthd.
func daemonArgs(root state.Root) ([]string, error) {
	raw, err := os.ReadFile(filepath.Join(root.Run, wire.ArgsFile))
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	if len(raw) == 0 {
		return nil, nil
	}
	return strings.Split(string(raw), "\x00"), nil
}

// programDir is where the executables are. The holder starts its children by absolute path;
// /proc/self/exe may be a sealed copy in memory.
func programDir() (string, error) {
	if filepath.IsAbs(os.Args[0]) {
		return filepath.Dir(os.Args[0]), nil
	}
	exe, err := os.Executable()
	return filepath.Dir(exe), err
}
