package dockerapi

import (
	"encoding/json"
	"reflect"
	"runtime"
	"strconv"
	"strings"

	containertypes "github.com/moby/moby/api/types/container"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// securityOf translates privileges, capabilities and security options.
func securityOf(h *hostConfigRequest) (engine.Security, error) {
	sec := engine.Security{
		Privileged: h.Privileged, CapAdd: h.CapAdd, CapDrop: h.CapDrop,
		MaskedPaths: h.MaskedPaths, ReadOnlyPaths: h.ReadonlyPaths,
	}
	if err := engine.CheckCapabilities(h.CapAdd); err != nil {
		return sec, invalid("invalid CapAdd: %w", err)
	}
	if err := engine.CheckCapabilities(h.CapDrop); err != nil {
		return sec, invalid("invalid CapDrop: %w", err)
	}
	for _, opt := range h.SecurityOpt {
		if err := applySecurityOption(&sec, opt); err != nil {
			return sec, err
		}
	}
	return sec, nil
}

func applySecurityOption(sec *engine.Security, opt string) error {
	if opt == "no-new-privileges" {
		sec.NoNewPrivileges = true
		return nil
	}
	i := strings.IndexAny(opt, "=:") // the colon is docker's old spelling
	if i < 0 {
		return invalid("invalid --security-opt 1: %q", opt)
	}
	key, value := opt[:i], opt[i+1:]
	switch key {
	case "no-new-privileges":
		on, err := strconv.ParseBool(value)
		if err != nil {
			return invalid("invalid --security-opt 2: %q", opt)
		}
		sec.NoNewPrivileges = on
	case "seccomp":
		switch {
		case value == "builtin":
			sec.Seccomp = ""
		case value == "unconfined", json.Valid([]byte(value)) && strings.HasPrefix(strings.TrimSpace(value), "{"):
			sec.Seccomp = value
		default:
			return invalid("Decoding seccomp profile failed: --security-opt seccomp must be unconfined, builtin or a profile as JSON")
		}
	case "apparmor":
		switch value {
		case "unconfined":
			sec.AppArmor = value
		case "":
		default:
			return unsupported("HostConfig.SecurityOpt apparmor=%s is not supported by Berth; it has unconfined", value)
		}
	case "label":
		if value != "disable" {
			return unsupported("HostConfig.SecurityOpt label=%s is not supported by Berth: it sets no SELinux labels", value)
		}
	default:
		return unsupported("HostConfig.SecurityOpt %s is not supported by Berth", key)
	}
	return nil
}

// resourcesOf translates limits. swapLimit tells whether the node can limit swap.
func resourcesOf(h *hostConfigRequest, swapLimit bool) (r engine.Resources, warnings []string) {
	r = engine.Resources{
		MemoryBytes: h.Memory, MemorySwapBytes: h.MemorySwap, MemoryReservation: h.MemoryReservation,
		CPUQuota: h.CPUQuota, CPUPeriod: h.CPUPeriod, CPUShares: h.CPUShares,
		CpusetCPUs: h.CpusetCpus, CpusetMems: h.CpusetMems,
	}
	if h.NanoCPUs > 0 {
		r.CPUPeriod = nanoCPUPeriod
		r.CPUQuota = h.NanoCPUs * nanoCPUPeriod / 1e9
	}
	if h.PidsLimit != nil && *h.PidsLimit > 0 {
		r.PidsLimit = *h.PidsLimit
	}
	if h.OomKillDisable != nil && *h.OomKillDisable {
		r.OOMKillDisable = true
		if h.Memory == 0 {
			warnings = append(warnings, "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
		}
	}
	if r.MemoryBytes > 0 && r.MemorySwapBytes != -1 && !swapLimit {
		warnings = append(warnings, "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		r.MemorySwapBytes = 0
	}
	for _, u := range h.Ulimits {
		r.Ulimits = append(r.Ulimits, engine.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	return r, warnings
}

// nanoCPUPeriod is the period, in µs, in which a number of CPUs is expressed.
const nanoCPUPeriod = 100000

// devicesOf translates device mappings.
func devicesOf(h *hostConfigRequest) ([]engine.Device, error) {
	var out []engine.Device
	for _, d := range h.Devices {
		if !strings.HasPrefix(d.PathOnHost, "/") {
			return nil, invalid("error gathering device information: %q is not an absolute path", d.PathOnHost)
		}
		e := engine.Device{HostPath: d.PathOnHost, Path: d.PathInContainer, Permissions: d.CgroupPermissions}
		if e.Path == "" {
			e.Path = e.HostPath
		}
		if e.Permissions == "" {
			e.Permissions = "rwm"
		}
		if strings.Trim(e.Permissions, "rwm") != "" {
			return nil, invalid("invalid device permissions %q of %s: use r, w and m", e.Permissions, e.HostPath)
		}
		out = append(out, e)
	}
	return out, nil
}

// mergeResources lays the limits that an update names over those that hold, and checks the
// whole.
func mergeResources(have engine.Resources, q *containertypes.Resources, swapLimit bool) (engine.Resources, bool, error) {
	if q.NanoCPUs > 0 && (q.CPUQuota > 0 || q.CPUPeriod > 0) {
		return have, false, checkResources(q, runtime.NumCPU())
	}
	out := have
	set := func(to *int64, from int64) {
		if from != 0 {
			*to = from
		}
	}
	set(&out.MemoryBytes, q.Memory)
	set(&out.MemoryReservation, q.MemoryReservation)
	if swapLimit {
		set(&out.MemorySwapBytes, q.MemorySwap)
	}
	set(&out.CPUQuota, q.CPUQuota)
	set(&out.CPUPeriod, q.CPUPeriod)
	set(&out.CPUShares, q.CPUShares)
	if q.NanoCPUs > 0 {
		out.CPUPeriod, out.CPUQuota = nanoCPUPeriod, q.NanoCPUs*nanoCPUPeriod/1e9
	}
	if q.CpusetCpus != "" {
		out.CpusetCPUs = q.CpusetCpus
	}
	if q.CpusetMems != "" {
		out.CpusetMems = q.CpusetMems
	}
	if q.PidsLimit != nil && *q.PidsLimit != 0 {
		out.PidsLimit = max(*q.PidsLimit, -1)
	}
	if q.Memory > 0 && q.MemorySwap == 0 && out.MemorySwapBytes > 0 && out.MemoryBytes > out.MemorySwapBytes {
		return have, false, errdefs.New(errdefs.ErrConflict, "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	}
	check := containertypes.Resources{
		Memory: out.MemoryBytes, MemorySwap: out.MemorySwapBytes, MemoryReservation: out.MemoryReservation,
		CPUQuota: out.CPUQuota, CPUPeriod: out.CPUPeriod, CPUShares: out.CPUShares,
		CpusetCpus: out.CpusetCPUs, CpusetMems: out.CpusetMems,
	}
	if q.NanoCPUs != 0 {
		check.CPUQuota, check.CPUPeriod, check.NanoCPUs = 0, 0, q.NanoCPUs
	}
	if err := checkResources(&check, runtime.NumCPU()); err != nil {
		return have, false, err
	}
	return out, !reflect.DeepEqual(out, have), nil
}
