package cli

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// runFlags are docker run's, less those of features that Berth lacks.
type runFlags struct {
	// How this program behaves.
	detach, rm, sigProxy, quiet           bool
	name, pull, platform, cidfile, detKey string

	// The program.
	interactive, tty, init                  bool
	env, envFile, labels, labelFile, groups []string
	user, workdir, entrypoint, stopSignal   string
	stopTimeout                             int
	healthCmd                               string
	healthInterval, healthTimeout           time.Duration
	healthStart, healthStartInterval        time.Duration
	healthRetries                           int
	noHealth, privileged, readOnly          bool
	volumes, mounts, tmpfs, devices         []string
	capAdd, capDrop, securityOpt, sysctls   []string
	restart, logDriver                      string
	logOpts, ulimits                        []string
	memory, memorySwap, memoryReserve, shm  string
	cpus, cpusetCPUs, cpusetMems            string
	cpuShares, pidsLimit                    int64
	oomScoreAdj                             int
	hostname, domainname, ip, mac           string
	networks, aliases, publish, expose      []string
	publishAll                              bool
	dns, dnsSearch, dnsOption, extraHosts   []string
	pid, ipc, uts                           string
	changed                                 func(string) bool
	lookup                                  func(string) (string, bool) // an environment variable
}

func (o *runFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SetInterspersed(false)
	o.changed = f.Changed
	f.Bool("help", false, "help for run") // -h is the host name, as in docker run
	f.BoolVarP(&o.detach, "detach", "d", false, "leave it in the background and print its ID")
	f.BoolVar(&o.rm, "rm", false, "remove it when it ends")
	f.BoolVar(&o.sigProxy, "sig-proxy", true, "pass signals on to the program")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "show no progress of a pull")
	f.StringVar(&o.name, "name", "", "name")
	f.StringVar(&o.pull, "pull", "missing", "fetch the image first: always, missing or never")
	f.StringVar(&o.platform, "platform", "", "os/arch[/variant] of the image")
	f.StringVar(&o.cidfile, "cidfile", "", "write the ID to this file")
	f.StringVar(&o.detKey, "detach-keys", "", "keys that leave a terminal session (default ctrl-p,ctrl-q)")
	o.addProgram(f)
	o.addFiles(f)
	o.addLimits(f)
	o.addNetwork(f)
}

func (o *runFlags) addProgram(f *pflag.FlagSet) {
	f.BoolVarP(&o.interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&o.tty, "tty", "t", false, "give it a terminal")
	f.BoolVar(&o.init, "init", false, "let a small init reap processes and forward signals")
	f.StringArrayVarP(&o.env, "env", "e", nil, "environment: NAME=VALUE, or NAME for this shell's value")
	f.StringArrayVar(&o.envFile, "env-file", nil, "file with environment, one per line")
	f.StringArrayVarP(&o.labels, "label", "l", nil, "label: KEY=VALUE")
	f.StringArrayVar(&o.labelFile, "label-file", nil, "file with labels, one per line")
	f.StringVarP(&o.user, "user", "u", "", "user[:group], names or numbers")
	f.StringArrayVar(&o.groups, "group-add", nil, "further group")
	f.StringVarP(&o.workdir, "workdir", "w", "", "working directory")
	f.StringVar(&o.entrypoint, "entrypoint", "", "program instead of the image's entrypoint")
	f.StringVar(&o.stopSignal, "stop-signal", "", "signal that stops it")
	f.IntVar(&o.stopTimeout, "stop-timeout", 0, "seconds from the stop signal to SIGKILL")
	f.StringVar(&o.restart, "restart", "", "when to start it again: no, on-failure[:N], always, unless-stopped")
	f.StringVar(&o.healthCmd, "health-cmd", "", "shell command that probes it")
	f.DurationVar(&o.healthInterval, "health-interval", 0, "time between probes")
	f.DurationVar(&o.healthTimeout, "health-timeout", 0, "time a probe may take")
	f.DurationVar(&o.healthStart, "health-start-period", 0, "time in which failing probes do not count")
	f.DurationVar(&o.healthStartInterval, "health-start-interval", 0, "time between probes in the start period")
	f.IntVar(&o.healthRetries, "health-retries", 0, "failing probes in a row that make it unhealthy")
	f.BoolVar(&o.noHealth, "no-healthcheck", false, "no probes, whatever the image says")
	f.StringVar(&o.logDriver, "log-driver", "", "json-file or none")
	f.StringArrayVar(&o.logOpts, "log-opt", nil, "option of the log: max-size=10m, max-file=3")
}

func (o *runFlags) addFiles(f *pflag.FlagSet) {
	f.StringArrayVarP(&o.volumes, "volume", "v", nil, "[SOURCE:]TARGET[:OPTIONS]: a host path, a named or an anonymous volume")
	f.StringArrayVar(&o.mounts, "mount", nil, "type=bind|volume|tmpfs,source=…,target=…[,readonly]…")
	f.StringArrayVar(&o.tmpfs, "tmpfs", nil, "TARGET[:OPTIONS]: a file system in memory")
	f.StringArrayVar(&o.devices, "device", nil, "host device: PATH[:PATH[:rwm]]")
	f.BoolVar(&o.readOnly, "read-only", false, "make the root file system read-only")
	f.StringVar(&o.shm, "shm-size", "", "size of /dev/shm")
}

func (o *runFlags) addLimits(f *pflag.FlagSet) {
	f.StringVarP(&o.memory, "memory", "m", "", "memory limit: 512m, 2g")
	f.StringVar(&o.memorySwap, "memory-swap", "", "memory and swap together; -1 for no limit")
	f.StringVar(&o.memoryReserve, "memory-reservation", "", "memory to keep when the node is short of it")
	f.StringVar(&o.cpus, "cpus", "", "processors, with a fraction: 1.5")
	f.Int64VarP(&o.cpuShares, "cpu-shares", "c", 0, "weight among those that compete")
	f.StringVar(&o.cpusetCPUs, "cpuset-cpus", "", "processors it may run on: 0-2,4")
	f.StringVar(&o.cpusetMems, "cpuset-mems", "", "memory nodes it may use")
	f.Int64Var(&o.pidsLimit, "pids-limit", 0, "processes it may have; -1 for no limit")
	f.IntVar(&o.oomScoreAdj, "oom-score-adj", 0, "the kernel's preference for killing it, -1000 to 1000")
	f.StringArrayVar(&o.ulimits, "ulimit", nil, "NAME=SOFT[:HARD]")
	f.BoolVar(&o.privileged, "privileged", false, "give it all the node's powers")
	f.StringArrayVar(&o.capAdd, "cap-add", nil, "capability to add")
	f.StringArrayVar(&o.capDrop, "cap-drop", nil, "capability to drop")
	f.StringArrayVar(&o.securityOpt, "security-opt", nil, "no-new-privileges, seccomp=FILE|unconfined, apparmor=…")
	f.StringArrayVar(&o.sysctls, "sysctl", nil, "kernel parameter: NAME=VALUE")
}

func (o *runFlags) addNetwork(f *pflag.FlagSet) {
	f.StringArrayVar(&o.networks, "network", nil, "network to connect to, or host, none, container:NAME")
	f.StringArrayVar(&o.networks, "net", nil, "the same as --network")
	_ = f.MarkHidden("net")
	f.StringArrayVar(&o.aliases, "network-alias", nil, "further name on the network")
	f.StringVar(&o.ip, "ip", "", "IPv4 address on the network")
	f.StringVar(&o.mac, "mac-address", "", "hardware address")
	f.StringVarP(&o.hostname, "hostname", "h", "", "host name")
	f.StringVar(&o.domainname, "domainname", "", "domain name")
	f.StringArrayVarP(&o.publish, "publish", "p", nil, "[[ADDRESS:]PORT:]PORT[/PROTOCOL]: publish a port")
	f.BoolVarP(&o.publishAll, "publish-all", "P", false, "publish all exposed ports on free ones")
	f.StringArrayVar(&o.expose, "expose", nil, "port that --publish-all publishes")
	f.StringArrayVar(&o.dns, "dns", nil, "name server")
	f.StringArrayVar(&o.dnsSearch, "dns-search", nil, "search domain")
	f.StringArrayVar(&o.dnsOption, "dns-option", nil, "resolver option")
	f.StringArrayVar(&o.extraHosts, "add-host", nil, "NAME:ADDRESS for /etc/hosts")
	f.StringVar(&o.pid, "pid", "", "PID namespace: host or container:NAME")
	f.StringVar(&o.ipc, "ipc", "", "IPC namespace: host, private, shareable or container:NAME")
	f.StringVar(&o.uts, "uts", "", "UTS namespace: host")
}

// request translates the flags into docker's create request.
func (o *runFlags) request(image string, args []string) (*createRequest, error) {
	switch o.pull {
	case "always", "missing", "never":
	default:
		return nil, fmt.Errorf("--pull %s: unknown; use always, missing or never", o.pull)
	}
	r := &createRequest{
		Image: image, Cmd: args, Hostname: o.hostname, Domainname: o.domainname, User: o.user, WorkingDir: o.workdir,
		Tty: o.tty, OpenStdin: o.interactive, StopSignal: o.stopSignal,
		AttachStdout: !o.detach, AttachStderr: !o.detach, AttachStdin: o.interactive && !o.detach,
	}
	r.StdinOnce = r.AttachStdin
	h := &r.HostConfig
	h.AutoRemove, h.Privileged, h.ReadonlyRootfs, h.PublishAllPorts = o.rm, o.privileged, o.readOnly, o.publishAll
	h.CapAdd, h.CapDrop, h.GroupAdd = o.capAdd, o.capDrop, o.groups
	h.DNS, h.DNSSearch, h.DNSOptions, h.ExtraHosts = o.dns, o.dnsSearch, o.dnsOption, o.extraHosts
	h.PidMode, h.IpcMode, h.UTSMode, h.OomScoreAdj = o.pid, o.ipc, o.uts, o.oomScoreAdj
	h.CPUShares, h.CpusetCpus, h.CpusetMems = o.cpuShares, o.cpusetCPUs, o.cpusetMems
	if o.changed("entrypoint") {
		r.Entrypoint = []string{o.entrypoint}
	}
	if o.changed("stop-timeout") {
		r.StopTimeout = &o.stopTimeout
	}
	if o.init {
		h.Init = &o.init
	}
	if o.changed("pids-limit") {
		h.PidsLimit = &o.pidsLimit
	}
	steps := []func(*createRequest) error{o.environment, o.health, o.storage, o.limits, o.security, o.network, o.lifecycle}
	for _, step := range steps {
		if err := step(r); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (o *runFlags) environment(r *createRequest) (err error) {
	if r.Env, err = o.keyValues(o.envFile, o.env, true); err != nil {
		return err
	}
	labels, err := o.keyValues(o.labelFile, o.labels, false)
	if err != nil {
		return err
	}
	for _, l := range labels {
		if r.Labels == nil {
			r.Labels = map[string]string{}
		}
		k, v, _ := strings.Cut(l, "=")
		r.Labels[k] = v
	}
	return nil
}

// keyValues joins the lines of files and arguments. With inherit a bare name takes its value
// from this program's environment, and is left out when it has none.
func (o *runFlags) keyValues(files, args []string, inherit bool) ([]string, error) {
	var all []string
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for i, line := range strings.Split(strings.TrimPrefix(string(raw), "\ufeff"), "\n") {
			line = strings.TrimLeft(strings.TrimSuffix(line, "\r"), " \t")
			if line == "" || line[0] == '#' {
				continue
			}
			if key, _, _ := strings.Cut(line, "="); key == "" || strings.ContainsAny(key, " \t") {
				return nil, fmt.Errorf("%s:%d: %q is no name", file, i+1, key)
			}
			all = append(all, line)
		}
	}
	var out []string
	for _, kv := range append(all, args...) {
		key, _, ok := strings.Cut(kv, "=")
		switch {
		case key == "":
			return nil, fmt.Errorf("%q: write it as NAME=VALUE", kv)
		case ok || !inherit:
			out = append(out, kv)
		default:
			if v, set := o.lookup(key); set {
				out = append(out, key+"="+v)
			}
		}
	}
	return out, nil
}

func (o *runFlags) health(r *createRequest) error {
	set := o.healthCmd != "" || o.healthInterval != 0 || o.healthTimeout != 0 || o.healthStart != 0 ||
		o.healthStartInterval != 0 || o.healthRetries != 0
	if o.noHealth {
		if set {
			return fmt.Errorf("--no-healthcheck cannot be combined with --health-…")
		}
		r.Healthcheck = &healthConfig{Test: []string{"NONE"}}
		return nil
	}
	if !set {
		return nil
	}
	for _, d := range []time.Duration{o.healthInterval, o.healthTimeout, o.healthStart, o.healthStartInterval} {
		if d < 0 {
			return fmt.Errorf("--health-… %s: a duration cannot be negative", d)
		}
	}
	r.Healthcheck = &healthConfig{
		Interval: int64(o.healthInterval), Timeout: int64(o.healthTimeout), StartPeriod: int64(o.healthStart),
		StartInterval: int64(o.healthStartInterval), Retries: o.healthRetries,
	}
	if o.healthCmd != "" {
		r.Healthcheck.Test = []string{"CMD-SHELL", o.healthCmd}
	}
	return nil
}

func (o *runFlags) limits(r *createRequest) (err error) {
	h := &r.HostConfig
	for _, m := range []struct {
		flag, text string
		to         *int64
	}{
		{"memory", o.memory, &h.Memory}, {"memory-swap", o.memorySwap, &h.MemorySwap},
		{"memory-reservation", o.memoryReserve, &h.MemoryReservation}, {"shm-size", o.shm, &h.ShmSize},
	} {
		if m.text == "" {
			continue
		}
		if m.text == "-1" && m.flag == "memory-swap" {
			*m.to = -1
			continue
		}
		if *m.to, err = units.RAMInBytes(m.text); err != nil {
			return fmt.Errorf("--%s %s: not a size; write it like 512m or 2g", m.flag, m.text)
		}
	}
	if o.cpus != "" {
		n, err := strconv.ParseFloat(o.cpus, 64)
		if err != nil || n < 0 || n > 1<<20 {
			return fmt.Errorf("--cpus %s: not a number of processors; write it like 1.5", o.cpus)
		}
		h.NanoCPUs = int64(n*1e9 + 0.5)
	}
	for _, u := range o.ulimits {
		parsed, err := units.ParseUlimit(u)
		if err != nil {
			return fmt.Errorf("--ulimit %s: %w", u, err)
		}
		h.Ulimits = append(h.Ulimits, ulimit{Name: parsed.Name, Soft: parsed.Soft, Hard: parsed.Hard})
	}
	return nil
}

func (o *runFlags) security(r *createRequest) error {
	for _, opt := range o.securityOpt {
		key, value, ok := strings.Cut(opt, "=")
		if !ok {
			key, value, ok = strings.Cut(opt, ":")
		}
		if key == "seccomp" && ok && value != "unconfined" && value != "builtin" {
			raw, err := os.ReadFile(value)
			if err != nil {
				return fmt.Errorf("--security-opt %s: %w", opt, err)
			}
			opt = "seccomp=" + string(raw)
		}
		r.HostConfig.SecurityOpt = append(r.HostConfig.SecurityOpt, opt)
	}
	for _, s := range o.sysctls {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return fmt.Errorf("--sysctl %s: write it as NAME=VALUE", s)
		}
		if r.HostConfig.Sysctls == nil {
			r.HostConfig.Sysctls = map[string]string{}
		}
		r.HostConfig.Sysctls[k] = v
	}
	return nil
}

func (o *runFlags) lifecycle(r *createRequest) error {
	if o.restart != "" {
		name, count, counted := strings.Cut(o.restart, ":")
		p := &restartPolicy{Name: name}
		if counted {
			n, err := strconv.Atoi(count)
			if err != nil || name != "on-failure" || n < 0 {
				return fmt.Errorf("--restart %s: only on-failure takes a number of tries, as in on-failure:5", o.restart)
			}
			p.MaximumRetryCount = n
		}
		switch name {
		case "no", "on-failure", "always", "unless-stopped":
		default:
			return fmt.Errorf("--restart %s: unknown; use no, on-failure[:N], always or unless-stopped", o.restart)
		}
		if o.rm && name != "no" {
			return fmt.Errorf("--rm and --restart %s exclude each other", name)
		}
		r.HostConfig.RestartPolicy = p
	}
	if o.logDriver == "" && len(o.logOpts) == 0 {
		return nil
	}
	l := &logConfig{Type: o.logDriver, Config: map[string]string{}}
	for _, opt := range o.logOpts {
		k, v, ok := strings.Cut(opt, "=")
		if !ok {
			return fmt.Errorf("--log-opt %s: write it as NAME=VALUE", opt)
		}
		l.Config[k] = v
	}
	r.HostConfig.LogConfig = l
	return nil
}
