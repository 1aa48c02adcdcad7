package test

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var diskKills = flag.Int("disk.kills", 15, "how often a node that keeps its data on disk is killed")

// A node that keeps its data in a directory is killed again and again, in the middle of appends and of rewriting its journal. It
// starts each time, and what was acknowledged is there, once, under its number; what was not is there at most once.
func TestDisk_killedAgainAndAgainLosesNothingThatWasAcknowledged(t *testing.T) {
	t.Parallel()
	program := plainProgram(t)
	dir := filepath.Join(t.TempDir(), "data")
	args := []string{"-redis", "embedded:" + dir, "-history-bytes", "1MiB", "-window-total", "16MiB"}
	var acknowledged, unknown, rewritten int
	ballast := `{"content":"` + strings.Repeat("b", 60_000) + `"}`
	n := startProgram(t, program, args...)
	for round := range *diskKills {
		var wg sync.WaitGroup
		var stop atomic.Bool
		told := make([]map[int]int64, 8) // by producer: the numbers of what was acknowledged
		said := make([]int, len(told))
		session := func(i int) string { return fmt.Sprintf("r%d-p%d", round, i) }
		for i := range told {
			told[i] = map[int]int64{}
			wg.Go(func() {
				for ; !stop.Load(); said[i]++ {
					a := n.post("/v1/sessions/"+session(i)+"/chunks", "application/json", fmt.Sprintf(`{"content":"%d."}`, said[i]))
					var s stored
					if a.status == http.StatusCreated && json.Unmarshal([]byte(a.body), &s) == nil {
						told[i][said[i]] = s.First
					} else if a.status != 0 && a.status < http.StatusInternalServerError {
						t.Errorf("append: %d %s", a.status, a.body)
					}
				}
			})
		}
		wg.Go(func() { // so that there is history
			for !stop.Load() {
				a := n.post("/v1/sessions/ballast/chunks", "application/json", "["+strings.Repeat(ballast+",", 7)+ballast+"]")
				if a.status != http.StatusCreated && a.status != 0 && a.status < http.StatusInternalServerError {
					t.Errorf("append: %d %s", a.status, a.body)
				}
			}
		})
		time.Sleep(100*time.Millisecond + rand.N(900*time.Millisecond))
		stop.Store(rand.IntN(4) == 0) // now and then it is killed when all is quiet
		n.kill()
		stop.Store(true)
		wg.Wait()
		rewritten += strings.Count(n.log.String(), "was rewritten")
		n = startProgram(t, program, args...)
		for i := range told {
			if len(told[i]) == 0 {
				continue
			}
			seen := map[int]int64{}
			for k, element := range n.pages(t, session(i)) {
				var c struct {
					Seq     int64
					Content string
				}
				decode(t, element, &c)
				var number int
				if _, err := fmt.Sscanf(c.Content, "%d.", &number); err != nil || seen[number] != 0 || c.Seq != int64(k+1) || number >= said[i]+1 {
					t.Errorf("round %d: chunk %d of producer %d is %s", round, k+1, i, element)
				}
				seen[number] = c.Seq
			}
			for number, seq := range told[i] {
				if seen[number] != seq {
					t.Errorf("round %d: producer %d was told that %d is number %d, and it is %d (0: lost)", round, i, number, seq, seen[number])
				}
			}
			acknowledged, unknown = acknowledged+len(told[i]), unknown+said[i]-len(told[i])
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d kills: %d chunks acknowledged, %d whose outcome nobody was told; %d times the journal was rewritten", *diskKills, acknowledged, unknown, rewritten)
}
