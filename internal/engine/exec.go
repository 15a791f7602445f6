package engine

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/runner"
)

const (
	execKept     = 5 * time.Minute // an ended exec can be inspected for so long
	execSyncMost = 16 << 20
)

// execution is one exec'd process. Execs are not in the journal: after a restart of the daemon
// running ones go on, but only their container remembers them.
type execution struct {
	mu sync.Mutex
	Exec
	out   *output
	stdin *stdinHub
	made  time.Time
	done  chan struct{} // closed when it has ended
}

// forgotten tells of an exec that was made and, for execKept, not started: its client vanished.
func (x *execution) forgotten(now time.Time) bool {
	return !x.view().Started && now.Sub(x.made) > execKept
}

func (x *execution) view() Exec {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.Exec
}

// execDir holds the output of one exec.
func (e *Engine) execDir(id string) string { return filepath.Join(e.Root.Run, "execs", id) }

// CreateExec implements ExecAPI.
func (e *Engine) CreateExec(_ context.Context, cfg ExecConfig) (Exec, error) {
	c, err := e.find(cfg.Container)
	if err != nil {
		return Exec{}, err
	}
	v := c.view()
	if err := execAllowed(v); err != nil {
		return Exec{}, err
	}
	if len(cfg.Args) == 0 || cfg.Args[0] == "" {
		return Exec{}, errdefs.New(errdefs.ErrInvalid, "no exec command specified")
	}
	cfg.Container = v.Config.ID
	x := &execution{Exec: Exec{ID: NewID(), Config: cfg}, stdin: &stdinHub{}, made: time.Now(), done: make(chan struct{})}
	x.out = newExecOutput(e.execDir(x.ID))
	e.mu.Lock()
	defer e.mu.Unlock()
	n := 0
	for id, o := range e.execs {
		switch {
		case o.Config.Container != cfg.Container || o.over():
		case o.forgotten(x.made):
			delete(e.execs, id)
		default:
			n++
		}
	}
	if n >= maxExecsPerContainer {
		return Exec{}, errdefs.New(errdefs.ErrExhausted, "container %s has %d execs already; the limit is %d", v.Config.ID, n, maxExecsPerContainer)
	}
	e.execs[x.ID] = x
	e.publish(v, "exec_create: "+CommandLine(cfg.Args), "execID", x.ID)
	return x.Exec, nil
}

func execAllowed(v Container) error {
	switch v.State.Status {
	case StatusRunning:
		return nil
	case StatusPaused:
		return errdefs.New(errdefs.ErrConflict, "container %s is paused, unpause the container before exec", v.Config.Name)
	case StatusRestarting:
		return errdefs.New(errdefs.ErrConflict, "container %s is restarting, wait until the container is running", v.Config.ID)
	}
	return errdefs.New(errdefs.ErrConflict, "container %s is not running", v.Config.ID)
}

func (e *Engine) findExec(id string) (*execution, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if x := e.execs[id]; x != nil {
		return x, nil
	}
	return nil, errdefs.New(errdefs.ErrNotFound, "No such exec instance: %s", id)
}

// Exec implements ExecAPI.
func (e *Engine) Exec(id string) (Exec, error) {
	x, err := e.findExec(id)
	if err != nil {
		return Exec{}, err
	}
	return x.view(), nil
}

// Execs implements ExecAPI.
func (e *Engine) Execs(container string) []string {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var ids []string
	for id, x := range e.execs {
		if x.Config.Container == container && !x.over() {
			ids = append(ids, id)
		}
	}
	return ids
}

func (x *execution) over() bool {
	select {
	case <-x.done:
		return true
	default:
		return false
	}
}

// AttachExec implements StreamAPI.
func (e *Engine) AttachExec(_ context.Context, id string, o AttachOptions) (*Attachment, error) {
	x, err := e.findExec(id)
	if err != nil {
		return nil, err
	}
	a, err := x.out.attach(o, x.Config.Terminal)
	if err != nil {
		return nil, err
	}
	if o.Stdin && x.Config.OpenStdin {
		a.Stdin = &stdinWriter{e: e, id: id, hub: x.stdin, last: !x.Config.Terminal}
	}
	return a, nil
}

// StartExec implements ExecAPI.
func (e *Engine) StartExec(ctx context.Context, id string) error {
	x, err := e.findExec(id)
	if err != nil {
		return err
	}
	x.mu.Lock()
	if x.Started {
		x.mu.Unlock()
		return errdefs.New(errdefs.ErrConflict, "exec %s has already run", id)
	}
	x.Started, x.Running = true, true
	cfg := x.Config
	x.mu.Unlock()
	c, err := e.find(cfg.Container)
	var p runner.Process
	if err == nil {
		p, err = e.execIn(ctx, x, c.view(), cfg)
	}
	if err != nil {
		if x.end(failureCode(err)) { // else its end was found by the next connection to the runner
			e.finishExec(x)
		}
		if errorIs(err, errdefs.ErrUnavailable) { // it may run all the same
			e.goWork(func(ctx context.Context) { e.dropStray(ctx, id) })
		}
		return err
	}
	x.mu.Lock()
	if x.Running {
		x.PID = p.PID
	}
	x.mu.Unlock()
	e.publish(c.view(), "exec_start: "+CommandLine(cfg.Args), "execID", id)
	return nil
}

func (e *Engine) execIn(ctx context.Context, x *execution, v Container, cfg ExecConfig) (runner.Process, error) {
	if err := execAllowed(v); err != nil {
		return runner.Process{}, err
	}
	p, err := e.execProcess(v, cfg)
	if err != nil {
		return runner.Process{}, err
	}
	x.out.beginRun()
	io := runner.IO{Spool: x.out.spoolDir(), Stdin: cfg.OpenStdin}
	if !x.out.tapped() {
		io.Spool = "" // nobody listens
	} else if err := os.MkdirAll(io.Spool, 0o700); err != nil {
		return runner.Process{}, storageError("exec", err)
	}
	r, err := e.link.get(ctx)
	if err != nil {
		return runner.Process{}, err
	}
	return r.Exec(ctx, runner.ExecRequest{ID: x.ID, Container: v.Config.ID, Process: p, IO: io})
}

// execProcess describes the new process: the container's own settings where the exec has none.
func (e *Engine) execProcess(v Container, cfg ExecConfig) (*specs.Process, error) {
	user := cfg.User
	if user == "" {
		user = v.Config.User
	}
	// The process's own view of its root; the daemon's mount may have changed since.
	root := "/proc/" + strconv.Itoa(v.State.PID) + "/root"
	u, home, err := resolveUser(root, user, v.Config.Groups)
	if err != nil {
		return nil, err
	}
	sec := v.Config.Security
	sec.Privileged = sec.Privileged || cfg.Privileged
	caps, err := capabilities(sec, e.hostCaps)
	if err != nil {
		return nil, err
	}
	box, err := e.Sandbox(v.Config.Sandbox)
	if err != nil {
		return nil, err
	}
	cwd := cfg.Cwd
	if cwd == "" {
		cwd = v.Config.Cwd
	}
	if cwd == "" {
		cwd = "/"
	}
	p := &specs.Process{
		Terminal: cfg.Terminal, Args: cfg.Args, Cwd: cwd, User: u,
		Env:             processEnv(append(append([]string(nil), v.Config.Env...), cfg.Env...), home, cfg.Terminal, hostname(box.Config)),
		NoNewPrivileges: sec.NoNewPrivileges, Capabilities: capabilitySets(caps, u.UID),
	}
	for _, l := range v.Config.Resources.Ulimits {
		p.Rlimits = append(p.Rlimits, rlimit(l))
	}
	if cfg.ConsoleSize != [2]uint16{} {
		p.ConsoleSize = &specs.Box{Height: uint(cfg.ConsoleSize[0]), Width: uint(cfg.ConsoleSize[1])}
	}
	return p, nil
}

// execEnded handles the exit of an exec'd process.
func (e *Engine) execEnded(ctx context.Context, x *execution, exit runner.Exit) {
	code := exit.Code
	if !exit.Known {
		code = unknownCode
	}
	if !x.end(code) { // its start failed here, but not in the runner
		e.dropStray(context.WithoutCancel(ctx), x.ID)
		return
	}
	e.finishExec(x)
	if err := e.link.delete(context.WithoutCancel(ctx), x.ID); err != nil {
		e.log.Warn("runner did not forget an ended exec", "exec", x.ID, "error", err)
	}
	if v, err := e.Container(x.Config.Container); err == nil {
		e.publish(v, "exec_die", "execID", x.ID, "exitCode", strconv.Itoa(code))
	}
}

// end records the end; false: it has been recorded before.
func (x *execution) end(code int) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.Running {
		return false
	}
	x.Running, x.PID, x.ExitCode = false, 0, code
	return true
}

// finishExec releases what an exec held and forgets it after a while.
func (e *Engine) finishExec(x *execution) {
	x.stdin.drop()
	x.out.endRun(false)
	close(x.done)
	time.AfterFunc(execKept, func() {
		e.mu.Lock()
		delete(e.execs, x.ID)
		e.mu.Unlock()
		_ = os.RemoveAll(filepath.Dir(x.out.spoolDir())) // in the run directory: gone at reboot at the latest
	})
}

// dropExecs forgets the execs of a removed container. One whose end was not told, because the
// runner was away, ended with the container.
func (e *Engine) dropExecs(container string) {
	e.mu.Lock()
	var dropped []*execution
	for id, x := range e.execs {
		if x.Config.Container == container {
			delete(e.execs, id)
			dropped = append(dropped, x)
		}
	}
	e.mu.Unlock()
	for _, x := range dropped {
		if x.end(unknownCode) {
			e.finishExec(x)
		}
		_ = os.RemoveAll(e.execDir(x.ID))
	}
}

// WaitExec implements ExecAPI.
func (e *Engine) WaitExec(ctx context.Context, id string) (Exec, error) {
	x, err := e.findExec(id)
	if err != nil {
		return Exec{}, err
	}
	select {
	case <-x.done:
		return x.view(), nil
	case <-ctx.Done():
		return Exec{}, ctx.Err()
	}
}

// ResizeExec implements ExecAPI.
func (e *Engine) ResizeExec(ctx context.Context, id string, height, width uint16) error {
	x, err := e.findExec(id)
	if err != nil {
		return err
	}
	if !x.view().Running {
		return errdefs.New(errdefs.ErrConflict, "exec %s is not running", id)
	}
	return e.link.do(ctx, func(r Runner) error { return r.Resize(ctx, id, height, width) })
}

// capWriter keeps the first most bytes and swallows the rest.
type capWriter struct {
	buf  bytes.Buffer
	most int
}

func (w *capWriter) Write(p []byte) (int, error) {
	if room := w.most - w.buf.Len(); room > 0 {
		w.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// ExecSync implements ExecAPI.
func (e *Engine) ExecSync(ctx context.Context, container string, args []string, timeout time.Duration) ([]byte, []byte, int, error) {
	x, err := e.CreateExec(ctx, ExecConfig{Container: container, Args: args})
	if err != nil {
		return nil, nil, 0, err
	}
	a, err := e.AttachExec(ctx, x.ID, AttachOptions{Stdout: true, Stderr: true})
	if err != nil {
		return nil, nil, 0, err
	}
	defer a.Close()
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	if err := e.StartExec(ctx, x.ID); err != nil {
		return nil, nil, 0, err
	}
	stdout, stderr := &capWriter{most: execSyncMost}, &capWriter{most: execSyncMost}
	err = a.Copy(ctx, stdout, stderr)
	if err == nil {
		x, err = e.WaitExec(ctx, x.ID)
	}
	if ctx.Err() != nil {
		kill := context.WithoutCancel(ctx)
		if kerr := e.link.do(kill, func(r Runner) error { return r.Kill(kill, x.ID, int(unix.SIGKILL), false) }); kerr != nil && !errorIs(kerr, errdefs.ErrNotFound) && !errorIs(kerr, errdefs.ErrConflict) {
			e.log.Warn("exec beyond its time not killed", "exec", x.ID, "error", kerr)
		}
		return stdout.buf.Bytes(), stderr.buf.Bytes(), -1, fmt.Errorf("command %q: %w", args[0], ctx.Err())
	}
	return stdout.buf.Bytes(), stderr.buf.Bytes(), x.ExitCode, err
}
