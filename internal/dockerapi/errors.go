package dockerapi

import (
	"encoding/json"
	"net/http"
	"strings"

	"berth/internal/errdefs"
)

// errPageNotFound answers paths that docker's API does not have.
var errPageNotFound = errdefs.New(errdefs.ErrNotFound, "page not found")

// invalid is a 400 with the given text.
func invalid(format string, args ...any) error {
	return errdefs.New(errdefs.ErrInvalid, format, args...)
}

// notFound is a 404 with the given text.
func notFound(format string, args ...any) error {
	return errdefs.New(errdefs.ErrNotFound, format, args...)
}

// conflict is a 409 with the given text.
func conflict(format string, args ...any) error {
	return errdefs.New(errdefs.ErrConflict, format, args...)
}

// unsupported is a 501 with the given text.
func unsupported(format string, args ...any) error {
	return errdefs.New(errdefs.ErrUnsupported, format, args...)
}

// statusOf is the one place where kinds of error become HTTP statuses.
func statusOf(err error) int {
	switch errdefs.Kind(err) {
	case errdefs.ErrNotFound:
		return http.StatusNotFound
	case errdefs.ErrExists, errdefs.ErrConflict:
		return http.StatusConflict
	case errdefs.ErrInvalid, errdefs.ErrInvocation, errdefs.ErrNoProgram:
		return http.StatusBadRequest
	case errdefs.ErrNotModified:
		return http.StatusNotModified
	case errdefs.ErrUnauthorized:
		return http.StatusUnauthorized
	case errdefs.ErrForbidden:
		return http.StatusForbidden
	case errdefs.ErrUnsupported:
		return http.StatusNotImplemented
	case errdefs.ErrUnavailable:
		return http.StatusServiceUnavailable
	default: // exhausted, data loss, and what has no kind
		return http.StatusInternalServerError
	}
}

// writeError answers in docker's error shape. Status 304 has no body.
func writeError(w http.ResponseWriter, status int, message string) {
	if status == http.StatusNotModified {
		w.WriteHeader(status)
		return
	}
	body, err := json.Marshal(struct {
		Message string `json:"message"`
	}{oneLine(message)})
	if err != nil {
		body = []byte(`{"message":"internal error"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a client that left needs no answer
}

// maxMessageBytes bounds an error message: it may quote what the client sent.
const maxMessageBytes = 2048

// oneLine is a message as clients show it: one line of bounded length.
func oneLine(message string) string {
	message = strings.Join(strings.FieldsFunc(message, func(r rune) bool { return r == '\n' || r == '\r' }), " ")
	if len(message) <= maxMessageBytes {
		return message
	}
	return strings.ToValidUTF8(message[:maxMessageBytes], "") + "…"
}
