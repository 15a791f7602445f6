package trace_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"berth/internal/trace"
)

func TestOffAllocatesNothing(t *testing.T) {
	ctx := context.Background()
	if n := testing.AllocsPerRun(100, func() {
		trace.Start(ctx, "mount", trace.Attr{Key: "kind", Value: "overlay"})()
	}); n != 0 {
		t.Errorf("%v allocations when off", n)
	}
}

func TestSpans(t *testing.T) {
	ctx, r := trace.With(context.Background())
	if trace.From(ctx) != r {
		t.Fatal("From does not find the recorder")
	}
	end := trace.Start(ctx, "create", trace.Attr{Key: "image", Value: "x"})
	trace.Start(ctx, "mount")()
	now := time.Now()
	for time.Since(now) < time.Millisecond {
	}
	end()
	d := r.Spans()[0].Duration
	end()
	trace.Start(ctx, "unfinished")
	spans := r.Spans()
	if len(spans) != 3 || spans[0].Name != "create" || spans[1].Name != "mount" || spans[0].Duration != d || spans[2].Duration >= 0 {
		t.Fatalf("spans = %+v", spans)
	}
	var b strings.Builder
	if _, err := r.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(b.String(), "\n")
	if !strings.HasSuffix(lines[0], "  create image=x") || !strings.HasSuffix(lines[1], "    mount") || !strings.HasSuffix(lines[2], "-  unfinished") {
		t.Errorf("text:\n%s", b.String())
	}
}

func TestBound(t *testing.T) {
	ctx, r := trace.With(context.Background())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				trace.Start(ctx, "x")()
			}
		})
	}
	wg.Wait()
	var b strings.Builder
	r.WriteTo(&b)
	if len(r.Spans()) != 1024 || !strings.Contains(b.String(), "2976 more spans") {
		t.Errorf("%d spans", len(r.Spans()))
	}
}
