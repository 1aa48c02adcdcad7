package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// Redis as it runs in production: over TLS and with a password, with Sentinels, and as a Cluster.

// tail does what the owner of a listener does: it reads the log after every notification, and now and then, so it never
// misses a chunk for long.
type tail struct {
	s  *store.Store
	id string

	mu    sync.Mutex
	live  int // chunks that were announced
	again chan struct{}
}

func (l *tail) Live(payload string) {
	l.mu.Lock()
	l.live++
	l.mu.Unlock()
	l.Resync()
}

func (l *tail) Resync() {
	select {
	case l.again <- struct{}{}:
	default:
	}
}

func (l *tail) heard() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.live
}

// numbered appends one chunk with its producer number, until it is acknowledged.
func numbered(ctx context.Context, s *store.Store, id string, i int) error {
	for {
		_, err := s.Append(ctx, id, store.Batch{
			Producer: store.Producer{ID: "p", Number: int64(i)}, Chunks: []store.Chunk{delta(fmt.Sprint(i))},
		})
		if err == nil || !store.Away(err) || ctx.Err() != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestTLS_verifiesTheServerAndLogsIn(t *testing.T) {
	authority, another := storetest.NewAuthority(t), storetest.NewAuthority(t)
	r := storetest.RedisTLS(t, authority, "--requirepass", "open sesame")
	if err := r.Client.Do(t.Context(), "ACL", "SETUSER", "writer", "on", ">s3same", "~chat:*", "&chat:*", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	cert, key := authority.Issue("gapless")
	reach := func(url, ca, cert, key string) error {
		s := open(t, func(c *store.Config) { c.Redis, c.RedisCA, c.RedisCert, c.RedisKey = url, ca, cert, key })
		ctx, cancel := context.WithTimeout(t.Context(), storetest.Patience)
		defer cancel()
		_, err := s.Append(ctx, "s", store.Batch{Chunks: []store.Chunk{delta("a")}})
		return err
	}
	at := "@" + r.Addr()
	if err := reach("rediss://:open%20sesame"+at, authority.File, cert, key); err != nil {
		t.Fatal(err)
	}
	if err := reach("rediss://writer:s3same"+at, authority.File, cert, key); err != nil {
		t.Fatal(err)
	}
	_, port, _ := strings.Cut(r.Addr(), ":")
	for what, err := range map[string]error{
		"another authority":        reach("rediss://:open%20sesame"+at, another.File, cert, key),
		"the system's authorities": reach("rediss://:open%20sesame"+at, "", cert, key),
		"another name":             reach("rediss://:open%20sesame@localhost:"+port, authority.File, cert, key),
		"no certificate of ours":   reach("rediss://:open%20sesame"+at, authority.File, "", ""),
		"a wrong password":         reach("rediss://:sesame"+at, authority.File, cert, key),
		"no TLS":                   reach("redis://:open%20sesame"+at, "", "", ""),
	} {
		if err == nil {
			t.Errorf("%s: it was let in", what)
		} else if strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: the error tells the password: %v", what, err)
		}
	}
}

// A password that was not escaped is never printed, whatever happens to the URL that it breaks.
func TestConfig_printsNothingOfAPassword(t *testing.T) {
	const head, tail = "s3same", "0pensesame"
	for _, between := range []string{"/", "#", "?", "@", "%", "%zz", " ", ":", "\\", "[", "]", "^", "`", "{", "\"", "<", "é", "語", "\t", "\n", "\x00", "&", ";", "=", "+", ",", "//", "/?#", "@/", "#@", "12/", "://", "%2"} {
		for _, user := range []string{"", "writer"} {
			for _, first := range []string{head + between + tail, "12" + between + tail, between + tail, tail + between, "%41" + between + tail} {
				for _, form := range []string{
					"redis://%s:%s@h:6379", "rediss://%s:%s@h:6379/1", "redis+sentinel://%s:%s@h:1,i:2/main", "redis+cluster://%s:%s@h:1,i:2",
					"redis://%s:%s", "%s:%s@h:6379", "redis:%s:%s@h:6379", "redis:/%s:%s@h", "http://%s:%s@h", "redis+sentinel://h:1/main/0?sentinel_username=%s&sentinel_password=%s",
					"redis+sentinel://h:1/main?sentinel_user=%s&sentinel_pass=%s", "redis://h/%s?pool_size=%s", "redis://h?db=%s%s", "redis://%s%s@h",
				} {
					cfg := store.DefaultConfig()
					cfg.Redis = fmt.Sprintf(form, user, first)
					err := cfg.Validate()
					if err != nil && (strings.Contains(err.Error(), head) || strings.Contains(err.Error(), tail) || strings.Contains(err.Error(), `"12`)) {
						t.Errorf("%q: %v", cfg.Redis, err)
					}
				}
			}
		}
	}
	for _, text := range []string{"redis://:ab/cd@h:6379", "redis://:12/cd@h:6379", "redis://:ab#cd@h:6379", "redis://u:12#cd@h", "redis://u:12?cd@h", "redis://:%zz@h", "redis://:a b@h"} {
		cfg := store.DefaultConfig()
		cfg.Redis = text
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "%2F") {
			t.Errorf("%s: the error does not name the remedy: %v", text, err)
		}
	}
}

func TestConfig_saysWhatIsWrongWithRedis(t *testing.T) {
	for text, want := range map[string]string{
		"localhost:6379": "scheme", "http://x": `scheme "http"`, "redis://": "host is missing", "redis://a,b": "one host",
		"redis+sentinel://a:1,b:2": "name of the master", "redis+sentinel://a/main/x": "database", "redis+cluster://a/1": "database",
		"redis://a/x": "database", "redis://a/-1": "database", "redis://a?nope=1": "unknown parameter", "redis://a?pool_size=x": "pool_size",
		"redis://u:secret@[::1": "redis://[user:password@]", "redis+sentinel://a/main?db=x": "database",
	} {
		cfg := store.DefaultConfig()
		cfg.Redis = text
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "-redis") || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", text, err)
		}
	}
	for _, text := range []string{"redis://a", "rediss://u:p@a:1/2", "redis+sentinel://a,b:2/main", "rediss+sentinel://:p@a:1/main/3?sentinel_password=x",
		"redis+cluster://a:1,b:2", "rediss+cluster://a", "redis://[::1]:6379", "redis://a?db=2&pool_size=5", store.Embedded} {
		cfg := store.DefaultConfig()
		cfg.Redis, cfg.Prefix = text, "other:" // the default one is refused with another database
		if err := cfg.Validate(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	for _, change := range []func(*store.Config){
		func(c *store.Config) { c.Redis, c.RedisCA = "redis://a", "x" }, func(c *store.Config) { c.Redis, c.RedisCA = "rediss://a", "/none" },
		func(c *store.Config) { c.Redis, c.RedisCert = "rediss://a", "/none" }, func(c *store.Config) { c.WaitReplicas = 1 },
		func(c *store.Config) { c.Redis, c.WaitReplicas, c.WaitTimeout = "redis://a", 1, time.Hour },
		func(c *store.Config) { c.Redis, c.WaitReplicas = "redis://a", -1 },
	} {
		cfg := store.DefaultConfig()
		change(&cfg)
		if cfg.Validate() == nil {
			t.Errorf("%+v", cfg)
		}
	}
}

func TestConfig_prefix(t *testing.T) {
	for _, prefix := range []string{"", strings.Repeat("x", 65), "a b", "a\n", "ä:", "a\x7f", "{a}", "a}", "a*", "a?", "[a]", "a]", `a\`} {
		cfg := store.DefaultConfig()
		cfg.Prefix = prefix
		if err := cfg.Validate(); err == nil || !strings.HasPrefix(err.Error(), "-prefix: must") {
			t.Errorf("%q: %v", prefix, err)
		}
	}
	for _, prefix := range []string{"a", "chat:", "staging:chat:", "~!#$%&'()+,-./:;<=>@^_`|", strings.Repeat("x", 64)} {
		cfg := store.DefaultConfig()
		cfg.Redis, cfg.Prefix = "redis://a", prefix
		if err := cfg.Validate(); err != nil {
			t.Errorf("%q: %v", prefix, err)
		}
	}
	for _, url := range []string{"redis://a/1", "redis://a?db=1", "rediss://a/1", "redis+sentinel://a/main/1"} {
		cfg := store.DefaultConfig()
		cfg.Redis = url
		if err := cfg.Validate(); err == nil || !strings.HasPrefix(err.Error(), "-redis, -prefix: database 1 ") {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// The keys of a session are in one slot, and its channel is sharded.
func TestCluster_contract(t *testing.T) {
	c := storetest.Cluster(t)
	for _, prefix := range []string{"chat:", "staging:"} {
		t.Run(prefix, func(t *testing.T) { testClusterContract(t, c, prefix) })
	}
}

func testClusterContract(t *testing.T, c *storetest.Clustered, prefix string) {
	s := open(t, func(cfg *store.Config) { cfg.Redis, cfg.Prefix = c.URL(), prefix })
	for i := range 20 {
		id := fmt.Sprint("s", i)
		e := newEar()
		stop := s.Listen(id, e)
		e.wait(t, "the acknowledgement", func() bool { return e.resyncs > 0 })
		mustAppend(t, s, id, delta("a"))
		list := c.LRange(t.Context(), prefix+"history:{"+id+"}", 0, -1).Val()
		if len(list) != 1 || c.HGet(t.Context(), prefix+"session:{"+id+"}", "last_seen").Val() != "1" {
			t.Fatal(list)
		}
		e.wait(t, "the chunk", func() bool { return slices.Equal(e.heard, list) })
		// A message of another producer arrives, too.
		if err := c.SPublish(t.Context(), prefix+"stream:{"+id+"}", "x").Err(); err != nil {
			t.Fatal(err)
		}
		e.wait(t, "the message", func() bool { return len(e.heard) == 2 })
		stop()
		if err := s.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	e := newEar()
	defer s.ListenUploads(e)()
	e.wait(t, "the acknowledgement", func() bool { return e.resyncs == 1 })
	for i := range 6 { // whichever server has the session
		id := fmt.Sprint("u", i)
		mustAppend(t, s, id, of("m"))
		if _, err := s.Cancel(t.Context(), id, ""); err != nil {
			t.Fatal(err)
		}
		e.wait(t, "the name", func() bool { return slices.Contains(e.heard, id) })
	}
}

// follow runs producers and listeners of many sessions while something happens to Redis. Every acknowledged chunk is in
// the log, once, in order, and afterwards chunks are announced again.
func follow(t *testing.T, s *store.Store, sessions int, happen func()) {
	t.Helper()
	ctx, cancel := storetest.Watch(t.Context(), t)
	defer cancel()
	ears := make([]*tail, sessions)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	counts := make([]atomic.Int64, sessions)
	for i := range ears {
		l := &tail{s: s, id: fmt.Sprint("s", i), again: make(chan struct{}, 1)}
		ears[i] = l
		defer s.Listen(l.id, l)()
		wg.Go(func() {
			for n := 0; ; n++ {
				if err := numbered(ctx, s, l.id, n); err != nil {
					t.Errorf("%s: %v", l.id, err)
					return
				}
				counts[i].Add(1)
				select {
				case <-stop:
					return
				case <-time.After(3 * time.Millisecond):
				}
			}
		})
	}
	wait := func(what string, ok func(i int) bool) {
		t.Helper()
		for i := range ears {
			for !ok(i) {
				if ctx.Err() != nil || t.Failed() {
					t.Fatalf("%s: waited in vain: %s", ears[i].id, what)
				}
				time.Sleep(5 * time.Millisecond)
			}
			storetest.Moved(t)
		}
	}
	wait("chunks, announced", func(i int) bool { return counts[i].Load() > 20 && ears[i].heard() > 10 })
	happen()
	was := make([]int64, sessions)
	heard := make([]int, sessions)
	for i := range was {
		was[i] = counts[i].Load()
	}
	wait("chunks go on", func(i int) bool { return counts[i].Load() > was[i]+20 })
	for i := range heard {
		heard[i] = ears[i].heard()
	}
	wait("chunks are announced again", func(i int) bool { return ears[i].heard() > heard[i]+10 })
	close(stop)
	wg.Wait()
	for i, l := range ears {
		for n, got := range contents(t, s, l.id) {
			if got != fmt.Sprint(n) {
				t.Errorf("%s: chunk %d says %s", l.id, n+1, got)
				break
			}
		}
		if p := mustRead(t, s, l.id, 1, 0, 0); p.Last != counts[i].Load() {
			t.Errorf("%s: %d chunks, and %d were acknowledged", l.id, p.Last, counts[i].Load())
		}
	}
}

func TestCluster_slotsMoveUnderLoad(t *testing.T) {
	c := storetest.Cluster(t)
	s := open(t, func(cfg *store.Config) { cfg.Redis = c.URL() })
	follow(t, s, 6, func() {
		for i := range 6 {
			c.Move(fmt.Sprintf("chat:stream:{s%d}", i))
		}
	})
}

// A master is lost, and its replica has its data: with -wait-replicas, all of it.
func TestCluster_masterIsLostUnderLoad(t *testing.T) {
	c := storetest.Cluster(t)
	s := open(t, func(cfg *store.Config) { cfg.Redis, cfg.WaitReplicas = c.URL(), 1 })
	follow(t, s, 6, func() {
		lost := c.MasterOf("chat:stream:{s0}")
		lost.Kill()
		storetest.Eventually(t, "another takes over", func() bool { return c.MasterOf("chat:stream:{s0}") != lost })
		lost.Start() // otherwise the new master has no replica, and nothing can be acknowledged
	})
}

func TestSentinel_failoverUnderLoad(t *testing.T) {
	w := storetest.Sentinel(t)
	s := open(t, func(cfg *store.Config) { cfg.Redis, cfg.WaitReplicas = w.URL(), 1 })
	follow(t, s, 4, func() {
		old := w.Master()
		old.Kill()
		storetest.Eventually(t, "another takes over", func() bool { return w.Master() != old })
		old.StartAsReplica(w.Master())
	})
}

// Promise: Durable, as defined by -wait-replicas.
func TestWaitReplicas_isAcknowledgedWhenReplicasHaveIt(t *testing.T) {
	w := storetest.Sentinel(t)
	s := open(t, func(cfg *store.Config) {
		cfg.Redis, cfg.WaitReplicas, cfg.WaitTimeout = w.URL(), 1, 2*time.Second
	})
	mustAppend(t, s, "s", delta("a"))
	replica := w.Servers[1]
	if got := replica.LRange(t.Context(), "chat:history:s", 0, -1).Val(); len(got) != 1 {
		t.Fatal(got)
	}
	replica.Signal(syscall.SIGSTOP)
	_, err := s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p"}, Chunks: []store.Chunk{delta("b")}})
	if !errors.Is(err, store.ErrOutcomeUnknown) {
		t.Fatal(err)
	}
	// It is stored, and acknowledged only once the replica has it, even for a retry.
	_, err = s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p"}, Chunks: []store.Chunk{delta("b")}})
	if !errors.Is(err, store.ErrOutcomeUnknown) {
		t.Fatal(err)
	}
	replica.Signal(syscall.SIGCONT)
	w.Synced()
	for range 100 {
		a, err := s.Append(t.Context(), "s", store.Batch{Producer: store.Producer{ID: "p"}, Chunks: []store.Chunk{delta("b")}})
		if err == nil {
			if a.First != 2 || a.Known != 1 {
				t.Fatal(a)
			}
			return
		}
	}
	t.Fatal("it is never acknowledged")
}
