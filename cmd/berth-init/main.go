// Command berth-init is the first process of containers that ask for one (docker run --init):
// it starts the program it is given, passes signals on to it, reaps whatever is left to it,
// and ends as the program ends, with 128 plus the signal if one killed it.
//
//	berth-init [--] PROGRAM [ARGUMENT…]
//
// It is linked statically and knows nothing of the image around it.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"syscall"
)

// Exit codes of its own, as docker's.
const (
	exitUsage     = 125
	exitNotInvoke = 126
	exitNotFound  = 127
)

func main() {
	debug.SetGCPercent(20)
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "usage: berth-init [--] PROGRAM [ARGUMENT…]")
		os.Exit(exitUsage)
	}
	os.Exit(run(args))
}

func run(args []string) int {
	path, err := exec.LookPath(args[0])
	if err != nil {
		fmt.Fprintln(os.Stderr, "berth-init:", err)
		if errors.Is(err, os.ErrPermission) {
			return exitNotInvoke
		}
		return exitNotFound
	}
	signals := make(chan os.Signal, 64) // before the program starts: none is missed
	signal.Notify(signals)
	// A group of its own, in the foreground where there is a terminal: ^C then reaches the
	// program's own children too, once.
	attr := &syscall.SysProcAttr{Setpgid: true}
	if _, err := foreground(); err == nil {
		attr.Foreground, attr.Ctty = true, 0
	}
	pid, err := syscall.ForkExec(path, args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: attr,
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "berth-init: exec %s: %v\n", path, err)
		return exitNotInvoke
	}
	for {
		if code, ended := reap(pid); ended {
			return code
		}
		s := (<-signals).(syscall.Signal)
		switch s {
		case syscall.SIGCHLD, syscall.SIGURG: // the Go runtime signals itself with SIGURG
		case syscall.SIGTTIN, syscall.SIGTTOU:
		default:
			_ = syscall.Kill(pid, s)
		}
	}
}

// reap takes all dead children and tells whether, and how, the program was among them.
func reap(pid int) (code int, ended bool) {
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || got <= 0 {
			return code, ended
		}
		if got != pid {
			continue
		}
		ended, code = true, status.ExitStatus()
		if status.Signaled() {
			code = 128 + int(status.Signal())
		}
	}
}
