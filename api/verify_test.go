package api

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"gapless/api/verify"
	"gapless/store/storetest"
)

// A log with elements of other programs, a trimmed log, and one that ends while it is followed are received whole.
func TestVerify_findsEveryLogComplete(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.store.HistoryMax = redis.URL(), 300 })
	check := func(session string, untilEnd bool) verify.Result {
		cfg := verify.DefaultConfig()
		cfg.Patience, cfg.UntilEnd = patience, untilEnd
		var err error
		if cfg.URL, err = url.Parse(n.server.URL + "/v1/sessions/" + session + "/stream"); err != nil {
			t.Fatal(err)
		}
		result, err := verify.Verify(t.Context(), cfg)
		if err != nil || !result.Complete {
			t.Errorf("%s: %s (%v)", session, result, err)
		}
		return result
	}
	n.append("s", manyChunks(100))
	if err := redis.RPush(t.Context(), "chat:history:s", `{"content":"sesame"}`, "no\njson").Err(); err != nil {
		t.Fatal(err)
	}
	n.append("s", `{"content":"sesame é\n"}`)
	if r := check("s", false); r.Count != 103 || r.Cuts != 3 || r.Breaks != 0 || r.Ended {
		t.Errorf("%+v", r)
	}
	for range 3 {
		n.append("s", manyChunks(100))
	}
	n.append("s", `{"type":"end"}`)
	if r := check("s", false); r.Count != 300 || r.Last != 404 || r.First != 105 || !r.Ended {
		t.Errorf("%+v", r)
	}
	done := make(chan struct{})
	go func() { // ends by itself, and is waited for
		defer close(done)
		for i := range 30 {
			n.append("live", fmt.Sprintf(`{"content":"sesame %d"}`, i))
		}
		n.append("live", `{"type":"end"}`)
	}()
	r := check("live", true)
	<-done
	if r.Count != 31 || !r.Ended || !strings.HasPrefix(r.String(), "complete: 31 chunks, ") {
		t.Errorf("%+v", r)
	}
}
