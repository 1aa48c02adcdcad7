package store

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// Listener hears of one session. Both methods are called on the receive loop of a
// connection that many sessions share: they must not block.
type Listener interface {
	// Live hands over what was published: a chunk's bytes, Hint, or anything else that
	// a foreign producer sends.
	Live(payload string)
	// Resync says that messages may have been missed: the subscription was
	// acknowledged, for the first time or again.
	Resync()
}

// Listen subscribes l to a session until stop is called. Nothing is heard before the
// first Resync. A session has one Listener: a later one takes the place of the former.
func (s *Store) Listen(session string, l Listener) (stop func()) {
	sub := s.subs[maphash.String(spread, session)%uint64(len(s.subs))]
	sub.add(channel(session), l)
	return func() { sub.remove(channel(session), l) }
}

// ListenUploads subscribes l to the names of sessions whose uploads have to look whether
// they may go on (HoldLook): Live hands over a session's id. There is one such Listener.
func (s *Store) ListenUploads(l Listener) (stop func()) {
	sub := s.subs[0]
	sub.add(uploads, l)
	return func() { sub.remove(uploads, l) }
}

var spread = maphash.MakeSeed()

// subscriber is one Pub/Sub connection, shared by many sessions, with the loop that
// receives from it.
//
// go-redis reconnects by itself and then subscribes to everything again; what was
// published in between is lost. The acknowledgements of that come in through the loop,
// and each is a Resync. What go-redis does not notice is a peer that went silent
// without a reset, so the loop asks for a pong and, when none comes, begins again
// with a new connection.
type subscriber struct {
	rdb  redis.UniversalClient
	ping time.Duration
	log  *slog.Logger
	quit context.CancelFunc
	done chan struct{} // closed when the loop has ended

	// wire is held while listeners change and Redis is told so, so that both happen in
	// the same order: an unsubscribe that overtakes a later subscribe would leave a
	// listener that hears nothing.
	wire sync.Mutex
	ps   *redis.PubSub // under wire; nil while none is connected

	mu        sync.RWMutex
	listeners map[string]Listener // by channel
}

func newSubscriber(rdb redis.UniversalClient, cfg Config) *subscriber {
	ctx, cancel := context.WithCancel(context.Background())
	s := &subscriber{
		rdb: rdb, ping: cfg.Ping, log: cfg.Logger,
		quit: cancel, done: make(chan struct{}), listeners: map[string]Listener{},
	}
	// Ended by close, which waits for it. Only it receives.
	go func() {
		defer close(s.done)
		s.run(ctx)
	}()
	return s
}

func (s *subscriber) close() {
	s.quit()
	s.wire.Lock()
	if s.ps != nil {
		_ = s.ps.Close() // a cancelled context does not end Receive, this does
	}
	s.wire.Unlock()
	<-s.done
}

func (s *subscriber) add(channel string, l Listener) {
	s.wire.Lock()
	defer s.wire.Unlock()
	s.mu.Lock()
	s.listeners[channel] = l
	s.mu.Unlock()
	if s.ps != nil {
		s.tell(s.ps.Subscribe(context.Background(), channel))
	}
}

func (s *subscriber) remove(channel string, l Listener) {
	s.wire.Lock()
	defer s.wire.Unlock()
	s.mu.Lock()
	mine := s.listeners[channel] == l
	if mine {
		delete(s.listeners, channel)
	}
	s.mu.Unlock()
	if mine && s.ps != nil {
		s.tell(s.ps.Unsubscribe(context.Background(), channel))
	}
}

// tell begins again after a write failed: what Redis knows is not known. wire is held.
func (s *subscriber) tell(err error) {
	if err != nil {
		_ = s.ps.Close()
		s.ps = nil
	}
}

// run keeps a connection for as long as the subscriber lives.
func (s *subscriber) run(ctx context.Context) {
	const least, most = 20 * time.Millisecond, time.Second
	pause := least
	for ctx.Err() == nil {
		ps, err := s.connect(ctx)
		if err == nil {
			pause = least
			err = s.receive(ctx, ps)
			s.wire.Lock()
			_ = ps.Close()
			if s.ps == ps {
				s.ps = nil
			}
			s.wire.Unlock()
		}
		if ctx.Err() != nil {
			return
		}
		s.log.LogAttrs(ctx, slog.LevelWarn, "pub/sub connection lost", slog.Any("err", err))
		select { // jittered, so that the nodes do not come back to a restarted Redis all at once
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
		}
		pause = min(2*pause, most)
	}
}

// connect makes a connection that is subscribed to all that anybody listens to.
func (s *subscriber) connect(ctx context.Context) (*redis.PubSub, error) {
	ps := s.rdb.Subscribe(ctx)
	if err := ps.Ping(ctx); err != nil {
		return nil, errors.Join(err, ps.Close())
	}
	s.wire.Lock()
	defer s.wire.Unlock()
	s.mu.RLock()
	channels := make([]string, 0, len(s.listeners))
	for c := range s.listeners {
		channels = append(channels, c)
	}
	s.mu.RUnlock()
	const batch = 1000
	for i := 0; i < len(channels); i += batch {
		if err := ps.Subscribe(ctx, channels[i:min(i+batch, len(channels))]...); err != nil {
			return nil, errors.Join(err, ps.Close())
		}
	}
	if err := ctx.Err(); err != nil { // close has not seen this one
		return nil, errors.Join(err, ps.Close())
	}
	s.ps = ps
	return ps, nil
}

// receive hands out what comes until the connection fails or falls silent.
func (s *subscriber) receive(ctx context.Context, ps *redis.PubSub) error {
	asked := false
	for {
		msg, err := ps.ReceiveTimeout(ctx, s.ping)
		if netErr := net.Error(nil); errors.As(err, &netErr) && netErr.Timeout() {
			if asked {
				return errSilent
			}
			asked = true
			err = ps.Ping(ctx)
		} else {
			asked = false
		}
		if err != nil {
			return err
		}
		switch m := msg.(type) {
		case *redis.Message:
			if l := s.listener(m.Channel); l != nil {
				l.Live(m.Payload)
			}
		case *redis.Subscription:
			if l := s.listener(m.Channel); l != nil && m.Kind == "subscribe" {
				l.Resync()
			}
		}
	}
}

var errSilent = errors.New("no sign of life from redis")

func (s *subscriber) listener(channel string) Listener {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.listeners[channel]
}
