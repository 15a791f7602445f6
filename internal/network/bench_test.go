package network_test

import (
	"slices"
	"testing"
	"time"
)

// stepTimes collects how long named steps took.
type stepTimes map[string][]time.Duration

func (s stepTimes) run(b *testing.B, name string, f func() error) {
	b.Helper()
	start := time.Now()
	if err := f(); err != nil {
		b.Fatalf("%s: %v", name, err)
	}
	s[name] = append(s[name], time.Since(start))
}

// report gives the median of each step.
func (s stepTimes) report(b *testing.B) {
	for name, times := range s {
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)/2].Microseconds()), name+"-µs")
	}
}
