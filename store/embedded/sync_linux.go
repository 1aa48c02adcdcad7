package embedded

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncData writes the data of a file to disk. Its length and its blocks are on disk already.
func syncData(file *os.File) error {
	for {
		if err := unix.Fdatasync(int(file.Fd())); err != unix.EINTR {
			return err
		}
	}
}
