package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// run requests a message from a part on, as WorkflowChatTransport does.
func (n *node) run(t *testing.T, message string, start int) *uiParts {
	t.Helper()
	return n.ui(t, request{method: "GET", path: fmt.Sprintf("/v1/sessions/s/ui-stream/%s/stream?startIndex=%d", message, start)})
}

// texts returns parts as JSON.
func texts(t *testing.T, all []part) (out []string) {
	t.Helper()
	for _, p := range all {
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(b))
	}
	return out
}

const manyKinds = `[{"message_id":"before","content":"not of it"},{"message_id":"m","type":"reasoning","content":"Hm"},{"message_id":"m","type":"reasoning","content":", tea."},
	{"message_id":"m","content":"Green"},{"message_id":"other","content":"nor this"},{"message_id":"m","content":" tea"},{"message_id":"m","type":"tool_calls","data":[{"index":0}]},{"message_id":"m","content":"."}]`

// Promise: resumable. A part has the same number whenever and wherever it is requested.
func TestUIRun_everyPartHasItsNumberAtEveryNodeDuringAndAfter(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	a, b := serve(t, on(redis)), serve(t, on(redis))
	a.append("s", manyKinds)
	var early []*uiParts
	for start := range 13 { // 12 parts exist by now, and the client has 0 to 12 of them
		early = append(early, []*node{a, b}[start%2].run(t, "m", start))
	}
	tail := b.run(t, "m", -3)
	b.append("s", `[{"message_id":"m","content":"!"},{"message_id":"m","type":"done","finish_reason":"stop"},{"message_id":"after","content":"x"}]`)
	early[0].rest()
	all := texts(t, early[0].all)
	if len(all) != 15 || !strings.Contains(all[14], `"finish"`) {
		t.Fatalf("%d: %q", len(all), all)
	}
	for start, u := range early {
		if start > 0 {
			u.rest()
		}
		if got := texts(t, u.all); !slices.Equal(got, all[start:]) {
			t.Errorf("from %d, during: %q", start, got)
		}
	}
	if tail.rest(); !slices.Equal(texts(t, tail.all), all[9:]) {
		t.Errorf("the last 3, during: %q", texts(t, tail.all))
	}
	for start := range 16 {
		u := []*node{a, b}[start%2].run(t, "m", start)
		for _, ok := u.next(); ok; _, ok = u.next() {
		}
		if got := texts(t, u.all); !slices.Equal(got, all[start:]) {
			t.Errorf("from %d, after: %q", start, got)
		}
		q := request{method: "GET", path: "/v1/sessions/s/ui-stream/m/stream?startIndex=" + strconv.Itoa(-1-start)}
		if u = b.ui(t, q); u.rest().Type != "finish" || !slices.Equal(texts(t, u.all), all[max(0, 14-start):]) {
			t.Errorf("the last %d, after: %q", start+1, texts(t, u.all))
		}
		q.method = "HEAD"
		if got := b.do(q); got.header.Get("X-Workflow-Stream-Tail-Index") != "14" {
			t.Errorf("%v", got.header)
		}
	}
}

// The id in the response to a question leads to the answer.
func TestUIRun_ofAQuestionInPlainText(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	res, err := n.client.Do(n.new(request{method: "POST", path: "/v1/sessions/s/ui-stream", kind: "text/plain;charset=UTF-8", body: uiBody(secret)}))
	if err != nil || res.StatusCode != 200 {
		t.Fatal(res, err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil || !strings.HasSuffix(string(body), "[DONE]\n\n") {
		t.Fatalf("%q %v", body, err)
	}
	u := n.run(t, res.Header.Get("X-Workflow-Run-Id"), 2)
	if last := u.rest(); last.Type != "finish" || u.text.String() != "Yes, "+secret+"." {
		t.Errorf("%s %q", u.kinds(), u.text.String())
	}
}

// The client retries until it receives finish.
func TestUIRun_whateverEndsAMessageIsFollowedByFinish(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	for name, c := range map[string]struct{ chunk, kinds string }{
		"failed":    {`{"message_id":"m","type":"failed","reason":"producer_lost"}`, "error finish"},
		"cancelled": {`{"message_id":"m","type":"cancelled"}`, "abort finish"},
		"end":       {`{"type":"end"}`, "error finish"},
	} {
		path := "/v1/sessions/" + name + "/ui-stream/m/stream"
		n.append(name, `{"message_id":"m","content":"sesame"}`)
		u := n.ui(t, request{method: "GET", path: path + "?startIndex=3"})
		n.append(name, c.chunk)
		if u.rest(); u.kinds() != "text-end "+c.kinds {
			t.Errorf("%s: %s", name, u.kinds())
		}
		u = n.ui(t, request{method: "GET", path: path + "?startIndex=-1"})
		if u.rest(); u.kinds() != "finish" {
			t.Errorf("%s, the last part: %s", name, u.kinds())
		}
	}
}

// Promise: said aloud. If a client has more parts than exist, Redis has lost some.
func TestUIRun_partsThatWereLostAreSaidAloud(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	few := func(s *setup) { on(redis)(s); s.store.HistoryMax = 10 }
	n := serve(t, few)
	lost := func(what string, u *uiParts) {
		t.Helper()
		if u.rest(); u.kinds() != "error finish" {
			t.Errorf("%s: %s", what, u.kinds())
		}
	}
	n.append("s", `[{"message_id":"m","content":"sesame"},{"message_id":"d","content":"sesame"},{"message_id":"d","type":"done"}]`)
	lost("after the end", n.run(t, "d", 6))
	u := n.run(t, "m", 4)
	n.append("s", `{"message_id":"m","content":"another"}`)
	lost("during", u)
	for range 20 {
		n.append("s", `{"message_id":"m","content":"sesame"}`)
	}
	other := serve(t, few) // this node has nothing of the message in memory
	lost("trimmed", other.run(t, "m", 9))
	lost("trimmed", other.run(t, "m", -2))
}

// A page that was just loaded knows no message. It names its chat, which is the session.
func TestUIRun_ofTheSessionIsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	none := func() {
		t.Helper()
		if u := n.run(t, "s", 0); u.rest().Type != "finish" || len(u.all) != 1 {
			t.Errorf("nothing is under way: %q", texts(t, u.all))
		}
	}
	none()
	n.append("s", `[{"message_id":"q","role":"user","content":"typing"},{"message_id":"old","content":"old"},{"message_id":"m","content":"sesame"}]`)
	u, late := n.run(t, "s", 0), n.run(t, "s", 3)
	n.append("s", `[{"message_id":"old","type":"done"},{"message_id":"m","content":"!"},{"message_id":"m","type":"done"}]`)
	if u.rest(); u.all[0].MessageID != "m" || u.text.String() != "sesame!" {
		t.Errorf("%q", texts(t, u.all))
	}
	if late.rest(); late.text.String() != "!" {
		t.Errorf("%q", texts(t, late.all))
	}
	if rest := n.run(t, "s", 4); rest.rest().Type != "finish" || rest.kinds() != "text-end finish" {
		t.Errorf("its last parts, after the end: %s", rest.kinds())
	}
	none()
	n.append("s", `[{"message_id":"s","content":"a message of the session's name"}]`)
	u = n.run(t, "s", 0)
	n.append("s", `{"message_id":"s","type":"done"}`)
	if u.rest(); u.all[0].MessageID != "s" {
		t.Errorf("%q", texts(t, u.all))
	}
	n.do(request{method: "DELETE", path: "/v1/sessions/s"})
	none()
	n.get("/v1/sessions/s/ui-stream/s/stream?startIndex=3").refused(t, 404, "session_not_found")
	n.append("s", `{"role":"user","content":"x"}`)
	n.get("/v1/sessions/s/ui-stream/s/stream?startIndex=3").refused(t, 404, "message_not_found")
}

func TestUIRun_thatIsNoneOrBadIsRefused(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.get("/v1/sessions/s/ui-stream/m/stream").refused(t, 404, "session_not_found")
	n.append("s", `{"content":"x"}`)
	n.get("/v1/sessions/s/ui-stream/m/stream?startIndex=-2").refused(t, 404, "message_not_found")
	for _, bad := range []string{"x", "-0", "1.5", "--1", "01", "12345678901234567"} {
		p := n.do(request{method: "GET", path: "/v1/sessions/s/ui-stream/m/stream?startIndex=" + bad, bad: true}).refused(t, 400, "invalid_parameter")
		if p.Member != "startIndex" {
			t.Errorf("%+v", p)
		}
	}
}

// Temporary trouble is no error to the client: the response ends cleanly, but not at once, because the client retries at once.
func TestUIRun_endsCleanlyWhereItCannotGoOn(t *testing.T) {
	t.Parallel()
	var f *faulty
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) {
		on(redis)(s)
		s.errors, s.sse.Reconcile = true, 50*time.Millisecond
		s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f }
	})
	held := func(what string) {
		t.Helper()
		begun := time.Now()
		u := n.run(t, "m", 2)
		if rest, err := io.ReadAll(u.body); err != nil || len(rest) > 0 || time.Since(begun) < uiPause {
			t.Errorf("%s: %q, %v, after %v", what, rest, err, time.Since(begun))
		}
		if a := n.do(request{method: "HEAD", path: "/v1/sessions/s/ui-stream/m/stream"}); a.status != 200 {
			t.Errorf("%s: HEAD: %d", what, a.status)
		}
	}
	n.append("s", `{"message_id":"m","content":"sesame"}`)
	f.fail(fmt.Errorf("read: %w", store.ErrAway))
	held("Redis is away")
	f.fail(errors.New("a fault"))
	n.get("/v1/sessions/s/ui-stream/m/stream").refused(t, 500, "internal")
	f.fail(nil)
	redis.Set(t.Context(), "chat:history:w", "sesame", 0)
	n.get("/v1/sessions/w/ui-stream/m/stream").refused(t, 500, "redis_wrong_type")

	u := n.run(t, "m", 0)
	for u.text.Len() == 0 {
		u.next()
	}
	n.hub.Drain(0)
	if rest, err := io.ReadAll(u.body); err != nil || strings.Contains(string(rest), "data") {
		t.Errorf("it ended with %q, %v", rest, err)
	}
	held("the hub drains")
	n.api.Drain()
	held("the node drains")
}
