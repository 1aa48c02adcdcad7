package api

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"gapless/api/auth/authtest"
	"gapless/api/model"
	"gapless/store/storetest"
)

// uiBody returns what useChat sends for a question.
func uiBody(question string) string {
	return fmt.Sprintf(`{"id":"s","trigger":"submit-message","messages":[{"id":"q","role":"user","parts":[{"type":"text","text":%q}]}]}`, question)
}

// uiParts is a UI message stream that is read part by part. Each part is checked against the contract.
type uiParts struct {
	t    *testing.T
	body *bufio.Reader
	all  []part
	text strings.Builder
}

// ui asks or resumes. The stream is closed when the test ends.
func (n *node) ui(t *testing.T, q request) *uiParts {
	t.Helper()
	res, err := n.client.Do(n.new(q))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = res.Body.Close() })
	if res.StatusCode != 200 || res.Header.Get("X-Vercel-Ai-Ui-Message-Stream") != "v1" {
		t.Fatalf("%s: %d %v", q.path, res.StatusCode, res.Header)
	}
	return &uiParts{t: t, body: bufio.NewReader(res.Body)}
}

// next returns the next part. ok is false at [DONE], after which nothing may follow.
func (u *uiParts) next() (p part, ok bool) {
	u.t.Helper()
	for {
		line, err := u.body.ReadString('\n')
		if err != nil {
			u.t.Fatalf("instead of a part: %v", err)
		}
		data, is := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "data: ")
		switch {
		case !is:
		case data == "[DONE]":
			if rest, err := io.ReadAll(u.body); err != nil || strings.TrimSpace(string(rest)) != "" {
				u.t.Fatalf("behind [DONE]: %q, %v", rest, err)
			}
			return p, false
		default:
			theContract().Holds(u.t, "UIPart", []byte(data))
			if err := json.Unmarshal([]byte(data), &p); err != nil {
				u.t.Fatal(err)
			}
			u.all = append(u.all, p)
			u.text.WriteString(p.Delta)
			return p, true
		}
	}
}

// rest reads to the end, and returns the last part.
func (u *uiParts) rest() part {
	u.t.Helper()
	for {
		if _, ok := u.next(); !ok {
			return u.all[len(u.all)-1]
		}
	}
}

// kinds returns the types of the parts, with repeated deltas once.
func (u *uiParts) kinds() string {
	var all []string
	for _, p := range u.all {
		if len(all) == 0 || p.Type != "text-delta" || all[len(all)-1] != p.Type {
			all = append(all, p.Type)
		}
	}
	return strings.Join(all, " ")
}

func TestUI_questionIsAnsweredByItsParts(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `[{"content":"before"},{"message_id":"other","content":"and beside"}]`)
	u := n.ui(t, request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody(secret)})
	last := u.rest()
	if last.Type != "finish" || u.text.String() != "Yes, "+secret+"." || u.kinds() != "start text-start text-delta text-end finish" {
		t.Errorf("%s: %q", u.kinds(), u.text.String())
	}
	all := n.chunks("s")
	if q := all[2]; q.Type != "message" || q.Role != "user" || q.Content != secret || u.all[0].MessageID != all[3].Message {
		t.Errorf("%+v", all)
	}
}

// A message that a producer left open under its own name is not the answer that a caller resumes.
func TestUI_resumesTheAnswer(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	n.append("s", `[{"message_id":"m1","content":"left open"},{"message_id":"zz","content":"left open"}]`)
	n.ask("s", secret)
	u := n.ui(t, request{method: "GET", path: "/v1/sessions/s/ui-stream"})
	m.steps <- "sesame"
	close(m.steps)
	if last := u.rest(); last.Type != "finish" || u.text.String() != "sesame" {
		t.Errorf("%s %q", u.kinds(), u.text.String())
	}
}

// Of several messages under way, a reloaded page gets the assistant's that began last: not the one with the greatest
// id, nor the user's own.
func TestUI_resumesTheAssistantsAnswerThatBeganLast(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	const v7 = "01990b6c-7d1e-7c3a-8a51-5d0f6e2b9a10" // an id like those that this server makes
	for i, c := range []struct{ log, want string }{
		{`[{"message_id":"z","role":"assistant","content":"old"},{"message_id":"a","role":"assistant","content":"new"}]`, "a"},
		{`[{"message_id":"z","content":"old"},{"message_id":"a","content":"new"},{"message_id":"z","content":"goes on"}]`, "a"},
		{`[{"message_id":"a","role":"assistant","content":"it"},{"message_id":"z","role":"user","content":"typing"}]`, "a"},
		{`[{"message_id":"a","role":"assistant","content":"it"},{"message_id":"` + v7 + `","role":"user","content":"typing"}]`, "a"},
		{`[{"message_id":"` + v7 + `","content":"old"},{"message_id":"a","content":"new"}]`, "a"},
		{`[{"message_id":"b","content":"old"},{"message_id":"a","content":"new"},{"message_id":"a","type":"done"}]`, "b"},
		{`[{"message_id":"a","content":"it"},{"message_id":"t","role":"tool","content":"42"},{"message_id":"s","role":"system","content":"be brief"}]`, "a"},
		{`[{"message_id":"u","role":"user","content":"typing"}]`, ""},
		{`[{"message_id":"u","role":"user","content":"typing"},{"message_id":"t","role":"tool","content":"42"}]`, ""},
		{`[{"message_id":"u","role":"user","content":"typing"},{"message_id":"u","role":"assistant","content":"still the user's"}]`, ""},
	} {
		s := fmt.Sprint("s", i)
		n.append(s, c.log)
		resume := request{method: "GET", path: "/v1/sessions/" + s + "/ui-stream"}
		if c.want == "" {
			if a := n.do(resume); a.status != 204 {
				t.Errorf("%s: %d", c.log, a.status)
			}
			continue
		}
		u := n.ui(t, resume)
		n.append(s, `[{"message_id":"other","content":"no"},{"message_id":"`+c.want+`","content":"!"},{"message_id":"`+c.want+`","type":"done"}]`)
		if last := u.rest(); last.Type != "finish" || u.all[0].MessageID != c.want || !strings.HasSuffix(u.text.String(), "!") || u.text.Len() < 3 {
			t.Errorf("%s: %+v %q", c.log, u.all[0], u.text.String())
		}
	}
	// A message that another program has ended in the list is not under way, whatever Redis' hash says.
	n.append("foreign", `[{"message_id":"a","content":"it"}]`)
	redis.RPush(t.Context(), "chat:history:foreign", `{"message_id":"a","type":"done"}`)
	if a := n.get("/v1/sessions/foreign/ui-stream"); a.status != 204 {
		t.Errorf("%d", a.status)
	}
}

func TestUI_resumesARunningMessageFromItsBeginningOnAnyNode(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	m := newPaced()
	a, b := serve(t, func(s *setup) { on(redis)(s); s.model = m }), serve(t, on(redis))
	resume := request{method: "GET", path: "/v1/sessions/s/ui-stream"}
	if got := b.do(resume); got.status != 204 {
		t.Fatalf("without a session: %d", got.status)
	}
	asked := a.ask("s", secret)
	before := b.ui(t, resume) // the answer has no word yet
	if p, _ := before.next(); p.Type != "start" || p.MessageID != asked.ReplyID {
		t.Fatalf("%+v", p)
	}
	var want strings.Builder
	for i := range 300 {
		word := fmt.Sprintf("sesame %d \u2028\"\\n</script>\U0001f35e ", i)
		want.WriteString(word)
		m.say(t, word)
		if i == 150 {
			eventually(t, "words", func() bool { return b.page("s", "").Last > 100 })
			b.append("s", `{"message_id":"other","content":"not of it"}`)
		}
	}
	of := b.ui(t, request{method: "GET", path: "/v1/sessions/s/messages/" + asked.ReplyID + "/ui-stream"})
	mid := b.ui(t, request{method: "GET", path: "/v1/sessions/s/messages/other/ui-stream"})
	close(m.steps)
	for name, u := range map[string]*uiParts{"from the first word on": before, "in the middle": of} {
		if last := u.rest(); last.Type != "finish" || u.text.String() != want.String() {
			t.Errorf("%s: %s, %d bytes of %d", name, u.kinds(), u.text.Len(), want.Len())
		}
	}
	b.append("s", `{"message_id":"other","type":"done"}`)
	if mid.rest(); mid.text.String() != "not of it" {
		t.Errorf("%q", mid.text.String())
	}
	for _, path := range []string{resume.path, "/v1/sessions/s/messages/" + asked.ReplyID + "/ui-stream", "/v1/sessions/s/messages/none/ui-stream"} {
		if got := b.get(path); got.status != 204 {
			t.Errorf("%s when nothing runs: %d", path, got.status)
		}
	}
}

func TestUI_everyEndOfAMessageHasItsPart(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	for name, c := range map[string]struct{ chunk, last, more string }{
		"done":      {`{"message_id":"m","type":"done","finish_reason":"content_filter"}`, "finish", "content-filter"},
		"failed":    {`{"message_id":"m","type":"failed","reason":"model_empty","detail":"it said nothing"}`, "error", "it said nothing"},
		"lost":      {`{"message_id":"m","type":"failed","reason":"producer_lost"}`, "error", "producer_lost"},
		"cancelled": {`{"message_id":"m","type":"cancelled"}`, "abort", ""},
		"end":       {`{"type":"end"}`, "error", "ended"},
		"complete":  {`{"message_id":"m","content":"!","is_complete":true}`, "finish", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n.append(name, `[{"message_id":"m","content":"sesame"},{"message_id":"m","type":"tool_calls","data":[{"a":1}]},{"message_id":"m","content":"."}]`)
			u := n.ui(t, request{method: "GET", path: "/v1/sessions/" + name + "/ui-stream"})
			for u.text.String() != "sesame." {
				u.next()
			}
			n.append(name, c.chunk)
			last := u.rest()
			if last.Type != c.last || !strings.Contains(last.ErrorText+last.FinishReason, c.more) {
				t.Errorf("%+v", last)
			}
			if want := "start text-start text-delta text-end data-tool_calls text-start text-delta text-end " + c.last; u.kinds() != want {
				t.Errorf("%s", u.kinds())
			}
		})
	}
}

// A stream that cannot continue must not end as if the answer had.
func TestUI_breaksOffWhereItCannotGoOn(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(n *node, redis *storetest.Server){
		"the node drains":        func(n *node, _ *storetest.Server) { n.hub.Drain(0) },
		"the session is deleted": func(n *node, _ *storetest.Server) { n.do(request{method: "DELETE", path: "/v1/sessions/s"}) },
		"the log is another one": func(_ *node, redis *storetest.Server) { redis.FlushAll(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := storetest.Redis(t)
			n := serve(t, func(s *setup) { on(redis)(s); s.sse.Reconcile = 50 * time.Millisecond })
			n.append("s", `{"message_id":"m","content":"sesame"}`)
			u := n.ui(t, request{method: "GET", path: "/v1/sessions/s/ui-stream"})
			for u.text.Len() == 0 {
				u.next()
			}
			stop(n, redis)
			if rest, err := io.ReadAll(u.body); err == nil || strings.Contains(string(rest), "DONE") {
				t.Errorf("it ended with %q, %v", rest, err)
			}
		})
	}
}

// Promise: losses are reported. If the beginning of a message was trimmed, no client gets the rest as if it were whole.
func TestUI_aMessageWhoseBeginningIsGoneIsAnError(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.HistoryMax = 10 })
	for range 20 {
		n.append("s", `{"message_id":"m","content":"sesame"}`)
	}
	u := n.ui(t, request{method: "GET", path: "/v1/sessions/s/ui-stream"})
	if last := u.rest(); last.Type != "error" || u.text.Len() > 0 {
		t.Errorf("%s", u.kinds())
	}
	// A message that began after the trim is whole.
	n.append("s", `[{"message_id":"m","type":"done"},{"message_id":"n","content":"whole"}]`)
	u = n.ui(t, request{method: "GET", path: "/v1/sessions/s/ui-stream"})
	n.append("s", `{"message_id":"n","type":"done"}`)
	if last := u.rest(); last.Type != "finish" || u.text.String() != "whole" {
		t.Errorf("%s %q", u.kinds(), u.text.String())
	}
	// So is a message of a log that was created again.
	n.do(request{method: "DELETE", path: "/v1/sessions/s"})
	n.append("s", `{"message_id":"o","content":"new"}`)
	u = n.ui(t, request{method: "GET", path: "/v1/sessions/s/ui-stream"})
	n.append("s", `{"message_id":"o","type":"done"}`)
	if last := u.rest(); last.Type != "finish" || u.text.String() != "new" {
		t.Errorf("%s %q", u.kinds(), u.text.String())
	}
}

func TestUI_badQuestionsAreRefusedAndStoreNothing(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.api.ChunkMax, s.api.BodyMax, s.api.Limits.Answers, s.model = 2<<10, 10<<10, 1, m })
	long := strings.Repeat("x", 4<<10)
	post := func(kind, body string) answer {
		return n.do(request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: kind, body: body, bad: true})
	}
	for _, c := range []struct {
		kind, body   string
		status       int
		code, member string
	}{
		{typeJSON, ``, 400, "invalid_json", ""},
		{typeText, `sesame`, 400, "invalid_json", ""},
		{typeJSON, `{"messages":5}`, 400, "invalid_json", "/messages"},
		{typeJSON, `{"messages":[{"role":"user","parts":[{"type":"text","text":5}]}]}`, 400, "invalid_json", "/messages/0/parts/0/text"},
		{typeJSON, `{"messages":[],"messages":[]}`, 400, "invalid_json", ""},
		{typeJSON, `{}`, 400, "invalid_content", "/messages"},
		{typeJSON, `{"messages":[{"role":"assistant","parts":[]}]}`, 400, "invalid_content", "/messages"},
		{typeJSON, `{"messages":[{"role":"user","parts":[]}]}`, 400, "invalid_content", "/messages/0/parts"},
		{typeJSON, `{"messages":[{"role":"user","parts":[{"type":"text","text":"a"},{"type":"file","url":"x"}]}]}`, 400, "invalid_content", "/messages/0/parts/1"},
		{typeNDJSON, `sesame`, 415, "unsupported_media_type", "Content-Type"},
		{typeJSON, uiBody(long), 413, "content_too_large", "/messages/0/parts"},
		{typeJSON, uiBody(long + long + long), 413, "body_too_large", ""},
	} {
		if p := post(c.kind, c.body).refused(t, c.status, c.code); p.Member != c.member {
			t.Errorf("%.60s: %+v", c.body, p)
		}
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
	n.append("over", `{"type":"end"}`)
	n.post("/v1/sessions/over/ui-stream", typeJSON, uiBody("sesame")).refused(t, 409, "session_ended")
	n.ask("t", secret)
	post(typeJSON, uiBody("sesame")).refused(t, 429, "model_busy")
	n.api.Drain()
	for _, q := range []request{
		{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody("sesame")},
		{method: "GET", path: "/v1/sessions/s/ui-stream"}, {method: "GET", path: "/v1/sessions/s/messages/m/ui-stream"},
	} {
		n.do(q).refused(t, 503, "draining")
	}
}

func TestUI_stopIsHarmlessWhereNothingIsLeftToStop(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	stop := func(session, message string) answer {
		return n.do(request{method: "POST", path: "/v1/sessions/" + session + "/messages/" + message + "/stop", bad: len(message) > 256})
	}
	stop("s", "m").refused(t, 404, "session_not_found")
	const id = "a%2Fb%20%F0%9F%8D%9E" // any text may be an id
	n.append("s", `[{"message_id":"a/b 🍞","content":"sesame"},{"message_id":"d","type":"done"}]`)
	u := n.ui(t, request{method: "GET", path: "/v1/sessions/s/messages/" + id + "/ui-stream"})
	for range 2 {
		if got := stop("s", id); got.status != 204 {
			t.Errorf("%d %s", got.status, got.body)
		}
	}
	if last := u.rest(); last.Type != "abort" {
		t.Errorf("%+v", last)
	}
	if got := stop("s", "d"); got.status != 204 {
		t.Errorf("%d %s", got.status, got.body)
	}
	stop("s", "none").refused(t, 404, "message_not_found")
	long := strings.Repeat("m", 257)
	stop("s", long).refused(t, 400, "invalid_parameter")
	n.do(request{method: "GET", path: "/v1/sessions/s/messages/" + long + "/ui-stream", bad: true}).refused(t, 400, "invalid_parameter")
	if all := n.chunks("s"); len(all) != 3 || all[2].Type != "cancelled" {
		t.Errorf("%+v", all)
	}
	n.append("s", `[{"message_id":"z"},{"type":"end"}]`)
	if got := stop("s", "z"); got.status != http.StatusNoContent {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// If a viewer's permission expires, its stream breaks off, and does not end as if the answer had.
func TestUI_streamEndsWithItsToken(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	token := issuer.Token(5*time.Second, authtest.May{"read": {"s"}, "write": {"s"}})
	if a := n.do(bearing(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"message_id":"m","content":"sesame"}`}, token)); a.status != 201 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	u := n.ui(t, bearing(request{method: "GET", path: "/v1/sessions/s/ui-stream"}, token))
	for u.text.Len() == 0 {
		u.next()
	}
	if rest, err := io.ReadAll(u.body); err == nil || strings.Contains(string(rest), "DONE") || strings.Contains(string(rest), "expired") {
		t.Errorf("it ended with %q, %v", rest, err)
	}
}

// A model's reasoning has its own kind of part, which is closed before the next part begins.
func TestUI_thinkingIsReasoningParts(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) {
		s.model = failing(nil, model.Piece{Text: "Hm", Reasoning: true}, model.Piece{Text: ", tea.", Reasoning: true}, model.Piece{Text: "Green"},
			model.Piece{ToolCalls: []byte(`[{"index":0}]`)}, model.Piece{Text: "Or", Reasoning: true}, model.Piece{Text: " tea"})
	})
	u := n.ui(t, request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: typeJSON, body: uiBody(secret)})
	u.rest()
	var kinds []string
	for _, p := range u.all {
		kinds = append(kinds, strings.TrimSpace(p.Type+" "+p.ID+" "+p.Delta))
	}
	want := "start, reasoning-start reasoning-1, reasoning-delta reasoning-1 Hm, reasoning-delta reasoning-1 , tea., reasoning-end reasoning-1, " +
		"text-start text-1, text-delta text-1 Green, text-end text-1, data-tool_calls, reasoning-start reasoning-2, reasoning-delta reasoning-2 Or, reasoning-end reasoning-2, " +
		"text-start text-2, text-delta text-2  tea, text-end text-2, finish"
	if got := strings.Join(kinds, ", "); got != want {
		t.Errorf("%s\nand not\n%s", got, want)
	}
}
