package engine

import (
	"context"
	"os"
	"path/filepath"
	"sync"

	"berth/internal/logs"
	"berth/internal/state"
)

// logFile is a container's rendered log. The renderer is opened at the first output.
type logFile struct {
	cfg logs.Config

	mu   sync.Mutex
	r    *logs.Renderer
	live bool
}

func newLogFile(root state.Root, cfg ContainerConfig, spoolDir string) *logFile {
	dir := root.Container(cfg.ID)
	c := logs.Config{
		SpoolDir: spoolDir, CheckpointPath: filepath.Join(dir, "log.checkpoint"),
		Driver: cfg.Log.Driver, MaxBytes: cfg.Log.MaxBytes, MaxFiles: cfg.Log.MaxFiles, Path: cfg.Log.Path,
	}
	switch c.Driver {
	case "", LogJSONFile:
		c.Driver, c.Path = logs.DriverJSONFile, filepath.Join(dir, cfg.ID+"-json.log")
	case LogNone:
		c.Path = ""
	}
	return &logFile{cfg: c}
}

func (l *logFile) path() string { return l.cfg.Path }

func (l *logFile) renderer() (*logs.Renderer, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.r == nil {
		if l.cfg.Driver == logs.DriverCRI {
			if err := os.MkdirAll(filepath.Dir(l.cfg.Path), 0o755); err != nil {
				return nil, err
			}
		}
		r, err := logs.Open(l.cfg)
		if err != nil {
			return nil, err
		}
		r.SetLive(l.live)
		l.r = r
	}
	return l.r, nil
}

// resume opens the renderer of a log that was written before, ahead of new output: after a power
// cut it must see that the spool is shorter than it was.
func (l *logFile) resume() {
	if _, err := os.Stat(l.cfg.CheckpointPath); err != nil {
		return
	}
	if r, err := l.renderer(); err == nil {
		r.CloseIdle()
	} // else it is tried again, and reported, when there is output
}

// setLive tells followers whether more may come: while the container runs or will run again.
func (l *logFile) setLive(live bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.live = live
	if l.r != nil {
		l.r.SetLive(live)
	}
}

// render brings the log up to the spool; last is set at the end of a run. Files are closed
// afterwards: an idle container holds none.
func (l *logFile) render(last bool) error {
	r, err := l.renderer()
	if err != nil {
		return err
	}
	defer r.CloseIdle()
	for more := true; more; {
		if more, err = r.Advance(); err != nil {
			return err
		}
	}
	if last {
		return r.Finish()
	}
	return nil
}

func (l *logFile) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.r != nil {
		l.r.Close()
		l.r = nil
	}
}

// Logs implements StreamAPI.
func (e *Engine) Logs(ctx context.Context, ref string, o LogOptions, f func(LogEntry) error) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	r, err := c.out.log.renderer()
	if err != nil {
		return err
	}
	opts := logs.Options{Since: o.Since, Until: o.Until, Tail: o.Tail, Stdout: o.Stdout, Stderr: o.Stderr, Follow: o.Follow}
	return r.Read(ctx, opts, func(x logs.Entry) error {
		return f(LogEntry{Time: x.Time, Stream: x.Stream, Line: x.Line, Partial: x.Partial})
	})
}

// ReopenLog implements StreamAPI.
func (e *Engine) ReopenLog(_ context.Context, ref string) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	r, err := c.out.log.renderer()
	if err != nil {
		return err
	}
	return r.Reopen()
}
