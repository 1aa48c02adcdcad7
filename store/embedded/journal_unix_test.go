//go:build !windows

package embedded

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A disk that is full refuses what takes space, before it has changed anything; reading and deleting go on. It is over when there
// is space again.
func TestJournal_aFullDiskRefuses(t *testing.T) {
	dir := t.TempDir()
	r, s := mustOpen(t, dir)
	var before, limited syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	limited = before
	limited.Cur = uint64(r.journal.allocated) + 1<<20 // no file becomes longer: Go ignores SIGXFSZ, and writing fails
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
