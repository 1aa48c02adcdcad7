package embedded

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncData has what was written to a file reach the disk. Its length and its place are known there already.
func syncData(file *os.File) error {
	for {
		if err := unix.Fdatasync(int(file.Fd())); err != unix.EINTR {
			return err
		}
	}
}
