package store_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// rightsLine returns the line of docs/redis.md that grants a Redis user its permissions.
func rightsLine(t *testing.T) []string {
	t.Helper()
	page, err := os.ReadFile("../docs/redis.md")
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^ACL SETUSER gapless .*$`).FindString(string(page))
	if line == "" {
		t.Fatal("docs/redis.md has no line of rights")
	}
	return strings.Fields(strings.ReplaceAll(line, "PASSWORD", "s3same"))
}

func doLine(t *testing.T, r *storetest.Server, line []string) {
	t.Helper()
	args := make([]any, len(line))
	for i, word := range line {
		args[i] = word
	}
	if err := r.Do(t.Context(), args...).Err(); err != nil {
		t.Fatal(err)
	}
}

// everything calls everything that a Store can do.
func everything(t *testing.T, s *store.Store, r *storetest.Server, id string) {
	t.Helper()
	ctx := t.Context()
	l, wide := &tail{s: s, id: id, again: make(chan struct{}, 1)}, &tail{s: s, id: id, again: make(chan struct{}, 1)}
	stop, stopWide := s.Listen(id, l), s.ListenUploads(wide)
	<-l.again
	<-wide.again
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	appended := func(b store.Batch) {
		t.Helper()
		_, err := s.Append(ctx, id, b)
		check("append", err)
	}
	_, _, err := s.Create(ctx, id)
	check("create", err)
	appended(store.Batch{Chunks: []store.Chunk{delta("a")}})
	appended(store.Batch{Chunks: []store.Chunk{delta("a")}})
	numbers := func(n int64) store.Producer { return store.Producer{ID: "p", Number: n} }
	appended(store.Batch{Producer: numbers(0), Chunks: []store.Chunk{delta("b"), delta("c")}})
	appended(store.Batch{Producer: numbers(1), Chunks: []store.Chunk{delta("c"), delta("d")}})
	appended(store.Batch{Producer: numbers(0), Chunks: []store.Chunk{delta("b")}})
	appended(store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDelta, "m", "", "a")}, Lease: time.Hour})
	appended(store.Batch{Chunks: []store.Chunk{store.NewChunk(store.TypeDelta, "n", "", "a")}, Hold: store.HoldOpen, Token: "t"})
	appended(store.Batch{Hold: store.HoldLook, Token: "t", Messages: []string{"n"}})
	appended(store.Batch{Hold: store.HoldBroken, Token: "t", Messages: []string{"n"}})
	_, open, err := s.Open(ctx, id)
	if check("open", err); len(open) != 1 {
		t.Errorf("open: %q", open)
	}
	_, err = s.Cancel(ctx, id, "m")
	check("cancel", err)
	many := make([]store.Chunk, 1500) // enough that some are trimmed, and that LRANGE alone reads a page
	for i := range many {
		many[i] = delta(fmt.Sprint(i))
	}
	appended(store.Batch{Producer: numbers(3), Chunks: many})
	p, err := s.Read(ctx, id, 1, 1<<20, 5000)
	if check("read", err); len(p.Elements) != 1200 {
		t.Errorf("%d elements", len(p.Elements))
	}
	_, err = s.Read(ctx, id, store.Newest, 1<<10, 10)
	check("read the newest", err)
	check("foreign push", r.RPush(ctx, "chat:history:"+id+"f", `{"type":"delta","message_id":"x"}`, "no json").Err())
	_, err = s.Read(ctx, id+"f", 1, lots, lots)
	check("read a foreign log", err)
	check("renew", s.Renew(ctx, id, p.Epoch, p.Last))
	check("make a ticket", s.MakeTicket(ctx, "t"+id, id, time.Time{}))
	_, err = s.EnterTicket(ctx, "t"+id, id, "c1")
	check("enter by a ticket", err)
	_, err = s.EnterTicket(ctx, "t"+id, id, "c2")
	check("enter again", err)
	check("renew a ticket", s.RenewTicket(ctx, "t"+id, id, "c2", time.Time{}))
	check("delete", s.Delete(ctx, id))
	check("probe", s.Probe(ctx))
	if s.Writes() != store.WritesOK {
		t.Errorf("writes are said to be %s", s.Writes())
	}
	if l.heard() == 0 {
		t.Error("nothing was heard")
	}
	stop()
	stopWide()
	r.ScriptFlush(ctx)
	_, _, err = s.Create(ctx, id+"g")
	check("create, with scripts that are forgotten", err)
}

// With the permissions of docs/redis.md, and no others, everything works.
func TestRights_thoseOfTheDocumentationAreEnough(t *testing.T) {
	r := storetest.Redis(t)
	doLine(t, r, rightsLine(t))
	var log lines
	s := open(t, func(c *store.Config) { c.Redis, c.Logger, c.HistoryMax = as(r, "gapless"), log.logger(), 1200 })
	everything(t, s, r, "s")
	if got := log.String(); got != "" {
		t.Errorf("the log:\n%s", got)
	}
	if got := value(t, s, "gapless_hints_failed_total", "") + value(t, s, "gapless_subscriptions_refused_total", "") + value(t, s, "gapless_pubsub_lost_total", ""); got != 0 {
		t.Errorf("%v hints failed, or were not heard", got)
	}
	if denied := r.Do(t.Context(), "ACL", "LOG").Val(); fmt.Sprint(denied) != "[]" {
		t.Errorf("Redis has denied something: %v", denied)
	}
}

// A Cluster needs a few more permissions, which docs/redis.md also names.
func TestRights_thoseOfTheDocumentationAreEnoughForACluster(t *testing.T) {
	page, err := os.ReadFile("../docs/redis.md")
	if err != nil {
		t.Fatal(err)
	}
	more := regexp.MustCompile("`(\\+cluster[^`]*)`").FindSubmatch(page)
	if more == nil {
		t.Fatal("docs/redis.md has no rights for a Cluster")
	}
	c := storetest.Cluster(t)
	for _, r := range c.Servers {
		doLine(t, r, append(rightsLine(t), strings.Fields(string(more[1]))...))
	}
	var log lines
	s := open(t, func(cfg *store.Config) {
		cfg.Redis, cfg.Logger = strings.Replace(c.URL(), "://", "://gapless:s3same@", 1), log.logger()
	})
	for i := range 12 { // on all masters
		id := fmt.Sprint("s", i)
		for range 3 {
			mustAppend(t, s, id, delta("a"))
		}
		l := &tail{s: s, id: id, again: make(chan struct{}, 1)}
		stop := s.Listen(id, l)
		<-l.again
		eventually(t, "a chunk is heard", func() bool { mustAppend(t, s, id, delta("b")); return l.heard() > 0 })
		stop()
		if err := s.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if err := s.Probe(t.Context()); err != nil || s.Writes() != store.WritesOK {
		t.Errorf("%v, writes %s", err, s.Writes())
	}
	if got := log.String(); got != "" {
		t.Errorf("the log:\n%s", got)
	}
	for _, r := range c.Servers {
		if denied := r.Do(t.Context(), "ACL", "LOG").Val(); fmt.Sprint(denied) != "[]" {
			t.Errorf("Redis has denied something: %v", denied)
		}
	}
	// One of the masters is full: logs are readable, and writes are refused.
	if err := c.MasterOf("chat:history:{s1}").ConfigSet(t.Context(), "maxmemory", "100kb").Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is known", func() bool { return s.Probe(t.Context()) == nil && s.Writes() == store.RedisFull })
}

// Each missing permission is named when a node starts. So docs/redis.md lists no permission too many or too few.
func TestRights_thoseThatAreMissingAreNamedAtTheStart(t *testing.T) {
	r := storetest.Redis(t)
	line := rightsLine(t)
	var commands []string
	for _, word := range line {
		if strings.HasPrefix(word, "+") {
			commands = append(commands, word)
		}
	}
	for i, missing := range append(slices.Clone(commands), "~chat:*", "&chat:*") {
		user := fmt.Sprint("u", i)
		rest := slices.Clone(line)
		rest[2] = user
		rest = slices.DeleteFunc(rest, func(word string) bool { return word == missing })
		doLine(t, r, rest)
		if missing == "+exec" { // it would execute the probe's commands
			continue
		}
		var log lines
		s, err := store.Open(func() store.Config {
			c := store.DefaultConfig()
			c.Redis, c.Logger = as(r, user), log.logger()
			return c
		}())
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the log names "+missing, func() bool { return strings.Contains(log.String(), "missing="+missing+" ") })
		if missing == "+discard" || missing == "+multi" { // the probe has left no transaction open
			for range 20 {
				mustAppend(t, s, user, delta("a"))
			}
			if n := r.LLen(t.Context(), "chat:history:"+user).Val(); n != 20 || s.Probe(t.Context()) != nil || s.Writes() != store.WritesOK {
				t.Errorf("without %s: %d elements, writes %s", missing, n, s.Writes())
			}
		}
		s.Close()
	}
	// The line contains all commands of the scripts.
	for _, m := range regexp.MustCompile(`(?:call|write|pcall|pcall_redis|publish)\(\s*'([A-Z]+)'(?:, '([A-Z]+)')?|'([LR]PUSH)'`).FindAllStringSubmatch(store.Scripts(), -1) {
		name := strings.ToLower(m[1] + m[3])
		if name == "memory" {
			name += "|" + strings.ToLower(m[2])
		}
		if !slices.Contains(commands, "+"+name) {
			t.Errorf("a script uses %s, which docs/redis.md does not name", name)
		}
	}
}
