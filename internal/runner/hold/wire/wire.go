// Package wire is what berth-holder and its clients have in common: packets, names of
// operations and limits.
//
// A packet is one message on a SOCK_SEQPACKET unix socket: fields separated by zero bytes,
// with file descriptors attached. A request begins with its operation; an answer begins with
// OK, or with Failed, the name of an error kind (package errdefs) and a text. Each connection's
// requests are answered in order. Only the standard library is used, and not package net, so
// that the holder stays small. Functions are safe for concurrent use.
package wire

import (
	"errors"
	"os"
	"strings"
	"syscall"
)

// Limits of the protocol.
const (
	MaxPacket = 64 << 10 // bytes of one packet
	MaxKey    = 255      // bytes of one key
	MaxFDs    = 64       // descriptors under one key
)

// Operations, with their arguments and what a good answer carries.
const (
	OpPut     = "put"     // key + descriptors; replaces what was there
	OpGet     = "get"     // key → descriptors (none if the key is not there)
	OpDrop    = "drop"    // key
	OpList    = "list"    // prefix, after → keys in order behind after, as many as fit; call again behind the last
	OpWatch   = "watch"   // pid, start time: record this process's exit should it become our child
	OpForget  = "forget"  // pid, start time: the opposite; removes a record
	OpExitOf  = "exitof"  // pid, start time → wait status, unix nanoseconds; NotFound if it is not recorded
	OpHello   = "hello"   // name, version: a child names itself
	OpStatus  = "status"  // → holder pid, version, mode, then per child: name, pid, start time, unix seconds, restarts, version
	OpRestart = "restart" // child's name; answered once the new process is started
	OpStop    = "stop"    // "keep" or "all"; answered once the children are gone
	OpStart   = "start"   // start children again after stop keep
	OpReexec  = "reexec"  // replace the holder's program by the one on disk; answered by the new one
)

// Answers.
const (
	OK     = "ok"
	Failed = "err"
)

// Arguments of OpStop, and the modes that OpStatus reports.
const (
	StopKeep = "keep"
	StopAll  = "all"

	ModeRunning = "running"
	ModeKept    = "kept" // children ended, everything still held
	ModeEnding  = "ending"
)

// Names of the holder's children: executables beside its own.
const (
	Runner = "berth-runner"
	Daemon = "berthd"
)

// Files below Root.Run.
const (
	LockFile = "holder.lock"
	ArgsFile = "holder.args" // the daemon's arguments, separated by zero bytes
	ExitsDir = "exits"       // <pid>-<start time>: JSON
)

// ReadyEnv names the descriptor on which a starting holder says that it is ready ("ok") or why not.
const ReadyEnv = "BERTH_HOLDER_READY_FD"

var errTruncated = errors.New("packet too long")

// Encode joins fields to a packet. Fields must not contain zero bytes.
func Encode(fields ...string) []byte { return []byte(strings.Join(fields, "\x00")) }

// Decode splits a packet into its fields.
func Decode(packet []byte) []string { return strings.Split(string(packet), "\x00") }

// Send writes one packet to a socket, with descriptors that stay the caller's.
func Send(socket int, packet []byte, fds []int) error {
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	for {
		_, err := syscall.SendmsgN(socket, packet, rights, nil, syscall.MSG_NOSIGNAL)
		if err != syscall.EINTR {
			return err
		}
	}
}

// Recv reads one packet into buf. The descriptors are the caller's, close-on-exec. At the end
// of the stream n is 0 and err nil.
func Recv(socket int, buf []byte) (n int, fds []int, err error) {
	oob := make([]byte, syscall.CmsgSpace(MaxFDs*4))
	var oobn, flags int
	for {
		n, oobn, flags, _, err = syscall.Recvmsg(socket, buf, oob, syscall.MSG_CMSG_CLOEXEC)
		if err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		return 0, nil, err
	}
	fds, err = Rights(oob[:oobn])
	if err == nil && flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0 {
		CloseAll(fds)
		return n, nil, errTruncated
	}
	return n, fds, err
}

// Rights returns the descriptors in a control message.
func Rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range messages {
		if messages[i].Header.Type != syscall.SCM_RIGHTS {
			continue
		}
		got, err := syscall.ParseUnixRights(&messages[i])
		if err != nil {
			CloseAll(fds)
			return nil, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// CloseAll closes descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		_ = syscall.Close(fd)
	}
}

// StartTime returns field 22 of /proc/PID/stat, in clock ticks since boot: with the pid it
// names a process for good. It works for zombies too.
func StartTime(pid int) (uint64, error) {
	fields, err := Stat(pid)
	if err != nil {
		return 0, err
	}
	return ParseUint(fields[statStartTime])
}

// Indexes into the fields that Stat returns: the kernel's number less 3.
const (
	statState     = 0
	statStartTime = 22 - 3
	statExitCode  = 52 - 3
)

// Stat returns the fields of /proc/PID/stat behind the command name.
func Stat(pid int) ([]string, error) {
	raw, err := os.ReadFile("/proc/" + Itoa(pid) + "/stat")
	if err != nil {
		return nil, err
	}
	text := string(raw)
	end := strings.LastIndexByte(text, ')')
	if end < 0 {
		return nil, syscall.EINVAL
	}
	fields := strings.Fields(text[end+1:])
	if len(fields) <= statExitCode {
		return nil, syscall.EINVAL
	}
	return fields, nil
}

// ZombieStatus returns the wait status of a process that is dead and not yet reaped.
func ZombieStatus(pid int, startTime uint64) (status int, ok bool) {
	fields, err := Stat(pid)
	if err != nil || fields[statState] != "Z" {
		return 0, false
	}
	if start, err := ParseUint(fields[statStartTime]); err != nil || start != startTime {
		return 0, false
	}
	code, err := ParseUint(fields[statExitCode])
	return int(code), err == nil
}
