package dockerapi

import (
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// maxBodyBytes bounds a JSON request body.
const maxBodyBytes = 4 << 20

// request is an HTTP request with what the router found out about it.
type request struct {
	*http.Request
	version int // minor API version
	vars    map[string]string
}

// query returns one parameter of the query string.
func (r *request) query(key string) string { return r.URL.Query().Get(key) }

// has tells whether the query string names key at all.
func (r *request) has(key string) bool { return r.URL.Query().Has(key) }

// boolQuery reads a flag the way docker does: all but "", 0, no, false and none is true.
func (r *request) boolQuery(key string) bool {
	switch strings.ToLower(strings.TrimSpace(r.query(key))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// boolQueryOr is boolQuery with a default for an absent parameter.
func (r *request) boolQueryOr(key string, absent bool) bool {
	if !r.has(key) {
		return absent
	}
	return r.boolQuery(key)
}

// intQuery reads a whole number, absent when the parameter is missing or empty.
func (r *request) intQuery(key string, absent int) (int, error) {
	text := r.query(key)
	if text == "" {
		return absent, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, invalid("invalid value for %s: %q is not a whole number", key, text)
	}
	return n, nil
}

// filters reads the parameter "filters" and refuses keys that are not in allowed.
func (r *request) filters(allowed ...string) (filters, error) {
	return parseFilters(r.query("filters"), allowed...)
}

// hasBody tells whether the client sends one.
func (r *request) hasBody() bool {
	return r.Body != nil && r.Body != http.NoBody && r.ContentLength != 0
}

// decodeJSON reads the body, one JSON value of at most maxBodyBytes, into v. An absent body is
// an error; see hasBody.
func (r *request) decodeJSON(v any) error {
	if err := r.checkJSON(); err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, maxBodyBytes+1))
	if err != nil {
		return invalid("reading the request body: %w", err)
	}
	if len(data) > maxBodyBytes {
		return invalid("invalid JSON: the request body is larger than %d bytes", maxBodyBytes)
	}
	return decodeStrict(data, v)
}

// checkJSON refuses a body of another type, as docker does.
func (r *request) checkJSON() error {
	ct := r.Header.Get("Content-Type")
	if ct == "" && !r.hasBody() {
		return nil
	}
	kind, _, err := mime.ParseMediaType(ct)
	if err != nil || kind != "application/json" {
		return invalid("unsupported Content-Type header (%s): must be 'application/json'", ct)
	}
	return nil
}

// decodeStrict decodes exactly one JSON value. Fields that v lacks are ignored, as docker does.
func decodeStrict(data []byte, v any) error {
	dec := json.NewDecoder(strings.NewReader(string(data)))
	if err := dec.Decode(v); err != nil {
		if errors.Is(err, io.EOF) {
			return invalid("invalid JSON: got EOF while reading request body")
		}
		return invalid("invalid JSON: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return invalid("unexpected content after JSON")
	}
	return nil
}

// writeJSON answers with v. Slices and maps in v must not be nil where clients iterate.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, err = w.Write(append(body, '\n'))
	return err
}

// parseTime reads docker's time stamps: seconds since 1970 with an optional fraction, or
// RFC 3339. "" and "0" are the zero time.
func parseTime(text string) (time.Time, error) {
	if text == "" || text == "0" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
		return t, nil
	}
	whole, fraction, _ := strings.Cut(text, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return time.Time{}, invalid("invalid time %q: give seconds since 1970 or an RFC 3339 date", text)
	}
	var nsec int64
	if fraction != "" {
		if len(fraction) > 9 {
			fraction = fraction[:9]
		}
		n, err := strconv.ParseUint(fraction, 10, 32)
		if err != nil {
			return time.Time{}, invalid("invalid time %q: the fraction is not a number", text)
		}
		nsec = int64(n)
		for i := len(fraction); i < 9; i++ {
			nsec *= 10
		}
	}
	return time.Unix(sec, nsec), nil
}

// terminalSize reads the parameters h and w of a resize.
func (r *request) terminalSize() (height, width uint16, err error) {
	h, err := strconv.ParseUint(r.query("h"), 10, 16)
	if err != nil {
		return 0, 0, invalid("invalid resize height %q: must be a number up to 65535", r.query("h"))
	}
	w, err := strconv.ParseUint(r.query("w"), 10, 16)
	if err != nil {
		return 0, 0, invalid("invalid resize width %q: must be a number up to 65535", r.query("w"))
	}
	return uint16(h), uint16(w), nil
}
