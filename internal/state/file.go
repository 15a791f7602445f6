package state

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	"berth/internal/errdefs"
)

// maxFile bounds what ReadFile reads, in bytes.
const maxFile = 64 << 20

// WriteFile stores v as JSON at path: afterwards the file holds all of it, and when the process
// is killed on the way, all of what it held before. It is not fsynced: after a power cut it may
// be torn, which ReadFile tells. version is of v's shape. Calls for the same path must not overlap.
// A full disk is errdefs.ErrExhausted.
func WriteFile(path string, version int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return errdefs.New(errdefs.ErrInvalid, "state file %s: %w", path, err)
	}
	content := fmt.Appendf(nil, fileHeader, version, len(body), crc32.Checksum(body, crcTable()))
	content = append(append(content, body...), '\n')
	// A fixed name, so that a killed writer leaves at most one; the next write takes it over.
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp")
	if err = os.WriteFile(tmp, content, 0o600); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return diskError("write state file "+path, err)
	}
	return nil
}

// fileHeader is the first line: the version of the content, its length and its crc32c.
const fileHeader = "berth-state v%d %d %08x\n"

// ReadFile reads what WriteFile stored into v. The error is of kind errdefs.ErrNotFound when
// there is no file, ErrDataLoss when it is torn or damaged, and ErrUnsupported when it was
// written in another version than the given one.
func ReadFile(path string, version int, v any) error {
	content, err := readBounded(path)
	if err != nil {
		return err
	}
	header, body, found := bytes.Cut(content, []byte("\n"))
	var got, length int
	var crc uint32
	n, err := fmt.Sscanf(string(header)+"\n", fileHeader, &got, &length, &crc)
	body = bytes.TrimSuffix(body, []byte("\n"))
	switch {
	case !found || err != nil || n != 3:
		return errdefs.New(errdefs.ErrDataLoss, "state file %s: its first line is damaged", path)
	case length != len(body) || crc32.Checksum(body, crcTable()) != crc:
		return errdefs.New(errdefs.ErrDataLoss, "state file %s: it is torn or damaged", path)
	case got != version:
		return errdefs.New(errdefs.ErrUnsupported, "state file %s: it has version %d, this berth reads version %d", path, got, version)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return errdefs.New(errdefs.ErrDataLoss, "state file %s: %w", path, err)
	}
	return nil
}

func readBounded(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err == nil && fi.Size() > maxFile {
		return nil, errdefs.New(errdefs.ErrDataLoss, "state file %s: %d bytes are more than any state file has", path, fi.Size())
	}
	var content []byte
	if err == nil {
		content, err = os.ReadFile(path)
	}
	if os.IsNotExist(err) {
		return nil, errdefs.New(errdefs.ErrNotFound, "state file %s: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("read state file: %w", err)
	}
	return content, nil
}
