// Package launch is the way from an OCI runtime specification to a running process, by
// libcontainer: the only package of Berth that links it.
//
// It keeps no state of its own; what is known of a container is in libcontainer's directory
// and is loaded when it is needed. It neither waits for processes nor reaps them, except those
// whose start fails, and does not know what becomes of their output. Operations on different
// containers may run concurrently; the caller lets only one at a time be at one container.
package launch

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// Limits of a launch.
const (
	maxSpec      = 16 << 20 // bytes of config.json
	startTimeout = 30 * time.Second
	startCheck   = 50 // milliseconds between looks at an init that does not answer
)

// initComm is the name that libcontainer's init bears until it becomes the user's program.
const initComm = "runc:[2:INIT]\n"

// Launcher starts containers whose state is below Dir.
type Launcher struct {
	Dir      string    // libcontainer's state directory: one subdirectory per container
	Programs *Programs // seccomp programs compiled before; nil: none are kept
}

// Stdio are a process's standard streams. They stay the caller's. With a Console socket the
// process gets a terminal, whose master is sent there; the others are then nil.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
	Console               *os.File
}

// ReadSpec reads config.json of a bundle and refuses what a container cannot do without.
func ReadSpec(bundle string) (*specs.Spec, error) {
	if !filepath.IsAbs(bundle) {
		return nil, errdefs.New(errdefs.ErrInvalid, "bundle %q: the path is not absolute", bundle)
	}
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "bundle %s: %w", bundle, err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxSpec {
		return nil, errdefs.New(errdefs.ErrInvalid, "bundle %s: config.json has more than %d bytes", bundle, maxSpec)
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(raw, spec); err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "bundle %s: config.json: %w", bundle, err)
	}
	switch {
	case spec.Root == nil || spec.Root.Path == "":
		return nil, errdefs.New(errdefs.ErrInvalid, "bundle %s: config.json names no root", bundle)
	case spec.Linux == nil || !filepath.IsAbs(spec.Linux.CgroupsPath):
		return nil, errdefs.New(errdefs.ErrInvalid, "bundle %s: linux.cgroupsPath must be an absolute path", bundle)
	}
	if !filepath.IsAbs(spec.Root.Path) {
		spec.Root.Path = filepath.Join(bundle, spec.Root.Path)
	}
	return spec, CheckProcess(spec.Process)
}

// CheckProcess refuses a process that cannot be started.
func CheckProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return errdefs.New(errdefs.ErrInvalid, "the specification has no process")
	case len(p.Args) == 0 || p.Args[0] == "":
		return errdefs.New(errdefs.ErrInvalid, "no command is specified; name one, or use an image that has one")
	case !filepath.IsAbs(p.Cwd):
		return errdefs.New(errdefs.ErrInvalid, "working directory %q: the path is not absolute", p.Cwd)
	}
	return nil
}

// Create makes a container from spec, with an init that waits for Start, and returns its pid.
// After an error nothing of it is left.
func (l Launcher) Create(id string, spec *specs.Spec, stdio Stdio) (pid int, err error) {
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec})
	if err != nil {
		return 0, errdefs.New(errdefs.ErrInvalid, "container %s: %w", id, err)
	}
	process, err := newProcess(spec.Process, stdio)
	if err != nil {
		return 0, err
	}
	process.Init = true
	l.addProgram(process, config.Seccomp)
	container, err := libcontainer.Create(l.Dir, id, config)
	if errors.Is(err, libcontainer.ErrExist) {
		return 0, errdefs.New(errdefs.ErrExists, "container %s exists already", id)
	}
	if err != nil {
		return 0, errdefs.New(errdefs.ErrInvalid, "container %s: %w", id, err)
	}
	if err := container.Start(process); err != nil {
		_ = container.Destroy() // what it leaves the caller's Remove finds
		return 0, startError(err)
	}
	return process.Pid()
}

// Start lets the init of a created container go on to the user's program and returns once it
// has. pidfd is the init's. errdefs.ErrConflict: it went on before, or is dead.
func (l Launcher) Start(id string, pid, pidfd int) error {
	// As libcontainer's Exec, but it does not leave a thread in open(2) when the init dies.
	path := l.fifo(id)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return errdefs.New(errdefs.ErrConflict, "container %s is started already", id)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	deadline := time.Now().Add(startTimeout)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, startCheck); err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		var b [1]byte
		if n, _ := unix.Read(fd, b[:]); n == 1 {
			break
		}
		if fds[1].Revents != 0 {
			return errdefs.New(errdefs.ErrConflict, "container %s: its first process died before it was started", id)
		}
		if !Waiting(pid) {
			break // a runner before us read the byte and was killed before it removed the FIFO
		}
		if time.Now().After(deadline) {
			return errdefs.New(errdefs.ErrUnavailable, "container %s: its first process does not go on after %s", id, startTimeout)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (l Launcher) fifo(id string) string { return filepath.Join(l.Dir, id, "exec.fifo") }

// Created tells whether the container's init, of this pid, still waits for Start. It tidies up
// after a runner that was killed right behind a Start.
func (l Launcher) Created(id string, pid int) bool {
	if _, err := os.Lstat(l.fifo(id)); err != nil {
		return false
	}
	if Waiting(pid) {
		return true
	}
	_ = os.Remove(l.fifo(id))
	return false
}

// Waiting tells whether the process still is libcontainer's init.
func Waiting(pid int) bool {
	raw, err := os.ReadFile(procPath(pid, "comm"))
	return err == nil && string(raw) == initComm
}

// Exec starts one more process in a running container and returns its pid.
func (l Launcher) Exec(container string, p *specs.Process, stdio Stdio) (pid int, err error) {
	if err := CheckProcess(p); err != nil {
		return 0, err
	}
	process, err := newProcess(p, stdio)
	if err != nil {
		return 0, err
	}
	c, err := l.load(container)
	if err != nil {
		return 0, err
	}
	config := c.Config()
	l.addProgram(process, config.Seccomp)
	if err := c.Start(process); err != nil {
		return 0, startError(err)
	}
	return process.Pid()
}

// addProgram gives the process's init the compiled form of its profile if there is one. It is no
// file of the user's program: init makes it close on exec.
func (l Launcher) addProgram(process *libcontainer.Process, profile *configs.Seccomp) {
	if file := l.Programs.find(profile); file != nil {
		process.ExtraFiles = []*os.File{file}
	}
}

func (l Launcher) load(id string) (*libcontainer.Container, error) {
	c, err := libcontainer.Load(l.Dir, id)
	if errors.Is(err, libcontainer.ErrNotExist) || errors.Is(err, libcontainer.ErrInvalidID) {
		return nil, errdefs.New(errdefs.ErrNotFound, "container %s does not exist", id)
	}
	return c, err
}

// Pause freezes the container's processes.
func (l Launcher) Pause(id string) error {
	c, err := l.load(id)
	if err != nil {
		return err
	}
	return stateError(id, c.Pause())
}

// Resume lets them go on.
func (l Launcher) Resume(id string) error {
	c, err := l.load(id)
	if err != nil {
		return err
	}
	return stateError(id, c.Resume())
}

func stateError(id string, err error) error {
	switch {
	case errors.Is(err, libcontainer.ErrNotRunning):
		return errdefs.New(errdefs.ErrConflict, "container %s is not running", id)
	case errors.Is(err, libcontainer.ErrNotPaused):
		return errdefs.New(errdefs.ErrConflict, "container %s is not paused", id)
	}
	return err
}

// Remove removes what libcontainer remembers of a container. Its processes and control groups
// are the caller's to remove.
func (l Launcher) Remove(id string) error {
	if id == "" || filepath.Base(id) != id {
		return errdefs.New(errdefs.ErrInvalid, "%q is not the ID of a container", id)
	}
	return os.RemoveAll(filepath.Join(l.Dir, id))
}

// IDs lists the containers that libcontainer remembers, whole or not.
func (l Launcher) IDs() ([]string, error) {
	entries, err := os.ReadDir(l.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, err
}
