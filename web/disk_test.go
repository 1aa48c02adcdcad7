package web_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"
)

// A node that keeps its data on disk is killed in the middle of an answer, three times, and starts again. The page shows the whole answer in the
// end, with no gap, nothing twice and no reset.
func TestDisk_aPageSurvivesANodeThatIsKilled(t *testing.T) {
	t.Parallel()
	data := "embedded:" + filepath.Join(t.TempDir(), "data")
	n := start(t, "-redis", data)
	p := open(t, chromium(t), n.url("/"))
	session := p.session()

	var wg sync.WaitGroup
	const count = 150
	wg.Go(func() { // ended by the answer's end, or with the test
		for i := 1; i <= count && t.Context().Err() == nil; {
			c := chunk{MessageID: "long", Role: "assistant", Content: fmt.Sprintf("%s %d ", nasty[i%(len(nasty)-1)], i)}
			if i == count {
				c = chunk{Type: "done", MessageID: "long"}
			}
			body, err := json.Marshal(c)
			if err != nil {
				t.Error(err)
				return
			}
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, n.url("/v1/sessions/"+session+"/chunks"), bytes.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			r.Header = http.Header{"Content-Type": {"application/json"}, "Producer-Id": {"p"}, "Producer-Epoch": {"0"}, "Producer-Chunk": {strconv.Itoa(i - 1)}}
			if answer, err := http.DefaultClient.Do(r); err == nil {
				text, _ := io.ReadAll(answer.Body)
				_ = answer.Body.Close()
				if answer.StatusCode/100 == 2 {
					i++
				} else if answer.StatusCode < http.StatusInternalServerError {
					t.Errorf("%d %s", answer.StatusCode, text)
					return
				}
			}
			time.Sleep(30 * time.Millisecond) // the pace of the producer
		}
	})
	t.Cleanup(wg.Wait)
	for _, seq := range []int{20, 60, 100} {
		p.until(fmt.Sprintf(`gapless.seq >= %d`, seq))
		n.kill()
		n.again(t)
	}
	wg.Wait()
	p.until(`gapless.seq >= ` + strconv.Itoa(count))
	p.showsTheHistory(n, session)
	if got := len(n.history(t, session)); got != count {
		t.Errorf("the log has %d chunks, not %d", got, count)
	}
}

// again starts a node that was killed at its address, with its arguments.
func (n *node) again(t testing.TB) {
	t.Helper()
	before := n.cmd
	n.once = sync.Once{}
	n.cmd = exec.Command(before.Path, before.Args[1:]...)
	n.cmd.Dir, n.cmd.Stdout, n.cmd.Stderr = before.Dir, before.Stdout, before.Stderr
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.waitReady()
}
