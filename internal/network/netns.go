package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"berth/internal/errdefs"
)

// nsfsMagic is the type of the file system that open namespaces live in (linux/magic.h).
const nsfsMagic = 0x6e736673

// namespaceFile is one kind of namespace a sandbox can have: its file below Root.Namespaces.
type namespaceFile struct {
	name string
	flag int
	want func(NS) bool
}

func namespaceFiles() []namespaceFile {
	return []namespaceFile{
		{"net", unix.CLONE_NEWNET, func(o NS) bool { return o.Net }},
		{"ipc", unix.CLONE_NEWIPC, func(o NS) bool { return o.IPC }},
		{"uts", unix.CLONE_NEWUTS, func(o NS) bool { return o.UTS }},
	}
}

// NetNS is the path of a sandbox's network namespace.
func (s *Service) NetNS(sandbox string) string {
	return filepath.Join(s.root.Namespaces(sandbox), "net")
}

// NewNamespaces makes the namespaces of a sandbox that own asks for and mounts them below
// Root.Namespaces(sandbox), as net, ipc and uts. The loopback interface is up. sysctls are
// namespaced kernel parameters ("net.ipv4.ip_forward"); one that belongs to no namespace of
// the sandbox's own, or that the kernel refuses, is ErrInvalid. ErrExists when the sandbox has
// namespaces already. After an error nothing is left.
func (s *Service) NewNamespaces(sandbox, hostname, domainname string, own NS, sysctls map[string]string) error {
	if err := checkSysctls(sysctls, own); err != nil {
		return err
	}
	s.reaper.touch()
	dir := s.root.Namespaces(sandbox)
	if err := s.prepareNamespaceDir(); err != nil {
		return fmt.Errorf("namespaces of sandbox %s: %w", sandbox, err)
	}
	if err := os.Mkdir(dir, 0o711); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return errdefs.New(errdefs.ErrExists, "namespaces of sandbox %s exist already", sandbox)
		}
		return fmt.Errorf("namespaces of sandbox %s: %w", sandbox, err)
	}
	err := onOwnThread(func() error { return fillNamespaces(dir, hostname, domainname, own, sysctls) })
	if err != nil {
		return errors.Join(fmt.Errorf("namespaces of sandbox %s: %w", sandbox, err), unmountNamespaces(dir))
	}
	return nil
}

// namespaceDir holds the directories of all sandboxes' namespaces.
func (s *Service) namespaceDir() string { return filepath.Join(s.root.Run, "ns") }

// prepareNamespaceDir makes the directory once. Where it is not in memory already, it becomes a
// file system in memory: the three files of a sandbox cost more than its namespaces on a disk.
// It is private, so that no other mount namespace holds on to the sandboxes'.
func (s *Service) prepareNamespaceDir() error {
	s.nsDir.mu.Lock()
	defer s.nsDir.mu.Unlock()
	if s.nsDir.ready {
		return nil
	}
	dir := s.namespaceDir()
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	// What an earlier process left on the disk must stay visible.
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if st.Type != unix.TMPFS_MAGIC && len(entries) == 0 {
		err := unix.Mount(nsMountName, dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0711,size=16m")
		if err == nil {
			err = unix.Mount("", dir, "", unix.MS_PRIVATE, "")
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	s.nsDir.ready = true
	return nil
}

// removeNamespaceDir undoes prepareNamespaceDir. Namespaces that are in use elsewhere live on.
func (s *Service) removeNamespaceDir() error {
	s.nsDir.mu.Lock()
	defer s.nsDir.mu.Unlock()
	s.nsDir.ready = false
	dir := s.namespaceDir()
	var st, parent unix.Stat_t
	if unix.Lstat(dir, &st) != nil || unix.Lstat(filepath.Dir(dir), &parent) != nil {
		return nil
	}
	if st.Dev != parent.Dev {
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// nsMountName is what mount tables show as the source of the file system.
const nsMountName = "berth-namespaces"

// fillNamespaces runs on a thread that is thrown away.
func fillNamespaces(dir, hostname, domainname string, own NS, sysctls map[string]string) error {
	flags := 0
	for _, f := range namespaceFiles() {
		if f.want(own) {
			flags |= f.flag
		}
	}
	if flags == 0 {
		return nil
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if own.UTS {
		if err := unix.Sethostname([]byte(hostname)); err != nil {
			return errdefs.New(errdefs.ErrInvalid, "hostname %q: %w", hostname, err)
		}
		if err := unix.Setdomainname([]byte(domainname)); err != nil {
			return errdefs.New(errdefs.ErrInvalid, "domain name %q: %w", domainname, err)
		}
	}
	if own.Net {
		if err := prepareNetNS(); err != nil {
			return err
		}
	}
	for k, v := range sysctls {
		if err := writeSysctl(sysctlPath(k), v); err != nil {
			return errdefs.New(errdefs.ErrInvalid, "sysctl %s=%q: %w", k, v, err)
		}
	}
	task := fmt.Sprintf("/proc/self/task/%d/ns", unix.Gettid())
	for _, f := range namespaceFiles() {
		if !f.want(own) {
			continue
		}
		target := filepath.Join(dir, f.name)
		file, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
		if err != nil {
			return err
		}
		file.Close()
		if err := unix.Mount(filepath.Join(task, f.name), target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
	}
	return nil
}

// prepareNetNS sets what docker sets in a container's own network namespace: low ports and
// ping need no privilege there, and there is no IPv6 besides the loopback, because networks
// have no IPv6 addresses and link-local ones would pass by the rules.
func prepareNetNS() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	for _, kv := range [...][2]string{
		{"net/ipv4/ip_unprivileged_port_start", "0"},
		{"net/ipv4/ping_group_range", "0 2147483647"},
		{"net/ipv6/conf/default/disable_ipv6", "1"},
	} {
		// A kernel built without one of these needs no setting of it.
		if err := writeSysctl(kv[0], kv[1]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// RemoveNamespaces takes away the names of a sandbox's namespaces. The kernel ends a namespace
// when nothing uses it any more, behind this call. Removing what is not there is no error.
func (s *Service) RemoveNamespaces(sandbox string) error {
	dir := s.root.Namespaces(sandbox)
	if filepath.Dir(dir) != s.namespaceDir() {
		return errdefs.New(errdefs.ErrInvalid, "sandbox ID %q is not one", sandbox)
	}
	// The new name lets the sandbox be made again at once; the rest happens behind the answer.
	old := filepath.Join(filepath.Dir(dir), removedPrefix+sandbox+"."+randomHex(4))
	if err := os.Rename(dir, old); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove namespaces of sandbox %s: %w", sandbox, err)
	}
	s.reap(remains{nsDir: old})
	return nil
}

// removedPrefix marks directories of namespaces that wait for their end.
const removedPrefix = ".removed-"

// unmountNamespaces removes a sandbox's namespace directory with all that is mounted in it: the
// namespaces, and what the engine put beside them (shared memory).
func unmountNamespaces(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, d := range entries {
		path := filepath.Join(dir, d.Name())
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// isNamespace tells whether path is a mounted namespace.
func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == nsfsMagic
}

// openNetNS opens a network namespace; the caller closes it.
func openNetNS(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if !isNamespace(path) {
		f.Close()
		return nil, errdefs.New(errdefs.ErrNotFound, "%s is no network namespace", path)
	}
	return f, nil
}

// onOwnThread runs f on a thread that no other goroutine ever sees: it ends with f, because
// the goroutine stays locked to it.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// inNetNS runs f on a thread of its own in the network namespace fd.
func inNetNS(fd int, f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// inHost runs f in the network namespace that the instance's bridges are in.
func (s *Service) inHost(f func() error) error {
	if s.hostNS == nil {
		return f()
	}
	return inNetNS(int(s.hostNS.Fd()), f)
}

// checkSysctls refuses kernel parameters that are not of a namespace of the sandbox's own.
func checkSysctls(sysctls map[string]string, own NS) error {
	ipc := []string{"kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/sem", "kernel/shmall", "kernel/shmmax", "kernel/shmmni", "kernel/shm_rmid_forced"}
	for k := range sysctls {
		path := sysctlPath(k)
		if path == "" || filepath.Clean(path) != path || filepath.IsAbs(path) || strings.HasPrefix(path, "..") {
			return errdefs.New(errdefs.ErrInvalid, "sysctl %q is not a name of a kernel parameter", k)
		}
		switch {
		case strings.HasPrefix(path, "net/") && own.Net:
		case (slices.Contains(ipc, path) || strings.HasPrefix(path, "fs/mqueue/")) && own.IPC:
		case path == "kernel/domainname" && own.UTS:
		default:
			return errdefs.New(errdefs.ErrInvalid, "sysctl %q is not in a separate kernel namespace", k)
		}
	}
	return nil
}

// sysctlPath turns a parameter's name into its path below /proc/sys. As sysctl(8) does, a name
// whose first separator is a slash keeps its dots.
func sysctlPath(name string) string {
	i := strings.IndexAny(name, "./")
	if i < 0 || name[i] == '/' {
		return name
	}
	return strings.NewReplacer(".", "/", "/", ".").Replace(name)
}

func writeSysctl(path, value string) error {
	f, err := os.OpenFile("/proc/sys/"+path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + path)
	return strings.TrimSpace(string(b)), err
}

// interfaceNumber returns n for a name that is prefix and n, -1 for another.
func interfaceNumber(name, prefix string) int {
	digits, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return -1
	}
	n, err := strconv.Atoi(digits)
	if err != nil {
		return -1
	}
	return n
}
