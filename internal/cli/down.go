package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	nodewire "berth/internal/nodeapi/wire"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

// listenPrefix begins the keys under which berthd has its listening sockets kept.
const listenPrefix = "listen"

// Bounds of taking an instance down.
const (
	daemonTimeout = 10 * time.Second // for a daemon that is away to come back
	drainTimeout  = 10 * time.Minute // for all containers to stop, in parallel
	goneTimeout   = 45 * time.Second // for the processes of the instance to end
)

func (a *app) downCommand() *cobra.Command {
	var containers string
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop Berth, with its containers or without",
		Args:  exactArgs(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.instance()
			if err != nil {
				return err
			}
			switch containers {
			case "keep":
				return platformError(a.downKeep(cmd.Context(), r))
			case "stop":
				return platformError(a.downStop(cmd.Context(), r))
			}
			return fmt.Errorf("--containers %s: unknown; use keep or stop", containers)
		},
	}
	cmd.Flags().StringVar(&containers, "containers", "stop", "what happens to containers: stop, or keep them running without Berth")
	_ = cmd.RegisterFlagCompletionFunc("containers", cobra.FixedCompletions([]string{"keep", "stop"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// downKeep ends the managers. As long as containers run the holder stays: it holds their
// streams and takes note of their exits.
func (a *app) downKeep(ctx context.Context, r state.Root) error {
	h, err := hold.Dial(r.Socket("holder"))
	if err != nil {
		fmt.Fprintf(a.Err, "no Berth runs on %s\n", r.State)
		return nil
	}
	defer h.Close()
	s, err := h.Status()
	if err != nil {
		return err
	}
	if s.Mode == wire.ModeKept {
		fmt.Fprintln(a.Err, "already resting; containers go on")
		return nil
	}
	ask, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	var node nodewire.Status
	err = a.call(ask, "GET", route("status"), nil, &node)
	if c := node.Containers; err == nil && c.Running+c.Paused+c.Restarting == 0 {
		return a.downStop(ctx, r) // there is nothing to hold
	}
	if err := h.Stop(true); err != nil {
		return err
	}
	if err := closeListeners(h); err != nil {
		return err
	}
	fmt.Fprintf(a.Err, "stopped; containers go on, held by berth-holder (process %d); '%s' manages them again\n", s.PID, a.hint("up"))
	return nil
}

// closeListeners gives up the daemon's listening sockets, which the holder keeps for its next
// one: while nobody is to come soon, clients are told so at once instead of waiting.
func closeListeners(h *hold.Client) error {
	keys, err := h.List(listenPrefix)
	for _, k := range keys {
		err = errors.Join(err, h.Drop(k))
	}
	return err
}

// downStop stops everything. What could not be done is said, and ends with 125.
func (a *app) downStop(ctx context.Context, r state.Root) error {
	h, err := hold.Dial(r.Socket("holder"))
	if err != nil {
		if !leftBehind(r) {
			fmt.Fprintf(a.Err, "no Berth runs on %s\n", r.State)
			return nil
		}
		// Its processes were killed: only a new daemon can find and stop what they left.
		fmt.Fprintln(a.Err, "the processes of Berth are gone, but containers were left behind: starting it to stop them")
		dir, err := programDir()
		if err != nil {
			return err
		}
		args, err := os.ReadFile(filepath.Join(r.Run, wire.ArgsFile))
		var words []string
		if err == nil && len(args) > 0 {
			words = wire.Decode(args)
		}
		if err := hold.Launch(ctx, r, dir, words); err != nil {
			return err
		}
		if h, err = hold.Dial(r.Socket("holder")); err != nil {
			return err
		}
	}
	defer h.Close()
	s, err := h.Status()
	if err != nil {
		return err
	}
	if s.Mode == wire.ModeKept {
		if err := h.Start(); err != nil {
			return err
		}
	}
	sockets, drainErr := a.drain(ctx, h)
	var refused *apiError
	if errors.As(drainErr, &refused) {
		return fmt.Errorf("%w; Berth goes on", drainErr)
	}
	// The children may have been started just now.
	if now, err := h.Status(); err == nil {
		s = now
	}
	if err := a.stopInstance(r, h, s, sockets); err != nil {
		return err
	}
	if drainErr != nil {
		return fmt.Errorf("down: Berth has ended, but containers may go on: %w", drainErr)
	}
	return nil
}

// leftBehind tells whether a process of a container runs, by the records that berth-runner
// keeps for its own successor.
func leftBehind(r state.Root) bool {
	records, err := filepath.Glob(filepath.Join(r.Run, "procs", "*.json"))
	if err != nil {
		return false
	}
	for _, path := range records {
		var record struct {
			PID       int
			StartTime uint64
		}
		raw, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(raw, &record) != nil || record.PID == 0 {
			continue
		}
		if start, err := wire.StartTime(record.PID); err == nil && start == record.StartTime {
			return true
		}
	}
	return false
}

// drain makes the daemon stop all containers and give the network back. It returns the
// sockets that the daemon served.
func (a *app) drain(ctx context.Context, h *hold.Client) ([]string, error) {
	ready, cancel := context.WithTimeout(ctx, daemonTimeout)
	err := a.waitReady(ready, h)
	cancel()
	if err != nil {
		return nil, err
	}
	ctx, cancel = context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	var node nodewire.Status
	if err := a.call(ctx, "GET", route("status"), nil, &node); err != nil {
		return nil, err
	}
	var down nodewire.Down
	if err := a.call(ctx, "POST", route("down"), nil, &down); err != nil {
		return node.Sockets, err
	}
	if down.Stopped > 0 {
		fmt.Fprintf(a.Err, "%d containers stopped\n", down.Stopped)
	}
	return node.Sockets, nil
}

// stopInstance ends the holder and its children and returns when they are gone.
func (a *app) stopInstance(r state.Root, h *hold.Client, s hold.Status, sockets []string) error {
	var left []unix.PollFd
	for _, pid := range append([]int{s.PID}, childPIDs(s)...) {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has gone already
		}
		defer unix.Close(fd)
		left = append(left, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	stopErr := h.Stop(false)
	deadline := time.Now().Add(goneTimeout)
	for len(left) > 0 {
		wait := time.Until(deadline)
		if stopErr != nil {
			wait = 0 // it was not told: only look
		}
		n, err := unix.Poll(left, int(max(wait.Milliseconds(), 0)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			if stopErr != nil {
				return stopErr
			}
			return fmt.Errorf("down: %d processes of the instance on %s did not end within %s", len(left), r.State, goneTimeout)
		}
		still := left[:0]
		for _, p := range left {
			if p.Revents == 0 {
				still = append(still, p)
			}
		}
		left = still
	}
	for _, name := range []string{"docker", "cri", "runner", "holder"} {
		sockets = append(sockets, r.Socket(name))
	}
	for _, path := range sockets {
		removeSocket(path)
	}
	fmt.Fprintln(a.Err, "Berth has ended")
	return nil
}

func childPIDs(s hold.Status) []int {
	var pids []int
	for _, c := range s.Children {
		if c.PID != 0 {
			pids = append(pids, c.PID)
		}
	}
	return pids
}

// removeSocket removes the file of a socket that nobody listens on any more.
func removeSocket(path string) {
	info, err := os.Lstat(path)
	if err == nil && info.Mode()&fs.ModeSocket != 0 && !listening(path) {
		_ = os.Remove(path)
	}
}

// listening tells whether somebody accepts connections at path.
func listening(path string) bool {
	raw, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return true // rather leave a file than break a service
	}
	return hasSocket(string(raw), path)
}

// hasSocket looks for a listening socket of that path in the text of /proc/net/unix.
func hasSocket(table, path string) bool {
	const flagListening = "00010000" // __SO_ACCEPTCON, fourth field
	for _, line := range strings.Split(table, "\n") {
		f := strings.Fields(line)
		if len(f) >= 8 && f[3] == flagListening && strings.HasSuffix(line, " "+path) {
			return true
		}
	}
	return false
}
