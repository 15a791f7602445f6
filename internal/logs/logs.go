// Package logs renders what a process wrote (package spool) into the files that people and log
// shippers read, and reads those back.
//
// Two formats: docker's json-file, bounded and rotated here, and Kubernetes' CRI text, which the
// kubelet rotates. Every byte of output is rendered exactly once, also when the rendering process
// is killed at any instant: a small checkpoint says how far the spool was read and how long the
// rendered file then was. What was written beyond that is written again at the same place, and
// since rendering depends on nothing but the spool and the checkpoint, it is the same. What does
// depend on something else (a rotation, a file given up on a full disk, the extent of a gap) is
// put down in the checkpoint before it is done.
//
// The package owns rendered files, checkpoints and the trimming of spools. It has no goroutines:
// the owner of a Renderer calls Advance when there is output. It does not know containers.
package logs

import (
	"path/filepath"
	"strconv"
	"time"

	"berth/internal/errdefs"
)

// The drivers.
const (
	DriverJSONFile = "json-file" // docker's format
	DriverCRI      = "cri"       // Kubernetes' text format
	DriverNone     = "none"      // nothing is kept; OnChunk still sees all
)

// The streams.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// Defaults and bounds.
const (
	DefaultMaxBytes = 10_000_000 // of one json-file
	DefaultMaxFiles = 3

	maxFilesBound = 1000     // the most that MaxFiles may be
	maxPiece      = 16 << 10 // bytes of output in one entry; longer lines are split, as docker does
	maxLine       = 1 << 20  // bytes of a rendered entry; what is longer in a file is not ours
	minRead       = 4 << 10  // the read buffer grows between these
	maxRead       = 64 << 10
	maxOut        = 256 << 10 // rendered bytes before they are written
	maxAdvance    = 4 << 20   // bytes of output rendered by one Advance
	trimEvery     = 64 << 10  // bytes of output before a look whether a segment can go
	minDiscard    = 256 << 10 // on a full disk the current file is given up from this size on
)

// Config says where a log comes from and goes to. Paths are absolute.
type Config struct {
	SpoolDir       string // of package spool
	CheckpointPath string // a file of this package's own
	Driver         string
	Path           string // of the current rendered file; older ones are Path.1, Path.2, …
	MaxBytes       int64  // per file; 0: DefaultMaxBytes for json-file, unbounded for cri
	MaxFiles       int    // with the current one; 0: DefaultMaxFiles

	// OnChunk, if set, is given all output raw, as soon as it is known and before it is
	// rendered, from the time Open was called on (and what was then not yet rendered). It is
	// called by Advance and Finish and must not call the Renderer. p is valid until it returns.
	OnChunk func(stream string, t time.Time, p []byte)

	// Floor, if set, returns the lowest position that somebody else still reads the spool at;
	// nothing from there on is trimmed. It must not call the Renderer.
	Floor func() uint64
}

func (c Config) normal() (Config, error) {
	switch c.Driver {
	case DriverJSONFile:
		if c.MaxBytes == 0 {
			c.MaxBytes = DefaultMaxBytes
		}
	case DriverCRI, DriverNone:
	default:
		return c, errdefs.New(errdefs.ErrUnsupported, "log driver %q: berth has %s, %s and %s", c.Driver, DriverJSONFile, DriverCRI, DriverNone)
	}
	if c.MaxFiles == 0 {
		c.MaxFiles = DefaultMaxFiles
	}
	if err := CheckLimits(c.MaxBytes, c.MaxFiles); err != nil {
		return c, err
	}
	if c.Driver != DriverNone && !filepath.IsAbs(c.Path) {
		return c, errdefs.New(errdefs.ErrInvalid, "log path %q: it is not absolute", c.Path)
	}
	return c, nil
}

// CheckLimits refuses, with ErrInvalid, a size or number of files that no log can have; 0 stands
// for the default of either.
func CheckLimits(maxBytes int64, maxFiles int) error {
	if maxBytes < 0 || maxFiles < 0 || maxFiles > maxFilesBound {
		return errdefs.New(errdefs.ErrInvalid, "log of %d bytes in %d files: a log has a size and 1 to %d files", maxBytes, maxFiles, maxFilesBound)
	}
	return nil
}

// file is the path of the i-th file, 0 being the current one.
func (c Config) file(i int) string {
	if i == 0 {
		return c.Path
	}
	return c.Path + "." + strconv.Itoa(i)
}

// Entry is one line of a log, or a piece of a long one.
type Entry struct {
	Time    time.Time
	Stream  string // Stdout or Stderr
	Line    []byte // with its newline, unless Partial
	Partial bool   // more of the line follows, or the process ended without a newline
}
