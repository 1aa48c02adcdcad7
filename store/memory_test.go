package store_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// pushed returns an element as another program pushes it: without a number, and possibly repeated.
func pushed(word string) string { return fmt.Sprintf(`{"content":%q}`, word) }

// A node that acknowledged or delivered chunks notices when Redis comes back without them, even if at least as many
// others have taken their numbers. The very next call reports it, once.
func TestMemory_whatWasGivenOutAndIsLostEndsTheEpoch(t *testing.T) {
	push := func(r *storetest.Server, words ...string) {
		for _, w := range words {
			r.RPush(t.Context(), "chat:history:s", pushed(w))
		}
	}
	for name, c := range map[string]struct {
		kept, lost func(s *store.Store, r *storetest.Server)
		since      func(other *store.Store, r *storetest.Server)
	}{
		"appended": {
			func(s *store.Store, r *storetest.Server) { mustAppend(t, s, "s", delta("1")) },
			func(s *store.Store, r *storetest.Server) { mustAppend(t, s, "s", delta("2"), delta("3"), delta("4")) },
			func(other *store.Store, r *storetest.Server) {},
		},
		"appended, and another node appends as many": {
			func(s *store.Store, r *storetest.Server) { mustAppend(t, s, "s", delta("1")) },
			func(s *store.Store, r *storetest.Server) { mustAppend(t, s, "s", delta("2"), delta("3"), delta("4")) },
			func(other *store.Store, r *storetest.Server) {
				mustAppend(t, other, "s", delta("2'"), delta("3'"), delta("4'"))
			},
		},
		"appended, and another node appends more": {
			func(s *store.Store, r *storetest.Server) { mustAppend(t, s, "s", delta("1")) },
			func(s *store.Store, r *storetest.Server) { mustAppend(t, s, "s", delta("2"), delta("3"), delta("4")) },
			func(other *store.Store, r *storetest.Server) {
				mustAppend(t, other, "s", delta("2'"), delta("3'"), delta("4'"), delta("5'"), delta("6'"))
			},
		},
		"pushed and read": {
			func(s *store.Store, r *storetest.Server) { push(r, "the"); mustRead(t, s, "s", 1, lots, lots) },
			func(s *store.Store, r *storetest.Server) {
				push(r, "cat", "the", "dog")
				mustRead(t, s, "s", 1, lots, lots)
			},
			func(other *store.Store, r *storetest.Server) {},
		},
		"pushed, and as many others of which the last one is equal": {
			func(s *store.Store, r *storetest.Server) { push(r, "the"); mustRead(t, s, "s", 1, lots, lots) },
			func(s *store.Store, r *storetest.Server) {
				push(r, "cat", "the", "dog")
				mustRead(t, s, "s", 1, lots, lots)
			},
			func(other *store.Store, r *storetest.Server) {
				push(r, "dog", "the", "dog")
				mustRead(t, other, "s", 1, lots, lots)
			},
		},
		"pushed, and more others of which one is equal": {
			func(s *store.Store, r *storetest.Server) { push(r, "the"); mustRead(t, s, "s", 1, lots, lots) },
			func(s *store.Store, r *storetest.Server) {
				push(r, "cat", "the", "dog")
				mustRead(t, s, "s", 1, lots, lots)
			},
			func(other *store.Store, r *storetest.Server) {
				push(r, "dog", "the", "dog", "the", "cat", "the", "cat", "the", "cat", "the")
				mustRead(t, other, "s", 1, lots, lots)
			},
		},
	} {
		for _, call := range []string{"read", "append"} {
			t.Run(name+", then "+call, func(t *testing.T) {
				r := storetest.Redis(t)
				s, other := open(t, func(c *store.Config) { c.Redis = r.URL() }), open(t, func(c *store.Config) { c.Redis = r.URL() })
				c.kept(s, r)
				lose := snapshot(t, r)
				c.lost(s, r)
				was := mustRead(t, s, "s", 1, lots, lots)
				lose()
				c.since(other, r)
				length := r.LLen(t.Context(), "chat:history:s").Val()
				first := int64(1_000_001)
				if call == "append" {
					a := mustAppend(t, s, "s", delta("next"))
					if a.Epoch == was.Epoch || a.First != first+length {
						t.Errorf("%+v after %d elements", a, length)
					}
					length++
				}
				p := mustRead(t, s, "s", 1, lots, lots)
				if p.Epoch == was.Epoch || p.First != first || p.Last != first+length-1 || p.Former != first-1 {
					t.Errorf("%+v of %d elements", p.Bounds, length)
				}
				for _, s := range []*store.Store{s, other} {
					if again := mustRead(t, s, "s", 1, lots, lots); again.Epoch != p.Epoch || again.Last != p.Last {
						t.Errorf("it changed again: %+v", again.Bounds)
					}
				}
			})
		}
	}
}

// snapshot returns a function that restores the current state of Redis, as a failover to a lagging replica does.
func snapshot(t *testing.T, r *storetest.Server) (restore func()) {
	kept := map[string]string{}
	for _, key := range r.Keys(t.Context(), "*").Val() {
		kept[key] = r.Dump(t.Context(), key).Val()
	}
	return func() {
		r.FlushAll(t.Context())
		for key, value := range kept {
			if err := r.Restore(t.Context(), key, 0, value).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// These end no epoch: a trim, an expiry, another node's appends, another node's new epoch.
func TestMemory_whatIsNotLostEndsNoEpoch(t *testing.T) {
	r := storetest.Redis(t)
	on := func(c *store.Config) { c.Redis, c.HistoryMax = r.URL(), 5 }
	s, other := open(t, on), open(t, on)
	was := mustAppend(t, s, "s", delta("1"), delta("2"))
	same := func(what string) {
		t.Helper()
		for _, s := range []*store.Store{s, other} {
			if p := mustRead(t, s, "s", 1, lots, lots); p.Epoch != was.Epoch || p.Former != 0 {
				t.Fatalf("%s: %+v", what, p.Bounds)
			}
		}
	}
	same("read")
	for i := range 20 {
		mustAppend(t, other, "s", delta(fmt.Sprint(i)))
		if i%3 == 0 {
			mustAppend(t, s, "s", delta(fmt.Sprint(i)))
		}
	}
	same("appends of another node, and trims")
	for range 12 {
		r.RPush(t.Context(), "chat:history:s", pushed("the"))
	}
	same("pushes")
	mustAppend(t, other, "s", delta("x"), delta("y"), delta("z")) // trims a part of what the mark of the pushes covers
	same("trims of pushes")
	r.Del(t.Context(), "chat:history:s")
	same("expiry")
	mustAppend(t, other, "s", delta("x"))
	same("what follows an expiry")
}

// A log that Redis has lost completely continues at numbers that were never used. Before the first chunk, a reader
// learns the epoch and the number that the chunk will have. No key is created for that.
func TestMemory_aLogThatIsGoneGoesOnElsewhere(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		for i := range int64(3) {
			begun := 1 + 2_000_000*i
			a := mustAppend(t, s, "s", delta("a"), delta("b"))
			if a.First != begun {
				t.Fatalf("%+v instead of %d", a, begun)
			}
			s.FlushAll(t.Context())
			p := mustRead(t, s, "s", 1, lots, lots)
			if p.Epoch == "" || p.Epoch == a.Epoch || p.Last != begun+1_000_000-1 || p.First != p.Last+1 || len(p.Elements) > 0 {
				t.Fatalf("%+v", p)
			}
			if keys := s.Keys(t.Context()); len(keys) > 0 {
				t.Fatalf("a read has made %q", keys)
			}
			if _, err := s.Describe(t.Context(), "s"); err == nil {
				t.Fatal("it is said to exist")
			}
			if b := mustAppend(t, s, "s", delta("c")); b.Epoch != p.Epoch || b.First != p.Last+1 || !b.Made {
				t.Fatalf("%+v after %+v", b, p.Bounds)
			}
			if again := mustRead(t, s, "s", 1, lots, lots); again.Epoch != p.Epoch || again.First != p.First || again.Last != p.First {
				t.Fatalf("%+v after %+v", again.Bounds, p.Bounds)
			}
			s.FlushAll(t.Context())
		}
	})
}

// One of two nodes remembers more. Whichever comes first, neither receives a number that meant something else to it.
func TestMemory_nodesThatRememberDifferentlyAgree(t *testing.T) {
	r := storetest.Redis(t)
	on := func(c *store.Config) { c.Redis = r.URL() }
	for _, first := range []int{0, 1} {
		r.FlushAll(t.Context())
		nodes := []*store.Store{open(t, on), open(t, on)}
		mustAppend(t, nodes[0], "s", delta("1"))
		mustRead(t, nodes[1], "s", 1, lots, lots)
		mustAppend(t, nodes[0], "s", delta("2"), delta("3"))
		r.FlushAll(t.Context())
		mustAppend(t, nodes[first], "s", delta("1'"))
		var epochs []string
		for _, s := range nodes {
			p := mustRead(t, s, "s", 1, lots, lots)
			if p.First != 1_000_001 || p.Last != 1_000_001 {
				t.Errorf("%+v", p.Bounds)
			}
			epochs = append(epochs, p.Epoch)
		}
		if epochs[0] != epochs[1] {
			t.Error(epochs)
		}
	}
}

// The memory of a node holds many sessions, but is limited.
func TestMemory_isBounded(t *testing.T) {
	sizes := store.MemoryHolds(200_000)
	if kept := sizes.Kept; kept < 50_000 || kept > 100_000 {
		t.Errorf("%d are kept", kept)
	}
	if !sizes.Newest {
		t.Error("one of the newest is forgotten")
	}
}

// A refused write hides nothing. Redis can be read, with the same epoch each time and on each node, even if other
// programs began the log meanwhile. When Redis accepts writes again, the epoch stays the same.
func TestRead_needsNoWrite(t *testing.T) {
	for name, refuse := range map[string]func(r *storetest.Server, on bool){
		"full": func(r *storetest.Server, on bool) {
			limit := map[bool]string{true: "1", false: "0"}[on]
			r.ConfigSet(t.Context(), "maxmemory", limit)
		},
		"without replicas": func(r *storetest.Server, on bool) {
			r.ConfigSet(t.Context(), "min-replicas-to-write", map[bool]string{true: "1", false: "0"}[on])
		},
		"denied": func(r *storetest.Server, on bool) {
			r.Do(t.Context(), "ACL", "SETUSER", "default", map[bool]string{true: "-@write", false: "+@write"}[on])
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := storetest.Redis(t)
			s, other := open(t, func(c *store.Config) { c.Redis = r.URL() }), open(t, func(c *store.Config) { c.Redis = r.URL() })
			was := mustAppend(t, s, "s", delta("a"), delta("b"), delta("c"), delta("d"))
			r.RPush(t.Context(), "chat:history:pushed", pushed("the"), pushed("cat"))
			refuse(r, true)
			if _, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("e")}}); err == nil {
				t.Fatal("the append succeeded")
			}
			if p := mustRead(t, s, "s", 1, lots, lots); p.Epoch != was.Epoch || len(p.Elements) != 4 {
				t.Fatalf("%+v", p)
			}
			first := mustRead(t, s, "pushed", 1, lots, lots)
			if first.Epoch == "" || first.Last != 2 || len(first.Elements) != 2 {
				t.Fatalf("%+v", first)
			}
			for _, s := range []*store.Store{s, other} {
				if p := mustRead(t, s, "pushed", 1, lots, lots); p.Epoch != first.Epoch || p.Last != 2 {
					t.Errorf("%+v after %+v", p.Bounds, first.Bounds)
				}
			}
			refuse(r, false)
			for _, s := range []*store.Store{s, other} {
				if p := mustRead(t, s, "pushed", 1, lots, lots); p.Epoch != first.Epoch || p.Last != 2 {
					t.Errorf("%+v after %+v", p.Bounds, first.Bounds)
				}
			}
			if epoch := r.HGet(t.Context(), "chat:session:pushed", "epoch").Val(); epoch != first.Epoch {
				t.Errorf("epoch %q is written down instead of %q", epoch, first.Epoch)
			}
		})
	}
}

// A failover may lose chunks and leave a master that accepts no writes for lack of replicas. The loss is still reported
// once, with the epoch that is recorded later.
func TestRead_lossIsToldWhileWritesAreRefused(t *testing.T) {
	r := storetest.Redis(t)
	s, other := open(t, func(c *store.Config) { c.Redis = r.URL() }), open(t, func(c *store.Config) { c.Redis = r.URL() })
	mustAppend(t, s, "s", delta("a"))
	lose := snapshot(t, r)
	was := mustAppend(t, s, "s", delta("b"), delta("c"))
	mustRead(t, other, "s", 1, lots, lots)
	lose()
	r.ConfigSet(t.Context(), "min-replicas-to-write", "1")
	first := mustRead(t, s, "s", 1, lots, lots)
	if first.Epoch == was.Epoch || first.First != 1_000_001 || first.Last != 1_000_001 {
		t.Fatalf("%+v", first.Bounds)
	}
	same := func(what string) {
		t.Helper()
		for range 2 {
			for _, s := range []*store.Store{s, other} {
				if p := mustRead(t, s, "s", 1, lots, lots); p.Epoch != first.Epoch || p.First != 1_000_001 || p.Last != 1_000_001 {
					t.Fatalf("%s: %+v after %+v", what, p.Bounds, first.Bounds)
				}
			}
		}
	}
	same("refused")
	r.ConfigSet(t.Context(), "min-replicas-to-write", "0")
	same("taken again")
	if epoch := r.HGet(t.Context(), "chat:session:s", "epoch").Val(); epoch != first.Epoch {
		t.Errorf("epoch %q is written down instead of %q", epoch, first.Epoch)
	}
}

// A hint may fail: a Redis user without permissions on channels stores as before, without an error.
func TestAppend_anAnnouncementThatIsRefusedFailsNothing(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	mustAppend(t, s, "s", store.NewChunk(store.TypeDelta, "m", "", "a"))
	r.Do(t.Context(), "ACL", "SETUSER", "default", "resetchannels")
	n := int64(1)
	for _, c := range []store.Chunk{store.NewChunk(store.TypeDelta, "m", "", "b"), store.NewChunk(store.TypeDelta, "n", "", "c"), store.NewChunk(store.TypeDone, "n", "", "")} {
		n++
		if a := mustAppend(t, s, "s", c); a.Last != n {
			t.Errorf("%+v", a)
		}
	}
	if c, err := s.Cancel(t.Context(), "s", "m"); err != nil || c.Last != n+1 {
		t.Errorf("%+v, %v", c, err)
	}
	if err := s.Delete(t.Context(), "s"); err != nil {
		t.Error(err)
	}
}

// A failure after the first write is never reported as "not done".
func TestAppend_whatFailsInTheMiddleIsInDoubt(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	mustAppend(t, s, "s", delta("a"))
	r.Do(t.Context(), "ACL", "SETUSER", "default", "-hset")
	for _, b := range []store.Batch{{Chunks: []store.Chunk{delta("b")}}, {Chunks: []store.Chunk{store.NewChunk(store.TypeDone, "m", "", "")}}} {
		before := r.LLen(t.Context(), "chat:history:s").Val()
		_, err := s.Append(t.Context(), "s", b)
		if err == nil {
			t.Fatal("the append succeeded")
		}
		if stored := r.LLen(t.Context(), "chat:history:s").Val() > before; stored && !strings.Contains(err.Error(), store.ErrOutcomeUnknown.Error()) {
			t.Errorf("it is stored, and the error is %v", err)
		}
	}
}

// The first read of a long list that other programs pushed is cheap, and so is every other call. The messages in the
// list are learned in slices, and an append waits until they are known.
func TestLearn_aMillionElementsInSlices(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.HistoryMax = r.URL(), 10_000_000 })
	const n = 300_000
	batch := make([]any, 0, 10_000)
	for i := range n {
		element := fmt.Sprintf(`{"message_id":"m%d","content":"word%d"}`, i%1000, i)
		if i == n-1 {
			element = `{"type":"done","message_id":"m7"}`
		}
		if batch = append(batch, element); len(batch) == cap(batch) {
			r.RPush(t.Context(), "chat:history:s", batch...)
			batch = batch[:0]
		}
	}
	r.RPush(t.Context(), "chat:history:s", batch...)
	r.ConfigResetStat(t.Context())
	if p := mustRead(t, s, "s", store.Newest, 1000, 10); p.Last != n {
		t.Fatalf("%+v", p.Bounds)
	}
	_, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDelta, "m7", "", "late")}})
	if err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("an append to a message that ended in the last element: %v", err)
	}
	_, open, err := s.Open(t.Context(), "s")
	if err != nil || len(open) != 999 {
		t.Errorf("%d messages are open, %v", len(open), err)
	}
	calls := strings.Count(r.Info(t.Context(), "commandstats").Val(), "cmdstat_evalsha")
	t.Log(calls, r.Info(t.Context(), "commandstats").Val())
}

// A viewer has chunks that one node gave out and Redis has lost. It comes to another node, which knew none of them. Whatever the log
// contains by then, and whichever node comes first, both nodes see the same epoch from then on.
func TestMemory_aViewerIsAWitness(t *testing.T) {
	r := storetest.Redis(t)
	on := func(c *store.Config) { c.Redis = r.URL() }
	for _, since := range []string{"nothing", "pushed", "appended"} {
		for _, first := range []string{"the one that knew", "the one that is told"} {
			t.Run(since+", "+first, func(t *testing.T) {
				r.FlushAll(t.Context())
				knew, told := open(t, on), open(t, on)
				for range 10 {
					r.RPush(t.Context(), "chat:history:s", pushed("the"))
				}
				mustRead(t, knew, "s", 1, lots, lots)
				r.FlushAll(t.Context())
				if first == "the one that knew" {
					mustRead(t, knew, "s", 1, lots, lots)
				}
				switch since {
				case "pushed":
					r.RPush(t.Context(), "chat:history:s", pushed("the"))
				case "appended":
					mustAppend(t, told, "s", delta("x"))
				}
				told.Witness("s", 7) // its connection may lag
				p := mustRead(t, told, "s", 1, lots, lots)
				if since != "nothing" && p.Last != 1_000_001 || p.Former != 1_000_000 {
					t.Errorf("the node that is told: %+v", p.Bounds)
				}
				for _, s := range []*store.Store{knew, told, knew} {
					if is := mustRead(t, s, "s", 1, lots, lots); is.Epoch != p.Epoch || is.Last != p.Last {
						t.Errorf("%+v after %+v", is.Bounds, p.Bounds)
					}
				}
				if a := mustAppend(t, knew, "s", delta("y")); a.Epoch != p.Epoch || a.First != p.Last+1 {
					t.Errorf("%+v after %+v", a, p.Bounds)
				}
			})
		}
	}
}

// A node notices that Redis was restarted, and not that connections were cut, or made for the first time.
func TestServers_aRestartIsNoticed(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	read := func() {
		storetest.Eventually(t, "Redis answers", func() bool {
			_, err := s.Read(t.Context(), "s", 1, lots, lots)
			return err == nil
		})
	}
	read()
	for _, kind := range []string{"normal", "pubsub"} {
		r.ClientKillByFilter(t.Context(), "TYPE", kind, "SKIPME", "yes")
		read()
	}
	if at := s.ReplacedAt(); at != 0 {
		t.Errorf("replaced at %d", at)
	}
	r.Kill()
	r.Start()
	before := time.Now().Add(-time.Minute).UnixMilli()
	read()
	if at := s.ReplacedAt(); at < before {
		t.Errorf("replaced at %d", at)
	}
}
