package dockerapi_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"berth/internal/dockerapi"
	"berth/internal/engine"
)

func volumeNode(t *testing.T) *node {
	n := newNode(t)
	n.volumes.list = []dockerapi.Volume{
		{VolumeConfig: dockerapi.VolumeConfig{Name: "data", Driver: "local", Labels: map[string]string{"app": "db"}}, Path: "/v/data", Created: epoch},
		{VolumeConfig: dockerapi.VolumeConfig{Name: "cache"}, Path: "/v/cache", Created: epoch},
		{VolumeConfig: dockerapi.VolumeConfig{Name: hexID("d"), Anonymous: true}, Path: "/v/anon", Created: epoch},
		{VolumeConfig: dockerapi.VolumeConfig{Name: "share", Options: map[string]string{"type": "tmpfs"}}, Path: "/v/share"},
	}
	n.engine.run(hexID("a"), "web", engine.StatusExited, "", engine.Mount{Kind: engine.MountVolume, Source: "data", Target: "/data"},
		engine.Mount{Kind: engine.MountBind, Source: "cache", Target: "/cache"})
	return n
}

func TestVolumeList(t *testing.T) {
	n := volumeNode(t)
	for filter, want := range map[string]string{
		``:                      "cache data " + hexID("d") + " share",
		`{"dangling":["true"]}`: "cache " + hexID("d") + " share", `{"dangling":["false"]}`: "data",
		`{"name":["^da"]}`: "data", `{"label":["app=db"]}`: "data", `{"driver":["local"],"name":["cache"]}`: "cache",
		`{"driver":["nfs"]}`: "", `{"label":["com.docker.volume.anonymous"]}`: hexID("d"),
	} {
		var list struct{ Volumes []struct{ Name string } }
		n.get("/volumes?filters="+urlEscape(filter), &list)
		var names []string
		for _, v := range list.Volumes {
			names = append(names, v.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s: %q, want %q", filter, got, want)
		}
	}
	n.refused("GET", "/volumes?filters="+urlEscape(`{"until":["1h"]}`), "", 400, "invalid filter 'until'")
	n.refused("GET", "/volumes?filters="+urlEscape(`{"dangling":["x"]}`), "", 400, "invalid filter 'dangling=x'")
}

func TestVolumeLife(t *testing.T) {
	n := volumeNode(t)
	status, body := n.do("GET", "/volumes/data", "")
	var got map[string]any
	if err := json.Unmarshal([]byte(body), &got); err != nil || status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	want := map[string]any{
		"Name": "data", "Driver": "local", "Mountpoint": "/v/data", "Scope": "local", "CreatedAt": "2026-03-01T12:00:00Z",
		"Labels": map[string]any{"app": "db"}, "Options": nil,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for range 2 { // the second time it is there already: no event
		status, body = n.do("POST", "/volumes/create", `{"Name":"logs","DriverOpts":{},"Labels":{"a":"b"}}`)
		if status != 201 || !strings.Contains(body, `"Name":"logs"`) {
			t.Errorf("%d %s", status, body)
		}
	}
	status, body = n.do("POST", "/volumes/create", `{"Driver":"local"}`)
	if status != 201 || !strings.Contains(body, "com.docker.volume.anonymous") {
		t.Errorf("anonymous: %d %s", status, body)
	}
	n.refused("POST", "/volumes/create", `{"Name":"a/b"}`, 400, `create a/b: "a/b" includes invalid characters for a local volume name`)
	n.refused("POST", "/volumes/create", `{"Name":"a"}`, 400, "volume name is too short")
	n.refused("POST", "/volumes/create", `{"Name":"x1","Driver":"nfs"}`, 404, `plugin "nfs" not found`)
	n.refused("POST", "/volumes/create", `{"Name":"x1","ClusterVolumeSpec":{}}`, 501, "ClusterVolumeSpec")
	n.refused("POST", "/volumes/create", `{"Name":3}`, 400, "invalid JSON")
	n.refused("PUT", "/volumes/data", `{}`, 501, "cluster volumes")
	n.refused("GET", "/volumes/nope", "", 404, "get nope: no such volume")
	n.refused("DELETE", "/volumes/nope", "", 404, "get nope: no such volume")
	n.refused("DELETE", "/volumes/data?force=1", "", 409, "remove data: volume is in use - ["+hexID("a")+"]")
	if status, _ := n.do("DELETE", "/volumes/nope?force=true", ""); status != 204 {
		t.Errorf("forced removal of nothing: %d", status)
	}
	if status, _ := n.do("DELETE", "/volumes/logs", ""); status != 204 {
		t.Errorf("removal: %d", status)
	}
	if diff := cmp.Diff([]string{"volume create logs", "volume create " + hexID("e"), "volume destroy logs"}, n.happened()); diff != "" {
		t.Error(diff)
	}
}

func TestVolumePrune(t *testing.T) {
	n := volumeNode(t)
	if _, body := n.do("POST", "/v1.42/volumes/prune", ""); body != `{"VolumesDeleted":["`+hexID("d")+`"],"SpaceReclaimed":1000}`+"\n" {
		t.Error(body)
	}
	if _, body := n.do("POST", "/v1.42/volumes/prune?filters="+urlEscape(`{"all":["true"],"label":["none"]}`), ""); body != `{"VolumesDeleted":[],"SpaceReclaimed":0}`+"\n" {
		t.Error(body)
	}
	if _, body := n.do("POST", "/v1.41/volumes/prune", ""); body != `{"VolumesDeleted":["cache"],"SpaceReclaimed":1000}`+"\n" {
		t.Errorf("API 1.41 takes all unused: %s", body)
	}
	n.refused("POST", "/volumes/prune?filters="+urlEscape(`{"name":["x"]}`), "", 400, "invalid filter 'name'")
}
