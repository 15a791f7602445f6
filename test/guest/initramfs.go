package main

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

//go:embed init.sh
var initScript string

//go:embed scripts.sh
var scriptsScript string

// build writes the initramfs: busybox, the modules, and below /payload what the tests need.
func build(ctx context.Context, o options, k kernel, file string) error {
	modules, err := k.load(wanted)
	if err != nil {
		return err
	}
	busybox, err := debianBusybox(ctx)
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	buffered := bufio.NewWriterSize(out, 1<<20)
	w := &cpio{w: buffered}
	for _, dir := range []string{"bin", "dev", "etc", "proc", "sys", "modules", "new", "payload", "payload/bin", "payload/etc", "payload/tmp"} {
		w.dir(dir)
	}
	w.node("dev/console", 5, 1)
	w.copy("bin/busybox", busybox, 0o755)
	w.copy("payload/bin/busybox", busybox, 0o755)
	applets, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("%s --list: %w", busybox, err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			w.link("bin/"+applet, "busybox")
			w.link("payload/bin/"+applet, "busybox")
		}
	}
	w.file("init", []byte(initScript), 0o755)
	w.file("payload/etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644)
	w.file("payload/etc/group", []byte("root:x:0:\n"), 0o644)
	w.file("payload/etc/hosts", []byte("127.0.0.1 localhost\n"), 0o644)
	var order []string
	for _, module := range modules {
		name := filepath.Base(module)
		w.copy("modules/"+name, module, 0o644)
		order = append(order, name)
	}
	w.file("modules/order", []byte(strings.Join(order, "\n")+"\n"), 0o644)
	if !o.hello {
		if err := payload(ctx, w, o); err != nil {
			return err
		}
	}
	w.trailer()
	return errors.Join(w.err, buffered.Flush())
}

// payload adds the product, the docker client, images and the compiled scripts.
func payload(ctx context.Context, w *cpio, o options) error {
	for _, dir := range []string{"payload/bin", "payload/e2e", "payload/e2e/testdata", "payload/e2e/testdata/script", "payload/cache", "payload/cache/images",
		"payload/cache/images/current", "payload/cache/tools", "payload/cache/tools/docker-config", "payload/cache/tools/docker-config/cli-plugins"} {
		w.dir(dir)
	}
	for _, name := range []string{"berth", "berthd", "berth-runner", "berth-holder", "berth-init"} {
		w.copy("payload/bin/"+name, filepath.Join(o.bin, name), 0o755)
	}
	docker, err := exec.LookPath("docker")
	if err != nil {
		return errors.New("no docker client: run hack/tools.sh and add its PATH")
	}
	w.copy("payload/bin/docker", docker, 0o755)
	made := map[string]bool{}
	for _, library := range libraries(ctx, docker) {
		for i, c := range library {
			if dir := library[:i]; c == '/' && i > 0 && !made[dir] {
				made[dir] = true
				w.dir("payload" + dir)
			}
		}
		w.copy("payload"+library, library, 0o755)
	}

	cache := os.Getenv("BERTH_CACHE")
	if cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		cache = filepath.Join(base, "berth")
	}
	for _, name := range []string{"busybox", "redis"} {
		w.copy("payload/cache/images/current/"+name+".tar", filepath.Join(cache, "images/current", name+".tar"), 0o644)
	}

	binary, err := os.CreateTemp("", "e2e-*.test")
	if err != nil {
		return err
	}
	defer os.Remove(binary.Name())
	binary.Close()
	compile := exec.CommandContext(ctx, "go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", binary.Name(), "./test/e2e")
	compile.Env = append(os.Environ(), "CGO_ENABLED=0")
	compile.Stderr = os.Stderr
	if err := compile.Run(); err != nil {
		return fmt.Errorf("compile test/e2e: %w", err)
	}
	w.copy("payload/e2e/e2e.test", binary.Name(), 0o755)
	var files []string
	for _, dir := range []string{"test/guest/testdata/script", "test/e2e/testdata/script"} {
		found, err := filepath.Glob(filepath.Join(dir, "*.txtar"))
		if err != nil {
			return err
		}
		files = append(files, found...) // sorted by Glob
	}
	chosen, err := regexp.Compile(o.run)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	var names []string
	for _, file := range files {
		if name := strings.TrimSuffix(filepath.Base(file), ".txtar"); chosen.MatchString(name) {
			w.copy("payload/e2e/testdata/script/"+filepath.Base(file), file, 0o644)
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return fmt.Errorf("-run %s: no script has such a name", o.run)
	}
	w.file("payload/e2e/run", []byte(fmt.Sprintf("VERBOSE=%t\nSCRIPTS='%s'\nSLOW=%d\nLIMIT=%s\n", o.verbose, strings.Repeat(strings.Join(names, " ")+" ", o.count), slowness, scriptLimit)), 0o644)
	w.file("payload/e2e/scripts.sh", []byte(scriptsScript), 0o755)
	return nil
}

// libraries lists the shared libraries that an executable needs, its loader too; a static one,
// of which ldd says so with an error, needs none.
func libraries(ctx context.Context, file string) []string {
	out, err := exec.CommandContext(ctx, "ldd", file).Output()
	if err != nil {
		return nil
	}
	var list []string
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			list = append(list, word)
		}
	}
	return list
}

func debianBusybox(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "hack/deb.sh", "busybox-static")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("busybox-static: %w", err)
	}
	root := strings.TrimSpace(string(out))
	for _, path := range []string{"bin/busybox", "usr/bin/busybox"} {
		if file := filepath.Join(root, path); !isDir(file) {
			if _, err := os.Stat(file); err == nil {
				return file, nil
			}
		}
	}
	return "", fmt.Errorf("%s holds no busybox", root)
}

// cpio writes the "newc" format of Linux' Documentation/driver-api/early-userspace/buffer-format.
// The first error sticks.
type cpio struct {
	w     io.Writer
	inode int
	err   error
}

// File types of st_mode.
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
	typeChar = 0o020000
)

func (c *cpio) header(name string, mode uint32, size int64, major, minor int) {
	c.inode++
	c.printf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", c.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0)
	c.printf("%s\x00", name)
	c.pad(110 + len(name) + 1)
}

func (c *cpio) printf(format string, args ...any) {
	if c.err == nil {
		_, c.err = fmt.Fprintf(c.w, format, args...)
	}
}

func (c *cpio) pad(n int) {
	if n%4 != 0 {
		c.printf("%s", "\x00\x00\x00"[:4-n%4])
	}
}

func (c *cpio) dir(name string) { c.header(name, typeDir|0o755, 0, 0, 0) }

func (c *cpio) node(name string, major, minor int) { c.header(name, typeChar|0o600, 0, major, minor) }

func (c *cpio) link(name, target string) { c.content(name, typeLink|0o777, []byte(target)) }

func (c *cpio) file(name string, content []byte, mode uint32) {
	c.content(name, typeFile|mode, content)
}

func (c *cpio) content(name string, mode uint32, content []byte) {
	c.header(name, mode, int64(len(content)), 0, 0)
	c.printf("%s", content)
	c.pad(len(content))
}

// copy adds a file of this machine without holding it in memory.
func (c *cpio) copy(name, from string, mode uint32) {
	if c.err != nil {
		return
	}
	f, err := os.Open(from)
	if err != nil {
		c.err = err
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		c.err = err
		return
	}
	c.header(name, typeFile|mode, info.Size(), 0, 0)
	if c.err == nil {
		_, c.err = io.CopyN(c.w, f, info.Size())
	}
	c.pad(int(info.Size() % 4))
}

func (c *cpio) trailer() { c.header("TRAILER!!!", 0, 0, 0, 0) }
