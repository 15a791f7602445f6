package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerCgroup is the cgroup parent that peers are given.
const peerCgroup = "berth-bench-peers"

// readyTimeout bounds the start of a daemon; stepTimeout that of one command.
const (
	readyTimeout = 60 * time.Second
	stepTimeout  = 60 * time.Second
)

// peerPackages are unpacked; their programs get links in the bench's own bin directory.
var peerPackages = []string{"docker.io", "containerd", "runc", "podman", "crun", "conmon", "netavark", "aardvark-dns", "iptables",
	"golang-github-containers-common", "golang-github-containers-image"}

// libraryPackages name the packages of libraries that a machine may not have.
var libraryPackages = map[string]string{
	"libsubid.so.4": "libsubid4", "libyajl.so.2": "libyajl2", "libdevmapper.so.1.02.1": "libdevmapper1.02.1",
	"libgpgme.so.11": "libgpgme11", "libassuan.so.0": "libassuan0", "libgpg-error.so.0": "libgpg-error0",
	"libglib-2.0.so.0": "libglib2.0-0", "libsystemd.so.0": "libsystemd0", "libseccomp.so.2": "libseccomp2",
	"libcap.so.2": "libcap2", "libip4tc.so.2": "libip4tc2", "libip6tc.so.2": "libip6tc2", "libxtables.so.12": "libxtables12",
	"libnftnl.so.11": "libnftnl11", "libmnl.so.0": "libmnl0", "libnetfilter_conntrack.so.3": "libnetfilter-conntrack3", "libnfnetlink.so.0": "libnfnetlink0",
}

// unpackPeers links the peers' programs into DIR/bin and the libraries they lack into DIR/lib.
func unpackPeers(dir string) error {
	bin, lib := filepath.Join(dir, "bin"), filepath.Join(dir, "lib")
	for _, d := range []string{bin, lib} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, pkg := range peerPackages {
		root, err := unpack(pkg)
		if err != nil {
			return err
		}
		for _, pattern := range []string{"usr/bin/*", "usr/sbin/*", "usr/lib/podman/*", "usr/libexec/podman/*"} {
			files, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil {
				return err
			}
			for _, file := range files {
				link(file, filepath.Join(bin, filepath.Base(file)))
				for _, soname := range missingLibraries(file) {
					if err := addLibrary(soname, lib); err != nil {
						return fmt.Errorf("%s: %w", filepath.Base(file), err)
					}
				}
			}
		}
	}
	// What podman reads from /etc is laid over the bench's own /etc.
	return copyPodmanFiles(dir)
}

func unpack(pkg string) (string, error) {
	cmd := exec.Command("hack/deb.sh", pkg)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// link keeps the first of several programs of one name.
func link(from, to string) {
	if _, err := os.Lstat(to); err != nil {
		_ = os.Symlink(from, to)
	}
}

func missingLibraries(file string) []string {
	out, err := exec.Command("ldd", file).Output()
	if err != nil {
		return nil // static, or a script
	}
	var list []string
	for _, line := range strings.Split(string(out), "\n") {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " => not found"); ok {
			list = append(list, name)
		}
	}
	return list
}

func addLibrary(soname, lib string) error {
	pkg, ok := libraryPackages[soname]
	if !ok {
		return fmt.Errorf("library %s is missing and its package unknown here", soname)
	}
	root, err := unpack(pkg)
	if err != nil {
		return err
	}
	for _, pattern := range []string{"usr/lib/*/", "lib/*/"} {
		if files, err := filepath.Glob(filepath.Join(root, pattern, soname)); err == nil && len(files) > 0 {
			link(files[0], filepath.Join(lib, soname))
			return nil
		}
	}
	return fmt.Errorf("package %s does not hold %s", pkg, soname)
}

func copyPodmanFiles(dir string) error {
	etc := filepath.Join(dir, "etc-upper", "containers")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"policy.json":     `{"default":[{"type":"insecureAcceptAnything"}]}`,
		"registries.conf": "unqualified-search-registries = [\"docker.io\"]\n",
		"containers.conf": fmt.Sprintf("[engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"none\"\nruntime=\"crun\"\nhelper_binaries_dir=[%q]\nconmon_path=[%q]\n[engine.runtimes]\ncrun=[%q]\nrunc=[%q]\n[network]\nnetwork_backend=\"netavark\"\n",
			filepath.Join(dir, "bin"), filepath.Join(dir, "bin/conmon"), filepath.Join(dir, "bin/crun"), filepath.Join(dir, "bin/runc")),
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	seccomp, err := unpack("golang-github-containers-common")
	if err != nil {
		return err
	}
	if profile, err := os.ReadFile(filepath.Join(seccomp, "usr/share/containers/seccomp.json")); err == nil {
		return os.WriteFile(filepath.Join(etc, "seccomp.json"), profile, 0o644)
	}
	return nil
}

// stage lays the peers' files over this mount namespace.
func stage(dir string) error {
	for _, d := range []string{"etc-work", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	err := unix.Mount("etc", "/etc", "overlay", 0, fmt.Sprintf("lowerdir=/etc,upperdir=%s/etc-upper,workdir=%s/etc-work", dir, dir))
	if err != nil {
		return fmt.Errorf("overlay on /etc: %w", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("tmpfs on /run: %w", err)
	}
	// crun 1.8 refuses a v2 mount without controllers beside v1; without it all of them work.
	if err := unix.Unmount("/sys/fs/cgroup/unified", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount /sys/fs/cgroup/unified: %w", err)
	}
	if err := stageLibraries(filepath.Join(dir, "lib")); err != nil {
		return err
	}
	return os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin:"+filepath.Join(dir, "bin"))
}

// stageLibraries lays the libraries that peers lack over the machine's: LD_LIBRARY_PATH would not
// reach a runtime that conmon starts with an environment of its own.
func stageLibraries(lib string) error {
	places, err := filepath.Glob("/usr/lib/*-linux-gnu")
	if err != nil {
		return err
	}
	if len(places) == 0 {
		return errors.New("no directory of shared libraries in /usr/lib")
	}
	if err := unix.Mount("lib", places[0], "overlay", unix.MS_RDONLY, "lowerdir="+lib+":"+places[0]); err != nil {
		return fmt.Errorf("overlay on %s: %w", places[0], err)
	}
	return nil
}

// dockerd starts a dockerd with its own containerd on a socket of its own and waits for its API.
func dockerd(dir string) (*exec.Cmd, time.Duration, error) {
	base := filepath.Join(dir, "docker")
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, 0, err
	}
	log, err := os.Create(filepath.Join(base, "log"))
	if err != nil {
		return nil, 0, err
	}
	defer log.Close()
	socket := filepath.Join(base, "d.sock")
	cmd := exec.Command(filepath.Join(dir, "bin/dockerd"), "--data-root", base+"/data", "--exec-root", base+"/exec", "--pidfile", base+"/pid",
		"-H", "unix://"+socket, "--cgroup-parent", "/"+peerCgroup, "--exec-opt", "native.cgroupdriver=cgroupfs", "--storage-driver", "overlay2",
		"--userland-proxy=false", "--config-file", base+"/none.json")
	if err := os.WriteFile(base+"/none.json", []byte("{}"), 0o644); err != nil {
		return nil, 0, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	if err := ping(socket, "/_ping"); err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, 0, fmt.Errorf("dockerd: %w\n%s", err, tail(text))
	}
	return cmd, time.Since(started), nil
}

func tail(text []byte) []byte { return text[max(0, len(text)-2000):] }

// ping waits until an HTTP server answers 200 on a unix socket.
func ping(socket, path string) error {
	deadline := time.Now().Add(readyTimeout)
	var last error
	for time.Now().Before(deadline) {
		if last = pingOnce(socket, path); last == nil {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return last
}

func pingOnce(socket, path string) error {
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: d\r\n\r\n", path); err != nil {
		return err
	}
	answer := make([]byte, 64)
	n, err := conn.Read(answer)
	if err == nil && !strings.Contains(string(answer[:n]), " 200 ") {
		err = fmt.Errorf("%s: %q", path, answer[:n])
	}
	return err
}

// stopDaemon ends a dockerd and its containerd.
func stopDaemon(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		_ = cmd.Process.Kill()
		<-done
	}
}

// podman returns the arguments of a podman with directories of its own.
func podman(dir string, args ...string) []string {
	base := filepath.Join(dir, "podman")
	return append([]string{filepath.Join(dir, "bin/podman"), "--root", base + "/root", "--runroot", base + "/run", "--tmpdir", base + "/tmp",
		"--storage-driver", "overlay", "--network-config-dir", base + "/net", "--cgroup-manager", "cgroupfs"}, args...)
}

// bundle makes an OCI bundle of the busybox image for runc and crun, without seccomp, as
// `runc spec` makes it.
func bundle(dir, archive string) (string, error) {
	base := filepath.Join(dir, "bundle")
	rootfs := filepath.Join(base, "rootfs")
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		return "", err
	}
	script := `set -e; cd "$1"; mkdir x; tar -C x -xf "$2"; for l in x/blobs/sha256/*; do tar -tf "$l" >/dev/null 2>&1 && tar -C rootfs -xf "$l"; done; rm -rf x
"$3" spec; sed -i -e 's/"terminal": true/"terminal": false/' -e 's/"sh"/"true"/' config.json`
	out, err := exec.Command("sh", "-c", script, "sh", base, archive, filepath.Join(dir, "bin/runc")).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("bundle: %w: %s", err, out)
	}
	return base, nil
}
