package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// elementsPerMessage keeps a message's nested attribute below its 64 KiB.
const elementsPerMessage = 256

// tableState keeps a comparison of the whole table, under the lock, apart from changes of
// single elements, which go on beside each other under the read lock. What is desired changes
// before an element does, so that a comparison never takes away what was just added.
type tableState struct {
	mu    sync.RWMutex
	ready bool

	// One connection for all transactions: closing one makes the kernel wait until what was
	// deleted last is freed, some ten milliseconds.
	connMu sync.Mutex
	conn   *nftables.Conn
}

func (t *tableState) close() {
	t.connMu.Lock()
	defer t.connMu.Unlock()
	if t.conn != nil {
		_ = t.conn.CloseLasting() // nothing is pending on it
		t.conn = nil
	}
}

// nft runs f with the connection to the host's nftables, one f at a time. What f queued and did
// not flush is flushed. After an error the next one gets a new connection, because answers may
// be waiting in the old.
func (s *Service) nft(f func(*nftables.Conn) error) error {
	s.table.connMu.Lock()
	defer s.table.connMu.Unlock()
	if s.table.conn == nil {
		options := []nftables.ConnOption{nftables.AsLasting()}
		if s.hostNS != nil {
			options = append(options, nftables.WithNetNSFd(int(s.hostNS.Fd())))
		}
		conn, err := nftables.New(options...)
		if err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
		s.table.conn = conn
	}
	err := f(s.table.conn)
	if err == nil {
		err = s.table.conn.Flush()
	}
	if err != nil {
		_ = s.table.conn.CloseLasting() // the error that matters is err
		s.table.conn = nil
	}
	return err
}

func (s *Service) nftTable() *nftables.Table { return newTable(s.root.Name()) }

// ensureTable makes the table with its rules once; elements of everything known come with it.
func (s *Service) ensureTable(ctx context.Context) error {
	s.table.mu.RLock()
	ready := s.table.ready
	s.table.mu.RUnlock()
	if ready {
		return nil
	}
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if s.table.ready {
		return nil
	}
	if err := s.syncTable(ctx); err != nil {
		return fmt.Errorf("nftables table %s: %w", s.root.Name(), err)
	}
	s.table.ready = true
	return nil
}

// Repair compares the instance's table with what it should be and mends the difference; what
// is right stays untouched. It makes no table where nothing needs one.
func (s *Service) Repair(ctx context.Context) error {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if err := s.syncTable(ctx); err != nil {
		return fmt.Errorf("nftables table %s: %w", s.root.Name(), err)
	}
	s.table.ready = true
	return nil
}

// desired collects what the rules must know. Networks whose bridge was never made have no
// elements; an element for a bridge that vanished does no harm.
func (s *Service) desired() ruleset {
	s.mu.Lock()
	defer s.mu.Unlock()
	var r ruleset
	for _, e := range s.nets {
		if e.pool != nil && s.attached(e.ID) {
			r.bridges = append(r.bridges, e.rule())
		}
	}
	for _, ports := range s.ports {
		for _, p := range ports {
			if p.ready {
				r.ports = append(r.ports, p)
			}
		}
	}
	return r
}

// rule is the network as the rules see it. The caller holds Service.mu or bridgeMu.
func (e *entry) rule() bridgeRule {
	return bridgeRule{
		name: e.Bridge, subnet: e.pool.subnet, internal: e.Config.Internal,
		masquerade: e.options.masquerade, icc: e.options.icc,
	}
}

// syncTable makes the kernel's table equal to the desired one. The caller holds table.mu.
func (s *Service) syncTable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t := s.nftTable()
	name, err := layout(t)
	if err != nil {
		return err
	}
	want := s.desired().elements()
	return s.nft(func(conn *nftables.Conn) error { return s.mend(conn, t, name, want) })
}

// mend is syncTable's part on the connection.
func (s *Service) mend(conn *nftables.Conn, t *nftables.Table, name string, want map[string][]nftables.SetElement) error {
	intact, exists, err := s.inspectTable(conn, t, name)
	if err != nil {
		return err
	}
	if !intact {
		return replaceTable(conn, t, name, exists, want)
	}
	for setName, set := range sets(t) {
		have, err := conn.GetSetElements(set)
		if err != nil {
			return fmt.Errorf("read set %s: %w", setName, err)
		}
		add, remove := difference(have, want[setName])
		if err := change(set, remove, conn.SetDeleteElements); err != nil {
			return err
		}
		if err := change(set, add, conn.SetAddElements); err != nil {
			return err
		}
	}
	return nil
}

// inspectTable tells whether the table is there, and whether its chains are as they should be.
func (s *Service) inspectTable(conn *nftables.Conn, t *nftables.Table, name string) (intact, exists bool, err error) {
	tables, err := conn.ListTablesOfFamily(t.Family)
	if err != nil {
		return false, false, fmt.Errorf("list tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(have *nftables.Table) bool { return have.Name == t.Name }) {
		return false, false, nil
	}
	have, err := conn.GetSets(t)
	if err != nil {
		return false, true, nil // not of our making: replaced
	}
	if !slices.ContainsFunc(have, func(set *nftables.Set) bool { return set.Name == name }) {
		return false, true, nil
	}
	for _, c := range chains(t) {
		rules, err := conn.GetRules(t, c.chain)
		if err != nil || len(rules) != len(c.rules) {
			return false, true, nil
		}
	}
	return true, true, nil
}

// replaceTable puts a complete table in place of whatever there is, in one transaction.
func replaceTable(conn *nftables.Conn, t *nftables.Table, layoutName string, exists bool, want map[string][]nftables.SetElement) error {
	if exists {
		conn.DelTable(t)
	}
	conn.AddTable(t)
	for name, set := range sets(t) {
		if err := conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
		if err := change(set, want[name], conn.SetAddElements); err != nil {
			return err
		}
	}
	if err := conn.AddSet(&nftables.Set{Table: t, Name: layoutName, KeyType: nftables.TypeIPAddr}, nil); err != nil {
		return err
	}
	for _, c := range chains(t) {
		conn.AddChain(c.chain)
		for _, r := range c.rules {
			conn.AddRule(&nftables.Rule{Table: t, Chain: c.chain, Exprs: r})
		}
	}
	return nil
}

// change queues the addition or deletion of elements, in messages of bounded size.
func change(set *nftables.Set, elements []nftables.SetElement, f func(*nftables.Set, []nftables.SetElement) error) error {
	for chunk := range slices.Chunk(elements, elementsPerMessage) {
		if err := f(set, chunk); err != nil {
			return fmt.Errorf("set %s: %w", set.Name, err)
		}
	}
	return nil
}

// difference tells what to add to and remove from a set. An element with another value is both.
func difference(have, want []nftables.SetElement) (add, remove []nftables.SetElement) {
	key := func(e nftables.SetElement) string {
		end := e.KeyEnd
		if len(end) == 0 {
			end = e.Key
		}
		return string(e.Key) + string(end) + string(e.Val)
	}
	missing := map[string]nftables.SetElement{}
	for _, e := range want {
		missing[key(e)] = e
	}
	for _, e := range have {
		k := key(e)
		if _, ok := missing[k]; ok {
			delete(missing, k)
		} else {
			remove = append(remove, e)
		}
	}
	for _, e := range missing {
		add = append(add, e)
	}
	return add, remove
}

// edit runs one transaction of element changes. When the table is gone or was tampered with,
// the whole of it is made anew from what is known, which must include the change.
func (s *Service) edit(ctx context.Context, f func(conn *nftables.Conn, sets map[string]*nftables.Set) error) error {
	if err := s.ensureTable(ctx); err != nil {
		return err
	}
	s.table.mu.RLock()
	err := s.nft(func(conn *nftables.Conn) error { return f(conn, sets(s.nftTable())) })
	s.table.mu.RUnlock()
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		return s.Repair(ctx)
	}
	if err != nil {
		return fmt.Errorf("nftables table %s: %w", s.root.Name(), err)
	}
	return nil
}

func (s *Service) addBridgeRules(ctx context.Context, e *entry) error {
	b := e.rule()
	return s.edit(ctx, func(conn *nftables.Conn, sets map[string]*nftables.Set) error {
		for name, el := range b.elements() {
			if err := conn.SetAddElements(sets[name], []nftables.SetElement{el}); err != nil {
				return err
			}
		}
		return nil
	})
}

// removeBridgeRules forgets a network; only what is there is removed.
func (s *Service) removeBridgeRules(e *entry) error {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	t := s.nftTable()
	for name, el := range e.rule().elements() {
		// A single transaction would fail as a whole when one is missing.
		err := s.nft(func(conn *nftables.Conn) error {
			return conn.SetDeleteElements(sets(t)[name], []nftables.SetElement{el})
		})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("nftables table %s: set %s: %w", t.Name, name, err)
		}
	}
	return nil
}

// forwardMark is an empty set in an instance's table: an instance that is gone by now had made
// the host a router; the last instance to go undoes it.
const forwardMark = "forwarding_was_off"

// dropTable removes the table. routerOff tells whether forwarding is to be switched off now:
// it was off before the first of the instances, and this is the last. Whoever is not the last
// leaves that to another.
func (s *Service) dropTable(wasOff bool) (routerOff bool, err error) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	s.table.ready = false
	err = s.nft(func(conn *nftables.Conn) error {
		routerOff, err = s.dropTableOn(conn, wasOff)
		return err
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("nftables table %s: %w", s.root.Name(), err)
	}
	return routerOff, nil
}

func (s *Service) dropTableOn(conn *nftables.Conn, wasOff bool) (routerOff bool, err error) {
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	var other *nftables.Table
	for _, t := range tables {
		if t.Name == s.root.Name() {
			_, err := conn.GetSetByName(t, forwardMark)
			wasOff = wasOff || err == nil
			conn.DelTable(t)
		} else if t.Name == "berth" || strings.HasPrefix(t.Name, "berth-") && t.Name != resolverTable {
			other = t
		}
	}
	if wasOff && other != nil {
		if err := conn.AddSet(&nftables.Set{Table: other, Name: forwardMark, KeyType: nftables.TypeIPAddr}, nil); err != nil {
			return false, err
		}
	}
	return wasOff && other == nil, nil
}
