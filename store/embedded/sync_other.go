//go:build !linux

package embedded

import "os"

// syncData has what was written to a file reach the disk.
func syncData(file *os.File) error { return file.Sync() }
