// Package spool keeps the output of a process on its way from its FIFOs to its log.
//
// A spool is a directory of segments, each a data file and an index file named after the
// position of its first byte. A position counts every byte the process ever wrote, dropped
// ones included, and never restarts. A Writer (in berth-runner) moves bytes from a pipe to the
// data file with splice(2); a Reader (in berthd) follows it from another process and deletes
// what it is done with.
//
// Why nothing is lost or doubled when the writer is killed: a splice either moved a byte from
// the pipe to the file or left it in the pipe, and the file's size is the only truth about how
// far it came. Before each splice an index record says which stream the bytes from the present
// end of the file on belong to. A record whose splice moved nothing is overwritten by the next.
// So bytes below the file's size always have a final record, and a reader that takes the size
// first and the records afterwards sees only final ones.
//
// The package does not render, split lines or fsync: a spool survives the death of every
// process, not a power cut. When the disk is full the oldest segment goes; when that is not enough, output is
// thrown away: a process never waits for a disk. Both show as a gap between positions. At its
// limit a spool takes nothing more until its reader has trimmed it: the process waits.
//
// A Writer and a Reader are each for one goroutine at a time; any number of Readers and at most
// one Writer (it takes a lock) may use a directory at once. Functions are safe for concurrent use.
package spool

import (
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The streams of a process. A terminal's output is Stdout.
const (
	Stdout uint8 = 1
	Stderr uint8 = 2
)

// Bounds.
const (
	DefaultLimit = 32 << 20 // bytes in a spool when no limit is given

	maxSegment    = 4 << 20  // bytes of data in a segment
	minSegment    = 64 << 10 // the least for very small limits
	maxRecords    = 16384    // index records in a segment
	maxPerCall    = 1 << 20  // bytes moved by one SpliceFrom
	recordSize    = 32
	indexPage     = 4096 // the index grows by this; a record never crosses a page
	slotsPerPage  = indexPage / recordSize
	recordMagic   = 0xb7
	maxIndexBytes = maxRecords * recordSize
)

// streamGap marks an index record that only says where the position has come to.
const streamGap uint8 = 0

// record is one entry of an index: from offset of the data file on, bytes belong to stream,
// were moved at nanos, and the first of them has position pos. A pos beyond the end of the
// record before means that what lies between was dropped.
type record struct {
	stream uint8
	offset int64
	pos    uint64
	nanos  int64
}

// layout: crc32c of the rest (4), magic (1), stream (1), zero (2), offset (8), pos (8), nanos (8).
func (r record) encode() (b [recordSize]byte) {
	b[4] = recordMagic
	b[5] = r.stream
	binary.LittleEndian.PutUint64(b[8:], uint64(r.offset))
	binary.LittleEndian.PutUint64(b[16:], r.pos)
	binary.LittleEndian.PutUint64(b[24:], uint64(r.nanos))
	binary.LittleEndian.PutUint32(b[0:], crc32.Checksum(b[4:], crc32.MakeTable(crc32.Castagnoli)))
	return b
}

func decode(b []byte) (r record, ok bool) {
	if b[4] != recordMagic || b[5] > Stderr ||
		binary.LittleEndian.Uint32(b) != crc32.Checksum(b[4:recordSize], crc32.MakeTable(crc32.Castagnoli)) {
		return record{}, false
	}
	r = record{
		stream: b[5],
		offset: int64(binary.LittleEndian.Uint64(b[8:])),
		pos:    binary.LittleEndian.Uint64(b[16:]),
		nanos:  int64(binary.LittleEndian.Uint64(b[24:])),
	}
	return r, r.offset >= 0
}

// index is what the records of a segment say about its first size bytes.
type index struct {
	base uint64
	recs []record // final: offset < size; ascending in offset and pos
	next int      // slot after the last final record
	size int64
	tail uint64 // position of the next byte, never less than end()
}

// end is the position after the last stored byte.
func (x *index) end() uint64 {
	if len(x.recs) == 0 {
		return x.base
	}
	last := x.recs[len(x.recs)-1]
	return last.pos + uint64(x.size-last.offset)
}

// extend takes the raw slots from x.next on, read after the data file was seen to have size
// bytes. Records that do not check out are skipped: their bytes count to the record before.
func (x *index) extend(raw []byte, size int64, fallback time.Time) {
	x.size = size
	x.tail = 0
	first := x.next
	for i := 0; (i+1)*recordSize <= len(raw); i++ {
		r, ok := decode(raw[i*recordSize:])
		if !ok || r.offset > size || r.pos < x.least(r.offset) {
			continue
		}
		if r.offset == size {
			x.tail = r.pos
			continue
		}
		if len(x.recs) == 0 && r.offset > 0 || len(x.recs) > 0 && r.offset == x.recs[len(x.recs)-1].offset {
			if len(x.recs) > 0 {
				continue
			}
			x.recs = append(x.recs, record{stream: Stdout, pos: x.base, nanos: r.nanos})
		}
		x.recs = append(x.recs, r)
		x.next = first + i + 1
	}
	if len(x.recs) == 0 && size > 0 {
		x.recs = append(x.recs, record{stream: Stdout, pos: x.base, nanos: fallback.UnixNano()})
	}
	x.tail = max(x.tail, x.end())
}

// least is the lowest position that a further record at offset may have.
func (x *index) least(offset int64) uint64 {
	if len(x.recs) == 0 {
		return x.base + uint64(offset)
	}
	last := x.recs[len(x.recs)-1]
	if offset < last.offset {
		return ^uint64(0)
	}
	return last.pos + uint64(offset-last.offset)
}

func dataPath(dir string, base uint64) string { return filepath.Join(dir, name(base)+".data") }
func idxPath(dir string, base uint64) string  { return filepath.Join(dir, name(base)+".idx") }

func name(base uint64) string {
	const digits = "0000000000000000"
	s := strconv.FormatUint(base, 16)
	return digits[len(s):] + s
}

// list returns the base positions of the segments in ascending order, and of index files
// without data. A directory that does not exist is empty.
func list(dir string) (bases, orphans []uint64, err error) {
	f, err := os.Open(dir)
	if os.IsNotExist(err) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range names {
		stem, isData := strings.CutSuffix(n, ".data")
		isIdx := false
		if !isData {
			stem, isIdx = strings.CutSuffix(n, ".idx")
		}
		base, err := strconv.ParseUint(stem, 16, 64)
		if err != nil || len(stem) != 16 || !isData && !isIdx {
			continue
		}
		if isData {
			bases = append(bases, base)
		} else {
			orphans = append(orphans, base)
		}
	}
	slices.Sort(bases)
	orphans = slices.DeleteFunc(orphans, func(b uint64) bool {
		_, found := slices.BinarySearch(bases, b)
		return found
	})
	return bases, orphans, nil
}

// remove deletes a segment; the data file first, because it is what makes a segment.
func remove(dir string, base uint64) error {
	err := os.Remove(dataPath(dir, base))
	if os.IsNotExist(err) {
		err = nil
	}
	if e := os.Remove(idxPath(dir, base)); err == nil && !os.IsNotExist(e) {
		err = e
	}
	return err
}

// Trim deletes the segments that lie wholly below pos. The newest always stays: it is the
// writer's, and it remembers the position. Safe beside a Writer in another process.
func Trim(dir string, pos uint64) error {
	bases, _, err := list(dir)
	if err != nil {
		return err
	}
	for i := 0; i+1 < len(bases) && bases[i+1] <= pos; i++ {
		if err := remove(dir, bases[i]); err != nil {
			return err
		}
	}
	return nil
}
