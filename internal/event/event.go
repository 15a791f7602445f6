// Package event is the node's stream of things that happened: one hub, a bounded history,
// and subscribers that can never slow a publisher down.
package event

import (
	"context"
	"sync"
	"time"
)

// Limits of a hub.
const (
	HistoryEvents    = 1024 // kept for late subscribers (docker events --since)
	SubscriberEvents = 4096 // queued per subscriber before it is cut off
)

// Event is one thing that happened to one object.
type Event struct {
	Type       string            // container, sandbox, image, network, volume, daemon
	Action     string            // docker's verbs: create, start, die, oom, health_status: healthy, …
	ID         string            // of the object
	Attributes map[string]string // never changed after publishing
	Time       time.Time
}

// Hub distributes events. The zero value is not usable; call NewHub.
// All methods are safe for concurrent use.
type Hub struct {
	mu      sync.Mutex
	history []Event // ring
	next    int
	subs    map[*Subscription]struct{}
}

// Subscription receives events until its context ends or it falls behind.
type Subscription struct {
	// C is closed when the subscription ends. Lagged tells why.
	C      <-chan Event
	c      chan Event
	hub    *Hub
	lagged bool
	closed bool
}

// NewHub returns an empty hub.
func NewHub() *Hub { return &Hub{subs: map[*Subscription]struct{}{}} }

// Publish records e and hands it to all subscribers. It never blocks: a subscriber whose
// queue is full is cut off and can see so with Lagged. A zero Time becomes now.
func (h *Hub) Publish(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.history) < HistoryEvents {
		h.history = append(h.history, e)
	} else {
		h.history[h.next] = e
		h.next = (h.next + 1) % HistoryEvents
	}
	for s := range h.subs {
		select {
		case s.c <- e:
		default:
			s.lagged = true
			h.closeLocked(s)
		}
	}
}

// Subscribe returns past events with Time after since (none for a zero since) and a live
// subscription that begins right behind them. It ends when ctx does.
func (h *Hub) Subscribe(ctx context.Context, since time.Time) ([]Event, *Subscription) {
	s := &Subscription{c: make(chan Event, SubscriberEvents), hub: h}
	s.C = s.c
	h.mu.Lock()
	var past []Event
	if !since.IsZero() {
		for i := range h.history {
			e := h.history[(h.next+i)%len(h.history)]
			if e.Time.After(since) {
				past = append(past, e)
			}
		}
	}
	h.subs[s] = struct{}{}
	h.mu.Unlock()
	context.AfterFunc(ctx, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.closeLocked(s)
	})
	return past, s
}

func (h *Hub) closeLocked(s *Subscription) {
	if s.closed {
		return
	}
	s.closed = true
	delete(h.subs, s)
	close(s.c)
}

// Lagged tells whether the subscription ended because its reader was too slow.
func (s *Subscription) Lagged() bool {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	return s.lagged
}
