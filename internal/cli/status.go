package cli

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	nodewire "berth/internal/nodeapi/wire"
	"berth/internal/runner/hold"
	"berth/internal/runner/hold/wire"
	"berth/internal/state"
)

// statusTimeout bounds the wait for a daemon that is busy or just coming back.
const statusTimeout = 5 * time.Second

// clockTicks is USER_HZ, which Linux fixes for user space.
const clockTicks = 100

// statusReport is what status prints.
type statusReport struct {
	State     string             `json:"state"` // running, starting, resting, not running
	Root      string             `json:"root"`
	Address   string             `json:"address"`
	Processes []nodewire.Process `json:"processes"`
	Node      *nodewire.Status   `json:"node,omitempty"` // what the daemon says, when it answers
}

func (a *app) statusCommand() *cobra.Command {
	var out outputFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the processes of Berth and what they do",
		Args:  exactArgs(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			r, err := a.instance()
			if err != nil {
				return err
			}
			report := a.status(cmd.Context(), r)
			if err := a.printStatus(report, &out); err != nil {
				return err
			}
			if report.State == "running" {
				return nil
			}
			return &exitError{code: exitFailed, err: fmt.Errorf("%s: %s; start it with '%s'", r.State, report.State, a.hint("up"))}
		},
	}
	out.add(cmd)
	return cmd
}

// status asks the holder and the daemon; either may be away.
func (a *app) status(ctx context.Context, r state.Root) statusReport {
	report := statusReport{State: "not running", Root: r.State, Address: "unix://" + r.Socket("docker"), Processes: []nodewire.Process{}}
	h, err := hold.Dial(r.Socket("holder"))
	if err != nil {
		return report
	}
	defer h.Close()
	s, err := h.Status()
	if err != nil {
		return report
	}
	report.Processes = processes(s)
	report.State = "starting"
	if s.Mode != wire.ModeRunning {
		report.State = "resting" // its socket is kept open, but nobody would answer
		return report
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var node nodewire.Status
	if a.call(ctx, "GET", route("status"), nil, &node) == nil {
		report.State, report.Node = "running", &node
		node.Processes = nil // the holder's view is the same, and there is always one
	}
	return report
}

// processes adds what /proc says to what the holder says.
func processes(s hold.Status) []nodewire.Process {
	list := []nodewire.Process{{Name: "berth-holder", PID: s.PID, Version: s.Version, Started: processStart(s.PID), RSSBytes: residentBytes(s.PID)}}
	for _, c := range s.Children {
		p := nodewire.Process{Name: c.Name, PID: c.PID, Version: c.Version, Started: c.Since, Restarts: c.Restarts}
		if c.PID != 0 {
			p.RSSBytes = residentBytes(c.PID)
		}
		list = append(list, p)
	}
	return list
}

// processStart is when a process began, zero when it is gone.
func processStart(pid int) time.Time {
	ticks, err := wire.StartTime(pid)
	if err != nil {
		return time.Time{}
	}
	raw, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return time.Time{}
	}
	first, _, _ := strings.Cut(string(raw), " ")
	uptime, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return time.Time{}
	}
	age := time.Duration((uptime - float64(ticks)/clockTicks) * float64(time.Second))
	return time.Now().Add(-age).Truncate(time.Second)
}

func residentBytes(pid int) int64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(raw))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

func (a *app) printStatus(report statusReport, out *outputFlags) error {
	switch out.form {
	case "json":
		return printJSON(a.Out, report)
	case "yaml":
		return printYAML(a.Out, report)
	case "name":
		_, err := fmt.Fprintln(a.Out, report.State)
		return err
	}
	l := listing{
		columns: []column{{"name", "PROCESS"}, {"pid", "PID"}, {"version", "VERSION"}, {"up", "UP"}, {"rss", "MEMORY"}, {"restarts", "RESTARTS"}},
		wide:    []column{{"started", "STARTED"}},
	}
	for _, p := range report.Processes {
		f := map[string]string{"name": p.Name, "version": p.Version, "restarts": strconv.Itoa(p.Restarts), "pid": "-", "up": "-", "rss": "-"}
		if p.PID != 0 {
			f["pid"], f["rss"] = strconv.Itoa(p.PID), units.HumanSizeWithPrecision(float64(p.RSSBytes), 3)
			if !p.Started.IsZero() {
				f["up"], f["started"] = units.HumanDuration(time.Since(p.Started)), p.Started.Format(time.RFC3339)
			}
		}
		l.rows = append(l.rows, row{name: p.Name, fields: f})
	}
	if len(l.rows) > 0 {
		if err := out.print(a.Out, l); err != nil {
			return err
		}
	}
	if n := report.Node; n != nil {
		c := n.Containers
		fmt.Fprintf(a.Out, "\nnode %s: %d containers (%d running, %d paused, %d restarting, %d stopped), %d images\n",
			n.Node, c.Total, c.Running, c.Paused, c.Restarting, c.Stopped, n.Images)
		fmt.Fprintf(a.Out, "root %s, docker API at %s\n", report.Root, report.Address)
	}
	return nil
}
