package launch

import (
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// newProcess turns the specification of a process into libcontainer's.
func newProcess(p *specs.Process, stdio Stdio) (*libcontainer.Process, error) {
	out := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		Label: p.SelinuxLabel, AppArmorProfile: p.ApparmorProfile, NoNewPrivileges: &p.NoNewPrivileges,
		Scheduler: p.Scheduler, IOPriority: p.IOPriority,
	}
	for _, g := range p.User.AdditionalGids {
		out.AdditionalGroups = append(out.AdditionalGroups, int(g))
	}
	if c := p.Capabilities; c != nil {
		out.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable,
			Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, r := range p.Rlimits {
		kind, ok := rlimits()[r.Type]
		if !ok {
			return nil, errdefs.New(errdefs.ErrInvalid, "limit %q is not known", r.Type)
		}
		out.Rlimits = append(out.Rlimits, configs.Rlimit{Type: kind, Hard: r.Hard, Soft: r.Soft})
	}
	var err error
	if out.CPUAffinity, err = configs.ConvertCPUAffinity(p.ExecCPUAffinity); err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "cpu affinity: %w", err)
	}
	if p.Terminal {
		out.ConsoleSocket = stdio.Console
		if p.ConsoleSize != nil {
			out.ConsoleHeight, out.ConsoleWidth = uint16(p.ConsoleSize.Height), uint16(p.ConsoleSize.Width)
		}
		return out, nil
	}
	out.Stdin, out.Stdout, out.Stderr = stdio.Stdin, stdio.Stdout, stdio.Stderr
	return out, nil
}

// rlimits names the resource limits as the runtime specification does (config.md, POSIX process).
func rlimits() map[string]int {
	return map[string]int{
		"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU,
		"RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
		"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
		"RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS,
		"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
		"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
	}
}

// startError gives libcontainer's error the kind that docker's exit codes 126 and 127 are made
// from, and leaves away what says nothing to a user.
func startError(err error) error {
	text := err.Error()
	for _, noise := range []string{"unable to start container process: ", "error during container init: "} {
		text = strings.ReplaceAll(text, noise, "")
	}
	about := strings.HasPrefix(text, "exec: ") || strings.HasPrefix(text, "exec ") || strings.HasPrefix(text, "mkdir ") || strings.Contains(text, "chdir to cwd")
	has := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(text, w) {
				return true
			}
		}
		return false
	}
	switch {
	case about && has("executable file not found", "no such file or directory"):
		return errdefs.New(errdefs.ErrNoProgram, "%s", text)
	case about && has("permission denied", "is a directory", "not a directory", "exec format error"):
		return errdefs.New(errdefs.ErrInvocation, "%s", text)
	case has("cannot exec in a stopped container", "container not running", "cannot exec a container that has stopped"):
		return errdefs.New(errdefs.ErrConflict, "%s", text)
	case has("container init was OOM-killed", "no space left on device"):
		return errdefs.New(errdefs.ErrExhausted, "%s", text)
	}
	return errdefs.New(errdefs.ErrInvalid, "%s", text)
}

func procPath(pid int, name string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), name)
}
