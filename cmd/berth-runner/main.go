// Command berth-runner starts, reaps and pumps the output of every container of a node. It is
// berth-holder's child; package berth/internal/runner/server does the work.
//
//	berth-runner [--root DIR]
//
// Called with "init" it is libcontainer's first process in a new container.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"berth/internal/runner/launch"
	"berth/internal/runner/server"
	"berth/internal/state"
)

// version is set by the linker.
var version = "dev"

// gcPercent trades a little time of the collector for the memory budget of 20 MB.
const gcPercent = 50

func main() {
	launch.Init()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "berth-runner:", err)
		os.Exit(1)
	}
}

func run() error {
	root := flag.String("root", "", "keep everything below this `directory`")
	tell := flag.Bool("version", false, "print the version and end")
	flag.Parse()
	if *tell {
		fmt.Println(version)
		return nil
	}
	if flag.NArg() > 0 {
		return fmt.Errorf("argument %q is not known; usage: berth-runner [--root DIR]", flag.Arg(0))
	}
	at, err := state.NewRoot(*root)
	if err != nil {
		return err
	}
	self, err := executable()
	if err != nil {
		return err
	}
	if err := launch.Seal(self, "berth-runner"); err != nil {
		// Slower and a little heavier, as libcontainer then seals a copy for each start.
		fmt.Fprintln(os.Stderr, "berth-runner: run from a sealed copy:", err)
	}
	debug.SetGCPercent(gcPercent)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// Caught, not ignored: what is ignored would be ignored in containers too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	return server.Run(ctx, server.Config{Root: at, Version: version})
}

// executable is the program's path on disk, also when it runs from a copy in memory.
func executable() (string, error) {
	if filepath.IsAbs(os.Args[0]) {
		return os.Args[0], nil
	}
	return os.Executable()
}
