package dockerapi

import "io/fs"

// HostFacts is what a test looks at of the facts about a machine.
type HostFacts struct {
	OperatingSystem, OSVersion string
	MemoryBytes                int64
	IPv4Forwarding             bool
	Warnings                   []string
}

// ReadHost opens the reading of a machine's facts to the tests.
func ReadHost(root fs.FS, cgroupVersion string) HostFacts {
	h := readHost(root, cgroupVersion)
	return HostFacts{h.operatingSystem, h.osVersion, h.memoryBytes, h.ipv4Forwarding, h.warnings(cgroupVersion)}
}
