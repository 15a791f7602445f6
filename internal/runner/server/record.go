package server

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"berth/internal/errdefs"
	"berth/internal/runner"
)

// record is what the runner must know of a process after its own death. It is replaced as a
// whole, and not fsynced: processes do not outlive a power cut either.
type record struct {
	Version   int    // of this format
	Boot      string // ID of the boot that the pid belongs to
	ID        string
	Container string // equals ID for a container's first process
	Nonce     string // makes holder keys and FIFOs of this process differ from a later one's of the same ID
	Group     string // control group of the container
	PID       int    `json:",omitempty"` // 0: it was never completely made
	StartTime uint64 `json:",omitempty"`

	Terminal    bool   `json:",omitempty"`
	Stdin       bool   `json:",omitempty"`
	StdinClosed bool   `json:",omitempty"`
	Spool       string `json:",omitempty"`
	SpoolBytes  int64  `json:",omitempty"`

	Paused   bool         `json:",omitempty"` // asked for; the freezer knows whether it came to it
	OOMKills uint64       `json:",omitempty"` // of the group before the process started
	Exit     *runner.Exit `json:",omitempty"` // it has ended, and its output is in the spool
}

const (
	recordVersion = 1
	recordSuffix  = ".json"
	maxID         = 128 // bytes
)

func (r record) first() bool { return r.ID == r.Container }

// checkID takes what can be a file name and a name to libcontainer.
func checkID(id string) error {
	good := id != "" && len(id) <= maxID && id[0] != '.'
	for _, c := range []byte(id) {
		good = good && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_+-.", c) >= 0)
	}
	if !good {
		return errdefs.New(errdefs.ErrInvalid, "%q is not an ID: letters, digits and _ + - . are, at most %d", id, maxID)
	}
	return nil
}

func (s *Server) recordPath(id string) string { return filepath.Join(s.recordsDir(), id+recordSuffix) }

func (s *Server) save(r record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := s.recordPath(r.ID)
	temp := filepath.Join(s.recordsDir(), "."+r.ID+".tmp")
	if err := os.WriteFile(temp, raw, 0o600); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return os.Rename(temp, path)
}

// update changes the record of a process, in memory and on disk. When the disk refuses, the
// change holds in memory.
func (s *Server) update(p *proc, change func(*record)) (record, error) {
	p.saving.Lock()
	defer p.saving.Unlock()
	s.mu.Lock()
	change(&p.record)
	r := p.record
	s.mu.Unlock()
	return r, s.save(r)
}

func (s *Server) forgetRecord(id string) error {
	err := os.Remove(s.recordPath(id))
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// loadRecords reads all records; one that cannot be read is reported and left alone.
func (s *Server) loadRecords() ([]record, error) {
	entries, err := os.ReadDir(s.recordsDir())
	if err != nil {
		return nil, err
	}
	var out []record
	for _, e := range entries {
		path := filepath.Join(s.recordsDir(), e.Name())
		id, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			_ = os.Remove(path) // a write that was cut short; the record before it holds
			continue
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var r record
		if err := json.Unmarshal(raw, &r); err != nil || r.ID != id || r.Version != recordVersion {
			s.log.Error("record of a process is not understood; left alone", "path", path, "version", r.Version, "err", err)
			continue
		}
		out = append(out, r)
	}
	return out, nil
}
