package logs

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// progress is all that a Renderer must know to go on. It is a value; change a clone.
type progress struct {
	Pos   uint64  // everything below this position of the spool is rendered, or in Lines
	Lines [2]line // of stdout and stderr

	Gen   uint64   // of the current file; counts rotations
	Size  int64    // of the current file
	Inode uint64   // of the current file; 0 while it is not known
	Old   []uint64 `json:",omitempty"` // generations of Path.1, Path.2, …

	// Shift is not 0 while a rotation is under way: the file before Path.Shift is to be moved
	// there next, then the one before that.
	Shift int `json:",omitempty"`
	// Discard says that the file at Path is to be deleted before anything is written.
	Discard bool `json:",omitempty"`

	// From Pos to Gap the spool lost output, which was noticed at GapNanos.
	Gap      uint64 `json:",omitempty"`
	GapNanos int64  `json:",omitempty"`

	// Lost bytes of rendered files were deleted for want of room; to be said at position LostAt.
	Lost      int64  `json:",omitempty"`
	LostAt    uint64 `json:",omitempty"`
	LostNanos int64  `json:",omitempty"`
}

// line is an unfinished line.
type line struct {
	Nanos   int64  // when its first byte came
	Pending []byte `json:",omitempty"` // not yet rendered, less than maxPiece
	Begun   bool   `json:",omitempty"` // pieces of it are rendered already
}

func (p progress) clone() progress {
	p.Old = slices.Clone(p.Old)
	for i := range p.Lines {
		p.Lines[i].Pending = slices.Clone(p.Lines[i].Pending)
	}
	return p
}

// A checkpoint file has two slots that are written in turn, so that one is whole when the process
// is killed, or the power fails, while the other is written. A slot: crc32c of the rest (4),
// length of the JSON (4), sequence number (8), JSON.
const (
	slotSize     = 64 << 10 // two lines of maxPiece in base64 and then some
	slotHeader   = 16
	slotReserved = 4 << 10 // allocated from the start: enough when no long line is pending
)

// checkpoint is an open checkpoint file.
type checkpoint struct {
	path string
	file *os.File // nil while closed
	seq  uint64
}

// load reads the newest whole slot. found is false when there is no checkpoint; an error of
// errNoCheckpoint when there is one but it is damaged.
func (c *checkpoint) load() (p progress, found bool, err error) {
	content, err := os.ReadFile(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return progress{}, false, nil
	}
	if err != nil {
		return progress{}, false, fmt.Errorf("log checkpoint: %w", err)
	}
	for at := 0; at+slotHeader <= len(content); at += slotSize {
		slot := content[at:]
		n := int(binary.LittleEndian.Uint32(slot[4:]))
		seq := binary.LittleEndian.Uint64(slot[8:])
		if n > len(slot)-slotHeader || n > slotSize-slotHeader || seq <= c.seq ||
			crc32.Checksum(slot[4:slotHeader+n], crcTable()) != binary.LittleEndian.Uint32(slot) {
			continue
		}
		var read progress
		if json.Unmarshal(slot[slotHeader:slotHeader+n], &read) == nil {
			p, found, c.seq = read, true, seq
		}
	}
	if !found && len(content) > 0 && slices.ContainsFunc(content, func(b byte) bool { return b != 0 }) {
		return progress{}, false, errNoCheckpoint
	}
	return p, found, nil
}

var errNoCheckpoint = errors.New("the log checkpoint is damaged")

// encode returns the bytes of the next slot and where they go.
func (c *checkpoint) encode(p progress) (b []byte, at int64, err error) {
	body, err := json.Marshal(p)
	if err != nil {
		return nil, 0, err
	}
	b = make([]byte, slotHeader, slotHeader+len(body))
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(body)))
	binary.LittleEndian.PutUint64(b[8:], c.seq+1)
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:], crcTable()))
	return b, int64((c.seq+1)%2) * slotSize, nil
}

func (c *checkpoint) open() error {
	if c.file != nil {
		return nil
	}
	f, err := os.OpenFile(c.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if c.seq == 0 { // new: so that a full disk does not keep us from saying so
		for _, at := range []int64{0, slotSize} {
			if err := unix.Fallocate(int(f.Fd()), 0, at, slotReserved); err != nil && err != unix.EOPNOTSUPP {
				_ = f.Close()
				return &os.PathError{Op: "fallocate", Path: c.path, Err: err}
			}
		}
	}
	c.file = f
	return nil
}

func (c *checkpoint) close() {
	if c.file != nil {
		_ = c.file.Close() // nothing is buffered
		c.file = nil
	}
}

func crcTable() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }
