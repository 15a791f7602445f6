package holder

import (
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"

	"berth/internal/errdefs"
	"berth/internal/runner/hold/wire"
)

// serve handles one packet of a client.
func (h *holder) serve(fd int) {
	if _, open := h.conns[fd]; !open {
		return
	}
	n, fds, err := wire.Recv(fd, h.packet)
	if err == syscall.EAGAIN {
		return
	}
	if err != nil || n == 0 {
		wire.CloseAll(fds)
		h.hangUp(fd)
		return
	}
	request := wire.Decode(h.packet[:n])
	op, args := request[0], request[1:]
	if op == wire.OpPut && len(args) == 1 {
		if err = h.put(args[0], fds); err != nil {
			wire.CloseAll(fds)
		}
		h.answer(fd, nil, nil, err)
		return
	}
	wire.CloseAll(fds) // no other operation takes any
	if wait, known := h.control(fd, op, args); known {
		if wait != nil {
			h.waiters = append(h.waiters, waiter{conn: fd, done: wait})
		}
		return
	}
	fields, out, err := h.answerTo(op, args)
	h.answer(fd, out, fields, err)
}

func (h *holder) answer(fd int, fds []int, fields []string, err error) {
	if err != nil {
		h.reply(fd, nil, wire.Failed, errdefs.Name(err), err.Error())
		return
	}
	h.reply(fd, fds, append([]string{wire.OK}, fields...)...)
}

// answerTo handles the operations that only look at or change what is held.
func (h *holder) answerTo(op string, args []string) (fields []string, fds []int, err error) {
	switch {
	case op == wire.OpGet && len(args) == 1:
		return nil, h.kept[args[0]], nil
	case op == wire.OpDrop && len(args) == 1:
		h.drop(args[0])
		return nil, nil, nil
	case op == wire.OpList && len(args) == 2:
		return h.list(args[0], args[1]), nil, nil
	case op == wire.OpStatus:
		return h.status(), nil, nil
	case op == wire.OpHello && len(args) == 2:
		if c := h.child(args[0]); c != nil {
			c.version = args[1]
			return nil, nil, nil
		}
		return nil, nil, errdefs.New(errdefs.ErrNotFound, "berth-holder: no child is named %q", args[0])
	case (op == wire.OpWatch || op == wire.OpForget || op == wire.OpExitOf) && len(args) == 2:
		pid, err := strconv.Atoi(args[0])
		start, err2 := wire.ParseUint(args[1])
		if err != nil || err2 != nil || pid <= 0 {
			return nil, nil, errdefs.New(errdefs.ErrInvalid, "berth-holder: %s: %q %q is not a pid and a start time", op, args[0], args[1])
		}
		fields, err := h.exits(op, pid, start)
		return fields, nil, err
	}
	return nil, nil, errdefs.New(errdefs.ErrUnsupported, "berth-holder: no operation %q with %d arguments; is it older than its client? try: reexec", op, len(args))
}

// control handles the operations on the children and on the holder itself. It answers at once,
// or returns when to.
func (h *holder) control(fd int, op string, args []string) (wait func() bool, known bool) {
	switch {
	case op == wire.OpRestart && len(args) == 1:
		c := h.child(args[0])
		if c == nil {
			h.answer(fd, nil, nil, errdefs.New(errdefs.ErrNotFound, "restart %q: there are %s and %s", args[0], wire.Runner, wire.Daemon))
			return nil, true
		}
		if h.mode != wire.ModeRunning {
			h.answer(fd, nil, nil, errdefs.New(errdefs.ErrConflict, "restart %s: the holder is told to run nothing; start it first", c.name))
			return nil, true
		}
		c.restart()
		return func() bool { return !c.wanted || h.mode != wire.ModeRunning }, true
	case op == wire.OpStop && len(args) == 1 && (args[0] == wire.StopKeep || args[0] == wire.StopAll):
		h.mode = wire.ModeKept
		if args[0] == wire.StopAll {
			h.mode = wire.ModeEnding
		}
		return func() bool { return h.childless() }, true
	case op == wire.OpStart:
		if h.mode == wire.ModeEnding {
			h.answer(fd, nil, nil, errdefs.New(errdefs.ErrConflict, "start: the holder is ending"))
			return nil, true
		}
		h.mode = wire.ModeRunning
		h.answer(fd, nil, nil, nil)
		return nil, true
	case op == wire.OpReexec:
		// Comes back only when it failed; the new program answers otherwise.
		h.answer(fd, nil, nil, h.reexec(fd))
		return nil, true
	}
	return nil, false
}

func (h *holder) put(key string, fds []int) error {
	switch {
	case key == "" || len(key) > wire.MaxKey:
		return errdefs.New(errdefs.ErrInvalid, "put: a key has 1 to %d bytes, this one %d", wire.MaxKey, len(key))
	case len(fds) == 0:
		return errdefs.New(errdefs.ErrInvalid, "put %s: no descriptor came with it", key)
	case h.keptFDs+len(fds)-len(h.kept[key]) > h.maxFDs:
		return errdefs.New(errdefs.ErrExhausted, "put %s: %d descriptors are held and RLIMIT_NOFILE allows no more; raise it", key, h.keptFDs)
	}
	h.drop(key)
	h.kept[key] = fds
	h.keptFDs += len(fds)
	return nil
}

func (h *holder) drop(key string) {
	fds := h.kept[key]
	wire.CloseAll(fds)
	h.keptFDs -= len(fds)
	delete(h.kept, key)
}

// list returns the keys with the prefix behind after that fit into a packet.
func (h *holder) list(prefix, after string) []string {
	var found []string
	for k := range h.kept {
		if strings.HasPrefix(k, prefix) && k > after {
			found = append(found, k)
		}
	}
	sort.Strings(found)
	room := wire.MaxPacket - 16
	for i, k := range found {
		if room -= len(k) + 1; room < 0 {
			return found[:i]
		}
	}
	return found
}

func (h *holder) status() []string {
	out := []string{wire.Itoa(os.Getpid()), h.Version, h.mode}
	for _, c := range h.children {
		since := int64(0)
		if c.pid != 0 {
			since = c.since.Unix()
		}
		out = append(out, c.name, wire.Itoa(c.pid), strconv.FormatUint(c.start, 10),
			strconv.FormatInt(since, 10), wire.Itoa(c.restarts), c.version)
	}
	return out
}

// exits handles what is about the exits of containers.
func (h *holder) exits(op string, pid int, start uint64) ([]string, error) {
	name := wire.ExitFile(pid, start)
	path := filepath.Join(h.Root.Run, wire.ExitsDir, name)
	switch op {
	case wire.OpWatch:
		if len(h.watched) >= maxWatched {
			return nil, errdefs.New(errdefs.ErrExhausted, "watch %d: %d processes are watched already", pid, len(h.watched))
		}
		h.watched[pid] = start
		return nil, nil
	case wire.OpForget:
		if h.watched[pid] == start {
			delete(h.watched, pid)
		}
		delete(h.unsaved, name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		return nil, nil
	}
	h.reap() // so that "not recorded" means "not ours"
	e, ok := h.unsaved[name]
	if !ok {
		var err error
		if e, err = readExit(path); err != nil {
			return nil, errdefs.New(errdefs.ErrNotFound, "no exit of process %d is recorded", pid)
		}
	}
	return []string{wire.Itoa(e.status), strconv.FormatInt(e.nanos, 10)}, nil
}
