// Command bench measures Berth beside its peers in one interleaved run and prints the tables that
// docs/benchmarks.md keeps.
//
//	bench -bin DIR [-n SAMPLES] [-rows 1,2,3,4,5] [-write FILE]
//
// Peers are Debian's docker.io with containerd and runc, podman, runc and crun, unpacked (not
// installed) into the cache. Everything runs in network, mount and PID namespaces of its own with
// data directories of its own, and is gone afterwards.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"berth/internal/state"
	"berth/test/isolate"
)

// The program starts itself as process 1 of new namespaces, and that starts it once more.
const (
	roleVar = "BERTH_BENCH_ROLE"
	dirVar  = "BERTH_BENCH_DIR"
)

type options struct {
	bin     string
	samples int
	rows    string
	write   string
	images  string // directory of the archives
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "directory of Berth's executables")
	flag.IntVar(&o.samples, "n", 20, "samples of each measurement")
	flag.StringVar(&o.rows, "rows", "1,2,3,4,5", "which rows of the table")
	flag.StringVar(&o.write, "write", "", "put the tables between the markers of this file")
	flag.Parse()
	code, err := 0, error(nil)
	switch os.Getenv(roleVar) {
	case "":
		err = outside(o)
	case "init":
		code, err = inside()
	default:
		err = measure(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// outside unpacks the peers while there is a network, makes the namespaces and cleans up.
func outside(o options) error {
	if os.Getuid() != 0 {
		return errors.New("run it as root: containers need it")
	}
	dir, err := os.MkdirTemp("/tmp", "bb-") // short: socket paths are below it
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	root, err := state.NewRoot(filepath.Join(dir, "berth"))
	if err != nil {
		return err
	}
	defer func() {
		for _, name := range []string{root.Name(), peerCgroup, "libpod_parent"} {
			if err := isolate.RemoveCgroups(name, 10*time.Second); err != nil {
				fmt.Fprintln(os.Stderr, "bench: cgroups left:", err)
			}
		}
	}()
	if err := unpackPeers(dir); err != nil {
		return err
	}
	var tables bytes.Buffer
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleVar+"=init", dirVar+"="+dir)
	cmd.SysProcAttr = isolate.Attributes()
	cmd.Stdout, cmd.Stderr = &tables, os.Stderr
	runtime.LockOSThread() // the death signal is of the thread that forks
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		return err
	}
	fmt.Print(tables.String())
	if o.write == "" {
		return nil
	}
	return writeDocument(o.write, tables.String())
}

func inside() (int, error) {
	if err := isolate.Prepare(); err != nil {
		return 1, err
	}
	exe, err := os.Executable()
	if err != nil {
		return 1, err
	}
	env := []string{roleVar + "=run"}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, roleVar+"=") {
			env = append(env, e)
		}
	}
	return isolate.Run(exe, append([]string{exe}, os.Args[1:]...), env)
}

// Markers of the generated part of the document.
const (
	beginMark = "<!-- tables: make bench WRITE=1 -->"
	endMark   = "<!-- end of tables -->"
)

func writeDocument(file, tables string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(text), beginMark)
	_, tail, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		return fmt.Errorf("%s: the lines %q and %q are missing", file, beginMark, endMark)
	}
	return os.WriteFile(file, []byte(head+beginMark+"\n\n"+tables+"\n"+endMark+tail), 0o644)
}

// machine describes where and when, for the table's caption.
func machine() string {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	cpu := "unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for _, line := range strings.Split(string(info), "\n") {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				cpu = strings.TrimSpace(strings.TrimLeft(name, "\t :"))
				break
			}
		}
	}
	cgroups := "cgroup v1"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		cgroups = "cgroup v2"
	}
	return fmt.Sprintf("%s, %d × %s, Linux %s, %s", time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), cpu, strings.TrimSpace(string(release)), cgroups)
}
