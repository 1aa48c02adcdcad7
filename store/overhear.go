package store

import (
	"context"
	"sync"

	"github.com/redis/go-redis/v9"
)

// Overhear calls heard with each message published for a session until ctx ends. It calls begun once Redis has
// acknowledged the subscription. All calls share a connection. heard must not block. Overhear does not report messages
// that it misses. It exists only for the viewer that loses chunks, which the demo shows next to ours.
func (s *Store) Overhear(ctx context.Context, session string, begun func(), heard func(payload string)) error {
	o := &s.overheard
	o.mu.Lock()
	if o.ears == nil {
		o.of = map[string]*crowd{}
		o.ears = s.newEars(1)
	}
	c := o.of[session]
	if c == nil {
		c = &crowd{all: map[*overhearer]struct{}{}}
		o.of[session] = c
		c.stop = o.ears.listen(s.key("stream", session), c)
	}
	one := &overhearer{begun, heard}
	c.mu.Lock()
	c.all[one] = struct{}{}
	if c.stands {
		begun()
	}
	c.mu.Unlock()
	o.mu.Unlock()
	<-ctx.Done()

	o.mu.Lock()
	defer o.mu.Unlock()
	c.mu.Lock()
	delete(c.all, one)
	empty := len(c.all) == 0
	c.mu.Unlock()
	if empty {
		delete(o.of, session)
		c.stop()
	}
	return context.Cause(ctx)
}

// overheard holds the calls of Overhear, by session.
type overheard struct {
	mu   sync.Mutex
	ears ears // nil until the first call
	of   map[string]*crowd
}

func (o *overheard) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ears != nil {
		o.ears.close()
	}
}

// crowd is the set of callers that overhear one session.
type crowd struct {
	stop   func()
	mu     sync.Mutex
	stands bool // Redis has acknowledged its subscription
	all    map[*overhearer]struct{}
}

type overhearer struct {
	begun func()
	heard func(payload string)
}

// Live implements Listener.
func (c *crowd) Live(payload string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for one := range c.all {
		one.heard(payload)
	}
}

// Resync implements Listener.
func (c *crowd) Resync() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stands {
		return // a resubscription: missed messages stay missed
	}
	c.stands = true
	for one := range c.all {
		one.begun()
	}
}

// newEars returns ears with a number of connections to each server.
func (s *Store) newEars(connections int) ears {
	cfg := s.cfg
	cfg.Listeners = connections
	if cluster, ok := s.rdb.(*redis.ClusterClient); ok {
		return newShards(cluster, cfg, s.metrics, s.refusals)
	}
	return newSpread(s.rdb, cfg, s.metrics, s.refusals)
}
