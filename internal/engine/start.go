package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/cgroup"
	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/trace"
)

// startTimeout bounds one start; unpacking an image for the first time is the slow part.
const startTimeout = 5 * time.Minute

// StartContainer implements ContainerAPI.
func (e *Engine) StartContainer(ctx context.Context, ref string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	if err := e.goingDown(); err != nil {
		return err
	}
	c.mu.Lock()
	status, name := c.State.Status, c.Config.Name
	if c.ending > 0 && status != StatusRunning {
		status = StatusRemoving
	}
	c.mu.Unlock()
	switch status {
	case StatusRunning:
		return errdefs.New(errdefs.ErrNotModified, "container %s is already started", name)
	case StatusPaused:
		return errdefs.New(errdefs.ErrConflict, "cannot start a paused container, try unpause instead")
	case StatusRemoving, StatusDead:
		return errdefs.New(errdefs.ErrConflict, "container is marked for removal and cannot be started")
	}
	c.mu.Lock()
	c.cancelRestart()
	if c.State.Status == StatusRestarting {
		c.State.Status = StatusExited
	}
	c.State.Attempts, c.State.RestartCount = 0, 0
	c.mu.Unlock()
	return e.start(ctx, c)
}

// start runs the container; its op is held. A client that leaves does not cut a start.
func (e *Engine) start(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
	defer cancel()
	e.expectStart()
	c.mu.Lock()
	c.starting = true // counts as a user of the sandbox from here on
	cfg := c.Config
	c.mu.Unlock()
	c.out.beginRun()
	b, err := e.findSandbox(cfg.Sandbox)
	if err == nil {
		err = e.prepare(ctx, b, cfg)
	}
	var (
		p     runner.Process
		doubt func() bool
	)
	if err == nil {
		p, doubt, err = e.launch(ctx, c, b.view())
	}
	if err != nil {
		return e.startFailed(ctx, c, err)
	}
	e.started(c, p)
	if doubt() {
		e.goWork(func(ctx context.Context) { e.recheck(ctx, c, p.PID) })
	}
	return nil
}

// prepare makes sandbox and files ready side by side.
func (e *Engine) prepare(ctx context.Context, b *sandbox, cfg ContainerConfig) error {
	mountErr := make(chan error, 1)
	go func() {
		defer trace.Start(ctx, "rootfs")()
		_, err := e.mountRootfs(ctx, cfg)
		mountErr <- err
	}()
	done := trace.Start(ctx, "sandbox")
	err := e.enter(ctx, b)
	done()
	if err2 := <-mountErr; err == nil {
		err = err2
	}
	return err
}

// launch writes the bundle and has the runner start it.
func (e *Engine) launch(ctx context.Context, c *container, box Sandbox) (p runner.Process, doubt func() bool, err error) {
	cfg := c.view().Config
	done := trace.Start(ctx, "spec")
	spec, err := e.spec(ctx, cfg, box)
	done()
	if err != nil {
		return p, nil, err
	}
	bundle := e.Root.Bundle(cfg.ID)
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		return p, nil, storageError("bundle", err)
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return p, nil, err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o600); err != nil {
		return p, nil, storageError("bundle", err)
	}
	defer trace.Start(ctx, "runner")()
	return e.link.create(ctx, runner.CreateRequest{
		ID: cfg.ID, Bundle: bundle, Start: true,
		IO: runner.IO{Spool: c.out.spoolDir(), Stdin: cfg.OpenStdin},
	})
}

// spec gathers what buildSpec needs.
func (e *Engine) spec(ctx context.Context, cfg ContainerConfig, box Sandbox) (*specs.Spec, error) {
	rootfs := e.rootfsPath(cfg.ID)
	in := specInput{
		container: cfg, sandbox: box.Config, rootfs: rootfs, unifiedV2: e.cgroups.Mode == cgroup.V2,
		cgroup: e.cgroupPath(cfg, box.Config), hostCaps: e.hostCaps, initPath: e.InitPath,
		namespaces: map[string]string{},
	}
	var err error
	if in.user, in.home, err = resolveUser(rootfs, cfg.User, cfg.Groups); err != nil {
		return nil, err
	}
	ns := e.Root.Namespaces(box.Config.ID)
	if box.Config.Network != NetworkHost {
		in.namespaces["net"] = filepath.Join(ns, "net")
	}
	if !box.Config.HostIPC {
		in.namespaces["ipc"] = filepath.Join(ns, "ipc")
		if !e.private(box.Config.ID) {
			in.shmPath = e.shmPath(box.Config.ID)
		}
	} else {
		in.shmPath = "/dev/shm"
	}
	if !box.Config.HostUTS {
		in.namespaces["uts"] = filepath.Join(ns, "uts")
	}
	if cfg.PIDOf != "" {
		other, err := e.Container(cfg.PIDOf)
		if err != nil {
			return nil, err
		}
		if other.State.PID == 0 {
			return nil, errdefs.New(errdefs.ErrConflict, "cannot join PID namespace of a non running container: %s", cfg.PIDOf)
		}
		in.pidPath = fmt.Sprintf("/proc/%d/ns/pid", other.State.PID)
	}
	if in.binds, err = e.binds(ctx, cfg, box, rootfs); err != nil {
		return nil, err
	}
	if in.devices, in.deviceRules, err = hostDevices(cfg); err != nil {
		return nil, err
	}
	return buildSpec(in)
}

func (e *Engine) cgroupPath(cfg ContainerConfig, box SandboxConfig) string {
	parent := box.CgroupParent
	if parent == "" {
		parent = e.Root.Name()
	}
	return filepath.Join("/", parent, cfg.ID)
}

// binds resolves volumes and host directories, and adds the sandbox's files unless the user
// mounts something there.
func (e *Engine) binds(ctx context.Context, cfg ContainerConfig, box Sandbox, rootfs string) ([]specs.Mount, error) {
	var out []specs.Mount
	taken := map[string]bool{}
	for _, m := range cfg.Mounts {
		taken[filepath.Clean(m.Target)] = true
		if m.Kind == MountTmpfs {
			continue
		}
		source := m.Source
		if m.Kind == MountVolume {
			p, err := e.Volumes.Path(m.Source)
			if err != nil {
				return nil, err
			}
			source = p
			if !m.NoCopy {
				if err := e.Volumes.CopyUp(ctx, m.Source, rootfs, m.Target); err != nil {
					return nil, storageError("copy the image's files into volume "+m.Source, err)
				}
			}
		} else if err := bindSource(m); err != nil {
			return nil, err
		}
		out = append(out, specs.Mount{Destination: m.Target, Type: "bind", Source: source, Options: bindOptions(m)})
	}
	dir := e.Root.Sandbox(box.Config.ID)
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		if target := "/etc/" + f; !taken[target] {
			out = append(out, specs.Mount{Destination: target, Type: "bind", Source: filepath.Join(dir, f), Options: []string{"rbind", "rprivate"}})
		}
	}
	return out, nil
}

func bindSource(m Mount) error {
	_, err := os.Stat(m.Source)
	if os.IsNotExist(err) && m.CreateSource {
		err = os.MkdirAll(m.Source, 0o755)
	}
	if os.IsNotExist(err) {
		return errdefs.New(errdefs.ErrInvalid, "invalid mount config for type \"bind\": bind source path does not exist: %s", m.Source)
	}
	return err
}

func bindOptions(m Mount) []string {
	opts := []string{"rbind"}
	if m.NonRecursive {
		opts = []string{"bind"}
	}
	p := m.Propagation
	if p == "" {
		p = "rprivate"
	}
	opts = append(opts, p)
	if m.ReadOnly {
		opts = append(opts, "ro")
	}
	return opts
}

// started records a successful start.
func (e *Engine) started(c *container, p runner.Process) {
	c.mu.Lock()
	c.starting = false
	c.countRestart()
	now := time.Now()
	c.State.Status, c.State.PID, c.State.StartedAt = StatusRunning, p.PID, now
	c.State.Error, c.State.OOMKilled, c.State.ExitCode, c.State.ExitKnown = "", false, 0, false
	c.State.StoppedByUser, c.State.NextRestart, c.State.FinishedAt = false, time.Time{}, time.Time{}
	c.exited = make(chan struct{})
	err := e.save(c)
	c.mu.Unlock()
	if err != nil {
		// It runs; on a full disk its record follows with the next change.
		e.log.Error("record of a started container not written", "container", c.Config.ID, "error", err)
	}
	e.publish(c.view(), "start")
	e.startHealth(c)
}

// startFailed records why a start failed and gives the error its final words.
func (e *Engine) startFailed(ctx context.Context, c *container, err error) error {
	c.mu.Lock()
	c.starting = false
	if c.State.Status == StatusRestarting && errorIs(err, errdefs.ErrUnavailable) {
		// No fault of the container's: the runner is away, or the daemon is on its way out. The
		// record says what is to be done.
		c.mu.Unlock()
		c.out.endRun(true)
		return err
	}
	c.countRestart()
	c.State.Error = err.Error()
	c.State.ExitCode, c.State.ExitKnown = failureCode(err), true
	if c.State.Status == StatusRestarting {
		c.State.Status = StatusExited
	}
	c.State.FinishedAt = time.Now()
	saveErr := e.save(c)
	auto := c.Config.AutoRemove
	waiters := c.takeWaiters(WaitNotRunning, WaitNextExit)
	code := c.State.ExitCode
	c.mu.Unlock()
	if saveErr != nil {
		e.log.Error("record of a failed start not written", "container", c.Config.ID, "error", saveErr)
	}
	for _, w := range waiters {
		w.ch <- WaitResult{ExitCode: code}
	}
	c.out.endRun(false)
	e.cleanupRun(ctx, c, true)
	if auto {
		if err := e.removeLocked(context.WithoutCancel(ctx), c, true); err != nil {
			e.log.Warn("container with automatic removal not removed", "container", c.Config.ID, "error", err)
		}
	}
	return err
}

// failureCode is docker's exit code for a container that could not start.
func failureCode(err error) int {
	switch {
	case errorIs(err, errdefs.ErrNoProgram):
		return 127
	case errorIs(err, errdefs.ErrInvocation):
		return 126
	}
	return 128
}

// CommandLine is the container's program as people read it.
func CommandLine(args []string) string { return strings.Join(args, " ") }
