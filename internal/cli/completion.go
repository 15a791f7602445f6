package cli

import (
	"net/url"
	"strings"

	"github.com/spf13/cobra"
)

// The completion command itself is cobra's; this file gives it the names that exist now.

type completion func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// completeContainers offers container names for up to limit arguments (0: any number).
func (a *app) completeContainers(limit int, all bool) completion {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if limit > 0 && len(args) >= limit {
			return nil, cobra.ShellCompDirectiveDefault
		}
		q := url.Values{}
		if all {
			q.Set("all", "1")
		}
		var list []containerSummary
		if a.call(cmd.Context(), "GET", docker(q, "containers", "json"), nil, &list) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp // a prompt is no place for errors
		}
		given := map[string]bool{}
		for _, arg := range args {
			given[arg] = true
		}
		var names []string
		for i := range list {
			for _, n := range list[i].Names {
				if n = strings.TrimPrefix(n, "/"); !given[n] {
					names = append(names, n)
				}
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeImages offers image names for the first limit arguments.
func (a *app) completeImages(limit int) completion {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= limit {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var list []imageSummary
		if a.call(cmd.Context(), "GET", docker(nil, "images", "json"), nil, &list) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []string
		for i := range list {
			names = append(names, list[i].RepoTags...)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
