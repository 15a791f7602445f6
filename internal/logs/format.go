package logs

import (
	"bytes"
	"encoding/json"
	"time"
	"unicode/utf8"
)

// appendEntry renders an entry in the driver's format.
func appendEntry(b []byte, driver string, e Entry) []byte {
	if driver == DriverCRI {
		return appendCRI(b, e)
	}
	return appendJSON(b, e)
}

// parseEntry is the inverse, for a line with its newline. The entry's Line may point into b.
func parseEntry(b []byte, driver string) (Entry, bool) {
	if driver == DriverCRI {
		return parseCRI(b)
	}
	return parseJSON(b)
}

// appendJSON writes docker's json-file format, byte for byte as docker does.
func appendJSON(b []byte, e Entry) []byte {
	b = append(b, `{"log":"`...)
	b = appendEscaped(b, e.Line)
	b = append(b, `","stream":"`...)
	b = append(b, e.Stream...)
	b = append(b, `","time":"`...)
	b = e.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	return append(b, "\"}\n"...)
}

// appendEscaped writes p as the inside of a JSON string. Docker escapes like encoding/json, but
// tabs and other control characters always as \u00XX; what is not UTF-8 becomes \ufffd.
func appendEscaped(b, p []byte) []byte {
	const hex = "0123456789abcdef"
	start := 0
	for i := 0; i < len(p); {
		c := p[i]
		if c >= ' ' && c < utf8.RuneSelf && c != '"' && c != '\\' && c != '<' && c != '>' && c != '&' {
			i++
			continue
		}
		if c < utf8.RuneSelf {
			b = append(b, p[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			default:
				b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRune(p[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			b = append(append(b, p[start:i]...), `\ufffd`...)
			start = i + size
		case r == '\u2028' || r == '\u2029':
			b = append(append(b, p[start:i]...), `\u202`...)
			b = append(b, hex[r&15])
			start = i + size
		}
		i += size
	}
	return append(b, p[start:]...)
}

func parseJSON(b []byte) (Entry, bool) {
	var v struct {
		Log    *string   `json:"log"`
		Stream string    `json:"stream"`
		Time   time.Time `json:"time"`
	}
	if json.Unmarshal(b, &v) != nil || v.Log == nil || v.Stream != Stdout && v.Stream != Stderr {
		return Entry{}, false
	}
	line := []byte(*v.Log)
	return Entry{Time: v.Time, Stream: v.Stream, Line: line, Partial: !bytes.HasSuffix(line, []byte("\n"))}, true
}

// The tags of the CRI format.
const (
	tagFull    = "F"
	tagPartial = "P"
)

// appendCRI writes "time stream tag line" as the kubelet reads it.
func appendCRI(b []byte, e Entry) []byte {
	b = e.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(append(append(b, ' '), e.Stream...), ' ')
	if e.Partial {
		b = append(b, tagPartial...)
	} else {
		b = append(b, tagFull...)
	}
	b = append(append(b, ' '), bytes.TrimSuffix(e.Line, []byte("\n"))...)
	return append(b, '\n')
}

func parseCRI(b []byte) (Entry, bool) {
	stamp, rest, ok1 := bytes.Cut(b, []byte(" "))
	stream, rest, ok2 := bytes.Cut(rest, []byte(" "))
	tag, line, ok3 := bytes.Cut(rest, []byte(" "))
	if !ok1 || !ok2 || !ok3 || !bytes.HasSuffix(line, []byte("\n")) {
		return Entry{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, string(stamp))
	e := Entry{Time: t, Stream: string(stream), Line: line}
	// Tags may be many in a later version, separated by colons; the first is the one.
	first, _, _ := bytes.Cut(tag, []byte(":"))
	if string(first) == tagPartial {
		e.Partial, e.Line = true, line[:len(line)-1]
	} else if string(first) != tagFull {
		return Entry{}, false
	}
	return e, err == nil && (e.Stream == Stdout || e.Stream == Stderr)
}
