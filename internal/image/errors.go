package image

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	cerrdefs "github.com/containerd/errdefs"

	"berth/internal/errdefs"
)

// localError gives a failure of our own disk and databases a kind and says what was tried.
// An error that has a kind already, and the end of a context, pass unchanged.
func localError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errdefs.Kind(err) != nil:
		return err
	case diskFull(err):
		return errdefs.New(errdefs.ErrExhausted, "%s: no space left on device", what)
	case cerrdefs.IsNotFound(err):
		return errdefs.New(errdefs.ErrNotFound, "%s: %s", what, oneLine(err))
	default:
		return fmt.Errorf("%s: %w", what, err)
	}
}

// diskFull tells whether space or quota ran out. Some libraries keep only the text of the cause.
func diskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) ||
		(err != nil && strings.Contains(err.Error(), syscall.ENOSPC.Error()))
}

// oneLine is an error's text without line breaks, which joined errors have.
func oneLine(err error) string {
	fields := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(fields, "; ")
}
