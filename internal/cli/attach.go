package cli

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"berth/internal/cli/unixhttp"
)

// Docker's frames of a stream without a terminal.
const (
	frameHeader   = 8
	frameStdout   = 1
	frameStderr   = 2
	frameSystem   = 3
	maxFrameBytes = 64 << 20
)

// demux splits docker's framed stream into stdout and stderr until r ends.
func demux(stdout, stderr io.Writer, r io.Reader) error {
	var head [frameHeader]byte
	var body io.LimitedReader
	buf := make([]byte, 32<<10)
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		size := binary.BigEndian.Uint32(head[4:])
		var w io.Writer
		switch head[0] {
		case 0, frameStdout:
			w = stdout
		case frameStderr, frameSystem:
			w = stderr
		default:
			return fmt.Errorf("the daemon's stream is not understood: frame of kind %d", head[0])
		}
		if size > maxFrameBytes {
			return fmt.Errorf("the daemon's stream is not understood: frame of %d bytes", size)
		}
		body = io.LimitedReader{R: r, N: int64(size)}
		// The wrapper hides ReadFrom of *os.File, which would allocate for each frame.
		if _, err := io.CopyBuffer(onlyWriter{w}, &body, buf); err != nil {
			return err
		}
		if body.N > 0 {
			return io.ErrUnexpectedEOF
		}
	}
}

type onlyWriter struct{ io.Writer }

// session is a conversation with a process over an upgraded connection.
type session struct {
	stream     *unixhttp.Stream
	terminal   bool   // the process has one: its output is not framed
	stdin      bool   // send ours
	detachKeys []byte // with a terminal and stdin
}

// errDetached ends a session whose user left it.
var errDetached = errors.New("detached")

// converse copies both ways until the process's output ends (nil) or the user detaches.
func (a *app) converse(s session) error {
	ended := make(chan error, 2)
	go func() {
		var err error
		if s.terminal {
			_, err = io.Copy(a.Out, s.stream)
		} else {
			err = demux(a.Out, a.Err, s.stream)
		}
		ended <- err
	}()
	if s.stdin {
		// Reading our input cannot be interrupted: this goroutine ends with the program.
		go func() {
			in := a.In
			if s.terminal && len(s.detachKeys) > 0 {
				in = &detachReader{r: a.In, keys: s.detachKeys}
			}
			_, err := io.Copy(s.stream, in)
			if errors.Is(err, errDetached) {
				ended <- err
				return
			}
			_ = s.stream.CloseWrite()
		}()
	}
	return <-ended
}

// defaultDetachKeys are docker's: ctrl-p, ctrl-q.
const defaultDetachKeys = "ctrl-p,ctrl-q"

// parseKeys reads a sequence like ctrl-p,ctrl-q or ctrl-a,d.
func parseKeys(text string) ([]byte, error) {
	if text == "" {
		text = defaultDetachKeys
	}
	var keys []byte
	for _, k := range strings.Split(text, ",") {
		name, ctrl := strings.CutPrefix(strings.ToLower(k), "ctrl-")
		switch {
		case !ctrl && len(k) == 1:
			keys = append(keys, k[0])
		case ctrl && len(name) == 1 && strings.Contains("abcdefghijklmnopqrstuvwxyz@[\\]^_", name):
			keys = append(keys, strings.ToUpper(name)[0]&0x1f)
		default:
			return nil, fmt.Errorf("--detach-keys %s: %q is not a key; write it like ctrl-a or x", text, k)
		}
	}
	return keys, nil
}

// detachReader passes input on and ends with errDetached behind the sequence of keys.
type detachReader struct {
	r       io.Reader
	keys    []byte
	matched int
	pending []byte // to be returned first
	err     error
}

func (d *detachReader) Read(p []byte) (int, error) {
	for len(d.pending) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		// What is held back may come on top of what is read.
		buf := make([]byte, len(p))
		n, err := d.r.Read(buf)
		d.err = err
		for _, b := range buf[:n] {
			if d.feed(b) {
				d.err = errDetached
				break
			}
		}
		if d.err != nil && !errors.Is(d.err, errDetached) {
			d.pending = append(d.pending, d.keys[:d.matched]...)
			d.matched = 0
		}
	}
	n := copy(p, d.pending)
	d.pending = d.pending[n:]
	return n, nil
}

// feed takes one byte and tells whether the sequence is complete.
func (d *detachReader) feed(b byte) bool {
	if b != d.keys[d.matched] && d.matched > 0 {
		d.pending = append(d.pending, d.keys[:d.matched]...)
		d.matched = 0
	}
	if b != d.keys[d.matched] {
		d.pending = append(d.pending, b)
		return false
	}
	d.matched++
	return d.matched == len(d.keys)
}

// terminalOf returns the descriptor of our terminal, or -1.
func terminalOf(stream any) int {
	if f, ok := stream.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return int(f.Fd())
	}
	return -1
}

// windowSize returns height and width of our terminal; ok is false when there is none.
func (a *app) windowSize() (size [2]uint, ok bool) {
	fd := terminalOf(a.Out)
	if fd < 0 {
		fd = terminalOf(a.In)
	}
	if fd < 0 {
		return size, false
	}
	w, h, err := term.GetSize(fd)
	if err != nil || w <= 0 || h <= 0 {
		return size, false
	}
	return [2]uint{uint(h), uint(w)}, true
}

// rawTerminal hands the keyboard to the process: every key goes through. The function it
// returns undoes that and may be called more than once.
func (a *app) rawTerminal() (restore func(), err error) {
	fd := terminalOf(a.In)
	if fd < 0 {
		return nil, errors.New("the input device is not a TTY; leave -t away, or give berth a terminal")
	}
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, platformError(err)
	}
	if _, err := term.MakeRaw(fd); err != nil {
		return nil, platformError(err)
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, old) }, nil
}

// followWindow passes changes of our window's size on to path until ctx ends.
func (a *app) followWindow(ctx context.Context, path func(url.Values) string) {
	last, ok := a.windowSize()
	if !ok {
		return
	}
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	go func() {
		defer signal.Stop(changes)
		for {
			select {
			case <-ctx.Done():
				return
			case <-changes:
			}
			size, ok := a.windowSize()
			if !ok || size == last {
				continue
			}
			last = size
			q := url.Values{"h": {strconv.Itoa(int(size[0]))}, "w": {strconv.Itoa(int(size[1]))}}
			_ = a.call(ctx, "POST", path(q), nil, nil) // the next change tries again
		}
	}()
}

// passSignals sends the signals that we get on to a container. Signals that come before
// started is closed wait for that. The function it returns ends it.
func (a *app) passSignals(ctx context.Context, id string, started <-chan struct{}) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 32)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGCONT)
	go func() {
		select {
		case <-started:
		case <-ctx.Done():
			return
		}
		for ends := 0; ; {
			select {
			case <-ctx.Done():
				return
			case s := <-signals:
				// Who has asked twice and asks again wants this program to end.
				if s == syscall.SIGINT || s == syscall.SIGTERM {
					if ends++; ends == 2 {
						signal.Reset(syscall.SIGINT, syscall.SIGTERM)
					}
				}
				name := unix.SignalName(s.(syscall.Signal))
				// A container that has just ended cannot be signalled; its exit code follows.
				_ = a.call(ctx, "POST", docker(url.Values{"signal": {name}}, "containers", id, "kill"), nil, nil)
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		cancel()
	}
}
