package main

import (
	"context"

	"berth/internal/dockerapi"
	"berth/internal/volume"
)

// volumesOf gives the volume store the shapes that the Docker API declares; the engine takes it
// as it is.
type volumesOf struct{ *volume.Store }

func dockerVolume(v volume.Volume) dockerapi.Volume {
	return dockerapi.Volume{VolumeConfig: dockerapi.VolumeConfig(v.Config), Path: v.Path, Created: v.Created}
}

func (s volumesOf) Create(ctx context.Context, c dockerapi.VolumeConfig) (dockerapi.Volume, error) {
	v, err := s.Store.Create(ctx, volume.Config(c))
	return dockerVolume(v), err
}

func (s volumesOf) Get(name string) (dockerapi.Volume, error) {
	v, err := s.Store.Get(name)
	return dockerVolume(v), err
}

func (s volumesOf) List() []dockerapi.Volume {
	var out []dockerapi.Volume
	for _, v := range s.Store.List() {
		out = append(out, dockerVolume(v))
	}
	return out
}
