package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/runner/hold"
	"berth/test/isolate"
)

// lasting is a container whose process lives through everything.
type lasting struct {
	name   string
	id     string
	pid    int
	start  uint64
	killed int // how often the test killed its process; its policy starts it again
	seen   int
}

func (s *survival) last(name string, c spec) {
	s.Helper()
	s.api.run(s.T, name, c)
	i, err := s.api.inspect(name)
	if err != nil {
		s.Fatal(err)
	}
	start, ok := startTime(i.State.Pid)
	if !ok {
		s.Fatalf("%s: no process %d", name, i.State.Pid)
	}
	s.lasting = append(s.lasting, &lasting{name: name, id: i.ID, pid: i.State.Pid, start: start})
}

// check compares what the API says of the container and what /proc says with what was there at
// the start.
func (l *lasting) check(s *survival) {
	s.Helper()
	if l.killed > l.seen {
		s.wait(l.name+" started again by its policy", func() error {
			i, err := s.api.inspect(l.name)
			if err != nil || i.State.Status != "running" || i.State.Pid == l.pid || i.RestartCount != l.killed {
				return fmt.Errorf("%w: %+v, killed %d times", err, i, l.killed)
			}
			l.pid = i.State.Pid
			l.start, _ = startTime(l.pid)
			return nil
		})
		l.seen = l.killed
		s.phoenix = time.Now()
	}
	i, err := s.api.inspect(l.name)
	start, ok := startTime(l.pid)
	switch {
	case err != nil:
		s.Errorf("%s: %v", l.name, err)
	case i.State.Status != "running" || i.State.Pid != l.pid || i.RestartCount != l.killed:
		s.Errorf("%s: %+v; want it running as %d, restarted %d times", l.name, i, l.pid, l.killed)
	case !ok || start != l.start || gone(l.pid):
		s.Errorf("%s: process %d of start time %d is gone", l.name, l.pid, l.start)
	}
}

// startTime is field 22 of /proc/PID/stat.
func startTime(pid int) (uint64, bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, false
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	return start, err == nil
}

// attach replaces the sessions: the daemon that served them is dead.
func (s *survival) attach() {
	s.Helper()
	for name, to := range map[string]**session{"term": &s.terminal, "input": &s.input} {
		if *to != nil {
			_ = (*to).conn.Close()
		}
		s.wait("attach to "+name, func() (err error) {
			*to, err = s.api.attach(name)
			return err
		})
	}
}

// answers checks that both sessions are alive; the terminal's shell still has its variable.
func (s *survival) answers(n int) {
	s.Helper()
	s.terminal.tell(s.T, fmt.Sprintf("echo \"<$TOKEN.%d>\"\n", n))
	s.terminal.hear(s.T, fmt.Sprintf("<secret-42.%d>", n))
	s.input.tell(s.T, fmt.Sprintf("line %d.\n", n))
	s.input.hear(s.T, fmt.Sprintf("line %d.\n", n))
}

// Load on the published port: from both of the host's own addresses, a connection per request.
const (
	webPort    = "18080"
	webClients = 4
	webEvery   = 8 * time.Millisecond
	webTimeout = 15 * time.Second // longer than three retransmissions of a SYN
)

type webLoad struct {
	stop     context.CancelFunc
	clients  sync.WaitGroup
	requests atomic.Int64
	mu       sync.Mutex
	failures []string
}

func startWeb(gateway string) *webLoad {
	ctx, cancel := context.WithCancel(context.Background())
	w := &webLoad{stop: cancel}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, address)
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // no TIME_WAIT: ports would run out
		}
		return conn, err
	}
	client := &http.Client{Timeout: webTimeout, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	for i := range webClients {
		host := []string{"127.0.0.1", gateway}[i%2]
		w.clients.Go(func() { w.request(ctx, client, "http://"+net.JoinHostPort(host, webPort)+"/") })
	}
	return w
}

func (w *webLoad) request(ctx context.Context, client *http.Client, url string) {
	ticker := time.NewTicker(webEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		begun := time.Now()
		if _, err := get(client, url); err != nil {
			w.mu.Lock()
			w.failures = append(w.failures, fmt.Sprintf("after %v: %v", time.Since(begun), err))
			w.mu.Unlock()
			continue
		}
		w.requests.Add(1)
	}
}

func (w *webLoad) answered() int64 { return w.requests.Load() }

func (w *webLoad) check(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.failures) > 0 {
		t.Errorf("%d requests failed, %d were answered: %s", len(w.failures), w.requests.Load(), strings.Join(w.failures[:min(3, len(w.failures))], "\n"))
	}
}

// Containers of an instant: how many, how long they run, how many may be waited for later.
const (
	shortOnes  = 3
	maxDelay   = 700 * time.Millisecond
	retries    = 2
	maxRetry   = 200 * time.Millisecond
	maxPending = 12
)

// passing is a container that ends about the time of a kill.
type passing struct {
	name    string
	code    int
	retries int  // of its on-failure policy
	maybe   bool // its exit code may be lost
}

// startPassing starts containers that end before, in and after the gap, side by side.
func (s *survival) startPassing(holder bool) {
	maybe := holder && !exitsKept()
	var starting sync.WaitGroup
	for i := range shortOnes + 1 {
		s.serial++
		p := &passing{name: fmt.Sprintf("passing-%d", s.serial), code: s.rng.IntN(126), maybe: maybe}
		delay := maxDelay
		if i == shortOnes {
			p.code, p.retries, delay = 1+s.rng.IntN(125), retries, maxRetry
		}
		c := spec{
			Cmd:  []string{"/workload", "exit", strconv.Itoa(p.code), time.Duration(s.rng.Int64N(int64(delay))).String()},
			Host: hostSpec{Binds: []string{s.workload + ":/workload:ro"}},
		}
		if p.retries > 0 {
			c.Host.Restart = restartSpec{"on-failure", p.retries}
		}
		s.pending = append(s.pending, p)
		starting.Go(func() { s.api.run(s.T, p.name, c) })
	}
	starting.Wait()
	if s.Failed() {
		s.FailNow()
	}
}

// exitsKept tells whether the kernel keeps the exit of a process that somebody else reaped.
func exitsKept() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 15)
}

// settle checks the ends of all passing containers but the last few, and removes these containers.
func (s *survival) settle(keep int) {
	s.Helper()
	for len(s.pending) > keep {
		p := s.pending[0]
		s.pending = s.pending[1:]
		p.check(s)
	}
}

func (p *passing) check(s *survival) {
	s.Helper()
	var i inspected
	s.wait(p.name+" has ended", func() (err error) {
		if i, err = s.api.inspect(p.name); err == nil && i.State.Status != "exited" {
			err = fmt.Errorf("%+v, code to come %d", i, p.code)
		}
		return err
	})
	if i.State.ExitCode != p.code && !(p.maybe && i.State.ExitCode == 255) {
		s.Errorf("%s: exit code %d, want %d: %+v", p.name, i.State.ExitCode, p.code, i)
	}
	if i.RestartCount != p.retries {
		s.Errorf("%s: restarted %d times, want %d: %+v", p.name, i.RestartCount, p.retries, i)
	}
	outputs, err := s.api.logs(p.name)
	want := strings.Repeat(fmt.Sprintf("exit %d\n", p.code), p.retries+1)
	if err != nil || string(outputs[0]) != want || len(outputs[1]) > 0 {
		s.Errorf("logs of %s: %v: %q and %q, want %q", p.name, err, outputs[0], outputs[1], want)
	}
	if err := s.api.remove(p.name, "0"); err != nil {
		s.Errorf("remove %s: %v", p.name, err)
	}
}

// inUse counts what must not grow.
type inUse map[string]int

// Descriptors and threads vary with what goes on at the moment; leaks do not stop at so few.
const slack = 12

// measure returns numbers that are the same whenever the same containers run, and for descriptors
// and threads nearly so.
func (s *survival) measure() inUse {
	s.Helper()
	u := inUse{"mounts": len(mountsAll(s.T)), "records of processes": entries(s.root.Run, "procs"), "FIFO directories": entries(s.root.Run, "io"),
		"exits recorded": entries(s.root.Run, "exits"), "bundles": entries(s.root.Run, "bundles"), "namespaces": entries(s.root.Run, "ns"),
		"container directories": entries(s.root.Containers()), "sandbox directories": entries(filepath.Dir(s.root.Sandbox("x")))}
	for _, dir := range isolate.Cgroups(s.root.Name()) {
		_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				u["cgroups"]++
			}
			return nil // what cannot be read is gone
		})
	}
	links, err := net.Interfaces()
	if err != nil {
		s.Fatal(err)
	}
	u["links"] = len(links)
	client, err := hold.Dial(s.root.Socket("holder"))
	if err != nil {
		s.Fatal(err)
	}
	defer client.Close()
	keys, err := client.List("")
	if err != nil {
		s.Fatal(err)
	}
	u["holder's keys"] = len(keys)
	for name, pid := range s.managers() {
		u["~descriptors of "+name] = entries(fmt.Sprintf("/proc/%d/fd", pid))
		u["~threads of "+name] = entries(fmt.Sprintf("/proc/%d/task", pid))
	}
	return u
}

func entries(path ...string) int {
	list, _ := os.ReadDir(filepath.Join(path...)) // what is not there is empty
	return len(list)
}

func mountsAll(t *testing.T) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// end stops everything and checks what is left and what was written.
func (s *survival) end() {
	s.web.check(s.T)
	s.wait("as much in use as at the start", func() error { return s.before.grown(s.measure()) })
	s.Logf("in use at the start: %v", s.before)
	s.Logf("in use at the end:   %v", s.measure())
	s.web.stop()
	s.web.clients.Wait()
	_ = s.terminal.conn.Close()
	_ = s.input.conn.Close()
	if err := s.api.do("POST", "/containers/counter/stop", nil, nil); err != nil {
		s.Error(err)
	}
	s.counted()
	for _, l := range s.lasting {
		if err := s.api.remove(l.name, "1"); err != nil {
			s.Error(err)
		}
	}
	bin, _ := binaries(s.T)
	s.command(filepath.Join(bin, "berth"), "down", "--root", s.root.Arg, "--containers", "stop")
	s.wait("nothing left behind", func() error {
		left, err := leftovers(s.root.Arg)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("left:\n  %s", strings.Join(left, "\n  "))
		}
		return err
	})
}

func (u inUse) grown(now inUse) error {
	var names []string
	for name := range now {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		allowed := u[name]
		if strings.HasPrefix(name, "~") {
			allowed += slack
		}
		if now[name] > allowed {
			return fmt.Errorf("%s: %d, at the start %d", strings.TrimPrefix(name, "~"), now[name], u[name])
		}
	}
	return nil
}

// counted compares what the counter says it wrote with what its log has, asked for and read from
// the file.
func (s *survival) counted() {
	text, err := os.ReadFile(filepath.Join(s.dir, "out", "count"))
	if err != nil {
		s.Errorf("the counter did not end well: %v", err)
		return
	}
	var wrote [2]int
	if _, err := fmt.Sscan(string(text), &wrote[0], &wrote[1]); err != nil {
		s.Fatalf("%q: %v", text, err)
	}
	served, err := s.api.logs("counter")
	if err != nil {
		s.Error(err)
	}
	i, err := s.api.inspect("counter")
	if err != nil {
		s.Fatal(err)
	}
	if i.State.ExitCode != 0 {
		s.Errorf("counter ended with %d", i.State.ExitCode)
	}
	filed := logFileLines(s.T, i.LogPath)
	for n, name := range []string{"stdout", "stderr"} {
		numbered(s.T, name+" as served", served[n], wrote[n])
		numbered(s.T, name+" in the file", filed[n], wrote[n])
	}
	s.Logf("%d and %d lines", wrote[0], wrote[1])
}

func logFileLines(t *testing.T, path string) (outputs [2][]byte) {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	for _, line := range bytes.SplitAfter(text, []byte("\n")) {
		if len(line) == 0 {
			continue
		}
		var e struct{ Log, Stream string }
		if err := json.Unmarshal(line, &e); err != nil {
			t.Errorf("%s: %q: %v", path, line, err)
			return outputs
		}
		n := 0
		if e.Stream == "stderr" {
			n = 1
		}
		outputs[n] = append(outputs[n], e.Log...)
	}
	return outputs
}

// numbered checks that the text is exactly the lines 1 to last.
func numbered(t *testing.T, what string, text []byte, last int) {
	t.Helper()
	want := 1
	for line := range bytes.Lines(text) {
		if string(line) != strconv.Itoa(want)+"\n" {
			t.Errorf("%s: line %d is %q: one was lost, doubled or cut", what, want, line)
			return
		}
		want++
	}
	if want != last+1 {
		t.Errorf("%s: the last line is %d, want %d", what, want-1, last)
	}
}
