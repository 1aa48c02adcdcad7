package test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"gapless/store/storetest"
)

// These tests do not measure speed, because test machines are sometimes slow. They distinguish a server that receives
// notifications of chunks from one that polls every eight seconds.

func TestLatency_aViewerHearsOfAnAppendLongBeforeTheNextReconciliation(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"the embedded redis", "redis-server, another node"} {
		t.Run(where, func(t *testing.T) {
			var to, from *node
			if strings.HasPrefix(where, "the embedded") {
				to = start(t, "-reconcile", "8s")
				from = to
			} else {
				both := nodes(t, 2, storetest.Redis(t), "-reconcile", "8s")
				to, from = both[0], both[1]
			}
			session := newID()
			delays(t, to, session, func() time.Time {
				from.append(t, session, `{"content":"word "}`)
				return time.Now()
			})
		})
	}
}

func TestLatency_aViewerHearsOfAForeignPushLongBeforeTheNextReconciliation(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-reconcile", "8s")[0]
	f := foreign{redis: redis, session: newID()}
	i := 0
	delays(t, n, f.session, func() time.Time {
		i++
		if err := f.say(t.Context(), foreignChunk(i), 5*time.Millisecond); err != nil {
			t.Error(err)
		}
		return time.Now()
	})
}

// delays appends 40 chunks, each after the one before has arrived.
func delays(t *testing.T, n *node, session string, say func() time.Time) {
	t.Helper()
	const count = 40
	ctx := deadline(t)
	arrived := make(chan time.Time, 1)
	v := &viewer{session: session}
	wait := background(t, func() {
		v.follow(ctx, at(n.addr), func(e event) bool {
			if e.name == "welcome" {
				return false
			}
			arrived <- time.Now()
			return v.cursor == count
		})
	})
	eventually(t, "the viewer is held", func() bool { return v.status.Load() != 0 })
	var all []time.Duration
	for range count {
		said := say()
		select {
		case at := <-arrived:
			all = append(all, at.Sub(said)) // negative if the event was faster than the response
		case <-ctx.Done():
			t.Fatal("a chunk did not arrive")
		}
	}
	wait()
	slices.Sort(all)
	median := all[count/2]
	t.Logf("median %v, worst %v", median, all[count-1])
	if most := 3 * time.Second; median > most {
		t.Errorf("the median is %v: more than %v, so chunks were looked for, not heard of", median, most)
	}
}
