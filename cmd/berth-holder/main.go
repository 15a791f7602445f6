// Command berth-holder is the parent of berth-runner and berthd: it respawns them and holds
// what must not close while they are away. Package berth/internal/runner/hold/holder does it.
//
//	berth-holder [--root DIR] [-- ARGUMENT FOR berthd…]
package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"berth/internal/runner/hold/holder"
	"berth/internal/state"
)

// version is set by the linker.
var version = "dev"

func main() {
	// It allocates a few kilobytes an hour: collecting early keeps it small.
	debug.SetGCPercent(20)
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "berth-holder:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	root := ""
	for len(args) > 0 && args[0] != "--" {
		value, joined := strings.CutPrefix(args[0], "--root=")
		switch {
		case args[0] == "--version":
			fmt.Println(version)
			return nil
		case joined:
			root, args = value, args[1:]
		case args[0] == "--root" && len(args) > 1:
			root, args = args[1], args[2:]
		default:
			return fmt.Errorf("argument %q is not known; usage: berth-holder [--root DIR] [-- ARGUMENT FOR berthd…]", args[0])
		}
	}
	if len(args) > 0 {
		args = args[1:]
	}
	at, err := state.NewRoot(root)
	if err != nil {
		return err
	}
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	return holder.Run(holder.Config{Root: at, Version: version, Executable: executable, Daemon: args})
}
