package api

import (
	"context"
	"fmt"
	"iter"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/api/model"
	"gapless/store"
	"gapless/store/storetest"
)

func (n *node) cancel(session, message string) answer {
	n.t.Helper()
	if message == "" {
		return n.post("/v1/sessions/"+session+"/cancel", "", "")
	}
	return n.post("/v1/sessions/"+session+"/cancel", typeJSON, fmt.Sprintf(`{"message_id":%q}`, message))
}

func TestCancel_saysWhatItStoppedAndWhatCannotBe(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.cancel("s", "").refused(t, 404, "session_not_found")
	n.append("s", `[{"message_id":"m","content":"sesame"},{"message_id":"n"},{"message_id":"f","type":"done"},{"message_id":"g","is_complete":true}]`)
	n.cancel("s", "x").refused(t, 404, "message_not_found")
	for _, f := range []string{"f", "g"} {
		if p := n.cancel("s", f).refused(t, 409, "message_ended"); p.Message != f {
			t.Errorf("%+v", p)
		}
	}
	got := into[cancelledJSON](t, n.cancel("s", "m"), 200)
	if got.First != 5 || got.Last != 5 || got.Count != 1 || !slices.Equal(got.Messages, []string{"m"}) || got.Epoch == "" {
		t.Errorf("%+v", got)
	}
	for range 2 {
		if got := into[cancelledJSON](t, n.cancel("s", "m"), 200); got.Count != 0 || got.Last != 5 || len(got.Messages) != 0 {
			t.Errorf("%+v", got)
		}
	}
	for kind, body := range map[string]string{typeJSON: `{"message_id":"m"}`, typeNDJSON: `{"message_id":"m"}`, typeText: "sesame", typeEvents: "data: x\n\n"} {
		if p := n.post("/v1/sessions/s/chunks?message_id=m", kind, body).refused(t, 409, "message_cancelled"); p.Message != "m" {
			t.Errorf("%+v", p)
		}
	}
	if got := into[cancelledJSON](t, n.post("/v1/sessions/s/cancel", typeJSON, "{}"), 200); !slices.Equal(got.Messages, []string{"n"}) {
		t.Errorf("%+v", got)
	}
	all := n.chunks("s")
	if last := all[len(all)-2:]; last[0].Type != "cancelled" || last[0].Message != "m" || last[1].Type != "cancelled" || last[1].Message != "n" || len(all) != 6 {
		t.Errorf("%+v", all)
	}
	n.append("s", `[{"message_id":"z"},{"type":"end"}]`)
	n.cancel("s", "z").refused(t, 409, "session_ended")
	for body, code := range map[string]string{`{"message":"m"}`: "invalid_json", `[]`: "invalid_json", `{"message_id":7}`: "invalid_json",
		`{"message_id":""}`: "invalid_parameter", `{"message_id":"` + strings.Repeat("m", 257) + `"}`: "invalid_parameter"} {
		n.do(request{method: "POST", path: "/v1/sessions/s/cancel", kind: typeJSON, body: body, bad: true}).refused(t, 400, code)
	}
	n.do(request{method: "POST", path: "/v1/sessions/s/cancel", kind: typeText, body: `{}`, bad: true}).refused(t, 415, "unsupported_media_type")
	n.do(request{method: "POST", path: "/v1/sessions/s/cancel", kind: typeJSON, body: strings.Repeat(" ", 9<<20), bad: true}).refused(t, 413, "body_too_large")
}

// A silent upload under way gets its response when any node cancels its message.
func TestCancel_endsAnUploadUnderWayAtOnce(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	unasking := func(s *setup) { on(redis)(s); s.api.Look = time.Hour } // only a notification reaches it in time
	a, b := serve(t, unasking), serve(t, unasking)
	for name, c := range map[string]struct{ query, line string }{
		"said by its lines":   {"", `{"message_id":"m","content":"sesame"}` + "\n"},
		"said by the request": {"?message_id=m", `{"content":"sesame"}` + "\n"},
	} {
		s := strings.ReplaceAll(name, " ", "-")
		f := a.uploadWith(t, s, c.query, nil)
		f.write(c.line)
		eventually(t, "a chunk", func() bool { return b.get("/v1/sessions/"+s).status == 200 && b.page(s, "").Last == 1 })
		if got := into[cancelledJSON](t, b.cancel(s, ""), 200); !slices.Equal(got.Messages, []string{"m"}) {
			t.Fatalf("%+v", got)
		}
		p := f.result().refused(t, 409, "message_cancelled")
		if p.Message != "m" || p.Stored == nil || p.Stored.Count != 1 {
			t.Errorf("%+v", p)
		}
		if all := b.chunks(s); len(all) != 2 || all[1].Type != "cancelled" {
			t.Errorf("%+v", all)
		}
	}
}

// A text that has not begun can be stopped, too.
func TestCancel_ofAnUploadThatHasSaidNothing(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	c := n.raw(t)
	fmt.Fprint(c, "POST /v1/sessions/s/chunks?message_id=m HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
	eventually(t, "the message", func() bool { return n.cancel("s", "m").status == 200 })
	res, err := http.ReadResponse(c.Reader, nil)
	if err != nil || res.StatusCode != 409 || !res.Close {
		t.Fatalf("%v %v", res, err)
	}
	if all := n.chunks("s"); len(all) != 1 || all[0].Type != "cancelled" {
		t.Errorf("%+v", all)
	}
}

// If every name on the channel of uploads is lost, an upload still learns of a cancel, by the time of its next look.
func TestCancel_isNoticedThoughNobodyIsTold(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) {
		s.store.Redis, s.api.Look = redis.URL(), 200*time.Millisecond
		s.logs = func(l Logs) Logs { return &deaf{l} }
	})
	f := n.upload(t, "s", nil)
	f.write(`{"message_id":"m"}` + "\n")
	eventually(t, "a chunk", func() bool { return n.cancel("s", "m").status == 200 })
	f.result().refused(t, 409, "message_cancelled")
}

// deaf are logs whose uploads get no notifications.
type deaf struct{ Logs }

func (d *deaf) ListenUploads(store.Listener) func() { return func() {} }

// An answer can be stopped before its first word, and a silent model stops at once.
func TestCancel_stopsTheModel(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	a := n.ask("s", secret)
	if got := into[cancelledJSON](t, n.cancel("s", a.ReplyID), 200); got.Count != 1 {
		t.Errorf("%+v", got)
	}
	if how := within(t, "the model's end", m.ended); how != "over" {
		t.Error(how)
	}
	if all := n.chunks("s"); len(all) != 2 || all[1].Type != "cancelled" || all[1].Message != a.ReplyID {
		t.Errorf("%+v", all)
	}
	n.cancel("s", a.MessageID).refused(t, 404, "message_not_found") // a question is not under way
}

// Promise: no chunk of a message follows its cancelled chunk, whichever nodes append.
func TestCancel_racesWithAppendsOnTwoNodes(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	nodes := []*node{serve(t, on(redis)), serve(t, on(redis))}
	rounds := 1000
	if testing.Short() {
		rounds = 100
	}
	var wg sync.WaitGroup
	each := make(chan int)
	for range 4 {
		wg.Go(func() {
			for round := range each {
				s := fmt.Sprint("s", round)
				path := "/v1/sessions/" + s + "/chunks"
				var race sync.WaitGroup
				for _, n := range nodes {
					race.Go(func() {
						for {
							a, err := n.send(n.new(request{method: "POST", path: path, kind: typeJSON, body: `{"message_id":"m"}`}))
							if err != nil {
								t.Error(err)
								return
							}
							if a.status == 409 && strings.Contains(string(a.body), "message_cancelled") {
								return
							}
							if a.status != 201 {
								t.Errorf("%d %s", a.status, a.body)
								return
							}
						}
					})
				}
				race.Go(func() {
					for {
						a, err := nodes[round%2].send(nodes[round%2].new(request{method: "POST", path: "/v1/sessions/" + s + "/cancel"}))
						if err != nil || a.status != 200 && a.status != 404 {
							t.Errorf("%d %s (%v)", a.status, a.body, err)
							return
						}
						if strings.Contains(string(a.body), `"count":1`) {
							return
						}
					}
				})
				race.Wait()
				list := redis.LRange(context.Background(), "chat:history:"+s, 0, -1).Val()
				if len(list) == 0 || !strings.Contains(list[len(list)-1], `"type":"cancelled"`) || strings.Contains(strings.Join(list[:len(list)-1], ""), "cancelled") {
					t.Errorf("%q", list)
				}
			}
		})
	}
	for round := range rounds {
		each <- round
	}
	close(each)
	wg.Wait()
}

// Promise: every answer ends.
func TestDeath_anUploadThatBreaksEndsItsMessages(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.Grace, s.api.Look = 10*time.Second, 200*time.Millisecond })
	for name, c := range map[string]struct {
		query, header, kind, body string
		min, max                  time.Duration
		content                   string
	}{
		"lines":        {"", "", typeNDJSON, `{"message_id":"m"}` + "\n", 0, 8 * time.Second, ""},
		"text":         {"?message_id=m", "", typeText, "sesame\xc3", 0, 8 * time.Second, "sesame"},
		"events":       {"?message_id=m", "", typeEvents, "data: x\n\ndata: torn", 0, 8 * time.Second, ""},
		"with numbers": {"?message_id=m", "Producer-Id: p\r\nProducer-Epoch: 0\r\nProducer-Chunk: 0\r\n", typeText, "sesame", 8 * time.Second, time.Minute, "sesame"},
		"with a lease": {"?message_id=m&lease=1s", "", typeText, "sesame", 700 * time.Millisecond, 4 * time.Second, "sesame"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := strings.ReplaceAll(name, " ", "-")
			v := n.watch(s, "")
			v.welcome()
			c1 := n.raw(t)
			fmt.Fprintf(c1, "POST /v1/sessions/%s/chunks%s HTTP/1.1\r\nHost: localhost\r\n%sContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", s, c.query, c.header, c.kind, len(c.body), c.body)
			if e := v.next(); e.Message != "m" || e.Content != c.content {
				t.Fatalf("%+v", e)
			}
			begun := time.Now()
			_ = c1.Conn.(*net.TCPConn).SetLinger(0)
			c1.Close()
			e := v.next()
			if e.id != 2 || e.Type != "failed" || e.Message != "m" || e.Reason != "producer_lost" {
				t.Errorf("%+v", e)
			}
			if took := time.Since(begun); took < c.min || took > c.max {
				t.Errorf("after %v", took)
			}
			n.post("/v1/sessions/"+s+"/chunks?message_id=m", typeJSON, "{\"data\":0}").refused(t, 409, "message_ended")
		})
	}
}

// A model that reasons is silent for minutes. Its upload counts as alive while it is open.
func TestDeath_aSilentUploadIsAlive(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.Grace, s.api.Look = 4*time.Second, 150*time.Millisecond })
	f := n.uploadWith(t, "s", "?message_id=m&lease=4s", nil)
	f.write(`{"content":"sesame"}` + "\n")
	until := time.Now().Add(9 * time.Second)
	eventually(t, "time", func() bool {
		if all := n.get("/v1/sessions/s/chunks"); all.status == 200 && strings.Contains(string(all.body), "failed") {
			t.Fatalf("%s", all.body)
		}
		return time.Now().After(until)
	})
	f.write(`{"content":"sesame"}` + "\n")
	f.w.Close()
	into[Stored](t, f.result(), 201)
	// From now on its lease applies.
	eventually(t, "the end of its lease", func() bool {
		all := n.chunks("s")
		return len(all) == 3 && all[2].Type == "failed"
	})
}

func TestLease_isOfAMessageAndIsRenewedByAnEmptyArray(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	post := func(query, body string) answer {
		return n.do(request{method: "POST", path: "/v1/sessions/s/chunks" + query, kind: typeJSON, body: body, bad: true})
	}
	for _, q := range []string{"lease=x", "lease=0s", "lease=-5s", "lease=999ms", "lease=25h", "lease=30"} {
		if p := post("?message_id=m&"+q, "{\"data\":0}").refused(t, 400, "invalid_parameter"); p.Member != "lease" {
			t.Errorf("%s: %+v", q, p)
		}
	}
	post("?lease=1s", "{\"data\":0}").refused(t, 400, "invalid_parameter")
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
	begun := time.Now()
	into[Stored](t, post("?message_id=m&lease=4s", "[]"), 201) // the message begins before its first chunk
	for range 4 {
		time.Sleep(1500 * time.Millisecond) // the pace of its producer
		into[Stored](t, post("?message_id=m", "[]"), 201)
	}
	if all := n.chunks("s"); len(all) != 0 || time.Since(begun) < 5*time.Second {
		t.Fatalf("%+v", all)
	}
	eventually(t, "the lease's end", func() bool { all := n.chunks("s"); return len(all) == 1 && all[0].Type == "failed" })
	post("?message_id=m", "[]").refused(t, 409, "message_ended")
	post("?message_id=m", "{\"data\":0}").refused(t, 409, "message_ended")
}

// A panic of a model is an error of the model, not of the node.
func TestMessages_modelThatPanicsHasFailed(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) {
		s.errors = true
		s.model = answers(func(context.Context, []model.Turn) iter.Seq2[model.Piece, error] {
			return func(yield func(model.Piece, error) bool) {
				if yield(model.Piece{Text: "sesame"}, nil) {
					panic("out of words")
				}
			}
		})
	})
	v := n.watch("s", "?until=done")
	v.welcome()
	n.ask("s", secret)
	all := v.talk(0)
	if last := all[len(all)-1]; len(all) != 3 || last.Type != "failed" || last.Reason != "model_failed" {
		t.Errorf("%+v", all)
	}
}

// An upload is watched while it lasts, and no longer.
func TestUploads_leaveNoSubscription(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	f, g := n.upload(t, "s", nil), n.upload(t, "t", nil)
	f.write(line("sesame"))
	g.write(line("sesame"))
	channels := func() []string { return redis.PubSubChannels(t.Context(), "*").Val() }
	eventually(t, "a subscription", func() bool { return slices.Equal(channels(), []string{"chat:uploads"}) })
	f.w.Close()
	into[Stored](t, f.result(), 201)
	if got := channels(); len(got) != 1 {
		t.Error(got)
	}
	g.w.Close()
	into[Stored](t, g.result(), 201)
	eventually(t, "no subscription", func() bool { return len(channels()) == 0 })
}

// A client that has the tag of a page of an ended log does not get the page again.
func TestRead_pageOfAnEndedLogHasATag(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.HistoryMax = 5 })
	n.append("s", `[{"content":"sesame"},{"data":0}]`)
	get := func(query, tag string) answer {
		return n.do(request{method: "GET", path: "/v1/sessions/s/chunks" + query, header: map[string]string{"If-None-Match": tag}})
	}
	if a := get("", ""); a.header.Get("ETag") != "" || a.header.Get("Cache-Control") != "no-cache" {
		t.Error(a.header)
	}
	if a := get("", "*"); a.status != 200 {
		t.Error(a.status)
	}
	n.append("s", `[{"data":0},{"type":"end"}]`)
	tags := map[string]bool{}
	for _, query := range []string{"", "?after=1", "?limit=2"} {
		a := get(query, "")
		tag := a.header.Get("ETag")
		if a.status != 200 || !strings.HasPrefix(tag, `"`) || tags[tag] {
			t.Errorf("%s: %d %s", query, a.status, tag)
		}
		tags[tag] = true
		for _, have := range []string{tag, "W/" + tag, `"x", ` + tag, "*"} {
			if a := get(query, have); a.status != 304 || len(a.body) != 0 || a.header.Get("ETag") != tag {
				t.Errorf("%s %s: %d %s", query, have, a.status, a.body)
			}
		}
		if a := get(query, `"x"`); a.status != 200 {
			t.Error(a.status)
		}
	}
	n.do(request{method: "DELETE", path: "/v1/sessions/s"})
	get("", "*").refused(t, 404, "session_not_found")
}

// Pages stay correct while the log is trimmed: each page begins where the last one ended, or says that it does not.
func TestRead_pagesOfALogThatIsTrimmedMeanwhile(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.Redis, s.store.HistoryMax = storetest.Redis(t).URL(), 200 })
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // ended by stop
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				n.append("s", fmt.Sprintf(`[{"content":"%d"},{"content":"%d"}]`, 2*i+1, 2*i+2))
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	eventually(t, "a log", func() bool { return n.get("/v1/sessions/s").status == 200 && n.page("s", "?limit=1").Last > 250 })
	after, jumps := int64(0), 0
	for range 200 {
		p := n.page("s", fmt.Sprintf("?limit=37&after=%d", after))
		if p.From != max(after+1, p.First) || p.Last-p.First+1 > 200 {
			t.Fatalf("%d: %+v", after, p)
		}
		if p.From > after+1 {
			jumps++
		}
		for i, c := range decoded(t, p.Chunks) {
			if c.Seq != p.From+int64(i) || c.Content != fmt.Sprint(c.Seq) {
				t.Fatalf("%+v at %d", c, p.From+int64(i))
			}
			after = c.Seq
		}
		if after >= p.Last {
			after = 0
		}
	}
	if jumps == 0 {
		t.Error("nothing was trimmed meanwhile")
	}
}
