// Command berth is Berth's command line; package berth/internal/cli does it.
package main

import (
	"context"
	"os"
	"runtime/debug"

	"berth/internal/cli"
)

// version is set by the linker.
var version = "dev"

func main() {
	// A command ends before it could be worth collecting; long ones stay below this.
	debug.SetGCPercent(400)
	os.Exit(cli.Main(context.Background(), version, os.Args[1:],
		cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, os.LookupEnv))
}
