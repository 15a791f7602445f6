package dockerapi_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/dockerapi"
	"berth/internal/errdefs"
)

func TestParseFilters(t *testing.T) {
	long := `{"name":["` + strings.Repeat("x", 70<<10) + `"]}`
	many := `{"name":["` + strings.Join(numbers(1100), `","`) + `"]}`
	for name, tc := range map[string]struct {
		text string
		want dockerapi.Filters
		err  string
	}{
		"none":         {"", dockerapi.Filters{}, ""},
		"empty object": {"{}", dockerapi.Filters{}, ""},
		"sets":         {`{"label":{"a=b":true,"c":true}}`, dockerapi.Filters{"label": {"a=b", "c"}}, ""},
		"lists":        {`{"label":["c","a=b","c"]}`, dockerapi.Filters{"label": {"a=b", "c"}}, ""},
		"mixed":        {`{"label":["c"],"name":{"x":true}}`, dockerapi.Filters{"label": {"c"}, "name": {"x"}}, ""},
		"false counts": {`{"name":{"x":false}}`, dockerapi.Filters{"name": {"x"}}, ""},
		"unknown key":  {`{"colour":{"red":true}}`, nil, "invalid filter 'colour'"},
		"not JSON":     {`label=x`, nil, "invalid filter: "},
		"numbers":      {`{"name":[1]}`, nil, "invalid filter 'name': "},
		"trailing":     {`{} {}`, nil, "invalid filter: "},
		"too long":     {long, nil, "invalid filter: more than 65536 bytes"},
		"too many":     {many, nil, "invalid filter: more than 1024 values"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := dockerapi.ParseFilters(tc.text, "label", "name")
			if tc.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tc.err) || !errors.Is(err, errdefs.ErrInvalid) {
					t.Fatalf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func numbers(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = strings.Repeat("a", i%50) + string(rune('a'+i%26)) + strings.Repeat("b", i/50)
	}
	return out
}

func TestFiltersMatch(t *testing.T) {
	labels := map[string]string{"tier": "web", "empty": ""}
	for text, want := range map[string]bool{
		``:                                   true,
		`{"label":["tier"]}`:                 true,
		`{"label":["tier=web"]}`:             true,
		`{"label":["tier=db"]}`:              false,
		`{"label":["tier","other"]}`:         false,
		`{"label":["empty="]}`:               true,
		`{"label!":["tier"]}`:                false,
		`{"label!":["tier=db"]}`:             true,
		`{"label!":["tier","other"]}`:        true, // docker leaves out only what has all
		`{"label":["tier"],"label!":["no"]}`: true,
	} {
		f, err := dockerapi.ParseFilters(text, "label", "label!")
		if err != nil {
			t.Fatal(err)
		}
		if got := f.MatchLabels(labels); got != want {
			t.Errorf("%s matches: %v, want %v", text, got, want)
		}
	}
	for value, want := range map[string]bool{"web": true, "my-web-1": true, "db": true, "dbx": true, "cache": false} {
		f, err := dockerapi.ParseFilters(`{"name":["web","^db","["]}`, "name")
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Match("name", value); got != want {
			t.Errorf("name %s matches: %v, want %v", value, got, want)
		}
	}
}

func TestFilterUntil(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"1h30m":                     now.Add(-90 * time.Minute),
		"2026-05-01":                time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC),
		"2026-05-01T10:11":          time.Date(2026, 5, 1, 10, 11, 0, 0, time.UTC),
		"2026-05-01T10:11:12":       time.Date(2026, 5, 1, 10, 11, 12, 0, time.UTC),
		"2026-05-01T10:11:12+02:00": time.Date(2026, 5, 1, 8, 11, 12, 0, time.UTC),
		"1000000000":                time.Unix(1000000000, 0),
		"1000000000.25":             time.Unix(1000000000, 250000000),
	} {
		got, err := dockerapi.Filters{"until": {text}}.Until(now)
		if err != nil || !got.Equal(want) {
			t.Errorf("until %s is %v (%v), want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"soon", "", "2026-99-01", "1.x"} {
		if got, err := (dockerapi.Filters{"until": {text}}).Until(now); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("until %q is %v, %v; want an error", text, got, err)
		}
	}
	if _, err := (dockerapi.Filters{"until": {"1h", "2h"}}).Until(now); err == nil {
		t.Error("two until filters were taken")
	}
}

func FuzzParseFilters(f *testing.F) {
	f.Add(`{"label":{"a=b":true}}`)
	f.Add(`{"label":["a=b"],"until":["1h"]}`)
	f.Add(`{"name":["["]}`)
	f.Fuzz(func(t *testing.T, text string) {
		parsed, err := dockerapi.ParseFilters(text, "label", "name", "until", "dangling")
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalid) {
				t.Fatalf("%q: %v is not an invalid argument", text, err)
			}
			return
		}
		parsed.MatchLabels(map[string]string{"a": "b"})
		parsed.Match("name", "web")
		_, _ = parsed.Boolean("dangling", false)
		_, _ = parsed.Until(time.Unix(0, 0))
	})
}
