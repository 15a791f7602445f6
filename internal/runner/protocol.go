// Package runner is the protocol of berth-runner and its client: one process per node that
// starts, reaps and pumps the stdio of every container.
//
// A process is addressed by an ID of its own: a container's first process has the container's
// ID, an exec'd process the exec's ID. The runner keeps nothing that its death loses: what it
// needs to adopt everything is in small files below Root.Run and in berth-holder.
package runner

import (
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// CreateRequest asks for a container: namespaces, cgroups and an init that waits for Start.
type CreateRequest struct {
	ID     string // of the container and of its first process
	Bundle string // absolute directory with config.json (OCI runtime spec); the cgroup is spec.Linux.CgroupsPath
	IO     IO
	Start  bool // start at once: one round trip instead of two
}

// ExecRequest asks for one more process in a running container. It is started at once.
type ExecRequest struct {
	ID        string // of the new process
	Container string
	Process   *specs.Process // Terminal and ConsoleSize are honoured
	IO        IO
}

// IO says where a process's standard streams go.
type IO struct {
	// Spool is the absolute directory that takes output (package spool). "" discards output.
	Spool string `json:",omitempty"`
	// SpoolBytes bounds what waits there unrendered; the oldest is dropped beyond it. 0: 32 MiB.
	SpoolBytes int64 `json:",omitempty"`
	// Stdin opens standard input; otherwise it is /dev/null. A terminal always has one.
	Stdin bool `json:",omitempty"`
}

// Process identifies a started process beyond pid reuse.
type Process struct {
	ID        string
	Container string // equals ID for a container's first process
	PID       int
	StartTime uint64 // clock ticks since boot, field 22 of /proc/PID/stat
}

// State of a process.
type State string

// The states of a process as the runner sees it.
const (
	Created State = "created" // waits for Start
	Running State = "running"
	Paused  State = "paused"
	Stopped State = "stopped" // Exit is set
)

// Exit tells how a process ended.
type Exit struct {
	Known     bool // false: the kernel could not tell any more; Code is then -1, never 0
	Code      int  // exit status, or 128 plus the signal
	Signal    int  // 0 when it exited by itself
	OOMKilled bool // the kernel's OOM killer struck in its cgroup
	At        time.Time
}

// Status is a process with its state.
type Status struct {
	Process
	State    State
	Exit     Exit // meaningful when State is Stopped
	Terminal bool
}

// Event is what the runner tells its clients unasked. Delivery is at most once: a client that
// (re)connects calls List and reads spools from its own offsets first.
type Event struct {
	Kind EventKind
	ID   string // of the process
	PID  int    // with EventExit: tells one run of a container from the next
	Exit Exit   // with EventExit
}

// EventKind tells events apart.
type EventKind string

// The kinds of event.
const (
	EventOutput EventKind = "output" // the process's spool grew; coalesced
	EventExit   EventKind = "exit"   // all output of the process is in its spool before this is sent
)

// Info describes the runner itself.
type Info struct {
	PID       int
	Version   string
	Processes int
}

// KillRequest sends a signal to a process, or with All to every process of its container.
type KillRequest struct {
	ID     string
	Signal int
	All    bool
}

// ResizeRequest sets the size of a process's terminal, in characters.
type ResizeRequest struct {
	ID            string
	Height, Width uint16
}

// UpdateRequest changes a running container's limits; what is not set stays as it is.
type UpdateRequest struct {
	ID        string
	Resources *specs.LinuxResources
}

// IDRequest is the request of all operations that need nothing but a process.
type IDRequest struct{ ID string }
