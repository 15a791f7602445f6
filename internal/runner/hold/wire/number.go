package wire

import "strconv"

// Itoa formats a number for a packet.
func Itoa(n int) string { return strconv.Itoa(n) }

// ParseUint reads a number from a packet.
func ParseUint(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }

// ExitFile is the name, below ExitsDir, of the record of one process.
func ExitFile(pid int, startTime uint64) string {
	return strconv.Itoa(pid) + "-" + strconv.FormatUint(startTime, 10)
}
