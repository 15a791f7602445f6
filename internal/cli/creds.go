package cli

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Docker Hub's registry, and its name in docker's configuration file.
const (
	dockerHub    = "docker.io"
	dockerHubKey = "https://index.docker.io/v1/"
)

// dockerConfig is the part of docker's config.json that names credentials.
type dockerConfig struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
	} `json:"auths"`
	CredHelpers map[string]string `json:"credHelpers"`
	CredsStore  string            `json:"credsStore"`
}

// authConfig is the content of X-Registry-Auth.
type authConfig struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	ServerAddress string `json:"serveraddress,omitempty"`
	IdentityToken string `json:"identitytoken,omitempty"`
	RegistryToken string `json:"registrytoken,omitempty"`
}

// registryAuth returns the header with the user's credentials for a registry, nil for none.
func (a *app) registryAuth(ctx context.Context, host string) ([]string, error) {
	dir := a.getenv("DOCKER_CONFIG")
	if dir == "" {
		home := a.getenv("HOME")
		if home == "" {
			return nil, nil
		}
		dir = filepath.Join(home, ".docker")
	}
	path := filepath.Join(dir, "config.json")
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, platformError(fmt.Errorf("read credentials: %w", err))
	}
	var c dockerConfig
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, platformError(fmt.Errorf("read credentials: %s: %w", path, err))
	}
	auth, err := c.find(ctx, host)
	if err != nil || auth == nil {
		return nil, platformError(err)
	}
	out, err := json.Marshal(auth)
	if err != nil {
		return nil, err
	}
	return []string{"X-Registry-Auth", base64.URLEncoding.EncodeToString(out)}, nil
}

// find looks for a registry in docker's order: its own helper, the common store, the file.
func (c *dockerConfig) find(ctx context.Context, host string) (*authConfig, error) {
	key := host
	if host == dockerHub {
		key = dockerHubKey
	}
	helper := c.CredHelpers[key]
	if helper == "" {
		helper = c.CredHelpers[host]
	}
	if helper == "" {
		helper = c.CredsStore
	}
	if helper != "" {
		return askHelper(ctx, helper, key)
	}
	for server, entry := range c.Auths {
		if server != key && serverHost(server) != host {
			continue
		}
		auth := &authConfig{Username: entry.Username, Password: entry.Password, ServerAddress: server,
			IdentityToken: entry.IdentityToken, RegistryToken: entry.RegistryToken}
		if entry.Auth != "" {
			plain, err := base64.StdEncoding.DecodeString(entry.Auth)
			user, password, ok := strings.Cut(string(plain), ":")
			if err != nil || !ok {
				return nil, fmt.Errorf("the credentials for %s in docker's config.json are malformed; log in again", server)
			}
			auth.Username, auth.Password = user, strings.Trim(password, "\x00")
		}
		return auth, nil
	}
	return nil, nil
}

// serverHost is the host of a key of auths, which may be a URL.
func serverHost(server string) string {
	if _, rest, ok := strings.Cut(server, "://"); ok {
		server = rest
	}
	host, _, _ := strings.Cut(server, "/")
	return host
}

// askHelper runs a docker credential helper that the user has configured.
func askHelper(ctx context.Context, helper, server string) (*authConfig, error) {
	program := "docker-credential-" + helper
	cmd := exec.CommandContext(ctx, program, "get")
	cmd.Stdin = strings.NewReader(server)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if strings.Contains(out.String(), "credentials not found") {
			return nil, nil
		}
		return nil, fmt.Errorf("credentials for %s: %s: %w: %s", server, program, err, strings.TrimSpace(out.String()+" "+errs.String()))
	}
	var got struct{ ServerURL, Username, Secret string }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		return nil, fmt.Errorf("credentials for %s: %s: its answer is not understood: %w", server, program, err)
	}
	if got.Username == "<token>" {
		return &authConfig{ServerAddress: server, IdentityToken: got.Secret}, nil
	}
	return &authConfig{Username: got.Username, Password: got.Secret, ServerAddress: server}, nil
}
