package main

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"

	"berth/internal/dns"
)

// resolvers runs the embedded resolver in every sandbox that needs one: package dns on sockets
// of package network, with the engine's names.
type resolvers struct {
	d      *daemon
	server *dns.Resolver
	ctx    context.Context
	cancel context.CancelFunc
	served sync.WaitGroup

	mu     sync.Mutex
	active map[string]context.CancelFunc
}

func newResolvers(d *daemon) *resolvers {
	r := &resolvers{d: d, active: map[string]context.CancelFunc{}}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.server = dns.New(dns.Config{
		Lookup:    func(sandbox, name string) ([]netip.Addr, bool) { return d.engine.Lookup(sandbox, name) },
		Reverse:   func(sandbox string, a netip.Addr) (string, bool) { return d.engine.Reverse(sandbox, a) },
		Upstreams: func(sandbox string) []string { return d.engine.Upstreams(sandbox) },
	})
	return r
}

// Serve implements engine.Resolvers. Serving what is served already changes nothing.
func (r *resolvers) Serve(sandbox, netns string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.active[sandbox] != nil {
		return nil
	}
	udp, tcp, err := r.d.networks.OpenResolver(sandbox, netns)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.ctx)
	r.active[sandbox] = cancel
	r.served.Add(1)
	go func() {
		defer r.served.Done()
		if err := r.server.Serve(ctx, sandbox, udp, tcp); err != nil && ctx.Err() == nil {
			slog.Warn("names are not answered in a sandbox any more", "sandbox", sandbox, "error", err)
		}
	}()
	return nil
}

// Stop implements engine.Resolvers.
func (r *resolvers) Stop(sandbox string) {
	r.mu.Lock()
	cancel := r.active[sandbox]
	delete(r.active, sandbox)
	r.mu.Unlock()
	if cancel == nil {
		return
	}
	cancel()
	if err := r.d.networks.CloseResolver(sandbox); err != nil {
		slog.Warn("resolver's sockets stay with the holder", "sandbox", sandbox, "error", err)
	}
}

// close ends serving and leaves the sockets with the holder: queries wait for the next daemon.
func (r *resolvers) close() {
	r.cancel()
	r.served.Wait()
}
