//go:build !cgo || !seccomp

package launch

import "berth/internal/errdefs"

func useProgram() {}

func compileProgram() error {
	return errdefs.New(errdefs.ErrUnsupported, "seccomp: this build has no libseccomp; build with cgo and the tag seccomp")
}
