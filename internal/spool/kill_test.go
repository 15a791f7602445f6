package spool_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/spool"
)

const pumpEnv = "BERTH_SPOOL_TEST_PUMP"

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(pumpEnv); dir != "" {
		pump(dir)
		return
	}
	os.Exit(m.Run())
}

// pump splices from the pipes at descriptors 3 and 4 until both end. It says on
// descriptor 5 that it has begun.
func pump(dir string) {
	w, err := spool.OpenWriter(dir, 64<<20)
	if err != nil {
		panic(err)
	}
	unix.Write(5, []byte("!"))
	open := map[uint8]int{spool.Stdout: 3, spool.Stderr: 4}
	for len(open) > 0 {
		var poll []unix.PollFd
		for _, fd := range open {
			poll = append(poll, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
		unix.Poll(poll, -1)
		for stream, fd := range open {
			switch _, err := w.SpliceFrom(fd, stream); {
			case err == nil:
			case errors.Is(err, io.EOF):
				delete(open, stream)
			default:
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
	}
}

// TestKilled kills the writer at random instants while both streams carry numbered lines and a
// reader follows.
func TestKilled(t *testing.T) {
	const kills = 120
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := filepath.Join(t.TempDir(), "s")
	outR, outW := mustPipe(t)
	errR, errW := mustPipe(t)

	stop := make(chan struct{})
	counts := make(chan int, 2)
	for i, w := range []*os.File{outW, errW} {
		go func() {
			n := 0
			for ; ; n++ {
				select {
				case <-stop:
					w.Close()
					counts <- n
					return
				default:
				}
				fmt.Fprintf(w, "stream %d line %d\n", i+1, n)
				if n%500 == 0 {
					time.Sleep(time.Millisecond) // the load: bursts, not one endless write
				}
			}
		}()
	}
	start := func() *exec.Cmd {
		ready, readyW := mustPipe(t)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), pumpEnv+"="+dir)
		cmd.Stderr = os.Stderr
		cmd.ExtraFiles = []*os.File{outR, errR, readyW}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		readyW.Close()
		ready.Read(make([]byte, 1))
		ready.Close()
		return cmd
	}
	done := make(chan struct{})
	followed := make(chan map[uint8][]byte, 1)
	go func() { followed <- follow(t, dir, done) }()
	for range kills {
		cmd := start()
		time.Sleep(time.Duration(rng.IntN(8000)) * time.Microsecond) // the random instant
		cmd.Process.Kill()
		cmd.Wait()
	}
	last := start()
	close(stop)
	n1, n2 := <-counts, <-counts
	if err := last.Wait(); err != nil {
		t.Fatal(err)
	}

	close(done)
	got := <-followed
	total := 0
	for stream, b := range got {
		lines := bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
		for i, l := range lines {
			if want := fmt.Sprintf("stream %d line %d", stream, i); string(l) != want {
				t.Fatalf("got %q, want %q", l, want)
			}
		}
		total += len(lines)
	}
	if total != n1+n2 {
		t.Fatalf("%d lines, want %d", total, n1+n2)
	}
	t.Logf("%d lines survived %d kills", total, kills)
}

// follow reads the spool while it is written, trims behind itself, and ends at the end once done.
func follow(t *testing.T, dir string, done chan struct{}) map[uint8][]byte {
	got := map[uint8][]byte{}
	r := spool.OpenReader(dir)
	defer r.Close()
	buf := make([]byte, 10000)
	var pos uint64
	for last := false; ; {
		c, err := r.Next(pos, buf)
		switch {
		case err == nil && c.Dropped == 0:
			got[c.Stream] = append(got[c.Stream], c.Data...)
			pos = c.End()
		case !errors.Is(err, io.EOF):
			t.Errorf("at %d: %v, gap of %d", pos, err, c.Dropped)
			return got
		case last:
			return got
		default:
			if err := spool.Trim(dir, pos); err != nil {
				t.Error(err)
			}
			select {
			case <-done:
				last = true
			case <-time.After(time.Millisecond):
			}
		}
	}
}

func mustPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}
