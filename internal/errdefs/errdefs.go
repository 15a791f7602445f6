// Package errdefs holds the kinds of error that cross package boundaries in Berth.
//
// Every error that leaves a package wraps one of the kinds below, so that each dialect
// turns kinds into its own status codes in a single function. The message says what was
// asked, what is wrong and, where it helps, what to do.
// All functions are safe for concurrent use.
package errdefs

import (
	"errors"
	"fmt"
)

// The kinds. Compare with errors.Is.
var (
	ErrNotFound     = errors.New("not found")
	ErrExists       = errors.New("already exists")
	ErrInvalid      = errors.New("invalid argument")
	ErrConflict     = errors.New("conflict")        // the object's state forbids it
	ErrNotModified  = errors.New("not modified")    // it already is as asked
	ErrUnauthorized = errors.New("unauthorized")    // who are you
	ErrForbidden    = errors.New("forbidden")       // not you
	ErrUnsupported  = errors.New("not supported")   // Berth lacks it and says so
	ErrUnavailable  = errors.New("unavailable")     // a peer is away; trying again may help
	ErrExhausted    = errors.New("exhausted")       // disk, addresses, a bound
	ErrInvocation   = errors.New("cannot invoke")   // the program cannot be executed (exit code 126)
	ErrNoProgram    = errors.New("no such program") // the program does not exist (exit code 127)
	ErrDataLoss     = errors.New("data is corrupt") // a digest or checksum does not match
)

var kinds = []error{
	ErrNotFound, ErrExists, ErrInvalid, ErrConflict, ErrNotModified, ErrUnauthorized, ErrForbidden,
	ErrUnsupported, ErrUnavailable, ErrExhausted, ErrInvocation, ErrNoProgram, ErrDataLoss,
}

// kindError carries a message of its own and a kind that the message need not repeat.
type kindError struct {
	kind  error
	cause error
	msg   string
}

func (e *kindError) Error() string { return e.msg }

func (e *kindError) Unwrap() []error {
	if e.cause == nil {
		return []error{e.kind}
	}
	return []error{e.kind, e.cause}
}

// New returns an error of the given kind whose text is exactly the formatted message.
// A %w verb keeps its operand in the chain.
func New(kind error, format string, args ...any) error {
	formatted := fmt.Errorf(format, args...)
	return &kindError{kind: kind, cause: errors.Unwrap(formatted), msg: formatted.Error()}
}

// Kind returns the kind that err wraps, or nil when it wraps none (an internal error).
func Kind(err error) error {
	for _, k := range kinds {
		if errors.Is(err, k) {
			return k
		}
	}
	return nil
}

// Name returns a stable one-word name for the kind of err, for wire protocols; "" for none.
func Name(err error) string {
	if k := Kind(err); k != nil {
		return k.Error()
	}
	return ""
}

// FromName is the inverse of Name: an error of the named kind with the given text.
// An unknown name gives a plain error.
func FromName(name, msg string) error {
	for _, k := range kinds {
		if k.Error() == name {
			return New(k, "%s", msg)
		}
	}
	return errors.New(msg)
}

// Wrap puts a prefix before err's text and keeps its chain.
func Wrap(prefix string, err error) error { return fmt.Errorf("%s: %w", prefix, err) }
