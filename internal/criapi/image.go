package criapi

import (
	"context"
	"encoding/base64"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"berth/internal/engine"
	"berth/internal/errdefs"
	"berth/internal/image"
)

// imageService is CRI's ImageService. It shows all images: they have no owner.
type imageService struct {
	runtime.UnimplementedImageServiceServer
	*Server
}

func (s *imageService) ListImages(ctx context.Context, req *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	out := &runtime.ListImagesResponse{}
	if name := imageName(req.GetFilter().GetImage()); name != "" {
		img, err := s.Images.Resolve(ctx, name)
		if errors.Is(err, errdefs.ErrNotFound) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out.Images = []*runtime.Image{imageStatus(img)}
		return out, nil
	}
	list, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, img := range list {
		out.Images = append(out.Images, imageStatus(img))
	}
	return out, nil
}

// ImageStatus answers without an image when there is none.
func (s *imageService) ImageStatus(ctx context.Context, req *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	name := imageName(req.GetImage())
	if name == "" {
		return nil, invalid("image status: no image was named")
	}
	img, err := s.Images.Resolve(ctx, name)
	if errors.Is(err, errdefs.ErrNotFound) {
		return &runtime.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &runtime.ImageStatusResponse{Image: imageStatus(img)}, nil
}

func imageStatus(img image.Image) *runtime.Image {
	out := &runtime.Image{
		Id: img.ID.String(), RepoTags: img.Names, RepoDigests: img.Digests, Size: uint64(max(img.SizeBytes, 0)),
		Spec: &runtime.ImageSpec{Image: img.ID.String()},
	}
	user, _, _ := strings.Cut(img.Config.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtime.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}

func (s *imageService) PullImage(ctx context.Context, req *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	name := imageName(req.GetImage())
	if name == "" {
		return nil, invalid("pull: no image was named")
	}
	if h := req.GetImage().GetRuntimeHandler(); h != "" {
		return nil, unsupported("pull %s: runtime handler %q is not supported", name, h)
	}
	creds, err := credentials(req.GetAuth())
	if err != nil {
		return nil, err
	}
	img, err := s.Images.Pull(ctx, name, image.PullOptions{Credentials: creds, Progress: func(image.Status) {}})
	if err != nil {
		return nil, err
	}
	return &runtime.PullImageResponse{ImageRef: img.ID.String()}, nil
}

// credentials reads the ways in which a kubelet logs in.
func credentials(a *runtime.AuthConfig) (image.Credentials, error) {
	c := image.Credentials{Username: a.GetUsername(), Password: a.GetPassword(), IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken()}
	if c == (image.Credentials{}) && a.GetAuth() != "" {
		plain, err := base64.StdEncoding.DecodeString(a.GetAuth())
		user, password, ok := strings.Cut(string(plain), ":")
		if err != nil || !ok {
			return c, invalid("auth: not the base64 form of user:password")
		}
		c.Username, c.Password = user, strings.Trim(password, "\x00")
	}
	return c, nil
}

// RemoveImage removes an image with all its names. It is idempotent.
func (s *imageService) RemoveImage(ctx context.Context, req *runtime.RemoveImageRequest) (*runtime.RemoveImageResponse, error) {
	img, err := s.Images.Resolve(ctx, imageName(req.GetImage()))
	if err == nil {
		_, err = s.Images.Remove(ctx, img.ID.String(), true, true, s.imageUsers)
	}
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return nil, err
	}
	return &runtime.RemoveImageResponse{}, nil
}

// imageUsers names the containers, of all dialects, that use an image.
func (s *Server) imageUsers(id digest.Digest) (names []string, running bool) {
	for _, c := range s.Engine.Containers() {
		if c.Config.ImageID == id.String() {
			names = append(names, c.Config.Name)
			running = running || slices.Contains([]engine.Status{engine.StatusRunning, engine.StatusPaused, engine.StatusRestarting}, c.State.Status)
		}
	}
	return names, running
}

// ImageFsInfo counts layers; containers' own layers are on the same file system.
func (s *imageService) ImageFsInfo(ctx context.Context, _ *runtime.ImageFsInfoRequest) (*runtime.ImageFsInfoResponse, error) {
	used, err := s.Images.DiskUsage(ctx)
	if err != nil {
		return nil, err
	}
	fs := []*runtime.FilesystemUsage{{
		Timestamp: time.Now().UnixNano(), FsId: &runtime.FilesystemIdentifier{Mountpoint: s.ImageDir},
		UsedBytes: &runtime.UInt64Value{Value: uint64(max(used, 0))}, InodesUsed: &runtime.UInt64Value{},
	}}
	return &runtime.ImageFsInfoResponse{ImageFilesystems: fs, ContainerFilesystems: fs}, nil
}
