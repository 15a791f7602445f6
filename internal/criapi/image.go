package criapi

import (
	"context"
	"encoding/base64"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
)

// imageName reads the reference out of a spec.
func imageName(field string, spec *runtimeapi.ImageSpec) (string, error) {
	if spec.GetRuntimeHandler() != "" {
		return "", unsupported(field+".runtime_handler", "Berth has one runtime, named by the empty string")
	}
	if spec.GetImage() == "" {
		return "", invalid("%s.image is missing", field)
	}
	return spec.GetImage(), nil
}

func (s *imageService) ListImages(ctx context.Context, req *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	resp := &runtimeapi.ListImagesResponse{}
	if spec := req.GetFilter().GetImage(); spec.GetImage() != "" {
		name, err := imageName("filter.image", spec)
		if err != nil {
			return nil, err
		}
		img, err := s.Images.Resolve(ctx, name)
		if gone(err) {
			return resp, nil
		}
		if err != nil {
			return nil, err
		}
		resp.Images = []*runtimeapi.Image{criImage(img)}
		return resp, nil
	}
	list, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, img := range list {
		resp.Images = append(resp.Images, criImage(img))
	}
	return resp, nil
}

// ImageStatus answers with no image when there is none, as the CRI says.
func (s *imageService) ImageStatus(ctx context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	name, err := imageName("image", req.GetImage())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{}
	img, err := s.Images.Resolve(ctx, name)
	if gone(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	resp.Image = criImage(img)
	if req.GetVerbose() {
		resp.Info, err = infoJSON(map[string]any{"imageSpec": img.Config})
	}
	return resp, err
}

// criImage tells the user that the image names by number or by name, never both: the kubelet
// checks runAsNonRoot with it.
func criImage(img image.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{Id: string(img.ID), RepoTags: img.Names, RepoDigests: img.Digests, Size: uint64(max(img.SizeBytes, 0))}
	user, _, _ := strings.Cut(img.Config.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}

func (s *imageService) PullImage(ctx context.Context, req *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	name, err := imageName("image", req.GetImage())
	if err != nil {
		return nil, err
	}
	login, err := credentials(name, req.GetAuth())
	if err != nil {
		return nil, err
	}
	img, err := s.Images.Pull(ctx, name, image.PullOptions{Credentials: login, Progress: func(image.Status) {}})
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: string(img.ID)}, nil
}

// credentials for the image's registry. Those that name another server are not sent.
func credentials(name string, a *runtimeapi.AuthConfig) (image.Credentials, error) {
	if a == nil {
		return image.Credentials{}, nil
	}
	if a.ServerAddress != "" {
		named, err := reference.ParseDockerRef(name)
		if err != nil {
			return image.Credentials{}, invalid("image %q: %v", name, err)
		}
		if registryHost(a.ServerAddress) != registryHost(reference.Domain(named)) {
			return image.Credentials{}, nil
		}
	}
	out := image.Credentials{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
	if a.Auth != "" && out.Username == "" {
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return image.Credentials{}, invalid("auth.auth: must be user:password in base64")
		}
		out.Username, out.Password = user, strings.Trim(password, "\x00")
	}
	return out, nil
}

// registryHost reads the host out of a server address, which may be a URL. Docker Hub has three names.
func registryHost(address string) string {
	if _, rest, ok := strings.Cut(address, "://"); ok {
		address = rest
	}
	host, _, _ := strings.Cut(address, "/")
	switch host = strings.ToLower(host); host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

// RemoveImage removes an image with all its names; one that is not there is no error.
func (s *imageService) RemoveImage(ctx context.Context, req *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	name, err := imageName("image", req.GetImage())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.RemoveImageResponse{}
	img, err := s.Images.Resolve(ctx, name)
	if errors.Is(err, errdefs.ErrDataLoss) {
		_, err = s.Images.Remove(ctx, name, true, true, s.imageUsers) // a damaged one has no ID to go by
	} else if err == nil {
		_, err = s.Images.Remove(ctx, string(img.ID), true, true, s.imageUsers)
	}
	if err != nil && !gone(err) {
		return nil, err
	}
	return resp, nil
}

// imageUsers are the containers made from an image, whoever made them.
func (s *Server) imageUsers(id digest.Digest) (names []string, running bool) {
	for _, c := range s.Engine.Containers() {
		if c.Config.ImageID != string(id) {
			continue
		}
		names = append(names, c.Config.Name)
		switch c.State.Status {
		case engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting:
			running = true
		}
	}
	return names, running
}

// ImageFsInfo tells what layers use. Images and containers are on one file system.
func (s *imageService) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	if s.ImageDir == "" {
		return nil, unsupported("ImageFsInfo", "the server was not told where images are kept")
	}
	used, err := s.Images.DiskUsage(ctx)
	if err != nil {
		return nil, err
	}
	usage := func() *runtimeapi.FilesystemUsage {
		return &runtimeapi.FilesystemUsage{
			Timestamp: time.Now().UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.ImageDir}, UsedBytes: value(uint64(max(used, 0))),
		}
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems: []*runtimeapi.FilesystemUsage{usage()}, ContainerFilesystems: []*runtimeapi.FilesystemUsage{usage()},
	}, nil
}
