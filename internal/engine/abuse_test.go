package engine_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// Whoever removes by force wins against those who start: it is not told that the container
// was started meanwhile.
func TestForcedRemovalAgainstStarts(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web")
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 20 {
					_ = r.e.StartContainer(bg, id)                // refused or not
					_ = r.e.RestartContainer(bg, id, nil, "KILL") // likewise
					time.Sleep(time.Millisecond)
				}
			})
		}
		time.Sleep(5 * time.Millisecond)
		must(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{Force: true}))
		wg.Wait()
		r.gone(id)
		r.empty()
	})
}

// Clients that die between the creation and the start of an exec do not use up a container's execs.
func TestVanishedExecClients(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		id := r.started("web")
		x := engine.ExecConfig{Container: id, Args: []string{"true"}}
		var err error
		for err == nil {
			_, err = r.e.CreateExec(bg, x)
		}
		wantKind(t, err, errdefs.ErrExhausted)
		time.Sleep(10 * time.Minute)
		_, err = r.e.CreateExec(bg, x)
		must(t, err)
		must(t, r.e.RemoveContainer(bg, id, engine.RemoveOptions{Force: true}))
	})
}

// What could never start is refused before anything of it exists.
func TestImpossibleContainers(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		for name, alter := range map[string]alter{
			"zero byte in a source": func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
				c.Mounts = []engine.Mount{{Kind: engine.MountBind, Source: "/a\x00b", Target: "/x"}}
			},
			"zero byte in a target": func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
				c.Mounts = []engine.Mount{{Kind: engine.MountBind, Source: "/a", Target: "/x\x00"}}
			},
			"too many log files": func(c *engine.ContainerConfig, _ *engine.SandboxConfig) {
				c.Log = engine.LogConfig{MaxFiles: 1 << 30}
			},
			"zero byte in the cgroup parent": func(_ *engine.ContainerConfig, s *engine.SandboxConfig) {
				s.CgroupParent = "a\x00b"
			},
			"long name in the cgroup parent": func(_ *engine.ContainerConfig, s *engine.SandboxConfig) {
				s.CgroupParent = "/a/" + strings.Repeat("b", 300)
			},
		} {
			_, err := r.tryContainer("web", alter)
			if errdefs.Kind(err) != errdefs.ErrInvalid || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v", name, err)
			}
		}
		if n := len(r.e.Containers()); n != 0 {
			t.Errorf("%d containers were made", n)
		}
	})
}
