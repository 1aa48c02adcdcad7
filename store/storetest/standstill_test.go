package storetest

import (
	"runtime"
	"strings"
	"testing"
	"time"
)

// The stacks are the runtime's. Only the waiting time is invented, because the runtime counts it in minutes.
func TestStandstill_findsTheTestThatWaits(t *testing.T) {
	release := make(chan struct{})
	go func() { // ends when it has seen the subtest wait
		defer close(release)
		var stacks string
		Eventually(t, "the subtest waits", func() bool {
			all := make([]byte, 1<<20)
			before := string(all[:runtime.Stack(all, true)])
			stacks = strings.ReplaceAll(before, "[chan receive]", "[chan receive, 16 minutes]")
			return len(waiting(stacks, standstill)) > 0 && len(waiting(before, time.Minute)) == 0
		})
		found := waiting(stacks, standstill)
		if len(found) != 1 || !strings.Contains(found[0], "TestStandstill_findsTheTestThatWaits.func2") {
			t.Errorf("found %q", found)
		}
		if found = waiting(stacks, 17*time.Minute); len(found) > 0 {
			t.Errorf("found too early: %s", found)
		}
	}()
	t.Run("waits", func(*testing.T) { <-release })
}
