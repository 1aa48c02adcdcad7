package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gapless/store/storetest"
)

// These tests run every row of the table of faults on the built program: what producers and viewers notice, and how
// soon.

// A Pub/Sub connection that stands but is silent costs a delay of at most the reconcile interval.
func TestFault_blackPubSubCostsTheReconcileIntervalAtMost(t *testing.T) {
	t.Parallel()
	const reconcile = time.Second
	redis := storetest.Redis(t)
	w := balance(t, redis.Addr())
	n := start(t, "-redis", "redis://"+w.addr, "-reconcile", reconcile.String())
	session := newID()
	ctx := deadline(t)
	var mu sync.Mutex
	said, heard := map[int64]time.Time{}, map[int64]time.Time{}
	v := &viewer{session: session}
	wait := background(t, func() {
		v.follow(ctx, at(n.addr), func(event) bool {
			mu.Lock()
			defer mu.Unlock()
			heard[v.cursor] = time.Now()
			return false
		})
	})
	last := int64(0)
	say := func(count int) (longest time.Duration) {
		first := last + 1
		for range count {
			mu.Lock()
			said[last+1] = time.Now()
			mu.Unlock()
			last = n.append(t, session, words(int(last+1), 1)).Last
			pause(ctx, 20*time.Millisecond)
		}
		eventually(t, "the viewer has all", func() bool { return v.seen.Load() >= last })
		mu.Lock()
		defer mu.Unlock()
		for seq := first; seq <= last; seq++ {
			longest = max(longest, heard[seq].Sub(said[seq]))
		}
		return longest
	}
	say(10)
	w.deaf.Store(true)
	longest := say(150)
	t.Logf("the longest delay in the dark: %v, with a reconcile interval of %v", longest, reconcile)
	if longest > reconcile+5*time.Second { // for a loaded machine
		t.Errorf("a chunk came %v late", longest)
	}
	if longest < reconcile/5 {
		t.Errorf("it was never dark: the longest delay was %v", longest)
	}
	w.deaf.Store(false)
	// Twenty chunks take longer than their allowed delay, so some would be late if the channel were still silent.
	eventually(t, "chunks are live again", func() bool { return say(20) < 300*time.Millisecond })
	n.append(t, session, `{"type":"end"}`)
	wait()
	v.check(t, history(t, redis, session))
	v.unreset(t)
}

// All faults at once, with producers that retry without a response: nothing is lost, doubled or out of order, no viewer
// is reset, and all finish.
func TestGapcheck_pubSubPauseNodeAndRedisAtOnce(t *testing.T) {
	for name, produce := range map[string]producer{"posts": byNumberedPosts, "uploads": byNumberedUploads} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := storetest.Redis(t, durable...)
			g := gapcheck{nodes: nodes(t, 3, redis), redis: redis, chunks: gapChunks * 3 / 2, produce: produce, ended: true}
			g.restarting(t, "-redis", redis.URL())
			calm := g.calm
			ctx, cancel := context.WithCancel(t.Context())
			times := map[string]int{}
			wait := background(t, func() {
				for i := 0; ctx.Err() == nil; i++ {
					pause(ctx, 300*time.Millisecond)
					g.recovers(ctx)
					switch i % 3 {
					case 0: // about each second: the disk of Redis has everything that it acknowledged
						redis.Kill()
						redis.Start()
						times["redis killed"]++
					case 1:
						if redis.ClientKillByFilter(ctx, "TYPE", "pubsub").Err() == nil {
							times["pub/sub killed"]++
						}
					case 2:
						if redis.Do(ctx, "CLIENT", "PAUSE", "200", "ALL").Err() == nil {
							times["redis paused"]++
						}
					}
				}
			})
			t.Cleanup(cancel)
			g.calm = func() {
				cancel()
				wait()
				calm()
				if t.Logf("%v", times); len(times) < 3 {
					t.Errorf("not all has happened: %v", times)
				}
			}
			g.run(t)
		})
	}
}

// A log is replaced after it was delivered. Each viewer, on each node, is reset once within seconds (more on a busy
// machine), and then has the new log from its first chunk. Producers continue all the time.
func TestFault_lostDataIsToldToEveryViewerWithinSecondsOnce(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, ctx context.Context, session string, master, replica *storetest.Server, w *balancer){
		"FLUSHALL": func(t *testing.T, ctx context.Context, session string, master, _ *storetest.Server, _ *balancer) {
			if err := master.FlushAll(ctx).Err(); err != nil {
				t.Error(err)
			}
		},
		"a list that is replaced by a longer one": func(t *testing.T, ctx context.Context, session string, master, _ *storetest.Server, _ *balancer) {
			tx := master.TxPipeline()
			key := "chat:history:" + session
			length := int(master.LLen(ctx, key).Val())
			tx.Del(ctx, key)
			for i := range length + 100 {
				tx.RPush(ctx, key, foreignChunk(10_000+i))
			}
			if _, err := tx.Exec(ctx); err != nil {
				t.Error(err)
			}
		},
		"a failover that lost the tail": func(t *testing.T, ctx context.Context, session string, master, replica *storetest.Server, w *balancer) {
			key := "chat:history:" + session
			if err := replica.Do(ctx, "REPLICAOF", "NO", "ONE").Err(); err != nil {
				t.Error(err)
			}
			had := replica.LLen(ctx, key).Val()
			eventually(t, "there is a tail", func() bool { return master.LLen(ctx, key).Val() > had+20 })
			w.retarget(replica.Addr())
			w.breakAll()
			master.Kill()
		},
		"one whose log has regrown": func(t *testing.T, ctx context.Context, session string, master, replica *storetest.Server, w *balancer) {
			key := "chat:history:" + session
			if err := replica.Do(ctx, "REPLICAOF", "NO", "ONE").Err(); err != nil {
				t.Error(err)
			}
			had := replica.LLen(ctx, key).Val()
			eventually(t, "there is a tail", func() bool { return master.LLen(ctx, key).Val() > had+20 })
			length := master.LLen(ctx, key).Val()
			other := start(t, "-redis", replica.URL(), "-node", "other") // it has never seen the old tail
			for replica.LLen(ctx, key).Val() < length+50 {
				other.append(t, session, words(20_000, 10))
			}
			w.retarget(replica.Addr())
			w.breakAll()
			master.Kill()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			master := storetest.Redis(t)
			replica := storetest.Redis(t)
			replica.Kill()
			replica.StartAsReplica(master)
			w := balance(t, master.Addr())
			both := []*node{start(t, "-redis", "redis://"+w.addr, "-node", "n1"), start(t, "-redis", "redis://"+w.addr, "-node", "n2")}
			ctx := deadline(t)
			session := newID()
			var last atomic.Int64
			stop := make(chan struct{})
			produced := background(t, func() {
				for i := 1; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(5 * time.Millisecond):
					}
					a := both[i%2].post("/v1/sessions/"+session+"/chunks", "application/json", fmt.Sprintf(`{"content":"word%d"}`, i))
					switch a.status {
					case http.StatusCreated:
						var s stored
						decode(t, a.body, &s)
						last.Store(s.Last)
					case http.StatusServiceUnavailable, http.StatusGatewayTimeout:
					default:
						t.Errorf("%d %s (%v)", a.status, a.body, a.err)
						return
					}
				}
			})
			viewers := make([]*viewer, 6)
			resets := make([]atomic.Int64, len(viewers)) // time of the reset, in ms of the test
			begun := time.Now()
			var wg sync.WaitGroup
			for i := range viewers {
				v := &viewer{session: session}
				viewers[i] = v
				wg.Go(func() {
					v.follow(ctx, at(both[i%2].addr), func(e event) bool {
						if e.name == "reset" {
							resets[i].CompareAndSwap(0, time.Since(begun).Milliseconds())
						}
						return false
					})
				})
			}
			for _, v := range viewers {
				eventually(t, "the viewer is live", func() bool { return v.seen.Load() > 40 })
			}
			lose(t, ctx, session, master, replica, w)
			lost := time.Since(begun)
			for i := range viewers {
				eventually(t, "the viewer is reset", func() bool { return resets[i].Load() > 0 })
				if late := time.Duration(resets[i].Load())*time.Millisecond - lost; late > slack {
					t.Errorf("viewer %d was reset after %v", i, late)
				}
			}
			was := last.Load()
			eventually(t, "the log goes on", func() bool { return last.Load() != was })
			pause(ctx, 2500*time.Millisecond) // time for a node that lags to report it again
			close(stop)
			produced()
			eventually(t, "the end", func() bool {
				a := both[0].post("/v1/sessions/"+session+"/chunks", "application/json", `{"type":"end"}`)
				return a.status == http.StatusCreated || a.status == http.StatusConflict
			})
			wg.Wait()
			now := master
			if *w.target.Load() != master.Addr() {
				now = replica
			}
			list := renumbered(viewers[0].cursor, history(t, now, session))
			epochs := map[string]bool{}
			for _, v := range viewers {
				v.check(t, list)
				if len(v.resets) != 1 {
					t.Errorf("resets: %+v", v.resets)
				}
				epochs[v.welcomes[len(v.welcomes)-1].Epoch] = true
			}
			var page struct{ Chunks []json.RawMessage }
			decode(t, both[0].get("/v1/sessions/"+session+"/chunks?limit=1000").body, &page)
			for i, c := range page.Chunks {
				if string(c) != list[i] {
					t.Fatalf("a page says\n%s\nand viewers were given\n%s", c, list[i])
				}
			}
			t.Logf("%d chunks, reset %v", len(list), viewers[0].reasons())
		})
	}
}

// router sends requests to nodes that report that they are ready, as load balancers do.
type router struct {
	addrs []string
	ready []atomic.Bool
	http  http.Client
}

func (r *router) watch(ctx context.Context) {
	for ctx.Err() == nil {
		for i, addr := range r.addrs {
			response, err := r.http.Get("http://" + addr + "/readyz")
			if err == nil {
				_ = response.Body.Close()
			}
			r.ready[i].Store(err == nil && response.StatusCode == http.StatusOK)
		}
		pause(ctx, 50*time.Millisecond)
	}
}

func (r *router) any() string {
	for {
		if i := rand.IntN(len(r.addrs)); r.ready[i].Load() {
			return r.addrs[i]
		}
		time.Sleep(time.Millisecond)
	}
}

// A rolling restart of three nodes: no request fails, no chunk is lost, no viewer is reset.
func TestDrain_aRollingRestartOfThreeNodesFailsNoRequest(t *testing.T) {
	for _, each := range []int{3, 0} { // without viewers nothing else delays a node
		t.Run(fmt.Sprintf("%d viewers a session", each), func(t *testing.T) {
			t.Parallel()
			rollingRestart(t, each)
		})
	}
}

func rollingRestart(t *testing.T, each int) {
	redis := storetest.Redis(t)
	args := []string{"-redis", redis.URL(), "-drain", "10s"}
	b := &router{ready: make([]atomic.Bool, 3), http: http.Client{Timeout: exchange, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	var all []*node
	for i := range 3 {
		n := start(t, args...)
		all, b.addrs = append(all, n), append(b.addrs, n.addr)
		b.ready[i].Store(true)
	}
	ctx := deadline(t)
	watching, calm := context.WithCancel(ctx)
	watched := background(t, func() { b.watch(watching) })
	defer watched()
	defer calm()

	const count = 12
	stop := make(chan struct{})
	var wg, following sync.WaitGroup
	names, acks := make([]string, count), make([]map[int64]string, count)
	var viewers []*viewer
	var requests atomic.Int64
	for i := range count {
		session := newID()
		names[i], acks[i] = session, map[int64]string{}
		for range each {
			v := &viewer{session: session}
			viewers = append(viewers, v)
			following.Go(func() { v.follow(ctx, b.any, nil) })
		}
		wg.Go(func() {
			for k := 1; ; k++ {
				content, ended := text(session, k), false
				body, err := json.Marshal(map[string]string{"content": content})
				if err != nil {
					t.Error(err)
				}
				select {
				case <-stop:
					body, ended = []byte(`{"type":"end"}`), true
				case <-time.After(rand.N(20 * time.Millisecond)):
				}
				requests.Add(1)
				r, err := b.http.Post("http://"+b.any()+"/v1/sessions/"+session+"/chunks", "application/json", bytes.NewReader(body))
				if err != nil {
					t.Errorf("a request failed: %v", err)
					return
				}
				answer, err := io.ReadAll(r.Body)
				_ = r.Body.Close()
				var s stored
				if err != nil || r.StatusCode != http.StatusCreated || json.Unmarshal(answer, &s) != nil {
					t.Errorf("a request was answered with %d %s (%v)", r.StatusCode, answer, err)
					return
				}
				if ended {
					return
				}
				acks[i][s.First] = content
			}
		})
	}
	for _, v := range viewers {
		eventually(t, "the viewer is live", func() bool { return v.seen.Load() > 3 })
	}
	eventually(t, "requests are under way", func() bool { return requests.Load() > 100 })
	for i, n := range all {
		n.exits(t, 10*time.Second)
		all[i] = start(t, append(args, "-listen", n.addr)...)
		eventually(t, "it has requests again", func() bool { return b.ready[i].Load() })
	}
	close(stop)
	wg.Wait()
	following.Wait()
	for _, v := range viewers {
		v.check(t, history(t, redis, v.session))
		v.unreset(t)
	}
	for i := range count {
		list := history(t, redis, names[i])
		for seq, content := range acks[i] {
			var c struct{ Content string }
			if seq > int64(len(list)) || json.Unmarshal([]byte(list[seq-1]), &c) != nil || c.Content != content {
				t.Errorf("chunk %d of %s was acknowledged and is not in the list", seq, names[i])
			}
		}
	}
	connections := []int{0}
	for _, v := range viewers {
		connections = append(connections, v.connections)
	}
	t.Logf("%d requests, none failed; %d viewers with %d to %d connections", requests.Load(), len(viewers), slices.Min(connections), slices.Max(connections))
}

// Sentinels do a failover, and a Cluster moves slots and loses a master. With -wait-replicas no acknowledged chunk is
// lost, and no viewer is reset.
func TestGapcheck_mastersAreLost(t *testing.T) {
	for name, c := range map[string]struct {
		start func(t *testing.T) (url string, lose func())
	}{
		"Sentinel": {func(t *testing.T) (string, func()) {
			w := storetest.Sentinel(t)
			return w.URL(), func() {
				old := w.Master()
				old.Kill()
				eventually(t, "another takes over", func() bool { return w.Master() != old })
				old.StartAsReplica(w.Master())
			}
		}},
		"Cluster": {func(t *testing.T) (string, func()) {
			c := storetest.Cluster(t)
			return c.URL(), func() {
				newest := sessions.Load()
				for i := range min(newest, 40) { // this test's, and perhaps some of other tests
					c.Move(fmt.Sprintf("chat:stream:{s%d}", newest-i))
				}
				one := fmt.Sprintf("chat:stream:{s%d}", newest)
				lost := c.MasterOf(one)
				lost.Kill()
				eventually(t, "another takes over", func() bool { return c.MasterOf(one) != lost })
				lost.Start()
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, lose := c.start(t)
			args := []string{"-redis", url, "-wait-replicas", "1"}
			g := gapcheck{nodes: []*node{start(t, args...), start(t, args...)}, chunks: 2 * gapChunks, produce: byNumberedPosts, ended: true}
			lost := background(t, func() {
				pause(t.Context(), time.Second)
				lose()
			})
			g.calm = lost
			g.run(t)
			for _, n := range g.nodes {
				m, _ := n.scrape(t)
				t.Logf("gaps found %.0f, repaired %.0f; Pub/Sub connections lost %.0f", m["gapless_gaps_found_total"], m["gapless_gaps_repaired_total"], m["gapless_pubsub_lost_total"])
			}
		})
	}
}
