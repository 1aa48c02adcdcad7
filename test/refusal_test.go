package test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

// A Redis that refuses commands, as producers, viewers and the operator see it.

// rotated returns a Redis with a user whose password can be revoked and restored, and a node that uses it.
func rotated(t *testing.T, args ...string) (redis *storetest.Server, n *node, take, give func()) {
	t.Helper()
	redis = storetest.Redis(t)
	do := func(args ...any) {
		t.Helper()
		if err := redis.Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	do("ACL", "SETUSER", "gapless", "on", ">s3same", "~chat:*", "&chat:*", "+@all")
	plant("s3same")
	n = start(t, append(args, "-redis", "redis://gapless:s3same@"+redis.Addr())...)
	take = func() {
		do("ACL", "SETUSER", "gapless", "resetpass", ">another")
		do("CLIENT", "KILL", "USER", "gapless")
	}
	give = func() { do("ACL", "SETUSER", "gapless", "resetpass", ">s3same") }
	return redis, n, take, give
}

// A password is rotated under load: posts get an error that nothing was stored, uploads wait, viewers are held, and
// everything continues when it is right again.
func TestRefusal_aRotatedPasswordEndsNoUpload(t *testing.T) {
	t.Parallel()
	redis, n, take, give := rotated(t, "-heartbeat", "50ms")
	ctx := deadline(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	type upload struct{ session, kind, query, last string }
	uploads := []upload{{newID(), "application/x-ndjson", "", "{\"content\":\"last\"}\n"}, {newID(), "text/plain", "", "last"}, {newID(), "application/x-ndjson", "numbered", "{\"content\":\"last\"}\n"}}
	pieces := make([]int, len(uploads))
	for i, u := range uploads {
		body, in := io.Pipe()
		wg.Go(func() {
			r, err := http.NewRequestWithContext(ctx, "POST", n.url("/v1/sessions/"+u.session+"/chunks"), body)
			if err != nil {
				t.Error(err)
				return
			}
			r.Header.Set("Content-Type", u.kind)
			if u.query != "" {
				r.Header.Set("Producer-Id", "p")
				r.Header.Set("Producer-Epoch", "0")
				r.Header.Set("Producer-Chunk", "0")
			}
			response, err := n.http.Do(r)
			if err != nil {
				t.Errorf("%s %s: %v", u.kind, u.query, err)
				return
			}
			answer, err := io.ReadAll(response.Body)
			_ = response.Body.Close()
			// The connection to Redis is killed during appends. Without numbers, the outcome of one may be unknown.
			if doubt := response.StatusCode == http.StatusGatewayTimeout && u.query == ""; err != nil || response.StatusCode != http.StatusCreated && !doubt {
				t.Errorf("%s %s: %d %s (%v)", u.kind, u.query, response.StatusCode, answer, err)
			}
		})
		wg.Go(func() {
			defer in.Close()
			for k := 1; ; k++ {
				piece := fmt.Sprintf("{\"content\":\"p%d\"}\n", k)
				if u.kind == "text/plain" {
					piece = "piece "
				}
				select {
				case <-stop:
					_, _ = io.WriteString(in, u.last)
					return
				case <-time.After(20 * time.Millisecond):
				}
				if _, err := io.WriteString(in, piece); err != nil {
					return
				}
				pieces[i] = k
			}
		})
	}
	post := func() answer {
		return n.post("/v1/sessions/"+uploads[0].session+"x/chunks", "application/json", `{"content":"x"}`)
	}
	stored := 0
	v := &viewer{session: uploads[2].session}
	wg.Go(func() {
		v.follow(ctx, at(n.addr), func(event) bool { return strings.Contains(strings.Join(v.chunks, ""), `"last"`) })
	})
	eventually(t, "the viewer is live", func() bool { return v.seen.Load() > 3 })
	for range 2 {
		take()
		begun := time.Now()
		denied := 0
		for denied < 20 || time.Since(begun) < 2*time.Second {
			a := post()
			switch {
			case a.status == http.StatusServiceUnavailable:
				if p := a.problem(t); p.Code != "redis_denied" || a.header.Get("Retry-After") == "" {
					t.Fatalf("%d %s", a.status, a.body)
				}
				denied++
			case a.status == http.StatusGatewayTimeout && denied == 0: // its connection was killed
			default:
				t.Fatalf("%d %s (%v)", a.status, a.body, a.err)
			}
			pause(ctx, 20*time.Millisecond)
		}
		held(t, []*viewer{v})
		give()
		eventually(t, "appends go through", func() bool { a := post(); stored++; return a.status == http.StatusCreated || a.status == 0 })
		from := v.seen.Load()
		eventually(t, "the viewer goes on", func() bool { return v.seen.Load() > from })
	}
	close(stop)
	wg.Wait()
	list := history(t, redis, uploads[2].session)
	v.check(t, list[:len(v.chunks)])
	v.unreset(t)
	if len(list) != pieces[2]+1 {
		t.Errorf("%d chunks of %d are stored", len(list), pieces[2]+1)
	}
	if v.connections != 1 {
		t.Errorf("the viewer made %d connections", v.connections)
	}
}

// Whatever Redis refuses, the log of a loaded node reports it in a few lines, with the remedy.
func TestRefusal_theLogOfALoadedNodeSaysItInAFewLines(t *testing.T) {
	for name, c := range map[string]struct {
		code        string
		refuse, end func(ctx context.Context, r *storetest.Server) error
		silent      bool // viewers are served
	}{
		"full": {"redis_full", func(ctx context.Context, r *storetest.Server) error {
			return r.ConfigSet(ctx, "maxmemory", "100kb").Err()
		},
			func(ctx context.Context, r *storetest.Server) error { return r.ConfigSet(ctx, "maxmemory", "0").Err() }, true},
		"a replica": {"redis_readonly", func(ctx context.Context, r *storetest.Server) error {
			return r.Do(ctx, "REPLICAOF", "127.0.0.1", "1").Err()
		}, func(ctx context.Context, r *storetest.Server) error { return r.Do(ctx, "REPLICAOF", "NO", "ONE").Err() }, true},
		"no subscriptions": {"", func(ctx context.Context, r *storetest.Server) error {
			return r.Do(ctx, "ACL", "SETUSER", "gapless", "-subscribe", "resetchannels").Err()
		}, func(ctx context.Context, r *storetest.Server) error {
			return r.Do(ctx, "ACL", "SETUSER", "gapless", "+subscribe", "&chat:*").Err()
		}, true},
		"no scripts": {"redis_denied", func(ctx context.Context, r *storetest.Server) error {
			return r.Do(ctx, "ACL", "SETUSER", "gapless", "-evalsha", "-eval").Err()
		}, func(ctx context.Context, r *storetest.Server) error {
			return r.Do(ctx, "ACL", "SETUSER", "gapless", "+evalsha", "+eval").Err()
		}, false},
		"another password": {"redis_denied", func(ctx context.Context, r *storetest.Server) error {
			_ = r.Do(ctx, "ACL", "SETUSER", "gapless", "resetpass", ">another").Err()
			return r.Do(ctx, "CLIENT", "KILL", "USER", "gapless").Err()
		}, func(ctx context.Context, r *storetest.Server) error {
			return r.Do(ctx, "ACL", "SETUSER", "gapless", "resetpass", ">s3same").Err()
		}, false},
		"gone": {"redis_away", func(_ context.Context, r *storetest.Server) error { r.Kill(); return nil },
			func(_ context.Context, r *storetest.Server) error { r.Start(); return nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis, n, _, _ := rotated(t, "-log-level", "info", "-heartbeat", "50ms", "-reconcile", "200ms")
			ctx, cancel := context.WithCancel(deadline(t))
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			var viewers []*viewer
			for range 8 {
				session := newID()
				n.append(t, session, words(1, 3))
				v := &viewer{session: session}
				viewers = append(viewers, v)
				wg.Go(func() { v.follow(ctx, at(n.addr), nil) })
				wg.Go(func() {
					for ctx.Err() == nil {
						n.post("/v1/sessions/"+session+"/chunks", "application/json", `{"content":"x"}`)
						n.get("/readyz")
						pause(ctx, 50*time.Millisecond)
					}
				})
			}
			for _, v := range viewers {
				eventually(t, "the viewer is live", func() bool { return v.seen.Load() > 3 })
			}
			eventually(t, "the log has their beginnings", func() bool { return strings.Count(n.log.String(), `msg="viewer begins"`) == len(viewers) })
			before := strings.Count(n.log.String(), "\n")
			if err := c.refuse(ctx, redis); err != nil {
				t.Fatal(err)
			}
			pause(ctx, 6*time.Second)
			held(t, viewers)
			said := strings.Join(strings.Split(n.log.String(), "\n")[before:], "\n")
			if lines := strings.Count(said, "\n"); lines == 0 || lines > 8 || !strings.Contains(said, "remedy=") || c.code != "" && !strings.Contains(said, "code="+c.code) || strings.Contains(said, "redis is back") {
				t.Errorf("the log says in %d lines:\n%s", lines, said)
			}
			if c.silent {
				for _, v := range viewers {
					if v.connections != 1 {
						t.Errorf("a viewer made %d connections", v.connections)
					}
				}
			}
			if err := c.end(ctx, redis); err != nil {
				t.Fatal(err)
			}
			for _, v := range viewers {
				from := v.seen.Load()
				eventually(t, "the viewer goes on", func() bool { return v.seen.Load() > from || c.code == "redis_away" })
			}
			said = strings.Join(strings.Split(n.log.String(), "\n")[before:], "\n")
			if lines := strings.Count(said, "\n"); lines > 12 {
				t.Errorf("with its end, the log says in %d lines:\n%s", lines, said)
			}
		})
	}
}

// At a start without Redis, one line names the Redis and the remedy.
func TestRefusal_aStartWithoutRedisIsSaidOnce(t *testing.T) {
	t.Parallel()
	plant("s3same")
	addr := fmt.Sprint("127.0.0.1:", storetest.FreePort(t))
	n := launch(t, "-redis", "redis://gapless:s3same@"+addr, "-log-level", "info")
	ctx, cancel := context.WithCancel(deadline(t))
	v := &viewer{session: newID()}
	wait := background(t, func() { v.follow(ctx, at(n.addr), nil) })
	defer wait()
	defer cancel()
	eventually(t, "it is said", func() bool { return strings.Contains(n.log.String(), `level=ERROR msg="redis cannot be reached"`) })
	pause(ctx, 5*time.Second)
	log := n.log.String()
	if strings.Count(log, "level=ERROR") != 1 || strings.Count(log, "level=WARN") > 1 || strings.Contains(log, "pub/sub") || !strings.Contains(log, "redis="+addr) || !strings.Contains(log, "-redis") {
		t.Errorf("the log:\n%s", log)
	}
}
