package state

import (
	"bufio"
	"cmp"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
)

// wasteful tells whether a compaction is worth it.
func (j *Journal) wasteful() bool {
	j.mu.RLock()
	defer j.mu.RUnlock()
	garbage := j.size - headerSize - j.live
	return j.file != nil && garbage > minGarbage && garbage > maxGarbage*j.live
}

// entry is a live record at the time a compaction began.
type entry struct {
	kind, key string
	at        location
}

// Compact rewrites the file without what was overwritten or deleted. Run does it when needed.
// Writers are held up only while the records that came in meanwhile are copied. When it fails
// the journal goes on with the old file.
func (j *Journal) Compact() error {
	j.compact.Lock()
	defer j.compact.Unlock()
	entries, seen := j.snapshot()
	if entries == nil && seen == 0 {
		return nil // closed
	}
	next, err := os.OpenFile(j.path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return diskError("compact journal "+j.path, err)
	}
	moved, end, err := j.copyLive(next, entries)
	if err == nil {
		err = next.Sync()
	}
	if err == nil {
		err = j.swap(next, entries, moved, seen, end)
	}
	if err != nil {
		_ = next.Close()
		_ = os.Remove(next.Name())
		return diskError("compact journal "+j.path, err)
	}
	return syncDir(filepath.Dir(j.path))
}

// snapshot returns the live records in file order and the end of the file.
func (j *Journal) snapshot() (entries []entry, end int64) {
	j.mu.RLock()
	defer j.mu.RUnlock()
	if j.file == nil {
		return nil, 0
	}
	for kind, keys := range j.index {
		for key, at := range keys {
			entries = append(entries, entry{kind, key, at})
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.at.offset, b.at.offset) })
	return entries, j.size
}

// copyLive writes the entries to next and returns their new places and the end. It needs no
// lock: the file below the snapshot's end does not change, and only Compact replaces it.
func (j *Journal) copyLive(next *os.File, entries []entry) (moved []location, end int64, err error) {
	w := bufio.NewWriterSize(next, 256<<10)
	if _, err := w.Write(journalHeader()); err != nil {
		return nil, 0, err
	}
	end = headerSize
	for _, e := range entries {
		if _, err := io.Copy(w, io.NewSectionReader(j.file, e.at.offset, e.at.length)); err != nil {
			return nil, 0, err
		}
		moved = append(moved, location{end, e.at.length})
		end += e.at.length
	}
	return moved, end, w.Flush()
}

// swap copies what was appended since seen, and puts next in the journal's place. These last
// records are no less durable than before: nothing was fsynced since the snapshot.
func (j *Journal) swap(next *os.File, entries []entry, moved []location, seen, end int64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := copyRange(next, end, j.file, seen, j.size); err != nil {
		return err
	}
	if err := os.Rename(next.Name(), j.path); err != nil {
		return err
	}
	for i, e := range entries {
		if keys := j.index[e.kind]; keys[e.key] == e.at {
			keys[e.key] = moved[i]
		}
	}
	shift := end - seen
	for _, keys := range j.index {
		for key, at := range keys {
			if at.offset >= seen {
				keys[key] = location{at.offset + shift, at.length}
			}
		}
	}
	old := j.file
	j.file = next
	if j.size > seen {
		j.markDirty()
	}
	j.size += shift
	_ = old.Close() // only read from by now
	return nil
}

func copyRange(dst *os.File, at int64, src *os.File, from, to int64) error {
	n, err := io.Copy(io.NewOffsetWriter(dst, at), io.NewSectionReader(src, from, to-from))
	if err == nil && n != to-from {
		err = errors.New("the source is shorter than expected")
	}
	return err
}
