//go:build cgo && seccomp

package launch

// #cgo pkg-config: libseccomp
// #cgo LDFLAGS: -Wl,--wrap=seccomp_init -Wl,--wrap=seccomp_arch_add -Wl,--wrap=seccomp_attr_set
// #cgo LDFLAGS: -Wl,--wrap=seccomp_rule_add_array -Wl,--wrap=seccomp_load -Wl,--wrap=seccomp_export_bpf
// #include "program.h"
import "C"

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// useProgram has libcontainer's init take the compiled program that it may have inherited as its
// first file.
func useProgram() { C.berth_program_use(firstExtraFile) }

// compileProgram reads libcontainer's seccomp configuration from standard input and writes the
// program that libcontainer would load, with the calls that made it, to standard output.
func compileProgram() error {
	config := new(configs.Seccomp)
	if err := json.NewDecoder(os.Stdin).Decode(config); err != nil {
		return fmt.Errorf("seccomp configuration: %w", err)
	}
	C.berth_program_record(C.int(os.Stdout.Fd()))
	_, err := seccomp.InitSeccomp(config)
	if errors.Is(err, unix.ECANCELED) {
		return nil
	}
	return fmt.Errorf("compile a seccomp program: %w", err)
}
