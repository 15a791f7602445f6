package dockerapi

import (
	"encoding/json"
	"mime"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/events"

	"berth/internal/event"
)

// Versions at which the event stream changed.
const (
	versionNoLegacyEvents = 52 // status, id and from went
	versionJSONLines      = 53 // application/jsonl came
)

// recordSeparator begins each record of a JSON text sequence (RFC 7464).
const recordSeparator = 0x1e

func (s *Server) eventRoutes() []route {
	return []route{{method: http.MethodGet, pattern: "/events", handler: s.streamEvents}}
}

// eventFilters are the keys that docker documents.
func eventFilters() []string {
	return []string{"config", "container", "daemon", "event", "image", "label", "network", "node", "plugin", "scope", "secret", "service", "type", "volume"}
}

func (s *Server) streamEvents(w http.ResponseWriter, r *request) error {
	f, err := r.filters(eventFilters()...)
	if err != nil {
		return err
	}
	since, err := parseTime(r.query("since"))
	if err != nil {
		return err
	}
	until, err := parseTime(r.query("until"))
	if err != nil {
		return err
	}
	if !since.IsZero() && !until.IsZero() && until.Before(since) {
		return invalid("`since` time (%s) cannot be after `until` time (%s)", r.query("since"), r.query("until"))
	}
	if !since.IsZero() {
		since = since.Add(-time.Nanosecond) // docker's since includes its moment
	}
	if since.IsZero() && !until.IsZero() {
		since = time.Unix(0, 0) // only an end: everything remembered up to it
	}
	ctx, cancel := streamContext(r)
	defer cancel()
	past, live := s.events.Subscribe(ctx, since)
	media, sequence := eventType(r)
	w.Header().Set("Content-Type", media)
	w.WriteHeader(http.StatusOK)
	flush := func() { _ = http.NewResponseController(w).Flush() } // the next write tells
	out := eventWriter{w: w, filters: f, legacy: r.version < versionNoLegacyEvents, sequence: sequence}
	for _, e := range past {
		if !until.IsZero() && e.Time.After(until) {
			break
		}
		if err := out.write(e); err != nil {
			return err
		}
	}
	flush()
	return out.follow(live, until, flush)
}

// eventType chooses the form of the stream: JSON objects, or a JSON text sequence if asked for.
func eventType(r *request) (media string, sequence bool) {
	if r.version < versionNoLegacyEvents {
		return "application/json", false
	}
	for _, accept := range strings.Split(r.Header.Get("Accept"), ",") {
		switch kind, _, _ := mime.ParseMediaType(strings.TrimSpace(accept)); {
		case kind == "application/json-seq":
			return kind, true
		case kind == "application/x-ndjson", kind == "application/jsonl" && r.version >= versionJSONLines:
			return kind, false
		}
	}
	return "application/json", false
}

// eventWriter writes events in docker's shape.
type eventWriter struct {
	w        http.ResponseWriter
	filters  filters
	legacy   bool
	sequence bool
	buf      []byte
}

// follow writes live events until their end, the client's, or the moment until (zero: none).
func (o *eventWriter) follow(live *event.Subscription, until time.Time, flush func()) error {
	var deadline <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		deadline = t.C
	}
	for {
		select {
		case e, ok := <-live.C:
			if !ok {
				return nil // the client left, or fell behind and learns so by the stream's end
			}
			if !until.IsZero() && e.Time.After(until) {
				return nil
			}
			if err := o.write(e); err != nil {
				return err
			}
			if len(live.C) == 0 {
				flush()
			}
		case <-deadline:
			return nil
		}
	}
}

func (o *eventWriter) write(e event.Event) error {
	m, ok := eventMessage(e)
	if !ok || !o.includes(m) {
		return nil
	}
	var v any = m
	if o.legacy {
		v = legacyMessage(m)
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	o.buf = o.buf[:0]
	if o.sequence {
		o.buf = append(o.buf, recordSeparator)
	}
	o.buf = append(append(o.buf, data...), '\n')
	_, err = o.w.Write(o.buf)
	return err
}

// eventMessage translates an event; false for what docker has no word for.
func eventMessage(e event.Event) (events.Message, bool) {
	switch e.Type {
	case "container", "image", "network", "volume", "daemon", "builder":
	default:
		return events.Message{}, false
	}
	return events.Message{
		Type: events.Type(e.Type), Action: events.Action(e.Action),
		Actor: events.Actor{ID: e.ID, Attributes: orEmpty(e.Attributes)},
		Scope: "local", Time: e.Time.Unix(), TimeNano: e.Time.UnixNano(),
	}, true
}

// legacyEvent is a message with the fields that it had until API 1.51.
type legacyEvent struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func legacyMessage(m events.Message) legacyEvent {
	l := legacyEvent{Message: m}
	switch m.Type {
	case events.ContainerEventType:
		l.Status, l.ID, l.From = string(m.Action), m.Actor.ID, m.Actor.Attributes["image"]
	case events.ImageEventType:
		l.Status, l.ID = string(m.Action), m.Actor.ID
	}
	return l
}

// includes applies docker's filters to one message.
func (o *eventWriter) includes(m events.Message) bool {
	f := o.filters
	if !f.exact("type", string(m.Type)) || !f.exact("scope", m.Scope) || !f.labels("label", m.Actor.Attributes) {
		return false
	}
	if !includesAction(f["event"], string(m.Action)) {
		return false
	}
	for _, key := range []string{"container", "daemon", "network", "volume", "plugin", "service", "node", "secret", "config"} {
		if f.has(key) && (!f.prefix(key, m.Actor.ID) && !f.prefix(key, m.Actor.Attributes["name"])) {
			return false
		}
	}
	return !f.has("image") || includesImage(f["image"], m)
}

// includesAction compares actions; those with free text behind a colon match by their beginning.
func includesAction(want []string, action string) bool {
	if len(want) == 0 {
		return true
	}
	word, _, _ := strings.Cut(action, ":")
	return slices.ContainsFunc(want, func(v string) bool {
		switch v {
		case "health_status", "exec_create", "exec_start":
			return v == word
		}
		return v == action
	})
}

// includesImage matches image events by the image and container events by the image they are
// made from, with the tag or without.
func includesImage(want []string, m events.Message) bool {
	attribute := "image"
	if m.Type == events.ImageEventType {
		attribute = "name"
	}
	name := m.Actor.Attributes[attribute]
	for _, candidate := range []string{m.Actor.ID, name, withoutTag(m.Actor.ID), withoutTag(name)} {
		if candidate != "" && slices.Contains(want, candidate) {
			return true
		}
	}
	return false
}

func withoutTag(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarName(ref)
}
