package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
	"berth/internal/errdefs"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

// Bounds of bringing an instance up.
const (
	readyTimeout   = 30 * time.Second
	pingFirst      = 2 * time.Millisecond
	pingMax        = 50 * time.Millisecond
	maxEarlyDeaths = 3    // of berthd, before up gives up
	reasonBytes    = 4096 // of a log, for the reason of a failure
	reasonLines    = 5
)

// programs are the executables of an instance, beside this one.
var programs = [...]string{"berth-holder", wire.Runner, wire.Daemon}

type upFlags struct {
	nodeName, dockerSocket, control, apiListen string
	noControl, install                         bool
	mirrors, insecure                          []string
}

func (a *app) upCommand() *cobra.Command {
	var o upFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start Berth, or bring a running one up to date",
		Long: `Start Berth and return when it is ready. If it already runs, the processes whose
executable was replaced are restarted; containers go on.`,
		Args: exactArgs(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return platformError(a.up(cmd.Context(), &o))
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.nodeName, "node-name", "", "name of this node (default: the host's)")
	f.StringVar(&o.dockerSocket, "docker-socket", "", "serve docker's API at this path too")
	f.StringVar(&o.control, "control", "never", "when the control plane runs: never")
	f.BoolVar(&o.noControl, "no-control", false, "the same as --control=never")
	f.StringVar(&o.apiListen, "api-listen", "", "address of the control plane")
	f.StringArrayVar(&o.mirrors, "mirror", nil, "HOST=URL: fetch images of this registry from there first")
	f.StringArrayVar(&o.insecure, "insecure-registry", nil, "HOST: speak plain http, or https with any certificate, to this registry")
	f.BoolVar(&o.install, "install", false, "make a systemd unit of it, started at boot")
	return cmd
}

// daemonArgs checks the flags and returns those that berthd gets.
func (o *upFlags) daemonArgs() ([]string, error) {
	switch o.control {
	case "never":
	case "lazy", "now":
		return nil, fmt.Errorf("--control=%s: the control plane is not part of this version; leave the flag away", o.control)
	default:
		return nil, fmt.Errorf("--control=%s: unknown; use never", o.control)
	}
	if o.apiListen != "" {
		return nil, errors.New("--api-listen: the control plane is not part of this version; leave the flag away")
	}
	var args []string
	if o.nodeName != "" {
		args = append(args, "--node-name", o.nodeName)
	}
	if o.dockerSocket != "" {
		path, err := filepath.Abs(o.dockerSocket)
		if err != nil {
			return nil, err
		}
		args = append(args, "--docker-socket", path)
	}
	for _, m := range o.mirrors {
		if host, url, ok := strings.Cut(m, "="); !ok || host == "" || url == "" {
			return nil, fmt.Errorf("--mirror %s: write it as HOST=URL", m)
		}
		args = append(args, "--mirror", m)
	}
	for _, h := range o.insecure {
		args = append(args, "--insecure-registry", h)
	}
	return args, nil
}

func (a *app) up(ctx context.Context, o *upFlags) error {
	args, err := o.daemonArgs()
	if err != nil {
		return err
	}
	r, err := a.instance()
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("up: Berth makes namespaces, cgroups and networks and must be started as root")
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	began := time.Now()
	h, err := hold.Dial(r.Socket("holder"))
	if err != nil {
		err = a.launch(ctx, r, o, args)
		if errors.Is(err, errdefs.ErrConflict) {
			h, err = hold.Dial(r.Socket("holder")) // somebody else was quicker
		}
		if err != nil {
			return err
		}
	}
	if h != nil {
		defer h.Close()
		if o.install {
			return fmt.Errorf("--install: an instance already runs on %s; end it first with '%s'", r.State, a.hint("down"))
		}
		if err := a.converge(ctx, r, h, args); err != nil {
			return err
		}
	}
	a.greet(r, time.Since(began))
	return nil
}

// launch starts an instance that does not run, and leaves nothing behind if that fails.
func (a *app) launch(ctx context.Context, r state.Root, o *upFlags, args []string) error {
	dir, err := programDir()
	if err != nil {
		return err
	}
	if err := makeDirectories(r); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	marks := logMarks(r)
	if o.install {
		err = a.install(ctx, r, dir, args)
	} else {
		err = hold.Launch(ctx, r, dir, args)
	}
	if err != nil {
		if errors.Is(err, errdefs.ErrConflict) {
			return err
		}
		return fmt.Errorf("%w%s", err, marks.reason())
	}
	h, err := hold.Dial(r.Socket("holder"))
	if err != nil {
		return fmt.Errorf("%w%s", err, marks.reason())
	}
	defer h.Close()
	if err := a.waitReady(ctx, h); err != nil {
		reason := marks.reason()
		_ = h.Stop(false) // its own failure would hide the first one
		return fmt.Errorf("%w%s", err, reason)
	}
	return nil
}

// programDir is the directory of this executable, if the others are beside it.
func programDir() (string, error) {
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(self)
	for _, name := range programs {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("up: %s is missing in %s, beside berth; build it with 'make build'", name, dir)
		}
	}
	return dir, nil
}

// makeDirectories makes the instance's two directories, readable by their owner only.
func makeDirectories(r state.Root) error {
	for _, dir := range []string{r.State, r.Run} {
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if info, err := os.Stat(dir); err != nil {
			return err
		} else if !info.IsDir() {
			return fmt.Errorf("%s is not a directory", dir)
		}
	}
	return nil
}

// waitReady returns when the daemon answers, or with the reason why it will not.
func (a *app) waitReady(ctx context.Context, h *hold.Client) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	for pause := pingFirst; ; pause = min(2*pause, pingMax) {
		last := ping(ctx, c)
		if last == nil {
			return nil
		}
		status, err := h.Status()
		if err != nil {
			return err
		}
		for _, child := range status.Children {
			if child.Name == wire.Daemon && child.Restarts >= maxEarlyDeaths && child.Since.Add(readyTimeout/3).After(time.Now()) {
				return fmt.Errorf("up: %s ended %d times without becoming ready", child.Name, child.Restarts)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("up: berthd is not ready after %s (%w)", readyTimeout, last)
		case <-time.After(pause):
		}
	}
}

func ping(ctx context.Context, c *unixhttp.Client) error {
	resp, err := c.Do(ctx, unixhttp.Request{Method: "GET", Path: "/_ping"})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.Status != 200 {
		return fmt.Errorf("it answers with status %d", resp.Status)
	}
	return nil
}

// greet tells how to go on. The address is data, the rest are words.
func (a *app) greet(r state.Root, took time.Duration) {
	address := "unix://" + r.Socket("docker")
	fmt.Fprintf(a.Err, "Berth is ready (%d ms); everything it keeps is below %s\n", took.Milliseconds(), r.State)
	fmt.Fprintln(a.Out, address)
	fmt.Fprintf(a.Err, `Next:
  export DOCKER_HOST=%s     docker and docker compose then use it
  %s
  %s
`, address, a.hint("run --rm -it IMAGE"), a.hint("status"))
}

// hint is a command line of this program for the same instance.
func (a *app) hint(command string) string {
	if a.rootArg == "" || a.getenv("BERTH_ROOT") == a.rootArg {
		return "berth " + command
	}
	name, rest, _ := strings.Cut(command, " ")
	return strings.TrimSpace("berth " + name + " --root " + a.rootArg + " " + rest)
}

// marks remember where the logs of an instance ended, so that a reason is read from what is new.
type marks map[string]int64

func logMarks(r state.Root) marks {
	m := marks{}
	for _, name := range programs {
		path := filepath.Join(r.State, "log", name+".log")
		m[path] = 0
		if info, err := os.Stat(path); err == nil {
			m[path] = info.Size()
		}
	}
	return m
}

// reason is the end of what was logged since, for a person, in one line.
func (m marks) reason() string {
	var parts []string
	for i := len(programs) - 1; i >= 0; i-- { // berthd knows best
		for path, from := range m {
			if filepath.Base(path) == programs[i]+".log" {
				if text := lastLines(path, from); text != "" {
					parts = append(parts, programs[i]+" says: "+text)
				}
			}
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return "; " + parts[0]
}

func lastLines(path string, from int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	from = max(from, info.Size()-reasonBytes)
	raw, err := io.ReadAll(io.NewSectionReader(f, from, reasonBytes))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	if len(lines) > reasonLines {
		lines = lines[len(lines)-reasonLines:]
	}
	return strings.Join(lines, "; ")
}
