package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/redis/go-redis/v9"

	"gapless/store"
	"gapless/store/storetest"
)

// Redis refuses commands: each reason has its name, nothing is stored, logs are readable all the same, and the store
// recovers by itself.

// lines is a log that tests can read.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lines) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

// eventually waits for something that must happen.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	begun := time.Now()
	for !ok() {
		if time.Since(begun) > time.Minute {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// value returns a metric, summed over its labels or for one label.
func value(t *testing.T, s *store.Store, name, label string) (sum float64) {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.Metrics()...)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == name && (label == "" || slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetValue() == label })) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// refusals are ways to make a Redis refuse writes, and to end that.
var refusals = map[string]struct {
	code          string
	begin, end    func(ctx context.Context, r *storetest.Server) error
	unreadable    bool
	says          string
	withoutDryRun bool
}{
	"full": {code: store.RedisFull, says: "OOM", begin: func(ctx context.Context, r *storetest.Server) error {
		return r.ConfigSet(ctx, "maxmemory", "100kb").Err()
	}, end: func(ctx context.Context, r *storetest.Server) error { return r.ConfigSet(ctx, "maxmemory", "0").Err() }},
	"without its replicas": {code: store.RedisReadOnly, says: "NOREPLICAS", begin: func(ctx context.Context, r *storetest.Server) error {
		return r.ConfigSet(ctx, "min-replicas-to-write", "1").Err()
	}, end: func(ctx context.Context, r *storetest.Server) error {
		return r.ConfigSet(ctx, "min-replicas-to-write", "0").Err()
	}},
	"without its disk": {code: store.RedisReadOnly, says: "MISCONF", begin: func(ctx context.Context, r *storetest.Server) error {
		dir := r.ConfigGet(ctx, "dir").Val()["dir"]
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		_ = r.BgSave(ctx).Err()
		for !strings.Contains(r.Info(ctx, "persistence").Val(), "rdb_last_bgsave_status:err") && ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
		return r.ConfigSet(ctx, "save", "3600 1").Err()
	}, end: func(ctx context.Context, r *storetest.Server) error {
		return r.ConfigSet(ctx, "stop-writes-on-bgsave-error", "no").Err()
	}},
	"a replica": {code: store.RedisReadOnly, says: "READONLY", begin: func(ctx context.Context, r *storetest.Server) error {
		return r.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err()
	}, end: func(ctx context.Context, r *storetest.Server) error { return r.Do(ctx, "REPLICAOF", "NO", "ONE").Err() }},
	"another password": {code: store.RedisDenied, says: "WRONGPASS", unreadable: true, begin: func(ctx context.Context, r *storetest.Server) error {
		return errors.Join(r.Do(ctx, "ACL", "SETUSER", "gapless", "resetpass", ">another").Err(), r.Do(ctx, "CLIENT", "KILL", "USER", "gapless").Err())
	}, end: func(ctx context.Context, r *storetest.Server) error {
		return r.Do(ctx, "ACL", "SETUSER", "gapless", "resetpass", ">s3same").Err()
	}},
	"a user that was deleted": {code: store.RedisDenied, says: "WRONGPASS", unreadable: true, begin: func(ctx context.Context, r *storetest.Server) error {
		return r.Do(ctx, "ACL", "DELUSER", "gapless").Err()
	}, end: allow},
	"without the right to push": {code: store.RedisDenied, says: "run this command", begin: func(ctx context.Context, r *storetest.Server) error {
		return r.Do(ctx, "ACL", "SETUSER", "gapless", "-rpush").Err()
	}, end: allow},
	"without the right to its keys": {code: store.RedisDenied, says: "NOPERM", unreadable: true, begin: func(ctx context.Context, r *storetest.Server) error {
		return r.Do(ctx, "ACL", "SETUSER", "gapless", "resetkeys", "~other:*").Err()
	}, end: allow},
	"without the right to run scripts": {code: store.RedisDenied, says: "NOPERM", unreadable: true, begin: func(ctx context.Context, r *storetest.Server) error {
		return r.Do(ctx, "ACL", "SETUSER", "gapless", "-@scripting").Err()
	}, end: allow},
}

func allow(ctx context.Context, r *storetest.Server) error {
	return r.Do(ctx, "ACL", "SETUSER", "gapless", "reset", "on", ">s3same", "~chat:*", "&chat:*", "+@all").Err()
}

func as(r *storetest.Server, user string) string { return "redis://" + user + ":s3same@" + r.Addr() }

func TestRefusal_hasItsNameStoresNothingAndPasses(t *testing.T) {
	for name, c := range refusals {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			r := storetest.Redis(t)
			if err := allow(ctx, r); err != nil {
				t.Fatal(err)
			}
			var log lines
			s := open(t, func(cfg *store.Config) { cfg.Redis, cfg.Logger = as(r, "gapless"), log.logger() })
			mustAppend(t, s, "s", delta("a"))
			if err := s.Probe(ctx); err != nil || s.Writes() != store.WritesOK {
				t.Fatalf("before: %v, writes %s", err, s.Writes())
			}
			if err := c.begin(ctx, r); err != nil {
				t.Fatal(err)
			}
			for range 200 {
				_, err := s.Append(ctx, "s", store.Batch{Chunks: []store.Chunk{delta("b")}})
				if errors.Is(err, store.ErrOutcomeUnknown) {
					continue // its connection was killed
				}
				if !errors.Is(err, store.ErrAway) || store.Why(err) != c.code {
					t.Fatalf("an append: %v, code %q", err, store.Why(err))
				}
				if strings.Contains(err.Error(), "s3same") {
					t.Fatal(err)
				}
			}
			if n := r.LLen(ctx, "chat:history:s").Val(); n != 1 {
				t.Errorf("%d elements are stored", n)
			}
			if s.Writes() != c.code || value(t, s, "gapless_redis_refuses", c.code) != 1 || value(t, s, "gapless_redis_refuses", "") != 1 {
				t.Errorf("writes are said to be %s", s.Writes())
			}
			p, err := s.Read(ctx, "s", 1, lots, lots)
			if c.unreadable {
				if store.Why(err) != c.code {
					t.Errorf("a read: %v", err)
				}
			} else if err != nil || len(p.Elements) != 1 {
				t.Errorf("a read: %+v, %v", p, err)
			}
			eventually(t, "a probe finds it", func() bool {
				err := s.Probe(ctx)
				return s.Writes() == c.code && (c.unreadable && store.Why(err) == c.code || !c.unreadable && err == nil)
			})
			if got := log.String(); strings.Count(got, "code="+c.code) != 1 || !strings.Contains(got, c.says) || !strings.Contains(got, "remedy=") || strings.Contains(got, "s3same") ||
				!strings.Contains(got, r.Addr()) || strings.Count(got, "\n") > 6 {
				t.Errorf("the log:\n%s", got)
			}

			if err := c.end(ctx, r); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is known to be over, though nobody appends", func() bool { return s.Writes() == store.WritesOK })
			mustAppend(t, s, "s", delta("b"))
			eventually(t, "the log says that it is over", func() bool { return strings.Contains(log.String(), "takes writes again") })
		})
	}
}

// The replies of Redis 6, 7 and later, and of compatible servers.
func TestRefusal_isKnownInEveryForm(t *testing.T) {
	for text, want := range map[string]string{
		"OOM command not allowed when used memory > 'maxmemory'.":                                                                       store.RedisFull,
		"OOM command not allowed when used memory > 'maxmemory'. script: c5214646, on @user_script:1.":                                  store.RedisFull,
		"ERR Error running script (call to f_ab): @user_script:7: @user_script: 7: -OOM command not allowed when used memory > 'maxm'.": store.RedisFull,
		"@user_script: 7: -READONLY You can't write against a read only replica.":                                                       store.RedisReadOnly,
		"READONLY You can't write against a read only replica.":                                                                         store.RedisReadOnly,
		"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.":                              store.RedisReadOnly,
		"MISCONF Errors writing to the AOF file: No space left on device":                                                               store.RedisReadOnly,
		"NOREPLICAS Not enough good replicas to write.":                                                                                 store.RedisReadOnly,
		"NOAUTH Authentication required.":                                                                                               store.RedisDenied,
		"NOAUTH HELLO must be called with the client already authenticated":                                                             store.RedisDenied,
		"WRONGPASS invalid username-password pair or user is disabled.":                                                                 store.RedisDenied,
		"ERR invalid password":                                                                             store.RedisDenied,
		"ERR Protocol error: unauthenticated multibulk length":                                             store.RedisDenied,
		"NOPERM this user has no permissions to run the 'evalsha' command":                                 store.RedisDenied,
		"ERR The user executing the script can't run this command or subcommand":                           store.RedisDenied,
		"ERR The user executing the script can't access at least one of the keys mentioned in the command": store.RedisDenied,
		"ERR ACL failure in script: User x has no permissions to run the 'rpush' command":                  store.RedisDenied,
		"NOPERM ACL failure in script: No permissions to access a key":                                     store.RedisDenied,
		"DENIED Redis is running in protected mode because protected mode is enabled":                      store.RedisDenied,
		"LOADING Redis is loading the dataset in memory":                                                   store.RedisAway,
		"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.":                 store.RedisAway,
		"BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.":           store.RedisAway,
		"ERR max number of clients reached":                                                                store.RedisAway,
		"WRONGTYPE Operation against a key holding the wrong kind of value":                                "",
		"ERR user_script:7: attempt to index a nil value":                                                  "",
		"BUSYKEY Target key name already exists.":                                                          "",
		"ERR no such key 'OOM'": "",
	} {
		if got := store.RefusalIn(text); got != want {
			t.Errorf("%q: %q, not %q", text, got, want)
		}
		err := store.Classify(fmt.Errorf("failed to authenticate: %w", store.ScriptError(text)))
		if store.Why(err) != want || errors.Is(err, store.ErrAway) != (want != "") || errors.Is(err, store.ErrOutcomeUnknown) {
			t.Errorf("%q: %v", text, err)
		}
	}
	// Scripts announce what they have stored, so a refusal at that point means that it was done.
	for _, text := range []string{
		"ERR The user executing the script can't publish to the channel mentioned in the command script: cab, on @user_script:1.",
		"ERR ACL failure in script: User x has no permissions to run the 'publish' command",
		"ERR ACL failure in script: User x has no permissions to access the 'chat:stream:s' channel",
	} {
		if err := store.Classify(store.ScriptError(text)); !errors.Is(err, store.ErrOutcomeUnknown) || errors.Is(err, store.ErrAway) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// If its user may not publish, everything is stored, acknowledged and read. The log and a metric say what is missing.
func TestRefusal_withoutChannelsAppendsSucceed(t *testing.T) {
	ctx := t.Context()
	r := storetest.Redis(t)
	if err := r.Do(ctx, "ACL", "SETUSER", "x", "on", ">s3same", "~chat:*", "+@all").Err(); err != nil { // the default for new users in Redis 7
		t.Fatal(err)
	}
	var log lines
	s := open(t, func(c *store.Config) { c.Redis, c.Logger = as(r, "x"), log.logger() })
	eventually(t, "the start says what is missing", func() bool { return strings.Contains(log.String(), "missing=&chat:*") })
	for i := range 20 {
		if a := mustAppend(t, s, "s", delta("a")); a.First != int64(i+1) {
			t.Fatal(a)
		}
	}
	if _, _, err := s.Create(ctx, "t"); err != nil {
		t.Error(err)
	}
	if _, err := s.Append(ctx, "t", store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDelta, "m", "", "a")}}); err != nil {
		t.Error(err)
	}
	if c, err := s.Cancel(ctx, "t", "m"); err != nil || len(c.Messages) != 1 {
		t.Errorf("%+v %v", c, err)
	}
	if err := s.Delete(ctx, "t"); err != nil {
		t.Error(err)
	}
	if s.Writes() != store.WritesOK {
		t.Errorf("writes are said to be %s", s.Writes())
	}
	if n := value(t, s, "gapless_hints_failed_total", store.RedisDenied); n < 20 {
		t.Errorf("%v hints have failed", n)
	}
	if got := log.String(); strings.Count(got, "not announced") != 1 || !strings.Contains(got, "ACL SETUSER") {
		t.Errorf("the log:\n%s", got)
	}
}

// An address moves at a failover. Nobody closes the connections to the old master, which continues as a replica.
func TestFailover_anAddressThatMovesIsDialledAgain(t *testing.T) {
	ctx := t.Context()
	master := storetest.Redis(t)
	replica := storetest.Redis(t)
	replica.Kill()
	replica.StartAsReplica(master)
	f := forward(t, master.Addr())
	var log lines
	s := open(t, func(c *store.Config) { c.Redis, c.Logger = "redis://"+f.addr, log.logger() })
	l := &tail{s: s, id: "s", again: make(chan struct{}, 1)}
	defer s.Listen("s", l)()
	<-l.again
	var wg sync.WaitGroup
	for i := range 20 { // fills the pool
		wg.Go(func() { mustAppend(t, s, fmt.Sprint("p", i), delta("a")) })
	}
	wg.Wait()
	mustAppend(t, s, "s", delta("a"))
	eventually(t, "the replica has it", func() bool { return replica.LLen(ctx, "chat:history:s").Val() == 1 })

	if err := replica.Do(ctx, "REPLICAOF", "NO", "ONE").Err(); err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(replica.Addr())
	if err := master.Do(ctx, "REPLICAOF", host, port).Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(ctx, "s", store.Batch{Chunks: []store.Chunk{delta("x")}}); store.Why(err) != store.RedisReadOnly {
		t.Fatalf("an append to the former master: %v", err)
	}
	if p, err := s.Read(ctx, "s", 1, lots, lots); err != nil || len(p.Elements) != 1 {
		t.Errorf("a read from the former master: %+v %v", p, err)
	}
	f.target.Store(replica.Addr())
	moved := time.Now()
	eventually(t, "appends go through", func() bool {
		_, err := s.Append(ctx, "s", store.Batch{Chunks: []store.Chunk{delta("b")}})
		if err != nil && store.Why(err) != store.RedisReadOnly {
			t.Fatal(err)
		}
		return err == nil
	})
	if took := time.Since(moved); took > 5*time.Second {
		t.Errorf("appends went through after %v", took)
	}
	for i := range 20 {
		mustAppend(t, s, fmt.Sprint("p", i), delta("b"))
	}
	eventually(t, "the subscription has moved", func() bool { return replica.PubSubNumSub(ctx, "chat:stream:s").Val()["chat:stream:s"] == 1 })
	eventually(t, "a chunk is heard", func() bool {
		was := l.heard()
		mustAppend(t, s, "s", delta("c"))
		time.Sleep(20 * time.Millisecond)
		return l.heard() > was
	})
	if n := strings.Count(log.String(), "\n"); n > 6 {
		t.Errorf("the log:\n%s", log.String())
	}
}

// After a timeout on an old master that is silent, the other pooled connections to it are not tried.
func TestFailover_aFormerMasterThatIsSilentCostsOneTimeout(t *testing.T) {
	r := storetest.Redis(t)
	f := forward(t, r.Addr())
	s := open(t, func(c *store.Config) { c.Redis, c.Timeout = "redis://"+f.addr, 500*time.Millisecond })
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() { mustAppend(t, s, fmt.Sprint("p", i), delta("a")) })
	}
	wg.Wait()
	f.mute()
	failed := 0
	eventually(t, "appends go through", func() bool {
		_, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("b")}})
		if err != nil {
			failed++
		}
		return err == nil
	})
	if failed > 3 {
		t.Errorf("%d appends have failed", failed)
	}
}

// A proxy accepts connections and has no Redis: nothing was sent but a greeting.
func TestRefusal_aProxyWithoutRedisIsAway(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	var log lines
	s := open(t, func(c *store.Config) { c.Redis, c.Logger = "redis://:s3same@"+l.Addr().String(), log.logger() })
	for range 50 {
		if _, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("a")}}); store.Why(err) != store.RedisAway {
			t.Fatal(err)
		}
	}
	if s.Writes() != store.RedisAway {
		t.Errorf("writes are said to be %s", s.Writes())
	}
	if got := log.String(); !strings.Contains(got, `msg="redis cannot be reached"`) || !strings.Contains(got, l.Addr().String()) || !strings.Contains(got, "start Redis there") ||
		strings.Contains(got, "s3same") || strings.Count(got, "\n") > 3 {
		t.Errorf("the log:\n%s", got)
	}
}

// A server that accepts connections and never replies is logged at the start, too.
func TestRefusal_aServerThatNeverAnswersIsSaidAtTheStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var log lines
	s := open(t, func(c *store.Config) { c.Redis, c.Logger = "redis://"+l.Addr().String(), log.logger() })
	eventually(t, "it is said", func() bool { return strings.Contains(log.String(), `level=ERROR msg="redis cannot be reached"`) })
	if s.Writes() != store.RedisAway {
		t.Errorf("writes are said to be %s", s.Writes())
	}
}

// An embedded Redis that is slow is this process: nobody can start another one.
func TestRefusal_anEmbeddedRedisThatIsSlowIsNotToBeStarted(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var log lines
	s := open(t, func(c *store.Config) {
		c.Redis, c.Logger, c.Timeout = store.Embedded, log.logger(), 100*time.Millisecond
		c.Dial = func(context.Context, string, string) (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) }
	})
	if _, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("a")}}); !store.Away(err) {
		t.Fatal(err)
	}
	if got := log.String(); !strings.Contains(got, `level=WARN msg="the embedded redis does not reply in time"`) || strings.Contains(got, "start Redis") || !strings.Contains(got, "overloaded") {
		t.Errorf("the log:\n%s", got)
	}
	// It has more time than one that may be away.
	open(t, func(c *store.Config) {
		c.Redis, c.Timeout = store.Embedded, time.Second
		c.Instrument = func(client redis.UniversalClient) error {
			if o := client.(*redis.Client).Options(); o.ReadTimeout != 10*time.Second || o.WriteTimeout != 10*time.Second {
				t.Errorf("a command may take %v and %v", o.ReadTimeout, o.WriteTimeout)
			}
			return nil
		}
	})
}

// Channels that the user may not subscribe to do not affect the others, and a permission granted later is used.
func TestListen_aSubscriptionThatIsRefusedIsAskedForNowAndThen(t *testing.T) {
	ctx := t.Context()
	r := storetest.Redis(t)
	some := func(args ...any) {
		t.Helper()
		if err := r.Do(ctx, append([]any{"ACL", "SETUSER", "x", "on", ">s3same", "~chat:*", "+@all"}, args...)...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	some("&chat:stream:s")
	var log lines
	s := open(t, func(c *store.Config) { c.Redis, c.Logger, c.Listeners = as(r, "x"), log.logger(), 1 })
	heard, deaf := &tail{s: s, id: "s", again: make(chan struct{}, 1)}, &tail{s: s, id: "t", again: make(chan struct{}, 1)}
	defer s.Listen("t", deaf)()
	defer s.Listen("s", heard)()
	eventually(t, "it is asked for again", func() bool { return value(t, s, "gapless_subscriptions_refused_total", "") >= 3 })
	eventually(t, "the channel that is allowed is heard", func() bool {
		r.Publish(ctx, "chat:stream:s", "x")
		time.Sleep(10 * time.Millisecond)
		return heard.heard() > 0
	})
	select {
	case <-deaf.again:
		t.Error("the other one is said to stand")
	default:
	}
	if n := value(t, s, "gapless_pubsub_lost_total", ""); n > 5 {
		t.Errorf("it has dialled %v times", n)
	}
	if got := log.String(); strings.Count(got, "refuses a subscription") != 1 || strings.Count(got, "\n") > 5 || !strings.Contains(got, "ACL SETUSER") {
		t.Errorf("the log:\n%s", got)
	}
	some("&chat:*")
	<-deaf.again
}

func TestProbe_isCheapHoweverOftenItIsAsked(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = r.URL() })
	keys := func() int64 { return r.DBSize(t.Context()).Val() }
	eventually(t, "the start's probe is over", func() bool { return s.Probe(t.Context()) == nil })
	was := r.Info(t.Context(), "commandstats").Val()
	count := func(info string) (n int) {
		for line := range strings.Lines(info) {
			if rest, ok := strings.CutPrefix(line, "cmdstat_evalsha:calls="); ok {
				_, _ = fmt.Sscan(strings.ReplaceAll(rest, ",", " "), &n)
			}
		}
		return n
	}
	begun := time.Now()
	for range 2000 {
		if err := s.Probe(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	most := 2 + int(time.Since(begun)/(500*time.Millisecond))
	if n := count(r.Info(t.Context(), "commandstats").Val()) - count(was); n > most {
		t.Errorf("2000 probes read %d times", n)
	}
	if keys() != 0 {
		t.Errorf("a probe has made keys: %v", r.Keys(t.Context(), "*").Val())
	}
}

// forwarder is a TCP proxy whose target can change: an address that moves. It closes nothing by itself.
type forwarder struct {
	addr   string
	target atomic.Value

	mu    sync.Mutex
	muted []*atomic.Bool
}

func forward(t *testing.T, target string) *forwarder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{addr: l.Addr().String()}
	f.target.Store(target)
	var mu sync.Mutex
	var all []net.Conn
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range all {
			_ = c.Close()
		}
	})
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", f.target.Load().(string))
			if err != nil {
				_ = in.Close()
				continue
			}
			mu.Lock()
			all = append(all, in, out)
			mu.Unlock()
			muted := &atomic.Bool{}
			f.mu.Lock()
			f.muted = append(f.muted, muted)
			f.mu.Unlock()
			go func() { _, _ = io.Copy(unless{muted, out}, in); _ = out.Close() }()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
		}
	}()
	return f
}

// mute drops everything that arrives on the existing connections.
func (f *forwarder) mute() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.muted {
		m.Store(true)
	}
}

type unless struct {
	muted *atomic.Bool
	to    io.Writer
}

func (u unless) Write(p []byte) (int, error) {
	if u.muted.Load() {
		return len(p), nil
	}
	return u.to.Write(p)
}

// A log that needs another epoch, because another program replaced it, is not read from a replica at once: its master
// may have what the replica lacks. After half a minute the node no longer waits for a master.
func TestReadOnly_aLogThatNeedsAnotherEpochIsReadAfterAWhile(t *testing.T) {
	r := storetest.Redis(t)
	s := open(t, func(cfg *store.Config) { cfg.Redis = r.URL() })
	for range 3 {
		mustAppend(t, s, "s", delta("word"))
	}
	ctx := t.Context()
	if r.Del(ctx, "chat:history:s").Err() != nil || r.RPush(ctx, "chat:history:s", `{"content":"x"}`, `{"content":"y"}`).Err() != nil {
		t.Fatal("redis")
	}
	if err := r.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if p, err := s.Read(ctx, "s", 1, 1<<20, 100); store.Why(err) != store.RedisReadOnly {
			t.Fatalf("%+v, %v", p, err)
		}
	}
	s.ReadOnlyFor(29 * time.Second)
	if p, err := s.Read(ctx, "s", 1, 1<<20, 100); store.Why(err) != store.RedisReadOnly {
		t.Fatalf("%+v, %v", p, err)
	}
	s.ReadOnlyFor(31 * time.Second)
	first, err := s.Read(ctx, "s", 1, 1<<20, 100)
	if err != nil || len(first.Elements) != 2 || first.From != 1_000_001 {
		t.Fatalf("%+v, %v", first, err)
	}
	// Every read derives the same epoch. It lasts until Redis accepts writes; then the log records its epoch.
	if again, err := s.Read(ctx, "s", 1, 1<<20, 100); err != nil || again.Epoch != first.Epoch {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := s.Append(ctx, "s", store.Batch{Chunks: []store.Chunk{delta("z")}}); store.Why(err) != store.RedisReadOnly {
		t.Errorf("an append: %v", err)
	}
	if err := r.Do(ctx, "REPLICAOF", "NO", "ONE").Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it takes chunks again", func() bool {
		_, err := s.Append(ctx, "s", store.Batch{Chunks: []store.Chunk{delta("z")}})
		return err == nil
	})
	if p, err := s.Read(ctx, "s", 1, 1<<20, 100); err != nil || len(p.Elements) != 3 || p.First <= 1_000_000 {
		t.Errorf("%+v, %v", p, err)
	}
}
