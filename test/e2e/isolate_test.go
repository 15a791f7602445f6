package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"berth/internal/state"
	"berth/test/isolate"
)

// The test binary plays three roles. The parent (no role) is `go test`: it makes namespaces and
// starts itself in them as their init, which starts itself once more to run one script.
const (
	roleVar   = "BERTH_E2E_ROLE"
	testVar   = "BERTH_E2E_TEST" // what runs inside
	scriptVar = "BERTH_E2E_SCRIPT"
	rootVar   = "BERTH_E2E_ROOT"

	timeoutVar = "BERTH_E2E_TIMEOUT"
	limitVar   = "BERTH_E2E_LIMIT" // set by who runs the tests: no script may take longer
	verboseVar = "BERTH_E2E_VERBOSE"

	roleInit   = "init"
	roleScript = "script"

	// A script may start $SELF in this role in a container's network: busybox has no UDP server.
	roleUDPEcho = "udpecho"
)

// Time limits of one script, and of cleaning up behind it.
const (
	scriptTimeout  = 4 * time.Minute
	cleanupTimeout = 10 * time.Second
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case roleInit:
		code, err := runInit()
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e init:", err)
		}
		os.Exit(code)
	case roleUDPEcho:
		fmt.Fprintln(os.Stderr, "e2e udpecho:", udpEcho())
		os.Exit(1)
	default:
		os.Exit(m.Run())
	}
}

// udpEcho answers "heard X" to each datagram X at port 53.
func udpEcho() error {
	conn, err := net.ListenPacket("udp4", ":53")
	if err != nil {
		return err
	}
	packet := make([]byte, 512)
	for {
		n, from, err := conn.ReadFrom(packet)
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(append([]byte("heard "), packet[:n]...), from); err != nil {
			return err
		}
	}
}

// isolated runs one script in namespaces of its own and returns what it printed.
func isolated(t *testing.T, script string) ([]byte, error) {
	t.Helper()
	limit := scriptTimeout
	if own := ownTimeout(script); own > 0 {
		limit = own
	}
	return isolatedTest(t, "TestOneScript", limit, scriptVar+"="+script)
}

// isolatedTest runs one test of this program in namespaces of its own.
func isolatedTest(t *testing.T, test string, limit time.Duration, env ...string) ([]byte, error) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "be-") // short: socket paths are below it
	if err != nil {
		t.Fatal(err)
	}
	root, err := state.NewRoot(filepath.Join(dir, "r"))
	if err != nil {
		t.Fatal(err)
	}
	// Cleanup first. The init's death kills all processes and with them mounts and links go;
	// cgroups and files are the host's.
	t.Cleanup(func() {
		for _, name := range append(instanceNames(dir), root.Name()) {
			if err := isolate.RemoveCgroups(name, cleanupTimeout); err != nil {
				t.Errorf("cgroups left: %v", err)
			}
		}
		removeTree(t, dir)
	})
	limit = patience(limit)
	if most, err := time.ParseDuration(os.Getenv(limitVar)); err == nil && most > 0 {
		limit = min(limit, most)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit+cleanupTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVar+"="+roleInit, testVar+"="+test, rootVar+"="+root.Arg, timeoutVar+"="+limit.String())
	cmd.Env = append(cmd.Env, env...)
	if testing.Verbose() {
		cmd.Env = append(cmd.Env, verboseVar+"=1")
	}
	cmd.SysProcAttr = isolate.Attributes()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = cleanupTimeout
	// Pdeathsig is of the thread that forks: it must live as long as the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.Cancel = func() error {
		err := cmd.Process.Kill()
		thawAll(dir, root)
		return err
	}
	err = cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("killed after %v: %w", limit, err)
	}
	return out.Bytes(), err
}

// thawAll lets paused containers die.
func thawAll(dir string, root state.Root) {
	for _, name := range append(instanceNames(dir), root.Name()) {
		isolate.Thaw(name)
	}
}

// ownTimeout reads "# timeout: 10m" from a script's first lines.
func ownTimeout(script string) time.Duration {
	text, err := os.ReadFile(script)
	if err != nil {
		return 0
	}
	for i, line := range strings.SplitN(string(text), "\n", 20) {
		if value, ok := strings.CutPrefix(line, "# timeout: "); ok && i < 19 {
			if d, err := time.ParseDuration(strings.TrimSpace(value)); err == nil {
				return d
			}
		}
	}
	return 0
}

// runInit is process 1 of a script's namespaces: it prepares them, runs the script and reaps
// what is orphaned. The kernel kills whatever is left when it exits.
func runInit() (int, error) {
	if err := isolate.Prepare(); err != nil {
		return 1, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	env := []string{roleVar + "=" + roleScript}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, roleVar+"=") {
			env = append(env, e)
		}
	}
	args := []string{exe, "-test.run=^" + os.Getenv(testVar) + "$", "-test.count=1", "-test.timeout=" + os.Getenv(timeoutVar)}
	if os.Getenv(verboseVar) != "" {
		args = append(args, "-test.v")
	}
	defer func() {
		if root, err := state.NewRoot(os.Getenv(rootVar)); err == nil {
			thawAll(filepath.Dir(root.Arg), root)
		}
	}()
	return isolate.Run(exe, args, env)
}

// instanceNames returns the cgroup names of further instances that a script made below dir.
func instanceNames(dir string) []string {
	var names []string
	for i := range 4 {
		if root, err := state.NewRoot(filepath.Join(dir, "r"+strconv.Itoa(i))); err == nil {
			names = append(names, root.Name())
		}
	}
	return names
}

// removeTree removes a script's files; immutable leftovers are an error worth seeing.
func removeTree(t *testing.T, dir string) {
	deadline := time.Now().Add(cleanupTimeout)
	for {
		err := os.RemoveAll(dir)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("files left: %v", err)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}
