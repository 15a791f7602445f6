package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"berth/internal/dockerapi"
	"berth/internal/engine"
	"berth/internal/event"
	"berth/internal/image"
	"berth/internal/network"
	"berth/internal/nodeapi"
	"berth/internal/runner"
	"berth/internal/runner/hold"
	"berth/internal/state"
	"berth/internal/volume"
)

// daemon is everything berthd consists of.
type daemon struct {
	root     state.Root
	flags    flags
	started  time.Time
	holder   *hold.Client
	sockets  *sockets
	journal  *state.Journal
	hub      *event.Hub
	images   *image.Store
	networks *network.Service
	volumes  *volume.Store
	names    *resolvers
	engine   *engine.Engine
	ready    chan struct{}
}

// serve constructs the parts, lowest first, and runs them until ctx ends or one fails.
func serve(ctx context.Context, root state.Root, f flags) error {
	for _, d := range []string{root.State, root.Run} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	if err := hold.Claim(root.Run, hold.Daemon); err != nil {
		return err
	}
	d := &daemon{root: root, flags: f, started: time.Now(), hub: event.NewHub(), ready: make(chan struct{})}
	if err := d.open(ctx); err != nil {
		return errors.Join(err, d.close())
	}
	err := d.run(ctx)
	return errors.Join(err, d.close())
}

func (d *daemon) open(ctx context.Context) error {
	var err error
	if d.holder, err = hold.Dial(d.root.Socket("holder")); err != nil {
		return fmt.Errorf("berthd runs under berth-holder; start it with berth up: %w", err)
	}
	d.sockets = newSockets(d.holder)
	if d.journal, err = state.OpenJournal(d.root.Journal()); err != nil {
		return err
	}
	// The image store is the slowest to open and needs nothing of the others.
	imagesOpen := make(chan error, 1)
	go func() {
		var err error
		d.images, err = image.Open(ctx, image.Config{
			Dir: d.root.Images(), Registries: d.root.Registries(), InsecureRegistries: d.flags.insecure, Log: slog.Default(),
		})
		imagesOpen <- err
	}()
	err = d.openNode(ctx)
	if err2 := <-imagesOpen; err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	d.names = newResolvers(d)
	d.engine, err = engine.Open(engine.Options{
		Root: d.root, Store: d.journal, DialRunner: d.dialRunner, Images: d.images, Networks: d.networks,
		Volumes: volumesOf{d.volumes}, Resolvers: d.names, Events: d.hub, InitPath: beside("berth-init"),
	})
	return err
}

func (d *daemon) openNode(ctx context.Context) error {
	if err := writeMirrors(d.root.Registries(), d.flags.mirrors); err != nil {
		return err
	}
	var err error
	if d.networks, err = network.Open(ctx, network.Options{
		Root: d.root, Store: d.journal, Sockets: d.sockets, Describe: d.describe,
	}); err != nil {
		return err
	}
	d.volumes, err = volume.Open(d.root.Volumes(), d.journal)
	return err
}

// describe names a sandbox in messages: by its container, where it has one.
func (d *daemon) describe(sandbox string) string {
	if d.engine != nil {
		if c, err := d.engine.Container(sandbox); err == nil {
			return fmt.Sprintf("container %q", c.Config.Name)
		}
	}
	return "sandbox " + sandbox
}

func (d *daemon) dialRunner(ctx context.Context) (engine.Runner, error) {
	return runner.Dial(ctx, d.root.Socket("runner"))
}

func (d *daemon) close() error {
	var errs []error
	if d.names != nil {
		d.names.close()
	}
	if d.images != nil {
		errs = append(errs, d.images.Close())
	}
	if d.networks != nil {
		d.networks.Close()
	}
	if d.journal != nil {
		errs = append(errs, d.journal.Close())
	}
	if d.holder != nil {
		errs = append(errs, d.holder.Close())
	}
	return errors.Join(errs...)
}

// run supervises: the first part that fails ends the others, and the holder starts anew.
func (d *daemon) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	part := func(name string, f func(context.Context) error) {
		parts.Add(1)
		go func() {
			defer parts.Done()
			if err := f(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", name, err))
			}
		}()
	}
	part("journal", d.journal.Run)
	part("images", d.images.Run)
	part("network", d.repairRules)
	part("engine", func(ctx context.Context) error { return d.engine.Run(ctx, func() { close(d.ready) }) })
	part("holder", func(ctx context.Context) error {
		err := hold.Survive(ctx, d.root, d.holder, d.sockets.park)
		for err != nil && ctx.Err() == nil {
			// Without a holder it still holds everything: better alone than gone.
			slog.Error("no new berth-holder yet", "error", err)
			err = hold.Revive(ctx, d.root, d.sockets.park)
		}
		if ctx.Err() != nil {
			return nil
		}
		return errors.New("berth-holder is gone; the new one starts the daemon again")
	})
	part("api", d.serveAPIs)
	parts.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// repairEvery is how often the packet filter's rules are compared with what they should be:
// an administrator or another program may have flushed them.
const repairEvery = 30 * time.Second

func (d *daemon) repairRules(ctx context.Context) error {
	t := time.NewTicker(repairEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := d.networks.Repair(ctx); err != nil && ctx.Err() == nil {
				slog.Warn("packet filter rules not repaired", "error", err)
			}
		}
	}
}

// serveAPIs waits until everything that ran is adopted, then answers.
func (d *daemon) serveAPIs(ctx context.Context) error {
	select {
	case <-d.ready:
	case <-ctx.Done():
		return nil
	}
	listeners, err := d.listenAll()
	if err != nil {
		return err
	}
	var sockets []string
	for _, l := range listeners {
		sockets = append(sockets, l.Addr().String())
	}
	docker := dockerapi.New(dockerapi.Options{
		Engine: d.engine, Images: d.images, Networks: d.networks, Volumes: volumesOf{d.volumes},
		Info: d.info(ctx), Events: d.hub, Logger: slog.Default(), Fallback: nodeapi.New(d.nodeOptions(sockets)),
	})
	cri := d.criServer()
	if err := d.holder.Hello(hold.Daemon, version); err != nil {
		slog.Warn("holder not greeted", "error", err)
	}
	slog.Info("ready", "version", version, "after", time.Since(d.started).Round(time.Millisecond))
	errs := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() {
			if l.cri {
				errs <- cri.Serve(ctx, l.Listener)
			} else {
				errs <- docker.Serve(ctx, l.Listener)
			}
		}()
	}
	var first error
	for range listeners {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// dockersSocket is where docker clients look by default.
const dockersSocket = "/var/run/docker.sock"

// listenKey is the name under which the holder keeps a listening socket.
func listenKey(path string) string { return "listen" + path }

type listener struct {
	net.Listener
	cri bool
}

// listenAll opens the sockets, or takes them from the holder: clients that connect while no
// daemon runs wait for the next one instead of being refused.
func (d *daemon) listenAll() ([]listener, error) {
	paths := []string{d.root.Socket("docker")}
	if d.flags.dockerSocket != "" {
		paths = append(paths, d.flags.dockerSocket)
	} else if d.root.Default() {
		// The holder's copy of our own socket takes connections, too: ask it first whose it is.
		ours, err := d.holder.List(listenKey(dockersSocket))
		if err != nil {
			return nil, err
		}
		if len(ours) > 0 || !answered(dockersSocket) {
			paths = append(paths, dockersSocket)
		}
	}
	var out []listener
	for _, p := range paths {
		l, err := d.listen(p)
		if err != nil {
			return nil, err
		}
		out = append(out, listener{Listener: l})
	}
	l, err := d.listen(d.root.Socket("cri"))
	return append(out, listener{Listener: l, cri: true}), err
}

func (d *daemon) listen(path string) (net.Listener, error) {
	key := listenKey(path)
	fds, err := d.sockets.Take(key)
	if err != nil {
		return nil, err
	}
	if len(fds) > 0 {
		f := os.NewFile(uintptr(fds[0]), path)
		defer f.Close()
		if _, err := os.Lstat(path); err == nil {
			return net.FileListener(f)
		}
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	var keepErr error
	if err := raw.Control(func(fd uintptr) { keepErr = d.sockets.Keep(key, int(fd)) }); err != nil {
		return nil, err
	}
	return l, keepErr
}

// answered tells whether somebody serves a socket.
func answered(path string) bool {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// beside is the path of another executable of this installation.
func beside(name string) string {
	exe := os.Args[0]
	if !filepath.IsAbs(exe) {
		if p, err := os.Executable(); err == nil {
			exe = p
		}
	}
	return filepath.Join(filepath.Dir(exe), name)
}
