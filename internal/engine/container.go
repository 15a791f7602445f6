package engine

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/logs"
)

// container is the engine's own view of a container.
//
// op serialises start, exit handling, pause, rename and removal; stop and kill only signal and
// then wait for exit handling. mu guards the record and the fields below it, and is never held
// across I/O other than the journal's single write.
type container struct {
	op opLock

	mu sync.Mutex
	Container
	removed  chan struct{} // closed when it is gone
	exited   chan struct{} // closed at the end of the current run; nil when it does not run
	waiters  []waiter
	out      *output // its log and spool
	stdin    *stdinHub
	restart  *time.Timer // pending restart
	probes   *healthLoop
	starting bool // its start is under way
	manual   int  // docker restarts at work: no automatic restart or removal meanwhile
	ending   int  // removals by force under way: nobody starts it any more
}

type waiter struct {
	cond WaitCondition
	ch   chan WaitResult
}

func (e *Engine) newContainer(rec Container) *container {
	c := &container{Container: rec, op: newOpLock(), removed: make(chan struct{})}
	c.out = newOutput(e.Root, rec.Config)
	c.stdin = &stdinHub{}
	c.State.LogPath = c.out.logPath()
	if c.running() {
		c.exited = make(chan struct{})
	}
	return c
}

// view returns a copy that its receiver may keep; maps and slices in it are shared and never changed in place.
func (c *container) view() Container {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.Container
	if v.State.Health != nil {
		h := *v.State.Health
		h.Log = slices.Clone(h.Log)
		v.State.Health = &h
	}
	v.State.Restarts = slices.Clone(v.State.Restarts)
	return v
}

func (c *container) running() bool {
	return c.State.Status == StatusRunning || c.State.Status == StatusPaused
}

// save writes the record; c.mu is held.
func (e *Engine) save(c *container) error {
	return e.Store.Put(kindContainer, c.Config.ID, &c.Container)
}

var nameRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

const maxNameBytes = 255

func checkName(name string) error {
	if !nameRE.MatchString(name) || len(name) > maxNameBytes {
		return errdefs.New(errdefs.ErrInvalid, "Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	return nil
}

// CreateContainer implements ContainerAPI. It reserves the name, writes the record and makes the
// container's directory; files and processes come with the start.
func (e *Engine) CreateContainer(ctx context.Context, cfg ContainerConfig) (Container, error) {
	if cfg.ID == "" {
		cfg.ID = NewID()
	}
	if cfg.Name == "" {
		cfg.Name = cfg.ID
	}
	e.expectStart() // most are started right after
	if err := e.checkContainer(cfg); err != nil {
		return Container{}, err
	}
	box, err := e.findSandbox(cfg.Sandbox)
	if err != nil {
		return Container{}, err
	}
	cfg.Sandbox = box.Config.ID
	c := e.newContainer(Container{Config: cfg, State: ContainerState{Status: StatusCreated, Created: time.Now()}})
	if cfg.Health != nil {
		c.State.Health = nil // set at start
	}
	e.mu.Lock()
	if id, taken := e.names[cfg.Name]; taken {
		e.mu.Unlock()
		return Container{}, errdefs.New(errdefs.ErrConflict, "Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+cfg.Name, id)
	}
	if e.containers[cfg.ID] != nil {
		e.mu.Unlock()
		return Container{}, errdefs.New(errdefs.ErrExists, "container %s already exists", cfg.ID)
	}
	e.names[cfg.Name] = cfg.ID
	e.containers[cfg.ID] = c
	e.ids.add(cfg.ID)
	c.op <- struct{}{} // nobody has it yet: who finds it by its name waits until it is made
	defer c.op.unlock()
	e.mu.Unlock()

	err = os.MkdirAll(e.Root.Container(cfg.ID), 0o710)
	if err == nil && cfg.Sandbox == cfg.ID {
		err = e.makePrivate(box)
	}
	if err == nil {
		c.mu.Lock()
		err = e.save(c)
		c.mu.Unlock()
	}
	if err != nil {
		c.mu.Lock()
		c.State.Status = StatusDead // for those who found it by its name
		close(c.removed)
		c.mu.Unlock()
		e.forget(c)
		_ = os.RemoveAll(e.Root.Container(cfg.ID)) // the error that counts is the first
		return Container{}, storageError("create container", err)
	}
	v := c.view()
	e.publish(v, "create")
	return v, nil
}

// gone tells whether the container is removed.
func (c *container) gone() bool {
	select {
	case <-c.removed:
		return true
	default:
		return false
	}
}

func storageError(what string, err error) error {
	if os.IsPermission(err) || errdefs.Kind(err) != nil {
		return err
	}
	if isNoSpace(err) {
		return errdefs.New(errdefs.ErrExhausted, "%s: %w", what, err)
	}
	return err
}

func isNoSpace(err error) bool {
	return errorIs(err, unix.ENOSPC) || errorIs(err, unix.EDQUOT)
}

// forget takes a container out of the indexes.
func (e *Engine) forget(c *container) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.names[c.Config.Name] == c.Config.ID {
		delete(e.names, c.Config.Name)
	}
	delete(e.containers, c.Config.ID)
	e.ids.remove(c.Config.ID)
}

// checkContainer refuses what could never start.
func (e *Engine) checkContainer(cfg ContainerConfig) error {
	if err := checkName(cfg.Name); err != nil {
		return err
	}
	if len(cfg.Args) == 0 || len(cfg.Args) == 1 && cfg.Args[0] == "" {
		return errdefs.New(errdefs.ErrInvalid, "no command specified")
	}
	if cfg.Cwd != "" && !filepath.IsAbs(cfg.Cwd) {
		return errdefs.New(errdefs.ErrInvalid, "the working directory '%s' is invalid, it needs to be an absolute path", cfg.Cwd)
	}
	for _, m := range cfg.Mounts {
		if strings.ContainsRune(m.Target+m.Source, 0) {
			return errdefs.New(errdefs.ErrInvalid, "invalid mount %q of %q: a path has no zero byte", m.Target, m.Source)
		}
		if !filepath.IsAbs(m.Target) {
			return errdefs.New(errdefs.ErrInvalid, "invalid mount target %q: must be an absolute path", m.Target)
		}
		if filepath.Clean(m.Target) == "/" {
			return errdefs.New(errdefs.ErrInvalid, "invalid mount target %q: destination can't be '/'", m.Target)
		}
	}
	if _, err := capabilities(cfg.Security, e.hostCaps); err != nil {
		return err
	}
	if cfg.StopSignal != "" {
		if _, err := ParseSignal(cfg.StopSignal); err != nil {
			return err
		}
	}
	switch cfg.Log.Driver {
	case "", LogJSONFile, LogCRI, LogNone:
	default:
		return errdefs.New(errdefs.ErrUnsupported, "log driver %q is not supported; use json-file or none", cfg.Log.Driver)
	}
	if err := logs.CheckLimits(cfg.Log.MaxBytes, cfg.Log.MaxFiles); err != nil {
		return err
	}
	switch cfg.Restart.Name {
	case "", "no", "on-failure", "always", "unless-stopped":
	default:
		return errdefs.New(errdefs.ErrInvalid, "invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'", cfg.Restart.Name)
	}
	return nil
}

// Container implements ContainerAPI.
func (e *Engine) Container(ref string) (Container, error) {
	c, err := e.find(ref)
	if err != nil {
		return Container{}, err
	}
	return c.view(), nil
}

// Containers implements ContainerAPI; newest first.
func (e *Engine) Containers() []Container {
	e.mu.RLock()
	list := make([]*container, 0, len(e.containers))
	for _, c := range e.containers {
		list = append(list, c)
	}
	e.mu.RUnlock()
	out := make([]Container, len(list))
	for i, c := range list {
		out[i] = c.view()
	}
	slices.SortFunc(out, func(a, b Container) int {
		if n := b.State.Created.Compare(a.State.Created); n != 0 {
			return n
		}
		return strings.Compare(a.Config.ID, b.Config.ID)
	})
	return out
}

// RenameContainer implements ContainerAPI.
func (e *Engine) RenameContainer(ctx context.Context, ref, name string) error {
	name = strings.TrimPrefix(name, "/")
	if name == "" {
		return errdefs.New(errdefs.ErrInvalid, "Neither old nor new names may be empty")
	}
	if err := checkName(name); err != nil {
		return err
	}
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	e.mu.Lock()
	if e.containers[c.Config.ID] != c {
		e.mu.Unlock()
		return errdefs.New(errdefs.ErrNotFound, "No such container: %s", ref)
	}
	if id, taken := e.names[name]; taken {
		e.mu.Unlock()
		if id == c.Config.ID {
			return errdefs.New(errdefs.ErrInvalid, "Renaming a container with the same name as its current name")
		}
		return errdefs.New(errdefs.ErrConflict, "Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, id)
	}
	e.names[name] = c.Config.ID
	e.mu.Unlock()

	c.mu.Lock()
	old := c.Config.Name
	c.Config.Name = name
	err = e.save(c)
	if err != nil {
		c.Config.Name = old
	}
	c.mu.Unlock()

	e.mu.Lock()
	if err != nil {
		delete(e.names, name)
	} else {
		delete(e.names, old)
	}
	e.mu.Unlock()
	if err != nil {
		return storageError("rename", err)
	}
	e.publish(c.view(), "rename", "oldName", "/"+old)
	return nil
}

// RemoveContainer implements ContainerAPI.
func (e *Engine) RemoveContainer(ctx context.Context, ref string, o RemoveOptions) error {
	c, err := e.find(ref)
	if err != nil {
		return err
	}
	if o.Force {
		c.mu.Lock()
		c.ending++
		c.mu.Unlock()
		defer func() {
			c.mu.Lock()
			c.ending--
			c.mu.Unlock()
		}()
	}
	for {
		if err := e.endForRemoval(ctx, c, o.Force); err != nil {
			return err
		}
		if err := c.op.lock(ctx); err != nil {
			return err
		}
		c.mu.Lock()
		started := c.running() // by a start that was under way when we looked
		c.mu.Unlock()
		switch {
		case o.Force && c.gone(): // its automatic removal was faster
			c.op.unlock()
			return nil
		case !started || !o.Force:
			defer c.op.unlock()
			return e.removeLocked(context.WithoutCancel(ctx), c, o.Volumes) // half a removal serves nobody
		}
		c.op.unlock()
	}
}

// endForRemoval makes sure that the container does not run, by force if allowed.
func (e *Engine) endForRemoval(ctx context.Context, c *container, force bool) error {
	c.mu.Lock()
	running, paused := c.running(), c.State.Status == StatusPaused
	restarting := c.State.Status == StatusRestarting
	name := c.Config.Name
	c.mu.Unlock()
	if !running && !restarting {
		return nil
	}
	if !force {
		switch {
		case paused:
			return errdefs.New(errdefs.ErrConflict, "cannot remove container %q: container is paused and must be unpaused first", "/"+name)
		case restarting:
			return errdefs.New(errdefs.ErrConflict, "cannot remove container %q: container is restarting: stop the container before removing or force remove", "/"+name)
		}
		return errdefs.New(errdefs.ErrConflict, "cannot remove container %q: container is running: stop the container before removing or force remove", "/"+name)
	}
	var now time.Duration
	err := e.stop(ctx, c, &now, "SIGKILL", "kill")
	if errorIs(err, errdefs.ErrNotModified) {
		return nil
	}
	return err
}

// removeLocked deletes the container and what belongs to it; its op is held and it does not run.
// Every step may find its work done already: an earlier removal may have been interrupted.
func (e *Engine) removeLocked(ctx context.Context, c *container, volumes bool) error {
	c.mu.Lock()
	if c.running() {
		c.mu.Unlock()
		return errdefs.New(errdefs.ErrConflict, "cannot remove container %q: container is running: stop the container before removing or force remove", "/"+c.Config.Name)
	}
	if c.gone() {
		c.mu.Unlock()
		return errdefs.New(errdefs.ErrNotFound, "No such container: %s", c.Config.ID)
	}
	c.cancelRestart()
	c.State.Status = StatusRemoving
	err := e.save(c)
	id, cfg := c.Config.ID, c.Config
	c.mu.Unlock()
	if err != nil && !isNoSpace(err) && !errorIs(err, errdefs.ErrExhausted) {
		return err // on a full disk removing goes on: it is what makes room
	}
	if err := e.link.delete(ctx, id); err != nil {
		return err
	}
	c.out.close()
	if err := e.unmountRootfs(id); err != nil {
		return err
	}
	if !cfg.AutoRemove {
		if err := e.removeFiles(id); err != nil {
			return err
		}
	}
	if volumes || cfg.AutoRemove {
		e.removeAnonymous(ctx, cfg)
	}
	if err := e.Store.Delete(kindContainer, id); err != nil {
		return err
	}
	e.dropExecs(id)
	e.forget(c)
	v := c.view()
	c.mu.Lock()
	close(c.removed)
	for _, w := range c.waiters {
		w.ch <- WaitResult{ExitCode: c.State.ExitCode}
	}
	c.waiters = nil
	c.mu.Unlock()
	e.publish(v, "destroy")
	if cfg.AutoRemove {
		// Behind the answer that a client waits for; what is left when we are killed now, removeStrays finds.
		e.goWork(func(context.Context) {
			if err := e.removeFiles(id); err != nil {
				e.log.Warn("files of a removed container stay until the next start", "container", id, "error", err)
			}
		})
	}
	e.releaseImage(ctx, cfg.ImageID)
	return e.removeSandboxIfEmpty(ctx, cfg.Sandbox)
}

// removeFiles deletes a container's directories.
func (e *Engine) removeFiles(id string) error {
	_ = os.RemoveAll(e.Root.Bundle(id)) // in the run directory: gone at the next reboot at the latest
	return os.RemoveAll(e.Root.Container(id))
}

// releaseImage tells the image store when the last container of an image is gone.
func (e *Engine) releaseImage(ctx context.Context, imageID string) {
	if ids, _ := e.ImageUsers(imageID); len(ids) > 0 || imageID == "" {
		return
	}
	if err := e.Images.Release(ctx, digest.Digest(imageID)); err != nil && !errorIs(err, errdefs.ErrNotFound) {
		e.log.Warn("layers of an image that was removed by force stay", "image", imageID, "error", err)
	}
}

func (e *Engine) removeAnonymous(ctx context.Context, cfg ContainerConfig) {
	for _, m := range cfg.Mounts {
		if m.Kind != MountVolume || !m.Anonymous || len(e.VolumeUsers(m.Source)) > 1 {
			continue
		}
		if err := e.Volumes.Remove(ctx, m.Source); err != nil && !errorIs(err, errdefs.ErrNotFound) {
			e.log.Warn("anonymous volume not removed", "volume", m.Source, "container", cfg.ID, "error", err)
			continue
		}
		e.Options.Events.Publish(event.Event{Type: "volume", Action: "destroy", ID: m.Source, Attributes: map[string]string{"driver": "local"}})
	}
}

// VolumeUsers returns the IDs of containers that mount a named volume.
func (e *Engine) VolumeUsers(name string) []string {
	var ids []string
	for _, c := range e.Containers() {
		for _, m := range c.Config.Mounts {
			if m.Kind == MountVolume && m.Source == name {
				ids = append(ids, c.Config.ID)
				break
			}
		}
	}
	return ids
}

// ImageUsers returns the IDs of containers made from an image and whether any of them runs.
func (e *Engine) ImageUsers(imageID string) (ids []string, running bool) {
	for _, c := range e.Containers() {
		if c.Config.ImageID != imageID {
			continue
		}
		ids = append(ids, c.Config.ID)
		running = running || c.State.Status == StatusRunning || c.State.Status == StatusPaused || c.State.Status == StatusRestarting
	}
	return ids, running
}
