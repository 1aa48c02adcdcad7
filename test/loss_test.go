package test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

var (
	lossRounds = flag.Int("loss.rounds", 3, "how often Redis loses the newest chunks of twenty sessions")
	lossSeed   = flag.Uint64("loss.seed", 0, "what the losses are drawn from; 0: another one each time")
)

// losses is one Redis that comes back without its newest chunks, with its nodes and affected sessions.
type losses struct {
	t     *testing.T
	rand  *rand.Rand
	redis *storetest.Server
	nodes []*node
	alive []*node // after the loss
}

// loser is one of these sessions.
type loser struct {
	session    string
	foreign    bool // another program pushes its chunks
	live, away *viewer
	follow     context.CancelFunc
	followed   func()
	ends       bool
}

// Redis fails over to an older state of the log. Some viewers are connected then, and others are away, at one to three
// nodes, of which one may be gone. If a node survives that acknowledged or delivered a lost chunk, every viewer ends
// with the log, or is reset once and then has the log. Chunks come from the API, and from a program that repeats its
// words.
func TestLoss_whatWasGivenOutAndLostIsNeverMixedWithWhatFollows(t *testing.T) {
	seed := *lossSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-loss.seed %d", seed)
	l := &losses{t: t, rand: rand.New(rand.NewPCG(seed, 0))}
	for range *lossRounds {
		t.Run("", func(t *testing.T) { l.t = t; l.round() })
	}
}

func (l *losses) round() {
	l.redis = storetest.Redis(l.t)
	linger := []string{"0s", "10s"}[l.rand.IntN(2)]
	l.nodes = nodes(l.t, 1+l.rand.IntN(3), l.redis, "-reconcile", "200ms", "-linger", linger)
	l.alive = l.nodes
	if len(l.nodes) > 1 && l.rand.IntN(2) == 0 {
		l.alive = l.nodes[1:]
	}
	all := make([]*loser, 20)
	for i := range all {
		s := &loser{session: newID(), foreign: l.rand.IntN(2) == 0, ends: l.rand.IntN(3) == 0}
		all[i] = s
		l.say(s, l.rand.IntN(11), l.nodes)
	}
	if err := l.redis.Save(deadline(l.t)).Err(); err != nil {
		l.t.Fatal(err)
	}
	for _, s := range all {
		l.begin(s)
	}
	for _, n := range l.nodes {
		if !slices.Contains(l.alive, n) {
			n.kill()
		}
	}
	l.redis.Kill()
	l.redis.Start()
	var wg sync.WaitGroup
	for _, s := range all {
		l.say(s, l.rand.IntN(16), l.alive)
		if s.ends {
			l.end(s)
		}
		at := l.any(l.alive).addr
		wg.Go(func() { l.finish(s, at) })
	}
	wg.Wait()
	for _, s := range all {
		l.check(s)
	}
}

func (l *losses) any(of []*node) *node { return of[l.rand.IntN(len(of))] }

// say adds chunks to a session, at any of some nodes, or by a direct push.
func (l *losses) say(s *loser, count int, at []*node) {
	for range count {
		word := []string{" the", " cat"}[l.rand.IntN(2)]
		if s.foreign {
			f := foreign{redis: l.redis, session: s.session}
			chunk := fmt.Sprintf(`{"content":%q}`, word)
			if l.rand.IntN(2) == 0 {
				_ = f.publish(l.t.Context(), chunk)
			}
			if err := f.push(l.t.Context(), chunk); err != nil {
				l.t.Fatal(err)
			}
			continue
		}
		n := l.any(at)
		body := fmt.Sprintf(`{"content":%q}`, word)
		eventually(l.t, "the append is taken", func() bool {
			return n.post("/v1/sessions/"+s.session+"/chunks", "application/json", body).status == http.StatusCreated
		})
	}
}

func (l *losses) end(s *loser) {
	eventually(l.t, "the end is taken", func() bool {
		status := l.any(l.alive).post("/v1/sessions/"+s.session+"/chunks", "application/json", `{"type":"end"}`).status
		return status == http.StatusCreated || status == http.StatusConflict
	})
}

// begin adds the chunks that will be lost. One viewer is connected meanwhile, to a node that survives. Another one has
// seen as much, or less, and is away.
func (l *losses) begin(s *loser) {
	s.live, s.away = &viewer{session: s.session}, &viewer{session: s.session}
	var ctx context.Context
	ctx, s.follow = context.WithCancel(l.t.Context())
	to := at(l.any(l.alive).addr)
	s.followed = background(l.t, func() { s.live.follow(ctx, to, nil) })
	length := func() int64 { return l.redis.LLen(l.t.Context(), "chat:history:"+s.session).Val() }
	seen := func() {
		eventually(l.t, "the viewer has seen it", func() bool { return s.live.seen.Load() >= length() })
	}
	l.say(s, 1+l.rand.IntN(10), l.nodes)
	had := length()
	if l.rand.IntN(2) == 0 {
		had = 1 + l.rand.Int64N(had)
	}
	s.away.follow(l.t.Context(), at(l.any(l.nodes).addr), func(event) bool { return s.away.cursor >= had })
	seen()
}

// finish makes both viewers read the current log.
func (l *losses) finish(s *loser, addr string) {
	n := l.alive[0]
	last := func() (last int64) {
		a := n.get("/v1/sessions/" + s.session)
		var is struct {
			Last int64 `json:"last_seq"`
		}
		if a.status == http.StatusOK {
			decode(l.t, a.body, &is)
		}
		return is.Last
	}
	done := func(v *viewer) bool { return v.seen.Load() == last() || last() == 0 && v.seen.Load()%1_000_000 == 0 }
	ctx, cancel := context.WithCancel(l.t.Context())
	back := make(chan struct{})
	go func() { // ended by cancel, or by the end
		defer close(back)
		s.away.follow(ctx, at(addr), nil)
	}()
	for _, v := range []*viewer{s.live, s.away} {
		eventually(l.t, "the viewer has the log", func() bool { return done(v) })
	}
	if !s.ends {
		pause(ctx, 600*time.Millisecond) // three times the reconcile interval, after which nothing changes
		cancel()
		s.follow()
	}
	<-back
	s.followed()
	cancel()
	s.follow()
}

var ownHead = regexp.MustCompile(`^\{"seq":[0-9]+,`)

func (l *losses) check(s *loser) {
	want := history(l.t, l.redis, s.session)
	first := s.live.cursor - int64(len(want)) + 1
	for i := range want {
		want[i] = ownHead.ReplaceAllString(want[i], fmt.Sprintf(`{"seq":%d,`, first+int64(i)))
	}
	for _, v := range []*viewer{s.live, s.away} {
		v.check(l.t, want)
		if len(v.resets) > 1 {
			l.t.Errorf("viewer of %s was reset more than once: %+v", s.session, v.resets)
		}
		if s.ends && !v.over {
			l.t.Errorf("the viewer of %s has no end", s.session)
		}
	}
	if s.live.cursor != s.away.cursor {
		l.t.Errorf("the viewers of %s are at %d and %d", s.session, s.live.cursor, s.away.cursor)
	}
}
