package engine

import (
	"fmt"
	"os"
	"path"
	"sort"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/errdefs"
)

// specInput is everything a container's OCI spec depends on; buildSpec is a pure function of it.
type specInput struct {
	container   ContainerConfig
	sandbox     SandboxConfig
	rootfs      string            // absolute, mounted
	namespaces  map[string]string // net, ipc, uts → path of the sandbox's; absent: the node's
	pidPath     string            // PID namespace to join; "": its own (or the node's with HostPID)
	cgroup      string            // absolute cgroup path
	unifiedV2   bool              // the node has only cgroup v2
	user        specs.User
	home        string
	binds       []specs.Mount // hosts, hostname, resolv.conf, volumes: sources resolved
	initPath    string        // host path of berth-init when Init is asked for
	shmPath     string        // shared /dev/shm of the sandbox; "": its own
	hostCaps    []string      // capabilities the node can give
	devices     []specs.LinuxDevice
	deviceRules []specs.LinuxDeviceCgroup
}

// defaultCaps is docker's default capability set.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE",
	"CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// defaultMasked and defaultReadOnly are docker's default protected paths.
var (
	defaultMasked = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
		"/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
		"/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	defaultReadOnly = []string{
		"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
	}
)

const (
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	initInside  = "/sbin/docker-init" // where docker's users expect it
)

// buildSpec translates a container into an OCI runtime spec (version 1.2).
func buildSpec(in specInput) (*specs.Spec, error) {
	c := in.container
	caps, err := capabilities(c.Security, in.hostCaps)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version:  "1.2.0",
		Hostname: "", // the sandbox's UTS namespace carries it
		Root:     &specs.Root{Path: in.rootfs, Readonly: c.ReadOnlyRootfs},
		Process:  specProcess(in, caps),
		Linux: &specs.Linux{
			CgroupsPath: in.cgroup,
			Namespaces:  specNamespaces(in),
			Resources:   linuxResources(c.Resources),
			Sysctl:      c.Sysctls,
		},
	}
	s.Linux.Resources.Devices = deviceRules(in)
	s.Linux.Devices = in.devices
	if !c.Security.Privileged {
		s.Linux.MaskedPaths = pathsOr(c.Security.MaskedPaths, defaultMasked)
		s.Linux.ReadonlyPaths = pathsOr(c.Security.ReadOnlyPaths, defaultReadOnly)
	}
	for _, u := range c.Resources.Ulimits {
		s.Process.Rlimits = append(s.Process.Rlimits, rlimit(u))
	}
	if s.Mounts, err = specMounts(in); err != nil {
		return nil, err
	}
	if err := setSeccomp(s, c.Security); err != nil {
		return nil, err
	}
	return s, nil
}

func pathsOr(given, def []string) []string {
	if given != nil {
		return given
	}
	return def
}

func specProcess(in specInput, caps []string) *specs.Process {
	c := in.container
	args := c.Args
	if c.Init {
		args = append([]string{initInside, "--"}, args...)
	}
	p := &specs.Process{
		Terminal:        c.Terminal,
		Args:            args,
		Env:             processEnv(c.Env, in.home, c.Terminal, hostname(in.sandbox)),
		Cwd:             c.Cwd,
		User:            in.user,
		NoNewPrivileges: c.Security.NoNewPrivileges,
		Capabilities:    capabilitySets(caps, in.user.UID),
		OOMScoreAdj:     &c.OOMScoreAdj,
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	if c.ConsoleSize != [2]uint16{} {
		p.ConsoleSize = &specs.Box{Height: uint(c.ConsoleSize[0]), Width: uint(c.ConsoleSize[1])}
	}
	return p
}

// capabilitySets gives root its capabilities in every set; another user keeps them in the
// bounding set only, as docker does. Ambient and inheritable stay empty (CVE-2022-24769).
func capabilitySets(caps []string, uid uint32) *specs.LinuxCapabilities {
	sets := &specs.LinuxCapabilities{Bounding: caps}
	if uid == 0 {
		sets.Effective, sets.Permitted = caps, caps
	}
	return sets
}

// processEnv puts the defaults that docker gives before what was asked for.
func processEnv(env []string, home string, terminal bool, hostname string) []string {
	set := map[string]bool{}
	for _, e := range env {
		k, _, _ := strings.Cut(e, "=")
		set[k] = true
	}
	var out []string
	add := func(e string) {
		if k, _, _ := strings.Cut(e, "="); !set[k] {
			out = append(out, e)
		}
	}
	add(defaultPath)
	add("HOSTNAME=" + hostname)
	if terminal {
		add("TERM=xterm")
	}
	// A variable named without a value was to be taken from the client; it had none.
	for _, e := range env {
		if strings.Contains(e, "=") {
			out = append(out, e)
		}
	}
	if home == "" {
		home = "/"
	}
	add("HOME=" + home)
	return out
}

func specNamespaces(in specInput) []specs.LinuxNamespace {
	ns := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	for _, n := range []struct {
		key string
		typ specs.LinuxNamespaceType
	}{{"net", specs.NetworkNamespace}, {"ipc", specs.IPCNamespace}, {"uts", specs.UTSNamespace}} {
		if p := in.namespaces[n.key]; p != "" {
			ns = append(ns, specs.LinuxNamespace{Type: n.typ, Path: p})
		}
	}
	switch {
	case in.pidPath != "":
		ns = append(ns, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: in.pidPath})
	case !in.container.HostPID:
		ns = append(ns, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if in.unifiedV2 && !in.container.Security.Privileged {
		// As docker: private on v2, the host's on v1.
		ns = append(ns, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return ns
}

func specMounts(in specInput) ([]specs.Mount, error) {
	c := in.container
	cgroupOpts := []string{"nosuid", "noexec", "nodev", "relatime"}
	sysOpts := []string{"nosuid", "noexec", "nodev"}
	if !c.Security.Privileged {
		cgroupOpts = append(cgroupOpts, "ro")
		sysOpts = append(sysOpts, "ro")
	}
	shm := in.sandbox.ShmBytes
	if shm == 0 {
		shm = 64 << 20
	}
	m := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: sysOpts},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: cgroupOpts},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	}
	switch {
	case in.shmPath != "":
		m = append(m, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: in.shmPath, Options: []string{"rbind", "rprivate"}})
	default:
		m = append(m, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}})
	}
	binds := append([]specs.Mount(nil), in.binds...)
	if c.Init {
		binds = append(binds, specs.Mount{Destination: initInside, Type: "bind", Source: in.initPath, Options: []string{"bind", "ro"}})
	}
	for _, t := range c.Mounts {
		if t.Kind == MountTmpfs {
			binds = append(binds, tmpfsMount(t))
		}
	}
	// A mount replaces the default one at the same place; parents go before children.
	taken := map[string]bool{}
	for _, b := range binds {
		d := path.Clean(b.Destination)
		if taken[d] {
			return nil, errdefs.New(errdefs.ErrInvalid, "Duplicate mount point: %s", d)
		}
		taken[d] = true
	}
	kept := m[:0]
	for _, d := range m {
		if !taken[d.Destination] {
			kept = append(kept, d)
		}
	}
	sort.SliceStable(binds, func(i, j int) bool {
		return strings.Count(path.Clean(binds[i].Destination), "/") < strings.Count(path.Clean(binds[j].Destination), "/")
	})
	return append(kept, binds...), nil
}

func tmpfsMount(t Mount) specs.Mount {
	opts := []string{"nosuid", "nodev"}
	has := func(name string) bool {
		for _, o := range t.Options {
			if o == name || strings.HasPrefix(o, name+"=") {
				return true
			}
		}
		return false
	}
	if !has("exec") {
		opts = append(opts, "noexec")
	}
	if t.ReadOnly {
		opts = append(opts, "ro")
	}
	if t.SizeBytes > 0 {
		opts = append(opts, "size="+strconv.FormatInt(t.SizeBytes, 10))
	}
	if t.Mode != 0 {
		opts = append(opts, "mode="+strconv.FormatUint(uint64(t.Mode), 8))
	} else if !has("mode") {
		opts = append(opts, "mode=1777")
	}
	return specs.Mount{Destination: t.Target, Type: "tmpfs", Source: "tmpfs", Options: append(opts, t.Options...)}
}

// linuxResources turns limits into the spec's form; libcontainer serves v1 and v2 from it.
func linuxResources(r Resources) *specs.LinuxResources {
	out := &specs.LinuxResources{Memory: &specs.LinuxMemory{}, CPU: &specs.LinuxCPU{}}
	if r.MemoryBytes > 0 {
		limit := r.MemoryBytes
		out.Memory.Limit = &limit
		swap := r.MemorySwapBytes
		if swap == 0 {
			swap = 2 * limit // docker's default: as much swap as memory
		}
		out.Memory.Swap = &swap
	}
	if r.MemoryReservation > 0 {
		v := r.MemoryReservation
		out.Memory.Reservation = &v
	}
	if r.OOMKillDisable {
		t := true
		out.Memory.DisableOOMKiller = &t
	}
	if r.CPUShares > 0 {
		v := uint64(r.CPUShares)
		out.CPU.Shares = &v
	}
	if r.CPUQuota > 0 {
		q, p := r.CPUQuota, uint64(r.CPUPeriod)
		if p == 0 {
			p = 100000
		}
		out.CPU.Quota, out.CPU.Period = &q, &p
	} else if r.CPUPeriod > 0 {
		p := uint64(r.CPUPeriod)
		out.CPU.Period = &p
	}
	out.Unified = r.Unified
	out.CPU.Cpus, out.CPU.Mems = r.CpusetCPUs, r.CpusetMems
	if r.PidsLimit != 0 {
		v := r.PidsLimit
		out.Pids = &specs.LinuxPids{Limit: &v}
	}
	return out
}

func rlimit(u Ulimit) specs.POSIXRlimit {
	v := func(n int64) uint64 {
		if n < 0 {
			return ^uint64(0)
		}
		return uint64(n)
	}
	return specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: v(u.Soft), Hard: v(u.Hard)}
}

// deviceRules is docker's default device allow-list: everything may be created by mknod, few
// may be opened. libcontainer adds the standard nodes (null, zero, full, random, tty, ptmx).
func deviceRules(in specInput) []specs.LinuxDeviceCgroup {
	if in.container.Security.Privileged {
		return []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	num := func(n int64) *int64 { return &n }
	rules := []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Major: num(1), Minor: num(5), Access: "rwm"},
		{Allow: true, Type: "c", Major: num(1), Minor: num(3), Access: "rwm"},
		{Allow: true, Type: "c", Major: num(1), Minor: num(9), Access: "rwm"},
		{Allow: true, Type: "c", Major: num(1), Minor: num(8), Access: "rwm"},
		{Allow: true, Type: "c", Major: num(5), Minor: num(0), Access: "rwm"},
		{Allow: true, Type: "c", Major: num(5), Minor: num(1), Access: "rwm"},
		{Allow: false, Type: "c", Major: num(10), Minor: num(229), Access: "rwm"},
	}
	return append(rules, in.deviceRules...)
}

// capabilities resolves the asked-for set against what the node can give.
func capabilities(s Security, host []string) ([]string, error) {
	have := map[string]bool{}
	for _, h := range host {
		have[h] = true
	}
	if s.Privileged {
		return host, nil
	}
	set := map[string]bool{}
	drop := map[string]bool{}
	for _, d := range s.CapDrop {
		n, err := capName(d)
		if err != nil {
			return nil, err
		}
		drop[n] = true
	}
	if !drop["ALL"] {
		for _, d := range defaultCaps {
			set[d] = have[d]
		}
	}
	for _, a := range s.CapAdd {
		n, err := capName(a)
		if err != nil {
			return nil, err
		}
		if n == "ALL" {
			for _, h := range host {
				set[h] = true
			}
			continue
		}
		if !have[n] {
			return nil, errdefs.New(errdefs.ErrInvalid, "capability %s cannot be added: Berth itself does not hold it on this node", n)
		}
		set[n] = true
	}
	var out []string
	for _, h := range host { // the kernel's order
		if set[h] && !drop[h] {
			out = append(out, h)
		}
	}
	return out, nil
}

// CheckCapabilities tells whether names are capabilities that exist.
func CheckCapabilities(names []string) error {
	for _, n := range names {
		if _, err := capName(n); err != nil {
			return err
		}
	}
	return nil
}

func capName(n string) (string, error) {
	u := strings.ToUpper(n)
	if u == "ALL" {
		return u, nil
	}
	if !strings.HasPrefix(u, "CAP_") {
		u = "CAP_" + u
	}
	for _, k := range knownCaps {
		if k == u {
			return u, nil
		}
	}
	return "", errdefs.New(errdefs.ErrInvalid, "invalid capability: %q", n)
}

// knownCaps are Linux's capabilities by number (capabilities(7)).
var knownCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE",
	"CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
	"CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
	"CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM",
	"CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// hostCapabilities reads which capabilities this process could hand on.
func hostCapabilities() ([]string, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		hex, ok := strings.CutPrefix(line, "CapPrm:")
		if !ok {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		if err != nil {
			return nil, err
		}
		var out []string
		for i, name := range knownCaps {
			if mask&(1<<i) != 0 {
				out = append(out, name)
			}
		}
		return out, nil
	}
	return nil, fmt.Errorf("/proc/self/status has no CapPrm line")
}

func hostname(s SandboxConfig) string {
	if s.Hostname != "" {
		return s.Hostname
	}
	return shortID(s.ID)
}
