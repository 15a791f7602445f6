package cli

import (
	"fmt"
	"io"
	"net/url"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"berth/internal/cli/unixhttp"
)

func (a *app) loadCommand() *cobra.Command {
	var (
		input string
		quiet bool
	)
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Read images from an archive of docker or OCI form",
		Args:  exactArgs(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := unixhttp.Request{
				Method: "POST", Path: docker(url.Values{"quiet": {fmt.Sprint(boolInt(quiet))}}, "images", "load"),
				Header: []string{"Content-Type", "application/x-tar"}, Stream: a.In,
			}
			if input != "" && input != "-" {
				f, err := os.Open(input)
				if err != nil {
					return &exitError{code: exitFailed, err: err}
				}
				defer f.Close()
				info, err := f.Stat()
				switch {
				case err != nil:
					return err
				case info.IsDir():
					return &exitError{code: exitFailed, err: fmt.Errorf("-i %s: is a directory; an archive file is needed", input)}
				case info.Mode().IsRegular() && info.Size() == 0:
					return &exitError{code: exitFailed, err: fmt.Errorf("-i %s: is empty", input)}
				}
				req.Stream, req.Length = f, info.Size()
			} else if f, ok := a.In.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				return fmt.Errorf("standard input is a terminal; name an archive with -i, or redirect one")
			}
			resp, err := a.do(cmd.Context(), req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			return a.newTransferView(quiet).follow(resp.Body, func(text string) { _, _ = io.WriteString(a.Out, text) })
		},
	}
	cmd.Flags().StringVarP(&input, "input", "i", "", "archive file (default: standard input)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	_ = cmd.MarkFlagFilename("input")
	return cmd
}
