package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"gapless/store/storetest"
)

// problem is an error as a client sees it.
type problem struct {
	Title, Detail, Code, Member string
	Status, Limit               int
	Chunk                       *int
	Stored                      *stored
}

func (a answer) problem(t *testing.T) (p problem) {
	t.Helper()
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("%d with Content-Type %q: %s (%v)", a.status, got, a.body, a.err)
		return p
	}
	decode(t, a.body, &p)
	if p.Status != a.status || p.Title == "" || p.Detail == "" {
		t.Errorf("the problem of a %d is %s", a.status, a.body)
	}
	return p
}

func TestInput_whatIsBadIsRefusedByNameAndStoresNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-chunk-max", "1KiB")[0]
	session := newID()
	n.append(t, session, words(1, 2))
	before := keys(t, redis, "*")
	const js, nd = "application/json", "application/x-ndjson"
	chunks := "/v1/sessions/" + session + "/chunks"
	long := strings.Repeat("x", 129)
	zero, one := 0, 1
	for _, c := range []struct {
		name, method, path, contentType, body string
		status                                int
		code, member                          string
		limit                                 int
		chunk                                 *int
	}{
		{"no JSON", "POST", chunks, js, `{"content":`, 400, "invalid_json", "*", 0, nil},
		{"nothing at all", "POST", chunks, js, ``, 400, "invalid_json", "*", 0, nil},
		{"text behind the object", "POST", chunks, js, `{"content":"a"} {}`, 400, "invalid_json", "", 0, nil},
		{"a comma too many", "POST", chunks, js, `{"content":"a",}`, 400, "invalid_json", "*", 0, nil},
		{"no object", "POST", chunks, js, `"text"`, 400, "invalid_chunk", "", 0, nil},
		{"seq", "POST", chunks, js, `{"seq":3,"content":"a"}`, 400, "reserved_member", "/seq", 0, nil},
		{"ts", "POST", chunks, js, `{"content":"a","ts":1}`, 400, "reserved_member", "/ts", 0, nil},
		{"seq, escaped", "POST", chunks, js, `{"\u0073eq":3}`, 400, "reserved_member", "/seq", 0, nil},
		{"ts, escaped", "POST", chunks, js, `{"t\u0073":3}`, 400, "reserved_member", "/ts", 0, nil},
		{"a name twice", "POST", chunks, js, `{"content":"a","content":"b"}`, 400, "duplicate_member", "/content", 0, nil},
		{"a name twice, once escaped", "POST", chunks, js, `{"type":"delta","t\u0079pe":"end"}`, 400, "duplicate_member", "/type", 0, nil},
		{"a name twice, deep inside", "POST", chunks, js, `{"data":{"a":1,"a":2}}`, 400, "duplicate_member", "/data/a", 0, nil},
		{"bad UTF-8", "POST", chunks, js, "{\"content\":\"\xff\"}", 400, "invalid_utf8", "", 0, nil},
		{"bad UTF-8 in a name", "POST", chunks, js, "{\"\xc3(\":1}", 400, "invalid_utf8", "", 0, nil},
		{"half a surrogate pair", "POST", chunks, js, `{"content":"\ud800"}`, 400, "*", "*", 0, nil},
		{"content that is no text", "POST", chunks, js, `{"content":1}`, 400, "invalid_chunk", "/content", 0, nil},
		{"type that is no text", "POST", chunks, js, `{"type":null}`, 400, "invalid_chunk", "/type", 0, nil},
		{"an array with one bad member", "POST", chunks, js, `[{"content":"a"},{"content":2},{"content":"c"}]`, 400, "invalid_chunk", "/content", 0, &one},
		{"an array with one that says seq", "POST", chunks, js, `[{"seq":1}]`, 400, "reserved_member", "/seq", 0, &zero},
		{"an array that does not end", "POST", chunks, js, `[{"content":"a"},{"content":"b"}`, 400, "invalid_json", "", 0, nil},
		{"an array in an array", "POST", chunks, js, `[{"content":"a"},[{"content":"b"}]]`, 400, "invalid_chunk", "", 0, &one},
		{"a chunk over the limit", "POST", chunks, js, `{"content":"` + strings.Repeat("x", 1024) + `"}`, 413, "chunk_too_large", "", 1024, nil},
		{"one of an array over the limit", "POST", chunks, js, `[{"data":0},{"content":"` + strings.Repeat("x", 1024) + `"}]`, 413, "chunk_too_large", "", 1024, &one},
		{"a first line over the limit", "POST", chunks, nd, `{"content":"` + strings.Repeat("x", 5000) + `"}` + "\n{}\n", 413, "chunk_too_large", "", 1024, &zero},
		{"a bad first line", "POST", chunks, nd, "no\n{}\n", 400, "invalid_json", "*", 0, &zero},
		{"too many at once", "POST", chunks, js, "[{\"data\":0}" + strings.Repeat(",{\"data\":0}", 1000) + "]", 413, "batch_too_large", "", 1000, nil},
		{"a body too large", "POST", chunks, js, strings.Repeat(" ", 8<<20) + "{\"data\":0}", 413, "body_too_large", "", 8 << 20, nil},
		{"no content type", "POST", chunks, "", `{}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"another content type", "POST", chunks, "application/xml", `<a/>`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"a content type that is none", "POST", chunks, "json", `{}`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"a form", "POST", chunks, "application/x-www-form-urlencoded", `a=b`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"PUT", "PUT", chunks, js, `{}`, 405, "method_not_allowed", "", 0, nil},
		{"DELETE of chunks", "DELETE", chunks, "", ``, 405, "method_not_allowed", "", 0, nil},
		{"POST to the stream", "POST", "/v1/sessions/" + session + "/stream", js, `{}`, 405, "method_not_allowed", "", 0, nil},
		{"no such path", "GET", "/v2/sessions", "", ``, 404, "not_found", "", 0, nil},
		{"an id of 129 letters", "POST", "/v1/sessions/" + long + "/chunks", js, `{}`, 400, "invalid_session_id", "id", 128, nil},
		{"an id with a slash", "POST", "/v1/sessions/a%2Fb/chunks", js, `{}`, 400, "invalid_session_id", "id", 128, nil},
		{"an id with a brace", "POST", "/v1/sessions/%7Ba%7D/chunks", js, `{}`, 400, "invalid_session_id", "id", 128, nil},
		{"an id with a space", "GET", "/v1/sessions/a%20b/stream", "", ``, 400, "invalid_session_id", "id", 128, nil},
		{"an id with a line break", "GET", "/v1/sessions/a%0Ab/stream", "", ``, 400, "invalid_session_id", "id", 128, nil},
		{"a made session with a slash", "POST", "/v1/sessions", js, `{"id":"a/b"}`, 400, "invalid_session_id", "/id", 128, nil},
		{"a made session of 129 letters", "POST", "/v1/sessions", js, `{"id":"` + long + `"}`, 400, "invalid_session_id", "/id", 128, nil},
		{"a made session without a name", "POST", "/v1/sessions", js, `{"id":""}`, 400, "invalid_session_id", "/id", 128, nil},
		{"a made session with a number", "POST", "/v1/sessions", js, `{"id":7}`, 400, "invalid_json", "/id", 0, nil},
		{"after=x of the stream", "GET", "/v1/sessions/" + session + "/stream?after=x", "", ``, 400, "invalid_parameter", "after", 0, nil},
		{"after=-1 of the stream", "GET", "/v1/sessions/" + session + "/stream?after=-1", "", ``, 400, "invalid_parameter", "after", 0, nil},
		{"after=01 of the stream", "GET", "/v1/sessions/" + session + "/stream?after=01", "", ``, 400, "invalid_parameter", "after", 0, nil},
		{"after of 17 digits", "GET", "/v1/sessions/" + session + "/stream?after=10000000000000000", "", ``, 400, "invalid_parameter", "after", 0, nil},
		{"until=x", "GET", "/v1/sessions/" + session + "/stream?until=x", "", ``, 400, "invalid_parameter", "until", 0, nil},
		{"after=x of a page", "GET", chunks + "?after=x", "", ``, 400, "invalid_parameter", "after", 0, nil},
		{"after=latest of a page", "GET", chunks + "?after=latest", "", ``, 400, "invalid_parameter", "after", 0, nil},
		{"limit=0", "GET", chunks + "?limit=0", "", ``, 400, "invalid_parameter", "limit", 1000, nil},
		{"limit=1001", "GET", chunks + "?limit=1001", "", ``, 400, "invalid_parameter", "limit", 1000, nil},
		{"a message id of 257 bytes", "POST", chunks + "?message_id=" + long + long, js, `{}`, 400, "invalid_parameter", "message_id", 0, nil},
		{"a question without content", "POST", "/v1/sessions/" + session + "/messages", js, `{}`, 400, "invalid_content", "/content", 0, nil},
		{"a question that is no text", "POST", "/v1/sessions/" + session + "/messages", js, `{"content":1}`, 400, "invalid_json", "/content", 0, nil},
		{"a question of another kind", "POST", "/v1/sessions/" + session + "/messages", "text/plain", `why?`, 415, "unsupported_media_type", "Content-Type", 0, nil},
		{"a question over the limit", "POST", "/v1/sessions/" + session + "/messages", js, `{"content":"` + strings.Repeat("x", 1024) + `"}`, 413, "content_too_large", "/content", 1024, nil},
		{"a page of a session that is not there", "GET", "/v1/sessions/nowhere/chunks", "", ``, 404, "session_not_found", "", 0, nil},
		{"a session that is not there", "GET", "/v1/sessions/nowhere", "", ``, 404, "session_not_found", "", 0, nil},
		{"the deletion of one that is not there", "DELETE", "/v1/sessions/nowhere", "", ``, 404, "session_not_found", "", 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := n.do(deadline(t), c.method, c.path, c.contentType, strings.NewReader(c.body))
			p := a.problem(t)
			if a.status != c.status || (p.Code != c.code && c.code != "*") || (p.Member != c.member && c.member != "*") || p.Code == "" || (c.limit != 0 && p.Limit != c.limit) {
				t.Errorf("got %d code %q member %q limit %d, want %d %q %q %d", a.status, p.Code, p.Member, p.Limit, c.status, c.code, c.member, c.limit)
			}
			if c.chunk != nil && (p.Chunk == nil || *p.Chunk != *c.chunk) {
				t.Errorf("chunk is not %d: %s", *c.chunk, a.body)
			}
			if c.status == 405 && a.header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
			if p.Stored != nil {
				t.Errorf("stored: %+v", p.Stored)
			}
		})
	}
	if got := len(history(t, redis, session)); got != 2 {
		t.Errorf("the log has %d chunks, not 2", got)
	}
	if made := keys(t, redis, "*"); len(made) != len(before) {
		t.Errorf("keys were made: %v, beside %v", made, before)
	}
}

func TestInput_anUploadWithABadLineSaysWhatItHasStored(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	for i, bad := range []string{`{"content":`, `{"seq":1}`, `[{"data":0}]`, "{\"a\":\"\xff\"}", `{"content":"` + strings.Repeat("x", 64<<10) + `"}`} {
		session := newID()
		a := n.post("/v1/sessions/"+session+"/chunks", "application/x-ndjson", "{\"content\":\"1\"}\n\n{\"content\":\"2\"}\n"+bad+"\n{\"content\":\"4\"}\n")
		p := a.problem(t)
		if a.status/100 != 4 || p.Stored == nil || p.Stored.Count != 2 || p.Stored.Last != 2 || p.Chunk == nil || *p.Chunk != 2 {
			t.Errorf("bad line %d: %d %s", i, a.status, a.body)
		}
		if list := history(t, redis, session); len(list) != 2 {
			t.Errorf("bad line %d: the log is %q", i, list)
		}
	}
}

func TestInput_whatIsOddAndNotBadIsKeptToTheByte(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	session := newID()
	n.append(t, session, "{ \"Seq\" : 1, \"\\u0054S\":2,\n \"n\":1.000e+2 , \"content\":\"\\u00e4ä\\/\" }\n")
	n.append(t, session, `{"data":{"seq":1,"ts":2}}`)
	n.append(t, session, `{"data":0}`)
	list := history(t, redis, session)
	for i, want := range []string{
		`"type":"delta","Seq":1,"\u0054S":2,"n":1.000e+2,"content":"\u00e4ä\/"}`, `"type":"delta","data":{"seq":1,"ts":2}}`, `"type":"delta","data":0}`,
	} {
		head := fmt.Sprintf(`{"seq":%d,"ts":`, i+1)
		if !strings.HasPrefix(list[i], head) || !json.Valid([]byte(list[i])) || list[i][len(head)+13:] != ","+want {
			t.Errorf("chunk %d is %s, not …%s", i+1, list[i], want)
		}
	}
}

func TestInput_aMessageThatHasEndedAndALogThatHasEndedTakeNothingMore(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	session := newID()
	path := "/v1/sessions/" + session + "/chunks"
	conflict := func(body, code string) {
		t.Helper()
		before := len(history(t, redis, session))
		a := n.post(path, "application/json", body)
		if p := a.problem(t); a.status != http.StatusConflict || p.Code != code {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
		if after := len(history(t, redis, session)); after != before {
			t.Errorf("%s: stored", body)
		}
	}
	n.append(t, session, words(1, 2, `{"type":"done","message_id":"m1"}`))
	conflict(`{"message_id":"m1"}`, "message_ended")
	conflict(`[{"message_id":"m2"},{"message_id":"m1"}]`, "message_ended")
	conflict(`[{"message_id":"m3","type":"failed"},{"message_id":"m3"}]`, "message_ended")
	n.append(t, session, `[{"message_id":"m2"},{"type":"end"}]`)
	conflict(`{"data":0}`, "session_ended")
	conflict(`{"type":"end"}`, "session_ended")
	if got := n.pages(t, session); len(got) != 5 {
		t.Errorf("the log: %q", got)
	}
}

func TestInput_anUploadStoresTheSameWhetherItsLinesComeAtOnceOrOneByOne(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	for _, lines := range [][]string{
		{`{"message_id":"m1"}`, `{"message_id":"m1","type":"done"}`, `{"message_id":"m1"}`},
		{`{"content":"a"}`, `{"type":"end"}`, `{"content":"b"}`},
	} {
		atOnce, oneByOne := newID(), newID()
		first := n.post("/v1/sessions/"+atOnce+"/chunks", "application/x-ndjson", strings.Join(lines, "\n")+"\n")
		in, answered := upload(t, n, oneByOne)
		for i, line := range lines {
			fmt.Fprintln(in, line)
			if i < 2 {
				eventually(t, "the line is stored", func() bool { return len(history(t, redis, oneByOne)) == i+1 })
			}
		}
		second := <-answered
		a, b := first.problem(t), second.problem(t)
		if a.Code != b.Code || len(history(t, redis, atOnce)) != len(history(t, redis, oneByOne)) || a.Stored == nil || b.Stored == nil || a.Stored.Count != b.Stored.Count {
			t.Errorf("at once: %s\none by one: %s", first.body, second.body)
		}
	}
}
