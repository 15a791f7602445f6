package dockerapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"strings"

	"github.com/moby/moby/api/types/registry"

	"berth/internal/errdefs"
	"berth/internal/image"
)

// maxAuthBytes bounds an X-Registry-Auth header and the body of POST /auth.
const maxAuthBytes = 64 << 10

// Names of Docker Hub: what clients send as its server address, and the host of its references.
const (
	hubIndexAddress = "https://index.docker.io/v1/"
	hubHost         = "docker.io"
)

// errBadAuth hides the decoder's own words, which could repeat a part of a password.
var errBadAuth = errors.New("not base64url of a JSON object")

// decodeAuthHeader reads an X-Registry-Auth header: base64url (RFC 4648, section 5) of a JSON
// AuthConfig, padded or not. "" is anonymous. Standard base64, which some clients send, is
// taken too.
func decodeAuthHeader(header string) (registry.AuthConfig, error) {
	if header == "" {
		return registry.AuthConfig{}, nil
	}
	if len(header) > maxAuthBytes {
		return registry.AuthConfig{}, errdefs.New(errdefs.ErrInvalid, "invalid X-Registry-Auth header: more than %d bytes", maxAuthBytes)
	}
	text := strings.TrimRight(strings.TrimSpace(header), "=")
	text = strings.NewReplacer("+", "-", "/", "_").Replace(text)
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return registry.AuthConfig{}, errdefs.New(errdefs.ErrInvalid, "invalid X-Registry-Auth header: %w", errBadAuth)
	}
	return decodeAuthConfig(raw, "invalid X-Registry-Auth header")
}

// decodeAuthBody reads an AuthConfig from a request body, as POST /auth and very old pushes send it.
func decodeAuthBody(r io.Reader) (registry.AuthConfig, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxAuthBytes+1))
	if err != nil {
		return registry.AuthConfig{}, errdefs.New(errdefs.ErrInvalid, "read credentials: %w", err)
	}
	if len(raw) > maxAuthBytes {
		return registry.AuthConfig{}, errdefs.New(errdefs.ErrInvalid, "credentials: more than %d bytes", maxAuthBytes)
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return registry.AuthConfig{}, nil
	}
	return decodeAuthConfig(raw, "invalid credentials")
}

func decodeAuthConfig(raw []byte, what string) (registry.AuthConfig, error) {
	var config registry.AuthConfig
	if err := json.Unmarshal(raw, &config); err != nil {
		return registry.AuthConfig{}, errdefs.New(errdefs.ErrInvalid, "%s: %w", what, errBadAuth)
	}
	if config.Username != "" || config.Password != "" || config.Auth == "" {
		return config, nil
	}
	// The form of ~/.docker/config.json: base64 of "user:password".
	pair, err := base64.StdEncoding.DecodeString(config.Auth)
	user, password, found := strings.Cut(string(pair), ":")
	if err != nil || !found {
		return registry.AuthConfig{}, errdefs.New(errdefs.ErrInvalid, "%s: field auth: want base64 of user:password", what)
	}
	config.Username, config.Password, config.Auth = user, strings.TrimRight(password, "\x00"), ""
	return config, nil
}

// credentials converts what a client sent into the image store's type.
func credentials(c registry.AuthConfig) image.Credentials {
	return image.Credentials{
		Username: c.Username, Password: c.Password,
		IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
	}
}

// registryHost is the host of a server address as docker login sends it: a host with or without
// port, or a URL; Docker Hub's many addresses are docker.io.
func registryHost(address string) (string, error) {
	if address == "" {
		return hubHost, nil
	}
	host := address
	if strings.Contains(address, "://") {
		u, err := url.Parse(address)
		if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
			return "", errdefs.New(errdefs.ErrInvalid, "server address %q: want HOST[:PORT] or an http(s) URL", address)
		}
		host = u.Host
	}
	host, _, _ = strings.Cut(host, "/")
	if host == "" || strings.ContainsAny(host, " \t\r\n@?#\\") {
		return "", errdefs.New(errdefs.ErrInvalid, "server address %q: want HOST[:PORT] or an http(s) URL", address)
	}
	switch host {
	case "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com":
		return hubHost, nil
	}
	return host, nil
}
