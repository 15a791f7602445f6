package state_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"berth/internal/errdefs"
	"berth/internal/state"
)

type sample struct {
	Name string
	N    int
}

func TestFileRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, want := range []sample{{"a long\nname", 1}, {"b", 2}} {
		if err := state.WriteFile(path, 3, want); err != nil {
			t.Fatal(err)
		}
		var got sample
		if err := state.ReadFile(path, 3, &got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestFileErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	var got sample
	if err := state.ReadFile(path, 1, &got); !errors.Is(err, errdefs.ErrNotFound) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if err := state.WriteFile(path, 1, sample{"x", 1}); err != nil {
		t.Fatal(err)
	}
	if err := state.ReadFile(path, 2, &got); !errors.Is(err, errdefs.ErrUnsupported) {
		t.Errorf("foreign version: %v", err)
	}
	if err := state.WriteFile(path, 1, make(chan int)); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("not JSON: %v", err)
	}
	if err := state.WriteFile(filepath.Join(path, "below"), 1, 1); err == nil {
		t.Error("a file below a file")
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) - 1 { // without only the last newline it is still whole
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := state.ReadFile(path, 1, &got); !errors.Is(err, errdefs.ErrDataLoss) {
			t.Errorf("torn after %d bytes: %v", n, err)
		}
	}
}

func FuzzReadFile(f *testing.F) {
	f.Add([]byte("berth-state v1 2 00000000\n{}\n"))
	path := filepath.Join(f.TempDir(), "f")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		var v any
		if err := state.ReadFile(path, 1, &v); err != nil && errdefs.Kind(err) == nil {
			t.Errorf("error without a kind: %v", err)
		}
	})
}
