package launch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
)

// Limits of the seccomp programs kept.
const (
	maxPrograms    = 32 // different profiles; more are compiled for each start, by libcontainer
	maxProgram     = 2 << 20
	compileTimeout = 10 * time.Second
)

// firstExtraFile is the number under which a process gets the first of its extra files.
const firstExtraFile = 3

// compileCommand is the program's first argument when it is to compile a seccomp profile.
const compileCommand = "seccomp"

// Programs keeps compiled seccomp programs, in sealed memory files that inits inherit. A profile
// is compiled beside its first start, which does not wait for it, in a process of its own. How an
// init takes its program, and why it cannot be a wrong one, is in program.c.
//
// The zero value is ready; methods may be called concurrently.
type Programs struct {
	mu       sync.Mutex
	files    map[[sha256.Size]byte]*os.File // nil: it cannot be compiled
	busy     bool
	compiles sync.WaitGroup
}

// find returns the program of a profile, or nil while there is none. The file stays open.
func (p *Programs) find(config *configs.Seccomp) *os.File {
	if p == nil || config == nil {
		return nil
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return nil
	}
	key := sha256.Sum256(raw)
	p.mu.Lock()
	defer p.mu.Unlock()
	file, known := p.files[key]
	if known || p.busy || len(p.files) >= maxPrograms {
		return file
	}
	p.busy = true
	p.compiles.Go(func() {
		file, err := compile(raw)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.busy = false
		if errors.Is(err, errCompile) {
			file = nil // nor will the next try succeed; the start says what is wrong
		} else if err != nil {
			return
		}
		if p.files == nil {
			p.files = map[[sha256.Size]byte]*os.File{}
		}
		p.files[key] = file
	})
	return nil
}

// Wait returns when no compilation is under way.
func (p *Programs) Wait() { p.compiles.Wait() }

// errCompile is a profile that libseccomp refuses.
var errCompile = errors.New("the profile does not compile")

func compile(config []byte) (*os.File, error) {
	ctx, cancel := context.WithTimeout(context.Background(), compileTimeout)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", compileCommand)
	cmd.Stdin, cmd.Stdout = bytes.NewReader(config), &out
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Exited() {
			return nil, fmt.Errorf("%w: %w", errCompile, err)
		}
		return nil, err
	}
	if out.Len() == 0 || out.Len() > maxProgram {
		return nil, errCompile
	}
	return sealed(out.Bytes())
}

// sealed returns a file in memory that nobody can change.
func sealed(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("berth-seccomp", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(fd), "berth-seccomp")
	if _, err := file.Write(content); err != nil {
		file.Close()
		return nil, err
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	if err != nil {
		file.Close()
		return nil, os.NewSyscallError("seal", err)
	}
	return file, nil
}
