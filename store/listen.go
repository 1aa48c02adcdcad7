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

// Listener receives the notifications of one session. Its methods run on the receive loop of a connection that many
// sessions share, so they must not block.
type Listener interface {
	// Live receives a published message: a chunk's bytes, Hint, or anything else that another producer sends.
	Live(payload string)
	// Resync reports that messages may have been missed: Redis acknowledged the subscription, for the first time or
	// again.
	Resync()
}

// Listen subscribes l to a session until stop is called. l receives nothing before the first Resync. A session has one
// Listener: a later one replaces the earlier.
func (s *Store) Listen(session string, l Listener) (stop func()) {
	return s.ears.listen(s.key("stream", session), l)
}

// ListenUploads subscribes l to the names of sessions whose uploads must check whether they may continue (HoldLook).
// Live receives a session's id. Only one such Listener exists.
func (s *Store) ListenUploads(l Listener) (stop func()) {
	return s.ears.listenWide(s.cfg.Prefix+uploads, l)
}

// ears holds the Pub/Sub connections.
type ears interface {
	listen(channel string, l Listener) (stop func())
	// listenWide is for a channel that belongs to no session.
	listenWide(channel string, l Listener) (stop func())
	// redial replaces every connection, because another server has become the master.
	redial()
	count() int // number of channels
	close()
}

// spread distributes the sessions of one server over a few connections.
type spread []*subscriber

func newSpread(rdb redis.UniversalClient, cfg Config, m *metrics, r *refusals) spread {
	all := make(spread, cfg.Listeners)
	for i := range all {
		all[i] = newSubscriber(cfg, m, r, ordinary, func(ctx context.Context) (*redis.PubSub, error) { return rdb.Subscribe(ctx), nil }, nil)
	}
	return all
}

var seed = maphash.MakeSeed()

func (s spread) listen(channel string, l Listener) (stop func()) {
	return s[maphash.String(seed, channel)%uint64(len(s))].listen(channel, l)
}

func (s spread) listenWide(channel string, l Listener) (stop func()) { return s[0].listen(channel, l) }

func (s spread) count() (n int) {
	for _, sub := range s {
		n += sub.count()
	}
	return n
}

func (s spread) redial() {
	for _, sub := range s {
		sub.redial()
	}
}

func (s spread) close() {
	var wg sync.WaitGroup
	for _, sub := range s {
		wg.Go(sub.close)
	}
	wg.Wait()
}

// kind is a way to subscribe to channels.
type kind struct {
	subscribe, unsubscribe func(ps *redis.PubSub, ctx context.Context, channels ...string) error
	acknowledged, ended    string // the kinds of the replies
}

var (
	ordinary = kind{(*redis.PubSub).Subscribe, (*redis.PubSub).Unsubscribe, "subscribe", "unsubscribe"}
	sharded  = kind{(*redis.PubSub).SSubscribe, (*redis.PubSub).SUnsubscribe, "ssubscribe", "sunsubscribe"}
)

// subscriber is one Pub/Sub connection, shared by many sessions, with the loop that receives from it.
//
// go-redis reconnects by itself and then subscribes to everything again; messages published in between are lost. The
// loop receives the acknowledgements, and each is a Resync. go-redis does not notice a peer that goes silent without a
// reset. So the loop asks for a pong and, if none comes, dials again. If Redis refuses a subscription, the connection
// is kept for the others, and is replaced now and then, in case the permissions have changed.
type subscriber struct {
	kind
	open     func(ctx context.Context) (*redis.PubSub, error)
	misfit   func() // called when a channel does not, or no longer, belong to this server; may be nil
	ping     time.Duration
	metrics  *metrics
	trouble  *refusals
	log      *slog.Logger
	patience time.Duration // how long to keep a connection on which something is refused; only the loop uses it
	quit     context.CancelFunc
	done     chan struct{} // closed when the loop has ended

	// wire is held while listeners change and Redis learns of it, so that both happen in the same order. An unsubscribe
	// that overtakes a later subscribe would leave a listener that hears nothing.
	wire sync.Mutex
	ps   *redis.PubSub // guarded by wire; nil while not connected

	mu        sync.RWMutex
	listeners map[string]Listener // by channel
	heard     map[string]bool     // channels whose subscription Redis acknowledged
	alone     bool                // subscribe to each channel by a separate command, because a refusal applies to a whole command
}

func newSubscriber(cfg Config, m *metrics, r *refusals, k kind, open func(ctx context.Context) (*redis.PubSub, error), misfit func()) *subscriber {
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), lasting{}, true))
	s := &subscriber{
		kind: k, open: open, misfit: misfit, ping: cfg.Ping, metrics: m, trouble: r, log: cfg.Logger, patience: leastPatience,
		quit: cancel, done: make(chan struct{}), listeners: map[string]Listener{}, heard: map[string]bool{},
	}
	// close ends it and waits for it. Only it receives.
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

// redial makes the loop dial again.
func (s *subscriber) redial() {
	s.wire.Lock()
	defer s.wire.Unlock()
	if s.ps != nil {
		_ = s.ps.Close()
		s.ps = nil
	}
}

func (s *subscriber) listen(channel string, l Listener) (stop func()) {
	s.add(channel, l)
	return func() { s.remove(channel, l) }
}

func (s *subscriber) add(channel string, l Listener) {
	s.wire.Lock()
	defer s.wire.Unlock()
	s.mu.Lock()
	s.listeners[channel] = l
	s.mu.Unlock()
	if s.ps != nil {
		s.tell(s.subscribe(s.ps, context.Background(), channel))
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
		s.tell(s.unsubscribe(s.ps, context.Background(), channel))
	}
}

// tell closes the connection after a failed write, because Redis may or may not know of the change. wire must be held.
func (s *subscriber) tell(err error) {
	if err != nil {
		_ = s.ps.Close()
		s.ps = nil
	}
}

// run keeps a connection while the subscriber lives.
func (s *subscriber) run(ctx context.Context) {
	const least, most = 20 * time.Millisecond, time.Second
	pause := least
	for ctx.Err() == nil {
		ps, err := s.connect(ctx)
		if err == nil {
			var answered bool
			if answered, err = s.receive(ctx, ps); answered { // a connection alone proves nothing: it may be a proxy without a Redis
				pause = least
			}
			if !errors.Is(err, errRefused) {
				s.patience = leastPatience
			}
			s.wire.Lock()
			_ = ps.Close()
			if s.ps == ps {
				s.ps = nil
			}
			s.mu.Lock()
			clear(s.heard)
			s.mu.Unlock()
			s.wire.Unlock()
		}
		if ctx.Err() != nil {
			return
		}
		s.metrics.lost.Inc()
		if !errors.Is(err, errRefused) && s.trouble.lost.now() {
			s.log.LogAttrs(ctx, slog.LevelWarn, "pub/sub connection lost: chunks come up to -reconcile late until it is back",
				slog.String("redis", s.trouble.at), slog.Any("err", err))
		}
		s.amiss()
		select { // jittered, so that the nodes do not all return to a restarted Redis at once
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
		}
		pause = min(2*pause, most)
	}
}

func (s *subscriber) amiss() {
	if s.misfit != nil {
		s.misfit()
	}
}

// connect makes a connection and subscribes it to every channel that has a listener.
func (s *subscriber) connect(ctx context.Context) (*redis.PubSub, error) {
	ps, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
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
	batch := 1000
	if s.alone || s.kind.acknowledged == sharded.acknowledged {
		batch = 1 // the channels of one command must belong to one slot
	}
	for i := 0; i < len(channels); i += batch {
		if err := s.subscribe(ps, ctx, channels[i:min(i+batch, len(channels))]...); err != nil {
			return nil, errors.Join(err, ps.Close())
		}
	}
	if err := ctx.Err(); err != nil { // close has not seen this connection
		return nil, errors.Join(err, ps.Close())
	}
	s.ps = ps
	return ps, nil
}

// leastPatience and mostPatience limit how long a connection is kept on which a subscription is refused.
const leastPatience, mostPatience = time.Second, 30 * time.Second

// receive delivers messages until the connection fails or falls silent. answered reports whether Redis has replied.
func (s *subscriber) receive(ctx context.Context, ps *redis.PubSub) (answered bool, failed error) {
	asked, refused := false, time.Time{} // when a subscription was refused on this connection
	for {
		wait := s.ping
		if !refused.IsZero() {
			if wait = min(wait, time.Until(refused.Add(s.patience))); wait <= 0 {
				s.patience = min(2*s.patience, mostPatience)
				return answered, errRefused
			}
		}
		msg, err := ps.ReceiveTimeout(ctx, wait)
		if netErr := net.Error(nil); errors.As(err, &netErr) && netErr.Timeout() {
			if wait < s.ping {
				continue
			}
			if asked {
				return answered, errSilent
			}
			asked = true
			err = ps.Ping(ctx)
		} else {
			asked = false
		}
		if redis.HasErrorPrefix(err, "MOVED") { // the reply to a subscription; the connection is fine
			s.amiss()
			continue
		}
		if reply := redis.Error(nil); errors.As(err, &reply) && refusalIn(reply.Error()) == RedisDenied { // Redis refused the subscription
			s.deny(ctx, reply.Error())
			if refused.IsZero() {
				refused = time.Now()
			}
			continue
		}
		if err != nil {
			return answered, err
		}
		answered = true
		switch m := msg.(type) {
		case *redis.Message:
			if l := s.listener(m.Channel); l != nil {
				l.Live(m.Payload)
			}
		case *redis.Subscription:
			l := s.note(m.Channel, m.Kind == s.acknowledged)
			switch {
			case l == nil:
			case m.Kind == s.acknowledged:
				l.Resync()
			case m.Kind == s.ended: // nobody here asked for it: its slot has moved
				s.amiss()
			}
		}
	}
}

// deny records that Redis refused a subscription.
func (s *subscriber) deny(ctx context.Context, text string) {
	s.metrics.deaf.Inc()
	s.mu.Lock()
	s.alone = true
	s.mu.Unlock()
	if s.trouble.deaf.now() {
		s.log.LogAttrs(ctx, slog.LevelWarn, "redis refuses a subscription: chunks come up to -reconcile late", slog.String("redis", s.trouble.at),
			slog.String("says", text), slog.String("remedy", "give the user of -redis the rights to its channels and to subscribe: docs/redis.md, ACL SETUSER"))
	}
}

// note records whether Redis has acknowledged a subscription, and returns the channel's listener.
func (s *subscriber) note(channel string, stands bool) Listener {
	s.mu.Lock()
	defer s.mu.Unlock()
	if stands {
		s.heard[channel] = true
	} else {
		delete(s.heard, channel)
	}
	return s.listeners[channel]
}

// hears reports whether Redis has acknowledged a subscription.
func (s *subscriber) hears(channel string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.heard[channel]
}

func (s *subscriber) count() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.listeners)
}

var (
	errSilent  = errors.New("no sign of life from redis")
	errRefused = errors.New("redis refuses a subscription")
)

func (s *subscriber) listener(channel string) Listener {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.listeners[channel]
}

// shards holds the sessions of a Cluster. It has a connection to each master, because only the master of its slot
// delivers a sharded channel. It compares channels and masters now and then, and whenever something seems wrong. Reads
// of the log find what is missed until then.
type shards struct {
	cluster *redis.ClusterClient
	cfg     Config
	metrics *metrics
	trouble *refusals
	wide    *subscriber // for ordinary channels, which every server delivers
	kick    chan struct{}
	quit    context.CancelFunc
	done    chan struct{}

	mu      sync.Mutex
	masters map[string]*subscriber // by address
	homes   map[string]home        // by channel
}

// home is where a channel is listened to.
type home struct {
	l       Listener
	address string // empty: nowhere yet
}

func newShards(cluster *redis.ClusterClient, cfg Config, m *metrics, r *refusals) *shards {
	ctx, cancel := context.WithCancel(context.Background())
	s := &shards{
		cluster: cluster, cfg: cfg, metrics: m, trouble: r, kick: make(chan struct{}, 1), quit: cancel, done: make(chan struct{}),
		masters: map[string]*subscriber{}, homes: map[string]home{},
	}
	s.wide = newSubscriber(cfg, m, r, ordinary, func(ctx context.Context) (*redis.PubSub, error) { return cluster.Subscribe(ctx), nil }, nil)
	go func() { // close ends it and waits for it
		defer close(s.done)
		s.tend(ctx)
	}()
	return s
}

func (s *shards) listenWide(channel string, l Listener) (stop func()) {
	return s.wide.listen(channel, l)
}

func (s *shards) listen(channel string, l Listener) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settle(channel, home{l: l})
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if h := s.homes[channel]; h.l == l {
			delete(s.homes, channel)
			if sub := s.masters[h.address]; sub != nil {
				sub.remove(channel, l)
			}
		}
	}
}

// settle subscribes a channel at the master that has its slot now. mu must be held.
func (s *shards) settle(channel string, h home) {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Timeout)
	defer cancel()
	address := ""
	if master, err := s.cluster.MasterForKey(ctx, channel); err == nil {
		address = master.Options().Addr
	} else {
		s.amiss()
	}
	old := s.masters[h.address]
	if address == "" || address == h.address && old.hears(channel) {
		s.homes[channel] = h
		return
	}
	if old != nil {
		old.remove(channel, h.l)
	}
	sub := s.masters[address]
	if sub == nil {
		sub = newSubscriber(s.cfg, s.metrics, s.trouble, sharded, func(ctx context.Context) (*redis.PubSub, error) { return s.open(ctx, address) }, s.amiss)
		s.masters[address] = sub
	}
	h.address = address
	s.homes[channel] = h
	sub.add(channel, h.l)
}

// open connects to the master at an address, through the cluster's client for it.
func (s *shards) open(ctx context.Context, address string) (ps *redis.PubSub, err error) {
	var mu sync.Mutex // ForEachMaster calls the function concurrently
	err = s.cluster.ForEachMaster(ctx, func(ctx context.Context, master *redis.Client) error {
		mu.Lock()
		defer mu.Unlock()
		if master.Options().Addr == address && ps == nil {
			ps = master.SSubscribe(ctx)
		}
		return nil
	})
	if ps == nil {
		return nil, errors.Join(err, errNoMaster)
	}
	return ps, nil
}

// amiss requests a comparison soon.
func (s *shards) amiss() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// tend keeps channels at the masters of their slots, and drops masters without channels.
func (s *shards) tend(ctx context.Context) {
	const calm, hasty = 5 * time.Second, 100 * time.Millisecond
	for {
		select {
		case <-time.After(calm):
		case <-s.kick:
			s.cluster.ReloadState(ctx)
			select { // a move takes a moment, and this merges many kicks
			case <-time.After(hasty):
			case <-ctx.Done():
			}
		case <-ctx.Done():
			return
		}
		if ctx.Err() != nil {
			return
		}
		for _, idle := range s.compare() {
			idle.close()
		}
	}
}

// compare settles every channel, and returns the masters that are left without one.
func (s *shards) compare() (idle []*subscriber) {
	s.mu.Lock()
	defer s.mu.Unlock()
	used := map[string]bool{}
	for channel, h := range s.homes {
		s.settle(channel, h)
		used[s.homes[channel].address] = true
	}
	for address, sub := range s.masters {
		if !used[address] {
			idle = append(idle, sub)
			delete(s.masters, address)
		}
	}
	return idle
}

func (s *shards) redial() {
	s.amiss()
	s.wide.redial()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sub := range s.masters {
		sub.redial()
	}
}

func (s *shards) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.homes) + s.wide.count()
}

func (s *shards) close() {
	s.quit()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sub := range s.masters {
		sub.close()
	}
	s.wide.close()
}
