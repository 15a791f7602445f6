package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The processes that an engine keeps for its containers, by the base names of their executables.
var (
	berthPrograms  = []string{"berthd", "berth-runner", "berth-holder"}
	dockerPrograms = []string{"dockerd", "containerd", "containerd-shim-runc-v2", "docker-proxy"}
)

// memory measures what the engines' own processes grow by with idle containers: the proportional
// set size, so that shared program text counts once. The containers' own processes do not count.
func (b *bench) memory() (string, error) {
	type engine struct {
		name     string
		socket   string
		programs []string
	}
	list := []engine{{"dockerd 20.10 with containerd", b.dockD, dockerPrograms}, {"Berth", b.berthD, berthPrograms}}
	var text strings.Builder
	fmt.Fprintf(&text, "### Memory per idle container, beyond its own process and the kernel's part\n\n| what | before | with %d more | per container |\n|---|---|---|---|\n", idle)
	for _, e := range list {
		// What the first containers touch stays: it is not the price of one more.
		if err := b.sleepers(e.socket, warm); err != nil {
			return "", err
		}
		if err := b.wake(e.socket, warm); err != nil {
			return "", err
		}
		time.Sleep(settle)
		before, err := proportional(e.programs)
		if err != nil {
			return "", err
		}
		if err := b.sleepers(e.socket, idle); err != nil {
			return "", err
		}
		time.Sleep(settle)
		after, err := proportional(e.programs)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "| %s | %.1f MB | %.1f MB | %.0f KiB |\n", e.name, mb(before), mb(after), float64(after-before)/idle/1024)
		if err := b.wake(e.socket, idle); err != nil {
			return "", err
		}
	}
	fmt.Fprintln(&text)
	return text.String(), nil
}

// sleepers starts idle containers, wake removes them.
func (b *bench) sleepers(socket string, count int) error {
	for i := range count {
		if _, err := output([]string{"docker", "-H", socket, "run", "-d", "--network", "none", "--name", "idle" + strconv.Itoa(i), "busybox", "sleep", "100000"}); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) wake(socket string, count int) error {
	for i := range count {
		if _, err := output([]string{"docker", "-H", socket, "rm", "-f", "idle" + strconv.Itoa(i)}); err != nil {
			return err
		}
	}
	return nil
}

// daemons measures how long each takes to be ready on a fresh directory and what it weighs idle.
func (b *bench) daemons() (string, error) {
	var ready, weight [2][]float64
	var alone []float64 // berthd itself
	for range daemonTries {
		if err := os.RemoveAll(filepath.Join(b.dir, "docker")); err != nil {
			return "", err
		}
		cmd, took, err := dockerd(b.dir)
		if err != nil {
			return "", err
		}
		time.Sleep(settle)
		rss, err := resident(dockerPrograms)
		if err != nil {
			return "", err
		}
		stopDaemon(cmd)
		ready[0], weight[0] = append(ready[0], ms(took)), append(weight[0], mb(rss))

		started := time.Now()
		if _, err := output(b.berth("up")); err != nil {
			return "", err
		}
		took = time.Since(started)
		time.Sleep(settle)
		if rss, err = resident(berthPrograms); err != nil {
			return "", err
		}
		own, err := resident([]string{"berthd"})
		if err != nil {
			return "", err
		}
		if _, err := output(b.berth("down", "--containers", "stop")); err != nil {
			return "", err
		}
		if err := os.RemoveAll(filepath.Join(b.dir, "berth")); err != nil {
			return "", err
		}
		ready[1], weight[1], alone = append(ready[1], ms(took)), append(weight[1], mb(rss)), append(alone, mb(own))
	}
	var out strings.Builder
	fmt.Fprintf(&out, "### Daemon idle memory (RSS), and ready on a fresh directory (median of %d)\n\n| what | idle | ready |\n|---|---|---|\n", daemonTries)
	fmt.Fprintf(&out, "| dockerd 20.10 with containerd | %.1f MB | %.0f ms |\n", median(weight[0]), median(ready[0]))
	fmt.Fprintf(&out, "| Berth: berthd %.1f MB, with runner and holder | %.1f MB | %.0f ms (`berth up` from exec to exit) |\n\n", median(alone), median(weight[1]), median(ready[1]))
	return out.String(), nil
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

func proportional(programs []string) (int64, error) { return sum(programs, "smaps_rollup", "Pss:") }

func resident(programs []string) (int64, error) { return sum(programs, "status", "VmRSS:") }

// sum adds a line of a /proc file, in kB, over all processes of these programs in this PID
// namespace; the result is in bytes.
func sum(programs []string, file, field string) (int64, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	var total int64
	found := false
	for _, entry := range entries {
		exe, err := os.Readlink(filepath.Join("/proc", entry.Name(), "exe"))
		if err != nil || !slices.Contains(programs, filepath.Base(strings.TrimSuffix(exe, " (deleted)"))) {
			continue
		}
		text, err := os.ReadFile(filepath.Join("/proc", entry.Name(), file))
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(text), "\n") {
			if value, ok := strings.CutPrefix(line, field); ok {
				n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
				if err != nil {
					return 0, fmt.Errorf("/proc/%s/%s: %w", entry.Name(), file, err)
				}
				total, found = total+n*1024, true
				break
			}
		}
	}
	if !found {
		return 0, fmt.Errorf("no process of %v", programs)
	}
	return total, nil
}
