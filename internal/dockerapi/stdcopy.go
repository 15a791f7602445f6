package dockerapi

import (
	"encoding/binary"
	"io"
	"sync"
)

// Streams of docker's multiplexed format.
const (
	frameStdout    = 1
	frameStderr    = 2
	frameSystemErr = 3
)

const (
	frameHeaderBytes = 8
	// frameBufferBytes is the largest payload that is copied behind its header to be written
	// with it in one call.
	frameBufferBytes = 32 << 10
)

// frameMux writes docker's multiplexed stream: each piece of output behind a header with its
// stream and its length. Its writers may be used at the same time.
type frameMux struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

func newFrameMux(w io.Writer) *frameMux { return &frameMux{w: w} }

// stream returns the writer of one stream.
func (m *frameMux) stream(id byte) io.Writer { return &frameWriter{mux: m, id: id} }

type frameWriter struct {
	mux *frameMux
	id  byte
}

func (f *frameWriter) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	m := f.mux
	m.mu.Lock()
	defer m.mu.Unlock()
	m.buf = append(m.buf[:0], f.id, 0, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(m.buf[4:], uint32(len(p)))
	if len(p) <= frameBufferBytes {
		m.buf = append(m.buf, p...)
		n, err := m.w.Write(m.buf)
		return max(n-frameHeaderBytes, 0), err
	}
	if _, err := m.w.Write(m.buf); err != nil {
		return 0, err
	}
	return m.w.Write(p)
}

// batchWriter decouples a producer of many small pieces from a slow flushing writer: what
// comes while one batch is being written goes out in the next. Call run in a goroutine.
type batchWriter struct {
	w     io.Writer
	flush func()

	mu      sync.Mutex
	changed *sync.Cond
	pending []byte
	err     error
	closed  bool
}

// maxBatchBytes bounds what waits in a batchWriter; a producer beyond it waits.
const maxBatchBytes = 256 << 10

func newBatchWriter(w io.Writer, flush func()) *batchWriter {
	b := &batchWriter{w: w, flush: flush}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// Write queues a copy of p. It returns the error of an earlier batch.
func (b *batchWriter) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.pending) > maxBatchBytes && b.err == nil && !b.closed {
		b.changed.Wait()
	}
	if b.err != nil {
		return 0, b.err
	}
	if b.closed {
		return 0, io.ErrClosedPipe
	}
	b.pending = append(b.pending, p...)
	b.changed.Broadcast()
	return len(p), nil
}

// close lets run return once all is written.
func (b *batchWriter) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.changed.Broadcast()
}

// run writes and flushes batches until close, or an error, which it returns.
func (b *batchWriter) run() error {
	var batch []byte
	for {
		b.mu.Lock()
		for len(b.pending) == 0 && !b.closed {
			b.changed.Wait()
		}
		if len(b.pending) == 0 {
			b.mu.Unlock()
			return nil
		}
		batch, b.pending = b.pending, batch[:0]
		b.changed.Broadcast()
		b.mu.Unlock()
		_, err := b.w.Write(batch)
		if err == nil {
			b.flush()
			continue
		}
		b.mu.Lock()
		b.err = err
		b.changed.Broadcast()
		b.mu.Unlock()
		return err
	}
}
