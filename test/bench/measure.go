package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Sizes of the measurements beside the number of samples.
const (
	warmups     = 3
	atOnce      = 8
	burst       = 48 // containers of one burst of row 3
	bursts      = 5
	idle        = 50 // containers of row 4
	warm        = 10 // containers that come and go before
	daemonTries = 7
	settle      = 2 * time.Second // before memory is read
)

// bench is one run in its namespaces.
type bench struct {
	options
	dir    string
	bundle string
	berthD string // the two docker sockets, as -H takes them
	dockD  string
	next   atomic.Int64 // names of runc and crun containers
}

// contestant is one column: a command line, made anew for each sample.
type contestant struct {
	name string
	args func() []string
}

func measure(o options) error {
	b := &bench{options: o, dir: os.Getenv(dirVar)}
	b.berthD = "unix://" + filepath.Join(b.dir, "berth/run/docker.sock")
	b.dockD = "unix://" + filepath.Join(b.dir, "docker/d.sock")
	if b.images = os.Getenv("BERTH_CACHE"); b.images == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		b.images = filepath.Join(cache, "berth")
	}
	b.images = filepath.Join(b.images, "images/current")
	if err := stage(b.dir); err != nil {
		return err
	}
	fmt.Printf("%s. Medians of %d samples, all columns interleaved in one run.\n\n", machine(), o.samples)
	// Measured in another order than printed: the daemons' own row starts and stops them, and
	// memory is read while they are fresh.
	tables := map[string]string{}
	wanted := strings.Split(o.rows, ",")
	for _, row := range []struct {
		name    string
		measure func() (string, error)
	}{
		{"5", b.daemons},
		{"", b.start},
		{"4", b.memory},
		{"1", func() (string, error) { return b.latency("Start to exit of `/bin/true`, no network", b.noNetwork()) }},
		{"2", func() (string, error) { return b.latency("The same with a bridge network", b.bridge()) }},
		{"3", b.throughput},
	} {
		if row.name != "" && !slices.Contains(wanted, row.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, "bench: measuring", or(row.name, "nothing, starting the engines"))
		text, err := row.measure()
		if err != nil {
			return fmt.Errorf("row %s: %w", row.name, err)
		}
		tables[row.name] = text
	}
	for _, row := range []string{"1", "2", "3", "4", "5"} {
		fmt.Print(tables[row])
	}
	_, err := output(b.berth("down", "--containers", "stop"))
	return err
}

func or(name, otherwise string) string {
	if name == "" {
		return otherwise
	}
	return "row " + name
}

// start brings up both engines with the image.
func (b *bench) start() (string, error) {
	archive := filepath.Join(b.images, "busybox.tar")
	var err error
	if b.bundle, err = bundle(b.dir, archive); err != nil {
		return "", err
	}
	if _, _, err = dockerd(b.dir); err != nil {
		return "", err
	}
	for _, args := range [][]string{
		b.berth("up"),
		{"docker", "-H", b.berthD, "load", "-q", "-i", archive},
		{"docker", "-H", b.dockD, "load", "-q", "-i", archive},
		podman(b.dir, "load", "-q", "-i", archive),
	} {
		if _, err := output(args); err != nil {
			return "", err
		}
	}
	return "", nil
}

func (b *bench) berth(args ...string) []string {
	return append([]string{filepath.Join(b.bin, "berth"), args[0], "--root", filepath.Join(b.dir, "berth")}, args[1:]...)
}

func fixed(args ...string) func() []string { return func() []string { return args } }

func (b *bench) noNetwork() []contestant {
	return []contestant{
		{"`docker run --rm`, dockerd 20.10", fixed("docker", "-H", b.dockD, "run", "--rm", "--network", "none", "busybox", "true")},
		{"`berth run --rm`", fixed(b.berth("run", "--rm", "--network", "none", "busybox", "true")...)},
		{"`docker run --rm` on Berth", fixed("docker", "-H", b.berthD, "run", "--rm", "--network", "none", "busybox", "true")},
		{"`podman run --rm`, crun", fixed(podman(b.dir, "run", "--rm", "--network", "none", "busybox", "true")...)},
		{"`runc run`, no seccomp", func() []string { return b.oci("runc") }},
		{"`crun run`, no seccomp", func() []string { return b.oci("crun") }},
	}
}

func (b *bench) bridge() []contestant {
	return []contestant{
		{"`docker run --rm`, dockerd 20.10", fixed("docker", "-H", b.dockD, "run", "--rm", "busybox", "true")},
		{"`berth run --rm`", fixed(b.berth("run", "--rm", "busybox", "true")...)},
		{"`docker run --rm` on Berth", fixed("docker", "-H", b.berthD, "run", "--rm", "busybox", "true")},
		{"`podman run --rm`, crun", fixed(podman(b.dir, "run", "--rm", "busybox", "true")...)},
	}
}

func (b *bench) oci(runtime string) []string {
	return []string{filepath.Join(b.dir, "bin", runtime), "--root", filepath.Join(b.dir, "run", runtime), "run", "-b", b.bundle,
		runtime + strconv.FormatInt(b.next.Add(1), 10)}
}

// output runs one command to its end; its words are the error when it fails.
func output(args []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", &failure{args, err, string(bytes.TrimSpace(tail(stderr.Bytes())))}
	}
	return stdout.String(), nil
}

// failure is a command that did not succeed.
type failure struct {
	args  []string
	err   error
	words string // the end of its standard error
}

func (f *failure) Error() string {
	return fmt.Sprintf("%s: %v: %s", strings.Join(f.args, " "), f.err, f.words)
}

func (f *failure) Unwrap() error { return f.err }

// latency times each contestant in turn, so that what disturbs the machine disturbs all. One that
// cannot run here is named with its reason and left out.
func (b *bench) latency(title string, list []contestant) (string, error) {
	times := make([][]time.Duration, len(list))
	broken := make([]error, len(list))
	for sample := -warmups; sample < b.samples; sample++ {
		for i := range list {
			i = (i + max(sample, 0)) % len(list)
			if broken[i] != nil {
				continue
			}
			args := list[i].args()
			started := time.Now()
			_, err := output(args)
			took := time.Since(started)
			switch {
			case err != nil:
				broken[i] = err
			case sample >= 0:
				times[i] = append(times[i], took)
			}
		}
	}
	if err := errors.Join(broken[0], broken[1]); err != nil {
		return "", err // without these two there is nothing to compare
	}
	var text strings.Builder
	fmt.Fprintf(&text, "### %s\n\n| what | median | 10th–90th percentile | against dockerd |\n|---|---|---|---|\n", title)
	base := median(times[0])
	for i, c := range list {
		if broken[i] != nil {
			fmt.Fprintf(&text, "| %s | did not run: %s | | |\n", c.name, firstLine(broken[i]))
			continue
		}
		m := median(times[i])
		fmt.Fprintf(&text, "| %s | %.1f ms | %.1f–%.1f | 1/%.1f |\n", c.name, ms(m), ms(percentile(times[i], 10)), ms(percentile(times[i], 90)), ms(base)/ms(m))
	}
	fmt.Fprintln(&text)
	return text.String(), nil
}

// throughput starts bursts of containers, some at once, in turn.
func (b *bench) throughput() (string, error) {
	list := b.noNetwork()[:3]
	rates := make([][]float64, len(list))
	for range bursts {
		for i, c := range list {
			started := time.Now()
			if err := parallel(burst, c.args); err != nil {
				return "", err
			}
			rates[i] = append(rates[i], burst/time.Since(started).Seconds())
		}
	}
	var text strings.Builder
	fmt.Fprintf(&text, "### Starts per second, %d at once (no network, to exit)\n\n| what | median of %d bursts of %d | against dockerd |\n|---|---|---|\n", atOnce, bursts, burst)
	for i, c := range list {
		fmt.Fprintf(&text, "| %s | %.1f/s | %.1f× |\n", c.name, median(rates[i]), median(rates[i])/median(rates[0]))
	}
	fmt.Fprintln(&text)
	return text.String(), nil
}

func parallel(count int, args func() []string) error {
	var wait sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(count))
	failures := make([]error, atOnce)
	for i := range atOnce {
		wait.Go(func() {
			for left.Add(-1) >= 0 && failures[i] == nil {
				_, failures[i] = output(args())
			}
		})
	}
	wait.Wait()
	return errors.Join(failures...)
}

func median[T time.Duration | float64](values []T) T { return percentile(values, 50) }

func percentile[T time.Duration | float64](values []T, p int) T {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// firstLine is why a contestant is not in the table, fit for a cell.
func firstLine(err error) string {
	const most = 160
	text := err.Error()
	var f *failure
	if errors.As(err, &f) && f.words != "" {
		text = f.words
	}
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return strings.ReplaceAll(line[:min(len(line), most)], "|", "/")
}
