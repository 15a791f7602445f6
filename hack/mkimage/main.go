// Command mkimage builds the image archives of the demo and the tests without any registry:
// busybox and redis out of Debian's packages, the guestbook front out of its source.
//
//	mkimage -out DIR -deb hack/deb.sh [-guestbook BINARY] IMAGE...
//
// Each archive is both a docker archive (manifest.json) and an OCI layout (index.json). The same
// inputs give the same bytes: entries are sorted and carry one fixed time.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	out := flag.String("out", "", "directory for NAME.tar")
	deb := flag.String("deb", "hack/deb.sh", "script that unpacks Debian packages")
	front := flag.String("guestbook", "", "static executable of the guestbook front")
	flag.Parse()
	if err := run(*out, *deb, *front, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run(out, deb, front string, names []string) error {
	if out == "" {
		return errors.New("-out is missing: name the directory that takes the archives")
	}
	debs := packages{script: deb}
	for _, name := range names {
		var im image
		var err error
		switch name {
		case "busybox":
			im, err = busybox(debs)
		case "redis":
			im, err = redis(debs)
		case "guestbook":
			im, err = guestbook(front)
		default:
			err = fmt.Errorf("unknown image: use busybox, redis or guestbook")
		}
		if err == nil {
			err = im.write(filepath.Join(out, name+".tar"))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// packages unpacks Debian packages, by name, into directories.
type packages struct{ script string }

// root returns the directory with a package's files.
func (p packages) root(name string) (string, error) {
	cmd := exec.Command(p.script, name)
	cmd.Stderr = os.Stderr
	dir, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("package %s: %w", name, err)
	}
	return strings.TrimSpace(string(dir)), nil
}

// libraries returns the names of the lib* packages that a package depends on, directly.
func (packages) libraries(name string) ([]string, error) {
	text, err := exec.Command("apt-cache", "depends", "--no-recommends", "--no-suggests", "--no-conflicts",
		"--no-breaks", "--no-replaces", "--no-enhances", name).Output()
	if err != nil {
		return nil, fmt.Errorf("apt-cache depends %s: %w", name, err)
	}
	var libs []string
	for _, line := range strings.Split(string(text), "\n") {
		kind, dep, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if ok && strings.HasSuffix(kind, "Depends") && strings.HasPrefix(dep, "lib") {
			libs = append(libs, dep)
		}
	}
	return libs, nil
}

// base is the tree that every image with a shell starts from.
func base() *tree {
	t := newTree()
	for _, dir := range []string{"/bin", "/dev", "/etc", "/home", "/proc", "/root", "/sbin", "/sys", "/usr", "/usr/bin", "/usr/sbin", "/var", "/var/log", "/run"} {
		t.dir(dir, 0o755, 0, 0)
	}
	t.dir("/tmp", 0o1777, 0, 0)
	t.dir("/var/tmp", 0o1777, 0, 0)
	t.dir("/home/app", 0o755, 1000, 1000)
	t.file("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\napp:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n")
	t.file("/etc/group", 0o644, "root:x:0:\ndaemon:x:1:\nstaff:x:50:app\napp:x:1000:\nnogroup:x:65534:\n")
	t.file("/etc/nsswitch.conf", 0o644, "hosts: files dns\n")
	return t
}

// busybox is Debian's static busybox with a link for each of its applets.
func busybox(debs packages) (image, error) {
	layer, err := busyboxLayer(debs)
	if err != nil {
		return image{}, err
	}
	return image{
		names:  []string{"busybox:latest"},
		layers: []*tree{layer},
		config: config{Cmd: []string{"sh"}, Env: []string{pathEnv}},
	}, nil
}

const pathEnv = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func busyboxLayer(debs packages) (*tree, error) {
	root, err := debs.root("busybox-static")
	if err != nil {
		return nil, err
	}
	program, err := locate(root, "/bin/busybox")
	if err != nil {
		return nil, err
	}
	t := base()
	if err := t.copy("/bin/busybox", program, 0o755); err != nil {
		return nil, err
	}
	applets, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", program, err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			t.link("/bin/"+applet, "busybox")
		}
	}
	return t, nil
}

// redis is Debian's redis-server on top of busybox, run as the user redis.
func redis(debs packages) (image, error) {
	lower, err := busyboxLayer(debs)
	if err != nil {
		return image{}, err
	}
	t := newTree()
	passwd := lower.files["/etc/passwd"].content
	group := lower.files["/etc/group"].content
	t.file("/etc/passwd", 0o644, string(passwd)+"redis:x:999:999:redis:/data:/bin/false\n")
	t.file("/etc/group", 0o644, string(group)+"redis:x:999:\n")
	t.dir("/data", 0o755, 999, 999)
	if err := t.programs(debs, "redis-tools", "/usr/bin/redis-server", "/usr/bin/redis-cli"); err != nil {
		return image{}, err
	}
	return image{
		names:  []string{"redis:7"},
		layers: []*tree{lower, t},
		config: config{
			User:         "redis",
			WorkingDir:   "/data",
			Env:          []string{pathEnv},
			ExposedPorts: map[string]struct{}{"6379/tcp": {}},
			Volumes:      map[string]struct{}{"/data": {}},
			Cmd:          []string{"redis-server", "--dir", "/data", "--appendonly", "yes", "--protected-mode", "no"},
			Healthcheck:  &healthcheck{Test: []string{"CMD", "redis-cli", "ping"}, Interval: 5e9, Timeout: 3e9, Retries: 3},
		},
	}, nil
}

// guestbook is the front alone: a static executable and nothing else.
func guestbook(program string) (image, error) {
	if program == "" {
		return image{}, errors.New("-guestbook is missing: name the static executable")
	}
	t := newTree()
	t.dir("/etc", 0o755, 0, 0)
	t.dir("/tmp", 0o1777, 0, 0)
	t.file("/etc/passwd", 0o644, "guestbook:x:65532:65532:guestbook:/:/none\n")
	t.file("/etc/group", 0o644, "guestbook:x:65532:\n")
	if err := t.copy("/guestbook", program, 0o755); err != nil {
		return image{}, err
	}
	return image{
		names:  []string{"guestbook:1"},
		layers: []*tree{t},
		config: config{
			User:         "guestbook",
			ExposedPorts: map[string]struct{}{"8080/tcp": {}},
			Entrypoint:   []string{"/guestbook"},
			Healthcheck:  &healthcheck{Test: []string{"CMD", "/guestbook", "-check", "http://127.0.0.1:8080/healthz"}, Interval: 5e9, Timeout: 3e9, Retries: 3},
		},
	}, nil
}
