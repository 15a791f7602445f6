package cli

import (
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
)

func (a *app) pushCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:               "push IMAGE",
		Short:             "Send an image to its registry",
		Args:              exactArgs(1, "the name of one IMAGE"),
		ValidArgsFunction: a.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref := parseImage(args[0])
			auth, err := a.registryAuth(cmd.Context(), ref.host)
			if err != nil {
				return err
			}
			if auth == nil {
				auth = []string{"X-Registry-Auth", "e30="} // {}: docker's API wants the header in any case
			}
			// The name's slashes are part of the path.
			path := apiVersion + "/images/" + (&url.URL{Path: ref.name}).EscapedPath() + "/push?" + url.Values{"tag": {ref.tag}}.Encode()
			resp, err := a.do(cmd.Context(), unixhttp.Request{Method: "POST", Path: path, Header: auth})
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if err := a.newTransferView(quiet).follow(resp.Body, func(string) {}); err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Out, ref)
			return err
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	return cmd
}
