package holder

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth/internal/errdefs"
	"berth/internal/runner/hold/wire"
)

// tableEnv names the descriptor of the table that one program image leaves to the next.
const tableEnv = "BERTH_HOLDER_TABLE_FD"

// maxTable bounds the table, in bytes.
const maxTable = 64 << 20

// reexec replaces the program in place: same pid, same children, same descriptors, same
// clients. It returns only when that failed, and then nothing has changed.
func (h *holder) reexec(client int) error {
	if h.mode == wire.ModeEnding {
		return errdefs.New(errdefs.ErrConflict, "reexec: the holder is ending")
	}
	if len(h.waiters) > 0 {
		return errdefs.New(errdefs.ErrConflict, "reexec: a restart or a stop is under way; try again when it is done")
	}
	table, err := os.CreateTemp(h.Root.Run, "holder-table-")
	if err != nil {
		return err
	}
	defer table.Close()
	_ = os.Remove(table.Name())
	if _, err := table.WriteString(h.table(client)); err != nil {
		return err
	}
	if _, err := table.Seek(0, 0); err != nil {
		return err
	}
	fds := append([]int{int(table.Fd()), h.lock, h.listener}, keys(h.conns)...)
	for _, kept := range h.kept {
		fds = append(fds, kept...)
	}
	for _, fd := range fds {
		setCloseOnExec(fd, false)
	}
	env := append(os.Environ(), tableEnv+"="+strconv.Itoa(int(table.Fd())))
	err = syscall.Exec(h.Executable, os.Args, env)
	for _, fd := range fds {
		setCloseOnExec(fd, true)
	}
	return fmt.Errorf("reexec %s: %w", h.Executable, err)
}

// table lists everything the next image cannot find out, one fact a line, fields separated by
// zero bytes.
func (h *holder) table(client int) string {
	var b strings.Builder
	line := func(fields ...string) {
		b.WriteString(strings.Join(fields, "\x00"))
		b.WriteByte('\n')
	}
	numbers := func(ns ...int) []string {
		out := make([]string, len(ns))
		for i, n := range ns {
			out[i] = strconv.Itoa(n)
		}
		return out
	}
	line("mode", h.mode)
	line(append([]string{"fds"}, numbers(h.lock, h.listener, client)...)...)
	line(append([]string{"conns"}, numbers(keys(h.conns)...)...)...)
	for key, fds := range h.kept {
		line(append([]string{"key", strconv.Quote(key)}, numbers(fds...)...)...)
	}
	for pid, start := range h.watched {
		line("watch", strconv.Itoa(pid), strconv.FormatUint(start, 10))
	}
	for name, e := range h.unsaved {
		line("exit", name, strconv.Itoa(e.status), strconv.FormatInt(e.nanos, 10))
	}
	for _, c := range h.children {
		if c.everRan {
			line("child", c.name, strconv.Itoa(c.pid), strconv.FormatUint(c.start, 10),
				strconv.FormatInt(c.since.UnixNano(), 10), strconv.Itoa(c.restarts), c.version)
		}
	}
	return b.String()
}

// restore takes over what the image before this one left. again is false when there was none.
func (h *holder) restore() (again bool, err error) {
	fd, err := strconv.Atoi(os.Getenv(tableEnv))
	if err != nil {
		return false, nil
	}
	_ = os.Unsetenv(tableEnv)
	file := os.NewFile(uintptr(fd), "table")
	defer file.Close()
	info, err := file.Stat()
	if err != nil || info.Size() > maxTable {
		return true, errdefs.New(errdefs.ErrInvalid, "the table of the program before cannot be read: %v", err)
	}
	raw := make([]byte, info.Size())
	if _, err := file.ReadAt(raw, 0); err != nil {
		return true, err
	}
	client := -1
	for _, text := range strings.Split(strings.TrimSuffix(string(raw), "\n"), "\n") {
		fields := strings.Split(text, "\x00")
		if fields[0] == "fds" && len(fields) == 4 {
			client, _ = strconv.Atoi(fields[3])
		}
		if err := h.restoreFact(fields[0], fields[1:]); err != nil {
			return true, errdefs.New(errdefs.ErrInvalid, "the table of the program before has a bad line %q: %v", text, err)
		}
	}
	// Nothing has changed for the children: those of a dead holder are found again by their lock.
	for _, c := range h.children {
		if c.pid == 0 && h.mode == wire.ModeRunning {
			h.findPredecessors()
			break
		}
	}
	if _, ok := h.conns[client]; ok {
		h.reply(client, nil, wire.OK)
	}
	return true, nil
}

func (h *holder) restoreFact(kind string, fields []string) error {
	var ns []int
	for _, f := range fields {
		n, _ := strconv.Atoi(f) // those that are no numbers are not used as such
		ns = append(ns, n)
	}
	switch {
	case kind == "mode" && len(fields) == 1:
		h.mode = fields[0]
	case kind == "fds" && len(fields) == 3:
		h.lock, h.listener = ns[0], ns[1]
		setCloseOnExec(h.lock, true)
		setCloseOnExec(h.listener, true)
	case kind == "conns":
		for _, fd := range ns {
			setCloseOnExec(fd, true)
			h.conns[fd] = struct{}{}
		}
	case kind == "key" && len(fields) >= 2:
		key, err := strconv.Unquote(fields[0])
		if err != nil {
			return err
		}
		for _, fd := range ns[1:] {
			setCloseOnExec(fd, true)
		}
		h.kept[key] = ns[1:]
		h.keptFDs += len(ns) - 1
	case kind == "watch" && len(fields) == 2:
		start, err := wire.ParseUint(fields[1])
		h.watched[ns[0]] = start
		return err
	case kind == "exit" && len(fields) == 3:
		nanos, err := strconv.ParseInt(fields[2], 10, 64)
		h.unsaved[fields[0]] = exit{status: ns[1], nanos: nanos}
		return err
	case kind == "child" && len(fields) == 6:
		return h.restoreChild(fields, ns)
	default:
		// A newer image wrote a fact that this one does not know: going on without is better
		// than losing all.
		logf("reexec: fact %q is not known; ignored", kind)
	}
	return nil
}

func (h *holder) restoreChild(fields []string, ns []int) error {
	c := h.child(fields[0])
	if c == nil {
		return nil
	}
	start, err := wire.ParseUint(fields[2])
	if err != nil {
		return err
	}
	since, err := strconv.ParseInt(fields[3], 10, 64)
	c.pid, c.start, c.since = ns[1], start, time.Unix(0, since)
	c.restarts, c.version, c.everRan = ns[4], fields[5], true
	return err
}

func setCloseOnExec(fd int, on bool) {
	flag := uintptr(0)
	if on {
		flag = syscall.FD_CLOEXEC
	}
	_, _, _ = syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_SETFD, flag)
}
