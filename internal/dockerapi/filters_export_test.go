package dockerapi

import (
	"time"

	"github.com/moby/moby/api/types/registry"
)

// Filters opens the parser of filters to the tests.
type Filters = filters

// ParseFilters opens the parser of filters to the tests.
func ParseFilters(text string, allowed ...string) (Filters, error) {
	return parseFilters(text, allowed...)
}

// Match, MatchLabels and Until open what is asked of filters to the tests.
func (f filters) Match(key, value string) bool                  { return f.match(key, value) }
func (f filters) MatchLabels(labels map[string]string) bool     { return f.matchLabels(labels) }
func (f filters) Until(now time.Time) (time.Time, error)        { return f.until(now) }
func (f filters) Boolean(key string, absent bool) (bool, error) { return f.boolean(key, absent) }

// DecodeAuthHeader opens the reader of X-Registry-Auth to the tests.
func DecodeAuthHeader(header string) (registry.AuthConfig, error) { return decodeAuthHeader(header) }

// RegistryHost opens the reading of server addresses to the tests.
func RegistryHost(address string) (string, error) { return registryHost(address) }
