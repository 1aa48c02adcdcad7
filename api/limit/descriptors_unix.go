//go:build unix

package limit

import "golang.org/x/sys/unix"

// descriptors returns how many connections this process can have. Go has raised the soft limit to
// the hard one.
func descriptors() int {
	var all unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &all); err != nil {
		return 0
	}
	const least, most = 64, 1 << 30
	n := int(min(uint64(all.Cur), most))
	return max(1, n-max(least, n/10))
}
