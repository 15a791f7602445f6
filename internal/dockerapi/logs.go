package dockerapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"berth/internal/engine"
)

// logTimeFormat is RFC 3339 with all nine digits, so that lines align.
const logTimeFormat = "2006-01-02T15:04:05.000000000Z07:00"

// logBufferBytes is gathered before a log that is not followed is written on.
const logBufferBytes = 32 << 10

// logRequest is what a client wants of a log.
type logRequest struct {
	options    engine.LogOptions
	timestamps bool
	details    bool
}

func parseLogRequest(r *request) (logRequest, error) {
	q := logRequest{timestamps: r.boolQuery("timestamps"), details: r.boolQuery("details")}
	o := &q.options
	o.Stdout, o.Stderr, o.Follow = r.boolQuery("stdout"), r.boolQuery("stderr"), r.boolQuery("follow")
	if !o.Stdout && !o.Stderr {
		return q, invalid("Bad parameters: you must choose at least one stream")
	}
	var err error
	if o.Since, err = parseTime(r.query("since")); err != nil {
		return q, err
	}
	if o.Until, err = parseTime(r.query("until")); err != nil {
		return q, err
	}
	o.Tail = -1 // docker takes anything but a number as "all"
	if n, err := strconv.Atoi(r.query("tail")); err == nil && n >= 0 {
		o.Tail = n
	}
	return q, nil
}

func (s *Server) containerLogs(w http.ResponseWriter, r *request) error {
	q, err := parseLogRequest(r)
	if err != nil {
		return err
	}
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	if c.Config.Log.Driver == engine.LogNone {
		return noReader()
	}
	w.Header().Set("Content-Type", streamType(c.Config.Terminal, r.version))
	w.WriteHeader(http.StatusOK)
	if !q.options.Follow {
		buffered := bufio.NewWriterSize(w, logBufferBytes)
		s.writeLog(r.Context(), buffered, c, q)
		return buffered.Flush()
	}
	flush := func() { _ = http.NewResponseController(w).Flush() } // the next write tells
	flush()
	batch := newBatchWriter(w, flush)
	ctx, cancel := streamContext(r)
	defer cancel()
	var writer sync.WaitGroup
	writer.Go(func() {
		if batch.run() != nil {
			cancel()
		}
	})
	s.writeLog(ctx, batch, c, q)
	batch.close()
	writer.Wait()
	return nil
}

// writeLog writes what was asked for. The answer has begun: an error is told in its stream.
func (s *Server) writeLog(ctx context.Context, w io.Writer, c engine.Container, q logRequest) {
	var mux *frameMux
	out := output{stdout: w}
	if !c.Config.Terminal {
		mux = newFrameMux(w)
		out = output{stdout: mux.stream(frameStdout), stderr: mux.stream(frameStderr)}
	}
	f := logFormatter{request: q, out: out}
	err := s.engine.Logs(ctx, c.Config.ID, q.options, f.entry)
	if err == nil || ctx.Err() != nil || errors.Is(err, f.failed) && f.failed != nil {
		return
	}
	message := fmt.Sprintf("Error grabbing logs: %v\n", err)
	if mux != nil {
		w = mux.stream(frameSystemErr)
	}
	_, _ = io.WriteString(w, message) // if this fails too, the client is gone
}

// logFormatter writes entries with the prefixes that were asked for.
type logFormatter struct {
	request logRequest
	out     output
	buf     []byte
	partial [2]bool // stdout's and stderr's last entry was not the end of a line
	failed  error   // of the writer
}

func (f *logFormatter) entry(e engine.LogEntry) error {
	i := 0
	if e.Stream == engine.Stderr {
		i = 1
	}
	if !f.partial[i] && (f.request.timestamps || f.request.details) {
		f.buf = f.buf[:0]
		if f.request.timestamps {
			f.buf = e.Time.UTC().AppendFormat(f.buf, logTimeFormat)
			f.buf = append(f.buf, ' ')
		}
		if f.request.details {
			f.buf = append(f.buf, ' ') // docker puts a driver's attributes here, of which there are none
		}
		f.buf = append(f.buf, e.Line...)
		e.Line = f.buf
	}
	f.partial[i] = e.Partial
	f.failed = f.out.entry(e)
	return f.failed
}
