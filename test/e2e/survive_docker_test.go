package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// dockerClient speaks docker's API as far as TestSurvive needs it: without a client's own process
// per request, and with a new connection for each.
type dockerClient struct {
	socket string
	http   *http.Client
}

const apiPrefix = "/v1.44"

type spec struct {
	Image   string
	Cmd     []string
	Tty     bool                `json:",omitempty"`
	Stdin   bool                `json:"OpenStdin,omitempty"`
	Exposed map[string]struct{} `json:"ExposedPorts,omitempty"`
	Host    hostSpec            `json:"HostConfig"`
}

type hostSpec struct {
	Binds   []string          `json:",omitempty"`
	Ports   map[string][]port `json:"PortBindings,omitempty"`
	Restart restartSpec       `json:"RestartPolicy"`
	Log     logSpec           `json:"LogConfig"`
}

type port struct{ HostPort string }

type restartSpec struct {
	Name       string
	MaxRetries int `json:"MaximumRetryCount"`
}

type logSpec struct {
	Type   string            `json:",omitempty"`
	Config map[string]string `json:",omitempty"`
}

// inspected is what is looked at of an inspected container.
type inspected struct {
	ID           string `json:"Id"`
	RestartCount int
	LogPath      string
	State        struct {
		Status    string
		Pid       int
		ExitCode  int
		Error     string
		StartedAt time.Time
	}
}

func newDockerClient(socket string) dockerClient {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return dockerClient{socket, &http.Client{Timeout: patience(pollTimeout), Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// do sends a request and decodes the answer into out unless that is nil.
func (d dockerClient) do(method, path string, in io.Reader, out any) error {
	request, err := http.NewRequest(method, "http://docker"+apiPrefix+path, in)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := d.http.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode >= 300:
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, bytes.TrimSpace(body))
	case out == nil:
		return nil
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = body
		return nil
	}
	return json.Unmarshal(body, out)
}

func (d dockerClient) ping() error { return d.do("GET", "/_ping", nil, nil) }

func (d dockerClient) resize(name string) error {
	return d.do("POST", "/containers/"+name+"/resize?h=24&w=80", nil, nil)
}

func (d dockerClient) load(t *testing.T, archive string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := d.do("POST", "/images/load?quiet=1", f, nil); err != nil {
		t.Fatal(err)
	}
}

// run creates and starts a container.
func (d dockerClient) run(t *testing.T, name string, s spec) {
	t.Helper()
	s.Image = "busybox"
	body, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.do("POST", "/containers/create?name="+name, bytes.NewReader(body), nil); err != nil {
		t.Fatal(err)
	}
	if err := d.do("POST", "/containers/"+name+"/start", nil, nil); err != nil {
		t.Fatal(err)
	}
}

func (d dockerClient) inspect(name string) (i inspected, err error) {
	return i, d.do("GET", "/containers/"+name+"/json", nil, &i)
}

func (d dockerClient) remove(name, force string) error {
	return d.do("DELETE", "/containers/"+name+"?force="+force, nil, nil)
}

// logs returns what a container without a terminal wrote on its two outputs, in order.
func (d dockerClient) logs(name string) (outputs [2][]byte, err error) {
	var raw []byte
	if err := d.do("GET", "/containers/"+name+"/logs?stdout=1&stderr=1", nil, &raw); err != nil {
		return outputs, err
	}
	for len(raw) > 0 {
		if len(raw) < 8 || raw[0] < 1 || raw[0] > 2 || len(raw)-8 < int(binary.BigEndian.Uint32(raw[4:8])) {
			return outputs, fmt.Errorf("logs of %s: not a stream of frames", name)
		}
		end := 8 + int(binary.BigEndian.Uint32(raw[4:8]))
		outputs[raw[0]-1] = append(outputs[raw[0]-1], raw[8:end]...)
		raw = raw[end:]
	}
	return outputs, nil
}

// gateway is the host's address on the default bridge.
func (d dockerClient) gateway(t *testing.T) string {
	t.Helper()
	var n struct {
		IPAM struct{ Config []struct{ Gateway string } }
	}
	if err := d.do("GET", "/networks/bridge", nil, &n); err != nil || len(n.IPAM.Config) == 0 {
		t.Fatalf("network bridge: %v, %+v", err, n)
	}
	return n.IPAM.Config[0].Gateway
}

// session is an attached client of a container's input and output.
type session struct {
	name string
	conn net.Conn
	from *bufio.Reader
}

func (d dockerClient) attach(name string) (*session, error) {
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		return nil, err
	}
	s := &session{name, conn, bufio.NewReader(conn)}
	_ = conn.SetDeadline(time.Now().Add(patience(pollTimeout)))
	fmt.Fprintf(conn, "POST %s/containers/%s/attach?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", apiPrefix, name)
	response, err := http.ReadResponse(s.from, nil)
	if err == nil && response.StatusCode != http.StatusSwitchingProtocols {
		err = fmt.Errorf("attach to %s: %s", name, response.Status)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return s, nil
}

func (s *session) tell(t *testing.T, text string) {
	t.Helper()
	_ = s.conn.SetDeadline(time.Now().Add(patience(pollTimeout)))
	if _, err := io.WriteString(s.conn, text); err != nil {
		t.Fatalf("write to the attached %s: %v", s.name, err)
	}
}

// hear reads until the text comes.
func (s *session) hear(t *testing.T, text string) {
	t.Helper()
	var all strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(all.String(), text) {
		n, err := s.from.Read(buf)
		all.Write(buf[:n])
		if err != nil {
			t.Fatalf("wait for %q from the attached %s: %v; it said %q", text, s.name, err, all.String())
		}
	}
}
