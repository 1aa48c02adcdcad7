package test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

// The cases of RACE.md, under their names, against the built program and a real redis-server. The answer comes from a
// producer as described there, which publishes first and pushes later, and, where that makes a difference, from
// appends.

// producing writes an answer of count chunks, one each pace on average, and then the end of the log.
func producing(t *testing.T, ctx context.Context, redis *storetest.Server, end *node, session string, count int, pace time.Duration) (wait func()) {
	t.Helper()
	f := foreign{redis: redis, session: session}
	return background(t, func() {
		for i := 1; i <= count; i++ {
			if err := f.say(ctx, foreignChunk(i), pace/2); err != nil {
				t.Errorf("produce: %v", err)
				return
			}
			pause(ctx, rand.N(pace))
		}
		if a := end.post("/v1/sessions/"+session+"/chunks", "application/json", `{"type":"end"}`); a.status != http.StatusCreated {
			t.Errorf("end: %d %s (%v)", a.status, a.body, a.err)
		}
	})
}

func at(addr string) func() string { return func() string { return addr } }

func TestRace_pageReloadInTheMiddleOfAnAnswerShowsTheAnswerSoFarThenTheRest(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	ctx := deadline(t)
	session := newID()
	wait := producing(t, ctx, redis, n, session, 120, 8*time.Millisecond)
	for reload := range 10 { // a reload has no id, so it begins at the start
		v := &viewer{session: session}
		v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == int64(10*(reload+1)) })
		v.check(t, history(t, redis, session)[:10*(reload+1)])
	}
	v := &viewer{session: session}
	v.follow(ctx, at(n.addr), nil)
	wait()
	v.check(t, history(t, redis, session))
	v.unreset(t)
}

func TestRace_pageReloadWhileTheDemoModelAnswersMissesNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	ctx := deadline(t)
	session := newID()
	if a := n.post("/v1/sessions/"+session+"/messages", "application/json", `{"content":"why do tides differ?"}`); a.status != http.StatusAccepted {
		t.Fatalf("ask: %d %s", a.status, a.body)
	}
	for reload := range 5 {
		v := &viewer{session: session}
		v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == int64(5*(reload+1)) })
		v.check(t, history(t, redis, session)[:5*(reload+1)])
	}
	v := &viewer{session: session, query: "?until=done"}
	v.follow(ctx, at(n.addr), nil)
	v.check(t, history(t, redis, session))
	v.unreset(t)
}

func TestRace_networkChangeAndReconnectMissesNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	wifi, mobile := balance(t, n.addr), balance(t, n.addr)
	ctx := deadline(t)
	session := newID()
	wait := producing(t, ctx, redis, n, session, 200, 8*time.Millisecond)
	v := &viewer{session: session}
	stop := background(t, func() { // the network changes every 50 ms, whatever is under way
		for networks := []*balancer{wifi, mobile}; ctx.Err() == nil && v.status.Load() != -1; pause(ctx, 50*time.Millisecond) {
			networks[0].breakAll()
			networks[0], networks[1] = networks[1], networks[0]
		}
	})
	v.follow(ctx, func() string {
		if v.connections%2 == 0 {
			return wifi.addr
		}
		return mobile.addr
	}, nil)
	v.status.Store(-1)
	wait()
	stop()
	v.check(t, history(t, redis, session))
	v.unreset(t)
	if v.connections < 5 {
		t.Errorf("the viewer connected %d times: the network did not change", v.connections)
	}
}

func TestRace_loadBalancerMovesClientsToAnotherNodeWhenTheirsIsKilled(t *testing.T) {
	t.Parallel()
	moves(t, func(old *node) { old.kill() })
}

func TestRace_loadBalancerMovesClientsToAnotherNodeWhenTheirsDrains(t *testing.T) {
	t.Parallel()
	moves(t, func(old *node) { old.terminate() })
}

// moves connects viewers of several sessions to one node, which goes away in the middle of their answers.
func moves(t *testing.T, away func(*node)) {
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis)
	front := balance(t, both[0].addr)
	ctx := deadline(t)
	var wg sync.WaitGroup
	viewers := make([]*viewer, 12)
	for i := range viewers {
		session := newID()
		producing(t, ctx, redis, both[1], session, 150, 8*time.Millisecond)
		v := &viewer{session: session}
		viewers[i] = v
		wg.Go(func() { v.follow(ctx, at(front.addr), nil) })
	}
	eventually(t, "all viewers are in the middle", func() bool {
		for _, v := range viewers {
			if v.seen.Load() < 20 {
				return false
			}
		}
		return true
	})
	front.retarget(both[1].addr)
	away(both[0])
	wg.Wait()
	for _, v := range viewers {
		v.check(t, history(t, redis, v.session))
		v.unreset(t)
		first, last := v.welcomes[0].Node, v.welcomes[len(v.welcomes)-1].Node
		if first != "n1" || last != "n2" {
			t.Errorf("the viewer went from %s to %s, not from n1 to n2", first, last)
		}
	}
}

func TestRace_severalTabsOnDifferentNodesShowTheSameBytesInTheSameOrder(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis)
	ctx := deadline(t)
	session := newID()
	wait := producing(t, ctx, redis, both[0], session, 150, 6*time.Millisecond)
	tabs := make([]*viewer, 6)
	var wg sync.WaitGroup
	for i := range tabs {
		tabs[i] = &viewer{session: session}
		wg.Go(func() {
			pause(ctx, rand.N(300*time.Millisecond)) // tabs are opened one after the other
			tabs[i].follow(ctx, at(both[i%2].addr), nil)
		})
	}
	wg.Wait()
	wait()
	want := history(t, redis, session)
	for _, v := range tabs {
		v.check(t, want)
		v.unreset(t)
	}
}

// The race itself: 1..6 are in the list, a client connects, and 7 is published and pushed at about that moment, then
// 8..10. In every second repetition 7 is the last chunk, so that no later chunk reveals the gap.
func TestRace_deterministicRaceHistory1To6Then7PublishedInTheWindowThen8To10(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis)
	ctx := deadline(t)
	const repetitions, atOnce = 240, 8
	places := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for repetition := range repetitions {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			f := foreign{redis: redis, session: newID()}
			last := 10
			if repetition%2 == 1 {
				last = 7
			}
			var all []string
			for i := 1; i <= last; i++ {
				all = append(all, foreignChunk(i))
			}
			if err := f.push(ctx, all[:6]...); err != nil {
				t.Error(err)
				return
			}
			v := &viewer{session: f.session}
			wait := sync.WaitGroup{}
			wait.Go(func() {
				v.follow(ctx, at(both[repetition%2].addr), func(event) bool { return v.cursor >= int64(last) })
			})
			pause(ctx, rand.N(8*time.Millisecond)) // before the connection, during it, or after it
			err := f.publish(ctx, all[6])
			if repetition%4 >= 2 {
				pause(ctx, rand.N(10*time.Millisecond))
			}
			if err == nil {
				err = f.push(ctx, all[6])
			}
			for _, c := range all[7:] {
				if err == nil {
					err = f.say(ctx, c, time.Millisecond)
				}
			}
			if err != nil {
				t.Errorf("produce: %v", err)
			}
			wait.Wait()
			v.check(t, all)
			v.unreset(t)
		})
	}
	wg.Wait()
}

func TestRace_stress100ConnectionsInARowEachCutDuringOneAnswerLoseNothing(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis := storetest.Redis(t)
		both := nodes(t, 2, redis, args...)
		ctx := deadline(t)
		session := newID()
		produce, enough := context.WithCancel(ctx)
		defer enough()
		wait := background(t, func() { // one answer, for as long as the connections last
			f := foreign{redis: redis, session: session}
			for i := 1; produce.Err() == nil; i++ {
				if err := f.say(ctx, foreignChunk(i), 5*time.Millisecond); err != nil {
					t.Errorf("produce: %v", err)
					return
				}
				pause(produce, rand.N(6*time.Millisecond))
			}
		})
		v := &viewer{session: session}
		for i := 0; ctx.Err() == nil && (i < 100 || len(v.welcomes) < 40 || v.cursor < 100); i++ { // on a busy machine most come too late
			life, cancel := context.WithTimeout(ctx, 15*time.Millisecond+rand.N(30*time.Millisecond))
			v.connect(life, both[i%2].addr, nil)
			cancel()
		}
		enough()
		wait()
		want := history(t, redis, session)
		v.follow(ctx, at(both[0].addr), func(event) bool { return v.cursor >= int64(len(want)) })
		v.check(t, want)
		v.unreset(t)
		t.Logf("%d of %d connections were welcomed, up to chunk %d", len(v.welcomes), v.connections, v.cursor)
		if len(v.welcomes) < 30 || v.cursor < 100 {
			t.Errorf("only %d of %d connections were welcomed, up to chunk %d: this shows nothing", len(v.welcomes), v.connections, v.cursor)
		}
	})
}

func TestRace_concurrency10ClientsConnectAtTheSameMomentDuringAnAnswer(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis)
	ctx := deadline(t)
	for round := range 6 {
		session := newID()
		wait := producing(t, ctx, redis, both[0], session, 60, 6*time.Millisecond)
		first := &viewer{session: session} // after its first chunks the answer is under way
		first.follow(ctx, at(both[1].addr), func(event) bool { return first.cursor >= int64(5*round+1) })
		clients := make([]*viewer, 10)
		gun := make(chan struct{})
		var wg sync.WaitGroup
		for i := range clients {
			clients[i] = &viewer{session: session}
			wg.Go(func() {
				<-gun
				clients[i].follow(ctx, at(both[i%2].addr), nil)
			})
		}
		close(gun)
		wg.Wait()
		wait()
		want := history(t, redis, session)
		if len(want) != 61 {
			t.Fatalf("the log has %d chunks", len(want))
		}
		for _, v := range clients {
			v.check(t, want)
			v.unreset(t)
		}
		if t.Failed() {
			t.Fatal(fmt.Sprint("in round ", round))
		}
	}
}

// A hint is only a hint: a read finds chunks that nobody announced, within the reconcile interval.
func TestRace_chunksThatNobodyAnnouncesComeWithinTheReconcileInterval(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-reconcile", "300ms")[0]
	ctx := deadline(t)
	f := foreign{redis: redis, session: newID()}
	v := &viewer{session: f.session}
	wait := background(t, func() { v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == 6 }) })
	eventually(t, "the viewer is held", func() bool { return v.status.Load() != 0 })
	for i := range 6 {
		pushed := time.Now()
		if err := f.push(ctx, foreignChunk(i)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the chunk comes", func() bool { return v.seen.Load() == int64(i+1) })
		if took := time.Since(pushed); took > slack/2 {
			t.Errorf("chunk %d came after %v", i+1, took)
		}
	}
	wait()
	v.check(t, history(t, redis, f.session))
	v.unreset(t)
}

// Announcements of chunks that are never pushed, doubled or late, or of no chunks at all, mislead no viewer.
func TestRace_announcementsThatAreWrongMisleadNobody(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis, "-reconcile", "300ms")
	ctx := deadline(t)
	session := newID()
	f := foreign{redis: redis, session: session}
	viewers := make([]*viewer, 4)
	var wg sync.WaitGroup
	for i := range viewers {
		viewers[i] = &viewer{session: session}
		wg.Go(func() { viewers[i].follow(ctx, at(both[i%2].addr), nil) })
	}
	lie := background(t, func() {
		for i := 1; i <= 150; i++ {
			list, err := redis.LRange(ctx, "chat:history:"+session, -5, -1).Result()
			if err != nil {
				t.Error(err)
			}
			lies := append(list, // doubled, late
				fmt.Sprintf(`{"seq":%d,"ts":1795424741692,"type":"delta","content":"never pushed"}`, i+50),
				`{"seq":1`, `{"seq":99999999999999999999,"ts":1}`, ``, `not JSON`, foreignChunk(i), `{"type":"hint"}`)
			if err := f.publish(ctx, lies[rand.IntN(len(lies))]); err != nil {
				t.Error(err)
			}
			both[0].append(t, session, words(i, 1))
		}
		both[0].append(t, session, `{"type":"end"}`)
	})
	lie()
	wg.Wait()
	for _, v := range viewers {
		v.check(t, history(t, redis, session))
		v.unreset(t)
	}
}
