package dockerapi_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"go.uber.org/goleak"

	"berth/internal/engine"
	"berth/internal/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hijacked is a client's end of a stream.
type hijacked struct {
	*net.UnixConn
	r    *bufio.Reader
	head http.Header
	code int
}

// hijack sends a POST that asks for the connection.
func (n *liveNode) hijack(path, body string, upgrade bool) *hijacked {
	n.t.Helper()
	c, err := net.Dial("unix", n.socket)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		n.t.Fatal(err)
	}
	head := "POST " + path + " HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n"
	if upgrade {
		head += "Connection: Upgrade\r\nUpgrade: tcp\r\n"
	}
	if _, err := fmt.Fprintf(c, "%sContent-Length: %d\r\n\r\n%s", head, len(body), body); err != nil {
		n.t.Fatal(err)
	}
	h := &hijacked{UnixConn: c.(*net.UnixConn), r: bufio.NewReader(c)}
	resp, err := http.ReadResponse(h.r, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	h.head, h.code = resp.Header, resp.StatusCode
	return h
}

// output reads frames to the end.
func (h *hijacked) output(t *testing.T) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &errs, h.r); err != nil {
		t.Fatalf("after %q %q: %v", out.String(), errs.String(), err)
	}
	return out.String(), errs.String()
}

func TestAttachFrames(t *testing.T) {
	n := newLiveNode(t)
	for _, tc := range []struct {
		path    string
		upgrade bool
		code    int
		kind    string
	}{
		{"/v1.44/containers/%s/attach?stream=1&stdout=1&stderr=1", true, 101, "application/vnd.docker.multiplexed-stream"},
		{"/v1.41/containers/%s/attach?stream=1&stdout=1&stderr=1", true, 101, "application/vnd.docker.raw-stream"},
		{"/containers/%s/attach?stream=1&stdout=1&stderr=1", false, 200, "application/vnd.docker.raw-stream"},
	} {
		c := n.create("", `{"Image":"busybox","Cmd":["both"]}`)
		h := n.hijack(fmt.Sprintf(tc.path, c.Config.ID), "", tc.upgrade)
		if h.code != tc.code || h.head.Get("Content-Type") != tc.kind || h.head.Get("Api-Version") != "1.56" {
			t.Errorf("%s: %d %v", tc.path, h.code, h.head)
		}
		// As docker's client without -i: no input, but the connection stays.
		if err := h.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		n.must(204, "POST", "/containers/"+c.Config.ID+"/start", "", nil)
		if stdout, stderr := h.output(t); stdout != "out\n" || stderr != "err\n" {
			t.Errorf("%s: %q %q", tc.path, stdout, stderr)
		}
	}
}

func TestAttachInputBeforeStart(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("", `{"Image":"busybox","Cmd":["cat"],"OpenStdin":true,"StdinOnce":true}`)
	h := n.hijack("/containers/"+c.Config.ID+"/attach?stream=1&stdin=1&stdout=1&stderr=1", "", true)
	if _, err := io.WriteString(h, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := h.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	n.must(204, "POST", "/containers/"+c.Config.ID+"/start", "", nil)
	if stdout, _ := h.output(t); stdout != "hello" {
		t.Errorf("%q", stdout)
	}
}

func TestAttachLargeOutput(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("", `{"Image":"busybox","Cmd":["big"]}`)
	h := n.hijack("/containers/"+c.Config.ID+"/attach?stream=1&stdout=1", "", true)
	n.must(204, "POST", "/containers/"+c.Config.ID+"/start", "", nil)
	if stdout, _ := h.output(t); len(stdout) != 1<<20 {
		t.Errorf("%d bytes", len(stdout))
	}
}

// TestVanishedClients: handlers end with their clients, however these sit there.
func TestVanishedClients(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("", `{"Image":"busybox","Cmd":["sleep"],"OpenStdin":true}`)
	id := c.Config.ID
	taps := func() int {
		n.engine.mu.Lock()
		defer n.engine.mu.Unlock()
		return len(n.engine.containers[0].taps)
	}
	for _, state := range []string{"created", "running"} {
		for _, half := range []bool{false, true} {
			h := n.hijack("/containers/"+id+"/attach?stream=1&stdin=1&stdout=1", "", true)
			io.WriteString(h, "input that nobody reads yet") // the client may be gone before
			if half {
				if err := h.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "attached", func() bool { return taps() == 1 })
			h.Close()
			eventually(t, state+": the handler of a vanished client ends", func() bool { return taps() == 0 })
		}
		if state == "created" {
			n.must(204, "POST", "/containers/"+id+"/start", "", nil)
		}
	}
}

func TestDetachKeys(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("", `{"Image":"busybox","Cmd":["cat"],"Tty":true,"OpenStdin":true,"StdinOnce":true}`)
	n.must(204, "POST", "/containers/"+c.Config.ID+"/start", "", nil)
	past, sub := n.hub.Subscribe(t.Context(), time.Time{})
	_ = past
	for _, tc := range []struct{ query, keys string }{{"", "\x10\x11"}, {"&detachKeys=ctrl-a,b", "\x01b"}} {
		h := n.hijack("/containers/"+c.Config.ID+"/attach?stream=1&stdin=1&stdout=1"+tc.query, "", true)
		if h.head.Get("Content-Type") != "application/vnd.docker.raw-stream" {
			t.Errorf("terminal: %v", h.head)
		}
		io.WriteString(h, "hi") // checked by what comes back
		buf := make([]byte, 2)
		if _, err := io.ReadFull(h.r, buf); err != nil || string(buf) != "hi" {
			t.Fatalf("%q %v", buf, err)
		}
		io.WriteString(h, tc.keys)
		if rest, err := io.ReadAll(h.r); err != nil || len(rest) > 0 {
			t.Errorf("after the keys: %q %v", rest, err)
		}
		e := <-sub.C
		if e.Action != "detach" {
			t.Errorf("event %s", e.Action)
		}
	}
	// A client that looks for the keys itself just leaves: the terminal stays as well.
	h := n.hijack("/containers/"+c.Config.ID+"/attach?stream=1&stdin=1&stdout=1", "", true)
	h.CloseWrite()
	h.Close()
	again := n.hijack("/containers/"+c.Config.ID+"/attach?stream=1&stdin=1&stdout=1", "", true)
	io.WriteString(again, "ho")
	buf := make([]byte, 2)
	if _, err := io.ReadFull(again.r, buf); err != nil || string(buf) != "ho" {
		t.Errorf("after a client left: %q %v", buf, err)
	}
	if got, _ := n.engine.Container(c.Config.ID); got.State.Status != engine.StatusRunning {
		t.Errorf("detaching ended it: %s", got.State.Status)
	}
	n.refuse(400, "Invalid detach keys (nonsense,) provided", "POST", "/containers/"+c.Config.ID+"/attach?detachKeys=nonsense,", "")
}

func TestExec(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("web", `{"Image":"busybox","Cmd":["sleep"],"OpenStdin":true}`)
	n.refuse(409, "is not running", "POST", "/containers/web/exec", `{"Cmd":["echo"]}`)
	n.must(204, "POST", "/containers/web/start", "", nil)
	n.refuse(400, "No exec command specified", "POST", "/containers/web/exec", `{}`)
	run := func(body, start string) (*hijacked, string) {
		var x struct{ ID string }
		n.must(201, "POST", "/containers/web/exec", body, &x)
		return n.hijack("/exec/"+x.ID+"/start", start, true), x.ID
	}
	type state struct {
		Running       bool
		ExitCode      *int
		ContainerID   string
		ProcessConfig struct {
			Entrypoint string   `json:"entrypoint"`
			Arguments  []string `json:"arguments"`
		}
	}
	h, id := run(`{"Cmd":["both","x"],"AttachStdout":true,"AttachStderr":true}`, `{}`)
	if stdout, stderr := h.output(t); stdout != "out\n" || stderr != "err\n" {
		t.Errorf("%q %q", stdout, stderr)
	}
	var st state
	n.must(200, "GET", "/exec/"+id+"/json", "", &st)
	if st.ExitCode == nil || *st.ExitCode != 3 || st.Running || st.ContainerID != c.Config.ID || st.ProcessConfig.Entrypoint != "both" {
		t.Errorf("%+v", st)
	}
	n.refuse(409, "already", "POST", "/exec/"+id+"/start", `{}`)

	h, _ = run(`{"Cmd":["cat"],"AttachStdin":true,"AttachStdout":true}`, `{"Detach":false,"Tty":false}`)
	io.WriteString(h, "through")
	h.CloseWrite()
	if stdout, _ := h.output(t); stdout != "through" {
		t.Errorf("cat: %q", stdout)
	}

	h, id = run(`{"Cmd":["missing"],"AttachStdout":true,"AttachStderr":true}`, `{}`)
	if stdout, _ := h.output(t); !strings.Contains(stdout, "executable file not found") {
		t.Errorf("missing: %q", stdout)
	}
	n.must(200, "GET", "/exec/"+id+"/json", "", &st)
	if st.ExitCode == nil || *st.ExitCode != 127 {
		t.Errorf("missing: %+v", st)
	}

	var x struct{ ID string }
	n.must(201, "POST", "/containers/web/exec", `{"Cmd":["sleep"],"Tty":true,"ConsoleSize":[5,6]}`, &x)
	n.must(200, "POST", "/exec/"+x.ID+"/start", `{"Detach":true}`, nil)
	n.must(200, "POST", "/exec/"+x.ID+"/resize?h=10&w=20", "", nil)
	if len(n.engine.resized) != 1 || n.engine.resized[0] != [2]uint16{10, 20} {
		t.Errorf("resized: %v", n.engine.resized)
	}
	n.refuse(404, "No such exec instance: nope", "GET", "/exec/nope/json", "")
}

func TestWaitSendsItsHeadFirst(t *testing.T) {
	n := newLiveNode(t)
	c := n.create("", `{"Image":"busybox","Cmd":["both"],"HostConfig":{"AutoRemove":true}}`)
	resp, err := n.client.Post("http://docker/containers/"+c.Config.ID+"/wait?condition=removed", "", nil)
	if err != nil {
		t.Fatal(err) // would hang here until the end of the test
	}
	defer resp.Body.Close()
	n.must(204, "POST", "/containers/"+c.Config.ID+"/start", "", nil)
	var out struct{ StatusCode int }
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil || out.StatusCode != 3 {
		t.Errorf("%+v %v", out, err)
	}
}

func TestLogs(t *testing.T) {
	n := newLiveNode(t)
	n.create("web", `{"Image":"busybox","Cmd":["sleep"]}`)
	n.engine.logs = []engine.LogEntry{
		{Time: epoch, Stream: engine.Stdout, Line: []byte("one\n")},
		{Time: epoch.Add(time.Second), Stream: engine.Stderr, Line: []byte("two\n")},
		{Time: epoch.Add(2 * time.Second), Stream: engine.Stdout, Line: []byte("thr"), Partial: true},
		{Time: epoch.Add(3 * time.Second), Stream: engine.Stdout, Line: []byte("ee\n")},
	}
	for _, tc := range []struct{ query, stdout, stderr string }{
		{"stdout=1&stderr=1", "one\nthree\n", "two\n"},
		{"stdout=1&tail=2", "three\n", ""},
		{"stdout=1&tail=all", "one\nthree\n", ""},
		{"stderr=1&timestamps=1", "", "2026-03-01T12:00:01.000000000Z two\n"},
		{"stdout=1&timestamps=1", "2026-03-01T12:00:00.000000000Z one\n2026-03-01T12:00:02.000000000Z three\n", ""},
		{fmt.Sprintf("stdout=1&since=%d", epoch.Unix()+1), "three\n", ""},
		{"stdout=1&until=2026-03-01T12:00:00Z", "one\n", ""},
		{"stdout=1&details=1&tail=1", " ee\n", ""},
	} {
		resp, err := n.client.Get("http://docker/containers/web/logs?" + tc.query)
		if err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		_, err = stdcopy.StdCopy(&out, &errs, resp.Body)
		resp.Body.Close()
		if err != nil || out.String() != tc.stdout || errs.String() != tc.stderr || resp.Header.Get("Content-Type") != "application/vnd.docker.multiplexed-stream" {
			t.Errorf("%s: %q %q %v", tc.query, out.String(), errs.String(), err)
		}
	}
	n.refuse(400, "Bad parameters: you must choose at least one stream", "GET", "/containers/web/logs", "")
	n.refuse(400, "invalid time", "GET", "/containers/web/logs?stdout=1&since=yesterday", "")
	n.create("mute", `{"Image":"busybox","Cmd":["sleep"],"HostConfig":{"LogConfig":{"Type":"none"}}}`)
	n.refuse(501, "configured logging driver does not support reading", "GET", "/containers/mute/logs?stdout=1", "")
}

func TestLogsFollowEndsWithItsClient(t *testing.T) {
	n := newLiveNode(t)
	n.create("web", `{"Image":"busybox","Cmd":["sleep"],"Tty":true}`)
	n.engine.logs = []engine.LogEntry{{Time: epoch, Stream: engine.Stdout, Line: []byte("one\n")}}
	resp, err := n.client.Get("http://docker/containers/web/logs?stdout=1&follow=1")
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(resp.Body).ReadString('\n')
	if err != nil || line != "one\n" {
		t.Errorf("%q %v", line, err)
	}
	resp.Body.Close() // goleak sees that the handler ended
}

func TestEvents(t *testing.T) {
	n := newLiveNode(t)
	publish := func(kind, action, id string, at time.Time, attrs ...string) {
		m := map[string]string{}
		for i := 0; i+1 < len(attrs); i += 2 {
			m[attrs[i]] = attrs[i+1]
		}
		n.hub.Publish(event.Event{Type: kind, Action: action, ID: id, Attributes: m, Time: at})
	}
	publish("container", "start", "abc", epoch, "name", "web", "image", "busybox:1", "app", "x")
	publish("sandbox", "create", "box", epoch)
	publish("container", "exec_create: sh -c true", "abc", epoch.Add(time.Second), "name", "web", "image", "busybox:1")
	publish("image", "pull", "busybox:1", epoch.Add(2*time.Second), "name", "busybox")
	publish("network", "connect", "net", epoch.Add(3*time.Second), "name", "shop")
	span := fmt.Sprintf("since=%d&until=%d.5", epoch.Unix(), epoch.Unix()+3)
	for _, tc := range []struct{ filters, want string }{
		{``, "start exec_create: sh -c true pull connect"},
		{`{"type":["container"]}`, "start exec_create: sh -c true"},
		{`{"event":["exec_create"]}`, "exec_create: sh -c true"},
		{`{"event":["start","pull"]}`, "start pull"},
		{`{"container":["web"]}`, "start exec_create: sh -c true"},
		{`{"container":["we"]}`, "start exec_create: sh -c true"},
		{`{"image":["busybox"]}`, "start exec_create: sh -c true pull"},
		{`{"network":["shop"]}`, "connect"},
		{`{"label":["app=x"]}`, "start"},
		{`{"scope":["swarm"]}`, ""},
	} {
		req, _ := http.NewRequest("GET", "http://docker/v1.44/events?"+span, nil)
		q := req.URL.Query()
		q.Set("filters", tc.filters)
		req.URL.RawQuery = q.Encode()
		resp, err := n.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for dec := json.NewDecoder(resp.Body); ; {
			var m struct {
				Action, Type string
				Status       string `json:"status"`
				TimeNano     int64  `json:"timeNano"`
			}
			if err := dec.Decode(&m); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if (m.Type == "container" || m.Type == "image") != (m.Status == m.Action) || m.TimeNano < epoch.UnixNano() {
				t.Errorf("shape: %+v", m)
			}
			got = append(got, m.Action)
		}
		resp.Body.Close()
		if g := strings.Join(got, " "); g != tc.want {
			t.Errorf("%s: %q, want %q", tc.filters, g, tc.want)
		}
	}
	n.refuse(400, "invalid filter 'odd'", "GET", "/events?filters=%7B%22odd%22%3A%5B%22x%22%5D%7D", "")
}

func TestEventsLive(t *testing.T) {
	n := newLiveNode(t)
	req, _ := http.NewRequest("GET", "http://docker/events", nil)
	req.Header.Set("Accept", "application/json-seq")
	resp, err := n.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") != "application/json-seq" {
		t.Errorf("%v", resp.Header)
	}
	n.hub.Publish(event.Event{Type: "volume", Action: "create", ID: "v"})
	line, err := bufio.NewReader(resp.Body).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "\x1e{") || strings.Contains(line, `"status"`) {
		t.Errorf("%q %v", line, err)
	}
}

// TestStopEndsStreams: a server that is told to stop does not wait for its streams.
func TestStopEndsStreams(t *testing.T) {
	n := newLiveNode(t)
	n.create("web", `{"Image":"busybox","Cmd":["sleep"],"OpenStdin":true}`)
	n.must(204, "POST", "/containers/web/start", "", nil)
	h := n.hijack("/containers/web/attach?stream=1&stdin=1&stdout=1", "", true)
	for _, path := range []string{"/events", "/containers/web/logs?follow=1&stdout=1", "/containers/web/stats"} {
		resp, err := n.client.Get("http://docker" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
	}
	wait, err := n.client.Post("http://docker/containers/web/wait", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer wait.Body.Close()
	began := time.Now()
	n.stop()
	<-n.stopped
	if took := time.Since(began); took > time.Second {
		t.Errorf("stopping took %s", took)
	}
	if _, err := h.r.ReadByte(); err == nil {
		t.Error("an attached client was not told")
	}
}
