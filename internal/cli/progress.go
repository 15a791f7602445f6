package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/term"
)

// transferView shows docker's stream of progress on standard error.
type transferView struct {
	out    io.Writer
	mode   string // plain, json, terminal, none
	width  int
	lines  map[string]int    // terminal: line of each ID
	status map[string]string // last status of each ID
}

func (a *app) newTransferView(quiet bool) *transferView {
	v := &transferView{out: a.Err, mode: a.progress, lines: map[string]int{}, status: map[string]string{}}
	if v.mode == "auto" {
		v.mode = "plain"
		if f, ok := a.Err.(*os.File); ok && a.getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd())) {
			v.mode, v.width = "terminal", 80
			if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 20 {
				v.width = w
			}
		}
	}
	if quiet {
		v.mode = "none"
	}
	return v
}

// follow shows the stream r until it ends. Text that the daemon meant as a result goes to
// result. An error in the stream is returned.
func (v *transferView) follow(r io.Reader, result func(string)) error {
	d := json.NewDecoder(r)
	for {
		var raw json.RawMessage
		if err := d.Decode(&raw); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return platformError(fmt.Errorf("the daemon's progress broke off: %w", err))
		}
		var t transfer
		if err := json.Unmarshal(raw, &t); err != nil {
			return platformError(fmt.Errorf("the daemon's progress is not understood: %w", err))
		}
		if t.ErrorDetail != nil && t.ErrorDetail.Message != "" {
			return &apiError{Status: 400, Message: t.ErrorDetail.Message, Kind: t.ErrorDetail.Kind}
		}
		if t.Error != "" {
			return &apiError{Status: 400, Message: t.Error}
		}
		if v.mode == "json" {
			var line bytes.Buffer
			if json.Compact(&line, raw) == nil {
				line.WriteByte('\n')
				_, _ = v.out.Write(line.Bytes())
			}
		}
		if t.Stream != "" {
			result(t.Stream)
		}
		if t.Status != "" {
			v.show(&t)
		}
	}
}

func (v *transferView) show(t *transfer) {
	switch v.mode {
	case "plain":
		if t.ID != "" && v.status[t.ID] == t.Status {
			return // a bar's next step
		}
		v.status[t.ID] = t.Status
		if t.ID == "" {
			fmt.Fprintln(v.out, t.Status)
			return
		}
		fmt.Fprintf(v.out, "%s: %s\n", t.ID, t.Status)
	case "terminal":
		v.draw(t)
	}
}

// draw rewrites the line of t's ID, or appends one.
func (v *transferView) draw(t *transfer) {
	text := t.Status
	if t.ID != "" {
		text = t.ID + ": " + text
	}
	text = shorten(text+bar(t.Progress, v.width-len(text)), v.width-1)
	line, known := v.lines[t.ID]
	if t.ID == "" || !known {
		if t.ID != "" {
			v.lines[t.ID] = len(v.lines)
		} else {
			// A statement on the whole ends the block of bars above it.
			v.lines = map[string]int{}
		}
		fmt.Fprintf(v.out, "\r\x1b[2K%s\n", text)
		return
	}
	up := len(v.lines) - line
	fmt.Fprintf(v.out, "\x1b[%dA\r\x1b[2K%s\x1b[%dB\r", up, text, up)
}

// bar draws progress in at most width columns.
func bar(d *transferDetail, width int) string {
	if d == nil || d.Current <= 0 {
		return ""
	}
	current := units.HumanSizeWithPrecision(float64(d.Current), 4)
	if d.Total <= 0 {
		return " " + current
	}
	numbers := current + "/" + units.HumanSizeWithPrecision(float64(d.Total), 4)
	cells := min(width-len(numbers)-6, 50)
	if cells < 5 {
		return " " + numbers
	}
	done := int(int64(cells) * min(d.Current, d.Total) / d.Total)
	head := ">"
	if done == cells {
		head = ""
	}
	return " [" + strings.Repeat("=", done) + head + strings.Repeat(" ", cells-done-len(head)) + "] " + numbers
}
