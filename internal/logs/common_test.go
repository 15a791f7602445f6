package logs_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/logs"
	"berth/internal/spool"
)

// fataler is what *testing.T and *rapid.T share.
type fataler interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
	Cleanup(func())
}

func must(t fataler, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// process writes output into a spool like the runner does.
type process struct {
	t    fataler
	w    *spool.Writer
	r, p [3]int
}

func newProcess(t fataler, dir string, limit int64) *process {
	t.Helper()
	w, err := spool.OpenWriter(dir, limit)
	must(t, err)
	p := &process{t: t, w: w}
	for _, s := range []uint8{spool.Stdout, spool.Stderr} {
		var fds [2]int
		must(t, unix.Pipe2(fds[:], unix.O_CLOEXEC))
		p.r[s], p.p[s] = fds[0], fds[1]
	}
	t.Cleanup(func() {
		w.Close()
		for _, s := range []uint8{spool.Stdout, spool.Stderr} {
			unix.Close(p.r[s])
			unix.Close(p.p[s])
		}
	})
	return p
}

// output writes b as one chunk per 60000 bytes.
func (p *process) output(stream uint8, b string) {
	p.t.Helper()
	for len(b) > 0 {
		n := min(len(b), 60000)
		if _, err := unix.Write(p.p[stream], []byte(b[:n])); err != nil {
			p.t.Fatal(err)
		}
		if got, err := p.w.SpliceFrom(p.r[stream], stream); err != nil || got != int64(n) {
			p.t.Fatal("SpliceFrom", got, err)
		}
		b = b[n:]
	}
}

func config(dir string) logs.Config {
	return logs.Config{
		SpoolDir: filepath.Join(dir, "spool"), CheckpointPath: filepath.Join(dir, "log.state"),
		Driver: logs.DriverJSONFile, Path: filepath.Join(dir, "x-json.log"), MaxBytes: 1 << 30,
	}
}

func mustOpen(t fataler, cfg logs.Config) *logs.Renderer {
	t.Helper()
	r, err := logs.Open(cfg)
	must(t, err)
	t.Cleanup(r.Close)
	return r
}

func advance(t fataler, r *logs.Renderer) {
	t.Helper()
	for {
		more, err := r.Advance()
		must(t, err)
		if !more {
			return
		}
	}
}

var all = logs.Options{Stdout: true, Stderr: true, Tail: -1}

// readAll returns the entries with their lines copied and without times.
func readAll(t fataler, cfg logs.Config, o logs.Options) (entries []logs.Entry) {
	t.Helper()
	must(t, logs.Read(context.Background(), cfg, o, func(e logs.Entry) error {
		e.Line = bytes.Clone(e.Line)
		entries = append(entries, e)
		return nil
	}))
	return entries
}

func texts(entries []logs.Entry) (s []string) {
	for _, e := range entries {
		s = append(s, e.Stream+" "+string(e.Line))
	}
	return s
}

func copyDir(t fataler, from, to string) {
	t.Helper()
	must(t, os.MkdirAll(to, 0o700))
	entries, err := os.ReadDir(from)
	must(t, err)
	for _, e := range entries {
		src, err := os.Open(filepath.Join(from, e.Name()))
		must(t, err)
		dst, err := os.Create(filepath.Join(to, e.Name()))
		must(t, err)
		_, err = io.Copy(dst, src)
		must(t, err)
		src.Close()
		must(t, dst.Close())
	}
}

// eventually polls cond, which some other goroutine will make true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}
