package test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gapless/store/storetest"
)

// durable makes every append of a log survive the server's death.
var durable = []string{"--appendonly", "yes", "--appendfsync", "always"}

func TestOutage_tenThousandMissedChunksComeInOneConnection(t *testing.T) {
	t.Parallel()
	for _, window := range []string{"256KiB", "0B", "4GiB"} {
		t.Run("with a window of "+window, func(t *testing.T) {
			redis := storetest.Redis(t)
			n := nodes(t, 1, redis, "-window", window, "-window-total", "8GiB")[0]
			ctx := deadline(t)
			session := newID()
			n.append(t, session, words(1, 5))
			v := &viewer{session: session}
			v.connect(ctx, n.addr, func(event) bool { return v.cursor == 5 })
			for i := range 10 {
				n.append(t, session, words(6+1000*i, 1000))
			}
			n.append(t, session, `{"type":"end"}`)
			v.connections = 0
			v.follow(ctx, at(n.addr), nil)
			if v.connections != 1 {
				t.Errorf("it took %d connections", v.connections)
			}
			v.check(t, history(t, redis, session))
			v.unreset(t)
		})
	}
}

// held waits until all viewers have received more signs of life, on their current connections.
func held(t *testing.T, viewers []*viewer) {
	t.Helper()
	for _, v := range viewers {
		before := v.beats.Load()
		eventually(t, "a viewer is held", func() bool { return v.beats.Load() >= before+3 })
	}
}

func TestOutage_viewersAreHeldWhileRedisIsDeadAndThenGetEverything(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis := storetest.Redis(t, durable...)
		both := nodes(t, 2, redis, append(args, "-heartbeat", "50ms")...)
		ctx := deadline(t)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var viewers []*viewer
		acks := map[string]map[int64]string{}
		for range 4 {
			session := newID()
			mine := map[int64]string{}
			acks[session] = mine
			for k := range 2 {
				v := &viewer{session: session}
				viewers = append(viewers, v)
				wg.Go(func() { v.follow(ctx, at(both[k].addr), nil) })
			}
			wg.Go(func() { // a producer that continues with its next chunk after a failed one
				for i := 1; ; i++ {
					select {
					case <-stop:
						eventually(t, "the log takes its end", func() bool {
							a := both[0].post("/v1/sessions/"+session+"/chunks", "application/json", `{"type":"end"}`)
							return a.status == http.StatusCreated || a.status == http.StatusConflict
						})
						return
					case <-time.After(5 * time.Millisecond):
					}
					content := fmt.Sprint("word", i)
					a := both[i%2].post("/v1/sessions/"+session+"/chunks", "application/json", fmt.Sprintf(`{"content":%q}`, content))
					switch {
					case a.status == http.StatusCreated:
						var s stored
						decode(t, a.body, &s)
						mine[s.First] = content
					case a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") != "", a.status == http.StatusGatewayTimeout:
					default:
						t.Errorf("an append was answered with %d %s (%v)", a.status, a.body, a.err)
						return
					}
				}
			})
		}
		for range 2 {
			for _, v := range viewers {
				from := v.seen.Load()
				eventually(t, "the viewer is live", func() bool { return v.seen.Load() > from+10 })
			}
			redis.Kill()
			eventually(t, "not ready", func() bool { return both[0].get("/readyz").status == http.StatusServiceUnavailable })
			held(t, viewers)
			redis.Start()
		}
		for _, n := range both {
			n.waitReady()
		}
		close(stop)
		wg.Wait()
		for _, v := range viewers {
			list := history(t, redis, v.session)
			v.check(t, list)
			v.unreset(t)
			if v.connections > 2 { // the original one, and the one with 204
				t.Errorf("viewer of %s made %d connections: it was not held", v.session, v.connections)
			}
			for seq, content := range acks[v.session] {
				if seq > int64(len(list)) || !strings.Contains(list[seq-1], `"`+content+`"`) {
					t.Errorf("%s: chunk %d, %q, was acknowledged and is not in the list", v.session, seq, content)
				}
			}
			if len(acks[v.session]) < 20 {
				t.Errorf("only %d appends were acknowledged", len(acks[v.session]))
			}
		}
	})
}

func TestOutage_theFirstConnectionDuringAnOutageIsHeldToo(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis := storetest.Redis(t, durable...)
		old := nodes(t, 1, redis, append(args, "-heartbeat", "50ms")...)[0]
		session := newID()
		old.append(t, session, words(1, 5))
		redis.Kill()
		young := launch(t, "-redis", redis.URL(), "-heartbeat", "50ms") // it has never seen Redis
		if a := young.get("/healthz"); a.status != http.StatusOK {
			t.Errorf("healthz during the outage: %d", a.status)
		}
		if a := young.get("/readyz"); a.status != http.StatusServiceUnavailable {
			t.Errorf("readyz during the outage: %d", a.status)
		}
		ctx := deadline(t)
		var viewers []*viewer
		var wg sync.WaitGroup
		for _, n := range []*node{old, young} {
			for _, id := range []string{"", "3"} {
				v := &viewer{session: session, parser: parser{id: id, lastID: id}}
				if id != "" {
					v.cursor = 3
				}
				viewers = append(viewers, v)
				wg.Go(func() { v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == 6 }) })
			}
		}
		held(t, viewers)
		a := old.post("/v1/sessions/"+session+"/chunks", "application/json", `{"data":0}`)
		if p := a.problem(t); a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" || p.Code == "" {
			t.Errorf("an append during the outage: %d %s", a.status, a.body)
		}
		redis.Start()
		old.waitReady()
		young.waitReady()
		old.append(t, session, words(6, 1))
		wg.Wait()
		list := history(t, redis, session)
		for _, v := range viewers {
			v.check(t, list[len(list)-len(v.chunks):])
			v.unreset(t)
			if v.connections != 1 || v.cursor != 6 {
				t.Errorf("the viewer made %d connections and is at %d", v.connections, v.cursor)
			}
		}
	})
}

// A peer that falls silent without a reset causes no message that a viewer could miss.
func TestOutage_aRedisThatIsSilentForAWhileCostsOnlyTime(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-heartbeat", "50ms")[0]
	ctx := deadline(t)
	f := foreign{redis: redis, session: newID()}
	n.append(t, f.session, words(1, 3))
	v := &viewer{session: f.session}
	wait := background(t, func() { v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == 6 }) })
	eventually(t, "the viewer is live", func() bool { return v.seen.Load() == 3 })
	redis.Signal(syscall.SIGSTOP)
	held(t, []*viewer{v})
	a := n.post("/v1/sessions/"+f.session+"/chunks", "application/json", `{"data":0}`) // it may or may not be stored
	redis.Signal(syscall.SIGCONT)
	if a.status != http.StatusGatewayTimeout && a.status != http.StatusServiceUnavailable {
		t.Errorf("an append to a silent Redis: %d %s", a.status, a.body)
	}
	eventually(t, "ready again", func() bool { return n.get("/readyz").status == http.StatusOK })
	for v.seen.Load() < 6 && ctx.Err() == nil {
		n.append(t, f.session, words(0, 1))
		pause(ctx, 20*time.Millisecond)
	}
	wait()
	v.check(t, history(t, redis, f.session)[:len(v.chunks)])
	v.unreset(t)
}

// Subscriptions end when no viewer is left.
func TestOutage_subscriptionsReturnToNone(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-linger", "100ms", "-reconcile", "200ms")[0]
	ctx := deadline(t)
	var wg sync.WaitGroup
	var most atomic.Int64
	subscriptions := func() int64 {
		channels, err := redis.PubSubChannels(context.Background(), "*").Result()
		if err != nil {
			t.Errorf("PUBSUB CHANNELS: %v", err)
		}
		return int64(len(channels))
	}
	for range 20 {
		session := newID()
		n.append(t, session, words(1, 3))
		wg.Go(func() {
			v := &viewer{session: session}
			v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == 3 })
			most.Store(max(most.Load(), subscriptions()))
		})
	}
	wg.Wait()
	if most.Load() == 0 {
		t.Error("there never was a subscription")
	}
	eventually(t, "nobody is subscribed", func() bool { return subscriptions() == 0 })
}

// The embedded Redis has one lock, which a subscriber that does not read would hold.
func TestEmbedded_appendsDoNotStallWhileViewersCome(t *testing.T) {
	t.Parallel()
	n := start(t, "-linger", "0s", "-reconcile", "200ms")
	ctx := deadline(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				session := newID()
				v := &viewer{session: session}
				var watch sync.WaitGroup
				watch.Go(func() { v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == 5 }) })
				slow := false
				for i := range 5 {
					begun := time.Now()
					a := n.post("/v1/sessions/"+session+"/chunks", "application/json", words(i, 1))
					if took := time.Since(begun); a.status != http.StatusCreated || took > slack {
						t.Errorf("an append took %v: %d %s", took, a.status, a.body)
						slow = true
					}
				}
				if watch.Wait(); slow {
					return
				}
				v.check(t, n.pages(t, session))
			}
		})
	}
	wg.Wait()
}
