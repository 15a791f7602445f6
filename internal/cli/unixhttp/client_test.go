package unixhttp_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"berth/internal/cli/unixhttp"
)

func serve(t *testing.T, h http.Handler) (*unixhttp.Client, *atomic.Int32) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var conns atomic.Int32
	s := &http.Server{Handler: h, ConnState: func(_ net.Conn, st http.ConnState) {
		if st == http.StateNew {
			conns.Add(1)
		}
	}}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	c := &unixhttp.Client{Socket: path}
	t.Cleanup(func() {
		c.CloseIdle()
		s.Close()
		<-done
		goleak.VerifyNone(t)
	})
	return c, &conns
}

func TestBodies(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789"), 100_000)
	c, conns := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/length":
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
			w.Write(big)
		case "/chunks":
			for i := 0; i < len(big); i += 70_000 {
				w.Write(big[i:min(i+70_000, len(big))])
				w.(http.Flusher).Flush()
			}
		case "/none":
			w.WriteHeader(http.StatusNoContent)
		case "/echo":
			if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
				t.Error(err)
			}
			io.Copy(w, r.Body)
		}
	}))
	for _, tt := range []struct {
		req  unixhttp.Request
		want []byte
	}{
		{unixhttp.Request{Method: "GET", Path: "/length"}, big},
		{unixhttp.Request{Method: "GET", Path: "/chunks"}, big},
		{unixhttp.Request{Method: "GET", Path: "/none"}, nil},
		{unixhttp.Request{Method: "POST", Path: "/echo", Body: []byte("hello")}, []byte("hello")},
		{unixhttp.Request{Method: "POST", Path: "/echo", Stream: bytes.NewReader(big)}, big},
		{unixhttp.Request{Method: "POST", Path: "/echo", Stream: bytes.NewReader(big), Length: 10}, big[:10]},
		{unixhttp.Request{Method: "HEAD", Path: "/length"}, nil},
	} {
		resp, err := c.Do(context.Background(), tt.req)
		if err != nil {
			t.Fatalf("%s %s: %v", tt.req.Method, tt.req.Path, err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, tt.want) {
			t.Errorf("%s %s: %d bytes, %v; want %d", tt.req.Method, tt.req.Path, len(got), err, len(tt.want))
		}
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections for requests one behind the other, want 1", n)
	}
}

func TestCancelClosesBody(t *testing.T) {
	c, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "first")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(context.Background())
	resp, err := c.Do(ctx, unixhttp.Request{Method: "GET", Path: "/"})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b := make([]byte, 5)
	if _, err := io.ReadFull(resp.Body, b); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("the end of the context does not end the body")
	}
}

func TestMalformedAnswers(t *testing.T) {
	for _, answer := range []string{
		"", "HTTP/1.1 200", "SPDY 200 OK\r\n\r\n", "HTTP/1.1 xx OK\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
		strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 20),
	} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096))
			io.WriteString(conn, answer)
			conn.Close()
		}()
		c := &unixhttp.Client{Socket: path}
		resp, err := c.Do(context.Background(), unixhttp.Request{Method: "POST", Path: "/"})
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Errorf("answer %.60q is taken for good", answer)
		}
		l.Close()
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("disk on fire") }

func TestBrokenSource(t *testing.T) {
	c, _ := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) }))
	for _, length := range []int64{0, 10} {
		_, err := c.Do(context.Background(), unixhttp.Request{Method: "POST", Path: "/", Stream: brokenReader{}, Length: length})
		if err == nil || !strings.Contains(err.Error(), "disk on fire") {
			t.Errorf("length %d: %v", length, err)
		}
	}
}

func TestHijack(t *testing.T) {
	c, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			http.Error(w, "no", http.StatusConflict)
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nearly ")
		io.Copy(conn, rw)
	}))
	s, _, err := c.Hijack(context.Background(), unixhttp.Request{Method: "POST", Path: "/yes"})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(s, "late")
	if err := s.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(s)
	s.Close()
	if err != nil || string(got) != "early late" {
		t.Errorf("got %q, %v", got, err)
	}
	s, resp, err := c.Hijack(context.Background(), unixhttp.Request{Method: "POST", Path: "/no"})
	if err != nil || s != nil || resp.Status != 409 {
		t.Fatalf("refused upgrade: %v %v %v", s, resp, err)
	}
	resp.Body.Close()
}

func TestServerAway(t *testing.T) {
	c := &unixhttp.Client{Socket: filepath.Join(t.TempDir(), "none")}
	if _, err := c.Do(context.Background(), unixhttp.Request{Method: "GET", Path: "/"}); !errors.Is(err, net.ErrClosed) && err == nil {
		t.Error("no error")
	}
}
