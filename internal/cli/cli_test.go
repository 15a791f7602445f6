package cli_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"berth/internal/cli"
)

// daemon is a server with canned answers at the place of berthd.
type daemon struct {
	root string
	mux  *http.ServeMux
	mu   sync.Mutex
	seen []string
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{root: t.TempDir(), mux: http.NewServeMux()}
	if err := os.Mkdir(filepath.Join(d.root, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(d.root, "run", "docker.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = strings.TrimPrefix(r.URL.Path, "/v1.47")
		d.note(r.Method + " " + r.URL.Path)
		d.mux.ServeHTTP(w, r)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return d
}

func (d *daemon) note(s string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen = append(d.seen, s)
}

func (d *daemon) json(pattern string, status int, body any) {
	d.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(body)
	})
}

type result struct {
	code     int
	out, err string
}

func noEnv(string) (string, bool) { return "", false }

func (d *daemon) run(in io.Reader, args ...string) result {
	var out, errs bytes.Buffer
	if in == nil {
		in = strings.NewReader("")
	}
	env := func(name string) (string, bool) {
		if name == "BERTH_ROOT" {
			return d.root, true
		}
		return "", false
	}
	code := cli.Main(context.Background(), "1.2.3", args, cli.Streams{In: in, Out: &out, Err: &errs}, env)
	return result{code, out.String(), errs.String()}
}

type message struct {
	Message string `json:"message"`
	Kind    string `json:"kind,omitempty"`
}

func frame(kind byte, text string) []byte {
	b := make([]byte, 8, 8+len(text))
	b[0] = kind
	binary.BigEndian.PutUint32(b[4:], uint32(len(text)))
	return append(b, text...)
}

// process makes the daemon run one container that echoes its input.
type process struct {
	tty     bool
	exit    int
	started chan struct{}
	ended   chan struct{}
	once    sync.Once
}

func (d *daemon) container(t *testing.T, p *process) {
	p.started, p.ended = make(chan struct{}), make(chan struct{})
	d.mux.HandleFunc("POST /containers/create", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(201)
		io.WriteString(w, `{"Id":"c0ffee","Warnings":["odd"]}`)
	})
	d.mux.HandleFunc("POST /containers/c0ffee/attach", func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
		go func() {
			defer conn.Close()
			<-p.started
			if !p.tty {
				conn.Write(frame(1, "to out\n"))
				conn.Write(frame(2, "to err\n"))
			}
			if r.URL.Query().Get("stdin") == "1" {
				text, _ := io.ReadAll(rw)
				conn.Write(frame(1, string(text)))
			}
			p.once.Do(func() { close(p.ended) })
		}()
	})
	d.mux.HandleFunc("POST /containers/c0ffee/wait", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-p.started:
			t.Error("wait came behind start")
		default:
		}
		w.(http.Flusher).Flush()
		select {
		case <-p.ended:
			fmt.Fprintf(w, `{"StatusCode":%d}`, p.exit)
		case <-r.Context().Done():
		}
	})
	d.mux.HandleFunc("POST /containers/c0ffee/start", func(w http.ResponseWriter, r *http.Request) {
		close(p.started)
		w.WriteHeader(204)
	})
}

func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name string
		exit int
		args []string
		in   string
		want result
	}{
		{"output", 0, []string{"run", "--rm", "box", "true"}, "", result{0, "to out\n", "WARNING: odd\nto err\n"}},
		{"exit code", 42, []string{"run", "box"}, "", result{42, "to out\n", "WARNING: odd\nto err\n"}},
		{"input", 0, []string{"run", "-i", "box", "cat"}, "hello\n", result{0, "to out\nhello\n", "WARNING: odd\nto err\n"}},
		{"detached", 0, []string{"run", "-d", "box"}, "", result{0, "c0ffee\n", "WARNING: odd\n"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDaemon(t)
			d.container(t, &process{exit: tt.exit})
			got := d.run(strings.NewReader(tt.in), tt.args...)
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(result{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRunFailures(t *testing.T) {
	for _, tt := range []struct {
		name  string
		start message
		code  int
	}{
		{"no program", message{"exec: \"nope\": executable file not found in $PATH", ""}, 127},
		{"no program by kind", message{"odd words", "no such program"}, 127},
		{"not executable", message{"exec: \"/etc/passwd\": permission denied", ""}, 126},
		{"kind decides", message{"bind source: no such file or directory", "invalid argument"}, 125},
		{"platform", message{"out of luck", ""}, 125},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDaemon(t)
			d.json("POST /containers/create", 201, map[string]string{"Id": "c0ffee"})
			d.json("POST /containers/c0ffee/start", 400, tt.start)
			got := d.run(nil, "run", "-d", "box")
			if got.code != tt.code || got.err != "berth: "+tt.start.Message+"\n" {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestRunPullsMissingImage(t *testing.T) {
	d := newDaemon(t)
	pulled := false
	d.mux.HandleFunc("POST /containers/create", func(w http.ResponseWriter, r *http.Request) {
		if !pulled {
			w.WriteHeader(404)
			io.WriteString(w, `{"message":"No such image: box:latest"}`)
			return
		}
		w.WriteHeader(201)
		io.WriteString(w, `{"Id":"c0ffee"}`)
	})
	d.mux.HandleFunc("POST /images/create", func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Get("fromImage") != "docker.io/library/box" || q.Get("tag") != "latest" {
			t.Errorf("query %v", q)
		}
		pulled = true
		for _, s := range []string{"Downloading", "Downloading", "Pull complete"} {
			fmt.Fprintf(w, `{"status":%q,"id":"abc","progressDetail":{"current":1,"total":2}}`+"\r\n", s)
		}
	})
	d.json("POST /containers/c0ffee/start", 204, nil)
	got := d.run(nil, "run", "-d", "box")
	want := result{0, "c0ffee\n", "Unable to find image 'box' locally\nabc: Downloading\nabc: Pull complete\n"}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(result{})); diff != "" {
		t.Error(diff)
	}
	if got := d.run(nil, "run", "--pull=never", "-d", "nope"); got.code != 0 { // exists now
		t.Errorf("%+v", got)
	}
}

func TestLists(t *testing.T) {
	d := newDaemon(t)
	d.json("GET /containers/json", 200, []map[string]any{{
		"Id": strings.Repeat("ab", 32), "Names": []string{"/web"}, "Image": "nginx", "Command": "nginx -g daemon off; and more",
		"Created": 0, "State": "running", "Status": "Up 3 seconds", "Labels": map[string]string{"a": "b"},
		"Ports": []map[string]any{
			{"IP": "0.0.0.0", "PrivatePort": 81, "PublicPort": 8081, "Type": "tcp"},
			{"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
			{"PrivatePort": 443, "Type": "tcp"},
		},
	}})
	d.json("GET /images/json", 200, []map[string]any{{"Id": "sha256:" + strings.Repeat("cd", 32), "RepoTags": []string{"box:1", "box:2"}, "Size": 1234567}})
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"ps"}, "CONTAINER ID   IMAGE   COMMAND                  CREATED   STATUS         PORTS                                   NAMES\n" +
			`abababababab   nginx   "nginx -g daemon off…"   N/A       Up 3 seconds   443/tcp, 0.0.0.0:8080-8081->80-81/tcp   web` + "\n"},
		{[]string{"ps", "-q"}, "abababababab\n"},
		{[]string{"ps", "-o", "name"}, "web\n"},
		{[]string{"ps", "--format", `{{.Names}}\t{{ .Status }}`}, "web\tUp 3 seconds\n"},
		{[]string{"ps", "--format", `table {{.Names}}\t{{.Status}}`}, "NAMES   STATUS\nweb     Up 3 seconds\n"},
		{[]string{"images", "-o", "name"}, "box:1\nbox:2\n"},
		{[]string{"images", "-q", "--no-trunc"}, strings.Repeat("sha256:"+strings.Repeat("cd", 32)+"\n", 2)},
	} {
		if got := d.run(nil, tt.args...); got.code != 0 || got.out != tt.want || got.err != "" {
			t.Errorf("%v: code %d, stderr %q\n%s", tt.args, got.code, got.err, cmp.Diff(tt.want, got.out))
		}
	}
	got := d.run(nil, "ps", "-o", "json")
	var list []map[string]any
	if err := json.Unmarshal([]byte(got.out), &list); err != nil || len(list) != 1 || list[0]["Image"] != "nginx" {
		t.Errorf("json: %v %s", err, got.out)
	}
	got = d.run(nil, "ps", "-o", "yaml")
	if !strings.Contains(got.out, "Names:\n    - \"/web\"\n") && !strings.Contains(got.out, "Names:\n    - /web\n") {
		t.Errorf("yaml:\n%s", got.out)
	}
	if got := d.run(nil, "ps", "--format", "{{range .Names}}"); got.code != 125 || !strings.Contains(got.err, "not supported") {
		t.Errorf("%+v", got)
	}
}

func TestEachPrintsWhatWorked(t *testing.T) {
	d := newDaemon(t)
	d.json("POST /containers/a/stop", 204, nil)
	d.json("POST /containers/b/stop", 404, message{Message: "No such container: b"})
	got := d.run(nil, "stop", "b", "a")
	if diff := cmp.Diff(result{1, "a\n", "berth: No such container: b\n"}, got, cmp.AllowUnexported(result{})); diff != "" {
		t.Error(diff)
	}
}

func TestExecAndLogs(t *testing.T) {
	d := newDaemon(t)
	d.json("POST /containers/web/exec", 201, map[string]string{"Id": "e1"})
	d.json("GET /exec/e1/json", 200, map[string]any{"Running": false, "ExitCode": 7})
	d.mux.HandleFunc("POST /exec/e1/start", func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\n\r\n")
		conn.Write(frame(1, "hi\n"))
		conn.Close()
	})
	if diff := cmp.Diff(result{7, "hi\n", ""}, d.run(nil, "exec", "web", "ls", "-l"), cmp.AllowUnexported(result{})); diff != "" {
		t.Error(diff)
	}
	d.mux.HandleFunc("GET /containers/web/logs", func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Get("tail") != "5" || q.Get("timestamps") != "1" {
			t.Errorf("query %v", q)
		}
		w.Header().Set("Content-Type", "application/vnd.docker.multiplexed-stream")
		w.Write(frame(1, "one\n"))
		w.(http.Flusher).Flush()
		w.Write(frame(2, "two\n"))
	})
	if diff := cmp.Diff(result{0, "one\n", "two\n"}, d.run(nil, "logs", "-t", "-n", "5", "web"), cmp.AllowUnexported(result{})); diff != "" {
		t.Error(diff)
	}
}

func TestExplain(t *testing.T) {
	d := newDaemon(t)
	d.json("GET /berth/v1/explain/web", 200, map[string]any{
		"subject": `container "web"`, "summary": "it exited with code 3", "details": []string{"It ran 5 s."}, "hints": []string{"Look at the log."}})
	want := "container \"web\": it exited with code 3\n  - It ran 5 s.\nWhat to do:\n  - Look at the log.\n"
	if got := d.run(nil, "explain", "web"); got.out != want || got.code != 0 {
		t.Errorf("%+v", got)
	}
}

func TestLoadAndPush(t *testing.T) {
	d := newDaemon(t)
	d.mux.HandleFunc("POST /images/load", func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, `{"stream":"Loaded image: %s\n"}`, raw)
		if err != nil {
			t.Error(err)
		}
	})
	d.mux.HandleFunc("POST /images/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/images/reg.test:5000/team/app/push" || r.URL.Query().Get("tag") != "v1" || r.Header.Get("X-Registry-Auth") == "" {
			t.Errorf("%s %v", r.URL, r.Header)
		}
		io.WriteString(w, `{"errorDetail":{"message":"denied: no"},"error":"denied: no"}`)
	})
	if got := d.run(strings.NewReader("box:1"), "load"); got != (result{0, "Loaded image: box:1\n", ""}) {
		t.Errorf("%+v", got)
	}
	if got := d.run(nil, "push", "reg.test:5000/team/app:v1"); got != (result{1, "", "berth: denied: no\n"}) {
		t.Errorf("%+v", got)
	}
}

func TestUsageErrors(t *testing.T) {
	root := t.TempDir()
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"nope"}, "nope"},
		{[]string{"run"}, "needs an IMAGE"},
		{[]string{"run", "--trace", "box"}, "unknown flag: --trace"},
		{[]string{"run", "-p", "x", "box"}, `-p x: "x" is not a port`},
		{[]string{"run", "-it", "box"}, "not a TTY"},
		{[]string{"ps", "-o", "xml"}, "-o xml: unknown"},
		{[]string{"--progress=fancy", "ps"}, "--progress fancy"},
		{[]string{"up", "--control=lazy"}, "the control plane is not part of this version"},
		{[]string{"up", "--api-listen", ":6443"}, "the control plane is not part of this version"},
		{[]string{"up", "--mirror", "docker.io"}, "write it as HOST=URL"},
		{[]string{"down", "--containers", "maybe"}, "use keep or stop"},
		{[]string{"ps"}, "start it with 'berth up --root " + root + "'"},
	} {
		var out, errs bytes.Buffer
		code := cli.Main(context.Background(), "v", append(tt.args[:len(tt.args):len(tt.args)], "--root", root)[:len(tt.args)+2],
			cli.Streams{In: strings.NewReader(""), Out: &out, Err: &errs}, noEnv)
		if tt.args[0] == "run" { // flags behind the image belong to the program
			errs.Reset()
			code = cli.Main(context.Background(), "v", append([]string{"--root", root}, tt.args...),
				cli.Streams{In: strings.NewReader(""), Out: &out, Err: &errs}, noEnv)
		}
		if code != 125 || !strings.Contains(errs.String(), tt.want) || strings.Count(errs.String(), "\n") != 1 || out.Len() > 0 {
			t.Errorf("%v: code %d, stdout %q, stderr %q; want %q", tt.args, code, out.String(), errs.String(), tt.want)
		}
	}
}

func TestNotRunning(t *testing.T) {
	var out, errs bytes.Buffer
	args := []string{"status", "-o", "json", "--root", t.TempDir()}
	code := cli.Main(context.Background(), "v", args, cli.Streams{Out: &out, Err: &errs}, noEnv)
	var s struct{ State string }
	if err := json.Unmarshal(out.Bytes(), &s); err != nil || code != 1 || s.State != "not running" {
		t.Errorf("code %d, %v, %s", code, err, out.String())
	}
	args = []string{"down", "--root", t.TempDir()}
	if code := cli.Main(context.Background(), "v", args, cli.Streams{Out: &out, Err: &errs}, noEnv); code != 0 {
		t.Errorf("down of nothing: %d %s", code, errs.String())
	}
}

func TestCompletion(t *testing.T) {
	d := newDaemon(t)
	d.json("GET /containers/json", 200, []map[string]any{{"Names": []string{"/web"}}, {"Names": []string{"/db"}}})
	if got := d.run(nil, "__complete", "stop", "web", ""); !strings.HasPrefix(got.out, "db\n:4") {
		t.Errorf("%+v", got)
	}
	if got := d.run(nil, "completion", "bash"); got.code != 0 || !strings.Contains(got.out, "__start_berth") {
		t.Errorf("%d %.100s", got.code, got.out)
	}
}
