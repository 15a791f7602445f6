package dockerapi

import (
	"bufio"
	"bytes"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hostFacts is what docker tells about the machine, read from its file systems.
type hostFacts struct {
	kernel          string
	operatingSystem string
	osVersion       string
	memoryBytes     int64
	ipv4Forwarding  bool
	bridgeNFIPv4    bool
	bridgeNFIPv6    bool
	cgroup          cgroupFacts
}

// cgroupFacts tells which limits the kernel can enforce.
type cgroupFacts struct {
	memory, swap, kernelMemory, kernelMemoryTCP, oomKillDisable bool
	cfsPeriod, cfsQuota, shares, cpuset, pids                   bool
}

// readHost collects the facts from root, the node's file system. What cannot be read stays
// zero: info is for people who look for what is wrong.
func readHost(root fs.FS, cgroupVersion string) hostFacts {
	h := hostFacts{
		kernel:         kernelRelease(),
		memoryBytes:    meminfoTotal(readText(root, "proc/meminfo")),
		ipv4Forwarding: readText(root, "proc/sys/net/ipv4/ip_forward") == "1",
		bridgeNFIPv4:   readText(root, "proc/sys/net/bridge/bridge-nf-call-iptables") == "1",
		bridgeNFIPv6:   readText(root, "proc/sys/net/bridge/bridge-nf-call-ip6tables") == "1",
		cgroup:         readCgroup(root, cgroupVersion),
	}
	release := osRelease(readText(root, "etc/os-release"))
	if len(release) == 0 {
		release = osRelease(readText(root, "usr/lib/os-release"))
	}
	h.operatingSystem, h.osVersion = release["PRETTY_NAME"], release["VERSION_ID"]
	if h.operatingSystem == "" {
		h.operatingSystem = "Linux"
	}
	return h
}

// backingFilesystem names the file system that dir is on, in docker's words; "" for one that
// has no name here.
func backingFilesystem(dir string) string {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return ""
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC:
		return "extfs"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs"
	}
	return ""
}

// readText is a small file's content without the space around it; "" when there is none.
func readText(root fs.FS, name string) string {
	raw, err := fs.ReadFile(root, name)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(raw))
}

func exists(root fs.FS, name string) bool {
	_, err := fs.Stat(root, name)
	return err == nil
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "<unknown>"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// meminfoTotal is MemTotal of /proc/meminfo, in bytes.
func meminfoTotal(text string) int64 {
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, "MemTotal:")
		if !ok {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
		if err != nil {
			return 0
		}
		return kib << 10
	}
	return 0
}

// osRelease parses os-release(5).
func osRelease(text string) map[string]string {
	out := map[string]string{}
	scanner := bufio.NewScanner(strings.NewReader(text))
	for scanner.Scan() {
		key, value, ok := strings.Cut(strings.TrimSpace(scanner.Text()), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		if unquoted, err := strconv.Unquote(value); err == nil {
			value = unquoted
		}
		out[key] = strings.Trim(value, "'")
	}
	return out
}

func readCgroup(root fs.FS, version string) cgroupFacts {
	const dir = "sys/fs/cgroup/"
	if version == "2" {
		have := map[string]bool{}
		for _, name := range strings.Fields(readText(root, dir+"cgroup.controllers")) {
			have[name] = true
		}
		return cgroupFacts{
			memory: have["memory"], swap: have["memory"], cfsPeriod: have["cpu"], cfsQuota: have["cpu"],
			shares: have["cpu"], cpuset: have["cpuset"], pids: have["pids"],
		}
	}
	return cgroupFacts{
		memory:          exists(root, dir+"memory/memory.limit_in_bytes"),
		swap:            exists(root, dir+"memory/memory.memsw.limit_in_bytes"),
		kernelMemory:    exists(root, dir+"memory/memory.kmem.limit_in_bytes"),
		kernelMemoryTCP: exists(root, dir+"memory/memory.kmem.tcp.limit_in_bytes"),
		oomKillDisable:  exists(root, dir+"memory/memory.oom_control"),
		cfsPeriod:       exists(root, dir+"cpu/cpu.cfs_period_us"),
		cfsQuota:        exists(root, dir+"cpu/cpu.cfs_quota_us"),
		shares:          exists(root, dir+"cpu/cpu.shares"),
		cpuset:          exists(root, dir+"cpuset/cpuset.cpus"),
		pids:            exists(root, dir+"pids"),
	}
}

// warnings are what docker info prints below its facts.
func (h hostFacts) warnings(cgroupVersion string) []string {
	var out []string
	warn := func(missing bool, text string) {
		if missing {
			out = append(out, "WARNING: "+text)
		}
	}
	c := h.cgroup
	warn(!c.memory, "No memory limit support")
	warn(!c.swap, "No swap limit support")
	warn(!c.oomKillDisable && cgroupVersion == "1", "No oom kill disable support")
	warn(!c.cfsQuota, "No cpu cfs quota support")
	warn(!c.cfsPeriod, "No cpu cfs period support")
	warn(!c.shares, "No cpu shares support")
	warn(!c.cpuset, "No cpuset support")
	warn(!c.pids, "No pids limit support")
	warn(!h.ipv4Forwarding, "IPv4 forwarding is disabled")
	return out
}
