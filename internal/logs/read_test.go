package logs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"berth/internal/logs"
	"berth/internal/spool"
)

// numbered renders lines 0 to n-1, odd ones on stderr, in small files.
func numbered(t *testing.T, driver string, n int) (logs.Config, *logs.Renderer) {
	t.Helper()
	cfg := config(t.TempDir())
	cfg.Driver, cfg.MaxBytes, cfg.MaxFiles = driver, 2000, 500
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	for i := range n {
		p.output(spool.Stdout+uint8(i%2), fmt.Sprintf("line %d\n", i))
	}
	advance(t, r)
	return cfg, r
}

func TestTail(t *testing.T) {
	const n = 200
	for _, driver := range []string{logs.DriverJSONFile, logs.DriverCRI} {
		cfg, _ := numbered(t, driver, n)
		// The last line is being written.
		f, err := os.OpenFile(cfg.Path, os.O_WRONLY|os.O_APPEND, 0)
		must(t, err)
		_, err = f.WriteString(`{"log":"tor`)
		must(t, err)
		must(t, f.Close())
		for _, tail := range []int{-1, 0, 1, 2, 17, 100, 199, 200, 201} {
			for _, streams := range []logs.Options{all, {Stdout: true}, {Stderr: true}} {
				o := streams
				o.Tail = tail
				var want []string
				for i := range n {
					if stream := i%2 == 0 && o.Stdout || i%2 == 1 && o.Stderr; stream {
						want = append(want, fmt.Sprintf("%s line %d\n", []string{"stdout", "stderr"}[i%2], i))
					}
				}
				if tail >= 0 && tail < len(want) {
					want = want[len(want)-tail:]
				}
				if len(want) == 0 {
					want = nil
				}
				if d := cmp.Diff(want, texts(readAll(t, cfg, o))); d != "" {
					t.Fatalf("%s tail %d %+v: %s", driver, tail, streams, d)
				}
			}
		}
	}
}

func TestSinceUntilAndErrors(t *testing.T) {
	cfg, _ := numbered(t, logs.DriverJSONFile, 50)
	entries := readAll(t, cfg, all)
	o := all
	o.Since, o.Until = entries[10].Time, entries[19].Time
	if got := readAll(t, cfg, o); len(got) != 10 || string(got[0].Line) != "line 10\n" {
		t.Errorf("since and until: %q", texts(got))
	}
	o.Tail = 3
	if got := readAll(t, cfg, o); len(got) != 3 || string(got[0].Line) != "line 17\n" {
		t.Errorf("with tail: %q", texts(got))
	}
	stop := errors.New("enough")
	n := 0
	err := logs.Read(context.Background(), cfg, all, func(logs.Entry) error {
		if n++; n == 5 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || n != 5 {
		t.Errorf("%v after %d", err, n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := logs.Read(ctx, cfg, all, func(logs.Entry) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestForeignLines: what is no entry, even a huge one, does not hide those around it.
func TestForeignLines(t *testing.T) {
	cfg := config(t.TempDir())
	good := `{"log":"%d\n","stream":"stdout","attrs":{"a":"b"},"time":"2026-01-02T03:04:05Z"}` + "\n"
	content := fmt.Sprintf(good, 1) + "junk\n\n{}\n" + strings.Repeat("x", 3<<20) + "\n" + fmt.Sprintf(good, 2) +
		`{"log":"` + strings.Repeat("y", 100_000) + `\n","stream":"stderr","time":"2026-01-02T03:04:05Z"}` + "\n" + strings.Repeat("z", 2<<20)
	must(t, os.WriteFile(cfg.Path, []byte(content), 0o600))
	want := []string{"stdout 1\n", "stdout 2\n", "stderr " + strings.Repeat("y", 100_000) + "\n"}
	for _, tail := range []int{-1, 3, 2} {
		o := all
		o.Tail = tail
		expect := want
		if tail == 2 {
			expect = want[1:]
		}
		if d := cmp.Diff(expect, texts(readAll(t, cfg, o))); d != "" {
			t.Errorf("tail %d: %.2000s", tail, d)
		}
	}
}

// TestFollow: followers that begin at any moment see every line once, across rotations, slow
// ones too, and end when the log does.
func TestFollow(t *testing.T) {
	defer goleak.VerifyNone(t)
	const lines = 4000
	cfg := config(t.TempDir())
	cfg.MaxBytes, cfg.MaxFiles = 20_000, 900
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	r.SetLive(true)
	o := all
	o.Follow = true
	var wg sync.WaitGroup
	follow := func(slow bool) {
		next := 0
		err := r.Read(context.Background(), o, func(e logs.Entry) error {
			if want := fmt.Sprintf("line %d\n", next); string(e.Line) != want {
				return fmt.Errorf("got %q, want %q", e.Line, want)
			}
			if next++; slow && next%50 == 0 {
				time.Sleep(time.Millisecond) // a slow consumer is the point
			}
			return nil
		})
		if err != nil || next != lines {
			t.Errorf("follower ended at %d: %v", next, err)
		}
	}
	for i := range lines {
		if i%400 == 0 {
			wg.Go(func() { follow(i%800 == 0) })
		}
		p.output(spool.Stdout, fmt.Sprintf("line %d\n", i))
		if i%3 == 0 {
			advance(t, r)
		}
		if i%700 == 0 {
			r.CloseIdle()
		}
	}
	must(t, r.Finish())
	r.SetLive(false)
	wg.Wait()
}

func TestFollowEnds(t *testing.T) {
	defer goleak.VerifyNone(t)
	cfg, r := numbered(t, logs.DriverJSONFile, 3)
	o := all
	o.Follow, o.Tail = true, 1
	read := func(ctx context.Context, o logs.Options) ([]string, error) {
		var got []string
		err := r.Read(ctx, o, func(e logs.Entry) error { got = append(got, string(bytes.Clone(e.Line))); return nil })
		return got, err
	}
	if got, err := read(context.Background(), o); err != nil || len(got) != 1 || got[0] != "line 2\n" {
		t.Errorf("of a log that is not live: %q, %v", got, err)
	}
	r.SetLive(true)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := read(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v", err)
	}
	o.Until = time.Now().Add(20 * time.Millisecond)
	if got, err := read(context.Background(), o); err != nil || len(got) != 1 {
		t.Errorf("until: %q, %v", got, err)
	}
	o.Until = time.Time{}
	done := make(chan error, 1)
	go func() { _, err := read(context.Background(), o); done <- err }()
	r.Close()
	if err := <-done; err != nil {
		t.Errorf("closed: %v", err)
	}
	// Deleted files are no error.
	must(t, os.Remove(cfg.Path))
	if _, err := read(context.Background(), all); err != nil {
		t.Error(err)
	}
}

// TestFollowCRIReopen: the kubelet's rotation loses nothing for a follower.
func TestFollowCRIReopen(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.Driver, cfg.MaxBytes = logs.DriverCRI, 0
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	r.SetLive(true)
	o := all
	o.Follow = true
	var mu sync.Mutex
	var got []string
	done := make(chan error, 1)
	go func() {
		done <- r.Read(context.Background(), o, func(e logs.Entry) error {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, string(e.Line))
			return nil
		})
	}()
	seen := func(n int) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return len(got) == n }
	}
	p.output(spool.Stdout, "a\n")
	advance(t, r)
	eventually(t, "a", seen(1))
	must(t, os.Rename(cfg.Path, cfg.Path+".old"))
	p.output(spool.Stdout, "b\n")
	advance(t, r)
	must(t, r.Reopen())
	p.output(spool.Stdout, "c\n")
	advance(t, r)
	eventually(t, "c", seen(3))
	r.SetLive(false)
	must(t, <-done)
	if strings.Join(got, "") != "a\nb\nc\n" {
		t.Errorf("got %q", got)
	}
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"log":"a\n","stream":"stdout","time":"2026-01-02T03:04:05.6Z"}` + "\n"))
	f.Add([]byte("2026-01-02T03:04:05.6Z stderr P text\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, driver := range []string{logs.DriverJSONFile, logs.DriverCRI} {
			// Whatever is in a file, reading it gives an entry or none.
			if e, ok := logs.ParseEntry(b, driver); ok {
				again, ok := logs.ParseEntry(logs.AppendEntry(nil, driver, e), driver)
				if d := cmp.Diff(e, again); !ok || driver == logs.DriverJSONFile && d != "" {
					t.Errorf("%s: %q: %v %s", driver, b, ok, d)
				}
			}
			// Whatever is output is read back.
			line := bytes.ToValidUTF8(bytes.ReplaceAll(b, []byte("\n"), nil), []byte("?"))
			e := logs.Entry{Time: time.Unix(1e9, 5).UTC(), Stream: logs.Stderr, Line: append(line, '\n')}
			rendered := logs.AppendEntry(nil, driver, e)
			if bytes.Count(rendered, []byte("\n")) != 1 {
				t.Errorf("%s: %q takes more than a line", driver, b)
			}
			got, ok := logs.ParseEntry(rendered, driver)
			if d := cmp.Diff(e, got); !ok || d != "" {
				t.Errorf("%s: %q: %v %s", driver, b, ok, d)
			}
		}
	})
}
