package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Restore compares the kernel with the records at the start of the daemon. live names the
// sandboxes that go on; all others lose their endpoints, ports and namespaces, and so does one
// whose network namespace is gone (after a reboot): it is started anew by its owner. What is
// missing for the live ones is made again; what is there is not touched, so that traffic does
// not notice.
func (s *Service) Restore(ctx context.Context, live map[string]bool) error {
	if err := s.forgetDead(ctx, live); err != nil {
		return fmt.Errorf("restore networks: %w", err)
	}
	if err := s.retakeSockets(); err != nil {
		return fmt.Errorf("restore networks: %w", err)
	}
	links, err := dump(s.host.LinkList)
	if err != nil {
		return fmt.Errorf("restore networks: list links: %w", err)
	}
	s.removeStrayLinks(links)
	if err := s.restoreEndpoints(ctx, links); err != nil {
		return fmt.Errorf("restore networks: %w", err)
	}
	if !s.needsTable() {
		return nil
	}
	return s.Repair(ctx)
}

// needsTable tells whether anything is attached.
func (s *Service) needsTable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.endpoints) > 0
}

// forgetDead removes the records and namespaces of sandboxes that are gone.
func (s *Service) forgetDead(ctx context.Context, live map[string]bool) error {
	s.mu.Lock()
	dead := map[string]bool{}
	for sandbox, eps := range s.endpoints {
		for _, ep := range eps {
			if !live[sandbox] || !isNamespace(ep.NetNS) {
				dead[sandbox] = true
			}
		}
	}
	for sandbox := range s.ports {
		if s.endpoints[sandbox] == nil {
			dead[sandbox] = true
		}
	}
	s.mu.Unlock()
	for sandbox := range dead {
		if err := s.forgetSandbox(ctx, sandbox); err != nil {
			return err
		}
	}
	return s.removeDeadNamespaces(live)
}

// forgetSandbox drops a sandbox's records; its interfaces are removed as strays, its ports from
// the kernel when the table is repaired.
func (s *Service) forgetSandbox(ctx context.Context, sandbox string) error {
	s.mu.Lock()
	ports := slices.Clone(s.ports[sandbox])
	eps := s.endpoints[sandbox]
	for _, p := range ports {
		s.dropPort(p)
	}
	delete(s.endpoints, sandbox)
	for _, ep := range eps {
		if e := s.nets[ep.NetworkID]; e != nil && e.pool != nil {
			e.pool.release(ep.Address.Addr())
		}
	}
	s.mu.Unlock()
	errs := []error{ctx.Err(), s.store.Delete(kindPorts, sandbox), s.CloseResolver(sandbox)}
	for _, p := range ports {
		if s.sockets != nil {
			errs = append(errs, s.sockets.Drop(p.socketKey()))
		}
	}
	for _, ep := range eps {
		errs = append(errs, s.store.Delete(kindEndpoint, endpointKey(ep.Endpoint)))
	}
	return errors.Join(errs...)
}

// removeDeadNamespaces removes directories of namespaces that no live sandbox owns, and what is
// left of a removal that was cut short.
func (s *Service) removeDeadNamespaces(live map[string]bool) error {
	dir := s.namespaceDir()
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, d := range entries {
		path := filepath.Join(dir, d.Name())
		if live[d.Name()] && s.intact(path) {
			continue
		}
		if err := unmountNamespaces(path); err != nil {
			s.log.Warn("remove namespaces", "directory", path, "error", err)
		}
	}
	return nil
}

// intact tells whether all namespace files in a directory are mounted namespaces: after a
// reboot on a file system that keeps them they are empty files. What the engine put beside them
// is its own business.
func (s *Service) intact(dir string) bool {
	for _, f := range namespaceFiles() {
		path := filepath.Join(dir, f.name)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue // the sandbox shares the host's
		}
		if !isNamespace(path) {
			return false
		}
	}
	return true
}

// retakeSockets takes the sockets of published ports back from their keeper. One that is lost
// is bound again; if somebody else was quicker, the rules still carry the traffic.
func (s *Service) retakeSockets() error {
	s.mu.Lock()
	var list []*publishedPort
	for _, ports := range s.ports {
		for _, p := range ports {
			if p.fd < 0 {
				list = append(list, p)
			}
		}
	}
	s.mu.Unlock()
	for _, p := range list {
		if s.takeSocket(p) {
			continue
		}
		if err := s.bind(p); err != nil {
			s.log.Warn("a published port could not be reserved again", "port", p.HostPort, "protocol", p.Protocol, "sandbox", p.Sandbox, "error", err)
			continue
		}
		if err := s.keep([]*publishedPort{p}); err != nil {
			return err
		}
	}
	return nil
}

func (s *Service) takeSocket(p *publishedPort) bool {
	if s.sockets == nil {
		return false
	}
	fds, err := s.sockets.Take(p.socketKey())
	if err != nil {
		s.log.Warn("take a published port's socket back", "port", p.HostPort, "error", err)
	}
	if len(fds) == 0 {
		return false
	}
	p.fd = fds[0]
	for _, fd := range fds[1:] {
		unix.Close(fd)
	}
	return true
}

// removeStrayLinks deletes interfaces of this instance that no record knows: of sandboxes that
// are gone, of attaches that a crash cut short, bridges of networks that were removed.
func (s *Service) removeStrayLinks(links []netlink.Link) {
	s.mu.Lock()
	known := map[string]bool{}
	for _, eps := range s.endpoints {
		for _, ep := range eps {
			known[ep.Peer] = true
		}
	}
	s.mu.Unlock()
	bridges := s.bridgeNames()
	prefix := peerPrefix(s.root.Tag())
	for _, l := range links {
		a := l.Attrs()
		stray := l.Type() == "veth" && strings.HasPrefix(a.Name, prefix) && len(a.Name) == len(prefix)+8 && !known[a.Name] ||
			l.Type() == "bridge" && a.Alias == s.alias() && !bridges[a.Name]
		if !stray {
			continue
		}
		if err := ignoreNoLink(s.host.LinkDel(l)); err != nil {
			s.log.Warn("delete stray interface", "interface", a.Name, "error", err)
		}
	}
}

// restoreEndpoints makes missing bridges of networks in use and plugs in again what fell out.
func (s *Service) restoreEndpoints(ctx context.Context, links []netlink.Link) error {
	present := map[string]int{} // master by name
	for _, l := range links {
		present[l.Attrs().Name] = l.Attrs().MasterIndex
	}
	s.mu.Lock()
	var list []Endpoint
	for _, eps := range s.endpoints {
		for _, ep := range eps {
			list = append(list, ep.Endpoint)
		}
	}
	s.mu.Unlock()
	for _, ep := range list {
		s.mu.Lock()
		e := s.nets[ep.NetworkID]
		s.mu.Unlock()
		if err := s.ensureBridge(ctx, e); err != nil {
			return err
		}
		e.bridgeMu.Lock()
		bridge := e.index
		e.bridgeMu.Unlock()
		master, ok := present[ep.Peer]
		if ok && master == bridge {
			continue
		}
		if ok {
			if err := s.replugHost(e, ep.Peer, bridge); err != nil {
				return err
			}
			continue
		}
		if err := s.plug(e, &ep); err != nil {
			return fmt.Errorf("sandbox %s: %w", shortID(ep.Sandbox), err)
		}
	}
	return nil
}

// replugHost makes an interface a port of the bridge again.
func (s *Service) replugHost(e *entry, peer string, bridge int) error {
	link, err := s.host.LinkByName(peer)
	if err == nil {
		err = s.host.LinkSetMasterByIndex(link, bridge)
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", peer, err)
	}
	return s.setPortFlags(e, link)
}

// Teardown removes every trace of the instance from the kernel: rules, interfaces, namespaces,
// kept sockets. The networks themselves stay on record. Containers must have ended before.
func (s *Service) Teardown(ctx context.Context) error {
	s.mu.Lock()
	sandboxes := map[string]bool{}
	for sandbox := range s.endpoints {
		sandboxes[sandbox] = true
	}
	for sandbox := range s.ports {
		sandboxes[sandbox] = true
	}
	s.mu.Unlock()
	var errs []error
	for sandbox := range sandboxes {
		errs = append(errs, s.Release(ctx, sandbox))
	}
	s.mu.Lock()
	bridges := make([]*entry, 0, len(s.nets))
	for _, e := range s.nets {
		bridges = append(bridges, e)
	}
	s.mu.Unlock()
	errs = append(errs, wait(ctx, s.reapNow()))
	s.mu.Lock()
	wasOff := s.plan.Forward == "0"
	s.mu.Unlock()
	routerOff, err := s.dropTable(wasOff)
	errs = append(errs, err)
	for _, e := range bridges {
		errs = append(errs, s.removeBridge(e))
	}
	if links, err := dump(s.host.LinkList); err == nil {
		s.removeStrayLinks(links)
	} else {
		errs = append(errs, err)
	}
	errs = append(errs, s.removeDeadNamespaces(nil), s.removeNamespaceDir(), s.restoreForwarding(routerOff))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("tear networks down: %w", err)
	}
	return nil
}

// restoreForwarding forgets that we made the host a router, and makes it none again if nobody
// else needs it so.
func (s *Service) restoreForwarding(off bool) error {
	s.mu.Lock()
	s.plan.Forward = ""
	plan := s.plan
	s.mu.Unlock()
	var err error
	if off {
		err = s.inHost(func() error { return writeSysctl("net/ipv4/ip_forward", "0") })
	}
	return errors.Join(err, s.store.Put(kindPlan, planKey, plan))
}
