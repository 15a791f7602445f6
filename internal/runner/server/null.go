package server

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// nullStreams opens what stands for the streams that nobody asked for. libcontainer gives a
// container's first process the null device from inside; an exec'd one keeps what it is started
// with, and with the node's own /dev/null root inside could change that file's mode and owner
// for the whole node. So its comes from inside, or, where a container has done away with it,
// an input at its end and an output that nobody reads.
func (s *Server) nullStreams(e *stdio, p *proc) (in, out *os.File, err error) {
	if p.first() {
		null, err := e.add(os.OpenFile(os.DevNull, os.O_RDWR, 0))
		return null, null, err
	}
	null, err := s.nullInside(p.Container)
	if err == nil {
		null, err = e.add(null, nil)
		return null, null, err
	}
	in, writer, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	e.files = append(e.files, in)
	if err := writer.Close(); err != nil {
		return nil, nil, err
	}
	reader, out, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	e.files = append(e.files, out)
	return in, out, reader.Close()
}

var errNoNull = errors.New("no null device inside the container")

// nullInside opens a container's own null device; its operation is held.
func (s *Server) nullInside(container string) (*os.File, error) {
	s.mu.Lock()
	first := s.procs[container]
	s.mu.Unlock()
	if first == nil {
		return nil, errNoNull
	}
	root, err := unix.Open("/proc/"+strconv.Itoa(first.PID)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	if s.mustRun(first) != nil {
		return nil, errNoNull // the pid may have been another's
	}
	// Not opened before it is known what it is: opening a device or FIFO has effects.
	path, err := unix.Openat2(root, "dev/null", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(path)
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		return nil, errNoNull
	}
	return os.OpenFile("/proc/self/fd/"+strconv.Itoa(path), os.O_RDWR, 0)
}
