package e2e_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// pollInterval is how often a condition is looked at; pollTimeout how long it may take.
const (
	pollInterval = 50 * time.Millisecond
	pollTimeout  = 20 * time.Second // see patience
	httpTimeout  = 5 * time.Second
	maxBody      = 1 << 20
)

// baseVars are what every program of a script gets; saved adds what the script kept with save.
var baseVars = []string{"PATH", "HOME", "WORK", "TMPDIR", "BERTH_ROOT", "ROOT", "REPO", "IMAGES", "DOCKER_HOST",
	"DOCKER_CONFIG", "DOCKER_CLI_HINTS", "NO_COLOR", "LANG"}

type savedKey struct{}

type saved struct{ names []string }

// patience stretches a time limit on machines that say, with BERTH_E2E_SLOW=N, that they are N
// times slower: a guest under software emulation.
func patience(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv("BERTH_E2E_SLOW")); err == nil && n > 1 {
		return d * time.Duration(n)
	}
	return d
}

type command = func(ts *testscript.TestScript, neg bool, args []string)

// commands are the words that scripts have beyond testscript's own:
//
//	up [ARG...]                 berth up for $BERTH_ROOT; its end is registered
//	down [ARG...]               berth down
//	load IMAGE...               docker load of archives made by make images
//	status CODE PROGRAM ARG...  run and expect exactly this exit code
//	waitfor [-t TIME] REGEXP PROGRAM ARG...  run until it succeeds and its output matches
//	save VAR                    keep the last output, trimmed, in $VAR
//	same A B                    compare two words
//	lines FIRST LAST            the last output is exactly the numbers from FIRST to LAST, a line each
//	fetch [-n COUNT] URL        GET; with -n that many times, none may fail
//	kill9 NAME...               kill -9 the instance's processes of these names
//	pid NAME VAR                the pid of the instance's process of this name
//	alive PID / ! alive PID     a process is there; its death is waited for
//	reboot                      what a reboot leaves: the state directory only
//	leftovers                   nothing of the instance may remain but its state
//	cri VERB ARG...             a CRI client; see cmdCRI
func commands() map[string]command {
	return map[string]command{
		"up":        cmdUp,
		"down":      cmdDown,
		"load":      cmdLoad,
		"status":    cmdStatus,
		"waitfor":   cmdWaitFor,
		"save":      cmdSave,
		"same":      cmdSame,
		"lines":     cmdLines,
		"fetch":     cmdFetch,
		"kill9":     cmdKill9,
		"pid":       cmdPID,
		"alive":     cmdAlive,
		"reboot":    cmdReboot,
		"leftovers": cmdLeftovers,
		"cri":       cmdCRI,
	}
}

func usage(ts *testscript.TestScript, neg, bad bool, text string) {
	if neg {
		ts.Fatalf("this command has no !: %s", text)
	}
	if bad {
		ts.Fatalf("usage: %s", text)
	}
}

// run executes a program, keeps its output for stdout and stderr, and returns its exit code.
func run(ts *testscript.TestScript, args []string) int {
	err := ts.Exec(args[0], args[1:]...)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	ts.Fatalf("%s: %v", args[0], err)
	return 0
}

func mustRun(ts *testscript.TestScript, args ...string) {
	if code := run(ts, args); code != 0 {
		ts.Fatalf("%s: exit code %d", strings.Join(args, " "), code)
	}
}

func cmdUp(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, false, "up [ARG...]")
	root := ts.Getenv("BERTH_ROOT")
	mustRun(ts, append([]string{"berth", "up", "--root", root}, args...)...)
}

func cmdDown(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, false, "down [ARG...]")
	mustRun(ts, append([]string{"berth", "down", "--root", ts.Getenv("BERTH_ROOT")}, args...)...)
}

func cmdLoad(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) == 0, "load IMAGE...")
	for _, name := range args {
		mustRun(ts, "docker", "load", "-q", "-i", filepath.Join(ts.Getenv("IMAGES"), name+".tar"))
	}
}

func cmdStatus(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) < 2, "status CODE PROGRAM ARG...")
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if got := run(ts, args[1:]); got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func cmdWaitFor(ts *testscript.TestScript, neg bool, args []string) {
	timeout := patience(pollTimeout)
	if len(args) > 2 && args[0] == "-t" {
		var err error
		timeout, err = time.ParseDuration(args[1])
		ts.Check(err)
		timeout = patience(timeout)
		args = args[2:]
	}
	usage(ts, neg, len(args) < 2, "waitfor [-t TIME] REGEXP PROGRAM ARG...")
	pattern, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	deadline := time.Now().Add(timeout)
	for {
		code, out := quiet(ts, args[1:])
		if code == 0 && pattern.Match(out) {
			fmt.Fprintf(ts.Stdout(), "%s", out)
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not within %v: exit code %d, output:\n%s", timeout, code, out)
		}
		time.Sleep(pollInterval)
	}
}

// quiet runs a program with the script's environment without logging each try.
func quiet(ts *testscript.TestScript, args []string) (int, []byte) {
	cmd := exec.Command(lookPath(ts, args[0]), args[1:]...)
	cmd.Dir = ts.MkAbs(".")
	for _, name := range append(ts.Value(savedKey{}).(*saved).names, baseVars...) {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, out
	case errors.As(err, &exit):
		return exit.ExitCode(), out
	}
	ts.Fatalf("%s: %v", args[0], err)
	return 0, nil
}

func lookPath(ts *testscript.TestScript, name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	ts.Fatalf("%s: not in PATH", name)
	return ""
}

func cmdSave(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 1, "save VAR")
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
	list := ts.Value(savedKey{}).(*saved)
	list.names = append(list.names, args[0])
}

func cmdSame(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: [!] same A B")
	}
	if (args[0] == args[1]) == neg {
		ts.Fatalf("%q and %q: same is %v", args[0], args[1], !neg)
	}
}

func cmdLines(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 2, "lines FIRST LAST")
	first, err := strconv.Atoi(args[0])
	ts.Check(err)
	last, err := strconv.Atoi(args[1])
	ts.Check(err)
	next := first
	for i, line := range strings.Split(strings.TrimRight(ts.ReadFile("stdout"), "\n"), "\n") {
		if line != strconv.Itoa(next) {
			ts.Fatalf("line %d is %q, want %d: a line was lost, doubled or out of order", i+1, line, next)
		}
		next++
	}
	if next != last+1 {
		ts.Fatalf("the last line is %d, want %d", next-1, last)
	}
}

func cmdFetch(ts *testscript.TestScript, neg bool, args []string) {
	count, many := 1, false
	if len(args) == 3 && args[0] == "-n" {
		var err error
		count, err = strconv.Atoi(args[1])
		ts.Check(err)
		args, many = args[2:], true
	}
	if len(args) != 1 {
		ts.Fatalf("usage: [!] fetch [-n COUNT] URL")
	}
	client := http.Client{Timeout: patience(httpTimeout), Transport: &http.Transport{DisableKeepAlives: true}}
	deadline := time.Now().Add(patience(pollTimeout))
	for done := 0; done < count; {
		body, err := get(&client, args[0])
		switch {
		case err == nil && neg:
			ts.Fatalf("%s answered: %s", args[0], body)
		case err != nil && neg:
			return
		case err == nil:
			done++
			if done == count {
				_, _ = ts.Stdout().Write(body)
			}
		case many && done > 0, time.Now().After(deadline):
			ts.Fatalf("request %d: %v", done+1, err)
		default:
			time.Sleep(pollInterval) // the first answer may take a while
		}
	}
}

func get(client *http.Client, url string) ([]byte, error) {
	response, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", url, response.Status, body)
	}
	return body, nil
}
