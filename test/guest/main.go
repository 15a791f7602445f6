// Command guest boots a Debian kernel under QEMU's software emulation with an initramfs made of
// this project's executables and runs a part of the end-to-end scripts there: on cgroup v2, which
// most users have and this or that host lacks.
//
//	guest -bin DIR [-short] [-run REGEXP]   the end-to-end scripts
//	guest -hello                            only shows that the kernel boots with what we need
//
// Nothing is installed beyond QEMU: the kernel is taken out of Debian's package. It prints what
// the guest's console prints, then "N passed, M failed", and its exit status says the same.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// shortScripts are part of make test; allScripts of make guest. Names are those of test/e2e and of
// test/guest, whose scripts are about cgroup v2. What writes or sleeps much is too slow here, and
// some scripts need programs that the guest has not.
const (
	shortScripts = "^(run_hello|cgroup2_engine|cri_pod)$"
	allScripts   = "^(run_hello|run_exit_codes|run_detached_logs|cgroup2_engine|limits_memory_oom_pids_cpu|caps_seccomp_defaults|" +
		"privileged|attach|init_reaps|inspect|network_connect_disconnect|volumes_bind_and_named|restart_policies|" +
		"down_keep_and_up_adopts|reboot_simulated|cri_pod)$"
)

// Bounds of a run.
const (
	shortTimeout = 6 * time.Minute
	fullTimeout  = 30 * time.Minute
	helloTimeout = 2 * time.Minute
	scriptLimit  = 3 * time.Minute // of one script, in the guest
	slowness     = 6               // how much longer than on the host what a script waits for may take
)

type options struct {
	bin     string
	run     string
	count   int
	verbose bool
	hello   bool
	memory  int // MiB
	cpus    int
	limit   time.Duration
}

func main() {
	var o options
	short := flag.Bool("short", false, "the part that make test runs")
	flag.StringVar(&o.bin, "bin", "bin", "directory of the executables")
	flag.StringVar(&o.run, "run", "", "regular expression of script names (default: a chosen set)")
	flag.IntVar(&o.count, "count", 1, "how often to run every script")
	flag.BoolVar(&o.verbose, "v", false, "show what every command of a script prints")
	flag.BoolVar(&o.hello, "hello", false, "boot, check the kernel, run no script")
	flag.IntVar(&o.memory, "m", 2048, "memory of the guest in MiB")
	flag.IntVar(&o.cpus, "smp", 2, "processors of the guest")
	flag.DurationVar(&o.limit, "timeout", 0, "limit of the whole run (default by what is run)")
	flag.Parse()
	switch {
	case o.hello:
		o.limit = or(o.limit, helloTimeout)
	case *short:
		o.run, o.limit = or(o.run, shortScripts), or(o.limit, shortTimeout)
	default:
		o.run, o.limit = or(o.run, allScripts), or(o.limit, fullTimeout)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	passed, failed, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if err != nil || failed > 0 || passed == 0 {
		os.Exit(1)
	}
}

func or[T comparable](a, b T) T {
	var zero T
	if a == zero {
		return b
	}
	return a
}

// run makes the initramfs, boots it and counts what the console says.
func run(ctx context.Context, o options) (passed, failed int, err error) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return 0, 0, errors.New("qemu-system-x86_64 is missing: run hack/deps.sh guest as root")
	}
	work, err := os.MkdirTemp("", "berth-guest-")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(work)
	kernel, err := findKernel(ctx)
	if err != nil {
		return 0, 0, err
	}
	initramfs := filepath.Join(work, "initramfs")
	if err := build(ctx, o, kernel, initramfs); err != nil {
		return 0, 0, err
	}
	info, err := os.Stat(initramfs)
	if err != nil {
		return 0, 0, err
	}
	fmt.Printf("guest: kernel %s, initramfs %d MB, %d MB memory\n", kernel.release, info.Size()>>20, o.memory)

	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	return boot(ctx, o, kernel, initramfs)
}

// results of the console: a check's or script's own line, and the last one of all.
var (
	resultLine = regexp.MustCompile(`^(?:script|kernel) (PASS|FAIL): `)
	exitLine   = regexp.MustCompile(`^GUEST-EXIT (\d+)`)
)

func boot(ctx context.Context, o options, kernel kernel, initramfs string) (passed, failed int, err error) {
	// TCG always: /dev/kvm may open and still hang a guest.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-m", strconv.Itoa(o.memory), "-smp", strconv.Itoa(o.cpus),
		"-kernel", kernel.image, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet panic=-1 oops=panic mitigations=off apparmor=0",
		"-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none", "-no-reboot", "-nodefaults")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	console, err := cmd.StdoutPipe()
	if err != nil {
		return 0, 0, err
	}
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	code := -1
	lines := bufio.NewReader(console)
	for {
		line, err := lines.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		if line != "" {
			fmt.Printf("guest %5.1fs| %s\n", time.Since(started).Seconds(), line)
		}
		if m := resultLine.FindStringSubmatch(line); m != nil {
			count(m[1], &passed, &failed)
		} else if m := exitLine.FindStringSubmatch(line); m != nil {
			code, _ = strconv.Atoi(m[1])
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, "guest: console:", err)
			}
			break
		}
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return passed, failed, fmt.Errorf("not done after %v: %w", o.limit, ctx.Err())
	case err != nil:
		return passed, failed, fmt.Errorf("qemu: %w", err)
	case code < 0:
		return passed, failed, errors.New("the guest ended without its last line: the kernel panicked or init failed")
	case code > 0 && failed == 0:
		return passed, failed, fmt.Errorf("the guest ended with exit status %d", code)
	}
	return passed, failed, nil
}

func count(word string, passed, failed *int) {
	if word == "PASS" {
		*passed++
	} else {
		*failed++
	}
}
