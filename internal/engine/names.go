package engine

import (
	"net/netip"
	"strings"
)

// Lookup answers a name asked in a sandbox: container names, short IDs and aliases of what is
// attached to one of the sandbox's networks. Names compare without case.
func (e *Engine) Lookup(sandboxID, name string) ([]netip.Addr, bool) {
	b, err := e.findSandbox(sandboxID)
	if err != nil {
		return nil, false
	}
	mine := e.resolvable(b.view())
	var found []netip.Addr
	for _, o := range e.Sandboxes() {
		for _, ep := range o.State.Endpoints {
			if mine[ep.NetworkID] && e.answersTo(o, ep.Aliases, name) {
				found = append(found, ep.Address.Addr())
			}
		}
	}
	return found, len(found) > 0
}

// resolvable are the networks of a sandbox on which names are answered.
func (e *Engine) resolvable(b Sandbox) map[string]bool {
	nets := map[string]bool{}
	for _, ep := range b.State.Endpoints {
		if n, err := e.Networks.Get(ep.NetworkID); err == nil && n.Config.Name != "bridge" {
			nets[ep.NetworkID] = true
		}
	}
	return nets
}

func (e *Engine) answersTo(b Sandbox, aliases []string, name string) bool {
	for _, a := range aliases {
		if strings.EqualFold(a, name) {
			return true
		}
	}
	if strings.EqualFold(shortID(b.Config.ID), name) || strings.EqualFold(b.Config.Hostname, name) {
		return true
	}
	for _, c := range e.inSandbox(b.Config.ID) {
		c.mu.Lock()
		n := c.Config.Name
		c.mu.Unlock()
		if strings.EqualFold(n, name) {
			return true
		}
	}
	return false
}

// Reverse answers an address asked in a sandbox: the name of the container that has it on one of
// the sandbox's networks, qualified by the network's name as docker does.
func (e *Engine) Reverse(sandboxID string, addr netip.Addr) (string, bool) {
	b, err := e.findSandbox(sandboxID)
	if err != nil {
		return "", false
	}
	mine := e.resolvable(b.view())
	for _, o := range e.Sandboxes() {
		for _, ep := range o.State.Endpoints {
			if !mine[ep.NetworkID] || ep.Address.Addr() != addr {
				continue
			}
			n, err := e.Networks.Get(ep.NetworkID)
			if err != nil {
				continue
			}
			for _, c := range e.inSandbox(o.Config.ID) {
				return c.view().Config.Name + "." + n.Config.Name, true
			}
			return shortID(o.Config.ID) + "." + n.Config.Name, true
		}
	}
	return "", false
}
