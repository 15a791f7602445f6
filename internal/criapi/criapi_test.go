package criapi_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"berth/internal/criapi"
	"berth/internal/engine"
	"berth/internal/network"
)

type fixture struct {
	engine  *fakeEngine
	images  *fakeImages
	runtime internalapi.RuntimeService
	image   internalapi.ImageManagerService
	stop    func() // ends the server and waits for it
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cri.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{engine: newFakeEngine(), images: &fakeImages{}}
	s := criapi.New(criapi.Options{Engine: f.engine, Images: f.images, Version: "1.2.3", ImageDir: "/images"})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	if f.runtime, err = criclient.NewRemoteRuntimeService(ctx, "unix://"+path, 5*time.Second, nil, false); err != nil {
		t.Fatal(err)
	}
	if f.image, err = criclient.NewRemoteImageService(ctx, "unix://"+path, 5*time.Second, nil, false); err != nil {
		t.Fatal(err)
	}
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		f.runtime.Close(context.Background())
		f.image.Close(context.Background())
		f.stop()
	})
	return f
}

func pod() *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: "web-1", Namespace: "default", Uid: "u1", Attempt: 2},
		Hostname: "web-1", LogDirectory: "/var/log/pods/u1", Labels: map[string]string{"app": "web"},
		PortMappings: []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080}, {ContainerPort: 81}},
		DnsConfig:    &runtime.DNSConfig{Servers: []string{"10.0.0.10"}},
		Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/u1"},
	}
}

func web() *runtime.ContainerConfig {
	return &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "web", Attempt: 1}, Image: &runtime.ImageSpec{Image: "box"}, LogPath: "web/1.log",
		Args: []string{"--port", "80"}, Envs: []*runtime.KeyValue{{Key: "A", Value: []byte("pod")}, {Key: "B", Value: []byte("2")}},
		Mounts: []*runtime.Mount{{HostPath: "/data", ContainerPath: "/srv/data", Readonly: true}},
		Labels: map[string]string{"name": "web"},
		Linux: &runtime.LinuxContainerConfig{
			Resources: &runtime.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, CpuShares: 512, OomScoreAdj: 100},
			SecurityContext: &runtime.LinuxContainerSecurityContext{
				RunAsUser: &runtime.Int64Value{Value: 5}, RunAsGroup: &runtime.Int64Value{Value: 6}, SupplementalGroups: []int64{7},
				NoNewPrivs: true, Capabilities: &runtime.Capability{AddCapabilities: []string{"NET_ADMIN"}},
				Seccomp:          &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined},
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
			},
		},
	}
}

func TestLife(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	box, err := f.runtime.RunPodSandbox(ctx, pod(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.runtime.RunPodSandbox(ctx, pod(), ""); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the same pod again: %v", err)
	}
	id, err := f.runtime.CreateContainer(ctx, box, web(), pod())
	if err != nil {
		t.Fatal(err)
	}
	got := f.engine.containers[id].Config
	got.Dialect = nil
	want := engine.ContainerConfig{
		ID: id, Name: "k8s_web_web-1_default_u1_1", Owner: engine.OwnerCRI, Sandbox: box, Labels: map[string]string{"name": "web"},
		Image: "box", ImageID: boxImage.ID.String(), Args: []string{"/entry", "--port", "80"}, Env: []string{"PATH=/bin", "A=pod", "B=2"},
		Cwd: "/srv", User: "5:6", Groups: []string{"7"},
		Mounts:    []engine.Mount{{Kind: engine.MountBind, Source: "/data", Target: "/srv/data", ReadOnly: true, Propagation: "rprivate"}},
		Resources: engine.Resources{MemoryBytes: 1 << 20, MemorySwapBytes: 1 << 20, CPUShares: 512}, OOMScoreAdj: 100,
		Security: engine.Security{NoNewPrivileges: true, CapAdd: []string{"NET_ADMIN"}, Seccomp: "unconfined"},
		Restart:  engine.RestartPolicy{Name: "no"},
		Log:      engine.LogConfig{Driver: engine.LogCRI, Path: "/var/log/pods/u1/web/1.log"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	b := f.engine.sandboxes[box].Config
	b.Dialect = nil
	wantBox := engine.SandboxConfig{
		ID: box, Name: "k8s_POD_web-1_default_u1_2", Owner: engine.OwnerCRI, Labels: map[string]string{"app": "web"}, Hostname: "web-1",
		Endpoints: []engine.EndpointConfig{{Network: "bridge"}}, Ports: []network.Port{{Protocol: "tcp", HostPort: 8080, Port: 80}},
		DNS: engine.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"."}}, CgroupParent: "/kubepods/u1", LogDirectory: "/var/log/pods/u1",
	}
	if diff := cmp.Diff(wantBox, b, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
	if err := f.runtime.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := f.runtime.StartContainer(ctx, id); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("second start: %v", err)
	}
	st, err := f.runtime.ContainerStatus(ctx, id, true)
	if err != nil || st.Status.State != runtime.ContainerState_CONTAINER_RUNNING || st.Status.Metadata.Attempt != 1 ||
		st.Status.ImageRef != boxImage.ID.String() || st.Status.LogPath != "/var/log/pods/u1/web/1.log" || !strings.Contains(st.Info["info"], `"pid":77`) {
		t.Errorf("status %v, %v", st, err)
	}
	ps, err := f.runtime.PodSandboxStatus(ctx, box, false)
	if err != nil || ps.Status.Network.Ip != "10.9.0.2" || ps.Status.Metadata.Uid != "u1" || ps.Status.State != runtime.PodSandboxState_SANDBOX_READY {
		t.Errorf("pod status %v, %v", ps, err)
	}
	f.checkLists(t, box, id)
	f.checkEnd(t, box, id)
}

func (f *fixture) checkLists(t *testing.T, box, id string) {
	ctx := context.Background()
	for _, tt := range []struct {
		filter *runtime.ContainerFilter
		want   int
	}{
		{nil, 1}, {&runtime.ContainerFilter{Id: id[:3]}, 1}, {&runtime.ContainerFilter{Id: "x"}, 0},
		{&runtime.ContainerFilter{PodSandboxId: box, LabelSelector: map[string]string{"name": "web"}}, 1},
		{&runtime.ContainerFilter{LabelSelector: map[string]string{"name": "db"}}, 0},
		{&runtime.ContainerFilter{State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_EXITED}}, 0},
	} {
		list, err := f.runtime.ListContainers(ctx, tt.filter)
		if err != nil || len(list) != tt.want {
			t.Errorf("filter %v: %d containers, %v", tt.filter, len(list), err)
		}
	}
	pods, err := f.runtime.ListPodSandbox(ctx, &runtime.PodSandboxFilter{LabelSelector: map[string]string{"app": "web"}})
	if err != nil || len(pods) != 1 || pods[0].Metadata.Name != "web-1" {
		t.Errorf("pods %v, %v", pods, err)
	}
	stats, err := f.runtime.ContainerStats(ctx, id)
	if err != nil || stats.Memory.WorkingSetBytes.Value != 700 || stats.Memory.AvailableBytes.Value != 1300 || stats.WritableLayer.UsedBytes.Value != 4096 {
		t.Errorf("stats %v, %v", stats, err)
	}
	ps, err := f.runtime.PodSandboxStats(ctx, box)
	if err != nil || ps.Linux.Network.DefaultInterface.Name != "eth0" || ps.Linux.Process.ProcessCount.Value != 2 {
		t.Errorf("pod stats %v, %v", ps, err)
	}
	if err := f.runtime.UpdateContainerResources(ctx, id, &runtime.ContainerResources{Linux: &runtime.LinuxContainerResources{CpuShares: 7}}); err != nil {
		t.Error(err)
	}
	if r := f.engine.containers[id].Config.Resources; r.CPUShares != 7 || r.MemoryBytes != 1<<20 {
		t.Errorf("resources %+v", r)
	}
	if err := f.runtime.ReopenContainerLog(ctx, id); err != nil || f.engine.reopened != 1 {
		t.Errorf("reopen: %v", err)
	}
}

func (f *fixture) checkEnd(t *testing.T, box, id string) {
	ctx := context.Background()
	for range 2 {
		if err := f.runtime.StopContainer(ctx, id, 3); err != nil {
			t.Error(err)
		}
	}
	st, err := f.runtime.ContainerStatus(ctx, id, false)
	if err != nil || st.Status.ExitCode != 143 || st.Status.Reason != "Error" || st.Status.FinishedAt == 0 {
		t.Errorf("status %v, %v", st, err)
	}
	f.engine.mu.Lock()
	f.engine.containers[id].State.ExitKnown = false
	f.engine.mu.Unlock()
	if st, _ := f.runtime.ContainerStatus(ctx, id, false); st.GetStatus().GetReason() != "ContainerStatusUnknown" {
		t.Errorf("unknown exit: %v", st)
	}
	for range 2 {
		if err := errors.Join(f.runtime.RemoveContainer(ctx, id), f.runtime.StopPodSandbox(ctx, box)); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if err := errors.Join(f.runtime.RemovePodSandbox(ctx, box), f.runtime.StopPodSandbox(ctx, box)); err != nil {
			t.Error(err)
		}
	}
	if _, err := f.runtime.PodSandboxStatus(ctx, box, false); status.Code(err) != codes.NotFound {
		t.Errorf("status of what is gone: %v", err)
	}
}

func TestForeignObjectsAreHidden(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	f.engine.containers["docker1"] = &engine.Container{Config: engine.ContainerConfig{ID: "docker1", Owner: engine.OwnerDocker}}
	if list, err := f.runtime.ListContainers(ctx, nil); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	if err := f.runtime.RemoveContainer(ctx, "docker1"); err != nil || f.engine.containers["docker1"] == nil {
		t.Errorf("a container of docker's was removed: %v", err)
	}
	if _, err := f.runtime.ContainerStatus(ctx, "docker1", false); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	box, err := f.runtime.RunPodSandbox(ctx, pod(), "")
	if err != nil {
		t.Fatal(err)
	}
	sec := func(s *runtime.LinuxContainerSecurityContext) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { c.Linux = &runtime.LinuxContainerConfig{SecurityContext: s} }
	}
	mount := func(m *runtime.Mount) func(*runtime.ContainerConfig) {
		m.HostPath, m.ContainerPath = "/h", "/c"
		return func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{m} }
	}
	for name, change := range map[string]func(*runtime.ContainerConfig){
		"namespace_options.pid POD":  sec(&runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_POD}}),
		"selinux_options":            sec(&runtime.LinuxContainerSecurityContext{SelinuxOptions: &runtime.SELinuxOption{Level: "s0"}}),
		"add_ambient_capabilities":   sec(&runtime.LinuxContainerSecurityContext{Capabilities: &runtime.Capability{AddAmbientCapabilities: []string{"X"}}}),
		"supplemental_groups_policy": sec(&runtime.LinuxContainerSecurityContext{SupplementalGroupsPolicy: runtime.SupplementalGroupsPolicy_Strict}),
		"apparmor": sec(&runtime.LinuxContainerSecurityContext{Apparmor: &runtime.SecurityProfile{
			ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "mine"}}),
		"recursive_read_only":    mount(&runtime.Mount{RecursiveReadOnly: true}),
		"selinux_relabel":        mount(&runtime.Mount{SelinuxRelabel: true}),
		"image is not supported": mount(&runtime.Mount{Image: &runtime.ImageSpec{Image: "x"}}),
		"uidMappings":            mount(&runtime.Mount{UidMappings: []*runtime.IDMapping{{Length: 1}}}),
		"CDI":                    func(c *runtime.ContainerConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: "gpu"}} },
		"hugepage_limits 2MB": func(c *runtime.ContainerConfig) {
			c.Linux = &runtime.LinuxContainerConfig{Resources: &runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: 1}}}}
		},
		"userns_options": sec(&runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{
			Pid: runtime.NamespaceMode_CONTAINER, UsernsOptions: &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD}}}),
		"unified memory.high": func(c *runtime.ContainerConfig) {
			c.Linux = &runtime.LinuxContainerConfig{Resources: &runtime.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}}}
		},
	} {
		c := web()
		change(c)
		_, err := f.runtime.CreateContainer(ctx, box, c, pod())
		if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	escape := web()
	escape.LogPath = "../../../etc/passwd"
	if _, err := f.runtime.CreateContainer(ctx, box, escape, pod()); status.Code(err) != codes.InvalidArgument {
		t.Errorf("log path: %v", err)
	}
	none := web()
	none.Image.Image = "nope"
	if _, err := f.runtime.CreateContainer(ctx, box, none, pod()); status.Code(err) != codes.NotFound {
		t.Errorf("image: %v", err)
	}
	if _, err := f.runtime.RunPodSandbox(ctx, pod(), "kata"); status.Code(err) != codes.Unimplemented {
		t.Errorf("handler: %v", err)
	}
	if err := f.runtime.CheckpointContainer(ctx, &runtime.CheckpointContainerRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("checkpoint: %v", err)
	}
	f.engine.startErr = errors.New("no address left")
	p := pod()
	p.Metadata.Attempt = 9
	if _, err := f.runtime.RunPodSandbox(ctx, p, ""); err == nil || len(f.engine.sandboxes) != 1 {
		t.Errorf("a pod that cannot start: %v, %d sandboxes", err, len(f.engine.sandboxes))
	}
}

func TestExecSync(t *testing.T) {
	f := newFixture(t)
	id := f.start(t)
	out, errs, err := f.runtime.ExecSync(context.Background(), id, []string{"echo", "hi"}, time.Second)
	var code interface{ ExitStatus() int }
	if string(out) != "hi" || string(errs) != "words" || !errors.As(err, &code) || code.ExitStatus() != 3 {
		t.Errorf("%q %q %v", out, errs, err)
	}
	_, _, err = f.runtime.ExecSync(context.Background(), id, []string{"sleep"}, time.Second)
	if err == nil || !strings.Contains(err.Error(), "timed out") {
		t.Errorf("timeout: %v", err)
	}
}

func (f *fixture) start(t *testing.T) string {
	t.Helper()
	ctx := context.Background()
	box, err := f.runtime.RunPodSandbox(ctx, pod(), "")
	if err != nil {
		t.Fatal(err)
	}
	id, err := f.runtime.CreateContainer(ctx, box, web(), pod())
	if err == nil {
		err = f.runtime.StartContainer(ctx, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// dial opens the connection behind a streaming URL.
func dial(t *testing.T, url string, protocols ...string) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest("POST", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range protocols {
		req.Header.Add(httpstream.HeaderProtocolVersion, p)
	}
	resp, err := (&http.Client{Transport: rt}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func stream(t *testing.T, c httpstream.Connection, headers ...string) httpstream.Stream {
	t.Helper()
	h := http.Header{}
	for i := 0; i < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	s, err := c.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestExecStream(t *testing.T) {
	f := newFixture(t)
	id := f.start(t)
	resp, err := f.runtime.Exec(context.Background(), &runtime.ExecRequest{ContainerId: id, Cmd: []string{"cat"}, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(resp.Url, "http://127.0.0.1:") {
		t.Fatalf("url %s", resp.Url)
	}
	c := dial(t, resp.Url, "v4.channel.k8s.io")
	fail := stream(t, c, "streamType", "error")
	in := stream(t, c, "streamType", "stdin")
	out := stream(t, c, "streamType", "stdout")
	io.WriteString(in, "hello")
	in.Close()
	got, err := io.ReadAll(out)
	if err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	end, err := io.ReadAll(fail)
	if err != nil || !strings.Contains(string(end), `"message":"7"`) {
		t.Errorf("exit code in %q, %v", end, err)
	}
	// A token is good for one connection.
	again, err := http.Get(resp.Url)
	if err != nil {
		t.Fatal(err)
	}
	again.Body.Close()
	if again.StatusCode != 404 {
		t.Errorf("the URL again: %s", again.Status)
	}
}

func TestAttachResizes(t *testing.T) {
	f := newFixture(t)
	id := f.start(t)
	resp, err := f.runtime.Attach(context.Background(), &runtime.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Tty: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.Url, "v4.channel.k8s.io")
	fail := stream(t, c, "streamType", "error")
	in := stream(t, c, "streamType", "stdin")
	out := stream(t, c, "streamType", "stdout")
	size := stream(t, c, "streamType", "resize")
	io.WriteString(size, `{"Width":80,"Height":24}`)
	want := id + " 24x80"
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		f.engine.mu.Lock()
		sizes := strings.Join(f.engine.sizes, ",")
		f.engine.mu.Unlock()
		if sizes == want {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("sizes %q, want %q", sizes, want)
		}
	}
	io.WriteString(in, "typed")
	in.Close()
	if got, err := io.ReadAll(out); err != nil || string(got) != "typed" {
		t.Errorf("%q, %v", got, err)
	}
	if end, err := io.ReadAll(fail); err != nil || !strings.Contains(string(end), `"Success"`) {
		t.Errorf("%q, %v", end, err)
	}
}

// A client that stays connected does not keep the server from ending.
func TestShutdownCutsStreams(t *testing.T) {
	f := newFixture(t)
	id := f.start(t)
	resp, err := f.runtime.Attach(context.Background(), &runtime.AttachRequest{ContainerId: id, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.Url, "v4.channel.k8s.io")
	for _, kind := range []string{"error", "stdin", "stdout"} {
		stream(t, c, "streamType", kind)
	}
	events := make(chan *runtime.ContainerEventResponse)
	opened := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- f.runtime.GetContainerEvents(context.Background(), events, func(runtime.RuntimeService_GetContainerEventsClient) { close(opened) })
	}()
	<-opened
	f.stop()
	select {
	case <-c.CloseChan():
	case <-time.After(10 * time.Second):
		t.Error("the attached client is still connected")
	}
	if err := <-ended; err == nil {
		t.Error("the events ended without an error")
	}
}

// newNetNS makes a network namespace with a loopback and an echo server in it.
func newNetNS(t *testing.T) (path string, port int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	type made struct {
		path string
		l    net.Listener
		err  error
	}
	result := make(chan made)
	quit := make(chan struct{})
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread ends with its namespace
		var m made
		if m.err = unix.Unshare(unix.CLONE_NEWNET); m.err == nil {
			m.path = filepath.Join("/proc/self/task", itoa(unix.Gettid()), "ns/net")
			var lo netlink.Link
			if lo, m.err = netlink.LinkByName("lo"); m.err == nil {
				m.err = netlink.LinkSetUp(lo)
			}
			if m.err == nil {
				m.l, m.err = net.Listen("tcp4", "127.0.0.1:0")
			}
		}
		result <- m
		<-quit
	}()
	m := <-result
	if m.err != nil {
		close(quit)
		t.Fatal(m.err)
	}
	go func() {
		for {
			c, err := m.l.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { m.l.Close(); close(quit) })
	return m.path, m.l.Addr().(*net.TCPAddr).Port
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestPortForward(t *testing.T) {
	path, port := newNetNS(t)
	f := newFixture(t)
	f.engine.netns = path
	box, err := f.runtime.RunPodSandbox(context.Background(), pod(), "")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.runtime.PortForward(context.Background(), &runtime.PortForwardRequest{PodSandboxId: box, Port: []int32{int32(port)}})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.Url, "portforward.k8s.io")
	fail := stream(t, c, "streamType", "error", "port", itoa(port), "requestID", "1")
	fail.Close()
	data := stream(t, c, "streamType", "data", "port", itoa(port), "requestID", "1")
	io.WriteString(data, "ping")
	data.Close()
	if got, err := io.ReadAll(data); err != nil || string(got) != "ping" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := criapi.DialInside(context.Background(), "", int32(port)); err == nil {
		t.Error("the port is open outside: the test shows nothing")
	}
}

func TestImages(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	if img, err := f.image.ImageStatus(ctx, &runtime.ImageSpec{Image: "nope"}, false); err != nil || img.Image != nil {
		t.Errorf("%v, %v", img, err)
	}
	img, err := f.image.ImageStatus(ctx, &runtime.ImageSpec{Image: "box"}, false)
	if err != nil || img.Image.Id != boxImage.ID.String() || img.Image.GetUid().GetValue() != 1000 {
		t.Errorf("%v, %v", img, err)
	}
	if ref, err := f.image.PullImage(ctx, &runtime.ImageSpec{Image: "box"}, &runtime.AuthConfig{Auth: "bWU6c2VjcmV0"}, nil); err != nil || ref != boxImage.ID.String() {
		t.Errorf("%s, %v", ref, err)
	}
	if f.images.creds.Username != "me" || f.images.creds.Password != "secret" {
		t.Errorf("credentials %+v", f.images.creds)
	}
	for _, name := range []string{"box", "nope"} {
		if err := f.image.RemoveImage(ctx, &runtime.ImageSpec{Image: name}); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff([]string{boxImage.ID.String()}, f.images.removed); diff != "" {
		t.Error(diff)
	}
	fs, err := f.image.ImageFsInfo(ctx)
	if err != nil || fs.ImageFilesystems[0].UsedBytes.Value != 123 {
		t.Errorf("%v, %v", fs, err)
	}
}

func TestStatusAndEvents(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	v, err := f.runtime.Version(ctx, "v1")
	if err != nil || v.RuntimeName != "berth" || v.RuntimeApiVersion != "v1" || v.RuntimeVersion != "1.2.3" {
		t.Errorf("%v, %v", v, err)
	}
	st, err := f.runtime.Status(ctx, false)
	if err != nil || len(st.Status.Conditions) != 2 || !st.Status.Conditions[0].Status || !st.Status.Conditions[1].Status {
		t.Errorf("%v, %v", st, err)
	}
	events := make(chan *runtime.ContainerEventResponse, 16)
	ready := make(chan struct{})
	go f.runtime.GetContainerEvents(ctx, events, func(runtime.RuntimeService_GetContainerEventsClient) { close(ready) })
	<-ready
	// The subscription stands some time after the call: publish until an event comes.
	deadline := time.After(10 * time.Second)
	for i := 0; ; i++ {
		p := pod()
		p.Metadata.Attempt = uint32(i)
		box, err := f.runtime.RunPodSandbox(ctx, p, "")
		if err == nil {
			_, err = f.runtime.CreateContainer(ctx, box, web(), p)
		}
		if err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-events:
			if e.ContainerEventType != runtime.ContainerEventType_CONTAINER_CREATED_EVENT || e.PodSandboxStatus == nil || len(e.ContainersStatuses) != 1 {
				t.Errorf("%v", e)
			}
			return
		case <-deadline:
			t.Fatal("no event")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestObjectName(t *testing.T) {
	long := strings.Repeat("p", 253)
	a, b := criapi.ObjectName("a", long, "n", "u", 1), criapi.ObjectName("a", long, "n", "u", 2)
	if len(a) != criapi.MaxNameBytes || a == b {
		t.Errorf("%d %v", len(a), a == b)
	}
	if got := criapi.ObjectName("POD", "web", "ns", "u", 3); got != "k8s_POD_web_ns_u_3" {
		t.Error(got)
	}
}
