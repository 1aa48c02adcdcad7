package store

import (
	"context"
	"fmt"

	"github.com/redis/go-redis/v9"
)

// Overhear calls heard with each message that is published for a session, on a connection of its own,
// from the moment on at which Redis has acknowledged that (begun), until ctx ends or the connection breaks. heard must
// not block. What it misses nobody is told: this is half of the viewer that loses chunks, which the demo shows
// beside ours, and nothing else may be made of it.
func (s *Store) Overhear(ctx context.Context, session string, begun func(), heard func(payload string)) error {
	subscribe := s.rdb.Subscribe
	if s.clustered {
		subscribe = s.rdb.SSubscribe
	}
	ps := subscribe(ctx, s.key("stream", session))
	defer ps.Close()
	defer context.AfterFunc(ctx, func() { _ = ps.Close() })() // a cancelled context does not end Receive, this does
	for {
		switch m, err := ps.Receive(ctx); m := m.(type) {
		case *redis.Subscription:
			begun()
		case *redis.Message:
			heard(m.Payload)
		case nil:
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("%w: overhear %s: %w", ErrAway, session, err)
		}
	}
}
