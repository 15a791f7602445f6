package server

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/runner"
	"berth/internal/runner/launch"
	"berth/internal/spool"
)

const (
	pipeBytes = 1 << 20 // what output may wait for a dead runner
	fifoMode  = 0o620   // libcontainer gives it to the process's user, who may then reopen /dev/stdout
)

// stdio holds the process's ends of its standard streams while it is started.
type stdio struct {
	launch.Stdio
	files   []*os.File
	console int // our end of the socket that the terminal's master comes through; -1: none
}

func (e *stdio) close() {
	for _, f := range e.files {
		_ = f.Close()
	}
	e.files = nil
	if e.console >= 0 {
		_ = unix.Close(e.console)
		e.console = -1
	}
}

func (e *stdio) add(f *os.File, err error) (*os.File, error) {
	if err == nil {
		e.files = append(e.files, f)
	}
	return f, err
}

// openStdio makes the streams of a process that is about to start: ours go to p, the process's
// are returned. The caller closes both if anything fails.
func (s *Server) openStdio(p *proc) (_ *stdio, err error) {
	e := &stdio{console: -1}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if p.Terminal {
		return e, e.openConsole(p)
	}
	if e.Stdin, e.Stdout, err = s.nullStreams(e, p); err != nil {
		return nil, err
	}
	e.Stderr = e.Stdout
	dir := s.fifos(p.ID)
	if p.Spool != "" || p.Stdin {
		if err := os.RemoveAll(dir); err != nil {
			return nil, err
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if p.Spool != "" {
		for _, out := range []struct {
			name   string
			number uint8
			to     **os.File
		}{{"stdout", spool.Stdout, &e.Stdout}, {"stderr", spool.Stderr, &e.Stderr}} {
			reader, writer, err := openOutput(filepath.Join(dir, out.name))
			if err != nil {
				return nil, err
			}
			p.streams = append(p.streams, &stream{fd: reader, number: out.number})
			*out.to, _ = e.add(writer, nil)
		}
	}
	if p.Stdin {
		reader, writer, err := openInput(filepath.Join(dir, "stdin"))
		if err != nil {
			return nil, err
		}
		p.stdin = writer
		e.Stdin, _ = e.add(reader, nil)
	}
	return e, nil
}

// openOutput makes a FIFO. The process's end is open for reading too, so that writing to it
// never fails for want of a reader.
func openOutput(path string) (reader int, writer *os.File, err error) {
	if err := unix.Mkfifo(path, fifoMode); err != nil {
		return -1, nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	if err := os.Chmod(path, fifoMode); err != nil { // whatever the umask
		return -1, nil, err
	}
	writer, err = blocking(path, unix.O_RDWR)
	if err != nil {
		return -1, nil, err
	}
	if reader, err = openReader(path); err != nil {
		_ = writer.Close()
		return -1, nil, err
	}
	return reader, writer, nil
}

// openReader opens our end of an output FIFO.
func openReader(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, pipeBytes) // less will do
	return fd, nil
}

// openInput makes a FIFO for standard input.
func openInput(path string) (reader *os.File, writer int, err error) {
	if err := unix.Mkfifo(path, fifoMode); err != nil {
		return nil, -1, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	reader, err = blocking(path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, -1, err
	}
	if writer, err = openWriter(path); err != nil {
		_ = reader.Close()
		return nil, -1, err
	}
	return reader, writer, nil
}

func openWriter(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// blocking opens a process's end of a FIFO; programs do not expect a non-blocking one.
func blocking(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openConsole makes the socket for a terminal's master, and the pipe that output goes through.
func (e *stdio) openConsole(p *proc) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	e.console = pair[0]
	e.Console, _ = e.add(os.NewFile(uintptr(pair[1]), "console"), nil)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return os.NewSyscallError("pipe", err)
	}
	p.streams, p.ptyIn = []*stream{{fd: pipe[0], number: spool.Stdout}}, pipe[1]
	_, _ = unix.FcntlInt(uintptr(pipe[0]), unix.F_SETPIPE_SZ, pipeBytes)
	return nil
}

// receivePty takes the master of a started process's terminal, which was sent before the start
// came back.
func (e *stdio) receivePty(p *proc) error {
	name, oob := make([]byte, unix.PathMax), make([]byte, unix.CmsgSpace(4))
	_, oobn, _, _, err := unix.Recvmsg(e.console, name, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return os.NewSyscallError("receive terminal", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return errdefs.New(errdefs.ErrInvalid, "terminal of %s: none came from the new process (%v)", p.ID, err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		closeAll(fds)
		return errdefs.New(errdefs.ErrInvalid, "terminal of %s: none came from the new process (%v)", p.ID, err)
	}
	p.pty = fds[0]
	return unix.SetNonblock(p.pty, true)
}

// openStdin returns a duplicate of the write end of a process's standard input.
func (s *Server) openStdin(id string) ([]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.procs[id]
	if p == nil {
		return nil, errNoProcess(id)
	}
	fd := p.stdin
	if p.Terminal {
		fd = p.pty
	}
	if fd < 0 {
		return nil, errdefs.New(errdefs.ErrConflict, "process %s has no standard input that is open", id)
	}
	return duplicate([]int{fd})
}

// closeStdin lets go of the write end of a process's standard input, here and in the holder.
func (s *Server) closeStdin(id string) error {
	s.mu.Lock()
	p := s.procs[id]
	if p == nil {
		s.mu.Unlock()
		return errNoProcess(id)
	}
	fd, only := p.stdin, len(p.streams) == 0
	p.stdin = -1
	s.mu.Unlock()
	if fd < 0 {
		return nil
	}
	_, err := s.update(p, func(r *record) { r.StdinClosed = true })
	_ = unix.Close(fd)
	if err != nil {
		return err
	}
	if only {
		return s.holderNow().Drop(holderKey(p.ID, p.Nonce))
	}
	return s.keepStreams(p)
}

// resize sets the size of a process's terminal.
func (s *Server) resize(r runner.ResizeRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.procs[r.ID]
	if p == nil {
		return errNoProcess(r.ID)
	}
	if p.pty < 0 {
		return errdefs.New(errdefs.ErrConflict, "process %s has no terminal that is open", r.ID)
	}
	err := unix.IoctlSetWinsize(p.pty, unix.TIOCSWINSZ, &unix.Winsize{Row: r.Height, Col: r.Width})
	if err != nil {
		return os.NewSyscallError("set the size of the terminal", err)
	}
	return nil
}
