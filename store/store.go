// Package store keeps logs in Redis. It is the only package that knows how.
//
// A log is a list (chat:history:<id>, one JSON object per chunk) next to a hash
// (chat:session:<id>; chat: is Config.Prefix). The hash holds what the list cannot: the log's epoch, the base of its
// numbers, and what was last seen at its end. The chunk at position i has number
// base+i. Nothing else numbers anything, so a program that knows nothing of
// this one can push to the list and is understood.
//
// Each operation is one Lua script, so its reply is true of one instant, and
// its changes are made as a whole. Every script first checks that the list is
// the one that was last seen, and that it contains what this node acknowledged or read
// (log.lua, memory.go). A list that was flushed, replaced or cut by another program, or by a
// failover, gets a new epoch. The new epoch's numbers are far above all former ones, so
// that no number ever means two chunks. There are two scripts for appends: push.lua is short and does
// nearly all of them; it leaves the others to append.lua, which handles every case.
//
// A chunk that Append acknowledged is in the list, once. The package does not promise that
// a Listener receives it. Pub/Sub is a hint and loses messages whenever a connection
// breaks. A listener that needs all chunks reads the log whenever Resync is called, and now and
// then without being asked.
package store

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"gapless/store/embedded"
)

// Config says where the logs are kept, and for how long.
type Config struct {
	// Redis is "embedded" (in this process, in memory), "embedded:DIR" (in this process, kept in a directory) or a URL. The URL
	// names one server, the Sentinels of a master, or a Cluster (connect.go).
	Redis string
	// Prefix starts the name of every key and every channel. Deployments that share a Redis need different ones.
	Prefix string
	// RedisCA is a file of certificates that vouch for a rediss:// server, instead of the
	// system's. RedisCert and RedisKey are the files by which we authenticate to it.
	RedisCA, RedisCert, RedisKey string
	// WaitReplicas is how many replicas must have an append before it is acknowledged.
	// WaitTimeout is how long they may take. A failover to one of those replicas then
	// loses nothing that was acknowledged.
	WaitReplicas int
	WaitTimeout  time.Duration
	// Dial makes the connections to Redis, if not nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Instrument, if not nil, is called with the client before it is used.
	Instrument func(client redis.UniversalClient) error
	// HistoryTTL is how long a list is kept after its last use. A day: an answer is
	// read again the next morning, hardly ever later.
	HistoryTTL time.Duration
	// SessionTTL is how long the hash is kept. The hash is kept at least twice as long as the list. It
	// outlives the list by far, so that numbers continue, and are not reused, when somebody
	// returns to an expired log, and so that an ended session stays ended.
	SessionTTL time.Duration
	// HistoryMax is how many chunks of a log are kept. 100,000 words are a long book.
	HistoryMax int
	// HistoryBytes is how many bytes of chunks a log keeps; 0: no limit. 64 MiB are thirty of those books, with their JSON.
	HistoryBytes int
	// NamesMax is how many messages and producers a log may have: their names are kept for as long
	// as the session. 20,000 are two years of thirty questions a day, and 2 MB.
	NamesMax int
	// Grace is how long an upload's messages outlive it, if it breaks off and has
	// a producer's numbers, or if its node dies. 30 s: a producer is back by then, and
	// a reader waits that long for the next word.
	Grace time.Duration
	// HistoryOrder is OldestFirst (producers RPUSH) or NewestFirst (producers LPUSH).
	HistoryOrder string
	// Listeners is how many Pub/Sub connections the sessions are spread over. One is
	// enough until its output buffer is the limit. With several, a slow one does not delay the others.
	Listeners int
	// Ping is how long a Pub/Sub connection may be silent before it is pinged, and
	// how long the reply may then take.
	Ping time.Duration
	// Timeout is how long Redis may take to reply to a command.
	Timeout time.Duration

	Logger *slog.Logger
}

// Values of Config.HistoryOrder: the end of the list to which producers push.
const (
	OldestFirst = "oldest-first"
	NewestFirst = "newest-first"
)

// Embedded is the Config.Redis of the in-process Redis that keeps everything in memory only. If a colon and a directory follow,
// whatever was acknowledged is on disk.
const Embedded = "embedded"

// Embedded reports whether Redis runs in this process. It also returns the data directory, or "" if the data is in memory only.
func (c Config) Embedded() (dir string, embedded bool) {
	name, dir, _ := strings.Cut(c.Redis, ":")
	return dir, name == Embedded
}

// DefaultPrefix is the Config.Prefix of a deployment that has a Redis to itself.
const DefaultPrefix = "chat:"

// maxPrefix limits the cost of the prefix: Redis keeps it with each key, and each script receives it five times per call.
const maxPrefix = 64

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{
		Redis:        Embedded,
		Prefix:       DefaultPrefix,
		HistoryTTL:   24 * time.Hour,
		SessionTTL:   30 * 24 * time.Hour,
		HistoryMax:   100_000,
		HistoryBytes: 64 << 20,
		NamesMax:     20_000,
		Grace:        30 * time.Second,
		HistoryOrder: OldestFirst,
		Listeners:    2,
		Ping:         5 * time.Second,
		Timeout:      3 * time.Second,
		WaitTimeout:  time.Second,
		Logger:       slog.New(slog.DiscardHandler),
	}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	errs = append(errs, validatePrefix(c.Prefix))
	if dir, embedded := c.Embedded(); !embedded {
		opt, err := parseRedis(c)
		if err == nil && opt.DB != 0 && c.Prefix == DefaultPrefix {
			err = fmt.Errorf("-redis, -prefix: database %d needs a -prefix other than %s: the databases of a Redis server share their channels, "+
				"so deployments with the same prefix would receive each other's messages", opt.DB, DefaultPrefix)
		}
		errs = append(errs, err)
	} else {
		if c.Redis != Embedded && dir == "" {
			errs = append(errs, errors.New("-redis: embedded: needs a directory after the colon; embedded without a colon keeps everything in memory only"))
		}
		if c.WaitReplicas > 0 {
			errs = append(errs, errors.New("-wait-replicas: the embedded Redis has no replicas"))
		}
	}
	if c.WaitReplicas < 0 {
		errs = append(errs, fmt.Errorf("-wait-replicas: must not be negative (%d)", c.WaitReplicas))
	}
	if c.WaitReplicas > 0 && (c.WaitTimeout < 10*time.Millisecond || c.WaitTimeout >= c.Timeout) {
		errs = append(errs, fmt.Errorf("-wait-timeout: must be at least 10ms and less than %v (%v)", c.Timeout, c.WaitTimeout))
	}
	if c.HistoryTTL < time.Second || c.HistoryTTL > mostTTL {
		errs = append(errs, fmt.Errorf("-history-ttl: must be between a second and a hundred years (%v)", c.HistoryTTL))
	}
	if c.HistoryMax < 1 {
		errs = append(errs, fmt.Errorf("-history-max: must be at least 1 (%d)", c.HistoryMax))
	}
	if c.HistoryBytes != 0 && c.HistoryBytes < leastBytes {
		errs = append(errs, fmt.Errorf("-history-bytes: must be at least %d, or 0 for no limit (%d)", leastBytes, c.HistoryBytes))
	}
	if c.NamesMax < 1 {
		errs = append(errs, fmt.Errorf("-session-names: must be at least 1 (%d)", c.NamesMax))
	}
	if c.Grace < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("-grace: must be at least 100ms (%v)", c.Grace))
	}
	if c.HistoryOrder != OldestFirst && c.HistoryOrder != NewestFirst {
		errs = append(errs, fmt.Errorf("-history-order: must be %s or %s (%q)", OldestFirst, NewestFirst, c.HistoryOrder))
	}
	return errors.Join(errs...)
}

// leastBytes is the smallest HistoryBytes.
const leastBytes = 1 << 10

// mostTTL is the longest HistoryTTL.
const mostTTL = 100 * 365 * 24 * time.Hour

// validatePrefix accepts what means the same in a key, in a pattern of an ACL rule and on a shell's command line. Braces would
// choose the slot in a Cluster, and the session must choose it.
func validatePrefix(prefix string) error {
	if prefix == "" || len(prefix) > maxPrefix {
		return fmt.Errorf("-prefix: must have 1 to %d characters, not %d", maxPrefix, len(prefix))
	}
	for _, r := range prefix {
		if r <= ' ' || r > '~' || strings.ContainsRune(`{}*?[]\`, r) {
			return fmt.Errorf("-prefix: must be printable ASCII without spaces and without { } * ? [ ] \\ (it has %q)", r)
		}
	}
	return nil
}

// Errors that callers tell apart. All other errors of a Store are unforeseen faults.
var (
	// ErrAway says that Redis cannot serve now, and that the command was certainly not
	// executed. An AwayError says why; Why returns its code.
	ErrAway = errors.New("redis is away")
	// ErrWrongType says that a key of the session has a type that no script gives it: another program wrote it.
	ErrWrongType = errors.New("a key of the session has the wrong type")
	// ErrOutcomeUnknown says that a command was sent and its reply was lost. It may or
	// may not have been executed, and the store does not repeat it.
	ErrOutcomeUnknown = errors.New("redis did not answer: the outcome is unknown")
	ErrNotFound       = errors.New("no such session")
	ErrSessionEnded   = errors.New("the session has ended")
	ErrSessionDeleted = errors.New("the session was deleted")
	// ErrProducerConflict says that the log holds something else under a producer's number.
	ErrProducerConflict = errors.New("the producer has posted something else under this number")
	ErrMessageUnknown   = errors.New("no such message")
	// ErrNotMade says that the session does not exist, and that the call must not create it.
	ErrNotMade = errors.New("no session is made")
)

// RefusedError says which chunk of an append the log refuses, and why. The chunks
// before it would be accepted.
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

// Stopped is the MessageEndedError.How of a message that Cancel ended.
const Stopped = "stopped"

func (e *MessageEndedError) Error() string {
	how := e.How
	if how == Stopped {
		how = TypeCancelled
	}
	return fmt.Sprintf("message %q has ended: it is %s", e.MessageID, how)
}

// FullError refuses a chunk whose message, or whose producer, is new to the log. The log already has as many of them
// as it may, or up to a dozen more.
type FullError struct{ Most int }

func (e *FullError) Error() string {
	return fmt.Sprintf("limit of %d messages and producers per session reached (-session-names): continue in another session", e.Most)
}

// FencedError refuses a producer whose epoch is older than the one that the session knows.
type FencedError struct{ Epoch int64 }

func (e *FencedError) Error() string {
	return fmt.Sprintf("another producer has taken over: its epoch is %d", e.Epoch)
}

// GapError refuses chunks if the producer's numbers before them are missing.
type GapError struct{ Expected int64 }

func (e *GapError) Error() string {
	return fmt.Sprintf("chunks of the producer are missing: the next number is %d", e.Expected)
}

// Store holds the logs of one Redis. Its methods are safe for concurrent use.
type Store struct {
	cfg       Config
	rdb       redis.UniversalClient
	scripts   [len(scriptNames)]script
	pipes     [len(scriptNames)]*pipe
	large     *queue // for reads of more than largeRead bytes
	clustered bool
	thorough  bool // append.lua does everything (for a test)
	dials     *dials
	refusals  *refusals
	servers   servers
	probes    probes
	ears      ears
	overheard overheard
	memory    memory
	metrics   *metrics
	log       *slog.Logger
	closers   []func()
}

const (
	scriptPush = iota
	scriptAppend
	scriptRead
	scriptSession
	scriptTicket
	// The same for a full Redis: these scripts free memory, or need so little that Redis can spare it.
	scriptSessionFull
	scriptTicketFull
)

// scriptNames are the scripts' names in the metrics, where a push counts as an append.
var scriptNames = [...]string{"append", "append", "read", "session", "ticket", "session", "ticket"}

//go:embed log.lua
var luaLog string

//go:embed run.lua
var luaRun string

//go:embed push.lua
var luaPush string

//go:embed append.lua
var luaAppend string

//go:embed read.lua
var luaRead string

//go:embed session.lua
var luaSession string

//go:embed ticket.lua
var luaTicket string

// allowFull lets a full Redis execute a script, from version 7 on. An older Redis refuses the line.
const allowFull = "#!lua flags=allow-oom\n"

// script is a Lua program and its name in Redis's cache.
type script struct{ text, sha string }

func newScript(text string) script { return script{text, redis.NewScript(text).Hash()} }

// Open connects to Redis and does not wait for it. A Redis that is away now is handled
// like one that goes away later.
func Open(cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	redis.SetLogger(redisLog{cfg.Logger}) // the library has one logger for all its clients
	s := &Store{cfg: cfg, log: cfg.Logger}
	for i, text := range [...]string{luaPush, luaLog + luaAppend + luaRun, luaLog + luaRead + luaRun, luaLog + luaSession + luaRun, luaTicket, allowFull + luaLog + luaSession + luaRun, allowFull + luaTicket} {
		s.scripts[i] = newScript(text)
	}
	opt, at := &redis.UniversalOptions{Addrs: []string{"127.0.0.1:0"}}, cfg.Redis // unused by the embedded one, which has no address
	dir, isEmbedded := cfg.Embedded()
	switch {
	case !isEmbedded:
		var err error
		if opt, err = parseRedis(cfg); err != nil {
			return nil, err
		}
		at = place(opt)
	case cfg.Dial == nil:
		r, err := embedded.Open(dir, cfg.Logger)
		if err != nil {
			return nil, fmt.Errorf("open the embedded redis (-redis embedded:DIR, or embedded for memory only): %w", err)
		}
		cfg.Dial = r.Dial
		s.closers = append(s.closers, func() {
			if err := r.Close(); err != nil {
				s.log.LogAttrs(context.Background(), slog.LevelError, "the embedded redis could not be closed", slog.Any("err", err))
			}
		})
	}
	s.metrics = newMetrics(func() int { return s.ears.count() })
	s.dials = &dials{dial: cfg.Dial}
	if cfg.Dial == nil {
		s.dials.dial = redis.NewDialer(&redis.Options{DialTimeout: dialTimeout, TLSConfig: opt.TLSConfig})
	}
	s.refusals = newRefusals(at, cfg, s.metrics, func() { s.ears.redial() })
	s.probes.turn = make(chan struct{}, 1)
	s.rdb = connect(cfg, opt, s.dials.connect, s.servers.connected)
	if cfg.Instrument != nil {
		if err := cfg.Instrument(s.rdb); err != nil {
			return nil, fmt.Errorf("instrument the client of redis: %w", err)
		}
	}
	var turn *turn
	if !isEmbedded { // the embedded Redis needs no network
		var err error
		if turn, err = newTurn(); err != nil {
			return nil, fmt.Errorf("make a pipe: %w", err)
		}
		s.closers = append(s.closers, turn.close)
	}
	s.large = newQueue(largeReads, cfg.Timeout/2)
	for i := range s.pipes {
		run := func(ctx context.Context, calls []*call) { s.exec(ctx, i, calls) }
		bytes := runBytes
		if i == scriptRead { // run.lua limits what the replies hold
			bytes *= 4
		}
		s.pipes[i] = &pipe{run: run, calls: 64, bytes: bytes, patience: cfg.Timeout / 2, turn: turn}
	}
	s.closers = append(s.closers, func() { _ = s.rdb.Close() })
	_, s.clustered = s.rdb.(*redis.ClusterClient)
	s.ears = s.newEars(cfg.Listeners)
	s.probes.simple.Store(isEmbedded) // the embedded Redis has no users, and so no rights
	if cfg.Redis != Embedded {        // the one in memory refuses nothing
		watching, stop := context.WithCancel(context.Background())
		watched := make(chan struct{})
		go func() { // ended by Close, which waits for it
			defer close(watched)
			s.watch(watching)
		}()
		s.closers = append(s.closers, func() { stop(); <-watched })
	}
	return s, nil
}

// Close ends the receive loops, then closes the connections.
func (s *Store) Close() {
	s.ears.close()
	s.overheard.close()
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
}

// redisLog receives what go-redis logs itself. We get every error from the calls as well.
type redisLog struct{ *slog.Logger }

// Printf implements the interface of go-redis's loggers.
func (l redisLog) Printf(ctx context.Context, format string, v ...any) {
	l.LogAttrs(ctx, slog.LevelDebug, "go-redis", slog.String("says", fmt.Sprintf(format, v...)))
}

// key returns the name of one of a session's keys. In a Cluster all of them are in one slot.
func (s *Store) key(what, id string) string {
	if s.clustered {
		id = "{" + id + "}"
	}
	return s.cfg.Prefix + what + ":" + id
}

// Channels for all sessions, after the prefix.
const (
	// uploads names a session whose uploads must check whether they may continue.
	uploads = "uploads"
	// tickets names a ticket whose connection was displaced by a new one.
	tickets = "tickets"
)

// Hint is published when the log changed in a way that no chunk says: it was deleted,
// or it began another epoch. It means "read the log". Programs that subscribe to the
// channel themselves may ignore it.
const Hint = `{"type":"hint"}`

// A read of more than largeRead bytes waits in a separate queue. That queue lets largeReads of them
// run at once.
const (
	largeRead  = 256 << 10
	largeReads = 2
)

// runBytes is how many bytes one run of a script sends, unless one call alone has more. Each chunk counts as chunkCost additional
// bytes. Such a run takes Redis about three milliseconds.
const (
	runBytes  = 256 << 10
	chunkCost = 1 << 10
)

// once is a command that go-redis never sends twice.
type once struct{ *redis.Cmd }

// NoRetry tells go-redis not to retry the command.
func (once) NoRetry() bool { return true }

// run executes a script on one session and returns the fields of its reply. size is about how many bytes it sends
// or wants. If wait is set, run also waits until the replicas have what the script wrote.
func (s *Store) run(ctx context.Context, which int, id string, size int, wait bool, args ...any) (reply []any, failed error) {
	begun := time.Now()
	defer func() {
		s.metrics.ran(which, begun, failed)
		s.refusals.note(ctx, failed)
		if failed == nil && (which == scriptPush || which == scriptAppend) && reply[0] == "ok" {
			s.refusals.accepted()
		}
	}()
	c := &call{session: id, args: args, size: size, wait: wait}
	if which == scriptRead && size > largeRead {
		if failed = s.large.enter(ctx, callerOf(ctx, id)); failed != nil {
			return nil, classify(failed)
		}
		defer s.large.leave()
		s.exec(ctx, which, []*call{c})
		return c.reply, classify(c.err)
	}
	if s.clustered { // sessions may be on different servers
		s.exec(ctx, which, []*call{c})
		return c.reply, classify(c.err)
	}
	reply, failed = s.pipes[which].do(ctx, c)
	return reply, classify(failed)
}

// exec runs a script once for all calls, and stores in each its reply or its error.
func (s *Store) exec(ctx context.Context, which int, calls []*call) {
	replies, short, err := s.eval(ctx, which, calls)
	for i, c := range calls {
		if c.err = err; err != nil {
			continue
		}
		c.reply, _ = replies[i].([]any)
		switch {
		case len(c.reply) == 0:
			c.err = fmt.Errorf("script answered %v: %w", replies[i], errReply)
			continue
		case c.reply[0] == other, c.reply[0] == again && len(c.reply) == 1: // a call that was not executed has nothing to replicate
			c.again = c.reply[0] == again && len(calls) > 1
			continue
		case c.reply[0] == "error":
			c.err = scriptError(fields(c.reply).text(1))
			continue
		case c.reply[0] == "broken":
			c.err = &HalfDoneError{Text: fields(c.reply).text(1)}
			continue
		case c.wait:
			c.err = short
		}
		r := fields(c.reply)
		s.memory.note(c.session, remembered{r.text(1), r.int(2), r.text(3)})
		s.noted(r.text(4))
		if r.err != nil {
			c.err = r.err
		}
	}
}

// noted handles a script's note of what Redis has refused meanwhile.
func (s *Store) noted(note string) {
	what, text, _ := strings.Cut(note, " ")
	switch what {
	case "unheard":
		s.hintFailed(text)
	case "refused":
		s.writesRefused(text)
	}
}

// Given tells the store what a feed has given out without having read it, so that the store remembers it.
func (s *Store) Given(session, epoch string, last int64) {
	s.memory.note(session, remembered{epoch: epoch, last: last})
}

// Witness tells the store that a viewer received chunk last from another node, and that Redis has lost it. The log then continues
// as it does for a node that remembers the chunk.
func (s *Store) Witness(session string, last int64) {
	s.memory.note(session, remembered{last: nextBase(last), mark: "-"}) // log.lua: open
}

// nextBase returns the number after which a new epoch begins if numbers up to top were in use (log.lua: next_base).
func nextBase(top int64) int64 {
	const block, margin = 1_000_000, 500_000
	return (top + margin + block - 1) / block * block
}

// ReplacedAt returns when this node last found another Redis server than before, or the same one restarted, in milliseconds since 1970, or 0.
func (s *Store) ReplacedAt() int64 { return s.servers.replacedAt.Load() }

// eval returns a reply for each call. If the server is not the master, it did not execute the script, and eval asks once more
// on a new connection. After that, any server may serve reads. short says that the calls are stored, but on too few replicas.
func (s *Store) eval(ctx context.Context, which int, calls []*call) (replies []any, short, err error) {
	generation := s.dials.generation.Load()
	replies, short, err = s.evalOnce(ctx, which, calls)
	if s.elsewhere(err) && s.dials.generation.Load() > generation {
		replies, short, err = s.evalOnce(ctx, which, calls)
	}
	return replies, short, err
}

// elsewhere reports whether err says that the server is not the master. In that case, and if the server is silent, it drops the connections.
func (s *Store) elsewhere(err error) bool {
	if reply := redis.Error(nil); errors.As(err, &reply) {
		if leadsElsewhere(reply.Error()) {
			s.dropped()
			return true
		}
		return false
	}
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() && !errors.Is(err, errUnsent) {
		s.dials.drop()
	}
	return false
}

// dropped replaces all connections. It first asks a Cluster for its current masters.
func (s *Store) dropped() {
	s.dials.drop()
	if cluster, ok := s.rdb.(*redis.ClusterClient); ok {
		cluster.ReloadState(context.Background())
	}
}

func (s *Store) evalOnce(ctx context.Context, which int, calls []*call) (replies []any, short, err error) {
	argv, err := s.argv(which, calls)
	if err != nil {
		return nil, nil, err
	}
	send := s.send
	if slices.ContainsFunc(calls, func(c *call) bool { return c.wait }) {
		send = s.sendAndWait
	}
	cmd, short, err := s.sendScript(ctx, which, argv, send)
	if err != nil {
		return nil, nil, err
	}
	if replies, err = cmd.Slice(); err == nil && len(replies) != len(calls) {
		err = fmt.Errorf("script answered %v: %w", cmd.Val(), errReply)
	}
	return replies, short, err
}

// keys returns the kinds of keys that a script receives for each call.
func keys(which int) []string {
	all := [...]string{"history", "session", "stream", "producers", "messages"}
	if which == scriptPush {
		return all[:4]
	}
	return all[:]
}

// argv returns the command that runs a script for all calls.
func (s *Store) argv(which int, calls []*call) ([]any, error) {
	keys := keys(which)
	size := 15
	for _, c := range calls {
		size += len(keys) + 4 + len(c.args)
	}
	argv := make([]any, 0, size)
	argv = append(argv, "evalsha", s.scripts[which].sha, len(keys)*len(calls))
	for _, c := range calls {
		for _, what := range keys {
			argv = append(argv, s.key(what, c.session))
		}
	}
	publish := "PUBLISH"
	if s.clustered {
		publish = "SPUBLISH"
	}
	ttl, grace := s.cfg.HistoryTTL.Milliseconds(), s.cfg.Grace.Milliseconds()
	sessionTTL := max(s.cfg.SessionTTL.Milliseconds(), 2*ttl)
	if which == scriptPush {
		argv = append(argv, ttl, sessionTTL, s.cfg.HistoryOrder, publish, s.cfg.HistoryMax, grace, s.cfg.HistoryBytes)
		for _, c := range calls {
			m := s.memory.get(c.session)
			argv = append(append(argv, m.epoch, m.last, m.mark), c.args...)
		}
		return argv, nil
	}
	random, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make an epoch: %w", err)
	}
	argv = append(argv, random.String(), ttl, sessionTTL, s.cfg.HistoryOrder, publish, Hint, s.cfg.Prefix+uploads, s.cfg.HistoryMax, grace, s.cfg.NamesMax, s.tolerant(), s.cfg.HistoryBytes)
	for _, c := range calls {
		m := s.memory.get(c.session)
		argv = append(append(argv, m.epoch, m.last, m.mark, len(c.args)), c.args...)
	}
	return argv, nil
}

// sendScript sends a script by its hash. If Redis does not know the hash, it sends the text.
func (s *Store) sendScript(ctx context.Context, which int, argv []any, send func(context.Context, []any) (*redis.Cmd, error, error)) (cmd *redis.Cmd, short, err error) {
	fresh := func() (*redis.Cmd, error, error) {
		for {
			// Each pooled connection from before a failover fails once this way, and is then gone.
			if cmd, short, err := send(ctx, argv); !errors.Is(err, errStale) {
				return cmd, short, err
			}
		}
	}
	cmd, short, err = fresh()
	if redis.HasErrorPrefix(err, "NOSCRIPT") { // certainly not executed: Redis was restarted or flushed
		argv[0], argv[1] = "eval", s.scripts[which].text
		cmd, short, err = fresh()
	}
	return cmd, short, err
}

// scriptError is the error that Redis returned to a command in a script.
type scriptError string

func (e scriptError) Error() string { return string(e) }
func (scriptError) RedisError()     {}

// send sends a command once. In a Cluster it repeats the command while its slot moves.
func (s *Store) send(ctx context.Context, argv []any) (cmd *redis.Cmd, short, err error) {
	for pause := redirectPause; ; pause *= 2 {
		cmd := redis.NewCmd(ctx, argv...)
		err := s.rdb.Process(ctx, once{cmd})
		if !s.clustered || !redis.HasErrorPrefix(err, "TRYAGAIN") || pause > redirectMost {
			return cmd, nil, err
		}
		time.Sleep(pause) // some of the session's keys have already moved: the command was not executed
	}
}

// A session that is in a moving slot moves within moments.
const (
	redirectPause = 5 * time.Millisecond
	redirectMost  = 500 * time.Millisecond
)

// sendAndWait sends a command once, and on the same connection waits until replicas have
// it. WAIT counts only the writes of its own connection, and scripts may not use it. So
// sendAndWait itself follows the redirections of a Cluster.
func (s *Store) sendAndWait(ctx context.Context, argv []any) (cmd *redis.Cmd, short, err error) {
	for pause := redirectPause; ; pause *= 2 {
		master, err := s.master(ctx, argv[3].(string))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errNoMaster, err)
		}
		cmd, pipe := redis.NewCmd(ctx, argv...), master.Pipeline()
		_ = pipe.Process(ctx, once{cmd})
		wait := pipe.Do(ctx, "wait", s.cfg.WaitReplicas, s.cfg.WaitTimeout.Milliseconds())
		_, _ = pipe.Exec(ctx)
		err = cmd.Err()
		if err == nil {
			n, short := wait.Int()
			if short == nil && n < s.cfg.WaitReplicas {
				short = fmt.Errorf("%w: it is stored, but %d of %d replicas have it (-wait-replicas)", ErrOutcomeUnknown, n, s.cfg.WaitReplicas)
			}
			return cmd, short, nil
		}
		cluster, clustered := s.rdb.(*redis.ClusterClient)
		moved := redis.HasErrorPrefix(err, "MOVED") || redis.HasErrorPrefix(err, "ASK") || redis.HasErrorPrefix(err, "TRYAGAIN")
		if !clustered || !moved || pause > redirectMost {
			return nil, nil, err
		}
		cluster.ReloadState(ctx)
		time.Sleep(pause)
	}
}

// Errors of commands that were certainly not sent.
var (
	errNoMaster = errors.New("no master is known")
	errUnsent   = errors.New("the command was not sent")
	errTurn     = fmt.Errorf("%w: it had no turn", errUnsent)
)

var errReply = errors.New("not a reply of ours")

// classify distinguishes "certainly not executed" from "unknown".
func classify(err error) error {
	if err == nil {
		return nil
	}
	var op *net.OpError
	var reply redis.Error
	switch {
	case errors.As(err, &reply):
		code := refusalIn(reply.Error())
		switch {
		case code == "" && strings.HasPrefix(reply.Error(), "WRONGTYPE"):
			return fmt.Errorf("%w: %w", ErrWrongType, err)
		case code == "":
			return err
		case code == RedisDenied && hintWords.MatchString(reply.Error()): // scripts announce only what they have already done
			return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
		}
		return &AwayError{Code: code, Err: err}
	case errors.As(err, &op) && op.Op == "dial", errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted),
		errors.Is(err, redis.ErrClosed), errors.Is(err, errNoMaster), errors.Is(err, errUnsent):
		return &AwayError{Code: RedisAway, Err: err}
	}
	// Anything else is not a reply of Redis: the connection broke, or time ran out.
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}

// HalfDoneError says that a script failed after its first write. It is an ErrOutcomeUnknown. Text is what Redis replied.
type HalfDoneError struct{ Text string }

func (e *HalfDoneError) Error() string { return "a script failed in the middle: " + e.Text }
func (e *HalfDoneError) Unwrap() error { return ErrOutcomeUnknown }

// Away reports whether err means that Redis cannot be reached, whether or not the command was executed.
func Away(err error) bool { return errors.Is(err, ErrAway) || errors.Is(err, ErrOutcomeUnknown) }
