package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/state"
)

// What TestSurvive and TestSoak take from the environment.
const (
	seedVar     = "BERTH_SEED"     // any 64-bit number; else chosen and printed
	instantsVar = "BERTH_INSTANTS" // how often to kill
	soakVar     = "BERTH_SOAK"     // how long to kill
	workloadVar = "BERTH_E2E_WORKLOAD"
)

const (
	defaultInstants = 200
	surviveTimeout  = 15 * time.Minute
	recovery        = 5 * time.Second        // from a kill to an instance that answers
	dumpTime        = 2 * time.Second        // for a stack trace
	maxOffset       = 250 * time.Millisecond // from everything being well to the kill
	maxSecond       = 80 * time.Millisecond  // from a kill to a second one, of what is coming back
	secondOdds      = 5                      // one kill in so many is followed by a second
	phoenixAge      = 11 * time.Second       // longer than what resets the back-off of restarts
)

// TestSurvive kills the instance's processes at many instants under load and checks that the work
// in it does not notice: see survival.
func TestSurvive(t *testing.T) {
	if os.Getenv("BERTH_E2E") == "" {
		t.Skip("needs built executables and images: use make e2e or make test")
	}
	requireRoot(t)
	surviveIsolated(t, surviveTimeout)
}

// TestSoak is TestSurvive for as long as BERTH_SOAK says.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv(soakVar))
	if err != nil {
		t.Skip("use make soak")
	}
	requireRoot(t)
	surviveIsolated(t, length+surviveTimeout)
}

func surviveIsolated(t *testing.T, limit time.Duration) {
	workload := os.Getenv(workloadVar)
	if workload == "" {
		workload = filepath.Join(t.TempDir(), "workload")
		build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-o", workload, "./workload")
		build.Env = append(os.Environ(), "CGO_ENABLED=0") // it runs in an image without a C library
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the workload: %v\n%s", err, out)
		}
	}
	seed := os.Getenv(seedVar)
	if seed == "" {
		seed = strconv.FormatInt(time.Now().UnixNano(), 10)
	}
	t.Logf("%s=%s", seedVar, seed)
	out, err := isolatedTest(t, "TestInsideSurvive", limit, workloadVar+"="+workload, seedVar+"="+seed)
	switch {
	case err != nil:
		t.Errorf("%v (%s=%s)\n%s", err, seedVar, seed, out)
	case testing.Verbose():
		t.Logf("%s", out)
	}
}

// victims are the sets of processes that are killed at once; each as likely as the others.
var victims = [][]string{{"berth-holder"}, {"berth-runner"}, {"berthd"}, {"berth-runner", "berthd"}}

// survival is one run: an instance, the containers that live as long as it, and what has been
// seen of them.
type survival struct {
	*testing.T
	root     state.Root
	dir      string // for the workload's files
	workload string
	rng      *rand.Rand
	api      dockerClient

	lasting  []*lasting
	terminal *session
	input    *session
	web      *webLoad
	phoenix  time.Time // when its present run began, at the latest
	pending  []*passing
	serial   int
	before   inUse
}

// TestInsideSurvive runs in namespaces of its own; TestSurvive and TestSoak start it.
func TestInsideSurvive(t *testing.T) {
	if os.Getenv(roleVar) != roleScript || os.Getenv(workloadVar) == "" {
		t.Skip("runs inside the namespaces that TestSurvive makes")
	}
	seed, err := strconv.ParseUint(os.Getenv(seedVar), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", seedVar, err)
	}
	root, err := state.NewRoot(os.Getenv(rootVar))
	if err != nil {
		t.Fatal(err)
	}
	s := &survival{T: t, root: root, dir: filepath.Dir(root.Arg), workload: os.Getenv(workloadVar), rng: rand.New(rand.NewPCG(seed, 0))}
	s.api = newDockerClient(root.Socket("docker"))
	defer func() {
		if t.Failed() {
			s.tellState()
			printLogs(root.Arg, 10*maxLogShown)
		}
	}()
	s.begin()
	started, counts := time.Now(), map[string]int{}
	more := s.until()
	for n := 0; more(n); n++ {
		counts[s.instant(n)]++
		if t.Failed() {
			t.Fatalf("at instant %d of seed %d", n, seed)
		}
	}
	s.settle(0)
	t.Logf("%v instants in %.1fs, %d requests answered", counts, time.Since(started).Seconds(), s.web.answered())
	s.end()
}

// until returns the condition for going on.
func (s *survival) until() func(n int) bool {
	if length, err := time.ParseDuration(os.Getenv(soakVar)); err == nil {
		deadline := time.Now().Add(length)
		return func(int) bool { return time.Now().Before(deadline) }
	}
	count := defaultInstants
	if own, err := strconv.Atoi(os.Getenv(instantsVar)); err == nil && own > 0 {
		count = own
	}
	return func(n int) bool { return n < count }
}

// begin starts the instance and the containers that must not notice anything.
func (s *survival) begin() {
	bin, images := binaries(s.T)
	s.command(filepath.Join(bin, "berth"), "up", "--root", s.root.Arg)
	s.api.load(s.T, filepath.Join(images, "busybox.tar"))
	out := filepath.Join(s.dir, "out")
	if err := os.Mkdir(out, 0o700); err != nil {
		s.Fatal(err)
	}
	helper := s.workload + ":/workload:ro"
	s.last("counter", spec{Cmd: []string{"/workload", "count", strconv.FormatUint(s.rng.Uint64(), 10), "/out/count"},
		Host: hostSpec{Binds: []string{helper, out + ":/out"}, Log: logSpec{"json-file", map[string]string{"max-size": "4g"}}}})
	s.last("web", spec{Cmd: []string{"/workload", "serve", ":80"}, Exposed: map[string]struct{}{"80/tcp": {}},
		Host: hostSpec{Binds: []string{helper}, Ports: map[string][]port{"80/tcp": {{HostPort: webPort}}}}})
	s.last("term", spec{Cmd: []string{"sh"}, Tty: true, Stdin: true})
	s.last("input", spec{Cmd: []string{"cat"}, Stdin: true})
	s.last("phoenix", spec{Cmd: []string{"sleep", "1000000"}, Host: hostSpec{Restart: restartSpec{Name: "always"}}})
	s.phoenix = time.Now()
	s.attach()
	s.terminal.tell(s.T, "TOKEN=secret-$((6*7))\n")
	s.web = startWeb(s.api.gateway(s.T))
	s.answers(-1)
	s.before = s.measure()
}

// tellState logs what a failure is found out from.
func (s *survival) tellState() {
	for _, l := range s.lasting {
		i, err := s.api.inspect(l.name)
		s.Logf("%s: %v: %+v", l.name, err, i)
	}
	for _, p := range s.pending {
		i, err := s.api.inspect(p.name)
		s.Logf("%s, to end with %d: %v: %+v", p.name, p.code, err, i)
	}
}

// binaries are the directories of the executables and of the image archives.
func binaries(t *testing.T) (bin, images string) {
	t.Helper()
	repo, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	cache, err := cacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return binDir(repo), filepath.Join(cache, "images/current")
}

func (s *survival) command(args ...string) {
	s.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		s.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// instant is one kill and everything that is checked behind it. It returns who was killed.
func (s *survival) instant(n int) string {
	who := victims[s.rng.IntN(len(victims))]
	s.startPassing(slices.Contains(who, "berth-holder"))
	<-time.After(time.Duration(s.rng.Int64N(int64(maxOffset))))
	old := s.managers()
	if time.Since(s.phoenix) > phoenixAge {
		s.killPhoenix()
	}
	s.kill(old, who)
	if who[0] != "berth-holder" && s.rng.IntN(secondOdds) == 0 {
		<-time.After(time.Duration(s.rng.Int64N(int64(maxSecond))))
		now := map[string]int{}
		for name, pid := range s.managersNow() {
			if name != "berth-holder" {
				now[name] = pid
			}
		}
		more := victims[1+s.rng.IntN(len(victims)-1)]
		s.kill(now, more)
		s.settled(old, who, slices.Contains(more, "berthd"))
	} else {
		s.settled(old, who, false)
	}
	for _, l := range s.lasting {
		l.check(s)
	}
	s.answers(n)
	s.web.check(s.T)
	s.settle(maxPending)
	return strings.Join(who, "+")
}

// kill finds nothing anew: who was there when the instant came dies.
func (s *survival) kill(pids map[string]int, who []string) {
	for _, name := range who {
		if pid := pids[name]; pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL) // in a second kill it may be dead
		}
	}
}

// managers waits until each of the instance's three processes is there.
func (s *survival) managers() map[string]int {
	s.Helper()
	var pids map[string]int
	s.wait("holder, runner and daemon", func() error {
		if pids = s.managersNow(); len(pids) != 3 {
			return fmt.Errorf("only %v", pids)
		}
		return nil
	})
	return pids
}

// managersNow finds them by their command lines. A child that one of them forked for another
// program has its parent's for a moment: the oldest of a name counts.
func (s *survival) managersNow() map[string]int {
	pids, ages := map[string]int{}, map[string]uint64{}
	for _, p := range processes(s.root.Arg) {
		start, ok := startTime(p.pid)
		if !slices.Contains([]string{"berth-holder", "berth-runner", "berthd"}, p.name) || !ok || gone(p.pid) {
			continue
		}
		if age, found := ages[p.name]; !found || start < age {
			pids[p.name], ages[p.name] = p.pid, start
		}
	}
	return pids
}

// settled waits until others do the work of those who were killed. Whoever was not killed is still
// the same process, but for the death of a holder, which renews all.
func (s *survival) settled(old map[string]int, who []string, again bool) {
	s.Helper()
	all := slices.Contains(who, "berth-holder")
	s.within(recovery, "those who were killed are back", func() error {
		now := s.managersNow()
		for name, pid := range old {
			switch killed := all || slices.Contains(who, name); {
			case now[name] == 0 || killed && now[name] == pid:
				return fmt.Errorf("%s: was %d, now %v", name, pid, now)
			}
		}
		if err := s.api.ping(); err != nil {
			return err
		}
		return s.api.resize("term") // goes through the runner
	}, func() {
		for _, pid := range old {
			// Who should be gone tells in its log why it is not.
			_ = unix.Kill(pid, unix.SIGQUIT)
			for end := time.Now().Add(dumpTime); !gone(pid) && time.Now().Before(end); {
				time.Sleep(pollInterval)
			}
		}
	})
	now := s.managersNow()
	if !all && now["berth-holder"] != old["berth-holder"] {
		s.Errorf("the holder changed from %d to %d when %v was killed", old["berth-holder"], now["berth-holder"], who)
	}
	if slices.Equal(who, []string{"berth-runner"}) && !again && now["berthd"] != old["berthd"] {
		s.Errorf("the daemon changed from %d to %d when only the runner was killed", old["berthd"], now["berthd"])
	}
	if all || again || slices.Contains(who, "berthd") || now["berthd"] != old["berthd"] {
		s.attach()
	}
}

// wait polls until f succeeds.
func (s *survival) wait(what string, f func() error) {
	s.Helper()
	s.within(pollTimeout, what, f, nil)
}

// within is wait with a limit; failed is called when that is reached.
func (s *survival) within(limit time.Duration, what string, f func() error, failed func()) {
	s.Helper()
	deadline := time.Now().Add(patience(limit))
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			if failed != nil {
				failed()
			}
			s.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// killPhoenix kills a container's process that is to be started again by policy, in the gap.
func (s *survival) killPhoenix() {
	s.phoenix = time.Now()
	for _, l := range s.lasting {
		if l.name == "phoenix" {
			if err := unix.Kill(l.pid, unix.SIGKILL); err != nil {
				s.Errorf("kill phoenix's process %d: %v", l.pid, err)
			}
			l.killed++
		}
	}
}
