package state

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"berth/internal/errdefs"
)

// The journal's format. Header: 16 bytes of text with the version. Then records: length of the
// rest after these eight bytes (4, little endian), its crc32c (4), operation (1), length of the
// kind (1), of the key (2), kind, key, value (JSON).
const (
	headerSize     = 16
	journalVersion = 1
	frameSize      = 8
	prefixSize     = 4
	maxRecord      = prefixSize + maxKind + maxKey + maxValue

	opPut    = 1
	opDelete = 2
)

func journalHeader() []byte { return fmt.Appendf(nil, headerFormat, journalVersion) }

const headerFormat = "berth-jrnl %04d\n"

func encodeRecord(op byte, kind, key string, value []byte) []byte {
	n := prefixSize + len(kind) + len(key) + len(value)
	b := make([]byte, frameSize+prefixSize, frameSize+n)
	b[8], b[9] = op, byte(len(kind))
	binary.LittleEndian.PutUint16(b[10:], uint16(len(key)))
	b = append(append(append(b, kind...), key...), value...)
	binary.LittleEndian.PutUint32(b, uint32(n))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[frameSize:], crcTable()))
	return b
}

// decodeRecord takes a whole record apart; value points into it.
func decodeRecord(b []byte) (op byte, kind, key string, value []byte, ok bool) {
	if len(b) < frameSize+prefixSize || int(binary.LittleEndian.Uint32(b)) != len(b)-frameSize ||
		binary.LittleEndian.Uint32(b[4:]) != crc32.Checksum(b[frameSize:], crcTable()) {
		return 0, "", "", nil, false
	}
	op = b[8]
	nKind, nKey := int(b[9]), int(binary.LittleEndian.Uint16(b[10:]))
	rest := b[frameSize+prefixSize:]
	if op != opPut && op != opDelete || nKind == 0 || nKey > maxKey || nKind+nKey > len(rest) {
		return 0, "", "", nil, false
	}
	return op, string(rest[:nKind]), string(rest[nKind : nKind+nKey]), rest[nKind+nKey:], true
}

// replay reads f into the index and returns the end of its sound part and its size. An end of 0
// means that the file is new or holds not even a whole header.
func (j *Journal) replay(f *os.File) (end, size int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	size = fi.Size()
	r := bufio.NewReaderSize(io.NewSectionReader(f, 0, size), 64<<10)
	header := make([]byte, headerSize)
	switch n, err := io.ReadFull(r, header); {
	case err == io.EOF:
		return 0, 0, nil
	case err == io.ErrUnexpectedEOF && string(header[:n]) == string(journalHeader()[:n]):
		return 0, size, nil
	case err != nil && err != io.ErrUnexpectedEOF:
		return 0, 0, fmt.Errorf("read journal: %w", err)
	}
	if string(header) != string(journalHeader()) {
		var version int
		if _, err := fmt.Sscanf(string(header), headerFormat, &version); err == nil {
			return 0, 0, errdefs.New(errdefs.ErrUnsupported, "journal %s: it has format version %d, this berth reads version %d", j.path, version, journalVersion)
		}
		return 0, 0, errdefs.New(errdefs.ErrDataLoss, "journal %s: this is no journal; move it away to begin anew", j.path)
	}
	end = headerSize
	var rec []byte
	for {
		if rec, err = readRecord(r, rec, size-end); err != nil {
			if errors.Is(err, io.EOF) {
				return end, size, nil
			}
			return 0, 0, fmt.Errorf("read journal: %w", err)
		}
		op, kind, key, _, ok := decodeRecord(rec)
		if !ok {
			return end, size, nil
		}
		j.apply(op, kind, key, location{end, int64(len(rec))})
		end += int64(len(rec))
	}
}

// readRecord reads the bytes of one record into buf; io.EOF when no whole one is left.
func readRecord(r io.Reader, buf []byte, left int64) ([]byte, error) {
	var frame [frameSize]byte
	if left < frameSize {
		return buf, io.EOF
	}
	if _, err := io.ReadFull(r, frame[:]); err != nil {
		return buf, err
	}
	n := int64(binary.LittleEndian.Uint32(frame[:]))
	if n < prefixSize || n > maxRecord || n > left-frameSize {
		return buf, io.EOF
	}
	if int64(cap(buf)) < frameSize+n {
		buf = make([]byte, frameSize+n)
	}
	buf = buf[:frameSize+n]
	copy(buf, frame[:])
	_, err := io.ReadFull(r, buf[frameSize:])
	return buf, err
}
