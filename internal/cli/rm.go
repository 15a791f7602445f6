package cli

import (
	"context"
	"net/url"

	"github.com/spf13/cobra"
)

func (a *app) rmCommand() *cobra.Command {
	var force, volumes bool
	cmd := &cobra.Command{
		Use:               "rm CONTAINER...",
		Short:             "Remove containers",
		Args:              minArgs(1, "at least one CONTAINER"),
		ValidArgsFunction: a.completeContainers(0, true),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{}
			if force {
				q.Set("force", "1")
			}
			if volumes {
				q.Set("v", "1")
			}
			return a.each(cmd.Context(), args, func(ctx context.Context, name string) error {
				return a.call(ctx, "DELETE", docker(q, "containers", name), nil, nil)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill those that run")
	cmd.Flags().BoolVarP(&volumes, "volumes", "v", false, "also their anonymous volumes")
	return cmd
}
