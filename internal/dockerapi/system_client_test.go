package dockerapi_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"berth/internal/dockerapi"
	"berth/internal/engine"
	"berth/internal/image"
	"berth/internal/network"
)

// clientTimeout bounds one run of the docker client.
const clientTimeout = 30 * time.Second

// client runs an unmodified docker client against a node on a unix socket.
type client struct {
	t      *testing.T
	node   *node
	binary string
	env    []string
}

func newClient(t *testing.T, change ...func(*dockerapi.Options)) *client {
	t.Helper()
	binary, err := exec.LookPath("docker")
	if err != nil {
		t.Skip("no docker client on this machine")
	}
	n := newNode(t, change...)
	dir := t.TempDir()
	socket := filepath.Join(dir, "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &client{t: t, node: n, binary: binary, env: append(os.Environ(), "DOCKER_HOST=unix://"+socket, "DOCKER_CONFIG="+dir, "HOME="+dir)}
}

// run returns what docker prints on stdout and stderr; it must end as ok says.
func (c *client) run(ok bool, args ...string) string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), clientTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.binary, args...)
	cmd.Env = c.env
	out, err := cmd.CombinedOutput()
	if (err == nil) != ok {
		c.t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// says checks that docker prints all of the texts.
func (c *client) says(args string, texts ...string) {
	c.t.Helper()
	c.check(true, args, texts)
}

// fails checks that docker fails and prints all of the texts.
func (c *client) fails(args string, texts ...string) {
	c.t.Helper()
	c.check(false, args, texts)
}

func (c *client) check(ok bool, args string, texts []string) {
	c.t.Helper()
	out := c.run(ok, strings.Fields(args)...)
	for _, text := range texts {
		if !strings.Contains(out, text) {
			c.t.Errorf("docker %s: no %q in\n%s", args, text, out)
		}
	}
}

func TestDockerClientSystem(t *testing.T) {
	for _, version := range []string{"", "1.40"} {
		t.Run("API "+version, func(t *testing.T) { speaking(t, version).system() })
	}
}

// speaking is a client that speaks an API version; "" is its own newest.
func speaking(t *testing.T, version string) *client {
	t.Helper()
	c := newClient(t)
	if version != "" {
		c.env = append(c.env, "DOCKER_API_VERSION="+version)
	}
	return c
}

func (c *client) system() {
	web := c.node.images.add("web:1", epoch, nil, 1<<20, 2<<20)
	c.node.engine.run(hexID("a"), "front", engine.StatusRunning, web.ID)
	if _, err := c.node.volumes.Create(c.t.Context(), dockerapi.VolumeConfig{Name: "data"}); err != nil {
		c.t.Fatal(err)
	}

	c.says("version", "Server: Berth", "API version:", "minimum version 1.40", "berth-runner:", "Experimental:     false")
	c.says("info", "Storage Driver: overlayfs", "Cgroup Driver: cgroupfs", "Cgroup Version: 1", "Default Runtime: berth", "Live Restore Enabled: true",
		"Running: 1", "Swarm: inactive", "registry.test:5000", "https://mirror.test/", "Logging Driver: json-file", "Network: bridge host null",
		"Profile: builtin", "cgroupns", "Name: harbour")
	c.says("system df", "Images          1         1         12.35kB", "Local Volumes   1         0         1kB", "Build Cache     0         0         0B")
	c.says("system df -v", "Images space usage", "web", "data")
	c.says("system prune -f", "Total reclaimed space: 0B")
	c.fails("search redis", "docker search is not supported by Berth")
	c.fails("login -u jo -p wrong registry.test", "unauthorized: incorrect username or password")
	c.says("login -u jo -p right registry.test", "Login Succeeded")
}

func TestDockerClientImages(t *testing.T) {
	for _, version := range []string{"", "1.40"} {
		t.Run("API "+version, func(t *testing.T) { speaking(t, version).handleImages() })
	}
}

func (c *client) handleImages() {
	t, n := c.t, c.node
	n.images.add("web:1", time.Now().Add(-2*time.Hour), nil, 1<<20, 2<<20)
	n.images.onPull(func(_ context.Context, ref string, o image.PullOptions) (image.Image, error) {
		o.Progress(image.Status{ID: "latest", Action: "Pulling from library/busybox"})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Pulling fs layer"})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Downloading", Current: 1, Total: 2})
		o.Progress(image.Status{ID: "aabbccddeeff", Action: "Pull complete"})
		o.Progress(image.Status{Action: "Digest: sha256:" + hexID("1")})
		o.Progress(image.Status{Action: "Status: Downloaded newer image for busybox:latest"})
		return n.images.add("busybox:latest", epoch, nil, 10), nil
	})
	c.says("images", "REPOSITORY", "web          1", "2 hours ago", "3.15MB")
	c.says("images -f reference=we* --format {{.Repository}}:{{.Tag}}", "web:1")
	c.says("image inspect web:1 -f {{.Architecture}}-{{.Config.Cmd}}-{{.Config.Healthcheck.Test}}-{{.Config.Entrypoint}}", "amd64-[sh]-[CMD true]-[]")
	c.says("history web:1", "COPY layer", "2.1MB")
	c.says("pull busybox", "latest: Pulling from library/busybox", "aabbccddeeff: Pull complete", "Status: Downloaded newer image for busybox:latest", "docker.io/library/busybox:latest")
	c.says("push busybox", "The push refers to repository [docker.io/library/busybox]", "aabbccddeeff: Pushed")
	c.says("tag busybox other:2")
	other, err := n.images.Resolve(t.Context(), "other:2")
	if err != nil {
		t.Fatal(err)
	}
	c.says("images -q other:2", other.ID.Encoded()[:12])
	n.images.onPull(nil)
	c.fails("pull nope", "pull access denied for docker.io/library/nope:latest")
	c.fails("pull -a busybox", "docker pull -a")
	c.fails("push nope", "An image does not exist locally with the tag: nope")
	c.fails("image inspect nope", "No such image: nope")
	c.fails("rmi nope", "No such image: nope")
	archive := filepath.Join(t.TempDir(), "a.tar")
	c.says("save -o " + archive + " web:1 busybox")
	if raw, err := os.ReadFile(archive); err != nil || string(raw) != "archive of web:1 busybox" {
		t.Errorf("saved %q, %v", raw, err)
	}
	c.says("load -i "+archive, "Loaded image: loaded:1", "Loaded image ID: sha256:")
	c.says("load -q -i "+archive, "Loaded image: loaded:1")
	c.says("rmi web:1", "Untagged: web:1", "Deleted: sha256:")
	c.says("image prune -f", "Total reclaimed space")
}

func TestDockerClientNetworksAndVolumes(t *testing.T) {
	c := newClient(t)
	n := c.node
	n.engine.run(hexID("a"), "front", engine.StatusRunning, "")
	c.says("network create --subnet 10.9.0.0/24 --gateway 10.9.0.1 --label a=b app")
	c.says("network ls", "bridge    bridge    local", "app       bridge    local", "host      host      local", "none      null      local")
	c.says("network connect --alias www --ip 10.9.0.9 app front")
	app, err := n.networks.Get("app")
	if err != nil {
		t.Fatal(err)
	}
	n.networks.attach(network.Endpoint{Sandbox: hexID("a"), NetworkID: app.ID, MAC: "02:42:0a:09:00:09"})
	c.says("network inspect app", `"Subnet": "10.9.0.0/24"`, `"Name": "front"`, `"MacAddress": "02:42:0a:09:00:09"`)
	c.fails("network rm app", "network app has active endpoints")
	c.fails("network rm bridge", "bridge is a pre-defined network and cannot be removed")
	c.fails("network create --ipv6 six", "IPv6")
	c.fails("network create app", "network with name app already exists")
	c.fails("network inspect nope", "nope")
	n.networks.attach()
	c.says("network disconnect app front")
	c.says("network prune -f", "app")

	c.says("volume create data", "data")
	c.says("volume ls", "local     data")
	c.says("volume inspect data", `"Driver": "local"`, `"Mountpoint": "/state/volumes/data"`)
	c.fails("volume inspect nope", "nope")
	c.says("volume rm data", "data")
	c.says("volume rm -f data", "data")
	c.says("volume create", hexID("e"))
	c.says("volume prune -f", hexID("e"), "Total reclaimed space: 1kB")
}
