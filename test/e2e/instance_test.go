package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"berth/internal/state"
	"berth/test/isolate"
)

// process is one process of an instance, found by the --root in its command line.
type process struct {
	pid  int
	name string // base name of its program
	args []string
}

// processes lists the instance's own processes (not containers).
func processes(root string) []process {
	var list []process
	for _, pid := range pids() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || len(text) == 0 {
			continue
		}
		args := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
		for i, arg := range args {
			if arg == "--root="+root || arg == "--root" && i+1 < len(args) && args[i+1] == root {
				list = append(list, process{pid, filepath.Base(args[0]), args})
				break
			}
		}
	}
	return list
}

func pids() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var list []int
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			list = append(list, pid)
		}
	}
	return list
}

// gone tells whether a process has ended; a zombie has.
func gone(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := bytes.Cut(text, []byte(") "))
	return len(rest) > 0 && (rest[0] == 'Z' || rest[0] == 'X')
}

func waitGone(ts *testscript.TestScript, pid int) {
	deadline := time.Now().Add(patience(pollTimeout))
	for !gone(pid) {
		if time.Now().After(deadline) {
			ts.Fatalf("process %d is still there after %v", pid, pollTimeout)
		}
		time.Sleep(time.Millisecond)
	}
}

// cmdKill9 finds all pids first and then kills, so that one death does not change the next.
func cmdKill9(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) == 0, "kill9 NAME...")
	var victims []process
	for _, p := range processes(ts.Getenv("BERTH_ROOT")) {
		if slices.Contains(args, p.name) {
			victims = append(victims, p)
		}
	}
	for _, name := range args {
		if !slices.ContainsFunc(victims, func(p process) bool { return p.name == name }) {
			ts.Fatalf("no process %s of this instance", name)
		}
	}
	for _, p := range victims {
		if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			ts.Fatalf("kill %s %d: %v", p.name, p.pid, err)
		}
	}
	for _, p := range victims {
		waitGone(ts, p.pid)
		ts.Logf("killed %s, pid %d", p.name, p.pid)
	}
}

func cmdPID(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 2, "pid NAME VAR")
	deadline := time.Now().Add(patience(pollTimeout))
	for {
		for _, p := range processes(ts.Getenv("BERTH_ROOT")) {
			if p.name == args[0] && !gone(p.pid) {
				ts.Setenv(args[1], strconv.Itoa(p.pid))
				return
			}
		}
		if time.Now().After(deadline) {
			ts.Fatalf("no process %s of this instance", args[0])
		}
		time.Sleep(pollInterval)
	}
}

func cmdAlive(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] alive PID")
	}
	pid, err := strconv.Atoi(args[0])
	ts.Check(err)
	switch {
	case neg:
		waitGone(ts, pid)
	case gone(pid):
		ts.Fatalf("process %d is gone", pid)
	}
}

// cmdReboot leaves what a reboot leaves: every process of the namespaces but the script's own is
// killed, mounts, links, rules and cgroups are gone and the run directory with them.
func cmdReboot(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, len(args) != 0, "reboot")
	root, err := state.NewRoot(ts.Getenv("BERTH_ROOT"))
	ts.Check(err)
	own := ancestors()
	isolate.Thaw(root.Name())
	deadline := time.Now().Add(patience(pollTimeout))
	for {
		left := 0
		for _, pid := range pids() {
			if !own[pid] && !gone(pid) {
				left++
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%d processes do not die", left)
		}
		time.Sleep(time.Millisecond)
	}
	mounts := mountsBelow(root.State)
	slices.Reverse(mounts)
	for _, m := range mounts {
		_ = unix.Unmount(m, unix.MNT_DETACH)
	}
	ts.Check(clearNetwork())
	ts.Check(isolate.RemoveCgroups(root.Name(), pollTimeout))
	ts.Check(os.RemoveAll(root.Run))
}

// ancestors are this process and those above it.
func ancestors() map[int]bool {
	own := map[int]bool{1: true}
	for pid := os.Getpid(); pid > 1; {
		own[pid] = true
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			break
		}
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 2 {
			break
		}
		if pid, err = strconv.Atoi(fields[1]); err != nil {
			break
		}
	}
	return own
}

func clearNetwork() error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, link := range links {
		if link.Attrs().Name != "lo" {
			_ = netlink.LinkDel(link) // the peer of a veth goes with it
		}
	}
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	conn.FlushRuleset()
	return conn.Flush()
}

// mountsBelow lists mount points in a directory, in the order they were made.
func mountsBelow(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var list []string
	for _, line := range strings.Split(string(text), "\n") {
		fields := strings.Fields(line)
		if len(fields) > 4 && (fields[4] == dir || strings.HasPrefix(fields[4], dir+"/")) {
			list = append(list, fields[4])
		}
	}
	return list
}

// cmdLeftovers polls, because namespaces and cgroups may be freed behind the answer; what is still
// there at the end fails the script. `! leftovers` expects some at once.
func cmdLeftovers(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 0 {
		ts.Fatalf("usage: [!] leftovers")
	}
	deadline := time.Now().Add(patience(pollTimeout))
	for {
		left, err := leftovers(ts.Getenv("BERTH_ROOT"))
		ts.Check(err)
		switch {
		case neg && len(left) == 0:
			ts.Fatalf("nothing is left")
		case neg || len(left) == 0:
			return
		case time.Now().After(deadline):
			ts.Fatalf("left behind:\n  %s", strings.Join(left, "\n  "))
		}
		time.Sleep(pollInterval)
	}
}

// leftovers names what remains of an instance beside its state directory.
func leftovers(dir string) ([]string, error) {
	root, err := state.NewRoot(dir)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, p := range processes(dir) {
		if !gone(p.pid) {
			left = append(left, fmt.Sprintf("process %d: %s", p.pid, strings.Join(p.args, " ")))
		}
	}
	for _, m := range mountsBelow(dir) {
		left = append(left, "mount "+m)
	}
	for _, cgroup := range isolate.Cgroups(root.Name()) {
		left = append(left, "cgroup "+cgroup)
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range interfaces {
		if i.Name != "lo" {
			left = append(left, "link "+i.Name)
		}
	}
	conn, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil, err
	}
	for _, table := range tables {
		left = append(left, "nftables table "+table.Name)
	}
	sockets, err := filepath.Glob(filepath.Join(root.Run, "*.sock"))
	if err != nil {
		return nil, err
	}
	for _, socket := range sockets {
		left = append(left, "socket "+socket)
	}
	return left, nil
}
