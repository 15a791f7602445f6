package dockerapi

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/jsonstream"

	"berth/internal/image"
)

// Limits of a progress stream.
const (
	maxPendingMessages = 8192                   // waiting for a slow client; beyond it, byte counts are dropped
	progressInterval   = 100 * time.Millisecond // between two looks at moving byte counts
)

// progressMessage is one line of docker's JSON progress streams: the current shape and the two
// fields that the API deprecated in 1.48 but that clients other than docker's own still print.
type progressMessage struct {
	jsonstream.Message
	ProgressText string `json:"progress,omitempty"`
	ErrorText    string `json:"error,omitempty"`
}

// progressStream carries the reports of a transfer to an HTTP client. Reports may come from
// several goroutines and never wait for the client: counts of one layer that were not sent yet
// are replaced by newer ones. The response begins with the first report; until then a failure
// can still become an HTTP status.
type progressStream struct {
	w     http.ResponseWriter
	began bool // response header sent; only touched by run's goroutine

	mu      sync.Mutex
	pending []progressMessage
	slot    map[string]int // ID and action → index in pending of a count that may be replaced
	urgent  chan struct{}  // holds a token when something other than a count waits
}

func newProgressStream(w http.ResponseWriter) *progressStream {
	return &progressStream{w: w, slot: map[string]int{}, urgent: make(chan struct{}, 1)}
}

// report queues one status. It is an image.Progress.
func (s *progressStream) report(status image.Status) {
	moving := status.Current > 0 || status.Total > 0
	m := progressMessage{Message: jsonstream.Message{ID: status.ID, Status: status.Action}}
	if status.ID != "" {
		m.Progress = &jsonstream.Progress{Current: status.Current, Total: status.Total}
		m.ProgressText = progressBar(status.Current, status.Total)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := status.ID + "\x00" + status.Action
	if i, ok := s.slot[key]; ok && moving {
		s.pending[i] = m
		return
	}
	if moving && len(s.pending) >= maxPendingMessages {
		return
	}
	if moving {
		s.slot[key] = len(s.pending)
	}
	s.pending = append(s.pending, m)
	if !moving {
		select {
		case s.urgent <- struct{}{}:
		default:
		}
	}
}

// send queues a message that is not a transfer's status.
func (s *progressStream) send(m progressMessage) {
	s.mu.Lock()
	s.pending = append(s.pending, m)
	s.mu.Unlock()
}

// print queues plain output, as load and build give it.
func (s *progressStream) print(text string) {
	s.send(progressMessage{Message: jsonstream.Message{Stream: text}})
}

// aux queues a result that programs read.
func (s *progressStream) aux(raw json.RawMessage) {
	s.send(progressMessage{Message: jsonstream.Message{Progress: &jsonstream.Progress{}, Aux: &raw}})
}

// run performs work while it passes on what work reports, and returns when work has returned.
// A failure before anything was sent is returned, for the caller to answer; a later one goes
// into the stream, and run returns nil.
func (s *progressStream) run(ctx context.Context, work func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if v := recover(); v != nil {
				done <- fmt.Errorf("internal error during the transfer: %v", v)
			}
		}()
		done <- work(ctx)
	}()
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			return s.finish(err)
		case <-s.urgent:
		case <-ticker.C:
		}
		if err := s.flush(); err != nil {
			cancel() // the client is gone; wait for work to notice
			<-done   //nolint:errcheck // what it says then is of no use to anybody
			return nil
		}
	}
}

func (s *progressStream) finish(err error) error {
	if err != nil && !s.began {
		return err
	}
	if err != nil {
		s.send(progressMessage{
			Message:   jsonstream.Message{Error: &jsonstream.Error{Message: err.Error()}},
			ErrorText: err.Error(),
		})
	}
	s.begin()
	_ = s.flush() // a client that went away learns nothing more
	return nil
}

func (s *progressStream) begin() {
	if s.began {
		return
	}
	s.began = true
	s.w.Header().Set("Content-Type", "application/json")
	s.w.WriteHeader(http.StatusOK)
}

// flush writes what is pending.
func (s *progressStream) flush() error {
	s.mu.Lock()
	batch := s.pending
	s.pending = nil
	clear(s.slot)
	s.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	s.begin()
	for _, m := range batch {
		if err := writeProgress(s.w, m); err != nil {
			return err
		}
	}
	return http.NewResponseController(s.w).Flush()
}

// writeProgress writes one line, ended as dockerd ends it.
func writeProgress(w io.Writer, m progressMessage) error {
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\r', '\n'))
	return err
}

// progressBar is the text that dockerd puts beside the numbers, for a terminal of 200 columns.
func progressBar(current, total int64) string {
	switch {
	case current <= 0 && total <= 0:
		return ""
	case total <= 0:
		return fmt.Sprintf("%8v", units.HumanSize(float64(current)))
	}
	const width = 50
	filled := min(max(int(float64(current)/float64(total)*width), 0), width)
	numbers := fmt.Sprintf("%8v/%v", units.HumanSize(float64(current)), units.HumanSize(float64(total)))
	if current > total {
		numbers = fmt.Sprintf("%8v", units.HumanSize(float64(current)))
	}
	return fmt.Sprintf("[%s>%s] %s", strings.Repeat("=", filled), strings.Repeat(" ", width-filled), numbers)
}
