package image_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/errdefs"
	"berth/internal/image"
)

func TestPush(t *testing.T) {
	g := newRegistry(t)
	s, _ := newStore(t)
	img := loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 1, 1<<20), bigLayer(t, 2, 1<<10)}}, g.host()+"/a/one:v1", g.host()+"/b/two:v1")
	var rec recorder
	d, err := s.Push(t.Context(), g.host()+"/a/one:v1", image.Credentials{}, rec.progress)
	if err != nil {
		t.Fatal(err)
	}
	for action, n := range map[string]int{
		"The push refers to repository [" + g.host() + "/a/one]": 1, "Preparing": 2, "Pushed": 2, "v1: digest: " + d.String() + " size: ": 1,
	} {
		if got := rec.count(action); got != n {
			t.Errorf("%q was reported %d times, want %d", action, got, n)
		}
	}
	var again recorder
	if _, err := s.Push(t.Context(), g.host()+"/a/one:v1", image.Credentials{}, again.progress); err != nil || again.count("Layer already exists") != 2 {
		t.Errorf("second push: %v, %v", err, again.all)
	}
	// To another repository of the registry the layers are mounted.
	puts := g.requests("PUT /v2/b/two/blobs")
	if _, err := s.Push(t.Context(), g.host()+"/b/two:v1", image.Credentials{}, nil); err != nil {
		t.Fatal(err)
	}
	if n := g.requests("PUT /v2/b/two/blobs"); n != puts {
		t.Errorf("%d blobs were sent instead of mounted", n-puts)
	}
	other, _ := newStore(t)
	back, err := other.Pull(t.Context(), g.host()+"/b/two:v1", image.PullOptions{})
	if err != nil || back.ID != img.ID {
		t.Fatalf("pulled back %s, %v; pushed %s", back.ID, err, img.ID)
	}
	if diff := cmp.Diff(tree(t, s, img.ID), tree(t, other, back.ID)); diff != "" {
		t.Error("contents differ")
	}
	if got, err := s.Resolve(t.Context(), g.host()+"/a/one@"+d.String()); err != nil || got.ID != img.ID {
		t.Errorf("by pushed digest: %v", err)
	}
}

func TestPushFaults(t *testing.T) {
	load := func(t *testing.T, g *registry) *image.Store {
		s, _ := newStore(t)
		loadOne(t, s, testImage{layers: [][]byte{bigLayer(t, 1, 1<<20)}}, g.host()+"/app:1")
		return s
	}
	t.Run("500 then well", func(t *testing.T) {
		g := newRegistry(t)
		s := load(t, g)
		n := 0
		g.setFault(func(w http.ResponseWriter, r *http.Request) bool {
			g.mu.Lock()
			defer g.mu.Unlock()
			if r.Method == http.MethodPut && n < 2 {
				n++
				w.WriteHeader(http.StatusBadGateway)
				return true
			}
			return false
		})
		if _, err := s.Push(t.Context(), g.host()+"/app:1", image.Credentials{}, nil); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("denied", func(t *testing.T) {
		g := newRegistry(t)
		s := load(t, g)
		g.setFault(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				fail(w, http.StatusForbidden, "DENIED", "requested access to the resource is denied")
				return true
			}
			return false
		})
		_, err := s.Push(t.Context(), g.host()+"/app:1", image.Credentials{Username: "u", Password: "p"}, nil)
		wantKind(t, err, errdefs.ErrForbidden, "denied: requested access to the resource is denied")
	})
	for _, auth := range []string{"basic", "bearer"} {
		t.Run(auth, func(t *testing.T) {
			g := newRegistry(t)
			s := load(t, g)
			g.auth, g.user, g.password = auth, "u", "p"
			_, err := s.Push(t.Context(), g.host()+"/app:1", image.Credentials{}, nil)
			wantKind(t, err, errdefs.ErrUnauthorized, "unauthorized")
			_, err = s.Push(t.Context(), g.host()+"/app:1", image.Credentials{Username: "u", Password: "x"}, nil)
			wantKind(t, err, errdefs.ErrUnauthorized, "unauthorized")
			if _, err := s.Push(t.Context(), g.host()+"/app:1", image.Credentials{Username: "u", Password: "p"}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	s, _ := newStore(t)
	_, err := s.Push(t.Context(), "nope:1", image.Credentials{}, nil)
	wantKind(t, err, errdefs.ErrNotFound, "An image does not exist locally with the tag: nope")
}

// TestInsecureRegistry speaks TLS with an unknown certificate: refused, unless told otherwise.
func TestInsecureRegistry(t *testing.T) {
	g := newRegistry(t)
	g.put(t, "app", "latest", threeLayers(t))
	ip := hostAddress(t)
	l, err := net.Listen("tcp", ip+":0")
	if err != nil {
		t.Skipf("cannot listen on %s: %v", ip, err)
	}
	srv := httptest.NewUnstartedServer(g)
	srv.Listener.Close()
	srv.Listener = l
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	srv.StartTLS()
	defer srv.Close()
	host := l.Addr().String()
	s, _ := newStore(t)
	_, err = s.Pull(t.Context(), host+"/app", image.PullOptions{})
	wantKind(t, err, errdefs.ErrUnavailable, "x509")
	for _, insecure := range []string{host, ip, ip + "/32"} {
		c := config(t.TempDir())
		c.InsecureRegistries = []string{insecure}
		if _, err := openStore(t, c).Pull(t.Context(), host+"/app", image.PullOptions{}); err != nil {
			t.Errorf("insecure %s: %v", insecure, err)
		}
	}
	// Plain http behind an insecure registry's name works too.
	plain, err := net.Listen("tcp", ip+":0")
	if err != nil {
		t.Fatal(err)
	}
	hs := &http.Server{Handler: g, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- hs.Serve(plain) }()
	defer func() { hs.Close(); <-done }()
	c := config(t.TempDir())
	c.InsecureRegistries = []string{ip + "/32"}
	if _, err := openStore(t, c).Pull(t.Context(), plain.Addr().String()+"/app", image.PullOptions{}); err != nil {
		t.Error(err)
	}
	_, err = s.Pull(t.Context(), plain.Addr().String()+"/app", image.PullOptions{})
	wantKind(t, err, errdefs.ErrUnavailable, "server gave HTTP response to HTTPS client")
}

// hostAddress is an address of this machine outside of 127.0.0.0/8; traffic to it stays inside.
func hostAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
			return n.IP.String()
		}
	}
	t.Skip("this machine has no address besides loopback")
	return ""
}

// TestDockerRegistry pushes to Debian's registry, pulls back, and lets skopeo read and write.
func TestDockerRegistry(t *testing.T) {
	needRoot(t)
	binary, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed")
	}
	addr := startDockerRegistry(t, binary)
	s, dir := newStore(t)
	img := loadOne(t, s, threeLayers(t), addr+"/team/app:1")
	d, err := s.Push(t.Context(), addr+"/team/app:1", image.Credentials{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	other, _ := newStore(t)
	for _, ref := range []string{addr + "/team/app:1", addr + "/team/app@" + d.String()} {
		back, err := other.Pull(t.Context(), ref, image.PullOptions{})
		if err != nil || back.ID != img.ID {
			t.Fatalf("%s: %s, %v", ref, back.ID, err)
		}
	}
	_, err = other.Pull(t.Context(), addr+"/team/app:2", image.PullOptions{})
	wantKind(t, err, errdefs.ErrNotFound, "manifest unknown")
	_, err = other.Pull(t.Context(), addr+"/no/such", image.PullOptions{})
	wantKind(t, err, errdefs.ErrNotFound, "not found")
	gc(t, s)
	_, ingests, _ := leftovers(t, dir)
	if len(ingests) > 0 {
		t.Errorf("ingests left: %v", ingests)
	}
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("skopeo is not installed")
	}
	tmp := t.TempDir()
	for from, to := range map[string]string{
		"docker://" + addr + "/team/app:1":             "docker-archive:" + filepath.Join(tmp, "docker.tar") + ":sk/app:1",
		"docker://" + addr + "/team/app@" + d.String(): "oci-archive:" + filepath.Join(tmp, "oci.tar") + ":sk/oci:2",
	} {
		if out, err := exec.Command(skopeo, "copy", "--src-tls-verify=false", from, to).CombinedOutput(); err != nil {
			t.Fatalf("skopeo: %v: %s", err, out)
		}
	}
	for file, name := range map[string]string{"docker.tar": "docker.io/sk/app:1", "oci.tar": "docker.io/sk/oci:2"} {
		data, err := os.ReadFile(filepath.Join(tmp, file))
		if err != nil {
			t.Fatal(err)
		}
		images, err := other.Load(t.Context(), bytes.NewReader(data), nil)
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if _, err := other.Resolve(t.Context(), name); err != nil || len(images) != 1 {
			t.Errorf("%s: %v", file, err)
		}
		if diff := cmp.Diff(tree(t, s, img.ID), tree(t, other, images[0].ID)); diff != "" {
			t.Error(diff)
		}
	}
	// What Save writes, skopeo reads as either kind.
	var b bytes.Buffer
	if err := s.Save(t.Context(), &b, []string{addr + "/team/app:1"}); err != nil {
		t.Fatal(err)
	}
	saved := filepath.Join(tmp, "saved.tar")
	if err := os.WriteFile(saved, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"docker-archive", "oci-archive"} {
		if out, err := exec.Command(skopeo, "inspect", kind+":"+saved).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", kind, err, out)
		}
	}
}

func startDockerRegistry(t *testing.T, binary string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	cfg := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\n", dir, addr)
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, binary, "serve", cfg)
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) { // polls until it serves
		resp, err := client.Get("http://" + addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatal(errors.Join(errors.New("docker-registry does not answer"), err))
		}
	}
}

func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"busybox": "docker.io/library/busybox:latest", "a/b:c": "docker.io/a/b:c", "localhost:1/x": "localhost:1/x:latest",
		"x@sha256:" + strings.Repeat("a", 64): "docker.io/library/x@sha256:" + strings.Repeat("a", 64),
	} {
		if got, err := image.NormalizeName(in); err != nil || got != want {
			t.Errorf("%s: %q, %v", in, got, err)
		}
	}
	if repo, tag := image.Repository("docker.io/library/busybox:1"); repo != "busybox" || tag != "1" {
		t.Errorf("%q %q", repo, tag)
	}
}
