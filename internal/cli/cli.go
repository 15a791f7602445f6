// Package cli is the berth command line: one file per command.
//
// It speaks plain HTTP over the instance's unix socket: the Docker API for containers and
// images, Berth's own routes for the rest. It owns words, tables, exit codes and terminals, and
// no state. It must stay quick to execute: no net/http, no regexp, no template, no client
// library may be linked into it.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
	"berth/internal/state"
)

// Exit codes, as docker's; a container's own code otherwise.
const (
	exitFailed      = 1   // what was asked could not be done to the object it was asked of
	exitPlatform    = 125 // Berth itself failed, or the command line is wrong
	exitNotInvoked  = 126 // the program cannot be invoked
	exitNotFound    = 127 // the program does not exist
	exitSignalledBy = 128 // plus the signal
)

// Streams are what a command reads and writes: data on Out, words on Err.
type Streams struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer
}

// app is one execution of the program.
type app struct {
	Streams
	lookup   func(string) (string, bool) // an environment variable
	version  string
	rootArg  string
	progress string
	api      *unixhttp.Client // made by client
}

// exitError ends the program with a code. Without a message nothing is printed.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// platformError makes err end the program with 125.
func platformError(err error) error {
	var exit *exitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	return &exitError{code: exitPlatform, err: err}
}

// Main runs the program of the given version with args (without its name) and returns its exit
// code. lookup reads the environment.
func Main(ctx context.Context, version string, args []string, s Streams, lookup func(string) (string, bool)) int {
	a := &app{Streams: s, lookup: lookup, version: version}
	cmd := a.root()
	cmd.SetArgs(args)
	cmd.SetIn(s.In)
	cmd.SetOut(s.Out)
	cmd.SetErr(s.Err)
	err := cmd.ExecuteContext(ctx)
	if a.api != nil {
		a.api.CloseIdle()
	}
	return a.report(err)
}

// report prints err in one line and returns the exit code for it.
func (a *app) report(err error) int {
	if err == nil {
		return 0
	}
	code := exitPlatform
	var (
		exit *exitError
		api  *apiError
	)
	switch {
	case errors.As(err, &exit):
		if exit.err == nil {
			return exit.code
		}
		code = exit.code
	case errors.As(err, &api) && api.Status < 500:
		code = exitFailed
	}
	fmt.Fprintln(a.Err, "berth: "+oneLine(err.Error()))
	return code
}

// oneLine joins the lines of a message.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// Root returns the command tree as it is in an empty environment, for generating its reference.
func Root() *cobra.Command {
	return (&app{lookup: func(string) (string, bool) { return "", false }}).root()
}

func (a *app) getenv(name string) string {
	v, _ := a.lookup(name)
	return v
}

func (a *app) root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "berth",
		Short:         "A container platform: one machine or many, docker's commands or Kubernetes'",
		Long:          "berth starts and drives Berth: a container engine that docker's commands work with as well.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%q is not a berth command; see 'berth --help'", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	f := cmd.PersistentFlags()
	f.StringVar(&a.rootArg, "root", a.getenv("BERTH_ROOT"), "directory of the instance (environment: BERTH_ROOT)")
	f.StringVar(&a.progress, "progress", "auto", "how to show progress: auto, plain or json")
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		switch a.progress {
		case "auto", "plain", "json":
			return nil
		}
		return fmt.Errorf("--progress %s: unknown; use auto, plain or json", a.progress)
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &exitError{code: exitPlatform, err: fmt.Errorf("%w; see '%s --help'", err, cmd.CommandPath())}
	})
	cmd.AddCommand(
		a.upCommand(), a.downCommand(), a.statusCommand(), a.versionCommand(),
		a.runCommand(), a.execCommand(), a.psCommand(), a.logsCommand(), a.stopCommand(), a.rmCommand(),
		a.imagesCommand(), a.loadCommand(), a.pullCommand(), a.pushCommand(), a.explainCommand(),
	)
	cmd.CompletionOptions.HiddenDefaultCmd = false
	return cmd
}

// instance returns the layout of the instance that --root names.
func (a *app) instance() (state.Root, error) {
	r, err := state.NewRoot(a.rootArg)
	if err != nil {
		return r, platformError(err)
	}
	return r, nil
}

// exactArgs is cobra's, with the words of this program.
func exactArgs(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == n {
			return nil
		}
		if n == 0 {
			return fmt.Errorf("%s takes no arguments, got %q; see '%s --help'", cmd.CommandPath(), args[0], cmd.CommandPath())
		}
		return fmt.Errorf("%s needs %s; see '%s --help'", cmd.CommandPath(), what, cmd.CommandPath())
	}
}

// minArgs asks for at least n arguments.
func minArgs(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= n {
			return nil
		}
		return fmt.Errorf("%s needs %s; see '%s --help'", cmd.CommandPath(), what, cmd.CommandPath())
	}
}
