package criapi

import (
	"encoding/json"
	"strings"
	"time"
)

// matches tells whether an ID passes a filter, which may be a prefix; "" passes all.
func matches(filter, id string) bool { return strings.HasPrefix(id, filter) }

// selects tells whether labels have all the selector's.
func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// nanos is a time as the CRI counts it; 0 for none.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// infoJSON is what a verbose answer carries, in the form that CRI clients print.
func infoJSON(info map[string]any) (map[string]string, error) {
	b, err := json.Marshal(info)
	return map[string]string{"info": string(b)}, err
}
