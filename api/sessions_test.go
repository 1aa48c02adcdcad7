package api

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"gapless/store"
	"gapless/store/storetest"
)

func TestSession_isMadeOnce(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	made := n.post("/v1/sessions", typeJSON, `{"id":"tea"}`)
	first := into[sessionJSON](t, made, 201)
	if got := made.header.Get("Location"); got != "/v1/sessions/tea" {
		t.Errorf("Location %q", got)
	}
	if first.ID != "tea" || first.Epoch == "" || first.First != 1 || first.Last != 0 || first.Ended || first.CreatedAt.IsZero() || first.Viewers != 0 {
		t.Errorf("%+v", first)
	}
	n.append("tea", `[{"content":"sesame"},{"type":"end"}]`)
	again := n.post("/v1/sessions", typeJSON, `{"id":"tea"}`)
	second := into[sessionJSON](t, again, 200)
	if second.Epoch != first.Epoch || !second.CreatedAt.Equal(first.CreatedAt) || second.Last != 2 || !second.Ended {
		t.Errorf("%+v after %+v", second, first)
	}
	if described := into[sessionJSON](t, n.get(again.header.Get("Location")), 200); described != second {
		t.Errorf("%+v, described %+v", second, described)
	}
	n.get("/v1/sessions/another").refused(t, 404, "session_not_found")
}

func TestSession_withoutAnIDGetsAUUIDv7(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, q := range []request{{}, {kind: typeJSON, body: "{}"}, {kind: "application/json; charset=utf-8", body: " {} "}} {
		q.method, q.path = "POST", "/v1/sessions"
		s := into[sessionJSON](t, n.do(q), 201)
		if id, err := uuid.Parse(s.ID); err != nil || id.Version() != 7 {
			t.Errorf("id %q", s.ID)
		}
	}
}

func TestSession_saysHowManyViewersTheNodeHas(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `{"content":"sesame"}`)
	viewers := func() int { return into[sessionJSON](t, n.get("/v1/sessions/s"), 200).Viewers }
	one, two := n.watch("s", ""), n.watch("s", "")
	one.welcome()
	two.welcome()
	if got := viewers(); got != 2 {
		t.Errorf("%d viewers", got)
	}
	one.stop()
	two.stop()
	eventually(t, "no viewers", func() bool { return viewers() == 0 })
}

const every = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~-"

func TestSession_idMayHoldEveryAllowedCharacterEscapedOrNot(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	escaped := func(id string) string {
		var b strings.Builder
		for _, c := range []byte(id) {
			fmt.Fprintf(&b, "%%%02X", c)
		}
		return b.String()
	}
	for _, id := range []string{every, strings.Repeat("x", 128), "x", "..a", ".-", "~", "-", "_", "0"} {
		if got := into[sessionJSON](t, n.post("/v1/sessions", typeJSON, `{"id":"`+id+`"}`), 201); got.ID != id {
			t.Fatalf("made %q of %q", got.ID, id)
		}
		for i, path := range []string{id, escaped(id), "%" + fmt.Sprintf("%02x", id[0]) + id[1:]} {
			if got := n.append(path, `{"content":"sesame"}`); got.Last != int64(i+1) {
				t.Errorf("%s is not the session %s: %+v", path, id, got)
			}
			if got := into[sessionJSON](t, n.get("/v1/sessions/"+path), 200); got.ID != id {
				t.Errorf("%s is %q", path, got.ID)
			}
			s := n.watch(path, "?after=latest")
			if _, w := s.welcome(); w.Session != id {
				t.Errorf("%s is viewed as %q", path, w.Session)
			}
			s.stop()
		}
	}
}

func TestSession_idThatIsNoneIsRefusedEverywhereAndMakesNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	for _, id := range []string{"a%2Fb", strings.Repeat("x", 129), "a%20b", "a+b", "%C3%A4", "a%00", "%25", "%2541", "a:b", "%7Bid%7D", "*", "a%0Ab", url.PathEscape("{a}"), "%2E", "%2e%2E", "...", strings.Repeat("%2E", 128)} {
		for _, q := range []request{
			{method: "GET"}, {method: "DELETE"}, {method: "POST"},
			{method: "POST", path: "/chunks", kind: typeJSON, body: `{"content":"sesame"}`},
			{method: "GET", path: "/chunks"}, {method: "GET", path: "/stream"},
			{method: "POST", path: "/messages", kind: typeJSON, body: `{"content":"sesame"}`},
			{method: "POST", path: "/cancel"}, {method: "POST", path: "/messages/m/stop"}, {method: "GET", path: "/messages/m/ui-stream"},
			{method: "GET", path: "/ui-stream"}, {method: "GET", path: "/ui-stream/m/stream"}, {method: "POST", path: "/ui-stream", kind: typeJSON, body: uiBody("sesame")},
		} {
			q.path, q.bad = "/v1/sessions/"+id+q.path, true
			if p := n.do(q).refused(t, 400, "invalid_session_id"); p.Member != "id" || p.Limit != 128 {
				t.Errorf("%s %s: %+v", q.method, q.path, p)
			}
		}
	}
	for _, id := range []string{"", "a/b", strings.Repeat("x", 129), "a b", "ä", `a\u0000`, `\n`, ".", "..", "..."} {
		p := n.do(request{method: "POST", path: "/v1/sessions", kind: typeJSON, body: `{"id":"` + id + `"}`, bad: true}).refused(t, 400, "invalid_session_id")
		if p.Member != "/id" || p.Limit != 128 {
			t.Errorf("%q: %+v", id, p)
		}
	}
	if keys := redis.Keys(t.Context(), "*").Val(); len(keys) > 0 {
		t.Errorf("there are keys now: %q", keys)
	}
}

func TestSession_badBodiesAreRefusedAndMakeNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.api.BodyMax = redis.URL(), 1000 })
	for _, c := range []struct {
		kind, body string
		status     int
		code       string
		member     string
	}{
		{typeJSON, `{"id":`, 400, "invalid_json", ""},
		{typeJSON, `[]`, 400, "invalid_json", ""},
		{typeJSON, ` `, 400, "invalid_json", ""},
		{typeJSON, `{} {}`, 400, "invalid_json", ""},
		{typeJSON, `"s"`, 400, "invalid_json", ""},
		{typeJSON, `{"id":"a","id":"b"}`, 400, "invalid_json", ""},
		{typeJSON, `{"id":"a","i\u0064":"b"}`, 400, "invalid_json", ""},
		{typeJSON, "{\"id\":\"\xff\"}", 400, "invalid_json", ""},
		{typeJSON, `{"id":"\ud800"}`, 400, "invalid_json", ""},
		{typeJSON, `{"id":5}`, 400, "invalid_json", "/id"},
		{typeJSON, `{"id":null}`, 400, "invalid_json", "/id"},
		{typeJSON, `{"ID":"a"}`, 400, "invalid_json", "/ID"},
		{typeJSON, `{"id":"a","ttl":1}`, 400, "invalid_json", "/ttl"},
		{"text/plain", `{"id":"a"}`, 415, "unsupported_media_type", "Content-Type"},
		{"", `{"id":"a"}`, 415, "unsupported_media_type", "Content-Type"},
		{typeJSON, `{"id":"a"` + strings.Repeat(" ", 1000) + `}`, 413, "body_too_large", ""},
	} {
		a := n.do(request{method: "POST", path: "/v1/sessions", kind: c.kind, body: c.body, bad: true})
		if p := a.refused(t, c.status, c.code); p.Member != c.member || c.code == "body_too_large" && p.Limit != 1000 {
			t.Errorf("%s: %+v", c.body, p)
		}
	}
	if keys := redis.Keys(t.Context(), "*").Val(); len(keys) > 0 {
		t.Errorf("there are keys now: %q", keys)
	}
}

func TestSession_deletedIsGoneAndBeginsAnewWithNumbersThatGoOn(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	const s = "/v1/sessions/s"
	n.do(request{method: "DELETE", path: s}).refused(t, 404, "session_not_found")
	was := n.append("s", `[{"content":"sesame"},{"content":"sesame"}]`)
	for range 2 { // deleting again is safe
		if a := n.do(request{method: "DELETE", path: s}); a.status != 204 || len(a.body) > 0 {
			t.Fatalf("%d %s", a.status, a.body)
		}
		n.get(s).refused(t, 404, "session_not_found")
		n.get(s+"/chunks").refused(t, 404, "session_not_found")
		if v := n.open(request{path: s + "/stream"}); v.status != 204 {
			t.Errorf("stream of a deleted session: %d", v.status)
		}
	}
	if got := into[Stored](t, n.post(s+"/chunks", typeJSON, `[]`), 201); got != (Stored{First: 1}) {
		t.Errorf("nothing, appended to a deleted session: %+v", got)
	}
	n.get(s).refused(t, 404, "session_not_found")
	is := n.append("s", `{"content":"sesame"}`)
	if is.Epoch == was.Epoch || is.First != 1_000_001 || is.Last != 1_000_001 || is.Count != 1 {
		t.Errorf("%+v after %+v", is, was)
	}
	n.do(request{method: "DELETE", path: s})
	if again := into[sessionJSON](t, n.post("/v1/sessions", typeJSON, `{"id":"s"}`), 201); again.Epoch == is.Epoch || again.First != 2_000_001 || again.Last != 2_000_000 {
		t.Errorf("%+v after %+v", again, is)
	}
}

// Every character of an id is valid in paths and keys without escaping.
func TestValidID_takesNoOtherByte(t *testing.T) {
	for b := range 256 {
		if got, want := validID(string([]byte{byte(b)})), slices.Contains([]byte(every), byte(b)) && b != '.'; got != want {
			t.Errorf("byte %d: %t", b, got)
		}
	}
}

func TestSession_isMadeByItsPathToo(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	a := n.post("/v1/sessions/tea", "", "")
	made := into[sessionJSON](t, a, 201)
	if made.ID != "tea" || a.header.Get("Location") != "/v1/sessions/tea" {
		t.Errorf("%+v %q", made, a.header.Get("Location"))
	}
	if again := into[sessionJSON](t, n.post("/v1/sessions", typeJSON, `{"id":"tea"}`), 200); again != made {
		t.Errorf("%+v, then %+v", made, again)
	}
	if again := into[sessionJSON](t, n.post("/v1/sessions/tea", "", ""), 200); again != made {
		t.Errorf("%+v, then %+v", made, again)
	}
}

// The pages of all sessions contain each session once, in order, without deleted ones.
func TestSessions_areListedInPages(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]func(*testing.T) string{
		"embedded": func(*testing.T) string { return store.Embedded },
		"redis":    func(t *testing.T) string { return storetest.Redis(t).URL() },
		"cluster":  func(t *testing.T) string { return storetest.Cluster(t).URL() },
	} {
		t.Run(name, func(t *testing.T) {
			n := serve(t, func(s *setup) { s.store.Redis = at(t) })
			var want []string
			for i := range 45 {
				id := fmt.Sprintf("tea-%02d", i)
				n.append(id, `{"content":"sesame"}`)
				if i%9 == 4 {
					n.do(request{method: "DELETE", path: "/v1/sessions/" + id})
				} else {
					want = append(want, id)
				}
			}
			into[sessionJSON](t, n.post("/v1/sessions", typeJSON, `{"id":"coffee"}`), 201)
			for query, want := range map[string][]string{
				"prefix=tea-": want, "prefix=tea-0&limit=1": want[:9], "limit=7": append([]string{"coffee"}, want...), "after=tea-2&limit=5": want[18:],
				"after=tea-44": nil, "prefix=none": nil, "prefix=..": nil, "after=" + strings.Repeat("x", 128): nil, "prefix=coffee&limit=1": {"coffee"},
			} {
				var got []string
				for after, pages := "", 0; ; pages++ {
					path := "/v1/sessions?" + query
					if after != "" {
						u, _ := url.ParseQuery(query)
						u.Set("after", after)
						path = "/v1/sessions?" + u.Encode()
					}
					a := n.get(path)
					p := into[sessionsJSON](t, a, 200)
					for _, s := range p.Sessions {
						got = append(got, s.ID)
						if one := into[sessionJSON](t, n.get("/v1/sessions/"+s.ID), 200); one != s {
							t.Errorf("%+v is listed as %+v", one, s)
						}
					}
					if (p.Next != "") != (a.header.Get("Link") != "") || pages > 100 {
						t.Fatalf("%+v, %q", p, a.header.Get("Link"))
					}
					if after = p.Next; after == "" {
						break
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("%s: %q, not %q", query, got, want)
				}
			}
			for _, query := range []string{"limit=0", "limit=1001", "limit=x", "prefix=a*", "prefix=a%20b", "after=%5B", "prefix=" + strings.Repeat("x", 129)} {
				n.do(request{method: "GET", path: "/v1/sessions?" + query, bad: true}).refused(t, 400, "invalid_parameter")
			}
		})
	}
}
