//go:build !linux

package embedded

import "os"

// syncData writes a file to disk.
func syncData(file *os.File) error { return file.Sync() }
