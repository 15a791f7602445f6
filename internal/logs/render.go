package logs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"berth/internal/errdefs"
	"berth/internal/spool"
)

// Renderer renders one spool. It is cheap while idle: no goroutine, and after CloseIdle no
// open file and no buffer. All methods are safe for concurrent use.
type Renderer struct {
	cfg Config

	mu        sync.Mutex
	reader    *spool.Reader
	check     checkpoint
	now       progress // what is rendered; ahead of saved by what is in out or written since
	saved     progress // what the checkpoint says
	out       []byte   // rendered, counted in now.Size, not yet written
	file      *os.File // the current file; nil while closed
	buf       []byte
	delivered uint64 // OnChunk saw everything below
	trimmed   uint64
	live      bool
	closed    bool
	changed   chan struct{} // closed when followers should look; nil when none waits

	// hook is for tests that kill the renderer between and within its writes: it is asked
	// before each change to a file, and when it fails only n bytes of b are written.
	hook func(op string, b []byte) (n int, err error)
}

// Open returns the renderer of a spool, continuing where the last one came to, however it ended.
// There must be only one at a time. The spool need not exist yet; it must not be deleted while
// the Renderer is open.
func Open(cfg Config) (*Renderer, error) {
	cfg, err := cfg.normal()
	if err != nil {
		return nil, err
	}
	r := &Renderer{cfg: cfg, reader: spool.OpenReader(cfg.SpoolDir), check: checkpoint{path: cfg.CheckpointPath}}
	p, found, err := r.check.load()
	if errors.Is(err, errNoCheckpoint) {
		// Better to render again what is left in the spool than to lose it.
		slog.Warn("a log goes on without its checkpoint", "checkpoint", cfg.CheckpointPath, "err", err)
	} else if err != nil {
		return nil, err
	}
	if !found {
		p = r.discover()
	}
	end, err := r.reader.End()
	_ = r.reader.Close()
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", cfg.SpoolDir, err)
	}
	if p.Pos > end { // a power cut took back output that was rendered
		p.Pos, p.Gap, p.LostAt = end, 0, min(p.LostAt, end)
	}
	r.now, r.saved = p, p.clone()
	r.delivered = p.Pos
	return r, r.settle()
}

// discover makes up a checkpoint from the files that are there: normally none.
func (r *Renderer) discover() (p progress) {
	if r.cfg.Driver == DriverNone {
		return p
	}
	for i := 1; i < r.cfg.MaxFiles; i++ {
		if _, err := os.Stat(r.cfg.file(i)); err != nil {
			break
		}
		p.Old = append(p.Old, 0)
	}
	p.Gen = uint64(len(p.Old))
	for i := range p.Old {
		p.Old[i] = p.Gen - 1 - uint64(i)
	}
	f, err := os.Open(r.cfg.Path)
	if err != nil {
		return p
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil {
		if p.Size, err = lastNewline(f, fi.Size()); err != nil {
			p.Size = fi.Size()
		}
	}
	return p
}

// settle completes what the previous renderer was in the middle of, and removes files beyond
// the bound.
func (r *Renderer) settle() error {
	if err := r.finishMoves(); err != nil {
		return err
	}
	if r.cfg.Driver == DriverNone {
		return nil
	}
	if over := len(r.now.Old) - (r.cfg.MaxFiles - 1); over > 0 {
		next := r.now.clone()
		next.Old = next.Old[:r.cfg.MaxFiles-1]
		if err := r.put(next); err != nil {
			return err
		}
	}
	for i := len(r.now.Old) + 1; ; i++ {
		if err := os.Remove(r.cfg.file(i)); err != nil {
			return nil
		}
	}
}

// Advance renders what the spool holds now. more is true when it stopped at its bound, to let
// others have a turn; call it again. An error of kind errdefs.ErrExhausted means a full
// disk: output waits in the spool, as far as that has room; call again later. After any error
// the Renderer can be used on.
func (r *Renderer) Advance() (more bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.advance()
}

func (r *Renderer) advance() (more bool, err error) {
	if r.closed {
		return false, errdefs.New(errdefs.ErrUnavailable, "log %s: its renderer is closed", r.cfg.Path)
	}
	before, gen := r.written(), r.now.Gen
	more, err = r.render()
	if err == nil && r.unsaved() {
		err = r.commit(r.now)
	}
	if err != nil {
		// Attached clients need not wait for a disk.
		err = errors.Join(err, r.deliver())
	}
	if err == nil && (r.now.Pos-r.trimmed >= trimEvery) {
		r.trimmed = r.now.Pos
		err = spool.Trim(r.cfg.SpoolDir, r.floor())
	}
	if r.written() != before || r.now.Gen != gen {
		r.wake()
	}
	if err != nil {
		return more, fmt.Errorf("log %s: %w", r.cfg.Path, err)
	}
	return more, nil
}

// floor is the position below which nobody needs the spool any more.
func (r *Renderer) floor() uint64 {
	if r.cfg.Floor == nil {
		return r.saved.Pos
	}
	return min(r.saved.Pos, r.cfg.Floor())
}

// unsaved tells whether something was rendered since the checkpoint.
func (r *Renderer) unsaved() bool {
	return r.now.Pos != r.saved.Pos || r.now.Size != r.saved.Size || r.now.Gap != r.saved.Gap || r.now.Lost != r.saved.Lost
}

// written is the size of the current file as far as it is written.
func (r *Renderer) written() int64 { return r.now.Size - int64(len(r.out)) }

// render takes chunks from the spool until there are no more or the bound is reached.
func (r *Renderer) render() (more bool, err error) {
	if err := r.finishMoves(); err != nil {
		return true, err
	}
	if err := r.flush(); err != nil {
		return true, err
	}
	for begin := r.now.Pos; ; {
		if err := r.notices(); err != nil {
			return true, err
		}
		if r.now.Pos-begin >= maxAdvance {
			return true, nil
		}
		c, err := r.next(r.now.Pos)
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return true, err
		}
		if c.Dropped > 0 {
			next := r.now.clone()
			next.Gap, next.GapNanos = c.End(), time.Now().UnixNano()
			if err := r.commit(next); err != nil {
				return true, err
			}
			continue
		}
		r.hand(c)
		if err := r.chunk(c); err != nil {
			return true, err
		}
	}
}

// next reads a chunk, but not beyond a place where something is to be said.
func (r *Renderer) next(pos uint64) (spool.Chunk, error) {
	if r.buf == nil {
		r.buf = make([]byte, minRead)
	}
	buf := r.buf
	if at := r.now.LostAt; r.now.Lost > 0 && at > pos && at-pos < uint64(len(buf)) {
		buf = buf[:at-pos]
	}
	c, err := r.reader.Next(pos, buf)
	if at := r.now.LostAt; err == nil && r.now.Lost > 0 && pos < at && at < c.End() && c.Dropped > 0 {
		c.Dropped = at - pos
	}
	if err == nil && len(c.Data) == len(r.buf) && len(r.buf) < maxRead {
		// Only for the next read: the chunk is in the old buffer.
		r.buf = make([]byte, min(4*len(r.buf), maxRead))
	}
	return c, err
}

// hand gives OnChunk what it has not seen of c.
func (r *Renderer) hand(c spool.Chunk) {
	if c.End() <= r.delivered {
		return
	}
	p := c.Data
	if r.delivered > c.Pos {
		p = p[r.delivered-c.Pos:]
	}
	r.delivered = c.End()
	if r.cfg.OnChunk != nil && len(p) > 0 {
		r.cfg.OnChunk(streamName(streamIndex(c)), c.Time, p)
	}
}

// deliver hands out chunks without rendering them.
func (r *Renderer) deliver() error {
	for r.cfg.OnChunk != nil {
		c, err := r.next(max(r.delivered, r.now.Pos))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		r.hand(c)
	}
	return nil
}

func streamName(i int) string {
	if i == 1 {
		return Stderr
	}
	return Stdout
}

func streamIndex(c spool.Chunk) int {
	if c.Stream == spool.Stderr {
		return 1
	}
	return 0
}

// chunk renders a chunk line by line. When it fails now.Pos says how far it came.
func (r *Renderer) chunk(c spool.Chunk) error {
	i := streamIndex(c)
	for data := c.Data; len(data) > 0; {
		l := &r.now.Lines[i]
		if len(l.Pending) == 0 && !l.Begun {
			l.Nanos = c.Time.UnixNano()
		}
		room := maxPiece - len(l.Pending)
		n := bytes.IndexByte(data[:min(room, len(data))], '\n') + 1
		whole := n > 0
		if !whole {
			n = min(room, len(data))
		}
		if !whole && n < room { // unfinished
			if r.cfg.Driver != DriverNone {
				l.Pending = append(l.Pending, data[:n]...)
			}
			r.now.Pos += uint64(n)
			return nil
		}
		text := data[:n]
		if len(l.Pending) > 0 {
			text = append(l.Pending[:len(l.Pending):len(l.Pending)], text...)
		}
		if err := r.emit(Entry{Time: time.Unix(0, l.Nanos), Stream: streamName(i), Line: text, Partial: !whole}); err != nil {
			return err
		}
		l.Pending, l.Begun = nil, !whole
		r.now.Pos += uint64(n)
		data = data[n:]
	}
	return nil
}

// notices says what is to be said at this position.
func (r *Renderer) notices() error {
	if p := &r.now; p.Lost > 0 && p.Pos >= p.LostAt {
		text := fmt.Sprintf("berth: %d bytes of the oldest log were dropped: the disk was full\n", p.Lost)
		if err := r.emit(Entry{Time: time.Unix(0, p.LostNanos), Stream: Stderr, Line: []byte(text)}); err != nil {
			return err
		}
		p.Lost, p.LostAt, p.LostNanos = 0, 0, 0
	}
	if p := &r.now; p.Gap > p.Pos {
		if err := r.flushLines(true); err != nil { // what follows is not their rest
			return err
		}
		text := fmt.Sprintf("berth: %d bytes of output were dropped here: the disk was full or the limit was reached\n", p.Gap-p.Pos)
		if err := r.emit(Entry{Time: time.Unix(0, p.GapNanos), Stream: Stderr, Line: []byte(text)}); err != nil {
			return err
		}
		p.Pos, p.Gap, p.GapNanos = p.Gap, 0, 0
		r.delivered = max(r.delivered, p.Pos)
	}
	return nil
}

// flushLines renders unfinished lines; cut ends them with a newline of ours.
func (r *Renderer) flushLines(cut bool) error {
	for i := range r.now.Lines {
		l := &r.now.Lines[i]
		if len(l.Pending) > 0 {
			e := Entry{Time: time.Unix(0, l.Nanos), Stream: streamName(i), Line: l.Pending, Partial: true}
			// The CRI format has no way to say that a line ends without a newline.
			if cut || r.cfg.Driver == DriverCRI {
				e.Line, e.Partial = append(bytes.Clone(l.Pending), '\n'), false
			}
			if err := r.emit(e); err != nil {
				return err
			}
		}
		*l = line{}
	}
	return nil
}

// emit renders an entry, in a new file when it would make the current one too big. When it
// fails nothing of the entry is rendered.
func (r *Renderer) emit(e Entry) error {
	if r.cfg.Driver == DriverNone {
		return nil
	}
	if len(r.out) >= maxOut {
		if err := r.flush(); err != nil {
			return err
		}
	}
	n := len(r.out)
	r.out = appendEntry(r.out, r.cfg.Driver, e)
	size := int64(len(r.out) - n)
	if r.cfg.MaxBytes > 0 && r.now.Size > 0 && r.now.Size+size > r.cfg.MaxBytes {
		entry := bytes.Clone(r.out[n:])
		r.out = r.out[:n]
		if err := r.rotate(); err != nil {
			return err
		}
		r.out = append(r.out, entry...)
	}
	r.now.Size += size
	return nil
}

// Finish renders the rest after a process ended: what is still in the spool, and lines without
// a newline. The spool's writer must have finished. A later process may go on with the same
// spool and Renderer.
func (r *Renderer) Finish() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reader.SetEnded(true)
	defer r.reader.SetEnded(false)
	for {
		more, err := r.advance()
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	if r.now.Pos == 0 {
		return nil // it never wrote anything
	}
	before, gen := r.written(), r.now.Gen
	err := r.flushLines(false)
	if err == nil {
		err = r.commit(r.now)
	}
	if err == nil {
		err = spool.Trim(r.cfg.SpoolDir, r.floor())
	}
	if r.written() != before || r.now.Gen != gen {
		r.wake()
	}
	if err != nil {
		return fmt.Errorf("log %s: %w", r.cfg.Path, err)
	}
	return nil
}

// CloseIdle closes files and frees buffers until they are needed again. Call it when there was
// no output for a while.
func (r *Renderer) CloseIdle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closeIdle()
}

func (r *Renderer) closeIdle() {
	_ = r.reader.Close() // read only
	r.check.close()
	r.closeFile()
	r.buf = nil
	if len(r.out) == 0 {
		r.out = nil
	}
}

// Close ends the Renderer and its followers. Everything rendered is in the files and the
// checkpoint already.
func (r *Renderer) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed, r.live = true, false
	r.closeIdle()
	r.wake()
}
