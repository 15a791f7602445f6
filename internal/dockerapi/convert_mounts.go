package dockerapi

import (
	"errors"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	mounttypes "github.com/moby/moby/api/types/mount"

	"github.com/docker/go-units"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// mountPlan is one mount before its volume exists.
type mountPlan struct {
	engine.Mount
	words         string            // of the mode, as the user wrote it behind -v
	volumeLabels  map[string]string // of a new volume
	volumeOptions map[string]string // of a new volume's driver
}

// maxMounts bounds the mounts of one container.
const maxMounts = 1024

// planMounts gathers all mounts that a request and its image ask for. Anonymous volumes have no
// source yet. others finds the container that VolumesFrom names.
func planMounts(h *hostConfigRequest, volumes map[string]struct{}, version int, others func(ref string) (engine.Container, error)) ([]mountPlan, error) {
	var plans []mountPlan
	taken := map[string]bool{}
	add := func(p mountPlan) error {
		p.Target = path.Clean(p.Target)
		if taken[p.Target] {
			return invalid("Duplicate mount point: %s", p.Target)
		}
		if len(plans) == maxMounts {
			return invalid("a container can have at most %d mounts", maxMounts)
		}
		taken[p.Target] = true
		plans = append(plans, p)
		return nil
	}
	for _, bind := range h.Binds {
		p, err := parseBind(bind)
		if err != nil {
			return nil, err
		}
		if err := add(p); err != nil {
			return nil, err
		}
	}
	for _, m := range h.Mounts {
		p, err := planMount(m, version)
		if err != nil {
			return nil, err
		}
		if err := add(p); err != nil {
			return nil, err
		}
	}
	for _, target := range slices.Sorted(mapKeys(h.Tmpfs)) {
		p, err := parseTmpfs(target, h.Tmpfs[target])
		if err != nil {
			return nil, err
		}
		if err := add(p); err != nil {
			return nil, err
		}
	}
	inherited, err := volumesFrom(h.VolumesFrom, others)
	if err != nil {
		return nil, err
	}
	for _, p := range inherited {
		if !taken[path.Clean(p.Target)] { // what the container says itself goes first
			if err := add(p); err != nil {
				return nil, err
			}
		}
	}
	for _, target := range slices.Sorted(mapKeys(volumes)) {
		if err := checkTarget(target); err != nil {
			return nil, invalid("invalid volume %q: %w", target, err)
		}
		if !taken[path.Clean(target)] {
			if err := add(mountPlan{Mount: engine.Mount{Kind: engine.MountVolume, Target: target, Anonymous: true}}); err != nil {
				return nil, err
			}
		}
	}
	return plans, nil
}

func mapKeys[K comparable, V any](m map[K]V) func(yield func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func checkTarget(target string) error {
	switch {
	case target == "":
		return errors.New("field Target must not be empty")
	case !strings.HasPrefix(target, "/"):
		return errors.New("invalid mount path: '" + target + "' mount path must be absolute")
	case path.Clean(target) == "/":
		return errors.New("invalid specification: destination can't be '/'")
	}
	return nil
}

// parseBind reads source:target[:mode] of -v; without a source it is an anonymous volume.
func parseBind(text string) (mountPlan, error) {
	parts := strings.Split(text, ":")
	bad := func() error { return invalid("invalid volume specification: '%s'", text) }
	p := mountPlan{Mount: engine.Mount{Kind: engine.MountVolume}}
	switch {
	case len(parts) > 3 || parts[0] == "":
		return p, bad()
	case len(parts) == 1:
		p.Target, p.Anonymous = parts[0], true
	case len(parts) == 2 && validMode(parts[1]):
		return p, bad() // a target with a mode and nothing to mount
	default:
		p.Source, p.Target = parts[0], parts[1]
	}
	if len(parts) == 3 {
		p.words = parts[2]
		if !validMode(p.words) {
			return p, invalid("invalid mode: %v", p.words)
		}
	}
	if err := checkTarget(p.Target); err != nil {
		return p, invalid("invalid volume specification: '%s': %w", text, err)
	}
	if strings.HasPrefix(p.Source, "/") {
		p.Kind, p.CreateSource = engine.MountBind, true
		p.Source = path.Clean(p.Source)
		p.Propagation = "rprivate"
	} else if err := checkVolumeName(p.Source); err != nil {
		return p, err
	}
	for _, word := range strings.Split(p.words, ",") {
		switch {
		case word == "ro":
			p.ReadOnly = true
		case word == "nocopy":
			p.NoCopy = true
		case isPropagation(word):
			if p.Kind != engine.MountBind {
				return p, invalid("invalid volume specification: '%s': propagation is for host directories", text)
			}
			p.Propagation = word
		}
	}
	return p, nil
}

// validMode tells whether a mode has known words, at most one of each group.
func validMode(mode string) bool {
	groups := [][]string{{"ro", "rw"}, {"z", "Z"}, {"nocopy"}, {"consistent", "cached", "delegated"}, propagations()}
	seen := make([]bool, len(groups))
	for _, word := range strings.Split(mode, ",") {
		i := slices.IndexFunc(groups, func(g []string) bool { return slices.Contains(g, word) })
		if i < 0 || seen[i] {
			return false
		}
		seen[i] = true
	}
	return true
}

func propagations() []string {
	return []string{"private", "rprivate", "shared", "rshared", "slave", "rslave"}
}

func isPropagation(word string) bool { return slices.Contains(propagations(), word) }

// planMount translates one --mount.
func planMount(m mounttypes.Mount, version int) (mountPlan, error) {
	wrong := func(format string, args ...any) error {
		return invalid("invalid mount config for type %q: %w", m.Type, invalid(format, args...))
	}
	p := mountPlan{Mount: engine.Mount{Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}}
	if err := checkTarget(m.Target); err != nil {
		return p, wrong("%w", err)
	}
	if version < versionStrictMounts { // options of other types were not looked at
		if m.Type != mounttypes.TypeVolume {
			m.VolumeOptions = nil
		}
		if m.Type != mounttypes.TypeTmpfs {
			m.TmpfsOptions = nil
		}
	}
	switch {
	case m.BindOptions != nil && m.Type != mounttypes.TypeBind:
		return p, invalid("BindOptions must not be specified on mount type %q", m.Type)
	case m.VolumeOptions != nil && m.Type != mounttypes.TypeVolume:
		return p, invalid("VolumeOptions must not be specified on mount type %q", m.Type)
	case m.TmpfsOptions != nil && m.Type != mounttypes.TypeTmpfs:
		return p, invalid("TmpfsOptions must not be specified on mount type %q", m.Type)
	case m.ClusterOptions != nil:
		return p, unsupported("cluster volumes (ClusterOptions) are not supported by Berth")
	}
	var err error
	switch m.Type {
	case mounttypes.TypeBind:
		err = planBind(&p, m, wrong)
	case mounttypes.TypeVolume:
		err = planVolume(&p, m, wrong)
	case mounttypes.TypeTmpfs:
		err = planTmpfs(&p, m, wrong)
	case mounttypes.TypeImage, mounttypes.TypeCluster, mounttypes.TypeNamedPipe:
		err = unsupported("mounts of type %s are not supported by Berth", m.Type)
	default:
		err = wrong("mount type unknown")
	}
	return p, err
}

// versionStrictMounts is from when options of another mount type are an error.
const versionStrictMounts = 42

func planBind(p *mountPlan, m mounttypes.Mount, wrong func(string, ...any) error) error {
	p.Kind, p.Propagation = engine.MountBind, "rprivate"
	switch {
	case m.Source == "":
		return wrong("field Source must not be empty")
	case !strings.HasPrefix(m.Source, "/"):
		return wrong("invalid mount path: '%s' mount path must be absolute", m.Source)
	}
	p.Source = path.Clean(m.Source)
	if o := m.BindOptions; o != nil {
		if o.ReadOnlyForceRecursive {
			return unsupported("BindOptions.ReadOnlyForceRecursive is not supported by Berth")
		}
		if o.Propagation != "" {
			if !isPropagation(string(o.Propagation)) {
				return wrong("invalid propagation mode: %s", o.Propagation)
			}
			p.Propagation = string(o.Propagation)
		}
		p.NonRecursive, p.CreateSource = o.NonRecursive, o.CreateMountpoint
	}
	if _, err := os.Stat(p.Source); errors.Is(err, os.ErrNotExist) && !p.CreateSource {
		return wrong("bind source path does not exist: %s", p.Source)
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return wrong("%w", err)
	}
	return nil
}

func planVolume(p *mountPlan, m mounttypes.Mount, wrong func(string, ...any) error) error {
	p.Kind, p.Anonymous = engine.MountVolume, m.Source == ""
	if m.ReadOnly && p.Anonymous {
		return wrong("must not set ReadOnly mode when using anonymous volumes")
	}
	if err := checkVolumeName(m.Source); err != nil {
		return err
	}
	o := m.VolumeOptions
	if o == nil {
		return nil
	}
	if o.Subpath != "" {
		return unsupported("VolumeOptions.Subpath is not supported by Berth")
	}
	p.NoCopy, p.volumeLabels = o.NoCopy, o.Labels
	if d := o.DriverConfig; d != nil {
		if d.Name != "" && d.Name != driverLocal {
			return errdefs.New(errdefs.ErrInvalid, "error looking up volume plugin %s: plugin %q not found", d.Name, d.Name)
		}
		p.volumeOptions = d.Options
	}
	return nil
}

func planTmpfs(p *mountPlan, m mounttypes.Mount, wrong func(string, ...any) error) error {
	p.Kind = engine.MountTmpfs
	if m.Source != "" {
		return wrong("field Source must not be specified")
	}
	o := m.TmpfsOptions
	if o == nil {
		return nil
	}
	if o.SizeBytes < 0 {
		return wrong("invalid tmpfs size %d", o.SizeBytes)
	}
	p.SizeBytes, p.Mode = o.SizeBytes, uint32(o.Mode)
	for _, opt := range o.Options {
		if len(opt) != 1 || opt[0] != "exec" && opt[0] != "noexec" {
			return wrong("invalid option: %s", strings.Join(opt, "="))
		}
		p.Options = append(p.Options, opt[0])
	}
	return nil
}

// parseTmpfs reads --tmpfs target:options.
func parseTmpfs(target, options string) (mountPlan, error) {
	p := mountPlan{Mount: engine.Mount{Kind: engine.MountTmpfs, Target: target}}
	if err := checkTarget(target); err != nil {
		return p, invalid("invalid tmpfs %q: %w", target, err)
	}
	for _, word := range strings.Split(options, ",") {
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "", "rw":
		case "ro":
			p.ReadOnly = true
		case "size":
			n, err := units.RAMInBytes(value)
			if err != nil || n < 0 {
				return p, invalid("invalid tmpfs option %q of %s: size must be bytes with an optional k, m or g", word, target)
			}
			p.SizeBytes = n
		case "mode":
			n, err := strconv.ParseUint(value, 8, 32)
			if err != nil || n > 0o7777 {
				return p, invalid("invalid tmpfs option %q of %s: mode must be octal", word, target)
			}
			p.Mode = uint32(n)
		case "exec", "noexec", "suid", "nosuid", "dev", "nodev", "sync", "async", "atime", "noatime",
			"diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
			"uid", "gid", "nr_inodes", "nr_blocks", "mpol":
			p.Options = append(p.Options, word)
		default:
			return p, invalid("invalid tmpfs option %q of %s", word, target)
		}
	}
	return p, nil
}

// volumesFrom takes over the volumes and host directories of other containers.
func volumesFrom(refs []string, others func(ref string) (engine.Container, error)) ([]mountPlan, error) {
	var plans []mountPlan
	for _, ref := range refs {
		id, mode, _ := strings.Cut(ref, ":")
		if id == "" {
			return nil, invalid("volumes-from specification cannot be an empty string")
		}
		if mode != "" && mode != "ro" && mode != "rw" && mode != "z" && mode != "Z" {
			return nil, invalid("invalid mode: %v", mode)
		}
		c, err := others(id)
		if err != nil {
			// Not as "not found": docker's clients would take that for a missing image.
			return nil, invalid("volumes-from: %v", err)
		}
		for _, m := range c.Config.Mounts {
			if m.Kind == engine.MountTmpfs {
				continue
			}
			m.ReadOnly = m.ReadOnly || mode == "ro"
			plans = append(plans, mountPlan{Mount: m, words: mode})
		}
	}
	return plans, nil
}
