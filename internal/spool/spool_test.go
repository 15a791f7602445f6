package spool_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"berth/internal/errdefs"
	"berth/internal/spool"
)

// pipes makes a pipe per stream, non-blocking at the reading end.
type pipes struct{ r, w map[uint8]int }

func newPipes(t interface {
	Fatal(...any)
	Cleanup(func())
}) pipes {
	p := pipes{map[uint8]int{}, map[uint8]int{}}
	for _, s := range []uint8{spool.Stdout, spool.Stderr} {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
		p.r[s], p.w[s] = fds[0], fds[1]
	}
	return p
}

func (p pipes) write(t interface{ Fatal(...any) }, stream uint8, b []byte) {
	for len(b) > 0 {
		n, err := unix.Write(p.w[stream], b)
		if err != nil {
			t.Fatal(err)
		}
		b = b[n:]
	}
}

// readAll reads from pos to the present end.
func readAll(t interface {
	Helper()
	Fatal(...any)
}, r *spool.Reader, pos uint64, bufSize int) (chunks []spool.Chunk) {
	t.Helper()
	buf := make([]byte, bufSize)
	for {
		c, err := r.Next(pos, buf)
		if errors.Is(err, io.EOF) {
			return chunks
		}
		if err != nil {
			t.Fatal(err)
		}
		if c.Pos != pos || c.End() == pos {
			t.Fatal("chunk does not begin where asked or is empty:", c.Pos, pos, len(c.Data), c.Dropped)
		}
		c.Data = bytes.Clone(c.Data)
		chunks = append(chunks, c)
		pos = c.End()
	}
}

func mustWriter(t interface{ Fatal(...any) }, dir string, limit int64) *spool.Writer {
	w, err := spool.OpenWriter(dir, limit)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// TestModel compares the spool with a plain list of bytes while writers die, readers start
// anew and what was read is trimmed.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tmp, err := os.MkdirTemp("", "spool")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(tmp)
		dir := filepath.Join(tmp, "s")
		p := newPipes(t)
		w := mustWriter(t, dir, 64<<20)
		defer func() { w.Close() }()
		r := spool.OpenReader(dir)
		defer func() { r.Close() }()

		type one struct{ stream, b byte }
		var model []one
		var read uint64
		next := byte(0)
		t.Repeat(map[string]func(*rapid.T){
			"output": func(t *rapid.T) {
				stream := rapid.SampledFrom([]uint8{spool.Stdout, spool.Stderr}).Draw(t, "stream")
				n := rapid.SampledFrom([]int{0, 1, 7, 100, 4096, 60000}).Draw(t, "n")
				b := make([]byte, n)
				for i := range b {
					b[i] = next
					next += 7
					model = append(model, one{stream, b[i]})
				}
				p.write(t, stream, b)
				got, err := w.SpliceFrom(p.r[stream], stream)
				if err != nil || got != int64(n) {
					t.Fatal("SpliceFrom:", got, err, "want", n)
				}
			},
			"crash":  func(t *rapid.T) { w.Close(); w = mustWriter(t, dir, 64<<20) },
			"reader": func(*rapid.T) { r.Close(); r = spool.OpenReader(dir) },
			"read": func(t *rapid.T) {
				for _, c := range readAll(t, r, read, rapid.SampledFrom([]int{100, 5000, 1 << 20}).Draw(t, "buf")) {
					if c.Dropped > 0 {
						t.Fatal("gap at", c.Pos)
					}
					for i, b := range c.Data {
						if want := model[int(c.Pos)+i]; want != (one{c.Stream, b}) {
							t.Fatal("at", int(c.Pos)+i, "got", c.Stream, b, "want", want)
						}
					}
					read = c.End()
				}
				if end, err := r.End(); err != nil || end != uint64(len(model)) || read != end {
					t.Fatal("End:", end, err, "read", read, "want", len(model))
				}
			},
			"trim": func(t *rapid.T) {
				if err := spool.Trim(dir, read); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
}

// At its limit a spool takes nothing more, loses nothing, and goes on once its reader has trimmed
// it; the last output of a dead process is taken all the same.
func TestLimitMakesTheProcessWait(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	p := newPipes(t)
	const limit = 1 << 20
	w := mustWriter(t, dir, limit)
	defer w.Close()
	block := bytes.Repeat([]byte("x"), 50000)
	fill := func() (total uint64, err error) {
		for range 100 {
			p.write(t, 1, block)
			n, err := w.SpliceFrom(p.r[1], spool.Stdout)
			total += uint64(n)
			if err != nil {
				return total, err
			}
		}
		return total, nil
	}
	total, err := fill()
	if !errors.Is(err, errdefs.ErrExhausted) {
		t.Fatalf("after %d bytes: %v", total, err)
	}
	if n := dirSize(t, dir); n > limit+64<<10 {
		t.Errorf("spool holds %d bytes, limit %d", n, limit)
	}
	r := spool.OpenReader(dir)
	defer r.Close()
	var stored uint64
	for _, c := range readAll(t, r, 0, 1<<20) {
		stored += uint64(len(c.Data))
		if c.Dropped > 0 {
			t.Errorf("%d bytes were dropped", c.Dropped)
		}
	}
	if stored != total {
		t.Errorf("stored %d of %d", stored, total)
	}
	if err := spool.Trim(dir, total); err != nil {
		t.Fatal(err)
	}
	if names, _ := filepath.Glob(dir + "/*.data"); len(names) != 1 {
		t.Errorf("after Trim: %v", names)
	}
	n, err := w.SpliceFrom(p.r[1], spool.Stdout)
	if err != nil || n == 0 {
		t.Fatalf("after Trim nothing is taken: %d, %v", n, err)
	}
	more, err := fill()
	if !errors.Is(err, errdefs.ErrExhausted) {
		t.Fatalf("the limit is gone: %v", err)
	}
	w.Last()
	last, err := w.SpliceFrom(p.r[1], spool.Stdout)
	if err != nil || last == 0 {
		t.Fatalf("the last output was not taken: %d, %v", last, err)
	}
	total += uint64(n) + more + uint64(last)
	if end, err := spool.OpenReader(dir).End(); err != nil || end != total {
		t.Errorf("End = %d, %v; want %d", end, err, total)
	}
}

func dirSize(t *testing.T, dir string) (n int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			n += fi.Size()
		}
	}
	return n
}

func TestEmptyEOFAndSecondWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "s")
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	w := mustWriter(t, dir, 0)
	defer w.Close()
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("a silent process has a spool directory")
	}
	r := spool.OpenReader(dir)
	defer r.Close()
	if _, err := r.Next(0, make([]byte, 10)); !errors.Is(err, io.EOF) {
		t.Errorf("Next without spool = %v", err)
	}
	if n, err := w.SpliceFrom(fds[0], spool.Stdout); n != 0 || err != nil {
		t.Errorf("empty pipe: %d, %v", n, err)
	}
	if _, err := unix.Write(fds[1], []byte("hello")); err != nil {
		t.Fatal(err)
	}
	other := mustWriter(t, dir, 0)
	if n, err := other.SpliceFrom(fds[0], spool.Stdout); n != 0 || !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("second writer: %d, %v", n, err)
	}
	unix.Close(fds[1])
	if n, err := w.SpliceFrom(fds[0], spool.Stdout); n != 5 || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := w.SpliceFrom(fds[0], spool.Stdout); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %d, %v", n, err)
	}
	file, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := w.SpliceFrom(int(file.Fd()), spool.Stdout); !errors.Is(err, unix.EINVAL) {
		t.Errorf("splice from a file = %v", err)
	}
	if got := readAll(t, r, 0, 100); len(got) != 1 || string(got[0].Data) != "hello" {
		t.Errorf("got %v", got)
	}
}

// TestCorruptIndex damages every record in turn: all bytes must still come, in order.
func TestCorruptIndex(t *testing.T) {
	for slot := range 6 {
		dir := filepath.Join(t.TempDir(), "s")
		p := newPipes(t)
		w := mustWriter(t, dir, 0)
		for i := range 5 {
			p.write(t, 1, fmt.Appendf(nil, "line %d\n", i))
			if _, err := w.SpliceFrom(p.r[1], spool.Stdout); err != nil {
				t.Fatal(err)
			}
		}
		w.Close()
		idx := filepath.Join(dir, "0000000000000000.idx")
		if slot == 5 {
			if err := os.Remove(idx); err != nil {
				t.Fatal(err)
			}
		} else {
			f, err := os.OpenFile(idx, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			f.WriteAt([]byte{0xff, 0xff, 0xff}, int64(slot)*32+10)
			f.Close()
		}
		w = mustWriter(t, dir, 0)
		p.write(t, 1, []byte("line 5\n"))
		if _, err := w.SpliceFrom(p.r[1], spool.Stdout); err != nil {
			t.Fatal(err)
		}
		w.Close()
		var got []byte
		r := spool.OpenReader(dir)
		for _, c := range readAll(t, r, 0, 100) {
			got = append(got, c.Data...)
		}
		r.Close()
		if want := "line 0\nline 1\nline 2\nline 3\nline 4\nline 5\n"; string(got) != want {
			t.Errorf("slot %d: got %q", slot, got)
		}
	}
}

// TestFullDisk fills a tiny tmpfs: the process never blocks, every byte is stored or counted,
// and storing resumes when there is room.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("cannot mount a tmpfs:", err)
	}
	t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
	dir := filepath.Join(mnt, "s")
	ballast := filepath.Join(mnt, "ballast")
	p := newPipes(t)
	w := mustWriter(t, dir, 32<<20)
	defer func() { w.Close() }()
	var total uint64
	output := func(b []byte) {
		t.Helper()
		p.write(t, 1, b)
		n, err := w.SpliceFrom(p.r[1], spool.Stdout)
		if err != nil || n != int64(len(b)) {
			t.Fatal(n, err)
		}
		total += uint64(n)
	}
	fill := func() {
		f, err := os.Create(ballast)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for {
			if _, err := f.Write(make([]byte, 4096)); err != nil {
				return
			}
		}
	}
	block := bytes.Repeat([]byte("y"), 30000)
	fill()
	output([]byte("lost before the first segment\n"))
	os.Remove(ballast)
	output([]byte("first\n"))
	fill()
	for i := range 50 {
		output(block)
		if i%10 == 0 { // the gap must survive the writer
			w.Close()
			w = mustWriter(t, dir, 32<<20)
		}
	}
	os.Remove(ballast)
	output([]byte("second\n"))
	fill()
	output(block)
	w.Close()

	r := spool.OpenReader(dir)
	defer r.Close()
	chunks := readAll(t, r, 0, 1<<20)
	r.SetEnded(true)
	pos := chunks[len(chunks)-1].End()
	chunks = append(chunks, readAll(t, r, pos, 1<<20)...)
	if end := chunks[len(chunks)-1].End(); end != total {
		t.Errorf("positions end at %d, output had %d bytes", end, total)
	}
	var lines, gaps int
	for _, c := range chunks {
		lines += bytes.Count(c.Data, []byte("\n"))
		if c.Dropped > 0 {
			gaps++
		}
	}
	if lines != 2 || gaps != 3 {
		t.Errorf("%d lines and %d gaps, want 2 and 3", lines, gaps)
	}
}
