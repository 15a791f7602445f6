package logs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"berth/internal/errdefs"
	"berth/internal/logs"
	"berth/internal/spool"
)

// errCrash stands for the death of the process.
var errCrash = errors.New("killed")

// TestKilled: with the renderer killed between and inside its writes, the rendered files are
// byte for byte those of one that was not, and hold all output.
func TestKilled(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "logs")
		must(t, err)
		defer os.RemoveAll(dir)
		cfg := config(dir)
		cfg.Driver = rapid.SampledFrom([]string{logs.DriverJSONFile, logs.DriverCRI}).Draw(t, "driver")
		cfg.MaxBytes = rapid.SampledFrom([]int64{300, 5000, 200_000}).Draw(t, "max bytes")
		cfg.MaxFiles = rapid.SampledFrom([]int{1, 2, 3, 900}).Draw(t, "max files")
		p := newProcess(t, cfg.SpoolDir, 64<<20)

		kill := -1 // after so many changes
		hook := func(op string, b []byte) (int, error) {
			if kill--; kill != -1 {
				return len(b), nil
			}
			return len(b) * rapid.IntRange(0, 4).Draw(t, "quarters written of "+op) / 4, errCrash
		}
		open := func() *logs.Renderer {
			for {
				r := mustOpenOrCrash(t, cfg, hook)
				if r != nil {
					return r
				}
			}
		}
		r := open()
		run := func(f func() error) {
			kill = rapid.IntRange(-10, 8).Draw(t, "kill after")
			for {
				err := f()
				if err == nil {
					kill = -1
					return
				}
				if !errors.Is(err, errCrash) {
					t.Fatal(err)
				}
				r.Close()
				kill = rapid.IntRange(-10, 8).Draw(t, "kill after")
				r = open()
			}
		}
		pieces := []string{"\n", "\n\n", "x", "<é\t\"\n", strings.Repeat("long", 700), strings.Repeat("z", 16384)}
		want := map[string]string{}
		count := 0
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			for range rapid.IntRange(0, 6).Draw(t, "chunks") {
				stream := rapid.SampledFrom([]uint8{spool.Stdout, spool.Stderr}).Draw(t, "stream")
				text := ""
				for range rapid.IntRange(1, 5).Draw(t, "pieces") {
					count++
					text += fmt.Sprint(count, " ")
					text += pieces[rapid.IntRange(0, len(pieces)-1).Draw(t, "piece")]
				}
				p.output(stream, text)
				want[map[uint8]string{1: "stdout", 2: "stderr"}[stream]] += text
			}
			run(func() error {
				more := true
				var err error
				for more && err == nil {
					more, err = r.Advance()
				}
				return err
			})
		}
		oracle := cfg
		oracle.SpoolDir, oracle.CheckpointPath = filepath.Join(dir, "spool2"), filepath.Join(dir, "state2")
		oracle.Path = filepath.Join(dir, "oracle")
		if _, err := os.Stat(cfg.SpoolDir); err == nil {
			copyDir(t, cfg.SpoolDir, oracle.SpoolDir)
		}
		run(func() error { return r.Finish() })

		o := mustOpen(t, oracle)
		advance(t, o)
		must(t, o.Finish())
		for i := range 1000 {
			suffix := fmt.Sprintf(".%d", i)
			if i == 0 {
				suffix = ""
			}
			a, errA := os.ReadFile(oracle.Path + suffix)
			b, errB := os.ReadFile(cfg.Path + suffix)
			if !bytes.Equal(a, b) || (errA == nil) != (errB == nil) {
				t.Fatalf("file %d: %v, %v\nwithout kills: %s\nwith: %s", i, errA, errB, numbers(a), numbers(b))
			}
			if errA != nil && i > 0 {
				break
			}
			if int64(len(a)) > cfg.MaxBytes && bytes.Count(a, []byte("\n")) > 1 {
				t.Fatalf("file %d has %d bytes", i, len(a))
			}
		}
		if cfg.MaxFiles == 900 {
			got := map[string]string{}
			for _, e := range readAll(t, cfg, all) {
				got[e.Stream] += string(e.Line)
			}
			if cfg.Driver == logs.DriverCRI { // ends each stream with a newline
				for s, text := range want {
					if last := text[strings.LastIndexByte(text, '\n')+1:]; len(last)%logs.MaxPiece > 0 {
						want[s] += "\n"
					}
				}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Fatal(d)
			}
		}
	})
}

// numbers returns the numbers in the entries of a file, so that a failure can be read.
func numbers(b []byte) []string {
	return regexp.MustCompile(`"?[ "](\d+ )`).FindAllString(string(b), -1)
}

// mustOpenOrCrash returns nil when the hook struck while the renderer settled.
func mustOpenOrCrash(t fataler, cfg logs.Config, hook func(string, []byte) (int, error)) *logs.Renderer {
	r := mustOpen(t, cfg)
	r.SetHook(hook)
	return r
}

func TestDockerFormat(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	p.output(spool.Stdout, "plain\ntab\there \"quoted\" back\\slash <&> \r\n\x1b[0m \xff bad \u2028 é 界\n")
	p.output(spool.Stderr, strings.Repeat("a", 16384)+"rest\n")
	p.output(spool.Stdout, "no newline")
	advance(t, r)
	must(t, r.Finish())
	b, err := os.ReadFile(cfg.Path)
	must(t, err)
	got := regexp.MustCompile(`"time":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z"`).ReplaceAllString(string(b), `"time":"T"`)
	// As docker 20.10 writes them.
	want := `{"log":"plain\n","stream":"stdout","time":"T"}
{"log":"tab\u0009here \"quoted\" back\\slash \u003c\u0026\u003e \r\n","stream":"stdout","time":"T"}
{"log":"\u001b[0m \ufffd bad \u2028 é 界\n","stream":"stdout","time":"T"}
{"log":"` + strings.Repeat("a", 16384) + `","stream":"stderr","time":"T"}
{"log":"rest\n","stream":"stderr","time":"T"}
{"log":"no newline","stream":"stdout","time":"T"}
`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestCRIFormatAndReopen(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	cfg.Driver, cfg.MaxBytes = logs.DriverCRI, 0
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	p.output(spool.Stdout, "one\n"+strings.Repeat("b", 16384)+"\n")
	advance(t, r)
	must(t, r.Reopen()) // nobody renamed: nothing changes
	must(t, os.Rename(cfg.Path, cfg.Path+".20260101"))
	p.output(spool.Stderr, "two\n")
	advance(t, r)
	// Killed before Reopen: what follows still belongs to the renamed file.
	r.Close()
	r = mustOpen(t, cfg)
	p.output(spool.Stderr, "three\n")
	advance(t, r)
	if _, err := os.Stat(cfg.Path); !os.IsNotExist(err) {
		t.Errorf("a new file before Reopen: %v", err)
	}
	must(t, r.Reopen())
	if fi, err := os.Stat(cfg.Path); err != nil || fi.Size() != 0 {
		t.Errorf("no empty file after Reopen: %v", err)
	}
	p.output(spool.Stdout, "four\npartial")
	advance(t, r)
	must(t, r.Finish())
	stamp := regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z `)
	for path, want := range map[string]string{
		cfg.Path + ".20260101": "stdout F one\nstdout P " + strings.Repeat("b", 16384) + "\nstdout F \nstderr F two\nstderr F three\n",
		cfg.Path:               "stdout F four\nstdout F partial\n",
	} {
		b, err := os.ReadFile(path)
		must(t, err)
		if d := cmp.Diff(want, stamp.ReplaceAllString(string(b), "")); d != "" {
			t.Error(d)
		}
	}
}

func TestNoneAndChunks(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	cfg.Driver, cfg.Path = logs.DriverNone, ""
	var got strings.Builder
	cfg.OnChunk = func(stream string, at time.Time, b []byte) {
		if time.Since(at) > time.Minute {
			t.Errorf("time %v", at)
		}
		got.WriteString(stream + ":" + string(b) + ";")
	}
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	p.output(spool.Stdout, "prompt> ")
	advance(t, r)
	p.output(spool.Stderr, "x\ny\n")
	advance(t, r)
	r.Close()
	r = mustOpen(t, cfg)
	p.output(spool.Stdout, "z")
	advance(t, r)
	must(t, r.Finish())
	if want := "stdout:prompt> ;stderr:x\ny\n;stdout:z;"; got.String() != want {
		t.Errorf("chunks %q, want %q", got.String(), want)
	}
	if len(readAll(t, cfg, all)) != 0 {
		t.Error("entries without a log")
	}
}

func TestGap(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	p := newProcess(t, cfg.SpoolDir, 2<<20)
	r := mustOpen(t, cfg)
	p.output(spool.Stdout, "first\nunfinished")
	advance(t, r)
	r.Close() // berthd is away
	line := strings.Repeat("n", 99) + "\n"
	p.output(spool.Stdout, strings.Repeat(line, 10000))
	dropOldest(t, cfg.SpoolDir) // as the writer does on a full disk
	// Killed at each step of rendering the gap.
	for kill := range 8 {
		r = mustOpen(t, cfg)
		n := 0
		r.SetHook(func(_ string, b []byte) (int, error) {
			if n++; n > kill {
				return len(b) / 2, errCrash
			}
			return len(b), nil
		})
		_, err := r.Advance()
		r.Close()
		if err == nil {
			break
		}
	}
	r = mustOpen(t, cfg)
	advance(t, r)
	must(t, r.Finish())
	got := readAll(t, cfg, all)
	var gaps, lines, dropped int
	for i, e := range got[2:] {
		if n, _ := fmt.Sscanf(string(e.Line), "berth: %d bytes of output were dropped here", &dropped); n == 1 {
			gaps++
		} else if string(e.Line) == line {
			lines++
		} else if i > 1 { // a line may be cut by the gap
			t.Fatalf("entry %d: %q", i, e.Line)
		}
	}
	if string(got[1].Line) != "unfinished\n" || gaps != 1 || dropped+lines*100 > 1_000_000+10 || dropped+lines*100 < 1_000_000-100 {
		t.Errorf("second %q, %d gaps, %d dropped and %d lines", got[1].Line, gaps, dropped, lines)
	}
}

// dropOldest removes all segments of a spool but the newest.
func dropOldest(t *testing.T, dir string) {
	t.Helper()
	for _, ext := range []string{".data", ".idx"} {
		files, err := filepath.Glob(filepath.Join(dir, "*"+ext)) // sorted, and so by position
		must(t, err)
		if len(files) < 2 {
			t.Fatalf("%d segments: nothing to drop", len(files))
		}
		for _, f := range files[:len(files)-1] {
			must(t, os.Remove(f))
		}
	}
}

// TestFullDisk: the log keeps its newest part, says what it lost, and goes on; nothing blocks.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=4m"); err != nil {
		t.Skip("cannot mount a tmpfs:", err)
	}
	t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
	for _, maxBytes := range []int64{500_000, 1 << 30} {
		t.Run(fmt.Sprint(maxBytes), func(t *testing.T) {
			dir := filepath.Join(mnt, fmt.Sprint(maxBytes))
			must(t, os.Mkdir(dir, 0o700))
			defer os.RemoveAll(dir)
			cfg := config(dir)
			cfg.MaxBytes, cfg.MaxFiles = maxBytes, 100
			p := newProcess(t, cfg.SpoolDir, 1<<20)
			r := mustOpen(t, cfg)
			n := 0
			for n < 100_000 {
				var b strings.Builder
				for range 500 {
					fmt.Fprintf(&b, "line %d %s\n", n, strings.Repeat("f", 50))
					n++
				}
				p.output(spool.Stdout, b.String())
				if _, err := r.Advance(); err != nil && !errors.Is(err, errdefs.ErrExhausted) {
					t.Fatal(err)
				}
			}
			must(t, r.Finish())
			p.w.Close()
			r.Close()
			got := readAll(t, cfg, all)
			last, notices, lines := -1, 0, 0
			for _, e := range got {
				var i int
				if c, _ := fmt.Sscanf(string(e.Line), "line %d ", &i); c == 1 {
					if i <= last {
						t.Fatalf("line %d after line %d", i, last)
					}
					last = i
					lines++
				} else if strings.HasPrefix(string(e.Line), "berth: ") && strings.Contains(string(e.Line), "dropped") {
					notices++
				} else {
					t.Fatalf("entry %q", e.Line)
				}
			}
			if last != n-1 || notices == 0 || lines < 5000 {
				t.Errorf("%d lines, last %d of %d, %d notices", lines, last, n, notices)
			}
		})
	}
}

func TestPowerCutTakesOutputBack(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	p := newProcess(t, cfg.SpoolDir, 0)
	r := mustOpen(t, cfg)
	p.output(spool.Stdout, "one\ntwo\n")
	advance(t, r)
	r.Close()
	p.w.Close()
	must(t, os.Truncate(filepath.Join(cfg.SpoolDir, "0000000000000000.data"), 4))
	fi, err := os.Stat(cfg.Path)
	must(t, err)
	must(t, os.Truncate(cfg.Path, fi.Size()-5))
	r = mustOpen(t, cfg)
	p.output(spool.Stdout, "three\n")
	advance(t, r)
	if d := cmp.Diff([]string{"stdout one\n", "stdout three\n"}, texts(readAll(t, cfg, all))); d != "" {
		t.Error(d)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct {
		change func(*logs.Config)
		kind   error
	}{
		{func(c *logs.Config) { c.Driver = "syslog" }, errdefs.ErrUnsupported},
		{func(c *logs.Config) { c.MaxBytes = -1 }, errdefs.ErrInvalid},
		{func(c *logs.Config) { c.MaxFiles = 5000 }, errdefs.ErrInvalid},
		{func(c *logs.Config) { c.Path = "relative" }, errdefs.ErrInvalid},
	} {
		cfg := config(t.TempDir())
		c.change(&cfg)
		if _, err := logs.Open(cfg); !errors.Is(err, c.kind) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

func TestSilentCostsNothing(t *testing.T) {
	dir := t.TempDir()
	r := mustOpen(t, config(dir))
	advance(t, r)
	must(t, r.Finish())
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("files of a silent process: %v", entries)
	}
}
