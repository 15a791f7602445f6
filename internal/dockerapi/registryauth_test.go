package dockerapi_test

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/registry"

	"berth/internal/dockerapi"
	"berth/internal/errdefs"
)

func TestDecodeAuthHeader(t *testing.T) {
	const object = `{"username":"jo>?","password":"sé~cret","serveraddress":"https://r.example/v2/"}`
	want := registry.AuthConfig{Username: "jo>?", Password: "sé~cret", ServerAddress: "https://r.example/v2/"}
	for name, header := range map[string]string{
		"padded":   base64.URLEncoding.EncodeToString([]byte(object)),
		"unpadded": base64.RawURLEncoding.EncodeToString([]byte(object)),
		"standard": base64.StdEncoding.EncodeToString([]byte(object)),
		"auth": base64.URLEncoding.EncodeToString([]byte(`{"auth":"` + base64.StdEncoding.EncodeToString([]byte("jo>?:sé~cret")) +
			`","serveraddress":"https://r.example/v2/"}`)),
	} {
		got, err := dockerapi.DecodeAuthHeader(header)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if got, err := dockerapi.DecodeAuthHeader(""); err != nil || got != (registry.AuthConfig{}) {
		t.Errorf("no header: %v, %v", got, err)
	}
	for name, header := range map[string]string{
		"not base64": "§§§",
		"not JSON":   base64.URLEncoding.EncodeToString([]byte("topsecret")),
		"bad auth":   base64.URLEncoding.EncodeToString([]byte(`{"auth":"topsecret"}`)),
		"no colon":   base64.URLEncoding.EncodeToString([]byte(`{"auth":"` + base64.StdEncoding.EncodeToString([]byte("topsecret")) + `"}`)),
		"huge":       strings.Repeat("A", 1<<20),
	} {
		_, err := dockerapi.DecodeAuthHeader(header)
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%s: error %v", name, err)
		} else if strings.Contains(err.Error(), "topsecret") {
			t.Errorf("%s: the error repeats the secret: %v", name, err)
		}
	}
}

func TestRegistryHost(t *testing.T) {
	for address, want := range map[string]string{
		"": "docker.io", "https://index.docker.io/v1/": "docker.io", "index.docker.io": "docker.io", "docker.io": "docker.io",
		"localhost:5000": "localhost:5000", "https://r.example/v2/": "r.example", "http://10.0.0.1:5000": "10.0.0.1:5000",
		"r.example/": "r.example", "[::1]:5000": "[::1]:5000",
		"ftp://r.example": "!", "https://": "!", "a b": "!", "user@host": "!", "/": "!",
	} {
		got, err := dockerapi.RegistryHost(address)
		if err != nil {
			got = "!"
		}
		if got != want {
			t.Errorf("%q is %q (%v), want %q", address, got, err, want)
		}
	}
}

func FuzzDecodeAuthHeader(f *testing.F) {
	f.Add(base64.URLEncoding.EncodeToString([]byte(`{"username":"a","password":"b"}`)))
	f.Add("e30=")
	f.Add("bnVsbA")
	f.Fuzz(func(t *testing.T, header string) {
		if _, err := dockerapi.DecodeAuthHeader(header); err != nil && !errors.Is(err, errdefs.ErrInvalid) {
			t.Fatalf("%q: %v is not an invalid argument", header, err)
		}
	})
}
