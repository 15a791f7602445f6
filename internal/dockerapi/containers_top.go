package dockerapi

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	containertypes "github.com/moby/moby/api/types/container"

	"berth/internal/engine"
)

func (s *Server) topContainer(w http.ResponseWriter, r *request) error {
	if args := strings.TrimSpace(r.query("ps_args")); args != "" && args != "-ef" && args != "ef" {
		return unsupported("docker top with the ps options %q is not supported by Berth: it shows those of -ef", args)
	}
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	switch c.State.Status {
	case engine.StatusRunning, engine.StatusPaused:
	case engine.StatusRestarting:
		return conflict("container %s is restarting, wait until the container is running", c.Config.ID)
	default:
		return conflict("container %s is not running", c.Config.ID)
	}
	pids, err := s.engine.PIDs(r.Context(), c.Config.ID)
	if err != nil {
		return err
	}
	slices.Sort(pids)
	out := containertypes.TopResponse{
		Titles:    []string{"UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"},
		Processes: [][]string{},
	}
	table := processTable{root: "/proc", now: time.Now(), users: map[string]string{}}
	if table.boot, err = bootTime(table.root); err != nil {
		return err
	}
	for _, pid := range pids {
		if row, ok := table.row(pid); ok {
			out.Processes = append(out.Processes, row)
		}
	}
	s.publishContainer(c, "top")
	return writeJSON(w, http.StatusOK, out)
}

// processTable reads processes as ps -ef shows them.
type processTable struct {
	root  string // where proc is mounted
	now   time.Time
	boot  time.Time
	users map[string]string // names by uid
}

// bootTime is when the machine started, from the line btime of /proc/stat.
func bootTime(root string) (time.Time, error) {
	data, err := os.ReadFile(root + "/stat")
	if err != nil {
		return time.Time{}, err
	}
	for line := range strings.Lines(string(data)) {
		if text, ok := strings.CutPrefix(line, "btime "); ok {
			sec, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			return time.Unix(sec, 0), err
		}
	}
	return time.Time{}, fmt.Errorf("%s/stat has no line btime", root)
}

// row describes one process; false when it has ended meanwhile.
func (t *processTable) row(pid int) ([]string, bool) {
	dir := t.root + "/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, false
	}
	// The name may have spaces and parentheses: fields begin behind the last one.
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return nil, false
	}
	name := string(stat[open+1 : end])
	f := strings.Fields(string(stat[end+1:]))
	if len(f) < 20 {
		return nil, false
	}
	number := func(field int) int64 { // as proc_pid_stat(5) counts; state is field 3
		n, err := strconv.ParseInt(f[field-3], 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	ticks := number(14) + number(15)
	started := t.boot.Add(time.Duration(number(22)) * time.Second / clockTicks)
	return []string{
		t.user(dir), strconv.Itoa(pid), f[1], strconv.FormatInt(t.percent(ticks, started), 10),
		t.since(started), terminalName(number(7)), cpuTime(ticks), processCommand(dir, name),
	}, true
}

// percent is the share of one CPU that the process used while it lived.
func (t *processTable) percent(ticks int64, started time.Time) int64 {
	lived := int64(t.now.Sub(started) / (time.Second / clockTicks))
	if lived <= 0 {
		return 0
	}
	return min(ticks*100/lived, 99)
}

// since is a start time as ps has it: the hour, the day or the year.
func (t *processTable) since(started time.Time) string {
	switch {
	case started.Year() != t.now.Year():
		return started.Format("2006")
	case t.now.Sub(started) > 24*time.Hour:
		return started.Format("Jan02")
	}
	return started.Format("15:04")
}

func cpuTime(ticks int64) string {
	sec := ticks / clockTicks
	return fmt.Sprintf("%02d:%02d:%02d", sec/3600, sec/60%60, sec%60)
}

// terminalName names a controlling terminal by its device number.
func terminalName(device int64) string {
	major, minor := (device>>8)&0xfff, device&0xff|(device>>12)&0xfff00
	switch {
	case device == 0:
		return "?"
	case major >= 136 && major <= 143:
		return "pts/" + strconv.FormatInt((major-136)<<20|minor, 10)
	case major == 4:
		return "tty" + strconv.FormatInt(minor, 10)
	}
	return "?"
}

// user is the effective user's name on the node, or number.
func (t *processTable) user(dir string) string {
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return "?"
	}
	for line := range strings.Lines(string(status)) {
		text, ok := strings.CutPrefix(line, "Uid:")
		if !ok {
			continue
		}
		f := strings.Fields(text)
		if len(f) < 2 {
			break
		}
		if _, known := t.users[f[1]]; !known {
			t.users[f[1]] = f[1]
			if u, err := user.LookupId(f[1]); err == nil {
				t.users[f[1]] = u.Username
			}
		}
		return t.users[f[1]]
	}
	return "?"
}

// maxCommandBytes bounds one command line in the answer.
const maxCommandBytes = 4096

func processCommand(dir, name string) string {
	data, err := os.ReadFile(dir + "/cmdline")
	data = bytes.TrimRight(data, "\x00")
	if err != nil || len(data) == 0 {
		return "[" + name + "]"
	}
	if len(data) > maxCommandBytes {
		data = data[:maxCommandBytes]
	}
	return strings.ToValidUTF8(string(bytes.ReplaceAll(data, []byte{0}, []byte{' '})), "?")
}
