package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// TestHarness shows that the harness itself isolates, waits and detects leftovers. It needs root
// but none of Berth's executables.
func TestHarness(t *testing.T) {
	requireRoot(t)
	runScripts(t, "testdata/harness")
}

// TestScript runs the end-to-end scripts; `make e2e` and `make test` build what they need.
func TestScript(t *testing.T) {
	if os.Getenv("BERTH_E2E") == "" {
		t.Skip("end-to-end scripts need built executables, clients and images: use make e2e or make test")
	}
	requireRoot(t)
	runScripts(t, "testdata/script")
}

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Getenv(roleVar) != "" {
		t.Skip("this process is inside a script")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for namespaces and containers")
	}
}

// runScripts runs every script of a directory, side by side as -parallel allows.
func runScripts(t *testing.T, dir string) {
	files, err := filepath.Glob(filepath.Join(dir, "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts in %s (%v)", dir, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			path, err := filepath.Abs(file)
			if err != nil {
				t.Fatal(err)
			}
			out, err := isolated(t, path)
			switch {
			case err != nil:
				t.Errorf("%v\n%s", err, out)
			case testing.Verbose():
				t.Logf("%s", out)
			}
		})
	}
}

// TestOneScript runs the script named by the environment; only isolated starts it.
func TestOneScript(t *testing.T) {
	if os.Getenv(roleVar) != roleScript {
		t.Skip("runs inside the namespaces that TestScript makes")
	}
	limit, err := time.ParseDuration(os.Getenv(timeoutVar))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Files:               []string{os.Getenv(scriptVar)},
		Setup:               setup,
		Cmds:                commands(),
		Condition:           condition,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Deadline:            time.Now().Add(limit - 5*time.Second),
	})
}

// setup gives a script the environment of a user of its own instance.
func setup(env *testscript.Env) error {
	repo, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	root, bin := os.Getenv(rootVar), binDir(repo)
	// docker login writes to its config directory: a script has one of its own, with the plugins.
	docker := filepath.Join(env.WorkDir, ".docker")
	if err := os.MkdirAll(docker, 0o700); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join(cache, "tools/docker-config/cli-plugins"), filepath.Join(docker, "cli-plugins")); err != nil {
		return err
	}
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("PATH", strings.Join([]string{bin, os.Getenv("PATH"), "/usr/sbin", "/sbin", filepath.Join(cache, "tools/bin")}, ":"))
	env.Setenv("BERTH_ROOT", root)
	env.Setenv("ROOT", root)
	env.Setenv("REPO", repo)
	env.Setenv("BIN", bin)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	env.Setenv("SELF", self)
	env.Setenv("IMAGES", filepath.Join(cache, "images/current"))
	env.Setenv("CACHE", cache)
	env.Setenv("DOCKER_HOST", "unix://"+filepath.Join(root, "run/docker.sock"))
	env.Setenv("DOCKER_CONFIG", docker)
	env.Setenv("DOCKER_CLI_HINTS", "false")
	env.Setenv("NO_COLOR", "1")
	env.Setenv("GOTRACEBACK", "single")
	env.Setenv("LANG", "C.UTF-8")
	env.Values[savedKey{}] = &saved{}
	env.Defer(func() { showLogs(env) })
	return nil
}

func cacheDir() (string, error) {
	if cache := os.Getenv("BERTH_CACHE"); cache != "" {
		return cache, nil
	}
	home, err := os.UserCacheDir()
	return filepath.Join(home, "berth"), err
}

func binDir(repo string) string {
	if bin := os.Getenv("BERTH_BIN"); bin != "" {
		return bin
	}
	return filepath.Join(repo, "bin")
}

// Condition words of scripts: [cgroup2] a unified hierarchy with controllers, [cmd:NAME] a program
// is on the machine.
func condition(word string) (bool, error) {
	name, argument, _ := strings.Cut(word, ":")
	switch name {
	case "cgroup2":
		var fs unix.Statfs_t
		if err := unix.Statfs("/sys/fs/cgroup", &fs); err != nil {
			return false, err
		}
		return fs.Type == unix.CGROUP2_SUPER_MAGIC, nil
	case "cmd":
		for _, dir := range filepath.SplitList(os.Getenv("PATH") + ":/usr/sbin:/sbin") {
			if info, err := os.Stat(filepath.Join(dir, argument)); err == nil && info.Mode()&0o111 != 0 {
				return true, nil
			}
		}
		return false, nil
	}
	return false, fmt.Errorf("unknown condition %q", word)
}

// maxLogShown bounds what is shown of each of the instance's logs behind a failed script, in bytes.
const maxLogShown = 6 << 10

// showLogs prints the ends of the instance's own logs when the script failed.
func showLogs(env *testscript.Env) {
	failed, ok := env.T().(interface{ Failed() bool })
	if !ok || !failed.Failed() {
		return
	}
	printLogs(os.Getenv(rootVar), maxLogShown)
}

func printLogs(root string, limit int) {
	for _, pattern := range []string{"*.log", "run/*.log", "log/*.log", "logs/*.log"} {
		files, _ := filepath.Glob(filepath.Join(root, pattern))
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil || len(text) == 0 {
				continue
			}
			if len(text) > limit {
				text = text[len(text)-limit:]
			}
			fmt.Printf("--- end of %s\n%s\n", file, text)
		}
	}
}
