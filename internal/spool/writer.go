package spool

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// Writer takes the output of one process. It opens its two files at the first output.
type Writer struct {
	dir     string
	limit   int64
	segment int64 // bytes of data per segment

	data, idx int // file descriptors; -1 while closed
	base      uint64
	size      int64  // of the data file
	pos       uint64 // of the next byte; while closed, what was dropped since then
	slot      int    // where the next record goes; always allocated
	slots     int    // allocated
	recorded  bool   // the record before slot holds for the next splice too

	last bool // no more is to come than what the pipes hold

	dropped uint64
	cause   error
}

// Last says that the process is dead: what its pipes still hold is taken beyond the limit, for
// nobody will write more.
func (w *Writer) Last() { w.last = true }

// OpenWriter returns a writer for the spool in dir, which keeps at most about limit bytes
// there (0: DefaultLimit): beyond it SpliceFrom fails with errdefs.ErrExhausted and takes nothing,
// so that a process which writes faster than its log is rendered waits, as it would for a
// terminal; only a full disk costs output. Nothing is opened yet; dir is made at the first output, its parent
// must exist. A spool left by a writer that died is continued where it ends.
func OpenWriter(dir string, limit int64) (*Writer, error) {
	if !filepath.IsAbs(dir) {
		return nil, errdefs.New(errdefs.ErrInvalid, "spool directory %q: the path is not absolute", dir)
	}
	if limit < 0 {
		return nil, errdefs.New(errdefs.ErrInvalid, "spool limit %d bytes: it cannot be negative", limit)
	}
	if limit == 0 {
		limit = DefaultLimit
	}
	limit = max(limit, 4*minSegment)
	return &Writer{
		dir: dir, limit: limit, segment: min(max(limit/4, minSegment), maxSegment),
		data: -1, idx: -1,
	}, nil
}

// Dropped is the number of bytes that this writer threw away or deleted unread, and the latest
// reason.
func (w *Writer) Dropped() (bytes uint64, cause error) { return w.dropped, w.cause }

// Close closes the files. What is in the spool stays.
func (w *Writer) Close() error {
	if w.data < 0 {
		return nil
	}
	err := errors.Join(unix.Close(w.data), unix.Close(w.idx))
	w.data, w.idx, w.pos = -1, -1, 0
	return err
}

// SpliceFrom moves what the pipe fd holds, at most 1 MiB, to the spool as output of the stream
// and returns the number of bytes taken from the pipe. It never waits for input, even when fd
// is blocking: (0, nil) means that there is none now. io.EOF, possibly with bytes, means that
// the pipe has no writer any more. When output cannot be stored the bytes are dropped
// and counted (see Dropped), with no error. After an error (except io.EOF) what was not yet moved
// is still in the pipe; try again later. An error of kind errdefs.ErrConflict means that
// another writer has the spool.
func (w *Writer) SpliceFrom(fd int, stream uint8) (int64, error) {
	if stream != Stdout && stream != Stderr {
		return 0, errdefs.New(errdefs.ErrInvalid, "spool %s: no stream has the number %d", w.dir, stream)
	}
	w.recorded = false
	var total int64
	for total < maxPerCall {
		n, err := w.store(fd, stream, maxPerCall-total)
		total += n
		if errors.Is(err, unix.EAGAIN) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// store does one splice, or drops as much when there is no room.
// unix.EAGAIN: the pipe is empty; io.EOF: and stays so.
func (w *Writer) store(fd int, stream uint8, limit int64) (int64, error) {
	for {
		n, err := w.splice(fd, stream, limit)
		if err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, io.EOF) || errors.Is(err, errdefs.ErrConflict) {
			return n, err
		}
		if !hopeless(err) {
			return 0, err // also when fd is no pipe: EINVAL
		}
		w.cause = err
		if full(err) {
			freed, dropErr := w.dropOldest()
			if freed {
				continue
			}
			if dropErr != nil {
				w.cause = dropErr
			}
		}
		return w.drain(fd, limit)
	}
}

func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// hopeless tells the errors after which output is dropped from those (too many open files, say)
// where it may as well wait in the pipe.
func hopeless(err error) bool {
	return full(err) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) ||
		errors.Is(err, unix.EFBIG) || errors.Is(err, unix.ENOENT)
}

// splice records and moves up to limit bytes. Any error but EAGAIN and io.EOF is about the spool.
func (w *Writer) splice(fd int, stream uint8, limit int64) (int64, error) {
	if w.data < 0 {
		if err := w.resume(); err != nil {
			return 0, err
		}
	}
	if w.size >= w.segment || w.slot+2 > maxRecords {
		if err := w.roll(); err != nil {
			return 0, err
		}
	}
	if !w.recorded {
		// One slot beyond this record is kept ready, so that a gap can be noted on a full disk.
		if err := w.allocate(w.slot + 2); err != nil {
			return 0, err
		}
		r := record{stream: stream, offset: w.size, pos: w.pos, nanos: time.Now().UnixNano()}
		if err := w.write(r); err != nil {
			return 0, err
		}
	}
	offset := w.size
	for {
		n, err := unix.Splice(fd, nil, w.data, &offset, int(min(limit, w.segment-w.size)), unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return 0, err
		case err != nil:
			return 0, os.NewSyscallError("splice", err)
		case n == 0:
			return 0, io.EOF
		}
		if !w.recorded {
			w.recorded = true
			w.slot++
		}
		w.size += n
		w.pos += uint64(n)
		return n, nil
	}
}

// write puts r into the present slot.
func (w *Writer) write(r record) error {
	b := r.encode()
	for {
		_, err := unix.Pwrite(w.idx, b[:], int64(w.slot)*recordSize)
		if err != unix.EINTR {
			return err
		}
	}
}

// allocate makes sure that the first n slots have room on the disk.
func (w *Writer) allocate(n int) error {
	for w.slots < n {
		at := int64(w.slots) * recordSize
		err := unix.Fallocate(w.idx, 0, at, indexPage)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
			_, err = unix.Pwrite(w.idx, make([]byte, indexPage), at)
		}
		if err != nil {
			return err
		}
		w.slots += slotsPerPage
	}
	return nil
}

// drain takes up to limit bytes out of the pipe and forgets them. They are counted first:
// killed in between, the count is too high, but nothing is lost unsaid.
func (w *Writer) drain(fd int, limit int64) (int64, error) {
	waiting, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return 0, os.NewSyscallError("ioctl FIONREAD", err)
	}
	null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: "/dev/null", Err: err}
	}
	defer unix.Close(null)
	w.recorded = false
	want := min(int64(waiting), limit)
	if want > 0 {
		w.noteGap(w.pos + uint64(want))
	}
	for {
		// With nothing waiting this tells an empty pipe from one without a writer.
		n, err := unix.Splice(fd, nil, null, nil, int(max(want, 1)), unix.SPLICE_F_NONBLOCK)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			if want > 0 {
				w.noteGap(w.pos)
			}
			switch err {
			case nil:
				return 0, io.EOF
			case unix.EAGAIN:
				return 0, err
			}
			return 0, os.NewSyscallError("splice", err)
		}
		w.pos += uint64(n)
		w.dropped += uint64(n)
		if n != want {
			w.noteGap(w.pos)
		}
		return n, nil
	}
}

// noteGap writes into the spare slot how far the position has come. Its error is of no use: the
// position is kept in memory too, and the next record that can be written carries it.
func (w *Writer) noteGap(pos uint64) {
	if w.data >= 0 && w.slot < w.slots {
		_ = w.write(record{stream: streamGap, offset: w.size, pos: pos, nanos: time.Now().UnixNano()})
	}
}

// dropOldest deletes the oldest segment unless it is the newest.
func (w *Writer) dropOldest() (bool, error) {
	bases, _, err := list(w.dir)
	if err != nil || len(bases) < 2 {
		return false, err
	}
	return true, w.drop(bases)
}

func (w *Writer) drop(bases []uint64) error {
	if err := remove(w.dir, bases[0]); err != nil {
		return err
	}
	w.dropped += bases[1] - bases[0]
	return nil
}

// roll starts a new segment at the present position.
func (w *Writer) roll() error {
	bases, _, err := list(w.dir)
	if err != nil {
		return err
	}
	if !w.last && len(bases) > 1 && w.stored(bases)+w.segment > w.limit {
		return errdefs.New(errdefs.ErrExhausted, "spool %s: the limit of %d bytes is reached; output waits in the pipe until its reader has caught up", w.dir, w.limit)
	}
	return w.create(w.pos)
}

// stored is the number of bytes in the segments' files.
func (w *Writer) stored(bases []uint64) (sum int64) {
	for _, b := range bases {
		for _, p := range []string{dataPath(w.dir, b), idxPath(w.dir, b)} {
			if fi, err := os.Stat(p); err == nil {
				sum += fi.Size()
			}
		}
	}
	return sum
}

// create makes the segment that begins at base and goes over to it; on error nothing changed.
func (w *Writer) create(base uint64) error {
	next := *w
	var err error
	if next.idx, err = lockIndex(w.dir, base); err != nil {
		return err
	}
	next.base, next.pos, next.size, next.slot, next.slots, next.recorded = base, base, 0, 0, 0, false
	if err = unix.Ftruncate(next.idx, 0); err == nil {
		err = next.allocate(1)
	}
	if err == nil {
		// Last, because the data file is what makes a segment.
		next.data, err = unix.Open(dataPath(w.dir, base), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	}
	if err != nil {
		_ = os.Remove(idxPath(w.dir, base))
		_ = unix.Close(next.idx)
		return &os.PathError{Op: "create segment", Path: dataPath(w.dir, base), Err: err}
	}
	_ = w.Close() // written through the page cache: nothing is left to fail
	*w = next
	return nil
}

// lockIndex opens and locks an index file, making it when it is not there.
func lockIndex(dir string, base uint64) (int, error) {
	path := idxPath(dir, base)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = unix.Close(fd)
		if err == unix.EWOULDBLOCK {
			return -1, errdefs.New(errdefs.ErrConflict, "spool %s: another process writes to it", dir)
		}
		return -1, &os.PathError{Op: "flock", Path: path, Err: err}
	}
	return fd, nil
}

// resume opens the newest segment, or makes the first.
func (w *Writer) resume() error {
	if err := os.Mkdir(w.dir, 0o700); err != nil && !os.IsExist(err) {
		return err
	}
	bases, _, err := list(w.dir)
	if err != nil {
		return err
	}
	for len(bases) > 0 {
		base := bases[len(bases)-1]
		idx, err := lockIndex(w.dir, base)
		if err != nil {
			return err
		}
		// A writer that had the lock until now may have gone on to a newer segment.
		var orphans []uint64
		if bases, orphans, err = list(w.dir); err == nil && len(bases) > 0 && bases[len(bases)-1] == base {
			for _, o := range orphans {
				_ = os.Remove(idxPath(w.dir, o))
			}
			return w.open(base, idx)
		}
		_ = unix.Close(idx)
		if err != nil {
			return err
		}
	}
	return w.create(w.pos)
}

// open continues the segment at base, whose locked index is idx (and is taken over).
func (w *Writer) open(base uint64, idx int) error {
	x := index{base: base}
	data, err := unix.Open(dataPath(w.dir, base), unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err == nil {
		if err = x.load(data, idx); err != nil {
			_ = unix.Close(data)
		}
	}
	if err != nil {
		_ = unix.Close(idx)
		return &os.PathError{Op: "open segment", Path: dataPath(w.dir, base), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(idx, &st); err == nil {
		w.slots = int(st.Size/indexPage) * slotsPerPage
	}
	w.data, w.idx, w.base, w.size, w.slot = data, idx, base, x.size, x.next
	w.recorded = false
	lost := w.pos // while no segment was open
	w.pos = x.tail + lost
	if lost > 0 {
		w.noteGap(w.pos)
	}
	if x.next == 0 && x.size > 0 {
		return w.repair(x)
	}
	return nil
}

// repair writes down what is assumed about data that no record speaks of.
func (w *Writer) repair(x index) error {
	err := w.allocate(2)
	if err == nil {
		err = w.write(x.recs[0])
	}
	if err != nil {
		_ = w.Close()
		return err
	}
	w.slot++
	return nil
}
