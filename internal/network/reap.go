package network

import (
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Deleting an interface or a network namespace takes the kernel tens of milliseconds, much of it
// under the lock that making one needs too; deleting many at once takes it hardly longer. So
// what is to go is collected while sandboxes are being made, and goes at a quiet moment.
const (
	reapQuiet = 250 * time.Millisecond // without a new sandbox
	reapAge   = 5 * time.Second        // and at the latest so long after it was asked for
	reapBatch = 64                     // or when so many wait
	reapQueue = 1024                   // beyond it callers wait for the reaper
)

// remains is what is left of a sandbox: one of its parts.
type remains struct {
	peer  string // interface to delete
	nsDir string // directory of namespaces to unmount
	done  func() // called afterwards
}

// reaper deletes what is left of sandboxes, behind the answers.
type reaper struct {
	queue  chan remains
	kick   chan chan struct{} // asks for all that is queued, now; closed when done
	stop   chan struct{}
	ended  chan struct{}
	once   sync.Once
	active atomic.Int64 // when a sandbox was last worked on, in nanoseconds since the epoch
}

func newReaper() *reaper {
	return &reaper{
		queue: make(chan remains, reapQueue), kick: make(chan chan struct{}),
		stop: make(chan struct{}), ended: make(chan struct{}),
	}
}

// touch notes that a sandbox is being made.
func (r *reaper) touch() { r.active.Store(time.Now().UnixNano()) }

// reap hands remains to the reaper; after the service was closed it does the work itself.
func (s *Service) reap(r remains) {
	select {
	case <-s.reaper.stop:
		s.bury([]remains{r})
		return
	default:
	}
	select {
	case s.reaper.queue <- r:
	case <-s.reaper.ended:
		s.bury([]remains{r})
	}
}

// reapNow asks for everything that was handed in before, and returns what is closed when it
// is gone.
func (s *Service) reapNow() <-chan struct{} {
	done := make(chan struct{})
	select {
	case s.reaper.kick <- done:
		return done
	case <-s.reaper.ended:
		return s.reaper.ended
	}
}

// runReaper is the reaper's goroutine.
func (s *Service) runReaper() {
	r := s.reaper
	defer close(r.ended)
	var batch []remains
	var oldest time.Time
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	flush := func() {
		for more := true; more; {
			select {
			case x := <-r.queue:
				batch = append(batch, x)
			default:
				more = false
			}
		}
		s.bury(batch)
		batch = nil
	}
	for {
		select {
		case x := <-r.queue:
			if len(batch) == 0 {
				oldest = time.Now()
			}
			batch = append(batch, x)
		case done := <-r.kick:
			flush()
			close(done)
		case <-timer.C:
		case <-r.stop:
			flush()
			return
		}
		if len(batch) == 0 {
			continue
		}
		quiet := time.Since(time.Unix(0, r.active.Load()))
		if len(batch) >= reapBatch || quiet >= reapQuiet || time.Since(oldest) >= reapAge {
			flush()
			continue
		}
		timer.Reset(reapQuiet - quiet)
	}
}

// closeReaper ends the goroutine after its last batch.
func (s *Service) closeReaper() {
	s.reaper.once.Do(func() { close(s.reaper.stop) })
	<-s.reaper.ended
	// What slipped in while it ended.
	for {
		select {
		case x := <-s.reaper.queue:
			s.bury([]remains{x})
		default:
			return
		}
	}
}

// bury deletes all of a batch. What fails is logged: the next Restore tries again.
func (s *Service) bury(batch []remains) {
	if len(batch) == 0 {
		return
	}
	if err := s.deleteLinks(batch); err != nil {
		s.log.Warn("delete interfaces", "error", err)
	}
	for _, r := range batch {
		if r.nsDir != "" {
			if err := unmountNamespaces(r.nsDir); err != nil {
				s.log.Warn("remove namespaces", "directory", r.nsDir, "error", err)
			}
		}
		if r.done != nil {
			r.done()
		}
	}
}

// deleteLinks deletes interfaces in one step: it puts them in a group that no other has.
func (s *Service) deleteLinks(batch []remains) error {
	var errs []error
	var links []netlink.Link
	for _, r := range batch {
		if r.peer == "" {
			continue
		}
		link, err := s.host.LinkByName(r.peer)
		if err == nil {
			links = append(links, link)
		} else {
			errs = append(errs, ignoreNoLink(err))
		}
	}
	if len(links) == 1 {
		return errors.Join(append(errs, ignoreNoLink(s.host.LinkDel(links[0])))...)
	}
	if len(links) == 0 {
		return errors.Join(errs...)
	}
	group := s.graveGroup()
	for _, link := range links {
		errs = append(errs, ignoreNoLink(s.host.LinkSetGroup(link, int(group))))
	}
	err := s.inHost(func() error {
		req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
		_, err := req.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		errs = append(errs, fmt.Errorf("delete group %#x: %w", group, err))
	}
	return errors.Join(errs...)
}

// graveGroup is the instance's group of interfaces about to be deleted. Groups that people make
// have small numbers.
func (s *Service) graveGroup() uint32 {
	h := fnv.New32a()
	h.Write([]byte(s.root.State))
	return 1<<30 | h.Sum32()>>3
}
