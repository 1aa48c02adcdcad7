package store

import (
	"context"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// Reasons why Redis did not execute a command. Clients, logs and metrics see these words.
const (
	RedisAway     = "redis_away"     // Redis cannot be reached, or is not ready
	RedisFull     = "redis_full"     // OOM: maxmemory is reached
	RedisReadOnly = "redis_readonly" // READONLY, MISCONF, NOREPLICAS: Redis accepts no writes now
	RedisDenied   = "redis_denied"   // NOAUTH, WRONGPASS, NOPERM: Redis denies access, or this command
)

// WritesOK is what Store.Writes returns while Redis refuses nothing.
const WritesOK = "ok"

var refusalCodes = []string{RedisAway, RedisFull, RedisReadOnly, RedisDenied}

// AwayError means that Redis certainly did not execute a command, and gives the reason. It is an ErrAway.
type AwayError struct {
	Code string // RedisAway, RedisFull, RedisReadOnly or RedisDenied
	Err  error
}

func (e *AwayError) Error() string {
	what := map[string]string{RedisFull: "redis is full", RedisReadOnly: "redis takes no writes", RedisDenied: "redis denies access"}[e.Code]
	if what == "" {
		what = ErrAway.Error()
	}
	return what + ": " + e.Err.Error()
}

func (e *AwayError) Unwrap() []error { return []error{ErrAway, e.Err} }

// Why returns the code of an error that is an ErrAway, and an empty string for any other.
func Why(err error) string {
	if e, ok := errors.AsType[*AwayError](err); ok {
		return e.Code
	}
	if errors.Is(err, ErrAway) {
		return RedisAway
	}
	return ""
}

// The words of Redis when it refuses a command. A script returns the error unchanged or, depending on the version of
// Redis, with a prefix ("ERR Error running script …: @user_script: 1: -OOM command not allowed …").
var (
	refusedWord = regexp.MustCompile(`(?:^|[ :-])(OOM|READONLY|MISCONF|NOREPLICAS|NOAUTH|WRONGPASS|NOPERM|DENIED) `)
	deniedWords = []string{"The user executing the script can't", "ACL failure in script", "ERR invalid password", "ERR Client sent AUTH"}
	// Commands that have no effect when refused, but which the scripts send after their first write.
	hintWords = regexp.MustCompile(`publish to the channel|one of the channels|'s?publish'|access the '[^']*' channel`)
)

// refusalIn returns the code of a Redis error, or an empty string if it is no refusal.
func refusalIn(text string) string {
	if m := refusedWord.FindStringSubmatch(text); m != nil {
		switch m[1] {
		case "OOM":
			return RedisFull
		case "READONLY", "MISCONF", "NOREPLICAS":
			return RedisReadOnly
		}
		return RedisDenied
	}
	for _, words := range deniedWords {
		if strings.Contains(text, words) {
			return RedisDenied
		}
	}
	for _, prefix := range notReady {
		if strings.HasPrefix(text, prefix) {
			return RedisAway
		}
	}
	return ""
}

// notReady lists the other error replies after which Redis has done nothing.
var notReady = []string{
	"LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ", "NOSCRIPT", "MOVED", "ASK ", "ERR max number of clients", "ERR DB index is out of range",
}

// leadsElsewhere reports whether a reply comes from a server that is not, or no longer, the master. Dialling its
// address again may then reach the master.
func leadsElsewhere(text string) bool {
	return strings.Contains(text, "READONLY ") || strings.HasPrefix(text, "MASTERDOWN") || strings.HasPrefix(text, "LOADING")
}

// remedyOf returns what an operator can do about a refusal.
func remedyOf(code, text string) string {
	switch {
	case strings.Contains(text, "embedded redis") && code == RedisFull:
		return "make room on the disk of -redis embedded:DIR; viewers are served meanwhile"
	case strings.Contains(text, "embedded redis"):
		return "the disk of -redis embedded:DIR fails: mend it, then start again"
	case code == RedisFull:
		return "raise Redis' maxmemory, or keep less: -history-ttl, -history-max, -history-bytes; viewers are served meanwhile"
	case strings.Contains(text, "MISCONF"):
		return "Redis cannot save to its disk: look at its log and at the disk's free space"
	case strings.Contains(text, "NOREPLICAS"):
		return "too few replicas are connected to Redis (min-replicas-to-write): look at the replicas"
	case code == RedisReadOnly:
		return "the address leads to a replica: let it lead to the master, or use redis+sentinel://"
	case strings.HasPrefix(text, "BUSY "):
		return "a script of another program keeps Redis busy: wait for it, or end it with SCRIPT KILL"
	case strings.Contains(text, "NOPERM") || strings.Contains(text, "script"):
		return "give the user of -redis the rights that it needs: docs/redis.md, ACL SETUSER"
	case code == RedisDenied:
		return "look at the user and the password in -redis, and at ACL LIST in Redis"
	}
	return "start Redis there, or name another one with -redis"
}

// seldom permits an event at most once per interval.
type seldom struct {
	every time.Duration
	mu    sync.Mutex
	last  time.Time
}

func (s *seldom) now() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); s.last.IsZero() || now.Sub(s.last) >= s.every {
		s.last = now
		return true
	}
	return false
}

// refusals knows what Redis refuses now. It logs this for the operator, at most once a minute for each reason.
type refusals struct {
	at      string // the address of Redis, without a password
	log     *slog.Logger
	metrics *metrics
	moved   func() // called when Redis accepts writes again after it was not the master
	wake    chan struct{}
	hints   seldom // limits lines about failed announcements,
	deaf    seldom // about refused subscriptions,
	lost    seldom // and about lost Pub/Sub connections

	well atomic.Bool // code is empty and nothing is left to log

	mu        sync.Mutex
	code      string    // why the last command was refused; empty if it was not
	last      time.Time // when Redis last refused something
	said      map[string]*seldom
	told      bool // the log says that something is refused
	elsewhere bool // a server that is no master has replied
	// elsewhereSince is the time of the first such reply after the last accepted write.
	elsewhereSince time.Time
	reached        bool // Redis has replied since the start
}

// Redis is away for moments at each failover. That is logged more often than refusals that only an operator can end.
const (
	awayEvery    = 30 * time.Second
	refusedEvery = time.Minute
	hintsEvery   = 30 * time.Second
	// settled is how long Redis must refuse nothing before the log says that all is well. A Redis whose memory is
	// nearly full refuses one write and accepts the next.
	settled = 5 * time.Second
)

func newRefusals(at string, cfg Config, m *metrics, moved func()) *refusals {
	r := &refusals{at: at, log: cfg.Logger, metrics: m, moved: moved, wake: make(chan struct{}, 1), hints: seldom{every: hintsEvery}, deaf: seldom{every: hintsEvery}, lost: seldom{every: hintsEvery}, said: map[string]*seldom{}}
	for _, code := range refusalCodes {
		r.said[code] = &seldom{every: refusedEvery}
	}
	r.said[RedisAway].every = awayEvery
	r.well.Store(true)
	return r
}

// refused notes that Redis did not execute a command.
func (r *refusals) refused(code, text string) {
	r.well.Store(false)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = time.Now()
	if leadsElsewhere(text) {
		if r.elsewhere = true; r.elsewhereSince.IsZero() {
			r.elsewhereSince = r.last
		}
	}
	if r.code != code {
		r.code = code
		r.gauge()
	}
	if r.said[code].now() {
		r.told = true
		what := "redis refuses writes"
		switch code {
		case RedisAway:
			what = "redis cannot be reached"
		case RedisDenied:
			what = "redis denies access"
		}
		level := slog.LevelWarn
		if !r.reached && (code == RedisAway || code == RedisDenied) { // most likely -redis is wrong, and only a person can fix that
			level = slog.LevelError
		}
		r.log.LogAttrs(context.Background(), level, what, slog.String("code", code), slog.String("redis", r.at),
			slog.String("says", text), slog.String("remedy", remedyOf(code, text)))
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// answered notes that Redis has replied properly.
func (r *refusals) answered() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reached = true
}

// accepted notes that Redis executed a write.
func (r *refusals) accepted() {
	if r.well.Load() {
		return
	}
	r.mu.Lock()
	moved := r.elsewhere
	r.elsewhere, r.elsewhereSince = false, time.Time{}
	if r.code != "" {
		r.code = ""
		r.gauge()
	}
	if r.told && time.Since(r.last) >= settled {
		r.told = false
		r.log.LogAttrs(context.Background(), slog.LevelInfo, "redis takes writes again", slog.String("redis", r.at))
	}
	r.well.Store(!r.told)
	r.mu.Unlock()
	if moved {
		r.moved()
	}
}

func (r *refusals) gauge() {
	for _, code := range refusalCodes {
		value := 0.0
		if code == r.code {
			value = 1
		}
		r.metrics.refuses.WithLabelValues(code).Set(value)
	}
}

// note records what a classified error says about Redis.
func (r *refusals) note(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil || errors.Is(err, errTurn) || errors.Is(err, errStale) { // this says nothing about Redis
		return
	}
	half, halfDone := errors.AsType[*HalfDoneError](err)
	if code := Why(err); code != "" {
		r.refused(code, deepest(err))
	} else if halfDone {
		if code := refusalIn(half.Text); code != "" {
			r.refused(code, half.Text)
		}
	} else if errors.Is(err, ErrOutcomeUnknown) {
		r.refused(RedisAway, deepest(err))
	}
}

// deepest returns the text of an error without the words that we wrapped around it.
func deepest(err error) string {
	var reply redis.Error
	if errors.As(err, &reply) {
		return reply.Error()
	}
	for {
		switch e := err.(type) {
		case interface{ Unwrap() error }:
			inner := e.Unwrap()
			if inner == nil {
				return err.Error()
			}
			err = inner
		case interface{ Unwrap() []error }:
			all := e.Unwrap()
			if len(all) == 0 {
				return err.Error()
			}
			err = all[len(all)-1]
		default:
			return err.Error()
		}
	}
}

// writesRefused notes the result of a write that a read tried. text is why Redis refused it, or empty if Redis executed
// it.
func (s *Store) writesRefused(text string) {
	if text == "" {
		s.refusals.accepted()
		return
	}
	if leadsElsewhere(text) {
		s.dropped()
	}
	code := refusalIn(text)
	if code == "" {
		code = RedisReadOnly // an unknown refusal
	}
	s.refusals.refused(code, text)
}

// hintFailed notes that a stored chunk could not be announced. text is the reason, or empty if the announcement
// succeeded.
func (s *Store) hintFailed(text string) {
	if text == "" {
		return
	}
	code := refusalIn(text)
	if code != RedisDenied {
		code = hintOther
	}
	s.metrics.hints.WithLabelValues(code).Inc()
	if s.refusals.hints.now() {
		s.log.LogAttrs(context.Background(), slog.LevelWarn, "chunks are stored but not announced: viewers get them up to -reconcile late",
			slog.String("redis", s.refusals.at), slog.String("says", text),
			slog.String("remedy", "give the user of -redis the rights to its channels and to publish: docs/redis.md, ACL SETUSER"))
	}
}

// Writes returns WritesOK, or the code of the reason why Redis refuses writes, as far as this node knows.
func (s *Store) Writes() string {
	s.refusals.mu.Lock()
	defer s.refusals.mu.Unlock()
	if s.refusals.code == "" {
		return WritesOK
	}
	return s.refusals.code
}

// tolerant returns which reads a read-only Redis may serve. Until its address is dialled again it is none (0), then
// reads of logs that continue (1). After readOnlyPatience it is all reads (2), because no better data exists.
func (s *Store) tolerant() int {
	s.refusals.mu.Lock()
	since := s.refusals.elsewhereSince
	s.refusals.mu.Unlock()
	switch {
	case !since.IsZero() && time.Since(since) > readOnlyPatience:
		return 2
	case s.dials.recently():
		return 1
	}
	return 0
}

const readOnlyPatience = 30 * time.Second
