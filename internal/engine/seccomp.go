package engine

import (
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/errdefs"
)

// Unconfined switches a protection off.
const Unconfined = "unconfined"

// setSeccomp resolves the container's profile for its capabilities into the spec.
func setSeccomp(s *specs.Spec, sec Security) error {
	if sec.Privileged && sec.Seccomp == "" || sec.Seccomp == Unconfined {
		return nil
	}
	var (
		p   *specs.LinuxSeccomp
		err error
	)
	if sec.Seccomp == "" {
		p, err = seccomp.GetDefaultProfile(s)
	} else {
		p, err = seccomp.LoadProfile(sec.Seccomp, s)
	}
	if err != nil {
		return errdefs.New(errdefs.ErrInvalid, "seccomp profile: %w", err)
	}
	s.Linux.Seccomp = p
	return nil
}
