// Package archive writes image archives without an engine or a registry: from directories, tar
// streams and literal files to one tar that docker load, podman, skopeo and Berth read, as a docker
// archive and as an OCI layout at once. The same input gives the same bytes: entries are sorted,
// times are zero, owners are root unless the layer says otherwise.
//
// It reads no archives; package image does. Functions may be called concurrently.
package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"berth/internal/errdefs"
)

// Spec describes one image.
type Spec struct {
	Name         string // busybox:latest; "" leaves the image without a name
	Architecture string // GOARCH's words; "" is this machine's
	OS           string // "" is linux
	Author       string
	Config       ocispec.ImageConfig
	Healthcheck  *Healthcheck
	Shell        []string // of Dockerfile's SHELL
	OnBuild      []string
	Layers       []Layer // bottom first
}

// Healthcheck is docker's extension of the image config; times are nanoseconds in the JSON.
type Healthcheck struct {
	Test        []string      `json:",omitempty"`
	Interval    time.Duration `json:",omitempty"`
	Timeout     time.Duration `json:",omitempty"`
	StartPeriod time.Duration `json:",omitempty"`
	Retries     int           `json:",omitempty"`
}

// Layer is one layer. Exactly one of its sources is used.
type Layer struct {
	Comment   string    // for docker history
	Directory string    // everything below it; owners become root, devices are refused
	Tar       io.Reader // taken as it is, byte for byte
	Files     []File
}

// File is a literal entry of a layer. Missing parent directories are made with mode 0755.
type File struct {
	Path    string // in the image
	Mode    fs.FileMode
	UID     int
	GID     int
	Data    []byte // contents of a regular file
	Source  string // or a file of the host with the contents; its symbolic links are followed
	Symlink string // target: makes a symbolic link
	Dir     bool
}

// maxMemory bounds a layer kept in memory while its digest is computed; larger ones go to a
// temporary file.
const maxMemory = 8 << 20

// Write writes the image to w as one uncompressed tar. Errors about what the spec says are
// errdefs.ErrInvalid.
func Write(w io.Writer, s Spec) error {
	name := ""
	if s.Name != "" {
		named, err := reference.ParseNormalizedNamed(s.Name)
		if err != nil {
			return errdefs.New(errdefs.ErrInvalid, "image name %q: %w", s.Name, err)
		}
		name = reference.TagNameOnly(named).String()
	}
	out := &writer{tw: tar.NewWriter(w), done: map[digest.Digest]bool{}}
	if err := out.small(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)); err != nil {
		return err
	}
	var layers []ocispec.Descriptor
	for i, l := range s.Layers {
		desc, err := out.layer(l)
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		layers = append(layers, desc)
	}
	config, err := s.config(layers)
	if err != nil {
		return err
	}
	if err := out.finish(name, config, layers); err != nil {
		return err
	}
	return out.tw.Close()
}

// config is the image config; image-spec, config.md, with docker's extensions.
func (s Spec) config(layers []ocispec.Descriptor) ([]byte, error) {
	type dockerConfig struct {
		ocispec.ImageConfig
		Healthcheck *Healthcheck `json:",omitempty"`
		Shell       []string     `json:",omitempty"`
		OnBuild     []string     `json:",omitempty"`
	}
	epoch := time.Unix(0, 0).UTC()
	image := struct {
		Created      *time.Time        `json:"created"`
		Author       string            `json:"author,omitempty"`
		Architecture string            `json:"architecture"`
		OS           string            `json:"os"`
		Config       dockerConfig      `json:"config"`
		RootFS       ocispec.RootFS    `json:"rootfs"`
		History      []ocispec.History `json:"history"`
	}{
		Created: &epoch, Author: s.Author, Architecture: s.Architecture, OS: s.OS,
		Config: dockerConfig{ImageConfig: s.Config, Healthcheck: s.Healthcheck, Shell: s.Shell, OnBuild: s.OnBuild},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
	}
	if image.Architecture == "" {
		image.Architecture = runtime.GOARCH
	}
	if image.OS == "" {
		image.OS = "linux"
	}
	for i, l := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, l.Digest)
		image.History = append(image.History, ocispec.History{Created: &epoch, CreatedBy: s.Layers[i].Comment})
	}
	return json.Marshal(image)
}

// writer writes the outer archive.
type writer struct {
	tw   *tar.Writer
	done map[digest.Digest]bool
}

func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// layer writes one layer as a blob and describes it. Layers are not compressed, so that blob and
// diff have one digest.
func (w *writer) layer(l Layer) (ocispec.Descriptor, error) {
	spool := &spool{}
	defer spool.close()
	digester := digest.Canonical.Digester()
	to := io.MultiWriter(spool, digester.Hash())
	var err error
	switch {
	case l.Tar != nil:
		_, err = io.Copy(to, l.Tar)
	case l.Directory != "":
		err = tarDirectory(to, l.Directory)
	default:
		err = tarFiles(to, l.Files)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digester.Digest(), Size: spool.size}
	if w.done[desc.Digest] {
		return desc, nil
	}
	w.done[desc.Digest] = true
	r, err := spool.reader()
	if err != nil {
		return desc, err
	}
	return desc, w.file(blobPath(desc.Digest), spool.size, r)
}

// finish writes manifest, config and both indexes.
func (w *writer) finish(name string, config []byte, layers []ocispec.Descriptor) error {
	if layers == nil {
		layers = []ocispec.Descriptor{}
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
		Layers:    layers,
	}
	manifest, err := json.Marshal(m)
	if err != nil {
		return err
	}
	desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	docker := struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{Config: blobPath(m.Config.Digest), RepoTags: []string{}, Layers: []string{}}
	if name != "" {
		_, tag, _ := strings.Cut(name[strings.LastIndexByte(name, '/'):], ":")
		desc.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: tag}
		docker.RepoTags = append(docker.RepoTags, familiar(name))
	}
	for _, l := range layers {
		docker.Layers = append(docker.Layers, blobPath(l.Digest))
	}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{desc}})
	if err != nil {
		return err
	}
	dockerIndex, err := json.Marshal([]any{docker})
	if err != nil {
		return err
	}
	for _, f := range []struct {
		path string
		data []byte
	}{
		{blobPath(m.Config.Digest), config}, {blobPath(desc.Digest), manifest}, {ocispec.ImageIndexFile, index}, {"manifest.json", dockerIndex},
	} {
		if err := w.small(f.path, f.data); err != nil {
			return err
		}
	}
	return nil
}

func familiar(name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(named)
}

func (w *writer) small(name string, data []byte) error {
	return w.file(name, int64(len(data)), bytes.NewReader(data))
}

func (w *writer) file(name string, size int64, r io.Reader) error {
	if err := w.tw.WriteHeader(header(name, tar.TypeReg, 0o444, size)); err != nil {
		return err
	}
	_, err := io.Copy(w.tw, r)
	return err
}

// header is that of an entry without a time, owned by root.
func header(name string, kind byte, mode int64, size int64) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
}

// tarMode are the permission bits as tar has them.
func tarMode(m fs.FileMode) int64 {
	mode := int64(m.Perm())
	for bit, value := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			mode |= value
		}
	}
	return mode
}

// tarDirectory writes everything below dir.
func tarDirectory(w io.Writer, dir string) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return tarEntry(tw, rel, p, info)
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func tarEntry(tw *tar.Writer, rel, from string, info fs.FileInfo) error {
	mode := tarMode(info.Mode())
	switch info.Mode().Type() {
	case 0:
		f, err := os.Open(from)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := tw.WriteHeader(header(rel, tar.TypeReg, mode, info.Size())); err != nil {
			return err
		}
		_, err = io.Copy(tw, f)
		return err
	case fs.ModeDir:
		return tw.WriteHeader(header(rel+"/", tar.TypeDir, mode, 0))
	case fs.ModeSymlink:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		h := header(rel, tar.TypeSymlink, 0o777, 0)
		h.Linkname = target
		return tw.WriteHeader(h)
	}
	return errdefs.New(errdefs.ErrInvalid, "%s: only files, directories and symbolic links can be put into a layer", from)
}

// tarFiles writes literal entries, sorted, with their parent directories.
func tarFiles(w io.Writer, files []File) error {
	all := map[string]File{}
	for _, f := range files {
		name := path.Clean("/" + f.Path)[1:]
		if name == "" {
			return errdefs.New(errdefs.ErrInvalid, "file %q has no path in the image", f.Path)
		}
		if _, ok := all[name]; ok {
			return errdefs.New(errdefs.ErrInvalid, "file %q is given twice", f.Path)
		}
		all[name] = f
	}
	for _, name := range slices.Collect(maps.Keys(all)) {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := all[dir]; !ok {
				all[dir] = File{Dir: true, Mode: 0o755}
			}
		}
	}
	names := slices.Collect(maps.Keys(all))
	sort.Strings(names)
	tw := tar.NewWriter(w)
	for _, name := range names {
		if err := tarFile(tw, name, all[name]); err != nil {
			return err
		}
	}
	return tw.Close()
}

func tarFile(tw *tar.Writer, name string, f File) error {
	write := func(h *tar.Header) error {
		h.Uid, h.Gid = f.UID, f.GID
		return tw.WriteHeader(h)
	}
	switch {
	case f.Dir:
		return write(header(name+"/", tar.TypeDir, tarMode(f.Mode), 0))
	case f.Symlink != "":
		h := header(name, tar.TypeSymlink, 0o777, 0)
		h.Linkname = f.Symlink
		return write(h)
	case f.Source != "":
		src, err := os.Open(f.Source)
		if err != nil {
			return err
		}
		defer src.Close()
		info, err := src.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return errdefs.New(errdefs.ErrInvalid, "%s is not a regular file", f.Source)
		}
		if err := write(header(name, tar.TypeReg, tarMode(f.Mode), info.Size())); err != nil {
			return err
		}
		_, err = io.Copy(tw, src)
		return err
	}
	if err := write(header(name, tar.TypeReg, tarMode(f.Mode), int64(len(f.Data)))); err != nil {
		return err
	}
	_, err := tw.Write(f.Data)
	return err
}

// spool keeps a layer until its digest is known: in memory, then in an unnamed temporary file.
type spool struct {
	mem  bytes.Buffer
	file *os.File
	size int64
}

func (s *spool) Write(b []byte) (int, error) {
	if s.file == nil && s.size+int64(len(b)) > maxMemory {
		f, err := os.CreateTemp("", "berth-layer-*")
		if err != nil {
			return 0, err
		}
		s.file = f
		if err := os.Remove(f.Name()); err != nil {
			return 0, err
		}
		if _, err := f.Write(s.mem.Bytes()); err != nil {
			return 0, err
		}
		s.mem = bytes.Buffer{}
	}
	s.size += int64(len(b))
	if s.file != nil {
		return s.file.Write(b)
	}
	return s.mem.Write(b)
}

func (s *spool) reader() (io.Reader, error) {
	if s.file == nil {
		return &s.mem, nil
	}
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(errors.New("read the layer back"), err)
	}
	return s.file, nil
}

func (s *spool) close() {
	if s.file != nil {
		_ = s.file.Close() // the file has no name: it is gone with this
	}
}
