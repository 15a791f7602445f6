package logs

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// ask lets a test stop the renderer before a change to a file.
func (r *Renderer) ask(op string, b []byte) (int, error) {
	if r.hook == nil {
		return len(b), nil
	}
	return r.hook(op, b)
}

// writeAt writes b to f, or what the hook lets through of it.
func (r *Renderer) writeAt(op string, f *os.File, b []byte, at int64) (int, error) {
	allowed, hookErr := r.ask(op, b)
	n, err := f.WriteAt(b[:allowed], at)
	return n, errors.Join(err, hookErr)
}

// commit writes everything rendered and then puts down next, which must be now or a clone of it.
func (r *Renderer) commit(next progress) error {
	for {
		if err := r.flush(); err != nil {
			return err
		}
		// What flush found out about the file, or did on a full disk, holds for next too.
		next.Gen, next.Size, next.Inode, next.Old = r.now.Gen, r.now.Size, r.now.Inode, r.now.Old
		next.Lost, next.LostAt, next.LostNanos = r.now.Lost, r.now.LostAt, r.now.LostNanos
		err := r.put(next)
		if err == nil || !isFull(err) {
			return err
		}
		if freed, freeErr := r.free(); freeErr != nil || !freed {
			return errors.Join(err, freeErr)
		}
	}
}

// put makes next the checkpoint and the present. Nothing may be in out.
func (r *Renderer) put(next progress) error {
	if err := r.save(next); err != nil {
		return err
	}
	r.now = next
	return nil
}

// save writes a checkpoint.
func (r *Renderer) save(p progress) error {
	if err := r.check.open(); err != nil {
		return full("open the checkpoint", err)
	}
	b, at, err := r.check.encode(p)
	if err != nil {
		return err
	}
	if _, err := r.writeAt("checkpoint", r.check.file, b, at); err != nil {
		return full("write the checkpoint", err)
	}
	r.check.seq++
	r.saved = p.clone()
	return nil
}

// full gives an error its kind when it says that the disk is full.
func full(what string, err error) error {
	if isFull(err) {
		return errdefs.New(errdefs.ErrExhausted, "%s: the disk is full: %w", what, err)
	}
	return err
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// flush writes out to the current file. On a full disk older files go first.
func (r *Renderer) flush() error {
	if len(r.out) > 0 && r.check.seq == 0 {
		// Before the first byte: without a checkpoint a later renderer would take it for
		// somebody else's.
		if err := r.save(r.saved); err != nil {
			return err
		}
	}
	for len(r.out) > 0 {
		err := r.openFile()
		if err == nil {
			var n int
			n, err = r.writeAt("write", r.file, r.out, r.written())
			r.out = append(r.out[:0], r.out[n:]...)
		}
		if err == nil {
			continue
		}
		if !isFull(err) {
			return err
		}
		freed, freeErr := r.free()
		if freeErr != nil {
			return errors.Join(full("write", err), freeErr)
		}
		if !freed {
			return full("write", err)
		}
	}
	return nil
}

// free gives up the oldest rendered file. The checkpoint learns of it first, on top of what it
// says so far: what is in out is not written yet.
func (r *Renderer) free() (bool, error) {
	if r.now.Shift > 0 || r.now.Discard {
		return false, nil // moving files: that comes first
	}
	oldest := len(r.now.Old)
	if oldest == 0 && r.written() < minDiscard {
		return false, nil
	}
	lost := r.written()
	if oldest > 0 {
		lost = 0
		if fi, err := os.Stat(r.cfg.file(oldest)); err == nil {
			lost = fi.Size()
		}
	}
	give := func(p progress) progress {
		p = p.clone()
		p.Lost += lost
		p.LostAt, p.LostNanos = r.now.Pos, time.Now().UnixNano()
		if oldest > 0 {
			p.Old = p.Old[:oldest-1]
			return p
		}
		p.Gen++
		p.Size, p.Inode, p.Discard = 0, 0, true
		return p
	}
	if err := r.save(give(r.saved)); err != nil {
		return false, err
	}
	r.now = give(r.now)
	if oldest > 0 {
		if _, err := r.ask("remove", nil); err != nil {
			return false, err
		}
		return true, gone(os.Remove(r.cfg.file(oldest)))
	}
	r.now.Size = int64(len(r.out))
	return true, r.discard()
}

// gone takes "not found" for success.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// discard deletes the file at Path, as the checkpoint says already.
func (r *Renderer) discard() error {
	r.closeFile()
	if _, err := r.ask("remove", nil); err != nil {
		return err
	}
	if err := gone(os.Remove(r.cfg.Path)); err != nil {
		return err
	}
	next := r.saved.clone()
	next.Discard = false
	if err := r.save(next); err != nil {
		return err
	}
	r.now.Discard = false
	return nil
}

// rotate makes the current file Path.1 and begins a new one.
func (r *Renderer) rotate() error {
	if err := r.flush(); err != nil {
		return err
	}
	if r.now.Size == 0 {
		return nil // making room began a new file already
	}
	if err := r.openFile(); err != nil {
		return err
	}
	// A full disk may have left a piece of an entry behind the end.
	if fi, err := r.file.Stat(); err == nil && fi.Size() > r.now.Size {
		if _, err := r.ask("truncate", nil); err != nil {
			return err
		}
		if err := r.file.Truncate(r.now.Size); err != nil {
			return err
		}
	}
	next := r.now.clone()
	if r.cfg.MaxFiles > 1 {
		next.Shift = min(len(next.Old)+1, r.cfg.MaxFiles-1)
	} else {
		next.Gen++
		next.Size, next.Inode, next.Discard = 0, 0, true
	}
	if err := r.put(next); err != nil {
		return err
	}
	return r.finishMoves()
}

// finishMoves does what the checkpoint says is to be done with the files. Each step can be done
// again: the source of a move comes back only after the checkpoint is beyond it.
func (r *Renderer) finishMoves() error {
	if r.now.Discard {
		return r.discard()
	}
	for r.now.Shift > 0 {
		r.closeFile()
		to := r.now.Shift
		if _, err := r.ask("rename", nil); err != nil {
			return err
		}
		if err := gone(os.Rename(r.cfg.file(to-1), r.cfg.file(to))); err != nil {
			return err
		}
		next := r.now.clone()
		next.Shift--
		if next.Shift == 0 {
			next.Old = slices.Insert(next.Old, 0, next.Gen)
			next.Old = next.Old[:min(len(next.Old), r.cfg.MaxFiles-1)]
			next.Gen++
			next.Size, next.Inode = 0, 0
		}
		if err := r.put(next); err != nil {
			return err
		}
	}
	return nil
}

// Reopen begins a new file at Path, after somebody (the kubelet) has renamed the old one.
func (r *Renderer) Reopen() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cfg.Driver == DriverNone {
		return errdefs.New(errdefs.ErrUnsupported, "reopen log: a container with log driver %q has no file", r.cfg.Driver)
	}
	if r.closed {
		return errdefs.New(errdefs.ErrUnavailable, "log %s: its renderer is closed", r.cfg.Path)
	}
	if err := r.finishMoves(); err != nil {
		return err
	}
	if err := r.flush(); err != nil {
		return err
	}
	var st unix.Stat_t
	if unix.Stat(r.cfg.Path, &st) == nil && st.Ino == r.now.Inode {
		return nil // nobody renamed it
	}
	next := r.now.clone()
	next.Gen++
	next.Size, next.Inode = 0, 0
	if err := r.put(next); err != nil {
		return err
	}
	r.closeFile()
	defer r.wake()
	return r.openFile()
}

func (r *Renderer) closeFile() {
	if r.file != nil {
		_ = r.file.Close() // written through the page cache: nothing is left to fail
		r.file = nil
	}
}

// openFile opens the current file if it is not, and finds its end.
func (r *Renderer) openFile() error {
	if r.file != nil {
		return nil
	}
	path := r.cfg.Path
	if r.cfg.Driver == DriverCRI && r.now.Inode != 0 {
		path = r.renamed()
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		_ = f.Close()
		return os.NewSyscallError("fstat", err)
	}
	if st.Size < r.written() || r.now.Inode != 0 && r.now.Inode != st.Ino {
		// Somebody cut or replaced it, or a power cut did.
		end, err := lastNewline(f, st.Size)
		if err == nil {
			err = f.Truncate(end)
		}
		if err != nil {
			_ = f.Close()
			return err
		}
		r.now.Size = end + int64(len(r.out))
	}
	r.now.Inode = st.Ino
	r.file = f
	return nil
}

// renamed finds the file that was current when the last renderer died: the kubelet may have
// renamed it and not yet called Reopen. What belongs there must not go to a new file.
func (r *Renderer) renamed() string {
	dir := filepath.Dir(r.cfg.Path)
	var st unix.Stat_t
	if unix.Stat(r.cfg.Path, &st) == nil && st.Ino == r.now.Inode {
		return r.cfg.Path
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return r.cfg.Path
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.Type().IsRegular() && unix.Lstat(path, &st) == nil && st.Ino == r.now.Inode {
			return path
		}
	}
	return r.cfg.Path
}

// lastNewline returns the offset after the last newline of the first size bytes.
func lastNewline(f *os.File, size int64) (int64, error) {
	buf := make([]byte, 4096)
	for size > 0 {
		n := min(size, int64(len(buf)))
		if _, err := f.ReadAt(buf[:n], size-n); err != nil {
			return 0, err
		}
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			return size - n + int64(i) + 1, nil
		}
		size -= n
	}
	return 0, nil
}
