package sse

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// lossy is a real store whose Pub/Sub can be made to lose everything.
type lossy struct {
	*store.Store
	deaf     atomic.Bool
	listener store.Listener
}

func (l *lossy) Listen(session string, listener store.Listener) func() {
	l.listener = listener
	return l.Store.Listen(session, l)
}

func (l *lossy) Live(payload string) {
	if !l.deaf.Load() {
		l.listener.Live(payload)
	}
}
func (l *lossy) Resync() { l.listener.Resync() }

// world is a hub on the real scripts, in a Redis that the test itself changes.
type world struct {
	t     *testing.T
	redis *redis.Client
	logs  *lossy
	hub   *Hub
	made  int // number of chunks made, so that no two are equal
	close func()
}

func newWorld(t *testing.T) *world {
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true)
	cfg := store.DefaultConfig()
	dial := func(context.Context, string, string) (net.Conn, error) { return m.Dial() }
	cfg.Dial, cfg.HistoryMax, cfg.Listeners = dial, 15, 1
	s, err := store.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, redis: redis.NewClient(&redis.Options{Addr: "127.0.0.1:0", Dialer: dial, Protocol: 2}), logs: &lossy{Store: s}}
	w.hub = NewHub(testConfig(), w.logs)
	w.close = func() {
		w.hub.Close()
		s.Close()
		_ = w.redis.Close()
		m.Close()
	}
	return w
}

func (w *world) list() []string {
	l, err := w.redis.LRange(w.t.Context(), "chat:history:s", 0, -1).Result()
	if err != nil {
		w.t.Fatal(err)
	}
	return l
}

func (w *world) push(n int) {
	for range n {
		w.made++
		w.redis.RPush(w.t.Context(), "chat:history:s", fmt.Sprintf(`{"content":"foreign %d"}`, w.made))
	}
}

func (w *world) append(n int) {
	for range n {
		w.made++
		if _, err := w.logs.Append(w.t.Context(), "s", store.Batch{Chunks: []store.Chunk{store.NewChunk("delta", "", "", fmt.Sprint("c", w.made))}}); err != nil {
			w.t.Fatal(err)
		}
	}
}

// saved is the state of a replica that lags.
type saved struct {
	list []any
	hash map[string]string
}

func (w *world) save() saved {
	s := saved{hash: w.redis.HGetAll(w.t.Context(), "chat:session:s").Val()}
	for _, e := range w.list() {
		s.list = append(s.list, e)
	}
	return s
}

func (w *world) restore(s saved) {
	w.redis.Del(w.t.Context(), "chat:history:s", "chat:session:s")
	if len(s.list) > 0 {
		w.redis.RPush(w.t.Context(), "chat:history:s", s.list...)
	}
	if len(s.hash) > 0 {
		w.redis.HSet(w.t.Context(), "chat:session:s", s.hash)
	}
}

// show compares what a client shows with the current log.
func (w *world) show(c *watcher) error {
	list := w.list()
	page, err := w.logs.Read(w.t.Context(), "s", 1, 0, 0)
	if err != nil {
		return err
	}
	if err := c.take(c.events()); err != nil {
		return err
	}
	if c.epoch != page.Epoch && len(c.resets) == 0 && c.epoch != "" {
		return fmt.Errorf("it was told epoch %s, and no reset: the log's is %s", c.epoch, page.Epoch)
	}
	return c.check(page.First, list)
}

// settle lets the feed discover what was not announced.
func (w *world) settle() {
	time.Sleep(2 * w.hub.cfg.Reconcile)
	synctest.Wait()
}

// hands are changes that other programs make to a log.
var hands = map[string]func(w *world){
	"flushed": func(w *world) { w.redis.FlushAll(w.t.Context()) },
	"expired": func(w *world) { w.redis.Del(w.t.Context(), "chat:history:s") },
	"replaced by a longer one": func(w *world) {
		n := len(w.list())
		w.redis.Del(w.t.Context(), "chat:history:s")
		w.push(n + 3)
	},
	"replaced by one as long": func(w *world) {
		n := len(w.list())
		w.redis.Del(w.t.Context(), "chat:history:s")
		w.push(n)
	},
	"cut at its tail": func(w *world) { w.redis.LTrim(w.t.Context(), "chat:history:s", 0, -3) },
	"cut at its tail and regrown": func(w *world) {
		w.redis.LTrim(w.t.Context(), "chat:history:s", 0, -3)
		w.push(2)
	},
	"cut at its head": func(w *world) { w.redis.LTrim(w.t.Context(), "chat:history:s", 2, -1) },
	"edited in the middle of what was read": func(w *world) {
		w.redis.LSet(w.t.Context(), "chat:history:s", -1, `{"content":"edited"}`)
	},
}

// Promises: Said aloud; Unique. In each way in which a log can be replaced, a live viewer gets a
// reset, and then the current log.
func TestFeed_logIsRewritten_viewersAreReset(t *testing.T) {
	for name, rewrite := range hands {
		for _, deaf := range []bool{false, true} {
			for _, regrow := range []string{"nothing", "appended", "pushed"} {
				t.Run(fmt.Sprintf("%s/deaf=%t/%s", name, deaf, regrow), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						w := newWorld(t)
						defer w.close()
						w.append(6)
						v := watch(t, w.hub, Ask{Session: "s"})
						defer v.leave()
						w.settle()
						if err := w.show(v); err != nil {
							t.Fatal(err)
						}
						w.logs.deaf.Store(deaf)
						rewrite(w)
						switch regrow {
						case "appended":
							w.append(9)
						case "pushed":
							w.push(9)
						}
						time.Sleep(3 * time.Second)
						synctest.Wait()
						if err := w.show(v); err != nil {
							t.Fatal(err)
						}
						if name != "expired" && len(v.resets) != 1 {
							t.Fatalf("resets: %v", v.resets)
						}
					})
				})
			}
		}
	}
}

// After a failover to a replica that lags, list and hash are older, with the same epoch. They may
// have grown past what viewers have.
func TestFeed_failoverLosesTheTail_viewersAreReset(t *testing.T) {
	for _, regrown := range []int{0, 1, 4, 5, 9} {
		t.Run(fmt.Sprint("regrown by ", regrown), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.close()
				w.append(3)
				replica := w.save()
				v := watch(t, w.hub, Ask{Session: "s"})
				defer v.leave()
				w.settle()
				w.append(4)
				synctest.Wait()
				w.logs.deaf.Store(true) // the connection to the old master is lost
				w.restore(replica)
				w.append(regrown)
				w.logs.deaf.Store(false)
				w.logs.Resync() // then the connection to the new one stands
				time.Sleep(3 * time.Second)
				synctest.Wait()
				if err := w.show(v); err != nil {
					t.Fatal(err)
				}
				if len(v.resets) != 1 {
					t.Fatalf("resets: %v", v.resets)
				}
				// A viewer that reconnects with a cursor of the lost tail is reset at once.
				back := watch(t, w.hub, Ask{Session: "s", Cursor: 7})
				defer back.leave()
				synctest.Wait()
				if err := w.show(back); err != nil {
					t.Fatal(err)
				}
				if len(back.resets) != 1 {
					t.Fatalf("resets of one that comes back: %v", back.resets)
				}
			})
		})
	}
}

// After any changes to a log, in any order, every viewer shows the log as it is once it settles.
// That includes live viewers and viewers that reconnect with their cursors.
func TestFeed_anythingDoneToTheLog_everyViewerShowsItInTheEnd(t *testing.T) {
	names := []string{"append", "push", "deaf", "hear", "wait", "come back", "delete"}
	for name := range hands {
		names = append(names, name)
	}
	slices.Sort(names)
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.SampledFrom(names), 1, 15).Draw(rt, "steps")
		folded := rapid.Bool().Draw(rt, "back asks for a snapshot")
		waits := rapid.SliceOfN(rapid.SampledFrom([]time.Duration{0, time.Millisecond, time.Second, 5 * time.Second}), len(steps), len(steps)).Draw(rt, "waits")
		var failure error
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.close()
			live := watch(t, w.hub, Ask{Session: "s"})
			back := watch(t, w.hub, Ask{Session: "s", Snapshot: folded})
			flushed := false // since back was last connected
			over := false    // deleted: the viewers' responses have ended
			for i, step := range steps {
				switch step {
				case "append":
					w.append(3)
				case "push":
					w.push(2)
				case "deaf", "hear":
					w.logs.deaf.Store(step == "deaf")
				case "wait":
					time.Sleep(waits[i])
				case "delete":
					if i < len(steps)-1 {
						continue // only as the last step, because it ends the viewers
					}
					w.settle()
					over = w.logs.Delete(t.Context(), "s") == nil
				case "come back":
					before := back
					before.leave()
					if err := before.take(before.events()); err != nil {
						failure = err
					}
					back = watch(t, w.hub, Ask{Session: "s", Cursor: before.cursor, Snapshot: folded})
					back.screen = before.screen
					back.seen = 0
					epoch := back.epoch
					synctest.Wait()
					time.Sleep(time.Millisecond)
					if err := back.take(back.events()); err != nil {
						failure = err
					}
					if epoch != "" && back.epoch != epoch && len(back.resets) == len(before.resets) && flushed {
						// This is the one exception of promise 8: only the epoch tells. The page
						// begins again.
						back.leave()
						back = watch(t, w.hub, Ask{Session: "s", Snapshot: folded})
					}
					flushed = false
				default:
					hands[step](w)
					flushed = flushed || step == "flushed"
				}
				synctest.Wait()
			}
			w.settle()
			w.logs.deaf.Store(false)
			w.settle()
			for name, v := range map[string]*watcher{"live": live, "back": back} {
				if over {
					if cause := <-v.done; cause != Deleted {
						failure = fmt.Errorf("%s: ended by %s", name, cause)
					}
					continue
				}
				if err := w.show(v); err != nil && failure == nil {
					failure = fmt.Errorf("%s: %w", name, err)
				}
				v.leave()
			}
		})
		if failure != nil {
			rt.Fatalf("%s: %v", strings.Join(steps, ", "), failure)
		}
	})
}

// Two nodes have given out different amounts of what a failover loses. The node that knows less may
// notice first. A viewer that reconnects to the other node is reset nevertheless.
func TestFeed_failover_nodesThatKnewMoreOrLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		other := &lossy{Store: w.logs.Store}
		w.append(8)
		replica := w.save()
		less := watch(t, w.hub, Ask{Session: "s"})
		defer less.leave()
		w.settle()
		w.append(2)
		synctest.Wait()
		w.logs.deaf.Store(true)
		w.append(2)
		more := NewHub(testConfig(), other) // it reads all twelve
		defer more.Close()
		v := watch(t, more, Ask{Session: "s"})
		defer v.leave()
		synctest.Wait()
		other.deaf.Store(true)
		w.restore(replica)
		w.append(4)
		w.logs.Resync() // the node with ten notices first
		synctest.Wait()
		w.settle()
		for name, hub := range map[string]*Hub{"more": more, "less": w.hub} {
			back := watch(t, hub, Ask{Session: "s", Cursor: 12})
			synctest.Wait()
			if err := w.show(back); err != nil || len(back.resets) != 1 {
				t.Errorf("back at the node that knew %s: %v, resets %v", name, err, back.resets)
			}
			back.leave()
		}
		if err := w.show(v); err != nil || len(v.resets) != 1 {
			t.Error(err, v.resets)
		}
		if err := w.show(less); err != nil || len(less.resets) != 1 {
			t.Error(err, less.resets)
		}
	})
}

// A session is deleted and made again. No chunk of the new log comes before the reset.
func TestFeed_deletedAndAppendedTo_endsBeforeTheNewChunk(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.close()
			w.append(3)
			v := watch(t, w.hub, Ask{Session: "s"})
			defer v.leave()
			w.settle()
			if err := w.logs.Delete(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
			w.append(1)
			w.settle()
			// It depends on whether the node has seen the deletion, or only what came after it.
			if got := names(v.events()); got != "welcome 0, chunk 1, chunk 2, chunk 3, reset 1000000, chunk 1000001" && got != "welcome 0, chunk 1, chunk 2, chunk 3, reset 3" {
				t.Fatal(got)
			}
		})
	}
}

// After a failover, the next chunk may be announced before the log was read again. It continues
// another log, and must not be taken for the next chunk of this one.
func TestFeed_failover_liveChunkBeforeTheRead_isNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for _, text := range []string{"a", "b", "c"} {
			log.Append(text)
		}
		h := started(t, testConfig(), log)
		v := now(t, h, log, Ask{})
		log.Disconnect()
		log.Hold()
		log.Replace(storetest.Element(1, "a"), storetest.Element(2, "other b"), storetest.Element(3, "other c"), storetest.Element(4, "other d"))
		log.Ack()
		synctest.Wait()
		log.Publish(storetest.Element(4, "other d"))
		log.Deliver(0)
		synctest.Wait()
		log.Release()
		time.Sleep(h.cfg.Reconcile)
		synctest.Wait()
		if got := names(v.events()); got != "welcome 0, chunk 1, chunk 2, chunk 3, reset 1000000, chunk 1000001, chunk 1000002, chunk 1000003, chunk 1000004" {
			t.Error(got)
		}
		v.leave()
	})
}

// Redis has lost chunks that a viewer has from another node. The node that it comes to knows only that Redis was replaced.
// The viewer is reset once, although the other node notices the loss later. A cursor that is ahead without such a loss, or for a second
// time, starts no epoch.
func TestWitness_aViewerIsResetOnceByTwoNodes(t *testing.T) {
	for _, lost := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m := &storetest.Model{}
			one, two := m.Node(), m.Node()
			for range 7 {
				m.Push(`{"content":"the"}`)
			}
			knew, told := NewHub(testConfig(), one), NewHub(testConfig(), two)
			defer knew.Close()
			defer told.Close()
			before := watch(t, knew, Ask{Session: "s"})
			time.Sleep(time.Second)
			before.leave()
			if lost {
				m.Fail(m.Behind())
				m.Push(`{"content":"the"}`)
				two.Resync()
			}
			cursors := []int64{7, 2_000_000}
			if !lost {
				cursors = []int64{9}
			}
			for i, cursor := range cursors {
				v := watch(t, told, Ask{Session: "s", Cursor: cursor})
				time.Sleep(time.Second)
				if i == 0 && lost {
					if _, err := one.Append("x"); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(time.Minute / 2)
				b, _, whole := m.Log()
				if err := v.take(v.events()); err != nil || len(v.resets) != 1 || v.cursor != b.Last || v.epoch != b.Epoch || b.Former != map[bool]int64{true: 1_000_000}[lost] {
					t.Errorf("lost %t, cursor %d: %v, resets %v, at %d of %+v %q", lost, cursor, err, v.resets, v.cursor, b, whole)
				}
				v.leave()
			}
		})
	}
}
