// Package volume keeps named volumes: directories of the node that outlive containers.
//
// It owns the directories and their records. Who mounts a volume, and whether one may be
// removed, is its callers' to know. All methods of Store are safe for concurrent use.
package volume

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"berth/internal/errdefs"
)

// DriverLocal is the only driver: a directory on the node's disk, or what its options mount there.
const DriverLocal = "local"

const (
	kind         = "volume"
	dataName     = "_data"     // what containers mount
	fillName     = "_data.new" // where the image's files are copied to first
	removedName  = ".removed-" // begins the names of directories whose removal was begun
	maxNameBytes = 240         // leaves room for removedName
)

// Records keeps volumes' records; package state's Journal is one.
type Records interface {
	Put(kind, key string, v any) error
	Delete(kind, key string) error
	Each(kind string, f func(key string, raw json.RawMessage) error) error
}

// Config asks for a volume.
type Config struct {
	Name      string            // "": a generated one of 64 hexadecimal digits, and the volume is anonymous
	Driver    string            // "" is local
	Options   map[string]string // of the local driver: type, o, device
	Labels    map[string]string
	Anonymous bool
}

// Volume is a volume as it is.
type Volume struct {
	Config
	Path    string `json:"-"` // the directory that containers mount
	Created time.Time
	// Populated tells that a container has had it: the image's files were copied then, or it
	// was not empty.
	Populated bool
}

// Store keeps the volumes of one instance.
type Store struct {
	dir     string
	records Records

	mu      sync.Mutex
	volumes map[string]*Volume
	filling map[string]*sync.Mutex // one copy at a time per volume
}

// Open loads the records and finishes what a killed process left half-done: removals and
// copies. A directory with data but without a record, which a power cut can leave, becomes a
// volume: nobody's data is thrown away for the loss of a record.
func Open(dir string, records Records) (*Store, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	s := &Store{dir: dir, records: records, volumes: map[string]*Volume{}, filling: map[string]*sync.Mutex{}}
	err := records.Each(kind, func(name string, raw json.RawMessage) error {
		v := &Volume{}
		if err := json.Unmarshal(raw, v); err != nil {
			return fmt.Errorf("record of volume %s: %w", name, err)
		}
		v.Path = s.path(name)
		s.volumes[name] = v
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, s.repair()
}

func (s *Store) repair() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := s.sweep(e); err != nil {
			return err
		}
	}
	for name := range s.volumes {
		if err := os.RemoveAll(filepath.Join(s.dir, name, fillName)); err != nil {
			return err
		}
		if err := os.MkdirAll(s.path(name), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// sweep deals with what is found in the directory at the start.
func (s *Store) sweep(e fs.DirEntry) error {
	name := e.Name()
	if strings.HasPrefix(name, removedName) {
		return removeTree(filepath.Join(s.dir, name))
	}
	if s.volumes[name] != nil || !e.IsDir() || CheckName(name) != nil {
		return nil
	}
	if empty, err := isEmpty(s.path(name)); empty || errors.Is(err, fs.ErrNotExist) {
		return removeTree(filepath.Join(s.dir, name))
	} else if err != nil {
		return err
	}
	info, err := e.Info()
	if err != nil {
		return err
	}
	v := &Volume{Config: Config{Name: name, Driver: DriverLocal, Anonymous: anonymousRE.MatchString(name)}, Path: s.path(name), Created: info.ModTime(), Populated: true}
	s.volumes[name] = v
	return s.records.Put(kind, name, v)
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name, dataName) }

var (
	nameRE      = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)
	anonymousRE = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// CheckName tells whether a volume may be called so, in docker's words.
func CheckName(name string) error {
	if len(name) == 1 {
		return errdefs.New(errdefs.ErrInvalid, "volume name is too short, names should be at least two alphanumeric characters")
	}
	if !nameRE.MatchString(name) || len(name) > maxNameBytes {
		return errdefs.New(errdefs.ErrInvalid, "%q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", name)
	}
	return nil
}

// Create makes a volume, or returns the existing one of that name: asking twice is no error,
// unless other options are asked for: ErrConflict.
func (s *Store) Create(_ context.Context, c Config) (Volume, error) {
	if c.Driver == "" {
		c.Driver = DriverLocal
	}
	if c.Driver != DriverLocal {
		return Volume{}, errdefs.New(errdefs.ErrUnsupported, "error looking up volume plugin %s: plugin %q not found; Berth has the local driver only", c.Driver, c.Driver)
	}
	if err := checkOptions(c.Options); err != nil {
		return Volume{}, errdefs.Wrap("create "+c.Name, err)
	}
	if c.Name == "" {
		var b [32]byte
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
		c.Name, c.Anonymous = hex.EncodeToString(b[:]), true
	}
	if err := CheckName(c.Name); err != nil {
		return Volume{}, errdefs.Wrap("create "+c.Name, err)
	}
	lock := s.fillLock(c.Name) // one that is being removed is waited for
	lock.Lock()
	defer lock.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.volumes[c.Name]; v != nil {
		if len(c.Options) > 0 && !maps.Equal(c.Options, v.Options) {
			return Volume{}, errdefs.New(errdefs.ErrConflict, "create %s: a volume named %s already exists with other options; volume names must be unique", c.Name, c.Name)
		}
		return *v, nil
	}
	v := &Volume{Config: c, Path: s.path(c.Name), Created: time.Now()}
	if err := os.MkdirAll(v.Path, 0o755); err != nil {
		return Volume{}, fmt.Errorf("create volume %s: %w", c.Name, err)
	}
	if err := s.records.Put(kind, c.Name, v); err != nil {
		return Volume{}, errors.Join(err, os.RemoveAll(filepath.Join(s.dir, c.Name)))
	}
	s.volumes[c.Name] = v
	return *v, nil
}

// Get returns a volume by name.
func (s *Store) Get(name string) (Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.volumes[name]; v != nil {
		return *v, nil
	}
	return Volume{}, errdefs.New(errdefs.ErrNotFound, "get %s: no such volume", name)
}

// List returns all volumes by name.
func (s *Store) List() []Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Volume, 0, len(s.volumes))
	for _, v := range s.volumes {
		out = append(out, *v)
	}
	slices.SortFunc(out, func(a, b Volume) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Path is the directory that containers mount. For a volume with options it mounts what they
// describe, unless it is mounted.
func (s *Store) Path(name string) (string, error) {
	v, err := s.Get(name)
	if err == nil {
		err = s.mountOptions(v)
	}
	return v.Path, err
}

// Remove deletes a volume with its data, but not what its options mounted there. The directory
// is renamed first: what a crash leaves of it is swept at the next Open.
func (s *Store) Remove(_ context.Context, name string) error {
	lock := s.fillLock(name)
	lock.Lock()
	defer lock.Unlock()
	v, err := s.Get(name)
	if err != nil {
		return err
	}
	dir, old := filepath.Join(s.dir, name), filepath.Join(s.dir, removedName+name)
	if err := errors.Join(unmount(v.Path), checkNoMounts(dir)); err != nil {
		return errdefs.Wrap("remove "+name, err)
	}
	if err := os.Rename(dir, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	if err := s.records.Delete(kind, name); err != nil {
		return errors.Join(err, os.Rename(old, dir))
	}
	// The name is free again once nothing is left: a volume of that name may follow at once.
	err = removeTree(old)
	s.mu.Lock()
	delete(s.volumes, name)
	delete(s.filling, name)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	return nil
}

// removeTree removes a directory with all below, following no symbolic link and entering no
// other file system.
func removeTree(dir string) error {
	if err := checkNoMounts(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// SizeBytes is the apparent size of a volume's files.
func (s *Store) SizeBytes(ctx context.Context, name string) (int64, error) {
	v, err := s.Get(name)
	if err != nil {
		return 0, err
	}
	var total int64
	err = filepath.WalkDir(v.Path, func(_ string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil || !d.Type().IsRegular() {
			return ignoreMissing(err)
		}
		fi, err := d.Info()
		if err == nil {
			total += fi.Size()
		}
		return ignoreMissing(err)
	})
	return total, err
}

// ignoreMissing: containers go on changing a volume while it is walked.
func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// markPopulated records that a container has had the volume.
func (s *Store) markPopulated(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[name]
	if v == nil || v.Populated {
		return nil
	}
	v.Populated = true
	return s.records.Put(kind, name, v)
}

func (s *Store) fillLock(name string) *sync.Mutex {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.filling[name] == nil {
		s.filling[name] = &sync.Mutex{}
	}
	return s.filling[name]
}

// clean is a path inside a container, relative to its root.
func clean(p string) string { return strings.TrimPrefix(filepath.Clean("/"+p), "/") }
