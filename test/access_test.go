package test

import (
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"gapless/api/auth/authtest"
	"gapless/store/storetest"
)

// token returns a token that no log may contain.
func token(i *authtest.Issuer, life time.Duration, may authtest.May) string {
	text := i.Token(life, may)
	plant(text, text[strings.LastIndex(text, ".")+1:])
	return text
}

// ticket makes a ticket that no log may contain, and returns the query of its URL.
func (n *node) ticket(t *testing.T, session string) (query string) {
	t.Helper()
	var made struct{ Ticket, URL string }
	a := n.post("/v1/sessions/"+session+"/tickets", "", "")
	if a.status != http.StatusCreated {
		t.Fatalf("ticket: %d %s (%v)", a.status, a.body, a.err)
	}
	decode(t, a.body, &made)
	plant(made.Ticket)
	_, query, _ = strings.Cut(made.URL, "?")
	return "?" + query
}

func TestAccess_withoutAuthOnlyLoopbackIsListenedOn(t *testing.T) {
	t.Parallel()
	for _, address := range []string{":0", "0.0.0.0:0", "[::]:0", "192.0.2.1:0", "host.example:0"} {
		code, out := program(t, nil, "-listen", address)
		for _, word := range []string{"-listen", address, "-auth", "127.0.0.1", "-insecure-open"} {
			if code != 2 || !strings.Contains(out, word) {
				t.Errorf("%s: exit code %d, and nothing of %s: %s", address, code, word, out)
			}
		}
	}
	issuer := authtest.New(t)
	for _, args := range [][]string{{"-insecure-open"}, {"-auth", issuer.Source()}} { // they fail only because nobody has this address
		code, out := program(t, nil, append(args, "-listen", "192.0.2.1:0")...)
		if code != 1 || !strings.Contains(out, "listen on 192.0.2.1:0") {
			t.Errorf("%v: exit code %d: %s", args, code, out)
		}
	}
	if n := start(t, "-insecure-open"); !strings.Contains(n.log.String(), "level=WARN msg=\"-insecure-open: whoever can connect") {
		t.Error("it does not say that it is open")
	}
}

// Bad keys in files or in the environment are refused at the start.
func TestAccess_badKeysAreRefusedAtTheStart(t *testing.T) {
	t.Parallel()
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, []byte("sesame"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out := program(t, []string{"GAPLESS_AUTH=secret:" + short}, "-auth-issuer", "login")
	if code != 2 || !strings.Contains(out, "6 bytes") || !strings.Contains(out, "gapless secret") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// All promises hold with tokens and tickets, too: viewers cut their connections and reconnect to any node.
func TestGapcheck_withTokensAndTicketsAtTwoNodes(t *testing.T) {
	t.Parallel()
	redis, issuer := storetest.Redis(t), authtest.New(t)
	all := nodes(t, 2, redis, "-auth", issuer.Source())
	for _, n := range all {
		n.token = token(issuer, time.Hour, authtest.May{"admin": {"*"}})
	}
	g := gapcheck{nodes: all, redis: redis, chunks: gapChunks / 2, produce: byUpload, ended: true, admit: func(v *viewer) {
		if rand.IntN(2) == 0 {
			v.query = all[rand.IntN(2)].ticket(t, v.session)
		} else {
			v.token = token(issuer, time.Hour, authtest.May{"read": {v.session}})
		}
	}}
	g.run(t)
}

// Of two connections with one ticket, at two nodes, the newer one stays. When the displaced page reconnects, it has
// every chunk once and in order.
func TestAccess_theNewestConnectionOfATicketStays(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis, issuer := storetest.Redis(t), authtest.New(t)
		all := nodes(t, 2, redis, append(args, "-auth", issuer.Source())...)
		for _, n := range all {
			n.token = token(issuer, time.Hour, authtest.May{"admin": {"*"}})
		}
		session := newID()
		all[0].append(t, session, words(1, 2))
		v := &viewer{session: session, query: all[0].ticket(t, session)}
		how := make(chan ending, 1)
		wait := background(t, func() { how <- v.connect(deadline(t), all[0].addr, nil) })
		eventually(t, "the first connection has both", func() bool { return v.seen.Load() == 2 })
		other := &viewer{session: session, query: v.query}
		again := background(t, func() { other.connect(deadline(t), all[1].addr, func(e event) bool { return e.id == "3" }) })
		if h := <-how; h != aborted {
			t.Errorf("the former connection ended: %s", h)
		}
		wait()
		all[0].append(t, session, words(3, 1))
		again()
		v.connect(deadline(t), all[1].addr, func(e event) bool { return e.id == "3" })
		want := all[0].pages(t, session)
		v.check(t, want)
		other.check(t, want)
		redis.Del(deadline(t), keys(t, redis, "chat:ticket:*")...) // as if nobody had been connected for a minute
		all[0].token = ""
		late := all[0].do(deadline(t), "GET", "/v1/sessions/"+session+"/stream"+v.query, "", nil)
		if late.status != http.StatusUnauthorized || !strings.Contains(late.body, "ticket_spent") {
			t.Errorf("a ticket that is spent: %d %s", late.status, late.body)
		}
	})
}

// If a token expires during a stream, an event that a page can read says so, and the stream breaks off without a clean
// end. A client that reconnects with the token learns what to do.
func TestAccess_aStreamEndsWithItsToken(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		issuer := authtest.New(t)
		n := start(t, append(args, "-auth", issuer.Source())...)
		n.token = token(issuer, time.Hour, authtest.May{"admin": {"*"}})
		session := newID()
		n.append(t, session, words(1, 2))
		v := &viewer{session: session, token: token(issuer, 5*time.Second, authtest.May{"read": {session}})}
		v.nextConnection(false)
		var last event
		how := v.raw(deadline(t), n.addr, func(b []byte) bool {
			return v.feed(b, func(e event) bool { last = e; return true })
		})
		if how != aborted || last.name != "expired" || last.id != "2" || last.data != `{"type":"expired"}` {
			t.Errorf("it ended %s behind %+v", how, last)
		}
		n.token = v.token
		a := n.get("/v1/sessions/" + session + "/stream")
		var p struct{ Code, Detail string }
		if err := json.Unmarshal([]byte(a.body), &p); err != nil || a.status != http.StatusUnauthorized || p.Code != "unauthorized" ||
			!strings.Contains(p.Detail, "expired at") || !strings.Contains(p.Detail, "get a new one") {
			t.Errorf("%d %s", a.status, a.body)
		}
	})
}

// Secret words are planted wherever a client can send text. At the end of each node its log, at debug level, must not
// contain them.
func TestAccess_logsHaveNothingThatPeopleSay(t *testing.T) {
	t.Parallel()
	issuer := authtest.New(t)
	n := start(t, "-auth", issuer.Source(), "-auth-cookie", "login")
	session := newID()
	good := token(issuer, time.Hour, authtest.May{"admin": {session}})
	for _, bearer := range []string{good, token(issuer, -time.Hour, nil), "sesame", token(authtest.New(t), time.Hour, nil)} {
		n.token = bearer
		for _, body := range []string{`{"content":"sesame","message_id":"sesame"}`, `{"content":sesame}`, `{"sesame":1,"sesame":2}`, `{"type":5,"content":"sesame"}`, "sesame"} {
			for _, kind := range []string{"application/json", "application/x-ndjson", "text/plain", "text/event-stream", "text/sesame"} {
				n.post("/v1/sessions/"+session+"/chunks?role=sesame", kind, body)
			}
			n.post("/v1/sessions/"+session+"/messages", "application/json", body)
			n.post("/v1/sessions/"+session+"/cancel", "application/json", body)
			n.post("/v1/sessions", "application/json", body)
		}
		for _, path := range []string{"/chunks?limit=sesame", "/sesame", "?access_token=sesame", "%zz-sesame"} {
			n.get("/v1/sessions/" + session + path)
		}
		for _, query := range []string{"?after=sesame", "?ticket=sesame"} {
			v := &viewer{session: session, query: query, token: bearer}
			v.connect(deadline(t), n.addr, func(event) bool { return true })
		}
	}
	n.token = good
	query := n.ticket(t, session)
	n.token = ""
	v := &viewer{session: session, query: query}
	v.connect(deadline(t), n.addr, func(event) bool { return true })
	eventually(t, "the viewer's end is in the log", func() bool { return strings.Contains(n.log.String(), "viewer ends") })
}

// Prometheus needs no token at the separate address for metrics, which serves nothing else.
func TestAccess_metricsAtAnAddressOfTheirOwn(t *testing.T) {
	t.Parallel()
	n := start(t, "-auth", authtest.New(t).Source(), "-metrics", "127.0.0.1:0")
	at := regexp.MustCompile(`flag=-metrics at=(\S+)`).FindStringSubmatch(n.log.String())
	if at == nil {
		t.Fatalf("the log does not say where: %s", n.log.String())
	}
	for url, want := range map[string]int{
		at[1] + "/metrics": http.StatusOK, at[1] + "/": http.StatusNotFound, at[1] + "/v1/sessions/s": http.StatusNotFound,
		"http://" + n.addr + "/metrics": http.StatusUnauthorized,
	} {
		r, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		_ = r.Body.Close()
		if err != nil || r.StatusCode != want || want == http.StatusOK != strings.Contains(string(body), "gapless_build_info{") {
			t.Errorf("%s: %s %.100s", url, r.Status, body)
		}
	}
}
