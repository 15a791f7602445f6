package dockerapi

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strings"

	containertypes "github.com/moby/moby/api/types/container"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// versionConsoleSize is from when clients may say how large their terminal is at the start.
const versionConsoleSize = 42

// execDialect is what docker said about an exec and the engine does not know.
type execDialect struct {
	AttachStdin, AttachStdout, AttachStderr bool
	DetachKeys                              []byte `json:",omitempty"`
}

func (s *Server) execRoutes() []route {
	return []route{
		{method: http.MethodPost, pattern: "/containers/{id}/exec", handler: s.createExec},
		{method: http.MethodPost, pattern: "/exec/{id}/start", handler: s.startExec},
		{method: http.MethodPost, pattern: "/exec/{id}/resize", handler: s.resizeExec},
		{method: http.MethodGet, pattern: "/exec/{id}/json", handler: s.inspectExec},
	}
}

func (s *Server) createExec(w http.ResponseWriter, r *request) error {
	var q containertypes.ExecCreateRequest
	if err := r.decodeJSON(&q); err != nil {
		return err
	}
	if len(q.Cmd) == 0 {
		return invalid("No exec command specified")
	}
	keys, err := detachSequence(q.DetachKeys)
	if err != nil {
		return err
	}
	if q.WorkingDir != "" && !strings.HasPrefix(q.WorkingDir, "/") {
		return invalid("the working directory '%s' is invalid, it needs to be an absolute path", q.WorkingDir)
	}
	dialect, err := json.Marshal(execDialect{q.AttachStdin, q.AttachStdout, q.AttachStderr, keys})
	if err != nil {
		return err
	}
	c := engine.ExecConfig{
		Container: r.vars["id"], Args: q.Cmd, Env: q.Env, Cwd: q.WorkingDir, User: q.User,
		Terminal: q.Tty, OpenStdin: q.AttachStdin, Privileged: q.Privileged, Dialect: dialect,
	}
	if q.ConsoleSize != nil && q.Tty && r.version >= versionConsoleSize {
		if c.ConsoleSize, err = consoleSize(*q.ConsoleSize); err != nil {
			return err
		}
	}
	x, err := s.engine.CreateExec(r.Context(), c)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, containertypes.ExecCreateResponse{ID: x.ID})
}

// consoleSize checks a terminal's height and width.
func consoleSize(size [2]uint) ([2]uint16, error) {
	if size[0] > math.MaxUint16 || size[1] > math.MaxUint16 {
		return [2]uint16{}, invalid("invalid console size %dx%d: at most %d rows and columns", size[0], size[1], math.MaxUint16)
	}
	return [2]uint16{uint16(size[0]), uint16(size[1])}, nil
}

func (s *Server) startExec(w http.ResponseWriter, r *request) error {
	var q containertypes.ExecStartRequest
	if r.hasBody() {
		if err := r.decodeJSON(&q); err != nil {
			return err
		}
	}
	x, err := s.engine.Exec(r.vars["id"])
	if err != nil {
		return err
	}
	if x.Started {
		return conflict("Error: Exec command %s is already running or has already run", x.ID)
	}
	c, err := s.engine.Container(x.Config.Container)
	if err != nil {
		return err
	}
	switch c.State.Status {
	case engine.StatusRunning:
	case engine.StatusPaused:
		return conflict("container %s is paused, unpause the container before exec", c.Config.ID)
	default:
		return conflict("container %s is not running", c.Config.ID)
	}
	var size [2]uint16
	if q.ConsoleSize != nil && x.Config.Terminal && r.version >= versionConsoleSize {
		if size, err = consoleSize(*q.ConsoleSize); err != nil {
			return err
		}
	}
	if q.Detach {
		if err := s.engine.StartExec(r.Context(), x.ID); err != nil {
			return invocation("OCI runtime exec failed: exec failed: unable to start container process", err)
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return s.runExec(w, r, x, c, size)
}

// runExec starts an exec with the client's connection as its standard streams.
func (s *Server) runExec(w http.ResponseWriter, r *request, x engine.Exec, c engine.Container, size [2]uint16) error {
	var wants execDialect
	if err := json.Unmarshal(x.Config.Dialect, &wants); err != nil {
		wants = execDialect{AttachStdin: x.Config.OpenStdin, AttachStdout: true, AttachStderr: true} // not made by docker
	}
	o := engine.AttachOptions{Stdin: wants.AttachStdin, Stdout: wants.AttachStdout, Stderr: wants.AttachStderr}
	ctx, cancel := streamContext(r)
	defer cancel()
	att, err := s.engine.AttachExec(ctx, x.ID, o)
	if err != nil {
		return err
	}
	defer att.Close()
	d, err := s.hijack(w, r, streamType(x.Config.Terminal, r.version))
	if err != nil {
		return err
	}
	out := newOutput(d, x.Config.Terminal, o)
	// A client that leaves now leaves a running program behind, as with docker.
	if err := s.engine.StartExec(ctx, x.ID); err != nil {
		// The answer has begun: docker clients expect the reason in the stream, and the exit
		// code from inspecting the exec.
		err = invocation("OCI runtime exec failed: exec failed: unable to start container process", err)
		to := out.stdout
		if to == nil {
			to = newOutput(d, x.Config.Terminal, engine.AttachOptions{Stdout: true}).stdout
		}
		_, _ = fmt.Fprintf(to, "%v\r\n", err) // if this fails the client is gone
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			_ = d.pump(nil) // what the client still says has no taker
		}()
		d.finish(gone)
		return nil
	}
	if size != [2]uint16{} {
		if err := s.engine.ResizeExec(ctx, x.ID, size[0], size[1]); err != nil {
			s.log.Debug("resizing an exec's terminal", "exec", x.ID, "error", err)
		}
	}
	var keys []byte
	if x.Config.Terminal {
		keys = wants.DetachKeys
	}
	if detached := d.join(ctx, cancel, att, out, nil, keys); detached {
		s.publishContainer(c, "exec_detach", "execID", x.ID)
	}
	return nil
}

// invocation gives a failed start the words from which docker's clients tell exit codes 126
// and 127.
func invocation(what string, err error) error {
	kind := errdefs.Kind(err)
	text := err.Error()
	has := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(text, w) {
				return true
			}
		}
		return false
	}
	switch kind {
	case errdefs.ErrNoProgram:
		if !has("executable file not found", "no such file or directory") {
			text += ": executable file not found in $PATH"
		}
	case errdefs.ErrInvocation:
		if !has("permission denied", "not a directory", "is a directory") {
			text += ": permission denied"
		}
	default:
		return err
	}
	return errdefs.New(kind, "%s: %s: unknown", what, text)
}

func (s *Server) resizeExec(w http.ResponseWriter, r *request) error {
	h, width, err := r.terminalSize()
	if err != nil {
		return err
	}
	if err := s.engine.ResizeExec(r.Context(), r.vars["id"], h, width); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (s *Server) inspectExec(w http.ResponseWriter, r *request) error {
	x, err := s.engine.Exec(r.vars["id"])
	if err != nil {
		return err
	}
	wants := execDialect{AttachStdin: x.Config.OpenStdin, AttachStdout: true, AttachStderr: true}
	if len(x.Config.Dialect) > 0 {
		if err := json.Unmarshal(x.Config.Dialect, &wants); err != nil {
			s.log.Debug("exec of another dialect", "exec", x.ID, "error", err)
		}
	}
	out := containertypes.ExecInspectResponse{
		ID: x.ID, Running: x.Running, OpenStdin: wants.AttachStdin, OpenStdout: wants.AttachStdout,
		OpenStderr: wants.AttachStderr, ContainerID: x.Config.Container, DetachKeys: wants.DetachKeys, Pid: x.PID,
		ProcessConfig: &containertypes.ExecProcessConfig{
			Tty: x.Config.Terminal, Privileged: &x.Config.Privileged, User: x.Config.User, Arguments: []string{},
		},
	}
	if len(x.Config.Args) > 0 {
		out.ProcessConfig.Entrypoint = x.Config.Args[0]
		out.ProcessConfig.Arguments = append(out.ProcessConfig.Arguments, x.Config.Args[1:]...)
	}
	if x.Started && !x.Running {
		out.ExitCode = &x.ExitCode
		out.CanRemove = true
	}
	return writeJSON(w, http.StatusOK, out)
}
