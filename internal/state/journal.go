package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// Bounds of a journal.
const (
	syncAfter  = 500 * time.Millisecond // a write is fsynced at most this and the fsync's own time later
	maxKind    = 255                    // bytes
	maxKey     = 4096                   // bytes
	maxValue   = 16 << 20               // bytes of JSON
	minGarbage = 1 << 20                // bytes before a compaction is worth it
	maxGarbage = 4                      // times the live bytes
	maxTorn    = 3                      // copies of torn tails
)

// Journal is the node's database: JSON values by kind and key. Writes are appended to one file
// and are there for whoever opens it next as soon as Put returns, also when this process is
// killed; they survive a power cut once Run has fsynced them, within a second. What a power cut
// leaves is a prefix of the writes. One process at a time; safe for concurrent use in it.
type Journal struct {
	path string
	lock *os.File

	mu      sync.RWMutex
	file    *os.File // nil once closed; replaced only under compact as well
	size    int64    // where the next record goes
	live    int64    // bytes of records that count
	index   map[string]map[string]location
	dirSync bool // the directory entry is not yet durable

	dirty   chan struct{} // holds a token while something is not fsynced
	compact sync.Mutex    // one fsync or compaction at a time; taken before mu
}

// location is where a record lies in the file.
type location struct {
	offset int64
	length int64 // of the whole record
}

// OpenJournal opens or makes the journal at path. What does not check out at its end (a write
// that a power cut tore) is moved to a file PATH.torn-TIME, of which three are kept. Errors:
// errdefs.ErrConflict when another process has it open, ErrUnsupported for another format
// version, ErrDataLoss when the file is no journal at all.
func OpenJournal(path string) (*Journal, error) {
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, err
	}
	j := &Journal{path: path, lock: lock, index: map[string]map[string]location{}, dirty: make(chan struct{}, 1)}
	if err := j.open(); err != nil {
		if j.file != nil {
			_ = j.file.Close()
		}
		_ = lock.Close()
		return nil, err
	}
	return j, nil
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, diskError("open "+path, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 20)
		n, _ := f.ReadAt(holder, 0)
		_ = f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, errdefs.New(errdefs.ErrConflict, "journal %s: process %s has it open; stop that one first", path, holder[:n])
		}
		return nil, &os.PathError{Op: "flock", Path: path, Err: err}
	}
	// Only for the message above, so its errors do not matter.
	_ = f.Truncate(0)
	_, _ = f.WriteAt(fmt.Append(nil, os.Getpid()), 0)
	return f, nil
}

func (j *Journal) open() error {
	f, err := os.OpenFile(j.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return diskError("open journal "+j.path, err)
	}
	j.file = f
	// A compaction that was cut short leaves its unfinished file.
	_ = os.Remove(j.path + ".new")
	end, size, err := j.replay(f)
	if err != nil {
		return err
	}
	if end < size {
		j.keepTorn(f, end, size)
		if err := f.Truncate(end); err != nil {
			return diskError("journal "+j.path+": cut its torn end", err)
		}
		j.markDirty()
	}
	if end == 0 {
		if _, err := f.WriteAt(journalHeader(), 0); err != nil {
			_ = f.Truncate(0)
			return diskError("begin journal "+j.path, err)
		}
		end = headerSize
		j.dirSync = true
		j.markDirty()
	}
	j.size = end
	return nil
}

// keepTorn saves what replay refused. It is for a person to look at: when it cannot be saved
// (the disk may be full, which is how ends get torn) opening the journal matters more.
func (j *Journal) keepTorn(f *os.File, from, to int64) {
	name := j.path + ".torn-" + time.Now().UTC().Format("20060102T150405.000000000")
	dst, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = copyRange(dst, 0, f, from, to)
		err = errors.Join(err, dst.Close())
	}
	if err != nil {
		slog.Warn("the torn end of the journal could not be kept", "journal", j.path, "bytes", to-from, "err", err)
		_ = os.Remove(name)
	} else {
		slog.Warn("the journal had a torn end", "journal", j.path, "bytes", to-from, "kept", name)
	}
	old, _ := filepath.Glob(globQuote(j.path) + ".torn-*")
	slices.Sort(old)
	for len(old) > maxTorn {
		_ = os.Remove(old[0])
		old = old[1:]
	}
}

func globQuote(s string) string {
	var b []byte
	for i := range len(s) {
		switch s[i] {
		case '*', '?', '[', '\\':
			b = append(b, '\\')
		}
		b = append(b, s[i])
	}
	return string(b)
}

// Put stores v as JSON under kind and key. When the disk is full the error is
// errdefs.ErrExhausted and the old value stays.
func (j *Journal) Put(kind, key string, v any) error {
	value, err := json.Marshal(v)
	if err != nil {
		return errdefs.New(errdefs.ErrInvalid, "journal: %s %q: %w", kind, key, err)
	}
	if kind == "" || len(kind) > maxKind || len(key) > maxKey || len(value) > maxValue {
		return errdefs.New(errdefs.ErrInvalid, "journal: %s %.64q with %d bytes: kind, key or value is empty or beyond its bound", kind, key, len(value))
	}
	rec := encodeRecord(opPut, kind, key, value)
	j.mu.Lock()
	defer j.mu.Unlock()
	at, err := j.append(rec)
	if err != nil {
		return err
	}
	j.apply(opPut, kind, key, location{at, int64(len(rec))})
	return nil
}

// Delete removes kind and key; what is not there is no error.
func (j *Journal) Delete(kind, key string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, found := j.index[kind][key]; !found && j.file != nil {
		return nil
	}
	rec := encodeRecord(opDelete, kind, key, nil)
	at, err := j.append(rec)
	if err != nil {
		return err
	}
	j.apply(opDelete, kind, key, location{at, int64(len(rec))})
	return nil
}

// append writes one record at the end. When it cannot be written whole the end stays where it was.
func (j *Journal) append(rec []byte) (at int64, err error) {
	if j.file == nil {
		return 0, errdefs.New(errdefs.ErrUnavailable, "journal %s: it is closed", j.path)
	}
	if _, err := j.file.WriteAt(rec, j.size); err != nil {
		// The next record begins at the same place in any case; this only frees the space.
		_ = j.file.Truncate(j.size)
		return 0, diskError("journal "+j.path, err)
	}
	at = j.size
	j.size += int64(len(rec))
	j.markDirty()
	return at, nil
}

// apply is the effect of a record on the index.
func (j *Journal) apply(op byte, kind, key string, at location) {
	keys := j.index[kind]
	if old, found := keys[key]; found {
		j.live -= old.length
		delete(keys, key)
	}
	if op == opDelete {
		return
	}
	if keys == nil {
		keys = map[string]location{}
		j.index[kind] = keys
	}
	keys[key] = at
	j.live += at.length
}

// Get reads the value of kind and key into v. errdefs.ErrNotFound when there is none.
func (j *Journal) Get(kind, key string, v any) error {
	raw, err := j.read(kind, key)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return errdefs.New(errdefs.ErrDataLoss, "journal: %s %q: %w", kind, key, err)
	}
	return nil
}

func (j *Journal) read(kind, key string) (json.RawMessage, error) {
	j.mu.RLock()
	defer j.mu.RUnlock()
	if j.file == nil {
		return nil, errdefs.New(errdefs.ErrUnavailable, "journal %s: it is closed", j.path)
	}
	at, found := j.index[kind][key]
	if !found {
		return nil, errdefs.New(errdefs.ErrNotFound, "journal: no %s %q", kind, key)
	}
	rec := make([]byte, at.length)
	if _, err := j.file.ReadAt(rec, at.offset); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	_, _, _, value, ok := decodeRecord(rec)
	if !ok {
		return nil, errdefs.New(errdefs.ErrDataLoss, "journal %s: the record of %s %q is damaged", j.path, kind, key)
	}
	return value, nil
}

// Each calls f for the entries of a kind, by ascending key, and returns its first error. f may
// use the journal; entries that are deleted meanwhile are left out, new ones too.
func (j *Journal) Each(kind string, f func(key string, raw json.RawMessage) error) error {
	j.mu.RLock()
	keys := slices.Sorted(maps.Keys(j.index[kind]))
	j.mu.RUnlock()
	for _, key := range keys {
		raw, err := j.read(kind, key)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue
		}
		if err == nil {
			err = f(key, raw)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (j *Journal) markDirty() {
	select {
	case j.dirty <- struct{}{}:
	default:
	}
}

// Run fsyncs what was written, in batches, and compacts the file, until ctx is done. A failed
// fsync or compaction is logged and tried again at the next write: the journal stays usable.
func (j *Journal) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-j.dirty:
		}
		select {
		case <-ctx.Done():
		case <-time.After(syncAfter):
		}
		err := j.Sync()
		if err == nil && j.wasteful() {
			err = j.Compact()
		}
		if err != nil {
			slog.Error("the journal could not be made durable", "journal", j.path, "err", err)
		}
	}
}

// Sync makes all writes up to now survive a power cut.
func (j *Journal) Sync() error {
	j.compact.Lock()
	defer j.compact.Unlock()
	return j.sync()
}

// sync is Sync with the compact lock held.
func (j *Journal) sync() error {
	select { // writes from here on put a new token there
	case <-j.dirty:
	default:
	}
	j.mu.Lock()
	f, dir := j.file, j.dirSync
	j.dirSync = false
	j.mu.Unlock()
	if f == nil {
		return nil
	}
	err := f.Sync()
	if dir {
		err = errors.Join(err, syncDir(filepath.Dir(j.path)))
	}
	if err != nil && dir {
		j.mu.Lock()
		j.dirSync = true
		j.mu.Unlock()
	}
	return err
}

// Close fsyncs and closes the journal.
func (j *Journal) Close() error {
	j.compact.Lock()
	defer j.compact.Unlock()
	err := j.sync()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.file == nil {
		return nil
	}
	err = errors.Join(err, j.file.Close(), j.lock.Close())
	j.file = nil
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// diskError gives err the kind ErrExhausted when it says that the disk is full.
func diskError(what string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return errdefs.New(errdefs.ErrExhausted, "%s: the disk is full: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func crcTable() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }
