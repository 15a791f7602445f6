package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
)

func (a *app) runCommand() *cobra.Command {
	var o runFlags
	o.lookup = a.lookup
	cmd := &cobra.Command{
		Use:               "run [flags] IMAGE [COMMAND] [ARG...]",
		Short:             "Create and start a container",
		Args:              minArgs(1, "an IMAGE"),
		ValidArgsFunction: a.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return platformError(a.run(cmd.Context(), &o, args[0], args[1:]))
		},
	}
	o.add(cmd)
	_ = cmd.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions([]string{"always", "missing", "never"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) run(ctx context.Context, o *runFlags, image string, args []string) error {
	req, err := o.request(image, args)
	if err != nil {
		return err
	}
	keys, err := parseKeys(o.detKey)
	if err != nil {
		return err
	}
	if o.tty && o.interactive && !o.detach && terminalOf(a.In) < 0 {
		return errors.New("the input device is not a TTY; leave -t away, or give berth a terminal")
	}
	if o.tty {
		if size, ok := a.windowSize(); ok {
			req.HostConfig.ConsoleSize = &size
		}
	}
	if o.cidfile != "" {
		if _, err := os.Stat(o.cidfile); err == nil {
			return fmt.Errorf("--cidfile %s: the file exists; remove it or choose another", o.cidfile)
		}
	}
	id, err := a.create(ctx, o, req)
	if err != nil {
		return err
	}
	if o.cidfile != "" {
		if err := os.WriteFile(o.cidfile, []byte(id), 0o644); err != nil {
			return err
		}
	}
	if !o.detach {
		return a.runAttached(ctx, o, id, keys)
	}
	if err := a.start(ctx, id); err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.Out, id)
	return err
}

// create makes the container, fetching its image first where that is asked for or needed.
func (a *app) create(ctx context.Context, o *runFlags, req *createRequest) (string, error) {
	if o.pull == "always" {
		if err := a.pull(ctx, req.Image, o.platform, o.quiet); err != nil {
			return "", err
		}
	}
	q := url.Values{}
	if o.name != "" {
		q.Set("name", o.name)
	}
	if o.platform != "" {
		q.Set("platform", o.platform)
	}
	var created createResponse
	err := a.call(ctx, "POST", docker(q, "containers", "create"), req, &created)
	var refused *apiError
	if o.pull == "missing" && errors.As(err, &refused) && refused.Status == 404 && strings.Contains(strings.ToLower(refused.Message), "no such image") {
		fmt.Fprintf(a.Err, "Unable to find image '%s' locally\n", req.Image)
		if err := a.pull(ctx, req.Image, o.platform, o.quiet); err != nil {
			return "", err
		}
		err = a.call(ctx, "POST", docker(q, "containers", "create"), req, &created)
	}
	if err != nil {
		return "", err
	}
	for _, w := range created.Warnings {
		fmt.Fprintln(a.Err, "WARNING: "+oneLine(w))
	}
	return created.ID, nil
}

func (a *app) start(ctx context.Context, id string) error {
	return invocationError(a.call(ctx, "POST", docker(nil, "containers", id, "start"), nil, nil))
}

// invocationError gives a failed start docker's exit code for its reason.
func invocationError(err error) error {
	var refused *apiError
	if !errors.As(err, &refused) {
		return err
	}
	code := exitPlatform
	has := func(texts ...string) bool {
		for _, t := range texts {
			if strings.Contains(refused.Message, t) {
				return true
			}
		}
		return false
	}
	switch {
	case refused.Kind == "no such program":
		code = exitNotFound
	case refused.Kind == "cannot invoke":
		code = exitNotInvoked
	case refused.Kind != "" || refused.Status != 400: // something else, and the daemon knows
	case has("executable file not found", "no such file or directory"):
		code = exitNotFound
	case has("permission denied", "is a directory", "not a directory", "exec format error"):
		code = exitNotInvoked
	}
	return &exitError{code: code, err: err}
}

// runAttached starts a container whose streams we have, and returns its exit code.
func (a *app) runAttached(ctx context.Context, o *runFlags, id string, keys []byte) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Both must stand before the start, or a quick container's output and end are missed.
	waited := make(chan waiting, 1)
	go func() { waited <- a.wait(ctx, id, o.rm) }()
	stream, err := a.attach(ctx, id, o)
	w := <-waited
	if err == nil {
		err = w.err
	}
	if err != nil {
		if stream != nil {
			stream.Close()
		}
		a.discard(id)
		return err
	}
	defer stream.Close()
	restore := func() {}
	if o.tty && o.interactive {
		if restore, err = a.rawTerminal(); err != nil {
			a.discard(id)
			return err
		}
		defer restore()
	}
	started := make(chan struct{})
	if o.sigProxy {
		defer a.passSignals(ctx, id, started)()
	}
	if err := a.start(ctx, id); err != nil {
		if o.rm {
			a.discard(id)
		}
		return err
	}
	close(started)
	if o.tty {
		a.followWindow(ctx, func(q url.Values) string { return docker(q, "containers", id, "resize") })
	}
	err = a.converse(session{stream: stream, terminal: o.tty, stdin: o.interactive, detachKeys: keys})
	restore()
	stream.Close() // the daemon waits for our side of it
	if errors.Is(err, errDetached) {
		fmt.Fprintln(a.Err, "\ndetached: the container goes on")
		return nil
	}
	return a.exitCode(id, w.body, err)
}

// discard removes a container that could not be started; nobody else knows it yet.
func (a *app) discard(id string) {
	_ = a.call(context.Background(), "DELETE", docker(url.Values{"force": {"1"}, "v": {"1"}}, "containers", id), nil, nil)
}

// waiting is a wait that the daemon has accepted: body delivers the result.
type waiting struct {
	body io.ReadCloser
	err  error
}

// wait asks for the end of a container and returns once the daemon watches for it.
func (a *app) wait(ctx context.Context, id string, removed bool) waiting {
	condition := "next-exit"
	if removed {
		condition = "removed"
	}
	resp, err := a.do(ctx, unixhttp.Request{
		Method: "POST", Path: docker(url.Values{"condition": {condition}}, "containers", id, "wait"),
	})
	if err != nil {
		return waiting{err: err}
	}
	return waiting{body: resp.Body}
}

func (a *app) attach(ctx context.Context, id string, o *runFlags) (*unixhttp.Stream, error) {
	q := url.Values{"stream": {"1"}, "stdout": {"1"}, "stderr": {"1"}}
	if o.interactive {
		q.Set("stdin", "1")
	}
	if o.detKey != "" {
		q.Set("detachKeys", o.detKey)
	}
	return a.hijack(ctx, unixhttp.Request{Method: "POST", Path: docker(q, "containers", id, "attach")})
}

// hijack opens an upgraded connection.
func (a *app) hijack(ctx context.Context, req unixhttp.Request) (*unixhttp.Stream, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	ctx, answered := a.watchResting(ctx)
	stream, refused, err := c.Hijack(ctx, req)
	answered()
	switch {
	case err != nil:
		return nil, a.unreachable(ctx, err)
	case refused != nil:
		return nil, readError(refused)
	}
	return stream, nil
}

// exitCode waits for the result and turns it into ours. broken is why the output ended, if
// not by itself.
func (a *app) exitCode(id string, body io.ReadCloser, broken error) error {
	defer body.Close()
	var result waitResponse
	raw, err := io.ReadAll(io.LimitReader(body, 1<<20))
	if err == nil {
		err = json.Unmarshal(raw, &result)
	}
	if err != nil {
		return fmt.Errorf("the connection to the daemon broke off; the container may go on: see 'berth logs %s' (%w)", shortID(id), err)
	}
	switch {
	case result.Error != nil && result.Error.Message != "":
		return errors.New(result.Error.Message)
	case result.StatusCode != 0:
		return &exitError{code: result.StatusCode}
	}
	return broken
}
