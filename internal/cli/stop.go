package cli

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"sync"

	"github.com/spf13/cobra"
)

// maxParallel bounds requests that one command has in flight.
const maxParallel = 16

func (a *app) stopCommand() *cobra.Command {
	var (
		timeout int
		signal  string
	)
	cmd := &cobra.Command{
		Use:               "stop CONTAINER...",
		Short:             "Stop containers: their stop signal, then SIGKILL",
		Args:              minArgs(1, "at least one CONTAINER"),
		ValidArgsFunction: a.completeContainers(0, false),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{}
			if cmd.Flags().Changed("time") {
				q.Set("t", strconv.Itoa(timeout))
			}
			if signal != "" {
				q.Set("signal", signal)
			}
			return a.each(cmd.Context(), args, func(ctx context.Context, name string) error {
				return a.call(ctx, "POST", docker(q, "containers", name, "stop"), nil, nil)
			})
		},
	}
	cmd.Flags().IntVarP(&timeout, "time", "t", 10, "seconds until SIGKILL; -1 waits for ever")
	cmd.Flags().StringVarP(&signal, "signal", "s", "", "signal to send instead of the container's own")
	return cmd
}

// each does f for all names at once and prints, in order, the names for which it worked.
// The last failure is returned, all others are printed.
func (a *app) each(ctx context.Context, names []string, f func(context.Context, string) error) error {
	errs := make([]error, len(names))
	slots := make(chan struct{}, maxParallel)
	var wg sync.WaitGroup
	if _, err := a.client(); err != nil {
		return err
	}
	for i, name := range names {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			errs[i] = f(ctx, name)
		})
	}
	wg.Wait()
	var last error
	for i, err := range errs {
		switch {
		case err == nil:
			fmt.Fprintln(a.Out, names[i])
		case last != nil:
			a.report(last)
			last = err
		default:
			last = err
		}
	}
	return last
}
