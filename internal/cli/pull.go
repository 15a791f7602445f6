package cli

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
)

func (a *app) pullCommand() *cobra.Command {
	var (
		quiet    bool
		platform string
	)
	cmd := &cobra.Command{
		Use:               "pull IMAGE",
		Short:             "Fetch an image from a registry",
		Args:              exactArgs(1, "the name of one IMAGE"),
		ValidArgsFunction: a.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.pull(cmd.Context(), args[0], platform, quiet); err != nil {
				return err
			}
			_, err := fmt.Fprintln(a.Out, parseImage(args[0]).String())
			return err
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	cmd.Flags().StringVar(&platform, "platform", "", "os/arch[/variant] to fetch")
	return cmd
}

// pull fetches an image and shows progress.
func (a *app) pull(ctx context.Context, image, platform string, quiet bool) error {
	ref := parseImage(image)
	q := url.Values{"fromImage": {ref.name}, "tag": {ref.tag}}
	if platform != "" {
		q.Set("platform", platform)
	}
	auth, err := a.registryAuth(ctx, ref.host)
	if err != nil {
		return err
	}
	resp, err := a.do(ctx, unixhttp.Request{Method: "POST", Path: docker(q, "images", "create"), Header: auth})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return a.newTransferView(quiet).follow(resp.Body, func(string) {})
}

// imageRef is an image's name in its parts.
type imageRef struct {
	host string // of its registry
	name string // in full, without tag and digest
	tag  string // or digest
}

func (r imageRef) String() string {
	if strings.Contains(r.tag, ":") {
		return r.name + "@" + r.tag
	}
	return r.name + ":" + r.tag
}

// parseImage completes a familiar name as docker does: busybox is docker.io/library/busybox:latest.
// It does not judge names; the daemon does.
func parseImage(s string) imageRef {
	r := imageRef{name: s, tag: "latest"}
	if name, digest, ok := strings.Cut(r.name, "@"); ok {
		r.name, r.tag = name, digest
		if i := strings.LastIndexByte(r.name, ':'); i > strings.LastIndexByte(r.name, '/') {
			r.name = r.name[:i] // the digest decides
		}
	} else if i := strings.LastIndexByte(r.name, ':'); i > strings.LastIndexByte(r.name, '/') {
		r.name, r.tag = r.name[:i], r.name[i+1:]
	}
	host, _, slash := strings.Cut(r.name, "/")
	switch {
	case slash && (strings.ContainsAny(host, ".:") || host == "localhost" || strings.ToLower(host) != host):
		r.host = host
		if host == "index.docker.io" {
			r.host, r.name = dockerHub, dockerHub+strings.TrimPrefix(r.name, host)
		}
	case slash:
		r.host, r.name = dockerHub, dockerHub+"/"+r.name
	default:
		r.host, r.name = dockerHub, dockerHub+"/library/"+r.name
	}
	return r
}
