package engine_test

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/network"
	"berth/internal/runner"
)

func TestRestartPolicy(t *testing.T) {
	failed, ok, unknown := runner.Exit{Known: true, Code: 1}, runner.Exit{Known: true}, runner.Exit{Code: -1}
	for _, c := range []struct {
		name     string
		policy   engine.RestartPolicy
		exit     runner.Exit
		ran      time.Duration
		attempts int
		stopped  bool
		draining bool
		restart  bool
		millis   int64
	}{
		{"none", engine.RestartPolicy{}, failed, 0, 0, false, false, false, 0},
		{"no", engine.RestartPolicy{Name: "no"}, failed, 0, 0, false, false, false, 0},
		{"always after success", engine.RestartPolicy{Name: "always"}, ok, 0, 0, false, false, true, 100},
		{"always stopped by user", engine.RestartPolicy{Name: "always"}, ok, 0, 0, true, false, false, 0},
		{"always while going down", engine.RestartPolicy{Name: "always"}, ok, 0, 0, false, true, false, 0},
		{"back-off doubles", engine.RestartPolicy{Name: "always"}, failed, time.Second, 3, false, false, true, 800},
		{"back-off is bounded", engine.RestartPolicy{Name: "always"}, failed, time.Second, 60, false, false, true, 60000},
		{"back-off is forgotten", engine.RestartPolicy{Name: "always"}, failed, time.Minute, 60, false, false, true, 100},
		{"on-failure success", engine.RestartPolicy{Name: "on-failure"}, ok, 0, 0, false, false, false, 0},
		{"on-failure failure", engine.RestartPolicy{Name: "on-failure"}, failed, 0, 0, false, false, true, 100},
		{"on-failure unknown counts as failure", engine.RestartPolicy{Name: "on-failure"}, unknown, 0, 0, false, false, true, 100},
		{"on-failure used up", engine.RestartPolicy{Name: "on-failure", MaxRetries: 2}, failed, 0, 2, false, false, false, 0},
		{"on-failure one left", engine.RestartPolicy{Name: "on-failure", MaxRetries: 2}, failed, 0, 1, false, false, true, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			restart, millis := engine.DecideRestart(c.policy, c.exit, c.ran, c.attempts, c.stopped, c.draining).Parts()
			if restart != c.restart || millis != c.millis {
				t.Fatalf("got restart %v after %d ms, want %v after %d ms", restart, millis, c.restart, c.millis)
			}
		})
	}
}

func TestHealthIsJudged(t *testing.T) {
	h := engine.HealthCheck{Args: []string{"x"}, Retries: 2, StartPeriod: 10 * time.Second}
	fail, pass := engine.HealthResult{ExitCode: 1}, engine.HealthResult{}
	now := engine.Health{Status: engine.HealthStarting}
	now = engine.Judge(h, now, fail, time.Second)
	if now.Status != engine.HealthStarting || now.FailingStreak != 0 {
		t.Fatalf("a failure in the start period counted: %+v", now)
	}
	now = engine.Judge(h, now, pass, 2*time.Second)
	if now.Status != engine.HealthHealthy {
		t.Fatalf("one success did not make it healthy: %+v", now)
	}
	now = engine.Judge(h, now, fail, 3*time.Second)
	if now.Status != engine.HealthHealthy || now.FailingStreak != 1 {
		t.Fatalf("one failure of two allowed: %+v", now)
	}
	now = engine.Judge(h, now, fail, 4*time.Second)
	if now.Status != engine.HealthUnhealthy {
		t.Fatalf("two failures left it %s", now.Status)
	}
	for range 10 {
		now = engine.Judge(h, now, fail, time.Minute)
	}
	if len(now.Log) != 5 {
		t.Fatalf("%d results kept, want 5", len(now.Log))
	}
}

func TestProbesAreOftenWhileStarting(t *testing.T) {
	h := engine.HealthCheck{Interval: time.Minute, StartPeriod: 10 * time.Second, StartInterval: time.Second}
	if d := engine.NextProbe(h, engine.HealthStarting, time.Second); d != time.Second {
		t.Errorf("in the start period: %s", d)
	}
	if d := engine.NextProbe(h, engine.HealthStarting, time.Minute); d != time.Minute {
		t.Errorf("behind the start period: %s", d)
	}
	if d := engine.NextProbe(h, engine.HealthHealthy, time.Second); d != time.Minute {
		t.Errorf("when healthy: %s", d)
	}
}

func TestDefaultSpecIsConfined(t *testing.T) {
	in := engine.NewSpecInput(engine.ContainerConfig{Args: []string{"true"}}, engine.SandboxConfig{ID: strings.Repeat("a", 64)}, engine.KnownCaps)
	s, err := engine.BuildSpec(in)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(s.Process.Capabilities.Bounding); got != 14 {
		t.Errorf("%d capabilities, docker gives 14", got)
	}
	if len(s.Process.Capabilities.Ambient)+len(s.Process.Capabilities.Inheritable) != 0 {
		t.Error("ambient or inheritable capabilities are set")
	}
	if s.Linux.Seccomp == nil || len(s.Linux.Seccomp.Syscalls) == 0 {
		t.Error("no seccomp profile")
	}
	if !slices.Contains(s.Linux.MaskedPaths, "/proc/kcore") || !slices.Contains(s.Linux.ReadonlyPaths, "/proc/sys") {
		t.Error("default masked or read-only paths are missing")
	}
	if r := s.Linux.Resources.Devices[0]; r.Allow || r.Access != "rwm" {
		t.Errorf("devices are not denied first: %+v", r)
	}
	for _, m := range s.Mounts {
		if m.Destination == "/sys" && !slices.Contains(m.Options, "ro") {
			t.Error("/sys is writable")
		}
	}
}

func TestMountsInTheSpec(t *testing.T) {
	in := engine.NewSpecInput(engine.ContainerConfig{Args: []string{"true"}, Mounts: []engine.Mount{
		{Kind: engine.MountTmpfs, Target: "/a/b/c"}, {Kind: engine.MountTmpfs, Target: "/a", SizeBytes: 1024}, {Kind: engine.MountTmpfs, Target: "/dev/shm"},
	}}, engine.SandboxConfig{ID: "x"}, engine.KnownCaps)
	s, err := engine.BuildSpec(in)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, m := range s.Mounts {
		order = append(order, m.Destination)
	}
	want := []string{"/proc", "/dev", "/dev/pts", "/sys", "/sys/fs/cgroup", "/dev/mqueue", "/a", "/dev/shm", "/a/b/c"}
	if d := cmp.Diff(want, order); d != "" {
		t.Errorf("mounts in this order (-want +got):\n%s", d)
	}
	twice := engine.NewSpecInput(engine.ContainerConfig{Args: []string{"true"}, Mounts: []engine.Mount{
		{Kind: engine.MountTmpfs, Target: "/a"}, {Kind: engine.MountTmpfs, Target: "/a/"}}}, engine.SandboxConfig{}, nil)
	if _, err := engine.BuildSpec(twice); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("two mounts at one place: %v", err)
	}
}

// Whatever is added and dropped, the result is held by the node, and nothing dropped is in it.
func TestCapabilitiesProperty(t *testing.T) {
	name := rapid.SampledFrom(append([]string{"ALL"}, engine.KnownCaps...))
	rapid.Check(t, func(t *rapid.T) {
		host := rapid.SliceOfNDistinct(rapid.SampledFrom(engine.KnownCaps), 0, 41, rapid.ID[string]).Draw(t, "host")
		sec := engine.Security{CapAdd: rapid.SliceOfN(name, 0, 5).Draw(t, "add"), CapDrop: rapid.SliceOfN(name, 0, 5).Draw(t, "drop")}
		got, err := engine.Capabilities(sec, host)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalid) {
				t.Fatalf("kind of %v", err)
			}
			return
		}
		for _, g := range got {
			if !slices.Contains(host, g) {
				t.Fatalf("%s is not the node's to give", g)
			}
			if slices.Contains(sec.CapDrop, g) {
				t.Fatalf("%s was dropped", g)
			}
		}
	})
}

func TestResolvConf(t *testing.T) {
	host := engine.ParseResolv([]byte("# c\nnameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:2\n"))
	for _, c := range []struct {
		name     string
		dns      engine.DNSConfig
		embedded bool
		want     string
	}{
		{"the node's", engine.DNSConfig{}, false, "nameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:2\n"},
		{"embedded", engine.DNSConfig{}, true, "nameserver 127.0.0.11\nsearch a.example b.example\noptions ndots:0\n"},
		{"own", engine.DNSConfig{Servers: []string{"9.9.9.9"}, Searches: []string{"."}, Options: []string{"edns0"}}, false, "nameserver 9.9.9.9\noptions edns0\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, string(engine.ResolvConf(host, c.dns, c.embedded))); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestHostsFile(t *testing.T) {
	got := string(engine.HostsFile(engine.SandboxConfig{ExtraHosts: []string{"db:10.1.2.3", "six:::1", "bad"}},
		[]network.Endpoint{{Address: netip.MustParsePrefix("10.64.0.5/18")}}, "web"))
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "10.1.2.3\tdb\n", "::1\tsix\n", "10.64.0.5\tweb\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no line %q in\n%s", want, got)
		}
	}
}

func TestSignalsByName(t *testing.T) {
	for in, want := range map[string]int{"9": 9, "KILL": 9, "SIGTERM": 15, "sigusr1": 10, "RTMIN+1": 35, "RTMAX": 64} {
		if n, err := engine.ParseSignal(in); err != nil || n != want {
			t.Errorf("%s: %d, %v", in, n, err)
		}
	}
	for _, in := range []string{"", "0", "-1", "65", "SIGNOPE", "RTMIN+99"} {
		if _, err := engine.ParseSignal(in); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%q was taken: %v", in, err)
		}
	}
}

func TestExplanations(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	base := engine.Container{Config: engine.ContainerConfig{Name: "web", Args: []string{"x"}}}
	for _, c := range []struct {
		name  string
		alter func(*engine.Container)
		want  []string
	}{
		{"oom", func(c *engine.Container) {
			c.State = engine.ContainerState{Status: engine.StatusExited, StartedAt: now.Add(-time.Minute), FinishedAt: now, ExitCode: 137, ExitKnown: true, OOMKilled: true}
			c.Config.Resources.MemoryBytes = 64 << 20
		}, []string{"more memory than it may", "64 MiB", "no restart policy"}},
		{"back-off", func(c *engine.Container) {
			c.Config.Restart.Name = "always"
			c.State = engine.ContainerState{Status: engine.StatusRestarting, NextRestart: now.Add(5 * time.Second), RestartCount: 3,
				Restarts: []engine.Past{{At: now, ExitCode: 3, Ran: time.Second}}}
		}, []string{"in 5s", "exit code 3", "restarted 3 times"}},
		{"port", func(c *engine.Container) {
			c.State = engine.ContainerState{Status: engine.StatusCreated, Error: "Bind for 0.0.0.0:80 failed: port is already allocated"}
		}, []string{"port is already allocated"}},
		{"health", func(c *engine.Container) {
			c.Config.Health = &engine.HealthCheck{Args: []string{"probe"}}
			c.State = engine.ContainerState{Status: engine.StatusRunning, StartedAt: now, Health: &engine.Health{Status: engine.HealthUnhealthy, FailingStreak: 3,
				Log: []engine.HealthResult{{ExitCode: 1, Output: "no answer"}}}}
		}, []string{"unhealthy", "no answer", "failed 3 times in a row", "docker exec web probe"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := base
			c.alter(&v)
			x := engine.ExplainFrom(v, engine.Sandbox{}, now)
			all := x.Summary + "\n" + strings.Join(x.Details, "\n") + "\n" + strings.Join(x.Hints, "\n")
			for _, w := range c.want {
				if !strings.Contains(all, w) {
					t.Errorf("nothing about %q in:\n%s", w, all)
				}
			}
		})
	}
}
