package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"
)

// stamp is the time of every file and image: the same inputs give the same bytes.
var stamp = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// tree is the content of one layer, by absolute path.
type tree struct{ files map[string]node }

type node struct {
	mode     int64
	uid, gid int
	kind     byte // of the tar header
	target   string
	content  []byte
}

func newTree() *tree { return &tree{files: map[string]node{}} }

func (t *tree) dir(name string, mode int64, uid, gid int) {
	t.files[name] = node{mode: mode, uid: uid, gid: gid, kind: tar.TypeDir}
}

func (t *tree) file(name string, mode int64, content string) {
	t.files[name] = node{mode: mode, kind: tar.TypeReg, content: []byte(content)}
}

func (t *tree) link(name, target string) {
	t.files[name] = node{mode: 0o777, kind: tar.TypeSymlink, target: target}
}

// copy adds a file of this machine.
func (t *tree) copy(name, from string, mode int64) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	t.files[name] = node{mode: mode, kind: tar.TypeReg, content: content}
	return nil
}

// layer returns the tree as a tar archive, parents first.
func (t *tree) layer() ([]byte, error) {
	for name := range t.files {
		for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
			if _, ok := t.files[dir]; !ok {
				t.dir(dir, 0o755, 0, 0)
			}
		}
	}
	var names []string
	for name := range t.files {
		names = append(names, name)
	}
	slices.Sort(names)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range names {
		n := t.files[name]
		h := &tar.Header{Typeflag: n.kind, Name: strings.TrimPrefix(name, "/"), Linkname: n.target,
			Mode: n.mode, Uid: n.uid, Gid: n.gid, Size: int64(len(n.content)), ModTime: stamp, Format: tar.FormatPAX}
		if n.kind == tar.TypeDir {
			h.Name += "/"
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(n.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// config is the part of a Docker image config that these images use.
type config struct {
	User         string              `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Env          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	Healthcheck  *healthcheck        `json:",omitempty"`
	Volumes      map[string]struct{} `json:",omitempty"`
	WorkingDir   string              `json:",omitempty"`
}

type healthcheck struct {
	Test     []string
	Interval int64 `json:",omitempty"` // nanoseconds
	Timeout  int64 `json:",omitempty"` // nanoseconds
	Retries  int   `json:",omitempty"`
}

// image is one archive to be.
type image struct {
	names  []string // with tags
	layers []*tree  // lowest first
	config config
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Media types of the OCI image specification.
const (
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
)

// blobs are the archive's files, in the order of writing.
type blobs struct {
	order []string
	data  map[string][]byte
}

func (b *blobs) add(name string, content []byte) {
	if _, ok := b.data[name]; !ok {
		b.order = append(b.order, name)
	}
	b.data[name] = content
}

func (b *blobs) blob(mediaType string, content []byte) descriptor {
	sum := sha256.Sum256(content)
	digest := hex.EncodeToString(sum[:])
	b.add("blobs/sha256/"+digest, content)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: len(content)}
}

func (b *blobs) json(mediaType string, v any) (descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return b.blob(mediaType, text), nil
}

func blobPath(d descriptor) string { return "blobs/" + strings.Replace(d.Digest, ":", "/", 1) }

// write makes the archive at file, whole or not at all.
func (im image) write(file string) error {
	b := blobs{data: map[string][]byte{}}
	var layers []descriptor
	var paths, diffIDs []string
	for _, t := range im.layers {
		content, err := t.layer()
		if err != nil {
			return err
		}
		d := b.blob(typeLayer, content) // not compressed: its digest is also its diff ID
		layers, paths, diffIDs = append(layers, d), append(paths, blobPath(d)), append(diffIDs, d.Digest)
	}
	history := make([]map[string]any, len(layers))
	for i := range history {
		history[i] = map[string]any{"created": stamp, "created_by": "berth mkimage"}
	}
	config, err := b.json(typeConfig, map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": stamp, "config": im.config, "history": history,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return err
	}
	manifest, err := b.json(typeManifest, map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest, "config": config, "layers": layers,
	})
	if err != nil {
		return err
	}
	var targets []descriptor
	for _, name := range im.names {
		d := manifest
		d.Annotations = map[string]string{
			"io.containerd.image.name":          "docker.io/library/" + name,
			"org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:],
		}
		targets = append(targets, d)
	}
	for name, v := range map[string]any{
		"oci-layout":    map[string]string{"imageLayoutVersion": "1.0.0"},
		"index.json":    map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": targets},
		"manifest.json": []any{map[string]any{"Config": blobPath(config), "RepoTags": im.names, "Layers": paths}},
	} {
		text, err := json.Marshal(v)
		if err != nil {
			return err
		}
		b.add(name, text)
	}
	slices.Sort(b.order)
	return writeFile(file, b.write)
}

func (b *blobs) write(w io.Writer) error {
	t := tar.NewWriter(w)
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: stamp}); err != nil {
			return err
		}
	}
	for _, name := range b.order {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(b.data[name])), ModTime: stamp}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(b.data[name]); err != nil {
			return err
		}
	}
	return t.Close()
}

func writeFile(file string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(path.Dir(file), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := write(f); err != nil {
		f.Close()
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
