package image

import (
	"context"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"berth/internal/errdefs"
)

// LayerSizes returns the bytes that each unpacked layer of the image takes, bottom first; 0 for a
// layer that is not unpacked. It fails with errdefs.ErrNotFound for an unknown ID.
func (s *Store) LayerSizes(ctx context.Context, id digest.Digest) ([]int64, error) {
	x, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	e, ok := x.byID[id]
	if !ok {
		return nil, errdefs.New(errdefs.ErrNotFound, "No such image: %s", id)
	}
	ctx = s.context(ctx)
	sizes := make([]int64, len(e.p.chains))
	for i, chain := range e.p.chains {
		sizes[i], err = s.chainSize(ctx, chain)
		if cerrdefs.IsNotFound(err) {
			sizes[i] = 0
		} else if err != nil {
			return nil, localError("size of image "+id.String(), err)
		}
	}
	return sizes, nil
}
