// Package limit limits everything that a stranger can make grow: connections, viewers, uploads,
// answers, memory for bodies, and the rates of sessions, tickets, chunks and calls.
//
// There are two kinds of limit. Places are held for a time and then given back. Rates are used up
// and return with time. Most limits apply to a caller: the subject of its token, or else its
// address. A caller at its limit is refused, and others do not notice.
//
// A refusal names the flag that sets the limit, and says what to do (Error). It is counted in
// gapless_refused_total, and logged once a minute.
//
// A caller need not be one person. Many people share an address behind a NAT, and one person can
// rent many addresses. So the limits of a caller are generous, and the node has limits, too.
package limit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
)

// Config holds the limits. 0 means no limit, except for Connections.
type Config struct {
	// Connections limits the node's connections. 0: as many as it has descriptors for, less a tenth
	// for Redis and files. Without free descriptors, the node cannot accept a connection nor
	// reconnect to Redis.
	Connections int
	// CallerConnections limits the connections of an address. 1,000 is enough for an office: a few
	// hundred people with some tabs each.
	CallerConnections int
	// Strangers limits the connections that have not shown a token yet, if tokens are required
	// (Tokens). Such a connection costs up to 50 KB. CallerStrangers is half of CallerConnections:
	// a few hundred people whose pages are loading.
	Strangers, CallerStrangers int
	// StrangerBytes limits the bytes per second that are read from an address's connections without a token. What
	// they send can cost the node a hundred times what it costs them. Loading a page sends 20 KB.
	StrangerBytes int
	// Viewers limits the node's viewers. 100,000 take 600 MB while they are idle.
	Viewers int
	// CallerViewers is like CallerConnections, and also for a service that views for its users.
	CallerViewers int
	// Uploads limits the node's open uploads. Each is a goroutine, buffers, and a call to Redis
	// every two seconds. 5,000 answers at once are more than Redis can take word by word.
	Uploads int
	// CallerUploads is a tenth of Uploads, so that one caller leaves places to others.
	CallerUploads int
	// Answers limits the node's unfinished answers of the model, which are expensive.
	Answers int
	// CallerAnswers is a quarter of Answers.
	CallerAnswers int
	// Bodies limits the bytes of the node's memory that large bodies take at once. CallerBodies is
	// one caller's share. A body takes three times its length (BodyCost).
	Bodies, CallerBodies int
	// Responses limits the bytes of the node's memory that unfinished requests take, except viewers
	// and uploads, which have their own limits. Each request takes CallCost, and a page takes its
	// size while it is written. CallerResponses is a quarter.
	Responses, CallerResponses int
	// Naive limits the naive viewers of the demo.
	Naive, CallerNaive int

	// CallerCalls is how many calls of /v1 a caller may make per second. The default is five times
	// the calls of a page that fifty people reload as fast as keys repeat.
	CallerCalls int
	// CallerAppends is how many chunks of up to 1 KiB a caller may append per second. A larger
	// chunk counts once per KiB. 10,000 is a thousand answers of ten words per second.
	CallerAppends int
	// CallerStored is how many bytes of chunks a caller may store per day. 256 MiB is a thousand
	// long answers, piece by piece, and a quarter of a Redis of 1 GB. Chunks are kept for -history-ttl, a day.
	CallerStored int
	// CallerSessions is how many sessions a caller may make per second. They are kept for a day,
	// and their names for a month. 50 suffices for a service with four million questions per day.
	CallerSessions int
	// CallerTickets is how many tickets a caller may make per second: one for each stream that a
	// page begins.
	CallerTickets int

	// TrustedProxies are the peers whose X-Forwarded-For names the caller.
	TrustedProxies []netip.Prefix
	// Addresses means that addresses distinguish callers. They do not if all callers share one, as
	// on loopback or with a proxy that is not trusted.
	Addresses bool
	// WriteTimeout is how long a client may accept nothing of a response; 0: no limit. Some time
	// later, the kernel ends a connection on which no handler enforces that.
	WriteTimeout time.Duration
	// Tokens means that callers must show a token.
	Tokens bool

	Logger *slog.Logger
	// Now is the clock of the rates; nil: time.Now.
	Now func() time.Time
}

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{
		CallerConnections: 1_000,
		Strangers:         5_000, CallerStrangers: 500, StrangerBytes: 256 << 10,
		Viewers: 100_000, CallerViewers: 1_000,
		Uploads: 5_000, CallerUploads: 500,
		Answers: 256, CallerAnswers: 64,
		Bodies: 128 << 20, CallerBodies: 64 << 20,
		Responses: 64 << 20, CallerResponses: 16 << 20,
		Naive: 64, CallerNaive: 16,
		CallerCalls: 1_000, CallerAppends: 10_000, CallerStored: 256 << 20, CallerSessions: 50, CallerTickets: 100,
		Addresses: true,
		Logger:    slog.New(slog.DiscardHandler),
	}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	for _, n := range []struct {
		flag  string
		value int
	}{
		{"connections", c.Connections}, {"caller-connections", c.CallerConnections}, {"strangers", c.Strangers}, {"caller-strangers", c.CallerStrangers}, {"stranger-bytes", c.StrangerBytes}, {"viewers", c.Viewers}, {"caller-viewers", c.CallerViewers},
		{"uploads", c.Uploads}, {"caller-uploads", c.CallerUploads}, {"answers", c.Answers}, {"caller-answers", c.CallerAnswers},
		{"bodies", c.Bodies}, {"caller-bodies", c.CallerBodies}, {"responses", c.Responses}, {"caller-responses", c.CallerResponses}, {"naive", c.Naive}, {"caller-naive", c.CallerNaive}, {"caller-calls", c.CallerCalls}, {"caller-appends", c.CallerAppends},
		{"caller-stored", c.CallerStored}, {"caller-sessions", c.CallerSessions}, {"caller-tickets", c.CallerTickets},
	} {
		if n.value < 0 {
			errs = append(errs, fmt.Errorf("-%s: must not be negative (%d); 0 is no limit", n.flag, n.value))
		}
	}
	return errors.Join(errs...)
}

// ParseProxies parses a comma-separated list of addresses and address ranges.
func ParseProxies(text string) (all []netip.Prefix, err error) {
	var errs []error
	for one := range strings.SplitSeq(text, ",") {
		one = strings.TrimSpace(one)
		p, err := netip.ParsePrefix(one)
		if a, bad := netip.ParseAddr(one); bad == nil && a.Zone() == "" {
			p, err = a.Prefix(a.BitLen())
		}
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%q is not an address, or a range such as 10.0.0.0/8", one))
		case p.Bits() == 0:
			errs = append(errs, fmt.Errorf("%s would trust everybody: list the addresses of your proxies", one))
		default:
			all = append(all, p.Masked())
		}
	}
	return all, errors.Join(errs...)
}

// Caller is the subject or the address that a limit applies to. The zero Caller cannot be told from
// others: only the node's limits apply to it.
type Caller struct {
	Subject string
	Address netip.Addr
}

// Error is the refusal of a call that is over a limit.
type Error struct {
	Limit  string // the flag, without its dash
	Most   int    // its value
	What   string // what is limited
	Rate   bool   // the limit is per second,
	Day    bool   // or per day
	Caller bool   // it is the caller's limit, not the node's
	// After is when to retry. It is exact for a rate. A place may become free at any time.
	After time.Duration
}

func (e *Error) Error() string {
	switch after := fmt.Sprintf("%d s", e.Seconds()); {
	case e.Day:
		return fmt.Sprintf("limit of %d %s per caller and day reached (-%s): retry in %s, or ask the operator to raise the limit", e.Most, e.What, e.Limit, after)
	case e.Rate:
		return fmt.Sprintf("limit of %d %s per second and caller reached (-%s): retry in %s", e.Most, e.What, e.Limit, after)
	case e.Caller:
		return fmt.Sprintf("limit of %d %s per caller reached (-%s): close one, or retry in %s", e.Most, e.What, e.Limit, after)
	default:
		return fmt.Sprintf("limit of %d %s of this node reached (-%s): use another node, or retry in %s", e.Most, e.What, e.Limit, after)
	}
}

// Seconds returns After in whole seconds.
func (e *Error) Seconds() int { return max(1, int((e.After+time.Second-1)/time.Second)) }

// Limits holds the limits of a node, and what is in use.
type Limits struct {
	cfg       Config
	extractor echo.IPExtractor
	refused   *prometheus.CounterVec

	connections, strangers                              *Places
	Viewers, Uploads, Answers, Bodies, Responses, Naive *Places
	// StrangerResponses are the half of Responses that callers without a token may use.
	StrangerResponses                 *Places
	Calls, Appends, Sessions, Tickets *Rates
	Stored, heard                     *Rates // bytes

	mu   sync.Mutex
	said map[string]time.Time // when the log last said that a limit was reached
}

// New returns Limits with nothing in use.
func New(cfg Config) *Limits {
	if cfg.Connections == 0 {
		cfg.Connections = descriptors()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	// The library trusts private networks by default.
	trust := []echo.TrustOption{echo.TrustLoopback(false), echo.TrustLinkLocal(false), echo.TrustPrivateNet(false)}
	for _, p := range cfg.TrustedProxies {
		trust = append(trust, echo.TrustIPRange(ipNet(p)))
	}
	l := &Limits{cfg: cfg, said: map[string]time.Time{}, extractor: echo.ExtractIPFromXFFHeader(trust...)}
	l.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gapless_refused_total", Help: "What was refused because a limit was met, by the limit's flag.",
	}, []string{"limit"})
	places := func(what, flag string, node, caller int) *Places {
		return &Places{limits: l, what: what, flag: flag, node: node, caller: caller, of: map[Caller]int{}}
	}
	rates := func(what, flag string, most int) *Rates {
		l.refused.WithLabelValues(flag)
		return &Rates{limits: l, what: what, flag: flag, most: most, per: time.Second, holds: saved, of: map[Caller]*bucket{}}
	}
	l.connections = places("connections", "connections", cfg.Connections, cfg.CallerConnections)
	l.strangers = places("connections without a token", "strangers", cfg.Strangers, cfg.CallerStrangers)
	l.Viewers = places("viewers", "viewers", cfg.Viewers, cfg.CallerViewers)
	l.Uploads = places("concurrent uploads", "uploads", cfg.Uploads, cfg.CallerUploads)
	l.Answers = places("concurrent model answers", "answers", cfg.Answers, cfg.CallerAnswers)
	l.Bodies = places("bytes of bodies in progress", "bodies", cfg.Bodies, cfg.CallerBodies)
	l.Responses = places("bytes of responses in progress", "responses", cfg.Responses, cfg.CallerResponses)
	l.StrangerResponses = places("bytes of responses in progress for callers without a token", "responses", cfg.Responses/2, 0)
	l.Naive = places("naive viewers", "naive", cfg.Naive, cfg.CallerNaive)
	l.refused.WithLabelValues("feeds")
	for _, p := range []*Places{l.connections, l.strangers, l.Viewers, l.Uploads, l.Answers, l.Bodies, l.Responses, l.Naive} {
		l.refused.WithLabelValues(p.flag) // so that a rate is known from the first refusal on
		l.refused.WithLabelValues("caller-" + p.flag)
	}
	l.Calls = rates("calls", "caller-calls", cfg.CallerCalls)
	l.Appends = rates("chunks of up to a KiB", "caller-appends", cfg.CallerAppends)
	l.Stored = rates("bytes of chunks", "caller-stored", cfg.CallerStored)
	l.Stored.per, l.Stored.holds = day, 1
	l.heard = rates("bytes without a token", "stranger-bytes", cfg.StrangerBytes)
	l.Sessions = rates("new sessions", "caller-sessions", cfg.CallerSessions)
	l.Tickets = rates("tickets", "caller-tickets", cfg.CallerTickets)
	return l
}

// Metrics returns the collectors for a Prometheus registry.
func (l *Limits) Metrics() []prometheus.Collector {
	return []prometheus.Collector{l.refused, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "gapless_connections", Help: "TCP connections of clients.",
	}, func() float64 { return float64(l.Connections()) })}
}

// Connections returns how many connections there are.
func (l *Limits) Connections() int { return l.connections.Taken() }

// Refuse counts a refusal, and logs refusals from time to time.
func (l *Limits) Refuse(e *Error) *Error {
	const often = time.Minute
	l.refused.WithLabelValues(e.Limit).Inc()
	now := time.Now()
	l.mu.Lock()
	say := now.Sub(l.said[e.Limit]) >= often // there are few: the names are those of the flags
	if say {
		l.said[e.Limit] = now
	}
	l.mu.Unlock()
	if say {
		l.cfg.Logger.LogAttrs(context.Background(), slog.LevelWarn, "a limit is met: what is over it is refused",
			slog.String("limit", "-"+e.Limit), slog.Int("most", e.Most), slog.String("detail", e.Error()))
	}
	return e
}

// Client returns the address that a request comes from. That is the peer's, or for a trusted proxy
// the last address in X-Forwarded-For that is not a trusted proxy. Forwarded is ignored: a proxy
// that writes one of the two headers passes the other on as a stranger wrote it.
func (l *Limits) Client(r *http.Request) string { return l.extractor(r) }

// Caller returns the caller of a request, by its address. For IPv6 it is the /64, which one
// subscriber has.
func (l *Limits) Caller(r *http.Request) Caller {
	if !l.cfg.Addresses {
		return Caller{}
	}
	a, err := netip.ParseAddr(l.Client(r))
	if err != nil {
		return Caller{}
	}
	return Caller{Address: network(a)}
}

func network(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64) // an IPv6 address always has 64 bits
		a = p.Addr()
	}
	return a
}

// trusts reports whether a peer is a trusted proxy, whose connections belong to others.
func (l *Limits) trusts(a netip.Addr) bool {
	for _, p := range l.cfg.TrustedProxies {
		if p.Contains(a.Unmap().WithZone("")) {
			return true
		}
	}
	return false
}
