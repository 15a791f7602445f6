package image

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"berth/internal/errdefs"
)

// Names inside the store.
const (
	namespace       = "berth"
	snapshotterName = "overlay"
	snapshotLease   = "snapshots/" + snapshotterName // a lease's resource type
	pullLeasePrefix = "pull-"
)

// Bounds of a store.
const (
	maxLayers        = 128     // of an image: overlayfs takes 500, docker and containerd stop here
	maxManifestBytes = 4 << 20 // of a manifest or an index
	maxConfigBytes   = 4 << 20 // of an image config
	maxRetries       = 5       // of one transfer step that failed for a passing reason

	defaultParallel    = 3
	defaultRetryDelay  = time.Second
	defaultStall       = time.Minute
	defaultLockTimeout = 10 * time.Second

	// partialDownloads of a killed process are kept this long, to be resumed by the next pull
	// of the same reference.
	partialDownloadAge = 24 * time.Hour
)

// Config tells Open where things are. Only Dir is required.
type Config struct {
	Dir                string        // everything the store writes
	Registries         string        // a directory with containerd's hosts.toml files, one directory per registry
	InsecureRegistries []string      // hosts, host:port or CIDRs: TLS is not verified and http is tried
	Parallel           int           // layers in transfer at once per pull or push; 0 is 3
	RetryDelay         time.Duration // before the first retry, doubled each time; 0 is 1 s
	Stall              time.Duration // a transfer without a byte for so long is broken off and retried; 0 is 1 min
	LockTimeout        time.Duration // how long Open waits for another process to close the store; 0 is 10 s
	Log                *slog.Logger  // background failures; nil is slog.Default
}

// Store keeps images in one directory. Open makes one; it implements API.
//
// Names live in containerd's image records. An image without a name has a hidden record called
// by its ID, so that garbage collection sees it; a hidden record may be pinned: such an image has
// been removed for its users and only keeps its layers until Release.
type Store struct {
	cfg     Config
	bolt    *bolt.DB
	db      *metadata.DB
	content content.Store
	snaps   snapshots.Snapshotter
	overlay io.Closer
	images  images.Store
	leases  leases.Manager
	log     *slog.Logger
	quiet   *log.Entry // the libraries' logger: what matters reaches us as errors

	locks keyedLocks // one transfer of one thing at a time

	namesMu  sync.Mutex // held while image records change
	removeMu sync.Mutex // one Remove or Prune at a time, as they ask for users in between
	index    atomic.Pointer[index]
	buildMu  sync.Mutex
	parsed   map[digest.Digest]*parsed // by manifest digest; under buildMu

	lowers sync.Map // digest.Digest of an image to []string, top layer first

	staleMu sync.Mutex
	stale   map[string]struct{} // leases of killed pulls that may be resumed

	wake  chan struct{} // asks Run for a collection
	sweep atomic.Bool   // the next collection also looks for what a killed process left unrecorded
}

var _ API = (*Store)(nil)

// Open opens or creates the store in c.Dir and removes what killed transfers left, except
// downloads young enough to be resumed. It fails with errdefs.ErrUnavailable when another process
// keeps the store open and with errdefs.ErrDataLoss when its database is unreadable.
func Open(ctx context.Context, c Config) (_ *Store, err error) {
	s := &Store{
		cfg:    withDefaults(c),
		log:    c.Log,
		parsed: map[digest.Digest]*parsed{},
		stale:  map[string]struct{}{},
		wake:   make(chan struct{}, 1),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	// containerd's packages log on their own to stderr what they also return, and what is no fault
	// (fs-verity missing). What matters reaches us as errors.
	if err := log.SetLevel("panic"); err != nil {
		return nil, err
	}
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	silent.SetLevel(logrus.PanicLevel)
	s.quiet = logrus.NewEntry(silent)

	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, localError("open the image store", err)
	}
	path := filepath.Join(c.Dir, "metadata.db")
	s.bolt, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: s.cfg.LockTimeout, FreelistType: bolt.FreelistMapType})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, errdefs.New(errdefs.ErrUnavailable, "image store %s: another process has it open", c.Dir)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return nil, errdefs.New(errdefs.ErrDataLoss, "image database %s: %w; move the directory away and load the images again", path, err)
	case err != nil:
		return nil, localError("open the image store", err)
	}
	defer func() {
		if err != nil {
			_ = s.bolt.Close()
		}
	}()
	if err := s.openStores(s.context(ctx)); err != nil {
		return nil, localError("open the image store", err)
	}
	if err := s.recover(s.context(ctx)); err != nil {
		_ = s.overlay.Close()
		return nil, localError("open the image store", err)
	}
	return s, nil
}

func withDefaults(c Config) Config {
	if c.Parallel <= 0 {
		c.Parallel = defaultParallel
	}
	if c.RetryDelay <= 0 {
		c.RetryDelay = defaultRetryDelay
	}
	if c.Stall <= 0 {
		c.Stall = defaultStall
	}
	if c.LockTimeout <= 0 {
		c.LockTimeout = defaultLockTimeout
	}
	return c
}

func (s *Store) removeProbes() error {
	dir := filepath.Join(s.cfg.Dir, "content")
	all, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, d := range all {
		if strings.HasPrefix(d.Name(), ".fsverity-check-") {
			if err := os.RemoveAll(filepath.Join(dir, d.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) openStores(ctx context.Context) error {
	// NewStore probes the file system; being killed in the middle leaves the probe.
	if err := s.removeProbes(); err != nil {
		return err
	}
	blobs, err := local.NewStore(filepath.Join(s.cfg.Dir, "content"))
	if err != nil {
		return err
	}
	// Directories are removed after the transaction that forgets them, outside of all locks.
	sn, err := overlay.NewSnapshotter(filepath.Join(s.cfg.Dir, "snapshots"), overlay.AsynchronousRemove)
	if err != nil {
		return err
	}
	s.overlay = sn
	s.db = metadata.NewDB(s.bolt, blobs, map[string]snapshots.Snapshotter{snapshotterName: sn})
	if err := s.db.Init(ctx); err != nil {
		_ = sn.Close()
		return err
	}
	s.content = s.db.ContentStore()
	s.snaps = s.db.Snapshotter(snapshotterName)
	s.images = metadata.NewImageStore(s.db)
	s.leases = metadata.NewLeaseManager(s.db)
	return nil
}

// Close releases the store. No method may run or be called afterwards.
func (s *Store) Close() error {
	return errors.Join(s.overlay.Close(), s.db.Close())
}

// context adds what containerd's stores expect.
func (s *Store) context(ctx context.Context) context.Context {
	return log.WithLogger(namespaces.WithNamespace(ctx, namespace), s.quiet)
}

// recover deals with the leases of a process that died in a transfer. A lease is there from before
// the first byte to after the last, so none means that nothing unrecorded can be on the disk.
func (s *Store) recover(ctx context.Context) error {
	s.wakeCollector() // the last process may not have come to it
	found, err := s.leases.List(ctx)
	if err != nil || len(found) == 0 {
		return err
	}
	s.sweep.Store(true)
	if err := s.removeUnnamedIngests(); err != nil {
		return err
	}
	for _, l := range found {
		if !strings.HasPrefix(l.ID, pullLeasePrefix) || time.Since(l.CreatedAt) > partialDownloadAge {
			if err := s.leases.Delete(ctx, l); err != nil && !cerrdefs.IsNotFound(err) {
				return err
			}
			continue
		}
		// Blobs were synced when committed; snapshots that no image refers to yet perhaps not.
		resources, err := s.leases.ListResources(ctx, l)
		if err != nil {
			return err
		}
		for _, r := range resources {
			if r.Type != snapshotLease {
				continue
			}
			if err := s.leases.DeleteResource(ctx, l, r); err != nil {
				return err
			}
		}
		s.stale[l.ID] = struct{}{}
	}
	return nil
}

// removeUnnamedIngests removes downloads that were killed before they had got, or after they had
// lost, the file that says whose they are: containerd's own collection passes them over.
func (s *Store) removeUnnamedIngests() error {
	dir := filepath.Join(s.cfg.Dir, "content", "ingest")
	all, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, d := range all {
		if st, err := os.Stat(filepath.Join(dir, d.Name(), "ref")); err == nil && st.Size() > 0 {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, d.Name())); err != nil {
			return err
		}
	}
	return nil
}

// lease protects from collection all that is made with the returned context. A lease of that name
// left by a killed process is taken over with what it holds. end must be called: a failed
// transfer's parts are removed before it returns.
func (s *Store) lease(ctx context.Context, id string) (_ context.Context, end func(err error), _ error) {
	l, err := s.leases.Create(ctx, leases.WithID(id))
	if err != nil && !cerrdefs.IsAlreadyExists(err) {
		return nil, nil, localError("begin the transfer", err)
	}
	l.ID = id
	undone := context.WithoutCancel(ctx)
	return leases.WithLease(ctx, id), func(failed error) {
		if err := s.endLease(undone, l); err != nil {
			s.log.Warn("image transfer leaves a lease behind until the next start", "lease", id, "error", err)
		}
		if failed != nil {
			if err := s.GC(undone); err != nil {
				s.log.Warn("parts of a failed image transfer remain until the next collection", "error", err)
				s.wakeCollector()
			}
		}
	}, nil
}

func (s *Store) endLease(ctx context.Context, l leases.Lease) error {
	s.staleMu.Lock()
	delete(s.stale, l.ID)
	s.staleMu.Unlock()
	if err := s.leases.Delete(ctx, l); err != nil && !cerrdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// dropStale forgets what a killed pull left under the lease, if anything.
func (s *Store) dropStale(ctx context.Context, id string) {
	s.staleMu.Lock()
	_, ok := s.stale[id]
	s.staleMu.Unlock()
	if !ok {
		return
	}
	if err := s.endLease(ctx, leases.Lease{ID: id}); err != nil {
		s.log.Warn("cannot remove the rest of an interrupted pull", "lease", id, "error", err)
		return
	}
	s.wakeCollector()
}

// Run removes in the background what nothing refers to any more, whenever something may have
// become so. It returns when ctx ends; its error is ctx's. Without it garbage waits for GC.
func (s *Store) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.wake:
		}
		if err := s.GC(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("image garbage collection failed", "error", err)
		}
	}
}

// wakeCollector asks Run for a collection; requests made while one is pending are one.
func (s *Store) wakeCollector() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// GC removes content and snapshots that no image and no transfer refers to, and waits for it.
func (s *Store) GC(ctx context.Context) error {
	ctx = s.context(ctx)
	unlock, err := s.locks.lock(ctx, "gc")
	if err != nil {
		return err
	}
	defer unlock()
	// The lease marks a collection in progress: if it is killed between forgetting a thing and
	// removing it from the disk, the next start sees the lease and sweeps.
	l, err := s.leases.Create(ctx, leases.WithID("gc"))
	if err != nil && !cerrdefs.IsAlreadyExists(err) {
		return localError("collect garbage", err)
	}
	l.ID = "gc"
	sweep := s.sweep.Swap(false)
	if sweep {
		if err := s.markDirty(ctx); err != nil {
			s.sweep.Store(true)
			return localError("collect garbage", err)
		}
	}
	if _, err := s.db.GarbageCollect(ctx); err != nil {
		if sweep {
			s.sweep.Store(true)
		}
		return localError("collect garbage", err)
	}
	return s.endLease(ctx, l)
}

// markDirty makes the next collection compare both stores with the database. containerd does so
// only for a store from which something has been removed, so something is.
func (s *Store) markDirty(ctx context.Context) error {
	key := "sweep" // always the same, so that being killed in between adds nothing
	if _, err := s.snaps.Prepare(ctx, key, ""); err != nil && !cerrdefs.IsAlreadyExists(err) {
		return err
	}
	if err := s.snaps.Remove(ctx, key); err != nil {
		return err
	}
	// An unleased blob that nothing refers to is removed by the collection itself.
	data := []byte(key)
	desc := descriptorOf("application/octet-stream", data)
	return content.WriteBlob(ctx, s.content, key, strings.NewReader(key), desc)
}

func randomID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand's contract
	return hex.EncodeToString(b[:])
}

// tempLease names a lease that no later process takes over.
func tempLease(kind string) string { return fmt.Sprintf("%s-%s", kind, randomID()) }
