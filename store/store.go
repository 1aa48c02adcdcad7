// Package store keeps logs in Redis, and is the only place that knows how.
//
// A log is a list (chat:history:<id>, one JSON object a chunk) beside a hash
// (chat:session:<id>) that says what the list cannot: its epoch, the base of its
// numbers, and what was seen at its end. The chunk at position i has number
// base+i; nothing else numbers anything, so that a program which knows nothing of
// this one can push to the list and is understood.
//
// Each operation is one Lua script, so what it answers is true of one instant, and
// what it changes is changed whole. Every script begins by checking that the list is
// the one that was seen last (log.lua): a list that was flushed, replaced or cut by
// other hands gets a new epoch, and its numbers go on where the old ones ended, so
// that no number ever means two chunks.
//
// Promised: a chunk that Append acknowledged is in the list, once. Not promised: that
// a Listener hears of it. Pub/Sub is a hint and loses messages whenever a connection
// breaks; who needs all chunks reads the log whenever Resync is called, and now and
// then without being asked.
package store

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// Config says where the logs are and how long they are kept.
type Config struct {
	// Redis is "embedded" (in this process, in memory) or a redis:// or rediss:// URL.
	Redis string
	// Dial makes the connections to Redis, if not nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// HistoryTTL is how long a list is kept after its last use. A day: an answer is
	// read again the next morning, hardly ever later.
	HistoryTTL time.Duration
	// SessionTTL is how long the hash is kept. It outlives the list by far, so that
	// numbers go on, and are not reused, when somebody comes back to an expired log.
	SessionTTL time.Duration
	// HistoryMax is how many chunks of a log are kept. 100,000 words are a long book.
	HistoryMax int
	// Grace is how long the messages of an upload outlive it: one that breaks off and has
	// a producer's numbers, or one whose node dies. 30 s: a producer is back by then, and
	// a reader waits that long for the next word.
	Grace time.Duration
	// HistoryOrder is OldestFirst (producers RPUSH) or NewestFirst (producers LPUSH).
	HistoryOrder string
	// Listeners is how many Pub/Sub connections sessions are spread over. One would
	// do until its output buffer is the limit; a few keep a slow moment of one apart.
	Listeners int
	// Ping is how long a Pub/Sub connection may be silent before it is asked for a
	// sign of life, and how long it then has to give one.
	Ping time.Duration
	// Timeout bounds a command that got no answer.
	Timeout time.Duration

	Logger *slog.Logger
}

// The two ends of the list that producers may push to.
const (
	OldestFirst = "oldest-first"
	NewestFirst = "newest-first"
)

// Embedded is the Config.Redis of the in-process Redis.
const Embedded = "embedded"

// DefaultConfig is what the flags start from.
func DefaultConfig() Config {
	return Config{
		Redis:        Embedded,
		HistoryTTL:   24 * time.Hour,
		SessionTTL:   30 * 24 * time.Hour,
		HistoryMax:   100_000,
		Grace:        30 * time.Second,
		HistoryOrder: OldestFirst,
		Listeners:    2,
		Ping:         5 * time.Second,
		Timeout:      3 * time.Second,
		Logger:       slog.New(slog.DiscardHandler),
	}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	if c.Redis != Embedded {
		if _, err := redis.ParseURL(c.Redis); err != nil {
			errs = append(errs, fmt.Errorf("-redis: %q or a redis:// or rediss:// URL: %w", Embedded, err))
		}
	}
	if c.HistoryTTL < time.Second {
		errs = append(errs, fmt.Errorf("-history-ttl: %v is less than a second", c.HistoryTTL))
	}
	if c.HistoryMax < 1 {
		errs = append(errs, fmt.Errorf("-history-max: %d is less than one chunk", c.HistoryMax))
	}
	if c.Grace < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("-grace: %v is less than 100ms", c.Grace))
	}
	if c.HistoryOrder != OldestFirst && c.HistoryOrder != NewestFirst {
		errs = append(errs, fmt.Errorf("-history-order: %q is neither %s nor %s", c.HistoryOrder, OldestFirst, NewestFirst))
	}
	return errors.Join(errs...)
}

// Errors that callers tell apart. Everything else that a Store returns is a fault
// that nobody foresaw.
var (
	// ErrAway says that Redis cannot serve now, and that the command was surely not
	// executed.
	ErrAway = errors.New("redis is away")
	// ErrOutcomeUnknown says that a command was sent and its answer lost: it may or
	// may not have been executed, and is not repeated here.
	ErrOutcomeUnknown = errors.New("redis did not answer: the outcome is unknown")
	ErrNotFound       = errors.New("no such session")
	ErrSessionEnded   = errors.New("the session has ended")
	ErrSessionDeleted = errors.New("the session was deleted")
	// ErrProducerConflict says that the log has something else under a producer's number.
	ErrProducerConflict = errors.New("the producer has posted something else under this number")
	ErrMessageUnknown   = errors.New("no such message")
)

// RefusedError says which chunk of an append the log does not take, and why. Those
// before it would be taken.
type RefusedError struct {
	Index int
	Err   error
}

func (e *RefusedError) Error() string { return e.Err.Error() }
func (e *RefusedError) Unwrap() error { return e.Err }

// MessageEndedError refuses a chunk of a message that has ended.
type MessageEndedError struct {
	MessageID string
	How       string // done, failed, cancelled (each by a chunk), or Stopped
}

// Stopped is how a message ended that Cancel ended.
const Stopped = "stopped"

func (e *MessageEndedError) Error() string {
	how := e.How
	if how == Stopped {
		how = TypeCancelled
	}
	return fmt.Sprintf("message %q has ended: it is %s", e.MessageID, how)
}

// FencedError refuses a producer of an older epoch than the session knows.
type FencedError struct{ Epoch int64 }

func (e *FencedError) Error() string {
	return fmt.Sprintf("another producer has taken over: its epoch is %d", e.Epoch)
}

// GapError refuses chunks in front of which a producer's numbers are missing.
type GapError struct{ Expected int64 }

func (e *GapError) Error() string {
	return fmt.Sprintf("chunks of the producer are missing: the next one is number %d", e.Expected)
}

// Store is the logs of one Redis. Its methods may be called from many goroutines.
type Store struct {
	cfg     Config
	rdb     redis.UniversalClient
	scripts [3]script
	subs    []*subscriber
	log     *slog.Logger
	closers []func()
}

const (
	scriptAppend = iota
	scriptRead
	scriptSession
)

//go:embed log.lua
var luaLog string

//go:embed append.lua
var luaAppend string

//go:embed read.lua
var luaRead string

//go:embed session.lua
var luaSession string

// script is a Lua program and its name in Redis's cache.
type script struct{ text, sha string }

// Open connects to Redis. It does not wait for it: a Redis that is away now is away
// like one that goes away later.
func Open(cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	redis.SetLogger(redisLog{cfg.Logger}) // the library has one logger for all its clients
	s := &Store{cfg: cfg, log: cfg.Logger}
	for i, text := range []string{luaAppend, luaRead, luaSession} {
		text = luaLog + text
		s.scripts[i] = script{text, redis.NewScript(text).Hash()}
	}
	opt := &redis.Options{Addr: "127.0.0.1:0"} // of nobody: the embedded one has none
	switch {
	case cfg.Redis != Embedded:
		var err error
		if opt, err = redis.ParseURL(cfg.Redis); err != nil {
			return nil, fmt.Errorf("parse redis URL: %w", err)
		}
	case cfg.Dial == nil:
		embedded, err := openEmbedded()
		if err != nil {
			return nil, fmt.Errorf("open the embedded redis: %w", err)
		}
		cfg.Dial = embedded.dial
		s.closers = append(s.closers, embedded.close)
	}
	opt.Dialer = cfg.Dial
	// Nothing is repeated behind our back: an append that is sent twice is stored twice.
	opt.MaxRetries = -1
	opt.DialerRetries = 1
	opt.DialTimeout = 2 * time.Second
	opt.ReadTimeout = cfg.Timeout
	opt.WriteTimeout = cfg.Timeout
	opt.ContextTimeoutEnabled = true
	opt.Protocol = 2 // Pub/Sub is received by our own loop, which needs nothing of RESP3
	opt.DisableIdentity = true
	opt.MaintNotificationsConfig = noMaintNotifications
	s.rdb = redis.NewClient(opt)
	s.closers = append(s.closers, func() { _ = s.rdb.Close() })
	for range cfg.Listeners {
		s.subs = append(s.subs, newSubscriber(s.rdb, cfg))
	}
	return s, nil
}

// Close ends the receive loops, then the connections.
func (s *Store) Close() {
	var wg sync.WaitGroup
	for _, sub := range s.subs {
		wg.Go(sub.close)
	}
	wg.Wait()
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
}

// Ping says whether Redis serves.
func (s *Store) Ping(ctx context.Context) error {
	return classify(s.rdb.Ping(ctx).Err())
}

// redisLog is for what go-redis says of itself: every error comes to us as well.
type redisLog struct{ *slog.Logger }

func (l redisLog) Printf(ctx context.Context, format string, v ...any) {
	l.LogAttrs(ctx, slog.LevelDebug, "go-redis", slog.String("says", fmt.Sprintf(format, v...)))
}

func historyKey(id string) string { return "chat:history:" + id }
func sessionKey(id string) string { return "chat:session:" + id }
func indexKey(id string) string   { return "chat:producers:" + id }
func opensKey(id string) string   { return "chat:messages:" + id }
func channel(id string) string    { return "chat:stream:" + id }

// uploads is a channel for all sessions: a session is named on it when its uploads have
// to look whether they may go on.
const uploads = "chat:uploads"

// Hint is published where the log changed in a way that no chunk says: it was deleted,
// or begins another epoch. It means "read the log"; programs that follow the
// channel themselves may pass over it.
const Hint = `{"type":"hint"}`

// once is a command that go-redis never sends twice.
type once struct{ *redis.Cmd }

func (once) NoRetry() bool { return true }

// run executes a script on one session and returns its reply's fields.
func (s *Store) run(ctx context.Context, which int, id string, args ...any) ([]any, error) {
	epoch, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make an epoch: %w", err)
	}
	sc := s.scripts[which]
	argv := make([]any, 0, 18+len(args))
	argv = append(argv, "evalsha", sc.sha, 5, historyKey(id), sessionKey(id), channel(id), indexKey(id), opensKey(id),
		epoch.String(), s.cfg.HistoryTTL.Milliseconds(), s.cfg.SessionTTL.Milliseconds(), s.cfg.HistoryOrder, "PUBLISH", Hint,
		uploads, s.cfg.HistoryMax, s.cfg.Grace.Milliseconds(), id)
	argv = append(argv, args...)
	cmd := once{redis.NewCmd(ctx, argv...)}
	err = s.rdb.Process(ctx, cmd)
	if redis.HasErrorPrefix(err, "NOSCRIPT") { // surely not executed: Redis was restarted or flushed
		argv[0], argv[1] = "eval", sc.text
		cmd = once{redis.NewCmd(ctx, argv...)}
		err = s.rdb.Process(ctx, cmd)
	}
	if err != nil {
		return nil, classify(err)
	}
	reply, err := cmd.Slice()
	if err != nil || len(reply) == 0 {
		return nil, fmt.Errorf("script answered %v: %w", cmd.Val(), errors.Join(err, errReply))
	}
	return reply, nil
}

var errReply = errors.New("not a reply of ours")

// notExecuted are the error replies by which Redis says that it did nothing.
var notExecuted = []string{
	"LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "OOM", "NOREPLICAS", "BUSY", "NOSCRIPT", "MOVED", "ASK",
	"ERR max number of clients",
}

// classify tells "surely not executed" from "not known".
func classify(err error) error {
	if err == nil {
		return nil
	}
	var op *net.OpError
	var reply redis.Error
	switch {
	case errors.As(err, &reply):
		for _, prefix := range notExecuted {
			if strings.HasPrefix(reply.Error(), prefix) {
				return fmt.Errorf("%w: %w", ErrAway, err)
			}
		}
		return err
	case errors.As(err, &op) && op.Op == "dial", errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted),
		errors.Is(err, redis.ErrClosed):
		return fmt.Errorf("%w: %w", ErrAway, err)
	}
	// Whatever else is no reply of Redis: the connection broke, or time ran out.
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}

// Away says whether err means that Redis cannot be reached, whatever became of the command.
func Away(err error) bool { return errors.Is(err, ErrAway) || errors.Is(err, ErrOutcomeUnknown) }
