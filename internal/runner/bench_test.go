package runner_test

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"berth/internal/runner"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
)

func (n *node) withSeccomp(spec *specs.Spec) *specs.Spec {
	n.t.Helper()
	profile, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		n.t.Fatal(err)
	}
	spec.Linux.Seccomp = profile
	return spec
}

// BenchmarkRun is the time of a container's whole life: created and started, its end told,
// deleted.
func BenchmarkRun(b *testing.B) {
	for _, with := range []string{"plain", "seccomp"} {
		for _, what := range []string{"life", "start"} {
			b.Run(with+"/"+what, func(b *testing.B) {
				n := newNode(b)
				c := n.dial()
				i, before := 0, n.runnerCPU()
				b.ResetTimer()
				for b.Loop() {
					b.StopTimer()
					i++
					id := fmt.Sprint("b", i)
					spec := n.spec(id, "true")
					if with == "seccomp" {
						spec = n.withSeccomp(spec)
					}
					r := n.request(id, spec)
					b.StartTimer()
					n.create(c, r)
					if what == "start" {
						b.StopTimer()
					}
					n.wait(c, id)
					if err := c.Delete(n.ctx(), id); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				b.ReportMetric((n.runnerCPU()-before)/float64(b.N), "cpu-ms/op")
			})
		}
	}
}

// runnerCPU is the processor time of the runner and of what it started and reaped, in
// milliseconds: on a busy machine it says more than the clock.
func (n *node) runnerCPU() float64 {
	n.t.Helper()
	fields, err := wire.Stat(n.child(hold.Runner).PID)
	if err != nil {
		n.t.Fatal(err)
	}
	const utime, cstime, perTick = 14 - 3, 17 - 3, 10 // fields of proc_pid_stat(5); USER_HZ is 100
	sum := uint64(0)
	for _, f := range fields[utime : cstime+1] {
		v, err := wire.ParseUint(f)
		if err != nil {
			n.t.Fatal(err)
		}
		sum += v
	}
	return float64(sum * perTick)
}

// BenchmarkParallel has eight starts under way at once.
func BenchmarkParallel(b *testing.B) {
	for _, with := range []string{"plain", "seccomp"} {
		b.Run(with, func(b *testing.B) {
			n := newNode(b)
			c := n.dial()
			var i atomic.Int64
			b.SetParallelism(4) // per processor
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					id := fmt.Sprint("b", i.Add(1))
					spec := n.spec(id, "true")
					if with == "seccomp" {
						spec = n.withSeccomp(spec)
					}
					n.create(c, n.request(id, spec))
					n.wait(c, id)
					if err := c.Delete(n.ctx(), id); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

// BenchmarkExec is the time until the end of one more process is told.
func BenchmarkExec(b *testing.B) {
	n := newNode(b)
	c := n.dial()
	n.create(c, n.sh("a", "sleep 100000"))
	i := 0
	for b.Loop() {
		i++
		id := fmt.Sprint("e", i)
		if _, err := c.Exec(n.ctx(), runner.ExecRequest{ID: id, Container: "a", Process: n.spec("a", "true").Process}); err != nil {
			b.Fatal(err)
		}
		n.wait(c, id)
		if err := c.Delete(n.ctx(), id); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIdle tells the resident memory of holder and runner with idle containers:
// go test -run XXX -bench Idle -benchtime 1x
func BenchmarkIdle(b *testing.B) {
	n := newNode(b)
	c := n.dial()
	h, err := n.holder().Status()
	if err != nil {
		b.Fatal(err)
	}
	have := 0
	for _, count := range []int{0, 100, 500} {
		b.Run(fmt.Sprint(count), func(b *testing.B) {
			for ; have < count; have++ {
				id := fmt.Sprint("m", have)
				n.create(c, n.request(id, n.spec(id, "sleep", "1000000")))
			}
			for range b.N {
				b.ReportMetric(residentMB(b, n.child(hold.Runner).PID), "runner-MB")
				b.ReportMetric(residentMB(b, h.PID), "holder-MB")
			}
		})
	}
	b.Run("adopted", func(b *testing.B) {
		n.killRunner()
		<-c.Closed()
		c = n.dial()
		b.ReportMetric(residentMB(b, n.child(hold.Runner).PID), "runner-MB")
		b.ReportMetric(residentMB(b, h.PID), "holder-MB")
	})
}

func residentMB(b *testing.B, pid int) float64 {
	b.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	var kb float64
	_, rest, _ := strings.Cut(string(raw), "VmRSS:")
	if _, err := fmt.Sscan(rest, &kb); err != nil {
		b.Fatal(err)
	}
	return kb / 1024
}
