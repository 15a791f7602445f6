package image

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/pelletier/go-toml/v2"

	"berth/internal/errdefs"
)

const (
	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io"

	// A registry may hash a large upload before it answers.
	pushResponseTimeout = 5 * time.Minute

	maxErrorBody = 4 << 10 // of a registry's answer kept for a message
)

// remote is a connection to one registry, with its mirrors, for one operation. close frees it.
type remote struct {
	named      reference.Named
	creds      Credentials
	hosts      []docker.RegistryHost
	resolver   remotes.Resolver
	transports []*http.Transport
}

func (r *remote) close() {
	for _, t := range r.transports {
		t.CloseIdleConnections()
	}
}

// connect prepares to speak with the registry of a reference. Nothing is sent yet.
func (s *Store) connect(ctx context.Context, named reference.Named, c Credentials, push bool) (*remote, error) {
	r := &remote{named: named, creds: c}
	hosts, err := s.registryHosts(ctx, r, reference.Domain(named), push)
	if err != nil {
		return nil, err
	}
	r.hosts = hosts
	r.resolver = docker.NewResolver(docker.ResolverOptions{
		Hosts:   func(string) ([]docker.RegistryHost, error) { return r.hosts, nil },
		Headers: http.Header{"User-Agent": []string{"berth"}},
	})
	return r, nil
}

// registryHosts reads the hosts.toml of a registry, if there is one, and applies docker's rules for
// insecure registries: TLS without verification first, then plain http.
func (s *Store) registryHosts(ctx context.Context, r *remote, domain string, push bool) ([]docker.RegistryHost, error) {
	dir, err := s.hostsDir(domain)
	if err != nil {
		return nil, err
	}
	own := domain
	if domain == dockerHub {
		own = dockerHubHost
	}
	o := config.HostOptions{
		// Credentials go to the registry they are for and never to its mirrors.
		Credentials: func(host string) (string, string, error) {
			switch {
			case host != own:
				return "", "", nil
			case r.creds.IdentityToken != "":
				return "", r.creds.IdentityToken, nil
			}
			return r.creds.Username, r.creds.Password, nil
		},
		UpdateClient: func(c *http.Client) error {
			if t, ok := c.Transport.(*http.Transport); ok {
				r.transports = append(r.transports, t)
				if push {
					t.ResponseHeaderTimeout = pushResponseTimeout
				}
			}
			return nil
		},
	}
	if dir != "" {
		o.HostDir = func(string) (string, error) { return dir, nil }
	} else if s.insecure(ctx, domain) {
		o.DefaultScheme = "http"
		o.DefaultTLS = &tls.Config{InsecureSkipVerify: true} // the operator listed this registry as insecure
	}
	hosts, err := config.ConfigureHosts(s.context(ctx), o)(domain)
	if err != nil {
		return nil, errdefs.New(errdefs.ErrInvalid, "registry %s: %s", domain, oneLine(err))
	}
	if r.creds.RegistryToken != "" {
		for i := range hosts {
			if hosts[i].Host == own {
				hosts[i].Authorizer = fixedToken(r.creds.RegistryToken)
			}
		}
	}
	return hosts, nil
}

// hostsDir finds the directory that configures a registry: named by host, host_port_ or _default,
// as containerd names them. "" is none. A hosts.toml that cannot be read is refused here:
// the library would go on without it.
func (s *Store) hostsDir(domain string) (string, error) {
	if s.cfg.Registries == "" {
		return "", nil
	}
	dir, err := config.HostDirFromRoot(s.cfg.Registries)(domain)
	if cerrdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", localError("read the configuration of registry "+domain, err)
	}
	path := filepath.Join(dir, "hosts.toml")
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return dir, nil // certificates only
	}
	if err != nil {
		return "", localError("read the configuration of registry "+domain, err)
	}
	var any map[string]any
	if err := toml.Unmarshal(data, &any); err != nil {
		return "", errdefs.New(errdefs.ErrInvalid, "%s: %s; correct or remove the file", path, oneLine(err))
	}
	return dir, nil
}

// insecure tells whether the operator listed the registry. Loopback needs no listing: the library
// tries https without verification and then http there, as docker does.
func (s *Store) insecure(ctx context.Context, domain string) bool {
	host := domain
	if h, _, err := net.SplitHostPort(domain); err == nil {
		host = h
	}
	var nets []*net.IPNet
	for _, entry := range s.cfg.InsecureRegistries {
		if entry == domain || entry == host {
			return true
		}
		if _, n, err := net.ParseCIDR(entry); err == nil {
			nets = append(nets, n)
		}
	}
	if len(nets) == 0 {
		return false
	}
	ips := []net.IP{net.ParseIP(strings.Trim(host, "[]"))}
	if ips[0] == nil {
		// An unknown host fails later, with the reason.
		ips, _ = net.DefaultResolver.LookupIP(ctx, "ip", host)
	}
	for _, ip := range ips {
		for _, n := range nets {
			if n.Contains(ip) {
				return true
			}
		}
	}
	return false
}

// fixedToken authorizes with a bearer token that the user brought.
type fixedToken string

func (t fixedToken) Authorize(_ context.Context, r *http.Request) error {
	r.Header.Set("Authorization", "Bearer "+string(t))
	return nil
}

func (t fixedToken) AddResponses(context.Context, []*http.Response) error {
	return fmt.Errorf("the registry token was refused: %w", docker.ErrInvalidAuthorization)
}

// CheckLogin tries credentials against a registry, given as host, host:port or docker's index
// address, and returns docker's line on success. Errors: errdefs.ErrUnauthorized when they are
// refused, errdefs.ErrUnavailable when the registry cannot be asked.
func (s *Store) CheckLogin(ctx context.Context, host string, c Credentials) (string, error) {
	ctx = s.context(ctx)
	domain := loginDomain(host)
	named, err := reference.ParseNormalizedNamed(domain + "/login")
	if err != nil {
		return "", errdefs.New(errdefs.ErrInvalid, "invalid registry %q: %w", clip(host), err)
	}
	r, err := s.connect(ctx, named, c, false)
	if err != nil {
		return "", err
	}
	defer r.close()
	if len(r.hosts) == 0 {
		return "", errdefs.New(errdefs.ErrInvalid, "registry %s has no hosts; its hosts.toml leaves none", domain)
	}
	h := r.hosts[len(r.hosts)-1] // mirrors come first
	address := h.Scheme + "://" + h.Host + strings.TrimSuffix(h.Path, "/") + "/"
	var seen []*http.Response
	for range 3 {
		resp, err := loginAttempt(ctx, h, address)
		if err != nil {
			return "", r.translate(opLogin, err)
		}
		seen = append(seen, resp)
		if resp.StatusCode == http.StatusOK {
			return "Login Succeeded", nil
		}
		if resp.StatusCode != http.StatusUnauthorized {
			return "", errdefs.New(errdefs.ErrUnavailable, "Get %q: received unexpected HTTP status: %s", address, resp.Status)
		}
		if len(seen) == 2 {
			break
		}
		if err := h.Authorizer.AddResponses(ctx, seen); err != nil {
			return "", r.translate(opLogin, err)
		}
	}
	return "", errdefs.New(errdefs.ErrUnauthorized, "Get %q: unauthorized: incorrect username or password", address)
}

func loginAttempt(ctx context.Context, h docker.RegistryHost, address string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	for k, v := range h.Header {
		req.Header[k] = v
	}
	if err := h.Authorizer.Authorize(ctx, req); err != nil {
		return nil, err
	}
	resp, err := h.Client.Do(req)
	if err != nil {
		return nil, err
	}
	_, _ = io.CopyN(io.Discard, resp.Body, maxErrorBody) // so that the connection can be used again
	resp.Body.Close()
	return resp, nil
}

// loginDomain turns what docker clients send as a server address into a reference's domain.
func loginDomain(host string) string {
	host = strings.TrimPrefix(strings.TrimPrefix(host, "https://"), "http://")
	host, _, _ = strings.Cut(host, "/")
	switch host {
	case "", "index.docker.io", dockerHubHost:
		return dockerHub
	}
	return host
}

// operation is what a registry was asked for, as its refusals mean different things.
type operation int

const (
	opPull operation = iota
	opPush
	opLogin
)

// translate puts a registry's failure into docker's words and gives it a kind.
func (r *remote) translate(op operation, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errdefs.Kind(err) != nil:
		return err
	case diskFull(err):
		return errdefs.New(errdefs.ErrExhausted, "%s: no space left on device", reference.FamiliarString(r.named))
	case cerrdefs.IsNotFound(err) && op == opPull:
		if strings.Contains(err.Error(), "rejecting ") {
			return errdefs.New(errdefs.ErrInvalid, "manifest of %s has more than %d bytes", reference.FamiliarString(r.named), maxManifestBytes)
		}
		return errdefs.New(errdefs.ErrNotFound, "manifest for %s not found: manifest unknown", reference.FamiliarString(r.named))
	case errors.Is(err, cerrdefs.ErrNotImplemented) && strings.Contains(err.Error(), "schema"), strings.Contains(err.Error(), "manifest.v1+"):
		return r.schema1()
	}
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		return r.translateStatus(op, status, or(registryMessage(err), bodyMessage(status.Body)))
	}
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		return r.refused(op, http.StatusUnauthorized, "")
	}
	var web *url.Error
	if errors.As(err, &web) {
		return errdefs.New(errdefs.ErrUnavailable, "Get %q: %s", versionURL(web.URL), oneLine(web.Err))
	}
	return errdefs.New(errdefs.ErrUnavailable, "%s: %s", reference.FamiliarString(r.named), oneLine(err))
}

func (r *remote) schema1() error {
	return errdefs.New(errdefs.ErrUnsupported, "image %s has a Docker schema 1 manifest, which is not supported; push it again with a current client", reference.FamiliarString(r.named))
}

func (r *remote) translateStatus(op operation, status remoteerrors.ErrUnexpectedStatus, message string) error {
	switch code := status.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return r.refused(op, code, message)
	case code == http.StatusNotFound:
		return errdefs.New(errdefs.ErrNotFound, "repository %s not found: does not exist or no pull access", reference.FamiliarName(r.named))
	case code == http.StatusTooManyRequests:
		return errdefs.New(errdefs.ErrUnavailable, "toomanyrequests: %s", or(message, status.Status))
	case code == http.StatusRequestEntityTooLarge, code == http.StatusBadRequest:
		return errdefs.New(errdefs.ErrInvalid, "registry refused %s: %s", reference.FamiliarString(r.named), or(message, status.Status))
	default:
		return errdefs.New(errdefs.ErrUnavailable, "received unexpected HTTP status: %s", or(message, status.Status))
	}
}

// refused is for 401 and 403. A stranger cannot be told whether what he wants exists.
func (r *remote) refused(op operation, code int, message string) error {
	anonymous := r.creds == Credentials{}
	switch {
	case op == opLogin:
		return errdefs.New(errdefs.ErrUnauthorized, "login attempt to %s failed: unauthorized: %s", reference.Domain(r.named), or(message, "incorrect username or password"))
	case op == opPull && (anonymous || code == http.StatusForbidden):
		return errdefs.New(errdefs.ErrNotFound, "pull access denied for %s, repository does not exist or may require 'docker login': denied: %s",
			reference.FamiliarName(r.named), or(message, "requested access to the resource is denied"))
	case op == opPush && code == http.StatusForbidden:
		return errdefs.New(errdefs.ErrForbidden, "denied: %s", or(message, "requested access to the resource is denied"))
	case anonymous:
		return errdefs.New(errdefs.ErrUnauthorized, "unauthorized: %s; log in with docker login %s", or(message, "authentication required"), reference.Domain(r.named))
	}
	return errdefs.New(errdefs.ErrUnauthorized, "unauthorized: %s", or(message, "authentication required"))
}

// registryMessage is what a registry itself said, clipped; "" when it said nothing.
func registryMessage(err error) string {
	var all docker.Errors
	if !errors.As(err, &all) || len(all) == 0 {
		return ""
	}
	message := ""
	var one docker.Error
	var code docker.ErrorCode
	switch {
	case errors.As(all[0], &one):
		message = one.Message
	case errors.As(all[0], &code):
		message = code.Message() // the code's usual words, which were therefore dropped
	}
	return clip(strings.Join(strings.Fields(message), " "))
}

// bodyMessage is what a token server said, in the registries' form or in Docker Hub's.
func bodyMessage(body []byte) string {
	var said struct {
		Errors  []struct{ Message string }
		Details string
	}
	if err := json.Unmarshal(body, &said); err != nil {
		return ""
	}
	if len(said.Errors) > 0 {
		said.Details = said.Errors[0].Message
	}
	return clip(strings.Join(strings.Fields(said.Details), " "))
}

func or(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}

// versionURL is the address docker names in such errors: the registry's API root.
func versionURL(full string) string {
	u, err := url.Parse(full)
	if err != nil {
		return full
	}
	return u.Scheme + "://" + u.Host + "/v2/"
}

// passing tells failures that may not happen again: worth a retry.
func passing(err error) bool {
	if errors.Is(err, context.Canceled) || diskFull(err) || errdefs.Kind(err) != nil {
		return false
	}
	var status remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		code := status.StatusCode
		return code >= 500 || code == http.StatusRequestTimeout || code == http.StatusTooManyRequests
	}
	var timeout net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errStalled) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED) ||
		(errors.As(err, &timeout) && timeout.Timeout())
}

// errStalled breaks off a transfer in which nothing arrives.
var errStalled = errors.New("the registry sent nothing for too long")

// retry runs step until it succeeds, fails for good, or has failed maxRetries times for passing
// reasons. The pauses double.
func (s *Store) retry(ctx context.Context, p Progress, id string, step func() error) error {
	delay := s.cfg.RetryDelay
	for attempt := 0; ; attempt++ {
		err := step()
		if err == nil || attempt == maxRetries || !passing(err) || ctx.Err() != nil {
			return err
		}
		p.say(id, fmt.Sprintf("Retrying in %s", delay.Round(time.Millisecond)))
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return ctx.Err()
		}
		delay *= 2
	}
}
