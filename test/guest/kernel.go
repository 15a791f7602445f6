package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// kernel is an unpacked Debian kernel.
type kernel struct {
	image   string // vmlinuz
	release string
	modules string // directory lib/modules/RELEASE
}

// wanted are the modules that the engine needs, where they are not built in.
var wanted = []string{
	"crc32c_generic", "overlay", "bridge", "br_netfilter", "veth", "dummy", "vxlan", "macvlan", "tun", "af_packet", "sctp",
	"nf_tables", "nf_conntrack", "nf_conntrack_netlink", "nft_chain_nat", "nft_nat", "nft_masq", "nft_redir", "nft_ct",
	"nft_fib", "nft_fib_ipv4", "nft_fib_ipv6", "nft_fib_inet", "nft_reject", "nft_reject_inet", "nft_hash", "nft_numgen",
	"nft_limit", "nft_log", "nft_objref", "nft_quota", "xfs", "loop",
}

// findKernel unpacks the package that linux-image-amd64 stands for.
func findKernel(ctx context.Context) (kernel, error) {
	const script = "hack/deb.sh"
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "linux-image-amd64").Output()
	if err != nil {
		return kernel{}, fmt.Errorf("apt-cache depends linux-image-amd64: %w", err)
	}
	var pkg string
	for _, line := range strings.Split(string(out), "\n") {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			pkg = "linux-image-" + name
			break
		}
	}
	if pkg == "" {
		return kernel{}, errors.New("apt knows no kernel package: run apt-get update as root, on Debian 12 or later")
	}
	cmd := exec.CommandContext(ctx, script, pkg)
	cmd.Stderr = os.Stderr
	dir, err := cmd.Output()
	if err != nil {
		return kernel{}, fmt.Errorf("%s %s: %w", script, pkg, err)
	}
	root := strings.TrimSpace(string(dir))
	images, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return kernel{}, fmt.Errorf("%s holds %d kernels, want one", root, len(images))
	}
	k := kernel{image: images[0], release: strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")}
	for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
		if dir := filepath.Join(root, lib, k.release); isDir(dir) {
			k.modules = dir
		}
	}
	if k.modules == "" {
		return kernel{}, fmt.Errorf("%s holds no modules for %s", root, k.release)
	}
	return k, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// load returns module files in the order of loading, what they depend on first. A module that
// the package does not hold is built in or absent; the guest's own checks tell.
func (k kernel) load(names []string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(k.modules, "kernel"), func(path string, entry fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(entry.Name(), ".ko"); err == nil && ok {
			files[canonical(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s: no uncompressed modules (.ko); this harness knows Debian 12's kernels", k.modules)
	}
	var order []string
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = canonical(name)
		file, ok := files[name]
		if !ok || done[name] {
			return nil
		}
		done[name] = true
		deps, err := dependencies(file)
		if err != nil {
			return err
		}
		for _, dep := range deps {
			if err := add(dep); err != nil {
				return err
			}
		}
		order = append(order, file)
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// dependencies reads depends= out of a module's .modinfo section.
func dependencies(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil
	}
	text, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var list []string
	for _, entry := range bytes.Split(text, []byte{0}) {
		if deps, ok := strings.CutPrefix(string(entry), "depends="); ok && deps != "" {
			list = append(list, strings.Split(deps, ",")...)
		}
	}
	return list, nil
}
