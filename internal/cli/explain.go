package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"berth/internal/nodeapi/wire"
)

func (a *app) explainCommand() *cobra.Command {
	var out outputFlags
	cmd := &cobra.Command{
		Use:               "explain NAME",
		Short:             "Say in words why a container is as it is",
		Args:              exactArgs(1, "the NAME or ID of one container"),
		ValidArgsFunction: a.completeContainers(1, true),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			var e wire.Explanation
			if err := a.call(cmd.Context(), "GET", route("explain", args[0]), nil, &e); err != nil {
				return err
			}
			switch out.form {
			case "json":
				return printJSON(a.Out, e)
			case "yaml":
				return printYAML(a.Out, e)
			case "name":
				_, err := fmt.Fprintln(a.Out, e.Subject)
				return err
			}
			var b strings.Builder
			fmt.Fprintf(&b, "%s: %s\n", e.Subject, e.Summary)
			for _, d := range e.Details {
				fmt.Fprintf(&b, "  - %s\n", d)
			}
			if len(e.Hints) > 0 {
				b.WriteString("What to do:\n")
			}
			for _, h := range e.Hints {
				fmt.Fprintf(&b, "  - %s\n", h)
			}
			_, err := a.Out.Write([]byte(b.String()))
			return err
		},
	}
	out.add(cmd)
	return cmd
}
