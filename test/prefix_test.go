package test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"gapless/store/storetest"
)

// Promise: every key and every channel begins with the prefix. Redis itself is the judge: its user may access nothing
// else, and ACL LOG shows each attempt, even of a script that catches its errors.
func TestPrefix_startsEveryKeyAndEveryChannel(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	if err := redis.Do(deadline(t), "ACL", "SETUSER", "node", "on", ">pw", "~other:*", "&other:*", "+@all").Err(); err != nil {
		t.Fatal(err)
	}
	n := start(t, "-redis", "redis://node:pw@"+redis.Addr(), "-prefix", "other:", "-reconcile", "200ms", "-grace", "1s")
	session, ctx := newID(), deadline(t)
	stream := "/v1/sessions/" + session
	follow := func(query string) *viewer {
		v := &viewer{session: session, query: query}
		background(t, func() { v.follow(ctx, at(n.addr), nil) })
		eventually(t, "a viewer", func() bool { return v.status.Load() == http.StatusOK })
		return v
	}
	must := func(a answer, status int) {
		t.Helper()
		if a.status != status {
			t.Errorf("%d %s (%v)", a.status, a.body, a.err)
		}
	}

	must(n.post("/v1/sessions", "application/json", `{"id":"`+session+`"}`), http.StatusCreated)
	v := follow("")
	follow(n.ticket(t, session))
	taken := n.ticket(t, session)
	for range 2 { // the second one replaces the first, which a channel announces
		w := &viewer{session: session, query: taken}
		w.connect(ctx, n.addr, func(event) bool { return true })
	}
	body, w := io.Pipe()
	answered := make(chan answer, 1)
	background(t, func() { answered <- n.do(ctx, "POST", stream+"/chunks?message_id=up", "text/plain", body) })
	t.Cleanup(func() { _ = w.Close() }) // before background waits
	if _, err := io.WriteString(w, "word1 "); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the word arrives", func() bool { return v.seen.Load() == 1 })
	channels := redis.PubSubChannels(ctx, "*").Val()
	if want := []string{"other:stream:" + session, "other:uploads", "other:tickets"}; len(channels) != len(want) {
		t.Errorf("subscribed to %q, not to %q", channels, want)
	}
	must(n.post(stream+"/cancel", "application/json", `{"message_id":"up"}`), http.StatusOK) // another channel announces it
	if a := <-answered; a.problem(t).Code != "message_cancelled" {
		t.Errorf("the upload: %d %s", a.status, a.body)
	}
	_ = w.Close()
	must(numberedPost(n, stream, 0, `[{"message_id":"m","content":"a"},{"message_id":"m","content":"b"}]`), http.StatusCreated)
	must(numberedPost(n, stream, 0, `[{"message_id":"m","content":"a"},{"message_id":"m","content":"b"}]`), http.StatusOK)
	must(n.post(stream+"/chunks?lease=1s&message_id=m", "application/json", `[]`), http.StatusCreated)
	eventually(t, "the lease ends the message", func() bool { return strings.Contains(n.get(stream+"/chunks").body, "producer_lost") })
	must(n.post(stream+"/messages", "application/json", `{"content":"Why?"}`), http.StatusAccepted)
	if err := redis.RPush(ctx, "other:history:"+session, `{"content":"foreign"}`).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the foreign chunk is seen", func() bool { return strings.Contains(n.get(stream+"/chunks?limit=1000").body, "foreign") })
	snapshot := &viewer{session: session, query: "?snapshot=1"}
	snapshot.connect(ctx, n.addr, func(e event) bool { return e.name == "snapshot" })
	naive := &viewer{session: session}
	naive.session += "/demo/naive?"
	naive.raw(ctx, n.addr, func(b []byte) bool { return !strings.Contains(string(b), "welcome") })
	must(n.get(stream), http.StatusOK)
	n.post(stream+"/ui-stream", "application/json", `{"messages":[{"role":"user","parts":[{"type":"text","text":"Why?"}]}]}`)
	n.append(t, session, `{"type":"end"}`)
	must(n.do(ctx, "DELETE", stream, "", nil), http.StatusNoContent)

	for _, name := range append(keys(t, redis, "*"), channels...) {
		if !strings.HasPrefix(name, "other:") {
			t.Errorf("%s does not begin with the prefix", name)
		}
	}
	if denied := redis.Do(ctx, "ACL", "LOG").Val(); len(denied.([]any)) > 0 {
		t.Errorf("other keys or channels were wanted: %v", denied)
	}
}

func numberedPost(n *node, stream string, number int, body string) (a answer) {
	r, err := http.NewRequest(http.MethodPost, n.url(stream+"/chunks"), strings.NewReader(body))
	if err != nil {
		return answer{err: err}
	}
	for name, value := range map[string]string{"Content-Type": "application/json", "Producer-Id": "p", "Producer-Epoch": "0", "Producer-Chunk": fmt.Sprint(number)} {
		r.Header.Set(name, value)
	}
	response, err := n.http.Do(r)
	if err != nil {
		return answer{err: err}
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, string(b), err}
}

// Promise: deployments with different prefixes share a Redis, in one database or in several. None hears or reads
// anything of another, although their sessions have the same ids.
func TestPrefix_keepsDeploymentsOnOneRedisApart(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	session, ctx := newID(), deadline(t)
	type deployment struct {
		prefix string
		*node
		v    *viewer
		wait func()
		body *io.PipeWriter
		up   chan answer
	}
	var all []*deployment
	for _, args := range [][]string{{}, {"-prefix", "two:"}, {"-prefix", "chat:three:"}, {"-prefix", "four:", "-redis", redis.URL() + "/1"}} {
		d := &deployment{prefix: "chat:", node: start(t, append([]string{"-redis", redis.URL()}, args...)...), v: &viewer{session: session}, up: make(chan answer, 1)}
		if len(args) > 1 {
			d.prefix = args[1]
		}
		d.append(t, session, words(1, 3))
		d.wait = background(t, func() { d.v.follow(ctx, at(d.addr), nil) })
		body, w := io.Pipe()
		d.body = w
		background(t, func() { d.up <- d.do(ctx, "POST", "/v1/sessions/"+session+"/chunks?message_id=up", "text/plain", body) })
		t.Cleanup(func() { _ = w.Close() }) // before background waits
		if _, err := fmt.Fprintf(w, "%s ", d.prefix); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the viewer has what there is", func() bool { return d.v.seen.Load() == 4 })
		all = append(all, d)
	}
	for _, d := range all {
		for _, channel := range []string{"stream:" + session, "uploads"} {
			if got := redis.PubSubNumSub(ctx, d.prefix+channel).Val()[d.prefix+channel]; got != 1 {
				t.Errorf("%d nodes listen to %s%s, not 1", got, d.prefix, channel)
			}
		}
	}
	// The content of chunk 5, 6, … names its deployment.
	for i := range 20 {
		for _, d := range all {
			d.append(t, session, fmt.Sprintf(`{"content":"%s %d"}`, d.prefix, i))
		}
	}
	all[0].append(t, session, `{"type":"end"}`)
	if a := <-all[0].up; a.problem(t).Code != "session_ended" {
		t.Errorf("the upload to what has ended: %d %s", a.status, a.body)
	}
	for _, d := range all {
		if d != all[0] {
			_ = d.body.Close()
			if a := <-d.up; a.status != http.StatusCreated {
				t.Errorf("the upload to %s: %d %s (%v)", d.prefix, a.status, a.body, a.err)
			}
			d.append(t, session, `{"type":"end"}`)
		}
		d.wait()
		want := d.pages(t, session)
		d.v.check(t, want)
		d.v.unreset(t)
		for i, c := range want[4:24] {
			if !strings.Contains(c, fmt.Sprintf(`"%s %d"`, d.prefix, i)) {
				t.Errorf("chunk %d of %s is %s", i+5, d.prefix, c)
			}
		}
	}
	if a := all[0].do(ctx, "DELETE", "/v1/sessions/"+session, "", nil); a.status != http.StatusNoContent {
		t.Errorf("%d %s", a.status, a.body)
	}
	for _, d := range all[1:] {
		if a := d.get("/v1/sessions/" + session); a.status != http.StatusOK {
			t.Errorf("%s: %d %s", d.prefix, a.status, a.body)
		}
	}
}

func TestPrefix_isAskedForWithAnotherDatabase(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-redis", "redis://127.0.0.1:1/1"}, {"-redis", "redis+sentinel://127.0.0.1:1/main/2"}, {"-redis", "redis://127.0.0.1:1?db=3", "-prefix", "chat:"}} {
		reported(t, nil, args, []string{"-redis", "-prefix", "database", "share their channels"})
	}
	reported(t, []string{"GAPLESS_PREFIX=a b", "GAPLESS_LINGER=-1s"}, nil, []string{"-prefix", `' '`, "-linger"})
}
