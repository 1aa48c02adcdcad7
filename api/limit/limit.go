// Package limit bounds what strangers can make grow: connections, viewers, uploads, answers,
// memory for bodies, and how fast sessions, tickets, chunks and calls may come.
//
// There are two kinds of bound. Places are what is held at once, and given back when it ends.
// Rates are what is used up, and comes back with time. Most bounds are of a caller: the subject
// of its token, or else the address that it comes from. One that is at its bound is refused,
// and the others notice nothing.
//
// A refusal names the flag that sets the bound, and says what to do (Error). It is counted in
// gapless_refused_total, and said in the log once a minute.
//
// Not promised: that callers are people. Many share an address behind a NAT, and one has many
// addresses who rents them; so the bounds are wide, and those of the node stand behind them.
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

// Config is the bounds. 0 is none, but for Connections.
type Config struct {
	// Connections bounds those of the node; 0: as many as it has descriptors for, without the
	// tenth that Redis and files need. At the end of the descriptors nothing can be accepted, and a
	// connection to Redis that broke cannot be made again.
	Connections int
	// CallerConnections bounds those of an address. 1,000: an office behind one, a few hundred
	// people with some tabs each.
	CallerConnections int
	// Strangers bounds the connections on which no token was shown yet, where tokens are wanted (Tokens): such a connection
	// costs up to 50 KB. CallerStrangers is a half of CallerConnections: a few hundred people whose pages are loading.
	Strangers, CallerStrangers int
	// StrangerBytes is how many bytes a second are read from an address's connections on which no token was shown yet: what they
	// send costs the node a hundred times what it costs them. A page that is loaded sends 20 KB.
	StrangerBytes int
	// Viewers bounds those of the node. 100,000 take 600 MB while they are idle.
	Viewers int
	// CallerViewers: as connections, and a service that views for its users.
	CallerViewers int
	// Uploads bounds those under way on the node: each is a goroutine, buffers, and a look at Redis
	// every two seconds. 5,000 answers at once are more than a Redis takes at a word's pace.
	Uploads int
	// CallerUploads is a tenth of them: one caller leaves places to others.
	CallerUploads int
	// Answers bounds those of the model under way on the node, which are dear.
	Answers int
	// CallerAnswers is a quarter of them.
	CallerAnswers int
	// Bodies bounds the bytes that large bodies take in the node's memory at once, and
	// CallerBodies one caller's share: a body takes three times its length (BodyCost).
	Bodies, CallerBodies int
	// Responses bounds the bytes that requests under way take in the node's memory, but for viewers and uploads, which have
	// their own bounds: each request takes CallCost, and a page what it holds while it is written. CallerResponses is a quarter.
	Responses, CallerResponses int
	// Naive bounds the naive viewers of the demo.
	Naive, CallerNaive int

	// CallerCalls is how many calls of /v1 a caller may make in a second: five times what a page
	// does that is reloaded as fast as keys repeat, by fifty people.
	CallerCalls int
	// CallerAppends is how many chunks a caller may append in a second, of up to a KiB; a larger one
	// counts for each KiB. 10,000: a thousand answers, ten words a second each.
	CallerAppends int
	// CallerStored is how many bytes of chunks a caller may store in a day. 256 MiB is a thousand long answers, piece by piece, and a quarter of a Redis of 1 GB;
	// what is stored is kept for -history-ttl, a day.
	CallerStored int
	// CallerSessions is how many sessions a caller may make in a second: they are kept for a day,
	// and what they were called for a month. 50: a service that is asked four million times a day.
	CallerSessions int
	// CallerTickets is how many tickets a caller may make in a second: one for each stream that
	// a page begins.
	CallerTickets int

	// TrustedProxies are the peers whose X-Forwarded-For says who the caller is.
	TrustedProxies []netip.Prefix
	// Addresses says that addresses tell callers apart. Where all come from one, as on loopback, behind
	// a proxy that is not trusted, they do not.
	Addresses bool
	// WriteTimeout is how long a client may take nothing of a response; 0: for ever. A while later the kernel ends a connection on
	// which nobody waits for that.
	WriteTimeout time.Duration
	// Tokens says that callers have to show a token.
	Tokens bool

	Logger *slog.Logger
	// Now is the clock of rates; nil: time.Now.
	Now func() time.Time
}

// DefaultConfig is what the flags start from.
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

// ParseProxies reads addresses and ranges of them, with commas between.
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
			errs = append(errs, fmt.Errorf("-trusted-proxies: %q is not an address, or a range such as 10.0.0.0/8", one))
		case p.Bits() == 0:
			errs = append(errs, fmt.Errorf("-trusted-proxies: %s would trust everybody: list the addresses of your proxies", one))
		default:
			all = append(all, p.Masked())
		}
	}
	return all, errors.Join(errs...)
}

// Caller is who is held to a bound: a subject, or an address. The zero Caller is nobody that can be
// told from others: only the node's bounds hold for it.
type Caller struct {
	Subject string
	Address netip.Addr
}

// Error refuses what is over a bound.
type Error struct {
	Limit  string // the flag, without its dash
	Most   int    // of it
	What   string // what there is too much of
	Rate   bool   // it is so many a second,
	Day    bool   // or a day
	Caller bool   // it is the caller's own bound, not the node's
	// After is when to try again: exactly, of a rate. Others' places may be free at any time.
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

// Seconds is After, in whole ones.
func (e *Error) Seconds() int { return max(1, int((e.After+time.Second-1)/time.Second)) }

// Limits are the bounds of a node, and what is under way within them.
type Limits struct {
	cfg       Config
	extractor echo.IPExtractor
	refused   *prometheus.CounterVec

	connections, strangers                              *Places
	Viewers, Uploads, Answers, Bodies, Responses, Naive *Places
	// StrangerResponses are those of the responses that are for callers without a token: a half.
	StrangerResponses                 *Places
	Calls, Appends, Sessions, Tickets *Rates
	Stored, heard                     *Rates // bytes

	mu   sync.Mutex
	said map[string]time.Time // when the log said last that a bound was met
}

// New begins with nothing under way.
func New(cfg Config) *Limits {
	if cfg.Connections == 0 {
		cfg.Connections = descriptors()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	// The library trusts private networks unless it is told not to.
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
		l.refused.WithLabelValues(p.flag) // so that a rate is known from the first one on
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

// Metrics are the collectors for a Prometheus registry.
func (l *Limits) Metrics() []prometheus.Collector {
	return []prometheus.Collector{l.refused, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "gapless_connections", Help: "TCP connections of clients.",
	}, func() float64 { return float64(l.Connections()) })}
}

// Connections is how many there are.
func (l *Limits) Connections() int { return l.connections.Taken() }

// Refuse counts a refusal, and says in the log that there are some.
func (l *Limits) Refuse(e *Error) *Error {
	const often = time.Minute
	l.refused.WithLabelValues(e.Limit).Inc()
	now := time.Now()
	l.mu.Lock()
	say := now.Sub(l.said[e.Limit]) >= often // the names are those of the flags: there are few
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

// Client is the address that a request comes from: the peer's, or, of a proxy that is trusted, the
// last in X-Forwarded-For that is none of those. Forwarded is not read: a proxy that writes one of
// the two hands the other on as a stranger wrote it.
func (l *Limits) Client(r *http.Request) string { return l.extractor(r) }

// Caller is who a request comes from, by the address. Of IPv6 it is the /64, which is what one subscriber has.
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
		p, _ := a.Prefix(64) // it has as many bits
		a = p.Addr()
	}
	return a
}

// trusts says whether a peer is a proxy whose connections are others'.
func (l *Limits) trusts(a netip.Addr) bool {
	for _, p := range l.cfg.TrustedProxies {
		if p.Contains(a.Unmap().WithZone("")) {
			return true
		}
	}
	return false
}
