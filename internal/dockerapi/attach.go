package dockerapi

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"sync"
	"time"

	"github.com/moby/term"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/event"
)

// defaultDetachKeys is what leaves a terminal session when the client does not say.
const defaultDetachKeys = "ctrl-p,ctrl-q"

// streamRoutes are attach and logs.
func (s *Server) streamRoutes() []route {
	return []route{
		{method: http.MethodPost, pattern: "/containers/{id}/attach", handler: s.attachContainer},
		{method: http.MethodGet, pattern: "/containers/{id}/logs", handler: s.containerLogs},
	}
}

// detachSequence parses detach keys; "" gives the default.
func detachSequence(keys string) ([]byte, error) {
	if keys == "" {
		keys = defaultDetachKeys
	}
	seq, err := term.ToBytes(keys)
	if err != nil {
		return nil, invalid("Invalid detach keys (%s) provided", keys)
	}
	return seq, nil
}

func (s *Server) attachContainer(w http.ResponseWriter, r *request) error {
	keys, err := detachSequence(r.query("detachKeys"))
	if err != nil {
		return err
	}
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	switch c.State.Status {
	case engine.StatusPaused:
		return conflict("container %s is paused, unpause the container before attach", r.vars["id"])
	case engine.StatusRestarting:
		return conflict("container %s is restarting, wait until the container is running", r.vars["id"])
	}
	ctx, cancel := streamContext(r)
	defer cancel()
	o := engine.AttachOptions{Stdin: r.boolQuery("stdin"), Stdout: r.boolQuery("stdout"), Stderr: r.boolQuery("stderr")}
	var att *engine.Attachment
	moment := time.Now()
	if r.boolQuery("stream") {
		if att, err = s.engine.Attach(ctx, c.Config.ID, o); err != nil {
			return err
		}
		defer att.Close()
	}
	var gate *startGate
	if att != nil && att.Stdin != nil && c.State.Status != engine.StatusRunning {
		gate = s.newStartGate(ctx, c.Config.ID)
	}
	d, err := s.hijack(w, r, streamType(c.Config.Terminal, r.version))
	if err != nil {
		return err
	}
	out := newOutput(d, c.Config.Terminal, o)
	if r.boolQuery("logs") && c.Config.Log.Driver != engine.LogNone {
		lo := engine.LogOptions{Stdout: o.Stdout, Stderr: o.Stderr, Tail: -1, Until: moment}
		if err := s.engine.Logs(ctx, c.Config.ID, lo, out.entry); err != nil {
			s.log.Debug("replaying the log to an attached client", "container", c.Config.ID, "error", err)
		}
	}
	if att == nil {
		att = engine.NewAttachment(nil, c.Config.Terminal, func(context.Context, io.Writer, io.Writer) error { return nil }, func() {})
	}
	if !c.Config.Terminal {
		keys = nil
	}
	if detached := d.join(ctx, cancel, att, out, gate, keys); detached {
		s.publishContainer(c, "detach")
	}
	return nil
}

// output is where a process's output goes: raw for a terminal, else in frames.
type output struct {
	stdout, stderr io.Writer // nil: not wanted
}

func newOutput(w io.Writer, terminal bool, o engine.AttachOptions) output {
	if terminal {
		if o.Stdout || o.Stderr {
			return output{stdout: w}
		}
		return output{}
	}
	var out output
	mux := newFrameMux(w)
	if o.Stdout {
		out.stdout = mux.stream(frameStdout)
	}
	if o.Stderr {
		out.stderr = mux.stream(frameStderr)
	}
	return out
}

// entry writes one log entry as output.
func (o output) entry(e engine.LogEntry) error {
	w := o.stdout
	if e.Stream == engine.Stderr && o.stderr != nil {
		w = o.stderr
	}
	if w == nil {
		return nil
	}
	_, err := w.Write(e.Line)
	return err
}

// join connects the client with a process until the process ends, the client is gone or it
// typed the detach keys (with a terminal; nil: none). It ends the connection.
func (d *duplex) join(ctx context.Context, cancel context.CancelFunc, att *engine.Attachment, out output, gate *startGate, keys []byte) (detached bool) {
	if len(keys) > 0 && att.Stdin != nil {
		d.input = term.NewEscapeProxy(d.input, keys)
	}
	var sink io.Writer
	if att.Stdin != nil {
		sink = gatedWriter{att.Stdin, gate}
	}
	pumped := make(chan struct{})
	go func() {
		defer close(pumped)
		err := d.pump(sink)
		var escape term.EscapeError
		if detached = errors.As(err, &escape); detached {
			cancel()
			return
		}
		if att.Stdin != nil && !att.Terminal { // a terminal outlives the clients that type in it
			gate.wait()
			_ = att.Stdin.Close() // the process may have ended, which is no news here
		}
	}()
	unwatch := d.watch(cancel)
	// An error means that the client is gone, that it detached or that the daemon stops.
	_ = att.Copy(ctx, out.stdout, out.stderr)
	cancel() // lets a pump that waits for the start go on
	unwatch()
	att.Close()
	d.finish(pumped)
	return detached
}

// startGate is passed once a container that did not run when the client attached has started:
// until then there is nobody to take input.
type startGate struct {
	once sync.Once
	id   string
	sub  *event.Subscription
	stop context.CancelFunc
}

func (s *Server) newStartGate(ctx context.Context, id string) *startGate {
	subCtx, stop := context.WithCancel(ctx)
	_, sub := s.events.Subscribe(subCtx, time.Time{})
	g := &startGate{id: id, sub: sub, stop: stop}
	if c, err := s.engine.Container(id); err == nil && c.State.Status == engine.StatusRunning {
		stop() // it started between the look and the subscription
	}
	return g
}

// wait returns once the container started or never will under this client. A nil gate is open.
func (g *startGate) wait() {
	if g == nil {
		return
	}
	g.once.Do(func() {
		defer g.stop()
		for e := range g.sub.C {
			if e.Type == "container" && e.ID == g.id && (e.Action == "start" || e.Action == "destroy") {
				return
			}
		}
	})
}

// gatedWriter writes to a process's stdin once it runs.
type gatedWriter struct {
	w    io.Writer
	gate *startGate
}

func (g gatedWriter) Write(p []byte) (int, error) {
	g.gate.wait()
	return g.w.Write(p)
}

// publishContainer tells the event hub what a client did with a container, besides what the
// engine tells itself.
func (s *Server) publishContainer(c engine.Container, action string, more ...string) {
	attrs := map[string]string{"name": c.Config.Name, "image": c.Config.Image}
	maps.Copy(attrs, c.Config.Labels)
	for i := 0; i+1 < len(more); i += 2 {
		attrs[more[i]] = more[i+1]
	}
	s.events.Publish(event.Event{Type: "container", Action: action, ID: c.Config.ID, Attributes: attrs})
}

// noReader is the answer for a container whose output is not kept.
func noReader() error {
	return errdefs.New(errdefs.ErrUnsupported, "configured logging driver does not support reading")
}
