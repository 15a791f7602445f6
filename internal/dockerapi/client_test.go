package dockerapi_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// docker runs the real client against the node.
func (n *liveNode) docker(stdin string, args ...string) (code int, stdout, stderr string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+n.socket, "DOCKER_CONFIG="+n.t.TempDir())
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatalf("docker %v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// TestRealClient: what people type, through the docker command on this machine.
func TestRealClient(t *testing.T) {
	if _, err := exec.LookPath("docker"); err != nil {
		t.Skip("no docker client on this machine")
	}
	n := newLiveNode(t)
	for _, tc := range []struct {
		stdin          string
		args           string
		code           int
		stdout, stderr string // contained; "=" at the front: equal
	}{
		{"", "run --rm busybox echo hi there", 0, "=hi there\n", "="},
		{"", "run --rm busybox both", 3, "=out\n", "=err\n"},
		{"some input", "run --rm -i busybox cat", 0, "=some input", "="},
		{"", "run --name lost busybox missing-program", 127, "=", "executable file not found"},
		{"", "run --rm busybox locked-program", 126, "=", "permission denied"},
		{"", "run --rm --network nope busybox echo", 125, "=", "network nope not found"},
		{"", "run --rm --gpus all busybox echo", 125, "=", "HostConfig.DeviceRequests is not supported by Berth"},
		{"", "run -d -i --name web -p 8080:80 -v data:/data --memory 64m --cpus 0.5 --restart always --label a=b busybox sleep", 0, "", "="},
		{"", "run --name web busybox echo", 125, "=", "Conflict. The container name \"/web\" is already in use"},
		{"", "ps --format {{.Names}}|{{.Ports}}|{{.Command}}|{{.State}}", 0, "=web|0.0.0.0:8080->80/tcp|\"sleep\"|running\n", "="},
		{"", "ps -a --filter name=lost --format {{.Status}}", 0, "Created", "="},
		{"", "inspect -f {{.HostConfig.Memory}}|{{.HostConfig.NanoCpus}}|{{.NetworkSettings.IPAddress}}|{{.State.Status}} web", 0, "=67108864|500000000|172.17.0.2|running\n", "="},
		{"", "port web", 0, "=80/tcp -> 0.0.0.0:8080\n", "="},
		{"", "exec web echo inside", 0, "=inside\n", "="},
		{"piped", "exec -i web cat", 0, "=piped", "="},
		{"", "exec web both", 3, "=out\n", "=err\n"},
		{"", "exec web missing", 127, "", ""},
		{"", "stats --no-stream --format {{.Name}}|{{.PIDs}} web", 0, "=web|3\n", "="},
		{"", "update --memory 128m --memory-swap -1 web", 0, "=web\n", "="},
		{"", "kill web", 0, "=web\n", "="},
		{"", "wait web", 0, "=0\n", "="},
		{"", "rm web lost", 0, "=web\nlost\n", "="},
		{"", "export nothing", 1, "=", "docker export is not supported yet by Berth"},
		{"", "service ls", 1, "=", "This node is not a swarm manager"},
		{"", "create --name later busybox echo", 0, "", "="},
		{"", "start -a later", 0, "=\n", "="}, // echo without words
		{"", "events --since 1h --until SOON --filter event=create --filter container=later --format {{.Action}}", 0, "=create\n", "="},
	} {
		tc.args = strings.ReplaceAll(tc.args, "SOON", strconv.FormatInt(time.Now().Unix()+1, 10))
		code, stdout, stderr := n.docker(tc.stdin, strings.Split(tc.args, " ")...)
		check := func(what, got, want string) {
			if exact, ok := strings.CutPrefix(want, "="); ok && got != exact || !ok && !strings.Contains(got, want) {
				t.Errorf("docker %s: %s %q, want %q", tc.args, what, got, want)
			}
		}
		if code != tc.code {
			t.Errorf("docker %s: exit code %d, want %d", tc.args, code, tc.code)
		}
		check("stdout", stdout, tc.stdout)
		check("stderr", stderr, tc.stderr)
	}
}
