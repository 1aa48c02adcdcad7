//go:build !windows

package embedded

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A full disk refuses commands that take space, before they change anything. Reading and deleting continue to work. Commands are
// accepted again once there is space.
func TestJournal_aFullDiskRefuses(t *testing.T) {
	dir := t.TempDir()
	r, s := mustOpen(t, dir)
	var before, limited syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	limited = before
	limited.Cur = uint64(r.journal.allocated) + 1<<20 // no file can grow: Go ignores SIGXFSZ, and the write fails
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limited); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Setrlimit(syscall.RLIMIT_FSIZE, &before) }()
	text, n := strings.Repeat("x", 64<<10), 0
	for ; n < 1000; n++ {
		got := do(t, r, "RPUSH l "+text)
		if strings.HasPrefix(got, "-OOM ") {
			break
		}
	}
	if n == 0 || n == 1000 {
		t.Fatalf("%d were stored", n)
	}
	want := fmt.Sprintf(":%d\r\n", n)
	if got := do(t, r, "LLEN l"); got != want {
		t.Errorf("%q are there, not %q", got, want)
	}
	do(t, r, "SET s x")
	if got := do(t, r, "LTRIM l 1 -1"); got != "+OK\r\n" {
		t.Errorf("LTRIM: %q", got)
	}
	if !strings.Contains(s.text(), "no room") {
		t.Errorf("the log says: %s", s.text())
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); strings.HasPrefix(do(t, r, "RPUSH l "+text), "-OOM "); time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatal("it is full for ever")
		}
	}
	mustClose(t, r)
	r, _ = mustOpen(t, dir)
	if got := do(t, r, "LLEN l"); got != want {
		t.Errorf("after a restart %q are there, not %q", got, want)
	}
	mustClose(t, r)
}

// A full disk empties itself: when its contents were deleted, a snapshot replaces them, although hardly any space is left for one.
func TestJournal_aFullDiskOfWhatWasDeletedEmptiesItself(t *testing.T) {
	dir := t.TempDir()
	const disk = 9 << 20
	former := fill
	t.Cleanup(func() { fill = former })
	fill = func(file *os.File, from, to int64) error {
		used := to - from
		all, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, entry := range all {
			if info, err := entry.Info(); err == nil {
				used += info.Size()
			}
		}
		if used > disk {
			return &os.PathError{Op: "write", Path: file.Name(), Err: syscall.ENOSPC}
		}
		return former(file, from, to)
	}
	r, _ := mustOpen(t, dir)
	text := strings.Repeat("x", 64<<10)
	for _, one := range []string{text, text[:1000], "x"} {
		for n := 0; !strings.HasPrefix(do(t, r, "RPUSH l "+one), "-OOM "); n++ {
			if n > 10_000 {
				t.Fatal("it is never full")
			}
		}
	}
	do(t, r, "SET kept y")
	for i := range 50 {
		do(t, r, fmt.Sprint("DEL l", i))
	}
	if got := do(t, r, "DEL l"); got != ":1\r\n" {
		t.Errorf("DEL: %q", got)
	}
	for begun := time.Now(); strings.HasPrefix(do(t, r, "RPUSH l "+text), "-OOM "); time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatal("it is full for ever")
		}
	}
	mustClose(t, r)
	r, _ = mustOpen(t, dir)
	if got := do(t, r, "LLEN l"); got != ":1\r\n" {
		t.Errorf("after a restart: %q", got)
	}
	mustClose(t, r)
}

// No second process may open a directory, whatever is removed from it. An unwritable directory is reported as such.
func TestOpen_saysWhyNot(t *testing.T) {
	dir := t.TempDir()
	r, _ := mustOpen(t, dir)
	defer mustClose(t, r)
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range all {
		if err := os.Rename(filepath.Join(dir, entry.Name()), filepath.Join(t.TempDir(), entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(dir, slog.New(slog.DiscardHandler)); !errors.Is(err, errInUse) || !strings.Contains(err.Error(), "its own directory") {
		t.Errorf("a second one: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	if err := os.MkdirAll(filepath.Join(other, "journal-00000001"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, filepath.Join(file, "under"), other} {
		if _, err := Open(path, slog.New(slog.DiscardHandler)); err == nil || errors.Is(err, errInUse) || !strings.Contains(err.Error(), "must be able to write") {
			t.Errorf("%s: %v", path, err)
		}
	}
	// Files with other names are not touched.
	strange := t.TempDir()
	for _, name := range []string{"journal-2", "snapshot-9", "journal-000000001", "snapshot-2.new", "notes"} {
		if err := os.WriteFile(filepath.Join(strange, name), []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o, _ := mustOpen(t, strange)
	mustClose(t, o)
	if all, err := os.ReadDir(strange); err != nil || len(all) != 6 {
		t.Errorf("%v, %v", all, err)
	}
}
