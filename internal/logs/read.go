package logs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Options choose entries.
type Options struct {
	Stdout, Stderr bool
	Since, Until   time.Time // both inclusive; zero: no bound
	Tail           int       // only the last so many of those chosen; negative: all
	Follow         bool      // Renderer.Read only: wait for more while the Renderer is live
}

func (o Options) match(e Entry) bool {
	return (e.Stream == Stdout && o.Stdout || e.Stream == Stderr && o.Stderr) &&
		(o.Since.IsZero() || !e.Time.Before(o.Since)) && (o.Until.IsZero() || !e.Time.After(o.Until))
}

// source is one rendered file, opened, so that its bytes stay when it is renamed or deleted.
type source struct {
	gen   uint64
	file  *os.File // nil: not there yet
	off   int64    // read up to here
	limit int64    // whole entries up to about here
}

func closeAll(sources []*source) {
	for _, s := range sources {
		if s.file != nil {
			_ = s.file.Close() // read only
		}
	}
}

// openSource opens a file up to limit (negative: its size). It is nil when there is no such file.
func openSource(path string, gen uint64, limit int64) (*source, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, gone(err)
	}
	fi, err := f.Stat()
	if err == nil {
		if limit < 0 || limit > fi.Size() {
			limit = fi.Size()
		}
		limit, err = lastNewline(f, limit)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &source{gen: gen, file: f, limit: limit}, nil
}

// Read calls fn for the entries in the rendered files, oldest first. It is for logs that no
// Renderer is writing; otherwise use Renderer.Read, which no rotation can confuse. Follow is
// ignored. An Entry's Line is valid until fn returns; fn's error ends the reading and is
// returned. A log without files is empty.
func Read(ctx context.Context, cfg Config, o Options, fn func(Entry) error) error {
	cfg, err := cfg.normal()
	if err != nil || cfg.Driver == DriverNone {
		return err
	}
	var sources []*source
	defer func() { closeAll(sources) }()
	for i := cfg.MaxFiles - 1; i >= 0; i-- {
		s, err := openSource(cfg.file(i), 0, -1)
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if s != nil {
			sources = append(sources, s)
		}
	}
	return readHistory(ctx, cfg.Driver, sources, o, fn)
}

// readHistory reads sources up to their limits.
func readHistory(ctx context.Context, driver string, sources []*source, o Options, fn func(Entry) error) error {
	if o.Tail >= 0 {
		if err := seekTail(ctx, driver, sources, o); err != nil {
			return err
		}
	}
	for _, s := range sources {
		if err := s.read(ctx, driver, o, fn); err != nil {
			return err
		}
	}
	return nil
}

// seekTail moves the sources' offsets to where the last o.Tail matching entries begin.
func seekTail(ctx context.Context, driver string, sources []*source, o Options) error {
	left := o.Tail
	for i := len(sources) - 1; i >= 0; i-- {
		s := sources[i]
		if s.file == nil {
			continue
		}
		s.off = s.limit
		if left == 0 {
			continue
		}
		off, err := lastLines(ctx, s.file, s.limit, func(b []byte) bool {
			if e, ok := parseEntry(b, driver); ok && o.match(e) {
				left--
			}
			return left > 0
		})
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		s.off = off
	}
	return nil
}

// lastLines calls more for the lines before end, last first, until it says no, and returns the
// offset of the last line it was called for.
func lastLines(ctx context.Context, f io.ReaderAt, end int64, more func([]byte) bool) (int64, error) {
	const block = 64 << 10
	var window []byte // the bytes from start on that are not yet looked at
	for start := end; ; {
		i := bytes.LastIndexByte(window[:max(len(window)-1, 0)], '\n') + 1
		if i == 0 && start > 0 {
			if len(window) > maxLine {
				window = nil // no entry of ours
			}
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			n := min(start, block)
			wider := make([]byte, int(n)+len(window))
			if _, err := f.ReadAt(wider[:n], start-n); err != nil {
				return 0, err
			}
			copy(wider[n:], window)
			window, start = wider, start-n
			continue
		}
		if len(window) == 0 || !more(window[i:]) {
			return start + int64(i), nil
		}
		window = window[:i]
		if len(window) == 0 && start == 0 {
			return 0, nil
		}
	}
}

// read calls fn for the matching entries between off and limit and moves off behind them. What
// is not an entry is passed over; a last line without its newline is left for later.
func (s *source) read(ctx context.Context, driver string, o Options, fn func(Entry) error) error {
	if s.file == nil || s.off >= s.limit {
		return nil
	}
	in := bufio.NewReaderSize(io.NewSectionReader(s.file, s.off, s.limit-s.off), int(min(maxRead, s.limit-s.off)))
	var long []byte
	for count := 0; ; count++ {
		if count%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		b, n, err := readLine(in, &long)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		s.off += n
		if e, ok := parseEntry(b, driver); ok && o.match(e) {
			if err := fn(e); err != nil {
				return err
			}
		}
	}
}

// readLine returns the next line with its newline, and its length; a line beyond maxLine comes
// out empty. io.EOF: no whole line is left.
func readLine(in *bufio.Reader, long *[]byte) (b []byte, n int64, err error) {
	b, err = in.ReadSlice('\n')
	n = int64(len(b))
	if !errors.Is(err, bufio.ErrBufferFull) {
		return b, n, err
	}
	*long = append((*long)[:0], b...)
	for errors.Is(err, bufio.ErrBufferFull) {
		b, err = in.ReadSlice('\n')
		n += int64(len(b))
		if len(*long) <= maxLine {
			*long = append(*long, b...)
		}
	}
	if n > maxLine {
		*long = (*long)[:0]
	}
	return *long, n, err
}

// SetLive says whether more output may come: true when a process was started, false when the
// last has ended, was finished (Finish), and none follows. Followers of a log that is not live
// return when they have read everything.
func (r *Renderer) SetLive(live bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live = live
	r.wake()
}

// wake makes followers look again. r.mu is held.
func (r *Renderer) wake() {
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// Read calls fn for the log's entries, oldest first, and with o.Follow goes on with those that
// are rendered later, none left out and none twice, until the log is not live any more (nil),
// o.Until has passed (nil), ctx is done (its error), or fn fails (its error). fn may be slow:
// nothing is queued for it, and the Renderer does not wait; only when files are deleted by
// rotation before they are reached, their entries are passed over.
func (r *Renderer) Read(ctx context.Context, o Options, fn func(Entry) error) error {
	sources, err := r.sources()
	defer func() { closeAll(sources) }()
	if err != nil {
		return fmt.Errorf("read log %s: %w", r.cfg.Path, err)
	}
	if err := readHistory(ctx, r.cfg.Driver, sources, o, fn); err != nil || !o.Follow {
		return err
	}
	if !o.Until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, o.Until, errUntil)
		defer cancel()
	}
	last := len(sources) - 1
	err = r.follow(ctx, &sources[last], o, fn)
	if err != nil && errors.Is(err, ctx.Err()) && errors.Is(context.Cause(ctx), errUntil) {
		return nil
	}
	return err
}

var errUntil = errors.New("the time until which to follow has passed")

// sources opens all files; the last is the current one, whose file is nil when nothing is there.
func (r *Renderer) sources() ([]*source, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var sources []*source
	for i := len(r.now.Old); i > 0; i-- {
		s, err := openSource(r.cfg.file(r.place(i)), r.now.Old[i-1], -1)
		if err != nil {
			return sources, err
		}
		if s != nil {
			sources = append(sources, s)
		}
	}
	s, err := r.current()
	if err != nil {
		return sources, err
	}
	return append(sources, s), nil
}

// place is the number of the file that holds Old[i-1]: one more while a rotation that could not
// be completed has moved it already.
func (r *Renderer) place(i int) int {
	if r.now.Shift > 0 && i >= r.now.Shift {
		return i + 1
	}
	return i
}

// current opens the current file; r.mu is held.
func (r *Renderer) current() (*source, error) {
	missing := &source{gen: r.now.Gen}
	if r.written() == 0 {
		return missing, nil
	}
	path := r.cfg.Path
	if r.cfg.Driver == DriverCRI {
		path = r.renamed()
	}
	s, err := openSource(path, r.now.Gen, r.written())
	if s == nil && err == nil {
		s = missing
	}
	return s, err
}

// follow reads on from *s, replacing it at each rotation.
func (r *Renderer) follow(ctx context.Context, s **source, o Options, fn func(Entry) error) error {
	for {
		wait, done, err := r.refresh(s)
		if err != nil {
			return fmt.Errorf("follow log %s: %w", r.cfg.Path, err)
		}
		if done {
			return nil
		}
		if wait == nil {
			if err := (*s).read(ctx, r.cfg.Driver, o, fn); err != nil {
				return err
			}
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-wait:
		}
	}
}

// refresh looks how far *s can now be read. When there is nothing new it returns a channel to
// wait for, or done when nothing will come.
func (r *Renderer) refresh(s **source) (wait <-chan struct{}, done bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cur := *s
	if cur.gen != r.now.Gen {
		return nil, false, r.leave(s)
	}
	if limit := r.written(); limit != cur.limit {
		if cur.file == nil {
			opened, err := r.current()
			if err != nil {
				return nil, false, err
			}
			*s = opened
			if opened.file != nil {
				return nil, false, nil
			}
		} else {
			cur.limit = limit
			return nil, false, nil
		}
	}
	if !r.live {
		return nil, true, nil
	}
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return r.changed, false, nil
}

// leave reads *s, which is complete, to its end, and then goes over to the file after it.
func (r *Renderer) leave(s **source) error {
	cur := *s
	if cur.file != nil {
		fi, err := cur.file.Stat()
		if err != nil {
			return err
		}
		if fi.Size() > cur.limit {
			cur.limit = fi.Size()
			return nil
		}
	}
	next, err := r.after(cur.gen)
	if err != nil {
		return err
	}
	closeAll([]*source{cur})
	*s = next
	return nil
}

// after opens the oldest file that is newer than gen.
func (r *Renderer) after(gen uint64) (*source, error) {
	for i := len(r.now.Old); i > 0; i-- {
		if r.now.Old[i-1] > gen {
			s, err := openSource(r.cfg.file(r.place(i)), r.now.Old[i-1], -1)
			if s != nil || err != nil {
				return s, err
			}
		}
	}
	return r.current()
}
