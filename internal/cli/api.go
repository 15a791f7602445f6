package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"strings"
	"syscall"
	"time"

	"berth/internal/cli/unixhttp"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
)

// apiVersion is the Docker API version whose words this client uses.
const apiVersion = "/v1.47"

// maxAnswerBytes bounds an answer that is read as a whole.
const maxAnswerBytes = 64 << 20

// apiError is a refusal by the server.
type apiError struct {
	Status  int
	Message string
	Kind    string // errdefs' name, when the server gives one
}

func (e *apiError) Error() string { return e.Message }

// client returns the connection to the instance's daemon.
func (a *app) client() (*unixhttp.Client, error) {
	if a.api == nil {
		r, err := a.instance()
		if err != nil {
			return nil, err
		}
		a.api = &unixhttp.Client{Socket: r.Socket("docker")}
	}
	return a.api, nil
}

// do sends a request and returns the answer when it is good. The caller closes its body.
func (a *app) do(ctx context.Context, req unixhttp.Request) (*unixhttp.Response, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	ctx, answered := a.watchResting(ctx)
	resp, err := c.Do(ctx, req)
	answered()
	if err != nil {
		return nil, a.unreachable(ctx, err)
	}
	if resp.Status >= 400 {
		return nil, readError(resp)
	}
	return resp, nil
}

// restingAfter is how long a request waits for its answer before it is asked whether anybody
// will give one: berth-holder keeps the socket open while the daemon is away.
const restingAfter = 300 * time.Millisecond

// watchResting ends the context when the daemon is away on purpose. The function it returns
// ends the watch.
func (a *app) watchResting(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(restingAfter, func() {
		r, err := a.instance()
		if err != nil {
			return
		}
		h, err := hold.Dial(r.Socket("holder"))
		if err != nil {
			return
		}
		defer h.Close()
		if s, err := h.Status(); err == nil && s.Mode == wire.ModeKept {
			cancel(platformError(fmt.Errorf("berth was told to rest while its containers go on; '%s' makes it manage them again", a.hint("up"))))
		}
	})
	return ctx, func() { timer.Stop() }
}

// unreachable turns a failed connection into words.
func (a *app) unreachable(ctx context.Context, err error) error {
	var resting *exitError
	if errors.As(context.Cause(ctx), &resting) {
		return resting
	}
	if errors.Is(err, context.Canceled) {
		return &exitError{code: exitSignalledBy + int(syscall.SIGINT), err: errors.New("interrupted")}
	}
	socket, start := a.api.Socket, a.hint("up")
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return platformError(fmt.Errorf("no Berth answers at %s; start it with '%s'", socket, start))
	case errors.Is(err, fs.ErrPermission):
		return platformError(fmt.Errorf("%s: permission denied; berth must run as the user that started it", socket))
	}
	return platformError(err)
}

// readError reads the answer of a failed request and closes it.
func readError(resp *unixhttp.Response) error {
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	var m struct {
		Message string `json:"message"`
		Kind    string `json:"kind"`
	}
	if json.Unmarshal(raw, &m) != nil || m.Message == "" {
		m.Message = strings.TrimSpace(string(raw))
	}
	if m.Message == "" {
		m.Message = fmt.Sprintf("the daemon answered with status %d", resp.Status)
		if err != nil {
			m.Message += ": " + err.Error()
		}
	}
	return &apiError{Status: resp.Status, Message: m.Message, Kind: m.Kind}
}

// call sends in as JSON (nil: no body) and reads the answer into out (nil: ignored).
func (a *app) call(ctx context.Context, method, path string, in, out any) error {
	req := unixhttp.Request{Method: method, Path: path}
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		req.Body, req.Header = raw, []string{"Content-Type", "application/json"}
	}
	resp, err := a.do(ctx, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return platformError(fmt.Errorf("%s %s: %w", method, path, err))
	}
	if r, ok := out.(*json.RawMessage); ok {
		*r = raw
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return platformError(fmt.Errorf("%s %s: the daemon's answer is not understood: %w", method, path, err))
	}
	return nil
}

// docker returns the path of a Docker API route. Parts are escaped; query may be nil.
func docker(query url.Values, parts ...string) string {
	var b strings.Builder
	b.WriteString(apiVersion)
	for _, p := range parts {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(p))
	}
	if len(query) > 0 {
		b.WriteByte('?')
		b.WriteString(query.Encode())
	}
	return b.String()
}

// route returns the path of one of Berth's own routes.
func route(parts ...string) string {
	var b strings.Builder
	b.WriteString("/berth/v1")
	for _, p := range parts {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(p))
	}
	return b.String()
}

// filters turns name=value arguments into docker's filter parameter.
func filters(args []string) (string, error) {
	m := map[string]map[string]bool{}
	for _, arg := range args {
		k, v, ok := strings.Cut(arg, "=")
		if !ok || k == "" {
			return "", fmt.Errorf("--filter %s: write it as name=value", arg)
		}
		k = strings.ToLower(strings.TrimSpace(k))
		if m[k] == nil {
			m[k] = map[string]bool{}
		}
		m[k][strings.TrimSpace(v)] = true
	}
	raw, err := json.Marshal(m)
	return string(raw), err
}
