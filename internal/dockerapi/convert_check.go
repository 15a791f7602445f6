package dockerapi

import (
	"fmt"
	"math"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	containertypes "github.com/moby/moby/api/types/container"
	networktypes "github.com/moby/moby/api/types/network"
)

// createRequest is the body of a container's creation, with fields that older versions had.
type createRequest struct {
	*containertypes.Config
	HostConfig       *hostConfigRequest
	NetworkingConfig *networktypes.NetworkingConfig
	MacAddress       string // until API 1.51; then per endpoint
}

// hostConfigRequest is docker's HostConfig with fields that older versions had.
type hostConfigRequest struct {
	containertypes.HostConfig
	KernelMemory    int64 // until API 1.41
	KernelMemoryTCP int64 // until API 1.51
}

// Limits that docker's users know by their messages.
const (
	minMemoryBytes = 6 << 20
	minCPUPeriod   = 1000    // µs
	maxCPUPeriod   = 1000000 // µs
	minCPUQuota    = 1000    // µs
)

// refuseUnsupported refuses by name every setting that docker has, Berth lacks, and is not at
// what stands for nothing in the requests of docker's clients.
func refuseUnsupported(h *hostConfigRequest, version int) error {
	zero := func(name string, isZero bool) error {
		if isZero {
			return nil
		}
		return unsupported("HostConfig.%s is not supported by Berth", name)
	}
	checks := []error{
		zero("BlkioWeight", h.BlkioWeight == 0),
		zero("BlkioWeightDevice", len(h.BlkioWeightDevice) == 0),
		zero("BlkioDeviceReadBps", len(h.BlkioDeviceReadBps) == 0),
		zero("BlkioDeviceWriteBps", len(h.BlkioDeviceWriteBps) == 0),
		zero("BlkioDeviceReadIOps", len(h.BlkioDeviceReadIOps) == 0),
		zero("BlkioDeviceWriteIOps", len(h.BlkioDeviceWriteIOps) == 0),
		zero("CpuRealtimePeriod", h.CPURealtimePeriod == 0),
		zero("CpuRealtimeRuntime", h.CPURealtimeRuntime == 0),
		zero("CpuCount", h.CPUCount == 0),
		zero("CpuPercent", h.CPUPercent == 0),
		zero("IOMaximumIOps", h.IOMaximumIOps == 0),
		zero("IOMaximumBandwidth", h.IOMaximumBandwidth == 0),
		zero("DeviceCgroupRules", len(h.DeviceCgroupRules) == 0),
		zero("DeviceRequests", len(h.DeviceRequests) == 0),
		zero("Cgroup", h.Cgroup == ""),
		zero("Links", len(h.Links) == 0),
		zero("StorageOpt", len(h.StorageOpt) == 0),
		zero("Umask", h.Umask == nil),
		zero("VolumeDriver", h.VolumeDriver == "" || h.VolumeDriver == driverLocal),
		zero("MemorySwappiness", h.MemorySwappiness == nil || *h.MemorySwappiness == -1),
		zero("KernelMemory", h.KernelMemory == 0 || version >= 42),       // docker ignores it from there on
		zero("KernelMemoryTCP", h.KernelMemoryTCP == 0 || version >= 52), // likewise
	}
	if i := slices.IndexFunc(checks, func(err error) bool { return err != nil }); i >= 0 {
		return checks[i]
	}
	return refuseValues(h)
}

// refuseValues refuses values of settings that Berth has in part.
func refuseValues(h *hostConfigRequest) error {
	if !h.Isolation.IsDefault() {
		return invalid("invalid isolation '%s' on %s", h.Isolation, runtime.GOOS)
	}
	switch h.Runtime {
	case "", runtimeName, "runc", "io.containerd.runc.v2":
	default:
		return invalid("unknown or invalid runtime name: %s; Berth has %s", h.Runtime, runtimeName)
	}
	if h.UsernsMode != "" && !h.UsernsMode.IsHost() {
		return invalid("invalid user namespace mode: %s", h.UsernsMode)
	}
	switch {
	case !h.IpcMode.Valid():
		return invalid("invalid IPC mode: %v", h.IpcMode)
	case h.IpcMode.IsNone():
		return unsupported("HostConfig.IpcMode none is not supported by Berth; use private")
	case !h.PidMode.Valid():
		return invalid("invalid PID mode: %v", h.PidMode)
	case !h.UTSMode.Valid():
		return invalid("invalid UTS mode: %v", h.UTSMode)
	case !h.CgroupnsMode.Valid():
		return invalid("invalid cgroup namespace mode: %v", h.CgroupnsMode)
	case h.ShmSize < 0:
		return invalid("SHM size can not be less than 0")
	case h.OomScoreAdj < -1000 || h.OomScoreAdj > 1000:
		return invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", h.OomScoreAdj)
	case h.AutoRemove && !h.RestartPolicy.IsNone():
		return invalid("can't create 'AutoRemove' container with restart policy")
	}
	if err := containertypes.ValidateRestartPolicy(h.RestartPolicy); err != nil {
		return invalid("%w", err)
	}
	if _, ok := h.Annotations[""]; ok {
		return invalid("invalid Annotations: the empty string is not permitted as an annotation key")
	}
	return nil
}

// checkResources refuses limits that make no sense, in docker's words.
func checkResources(r *containertypes.Resources, cpus int) error {
	switch {
	case r.Memory < 0 || r.Memory > 0 && r.Memory < minMemoryBytes:
		return invalid("Minimum memory limit allowed is 6MB")
	case r.MemorySwap < -1:
		return invalid("invalid memory swap limit %d: give bytes, or -1 for no limit", r.MemorySwap)
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.Memory == 0 && r.MemorySwap > 0:
		return invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemoryReservation < 0 || r.MemoryReservation > 0 && r.MemoryReservation < minMemoryBytes:
		return invalid("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.MemoryReservation > 0 && r.Memory < r.MemoryReservation:
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs != 0 && r.CPUPeriod > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case r.NanoCPUs != 0 && r.CPUQuota > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(cpus)*1e9:
		return invalid("range of CPUs is from 0.01 to %[1]d.00, as there are only %[1]d CPUs available", cpus)
	case r.NanoCPUs > 0 && r.NanoCPUs < 1e7:
		return invalid("range of CPUs is from 0.01 to %[1]d.00, as there are only %[1]d CPUs available", cpus)
	case r.CPUPeriod != 0 && (r.CPUPeriod < minCPUPeriod || r.CPUPeriod > maxCPUPeriod):
		return invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < minCPUQuota:
		return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.CPUShares < 0:
		return invalid("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	}
	if err := checkSet("cpuset cpus", "CPUs", r.CpusetCpus, cpus); err != nil {
		return err
	}
	if err := checkSet("cpuset mems", "memory nodes", r.CpusetMems, math.MaxInt); err != nil {
		return err
	}
	return checkUlimits(r.Ulimits)
}

// checkSet checks a list such as 0-2,7 against how many there are.
func checkSet(what, plural, list string, have int) error {
	if list == "" {
		return nil
	}
	for _, part := range strings.Split(list, ",") {
		low, high, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			high = low
		}
		from, err1 := strconv.ParseUint(low, 10, 31)
		to, err2 := strconv.ParseUint(high, 10, 31)
		if err1 != nil || err2 != nil || to < from {
			return invalid("Invalid value %s for %s", list, what)
		}
		if to >= uint64(have) {
			return invalid("Requested %s are not available - requested %s, available: 0-%d", plural, list, have-1)
		}
	}
	return nil
}

func checkUlimits(ulimits []*containertypes.Ulimit) error {
	for _, u := range ulimits {
		if u == nil {
			return invalid("invalid ulimit: null")
		}
		if _, err := u.GetRlimit(); err != nil {
			return invalid("invalid ulimit %q: %w", u.Name, err)
		}
		if u.Soft > u.Hard && u.Hard != -1 || u.Soft == -1 && u.Hard != -1 {
			return invalid("ulimit soft limit must be less than or equal to hard limit: %s=%d:%d", u.Name, u.Soft, u.Hard)
		}
	}
	return nil
}

// checkHealth refuses health checks that docker refuses.
func checkHealth(h *containertypes.HealthConfig) error {
	if h == nil {
		return nil
	}
	durations := reflect.ValueOf(*h)
	for _, name := range []string{"Interval", "Timeout", "StartPeriod", "StartInterval"} {
		if d := durations.FieldByName(name).Int(); d != 0 && d < int64(containertypes.MinimumDuration) {
			return invalid("%s in Healthcheck cannot be less than %s", name, containertypes.MinimumDuration)
		}
	}
	if h.Retries < 0 {
		return invalid("Retries in Healthcheck cannot be negative")
	}
	if len(h.Test) > 0 {
		switch h.Test[0] {
		case "NONE", "CMD", "CMD-SHELL":
		default:
			return invalid("Unknown healthcheck type '%s' (expected 'CMD')", h.Test[0])
		}
		if h.Test[0] != "NONE" && len(h.Test) == 1 {
			return invalid("Healthcheck %s needs a command", h.Test[0])
		}
	}
	return nil
}

// logOptions translates the log settings.
func logOptions(c containertypes.LogConfig) (driver string, maxBytes int64, maxFiles int, err error) {
	switch c.Type {
	case "", "json-file":
		driver = "json-file"
	case "none":
		driver = "none"
	default:
		return "", 0, 0, unsupported("log driver %q is not supported by Berth; use json-file or none", c.Type)
	}
	for key, value := range c.Config {
		switch {
		case driver == "none":
			err = fmt.Errorf("the driver none takes no options")
		case key == "max-size":
			maxBytes, err = units.FromHumanSize(value)
			if err == nil && maxBytes <= 0 {
				err = fmt.Errorf("must be more than 0")
			}
		case key == "max-file":
			maxFiles, err = strconv.Atoi(value)
			if err == nil && maxFiles < 1 {
				err = fmt.Errorf("max-file cannot be less than 1")
			}
		case key == "mode" && value == "blocking", key == "compress" && value == "false":
		default:
			return "", 0, 0, unsupported("log option %s=%s of driver %s is not supported by Berth; it has max-size and max-file", key, value, driver)
		}
		if err != nil {
			return "", 0, 0, invalid("invalid log option %s=%s: %w", key, value, err)
		}
	}
	return driver, maxBytes, maxFiles, nil
}
