package cli

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"berth/internal/cli/unixhttp"
)

func (a *app) logsCommand() *cobra.Command {
	var (
		follow, times      bool
		since, until, tail string
	)
	cmd := &cobra.Command{
		Use:               "logs CONTAINER",
		Short:             "Show what a container has written",
		Args:              exactArgs(1, "the NAME or ID of one CONTAINER"),
		ValidArgsFunction: a.completeContainers(1, true),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{"stdout": {"1"}, "stderr": {"1"}}
			if follow {
				q.Set("follow", "1")
			}
			if times {
				q.Set("timestamps", "1")
			}
			if _, err := strconv.ParseUint(tail, 10, 31); err != nil && tail != "all" {
				return fmt.Errorf("--tail %s: neither a number nor all", tail)
			}
			q.Set("tail", tail)
			for name, text := range map[string]string{"since": since, "until": until} {
				if text == "" {
					continue
				}
				t, err := parseTime(text, time.Now())
				if err != nil {
					return fmt.Errorf("--%s %s: %w", name, text, err)
				}
				q.Set(name, t)
			}
			return a.logs(cmd.Context(), args[0], q)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on until the container ends")
	f.BoolVarP(&times, "timestamps", "t", false, "show times")
	f.StringVar(&since, "since", "", "only what is younger: 10m, 2026-01-02T15:04:05Z or seconds since 1970")
	f.StringVar(&until, "until", "", "only what is older")
	f.StringVarP(&tail, "tail", "n", "all", "only the last N lines")
	return cmd
}

func (a *app) logs(ctx context.Context, container string, q url.Values) error {
	resp, err := a.do(ctx, unixhttp.Request{Method: "GET", Path: docker(q, "containers", container, "logs")})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var framed bool
	switch resp.Header.Get("Content-Type") {
	case "application/vnd.docker.multiplexed-stream":
		framed = true
	case "application/vnd.docker.raw-stream":
	default:
		var c containerInspect
		if err := a.call(ctx, "GET", docker(nil, "containers", container, "json"), nil, &c); err != nil {
			return err
		}
		framed = !c.Config.Tty
	}
	if framed {
		err = demux(a.Out, a.Err, resp.Body)
	} else {
		_, err = io.Copy(a.Out, resp.Body)
	}
	if err != nil {
		return platformError(fmt.Errorf("the log of %s broke off: %w", container, err))
	}
	return nil
}

// parseTime turns a duration before now, a date or a number of seconds into docker's form.
func parseTime(text string, now time.Time) (string, error) {
	form := func(t time.Time) string {
		return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond())
	}
	if d, err := time.ParseDuration(text); err == nil {
		return form(now.Add(-d)), nil
	}
	if whole, frac, _ := strings.Cut(text, "."); strings.Trim(whole+frac, "0123456789") == "" && whole != "" {
		return text, nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return form(t), nil
		}
	}
	return "", fmt.Errorf("neither a duration, a date nor a number of seconds")
}
