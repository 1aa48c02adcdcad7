package store_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// saying returns what a log's chunks say about messages: "type message_id reason", in order.
func saying(t testing.TB, s *store.Store, id string) (all []string) {
	t.Helper()
	for _, element := range mustRead(t, s, id, 1, lots, lots).Elements {
		var c struct {
			Type    string
			Message string `json:"message_id"`
			Reason  string
		}
		if err := json.Unmarshal([]byte(element), &c); err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.TrimSpace(c.Type+" "+c.Message+" "+c.Reason))
	}
	return all
}

func of(message string) store.Chunk { return store.NewChunk(store.TypeDelta, message, "", "x") }

func (b batch) to(t testing.TB, s *store.Store) error {
	t.Helper()
	if b.Hold != store.HoldNone && b.Token == "" {
		b.Token = "t"
	}
	_, err := s.Append(t.Context(), "s", store.Batch(b))
	return err
}

type batch store.Batch

// must fails the test on an error.
func (b batch) must(t testing.TB, s *store.Store) {
	t.Helper()
	if err := b.to(t, s); err != nil {
		t.Fatal(err)
	}
}

const lost = "failed m producer_lost"

// untilLost reads until the message is declared lost, and returns how long that took.
func untilLost(t *testing.T, s *store.Store) time.Duration {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if all := saying(t, s, "s"); all[len(all)-1] == lost {
			return time.Since(begun)
		}
		if time.Since(begun) > storetest.Patience {
			t.Fatal("no one noticed that the producer is lost:", saying(t, s, "s"))
		}
	}
}

// short is a grace period that ends soon, but that a test on a busy machine does not exceed.
func short(c *store.Config) { c.Grace = 2 * time.Second }

// ended checks that a message has exactly one end, and accepts no more chunks.
func ended(t *testing.T, s *store.Store, how string) {
	t.Helper()
	err := batch{Chunks: []store.Chunk{of("m")}}.to(t, s)
	if e, ok := errors.AsType[*store.MessageEndedError](err); !ok || e.How != how {
		t.Fatal(err)
	}
	ends := 0
	for _, text := range saying(t, s, "s") {
		if !strings.HasPrefix(text, "delta") && !strings.HasPrefix(text, "message") {
			ends++
		}
	}
	if ends != 1 {
		t.Fatal(saying(t, s, "s"))
	}
}

// A message whose lease nobody renews ends once, however many callers read the log.
func TestLease_lapsesOnceAlthoughManyLook(t *testing.T) {
	t.Parallel()
	r := storetest.Redis(t)
	a := open(t, func(c *store.Config) { c.Redis = r.URL() })
	b := open(t, func(c *store.Config) { c.Redis = r.URL() })
	batch{Chunks: []store.Chunk{of("m")}, Lease: 2 * time.Second}.must(t, a)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s := []*store.Store{a, b}[i%2]
			if took := untilLost(t, s); took < 1900*time.Millisecond {
				t.Errorf("the lease lapsed after %v", took)
			}
		})
	}
	wg.Wait()
	ended(t, b, "failed")
}

func TestLease_isRenewedByAppendsAndByNamingTheMessage(t *testing.T) {
	t.Parallel()
	both(t, nil, func(t *testing.T, s *store.Store) {
		batch{Messages: []string{"m"}, Lease: 2 * time.Second}.must(t, s)
		for i := range 8 {
			time.Sleep(500 * time.Millisecond) // the producer's pace
			b := batch{Chunks: []store.Chunk{of("m")}}
			if i%2 == 0 {
				b = batch{Messages: []string{"m"}}
			}
			b.must(t, s)
		}
		if all := saying(t, s, "s"); !slices.Equal(all, slices.Repeat([]string{"delta m"}, 4)) {
			t.Fatal(all)
		}
		untilLost(t, s)
		ended(t, s, "failed")
		if e, ok := errors.AsType[*store.MessageEndedError](batch{Messages: []string{"m"}}.to(t, s)); !ok || e.How != "failed" {
			t.Fatal("a lost message is renewed:", e)
		}
	})
}

func TestLease_isNotThereUnlessAskedFor(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); short(c) })
	batch{Chunks: []store.Chunk{of("m")}}.must(t, s)
	batch{Messages: []string{"other"}}.must(t, s) // naming a message without a lease does not begin it
	hash := r.HGetAll(t.Context(), "chat:session:s").Val()
	if hash["m:m"] != "open" || hash["due"] != "" || hash["m:other"] != "" {
		t.Fatal(hash)
	}
	batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDone, "m", "", "")}}.must(t, s)
	if hash := r.HGetAll(t.Context(), "chat:session:s").Val(); hash["m:m"] != "done" {
		t.Fatal(hash)
	}
}

// An upload under way is a sign of life. When its node dies, the signs stop.
func TestHold_openUploadCountsAsAlive_aDeadNodesDoesNot(t *testing.T) {
	t.Parallel()
	both(t, short, func(t *testing.T, s *store.Store) {
		begun := time.Now()
		batch{Chunks: []store.Chunk{of("m")}, Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
		for time.Since(begun) < 4*time.Second {
			time.Sleep(400 * time.Millisecond)
			batch{Hold: store.HoldLook, Messages: []string{"m"}}.must(t, s)
		}
		if took := untilLost(t, s); took < 1600*time.Millisecond {
			t.Fatal("lost after", took)
		}
		ended(t, s, "failed")
		if _, ok := errors.AsType[*store.MessageEndedError](batch{Hold: store.HoldLook, Messages: []string{"m"}}.to(t, s)); !ok {
			t.Fatal("an upload may go on with a message that was lost")
		}
		batch{Hold: store.HoldBroken, Messages: []string{"m"}}.must(t, s)
		batch{Hold: store.HoldClosed, Messages: []string{"m"}}.must(t, s)
		ended(t, s, "failed")
	})
}

func TestHold_closed_leavesNoLeaseButTheOneThatWasAskedFor(t *testing.T) {
	t.Parallel()
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); short(c) })
	hash := func(name string) string { return r.HGet(t.Context(), "chat:session:s", name).Val() }
	batch{Chunks: []store.Chunk{of("m")}, Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
	if !strings.HasSuffix(hash("m:m"), " 0 t ") {
		t.Fatal(hash("m:m"))
	}
	batch{Hold: store.HoldClosed, Messages: []string{"m"}}.must(t, s)
	if hash("m:m") != "open" {
		t.Fatal(hash("m:m"))
	}
	batch{Chunks: []store.Chunk{of("m")}, Lease: 1600 * time.Millisecond}.must(t, s)
	batch{Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
	batch{Hold: store.HoldClosed, Messages: []string{"m"}}.must(t, s)
	if took := untilLost(t, s); took < 1400*time.Millisecond {
		t.Fatal(took)
	}
}

func TestHold_broken_failsAtOnceWithoutNumbers(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		batch{Chunks: []store.Chunk{of("m"), of("other")}, Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
		batch{Hold: store.HoldBroken, Messages: []string{"m"}}.must(t, s)
		if all := saying(t, s, "s"); !slices.Equal(all, []string{"delta m", "delta other", lost}) {
			t.Fatal(all)
		}
		ended(t, s, "failed")
	})
}

func TestHold_broken_hasAGraceWithNumbers(t *testing.T) {
	t.Parallel()
	both(t, short, func(t *testing.T, s *store.Store) {
		p := store.Producer{ID: "p"}
		batch{Producer: p, Chunks: []store.Chunk{of("m")}, Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
		p.Number++
		batch{Producer: p, Hold: store.HoldBroken, Messages: []string{"m"}}.must(t, s)
		// Other producers neither renew it nor take it over.
		batch{Chunks: []store.Chunk{of("m")}}.must(t, s)
		if took := untilLost(t, s); took < 1800*time.Millisecond {
			t.Fatal(took)
		}
		ended(t, s, "failed")
		err := batch{Producer: p, Chunks: []store.Chunk{of("m")}}.to(t, s)
		if e, ok := errors.AsType[*store.MessageEndedError](err); !ok || e.How != "failed" {
			t.Fatal("it came back too late:", err)
		}
	})
}

func TestHold_broken_aProducerThatComesBackInTimeGoesOn(t *testing.T) {
	t.Parallel()
	both(t, short, func(t *testing.T, s *store.Store) {
		p := store.Producer{ID: "p"}
		batch{Producer: p, Chunks: []store.Chunk{of("m")}, Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
		p.Number++
		batch{Producer: p, Hold: store.HoldBroken, Messages: []string{"m"}}.must(t, s)
		time.Sleep(300 * time.Millisecond)
		batch{Producer: p, Chunks: []store.Chunk{of("m")}}.must(t, s)
		time.Sleep(4 * time.Second) // longer than any grace period, which only uploads have
		if all := saying(t, s, "s"); !slices.Equal(all, []string{"delta m", "delta m"}) {
			t.Fatal(all)
		}
	})
}

// Nobody can renew a lease while Redis is away. So a message that expired meanwhile is asked once more.
func TestLease_isAskedOnceMoreBeforeItLapses(t *testing.T) {
	t.Parallel()
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); c.Grace = 3 * time.Second })
	e := newEar()
	defer s.ListenUploads(e)()
	e.wait(t, "the acknowledgement", func() bool { return e.resyncs == 1 })
	batch{Chunks: []store.Chunk{of("m")}, Hold: store.HoldOpen, Messages: []string{"m"}}.must(t, s)
	time.Sleep(4500 * time.Millisecond) // the outage: no script runs
	if all := saying(t, s, "s"); !slices.Equal(all, []string{"delta m"}) {
		t.Fatal(all)
	}
	e.wait(t, "the question", func() bool { return slices.Equal(e.heard, []string{"s"}) })
	batch{Hold: store.HoldLook, Messages: []string{"m"}}.must(t, s)
	time.Sleep(500 * time.Millisecond)
	if all := saying(t, s, "s"); !slices.Equal(all, []string{"delta m"}) {
		t.Fatal(all)
	}
	untilLost(t, s)
}

func TestCancel_endsTheMessageInTheLog(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		ctx := t.Context()
		if _, err := s.Cancel(ctx, "s", ""); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		question := store.NewChunk(store.TypeMessage, "q", "user", "Why?")
		batch{Chunks: []store.Chunk{question, of("m"), of("n"), of("f"), store.NewChunk(store.TypeDone, "f", "", "")}}.must(t, s)
		if _, err := s.Cancel(ctx, "s", "nobody"); !errors.Is(err, store.ErrMessageUnknown) {
			t.Fatal(err)
		}
		_, err := s.Cancel(ctx, "s", "f")
		if e, ok := errors.AsType[*store.MessageEndedError](err); !ok || e.How != "done" || e.MessageID != "f" {
			t.Fatal(err)
		}
		c, err := s.Cancel(ctx, "s", "m")
		if err != nil || !slices.Equal(c.Messages, []string{"m"}) || c.First != 6 || c.Last != 6 || c.Epoch == "" {
			t.Fatal(c, err)
		}
		if c, err := s.Cancel(ctx, "s", "m"); err != nil || len(c.Messages) != 0 {
			t.Fatal("repeating it:", c, err)
		}
		err = batch{Chunks: []store.Chunk{of("m")}}.to(t, s)
		if e, ok := errors.AsType[*store.MessageEndedError](err); !ok || e.How != store.Stopped {
			t.Fatal(err)
		}
		batch{Messages: []string{"begun without a chunk"}, Hold: store.HoldOpen, Token: "u"}.must(t, s)
		if c, err := s.Cancel(ctx, "s", ""); err != nil || !slices.Equal(c.Messages, []string{"begun without a chunk", "n"}) {
			t.Fatal(c, err)
		}
		if c, err := s.Cancel(ctx, "s", ""); err != nil || len(c.Messages) != 0 {
			t.Fatal(c, err)
		}
		want := []string{"message q", "delta m", "delta n", "delta f", "done f", "cancelled m", "cancelled begun without a chunk", "cancelled n"}
		if all := saying(t, s, "s"); !slices.Equal(all, want) {
			t.Fatal(all)
		}
		batch{Chunks: []store.Chunk{of("z"), store.NewEnding(store.TypeEnd, store.Fill{})}}.must(t, s)
		if _, err := s.Cancel(ctx, "s", "z"); !errors.Is(err, store.ErrSessionEnded) {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "s"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Cancel(ctx, "s", ""); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
	})
}

func TestOpen_tellsWhatIsUnfinished(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		ctx := t.Context()
		open := func(want ...string) store.Bounds {
			t.Helper()
			b, ids, err := s.Open(ctx, "s")
			if slices.Sort(ids); err != nil || !slices.Equal(ids, want) {
				t.Fatal(ids, err)
			}
			return b
		}
		if _, _, err := s.Open(ctx, "s"); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
		batch{Chunks: []store.Chunk{store.NewChunk(store.TypeMessage, "q", "user", "Why?"), of("m"), of("n"), of("f"), store.NewChunk(store.TypeDone, "f", "", "")}}.must(t, s)
		batch{Messages: []string{"begun without a chunk"}, Hold: store.HoldOpen, Token: "u"}.must(t, s)
		if b := open("begun without a chunk", "m", "n"); b.First != 1 || b.Last != 5 || b.Epoch == "" {
			t.Fatal(b)
		}
		if _, err := s.Cancel(ctx, "s", "m"); err != nil {
			t.Fatal(err)
		}
		open("begun without a chunk", "n")
		batch{Chunks: []store.Chunk{store.NewEnding(store.TypeEnd, store.Fill{})}}.must(t, s)
		open()
		if err := s.Delete(ctx, "s"); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Open(ctx, "s"); !errors.Is(err, store.ErrNotFound) {
			t.Fatal(err)
		}
	})
}

// Ids may be any text.
func TestCancel_ofAnIDThatNeedsQuoting(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		for _, id := range []string{`"`, `\`, "a b", "é🍞", "</script>", "\u2028\x00\x1f", "open 1 2 =", "%d%%"} {
			batch{Chunks: []store.Chunk{of(id)}, Lease: time.Hour}.must(t, s)
			c, err := s.Cancel(t.Context(), "s", "")
			if err != nil || !slices.Equal(c.Messages, []string{id}) {
				t.Fatalf("%q: %v %v", id, c, err)
			}
			if all := saying(t, s, "s"); all[len(all)-1] != strings.TrimSpace("cancelled "+id) {
				t.Fatalf("%q", all)
			}
		}
	})
}

// No chunk of a message follows its cancelled chunk.
func TestCancel_racingWithAppends(t *testing.T) {
	r := storetest.Redis(t)
	a := open(t, func(c *store.Config) { c.Redis = r.URL() })
	b := open(t, func(c *store.Config) { c.Redis = r.URL() })
	for round := range 200 {
		id := fmt.Sprint("s", round)
		var wg sync.WaitGroup
		for _, s := range []*store.Store{a, b} {
			wg.Go(func() {
				for {
					_, err := s.Append(t.Context(), id, store.Batch{Chunks: []store.Chunk{of("m"), of("m")}})
					if e, ok := errors.AsType[*store.MessageEndedError](err); ok && e.How == store.Stopped {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Go(func() {
			for {
				_, err := b.Cancel(t.Context(), id, "m")
				if err == nil {
					return
				}
				if !errors.Is(err, store.ErrNotFound) && !errors.Is(err, store.ErrMessageUnknown) {
					t.Error(err)
					return
				}
			}
		})
		wg.Wait()
		all := saying(t, a, id)
		if i := slices.Index(all, "cancelled m"); i < 0 || i != len(all)-1 {
			t.Fatal(all)
		}
	}
}

// Chunks that other programs push count: they begin and end messages.
func TestForeign_messagesAreKnownToTheAPI(t *testing.T) {
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		r := storetest.Redis(t)
		s := open(t, func(c *store.Config) { c.Redis = r.URL(); c.HistoryOrder = order })
		push := func(element string) {
			if order == store.NewestFirst {
				r.LPush(t.Context(), "chat:history:s", element)
			} else {
				r.RPush(t.Context(), "chat:history:s", element)
			}
		}
		how := func(id string) string {
			err := batch{Chunks: []store.Chunk{of(id)}}.to(t, s)
			if e, ok := errors.AsType[*store.MessageEndedError](err); ok {
				return e.How
			}
			if err != nil {
				t.Fatal(err)
			}
			return ""
		}
		push(`{"message_id":"m1","content":"a"}`)
		push(`{"message_id":"m1","content":"","is_complete":true}`)
		push(`{"message\u005fid":"m2","type":"failed"}`)
		push(`not JSON: "message_id"`)
		push(`{"message_id":7}`)
		push(`["message_id"]`)
		push(`{"message_id":"m3","content":"a","is_complete":false}`)
		push(`{"message_id":"q","type":"message"}`)
		if how("m1") != "done" || how("m2") != "failed" || how("m4") != "" {
			t.Fatal(order, r.HGetAll(t.Context(), "chat:session:s").Val())
		}
		c, err := s.Cancel(t.Context(), "s", "")
		if err != nil || !slices.Equal(c.Messages, []string{"m3", "m4"}) {
			t.Fatal(order, c, err)
		}
		// It cannot be refused, and it does not reopen the message.
		push(`{"message_id":"m3","content":"b","is_complete":true}`)
		if how("m3") != store.Stopped {
			t.Fatal(order)
		}
		if p := mustRead(t, s, "s", 1, lots, lots); p.Last != 12 {
			t.Fatal(order, p)
		}
	}
}

// A producer that repeats stored chunks is not told to stop, whatever has ended since.
func TestHold_look_ofAProducerThatSendsAgainWhatIsKnown(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		p := store.Producer{ID: "p"}
		batch{Producer: p, Chunks: []store.Chunk{of("m"), store.NewEnding(store.TypeEnd, store.Fill{})}}.must(t, s)
		batch{Producer: p, Hold: store.HoldLook, Messages: []string{"m"}}.must(t, s)
		p.Number = 2
		if err := (batch{Producer: p, Hold: store.HoldLook, Messages: []string{"m"}}).to(t, s); !errors.Is(err, store.ErrSessionEnded) {
			t.Fatal(err)
		}
	})
}

func TestHold_look_tellsWhatEndedElsewhere(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		first, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{of("m")}, Hold: store.HoldOpen, Messages: []string{"m"}, Producer: store.Producer{ID: "p"}})
		if err != nil {
			t.Fatal(err)
		}
		look := batch{Hold: store.HoldLook, Messages: []string{"m"}, Life: first.Life, Producer: store.Producer{ID: "p", Number: 1}}
		look.must(t, s)
		if _, err := s.Cancel(t.Context(), "s", ""); err != nil {
			t.Fatal(err)
		}
		if e, ok := errors.AsType[*store.MessageEndedError](look.to(t, s)); !ok || e.How != store.Stopped {
			t.Fatal(e)
		}
		batch{Producer: store.Producer{ID: "p", Epoch: 1}}.must(t, s)
		if e, ok := errors.AsType[*store.FencedError](look.to(t, s)); !ok || e.Epoch != 1 {
			t.Fatal(e)
		}
		look.Producer = store.Producer{}
		batch{Chunks: []store.Chunk{store.NewEnding(store.TypeEnd, store.Fill{})}}.must(t, s)
		if err := look.to(t, s); !errors.Is(err, store.ErrSessionEnded) {
			t.Fatal(err)
		}
		if err := s.Delete(t.Context(), "s"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := look.to(t, s); !errors.Is(err, store.ErrSessionDeleted) {
				t.Fatal(err)
			}
			if _, _, err := s.Create(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func hold(how store.Hold, token string, p store.Producer, chunks ...store.Chunk) batch {
	return batch{Hold: how, Token: token, Producer: p, Messages: []string{"m"}, Chunks: chunks}
}

// stays reads for longer than any lease of these tests lasts, and expects no more chunks.
func stays(t *testing.T, s *store.Store, want ...string) {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < 4*time.Second; time.Sleep(50 * time.Millisecond) {
		if all := saying(t, s, "s"); !slices.Equal(all, want) {
			t.Fatalf("%q instead of %q", all, want)
		}
	}
}

// The newest upload of a message's producer holds it. Its other uploads do not affect it, and an upload of another
// producer neither ends it nor takes it over.
func TestHold_isOfTheUploadThatHasIt(t *testing.T) {
	t.Parallel()
	nobody, p, q := store.Producer{}, store.Producer{ID: "p"}, store.Producer{ID: "q"}
	at := func(p store.Producer, number int64) store.Producer {
		p.Number = number
		return p
	}
	both(t, short, func(t *testing.T, s *store.Store) {
		renewed := func(t *testing.T, by batch, until time.Duration) {
			t.Helper()
			for begun := time.Now(); time.Since(begun) < until; time.Sleep(400 * time.Millisecond) {
				by.must(t, s)
			}
		}
		for name, test := range map[string]func(t *testing.T){
			"the former of two without numbers breaks": func(t *testing.T) {
				hold(store.HoldOpen, "former", nobody, of("m")).must(t, s)
				hold(store.HoldOpen, "newer", nobody, of("m")).must(t, s)
				hold(store.HoldLook, "former", nobody).must(t, s) // a look takes nothing over
				hold(store.HoldBroken, "former", nobody).must(t, s)
				hold(store.HoldClosed, "former", nobody).must(t, s)
				renewed(t, hold(store.HoldLook, "newer", nobody), 4*time.Second)
				hold(store.HoldBroken, "newer", nobody).must(t, s)
				ended(t, s, "failed")
			},
			"one without numbers breaks beside one with": func(t *testing.T) {
				hold(store.HoldOpen, "live", p, of("m")).must(t, s)
				hold(store.HoldOpen, "other", nobody, of("m")).must(t, s)
				hold(store.HoldBroken, "other", nobody).must(t, s)
				renewed(t, hold(store.HoldLook, "live", at(p, 1)), 4*time.Second)
				untilLost(t, s)
			},
			"another closes while one's grace is running": func(t *testing.T) {
				hold(store.HoldOpen, "dead", p, of("m")).must(t, s)
				hold(store.HoldOpen, "other", q, of("m")).must(t, s)
				hold(store.HoldClosed, "other", at(q, 1)).must(t, s)
				untilLost(t, s)
			},
			"its producer comes back by a short upload": func(t *testing.T) {
				hold(store.HoldOpen, "dead", p, of("m")).must(t, s)
				hold(store.HoldBroken, "dead", at(p, 1)).must(t, s)
				hold(store.HoldClosed, "back", at(p, 1), of("m")).must(t, s)
				stays(t, s, "delta m", "delta m")
			},
			"its producer comes back by posts from a node that died": func(t *testing.T) {
				hold(store.HoldOpen, "dead", p, of("m")).must(t, s)
				batch{Producer: at(p, 1), Chunks: []store.Chunk{of("m")}}.must(t, s)
				batch{Producer: at(p, 2), Chunks: []store.Chunk{of("m")}}.must(t, s)
				stays(t, s, "delta m", "delta m", "delta m")
			},
			"its upload was answered, and its producer goes on by posts": func(t *testing.T) {
				hold(store.HoldOpen, "a", nobody, of("m")).must(t, s)
				hold(store.HoldLeft, "a", nobody).must(t, s)
				batch{Chunks: []store.Chunk{of("m")}}.must(t, s)
				stays(t, s, "delta m", "delta m")
			},
			"its upload was answered, and its producer gives up": func(t *testing.T) {
				hold(store.HoldOpen, "a", nobody, of("m")).must(t, s)
				hold(store.HoldLeft, "a", nobody).must(t, s)
				untilLost(t, s)
			},
			"a post of the same producer does not take it away": func(t *testing.T) {
				hold(store.HoldOpen, "live", p, of("m")).must(t, s)
				batch{Producer: at(p, 1), Chunks: []store.Chunk{of("m")}}.must(t, s)
				untilLost(t, s) // when its node dies
			},
			"a lease that is shorter than the grace": func(t *testing.T) {
				b := hold(store.HoldOpen, "a", p, of("m"))
				b.Lease = 200 * time.Millisecond
				b.must(t, s)
				hold(store.HoldBroken, "a", at(p, 1)).must(t, s)
				if took := untilLost(t, s); took < 1600*time.Millisecond {
					t.Error("lost after", took)
				}
			},
		} {
			t.Run(name, func(t *testing.T) {
				_ = s.Delete(t.Context(), "s")
				if _, _, err := s.Create(t.Context(), "s"); err != nil {
					t.Fatal(err)
				}
				p.Epoch++ // otherwise the deletion counts
				q.Epoch++
				test(t)
			})
		}
	})
}

// Nothing follows the end of the log.
func TestEnd_nothingLapsesOrIsCancelledBehindIt(t *testing.T) {
	t.Parallel()
	both(t, short, func(t *testing.T, s *store.Store) {
		batch{Chunks: []store.Chunk{of("m")}, Lease: 2 * time.Second}.must(t, s)
		hold(store.HoldOpen, "a", store.Producer{}, of("n"), store.NewEnding(store.TypeEnd, store.Fill{})).must(t, s)
		if c, err := s.Cancel(t.Context(), "s", ""); err != nil || len(c.Messages) != 0 {
			t.Fatal(c, err)
		}
		hold(store.HoldBroken, "a", store.Producer{}).must(t, s)
		stays(t, s, "delta m", "delta n", "end")
	})
}

// A message without a chunk does not fail, unless a viewer waits for it.
func TestHold_ofAMessageWithoutAChunk(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); short(c) })
	known := func() string { return r.HGet(t.Context(), "chat:session:s", "m:m").Val() }
	for _, how := range []store.Hold{store.HoldClosed, store.HoldLeft} {
		hold(store.HoldLook, "a", store.Producer{}).must(t, s)
		if !strings.HasPrefix(known(), "new ") {
			t.Fatal(known())
		}
		hold(how, "a", store.Producer{}).must(t, s)
		if known() != "" || r.ZCard(t.Context(), "chat:messages:s").Val() != 0 {
			t.Fatal(how, known())
		}
	}
	hold(store.HoldLook, "a", store.Producer{}).must(t, s)
	hold(store.HoldBroken, "a", store.Producer{}).must(t, s) // it was announced, and will never come
	ended(t, s, "failed")
}

// Naming a message creates no session, and does not revive one.
func TestLease_namingAMessageMakesNothing(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	a, err := s.Append(t.Context(), "s", store.Batch{Messages: []string{"m"}})
	if err != nil || a.First != 1 || a.Last != 0 || a.Epoch != "" || len(r.Keys(t.Context(), "*").Val()) > 0 {
		t.Fatal(a, err, r.Keys(t.Context(), "*").Val())
	}
	mustAppend(t, s, "s", of("x"))
	if err := s.Delete(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(t.Context(), "s", store.Batch{Messages: []string{"m"}}); err != nil {
		t.Fatal(err)
	}
	if p := mustRead(t, s, "s", 1, 0, 0); !p.Deleted {
		t.Fatal(p)
	}
}

// A lapse does not read ended messages.
func TestLease_lapseReadsOnlyWhatIsOpen(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL(); short(c) })
	for i := range 100 {
		mustAppend(t, s, "s", of(fmt.Sprint(i)), store.NewChunk(store.TypeDone, fmt.Sprint(i), "", ""))
	}
	hold(store.HoldOpen, "a", store.Producer{}, of("m")).must(t, s)
	if n := r.ZCard(t.Context(), "chat:messages:s").Val(); n != 1 {
		t.Fatalf("%d open messages", n)
	}
	calls := func() string { return r.Info(t.Context(), "commandstats").Val() }
	untilLost(t, s)
	if strings.Contains(calls(), "cmdstat_hgetall") {
		t.Fatal(calls())
	}
	if due := r.HGet(t.Context(), "chat:session:s", "due").Val(); due != "" {
		t.Fatal(due)
	}
}
