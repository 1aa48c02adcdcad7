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

	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// Promise: Once. An append that is retried with the same producer numbers takes effect once.

// posted returns a chunk as a producer posts it.
func posted(t testing.TB, text string) store.Chunk {
	t.Helper()
	c, err := store.ParseChunk([]byte(text), store.Fill{}, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func texts(t testing.TB, text string, fill store.Fill) []store.Chunk {
	t.Helper()
	chunks, err := store.NewTexts(text, fill, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	return chunks
}

// contents returns the contents of the log's chunks.
func contents(t testing.TB, s *store.Store, id string) (all []string) {
	t.Helper()
	for _, element := range mustRead(t, s, id, 1, lots, lots).Elements {
		var c struct{ Content string }
		if err := json.Unmarshal([]byte(element), &c); err != nil {
			t.Fatal(err)
		}
		all = append(all, c.Content)
	}
	return all
}

func TestOnce_aRetryIsAnsweredWithTheNumbersItHas(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		a, b, c := posted(t, `{"content":"a"}`), posted(t, `{"content":"b"}`), posted(t, `{"content":"c"}`)
		p := store.Producer{ID: "p"}
		first, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{a, b}})
		if err != nil || first.First != 1 || first.Last != 2 || first.Count != 2 || first.Known != 0 {
			t.Fatal(first, err)
		}
		mustAppend(t, s, "s", delta("of somebody else"))
		// All of it again, more of it, and a part of it.
		again, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{a, b}})
		if err != nil || again.First != 1 || again.Last != 2 || again.Count != 2 || again.Known != 2 || again.Epoch != first.Epoch {
			t.Fatal(again, err)
		}
		more, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{a, b, c}})
		if err != nil || more.First != 1 || more.Last != 4 || more.Count != 3 || more.Known != 2 {
			t.Fatal(more, err)
		}
		p.Number = 1
		part, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{b}})
		if err != nil || part.First != 2 || part.Last != 2 || part.Known != 1 {
			t.Fatal(part, err)
		}
		if got := contents(t, s, "s"); !slices.Equal(got, []string{"a", "b", "of somebody else", "c"}) {
			t.Fatal(got)
		}
	})
}

func TestOnce_gapsAreRefusedWithTheExpectedNumber(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		p := store.Producer{ID: "p", Number: 1}
		_, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{delta("b")}})
		if gap, ok := errors.AsType[*store.GapError](err); !ok || gap.Expected != 0 {
			t.Fatal(err)
		}
		if p := mustRead(t, s, "s", 1, lots, lots); p.Epoch != "" {
			t.Fatal("a refused append made the session", p)
		}
		p.Number = 0
		if _, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: texts(t, "Grüße", store.Fill{})}); err != nil {
			t.Fatal(err)
		}
		p.Number = 8
		_, err = s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{delta("b")}})
		if gap, ok := errors.AsType[*store.GapError](err); !ok || gap.Expected != 7 { // bytes
			t.Fatal(err)
		}
	})
}

// The posted part is compared, not what the server added.
func TestOnce_otherContentIsAConflict_filledInMembersAreNot(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		parse := func(text string, fill store.Fill) []store.Chunk {
			c, err := store.ParseChunk([]byte(text), fill, 64<<10)
			if err != nil {
				t.Fatal(err)
			}
			return []store.Chunk{c}
		}
		p := store.Producer{ID: "p"}
		at := func(n int64, chunks []store.Chunk) error {
			p.Number = n
			_, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: chunks})
			return err
		}
		for i, chunks := range [][]store.Chunk{
			parse(`{"content":"a"}`, store.Fill{MessageID: "m1"}),
			parse(`{"message_id":"m1","content":"b"}`, store.Fill{}),
			parse(`{}`, store.Fill{Role: "r"}),
			parse(`{}`, store.Fill{MessageID: "m1", Role: "r"}),
		} {
			if err := at(int64(i), chunks); err != nil {
				t.Fatal(i, err)
			}
		}
		for _, c := range []struct {
			number   int64
			chunks   []store.Chunk
			conflict bool
		}{
			{0, parse(`{"content":"a"}`, store.Fill{MessageID: "m2", Role: "r"}), false},
			{0, parse(`{"content":"a"}`, store.Fill{}), false},
			{0, parse(`{"message_id":"m1","content":"a"}`, store.Fill{}), true},
			{0, parse(`{"content":"b"}`, store.Fill{MessageID: "m1"}), true},
			{0, texts(t, "a", store.Fill{MessageID: "m1"}), true},
			{1, parse(`{"message_id":"m1","content":"b"}`, store.Fill{}), false},
			{1, parse(`{"content":"b"}`, store.Fill{MessageID: "m1"}), true}, // equal in the log, but posted differently
			{2, parse(` { } `, store.Fill{MessageID: "m9"}), false},
			{3, parse(`{}`, store.Fill{MessageID: "m8"}), false},
			{3, parse(`{"role":"r"}`, store.Fill{}), true},
		} {
			err := at(c.number, c.chunks)
			if errors.Is(err, store.ErrProducerConflict) != c.conflict || err != nil && !c.conflict {
				t.Errorf("%+v: %v", c, err)
			}
		}
		if p := mustRead(t, s, "s", 1, lots, lots); p.Last != 4 {
			t.Fatal(p)
		}
		// The error names the chunk of the batch.
		err := at(0, append(parse(`{"content":"a"}`, store.Fill{}), parse(`{"content":"no"}`, store.Fill{})...))
		if refused, ok := errors.AsType[*store.RefusedError](err); !ok || refused.Index != 1 {
			t.Fatal(err)
		}
	})
}

// The index of a refused chunk counts the chunks that were known.
func TestOnce_aRefusedChunkBehindKnownOnesIsCountedFromTheFirst(t *testing.T) {
	s := open(t, nil)
	p := store.Producer{ID: "p"}
	one, done := posted(t, `{"content":"a","message_id":"m"}`), posted(t, `{"type":"done","message_id":"m"}`)
	if _, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{one, done}}); err != nil {
		t.Fatal(err)
	}
	_, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{one, done, delta("b"), one}})
	if refused, ok := errors.AsType[*store.RefusedError](err); !ok || refused.Index != 3 {
		t.Fatal(err)
	}
	// Known chunks are accepted, whatever has ended meanwhile.
	if a, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{one, done}}); err != nil || a.Known != 2 {
		t.Fatal(a, err)
	}
	p.Number = 2
	end := store.NewEnding(store.TypeEnd, store.Fill{})
	for range 2 {
		if _, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{end}}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOnce_aNewEpochFencesTheOldOneAndCountsFromZero(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		say := func(epoch, number int64, text string) error {
			_, err := s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p", Epoch: epoch, Number: number}, Chunks: []store.Chunk{delta(text)}})
			return err
		}
		if err := say(3, 0, "a"); err != nil {
			t.Fatal(err)
		}
		if err, ok := errors.AsType[*store.FencedError](say(2, 0, "a")); !ok || err.Epoch != 3 {
			t.Fatal(err)
		}
		if err, ok := errors.AsType[*store.GapError](say(4, 1, "b")); !ok || err.Expected != 0 {
			t.Fatal(err)
		}
		if err := say(3, 1, "b"); err != nil {
			t.Fatal("a refused epoch has fenced:", err)
		}
		if err := say(7, 0, "c"); err != nil {
			t.Fatal(err)
		}
		if err, ok := errors.AsType[*store.FencedError](say(3, 2, "d")); !ok || err.Epoch != 7 {
			t.Fatal(err)
		}
		if err := say(7, 0, "a"); !errors.Is(err, store.ErrProducerConflict) { // it is not of the old epoch
			t.Fatal(err)
		}
		// An epoch may begin without a chunk.
		if _, err := s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p", Epoch: 8}}); err != nil {
			t.Fatal(err)
		}
		if err, ok := errors.AsType[*store.FencedError](say(7, 1, "d")); !ok || err.Epoch != 8 {
			t.Fatal(err)
		}
		if got := contents(t, s, "s"); !slices.Equal(got, []string{"a", "b", "c"}) {
			t.Fatal(got)
		}
	})
}

// Chunks that were trimmed are known by their numbers.
func TestOnce_olderThanKeptIsAnsweredByNumber(t *testing.T) {
	both(t, func(c *store.Config) { c.HistoryMax = 10 }, func(t *testing.T, s *store.Store) {
		p := store.Producer{ID: "p"}
		for i := range 30 {
			p.Number = int64(i)
			if _, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{posted(t, fmt.Sprintf(`{"content":"%d"}`, i))}}); err != nil {
				t.Fatal(err)
			}
			if i%3 == 0 { // a run ends
				mustAppend(t, s, "s", delta("x"))
			}
		}
		p.Number = 2
		if a, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{delta("not this")}}); err != nil || a.Known != 1 || a.First != 0 {
			t.Fatal(a, err)
		}
		p.Number = 29
		if _, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{delta("not this")}}); !errors.Is(err, store.ErrProducerConflict) {
			t.Fatal(err)
		}
		all := make([]store.Chunk, 32)
		for i := range all {
			all[i] = posted(t, fmt.Sprintf(`{"content":"%d"}`, i))
		}
		p.Number = 0
		if a, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: all}); err != nil || a.Known != 30 || a.Count != 32 || a.Last != 42 {
			t.Fatal(a, err)
		}
	})
}

// The index of trimmed chunks is trimmed, too.
func TestOnce_theIndexIsTrimmedWithTheLogAndDiesWithIt(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.HistoryMax = r.URL(), 20 })
	p := store.Producer{ID: "p"}
	for i := range 200 {
		p.Number = int64(i)
		if _, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{delta("y")}}); err != nil {
			t.Fatal(err)
		}
		mustAppend(t, s, "s", delta("x"))
	}
	if n := r.ZCard(t.Context(), "chat:producers:s").Val(); n < 9 || n > 25 {
		t.Fatalf("%d runs for 10 chunks", n)
	}
	if list, index := r.PTTL(t.Context(), "chat:history:s").Val(), r.PTTL(t.Context(), "chat:producers:s").Val(); (list - index).Abs().Seconds() > 1 {
		t.Fatal(list, index)
	}
	if err := s.Delete(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if keys := r.Keys(t.Context(), "*").Val(); !slices.Equal(keys, []string{"chat:session:s"}) {
		t.Fatal(keys)
	}
}

// model describes a log and its producers after a history of appends.
type model struct {
	log       []piece
	producers map[string]*modelProducer
}

type piece struct {
	content string
	chunk   bool
}

type modelProducer struct {
	epoch int64
	units []unit
}

// unit is a thing with a producer number: a chunk, or a byte of a text.
type unit struct {
	what  string
	chunk bool
	at    int // in the log
}

// append returns what an append must return.
func (m *model) append(p store.Producer, parts []piece) (want string) {
	state := m.producers[p.ID]
	switch {
	case p.ID == "":
		state = &modelProducer{}
	case state != nil && p.Epoch < state.epoch:
		return fmt.Sprint("fenced ", state.epoch)
	case state == nil || p.Epoch > state.epoch:
		if p.Number > 0 {
			return "gap 0"
		}
		state = &modelProducer{epoch: p.Epoch}
	case p.Number > int64(len(state.units)):
		return fmt.Sprint("gap ", len(state.units))
	}
	next := int(p.Number)
	units := slices.Clone(state.units)
	log := slices.Clone(m.log)
	first, last, place := 0, 0, 0
	seen := func(at int) {
		if place = at + 1; first == 0 {
			first = place
		}
		last = place
	}
	for i, part := range parts {
		all := []string{part.content}
		if !part.chunk {
			all = strings.Split(part.content, "") // the alphabet of these tests is ASCII
		}
		for k, what := range all {
			if next < len(state.units) {
				if u := state.units[next]; u.what != what || u.chunk != part.chunk {
					return fmt.Sprint("conflict ", i)
				}
				seen(state.units[next].at)
				next++
				continue
			}
			rest := piece{strings.Join(all[k:], ""), part.chunk}
			log = append(log, rest)
			for _, what := range all[k:] {
				units = append(units, unit{what, part.chunk, len(log) - 1})
			}
			next += len(all[k:])
			seen(len(log) - 1)
			break
		}
	}
	m.log = log
	if state.units = units; p.ID != "" {
		m.producers[p.ID] = state
	}
	return fmt.Sprint("ok ", first, " ", last)
}

func said(a store.Appended, err error) string {
	if fenced, ok := errors.AsType[*store.FencedError](err); ok {
		return fmt.Sprint("fenced ", fenced.Epoch)
	}
	if gap, ok := errors.AsType[*store.GapError](err); ok {
		return fmt.Sprint("gap ", gap.Expected)
	}
	if refused, ok := errors.AsType[*store.RefusedError](err); ok && errors.Is(err, store.ErrProducerConflict) {
		return fmt.Sprint("conflict ", refused.Index)
	}
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint("ok ", a.First, " ", a.Last)
}

// Producers and their zombies send anything, in any pieces, once or again. The log must equal that of a simple model.
func TestOnce_anyHistoryOfAppendsIsWhatAModelSays(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		runs := 0
		rapid.Check(t, func(t *rapid.T) {
			runs++
			id := fmt.Sprint("s", runs)
			m := model{producers: map[string]*modelProducer{}}
			for range rapid.IntRange(1, 25).Draw(t, "appends") {
				p := store.Producer{ID: rapid.SampledFrom([]string{"p", "q", "q", "pp", ""}).Draw(t, "producer")}
				state := m.producers[p.ID]
				if p.ID != "" {
					p.Epoch = rapid.SampledFrom([]int64{0, 0, 0, 1, 2}).Draw(t, "epoch")
					if state != nil {
						p.Epoch = max(0, state.epoch+rapid.SampledFrom([]int64{0, 0, 0, 0, 0, 0, 0, 1, -1}).Draw(t, "epoch"))
						p.Number = int64(rapid.IntRange(0, len(state.units)+1).Draw(t, "number"))
						if p.Epoch != state.epoch {
							p.Number = min(p.Number, 1)
						}
					}
				}
				var parts []piece
				next := int(p.Number)
				for range rapid.IntRange(1, 4).Draw(t, "parts") {
					part := piece{rapid.StringMatching(`[ab]{1,2}`).Draw(t, "content"), rapid.Bool().Draw(t, "chunk")}
					if state != nil && p.Epoch == state.epoch && next < len(state.units) && rapid.IntRange(0, 9).Draw(t, "true") > 0 {
						// Mostly a retry repeats the same text, though perhaps in other pieces.
						u := state.units[next]
						part = piece{u.what, u.chunk}
						for n := rapid.IntRange(0, 4).Draw(t, "more"); n > 0 && !u.chunk && next+len(part.content) < len(state.units) && !state.units[next+len(part.content)].chunk; n-- {
							part.content += state.units[next+len(part.content)].what
						}
					}
					if part.chunk {
						next++
					} else {
						next += len(part.content)
					}
					parts = append(parts, part)
				}
				var chunks []store.Chunk
				for _, part := range parts {
					fill := store.Fill{Role: rapid.SampledFrom([]string{"", "r"}).Draw(t, "role")}
					if !part.chunk {
						c, err := store.NewTexts(part.content, fill, 64<<10)
						if err != nil {
							t.Fatal(err)
						}
						chunks = append(chunks, c...)
						continue
					}
					c, err := store.ParseChunk([]byte(`{"content":"`+part.content+`"}`), fill, 64<<10)
					if err != nil {
						t.Fatal(err)
					}
					chunks = append(chunks, c)
				}
				want := m.append(p, parts)
				if got := said(s.Append(t.Context(), id, store.Batch{Producer: p, Chunks: chunks})); got != want {
					t.Fatalf("%+v %v: %s instead of %s\nlog %v", p, parts, got, want, m.log)
				}
			}
			page, err := s.Read(t.Context(), id, 1, lots, lots)
			if err != nil || len(page.Elements) != len(m.log) {
				t.Fatalf("%d elements instead of %d (%v)", len(page.Elements), len(m.log), err)
			}
			for i, element := range page.Elements {
				var c struct{ Content string }
				if err := json.Unmarshal([]byte(element), &c); err != nil || c.Content != m.log[i].content {
					t.Fatalf("%s instead of %v", element, m.log)
				}
			}
		})
	})
}

// Two producers with one id and the same numbers, on two nodes, are one producer to the log.
func TestOnce_zombiesOfOneEpochAppendTogetherWhatOneWould(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		const count = 300
		var wg sync.WaitGroup
		for k := range 3 {
			wg.Go(func() {
				for i := 0; i < count; {
					n := min(1+(i+k)%5, count-i)
					var chunks []store.Chunk
					for j := range n {
						chunks = append(chunks, posted(t, fmt.Sprintf(`{"content":"%d"}`, i+j)))
					}
					if _, err := s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p", Number: int64(i)}, Chunks: chunks}); err != nil {
						t.Error(err)
						return
					}
					i += n
				}
			})
		}
		wg.Wait()
		for i, got := range contents(t, s, "s") {
			if got != fmt.Sprint(i) {
				t.Fatalf("chunk %d says %s", i+1, got)
			}
		}
		if p := mustRead(t, s, "s", 1, 0, 0); p.Last != count {
			t.Fatal(p)
		}
	})
}

// Epochs race: no chunk of a fenced epoch follows the first chunk of the next epoch, and each epoch's chunks are its
// first ones, in order.
func TestOnce_epochsRace(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		var wg sync.WaitGroup
		for epoch := range int64(8) {
			wg.Go(func() {
				for i := range int64(60) {
					_, err := s.Append(t.Context(), "s", store.Batch{
						Producer: store.Producer{ID: "p", Epoch: epoch, Number: i},
						Chunks:   []store.Chunk{delta(fmt.Sprint(epoch, " ", i))},
					})
					if _, fenced := errors.AsType[*store.FencedError](err); fenced {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		var epoch, number int64 = -1, 0
		all := contents(t, s, "s")
		for _, text := range all {
			var e, n int64
			if _, err := fmt.Sscan(text, &e, &n); err != nil {
				t.Fatal(err)
			}
			if e > epoch {
				epoch, number = e, 0
			}
			if e != epoch || n != number {
				t.Fatal(all)
			}
			number++
		}
		if epoch != 7 || number != 60 {
			t.Fatal(all)
		}
	})
}

// The list expires, and the producers' index with it. The producer continues, and later retries are compared again.
func TestOnce_afterTheListExpired(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	say := func(number int64, text string) (store.Appended, error) {
		return s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p", Number: number}, Chunks: []store.Chunk{posted(t, text)}})
	}
	for i := range int64(3) {
		if _, err := say(i, fmt.Sprintf(`{"content":"%d"}`, i)); err != nil {
			t.Fatal(err)
		}
	}
	r.Del(t.Context(), "chat:history:s", "chat:producers:s") // expiry does this to both
	for i := int64(3); i < 5; i++ {
		if a, err := say(i, fmt.Sprintf(`{"content":"%d"}`, i)); err != nil || a.First != i+1 {
			t.Fatal(a, err)
		}
	}
	if a, err := say(4, `{"content":"4"}`); err != nil || a.First != 5 || a.Known != 1 {
		t.Fatal(a, err)
	}
	if _, err := say(4, `{"content":"no"}`); !errors.Is(err, store.ErrProducerConflict) {
		t.Fatal(err)
	}
	if a, err := say(1, `{"content":"not kept"}`); err != nil || a.Known != 1 || a.First != 0 {
		t.Fatal(a, err)
	}
}

// Trimmed numbers are skipped, not searched one by one.
func TestOnce_manyTrimmedNumbersCostFewReads(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.HistoryMax = r.URL(), 1000 })
	all := make([]store.Chunk, 2000)
	for i := range all {
		all[i] = posted(t, `{"content":"x"}`)
	}
	b := store.Batch{Producer: store.Producer{ID: "p"}, Chunks: all}
	if _, err := s.Append(t.Context(), "s", b); err != nil {
		t.Fatal(err)
	}
	r.ConfigResetStat(t.Context())
	if a, err := s.Append(t.Context(), "s", b); err != nil || a.Known != 2000 || a.Last != 2000 {
		t.Fatal(a, err)
	}
	calls := r.Info(t.Context(), "commandstats").Val()
	_, rest, _ := strings.Cut(calls, "cmdstat_evalsha:calls=")
	if count, _, _ := strings.Cut(rest, ","); len(count) > 2 {
		t.Fatalf("%s scripts", count)
	}
}

// A retry covers more runs than one reply of the script contains.
func TestOnce_aRetryAcrossManyRuns(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		var all []store.Chunk
		for i := range 2200 { // each differs from the one before it
			all = append(all, posted(t, []string{`{"content":"x"}`, `{"type":"t","content":"y"}`}[i%2]))
		}
		b := store.Batch{Producer: store.Producer{ID: "p"}, Chunks: all}
		for i := range 2 {
			if a, err := s.Append(t.Context(), "s", b); err != nil || a.First != 1 || a.Last != 2200 || a.Count != 2200 || a.Known != i*2200 {
				t.Fatal(a, err)
			}
		}
		b.Chunks = append(slices.Clone(all[:2100]), posted(t, `{"content":"no"}`))
		_, err := s.Append(t.Context(), "s", b)
		if refused, ok := errors.AsType[*store.RefusedError](err); !ok || !errors.Is(err, store.ErrProducerConflict) || refused.Index != 2100 {
			t.Fatal(err)
		}
	})
}

// Other producers trim the index of a producer that has gone.
func TestOnce_theIndexOfManyProducersIsTrimmed(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.HistoryMax = r.URL(), 50 })
	for i := range 100 {
		var all []store.Chunk
		for k := range 20 {
			all = append(all, posted(t, []string{`{"content":"x"}`, `{"type":"t","content":"y"}`}[k%2]))
		}
		if _, err := s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: fmt.Sprint("p", i)}, Chunks: all}); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.ZCard(t.Context(), "chat:producers:s").Val(); n > 350 { // one for each producer that has gone, 50 that are kept
		t.Fatalf("%d runs", n)
	}
}

// A producer that repeats itself does not revive a deleted session.
func TestOnce_aDeletedSessionStaysSo(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		say := func(p store.Producer) error {
			_, err := s.Append(t.Context(), "s", store.Batch{Producer: p, Chunks: []store.Chunk{delta("a")}})
			return err
		}
		p := store.Producer{ID: "p", Epoch: 3}
		if err := say(p); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := s.Delete(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
			for _, q := range []store.Producer{{ID: "p", Epoch: 3}, {ID: "p", Epoch: 3, Number: 1}, {ID: "p", Epoch: 2}} {
				if err := say(q); !errors.Is(err, store.ErrSessionDeleted) {
					t.Fatal(q, err)
				}
			}
			if _, _, err := s.Create(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
			if err := say(p); !errors.Is(err, store.ErrSessionDeleted) {
				t.Fatal(err)
			}
		}
		if err := say(store.Producer{ID: "q"}); err != nil {
			t.Fatal(err)
		}
		if err := say(store.Producer{ID: "p", Epoch: 4}); err != nil {
			t.Fatal(err)
		}
		if err, ok := errors.AsType[*store.FencedError](say(p)); !ok {
			t.Fatal(err)
		}
	})
}

// A retry of known chunks succeeds, whatever has ended since.
func TestOnce_aRetryWithALease(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		b := store.Batch{
			Producer: store.Producer{ID: "p"}, Lease: time.Minute, Messages: []string{"m"},
			Chunks: []store.Chunk{posted(t, `{"message_id":"m"}`), posted(t, `{"message_id":"m","type":"done"}`), store.NewEnding(store.TypeEnd, store.Fill{})},
		}
		for i := range 3 {
			if a, err := s.Append(t.Context(), "s", b); err != nil || a.Count != 3 || (a.Known == 3) != (i > 0) {
				t.Fatal(a, err)
			}
		}
	})
}

// A limit with hardly any room for a character causes an error, not a loop.
func TestNewTexts_aCharacterThatDoesNotFit(t *testing.T) {
	fill := store.Fill{MessageID: strings.Repeat("m", 200)}
	for limit := store.Overhead + 200; limit < store.Overhead+300; limit++ {
		for _, text := range []string{"🍞a", "🍞🍞", "a🍞b", "aé🍞", "\x00\x00\x00🍞"} {
			chunks, err := store.NewTexts(text, fill, limit)
			if tooLarge, ok := errors.AsType[*store.ChunkError](err); err != nil && (!ok || tooLarge.Code != "chunk_too_large") {
				t.Fatal(err)
			}
			for _, c := range chunks {
				if c.Size() > limit {
					t.Fatal(limit, c.Members())
				}
			}
		}
	}
}

// The end of a log belongs to no message.
func TestAppend_endOfTheLogInTheNameOfAMessageThatHasEnded(t *testing.T) {
	s := open(t, nil)
	end, err := store.ParseChunk([]byte(`{"type":"end"}`), store.Fill{MessageID: "m"}, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, s, "s", store.NewChunk(store.TypeDone, "m", "", ""), end)
}
