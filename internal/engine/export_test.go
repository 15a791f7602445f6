package engine

// The pure cores, for the external tests.
var (
	DecideRestart = decideRestart
	Judge         = judge
	NextProbe     = nextProbe
	ExplainFrom   = explain
	ResolvConf    = resolvConf
	ParseResolv   = parseResolv
	BuildSpec     = buildSpec
	Capabilities  = capabilities
	HostsFile     = hostsFile
)

// SpecInput is what BuildSpec takes.
type SpecInput = specInput

// NewSpecInput builds one from the parts that tests vary.
func NewSpecInput(c ContainerConfig, s SandboxConfig, hostCaps []string) SpecInput {
	return specInput{container: c, sandbox: s, rootfs: "/rootfs", cgroup: "/berth/x", hostCaps: hostCaps,
		namespaces: map[string]string{"net": "/ns/net", "ipc": "/ns/ipc", "uts": "/ns/uts"}, initPath: "/usr/bin/berth-init"}
}

// Decision exposes the fields of a decision.
func (d decision) Parts() (restart bool, delayMillis int64) { return d.restart, d.delay.Milliseconds() }

// KnownCaps are all capabilities.
var KnownCaps = knownCaps

// Waiters counts those who wait for something of a container.
func (e *Engine) Waiters(ref string) int {
	c, err := e.find(ref)
	if err != nil {
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiters)
}
