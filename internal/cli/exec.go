package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
)

type execFlags struct {
	interactive, tty, detach, privileged bool
	env, envFile                         []string
	user, workdir, detachKeys            string
}

// execRequest is the Docker API's, version 1.47.
type execRequest struct {
	User         string   `json:",omitempty"`
	Privileged   bool     `json:",omitempty"`
	Tty          bool     `json:",omitempty"`
	ConsoleSize  *[2]uint `json:",omitempty"`
	AttachStdin  bool     `json:",omitempty"`
	AttachStdout bool     `json:",omitempty"`
	AttachStderr bool     `json:",omitempty"`
	Env          []string `json:",omitempty"`
	WorkingDir   string   `json:",omitempty"`
	DetachKeys   string   `json:",omitempty"`
	Cmd          []string
}

func (a *app) execCommand() *cobra.Command {
	var o execFlags
	cmd := &cobra.Command{
		Use:               "exec [flags] CONTAINER COMMAND [ARG...]",
		Short:             "Run one more program in a running container",
		Args:              minArgs(2, "a CONTAINER and a COMMAND"),
		ValidArgsFunction: a.completeContainers(1, false),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.exec(cmd.Context(), o, args[0], args[1:])
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&o.interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&o.tty, "tty", "t", false, "give it a terminal")
	f.BoolVarP(&o.detach, "detach", "d", false, "leave it in the background")
	f.BoolVar(&o.privileged, "privileged", false, "give it all the node's powers")
	f.StringArrayVarP(&o.env, "env", "e", nil, "environment: NAME=VALUE, or NAME for this shell's value")
	f.StringArrayVar(&o.envFile, "env-file", nil, "file with environment, one per line")
	f.StringVarP(&o.user, "user", "u", "", "user[:group], names or numbers")
	f.StringVarP(&o.workdir, "workdir", "w", "", "working directory")
	f.StringVar(&o.detachKeys, "detach-keys", "", "keys that leave a terminal session (default ctrl-p,ctrl-q)")
	return cmd
}

func (a *app) exec(ctx context.Context, o execFlags, container string, args []string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	keys, err := parseKeys(o.detachKeys)
	if err != nil {
		return err
	}
	if o.tty && o.interactive && !o.detach && terminalOf(a.In) < 0 {
		return errors.New("the input device is not a TTY; leave -t away, or give berth a terminal")
	}
	req := execRequest{
		User: o.user, Privileged: o.privileged, Tty: o.tty, WorkingDir: o.workdir, DetachKeys: o.detachKeys, Cmd: args,
		AttachStdin: o.interactive && !o.detach, AttachStdout: !o.detach, AttachStderr: !o.detach,
	}
	if o.tty {
		if size, ok := a.windowSize(); ok {
			req.ConsoleSize = &size
		}
	}
	if req.Env, err = (&runFlags{lookup: a.lookup}).keyValues(o.envFile, o.env, true); err != nil {
		return err
	}
	var created createResponse
	if err := a.call(ctx, "POST", docker(nil, "containers", container, "exec"), req, &created); err != nil {
		return err
	}
	start := struct {
		Detach      bool
		Tty         bool     `json:",omitempty"`
		ConsoleSize *[2]uint `json:",omitempty"`
	}{o.detach, o.tty, req.ConsoleSize}
	if o.detach {
		return invocationError(a.call(ctx, "POST", docker(nil, "exec", created.ID, "start"), start, nil))
	}
	return a.execAttached(ctx, o, created.ID, start, keys)
}

func (a *app) execAttached(ctx context.Context, o execFlags, id string, start any, keys []byte) error {
	raw, err := json.Marshal(start)
	if err != nil {
		return err
	}
	restore := func() {}
	if o.tty && o.interactive {
		if restore, err = a.rawTerminal(); err != nil {
			return err
		}
		defer restore()
	}
	stream, err := a.hijack(ctx, unixhttp.Request{
		Method: "POST", Path: docker(nil, "exec", id, "start"), Body: raw, Header: []string{"Content-Type", "application/json"},
	})
	if err != nil {
		return invocationError(err)
	}
	defer stream.Close()
	if o.tty {
		a.followWindow(ctx, func(q url.Values) string { return docker(q, "exec", id, "resize") })
	}
	err = a.converse(session{stream: stream, terminal: o.tty, stdin: o.interactive, detachKeys: keys})
	restore()
	stream.Close() // the daemon waits for our side of it
	if errors.Is(err, errDetached) {
		fmt.Fprintln(a.Err, "\ndetached: the program goes on")
		return nil
	}
	var e execInspect
	if inspectErr := a.call(ctx, "GET", docker(nil, "exec", id, "json"), nil, &e); inspectErr != nil {
		return platformError(fmt.Errorf("the program's exit code is unknown: %w", inspectErr))
	}
	switch {
	case e.Running:
		return platformError(errors.New("the connection to the program broke off; it goes on"))
	case e.ExitCode == nil:
		return platformError(errors.New("the program's exit code is unknown"))
	case *e.ExitCode != 0:
		return &exitError{code: *e.ExitCode}
	}
	return err
}
