package image

import (
	"sync"
	"time"
)

// progressInterval is the least time between two reports of the same running action.
const progressInterval = 100 * time.Millisecond

// say reports a statement; a nil Progress takes none.
func (p Progress) say(id, action string) {
	if p != nil {
		p(Status{ID: id, Action: action})
	}
}

// meter reports the bytes of one running action, not more often than people can read.
type meter struct {
	p      Progress
	id     string
	action string
	total  int64

	mu   sync.Mutex
	last time.Time
}

func (p Progress) meter(id, action string, total int64) *meter {
	return &meter{p: p, id: id, action: action, total: total}
}

// at reports that current bytes of the total are done. The last byte is always reported.
func (m *meter) at(current int64) {
	if m.p == nil {
		return
	}
	m.mu.Lock()
	now := time.Now()
	due := now.Sub(m.last) >= progressInterval || current == m.total
	if due {
		m.last = now
	}
	m.mu.Unlock()
	if due {
		m.p(Status{ID: m.id, Action: m.action, Current: current, Total: m.total})
	}
}
