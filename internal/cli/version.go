package cli

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

type versionInfo struct {
	Client clientVersion  `json:"client"`
	Server map[string]any `json:"server,omitempty"`
}

type clientVersion struct {
	Version    string `json:"version"`
	APIVersion string `json:"apiVersion"`
	Go         string `json:"go"`
	Platform   string `json:"platform"`
}

func (a *app) versionCommand() *cobra.Command {
	var (
		out    outputFlags
		client bool
	)
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the versions of this program and of the daemon",
		Args:  exactArgs(0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			v := versionInfo{Client: clientVersion{
				Version: a.version, APIVersion: apiVersion[len("/v"):],
				Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
			}}
			var serverErr error
			if !client {
				serverErr = a.call(cmd.Context(), "GET", docker(nil, "version"), nil, &v.Server)
			}
			if err := a.printVersion(v, &out); err != nil {
				return err
			}
			return serverErr
		},
	}
	cmd.Flags().BoolVar(&client, "client", false, "do not ask the daemon")
	out.add(cmd)
	return cmd
}

func (a *app) printVersion(v versionInfo, out *outputFlags) error {
	switch out.form {
	case "json":
		return printJSON(a.Out, v)
	case "yaml":
		return printYAML(a.Out, v)
	case "name":
		_, err := fmt.Fprintln(a.Out, v.Client.Version)
		return err
	}
	fmt.Fprintf(a.Out, "berth %s (%s, %s, Docker API %s)\n", v.Client.Version, v.Client.Platform, v.Client.Go, v.Client.APIVersion)
	if v.Server != nil {
		fmt.Fprintf(a.Out, "berthd %v (%v/%v, %v, Docker API %v to %v)\n", v.Server["Version"], v.Server["Os"], v.Server["Arch"],
			v.Server["GoVersion"], v.Server["MinAPIVersion"], v.Server["ApiVersion"])
	}
	return nil
}
