package criapi_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/criapi"
	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCodes(t *testing.T) {
	for kind, want := range map[error]codes.Code{
		errdefs.ErrNotFound: codes.NotFound, errdefs.ErrExists: codes.AlreadyExists, errdefs.ErrInvalid: codes.InvalidArgument,
		errdefs.ErrConflict: codes.FailedPrecondition, errdefs.ErrNotModified: codes.FailedPrecondition,
		errdefs.ErrUnauthorized: codes.Unauthenticated, errdefs.ErrForbidden: codes.PermissionDenied, errdefs.ErrUnsupported: codes.Unimplemented,
		errdefs.ErrUnavailable: codes.Unavailable, errdefs.ErrExhausted: codes.ResourceExhausted, errdefs.ErrDataLoss: codes.DataLoss,
		errdefs.ErrInvocation: codes.InvalidArgument, errdefs.ErrNoProgram: codes.InvalidArgument, errors.New("other"): codes.Unknown,
		context.DeadlineExceeded: codes.DeadlineExceeded, context.Canceled: codes.Canceled,
	} {
		if got := criapi.Code(fmt.Errorf("wrapped: %w", kind)); got != want {
			t.Errorf("%v: %s, want %s", kind, got, want)
		}
	}
}

func TestCommand(t *testing.T) {
	for _, tt := range []struct{ command, args, want []string }{
		{nil, nil, []string{"/entry", "serve"}},
		{nil, []string{"a"}, []string{"/entry", "a"}},
		{[]string{"c"}, nil, []string{"c"}},
		{[]string{"c"}, []string{"a"}, []string{"c", "a"}},
	} {
		got := criapi.CommandOf(&runtime.ContainerConfig{Command: tt.command, Args: tt.args}, boxImage)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("command %q, args %q: %s", tt.command, tt.args, diff)
		}
	}
}

// Every signal of the CRI is one that the engine knows, and comes back as itself or its other name.
func TestStopSignals(t *testing.T) {
	other := map[string]string{"SIGCLD": "SIGCHLD", "SIGIOT": "SIGABRT", "SIGPOLL": "SIGIO"}
	for n, name := range runtime.Signal_name {
		s := runtime.Signal(n)
		words, err := criapi.StopSignal(s, image.Image{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if s == runtime.Signal_RUNTIME_DEFAULT {
			continue
		}
		if _, err := engine.ParseSignal(words); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want := name
		if o, ok := other[name]; ok {
			want = o
		}
		if got := criapi.CRISignal(words).String(); got != want {
			t.Errorf("%s came back as %s", name, got)
		}
	}
	if got := criapi.CRISignal("quit"); got != runtime.Signal_SIGQUIT {
		t.Error(got)
	}
	if got := criapi.CRISignal(""); got != runtime.Signal_SIGTERM {
		t.Error(got)
	}
}

func TestCredentials(t *testing.T) {
	for _, tt := range []struct {
		image string
		auth  *runtime.AuthConfig
		want  image.Credentials
	}{
		{"busybox", nil, image.Credentials{}},
		{"busybox", &runtime.AuthConfig{Username: "u", Password: "p"}, image.Credentials{Username: "u", Password: "p"}},
		{"busybox", &runtime.AuthConfig{Auth: "dTpwOnE="}, image.Credentials{Username: "u", Password: "p:q"}},
		{"busybox", &runtime.AuthConfig{Username: "u", ServerAddress: "https://index.docker.io/v1/"}, image.Credentials{Username: "u"}},
		{"reg.example:5000/a", &runtime.AuthConfig{Username: "u", ServerAddress: "reg.example:5000"}, image.Credentials{Username: "u"}},
		{"reg.example:5000/a", &runtime.AuthConfig{Username: "u", ServerAddress: "other.example"}, image.Credentials{}},
		{"busybox", &runtime.AuthConfig{IdentityToken: "i", RegistryToken: "r"}, image.Credentials{IdentityToken: "i", RegistryToken: "r"}},
	} {
		got, err := criapi.Credentials(tt.image, tt.auth)
		if err != nil || got != tt.want {
			t.Errorf("%s %v: %+v, %v", tt.image, tt.auth, got, err)
		}
	}
	if _, err := criapi.Credentials("busybox", &runtime.AuthConfig{Auth: "?"}); !errors.Is(err, errdefs.ErrInvalid) {
		t.Error(err)
	}
}

// container runs a pod and creates a container in it after the changes.
func (f *fixture) container(t *testing.T, changePod func(*runtime.PodSandboxConfig), change func(*runtime.ContainerConfig)) (engine.ContainerConfig, error) {
	t.Helper()
	p, c := pod(), web()
	p.Metadata.Attempt = uint32(len(f.engine.sandboxes) + 10)
	if changePod != nil {
		changePod(p)
	}
	box, err := f.runtime.RunPodSandbox(context.Background(), p, "")
	if err != nil {
		t.Fatal(err)
	}
	change(c)
	id, err := f.runtime.CreateContainer(context.Background(), box, c, p)
	if err != nil {
		return engine.ContainerConfig{}, err
	}
	return f.engine.containers[id].Config, nil
}

func TestSeccompProfiles(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good"), filepath.Join(dir, "bad")
	if err := errors.Join(os.WriteFile(good, []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`), 0o600), os.WriteFile(bad, []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	local := func(path string) *runtime.SecurityProfile {
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: path}
	}
	for _, tt := range []struct {
		profile *runtime.SecurityProfile
		word    string
		want    string
		code    codes.Code
	}{
		{nil, "", "", codes.OK},
		{nil, "unconfined", "unconfined", codes.OK},
		{nil, "localhost/" + good, `{"defaultAction":"SCMP_ACT_ALLOW"}`, codes.OK},
		{nil, "nonsense", "", codes.InvalidArgument},
		{&runtime.SecurityProfile{}, "unconfined", "", codes.OK},
		{local(good), "", `{"defaultAction":"SCMP_ACT_ALLOW"}`, codes.OK},
		{local(bad), "", "", codes.InvalidArgument},
		{local("good"), "", "", codes.InvalidArgument},
		{local(filepath.Join(dir, "none")), "", "", codes.InvalidArgument},
	} {
		c, err := f.container(t, nil, func(c *runtime.ContainerConfig) {
			//nolint:staticcheck // deprecated, but not ignored
			c.Linux.SecurityContext.Seccomp, c.Linux.SecurityContext.SeccompProfilePath = tt.profile, tt.word
		})
		if status.Code(err) != tt.code || c.Security.Seccomp != tt.want {
			t.Errorf("%v %q: %q, %v", tt.profile, tt.word, c.Security.Seccomp, err)
		}
	}
}

func TestNamespaces(t *testing.T) {
	f := newFixture(t)
	host := &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE, Ipc: runtime.NamespaceMode_NODE}
	onHost := func(p *runtime.PodSandboxConfig) {
		p.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{NamespaceOptions: host}
	}
	plain := func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = nil }
	c, err := f.container(t, onHost, plain)
	if err != nil || !c.HostPID {
		t.Errorf("host PID %v, %v", c.HostPID, err)
	}
	b := f.engine.sandboxes[c.Sandbox].Config
	if b.Network != engine.NetworkHost || !b.HostIPC || !b.HostUTS || len(b.Endpoints) != 0 || len(b.Ports) != 0 {
		t.Errorf("sandbox %+v", b)
	}
	if c, err := f.container(t, nil, plain); err != nil || c.HostPID {
		t.Errorf("own PID %v, %v", c.HostPID, err)
	}
	for name, o := range map[string]*runtime.NamespaceOption{
		"network NODE": {Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER},
		"ipc NODE":     {Ipc: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER},
		"target_id":    {Pid: runtime.NamespaceMode_TARGET},
	} {
		_, err := f.container(t, nil, func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = o })
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := pod()
	p.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{}}
	if _, err := f.runtime.RunPodSandbox(context.Background(), p, ""); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "pid POD") {
		t.Errorf("shared PID namespace: %v", err)
	}
}

func TestPrivilegedNeedsPrivilegedPod(t *testing.T) {
	f := newFixture(t)
	privileged := func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }
	if _, err := f.container(t, nil, privileged); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	c, err := f.container(t, func(p *runtime.PodSandboxConfig) {
		p.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{Privileged: true}
	}, privileged)
	if err != nil || !c.Security.Privileged {
		t.Errorf("%+v, %v", c.Security, err)
	}
}

func TestLimits(t *testing.T) {
	f := newFixture(t)
	c, err := f.container(t, nil, func(c *runtime.ContainerConfig) {
		c.Linux.Resources = &runtime.LinuxContainerResources{
			CpuPeriod: 100000, CpuQuota: 50000, CpusetCpus: "0", MemoryLimitInBytes: 8 << 20, MemorySwapLimitInBytes: 9 << 20,
			Unified: map[string]string{"pids.max": "12"}, HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB"}},
		}
	})
	want := engine.Resources{CPUPeriod: 100000, CPUQuota: 50000, CpusetCPUs: "0", MemoryBytes: 8 << 20, MemorySwapBytes: 9 << 20, PidsLimit: 12}
	if diff := cmp.Diff(want, c.Resources); err != nil || diff != "" {
		t.Error(err, diff)
	}
	for _, r := range []*runtime.LinuxContainerResources{{OomScoreAdj: 1001}, {Unified: map[string]string{"pids.max": "many"}}} {
		if _, err := f.container(t, nil, func(c *runtime.ContainerConfig) { c.Linux.Resources = r }); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", r, err)
		}
	}
}

// A container in a sandbox that was stopped would bring it back to life.
func TestStoppedPod(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	box, err := f.runtime.RunPodSandbox(ctx, pod(), "")
	if err != nil {
		t.Fatal(err)
	}
	id, err := f.runtime.CreateContainer(ctx, box, web(), pod())
	if err != nil {
		t.Fatal(err)
	}
	if err := f.runtime.StopPodSandbox(ctx, box); err != nil {
		t.Fatal(err)
	}
	if err := f.runtime.StartContainer(ctx, id); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("start: %v", err)
	}
	if _, err := f.runtime.CreateContainer(ctx, box, web(), pod()); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("create: %v", err)
	}
	if _, err := f.runtime.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: box}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("port-forward: %v", err)
	}
}

// A start that failed is an end: the kubelet looks for the reason and makes a new container.
func TestFailedStart(t *testing.T) {
	f := newFixture(t)
	id := f.start(t)
	f.engine.mu.Lock()
	st := &f.engine.containers[id].State
	*st = engine.ContainerState{Status: engine.StatusCreated, Created: st.Created, FinishedAt: st.StartedAt, ExitCode: 127, ExitKnown: true, Error: "no such program"}
	f.engine.mu.Unlock()
	got, err := f.runtime.ContainerStatus(context.Background(), id, false)
	if err != nil || got.Status.State != runtime.ContainerState_CONTAINER_EXITED || got.Status.Reason != "StartError" || got.Status.ExitCode != 127 || got.Status.Message == "" {
		t.Errorf("%v, %v", got, err)
	}
}
