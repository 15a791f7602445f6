package engine

import (
	"context"
	"io"
	"time"

	"berth/internal/event"
)

// API lists what Engine offers, as documentation of the contract; the compiler checks it.
// Consumers declare the smaller interfaces they need. A ref is an ID, an unambiguous prefix of
// one, or a name. Errors wrap the kinds of package errdefs.
type API interface {
	SandboxAPI
	ContainerAPI
	ExecAPI
	StreamAPI
	Events() *event.Hub
}

// SandboxAPI is the life of sandboxes.
type SandboxAPI interface {
	// CreateSandbox records a sandbox; it is made ready by StartSandbox or by the start of its
	// first container.
	CreateSandbox(ctx context.Context, c SandboxConfig) (Sandbox, error)
	StartSandbox(ctx context.Context, ref string) error
	// StopSandbox stops its containers and frees its network.
	StopSandbox(ctx context.Context, ref string) error
	// RemoveSandbox removes it with its containers.
	RemoveSandbox(ctx context.Context, ref string) error
	Sandbox(ref string) (Sandbox, error)
	Sandboxes() []Sandbox
	// ConnectSandbox adds a network, at once when the sandbox is ready.
	ConnectSandbox(ctx context.Context, ref string, e EndpointConfig) error
	DisconnectSandbox(ctx context.Context, ref, network string, force bool) error
	// NetworkUsers returns the IDs of sandboxes that name a network, ready ones first.
	NetworkUsers(networkID string) []Sandbox
}

// ContainerAPI is the life of containers.
type ContainerAPI interface {
	CreateContainer(ctx context.Context, c ContainerConfig) (Container, error)
	// StartContainer returns when the program runs. ErrNotModified when it already does.
	StartContainer(ctx context.Context, ref string) error
	// StopContainer sends the stop signal (signal, or the container's own when ""), then SIGKILL
	// after timeout (nil: the container's own; negative: never). ErrNotModified when not running.
	StopContainer(ctx context.Context, ref string, timeout *time.Duration, signal string) error
	RestartContainer(ctx context.Context, ref string, timeout *time.Duration, signal string) error
	// KillContainer sends one signal ("" is SIGKILL). ErrConflict when not running.
	KillContainer(ctx context.Context, ref, signal string) error
	PauseContainer(ctx context.Context, ref string) error
	UnpauseContainer(ctx context.Context, ref string) error
	RenameContainer(ctx context.Context, ref, name string) error
	RemoveContainer(ctx context.Context, ref string, o RemoveOptions) error
	// UpdateContainer changes limits of a running or stopped container, and its restart policy.
	UpdateContainer(ctx context.Context, ref string, r *Resources, p *RestartPolicy) error
	Container(ref string) (Container, error)
	Containers() []Container
	// Wait subscribes at once and returns a channel that delivers one result.
	Wait(ctx context.Context, ref string, c WaitCondition) (<-chan WaitResult, error)
	ResizeContainer(ctx context.Context, ref string, height, width uint16) error
	// Stats reads the container's cgroup and network counters. ErrConflict when not running.
	Stats(ctx context.Context, ref string) (Stats, error)
	// PIDs of the container's processes in the node's PID namespace.
	PIDs(ctx context.Context, ref string) ([]int, error)
	// WritableBytes is the size of the container's own layer.
	WritableBytes(ctx context.Context, ref string) (int64, error)
	// Explain says in words why the container is as it is.
	Explain(ctx context.Context, ref string) (Explanation, error)
}

// ExecAPI is the life of exec'd processes.
type ExecAPI interface {
	CreateExec(ctx context.Context, c ExecConfig) (Exec, error)
	Exec(id string) (Exec, error)
	// Execs returns the IDs of a container's execs that have not been forgotten.
	Execs(container string) []string
	// StartExec starts it. Attach with AttachExec before, so that no output is missed.
	StartExec(ctx context.Context, id string) error
	WaitExec(ctx context.Context, id string) (Exec, error)
	ResizeExec(ctx context.Context, id string, height, width uint16) error
	// ExecSync runs a program to its end. After timeout (0: none) it is killed and the error
	// wraps context.DeadlineExceeded. Output beyond 16 MiB is cut.
	ExecSync(ctx context.Context, container string, args []string, timeout time.Duration) (stdout, stderr []byte, exitCode int, err error)
}

// StreamAPI is containers' input and output.
type StreamAPI interface {
	// Attach connects to a container's streams from now on. It works before the start.
	Attach(ctx context.Context, ref string, o AttachOptions) (*Attachment, error)
	AttachExec(ctx context.Context, id string, o AttachOptions) (*Attachment, error)
	// Logs calls f for each entry in order; f's error ends it and is returned. With Follow it
	// returns when the container ended (and will not be restarted) or ctx did.
	Logs(ctx context.Context, ref string, o LogOptions, f func(LogEntry) error) error
	// ReopenLog makes the engine write to a new file at the log's path (CRI log rotation).
	ReopenLog(ctx context.Context, ref string) error
}

// RemoveOptions tune RemoveContainer.
type RemoveOptions struct {
	Force   bool // kill it first when it runs
	Volumes bool // also its anonymous volumes
}

// WaitCondition says what Wait waits for.
type WaitCondition string

// The conditions, in docker's words.
const (
	WaitNotRunning WaitCondition = "not-running" // at once when it does not run
	WaitNextExit   WaitCondition = "next-exit"
	WaitRemoved    WaitCondition = "removed"
)

// WaitResult is how it ended; a container that could not start has the exit code for that.
type WaitResult struct{ ExitCode int }

// AttachOptions choose streams.
type AttachOptions struct {
	Stdin, Stdout, Stderr bool
}

// Attachment is one client's connection to a process's streams; made by Attach.
type Attachment struct {
	// Stdin writes to the process. Close tells that this client has no more input: with
	// StdinOnce (and for execs) the process then sees the end of file. Nil when not asked for.
	// Writes fail with ErrConflict before the process runs.
	Stdin io.WriteCloser
	// Terminal tells that stdout carries everything, raw.
	Terminal bool
	copy     func(ctx context.Context, stdout, stderr io.Writer) error
	close    func()
}

// NewAttachment returns an attachment made of its parts: stdin may be nil; copy and release are
// what Copy and Close do. Besides the engine, tests of dialects use it for fakes.
func NewAttachment(stdin io.WriteCloser, terminal bool, copy func(ctx context.Context, stdout, stderr io.Writer) error, release func()) *Attachment {
	return &Attachment{Stdin: stdin, Terminal: terminal, copy: copy, close: release}
}

// Copy writes output until the process has ended and all of it was written (nil), a writer
// failed, or ctx ended. Call it once. A nil writer discards.
func (a *Attachment) Copy(ctx context.Context, stdout, stderr io.Writer) error {
	return a.copy(ctx, stdout, stderr)
}

// Close releases the attachment; it does not touch the process except as Stdin.Close does.
func (a *Attachment) Close() { a.close() }

// Streams of output.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// LogOptions choose entries.
type LogOptions struct {
	Stdout, Stderr bool
	Since, Until   time.Time // zero: no bound
	Tail           int       // negative: all
	Follow         bool
}

// LogEntry is one line (or part of a very long one).
type LogEntry struct {
	Time    time.Time
	Stream  string
	Line    []byte // with its newline, unless Partial; valid until f returns
	Partial bool
}

// Stats are a container's counters, in bytes, nanoseconds and numbers.
type Stats struct {
	Time                      time.Time
	CPUNanos                  uint64
	CPUUserNanos              uint64
	CPUSysNanos               uint64
	ThrottledNanos            uint64
	ThrottledPeriods, Periods uint64
	MemoryBytes               uint64 // usage as the kernel counts
	MemoryCache               uint64 // inactive file pages
	MemoryLimit               uint64
	MemoryPeak                uint64
	Pids, PidsLimit           uint64
	Networks                  map[string]NetworkStats // by interface
	ReadBytes, WriteBytes     uint64
}

// NetworkStats are one interface's counters.
type NetworkStats struct {
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Explanation answers "why" in words.
type Explanation struct {
	Subject string   // container "web"
	Summary string   // one sentence
	Details []string // facts behind it, one sentence each
	Hints   []string // what to do
}
