package spool

import (
	"errors"
	"io"
	"os"
	"sort"
	"time"

	"golang.org/x/sys/unix"
)

// Chunk is a piece of output, or a gap where output was dropped.
type Chunk struct {
	Stream  uint8     // Stdout or Stderr; 0 for a gap
	Time    time.Time // when the bytes were taken from the pipe
	Pos     uint64    // of the first byte
	Data    []byte    // in the caller's buffer
	Dropped uint64    // bytes missing from Pos on; Data is then empty
}

// End is the position after the chunk.
func (c Chunk) End() uint64 { return c.Pos + uint64(len(c.Data)) + c.Dropped }

// Reader reads a spool while it grows. It holds at most two open files, of the segment it is in.
type Reader struct {
	dir   string
	ended bool

	open      bool
	data, idx int
	x         index
}

// OpenReader returns a reader of the spool in dir. Nothing is opened yet, and dir need not
// exist: a process that wrote nothing has no spool.
func OpenReader(dir string) *Reader { return &Reader{dir: dir} }

// Close closes the open files, if any. The reader can go on to be used and opens them again.
func (r *Reader) Close() error {
	if !r.open {
		return nil
	}
	r.open = false
	r.x = index{}
	return errors.Join(unix.Close(r.data), unix.Close(r.idx))
}

// SetEnded says whether the writer has finished, for now: a gap at the very end is then final
// and returned too. Before that it may still grow.
func (r *Reader) SetEnded(ended bool) { r.ended = ended }

// End is the position after the last byte of the spool, dropped ones included: where output
// goes on. 0 when there was none yet.
func (r *Reader) End() (uint64, error) {
	for {
		bases, _, err := list(r.dir)
		if err != nil || len(bases) == 0 {
			return 0, err
		}
		if newest := bases[len(bases)-1]; !r.open || r.x.base != newest {
			err := r.enter(newest)
			if os.IsNotExist(err) {
				continue // no longer the newest, and deleted
			}
			if err != nil {
				return 0, err
			}
		}
		if err := r.x.load(r.data, r.idx); err != nil {
			return 0, err
		}
		return r.x.tail, nil
	}
}

// Next returns the chunk that begins at pos, with at most len(buf) bytes in buf, which must not
// be empty. Go on at its End. io.EOF means that there is no more for now. Chunks are cut at
// other places when read again; the stream and time of each byte stay the same.
func (r *Reader) Next(pos uint64, buf []byte) (Chunk, error) {
	if r.open && pos < r.x.base {
		_ = r.Close()
	}
	for {
		if !r.open {
			switch err := r.seek(pos); {
			case os.IsNotExist(err):
				continue // deleted between list and open
			case err != nil:
				return Chunk{}, err
			}
		}
		if pos < r.x.base {
			return Chunk{Pos: pos, Dropped: r.x.base - pos}, nil
		}
		if c, ok, err := r.chunk(pos, buf); ok || err != nil {
			return c, err
		}
		next, found, err := r.following()
		if err != nil {
			return Chunk{}, err
		}
		// Load after looking for a next segment: once there is one, this one is complete.
		if err := r.x.load(r.data, r.idx); err != nil {
			return Chunk{}, err
		}
		if c, ok, err := r.chunk(pos, buf); ok || err != nil {
			return c, err
		}
		if !found {
			if r.ended && r.x.tail > pos {
				return Chunk{Pos: pos, Dropped: r.x.tail - pos}, nil
			}
			return Chunk{}, io.EOF
		}
		if err := r.enter(next); err != nil && !os.IsNotExist(err) {
			return Chunk{}, err
		}
	}
}

// chunk looks at what is known of the open segment; ok is false when pos is at its end.
func (r *Reader) chunk(pos uint64, buf []byte) (c Chunk, ok bool, err error) {
	recs := r.x.recs
	i := sort.Search(len(recs), func(i int) bool { return recs[i].pos > pos }) - 1
	if i < 0 {
		if len(recs) == 0 {
			return Chunk{}, false, nil
		}
		return Chunk{Pos: pos, Dropped: recs[0].pos - pos}, true, nil
	}
	rec, end := recs[i], r.x.size
	if i+1 < len(recs) {
		end = recs[i+1].offset
	}
	at := rec.offset + int64(pos-rec.pos)
	if at >= end || at < rec.offset {
		if i+1 < len(recs) {
			return Chunk{Pos: pos, Dropped: recs[i+1].pos - pos}, true, nil
		}
		return Chunk{}, false, nil
	}
	stream := rec.stream
	if stream == streamGap {
		stream = Stdout // its own record is lost
	}
	n, err := pread(r.data, buf[:min(int64(len(buf)), end-at)], at)
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return Chunk{}, false, &os.PathError{Op: "read", Path: dataPath(r.dir, r.x.base), Err: err}
	}
	return Chunk{Stream: stream, Time: time.Unix(0, rec.nanos), Pos: pos, Data: buf[:n]}, true, nil
}

// seek opens the segment that holds pos, or else the first one after it.
func (r *Reader) seek(pos uint64) error {
	bases, _, err := list(r.dir)
	if err != nil {
		return err
	}
	if len(bases) == 0 {
		return io.EOF
	}
	i := sort.Search(len(bases), func(i int) bool { return bases[i] > pos })
	return r.enter(bases[max(i-1, 0)])
}

// following finds the segment after the open one.
func (r *Reader) following() (base uint64, found bool, err error) {
	bases, _, err := list(r.dir)
	if err != nil {
		return 0, false, err
	}
	i := sort.Search(len(bases), func(i int) bool { return bases[i] > r.x.base })
	if i == len(bases) {
		return 0, false, nil
	}
	return bases[i], true, nil
}

// enter opens the segment at base in place of the present one. When the segment is gone the
// reader is closed and the error satisfies os.IsNotExist.
func (r *Reader) enter(base uint64) error {
	_ = r.Close()
	data, err := unix.Open(dataPath(r.dir, base), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dataPath(r.dir, base), Err: err}
	}
	idx, err := unix.Open(idxPath(r.dir, base), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err == unix.ENOENT {
		// Either the segment is being deleted, or its index is lost and the data speaks alone.
		if _, gone := os.Lstat(dataPath(r.dir, base)); gone == nil {
			idx, err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
	}
	if err != nil {
		_ = unix.Close(data)
		return &os.PathError{Op: "open", Path: idxPath(r.dir, base), Err: err}
	}
	r.data, r.idx, r.open = data, idx, true
	r.x = index{base: base}
	if err := r.x.load(data, idx); err != nil {
		_ = r.Close()
		return err
	}
	return nil
}

// load brings x up to date with the files: the size first, then the records (see the package
// comment).
func (x *index) load(data, idx int) error {
	var st unix.Stat_t
	if err := unix.Fstat(data, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	raw := make([]byte, 0, indexPage)
	for from := int64(x.next) * recordSize; len(raw) < maxIndexBytes; {
		if len(raw) == cap(raw) {
			raw = append(raw, 0)[:len(raw)]
		}
		n, err := pread(idx, raw[len(raw):cap(raw)], from+int64(len(raw)))
		if err != nil {
			return os.NewSyscallError("read index", err)
		}
		if n == 0 {
			break
		}
		raw = raw[:len(raw)+n]
	}
	x.extend(raw, st.Size, time.Unix(st.Mtim.Unix()))
	return nil
}

func pread(fd int, b []byte, at int64) (int, error) {
	for {
		n, err := unix.Pread(fd, b, at)
		if err != unix.EINTR {
			return n, err
		}
	}
}
