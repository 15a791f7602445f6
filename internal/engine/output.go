package engine

import (
	"context"
	"math"
	"path/filepath"
	"sync"
	"time"

	"berth/internal/spool"
	"berth/internal/state"
)

// output is what the engine knows of one process's output: its spool, who reads it, and the
// renderer of its log. Without output coming in it costs no goroutine and no open file.
type output struct {
	dir      string   // the spool
	log      *logFile // nil: output goes to attached clients only
	mu       sync.Mutex
	grown    chan struct{} // closed and replaced when there is more to read, or a run ended
	taps     map[*tap]struct{}
	run      uint64 // counts runs
	endedRun uint64
	busy     bool // a renderer goroutine is at work
	dirty    bool // more output was announced meanwhile
	closed   bool // the container is gone
}

// tap is one attached client's position in the spool.
type tap struct{ pos uint64 }

func (t *tap) at(o *output) uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return t.pos
}

// advance moves the tap and frees what nobody needs any more.
func (t *tap) advance(o *output, pos uint64) {
	o.mu.Lock()
	t.pos = pos
	o.mu.Unlock()
	if o.log == nil {
		o.trim(pos)
	}
}

// trim deletes segments below limit that no tap needs. Errors leave them for the next time.
func (o *output) trim(limit uint64) { _ = spool.Trim(o.dir, min(limit, o.floor())) }

// floor is the lowest position that an attached client still reads at.
func (o *output) floor() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	lowest := uint64(math.MaxUint64)
	for t := range o.taps {
		lowest = min(lowest, t.pos)
	}
	return lowest
}

func newOutput(root state.Root, cfg ContainerConfig) *output {
	dir := filepath.Join(root.Container(cfg.ID), "spool")
	o := &output{dir: dir, log: newLogFile(root, cfg, dir), grown: make(chan struct{}), taps: map[*tap]struct{}{}}
	o.log.cfg.Floor = o.floor
	return o
}

// newExecOutput keeps output for attached clients only.
func newExecOutput(dir string) *output {
	return &output{dir: filepath.Join(dir, "spool"), grown: make(chan struct{}), taps: map[*tap]struct{}{}}
}

func (o *output) spoolDir() string { return o.dir }

func (o *output) logPath() string {
	if o.log == nil {
		return ""
	}
	return o.log.path()
}

func (o *output) tapped() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.taps) > 0
}

func (o *output) beginRun() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.run++
	if o.log != nil {
		o.log.resume()
		o.log.setLive(true)
	}
}

// endRun tells attached clients that no more output will come; followers of the log wait on when
// the container will run again by itself.
func (o *output) endRun(again bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.endedRun = o.run
	o.wake()
	if o.log != nil {
		o.log.setLive(again)
	}
}

// wake tells all readers to look again; o.mu is held.
func (o *output) wake() {
	close(o.grown)
	o.grown = make(chan struct{})
}

// watch returns a channel that closes at the next change, and whether a run is over.
func (o *output) watch(run uint64) (<-chan struct{}, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.grown, o.endedRun >= run
}

// grew is told that the spool has more. Rendering happens in a goroutine that ends when there is
// nothing left, so that the caller never waits for a disk.
func (o *output) grew(e *Engine) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wake()
	if o.log == nil {
		return
	}
	o.dirty = true
	if o.busy {
		return
	}
	o.busy = true
	e.goWork(func(context.Context) {
		for {
			o.mu.Lock()
			if !o.dirty {
				o.busy = false
				o.mu.Unlock()
				return
			}
			o.dirty = false
			o.mu.Unlock()
			o.render(e, false)
		}
	})
}

// finish renders the rest at the end of a run.
func (o *output) finish(e *Engine) {
	if o.log != nil {
		o.render(e, true)
	}
}

// renderAgain is how long output waits in the spool after its rendering failed (full disk).
const renderAgain = time.Second

func (o *output) render(e *Engine, last bool) {
	err := o.log.render(last)
	if err == nil {
		return
	}
	e.log.Error("output not rendered into its log; it waits in the spool", "log", o.log.path(), "error", err)
	time.AfterFunc(renderAgain, func() {
		if e.ctx.Err() == nil && !o.gone() {
			o.grew(e)
		}
	})
}

func (o *output) gone() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.closed
}

// close releases files.
func (o *output) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	if o.log != nil {
		o.log.close()
	}
}
