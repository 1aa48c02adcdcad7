package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// double is a store whose clock the test sets (store.WithClock), and whose state is compared after each step.
type double struct {
	*store.Store
	redis redis.UniversalClient
	heard *redis.PubSub
	base  int64 // the log's base, the highest seen
}

func newDouble(t *testing.T, change func(*store.Config)) *double {
	s := open(t, func(c *store.Config) {
		c.HistoryMax, c.NamesMax = 6, 3
		change(c)
	})
	s.WithClock()
	w := &double{Store: s, redis: s.Client()}
	w.heard = w.redis.Subscribe(t.Context(), "chat:stream:s", "chat:uploads", "all")
	t.Cleanup(func() { _ = w.heard.Close() })
	for range 3 {
		if _, err := w.heard.Receive(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// state returns everything in Redis, and everything published since the last call. It rounds times to live to minutes.
func (w *double) state(ctx context.Context) string {
	var b strings.Builder
	keys := w.redis.Keys(ctx, "*").Val()
	slices.Sort(keys)
	for _, key := range keys {
		kind := w.redis.Type(ctx, key).Val()
		fmt.Fprintf(&b, "%s %s (%.0f min) ", kind, key, math.Round(w.redis.PTTL(ctx, key).Val().Minutes()))
		switch kind {
		case "list":
			fmt.Fprintln(&b, strings.Join(w.redis.LRange(ctx, key, 0, -1).Val(), "\n  "))
		case "hash":
			all := w.redis.HGetAll(ctx, key).Val()
			for _, name := range slices.Sorted(maps.Keys(all)) {
				fmt.Fprintf(&b, "\n  %s = %s", name, all[name])
			}
			fmt.Fprintln(&b)
		case "zset":
			base, _ := w.redis.HGet(ctx, "chat:session:s", "base").Int64()
			w.base = max(w.base, base) // the hash may be lost
			for _, m := range w.redis.ZRangeWithScores(ctx, key, 0, -1).Val() {
				var seq int64
				if key == "chat:producers:s" { // the scripts look for runs of lost chunks at random
					_, _ = fmt.Sscanf(fmt.Sprint(m.Member), "%s %d %d", new(string), new(int64), &seq)
				}
				if key != "chat:producers:s" || seq > w.base {
					fmt.Fprintf(&b, "\n  %v = %v", m.Member, m.Score)
				}
			}
			fmt.Fprintln(&b)
		default:
			fmt.Fprintln(&b, w.redis.Get(ctx, key).Val())
		}
	}
	w.redis.Publish(ctx, "all", "")
	for {
		m, err := w.heard.ReceiveMessage(ctx)
		if err != nil {
			return b.String() + err.Error()
		}
		if m.Channel == "all" {
			break
		}
		fmt.Fprintln(&b, m.Channel, m.Payload)
	}
	return b.String()
}

// The embedded Redis behaves like redis-server. The same happens to two logs, one in each, at the same times. Then the
// results of calls, the stored data, the times to live and the published messages are all equal.
func TestEmbedded_isRedis(t *testing.T) {
	t.Run("in memory", func(t *testing.T) { twins(t, store.Embedded) })
	t.Run("on disk", func(t *testing.T) { twins(t, store.Embedded+":"+t.TempDir()) })
}

// epochs matches epochs, which are random.
var epochs = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)

func twins(t *testing.T, embedded string) {
	type settings struct {
		order string
		bytes int
	}
	pairs := map[settings][2]*double{}
	for _, order := range []string{store.OldestFirst, store.NewestFirst} {
		for _, bytes := range []int{0, 1 << 10} {
			change := func(address string) func(*store.Config) {
				return func(c *store.Config) {
					c.Redis, c.HistoryOrder = address, order
					if c.HistoryBytes = bytes; bytes > 0 {
						c.HistoryMax = 100
					}
				}
			}
			place := embedded
			if _, dir, ok := strings.Cut(embedded, ":"); ok {
				place = fmt.Sprintf("%s:%s/%s%d", store.Embedded, dir, order, bytes)
			}
			pairs[settings{order, bytes}] = [2]*double{newDouble(t, change(place)), newDouble(t, change(storetest.Redis(t).URL()))}
		}
	}
	ctx := t.Context()
	rapid.Check(t, func(r *rapid.T) {
		pair := pairs[settings{rapid.SampledFrom([]string{store.OldestFirst, store.NewestFirst}).Draw(r, "order"), rapid.SampledFrom([]int{0, 1 << 10}).Draw(r, "bytes")}]
		for _, w := range pair {
			w.FlushAll(ctx)
			w.ForgetAll()
			w.base = 0
			w.state(ctx) // discard what the previous round published
		}
		now, life, number := int64(1_800_000_000_000), int64(0), int64(0)
		for step := range rapid.IntRange(1, 60).Draw(r, "steps") {
			now += rapid.SampledFrom([]int64{0, 0, 0, 0, 1, 1000, 1000, -1000, 3000, 24_000, 40_000}).Draw(r, "passed")
			what := rapid.SampledFrom([]string{
				"append", "append", "append", "append", "append", "append", "upload", "upload", "upload", "upload", "its end", "lease",
				"numbers", "numbers", "numbers", "again", "cancel", "cancel one", "direct", "direct", "edit", "list lost", "hash lost", "wrong list", "wrong hash",
				"wrong messages", "delete", "end", "read", "newest", "made", "names", "long ago",
			}).Draw(r, "what")
			id := rapid.SampledFrom([]string{"", "", "m", "m", "m", "n", `"\u00e4 b%/` + "\x7f\t"}).Draw(r, "message")
			token := rapid.SampledFrom([]string{"t1", "t1", "t2"}).Draw(r, "token")
			lease := rapid.SampledFrom([]time.Duration{0, 0, 0, 0, time.Minute}).Draw(r, "lease")
			producer := rapid.SampledFrom([]string{"p", "p", "q"}).Draw(r, "producer")
			kind := rapid.SampledFrom([]string{store.TypeDelta, store.TypeDelta, store.TypeDelta, store.TypeDone, store.TypeFailed}).Draw(r, "kind")
			var chunks []store.Chunk
			for k := range rapid.IntRange(1, 3).Draw(r, "chunks") {
				chunks = append(chunks, store.NewChunk(store.TypeDelta, id, "", fmt.Sprint(step, ".", k)))
			}
			quoted, _ := json.Marshal(id)
			element := fmt.Sprintf(`{"type":%q,"message_id":%s,"content":"%d"}`, kind, quoted, step)
			do := func(w *double) string {
				w.redis.Set(ctx, "clock", now, 0)
				batch := store.Batch{Chunks: chunks, Life: life}
				const history, session = "chat:history:s", "chat:session:s"
				told := func(err error) string {
					text := fmt.Sprint(err)
					if broken := (*store.HalfDoneError)(nil); errors.As(err, &broken) || errors.Is(err, store.ErrWrongType) {
						text, _, _ = strings.Cut(text, " script") // Redis adds the place in the script
					}
					return text
				}
				switch what {
				case "upload", "its end":
					if batch.Hold, batch.Token = store.HoldOpen, token; what == "its end" {
						batch.Hold, batch.Chunks = store.HoldBroken, nil
					}
					if id != "" {
						batch.Messages = []string{id}
					}
					batch.Lease = lease
				case "lease":
					batch.Lease = max(lease, 10*time.Second)
				case "numbers":
					batch.Producer = store.Producer{ID: producer, Epoch: 1, Number: number}
				case "again":
					batch.Producer = store.Producer{ID: producer, Epoch: 1, Number: max(number-2, 0)}
				case "names":
					batch.Chunks = []store.Chunk{store.NewChunk(store.TypeDelta, fmt.Sprint("name", step), "", "x")}
				case "cancel", "cancel one":
					one := ""
					if what == "cancel one" {
						one = id
					}
					ended, err := w.Cancel(ctx, "s", one)
					return fmt.Sprintf("%+v", ended) + told(err)
				case "direct":
					push := w.redis.RPush
					if w.Order() == store.NewestFirst {
						push = w.redis.LPush
					}
					push(ctx, history, element, strconv.Itoa(step))
					return ""
				case "edit":
					if all := w.redis.LRange(ctx, history, 0, -1).Val(); len(all) > 0 {
						w.redis.Del(ctx, history)
						all[step%len(all)] = element
						w.redis.RPush(ctx, history, all)
					}
					return ""
				case "list lost":
					w.redis.Del(ctx, history)
					return ""
				case "hash lost":
					w.redis.Del(ctx, session)
					return ""
				case "long ago":
					w.redis.PExpire(ctx, history, time.Hour)
					return ""
				case "wrong list", "wrong hash", "wrong messages":
					key := map[string]string{"wrong list": history, "wrong hash": session, "wrong messages": "chat:messages:s"}[what]
					if w.redis.Exists(ctx, key).Val() > 0 {
						return ""
					}
					w.redis.Set(ctx, key, "text", 0)
					_, err := w.Append(ctx, "s", batch)
					w.redis.Del(ctx, key)
					return told(err)
				case "delete":
					return told(w.Delete(ctx, "s"))
				case "end":
					if step%3 > 0 { // nothing can happen after it
						return ""
					}
					batch.Chunks = append(batch.Chunks, store.NewChunk(store.TypeEnd, "", "", ""))
				case "read", "newest":
					from := int64(1)
					if what == "newest" {
						from = store.Newest
					}
					p, err := w.Read(ctx, "s", from, lots, lots)
					return fmt.Sprint(p, told(err))
				case "made":
					_, _, err := w.Create(ctx, "s")
					return told(err)
				}
				got, err := w.Append(ctx, "s", batch)
				if got.Life > 0 {
					life = got.Life
				}
				if what == "numbers" && err == nil && w == pair[1] {
					number += int64(len(chunks))
				}
				return fmt.Sprintf("%+v, %v", got, told(err))
			}
			x, y := do(pair[0])+"\n"+pair[0].state(ctx), do(pair[1])+"\n"+pair[1].state(ctx)
			x, y = epochs.ReplaceAllString(x, "<epoch>"), epochs.ReplaceAllString(y, "<epoch>")
			if x != y {
				r.Fatalf("step %d, %s: embedded:\n%s\nredis-server:\n%s", step, what, x, y)
			}
		}
	})
}
