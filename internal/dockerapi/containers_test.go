package dockerapi_test

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/network"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestVersions(t *testing.T) {
	n := newLiveNode(t)
	for _, tc := range []struct {
		path   string
		status int
		text   string
	}{
		{"/v1.56/containers/json", 200, "[]"},
		{"/v1.40/containers/json", 200, "[]"},
		{"/containers/json", 200, "[]"},
		{"/v1.39/containers/json", 400, "client version 1.39 is too old. Minimum supported API version is 1.40, please upgrade your client to a newer version"},
		{"/v1.57/containers/json", 400, "client version 1.57 is too new. Maximum supported API version is 1.56"},
		{"/v2.0/containers/json", 400, "client version 2.0 is too new"},
		{"/nothing", 404, `{"message":"page not found"}`},
		{"/v1.56/nothing/here", 404, `{"message":"page not found"}`},
		{"/vx/containers/json", 404, "page not found"},
		{"/services", 503, "This node is not a swarm manager"},
		{"/containers/x/export", 501, "docker export is not supported yet by Berth"},
	} {
		status, body := n.call("GET", tc.path, "")
		if status != tc.status || !strings.Contains(body, tc.text) {
			t.Errorf("GET %s: %d %s; want %d %s", tc.path, status, body, tc.status, tc.text)
		}
	}
	if status, body := n.call("DELETE", "/containers/json/x", ""); status != 404 || !strings.Contains(body, "page not found") {
		t.Errorf("wrong method: %d %s", status, body)
	}
}

func TestMalformedBodies(t *testing.T) {
	n := newLiveNode(t)
	for _, tc := range []struct{ body, text string }{
		{`{"Image":`, "invalid JSON: "},
		{`{"Image":"busybox"} {}`, "unexpected content after JSON"},
		{`{"Image":5}`, "invalid JSON: "},
		{`null`, "config cannot be empty in order to create a container"},
		{`{"HostConfig":{}}`, "config cannot be empty in order to create a container"},
		{`{"Image":"` + strings.Repeat("x", 5<<20) + `"}`, "larger than"},
		{`{"Image":"busybox","HostConfig":{"Dns":["nonsense"]}}`, "invalid JSON"},
	} {
		n.refuse(400, tc.text, "POST", "/containers/create", tc.body)
	}
	// What a message quotes of the request is bounded.
	if status, body := n.call("POST", "/containers/create?name=-"+strings.Repeat("x", 1<<18), `{"Image":"busybox"}`); status != 400 || len(body) > 4096 || !strings.Contains(body, "…") {
		t.Errorf("a long name: %d %.100q… of %d bytes", status, body, len(body))
	}
	resp, err := n.client.Post("http://docker/containers/create", "text/plain", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 400 {
		t.Errorf("text/plain: %d", resp.StatusCode)
	}
}

// TestCreateRefusals: what Berth lacks is refused by name, what makes no sense in docker's
// words, and nothing is left behind.
func TestCreateRefusals(t *testing.T) {
	n := newLiveNode(t)
	host := func(field string) string { return `{"Image":"busybox","Cmd":["sh"],"HostConfig":{` + field + `}}` }
	conf := func(field string) string { return `{"Image":"busybox","Cmd":["sh"],` + field + `}` }
	for _, tc := range []struct {
		body   string
		status int
		text   string
	}{
		{host(`"BlkioWeight":300`), 501, "HostConfig.BlkioWeight is not supported"},
		{host(`"Links":["a:b"]`), 501, "HostConfig.Links is not supported"},
		{host(`"DeviceRequests":[{"Count":-1}]`), 501, "HostConfig.DeviceRequests is not supported"},
		{host(`"StorageOpt":{"size":"1G"}`), 501, "HostConfig.StorageOpt is not supported"},
		{host(`"MemorySwappiness":10`), 501, "HostConfig.MemorySwappiness is not supported"},
		{host(`"Umask":18`), 501, "HostConfig.Umask is not supported"},
		{host(`"IpcMode":"none"`), 501, "HostConfig.IpcMode none"},
		{host(`"Runtime":"kata"`), 400, "unknown or invalid runtime name: kata"},
		{host(`"LogConfig":{"Type":"syslog"}`), 501, `log driver "syslog" is not supported`},
		{host(`"LogConfig":{"Type":"json-file","Config":{"tag":"x"}}`), 501, "log option tag=x"},
		{host(`"SecurityOpt":["label=type:x"]`), 501, "label=type:x"},
		{host(`"SecurityOpt":["apparmor=mine"]`), 501, "apparmor=mine"},
		{host(`"CgroupnsMode":"private"`), 501, "HostConfig.CgroupnsMode private"},
		{host(`"CapAdd":["BOGUS"]`), 400, "invalid CapAdd"},
		{host(`"Memory":1024`), 400, "Minimum memory limit allowed is 6MB"},
		{host(`"NanoCpus":900000000000`), 400, "range of CPUs is from 0.01 to "},
		{host(`"CpusetCpus":"4096"`), 400, "Requested CPUs are not available - requested 4096"},
		{host(`"Memory":33554432,"MemorySwap":16777216`), 400, "Minimum memoryswap limit should be larger than memory limit"},
		{host(`"AutoRemove":true,"RestartPolicy":{"Name":"always"}`), 400, "can't create 'AutoRemove' container with restart policy"},
		{host(`"RestartPolicy":{"Name":"sometimes"}`), 400, "unknown policy 'sometimes'"},
		{host(`"NetworkMode":"nope"`), 400, "network nope not found"},
		{host(`"NetworkMode":"container:nope"`), 400, "No such container: nope"},
		{host(`"Binds":["a:b:c:d"]`), 400, "invalid volume specification: 'a:b:c:d'"},
		{host(`"Binds":["/x:/y:what"]`), 400, "invalid mode: what"},
		{host(`"Binds":["/x:/"]`), 400, "destination can't be '/'"},
		{host(`"Binds":["/x:/y","/z:/y"]`), 400, "Duplicate mount point: /y"},
		{host(`"Mounts":[{"Type":"bind","Source":"/not/there","Target":"/y"}]`), 400, "bind source path does not exist: /not/there"},
		{host(`"Mounts":[{"Type":"image","Source":"x","Target":"/y"}]`), 501, "mounts of type image"},
		{host(`"Mounts":[{"Type":"volume","Source":"v","Target":"/y","BindOptions":{}}]`), 400, "BindOptions must not be specified"},
		{host(`"PortBindings":{"80/tcp":[{"HostPort":"x"}]}`), 400, "invalid port specification"},
		{host(`"PortBindings":{"80/foo":[{"HostPort":"1"}]}`), 400, "protocol must be tcp, udp or sctp"},
		{host(`"ExtraHosts":["nonsense"]`), 400, "bad format for add-host"},
		{host(`"Ulimits":[{"Name":"bogus","Soft":1,"Hard":1}]`), 400, "bogus"},
		{conf(`"WorkingDir":"relative"`), 400, "needs to be an absolute path"},
		{conf(`"StopSignal":"SIGNONE"`), 400, "invalid signal"},
		{conf(`"Healthcheck":{"Test":["BAD","x"]}`), 400, "Unknown healthcheck type 'BAD'"},
		{conf(`"MacAddress":"02:42:ac:11:00:09"`), 400, "Config.MacAddress is not supported since API version 1.52"},
		{`{"Image":"nothere"}`, 404, "No such image: nothere:latest"},
		{`{"Image":"busybox","Cmd":[""]}`, 400, "no command specified"},
		{`{"Image":"busybox","Cmd":["sh"],"NetworkingConfig":{"EndpointsConfig":{"bridge":{"DriverOpts":{"a":"b"}}}}}`, 501, "DriverOpts"},
	} {
		n.refuse(tc.status, tc.text, "POST", "/containers/create", tc.body)
	}
	n.refuse(400, "Invalid container name (-x), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", "POST", "/containers/create?name=-x", host(""))
	if len(n.engine.containers)+len(n.engine.sandboxes)+len(n.volumes.list) != 0 {
		t.Errorf("left behind: %d containers, %d sandboxes, %d volumes", len(n.engine.containers), len(n.engine.sandboxes), len(n.volumes.list))
	}
}

func TestCreateFailureLeavesNothing(t *testing.T) {
	n := newLiveNode(t)
	n.engine.failCreate = errdefs.New(errdefs.ErrExhausted, "no space left on device")
	n.refuse(500, "no space left", "POST", "/containers/create", `{"Image":"busybox","Volumes":{"/a":{}},"HostConfig":{"Binds":["data:/d"]}}`)
	if len(n.engine.sandboxes)+len(n.volumes.list) != 0 {
		t.Errorf("left behind: %d sandboxes, %d volumes", len(n.engine.sandboxes), len(n.volumes.list))
	}
}

func TestNameConflict(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("web", `{"Image":"busybox"}`)
	n.refuse(409, `Conflict. The container name "/web" is already in use by container "`+c.Config.ID+`". You have to remove (or rename) that container to be able to reuse that name.`,
		"POST", "/containers/create?name=/web", `{"Image":"busybox"}`)
	if len(n.engine.sandboxes) != 1 {
		t.Errorf("%d sandboxes", len(n.engine.sandboxes))
	}
}

// TestCreateConversion: one request with nearly everything, and what the engine is told.
func TestCreateConversion(t *testing.T) {
	n := newLiveNode(t)
	dir := t.TempDir()
	c := n.create("web", `{
		"Image":"busybox","Cmd":["echo","hi"],"Env":["A=1","PATH=/mine"],"User":"1:2","WorkingDir":"/w","Tty":true,"OpenStdin":true,"StdinOnce":true,
		"Labels":{"x":"y"},"StopSignal":"SIGINT","StopTimeout":0,"ExposedPorts":{"9/udp":{}},"Volumes":{"/anon":{}},"Hostname":"h","Domainname":"d",
		"Healthcheck":{"Test":["CMD-SHELL","probe it"],"Retries":5},
		"HostConfig":{
			"Binds":["`+dir+`:/b:ro,rslave","data:/d:nocopy","shared:/s:z"],
			"Mounts":[{"Type":"volume","Source":"mv","Target":"/mv","VolumeOptions":{"Labels":{"l":"1"}}},{"Type":"tmpfs","Target":"/t","TmpfsOptions":{"SizeBytes":1048576,"Mode":448}}],
			"Tmpfs":{"/run":"size=64k,mode=1770,noexec"},
			"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"}]},"PublishAllPorts":true,
			"NetworkMode":"shop","Dns":["9.9.9.9"],"DnsSearch":["s"],"DnsOptions":["o"],"ExtraHosts":["up:host-gateway","v6:::1"],
			"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3},"Memory":33554432,"NanoCpus":500000000,"PidsLimit":7,
			"CapAdd":["NET_ADMIN"],"CapDrop":["ALL"],"SecurityOpt":["no-new-privileges:true","seccomp=unconfined"],"ReadonlyRootfs":true,
			"Devices":[{"PathOnHost":"/dev/null","PathInContainer":"/dev/x","CgroupPermissions":"r"}],"GroupAdd":["27"],"Init":true,
			"PidMode":"host","IpcMode":"host","ShmSize":1048576,"OomScoreAdj":-5,"MaskedPaths":[],"ReadonlyPaths":[],
			"Ulimits":[{"Name":"nofile","Soft":10,"Hard":20}],"Sysctls":{"net.core.somaxconn":"10"},"MemorySwappiness":-1,"OomKillDisable":false,
			"LogConfig":{"Type":"json-file","Config":{"max-size":"1m","max-file":"2"}},"ConsoleSize":[24,80],"Runtime":"runc"
		},
		"NetworkingConfig":{"EndpointsConfig":{"shop":{"Aliases":["front"],"IPAMConfig":{"IPv4Address":"172.20.0.9"},"MacAddress":"02:42:ac:14:00:09"}}}
	}`)
	img := n.images.list[0]
	want := engine.ContainerConfig{
		ID: c.Config.ID, Name: "web", Owner: engine.OwnerDocker, Sandbox: c.Config.ID,
		Labels: map[string]string{"x": "y", "from": "image"}, Image: "busybox", ImageID: img.ID.String(),
		Args: []string{"echo", "hi"}, Env: []string{"A=1", "PATH=/mine"}, Cwd: "/w", User: "1:2", Groups: []string{"27"},
		Terminal: true, ConsoleSize: [2]uint16{24, 80}, OpenStdin: true, StdinOnce: true, Init: true, ReadOnlyRootfs: true,
		Mounts: []engine.Mount{
			{Kind: "bind", Source: dir, Target: "/b", ReadOnly: true, Propagation: "rslave", CreateSource: true},
			{Kind: "volume", Source: "data", Target: "/d", NoCopy: true},
			{Kind: "volume", Source: "shared", Target: "/s"},
			{Kind: "volume", Source: "mv", Target: "/mv"},
			{Kind: "tmpfs", Target: "/t", SizeBytes: 1 << 20, Mode: 0o700},
			{Kind: "tmpfs", Target: "/run", SizeBytes: 64 << 10, Mode: 0o1770, Options: []string{"noexec"}},
			{Kind: "volume", Source: hexID("e"), Target: "/anon", Anonymous: true},
		},
		Resources: engine.Resources{
			MemoryBytes: 32 << 20, CPUQuota: 50000, CPUPeriod: 100000, PidsLimit: 7,
			Ulimits: []engine.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}},
		},
		Security: engine.Security{
			CapAdd: []string{"NET_ADMIN"}, CapDrop: []string{"ALL"}, NoNewPrivileges: true, Seccomp: "unconfined",
			MaskedPaths: []string{}, ReadOnlyPaths: []string{},
		},
		Devices: []engine.Device{{HostPath: "/dev/null", Path: "/dev/x", Permissions: "r"}},
		HostPID: true, OOMScoreAdj: -5, Sysctls: map[string]string{"net.core.somaxconn": "10"},
		StopSignal: "SIGINT", StopTimeout: time.Nanosecond, Restart: engine.RestartPolicy{Name: "on-failure", MaxRetries: 3},
		Health: &engine.HealthCheck{
			Args: []string{"/bin/sh", "-c", "probe it"}, Interval: time.Second, Timeout: 30 * time.Second, StartInterval: 5 * time.Second, Retries: 5,
		},
		Log: engine.LogConfig{Driver: "json-file", MaxBytes: 1000000, MaxFiles: 2},
	}
	if diff := cmp.Diff(want, c.Config, cmpopts.IgnoreFields(engine.ContainerConfig{}, "Dialect")); diff != "" {
		t.Errorf("container (-want +got):\n%s", diff)
	}
	box, err := n.engine.Sandbox(c.Config.ID)
	if err != nil {
		t.Fatal(err)
	}
	shop, _ := n.networks.Get("shop")
	wantBox := engine.SandboxConfig{
		ID: c.Config.ID, Owner: engine.OwnerDocker, Hostname: "h", Domainname: "d", HostIPC: true, ShmBytes: 1 << 20,
		Endpoints: []engine.EndpointConfig{{
			Network: shop.ID, Aliases: []string{"front"},
			Address: netip.MustParseAddr("172.20.0.9"), MAC: "02:42:ac:14:00:09",
		}},
		Ports: []network.Port{
			{Protocol: "udp", Port: 9},
			{Protocol: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, Port: 80},
		},
		DNS:        engine.DNSConfig{Servers: []string{"9.9.9.9"}, Searches: []string{"s"}, Options: []string{"o"}},
		ExtraHosts: []string{"up:172.20.0.1", "v6:::1"},
	}
	if diff := cmp.Diff(wantBox, box.Config, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("sandbox (-want +got):\n%s", diff)
	}
	if len(n.volumes.list) != 4 {
		t.Errorf("volumes: %v", n.volumes.list)
	}
}

func TestImageDefaultsAndEntrypoints(t *testing.T) {
	n := newLiveNode(t)
	n.images.list[0].Config.Config.Entrypoint = []string{"/entry"}
	for _, tc := range []struct {
		body string
		want []string
	}{
		{`{"Image":"busybox"}`, []string{"/entry", "sh"}},
		{`{"Image":"busybox","Cmd":["x"]}`, []string{"/entry", "x"}},
		{`{"Image":"busybox","Entrypoint":["/e"]}`, []string{"/e"}},
		{`{"Image":"busybox","Entrypoint":[""],"Cmd":["x"]}`, []string{"x"}},
		{`{"Image":"busybox","Entrypoint":["/e"],"Cmd":["x"]}`, []string{"/e", "x"}},
	} {
		c := n.create("", tc.body)
		if diff := cmp.Diff(tc.want, c.Config.Args); diff != "" {
			t.Errorf("%s: %s", tc.body, diff)
		}
		if c.Config.Health == nil || c.Config.Env[0] != "PATH=/bin" {
			t.Errorf("%s: image's settings are missing: %+v", tc.body, c.Config)
		}
	}
	c := n.create("", `{"Image":"busybox","Healthcheck":{"Test":["NONE"]}}`)
	if c.Config.Health != nil {
		t.Errorf("NONE: %+v", c.Config.Health)
	}
}

func TestNetworkModes(t *testing.T) {
	n := newLiveNode(t)
	host := n.create("onhost", `{"Image":"busybox","HostConfig":{"NetworkMode":"host","PortBindings":{"80/tcp":[{"HostPort":"1"}]}}}`)
	box, _ := n.engine.Sandbox(host.Config.Sandbox)
	if box.Config.Network != engine.NetworkHost || box.Config.Hostname != "harbour" || len(box.Config.Ports) != 0 {
		t.Errorf("host: %+v", box.Config)
	}
	none := n.create("alone", `{"Image":"busybox","HostConfig":{"NetworkMode":"none"}}`)
	if box, _ := n.engine.Sandbox(none.Config.Sandbox); box.Config.Network != engine.NetworkNone {
		t.Errorf("none: %+v", box.Config)
	}
	joined := n.create("joined", `{"Image":"busybox","HostConfig":{"NetworkMode":"container:alone"}}`)
	if joined.Config.Sandbox != none.Config.ID {
		t.Errorf("joined sandbox %s", joined.Config.Sandbox)
	}
	for _, tc := range []struct{ field, text string }{
		{`"PortBindings":{"80/tcp":[{}]}`, "conflicting options: port publishing and the container type network mode"},
		{`"Dns":["1.1.1.1"]`, "conflicting options: dns and the network mode"},
		{`"ExtraHosts":["a:1.1.1.1"]`, "conflicting options: custom host-to-IP mapping and the network mode"},
	} {
		n.refuse(400, tc.text, "POST", "/containers/create", `{"Image":"busybox","HostConfig":{"NetworkMode":"container:alone",`+tc.field+`}}`)
	}
	two := n.create("two", `{"Image":"busybox","HostConfig":{"NetworkMode":"shop"},"NetworkingConfig":{"EndpointsConfig":{"bridge":{},"shop":{}}}}`)
	box, _ = n.engine.Sandbox(two.Config.Sandbox)
	shop, _ := n.networks.Get("shop")
	if len(box.Config.Endpoints) != 2 || box.Config.Endpoints[0].Network != shop.ID {
		t.Errorf("two: %+v", box.Config.Endpoints)
	}
	n.refuse(400, "Container cannot be created with multiple network endpoints: bridge, shop", "POST", "/v1.43/containers/create",
		`{"Image":"busybox","HostConfig":{"NetworkMode":"shop"},"NetworkingConfig":{"EndpointsConfig":{"bridge":{},"shop":{}}}}`)
	old := n.create("old", `{"Image":"busybox","HostConfig":{"NetworkMode":"default"},"NetworkingConfig":{"EndpointsConfig":{"default":{}}}}`)
	if box, _ := n.engine.Sandbox(old.Config.Sandbox); len(box.Config.Endpoints) != 1 {
		t.Errorf("default: %+v", box.Config.Endpoints)
	}
}

// golden compares an answer with a file; IDs and times are made the same first.
func golden(t *testing.T, name, got string, replace ...string) {
	t.Helper()
	got = strings.NewReplacer(replace...).Replace(got)
	got = regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`).ReplaceAllStringFunc(got, func(s string) string {
		if strings.HasPrefix(s, "0001-") {
			return s
		}
		return "TIME"
	})
	got = regexp.MustCompile(`"Created":\d+`).ReplaceAllString(got, `"Created":1`)
	got = regexp.MustCompile(`"EndpointID":"[0-9a-f]{64}"`).ReplaceAllString(got, `"EndpointID":"ENDPOINT"`)
	got = regexp.MustCompile(`Up [^"(]*`).ReplaceAllString(got, `Up SOMETIME`)
	var v any
	if err := json.Unmarshal([]byte(got), &v); err != nil {
		t.Fatal(err)
	}
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, '\n')
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(data)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestInspectAndListShapes(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("web", `{"Image":"busybox","Cmd":["sleep","a b"],"OpenStdin":true,"ExposedPorts":{"81/tcp":{}},
		"HostConfig":{"NetworkMode":"bridge","PortBindings":{"80/tcp":[{"HostPort":"8080"}]},"Binds":["/:/host:ro","data:/d"],"Tmpfs":{"/t":""},"Memory":33554432,"NanoCpus":1000000000}}`)
	same := []string{c.Config.ID, "CONTAINER", c.Config.ID[:12], "SHORT", c.Config.ImageID, "IMAGE", c.Config.ID[:6], "SHORT6"}
	n.must(204, "POST", "/containers/web/start", "", nil)
	golden(t, "inspect-1.40.json", n.must(200, "GET", "/v1.40/containers/web/json?size=1", "", nil), same...)
	golden(t, "inspect-1.56.json", n.must(200, "GET", "/v1.56/containers/web/json", "", nil), same...)
	golden(t, "list-1.44.json", n.must(200, "GET", "/v1.44/containers/json?size=1", "", nil), same...)
	golden(t, "list-1.56.json", n.must(200, "GET", "/containers/json", "", nil), same...)
}

func TestForeignContainerIsShown(t *testing.T) {
	n := newLiveNode(t)
	n.engine.sandboxes = append(n.engine.sandboxes, engine.Sandbox{Config: engine.SandboxConfig{ID: hexID("b"), Owner: engine.OwnerCRI}})
	n.engine.containers = append(n.engine.containers, &liveContainer{Container: engine.Container{
		Config: engine.ContainerConfig{ID: hexID("a"), Name: "k8s_app", Owner: engine.OwnerCRI, Sandbox: hexID("b"), Args: []string{"app"}, Image: "gone", ImageID: "sha256:1"},
		State:  engine.ContainerState{Status: engine.StatusExited, ExitCode: 1, Created: epoch, StartedAt: epoch, FinishedAt: epoch},
	}})
	var list []struct{ Image, State string }
	n.must(200, "GET", "/containers/json?all=1", "", &list)
	if len(list) != 1 || list[0].Image != "sha256:1" || list[0].State != "exited" {
		t.Errorf("list: %+v", list)
	}
	var one struct {
		Config     struct{ Cmd []string }
		HostConfig struct{ NetworkMode string }
	}
	n.must(200, "GET", "/containers/k8s_app/json", "", &one)
	if one.HostConfig.NetworkMode != "container:"+hexID("b") || len(one.Config.Cmd) != 1 {
		t.Errorf("inspect: %+v", one)
	}
}

func TestListFilters(t *testing.T) {
	n := newLiveNode(t)
	n.create("web-1", `{"Image":"busybox","Cmd":["sleep"],"Labels":{"app":"web","tier":"front"},"Healthcheck":{"Test":["NONE"]},"HostConfig":{"NetworkMode":"shop","Binds":["data:/d"],"PortBindings":{"80/tcp":[{"HostPort":"8080"}]},"Annotations":{"a":"1"}}}`)
	n.create("web-2", `{"Image":"busybox","Cmd":["both"],"Labels":{"app":"web"},"Healthcheck":{"Test":["NONE"]}}`)
	n.create("db", `{"Image":"busybox","Cmd":["sleep"],"Healthcheck":{"Test":["CMD","x"]}}`)
	n.must(204, "POST", "/containers/web-1/start", "", nil)
	n.must(204, "POST", "/containers/web-2/start", "", nil)
	n.must(200, "POST", "/containers/web-2/wait", "", nil)
	for _, tc := range []struct{ query, want string }{
		{"", "web-1"},
		{"all=1", "db web-2 web-1"},
		{"limit=2", "db web-2"},
		{`filters={"name":["web"]}&all=1`, "web-2 web-1"},
		{`filters={"name":["^/?web-1$"]}`, "web-1"},
		{`filters={"label":["app=web","tier"]}&all=1`, "web-1"},
		{`filters={"label":{"app=web":true}}&all=1`, "web-2 web-1"},
		{`filters={"status":["exited"]}`, "web-2"},
		{`filters={"status":["created","running"]}`, "db web-1"},
		{`filters={"exited":["3"]}&all=1`, "web-2"},
		{`filters={"health":["none"]}&all=1`, "db web-2 web-1"},
		{`filters={"ancestor":["busybox"]}&all=1`, "db web-2 web-1"},
		{`filters={"ancestor":["nothing"]}&all=1`, ""},
		{`filters={"before":["db"]}&all=1`, "web-2 web-1"},
		{`filters={"since":["web-1"]}&all=1`, "db web-2"},
		{`filters={"volume":["data"]}`, "web-1"},
		{`filters={"volume":["/d"]}`, "web-1"},
		{`filters={"network":["shop"]}&all=1`, "web-1"},
		{`filters={"publish":["8080/tcp"]}`, "web-1"},
		{`filters={"expose":["80"]}`, "web-1"},
		{`filters={"publish":["1-9/udp"]}`, ""},
		{`filters={"is-task":["true"]}&all=1`, ""},
		{`filters={"annotation":["a=1"]}`, "web-1"},
	} {
		var list []struct{ Names []string }
		n.must(200, "GET", "/containers/json?"+strings.NewReplacer("{", "%7B", "}", "%7D", `"`, "%22", "^", "%5E", "[", "%5B", "]", "%5D").Replace(tc.query), "", &list)
		var names []string
		for _, c := range list {
			names = append(names, strings.TrimPrefix(c.Names[0], "/"))
		}
		if got := strings.Join(names, " "); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.query, got, tc.want)
		}
	}
	n.refuse(400, "invalid filter 'bogus'", "GET", "/containers/json?filters=%7B%22bogus%22%3A%5B%22x%22%5D%7D", "")
	n.refuse(400, "invalid filter 'annotation'", "GET", "/v1.55/containers/json?filters=%7B%22annotation%22%3A%5B%22x%22%5D%7D", "")
	n.refuse(400, "invalid filter 'status=odd'", "GET", "/containers/json?filters=%7B%22status%22%3A%5B%22odd%22%5D%7D", "")
	n.refuse(404, "No such container: nobody", "GET", "/containers/json?filters=%7B%22before%22%3A%5B%22nobody%22%5D%7D", "")
}

func TestLifecycleAnswers(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("web", `{"Image":"busybox","Cmd":["sleep"],"OpenStdin":true}`)
	n.must(204, "POST", "/containers/web/start", "", nil)
	if status, body := n.call("POST", "/containers/web/start", ""); status != 304 || body != "" {
		t.Errorf("second start: %d %q", status, body)
	}
	n.refuse(409, "container is running: stop the container before removing or force remove", "DELETE", "/containers/web", "")
	n.must(204, "POST", "/containers/web/stop?t=1", "", nil)
	n.must(304, "POST", "/containers/web/stop", "", nil)
	n.refuse(409, "cannot kill container: web: container "+c.Config.ID+" is not running", "POST", "/containers/web/kill", "")
	n.refuse(404, "No such container: nobody", "POST", "/containers/nobody/start", "")
	n.refuse(400, "invalid resize height", "POST", "/containers/web/resize?h=x&w=1", "")
	n.refuse(400, "Neither old nor new names may be empty", "POST", "/containers/web/rename", "")
	n.refuse(400, "non-empty request body", "POST", "/containers/web/start", `{"Binds":["a:b"]}`)
	n.refuse(400, "invalid condition", "POST", "/containers/web/wait?condition=soon", "")
	n.must(204, "DELETE", "/containers/web?v=1", "", nil)

	n.create("lost", `{"Image":"busybox","Cmd":["missing"]}`)
	n.refuse(400, `failed to create task for container: exec: "missing": executable file not found in $PATH: unknown`, "POST", "/containers/lost/start", "")
	n.create("locked", `{"Image":"busybox","Cmd":["locked"]}`)
	n.refuse(400, "permission denied", "POST", "/containers/locked/start", "")
}

func TestUpdate(t *testing.T) {
	n := newLiveNode(t)
	n.create("web", `{"Image":"busybox","HostConfig":{"Memory":33554432,"NanoCpus":500000000}}`)
	n.must(200, "POST", "/containers/web/update", `{"Memory":67108864,"MemorySwap":-1,"RestartPolicy":{"Name":"always"}}`, nil)
	c, _ := n.engine.Container("web")
	want := engine.Resources{MemoryBytes: 64 << 20, MemorySwapBytes: -1, CPUQuota: 50000, CPUPeriod: 100000}
	if diff := cmp.Diff(want, c.Config.Resources); diff != "" || c.Config.Restart.Name != "always" {
		t.Errorf("%s %+v", diff, c.Config.Restart)
	}
	n.refuse(400, "Minimum memory limit allowed is 6MB", "POST", "/containers/web/update", `{"Memory":1}`)
	n.refuse(501, "HostConfig.BlkioWeight is not supported", "POST", "/containers/web/update", `{"BlkioWeight":10}`)
	var out struct {
		HostConfig struct {
			Memory, MemorySwap, NanoCpus int64
			RestartPolicy                struct{ Name string }
		}
	}
	n.must(200, "GET", "/containers/web/json", "", &out)
	if out.HostConfig.Memory != 64<<20 || out.HostConfig.MemorySwap != -1 || out.HostConfig.NanoCpus != 5e8 || out.HostConfig.RestartPolicy.Name != "always" {
		t.Errorf("inspect: %+v", out)
	}
}

func TestStatsAndTop(t *testing.T) {
	n := newLiveNode(t)
	n.create("web", `{"Image":"busybox","Cmd":["sleep"],"OpenStdin":true}`)
	var st struct {
		Name        string
		MemoryStats struct{ Usage, Limit uint64 } `json:"memory_stats"`
		CPUStats    struct {
			CPUUsage   struct{ TotalUsage uint64 }
			OnlineCPUs int `json:"online_cpus"`
		} `json:"cpu_stats"`
		PidsStats struct{ Current int } `json:"pids_stats"`
	}
	n.must(200, "GET", "/containers/web/stats?stream=0", "", &st)
	if st.Name != "/web" || st.MemoryStats.Usage != 0 {
		t.Errorf("stopped: %+v", st)
	}
	n.must(204, "POST", "/containers/web/start", "", nil)
	n.must(200, "GET", "/containers/web/stats?stream=0&one-shot=1", "", &st)
	if st.MemoryStats.Usage != 1<<20 || st.MemoryStats.Limit == 0 || st.PidsStats.Current != 3 || st.CPUStats.OnlineCPUs == 0 {
		t.Errorf("running: %+v", st)
	}
	n.refuse(501, "ps options", "GET", "/containers/web/top?ps_args=aux", "")
}

// FuzzCreate feeds bodies to the creation of containers: it must answer, and with an error
// leave nothing behind.
func FuzzCreate(f *testing.F) {
	for _, seed := range []string{
		`{"Image":"busybox"}`, `{"Image":"busybox","HostConfig":{"Binds":["a:/b:ro"],"PortBindings":{"80/tcp":[{"HostPort":"1-2"}]}}}`,
		`{"Image":"busybox","HostConfig":{"Mounts":[{"Type":"tmpfs","Target":"/x"}],"Ulimits":[null]}}`,
		`{"Image":"busybox","NetworkingConfig":{"EndpointsConfig":{"shop":null}}}`, `{"Healthcheck":{"Test":["CMD"]}}`, `[]`, `{`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, body string) {
		n := newNode(t)
		e := newLiveEngine(n.events)
		live := newServerOver(n, e)
		status, answer := serve(live, "POST", "/containers/create", body)
		switch {
		case status == 201 && len(e.containers) == 1:
		case status >= 400 && status < 600 && status != 500 && len(e.containers) == 0 && len(e.sandboxes) == 0:
		default:
			t.Errorf("%s: %d %s, %d containers, %d sandboxes", body, status, answer, len(e.containers), len(e.sandboxes))
		}
	})
}
