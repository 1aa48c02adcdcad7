package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gapless/store/storetest"
)

// gapcheck runs many sessions at once, whose viewers cut their connections at random and reconnect to any node.
type gapcheck struct {
	nodes   []*node
	redis   *storetest.Server // nil: embedded
	chunks  int
	produce producer
	// ended reports whether the producer ends the log. Foreign producers cannot.
	ended       bool
	newestFirst bool // the list is in the other order
	patient     bool // viewers come back after a clean end
	proxied     bool // viewers are behind a proxy
	// admit gives a viewer its credential; nil if it needs none.
	admit func(v *viewer)

	mu     sync.Mutex // guards nodes while they are restarted
	client http.Client
	calm   func()          // ends the restarts
	enough <-chan struct{} // closed after enough restarts; nil if no nodes are restarted

	acked   atomic.Int64 // requests of producers with numbers
	waiting atomic.Int64 // producers that wait for enough
}

// producer writes count chunks to a session, and returns the acknowledged ones by number. A foreign producer has no
// numbers, and returns nothing.
type producer func(ctx context.Context, g *gapcheck, session string, count int) (acknowledged map[int64]string, err error)

const (
	gapSessions = 20
	gapViewers  = 4
	gapChunks   = 200
	gapPace     = 3 * time.Millisecond
)

// tempo waits before the next chunk: 3 ms on average, at random.
func tempo(ctx context.Context) {
	pause(ctx, min(time.Duration(rand.ExpFloat64()*float64(gapPace)), 20*gapPace))
}

func (g *gapcheck) any() *node { return g.node(rand.IntN(len(g.nodes))) }

func (g *gapcheck) node(i int) *node {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.nodes[i]
}

// text returns the content of chunk i of a session. All contents differ.
func text(session string, i int) string {
	return fmt.Sprintf("%s word %d – „ü\\n🍞%s“ ", session, i, strings.Repeat("x", i%40))
}

func (g *gapcheck) run(t *testing.T) {
	t.Helper()
	ctx, giveUp := context.WithCancel(deadline(t))
	defer giveUp()
	type result struct {
		session string
		acks    map[int64]string
		viewers [gapViewers]*viewer
	}
	results := make([]result, gapSessions)
	var wg sync.WaitGroup
	for i := range results {
		r := &results[i]
		r.session = newID()
		produced := make(chan struct{})
		var late time.Time // when a viewer must have all of it
		wg.Go(func() {
			acks, err := g.produce(ctx, g, r.session, g.chunks)
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("produce %s: %v", r.session, err)
				}
				giveUp()
			}
			r.acks, late = acks, time.Now().Add(slack)
			close(produced)
		})
		for k := range r.viewers {
			v := &viewer{session: r.session, glue: k%2 == 1, patient: g.patient, proxied: g.proxied}
			if g.admit != nil {
				g.admit(v)
			}
			if k == 0 { // one of them starts with a snapshot
				v.query = strings.TrimSuffix("?snapshot=1&"+strings.TrimPrefix(v.query, "?"), "&")
			}
			r.viewers[k] = v
			wg.Go(func() {
				pause(ctx, rand.N(200*time.Millisecond))
				for !v.over && ctx.Err() == nil && (g.ended || v.cursor < int64(g.chunks)) {
					v.connect(ctx, g.any().addr, func(event) bool {
						return rand.IntN(20) == 0 || !g.ended && v.cursor >= int64(g.chunks)
					})
				}
				if arrived := time.Now(); !g.ended {
					if <-produced; arrived.After(late) {
						t.Errorf("the last chunk of %s came %v after it was pushed", r.session, arrived.Sub(late)+slack)
					}
				}
			})
		}
	}
	wg.Wait()
	if g.calm != nil {
		g.calm()
	}
	if ctx.Err() != nil {
		t.Fatal("not all have finished")
	}
	var connections int
	for _, r := range results {
		want := g.node(0).pages(t, r.session)
		if g.redis != nil {
			list := history(t, g.redis, r.session)
			if g.newestFirst {
				slices.Reverse(list)
			}
			if strings.Join(list, "\n") != strings.Join(want, "\n") {
				t.Errorf("%s: the list and its pages differ", r.session)
			}
		}
		count := g.chunks
		if g.ended {
			count++
		}
		if len(want) != count {
			t.Errorf("the log of %s has %d chunks, not %d", r.session, len(want), count)
		}
		for seq, content := range r.acks {
			var c struct{ Content string }
			if seq > int64(len(want)) || json.Unmarshal([]byte(want[seq-1]), &c) != nil || c.Content != content {
				t.Errorf("%s: chunk %d, %q, was acknowledged and is not in the list", r.session, seq, content)
			}
		}
		for _, v := range r.viewers {
			v.check(t, want)
			v.unreset(t)
			if g.ended && !v.over {
				t.Errorf("viewer of %s is at %d and has not finished", r.session, v.cursor)
			}
			connections += v.connections
		}
	}
	t.Logf("%d viewers, %d connections", gapSessions*gapViewers, connections)
	if connections < 5*gapSessions*gapViewers*g.chunks/200 {
		t.Errorf("%d connections are too few: viewers did not cut themselves", connections)
	}
}

// byPost appends one chunk per request, on any node, and ends the log.
func byPost(ctx context.Context, g *gapcheck, session string, count int) (map[int64]string, error) {
	acks := map[int64]string{}
	send := func(chunk any) (s stored, err error) {
		b, err := json.Marshal(chunk)
		if err != nil {
			return s, err
		}
		a := g.any().do(ctx, "POST", "/v1/sessions/"+session+"/chunks", "application/json", strings.NewReader(string(b)))
		if a.status != http.StatusCreated {
			return s, fmt.Errorf("%d %s (%v)", a.status, a.body, a.err)
		}
		return s, json.Unmarshal([]byte(a.body), &s)
	}
	for i := 1; i <= count; i++ {
		content := text(session, i)
		s, err := send(map[string]string{"content": content, "message_id": "m1"})
		if err != nil {
			return acks, err
		}
		acks[s.First] = content
		tempo(ctx)
	}
	_, err := send(map[string]string{"type": "end"})
	return acks, err
}

// byUpload appends the lines of a few consecutive uploads. The last one closes the log.
func byUpload(ctx context.Context, g *gapcheck, session string, count int) (map[int64]string, error) {
	acks := map[int64]string{}
	for done := 0; done < count; {
		part := min(count-done, 30+rand.IntN(60))
		body, in := io.Pipe()
		go func() { // ends with the body, which the request closes
			for i := done + 1; i <= done+part; i++ {
				b, err := json.Marshal(map[string]string{"content": text(session, i), "message_id": "m1"})
				if err == nil {
					_, err = in.Write(append(b, '\n'))
				}
				if err != nil {
					_ = in.CloseWithError(err)
					return
				}
				tempo(ctx)
			}
			_ = in.Close()
		}()
		n := g.any()
		r, err := http.NewRequestWithContext(ctx, "POST", n.url("/v1/sessions/"+session+"/chunks"), body)
		if err != nil {
			return acks, err
		}
		r.Header.Set("Content-Type", "application/x-ndjson")
		if done+part == count {
			r.Header.Set("Stream-Closed", "true")
		}
		response, err := n.http.Do(r)
		if err != nil {
			return acks, err
		}
		var s stored
		b, err := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if err != nil || response.StatusCode != http.StatusCreated {
			return acks, fmt.Errorf("%d %s (%v)", response.StatusCode, b, err)
		}
		if err := json.Unmarshal(b, &s); err != nil {
			return acks, err
		}
		for i := range part {
			acks[s.First+int64(i)] = text(session, done+1+i)
		}
		done += part
	}
	return acks, nil
}

// byForeign publishes, pauses up to 5 ms, and pushes.
func byForeign(ctx context.Context, g *gapcheck, session string, count int) (map[int64]string, error) {
	f := foreign{g.redis, session, g.newestFirst}
	for i := 1; i <= count; i++ {
		b, err := json.Marshal(map[string]any{"content": text(session, i), "is_complete": i == count})
		if err != nil {
			return nil, err
		}
		if err := f.say(ctx, string(b), 5*time.Millisecond); err != nil {
			return nil, err
		}
		tempo(ctx)
	}
	return nil, nil
}

// killing cuts all Pub/Sub connections of a Redis every 0.4 s.
func killing(t *testing.T, redis *storetest.Server) {
	ctx, cancel := context.WithCancel(t.Context())
	var killed int64
	wait := background(t, func() {
		for ctx.Err() == nil {
			n, err := redis.ClientKillByFilter(ctx, "TYPE", "pubsub").Result()
			if err != nil && ctx.Err() == nil {
				t.Errorf("CLIENT KILL: %v", err)
			}
			killed += n
			pause(ctx, 400*time.Millisecond)
		}
	})
	t.Cleanup(func() {
		cancel()
		if wait(); killed == 0 {
			t.Error("no connection was killed")
		}
	})
}

func TestGapcheck_oneNodeOnTheEmbeddedRedis(t *testing.T) {
	t.Parallel()
	g := gapcheck{nodes: []*node{start(t)}, chunks: gapChunks / 4, produce: byPost, ended: true}
	g.run(t)
}

func TestGapcheck_uploadsToOneNodeOnTheEmbeddedRedis(t *testing.T) {
	t.Parallel()
	g := gapcheck{nodes: []*node{start(t)}, chunks: gapChunks / 2, produce: byUpload, ended: true}
	g.run(t)
}

func TestGapcheck_twoNodesOnOneRedis(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	g := gapcheck{nodes: nodes(t, 2, redis), redis: redis, chunks: gapChunks, produce: byPost, ended: true}
	g.run(t)
}

func TestGapcheck_twoNodesWhilePubSubConnectionsAreKilled(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis := storetest.Redis(t)
		g := gapcheck{nodes: nodes(t, 2, redis, args...), redis: redis, chunks: gapChunks, produce: byUpload, ended: true}
		killing(t, redis)
		g.run(t)
	})
}

func TestGapcheck_foreignProducersThatPublishBeforeTheyPush(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	g := gapcheck{nodes: nodes(t, 2, redis), redis: redis, chunks: gapChunks, produce: byForeign}
	g.run(t)
}

func TestGapcheck_foreignProducersWhilePubSubConnectionsAreKilled(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	g := gapcheck{nodes: nodes(t, 2, redis), redis: redis, chunks: gapChunks, produce: byForeign}
	killing(t, redis)
	g.run(t)
}

// The control: a client that first reads the list and then subscribes, as in RACE.md, loses chunks here. If it does
// not, these tests prove nothing.
func TestGapcheck_controlTheNaiveViewerLosesChunks(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	ctx := deadline(t)
	var lost, finished int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 20 {
		f := foreign{redis: redis, session: newID()}
		const count = 60
		wg.Go(func() {
			for i := 1; i <= count; i++ {
				if err := f.say(ctx, foreignChunk(i), 5*time.Millisecond); err != nil {
					t.Errorf("produce: %v", err)
				}
				tempo(ctx)
			}
			if err := f.publish(ctx, "last"); err != nil {
				t.Errorf("produce: %v", err)
			}
		})
		wg.Go(func() {
			pause(ctx, 50*time.Millisecond+rand.N(100*time.Millisecond))
			got := map[string]bool{}
			before, err := redis.LRange(ctx, "chat:history:"+f.session, 0, -1).Result()
			if err != nil {
				t.Error(err)
				return
			}
			for _, c := range before {
				got[c] = true
			}
			pause(ctx, 5*time.Millisecond) // the window of RACE.md
			sub := redis.Subscribe(ctx, "chat:stream:"+f.session)
			defer sub.Close()
			for {
				m, err := sub.ReceiveMessage(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				if m.Payload == "last" {
					break
				}
				got[m.Payload] = true
			}
			mu.Lock()
			defer mu.Unlock()
			finished++
			lost += count - len(got)
		})
	}
	wg.Wait()
	t.Logf("%d naive viewers lost %d chunks", finished, lost)
	if lost == 0 {
		t.Error("the naive viewer lost nothing")
	}
}
