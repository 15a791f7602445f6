package image

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// zstdWindow bounds the memory that a stranger's zstd stream can ask for; 128 MiB is what the zstd
// program itself accepts without being told otherwise.
const zstdWindow = 128 << 20

// copyBuffer is the size of buffers in transfers.
const copyBuffer = 256 << 10

// RootFS returns the overlay lower directories of an image, top layer first; the slice belongs to
// the caller. An image that is not unpacked is unpacked first. Otherwise it reads memory only,
// or the database once after each start. The directories stay until the image is removed: the
// caller must be known to the function given to Remove and Prune before it uses them.
func (s *Store) RootFS(ctx context.Context, id digest.Digest) ([]string, error) {
	if dirs, ok := s.lowers.Load(id); ok {
		return slices.Clone(dirs.([]string)), nil
	}
	ctx = s.context(ctx)
	x, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	e := x.byID[id]
	if e == nil {
		return nil, errdefs.New(errdefs.ErrNotFound, "No such image: %s", id)
	}
	dirs, err := s.lowerDirs(ctx, e.p)
	if cerrdefs.IsNotFound(err) {
		dirs, err = s.unpackLeased(ctx, e.p)
	}
	if err != nil {
		return nil, localError("unpack image "+shortID(id), err)
	}
	s.namesMu.Lock()
	defer s.namesMu.Unlock()
	if x, err := s.current(ctx); err == nil && x.byID[id] != nil {
		s.lowers.Store(id, dirs)
	}
	return slices.Clone(dirs), nil
}

// lowerDirs asks the snapshotter for the directories of an unpacked image.
func (s *Store) lowerDirs(ctx context.Context, p *parsed) ([]string, error) {
	mounts, err := s.snaps.Mounts(ctx, p.viewKey())
	if err != nil {
		return nil, err
	}
	_, lower, err := s.layerDirs(mounts)
	if err != nil {
		return nil, err
	}
	for _, d := range lower {
		if _, err := os.Stat(d); err != nil {
			return nil, errdefs.New(errdefs.ErrDataLoss, "a layer is missing on the disk: %w; remove the image and pull or load it again", err)
		}
	}
	return lower, nil
}

// layerDirs finds the directories in what the snapshotter would have us mount: for a view its
// lower directories, for an active snapshot the directory to write to as well.
func (s *Store) layerDirs(mounts []mount.Mount) (upper string, lower []string, err error) {
	if len(mounts) != 1 {
		return "", nil, fmt.Errorf("snapshotter returned %d mounts", len(mounts))
	}
	m := mounts[0]
	if m.Type == "bind" {
		return m.Source, []string{m.Source}, nil
	}
	// The directories all begin with ours, whatever characters that contains.
	separator := ":" + filepath.Join(s.cfg.Dir, "snapshots") + "/"
	for _, o := range m.Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = dir
		}
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			for i, d := range strings.Split(dirs, separator) {
				if i > 0 {
					d = separator[1:] + d
				}
				lower = append(lower, d)
			}
		}
	}
	if len(lower) == 0 {
		return "", nil, fmt.Errorf("snapshotter returned a mount of type %q without directories", m.Type)
	}
	return upper, lower, nil
}

// unpackLeased unpacks outside of a transfer.
func (s *Store) unpackLeased(ctx context.Context, p *parsed) (dirs []string, err error) {
	ctx, end, err := s.lease(ctx, tempLease("unpack"))
	if err != nil {
		return nil, err
	}
	defer func() { end(err) }()
	applied := false
	for i := range p.layers {
		fresh, err := s.unpackLayer(ctx, p, i, func(int64) {})
		if err != nil {
			return nil, err
		}
		applied = applied || fresh
	}
	if err := s.finishUnpack(ctx, p, applied); err != nil {
		return nil, err
	}
	return s.lowerDirs(ctx, p)
}

// unpackLayer makes the snapshot of layer i on top of those below, unless it is there. The context
// has a lease. progress is told how many of the blob's bytes have been read.
func (s *Store) unpackLayer(ctx context.Context, p *parsed, i int, progress func(int64)) (fresh bool, err error) {
	chain, parent := p.chains[i].String(), ""
	if i > 0 {
		parent = p.chains[i-1].String()
	}
	unlock, err := s.locks.lock(ctx, "chain:"+chain)
	if err != nil {
		return false, err
	}
	defer unlock()
	key := "extract-" + randomID() + " " + chain
	// With this label Prepare puts an existing snapshot into our lease instead of making one.
	target := snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": chain})
	mounts, err := s.snaps.Prepare(ctx, key, parent, target)
	if cerrdefs.IsAlreadyExists(err) {
		_, err = s.snaps.Stat(ctx, chain)
		return false, err
	}
	if err != nil {
		return false, err
	}
	upper, lower, err := s.layerDirs(mounts)
	if err != nil {
		return false, err
	}
	if mounts[0].Type == "bind" {
		lower = nil
	}
	defer func() {
		if err != nil {
			// On a full disk the database cannot be written before there is room.
			emptyDir(upper)
			if rmErr := s.snaps.Remove(context.WithoutCancel(ctx), key); rmErr != nil {
				err = errors.Join(err, rmErr)
			}
		}
	}()
	if err := s.extract(ctx, p, i, upper, lower, progress); err != nil {
		return false, err
	}
	return true, s.snaps.Commit(ctx, chain, key)
}

// extract writes layer i into upper and checks the diff ID. containerd's archive.Apply keeps every
// path inside upper, whatever names and links the layer has.
func (s *Store) extract(ctx context.Context, p *parsed, i int, upper string, lower []string, progress func(int64)) error {
	blob, err := s.openBlob(ctx, p.layers[i])
	if err != nil {
		return err
	}
	defer blob.Close()
	stream, err := decompress(&countingReader{ctx: ctx, r: blob, report: progress})
	if err != nil {
		return layerError(p.layers[i], err)
	}
	defer stream.Close()
	digester := p.image.RootFS.DiffIDs[i].Algorithm().Digester()
	tee := io.TeeReader(stream, digester.Hash())

	var opts []archive.ApplyOpt
	if len(lower) > 0 {
		opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(lower))
	}
	if _, err := archive.Apply(ctx, upper, tee, opts...); err != nil {
		return layerError(p.layers[i], err)
	}
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return layerError(p.layers[i], err)
	}
	if got, want := digester.Digest(), p.image.RootFS.DiffIDs[i]; got != want {
		return errdefs.New(errdefs.ErrDataLoss, "invalid diffID for layer %d: expected %q, got %q", i, want, got)
	}
	return nil
}

// layerError gives what went wrong with a layer's contents a kind.
func layerError(l ocispec.Descriptor, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if diskFull(err) {
		return errdefs.New(errdefs.ErrExhausted, "failed to register layer %s: no space left on device", shortID(l.Digest))
	}
	return errdefs.New(errdefs.ErrInvalid, "failed to register layer %s: %s", shortID(l.Digest), oneLine(err))
}

// finishUnpack makes what has been unpacked durable, ties it to the image's config and computes
// the image's size. The context has a lease.
func (s *Store) finishUnpack(ctx context.Context, p *parsed, fresh bool) error {
	if fresh {
		// One sync for all layers, before anything durable refers to them.
		if err := syncFilesystem(s.cfg.Dir); err != nil {
			return err
		}
	}
	if _, err := s.snaps.View(ctx, p.viewKey(), p.chain()); err != nil && !cerrdefs.IsAlreadyExists(err) {
		return err
	}
	var size int64
	for _, c := range p.chains {
		n, err := s.chainSize(ctx, c)
		if err != nil {
			return err
		}
		size += n
	}
	labels := map[string]string{labelRefView: p.viewKey(), labelSize: strconv.FormatInt(size, 10)}
	if len(p.chains) > 0 {
		labels[labelRefSnapshot] = p.chain()
	}
	return s.setLabels(ctx, p.config.Digest, labels)
}

// chainSize is what one layer takes on the disk.
func (s *Store) chainSize(ctx context.Context, chain digest.Digest) (int64, error) {
	u, err := s.snaps.Usage(ctx, chain.String())
	return u.Size, err
}

// unpackedBelow is the number of layers, from the bottom, whose snapshots exist. They are put into
// the context's lease, so that they still exist when the caller comes to them.
func (s *Store) unpackedBelow(ctx context.Context, p *parsed, lease string) (int, error) {
	for i := len(p.chains); i > 0; i-- {
		if _, err := s.snaps.Stat(ctx, p.chains[i-1].String()); cerrdefs.IsNotFound(err) {
			continue
		} else if err != nil {
			return 0, err
		}
		err := s.leases.AddResource(ctx, leases.Lease{ID: lease}, leases.Resource{ID: p.chains[i-1].String(), Type: snapshotLease})
		return i, err
	}
	return 0, nil
}

func syncFilesystem(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

func emptyDir(dir string) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, n := range names {
		_ = os.RemoveAll(filepath.Join(dir, n.Name())) // the collection removes what remains
	}
}

// decompress finds out from its first bytes whether a stream is gzip, zstd or neither. No helper
// program is executed.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, copyBuffer)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch compressionOf(magic) {
	case "gzip":
		return gzip.NewReader(b)
	case "zstd":
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// compressionOf names the compression that the first bytes of a stream show, "" for none.
func compressionOf(magic []byte) string {
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b:
		return "gzip"
	case len(magic) >= 4 && string(magic[:4]) == "\x28\xb5\x2f\xfd":
		return "zstd"
	case len(magic) >= 4 && magic[0]&0xf0 == 0x50 && string(magic[1:4]) == "\x2a\x4d\x18": // skippable frame
		return "zstd"
	}
	return ""
}

// countingReader tells how far a stream has been read, and ends with its context.
type countingReader struct {
	ctx    context.Context
	r      io.Reader
	n      int64
	report func(int64)
}

func (c *countingReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(b)
	c.n += int64(n)
	c.report(c.n)
	return n, err
}
