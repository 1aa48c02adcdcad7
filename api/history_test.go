package api

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"gapless/sse"
	"gapless/store/storetest"
)

// messagesJSON is the conversation as clients see it, with the members that it shares with a snapshot.
type messagesJSON struct {
	Epoch    string           `json:"epoch"`
	First    int64            `json:"first_seq"`
	Last     int64            `json:"last_seq"`
	Ended    bool             `json:"ended"`
	Messages []map[string]any `json:"messages"`
	Next     int64            `json:"next_after"`
}

func (n *node) messages(session, query string) messagesJSON {
	n.t.Helper()
	return into[messagesJSON](n.t, n.get("/v1/sessions/"+session+"/messages"+query), 200)
}

// snapshot returns the snapshot at the start of a stream.
func (n *node) snapshot(session string) (m messagesJSON) {
	n.t.Helper()
	s := n.watch(session, "?snapshot=1")
	s.welcome()
	e := s.next()
	if err := json.Unmarshal([]byte(e.data), &m); err != nil || e.name != "snapshot" {
		n.t.Fatalf("%+v: %v", e, err)
	}
	s.stop()
	return m
}

// Whatever a log contains, its messages, and its pages of messages, equal those of a snapshot.
func TestMessages_areThoseOfASnapshotInPagesOfAnySize(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { on(redis)(s); s.sse.Reconcile = 50 * time.Millisecond })
	elements := []string{
		`{"message_id":"a","role":"user","content":"a "}`, `{"message_id":"b","content":"b "}`, `{"message_id":"b","type":"reasoning","content":"hm "}`,
		`{"message_id":"a","type":"done"}`, `{"message_id":"b","type":"failed","reason":"model_\"x\""}`, `{"content":"nobody's "}`, `{"role":"user","content":"u "}`,
		`{"message_id":"c\ud83c\udf75","type":"tool_calls","data":[{"a":1}]}`, `{"type":"message","message_id":"d","role":"user","content":"whole"}`, `no JSON`,
		`{"type":"end"}`, `{"message_id":"b","content":"\ud83c"}`, `{"seq":7,"ts":3,"type":"delta","message_id":"a","content":"copied "}`, `{"type":"done"}`,
	}
	number := 0
	rapid.Check(t, func(rt *rapid.T) {
		number++
		s := fmt.Sprint("s", number)
		n.append(s, `{"message_id":"first","content":"ours"}`)
		for _, e := range rapid.SliceOfN(rapid.SampledFrom(elements), 0, 25).Draw(rt, "elements") {
			redis.RPush(t.Context(), "chat:history:"+s, e)
		}
		want := n.snapshot(s)
		all := n.messages(s, "")
		if all.Next = 0; !reflect.DeepEqual(all, want) {
			rt.Fatalf("%+v\nand the snapshot\n%+v", all, want)
		}
		limit := rapid.IntRange(1, 5).Draw(rt, "limit")
		var paged []map[string]any
		for after := int64(0); ; {
			a := n.get("/v1/sessions/" + s + "/messages?limit=" + strconv.Itoa(limit) + "&after=" + strconv.FormatInt(after, 10))
			p := into[messagesJSON](t, a, 200)
			paged = append(paged, p.Messages...)
			link := a.header.Get("Link")
			if more := strings.Contains(string(a.body), "next_after"); more != (link != "") || len(p.Messages) > limit || more && !strings.Contains(link, fmt.Sprintf("after=%d", p.Next)) {
				rt.Fatalf("%s, Link %q", a.body, link)
			} else if !more {
				break
			}
			after = p.Next
		}
		if !reflect.DeepEqual(paged, want.Messages) {
			rt.Fatalf("%+v\nand the snapshot\n%+v", paged, want.Messages)
		}
		for _, m := range want.Messages {
			id, named := m["message_id"].(string)
			if !named || id == "" || strings.Contains(id, "\ufffd") {
				continue
			}
			if got := into[map[string]any](t, n.get("/v1/sessions/"+s+"/messages/"+strings.ReplaceAll(id, "\U0001f375", "%F0%9F%8D%B5")), 200); !reflect.DeepEqual(got, m) {
				rt.Fatalf("%+v, and %+v", got, m)
			}
		}
	})
}

func TestMessages_forTheAISDK(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `[{"type":"message","message_id":"q","role":"user","content":"Tea?"},{"message_id":"a","type":"reasoning","content":"h"},{"message_id":"a","type":"reasoning","content":"m"},
		{"message_id":"a","content":"Yes, "},{"message_id":"a","type":"tool_calls","data":{"kettle":[1,"\u2028"]}},{"message_id":"a","content":"please."},{"message_id":"a","type":"done"},
		{"message_id":"t","role":"tool","content":"42","is_complete":true},{"message_id":"i","role":"developer","content":"Be brief.","is_complete":true},
		{"message_id":"e","raw":"x"},{"message_id":"e","type":"done"},{"message_id":"f","content":"half"},{"message_id":"f","type":"cancelled"},{"content":"no name"},{"type":"done"},
		{"message_id":"run","content":"under way"}]`)
	got := into[[]sse.UIMessage](t, n.get("/v1/sessions/s/messages?format=ui"), 200)
	text := func(s string) sse.UIPart { return sse.UIPart{Type: "text", Text: s, State: "done"} }
	want := []sse.UIMessage{
		{ID: "q", Role: "user", Parts: []sse.UIPart{text("Tea?")}},
		{ID: "a", Role: "assistant", Parts: []sse.UIPart{{Type: "reasoning", Text: "hm", State: "done"}, text("Yes, please."), {Type: "data-tool_calls", Data: json.RawMessage(`{"kettle":[1,"\u2028"]}`)}}},
		{ID: "i", Role: "system", Parts: []sse.UIPart{text("Be brief.")}},
		{ID: "f", Role: "assistant", Parts: []sse.UIPart{text("half")}},
		{ID: "seq-14", Role: "assistant", Parts: []sse.UIPart{text("no name")}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	// resume returns everything that is under way, and nothing else.
	u := n.ui(t, request{method: "GET", path: "/v1/sessions/s/ui-stream"})
	if p, _ := u.next(); p.MessageID != "run" {
		t.Errorf("%+v", p)
	}
	n.post("/v1/sessions/empty", "", "")
	for path, want := range map[string]string{"/v1/sessions/empty/messages?format=ui": "[]", "/v1/sessions/s/messages?format=ui&after=99": "[]"} {
		if a := n.get(path); a.status != 200 || string(a.body) != want {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

func TestMessages_saysWhatIsWrongAndWhatHasNotChanged(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	const path = "/v1/sessions/s/messages"
	for _, p := range []string{path, path + "?format=ui", path + "/m"} {
		n.get(p).refused(t, 404, "session_not_found")
	}
	n.append("s", `[{"message_id":"m","content":"sesame"},{"message_id":"a/b 🍞","content":"bread","is_complete":true}]`)
	n.get(path+"/none").refused(t, 404, "message_not_found")
	for _, bad := range []string{"?after=x", "?after=-1", "?limit=0", "?limit=1001", "?limit=x", "?format=json", "?format=raw"} {
		n.do(request{method: "GET", path: path + bad, bad: true}).refused(t, 400, "invalid_parameter")
	}
	n.do(request{method: "GET", path: path + "/" + strings.Repeat("x", 257), bad: true}).refused(t, 400, "invalid_parameter")
	n.do(request{method: "GET", path: "/v1/sessions/a%20b/messages", bad: true}).refused(t, 400, "invalid_session_id")
	n.do(request{method: "GET", path: "/v1/sessions/a%20b/messages/m", bad: true}).refused(t, 400, "invalid_session_id")
	if m := into[map[string]any](t, n.get(path+"/a%2Fb%20%F0%9F%8D%9E"), 200); m["content"] != "bread" {
		t.Errorf("%+v", m)
	}
	tag := func(path, have string, status int) string {
		t.Helper()
		q := request{method: "GET", path: path}
		if have != "" {
			q.header = map[string]string{"If-None-Match": have}
		}
		a := n.do(q)
		if a.status != status || status == 304 && len(a.body) > 0 {
			t.Errorf("%s with %s: %d %s", path, have, a.status, a.body)
		}
		return a.header.Get("ETag")
	}
	if tag(path, "", 200) != "" || tag(path+"/m", "", 200) != "" {
		t.Error("what goes on has an ETag")
	}
	tag(path+"/m", tag(path+"/a%2Fb%20%F0%9F%8D%9E", "", 200), 200)
	tag(path+"/a%2Fb%20%F0%9F%8D%9E", tag(path+"/a%2Fb%20%F0%9F%8D%9E", "", 200), 304)
	n.append("s", `[{"message_id":"m","type":"done"},{"type":"end"}]`)
	for _, p := range []string{path, path + "?limit=1", path + "?format=ui", path + "/m"} {
		one := tag(p, "", 200)
		tag(p, `"other", W/`+one, 304)
		tag(p, `"other"`, 200)
	}
	if m := n.messages("s", ""); !m.Ended || m.Last != 4 || len(m.Messages) != 2 {
		t.Errorf("%+v", m)
	}
	n.do(request{method: http.MethodDelete, path: "/v1/sessions/s"})
	n.get(path).refused(t, 404, "session_not_found")
}

// Memory is limited: messages that do not fit are on the next page, and a single message that does not fit is cut, and
// marked as cut.
func TestMessages_areBoundedInBytes(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	word := strings.Repeat("x", 60<<10)
	many := func(id string, count int) {
		chunk := `{"message_id":"` + id + `","content":"` + word + `"}`
		for range count / 5 {
			n.append("s", "["+strings.Repeat(chunk+",", 4)+chunk+"]")
		}
	}
	many("a", 30)
	many("b", 100) // 5.9 MB
	many("a", 10)
	many("c", 10)
	sizes, cut := map[string]int{}, ""
	pages := 0
	for after := int64(0); ; pages++ {
		p := n.messages("s", "?after="+strconv.FormatInt(after, 10))
		for _, m := range p.Messages {
			id := m["message_id"].(string)
			if sizes[id] > 0 {
				t.Errorf("%s is on two pages", id)
			}
			sizes[id] = len(m["content"].(string))
			if m["cut"] == true {
				cut += id
			}
		}
		if p.Next == 0 {
			break
		}
		after = p.Next
	}
	if sizes["a"] != 40*len(word) || sizes["c"] != 10*len(word) || sizes["b"] < 4<<20-len(word) || sizes["b"] > 4<<20+len(word) || cut != "b" || pages < 2 {
		t.Errorf("%v, cut %q, %d pages", sizes, cut, pages)
	}
	if m := into[map[string]any](t, n.get("/v1/sessions/s/messages/c"), 200); len(m["content"].(string)) != 10*len(word) {
		t.Errorf("%v", slices.Sorted(maps.Keys(m)))
	}
}
