package main

import (
	"syscall"
	"unsafe"
)

// foreground returns the foreground process group of the terminal on descriptor 0, or an error
// if there is no terminal.
func foreground() (int, error) {
	var group int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	if errno != 0 {
		return 0, errno
	}
	return int(group), nil
}
