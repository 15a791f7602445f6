package criapi

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// maxProfileBytes bounds a seccomp profile.
const maxProfileBytes = 1 << 20

const securityField = "config.linux.security_context"

// applySecurity translates a container's security context. Where the CRI cannot tell "not set" from
// a value, the safer reading is taken: absent seccomp, masked and read-only paths mean the defaults.
func applySecurity(out *engine.ContainerConfig, sec *runtimeapi.LinuxContainerSecurityContext, p pod) error {
	if err := containerNamespaces(out, sec.GetNamespaceOptions(), p); err != nil {
		return err
	}
	switch {
	case sec.GetSupplementalGroupsPolicy() != runtimeapi.SupplementalGroupsPolicy_Merge:
		return unsupported(securityField+".supplemental_groups_policy Strict", "groups of the image are always merged")
	case len(sec.GetCapabilities().GetAddAmbientCapabilities()) > 0:
		return unsupported(securityField+".capabilities.add_ambient_capabilities", "Berth gives no ambient capabilities")
	case sec.GetPrivileged() && !p.config.GetLinux().GetSecurityContext().GetPrivileged():
		return invalid("%s.privileged: the pod sandbox is not privileged", securityField)
	}
	if err := checkSELinux(securityField+".selinux_options", sec.GetSelinuxOptions()); err != nil {
		return err
	}
	if err := applyUser(out, sec); err != nil {
		return err
	}
	out.ReadOnlyRootfs = sec.GetReadonlyRootfs()
	out.Security = engine.Security{
		Privileged: sec.GetPrivileged(), NoNewPrivileges: sec.GetNoNewPrivs(),
		CapAdd: sec.GetCapabilities().GetAddCapabilities(), CapDrop: sec.GetCapabilities().GetDropCapabilities(),
		MaskedPaths: sec.GetMaskedPaths(), ReadOnlyPaths: sec.GetReadonlyPaths(),
	}
	var err error
	//nolint:staticcheck // deprecated, but a client that sets it must not be ignored
	if out.Security.Seccomp, err = seccomp(sec.GetSeccomp(), sec.GetSeccompProfilePath()); err != nil {
		return err
	}
	//nolint:staticcheck // as above
	out.Security.AppArmor, err = appArmor(sec.GetApparmor(), sec.GetApparmorProfile())
	return err
}

// containerNamespaces: without options of its own a container has its pod's.
func containerNamespaces(out *engine.ContainerConfig, o *runtimeapi.NamespaceOption, p pod) error {
	const field = securityField + ".namespace_options"
	if o == nil {
		out.HostPID = p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_NODE
		return nil
	}
	if err := checkUserNS(field+".userns_options", o.GetUsernsOptions()); err != nil {
		return err
	}
	if o.Network == runtimeapi.NamespaceMode_NODE && p.box.Config.Network != engine.NetworkHost {
		return invalid("%s.network NODE: the pod sandbox has a network namespace of its own", field)
	}
	if o.Ipc == runtimeapi.NamespaceMode_NODE && !p.box.Config.HostIPC {
		return invalid("%s.ipc NODE: the pod sandbox has an IPC namespace of its own", field)
	}
	switch o.Pid {
	case runtimeapi.NamespaceMode_CONTAINER:
	case runtimeapi.NamespaceMode_NODE:
		out.HostPID = true
	case runtimeapi.NamespaceMode_TARGET:
		if o.TargetId == "" {
			return invalid("%s.target_id is missing", field)
		}
		out.PIDOf = o.TargetId
	default:
		return unsupported(field+".pid "+o.Pid.String(), "containers of a pod do not share a PID namespace; ask for CONTAINER, NODE or TARGET")
	}
	return nil
}

// applyUser overrides the image's user where the context names one.
func applyUser(out *engine.ContainerConfig, sec *runtimeapi.LinuxContainerSecurityContext) error {
	switch {
	case sec.GetRunAsUser() != nil:
		if sec.RunAsUser.Value < 0 {
			return invalid("%s.run_as_user %d: must not be negative", securityField, sec.RunAsUser.Value)
		}
		out.User = strconv.FormatInt(sec.RunAsUser.Value, 10)
	case sec.GetRunAsUsername() != "":
		out.User = sec.RunAsUsername
	case sec.GetRunAsGroup() != nil:
		return invalid("%s.run_as_group: needs run_as_user or run_as_username beside it", securityField)
	}
	if g := sec.GetRunAsGroup(); g != nil {
		if g.Value < 0 {
			return invalid("%s.run_as_group %d: must not be negative", securityField, g.Value)
		}
		name, _, _ := strings.Cut(out.User, ":")
		out.User = name + ":" + strconv.FormatInt(g.Value, 10)
	}
	for _, g := range sec.GetSupplementalGroups() {
		if g < 0 {
			return invalid("%s.supplemental_groups %d: must not be negative", securityField, g)
		}
		out.Groups = append(out.Groups, strconv.FormatInt(g, 10))
	}
	return nil
}

// Words of the deprecated profile fields.
const (
	wordDefault       = "runtime/default"
	wordDockerDefault = "docker/default"
	wordUnconfined    = "unconfined"
	wordLocalhost     = "localhost/"
)

// profile reads a profile from its field, or from the deprecated one beside it.
func profile(field string, p *runtimeapi.SecurityProfile, word string) (*runtimeapi.SecurityProfile, error) {
	if p != nil {
		return p, nil
	}
	switch {
	case word == "" || word == wordDefault || word == wordDockerDefault:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	case word == wordUnconfined:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(word, wordLocalhost):
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: strings.TrimPrefix(word, wordLocalhost)}, nil
	}
	return nil, invalid("%s %q: must be %s, %s or %sPATH", field, word, wordDefault, wordUnconfined, wordLocalhost)
}

func seccomp(p *runtimeapi.SecurityProfile, word string) (string, error) {
	p, err := profile(securityField+".seccomp_profile_path", p, word)
	if err != nil {
		return "", err
	}
	switch p.ProfileType {
	case runtimeapi.SecurityProfile_RuntimeDefault:
		return "", nil
	case runtimeapi.SecurityProfile_Unconfined:
		return engine.Unconfined, nil
	case runtimeapi.SecurityProfile_Localhost:
		return readProfile(p.LocalhostRef)
	}
	return "", invalid("%s.seccomp.profile_type %d: no such type", securityField, p.ProfileType)
}

// readProfile reads a seccomp profile on the node; the kubelet gives its absolute path.
func readProfile(path string) (string, error) {
	const field = securityField + ".seccomp.localhost_ref"
	if !filepath.IsAbs(path) {
		return "", invalid("%s %q: must be an absolute path", field, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", errdefs.New(errdefs.ErrInvalid, "%s: %w", field, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxProfileBytes+1))
	if err != nil {
		return "", errdefs.New(errdefs.ErrInvalid, "%s: %w", field, err)
	}
	if len(b) > maxProfileBytes || !json.Valid(b) {
		return "", invalid("%s %s: must be JSON of at most %d bytes", field, path, maxProfileBytes)
	}
	return string(b), nil
}

func appArmor(p *runtimeapi.SecurityProfile, word string) (string, error) {
	p, err := profile(securityField+".apparmor_profile", p, word)
	if err != nil {
		return "", err
	}
	switch p.ProfileType {
	case runtimeapi.SecurityProfile_RuntimeDefault:
		return "", nil
	case runtimeapi.SecurityProfile_Unconfined:
		return engine.Unconfined, nil
	}
	return "", unsupported(securityField+".apparmor "+p.ProfileType.String()+" "+p.LocalhostRef, "ask for RuntimeDefault or Unconfined")
}
