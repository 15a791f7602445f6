package dockerapi

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
)

// route is one endpoint. In pattern, {x} takes one path segment and {x...} one or more.
type route struct {
	method     string
	pattern    string
	minVersion int // minor API version from which it exists; 0: always
	handler    func(w http.ResponseWriter, r *request) error
}

// routeTable finds routes by method and path. A literal segment beats a variable.
type routeTable struct {
	byHead map[string][]compiledRoute // by method and first segment
}

type compiledRoute struct {
	route
	segments []segment
	literals int
}

type segment struct {
	text  string // literal, or the variable's name
	isVar bool
	multi bool
}

func (t *routeTable) add(routes []route) {
	if t.byHead == nil {
		t.byHead = map[string][]compiledRoute{}
	}
	for _, r := range routes {
		c := compiledRoute{route: r}
		for _, part := range strings.Split(strings.TrimPrefix(r.pattern, "/"), "/") {
			g := segment{text: part}
			if name, ok := strings.CutPrefix(part, "{"); ok {
				name = strings.TrimSuffix(name, "}")
				g.text, g.multi = strings.CutSuffix(name, "...")
				g.isVar = true
			} else {
				c.literals++
			}
			c.segments = append(c.segments, g)
		}
		key := r.method + " " + c.segments[0].text
		list := append(t.byHead[key], c)
		slices.SortStableFunc(list, func(a, b compiledRoute) int { return cmp.Compare(b.literals, a.literals) })
		t.byHead[key] = list
	}
}

// find returns the route for a request, nil for none. HEAD falls back to GET.
func (t *routeTable) find(method, path string) (*route, map[string]string) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for {
		list := t.byHead[method+" "+parts[0]]
		for i := range list {
			vars := map[string]string{}
			if list[i].match(parts, vars) {
				return &list[i].route, vars
			}
		}
		if method != http.MethodHead {
			return nil, nil
		}
		method = http.MethodGet
	}
}

// match compares parts with the pattern; at most one segment of a pattern is multi.
func (c *compiledRoute) match(parts []string, vars map[string]string) bool {
	extra := len(parts) - len(c.segments)
	i := 0
	for _, g := range c.segments {
		if i >= len(parts) {
			return false
		}
		switch {
		case g.multi:
			if extra < 0 {
				return false
			}
			vars[g.text] = strings.Join(parts[i:i+extra+1], "/")
			i += extra
		case g.isVar:
			if parts[i] == "" {
				return false
			}
			vars[g.text] = parts[i]
		case parts[i] != g.text:
			return false
		}
		i++
	}
	return i == len(parts)
}
