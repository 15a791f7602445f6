package cgroup

import (
	"bufio"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Unlimited stands for a limit that is not set.
const Unlimited = math.MaxUint64

// Stats are a group's counters: bytes, nanoseconds and numbers. What the kernel does not count
// is 0; a limit that is not set is Unlimited.
type Stats struct {
	CPUNanos                  uint64
	CPUUserNanos              uint64
	CPUSysNanos               uint64
	ThrottledNanos            uint64
	ThrottledPeriods, Periods uint64
	MemoryBytes               uint64 // usage as the kernel counts, page cache included
	MemoryCache               uint64 // inactive file pages
	MemoryLimit               uint64
	MemoryPeak                uint64
	Pids, PidsLimit           uint64
	ReadBytes, WriteBytes     uint64
	OOMKills                  uint64
}

// v1Unlimited: limits from here on are the kernel's way to say "none" (PAGE_COUNTER_MAX).
const v1Unlimited = math.MaxInt64 - 1<<20

// Read returns the group's counters. fs.ErrNotExist: the group is not there.
func (s Systems) Read(group string) (Stats, error) {
	if dir := s.main(group); dir == "" || !exists(dir) {
		return Stats{}, &fs.PathError{Op: "read control group", Path: group, Err: fs.ErrNotExist}
	}
	if s.Mode == V2 {
		return readV2(s.main(group)), nil
	}
	return s.readV1(group), nil
}

func readV2(dir string) Stats {
	var out Stats
	cpu := table(filepath.Join(dir, "cpu.stat"))
	const micro = 1000 // nanoseconds
	out.CPUNanos, out.CPUUserNanos, out.CPUSysNanos = cpu["usage_usec"]*micro, cpu["user_usec"]*micro, cpu["system_usec"]*micro
	out.Periods, out.ThrottledPeriods, out.ThrottledNanos = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_usec"]*micro
	out.MemoryBytes = number(filepath.Join(dir, "memory.current"))
	out.MemoryLimit = number(filepath.Join(dir, "memory.max"))
	out.MemoryPeak = number(filepath.Join(dir, "memory.peak"))
	out.MemoryCache = table(filepath.Join(dir, "memory.stat"))["inactive_file"]
	out.OOMKills = table(filepath.Join(dir, "memory.events"))["oom_kill"]
	out.Pids, out.PidsLimit = number(filepath.Join(dir, "pids.current")), number(filepath.Join(dir, "pids.max"))
	for _, line := range lines(filepath.Join(dir, "io.stat")) {
		for _, field := range strings.Fields(line) {
			key, value, _ := strings.Cut(field, "=")
			n, _ := strconv.ParseUint(value, 10, 64)
			switch key {
			case "rbytes":
				out.ReadBytes += n
			case "wbytes":
				out.WriteBytes += n
			}
		}
	}
	return out
}

func (s Systems) readV1(group string) Stats {
	var out Stats
	file := func(controller, name string) string {
		dir := s.Path(controller, group)
		if dir == "" {
			return ""
		}
		return filepath.Join(dir, name)
	}
	out.CPUNanos = number(file("cpuacct", "cpuacct.usage"))
	out.CPUUserNanos = number(file("cpuacct", "cpuacct.usage_user"))
	out.CPUSysNanos = number(file("cpuacct", "cpuacct.usage_sys"))
	cpu := table(file("cpu", "cpu.stat"))
	out.Periods, out.ThrottledPeriods, out.ThrottledNanos = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_time"]
	out.MemoryBytes = number(file("memory", "memory.usage_in_bytes"))
	out.MemoryPeak = number(file("memory", "memory.max_usage_in_bytes"))
	if out.MemoryLimit = number(file("memory", "memory.limit_in_bytes")); out.MemoryLimit >= v1Unlimited {
		out.MemoryLimit = Unlimited
	}
	out.MemoryCache = table(file("memory", "memory.stat"))["total_inactive_file"]
	out.OOMKills = table(file("memory", "memory.oom_control"))["oom_kill"]
	out.Pids, out.PidsLimit = number(file("pids", "pids.current")), number(file("pids", "pids.max"))
	for _, line := range lines(file("blkio", "blkio.throttle.io_service_bytes_recursive")) {
		fields := strings.Fields(line) // major:minor operation bytes
		if len(fields) != 3 {
			continue
		}
		n, _ := strconv.ParseUint(fields[2], 10, 64)
		switch fields[1] {
		case "Read":
			out.ReadBytes += n
		case "Write":
			out.WriteBytes += n
		}
	}
	return out
}

// OOMKills returns how many processes of the group the kernel killed for want of memory; 0 when
// that is not counted.
func (s Systems) OOMKills(group string) uint64 {
	if s.Mode == V2 {
		return table(filepath.Join(s.main(group), "memory.events"))["oom_kill"]
	}
	dir := s.Path("memory", group)
	if dir == "" {
		return 0
	}
	return table(filepath.Join(dir, "memory.oom_control"))["oom_kill"]
}

// number reads a file with one number; "max" is Unlimited, a missing file 0.
func number(path string) uint64 {
	text := strings.TrimSpace(read(path))
	if text == "max" {
		return Unlimited
	}
	n, _ := strconv.ParseUint(text, 10, 64)
	return n
}

// table reads a file of lines "key number".
func table(path string) map[string]uint64 {
	out := map[string]uint64{}
	for _, line := range lines(path) {
		key, value, _ := strings.Cut(line, " ")
		if n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64); err == nil {
			out[key] = n
		}
	}
	return out
}

func lines(path string) []string {
	if path == "" {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		out = append(out, scanner.Text())
	}
	if errors.Is(scanner.Err(), bufio.ErrTooLong) {
		return nil
	}
	return out
}
