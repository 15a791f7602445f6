package dockerapi

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Limits of a filters parameter.
const (
	maxFilterBytes  = 64 << 10
	maxFilterValues = 1024 // of all keys together
)

// filters are docker's: for each key the values asked for, sorted. Values of one key are
// alternatives (labels: all must match); keys are all needed. The zero value lets all pass.
type filters map[string][]string

// parseFilters reads docker's JSON of filters, {"key":{"value":true}} or {"key":["value"]}, and
// refuses keys that are not in allowed.
func parseFilters(text string, allowed ...string) (filters, error) {
	f := filters{}
	if text == "" {
		return f, nil
	}
	if len(text) > maxFilterBytes {
		return nil, invalid("invalid filter: more than %d bytes", maxFilterBytes)
	}
	var raw map[string]json.RawMessage
	if err := decodeStrict([]byte(text), &raw); err != nil {
		return nil, invalid("invalid filter: %w", err)
	}
	count := 0
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		if !slices.Contains(allowed, key) {
			return nil, invalid("invalid filter '%s'", key)
		}
		var set map[string]bool
		var list []string
		if err := json.Unmarshal(raw[key], &set); err == nil {
			list = slices.Collect(maps.Keys(set)) // as in docker, what they are set to means nothing
		} else if err := json.Unmarshal(raw[key], &list); err != nil {
			return nil, invalid("invalid filter '%s': values must be strings", key)
		}
		slices.Sort(list)
		list = slices.Compact(list)
		if count += len(list); count > maxFilterValues {
			return nil, invalid("invalid filter: more than %d values", maxFilterValues)
		}
		if len(list) > 0 {
			f[key] = list
		}
	}
	return f, nil
}

// has tells whether key was asked for.
func (f filters) has(key string) bool { return len(f[key]) > 0 }

// get returns the values of key, sorted.
func (f filters) get(key string) []string { return f[key] }

// exact tells whether value is one of key's, or key was not asked for.
func (f filters) exact(key, value string) bool {
	return !f.has(key) || slices.Contains(f[key], value)
}

// prefix is exact for values that begin with one of key's.
func (f filters) prefix(key, value string) bool {
	return !f.has(key) || slices.ContainsFunc(f[key], func(p string) bool { return strings.HasPrefix(value, p) })
}

// match is exact for values that one of key's matches as a regular expression, docker's rule
// for names.
func (f filters) match(key, value string) bool {
	return f.exact(key, value) || slices.ContainsFunc(f[key], func(expr string) bool {
		re, err := regexp.Compile(expr)
		return err == nil && re.MatchString(value)
	})
}

// labels tells whether all of key's "name" and "name=value" are in labels.
func (f filters) labels(key string, labels map[string]string) bool {
	for _, want := range f[key] {
		name, value, hasValue := strings.Cut(want, "=")
		got, ok := labels[name]
		if !ok || hasValue && got != value {
			return false
		}
	}
	return true
}

// notLabels is for label!: as in docker, what has all of key's labels is left out.
func (f filters) notLabels(key string, labels map[string]string) bool {
	return !f.has(key) || !f.labels(key, labels)
}

// matchLabels applies label and label!.
func (f filters) matchLabels(labels map[string]string) bool {
	return f.labels("label", labels) && f.notLabels("label!", labels)
}

// boolean reads a filter such as dangling=true; absent when it was not asked for.
func (f filters) boolean(key string, absent bool) (bool, error) {
	if !f.has(key) {
		return absent, nil
	}
	switch {
	case len(f[key]) > 1:
		return false, invalid("invalid filter '%s=%v': give one value", key, f[key])
	case f[key][0] == "1" || f[key][0] == "true":
		return true, nil
	case f[key][0] == "0" || f[key][0] == "false":
		return false, nil
	}
	return false, invalid("invalid filter '%s=%s'", key, f[key][0])
}

// until reads the key until. The zero time means that it was not asked for.
func (f filters) until(now time.Time) (time.Time, error) {
	switch values := f["until"]; len(values) {
	case 0:
		return time.Time{}, nil
	case 1:
		return parseFilterTime(values[0], now)
	}
	return time.Time{}, invalid("more than one until filter specified")
}

// parseFilterTime reads the time of a filter: a duration before now, a date with or without a
// time of day and a zone (the node's, when it is left out), or what parseTime reads.
func parseFilterTime(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && strings.Trim(text, "0123456789.") != "" {
		return now.Add(-d), nil
	}
	layouts := [...]string{
		"2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02T15", "2006-01-02Z07:00", "2006-01-02",
	}
	for _, layout := range layouts {
		if t, err := time.ParseInLocation(layout, text, now.Location()); err == nil {
			return t, nil
		}
	}
	t, err := parseTime(text)
	if err == nil && t.IsZero() && text != "0" {
		return t, invalid("invalid time %q: give seconds since 1970, an RFC 3339 date or a duration", text)
	}
	return t, err
}
