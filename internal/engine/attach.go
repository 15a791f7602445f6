package engine

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"berth/internal/errdefs"
	"berth/internal/spool"
)

// attachBuffer is the largest piece that an attached client is written at once.
const attachBuffer = 64 << 10

// Attach implements StreamAPI.
func (e *Engine) Attach(_ context.Context, ref string, o AttachOptions) (*Attachment, error) {
	c, err := e.find(ref)
	if err != nil {
		return nil, err
	}
	v := c.view()
	if v.State.Status == StatusPaused {
		return nil, errdefs.New(errdefs.ErrConflict, "container %s is paused, unpause the container before attach", ref)
	}
	if v.State.Status == StatusRestarting {
		return nil, errdefs.New(errdefs.ErrConflict, "container %s is restarting, wait until the container is running", ref)
	}
	a, err := c.out.attach(o, v.Config.Terminal)
	if err != nil {
		return nil, err
	}
	if o.Stdin && v.Config.OpenStdin {
		a.Stdin = &stdinWriter{e: e, id: v.Config.ID, hub: c.stdin, last: v.Config.StdinOnce && !v.Config.Terminal}
	}
	e.publish(v, "attach")
	return a, nil
}

// stdinHub shares one process's standard input between attached clients.
type stdinHub struct {
	mu   sync.Mutex
	file *os.File // nil until the first write
	gone bool     // closed for good in this run
}

// write opens the input at the first use: before, the process may not have run.
func (h *stdinHub) write(ctx context.Context, e *Engine, id string, p []byte) (int, error) {
	h.mu.Lock()
	f := h.file
	if h.gone {
		h.mu.Unlock()
		return 0, io.ErrClosedPipe
	}
	h.mu.Unlock()
	if f == nil {
		var err error
		err = e.link.do(ctx, func(r Runner) error {
			f, err = r.OpenStdin(ctx, id)
			return err
		})
		if err != nil {
			return 0, err
		}
		h.mu.Lock()
		if h.file == nil {
			h.file = f
		} else {
			f.Close()
			f = h.file
		}
		h.mu.Unlock()
	}
	return f.Write(p)
}

// close ends the input: the process reads the end of file once it has read what was written.
func (h *stdinHub) close(ctx context.Context, e *Engine, id string) error {
	h.mu.Lock()
	f := h.file
	h.file, h.gone = nil, true
	h.mu.Unlock()
	if f != nil {
		f.Close()
	}
	err := e.link.do(ctx, func(r Runner) error { return r.CloseStdin(ctx, id) })
	if errorIs(err, errdefs.ErrNotFound) || errorIs(err, errdefs.ErrConflict) {
		return nil // it ended by itself
	}
	return err
}

// drop forgets the file at the end of a run.
func (h *stdinHub) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file != nil {
		h.file.Close()
	}
	h.file, h.gone = nil, false
}

type stdinWriter struct {
	e    *Engine
	id   string
	hub  *stdinHub
	last bool // closing it closes the process's input
	once sync.Once
}

func (w *stdinWriter) Write(p []byte) (int, error) { return w.hub.write(w.e.ctx, w.e, w.id, p) }

func (w *stdinWriter) Close() (err error) {
	if w.last {
		w.once.Do(func() { err = w.hub.close(w.e.ctx, w.e, w.id) })
	}
	return err
}

// attach makes an attachment that reads the spool from its present end. While it lives nothing
// that it has not read is trimmed: a slow client slows its container, as with docker.
func (o *output) attach(opts AttachOptions, terminal bool) (*Attachment, error) {
	r := spool.OpenReader(o.spoolDir())
	o.mu.Lock()
	defer o.mu.Unlock()
	pos, err := r.End()
	r.Close() // Copy opens it again: an attachment that is never copied holds no file
	if err != nil {
		return nil, err
	}
	run := o.run
	if o.endedRun == o.run {
		run++ // made before the start
	}
	t := &tap{pos: pos}
	o.taps[t] = struct{}{}
	a := &Attachment{Terminal: terminal}
	a.close = func() {
		o.mu.Lock()
		delete(o.taps, t)
		o.mu.Unlock()
	}
	a.copy = func(ctx context.Context, stdout, stderr io.Writer) error {
		defer r.Close()
		if !opts.Stdout {
			stdout = nil
		}
		if !opts.Stderr {
			stderr = nil
		}
		return o.copyFrom(ctx, r, t, run, stdout, stderr)
	}
	return a, nil
}

// copyFrom follows the spool until the run has ended and everything was written.
func (o *output) copyFrom(ctx context.Context, r *spool.Reader, t *tap, run uint64, stdout, stderr io.Writer) error {
	buf := make([]byte, attachBuffer)
	for {
		changed, over := o.watch(run)
		if over {
			r.SetEnded(true)
		}
		for {
			chunk, err := r.Next(t.at(o), buf)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			w := stdout
			if chunk.Stream == spool.Stderr {
				w = stderr
			}
			if w != nil && len(chunk.Data) > 0 {
				if _, err := w.Write(chunk.Data); err != nil {
					return err
				}
			}
			t.advance(o, chunk.End())
		}
		if over {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
