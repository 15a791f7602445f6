package network

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
	"berth/internal/event"
	"berth/internal/state"
)

// Kinds of record in the Store.
const (
	kindNetwork  = "network"      // networkRecord by network ID
	kindEndpoint = "endpoint"     // Endpoint by sandbox/network
	kindPorts    = "ports"        // []publishedPort by sandbox
	kindPlan     = "address-plan" // planRecord by planKey
	planKey      = "node"
)

// Options make a Service.
type Options struct {
	Root    state.Root
	Store   Store
	Sockets Sockets    // nil: sockets live as long as this process
	Events  *event.Hub // nil: nobody is told
	// HostNS is the path of the network namespace that bridges and published ports are in;
	// "" is the process's own. Tests have several "hosts" in one process.
	HostNS string
	// Describe names a sandbox in messages about conflicts: container "web". Nil: its ID. It is
	// called without locks held.
	Describe func(sandbox string) string
	Log      *slog.Logger // nil: slog.Default
}

// Service makes the networks of one instance. All methods are safe for concurrent use; work on
// different networks and sandboxes goes on in parallel. Close it at the end of the process:
// what it made in the kernel stays.
type Service struct {
	root     state.Root
	store    Store
	sockets  Sockets
	events   *event.Hub
	describe func(string) string
	log      *slog.Logger
	hostNS   *os.File // nil: the process's own
	host     *netlink.Handle

	mu        sync.Mutex
	plan      planRecord
	nets      map[string]*entry
	byName    map[string]*entry
	endpoints map[string]map[string]*endpoint // by sandbox and network ID
	draining  map[drainKey]chan struct{}      // addresses whose interface is being deleted
	ports     map[string][]*publishedPort     // by sandbox
	hostPorts map[hostPort][]*publishedPort   // by protocol and port; several addresses

	table  tableState
	reaper *reaper
	nsDir  struct {
		mu    sync.Mutex
		ready bool
	}
}

// entry is a network with what is known of its bridge.
type entry struct {
	Network
	auto    bool // the subnet was chosen by the address plan
	options driverOptions
	pool    *pool // guarded by Service.mu; nil for host and none

	// Guarded by Service.mu.
	pending  int // attaches on their way
	removing bool

	// bridgeMu serialises making and removing the bridge; up and index belong to it.
	bridgeMu sync.Mutex
	up       bool
	index    int
}

// endpoint is an Endpoint that may still be on its way.
type endpoint struct {
	Endpoint
	ready bool
	done  chan struct{} // closed when it is ready or gone
}

type drainKey struct {
	network string
	addr    netip.Addr
}

type networkRecord struct {
	Network Network
	Auto    bool
}

type planRecord struct {
	Base netip.Prefix // the instance's /16
	// Forward is what net.ipv4.ip_forward was before this instance set it; "" when it did not.
	Forward string
}

// Open reads the records and makes the predefined networks when they are missing. It does not
// touch the kernel: Restore does.
func Open(ctx context.Context, o Options) (*Service, error) {
	s := &Service{
		root: o.Root, store: o.Store, sockets: o.Sockets, events: o.Events, describe: o.Describe, log: o.Log,
		nets: map[string]*entry{}, byName: map[string]*entry{}, endpoints: map[string]map[string]*endpoint{},
		draining: map[drainKey]chan struct{}{}, ports: map[string][]*publishedPort{}, hostPorts: map[hostPort][]*publishedPort{},
		reaper: newReaper(),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.describe == nil {
		s.describe = func(sandbox string) string { return "sandbox " + shortID(sandbox) }
	}
	ns := netns.None()
	if o.HostNS != "" {
		f, err := openNetNS(o.HostNS)
		if err != nil {
			return nil, fmt.Errorf("open networks: %w", err)
		}
		s.hostNS, ns = f, netns.NsHandle(f.Fd())
	}
	var err error
	if s.host, err = netlink.NewHandleAt(ns, unix.NETLINK_ROUTE); err != nil {
		s.closeFiles()
		return nil, fmt.Errorf("open networks: netlink: %w", err)
	}
	if err := errors.Join(s.load(), ctx.Err()); err != nil {
		s.closeFiles()
		return nil, fmt.Errorf("open networks: %w", err)
	}
	if err := s.ensurePredefined(); err != nil {
		s.closeFiles()
		return nil, fmt.Errorf("open networks: %w", err)
	}
	go s.runReaper()
	return s, nil
}

// Close waits for the work behind answers and frees the process's resources. What is in the
// kernel stays as it is.
func (s *Service) Close() {
	s.closeReaper()
	s.table.close()
	s.mu.Lock()
	for _, ports := range s.ports {
		for _, p := range ports {
			p.closeSocket()
		}
	}
	s.mu.Unlock()
	s.closeFiles()
}

func (s *Service) closeFiles() {
	if s.host != nil {
		s.host.Close()
	}
	if s.hostNS != nil {
		s.hostNS.Close()
	}
}

// load fills the maps from the store.
func (s *Service) load() error {
	err := s.store.Each(kindPlan, func(_ string, raw json.RawMessage) error { return json.Unmarshal(raw, &s.plan) })
	if err != nil {
		return fmt.Errorf("read the address plan: %w", err)
	}
	err = s.store.Each(kindNetwork, func(key string, raw json.RawMessage) error {
		var r networkRecord
		if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("network %s: %w", key, err)
		}
		e, err := newEntry(r.Network, r.Auto)
		if err != nil {
			return fmt.Errorf("network %s: %w", key, err)
		}
		s.nets[e.ID], s.byName[e.Config.Name] = e, e
		return nil
	})
	if err != nil {
		return err
	}
	err = s.store.Each(kindEndpoint, func(key string, raw json.RawMessage) error {
		ep := &endpoint{ready: true, done: closedChan()}
		if err := json.Unmarshal(raw, &ep.Endpoint); err != nil {
			return fmt.Errorf("endpoint %s: %w", key, err)
		}
		e := s.nets[ep.NetworkID]
		if e == nil || e.pool == nil || e.pool.claim(ep.Address.Addr()) != nil {
			s.log.Warn("an endpoint's record fits no network; it is dropped", "sandbox", ep.Sandbox, "network", ep.NetworkID)
			return s.store.Delete(kindEndpoint, key)
		}
		s.addEndpoint(ep)
		return nil
	})
	if err != nil {
		return err
	}
	for _, e := range s.nets {
		if e.pool != nil {
			e.pool.resume()
		}
	}
	return s.store.Each(kindPorts, func(key string, raw json.RawMessage) error {
		var ports []*publishedPort
		if err := json.Unmarshal(raw, &ports); err != nil {
			return fmt.Errorf("ports of sandbox %s: %w", key, err)
		}
		for _, p := range ports {
			p.fd, p.ready, p.kept = -1, true, s.sockets != nil
			s.addPort(p)
		}
		return nil
	})
}

func newEntry(n Network, auto bool) (*entry, error) {
	e := &entry{Network: n, auto: auto}
	if n.Config.Driver != DriverBridge {
		return e, nil
	}
	options := n.Config.clone().Options
	delete(options, OptionDefaultBridge)
	var err error
	if e.options, err = parseOptions(options); err != nil {
		return nil, err
	}
	if len(n.Config.Subnets) != 1 {
		return nil, errdefs.New(errdefs.ErrDataLoss, "%d subnets on record, want one", len(n.Config.Subnets))
	}
	e.pool = newPool(n.Config.Subnets[0])
	return e, nil
}

// ensurePredefined makes the networks that every node has.
func (s *Service) ensurePredefined() error {
	if s.byName[DefaultNetwork] == nil {
		base, err := s.newBase()
		if err != nil {
			return err
		}
		s.plan.Base = base
		if err := s.store.Put(kindPlan, planKey, s.plan); err != nil {
			return err
		}
		id := randomHex(32)
		name := bridgeName(s.root.Tag(), id, true)
		subnet := Subnet{Prefix: defaultSubnet(base)}
		if err := checkSubnet(&subnet); err != nil {
			return err
		}
		c := Config{Name: DefaultNetwork, Driver: DriverBridge, Subnets: []Subnet{subnet}, Options: map[string]string{
			OptionDefaultBridge: "true", OptionICC: "true", OptionMasquerade: "true",
			OptionHostBinding: "0.0.0.0", OptionBridgeName: name, OptionMTU: fmt.Sprint(defaultMTU),
		}}
		if err := s.record(Network{ID: id, Config: c, Bridge: name, Created: time.Now().UTC()}, true); err != nil {
			return err
		}
	}
	for name, driver := range map[string]string{"host": DriverHost, "none": DriverNull} {
		if s.byName[name] == nil {
			n := Network{ID: randomHex(32), Config: Config{Name: name, Driver: driver}, Created: time.Now().UTC()}
			if err := s.record(n, false); err != nil {
				return err
			}
		}
	}
	return nil
}

// record keeps a new network. Only Open calls it: it takes no lock.
func (s *Service) record(n Network, auto bool) error {
	e, err := newEntry(n, auto)
	if err != nil {
		return err
	}
	s.nets[n.ID], s.byName[n.Config.Name] = e, e
	return s.store.Put(kindNetwork, n.ID, networkRecord{Network: n, Auto: auto})
}

// newBase chooses the instance's /16. When routes of the host leave none free, the first that
// overlaps no address of the host must do: longer routes win over them.
func (s *Service) newBase() (netip.Prefix, error) {
	taken, addrs, err := s.hostPrefixes()
	if err != nil {
		return netip.Prefix{}, err
	}
	order := planOrder(s.root.State)
	if base, ok := chooseBase(order, taken); ok {
		return base, nil
	}
	if base, ok := chooseBase(order, addrs); ok {
		s.log.Warn("the host has routes for all private addresses; container networks use some of them", "range", base)
		return base, nil
	}
	return netip.Prefix{}, errdefs.New(errdefs.ErrExhausted, "no private IPv4 range is free on this host for container networks")
}

// Create makes a network. Its bridge is made when the first sandbox is attached.
func (s *Service) Create(ctx context.Context, c Config) (Network, error) {
	c = c.clone()
	if err := checkConfig(&c); err != nil {
		return Network{}, err
	}
	options, err := parseOptions(c.Options)
	if err != nil {
		return Network{}, err
	}
	auto := len(c.Subnets) == 0 || !c.Subnets[0].Prefix.IsValid()
	var taken []netip.Prefix
	if auto {
		if taken, _, err = s.hostPrefixes(); err != nil {
			return Network{}, fmt.Errorf("create network %s: %w", c.Name, err)
		}
	}
	n := Network{ID: randomHex(32), Config: c, Bridge: options.bridge, Created: time.Now().UTC()}
	if n.Bridge == "" {
		n.Bridge = bridgeName(s.root.Tag(), n.ID, false)
	}
	if err := s.mayMake(n); err != nil {
		return Network{}, err
	}
	s.mu.Lock()
	e, err := s.insert(n, auto, taken)
	s.mu.Unlock()
	if err != nil {
		return Network{}, err
	}
	if err := errors.Join(s.store.Put(kindNetwork, e.ID, networkRecord{Network: e.Network, Auto: auto}), ctx.Err()); err != nil {
		s.mu.Lock()
		s.forget(e)
		s.mu.Unlock()
		return Network{}, errors.Join(fmt.Errorf("create network %s: %w", c.Name, err), s.store.Delete(kindNetwork, e.ID))
	}
	s.publish(e, "create")
	return e.clone(), nil
}

// mayMake refuses a bridge whose name an interface of somebody else's has.
func (s *Service) mayMake(n Network) error {
	link, err := s.host.LinkByName(n.Bridge)
	switch {
	case isNoLink(err):
		return nil
	case err != nil:
		return fmt.Errorf("network %s: %w", n.Config.Name, err)
	case link.Type() != "bridge" || link.Attrs().Alias != s.alias():
		return errdefs.New(errdefs.ErrConflict, "network %s: there is an interface %s already that is not its bridge", n.Config.Name, n.Bridge)
	}
	return nil
}

// insert adds a network that conflicts with no other. The caller holds mu.
func (s *Service) insert(n Network, auto bool, hostTaken []netip.Prefix) (*entry, error) {
	if s.byName[n.Config.Name] != nil {
		return nil, errdefs.New(errdefs.ErrConflict, "network with name %s already exists", n.Config.Name)
	}
	if len(s.nets) >= maxNetworks {
		return nil, errdefs.New(errdefs.ErrExhausted, "network %s: there are %d networks already, the most a node takes", n.Config.Name, maxNetworks)
	}
	for _, other := range s.nets {
		if other.Bridge != "" && other.Bridge == n.Bridge {
			return nil, errdefs.New(errdefs.ErrConflict, "network %s: conflicts with network %s: networks have same bridge name", n.Config.Name, other.Config.Name)
		}
	}
	own := s.ownSubnets(nil)
	if auto {
		p, ok := chooseSubnet(s.plan.Base, planOrder(s.root.State), append(own, hostTaken...))
		if !ok {
			return nil, errdefs.New(errdefs.ErrExhausted, "network %s: all predefined address pools have been fully subnetted; choose a subnet with --subnet", n.Config.Name)
		}
		subnet := Subnet{Prefix: p}
		if err := checkSubnet(&subnet); err != nil {
			return nil, err
		}
		n.Config.Subnets = []Subnet{subnet}
	} else if overlapsAny(n.Config.Subnets[0].Prefix, own) {
		return nil, errdefs.New(errdefs.ErrForbidden, "invalid pool request: Pool overlaps with other one on this address space")
	}
	e, err := newEntry(n, auto)
	if err != nil {
		return nil, err
	}
	s.nets[e.ID], s.byName[e.Config.Name] = e, e
	return e, nil
}

// ownSubnets lists the subnets of all networks but one. The caller holds mu.
func (s *Service) ownSubnets(but *entry) []netip.Prefix {
	var own []netip.Prefix
	for _, e := range s.nets {
		if e != but && e.pool != nil {
			own = append(own, e.pool.subnet)
		}
	}
	return own
}

func (s *Service) forget(e *entry) {
	delete(s.nets, e.ID)
	delete(s.byName, e.Config.Name)
}

// Get finds a network by ID, name or unambiguous beginning of an ID.
func (s *Service) Get(ref string) (Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.find(ref)
	if err != nil {
		return Network{}, err
	}
	return e.clone(), nil
}

func (s *Service) find(ref string) (*entry, error) {
	if e := s.nets[ref]; e != nil {
		return e, nil
	}
	if e := s.byName[ref]; e != nil {
		return e, nil
	}
	var found []*entry
	if ref != "" {
		for id, e := range s.nets {
			if strings.HasPrefix(id, ref) {
				found = append(found, e)
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, errdefs.New(errdefs.ErrNotFound, "network %s not found", ref)
	case 1:
		return found[0], nil
	default:
		return nil, errdefs.New(errdefs.ErrInvalid, "network %s is ambiguous (%d matches found on ID prefix)", ref, len(found))
	}
}

// List returns all networks, oldest first.
func (s *Service) List() []Network {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Network, 0, len(s.nets))
	for _, e := range s.nets {
		list = append(list, e.clone())
	}
	slices.SortFunc(list, func(a, b Network) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	return list
}

// Remove removes a network and its bridge. ErrConflict while something is attached,
// ErrForbidden for the predefined ones.
func (s *Service) Remove(ctx context.Context, ref string) error {
	s.mu.Lock()
	e, err := s.find(ref)
	if err == nil {
		err = s.removable(e)
	}
	if err == nil {
		e.removing = true
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	err = ctx.Err()
	if err == nil {
		err = s.removeBridge(e)
	}
	if err == nil {
		err = s.store.Delete(kindNetwork, e.ID)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		e.removing = false
		return fmt.Errorf("remove network %s: %w", e.Config.Name, err)
	}
	s.forget(e)
	s.publish(e, "destroy")
	return nil
}

func (s *Service) removable(e *entry) error {
	switch {
	case predefined(e.Config):
		return errdefs.New(errdefs.ErrForbidden, "%s is a pre-defined network and cannot be removed", e.Config.Name)
	case e.removing:
		return errdefs.New(errdefs.ErrConflict, "network %s is being removed already", e.Config.Name)
	case e.pending > 0 || s.attached(e.ID):
		return errdefs.New(errdefs.ErrConflict, "error while removing network: network %s id %s has active endpoints", e.Config.Name, e.ID)
	}
	return nil
}

func predefined(c Config) bool {
	return c.Driver != DriverBridge || c.Options[OptionDefaultBridge] == "true"
}

func (s *Service) attached(networkID string) bool {
	for _, eps := range s.endpoints {
		if eps[networkID] != nil {
			return true
		}
	}
	return false
}

// publish tells the hub that a network was made or removed. Who came and went on one is the
// engine's to tell: it knows containers.
func (s *Service) publish(e *entry, action string) {
	if s.events == nil {
		return
	}
	attributes := map[string]string{"name": e.Config.Name, "type": e.Config.Driver}
	s.events.Publish(event.Event{Type: "network", Action: action, ID: e.ID, Attributes: attributes})
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func shortID(id string) string { return id[:min(12, len(id))] }

func closedChan() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}
