package criapi

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/network"
)

const (
	sandboxPart  = "POD" // stands for the container's name in a sandbox's name
	maxNameBytes = 255
	maxPort      = 65535
)

// sandboxDialect is what the engine keeps for us with a sandbox. Lists need the metadata only.
type sandboxDialect struct {
	Name      string          `json:"name"`
	UID       string          `json:"uid,omitempty"`
	Namespace string          `json:"namespace,omitempty"`
	Attempt   uint32          `json:"attempt,omitempty"`
	Config    json.RawMessage `json:"config"` // runtimeapi.PodSandboxConfig
}

func (d sandboxDialect) metadata() *runtimeapi.PodSandboxMetadata {
	return &runtimeapi.PodSandboxMetadata{Name: d.Name, Uid: d.UID, Namespace: d.Namespace, Attempt: d.Attempt}
}

func (d sandboxDialect) config() (*runtimeapi.PodSandboxConfig, error) {
	var c runtimeapi.PodSandboxConfig
	err := protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(d.Config, &c)
	return &c, err
}

// objectName is the unique name of a container, or with sandboxPart of a sandbox. One that would be
// longer than the engine's names ends in a hash of the whole.
func objectName(container, pod, namespace, uid string, attempt uint32) string {
	name := strings.Join([]string{"k8s", container, pod, namespace, uid, strconv.FormatUint(uint64(attempt), 10)}, "_")
	if len(name) <= maxNameBytes {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	hash := "_" + hex.EncodeToString(sum[:16])
	return name[:maxNameBytes-len(hash)] + hash
}

// sandboxConfig translates a pod's sandbox. Security settings of a sandbox that concern a process
// have nothing to apply to: Berth's sandboxes have none.
func sandboxConfig(c *runtimeapi.PodSandboxConfig) (engine.SandboxConfig, error) {
	var out engine.SandboxConfig
	m := c.GetMetadata()
	if m.GetName() == "" {
		return out, invalid("config.metadata.name of a pod sandbox is missing")
	}
	if c.GetWindows() != nil {
		return out, unsupported("config.windows", "this is a Linux node")
	}
	raw, err := protojson.Marshal(c)
	if err != nil {
		return out, err
	}
	dialect, err := json.Marshal(sandboxDialect{Name: m.Name, UID: m.GetUid(), Namespace: m.GetNamespace(), Attempt: m.GetAttempt(), Config: raw})
	if err != nil {
		return out, err
	}
	if dir := c.GetLogDirectory(); dir != "" && !filepath.IsAbs(dir) {
		return out, invalid("config.log_directory %q: must be an absolute path", dir)
	}
	out = engine.SandboxConfig{
		Name: objectName(sandboxPart, m.Name, m.GetNamespace(), m.GetUid(), m.GetAttempt()), Owner: engine.OwnerCRI,
		Labels: c.GetLabels(), Annotations: c.GetAnnotations(), Hostname: c.GetHostname(), DNS: dnsConfig(c.GetDnsConfig()),
		LogDirectory: c.GetLogDirectory(), CgroupParent: c.GetLinux().GetCgroupParent(), Sysctls: c.GetLinux().GetSysctls(), Dialect: dialect,
	}
	sec := c.GetLinux().GetSecurityContext()
	if err := checkSELinux("config.linux.security_context.selinux_options", sec.GetSelinuxOptions()); err != nil {
		return out, err
	}
	if err := sandboxNamespaces(&out, sec.GetNamespaceOptions()); err != nil {
		return out, err
	}
	if out.Network == engine.NetworkHost { // port mappings are the pod's own ports then
		return out, nil
	}
	out.Ports, err = ports(c.GetPortMappings())
	return out, err
}

// sandboxNamespaces applies the namespace options. Absent ones mean what a kubelet sends for a plain
// pod: a network and an IPC namespace of the pod, a PID namespace for each container.
func sandboxNamespaces(out *engine.SandboxConfig, o *runtimeapi.NamespaceOption) error {
	const field = "config.linux.security_context.namespace_options"
	if o != nil && o.Pid == runtimeapi.NamespaceMode_POD {
		return unsupported(field+".pid POD", "containers of a pod do not share a PID namespace; ask for CONTAINER or NODE")
	}
	if o.GetPid() == runtimeapi.NamespaceMode_TARGET {
		return invalid("%s.pid TARGET: is for containers only", field)
	}
	if err := checkUserNS(field+".userns_options", o.GetUsernsOptions()); err != nil {
		return err
	}
	switch o.GetNetwork() {
	case runtimeapi.NamespaceMode_POD:
		out.Endpoints = []engine.EndpointConfig{{Network: network.DefaultNetwork}}
	case runtimeapi.NamespaceMode_NODE:
		out.Network, out.HostUTS = engine.NetworkHost, true
		if out.Hostname == "" {
			out.Hostname, _ = os.Hostname() // left empty the engine says the node's name in /etc/hostname all the same
		}
	default:
		return unsupported(field+".network "+o.GetNetwork().String(), "ask for POD or NODE")
	}
	switch o.GetIpc() {
	case runtimeapi.NamespaceMode_POD:
	case runtimeapi.NamespaceMode_NODE:
		out.HostIPC = true
	default:
		return unsupported(field+".ipc "+o.GetIpc().String(), "ask for POD or NODE")
	}
	return nil
}

func checkUserNS(field string, o *runtimeapi.UserNamespace) error {
	if o != nil && o.Mode != runtimeapi.NamespaceMode_NODE {
		return unsupported(field, "containers run in the node's user namespace; ask for mode NODE")
	}
	return nil
}

func checkSELinux(field string, o *runtimeapi.SELinuxOption) error {
	if o.GetUser() != "" || o.GetRole() != "" || o.GetType() != "" || o.GetLevel() != "" {
		return unsupported(field, "Berth sets no SELinux labels")
	}
	return nil
}

// dnsConfig keeps the node's search domains out of a pod that names servers of its own.
func dnsConfig(c *runtimeapi.DNSConfig) engine.DNSConfig {
	out := engine.DNSConfig{Servers: c.GetServers(), Searches: c.GetSearches(), Options: c.GetOptions()}
	if c != nil && len(out.Searches) == 0 {
		out.Searches = []string{"."}
	}
	return out
}

// ports takes the mappings that have a host port; the others only inform.
func ports(mappings []*runtimeapi.PortMapping) ([]network.Port, error) {
	var out []network.Port
	for i, m := range mappings {
		if m.GetHostPort() == 0 {
			continue
		}
		p := network.Port{}
		switch m.GetProtocol() {
		case runtimeapi.Protocol_TCP:
			p.Protocol = "tcp"
		case runtimeapi.Protocol_UDP:
			p.Protocol = "udp"
		case runtimeapi.Protocol_SCTP:
			p.Protocol = "sctp"
		default:
			return nil, invalid("config.port_mappings[%d].protocol %d: must be TCP, UDP or SCTP", i, m.GetProtocol())
		}
		if m.HostPort < 0 || m.HostPort > maxPort || m.ContainerPort < 1 || m.ContainerPort > maxPort {
			return nil, invalid("config.port_mappings[%d] %d:%d: ports are 1 to %d", i, m.HostPort, m.ContainerPort, maxPort)
		}
		p.HostPort, p.Port = uint16(m.HostPort), uint16(m.ContainerPort)
		if m.HostIp != "" {
			addr, err := netip.ParseAddr(m.HostIp)
			if err != nil {
				return nil, invalid("config.port_mappings[%d].host_ip %q: must be an IP address", i, m.HostIp)
			}
			p.HostIP = addr
		}
		out = append(out, p)
	}
	return out, nil
}
