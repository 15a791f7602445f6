package engine

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Explain implements ContainerAPI.
func (e *Engine) Explain(_ context.Context, ref string) (Explanation, error) {
	c, err := e.find(ref)
	if err != nil {
		return Explanation{}, err
	}
	v := c.view()
	box, err := e.Sandbox(v.Config.Sandbox)
	if err != nil {
		return Explanation{}, err
	}
	return explain(v, box, time.Now()), nil
}

// explain is a pure function of the records and the time.
func explain(v Container, box Sandbox, now time.Time) Explanation {
	x := Explanation{Subject: fmt.Sprintf("container %q", v.Config.Name)}
	ago := func(t time.Time) string { return now.Sub(t).Round(time.Second).String() + " ago" }
	add := func(format string, args ...any) { x.Details = append(x.Details, fmt.Sprintf(format, args...)) }
	hint := func(format string, args ...any) { x.Hints = append(x.Hints, fmt.Sprintf(format, args...)) }
	s := v.State
	switch s.Status {
	case StatusRunning:
		x.Summary = fmt.Sprintf("It has been running for %s (process %d).", now.Sub(s.StartedAt).Round(time.Second), s.PID)
	case StatusPaused:
		x.Summary = "It is paused: its processes are frozen and keep their memory."
		hint("unpause it with: docker unpause %s", v.Config.Name)
	case StatusCreated:
		x.Summary = "It was created and never ran."
		if s.Error != "" {
			x.Summary = "Its start failed: " + s.Error
		} else {
			hint("start it with: docker start %s", v.Config.Name)
		}
	case StatusRestarting:
		x.Summary = fmt.Sprintf("It ended and backs off; the next start is in %s (at %s).",
			max(0, s.NextRestart.Sub(now)).Round(100*time.Millisecond), s.NextRestart.Format(time.TimeOnly))
	case StatusRemoving, StatusDead:
		x.Summary = "It is being removed."
	default:
		x.Summary = exitedSummary(s, ago)
		explainNoRestart(v, add)
	}
	if s.Status == StatusExited && s.Error != "" {
		add("The last start failed: %s", s.Error)
		if strings.Contains(s.Error, "port is already allocated") || strings.Contains(s.Error, "address already in use") {
			hint("free that port or publish another one with -p")
		}
	}
	if s.Status != StatusExited && len(s.Restarts) > 0 || s.Status == StatusRestarting {
		last := s.Restarts[len(s.Restarts)-1]
		add("Its last end was %s: %s, after it had run for %s.", ago(last.At), codeWords(last.ExitCode, true, last.OOMKilled), last.Ran.Round(time.Millisecond))
	}
	if s.RestartCount > 0 {
		add("It was restarted %s by its policy %q.", times(s.RestartCount), v.Config.Restart.Name)
	}
	if s.OOMKilled && v.Config.Resources.MemoryBytes > 0 {
		hint("its memory limit is %d MiB: raise it with --memory", v.Config.Resources.MemoryBytes>>20)
	}
	explainHealth(v, add, hint)
	explainPlace(v, box, add)
	return x
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

func exitedSummary(s ContainerState, ago func(time.Time) string) string {
	if s.StartedAt.IsZero() {
		return "It never ran: its start failed."
	}
	return fmt.Sprintf("It ended %s: %s.", ago(s.FinishedAt), codeWords(s.ExitCode, s.ExitKnown, s.OOMKilled))
}

// codeWords says what an exit code means.
func codeWords(code int, known, oom bool) string {
	switch {
	case oom:
		return fmt.Sprintf("the kernel killed it because it used more memory than it may (exit code %d)", code)
	case !known:
		return "nobody could observe its exit code (the machine or every Berth process went down)"
	case code == 0:
		return "it finished with exit code 0"
	case code == 126:
		return "exit code 126: its program could not be executed"
	case code == 127:
		return "exit code 127: its program was not found"
	case code == 137:
		return "exit code 137: it was killed (SIGKILL)"
	case code == 143:
		return "exit code 143: it ended on SIGTERM"
	case code > 128 && code < 193:
		return fmt.Sprintf("exit code %d: signal %d", code, code-128)
	}
	return fmt.Sprintf("it failed with exit code %d", code)
}

func explainNoRestart(v Container, add func(string, ...any)) {
	p := v.Config.Restart
	switch {
	case v.State.StoppedByUser:
		add("It was stopped on request; its restart policy leaves it alone until it is started.")
	case p.Name == "" || p.Name == "no":
		add("It has no restart policy, so it stays ended.")
	case p.Name == "on-failure" && v.State.ExitKnown && v.State.ExitCode == 0:
		add("Its policy restarts it on failure only, and it succeeded.")
	case p.Name == "on-failure" && p.MaxRetries > 0 && v.State.RestartCount >= p.MaxRetries:
		add("Its policy allows %d restarts, and all were used.", p.MaxRetries)
	}
}

func explainHealth(v Container, add, hint func(string, ...any)) {
	h := v.State.Health
	if h == nil {
		return
	}
	add("Its health check says: %s.", h.Status)
	if h.Status == HealthHealthy || len(h.Log) == 0 {
		return
	}
	last := h.Log[len(h.Log)-1]
	add("The last probe (%s) gave exit code %d: %s", CommandLine(v.Config.Health.Args), last.ExitCode, strings.TrimSpace(last.Output))
	if h.FailingStreak > 0 {
		add("The probe failed %s in a row.", times(h.FailingStreak))
	}
	hint("run the probe by hand: docker exec %s %s", v.Config.Name, CommandLine(v.Config.Health.Args))
}

// explainPlace tells where it is: addresses and ports.
func explainPlace(v Container, box Sandbox, add func(string, ...any)) {
	switch box.Config.Network {
	case NetworkHost:
		add("It shares the node's network.")
	case NetworkNone:
		add("It has no network but its own loopback.")
	}
	active := v.State.Status == StatusRunning || v.State.Status == StatusPaused || v.State.Status == StatusRestarting
	if !active { // what its sandbox still shows is being taken away
		box.State = SandboxState{}
	}
	for _, ep := range box.State.Endpoints {
		add("It has address %s on interface %s.", ep.Address.Addr(), ep.Interface)
	}
	for _, p := range box.State.Ports {
		host := "every address"
		if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
			host = p.HostIP.String()
		}
		add("Its port %d/%s is published at port %d of %s of this node.", p.Port, p.Protocol, p.HostPort, host)
	}
	if r := v.Config.Resources; r.MemoryBytes > 0 || r.CPUQuota > 0 || r.PidsLimit > 0 {
		add("Its limits: memory %s, cpu %s, processes %s.", limitWord(r.MemoryBytes>>20, "MiB"), cpuWord(r), limitWord(r.PidsLimit, ""))
	}
}

func limitWord(n int64, unit string) string {
	if n <= 0 {
		return "unlimited"
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", n, unit))
}

func cpuWord(r Resources) string {
	if r.CPUQuota <= 0 {
		return "unlimited"
	}
	period := r.CPUPeriod
	if period == 0 {
		period = 100000
	}
	return fmt.Sprintf("%.2f cores", float64(r.CPUQuota)/float64(period))
}
