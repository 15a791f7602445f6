package engine

import (
	"bytes"
	"net/netip"
	"os"
	"strings"
)

// Where the node's own resolver configuration may be: the second is systemd-resolved's list of
// real servers, needed when the first points to its stub on a loopback address.
const (
	resolvPath        = "/etc/resolv.conf"
	resolvSystemdPath = "/run/systemd/resolve/resolv.conf"
)

// resolv is the content of a resolv.conf(5).
type resolv struct {
	servers, searches, options []string
}

func parseResolv(b []byte) resolv {
	var r resolv
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			r.servers = append(r.servers, f[1])
		case "search", "domain":
			r.searches = f[1:]
		case "options":
			r.options = append(r.options, f[1:]...)
		}
	}
	return r
}

// hostResolv reads the node's configuration. Loopback servers cannot be reached from another
// network namespace and are left out unless it is the node's own.
func hostResolv(ownNamespace bool) resolv {
	b, _ := os.ReadFile(resolvPath) // absent: no servers
	r := parseResolv(b)
	if ownNamespace {
		return r
	}
	if reach := reachable(r.servers); len(reach) > 0 || len(r.servers) == 0 {
		r.servers = reach
		return r
	}
	b, _ = os.ReadFile(resolvSystemdPath)
	real := parseResolv(b)
	r.servers = reachable(real.servers)
	return r
}

func reachable(servers []string) []string {
	var out []string
	for _, s := range servers {
		if a, err := netip.ParseAddr(s); err == nil && !a.IsLoopback() {
			out = append(out, s)
		}
	}
	return out
}

// resolvConf renders the file for a sandbox: explicit settings win over the node's.
func resolvConf(host resolv, d DNSConfig, embedded bool) []byte {
	pick := func(own, fallback []string) []string {
		if len(own) > 0 {
			return own
		}
		return fallback
	}
	servers, searches, options := pick(d.Servers, host.servers), pick(d.Searches, host.searches), pick(d.Options, host.options)
	if embedded {
		servers = []string{ResolverAddress}
		if len(d.Options) == 0 {
			options = []string{"ndots:0"}
		}
	}
	var b bytes.Buffer
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(searches) > 0 && !(len(searches) == 1 && searches[0] == ".") {
		b.WriteString("search " + strings.Join(searches, " ") + "\n")
	}
	if len(options) > 0 {
		b.WriteString("options " + strings.Join(options, " ") + "\n")
	}
	return b.Bytes()
}

// Upstreams returns the servers that the embedded resolver asks for a sandbox's other names.
func (e *Engine) Upstreams(sandboxID string) []string {
	b, err := e.findSandbox(sandboxID)
	if err != nil {
		return nil
	}
	if s := b.view().Config.DNS.Servers; len(s) > 0 {
		return s
	}
	return hostResolv(true).servers // queries leave from the node's own namespace
}
