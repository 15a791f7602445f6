package cli

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"berth/internal/state"
)

// Where systemd is found, and where units go.
const (
	systemdMark = "/run/systemd/system"
	unitDir     = "/etc/systemd/system"
)

// install makes a systemd unit of the holder and starts it.
func (a *app) install(ctx context.Context, r state.Root, dir string, args []string) error {
	if _, err := os.Stat(systemdMark); err != nil {
		return fmt.Errorf("--install: systemd does not run on this machine; start Berth at boot with '%s'", a.hint("up"))
	}
	unit := r.Name() + ".service"
	path := filepath.Join(unitDir, unit)
	if err := os.WriteFile(path, []byte(unitText(r, dir, args)), 0o644); err != nil {
		return fmt.Errorf("--install: %w", err)
	}
	for _, words := range [][]string{{"daemon-reload"}, {"enable", unit}, {"restart", unit}} {
		if out, err := exec.CommandContext(ctx, "systemctl", words...).CombinedOutput(); err != nil {
			return fmt.Errorf("--install: systemctl %s: %w: %s", strings.Join(words, " "), err, strings.TrimSpace(string(out)))
		}
	}
	fmt.Fprintf(a.Err, "installed %s\n", path)
	return nil
}

// unitText is the unit: systemd may end the holder, never a container.
func unitText(r state.Root, dir string, args []string) string {
	line := []string{filepath.Join(dir, "berth-holder")}
	if !r.Default() {
		line = append(line, "--root", r.Arg)
	}
	if len(args) > 0 {
		line = append(append(line, "--"), args...)
	}
	for i, word := range line {
		// systemd expands % and $, and splits at spaces outside quotes.
		word = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%", "$", "$$").Replace(word)
		line[i] = `"` + word + `"`
	}
	return fmt.Sprintf(`[Unit]
Description=Berth container platform (%s)
After=network.target local-fs.target

[Service]
ExecStart=%s
Restart=on-failure
KillMode=process
Delegate=yes
LimitNOFILE=1048576
TasksMax=infinity
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
`, r.State, strings.Join(line, " "))
}
