package api

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

func TestAppend_anObjectOrAnArrayOfThemIsStoredAsItIs(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	one := n.append("s", `{"content":"sesame","data":{"a":[1,1e2,1.0]},"x\u0079":null}`)
	many := n.append("s", ` [{"type":"tool_call"}, {"content":"sesame"} , {"data":0}]`)
	if one != (Stored{Epoch: one.Epoch, First: 1, Last: 1, Count: 1}) || many != (Stored{Epoch: one.Epoch, First: 2, Last: 4, Count: 3}) {
		t.Errorf("%+v, %+v", one, many)
	}
	p := n.page("s", "")
	want := []string{
		`"type":"delta","content":"sesame","data":{"a":[1,1e2,1.0]},"x\u0079":null}`,
		`"type":"tool_call"}`, `"type":"delta","content":"sesame"}`, `"type":"delta","data":0}`,
	}
	for i, element := range redis.LRange(t.Context(), "chat:history:s", 0, -1).Val() {
		if got := string(p.Chunks[i]); got != element {
			t.Errorf("the page has %s, the list %s", got, element)
		}
		head := regexp.MustCompile(`^\{"seq":` + strconv.Itoa(i+1) + `,"ts":\d{13},`)
		if !head.MatchString(element) || head.ReplaceAllString(element, "") != want[i] {
			t.Errorf("%s, not %s", element, want[i])
		}
	}
	if len(p.Chunks) != len(want) {
		t.Errorf("%d chunks", len(p.Chunks))
	}
}

func TestAppend_fillsInWhatABodyDoesNotSay(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	const query = "/v1/sessions/s/chunks?message_id=m1&role=" + "assist%22ant"
	for _, q := range []request{
		{kind: typeJSON, body: `[{"content":"sesame"},{"message_id":"m2","content":"sesame"},{"role":"user"},{"role":"","message_id":""}]`},
		{kind: typeNDJSON, body: "{\"content\":\"sesame\"}\n{\"message_id\":\"m2\",\"content\":\"sesame\"}\n{\"role\":\"user\"}\n{\"role\":\"\",\"message_id\":\"\"}\n"},
	} {
		q.method, q.path = "POST", query
		at := into[Stored](t, n.do(q), 201)
		got := decoded(t, n.page("s", "?after="+strconv.FormatInt(at.First-1, 10)).Chunks)
		for i, want := range []chunk{
			{Message: "m1", Role: `assist"ant`, Content: secret}, {Message: "m2", Role: `assist"ant`, Content: secret},
			{Message: "m1", Role: "user"}, {},
		} {
			want.Seq, want.Type = at.First+int64(i), "delta"
			if got[i] != want {
				t.Errorf("%s: %+v, not %+v", q.kind, got[i], want)
			}
		}
	}
	// Filled members count: they end the message, and are refused if it has ended.
	into[Stored](t, n.post(query, typeJSON, `{"type":"done"}`), 201)
	if p := n.post(query, typeJSON, `{"content":"sesame"}`).refused(t, 409, "message_ended"); p.Message != "m1" {
		t.Errorf("%+v", p)
	}
	empty := n.post("/v1/sessions/t/chunks?message_id=&role=", typeJSON, `{"content":"sesame"}`)
	into[Stored](t, empty, 201)
	if got := decoded(t, n.page("t", "").Chunks)[0]; got.Message != "" || got.Role != "" {
		t.Errorf("empty fills in %+v", got)
	}
}

func TestAppend_nothingAnswersTheBoundsAndMakesNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	for kind, body := range map[string]string{typeJSON: " [ ] ", typeNDJSON: "\n \r\n\n"} {
		if got := into[Stored](t, n.post("/v1/sessions/none/chunks", kind, body), 201); got != (Stored{First: 1}) {
			t.Errorf("%s: %+v", kind, got)
		}
	}
	if keys := redis.Keys(t.Context(), "*").Val(); len(keys) > 0 {
		t.Errorf("there are keys now: %q", keys)
	}
	at := n.append("s", `[{"content":"sesame"},{"content":"sesame"}]`)
	for kind, body := range map[string]string{typeJSON: "[]", typeNDJSON: "\n"} {
		if got := into[Stored](t, n.post("/v1/sessions/s/chunks", kind, body), 201); got != (Stored{Epoch: at.Epoch, First: 3, Last: 2, Count: 0}) {
			t.Errorf("%s: %+v", kind, got)
		}
	}
	closed := n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: "[]", header: map[string]string{"Stream-Closed": "true"}})
	if got := into[Stored](t, closed, 201); got != (Stored{Epoch: at.Epoch, First: 3, Last: 3, Count: 1}) {
		t.Errorf("nothing and the end: %+v", got)
	}
	if got := into[Stored](t, n.post("/v1/sessions/s/chunks", typeJSON, "[]"), 201); got != (Stored{Epoch: at.Epoch, First: 4, Last: 3, Count: 0}) {
		t.Errorf("nothing behind the end: %+v", got)
	}
}

func TestAppend_streamClosedEndsTheLogBehindTheBody(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for i, q := range []request{{kind: typeJSON, body: `[{"content":"sesame"},{"data":0}]`}, {kind: typeNDJSON, body: line("") + line("")}} {
		s := fmt.Sprint("s", i)
		q.method, q.path, q.header = "POST", "/v1/sessions/"+s+"/chunks", map[string]string{"Stream-Closed": "true"}
		if got := into[Stored](t, n.do(q), 201); got.Count != 3 || got.Last != 3 {
			t.Errorf("%+v", got)
		}
		p := n.page(s, "")
		if got := decoded(t, p.Chunks)[2]; !p.Ended || got.Type != "end" || got.Seq != 3 {
			t.Errorf("%+v %s", got, p.Chunks)
		}
		q.header["Stream-Closed"] = "false"
		n.do(q).refused(t, 409, "session_ended")
		if got := n.page(s, ""); got.Last != 3 {
			t.Errorf("last is %d", got.Last)
		}
	}
}

func TestAppend_toWhatHasEndedIsRefusedAndStoresNothing(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, end := range []string{"done", "failed", "cancelled"} {
		n.append("s", `[{"message_id":"`+end+`"},{"type":"`+end+`","message_id":"`+end+`"}]`)
		last := n.page("s", "").Last
		p := n.post("/v1/sessions/s/chunks", typeJSON, `[{"message_id":"x"},{"message_id":"y"},{"message_id":"`+end+`"}]`).refused(t, 409, "message_ended")
		if p.Member != "/message_id" || p.Message != end || p.Chunk == nil || *p.Chunk != 2 || p.Stored != nil {
			t.Errorf("%s: %+v", end, p)
		}
		if got := n.page("s", "").Last; got != last {
			t.Errorf("%s: %d instead of %d chunks", end, got, last)
		}
	}
	// A chunk of type message ends nothing, and nothing may follow an end inside an array.
	n.append("s", `[{"type":"message","message_id":"m"},{"message_id":"m"}]`)
	n.post("/v1/sessions/t/chunks", typeJSON, `[{"type":"end"},{"content":"sesame"}]`).refused(t, 409, "session_ended")
	n.get("/v1/sessions/t").refused(t, 404, "session_not_found")
	n.post("/v1/sessions/t/chunks", typeJSON, `[{"type":"done","message_id":"m"},{"message_id":"m"}]`).refused(t, 409, "message_ended")
	n.get("/v1/sessions/t").refused(t, 404, "session_not_found")
}

func TestAppend_badInputIsRefusedByNameAndStoresNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) {
		s.store.Redis, s.api.ChunkMax, s.api.BodyMax, s.api.BatchMax = redis.URL(), 2<<10, 10<<10, 10
	})
	n.append("s", `{"content":"sesame"}`)
	before := redis.LRange(t.Context(), "chat:history:s", 0, -1).Val()
	long := strings.Repeat("x", 4<<10)
	fits := 2<<10 - store.Overhead - len(`"type":"delta","content":""}`)
	at := func(i int) *int { return &i }
	const js, nd = typeJSON, typeNDJSON
	for _, c := range []struct {
		name, kind, query, closed, body string
		status                          int
		code, member                    string
		limit                           int
		chunk                           *int
	}{
		{"no JSON", js, "", "", `{"content":`, 400, "invalid_json", "*", 0, nil},
		{"nothing at all", js, "", "", ``, 400, "invalid_json", "*", 0, nil},
		{"a word", js, "", "", `sesame`, 400, "invalid_json", "*", 0, nil},
		{"text behind the object", js, "", "", `{"content":"a"} {}`, 400, "invalid_json", "", 0, nil},
		{"text behind the array", js, "", "", `[{"content":"a"}] {}`, 400, "invalid_json", "", 0, nil},
		{"an array that does not end", js, "", "", `[{"content":"a"},`, 400, "invalid_json", "*", 0, nil},
		{"an array with a comma too many", js, "", "", `[{"content":"a"},]`, 400, "invalid_json", "*", 0, nil},
		{"a byte order mark", js, "", "", "\ufeff{}", 400, "invalid_json", "*", 0, nil},
		{"text", js, "", "", `"text"`, 400, "invalid_chunk", "", 0, nil},
		{"null", js, "", "", `null`, 400, "invalid_chunk", "", 0, nil},
		{"an array in an array", js, "", "", `[{"data":0},[]]`, 400, "invalid_chunk", "", 0, at(1)},
		{"seq", js, "", "", `{"content":"a","seq":1}`, 400, "reserved_member", "/seq", 0, nil},
		{"ts", js, "", "", `[{"data":0},{"ts":1}]`, 400, "reserved_member", "/ts", 0, at(1)},
		{"seq, escaped", js, "", "", `{"\u0073eq":1}`, 400, "reserved_member", "/seq", 0, nil},
		{"a name twice", js, "", "", `{"content":"a","content":"b"}`, 400, "duplicate_member", "/content", 0, nil},
		{"a name twice, escaped once", js, "", "", `{"content":"a","c\u006fntent":"b"}`, 400, "duplicate_member", "/content", 0, nil},
		{"a name twice, inside", js, "", "", `[{"data":{"a":1,"a":2}}]`, 400, "duplicate_member", "/data/a", 0, at(0)},
		{"bad UTF-8", js, "", "", "{\"content\":\"\xff\"}", 400, "invalid_utf8", "", 0, nil},
		{"half a character", js, "", "", "[{\"data\":0},{\"content\":\"\xe2\x82\"}]", 400, "invalid_utf8", "", 0, at(1)},
		{"half a surrogate", js, "", "", `{"content":"\ud800"}`, 400, "invalid_json", "*", 0, nil},
		{"type is a number", js, "", "", `{"type":1}`, 400, "invalid_chunk", "/type", 0, nil},
		{"type is empty", js, "", "", `{"type":""}`, 400, "invalid_chunk", "/type", 0, nil},
		{"content is null", js, "", "", `{"content":null}`, 400, "invalid_chunk", "/content", 0, nil},
		{"content is a list", js, "", "", `[{"content":["a"]}]`, 400, "invalid_chunk", "/content", 0, at(0)},
		{"role is a number", js, "", "", `{"role":1}`, 400, "invalid_chunk", "/role", 0, nil},
		{"message_id is a number", js, "", "", `{"message_id":1}`, 400, "invalid_chunk", "/message_id", 0, nil},
		{"message_id is too long", js, "", "", `{"message_id":"` + long[:257] + `"}`, 400, "invalid_chunk", "/message_id", 256, nil},
		{"raw is an object", js, "", "", `{"raw":{}}`, 400, "invalid_chunk", "/raw", 0, nil},
		{"event is true", js, "", "", `{"event":true}`, 400, "invalid_chunk", "/event", 0, nil},
		{"a chunk over the limit", js, "", "", `[{"data":0},{"data":0},{"content":"` + long + `"}]`, 413, "chunk_too_large", "", 2 << 10, at(2)},
		{"too many chunks", js, "", "", `[{"data":0}` + strings.Repeat(`,{"data":0}`, 10) + `]`, 413, "batch_too_large", "", 10, nil},
		{"a body over the limit", js, "", "", `[{"content":"` + long + long + long + `"}]`, 413, "body_too_large", "", 10 << 10, nil},
		{"message_id parameter too long", js, "?message_id=" + long[:257], "", `{"data":0}`, 400, "invalid_parameter", "message_id", 0, nil},
		{"role parameter too long", js, "?role=" + long[:257], "", `{"data":0}`, 400, "invalid_parameter", "role", 0, nil},
		{"message_id parameter in bad UTF-8", js, "?message_id=%ff", "", `{"data":0}`, 400, "invalid_parameter", "message_id", 0, nil},
		{"role parameter in bad UTF-8", js, "?role=a%ff", "", `{"data":0}`, 400, "invalid_parameter", "role", 0, nil},
		{"Stream-Closed", js, "", "yes", `{"data":0}`, 400, "invalid_parameter", "Stream-Closed", 0, nil},
		{"another content type", "application/xml", "", "", `{"data":0}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"no content type", "", "", "", `{"data":0}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"a content type that is none", "json;;", "", "", `{"data":0}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"another charset", "text/plain; charset=iso-8859-1", "", "", `{"data":0}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"JSON in another charset", js + "; charset=utf-16", "", "", `{"data":0}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"a form", "application/x-www-form-urlencoded", "", "", `a=b`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"a line that is no JSON", nd, "", "", "\n\r\n{\"content\":\n", 400, "invalid_json", "*", 0, at(0)},
		{"a line with two objects", nd, "", "", "{\"data\":0}{\"data\":0}\n", 400, "invalid_json", "", 0, at(0)},
		{"an array in a line", nd, "", "", "[{\"data\":0}]\n", 400, "invalid_chunk", "", 0, at(0)},
		{"a line with seq", nd, "", "", "{\"seq\":1}\n", 400, "reserved_member", "/seq", 0, at(0)},
		{"a line over the limit", nd, "", "", `{"content":"` + long + `"}`, 413, "chunk_too_large", "", 2 << 10, at(0)},
		{"a line just over the limit", nd, "", "", `{"content":"` + long[:fits+1] + `"}`, 413, "chunk_too_large", "", 2 << 10, at(0)},
		{"a line in bad UTF-8", nd, "", "", "{\"content\":\"\xff\"}\n", 400, "invalid_utf8", "", 0, at(0)},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := request{method: "POST", path: "/v1/sessions/s/chunks" + c.query, kind: c.kind, body: c.body, bad: true, header: map[string]string{}}
			if c.closed != "" {
				q.header["Stream-Closed"] = c.closed
			}
			p := n.do(q).refused(t, c.status, c.code)
			if c.member != "*" && p.Member != c.member || p.Limit != c.limit || (p.Chunk == nil) != (c.chunk == nil) || p.Chunk != nil && *p.Chunk != *c.chunk || p.Stored != nil {
				t.Errorf("%+v (chunk %v)", p, p.Chunk)
			}
		})
	}
	if after := redis.LRange(t.Context(), "chat:history:s", 0, -1).Val(); len(after) != len(before) || after[0] != before[0] {
		t.Errorf("the list was %q and is %q", before, after)
	}
	// A chunk that is just small enough is accepted.
	n.append("s", `{"content":"`+long[:fits]+`"}`)
	n.append("s", `[{"data":0}`+strings.Repeat(`,{"data":0}`, 9)+`]`)
	n.append("s", `{"message_id":"`+long[:256]+`"}`)
}

// With end=done an append ends its message, whatever its content type.
func TestAppend_endsTheMessageWhereItIsAskedTo(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for i, c := range []struct{ query, kind, body, want string }{
		{"?message_id=m", typeJSON, `{"content":"a"}`, "delta m|done m"},
		{"?message_id=m", typeJSON, `[{"content":"a"},{"content":"b"}]`, "delta m|delta m|done m"},
		{"?message_id=m", typeNDJSON, line("a") + line("b"), "delta m|delta m|done m"},
		{"?message_id=m", typeText, "a", "delta m|done m"},
		{"?message_id=m", typeEvents, "data: a\n\n", "delta m|done m"},
		{"?message_id=m", typeJSON, `[]`, "done m"},
		{"?message_id=m", typeNDJSON, ``, "done m"},
		{"?", typeJSON, `{"message_id":"a","content":"a"}`, "delta a|done a"},
		{"?", typeJSON, `[{"message_id":"a","content":"a"},{"message_id":"b","content":"b"}]`, "delta a|delta b|done b"},
		{"?", typeNDJSON, `{"message_id":"a","content":"a"}`, "delta a|done a"},
		{"?", typeJSON, `{"content":"a"}`, "delta |done "},
		{"?message_id=m", typeJSON, `[{"content":"a"},{"message_id":"b","content":"b"}]`, "delta m|delta b|done m"},
		{"?", typeJSON, `{"type":"message","message_id":"a","content":"a"}`, "message a|done a"},
		// Without a message there is nothing to end.
		{"?", typeJSON, `[]`, ""},
		{"?", typeNDJSON, "\n", ""},
		// Nothing can come after an end: the done comes before it.
		{"?", typeNDJSON, `{"message_id":"a","content":"a"}` + "\n" + `{"type":"end"}`, "delta a|done a|end "},
		{"?", typeJSON, `[{"message_id":"a","content":"a"},{"type":"end"}]`, "delta a|done a|end "},
		{"?message_id=m", typeJSON, `[{"content":"a"},{"message_id":"b"},{"type":"end"}]`, "delta m|delta b|done m|end m"},
		{"?message_id=m", typeNDJSON, line("a") + `{"type":"failed"}` + "\n" + `{"type":"end"}`, "delta m|failed m|end m"},
		{"?", typeJSON, `{"type":"end"}`, "end "},
		// It has ended by itself.
		{"?message_id=m", typeJSON, `[{"content":"a"},{"type":"done"}]`, "delta m|done m"},
		{"?message_id=m", typeNDJSON, line("a") + `{"type":"failed"}`, "delta m|failed m"},
		{"?", typeJSON, `{"message_id":"a","content":"a","is_complete":true}`, "delta a"},
	} {
		for _, closed := range []string{"", "true"} {
			if closed != "" && strings.Contains(c.want, "end") {
				continue
			}
			s := fmt.Sprint("s", i, closed)
			q := request{method: "POST", path: "/v1/sessions/" + s + "/chunks" + c.query + "&end=done", kind: c.kind, body: c.body, bad: true, header: numbers("p", 0, 0)}
			if closed != "" {
				q.header["Stream-Closed"] = closed
				c.want = strings.TrimPrefix(c.want+"|end ", "|")
			}
			first := into[Stored](t, n.do(q), 201)
			var got []string
			if c.want != "" {
				for _, one := range n.chunks(s) {
					got = append(got, one.Type+" "+one.Message)
				}
			}
			if strings.Join(got, "|") != c.want || first.Count != len(got) {
				t.Errorf("%+v: %q, %+v", c, got, first)
			}
			again := 200
			if c.want == "" {
				again = 201
			}
			if again := into[Stored](t, n.do(q), again); again.Last != first.Last {
				t.Errorf("%+v: %+v and then %+v", c, first, again)
			}
		}
	}
	n.do(request{method: "POST", path: "/v1/sessions/s/chunks?end=true", kind: typeJSON, body: `{"content":"a"}`, bad: true}).refused(t, 400, "invalid_parameter")
	n.append("s", `[{"message_id":"m","content":"a"},{"message_id":"m","type":"done"}]`)
	n.post("/v1/sessions/s/chunks?message_id=m&end=done", typeJSON, `[]`).refused(t, 409, "message_ended")
	for _, kind := range []string{typeJSON, typeNDJSON} { // without a chunk there is no session either
		body := map[string]string{typeJSON: "[]", typeNDJSON: "\n"}[kind]
		if a := into[Stored](t, n.post("/v1/sessions/none/chunks?end=done", kind, body), 201); a.Count != 0 {
			t.Errorf("%+v", a)
		}
		n.get("/v1/sessions/none").refused(t, 404, "session_not_found")
	}
	// An error names the chunk of the body, not that of the log.
	const late = `{"content":"a"}` + "\n" + `{"type":"end"}` + "\n" + `{"content":"b"}`
	p := n.post("/v1/sessions/late/chunks?message_id=m&end=done", typeJSON, "["+strings.ReplaceAll(late, "\n", ",")+"]").refused(t, 409, "session_ended")
	if p.Chunk == nil || *p.Chunk != 2 || p.Stored != nil {
		t.Errorf("%v, %+v", p.Chunk, p.Stored)
	}
	p = n.post("/v1/sessions/late/chunks?message_id=m&end=done", typeNDJSON, late).refused(t, 409, "session_ended")
	if p.Chunk == nil || *p.Chunk != 2 || p.Stored == nil || p.Stored.Count != 3 {
		t.Errorf("%v, %+v", p.Chunk, p.Stored)
	}
}

// Every name of a content type is known.
func TestAppend_knowsTheNamesOfItsContentTypes(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	const line = `{"content":"sesame"}` + "\n"
	for kind, body := range map[string]string{
		"application/jsonl": line, "application/ndjson": line, "application/x-ndjson": line, "application/jsonlines": line, "Application/JSONL; charset=UTF8": line,
		"application/json; charset=utf8": line, "application/json; charset=\"UTF-8\"": line, "application/json;": line, "APPLICATION/JSON": line,
		"text/plain; charset=utf8": "sesame", "text/plain;charset=us-ascii": "sesame", "text/plain; format=flowed": "sesame",
	} {
		a := n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: kind, body: body, bad: true})
		if into[Stored](t, a, 201); n.contents("s")[into[Stored](t, a, 201).First-1] != "sesame" {
			t.Errorf("%s: %q", kind, n.contents("s"))
		}
	}
	for _, kind := range []string{"application/json; charset=utf8", "application/json"} {
		if a := n.do(request{method: "POST", path: "/v1/sessions", kind: kind, body: `{"id":"s"}`, bad: true}); a.status != 200 {
			t.Errorf("%s: %d %s", kind, a.status, a.body)
		}
	}
	n.do(request{method: "POST", path: "/v1/sessions", kind: "application/json; charset=latin1", body: `{"id":"s"}`, bad: true}).refused(t, 415, "unsupported_media_type")
}

func TestAppend_byPutIsRefusedSinceProxiesMayResendIt(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	a := n.do(request{method: "PUT", path: "/v1/sessions/s/chunks", kind: typeJSON, body: `{"data":0}`})
	a.refused(t, 405, "method_not_allowed") // its Allow is checked against the contract
	if allow := a.header.Get("Allow"); !strings.Contains(allow, "POST") || !strings.Contains(allow, "GET") {
		t.Errorf("Allow: %s", allow)
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")
}

func TestPage_handsOutElementsAsTheyAreInTheList(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	n.append("s", `{"content":"sesame"}`)
	foreign := []string{
		`{"role":"assistant","content":"sesame"}`, `{"seq":99,"content":"sesame"}`, `{"is_complete":true}`,
		"sesame\n\"oil\" \xff", `[1]`, "{\n}", "", `{"content":"<&>\u00e9é","a":1,"a":2}`,
	}
	for _, e := range foreign {
		redis.RPush(t.Context(), "chat:history:s", e)
	}
	n.append("s", `{"content":"sesame"}`)
	list := redis.LRange(t.Context(), "chat:history:s", 0, -1).Val()
	wrapped := map[int]string{
		5: `{"seq":5,"type":"foreign","content":"sesame\n\"oil\" ` + "\ufffd" + `"}`,
		6: `{"seq":6,"type":"foreign","content":"[1]"}`,
		7: `{"seq":7,"type":"foreign","content":"{\n}"}`,
		8: `{"seq":8,"type":"foreign","content":""}`,
	}
	p := n.page("s", "")
	if p.From != 1 || p.First != 1 || p.Last != 10 || len(p.Chunks) != 10 {
		t.Fatalf("%+v", p)
	}
	v := n.watch("s", "")
	v.welcome()
	for i, got := range p.Chunks {
		want := list[i]
		if w, ok := wrapped[i+1]; ok {
			want = w
		}
		if string(got) != want {
			t.Errorf("chunk %d is %s, not %s", i+1, got, want)
		}
		if e := v.next(); e.id != int64(i+1) || e.data != want {
			t.Errorf("event %+v, not %s", e, want)
		}
	}
}

func TestPage_saysTheNumberOfItsFirstChunk(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.store.HistoryMax = redis.URL(), 5 })
	for i := range 8 { // 4 to 8 are kept
		n.append("s", fmt.Sprintf(`{"content":"sesame %d"}`, i+1))
	}
	for _, c := range []struct {
		query string
		from  int64
		count int
	}{
		{"", 4, 5}, {"?after=0", 4, 5}, {"?after=2", 4, 5}, {"?after=3", 4, 5}, {"?after=4", 5, 4}, {"?after=7", 8, 1},
		{"?after=8", 9, 0}, {"?after=9", 10, 0}, {"?after=500", 501, 0}, {"?after=9007199254740990", 9007199254740991, 0},
		{"?limit=2", 4, 2}, {"?after=5&limit=1", 6, 1}, {"?limit=1000", 4, 5}, {"?after=7&limit=2", 8, 1},
	} {
		p := n.page("s", c.query)
		if p.First != 4 || p.Last != 8 || p.From != c.from || len(p.Chunks) != c.count || p.Ended {
			t.Errorf("%s: %+v", c.query, p)
			continue
		}
		for k, got := range decoded(t, p.Chunks) {
			if want := p.From + int64(k); got.Seq != want || got.Content != fmt.Sprint("sesame ", want) {
				t.Errorf("%s: %+v as chunk %d", c.query, got, want)
			}
		}
	}
	redis.Del(t.Context(), "chat:history:s") // expired
	if p := n.page("s", "?after=2"); p.First != 9 || p.Last != 8 || p.From != 9 || p.Chunks == nil || len(p.Chunks) != 0 {
		t.Errorf("%+v", p)
	}
	n.get("/v1/sessions/none/chunks").refused(t, 404, "session_not_found")
	if keys := redis.Keys(t.Context(), "*none*").Val(); len(keys) > 0 {
		t.Errorf("reading made %q", keys)
	}
}

func TestPage_badParametersAreRefused(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `{"data":0}`)
	for query, want := range map[string]Problem{
		"after=x": {Member: "after"}, "after=-1": {Member: "after"}, "after=latest": {Member: "after"}, "after=00": {Member: "after"}, "after=1.0": {Member: "after"},
		"after=%2B1": {Member: "after"}, "after=12345678901234567": {Member: "after"},
		"limit=0": {Member: "limit", Limit: 1000}, "limit=1001": {Member: "limit", Limit: 1000}, "limit=x": {Member: "limit", Limit: 1000},
		"limit=99999999999999999999": {Member: "limit", Limit: 1000}, "limit=-5": {Member: "limit", Limit: 1000},
	} {
		p := n.do(request{method: "GET", path: "/v1/sessions/s/chunks?" + query, bad: true}).refused(t, 400, "invalid_parameter")
		if p.Member != want.Member || p.Limit != want.Limit {
			t.Errorf("%s: %+v", query, p)
		}
	}
	if p := into[pageJSON](t, n.do(request{method: "GET", path: "/v1/sessions/s/chunks?after=&limit=", bad: true}), 200); len(p.Chunks) != 1 {
		t.Errorf("empty is absent: %+v", p)
	}
}

func TestPage_ofLargeChunksHoldsFewerThanItsLimitButGoesOn(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, on(redis))
	for range 5 {
		redis.RPush(t.Context(), "chat:history:s", `{"content":"`+strings.Repeat("x", 1<<20)+`"}`)
	}
	for _, c := range []struct {
		after string
		from  int64
		count int
	}{{"0", 1, 3}, {"3", 4, 2}} { // as many as fit into 4 MiB
		if p := n.page("s", "?limit=1000&after="+c.after); p.From != c.from || len(p.Chunks) != c.count || p.Last != 5 {
			t.Fatalf("after %s: %d chunks from %d on", c.after, len(p.Chunks), p.From)
		}
	}
}

func TestSession_timesAreUTCAndMoveWithTheLog(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `{"data":0}`)
	first := into[sessionJSON](t, n.get("/v1/sessions/s"), 200)
	if age := time.Since(first.CreatedAt); age < -time.Minute || age > time.Minute || first.CreatedAt.Location() != time.UTC {
		t.Errorf("created at %v", first.CreatedAt)
	}
	eventually(t, "a later update", func() bool {
		n.append("s", `{"data":0}`)
		s := into[sessionJSON](t, n.get("/v1/sessions/s"), 200)
		return s.CreatedAt.Equal(first.CreatedAt) && s.UpdatedAt.After(first.UpdatedAt)
	})
}

var number = regexp.MustCompile(`^(0|[1-9][0-9]{0,15})$`)

func FuzzParseNumber(f *testing.F) {
	for _, s := range []string{"", "0", "1", "00", "01", "-1", "+1", "1 ", " 1", "1e3", "9007199254740991", "9999999999999999", "10000000000000000", "12345678901234567890123", "१", "1\x00", "0x1", "1_0", "1\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseNumber(s)
		want, ok := int64(0), s == ""
		if number.MatchString(s) && !strings.HasSuffix(s, "\n") {
			want, _ = strconv.ParseInt(s, 10, 64)
			ok = true
		}
		if (err == nil) != ok || n != want {
			t.Errorf("%q: %d, %v", s, n, err)
		}
	})
}
