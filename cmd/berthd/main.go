// Command berthd is the node: the engine with its images, networks and volumes, served as the
// Docker API, as CRI, and with Berth's own routes. Containers do not depend on it: it may be
// killed, upgraded or restarted at any time.
//
// This package only reads flags, constructs the parts and supervises them.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"berth/internal/state"
)

// Set by the linker.
var (
	version = "dev"
	commit  = ""
	built   = ""
)

// gcPercent trades a little CPU for memory: an idle daemon should be small.
const gcPercent = 50

type flags struct {
	root         string
	nodeName     string
	dockerSocket string
	insecure     []string
	mirrors      []string
	debug        bool
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "berthd:", err)
		os.Exit(1)
	}
}

func run() error {
	debug.SetGCPercent(gcPercent)
	var f flags
	fs := pflag.NewFlagSet("berthd", pflag.ContinueOnError)
	fs.StringVar(&f.root, "root", os.Getenv("BERTH_ROOT"), "keep everything below this directory (default: /var/lib/berth and /run/berth)")
	fs.StringVar(&f.nodeName, "node-name", "", "name of this node (default: the host name)")
	fs.StringVar(&f.dockerSocket, "docker-socket", "", "also serve the Docker API at this socket")
	fs.StringArrayVar(&f.insecure, "insecure-registry", nil, "registry (host, host:port or CIDR) to be used without verified TLS")
	fs.StringArrayVar(&f.mirrors, "mirror", nil, "HOST=URL: try this mirror of a registry first")
	fs.BoolVar(&f.debug, "debug", false, "log more")
	showVersion := fs.Bool("version", false, "print the version and exit")
	if err := fs.Parse(os.Args[1:]); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return nil
		}
		return err
	}
	if *showVersion {
		fmt.Println(version)
		return nil
	}
	level := slog.LevelInfo
	if f.debug {
		level = slog.LevelDebug
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	klog.SetSlogLogger(slog.Default()) // what serves CRI streams logs through it
	root, err := state.NewRoot(f.root)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return serve(ctx, root, f)
}
