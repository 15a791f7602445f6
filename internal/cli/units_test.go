package cli_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/cli"
	"berth/internal/state"
)

func TestRequest(t *testing.T) {
	dir := t.TempDir()
	envFile := filepath.Join(dir, "env")
	if err := os.WriteFile(envFile, []byte("# words\nA=1\n\nHOME\nNOT_SET\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	lookup := func(name string) (string, bool) { return "/home/x", name == "HOME" }
	for _, tt := range []struct {
		args string
		want string // part of the JSON, as JSON
	}{
		{"--env-file " + envFile + " -e B=2 -e C= box", `{"Env":["A=1","HOME=/home/x","B=2","C="]}`},
		{"box sh -c ls", `{"Image":"box","Cmd":["sh","-c","ls"]}`},
		{"--entrypoint  box", `{"Entrypoint":[""]}`},
		{"-it box", `{"Tty":true,"OpenStdin":true,"StdinOnce":true,"AttachStdin":true}`},
		{"-itd box", `{"Tty":true,"OpenStdin":true}`},
		{"-m 512m --memory-swap -1 --cpus 1.5 --pids-limit 0 --shm-size 64m box",
			`{"HostConfig":{"Memory":536870912,"MemorySwap":-1,"NanoCpus":1500000000,"PidsLimit":0,"ShmSize":67108864}}`},
		{"-p 8080:80 -p 127.0.0.1:53:53/udp -p [::1]::22 -p 90-91:90-91 box", `{"HostConfig":{"PortBindings":{
			"80/tcp":[{"HostIp":"","HostPort":"8080"}],"53/udp":[{"HostIp":"127.0.0.1","HostPort":"53"}],
			"22/tcp":[{"HostIp":"::1","HostPort":""}],"90/tcp":[{"HostIp":"","HostPort":"90"}],"91/tcp":[{"HostIp":"","HostPort":"91"}]}}}`},
		{"-v /a:/b:ro -v data:/d -v /anon --tmpfs /t:size=1m box",
			`{"Volumes":{"/anon":{}},"HostConfig":{"Binds":["/a:/b:ro","data:/d"],"Tmpfs":{"/t":"size=1m"}}}`},
		{"--mount type=bind,src=/a,dst=/b,ro,bind-propagation=rslave --mount type=tmpfs,dst=/t,tmpfs-size=1k,tmpfs-mode=1777 box",
			`{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/a","Target":"/b","ReadOnly":true,"BindOptions":{"Propagation":"rslave"}},
			{"Type":"tmpfs","Target":"/t","TmpfsOptions":{"SizeBytes":1024,"Mode":1023}}]}}`},
		{"--network n1 --network n2 --network-alias x --ip 10.0.0.9 box",
			`{"HostConfig":{"NetworkMode":"n1"},"NetworkingConfig":{"EndpointsConfig":{"n1":{"IPAMConfig":{"IPv4Address":"10.0.0.9"},"Aliases":["x"]},"n2":{}}}}`},
		{"--restart on-failure:3 --init --privileged --read-only --cap-add NET_ADMIN box",
			`{"HostConfig":{"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3},"Init":true,"Privileged":true,"ReadonlyRootfs":true,"CapAdd":["NET_ADMIN"]}}`},
		{"--health-cmd ls --health-interval 5s --device /dev/fuse:r box",
			`{"Healthcheck":{"Test":["CMD-SHELL","ls"],"Interval":5000000000},"HostConfig":{"Devices":[{"PathOnHost":"/dev/fuse","PathInContainer":"/dev/fuse","CgroupPermissions":"r"}]}}`},
	} {
		got, err := cli.RequestOf(lookup, strings.Split(tt.args, " "))
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		raw, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		var all, want map[string]any
		if json.Unmarshal(raw, &all) != nil || json.Unmarshal([]byte(tt.want), &want) != nil {
			t.Fatalf("bad JSON in the test %q", tt.args)
		}
		if diff := contains(all, want); diff != "" {
			t.Errorf("%s: %s\nin %s", tt.args, diff, raw)
		}
	}
	for args, want := range map[string]string{
		"--rm --restart always box":               "exclude each other",
		"--restart sometimes box":                 "unknown",
		"--restart always:3 box":                  "only on-failure",
		"-m lots box":                             "not a size",
		"--cpus many box":                         "not a number",
		"-v rel box":                              "absolute",
		"--mount type=bind,src=/a box":            "target is missing",
		"--mount type=nfs,dst=/a box":             "not supported",
		"--mount type=tmpfs,dst=/a,volume-nocopy": "does not belong",
		"--network host --network b box":          "cannot be combined",
		"--network host --ip 1.2.3.4 box":         "need a network",
		"-p 1-5000:1-5000 box":                    "at most",
		"-p 1-3:1-2 box":                          "differ in length",
		"-p 99999:1 box":                          "not a port",
		"-p 80/xyz box":                           "protocol",
		"--env-file /none/such box":               "no such file",
		"--no-healthcheck --health-cmd x box":     "cannot be combined",
		"--pull perhaps box":                      "unknown",
	} {
		if !strings.HasSuffix(args, " box") {
			args += " box"
		}
		if _, err := cli.RequestOf(lookup, strings.Split(args, " ")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", args, err, want)
		}
	}
}

// contains compares the parts of got that want has.
func contains(got, want map[string]any) string {
	for k, w := range want {
		if wm, ok := w.(map[string]any); ok && (k == "HostConfig" || k == "NetworkingConfig") {
			gm, _ := got[k].(map[string]any)
			if diff := contains(gm, wm); diff != "" {
				return diff
			}
			continue
		}
		if diff := cmp.Diff(w, got[k]); diff != "" {
			return k + ": " + diff
		}
	}
	return ""
}

func TestDetachReader(t *testing.T) {
	keys, err := cli.ParseKeys("")
	if err != nil || string(keys) != "\x10\x11" {
		t.Fatalf("%q %v", keys, err)
	}
	for in, want := range map[string]struct {
		out      string
		detached bool
	}{
		"hello":             {"hello", false},
		"a\x10\x11b":        {"a", true},
		"a\x10b":            {"a\x10b", false},
		"\x10\x10\x11":      {"\x10", true},
		"tail\x10":          {"tail\x10", false},
		"\x11\x10x\x10\x11": {"\x11\x10x", true},
	} {
		for _, wrap := range []func(io.Reader) io.Reader{iotest.OneByteReader, func(r io.Reader) io.Reader { return r }} {
			out, err := io.ReadAll(cli.NewDetachReader(wrap(strings.NewReader(in)), keys))
			if string(out) != want.out || cli.IsDetached(err) != want.detached {
				t.Errorf("%q: %q, %v", in, out, err)
			}
		}
	}
	for _, bad := range []string{"ctrl-", "ctrl-1", "ab", "ctrl-a,"} {
		if _, err := cli.ParseKeys(bad); err == nil {
			t.Errorf("%q is taken for keys", bad)
		}
	}
}

func TestParseImage(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string][3]string{
		"busybox":                    {"docker.io", "docker.io/library/busybox", "docker.io/library/busybox:latest"},
		"team/app:v1":                {"docker.io", "docker.io/team/app", "docker.io/team/app:v1"},
		"localhost/app":              {"localhost", "localhost/app", "localhost/app:latest"},
		"reg.test:5000/a/b:t":        {"reg.test:5000", "reg.test:5000/a/b", "reg.test:5000/a/b:t"},
		"reg.test:5000/a@" + digest:  {"reg.test:5000", "reg.test:5000/a", "reg.test:5000/a@" + digest},
		"reg.test/a:t@" + digest:     {"reg.test", "reg.test/a", "reg.test/a@" + digest},
		"index.docker.io/library/bb": {"docker.io", "docker.io/library/bb", "docker.io/library/bb:latest"},
	} {
		host, name, full := cli.ParseImage(in)
		if got := [3]string{host, name, full}; got != want {
			t.Errorf("%s: %v, want %v", in, got, want)
		}
	}
}

func TestParseTime(t *testing.T) {
	now := time.Unix(1_000_000, 5)
	for in, want := range map[string]string{
		"10s": "999990.000000005", "1700000000": "1700000000", "1700000000.5": "1700000000.5",
		"2001-09-09T01:46:40Z": "1000000000.000000000",
	} {
		if got, err := cli.ParseTime(in, now); err != nil || got != want {
			t.Errorf("%s: %s %v", in, got, err)
		}
	}
	if _, err := cli.ParseTime("yesterday", now); err == nil {
		t.Error(errors.New("yesterday is no time"))
	}
}

func TestUnitText(t *testing.T) {
	r, err := state.NewRoot("/srv/my berth")
	if err != nil {
		t.Fatal(err)
	}
	text := cli.UnitText(r, "/opt/berth/bin", []string{"--node-name", "50%"})
	want := `ExecStart="/opt/berth/bin/berth-holder" "--root" "/srv/my berth" "--" "--node-name" "50%%"`
	if !strings.Contains(text, want) || !strings.Contains(text, "KillMode=process") {
		t.Errorf("%s\nwant %s", text, want)
	}
}

func TestHasSocket(t *testing.T) {
	table := "Num       RefCount Protocol Flags    Type St Inode Path\n" +
		"0000: 00000002 00000000 00010000 0001 01 100 /run/x.sock\n0000: 00000003 00000000 00000000 0001 03 101 /run/y.sock\n"
	if !cli.HasSocket(table, "/run/x.sock") || cli.HasSocket(table, "/run/y.sock") || cli.HasSocket(table, "x.sock") {
		t.Error("wrong")
	}
}
