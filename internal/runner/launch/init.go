package launch

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	_ "github.com/opencontainers/cgroups/devices" // without it no device rule can be set
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/exeseal"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // C code that runs before Go does, in "init"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// Init is what the program does first of all when its first argument is "init", as libcontainer
// executes it inside new containers, or "seccomp", as Programs does to compile a profile. It does
// not return then. The main goroutine must call it.
func Init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		useProgram()
		libcontainer.Init()
	}
	if len(os.Args) == 2 && os.Args[1] == compileCommand {
		if err := compileProgram(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The main goroutine keeps the main thread. libcontainer has goroutines that end with their
	// thread, as it is in a container's mount namespace; the main thread cannot end, would hold that
	// namespace with all its mounts for ever, and is what /proc/self shows.
	runtime.LockOSThread()
	logrus.SetLevel(logrus.WarnLevel)
}

// Seal makes the program run from a sealed copy of itself in memory: a container can then never
// reach the executable on disk through /proc/PID/exe (CVE-2019-5736), and libcontainer need not
// make a copy for each start. self is the path of the executable, name what ps shows.
// It returns when the program runs sealed, or with the reason why it cannot.
func Seal(self, name string) error {
	if exeseal.IsSelfExeCloned() {
		return os.WriteFile("/proc/self/comm", []byte(name), 0)
	}
	source, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return err
	}
	clone, err := exeseal.CloneBinary(source, info.Size(), self, os.TempDir())
	if err != nil {
		return err
	}
	defer clone.Close()
	argv := append([]string{self}, os.Args[1:]...)
	err = unix.Exec("/proc/self/fd/"+strconv.Itoa(int(clone.Fd())), argv, os.Environ())
	return fmt.Errorf("execute the sealed copy: %w", err)
}
