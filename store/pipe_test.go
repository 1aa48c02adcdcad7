package store_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// While Redis is silent, a few commands are under way, and their outcome is unknown. Those that wait after them were
// certainly not executed, now or later.
func TestPipe_whatWaitsBehindASilentRedisIsSurelyNotStored(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.Timeout = redis.URL(), 3*time.Second })
	mustAppend(t, s, "s", delta("first"))
	redis.Signal(syscall.SIGSTOP)
	const count = 20
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		if i == 1 { // the first one is under way
			until(t, s.Pushes, 0, 1)
		}
		wg.Go(func() {
			_, errs[i] = s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta(fmt.Sprint("chunk", i))}})
		})
	}
	wg.Wait()
	redis.Signal(syscall.SIGCONT)
	list := strings.Join(redis.LRange(t.Context(), "chat:history:s", 0, -1).Val(), "\n")
	var away, unknown int
	for i, err := range errs {
		switch stored := strings.Contains(list, fmt.Sprintf("chunk%d\"", i)); {
		case errors.Is(err, store.ErrAway):
			if away++; stored {
				t.Errorf("chunk %d was surely not stored, and is in the list", i)
			}
		case errors.Is(err, store.ErrOutcomeUnknown):
			unknown++
		default:
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	if away == 0 || unknown == 0 || unknown > 4 {
		t.Errorf("%d were surely not stored, of %d it is not known", away, unknown)
	}
	mustAppend(t, s, "s", delta("last"))
}

// Concurrent appends are batched: Redis receives far fewer writes than appends. Each append runs once, and gets its own
// reply.
func TestPipe_manyGoTogether(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	const sessions, each = 50, 40
	var wg sync.WaitGroup
	for i := range sessions {
		wg.Go(func() {
			id := fmt.Sprint("s", i)
			for k := range int64(each) {
				a, err := s.Append(t.Context(), id, store.Batch{Chunks: []store.Chunk{delta(fmt.Sprint(i, " ", k))}})
				if err != nil || a.First != k+1 || a.Last != k+1 {
					t.Errorf("%s, chunk %d: %+v, %v", id, k+1, a, err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i := range sessions {
		for k, got := range contents(t, s, fmt.Sprint("s", i)) {
			if got != fmt.Sprint(i, " ", k) {
				t.Errorf("session %d, chunk %d says %s", i, k+1, got)
			}
		}
	}
	info := redis.Info(t.Context(), "stats").Val()
	var reads int
	if _, after, ok := strings.Cut(info, "total_reads_processed:"); ok {
		_, _ = fmt.Sscanf(after, "%d", &reads)
	}
	t.Logf("%d appends in %d reads of Redis", sessions*each, reads)
	if reads == 0 || reads > sessions*each/2 {
		t.Errorf("%d reads for %d appends", reads, sessions*each)
	}
}

// A connection that breaks takes a whole batch with it. No call of it is executed twice.
func TestPipe_aBatchThatBreaksIsNotRepeated(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	stop := make(chan struct{})
	var wg, killing sync.WaitGroup
	killing.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				_ = redis.ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err()
			}
		}
	})
	var mu sync.Mutex
	acknowledged := map[string]bool{}
	unknown := 0
	for i := range 30 {
		wg.Go(func() {
			for k := range 100 {
				text := fmt.Sprintf("%d.%d.", i, k)
				_, err := s.Append(t.Context(), fmt.Sprint("s", i), store.Batch{Chunks: []store.Chunk{delta(text)}})
				mu.Lock()
				if err == nil {
					acknowledged[text] = true
				} else if errors.Is(err, store.ErrOutcomeUnknown) {
					unknown++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	close(stop)
	killing.Wait()
	times := map[string]int{}
	for i := range 30 {
		for _, text := range contents(t, s, fmt.Sprint("s", i)) {
			times[text]++
		}
	}
	for text, n := range times {
		if n > 1 {
			t.Errorf("%s is there %d times", text, n)
		}
	}
	for text := range acknowledged {
		if times[text] != 1 {
			t.Errorf("%s was acknowledged, and is there %d times", text, times[text])
		}
	}
	t.Logf("%d acknowledged, %d unknown", len(acknowledged), unknown)
	if unknown == 0 {
		t.Error("no connection broke under an append")
	}
}

// Calls that share a run of the script do not affect each other. An error concerns one caller, new logs have their own
// epochs, a message belongs to one session, and each channel receives only its own log.
func TestPipe_thoseThatGoTogetherAreApart(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	s.Thorough()
	mustAppend(t, s, "first", delta("x"))
	redis.Set(t.Context(), "chat:history:wrong1", "text", 0)
	redis.Set(t.Context(), "chat:session:wrong2", "text", 0)
	redis.Set(t.Context(), "chat:messages:wrong3", "text", 0)
	heard := redis.PSubscribe(t.Context(), "chat:stream:*")
	defer heard.Close()
	if _, err := heard.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	redis.ConfigResetStat(t.Context())
	redis.Signal(syscall.SIGSTOP)
	var wg sync.WaitGroup
	wg.Go(func() { mustAppend(t, s, "first", delta("y")) })
	untilAppends(t, s, 0, 1)
	ids := []string{"right1", "wrong1", "right2", "wrong2", "right1", "wrong3", "right3", "first", "ends"}
	epochs, errs := make([]string, len(ids)), make([]error, len(ids))
	for i, id := range slices.Backward(ids) {
		if id == "right3" { // after the end of another session's message
			untilAppends(t, s, 2, 1)
		}
		wg.Go(func() {
			chunk := delta("z")
			switch id {
			case "wrong3", "right3":
				chunk = store.NewChunk(store.TypeDelta, "m", "", "z")
			case "ends":
				chunk = store.NewChunk(store.TypeDone, "m", "", "z")
			}
			a, err := s.Append(t.Context(), id, store.Batch{Chunks: []store.Chunk{chunk}})
			epochs[i], errs[i] = a.Epoch, err
		})
	}
	untilAppends(t, s, len(ids), 1)
	redis.Signal(syscall.SIGCONT)
	wg.Wait()
	if stats := redis.Info(t.Context(), "commandstats").Val(); !strings.Contains(stats, "cmdstat_evalsha:calls=2,") {
		t.Errorf("they did not go together: %s", stats)
	}
	seen := map[string]string{}
	for i, id := range ids {
		if wrong := strings.HasPrefix(id, "wrong"); wrong != (errs[i] != nil) || wrong && (!errors.Is(errs[i], store.ErrWrongType) || !strings.HasPrefix(errs[i].Error(), "append to "+id+": ")) {
			t.Errorf("%s: %v", id, errs[i])
		} else if of, ok := seen[epochs[i]]; !wrong && ok && of != id {
			t.Errorf("%s and %s have one epoch", id, of)
		}
		seen[epochs[i]] = id
	}
	for id, want := range map[string]int{"first": 3, "right1": 2, "right2": 1, "right3": 1, "ends": 1} {
		if got := contents(t, s, id); len(got) != want {
			t.Errorf("%s has %q", id, got)
		}
	}
	redis.Publish(t.Context(), "chat:stream:last", "")
	for count := 0; ; count++ {
		m, err := heard.ReceiveMessage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		id := strings.TrimPrefix(m.Channel, "chat:stream:")
		if id == "last" {
			if count != 7 {
				t.Errorf("%d messages for 7 chunks", count)
			}
			break
		}
		if !slices.Contains(redis.LRange(t.Context(), "chat:history:"+id, 0, -1).Val(), m.Payload) {
			t.Errorf("%s heard %s, of another log", m.Channel, m.Payload)
		}
	}
	if n := redis.LLen(t.Context(), "chat:history:wrong3").Val(); n != 0 {
		t.Errorf("%d chunks of an append that failed are stored", n)
	}
}

// The same for ordinary appends, some of which only seem ordinary.
func TestPipe_ordinaryAppendsThatGoTogetherAreApart(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	ids := []string{"first", "lost", "wrong1", "right1", "wrong2", "right2", "ended", "held", "new"}
	for _, id := range ids[:len(ids)-1] {
		mustAppend(t, s, id, store.NewChunk(store.TypeDelta, "m", "", "a"))
	}
	mustAppend(t, s, "ended", store.NewChunk(store.TypeEnd, "", "", ""))
	redis.Set(t.Context(), "chat:history:wrong1", "text", 0)
	redis.Set(t.Context(), "chat:session:wrong2", "text", 0)
	redis.Del(t.Context(), "chat:history:lost")
	redis.ConfigResetStat(t.Context())
	redis.Signal(syscall.SIGSTOP)
	var wg sync.WaitGroup
	wg.Go(func() { mustAppend(t, s, "first", delta("y")) })
	until(t, s.Pushes, 0, 1)
	answers, errs := make([]store.Appended, len(ids)), make([]error, len(ids))
	for i, id := range ids {
		wg.Go(func() {
			b := store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDelta, "m", "", "b")}}
			if id == "held" {
				b.Hold, b.Token, b.Messages = store.HoldOpen, "t", []string{"m"}
			}
			answers[i], errs[i] = s.Append(t.Context(), id, b)
		})
	}
	until(t, s.Pushes, len(ids), 1)
	redis.Signal(syscall.SIGCONT)
	wg.Wait()
	var runs int
	if _, after, ok := strings.Cut(redis.Info(t.Context(), "commandstats").Val(), "cmdstat_evalsha:calls="); ok {
		_, _ = fmt.Sscanf(after, "%d", &runs)
	}
	if runs < 3 || runs > 2+6 { // the six that are not ordinary run separately
		t.Errorf("%d runs", runs)
	}
	for i, id := range ids {
		switch id {
		case "wrong1", "wrong2":
			if !errors.Is(errs[i], store.ErrWrongType) || !strings.HasPrefix(errs[i].Error(), "append to "+id+": ") {
				t.Errorf("%s: %v", id, errs[i])
			}
			continue
		case "ended":
			if !errors.Is(errs[i], store.ErrSessionEnded) {
				t.Errorf("%s: %v", id, errs[i])
			}
			continue
		}
		want, texts := int64(2), []string{"a", "b"}
		switch id {
		case "first":
			want, texts = 3, []string{"a", "y", "b"}
		case "lost":
			texts = texts[1:]
		case "new":
			want, texts = 1, texts[1:]
		}
		if errs[i] != nil || answers[i].First != want || answers[i].Count != 1 {
			t.Errorf("%s: %+v, %v", id, answers[i], errs[i])
		}
		if got := contents(t, s, id); !slices.Equal(got, texts) {
			t.Errorf("%s has %q", id, got)
		}
	}
}

func untilAppends(t *testing.T, s *store.Store, waiting, under int) {
	t.Helper()
	until(t, s.Appends, waiting, under)
}

func until(t *testing.T, state func() (waiting, under int), waiting, under int) {
	t.Helper()
	for deadline := time.Now().Add(storetest.Patience); ; time.Sleep(time.Millisecond) {
		w, u := state()
		if w == waiting && u == under {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d appends wait and %d runs are under way", w, u)
		}
	}
}
