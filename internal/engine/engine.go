package engine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"berth/internal/cgroup"
	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/state"
)

// Journal kinds of the engine's records.
const (
	kindContainer = "container"
	kindSandbox   = "sandbox"
)

// Limits of the engine.
const (
	maxExecsPerContainer = 1024
	parallelRestores     = 4
	runnerWait           = 10 * time.Second // how long an operation waits for a lost runner
)

// Options are what an Engine is made of. Everything is required but Logger.
type Options struct {
	Root       state.Root
	Store      Store
	DialRunner func(ctx context.Context) (Runner, error)
	Images     Images
	Networks   Networks
	Volumes    Volumes
	Resolvers  Resolvers
	Events     *event.Hub
	InitPath   string // berth-init on the host
	Logger     *slog.Logger
}

// Engine implements API. Make one with Open, then call Run.
type Engine struct {
	Options
	log      *slog.Logger
	hostCaps []string
	cgroups  cgroup.Systems
	link     *link
	ctx      context.Context // of Run; ends background work
	cancel   context.CancelFunc
	work     sync.WaitGroup
	workMu   sync.Mutex  // orders work.Add before the end of ctx
	draining atomic.Bool // the instance is going down: nothing is restarted
	warming  atomic.Bool // expectStart is at work, and has the warmer
	warmer   cgroup.Warmer

	mu         sync.RWMutex
	containers map[string]*container
	sandboxes  map[string]*sandbox
	names      map[string]string // container name → ID
	boxNames   map[string]string // sandbox name → ID
	execs      map[string]*execution
	ids        idIndex
}

// Open loads the records of the instance. Nothing is started before Run.
func Open(o Options) (*Engine, error) {
	caps, err := hostCapabilities()
	if err != nil {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	groups, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	e := &Engine{
		Options: o, log: o.Logger, hostCaps: caps, cgroups: groups,
		containers: map[string]*container{}, sandboxes: map[string]*sandbox{},
		names: map[string]string{}, boxNames: map[string]string{}, execs: map[string]*execution{},
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.link = newLink(e)
	for _, d := range []string{o.Root.Containers(), filepath.Join(o.Root.Run, "bundles"), filepath.Join(o.Root.Run, "ns")} {
		if err := os.MkdirAll(d, 0o710); err != nil {
			return nil, err
		}
	}
	if err := e.load(); err != nil {
		return nil, err
	}
	return e, nil
}

func (e *Engine) load() error {
	err := e.Store.Each(kindSandbox, func(key string, raw json.RawMessage) error {
		var s Sandbox
		if err := json.Unmarshal(raw, &s); err != nil {
			return fmt.Errorf("record of sandbox %s: %w", key, err)
		}
		b := &sandbox{Sandbox: s, op: newOpLock()}
		e.sandboxes[key] = b
		e.boxNames[s.Config.Name] = key
		return nil
	})
	if err != nil {
		return err
	}
	return e.Store.Each(kindContainer, func(key string, raw json.RawMessage) error {
		var c Container
		if err := json.Unmarshal(raw, &c); err != nil {
			return fmt.Errorf("record of container %s: %w", key, err)
		}
		e.containers[key] = e.newContainer(c)
		e.names[c.Config.Name] = key
		e.ids.add(key)
		return nil
	})
}

// Events is the node's event hub.
func (e *Engine) Events() *event.Hub { return e.Options.Events }

// Run connects to the runner, adopts what runs, resumes restart policies and health checks,
// and serves until ctx ends. ready is called once everything that ran is adopted.
// When it returns, containers run on.
func (e *Engine) Run(ctx context.Context, ready func()) error {
	defer e.work.Wait()
	defer e.cancel()
	stop := context.AfterFunc(ctx, func() {
		e.workMu.Lock()
		defer e.workMu.Unlock()
		e.cancel()
	})
	defer stop()
	return e.link.run(e.ctx, ready)
}

// goWork runs f in a goroutine that Run waits for.
func (e *Engine) goWork(f func(ctx context.Context)) {
	e.workMu.Lock()
	defer e.workMu.Unlock()
	if e.ctx.Err() != nil {
		return // the next daemon does it
	}
	e.work.Add(1)
	go func() {
		defer e.work.Done()
		f(e.ctx)
	}()
}

// NewID returns 64 random hexadecimal digits, never all decimal in the first 12.
func NewID() string {
	for {
		var b [32]byte
		_, _ = rand.Read(b[:]) // never fails since Go 1.24
		id := hex.EncodeToString(b[:])
		if strings.ContainsAny(id[:12], "abcdef") {
			return id
		}
	}
}

func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// idIndex finds IDs by prefix in a sorted slice. It is guarded by Engine.mu.
type idIndex struct{ sorted []string }

func (x *idIndex) add(id string) {
	i := sort.SearchStrings(x.sorted, id)
	if i < len(x.sorted) && x.sorted[i] == id {
		return
	}
	x.sorted = append(x.sorted, "")
	copy(x.sorted[i+1:], x.sorted[i:])
	x.sorted[i] = id
}

func (x *idIndex) remove(id string) {
	if i := sort.SearchStrings(x.sorted, id); i < len(x.sorted) && x.sorted[i] == id {
		x.sorted = append(x.sorted[:i], x.sorted[i+1:]...)
	}
}

// find returns the only ID with the prefix; n tells how many there are (2 for several).
func (x *idIndex) find(prefix string) (id string, n int) {
	i := sort.SearchStrings(x.sorted, prefix)
	if i == len(x.sorted) || !strings.HasPrefix(x.sorted[i], prefix) {
		return "", 0
	}
	if i+1 < len(x.sorted) && strings.HasPrefix(x.sorted[i+1], prefix) {
		return "", 2
	}
	return x.sorted[i], 1
}

// find returns a container by ID, name or unambiguous ID prefix.
func (e *Engine) find(ref string) (*container, error) {
	ref = strings.TrimPrefix(ref, "/")
	e.mu.RLock()
	defer e.mu.RUnlock()
	if ref == "" {
		return nil, errdefs.New(errdefs.ErrInvalid, "no container was named")
	}
	if c := e.containers[ref]; c != nil {
		return c, nil
	}
	if id, ok := e.names[ref]; ok {
		return e.containers[id], nil
	}
	switch id, n := e.ids.find(ref); n {
	case 1:
		return e.containers[id], nil
	case 2:
		return nil, errdefs.New(errdefs.ErrInvalid, "multiple IDs found with provided prefix: %s", ref)
	}
	return nil, errdefs.New(errdefs.ErrNotFound, "No such container: %s", ref)
}

func (e *Engine) findSandbox(ref string) (*sandbox, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if b := e.sandboxes[ref]; b != nil {
		return b, nil
	}
	if id, ok := e.boxNames[ref]; ok {
		return e.sandboxes[id], nil
	}
	var found *sandbox
	for id, b := range e.sandboxes {
		if ref != "" && strings.HasPrefix(id, ref) {
			if found != nil {
				return nil, errdefs.New(errdefs.ErrInvalid, "multiple IDs found with provided prefix: %s", ref)
			}
			found = b
		}
	}
	if found == nil {
		return nil, errdefs.New(errdefs.ErrNotFound, "No such sandbox: %s", ref)
	}
	return found, nil
}

// publish tells the event hub about a container.
func (e *Engine) publish(c Container, action string, more ...string) {
	attrs := map[string]string{"name": c.Config.Name, "image": c.Config.Image}
	for k, v := range c.Config.Labels {
		attrs[k] = v
	}
	for i := 0; i+1 < len(more); i += 2 {
		attrs[more[i]] = more[i+1]
	}
	e.Options.Events.Publish(event.Event{Type: "container", Action: action, ID: c.Config.ID, Attributes: attrs})
}

// opLock serialises the operations on one object; unlike a mutex, waiting for it can be given up.
type opLock chan struct{}

func newOpLock() opLock { return make(opLock, 1) }

func (l opLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errdefs.New(errdefs.ErrUnavailable, "waiting for another operation on the same object: %w", ctx.Err())
	}
}

func (l opLock) unlock() { <-l }
