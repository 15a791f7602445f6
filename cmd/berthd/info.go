package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"berth/internal/cgroup"
	"berth/internal/dockerapi"
	"berth/internal/errdefs"
	"berth/internal/state"
)

// info gathers what the node says about itself.
func (d *daemon) info(ctx context.Context) dockerapi.Info {
	name := d.flags.nodeName
	if name == "" {
		name, _ = os.Hostname() // an unnamed machine shows as such
	}
	id, err := nodeID(filepath.Join(d.root.State, "node-id"))
	if err != nil {
		slog.Warn("the node's identity is not kept", "error", err)
	}
	when, _ := time.Parse(time.RFC3339, built) // a development build has no date
	in := dockerapi.Info{
		Version: version, Commit: commit, Built: when, ID: id, Name: name, StateDir: d.root.State,
		CgroupVersion: "1", SwapLimit: swapLimit(), RunnerVersion: version,
		SecurityOptions:    []string{"name=seccomp,profile=builtin"},
		InsecureRegistries: d.flags.insecure, NodeAddress: nodeAddress(),
	}
	if g, err := cgroup.Detect(); err == nil && g.Mode == cgroup.V2 {
		in.CgroupVersion = "2"
		in.SecurityOptions = append(in.SecurityOptions, "name=cgroupns")
	}
	for _, m := range d.flags.mirrors {
		if _, u, ok := strings.Cut(m, "="); ok {
			in.Mirrors = append(in.Mirrors, u)
		}
	}
	return in
}

// swapLimit tells whether the kernel can bound memory plus swap; cgroup v2 always can.
func swapLimit() bool {
	g, err := cgroup.Detect()
	if err != nil || g.Mode == cgroup.V2 {
		return err == nil
	}
	_, err = os.Stat(filepath.Join(g.Path("memory", "/"), "memory.memsw.limit_in_bytes"))
	return err == nil
}

// nodeAddress is the address by which others reach this node: what its default route leaves from.
func nodeAddress() string {
	c, err := net.Dial("udp4", "192.0.2.1:9") // documentation address: nothing is sent
	if err != nil {
		return ""
	}
	defer c.Close()
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok {
		return a.IP.String()
	}
	return ""
}

// nodeID is made once and kept.
func nodeID(path string) (string, error) {
	var id string
	err := state.ReadFile(path, 1, &id)
	if err == nil && id != "" {
		return id, nil
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	id = hex.EncodeToString(b[:])
	return id, state.WriteFile(path, 1, id)
}

// writeMirrors turns --mirror flags into containerd's hosts.toml files, beside those that the
// administrator wrote: a file that we did not make is left alone.
func writeMirrors(dir string, mirrors []string) error {
	const mark = "# written by berthd from --mirror\n"
	byHost := map[string][]string{}
	for _, m := range mirrors {
		host, u, ok := strings.Cut(m, "=")
		parsed, err := url.Parse(u)
		if !ok || host == "" || err != nil || parsed.Host == "" || parsed.Scheme != "http" && parsed.Scheme != "https" {
			return errdefs.New(errdefs.ErrInvalid, "--mirror %s: expected HOST=URL with an http or https URL, as in docker.io=https://mirror.example", m)
		}
		byHost[host] = append(byHost[host], u)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(dir, "*", "hosts.toml"))
	if err != nil {
		return err
	}
	for _, p := range old {
		b, err := os.ReadFile(p)
		host := filepath.Base(filepath.Dir(p))
		if err == nil && strings.HasPrefix(string(b), mark) && byHost[host] == nil {
			if err := os.Remove(p); err != nil {
				return err
			}
		}
	}
	for host, urls := range byHost {
		if strings.ContainsAny(host, "/\x00") || host == ".." || host == "." {
			return errdefs.New(errdefs.ErrInvalid, "--mirror: %q is no registry host", host)
		}
		p := filepath.Join(dir, host, "hosts.toml")
		if b, err := os.ReadFile(p); err == nil && !strings.HasPrefix(string(b), mark) {
			return errdefs.New(errdefs.ErrConflict, "--mirror %s: %s was written by hand; remove it or the flag", host, p)
		}
		var s strings.Builder
		s.WriteString(mark)
		for _, u := range urls {
			fmt.Fprintf(&s, "\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", u)
		}
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, []byte(s.String()), 0o644); err != nil {
			return err
		}
	}
	return nil
}
