// Package trace records how long the steps of one request took.
//
// A request that wants to know carries a Recorder in its context; for all others Start costs a
// context lookup and no allocation. It owns neither export nor sampling. Everything is safe for
// concurrent use.
package trace

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxSpans bounds a recorder; later spans are counted, not kept.
const maxSpans = 1024

// Attr is a detail of a span.
type Attr struct{ Key, Value string }

// Span is one step.
type Span struct {
	Name     string
	Start    time.Duration // since the recorder was made
	Duration time.Duration // negative while it is not over
	Attrs    []Attr
}

// Recorder takes the spans of one request.
type Recorder struct {
	begin time.Time

	mu      sync.Mutex
	spans   []Span
	omitted int
}

type key struct{}

// With returns a context under which Start records, and the recorder.
func With(ctx context.Context) (context.Context, *Recorder) {
	r := &Recorder{begin: time.Now()}
	return context.WithValue(ctx, key{}, r), r
}

// From returns the recorder that ctx carries, or nil.
func From(ctx context.Context) *Recorder {
	r, _ := ctx.Value(key{}).(*Recorder)
	return r
}

// Start begins a span and returns the function that ends it; calling that again changes nothing.
//
//	defer trace.Start(ctx, "mount", trace.Attr{Key: "kind", Value: "overlay"})()
func Start(ctx context.Context, name string, attrs ...Attr) func() {
	r := From(ctx)
	if r == nil {
		return nothing
	}
	return r.start(name, slices.Clone(attrs)) // a clone: attrs then need not escape
}

func nothing() {}

func (r *Recorder) start(name string, attrs []Attr) func() {
	s := Span{Name: name, Start: time.Since(r.begin), Duration: -1, Attrs: attrs}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.spans) == maxSpans {
		r.omitted++
		return nothing
	}
	i := len(r.spans)
	r.spans = append(r.spans, s)
	return func() {
		end := time.Since(r.begin)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.spans[i].Duration < 0 {
			r.spans[i].Duration = end - s.Start
		}
	}
}

// Add records a span that was measured elsewhere, by the runner say.
func (r *Recorder) Add(name string, start time.Time, d time.Duration, attrs ...Attr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.spans) == maxSpans {
		r.omitted++
		return
	}
	r.spans = append(r.spans, Span{Name: name, Start: start.Sub(r.begin), Duration: d, Attrs: attrs})
}

// Spans returns the spans so far, in the order of their starts; of two that start together the
// longer is first, since it holds the other.
func (r *Recorder) Spans() []Span {
	r.mu.Lock()
	spans := slices.Clone(r.spans)
	r.mu.Unlock()
	slices.SortStableFunc(spans, func(a, b Span) int {
		if a.Start != b.Start {
			return int(a.Start - b.Start)
		}
		return int(b.Duration - a.Duration)
	})
	return spans
}

// WriteTo writes a line per span: start and duration in microseconds, then the name, indented
// below the span that encloses it, and the attributes.
func (r *Recorder) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	var ends []time.Duration // of the enclosing spans
	for _, s := range r.Spans() {
		end := s.Start + s.Duration
		for len(ends) > 0 && ends[len(ends)-1] < end {
			ends = ends[:len(ends)-1]
		}
		took := fmt.Sprint(s.Duration.Microseconds())
		if s.Duration < 0 {
			took = "-"
		}
		fmt.Fprintf(&b, "%9d %9s  %s%s", s.Start.Microseconds(), took, strings.Repeat("  ", len(ends)), s.Name)
		for _, a := range s.Attrs {
			fmt.Fprintf(&b, " %s=%s", a.Key, a.Value)
		}
		b.WriteByte('\n')
		if s.Duration > 0 {
			ends = append(ends, end)
		}
	}
	r.mu.Lock()
	omitted := r.omitted
	r.mu.Unlock()
	if omitted > 0 {
		fmt.Fprintf(&b, "%d more spans were not kept\n", omitted)
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}
