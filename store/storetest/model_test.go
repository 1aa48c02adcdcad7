package storetest_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// twins is a Model next to the scripts on a Redis. Every step is done to both.
type twins struct {
	ctx    context.Context
	model  *storetest.Model
	nodes  []*storetest.Node
	redis  *redis.Client
	open   func() *store.Store
	stores []*store.Store
	saved  []saved           // like the Model's past
	same   map[string]string // names that differ between the two
}

// saved holds both keys.
type saved struct {
	list []string
	hash map[string]string
}

const (
	listKey, hashKey = "chat:history:s", "chat:session:s"
	keepMost         = 6
)

func (w *twins) save() saved {
	return saved{w.redis.LRange(w.ctx, listKey, 0, -1).Val(), w.redis.HGetAll(w.ctx, hashKey).Val()}
}

func (w *twins) restore(s saved) {
	w.redis.Del(w.ctx, listKey, hashKey)
	for _, e := range s.list {
		w.redis.RPush(w.ctx, listKey, e)
	}
	if len(s.hash) > 0 {
		w.redis.HSet(w.ctx, hashKey, s.hash)
	}
}

// is records that a of the Model is b of the Redis. It returns an error if either was something else before.
func (w *twins) is(a, b string) error {
	for _, pair := range [][2]string{{"model " + a, b}, {"redis " + b, a}} {
		if before, ok := w.same[pair[0]]; ok && before != pair[1] {
			return fmt.Errorf("%s was %q, and is %q", pair[0], before, pair[1])
		}
		w.same[pair[0]] = pair[1]
	}
	return nil
}

var stamp = regexp.MustCompile(`"ts":\d+`)

func plain(elements []string) string {
	return stamp.ReplaceAllString(strings.Join(elements, "\n"), `"ts":0`)
}

// bounds compares the log's bounds.
func (w *twins) bounds(a, b store.Bounds) error {
	if (a.Epoch == "") != (b.Epoch == "") {
		return fmt.Errorf("epochs %q and %q", a.Epoch, b.Epoch)
	}
	if err := w.is(a.Epoch, b.Epoch); err != nil {
		return err
	}
	b.Epoch, b.CreatedAt, b.UpdatedAt = a.Epoch, a.CreatedAt, a.UpdatedAt
	if a != b {
		return fmt.Errorf("the model says %+v, Redis %+v", a, b)
	}
	return nil
}

// keys compares the stored keys.
func (w *twins) keys() error {
	k, s := w.model.Keys(), w.save()
	if plain(k.List) != plain(s.list) {
		return fmt.Errorf("the model's list is\n%s\nand the one in Redis\n%s", plain(k.List), plain(s.list))
	}
	fields := []string{"epoch", "base", "last_seen", "former", "ended", "deleted", "mark"}
	there := []string{s.hash["epoch"], s.hash["base"], s.hash["last_seen"], s.hash["former"],
		fmt.Sprint(s.hash["ended"] != ""), fmt.Sprint(s.hash["deleted"] != ""), s.hash["mark"]}
	if len(s.hash) == 0 {
		there = nil
	}
	if len(k.Hash) != len(there) {
		return fmt.Errorf("the model's hash is %q, and the one in Redis %q", k.Hash, there)
	}
	for i, value := range k.Hash {
		switch fields[i] {
		case "epoch":
			if err := w.is(value, there[i]); err != nil {
				return err
			}
		case "mark": // two elements of Redis may be equal if their times are within one millisecond
			if before, ok := w.same["mark "+value]; ok && before != there[i] {
				return fmt.Errorf("the mark of %q was %q, and is %q", value, before, there[i])
			}
			w.same["mark "+value] = there[i]
		default:
			if value != there[i] {
				return fmt.Errorf("%s is %s in the model, and %s in Redis", fields[i], value, there[i])
			}
		}
	}
	return nil
}

// twinSteps are the possible steps. Each gets a node and a number.
var twinSteps = map[string]func(w *twins, node, n int) error{
	"append": func(w *twins, node, n int) error {
		text := fmt.Sprint("c", n)
		a, err := w.nodes[node].Append(text)
		return w.append(node, store.NewChunk("delta", "", "", text), a, err)
	},
	"end": func(w *twins, node, _ int) error {
		a, err := w.nodes[node].End()
		return w.append(node, store.NewChunk("end", "", "", ""), a, err)
	},
	"push": func(w *twins, _, n int) error {
		element := fmt.Sprintf(`{"content":"f%d"}`, n%2)
		w.model.Push(element)
		return w.redis.RPush(w.ctx, listKey, element).Err()
	},
	"read": func(w *twins, node, n int) error {
		p, _ := w.nodes[node].Read(w.ctx, "s", int64(n%8), 60, n%4)
		q, err := w.stores[node].Read(w.ctx, "s", int64(n%8), 60, n%4)
		if err == nil {
			err = w.bounds(p.Bounds, q.Bounds)
		}
		if err == nil && (p.From != q.From || plain(p.Elements) != plain(q.Elements)) {
			err = fmt.Errorf("the model reads %d %q, Redis %d %q", p.From, p.Elements, q.From, q.Elements)
		}
		return err
	},
	"make": func(w *twins, node, _ int) error {
		a, made := w.nodes[node].Create()
		b, madeThere, err := w.stores[node].Create(w.ctx, "s")
		if err == nil && made != madeThere {
			err = fmt.Errorf("made: %t in the model, %t in Redis", made, madeThere)
		}
		return errors.Join(err, w.bounds(a, b))
	},
	"delete": func(w *twins, node, _ int) error {
		a, b := w.nodes[node].Delete(), w.stores[node].Delete(w.ctx, "s")
		if !errors.Is(b, a) {
			return fmt.Errorf("delete says %v in the model, %v in Redis", a, b)
		}
		return nil
	},
	"renew": func(w *twins, node, n int) error {
		here, there := "another", "another"
		if hash := w.model.Keys().Hash; n%2 == 0 && hash != nil {
			here, there = hash[0], w.redis.HGet(w.ctx, hashKey, "epoch").Val()
		}
		last := int64(n % 10)
		x, y := w.nodes[node].Renew(w.ctx, "s", here, last), w.stores[node].Renew(w.ctx, "s", there, last)
		if !errors.Is(y, x) {
			return fmt.Errorf("renew says %v in the model, %v in Redis", x, y)
		}
		return nil
	},
	"restart": func(w *twins, node, _ int) error {
		w.stores[node].Close()
		w.nodes[node].Close()
		w.stores[node], w.nodes[node] = w.open(), w.model.Node()
		return nil
	},
	"fail": func(w *twins, _, n int) error {
		if n = n % 3; n >= w.model.Behind() {
			return nil
		}
		w.model.Fail(n + 1)
		w.restore(w.saved[len(w.saved)-n-1])
		w.saved = w.saved[:len(w.saved)-n-1]
		return nil
	},
	"flush": func(w *twins, _, _ int) error {
		w.model.Flush()
		return w.redis.Del(w.ctx, listKey, hashKey).Err()
	},
	"expire": func(w *twins, _, _ int) error {
		w.model.Expire()
		return w.redis.Del(w.ctx, listKey).Err()
	},
	"unhash": func(w *twins, _, _ int) error {
		w.model.Unhash()
		return w.redis.Del(w.ctx, hashKey).Err()
	},
	"cut": func(w *twins, _, n int) error {
		n = min(n%3+1, len(w.model.Keys().List))
		w.model.Cut(n)
		return w.redis.LTrim(w.ctx, listKey, 0, int64(-1-n)).Err()
	},
}

func (w *twins) append(node int, c store.Chunk, a store.Appended, errA error) error {
	b, errB := w.stores[node].Append(w.ctx, "s", store.Batch{Chunks: []store.Chunk{c}})
	if (errA == nil) != (errB == nil) || errA != nil && !errors.Is(errB, errA) {
		return fmt.Errorf("append says %v in the model, %v in Redis", errA, errB)
	}
	if errA != nil {
		return nil
	}
	if a.First != b.First || a.Last != b.Last {
		return fmt.Errorf("the model appends %d, Redis %d", a.First, b.First)
	}
	return w.is(a.Epoch, b.Epoch)
}

// play does steps to both, and compares them after each.
func (w *twins) play(steps []string, nodes, numbers []int) error {
	w.model, w.same, w.saved = &storetest.Model{Max: keepMost}, map[string]string{}, nil
	w.nodes, w.stores = nil, nil
	w.redis.FlushAll(w.ctx)
	for range 2 {
		w.nodes, w.stores = append(w.nodes, w.model.Node()), append(w.stores, w.open())
	}
	defer func() {
		for _, s := range w.stores {
			s.Close()
		}
	}()
	for i, step := range steps {
		before, as := w.model.Keys(), w.save()
		err := twinSteps[step](w, nodes[i], numbers[i])
		if step != "fail" && fmt.Sprint(w.model.Keys()) != fmt.Sprint(before) {
			w.saved = append(w.saved, as)
			w.saved = w.saved[max(0, len(w.saved)-storetest.Replicas):]
		}
		if err == nil {
			err = w.keys()
		}
		if err != nil {
			return fmt.Errorf("step %d, %s: %w", i, step, err)
		}
	}
	return nil
}

func testTwins(t *testing.T, w *twins) {
	w.ctx = t.Context()
	var names []string
	for name := range twinSteps {
		names = append(names, name)
	}
	names = append(names, "append", "append", "append", "push", "push", "read", "read") // a log mostly grows
	slices.Sort(names)
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.SampledFrom(names), 1, 30).Draw(rt, "steps")
		nodes := rapid.SliceOfN(rapid.IntRange(0, 1), len(steps), len(steps)).Draw(rt, "nodes")
		numbers := rapid.SliceOfN(rapid.IntRange(0, 99), len(steps), len(steps)).Draw(rt, "numbers")
		if err := w.play(steps, nodes, numbers); err != nil {
			rt.Fatal(err)
		}
	})
}

// The explorer's Model does what the scripts do, step by step.
func TestModel_isTheScripts(t *testing.T) {
	t.Run("embedded", func(t *testing.T) {
		m := miniredis.NewMiniRedis()
		defer m.Close()
		dial := func(context.Context, string, string) (net.Conn, error) { return m.Dial() }
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:0", Dialer: dial, Protocol: 2})
		defer func() { _ = client.Close() }()
		testTwins(t, &twins{redis: client, open: func() *store.Store {
			return opened(t, func(c *store.Config) { c.Dial = dial })
		}})
	})
	t.Run("redis", func(t *testing.T) {
		r := storetest.Redis(t)
		testTwins(t, &twins{redis: r.Client, open: func() *store.Store {
			return opened(t, func(c *store.Config) { c.Redis = r.URL() })
		}})
	})
}

func opened(t *testing.T, change func(*store.Config)) *store.Store {
	cfg := store.DefaultConfig()
	cfg.HistoryMax, cfg.Listeners = keepMost, 1
	change(&cfg)
	s, err := store.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
