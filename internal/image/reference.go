package image

import (
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"berth/internal/errdefs"
)

// parseName reads a reference as docker does: busybox is docker.io/library/busybox. Neither tag nor
// digest is added. Errors are errdefs.ErrInvalid in docker's words.
func parseName(ref string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "%w", err)
	}
	return named, nil
}

// parseTarget reads a reference that names one image: without tag and digest it is :latest. With a
// digest the tag is dropped, as only the digest then decides.
func parseTarget(ref string) (reference.Named, error) {
	named, err := parseName(ref)
	if err != nil {
		return nil, err
	}
	if d, ok := named.(reference.Digested); ok {
		c, err := reference.WithDigest(reference.TrimNamed(named), d.Digest())
		if err != nil {
			return nil, errdefs.New(errdefs.ErrInvalid, "%w", err)
		}
		return c, nil
	}
	return reference.TagNameOnly(named), nil
}

// parseTag reads a reference that may become a name of an image.
func parseTag(ref string) (reference.Named, error) {
	named, err := parseName(ref)
	if err != nil {
		return nil, err
	}
	if _, ok := named.(reference.Digested); ok {
		return nil, errdefs.New(errdefs.ErrInvalid, "refusing to create a tag with a digest reference")
	}
	tagged := reference.TagNameOnly(named)
	if reference.FamiliarName(tagged) == digest.Canonical.String() {
		return nil, errdefs.New(errdefs.ErrInvalid, "refusing to create an ambiguous tag using digest algorithm as name")
	}
	return tagged, nil
}

// familiar is a canonical name as docker shows it.
func familiar(name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(named)
}

// tagOrDigest is the last part of a reference.
func tagOrDigest(named reference.Named) string {
	if d, ok := named.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := named.(reference.Tagged); ok {
		return t.Tag()
	}
	return ""
}

// byDigest is the canonical reference repository@digest.
func byDigest(named reference.Named, d digest.Digest) string {
	return reference.TrimNamed(named).Name() + "@" + d.String()
}

// repository is the part of a canonical name before tag or digest.
func repository(name string) string {
	if repo, _, ok := strings.Cut(name, "@"); ok {
		return repo
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[:i]
	}
	return name
}

// isDigestRef tells names of the kind repository@digest.
func isDigestRef(name string) bool { return strings.Contains(name, "@") }

// isHidden tells the record of an image without a name: it is called by the image's ID.
func isHidden(name string) bool { return !strings.Contains(name, "/") }

// shortID is docker's 12 digits of a digest.
func shortID(d digest.Digest) string {
	enc := d.Encoded()
	return enc[:min(12, len(enc))]
}
