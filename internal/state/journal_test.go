package state_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"berth/internal/errdefs"
	"berth/internal/state"
)

type fataler interface {
	Helper()
	Fatal(...any)
}

func mustOpen(t fataler, path string) *state.Journal {
	t.Helper()
	j, err := state.OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func must(t fataler, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var kinds = []string{"container", "network"}

func dump(t fataler, j *state.Journal) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, kind := range kinds {
		last := ""
		must(t, j.Each(kind, func(key string, raw json.RawMessage) error {
			if key <= last {
				t.Fatal("keys out of order:", last, key)
			}
			last = key
			var v string
			must(t, j.Get(kind, key, &v))
			if quoted, _ := json.Marshal(v); string(quoted) != string(raw) {
				t.Fatal("Get and Each differ", v, string(raw))
			}
			all[kind+"/"+key] = v
			return nil
		}))
	}
	return all
}

// TestPrefix: whatever part of the file a power cut leaves, what is read is the effect of a
// prefix of the writes; and the journal then goes on from there.
func TestPrefix(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "journal")
		must(t, err)
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "j")
		j := mustOpen(t, path)
		model := map[string]string{}
		type version struct {
			size  int64
			state map[string]string
		}
		size := func() int64 {
			fi, err := os.Stat(path)
			must(t, err)
			return fi.Size()
		}
		clone := func() map[string]string {
			c := map[string]string{}
			for k, v := range model {
				c[k] = v
			}
			return c
		}
		history := []version{{size(), clone()}}
		for range rapid.IntRange(0, 40).Draw(t, "ops") {
			kind := rapid.SampledFrom(kinds).Draw(t, "kind")
			key := rapid.SampledFrom([]string{"a", "b", "c d"}).Draw(t, "key")
			switch rapid.IntRange(0, 9).Draw(t, "op") {
			case 0, 1:
				must(t, j.Delete(kind, key))
				delete(model, kind+"/"+key)
			case 2:
				must(t, j.Compact())
				history = nil
			case 3:
				must(t, j.Close())
				j = mustOpen(t, path)
			default:
				v := strings.Repeat("x", rapid.IntRange(0, 300).Draw(t, "n"))
				must(t, j.Put(kind, key, v))
				model[kind+"/"+key] = v
			}
			history = append(history, version{size(), clone()})
		}
		if d := cmp.Diff(model, dump(t, j)); d != "" {
			t.Fatal(d)
		}
		must(t, j.Close())
		cut := rapid.Int64Range(history[0].size, size()).Draw(t, "cut")
		damage := rapid.Bool().Draw(t, "damage")
		want := history[0].state
		for _, v := range history {
			if v.size <= cut {
				want = v.state
			}
		}
		if damage && cut < size() {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			must(t, err)
			b := make([]byte, 1)
			_, err = f.ReadAt(b, cut)
			must(t, err)
			_, err = f.WriteAt([]byte{^b[0]}, cut)
			must(t, err)
			must(t, f.Close())
		} else {
			must(t, os.Truncate(path, cut))
		}
		for range 2 {
			j = mustOpen(t, path)
			if d := cmp.Diff(want, dump(t, j)); d != "" {
				t.Fatal(d)
			}
			must(t, j.Close())
		}
	})
}

func TestJournalErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j := mustOpen(t, path)
	if _, err := state.OpenJournal(path); !errors.Is(err, errdefs.ErrConflict) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("second opener: %v", err)
	}
	var v string
	if err := j.Get("container", "x", &v); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("missing key: %v", err)
	}
	if err := j.Put("container", strings.Repeat("k", 5000), 1); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("long key: %v", err)
	}
	must(t, j.Close())
	must(t, j.Close())
	if err := j.Put("container", "x", 1); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("Put after Close: %v", err)
	}
	for content, kind := range map[string]error{
		"berth-jrnl 0002\n":       errdefs.ErrUnsupported,
		"something else entirely": errdefs.ErrDataLoss,
	} {
		must(t, os.WriteFile(path, []byte(content), 0o600))
		if _, err := state.OpenJournal(path); !errors.Is(err, kind) {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestTornCopies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	for range 5 {
		j := mustOpen(t, path)
		must(t, j.Put("container", "a", "whole"))
		must(t, j.Close())
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		must(t, err)
		_, err = f.WriteString("torn")
		must(t, err)
		must(t, f.Close())
	}
	must(t, mustOpen(t, path).Close())
	copies, _ := filepath.Glob(path + ".torn-*")
	if len(copies) != 3 {
		t.Fatalf("%d copies", len(copies))
	}
	if b, _ := os.ReadFile(copies[0]); string(b) != "torn" {
		t.Errorf("copy holds %q", b)
	}
}

func TestJournalFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("cannot mount a tmpfs:", err)
	}
	t.Cleanup(func() { unix.Unmount(mnt, unix.MNT_DETACH) })
	path := filepath.Join(mnt, "j")
	j := mustOpen(t, path)
	must(t, j.Put("container", "a", "old"))
	full := false
	for i := range 100 {
		err := j.Put("network", fmt.Sprint(i), strings.Repeat("x", 3000))
		if err != nil {
			if !errors.Is(err, errdefs.ErrExhausted) {
				t.Fatal(err)
			}
			full = true
		}
	}
	if !full {
		t.Fatal("the disk did not fill")
	}
	before := dump(t, j)
	must(t, j.Close())
	j = mustOpen(t, path)
	defer j.Close()
	if d := cmp.Diff(before, dump(t, j)); d != "" {
		t.Error(d)
	}
	if copies, _ := filepath.Glob(path + ".torn-*"); len(copies) != 0 {
		t.Errorf("a full disk tore the journal: %v", copies)
	}
}

// TestRunCompacts writes one key over and over, from several goroutines, beside Run.
func TestRunCompacts(t *testing.T) {
	defer goleak.VerifyNone(t)
	path := filepath.Join(t.TempDir(), "j")
	j := mustOpen(t, path)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- j.Run(ctx) }()
	big := strings.Repeat("x", 10000)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 300 {
				if err := j.Put("container", fmt.Sprint(g), fmt.Sprint(i, big)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	deadline := time.Now().Add(10 * time.Second)
	for {
		fi, err := os.Stat(path)
		must(t, err)
		if fi.Size() < 1<<20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %d bytes", fi.Size())
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	must(t, <-ran)
	must(t, j.Close())
	j = mustOpen(t, path)
	defer j.Close()
	want := map[string]string{}
	for g := range 4 {
		want[fmt.Sprintf("container/%d", g)] = fmt.Sprint(299, big)
	}
	if d := cmp.Diff(want, dump(t, j)); d != "" {
		t.Error(d)
	}
}

// TestCompactBesideWriters: no write is lost when it falls into a compaction.
func TestCompactBesideWriters(t *testing.T) {
	j := mustOpen(t, filepath.Join(t.TempDir(), "j"))
	defer j.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 3000 {
			if err := j.Put("container", fmt.Sprint(i%17), fmt.Sprint(i)); err != nil {
				t.Error(err)
			}
		}
	}()
	for n := 0; ; n++ {
		must(t, j.Compact())
		select {
		case <-done:
			must(t, j.Compact())
			for i := 3000 - 17; i < 3000; i++ {
				var v string
				must(t, j.Get("container", fmt.Sprint(i%17), &v))
				if v != fmt.Sprint(i) {
					t.Errorf("key %d = %s, want %d", i%17, v, i)
				}
			}
			return
		default:
		}
	}
}

func FuzzReplay(f *testing.F) {
	path := filepath.Join(f.TempDir(), "j")
	j, err := state.OpenJournal(path)
	if err != nil {
		f.Fatal(err)
	}
	j.Put("container", "a", "value")
	j.Put("network", "b", 1)
	j.Delete("container", "a")
	j.Close()
	seed, _ := os.ReadFile(path)
	f.Add(seed)
	f.Add(seed[:len(seed)-3])
	f.Add([]byte("berth-jrnl 0001\n\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := state.OpenJournal(path)
		if err != nil {
			if errdefs.Kind(err) == nil {
				t.Fatalf("error without a kind: %v", err)
			}
			return
		}
		must(t, j.Put("fuzz", "k", "v"))
		must(t, j.Close())
		j, err = state.OpenJournal(path)
		must(t, err)
		var v string
		if err := j.Get("fuzz", "k", &v); err != nil || v != "v" {
			t.Fatal(v, err)
		}
		must(t, j.Close())
		copies, _ := filepath.Glob(path + ".torn-*")
		for _, c := range copies {
			os.Remove(c)
		}
	})
}
