package api

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"testing"

	"gapless/store/storetest"
)

// The digest matches a stream and a page, also for elements that other programs pushed.
func TestDigest_isOfWhatViewersAreGiven(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.store.HistoryMax = redis.URL(), 1500 })
	n.get("/v1/sessions/s/digest").refused(t, 404, "session_not_found")
	n.do(request{method: "GET", path: "/v1/sessions/a%20b/digest", bad: true}).refused(t, 400, "invalid_session_id")
	for i := range 20 {
		n.append("s", `[`+fmt.Sprintf(`{"content":"sesame %d"},`, i)+`{"content":"é\n","message_id":"m"}]`)
		if err := redis.RPush(t.Context(), "chat:history:s", `{"content":"sesame"}`, "no\njson", `{"seq":3,"ts":1,"type":"delta","content":"sesame"}`).Err(); err != nil {
			t.Fatal(err)
		}
	}
	check := func(query string) digestJSON {
		t.Helper()
		d := into[digestJSON](t, n.get("/v1/sessions/s/digest?"+query), 200)
		hash, count := sha256.New(), int64(0)
		for after := d.First - 1; after < d.Last; {
			p := n.page("s", fmt.Sprintf("?limit=1000&after=%d", after))
			for i, chunk := range p.Chunks {
				if seq := p.From + int64(i); seq <= d.Last {
					hash.Write(append(chunk, '\n'))
					after, count = seq, count+1
				}
			}
		}
		if got := hex.EncodeToString(hash.Sum(nil)); got != d.SHA256 || count != d.Count || d.Epoch != n.page("s", "").Epoch {
			t.Errorf("%s: %+v, but the pages give %s of %d", query, d, got, count)
		}
		return d
	}
	for query, want := range map[string][2]int64{"": {1, 100}, "first=0&last=0": {1, 100}, "first=7": {7, 100}, "last=7": {1, 7}, "first=100&last=100": {100, 100},
		"first=3&last=500": {3, 100}, "first=101": {101, 100}, "first=500&last=900": {500, 499}} {
		if d := check(query); d.First != want[0] && d.Count > 0 || d.Last-d.First != want[1]-want[0] {
			t.Errorf("%s: %+v", query, d)
		}
	}
	for _, query := range []string{"first=x", "last=-1", "first=8&last=7", "first=01"} {
		n.do(request{method: "GET", path: "/v1/sessions/s/digest?" + query, bad: true}).refused(t, 400, "invalid_parameter")
	}
	for range 20 { // more than one part, and older chunks are trimmed
		n.append("s", manyChunks(100))
	}
	if d := check(""); d.Last != 2100 || d.First != 601 {
		t.Errorf("%+v", d)
	}
	if d := check("first=1&last=700"); d.First != 601 || d.Last != 700 {
		t.Errorf("%+v", d)
	}
	n.append("s", `{"type":"end"}`)
	a := n.get("/v1/sessions/s/digest")
	q := request{method: "GET", path: "/v1/sessions/s/digest", header: map[string]string{"If-None-Match": a.header.Get("ETag")}}
	if again := n.do(q); a.header.Get("ETag") == "" || again.status != 304 || len(again.body) != 0 {
		t.Errorf("%d %s", again.status, again.body)
	}
	if q.path += "?first=900"; n.do(q).status != 200 {
		t.Error("another part has the same tag")
	}
}

func manyChunks(n int) string {
	b := []byte(`[{"content":"sesame"}`)
	for range n - 1 {
		b = append(b, `,{"content":"`+fmt.Sprintf("%0200d", n)+`"}`...)
	}
	return string(append(b, ']'))
}
