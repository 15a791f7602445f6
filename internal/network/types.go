// Package network makes the node's container networks: bridges, address management, endpoints
// in network namespaces, published ports, and the sockets of the embedded resolver.
//
// Desired state comes in as plain values, netlink goes out; no helper program is executed.
// What is published and attached lives in the kernel and outlives every Berth process.
package network

import (
	"encoding/json"
	"net/netip"
	"time"
)

// Drivers of a network.
const (
	DriverBridge = "bridge"
	DriverHost   = "host" // the predefined network "host"
	DriverNull   = "null" // the predefined network "none"
)

// DefaultNetwork is the predefined bridge network.
const DefaultNetwork = "bridge"

// Config asks for a network.
type Config struct {
	Name     string
	Driver   string   // "" is bridge
	Subnets  []Subnet // empty: one is chosen from the node's address plan
	Internal bool     // no way out of the bridge
	Labels   map[string]string
	Options  map[string]string // of the driver; unknown ones are refused by name
}

// Subnet is one address range of a network.
type Subnet struct {
	Prefix  netip.Prefix
	Gateway netip.Addr            // zero: the first address
	Range   netip.Prefix          // zero: all of Prefix
	Aux     map[string]netip.Addr // never handed out
}

// Network is a network as it is.
type Network struct {
	ID      string // 64 hexadecimal digits
	Config  Config // subnets and gateways filled in
	Bridge  string // interface name; "" for host and none
	Created time.Time
}

// AttachRequest connects a sandbox's network namespace to a network.
type AttachRequest struct {
	Sandbox   string     // ID
	NetNS     string     // path of the bind-mounted network namespace
	Network   string     // ID or name
	Interface string     // name inside; "" is the first free ethN
	Address   netip.Addr // wished IPv4 address; zero: any
	MAC       string     // wished hardware address; "": derived from the address
	Aliases   []string   // names that the embedded resolver answers on this network
	Gateway   bool       // this endpoint carries the default route
}

// Endpoint is a sandbox's place on a network.
type Endpoint struct {
	Sandbox      string
	NetworkID    string
	NetNS        string       // path of the network namespace it was attached to
	Interface    string       // inside the namespace
	Peer         string       // the other end, a port of the network's bridge
	Address      netip.Prefix // with the subnet's length
	Gateway      netip.Addr
	DefaultRoute bool // the namespace's default route goes through this endpoint
	MAC          string
	Aliases      []string
}

// Port is one published port.
type Port struct {
	Protocol string     // tcp, udp, sctp
	HostIP   netip.Addr // zero or 0.0.0.0: every local address
	HostPort uint16     // 0: chosen from the ephemeral range
	Port     uint16     // inside the sandbox
}

// Sockets keeps listening sockets open across a restart of the daemon. It is implemented by
// the holder's client; keys are unique per instance.
type Sockets interface {
	// Keep duplicates the descriptors into the keeper under key, replacing what was there.
	Keep(key string, fds ...int) error
	// Take returns descriptors (owned by the caller, close-on-exec) kept under key, nil if none.
	Take(key string) ([]int, error)
	// Drop forgets key.
	Drop(key string) error
}

// Store keeps records across restarts of the daemon; state.Journal is one. Put must not wait
// for the disk: what a power cut loses, the next Restore cleans up.
type Store interface {
	Put(kind, key string, v any) error
	Delete(kind, key string) error
	Each(kind string, f func(key string, raw json.RawMessage) error) error
}

// NS says which namespaces a sandbox has of its own; the others are the node's.
type NS struct {
	Net, IPC, UTS bool
}

// Counters are one interface's, in bytes and packets since it was made.
type Counters struct {
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}
