package main

import (
	"berth/internal/criapi"
)

// criServer serves the engine as Kubernetes' container runtime interface.
func (d *daemon) criServer() *criapi.Server {
	return criapi.New(criapi.Options{Engine: d.engine, Images: d.images, Version: version, ImageDir: d.root.Images()})
}
