package storetest

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

const standstill = 15 * time.Minute

// Standstill ends the program when one of its tests has waited in one place for a quarter of an hour, and prints where.
// This is long before go test -timeout, and the output contains nothing else. With -timeout 0 it does nothing. Call it
// from TestMain.
func Standstill() {
	time.AfterFunc(time.Minute, func() {
		if f := flag.Lookup("test.timeout"); f == nil || f.Value.String() == "0s" {
			return
		}
		all := make([]byte, 16<<20)
		if stuck := waiting(string(all[:runtime.Stack(all, true)]), standstill); len(stuck) > 0 {
			fmt.Fprintf(os.Stderr, "tests have stood still for %v:\n\n%s\n", standstill, strings.Join(stuck, "\n\n"))
			os.Exit(2)
		}
		Standstill()
	})
}

var since = regexp.MustCompile(`^goroutine .*, (\d+) minutes`)

// waiting returns the stacks of the tests that have waited in one place for at least d. It omits tests that wait for
// their subtests, or for their turn.
func waiting(stacks string, d time.Duration) (found []string) {
	for stack := range strings.SplitSeq(stacks, "\n\n") {
		m := since.FindStringSubmatch(stack)
		if m == nil || !strings.Contains(stack, "testing.tRunner(") || !strings.Contains(stack, "_test.go:") ||
			strings.Contains(stack, "testing.(*T).Run(") || strings.Contains(stack, "testing.(*T).Parallel(") {
			continue
		}
		if n, err := strconv.Atoi(m[1]); err == nil && time.Duration(n)*time.Minute >= d {
			found = append(found, stack)
		}
	}
	return found
}
