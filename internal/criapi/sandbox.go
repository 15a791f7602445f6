package criapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/network"
)

// maxNameBytes is the longest name that the engine takes.
const maxNameBytes = 255

// dialect is what the engine keeps for us with a sandbox or a container: the client's own
// words, as their message, so that nothing gets lost.
type dialect struct {
	Config []byte // *runtime.PodSandboxConfig or *runtime.ContainerConfig, without environment
	// ImageRef is what the kubelet calls image_ref: the ID of the image at the time.
	ImageRef string `json:",omitempty"`
}

func encodeDialect(m proto.Message, imageRef string) (json.RawMessage, error) {
	raw, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return json.Marshal(dialect{Config: raw, ImageRef: imageRef})
}

// decodeDialect fills m. What cannot be read leaves it empty: the engine's own view remains.
func decodeDialect(raw json.RawMessage, m proto.Message) (imageRef string) {
	var d dialect
	if json.Unmarshal(raw, &d) != nil || proto.Unmarshal(d.Config, m) != nil {
		proto.Reset(m)
	}
	return d.ImageRef
}

// objectName joins the parts of a name as other runtimes do, and keeps it within bounds.
func objectName(container string, pod *runtime.PodSandboxMetadata, attempt uint32) string {
	name := fmt.Sprintf("k8s_%s_%s_%s_%s_%d", container, pod.GetName(), pod.GetNamespace(), pod.GetUid(), attempt)
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_.-", r) {
			return r
		}
		return '-'
	}, name)
	if len(name) > maxNameBytes {
		sum := sha256.Sum256([]byte(name))
		digits := hex.EncodeToString(sum[:])
		name = name[:maxNameBytes-len(digits)-1] + "_" + digits
	}
	return name
}

// sandbox returns a sandbox that CRI made.
func (s *Server) sandbox(ref string) (engine.Sandbox, error) {
	if ref == "" {
		return engine.Sandbox{}, invalid("no pod sandbox was named")
	}
	b, err := s.Engine.Sandbox(ref)
	if err != nil {
		return b, err
	}
	if b.Config.Owner != engine.OwnerCRI {
		return b, errdefs.New(errdefs.ErrNotFound, "pod sandbox %s: not made through CRI", ref)
	}
	return b, nil
}

func (s *runtimeService) RunPodSandbox(ctx context.Context, req *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	if h := req.GetRuntimeHandler(); h != "" {
		return nil, unsupported("runtime handler %q: there is only the default one", h)
	}
	cfg, err := s.sandboxConfig(req.GetConfig())
	if err != nil {
		return nil, err
	}
	box, err := s.Engine.CreateSandbox(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := s.Engine.StartSandbox(ctx, box.Config.ID); err != nil {
		if rmErr := s.Engine.RemoveSandbox(context.WithoutCancel(ctx), box.Config.ID); rmErr != nil {
			s.Logger.Warn("a pod sandbox that could not start is left behind", "sandbox", box.Config.ID, "error", rmErr)
		}
		return nil, err
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: box.Config.ID}, nil
}

// sandboxConfig translates a pod's configuration. There is no pause container: what the client
// says about that one's user, confinement and resources has no object here.
func (s *Server) sandboxConfig(c *runtime.PodSandboxConfig) (engine.SandboxConfig, error) {
	var out engine.SandboxConfig
	meta := c.GetMetadata()
	if meta.GetName() == "" || meta.GetNamespace() == "" || meta.GetUid() == "" {
		return out, invalid("pod sandbox: metadata needs name, namespace and uid")
	}
	if c.GetWindows() != nil {
		return out, unsupported("pod sandbox %s: windows is not supported", meta.Name)
	}
	raw, err := encodeDialect(c, "")
	if err != nil {
		return out, err
	}
	out = engine.SandboxConfig{
		Name: objectName("POD", meta, meta.GetAttempt()), Owner: engine.OwnerCRI,
		Labels: c.GetLabels(), Annotations: c.GetAnnotations(), Hostname: c.GetHostname(),
		LogDirectory: c.GetLogDirectory(), CgroupParent: c.GetLinux().GetCgroupParent(), Sysctls: c.GetLinux().GetSysctls(),
		DNS: engine.DNSConfig{
			Servers: c.GetDnsConfig().GetServers(), Searches: c.GetDnsConfig().GetSearches(), Options: c.GetDnsConfig().GetOptions(),
		},
		Dialect: raw,
	}
	sec := c.GetLinux().GetSecurityContext()
	if err := checkSELinux(sec.GetSelinuxOptions()); err != nil {
		return out, err
	}
	ns := sec.GetNamespaceOptions()
	if err := checkNamespaces(ns); err != nil {
		return out, err
	}
	switch ns.GetNetwork() {
	case runtime.NamespaceMode_POD:
		out.Endpoints = []engine.EndpointConfig{{Network: s.Network}}
	case runtime.NamespaceMode_NODE:
		out.Network, out.HostUTS = engine.NetworkHost, true
	default:
		return out, unsupported("namespace mode %s of the network is not supported; use POD or NODE", ns.GetNetwork())
	}
	switch ns.GetIpc() {
	case runtime.NamespaceMode_POD:
	case runtime.NamespaceMode_NODE:
		out.HostIPC = true
	default:
		return out, unsupported("namespace mode %s of ipc is not supported; use POD or NODE", ns.GetIpc())
	}
	out.Ports, err = ports(c.GetPortMappings(), out.Network == engine.NetworkHost)
	return out, err
}

// checkNamespaces refuses what cannot be had. A missing option is fine.
func checkNamespaces(ns *runtime.NamespaceOption) error {
	if ns == nil {
		return nil
	}
	if ns.GetPid() == runtime.NamespaceMode_POD {
		return unsupported("namespace mode POD of pid (a shared process namespace) is not supported; use CONTAINER, TARGET or NODE")
	}
	if u := ns.GetUsernsOptions(); u != nil && (u.GetMode() != runtime.NamespaceMode_NODE || len(u.GetUids())+len(u.GetGids()) > 0) {
		return unsupported("user namespaces (userns_options) are not supported")
	}
	return nil
}

func ports(list []*runtime.PortMapping, hostNetwork bool) ([]network.Port, error) {
	var out []network.Port
	for _, m := range list {
		if m.GetHostPort() == 0 || hostNetwork {
			continue // only a statement about what listens inside
		}
		if m.GetHostPort() < 0 || m.GetHostPort() > 65535 || m.GetContainerPort() < 1 || m.GetContainerPort() > 65535 {
			return nil, invalid("port mapping %d to %d: not a port", m.GetHostPort(), m.GetContainerPort())
		}
		p := network.Port{HostPort: uint16(m.GetHostPort()), Port: uint16(m.GetContainerPort())}
		switch m.GetProtocol() {
		case runtime.Protocol_TCP:
			p.Protocol = "tcp"
		case runtime.Protocol_UDP:
			p.Protocol = "udp"
		case runtime.Protocol_SCTP:
			p.Protocol = "sctp"
		default:
			return nil, invalid("port mapping %d: protocol %s is unknown", m.GetHostPort(), m.GetProtocol())
		}
		if ip := m.GetHostIp(); ip != "" {
			addr, err := netip.ParseAddr(ip)
			if err != nil {
				return nil, invalid("port mapping %d: %q is not an address", m.GetHostPort(), ip)
			}
			p.HostIP = addr
		}
		out = append(out, p)
	}
	return out, nil
}

// StopPodSandbox is idempotent, and a sandbox that does not exist is stopped.
func (s *runtimeService) StopPodSandbox(ctx context.Context, req *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	box, err := s.sandbox(req.GetPodSandboxId())
	if err == nil {
		err = s.Engine.StopSandbox(ctx, box.Config.ID)
	}
	if err != nil && !gone(err) {
		return nil, err
	}
	return &runtime.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox is idempotent.
func (s *runtimeService) RemovePodSandbox(ctx context.Context, req *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	box, err := s.sandbox(req.GetPodSandboxId())
	if err == nil {
		err = s.Engine.RemoveSandbox(ctx, box.Config.ID)
	}
	if err != nil && !gone(err) {
		return nil, err
	}
	return &runtime.RemovePodSandboxResponse{}, nil
}

func (s *runtimeService) PodSandboxStatus(_ context.Context, req *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	box, err := s.sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &runtime.PodSandboxStatusResponse{Status: sandboxStatus(box)}
	if req.GetVerbose() {
		info, err := json.Marshal(map[string]any{"name": box.Config.Name, "netns": box.State.NetNS, "endpoints": box.State.Endpoints, "ports": box.State.Ports})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

func sandboxState(box engine.Sandbox) runtime.PodSandboxState {
	if box.State.Ready {
		return runtime.PodSandboxState_SANDBOX_READY
	}
	return runtime.PodSandboxState_SANDBOX_NOTREADY
}

func sandboxStatus(box engine.Sandbox) *runtime.PodSandboxStatus {
	var c runtime.PodSandboxConfig
	decodeDialect(box.Config.Dialect, &c)
	out := &runtime.PodSandboxStatus{
		Id: box.Config.ID, Metadata: c.GetMetadata(), State: sandboxState(box), CreatedAt: box.State.Created.UnixNano(),
		Network: &runtime.PodSandboxNetworkStatus{}, Labels: box.Config.Labels, Annotations: box.Config.Annotations,
		Linux: &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{
			Options: c.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
	}
	for i, e := range box.State.Endpoints {
		if ip := e.Address.Addr().String(); i == 0 {
			out.Network.Ip = ip
		} else {
			out.Network.AdditionalIps = append(out.Network.AdditionalIps, &runtime.PodIP{Ip: ip})
		}
	}
	return out
}

func (s *runtimeService) ListPodSandbox(_ context.Context, req *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	f := req.GetFilter()
	out := &runtime.ListPodSandboxResponse{}
	for _, box := range s.Engine.Sandboxes() {
		if box.Config.Owner != engine.OwnerCRI || !strings.HasPrefix(box.Config.ID, f.GetId()) ||
			f.GetState() != nil && f.GetState().GetState() != sandboxState(box) || !labelsMatch(box.Config.Labels, f.GetLabelSelector()) {
			continue
		}
		var c runtime.PodSandboxConfig
		decodeDialect(box.Config.Dialect, &c)
		out.Items = append(out.Items, &runtime.PodSandbox{
			Id: box.Config.ID, Metadata: c.GetMetadata(), State: sandboxState(box), CreatedAt: box.State.Created.UnixNano(),
			Labels: box.Config.Labels, Annotations: box.Config.Annotations,
		})
	}
	return out, nil
}

func labelsMatch(labels, want map[string]string) bool {
	for k, v := range want {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}
