package store_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

func TestTicket_opensOneGrantForOneSession(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		ctx := t.Context()
		until := time.Now().Add(time.Hour).Truncate(time.Millisecond)
		a, b := store.TicketName("a"), store.TicketName("b")
		if err := errors.Join(s.MakeTicket(ctx, a, "s", until), s.MakeTicket(ctx, b, "s", time.Time{})); err != nil {
			t.Fatal(err)
		}
		for name, session := range map[string]string{a: "other", store.TicketName("c"): "s", store.TicketName(""): "s"} {
			if _, err := s.EnterTicket(ctx, name, session, "x"); !errors.Is(err, store.ErrTicketSpent) {
				t.Errorf("%.4s of %s: %v", name, session, err)
			}
		}
		if err := s.RenewTicket(ctx, b, "s", "c0", time.Time{}); err != nil { // its entry was lost with a master
			t.Error(err)
		}
		for name, want := range map[string]time.Time{a: until, b: {}} {
			if got, err := s.EnterTicket(ctx, name, "s", "c1"); err != nil || !got.Equal(want) {
				t.Fatalf("%v, not %v: %v", got, want, err)
			}
			if err := s.RenewTicket(ctx, name, "s", "c1", want); err != nil {
				t.Error(err)
			}
			if got, err := s.EnterTicket(ctx, name, "s", "c2"); err != nil || !got.Equal(want) { // the page reconnects
				t.Errorf("%v, not %v: %v", got, want, err)
			}
			if err := s.RenewTicket(ctx, name, "s", "c1", want); !errors.Is(err, store.ErrTicketReplaced) {
				t.Errorf("the former one: %v", err)
			}
			if err := s.RenewTicket(ctx, name, "s", "c2", want); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestTicket_isNotGoodForLongerThanItsToken(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		ctx, name := t.Context(), store.TicketName("a")
		until := time.Now().Add(2 * time.Second).Truncate(time.Millisecond)
		if err := s.MakeTicket(ctx, name, "s", until); err != nil {
			t.Fatal(err)
		}
		for ctx.Err() == nil {
			begun := time.Now()
			_, err := s.EnterTicket(ctx, name, "s", "c")
			late := time.Now().After(until)
			if err != nil {
				if !late || !errors.Is(err, store.ErrTicketSpent) {
					t.Errorf("%v before its time: %v", time.Until(until), err)
				}
				return
			}
			if err := s.RenewTicket(ctx, name, "s", "c", until); err != nil {
				t.Error(err)
			}
			if begun.Sub(until) > time.Second {
				t.Fatal("it is good for longer")
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}

func TestTicket_livesAMinuteWithoutAConnection(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	ctx, name := t.Context(), store.TicketName("sesame")
	key := "chat:ticket:" + name
	life := func(when string, most time.Duration) {
		t.Helper()
		if left := r.PTTL(ctx, key).Val(); left <= most-5*time.Second || left > most {
			t.Errorf("%s it lives for %v, not %v", when, left, most)
		}
	}
	if err := s.MakeTicket(ctx, name, "s", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if all := fmt.Sprint(r.Keys(ctx, "*").Val(), r.HGetAll(ctx, key).Val()); strings.Contains(all, "sesame") || !strings.Contains(all, key) {
		t.Errorf("in Redis stands %s", all)
	}
	life("made,", store.TicketLife)
	shorten := func() { r.PExpire(ctx, key, 10*time.Second) }
	shorten()
	if _, err := s.EnterTicket(ctx, name, "other", "c"); err == nil {
		t.Error("another session was entered")
	}
	life("after a try,", 10*time.Second)
	if _, err := s.EnterTicket(ctx, name, "s", "c1"); err != nil {
		t.Fatal(err)
	}
	life("entered,", store.TicketLife)
	shorten()
	if err := s.RenewTicket(ctx, name, "s", "c1", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	life("renewed,", store.TicketLife)
	if err := s.RenewTicket(ctx, name, "s", "c1", time.Now().Add(20*time.Second)); err != nil {
		t.Fatal(err)
	}
	life("with a token that ends,", 20*time.Second)
	r.Del(ctx, key) // nobody was connected for so long
	if _, err := s.EnterTicket(ctx, name, "s", "c2"); !errors.Is(err, store.ErrTicketSpent) {
		t.Errorf("it is not spent: %v", err)
	}
}

// After Redis lost everything, a standing connection keeps its grant, and no two connections have the same one.
func TestTicket_aConnectionThatStandsBringsItsGrantBack(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) {
		ctx, name := t.Context(), store.TicketName("a")
		until := time.Now().Add(time.Hour)
		if err := s.RenewTicket(ctx, name, "s", "c2", until); err != nil {
			t.Error(err)
		}
		if err := s.RenewTicket(ctx, name, "s", "c1", until); !errors.Is(err, store.ErrTicketReplaced) {
			t.Errorf("a former one: %v", err)
		}
		if got, err := s.EnterTicket(ctx, name, "s", "c3"); err != nil || !got.Equal(until.Truncate(time.Millisecond)) {
			t.Errorf("it is not there again: %v %v", got, err)
		}
	})
}

// However many connections enter at once, at whichever nodes, only one has the grant.
func TestTicket_raceOfTwoNodes(t *testing.T) {
	r := storetest.Redis(t)
	nodes := [2]*store.Store{}
	for i := range nodes {
		nodes[i] = open(t, func(c *store.Config) { c.Redis = r.URL() })
	}
	for round := range 20 {
		name := store.TicketName(fmt.Sprint(round))
		if err := nodes[0].MakeTicket(t.Context(), name, "s", time.Time{}); err != nil {
			t.Fatal(err)
		}
		const many = 20
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() {
				if _, err := nodes[i%2].EnterTicket(t.Context(), name, "s", fmt.Sprint("c", i)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		have := 0
		for i := range many {
			if err := nodes[(i+1)%2].RenewTicket(t.Context(), name, "s", fmt.Sprint("c", i), time.Time{}); err == nil {
				have++
			} else if !errors.Is(err, store.ErrTicketReplaced) {
				t.Error(err)
			}
		}
		if have != 1 {
			t.Fatalf("%d have the grant", have)
		}
	}
}

// entering makes a ticket, and listens for another entry with it.
func entering(t *testing.T, s, other *store.Store) {
	t.Helper()
	ctx, name := t.Context(), store.TicketName("a")
	e := newEar()
	stop := other.ListenTickets(e)
	defer stop()
	e.wait(t, "the acknowledgement", func() bool { return e.resyncs > 0 })
	if err := s.MakeTicket(ctx, name, "s", time.Time{}); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, err := s.EnterTicket(ctx, name, "s", fmt.Sprint("c", i)); err != nil {
			t.Fatal(err)
		}
	}
	e.wait(t, "the ticket's name", func() bool { return len(e.heard) == 2 && e.heard[0] == name && e.heard[1] == name })
}

func TestTicket_whoComesInAgainIsHeard(t *testing.T) {
	both(t, nil, func(t *testing.T, s *store.Store) { entering(t, s, s) })
}

func TestCluster_ticketsAreHeardByAll(t *testing.T) {
	c := storetest.Cluster(t)
	all := func(cfg *store.Config) { cfg.Redis = c.URL() }
	entering(t, open(t, all), open(t, all))
}

func TestTicket_redisAwayIsNotSpent(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	name := store.TicketName("a")
	if err := s.MakeTicket(t.Context(), name, "s", time.Time{}); err != nil {
		t.Fatal(err)
	}
	r.Kill()
	_, entered := s.EnterTicket(t.Context(), name, "s", "c")
	for _, err := range []error{entered, s.MakeTicket(t.Context(), name, "s", time.Time{}), s.RenewTicket(t.Context(), name, "s", "c", time.Time{})} {
		if !errors.Is(err, store.ErrAway) {
			t.Errorf("not away: %v", err)
		}
	}
}
