package dockerapi_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/dockerapi"
	"berth/internal/engine"
)

func TestPing(t *testing.T) {
	n := newNode(t)
	for _, target := range []string{"/_ping", "/v1.44/_ping"} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			w := n.exchange(method, target, nil)
			h := w.Header()
			want := ""
			if method == http.MethodGet {
				want = "OK"
			}
			if w.Code != 200 || w.Body.String() != want || h.Get("Api-Version") == "" || h.Get("Builder-Version") != "1" ||
				h.Get("Docker-Experimental") != "false" || h.Get("Swarm") != "inactive" || h.Get("Ostype") != "linux" ||
				h.Get("Cache-Control") != "no-cache, no-store, must-revalidate" || h.Get("Pragma") != "no-cache" {
				t.Errorf("%s %s: %d %q %v", method, target, w.Code, w.Body, h)
			}
		}
	}
}

func TestVersion(t *testing.T) {
	n := newNode(t)
	var v struct {
		Platform                                                     struct{ Name string }
		Version, APIVersion, MinAPIVersion, GitCommit, Os, BuildTime string
		KernelVersion                                                string
		Components                                                   []struct {
			Name    string
			Details map[string]string
		}
	}
	n.get("/version", &v)
	if v.Platform.Name != "Berth" || v.Version != "0.1.0" || v.MinAPIVersion != "1.40" || v.GitCommit != "abcdef0" || v.Os != "linux" ||
		v.BuildTime != "2026-03-01T12:00:00Z" || v.KernelVersion == "" || v.Components[0].Details["ApiVersion"] != v.APIVersion ||
		v.Components[1].Name != "berth-runner" {
		t.Errorf("%+v", v)
	}
}

func TestInfo(t *testing.T) {
	n := newNode(t)
	n.images.add("web:1", epoch, nil, 1)
	n.engine.run(hexID("a"), "one", engine.StatusRunning, "")
	n.engine.run(hexID("b"), "two", engine.StatusPaused, "")
	n.engine.run(hexID("c"), "three", engine.StatusExited, "")
	n.engine.run(hexID("d"), "four", engine.StatusRestarting, "")
	var v map[string]any
	n.get("/v1.52/info", &v)
	for key, want := range map[string]any{
		"ID": "node-id", "Name": "harbour", "Containers": 4.0, "ContainersRunning": 2.0, "ContainersPaused": 1.0, "ContainersStopped": 1.0,
		"Images": 1.0, "Driver": "overlayfs", "CgroupDriver": "cgroupfs", "CgroupVersion": "1", "OSType": "linux", "ServerVersion": "0.1.0",
		"DefaultRuntime": "berth", "LiveRestoreEnabled": true, "LoggingDriver": "json-file", "IndexServerAddress": "https://index.docker.io/v1/",
		"SecurityOptions": []any{"name=seccomp,profile=builtin", "name=cgroupns"},
		"Plugins":         map[string]any{"Volume": []any{"local"}, "Network": []any{"bridge", "host", "null"}, "Authorization": nil, "Log": []any{"json-file", "none"}},
	} {
		if diff := cmp.Diff(want, v[key]); diff != "" {
			t.Errorf("%s: %s", key, diff)
		}
	}
	registries := v["RegistryConfig"].(map[string]any)
	if _, ok := registries["IndexConfigs"].(map[string]any)["registry.test:5000"]; !ok ||
		!strings.Contains(strings.Join(texts(registries["InsecureRegistryCIDRs"]), " "), "10.0.0.0/8") || texts(registries["Mirrors"])[0] != "https://mirror.test/" {
		t.Errorf("registries: %v", registries)
	}
	for _, key := range []string{"NCPU", "MemTotal", "KernelVersion", "OperatingSystem", "Architecture", "SystemTime", "FirewallBackend"} {
		if v[key] == nil || v[key] == 0.0 || v[key] == "" {
			t.Errorf("%s is missing", key)
		}
	}
	for version, keys := range map[string][]string{
		"1.52": nil, "1.51": {"KernelMemoryTCP"}, "1.49": {"KernelMemoryTCP", "BridgeNfIptables"},
		"1.40": {"KernelMemoryTCP", "BridgeNfIptables", "KernelMemory"},
	} {
		var v map[string]any
		n.get("/v"+version+"/info", &v)
		var got []string
		for _, key := range []string{"KernelMemoryTCP", "BridgeNfIptables", "KernelMemory"} {
			if _, ok := v[key]; ok {
				got = append(got, key)
			}
		}
		if diff := cmp.Diff(keys, got); diff != "" {
			t.Errorf("%s: %s", version, diff)
		}
	}
}

func texts(v any) (out []string) {
	for _, one := range v.([]any) {
		out = append(out, one.(string))
	}
	return out
}

func TestHostFacts(t *testing.T) {
	root := fstest.MapFS{}
	for name, content := range map[string]string{
		"proc/meminfo":                            "MemTotal:        2048 kB\nMemFree: 1 kB\n",
		"proc/sys/net/ipv4/ip_forward":            "1\n",
		"etc/os-release":                          "# comment\nPRETTY_NAME=\"Debian GNU/Linux 12\"\nVERSION_ID='12'\n",
		"sys/fs/cgroup/cgroup.controllers":        "cpu memory pids\n",
		"sys/fs/cgroup/memory/memory.oom_control": "",
		"sys/fs/cgroup/cpu/cpu.shares":            "",
	} {
		root[name] = &fstest.MapFile{Data: []byte(content)}
	}
	h := dockerapi.ReadHost(root, "2")
	if h.MemoryBytes != 2048<<10 || h.OperatingSystem != "Debian GNU/Linux 12" || h.OSVersion != "12" || !h.IPv4Forwarding {
		t.Errorf("%+v", h)
	}
	if diff := cmp.Diff([]string{"WARNING: No cpuset support"}, h.Warnings); diff != "" {
		t.Errorf("cgroup v2: %s", diff)
	}
	v1 := strings.Join(dockerapi.ReadHost(root, "1").Warnings, "\n")
	if strings.Contains(v1, "cpu shares") || strings.Contains(v1, "oom kill") || !strings.Contains(v1, "No memory limit support") {
		t.Errorf("cgroup v1: %s", v1)
	}
	empty := dockerapi.ReadHost(fstest.MapFS{}, "2")
	if empty.OperatingSystem != "Linux" || empty.MemoryBytes != 0 {
		t.Errorf("nothing to read: %+v", empty)
	}
}

func TestLogin(t *testing.T) {
	n := newNode(t)
	if status, body := n.do("POST", "/auth", `{"username":"jo","password":"right","serveraddress":"https://r.test/v2/"}`); status != 200 || body != `{"Status":"Login Succeeded"}`+"\n" {
		t.Errorf("%d %s", status, body)
	}
	n.refused("POST", "/auth", `{"username":"jo","password":"wrong","serveraddress":"r.test"}`, 401, "unauthorized: incorrect username or password")
	n.refused("POST", "/auth", `{"serveraddress":"a b"}`, 400, "server address")
	n.refused("POST", "/auth", `{"username":`, 400, "invalid credentials")
	n.refused("POST", "/auth", `"`+strings.Repeat("x", 100<<10)+`"`, 400, "more than")
}

func TestDiskUsage(t *testing.T) {
	n := newNode(t)
	web := n.images.add("web:1", epoch, nil, 100, 20)
	n.images.add("db:2", epoch, nil, 100, 7)
	n.engine.run(hexID("a"), "one", engine.StatusExited, web.ID, engine.Mount{Kind: engine.MountVolume, Source: "data"})
	n.engine.writable = 55
	n.volumes.list = []dockerapi.Volume{{VolumeConfig: dockerapi.VolumeConfig{Name: "data"}}, {VolumeConfig: dockerapi.VolumeConfig{Name: "idle"}}}
	shape := func(target string) map[string]any {
		var v map[string]any
		n.get(target, &v)
		return v
	}
	old := shape("/v1.44/system/df")
	if old["LayersSize"] != 12345.0 || len(old["Images"].([]any)) != 2 || len(old["BuildCache"].([]any)) != 0 {
		t.Errorf("old: %v", old)
	}
	if c := old["Containers"].([]any)[0].(map[string]any); c["SizeRw"] != 55.0 {
		t.Errorf("container: %v", c)
	}
	if u := old["Volumes"].([]any)[0].(map[string]any)["UsageData"].(map[string]any); u["Size"] != 1000.0 || u["RefCount"] != 1.0 {
		t.Errorf("volume: %v", u)
	}
	for _, one := range old["Images"].([]any) {
		if one.(map[string]any)["SharedSize"] != 100.0 {
			t.Errorf("image: %v", one)
		}
	}
	brief := shape("/v1.53/system/df")
	if brief["Images"] != nil || brief["ImageUsage"].(map[string]any)["Items"] != nil {
		t.Errorf("1.53: %v", brief)
	}
	want := map[string]any{"TotalCount": 2.0, "ActiveCount": 1.0, "TotalSize": 2000.0, "Reclaimable": 1000.0}
	if diff := cmp.Diff(want, brief["VolumeUsage"]); diff != "" {
		t.Error(diff)
	}
	want = map[string]any{"TotalCount": 2.0, "ActiveCount": 1.0, "TotalSize": 12345.0, "Reclaimable": 12325.0}
	if diff := cmp.Diff(want, brief["ImageUsage"]); diff != "" {
		t.Error(diff)
	}
	both := shape("/v1.52/system/df?type=image")
	if both["ImageUsage"] == nil || both["Images"] == nil || both["Volumes"] != nil || both["VolumeUsage"] != nil {
		t.Errorf("1.52: %v", both)
	}
	if v := shape("/v1.53/system/df?verbose=1"); len(v["ImageUsage"].(map[string]any)["Items"].([]any)) != 2 {
		t.Errorf("verbose: %v", v)
	}
	n.refused("GET", "/system/df?type=fish", "", 400, "unknown object type: fish")
}

func TestContainerPrune(t *testing.T) {
	n := newNode(t)
	n.engine.writable = 10
	n.engine.run(hexID("a"), "running", engine.StatusRunning, "")
	n.engine.run(hexID("b"), "ended", engine.StatusExited, "")
	n.engine.run(hexID("c"), "keep", engine.StatusExited, "")
	n.engine.run(hexID("d"), "young", engine.StatusCreated, "")
	n.engine.containers[3].State.Created = time.Now()
	n.engine.run(hexID("e"), "pod", engine.StatusExited, "")
	n.engine.containers[4].Config.Owner = engine.OwnerCRI
	status, body := n.do("POST", "/containers/prune?filters="+urlEscape(`{"until":["1h"],"label!":["role=keep"]}`), "")
	if status != 200 || body != `{"ContainersDeleted":["`+hexID("b")+`"],"SpaceReclaimed":10}`+"\n" {
		t.Errorf("%d %s", status, body)
	}
	if diff := cmp.Diff([]string{"container prune"}, n.happened()); diff != "" {
		t.Error(diff)
	}
	n.refused("POST", "/containers/prune?filters="+urlEscape(`{"name":["x"]}`), "", 400, "invalid filter 'name'")
	status, body = n.do("POST", "/build/prune", "")
	var report map[string]any
	if err := json.Unmarshal([]byte(body), &report); err != nil || status != 200 || report["SpaceReclaimed"] != 0.0 {
		t.Errorf("%d %s", status, body)
	}
}
