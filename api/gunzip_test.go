package api

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"strings"
	"testing"
)

// gzipped returns a compressed text.
func gzipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(text))
	_ = w.Close()
	return b.String()
}

// coded returns a request whose body has a Content-Encoding, which the contract's validator does not read.
func coded(path, kind, coding, body string) request {
	return request{method: "POST", path: path, kind: kind, body: body, bad: true, header: map[string]string{"Content-Encoding": coding}}
}

func TestBody_inGzipIsDecoded(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BodyMax = 100 << 10 })
	const chunks = "/v1/sessions/s/chunks"
	for _, c := range []struct{ path, kind, body, coding string }{
		{"/v1/sessions", typeJSON, `{"id":"s"}`, "gzip"},
		{chunks, typeJSON, `{"message_id":"a","content":"sesame 1"}`, "gzip"},
		{chunks, typeJSON, `[{"message_id":"a","content":"sesame 2"}]`, "GZIP"},
		{chunks, typeNDJSON, `{"message_id":"a","content":"sesame 3"}`, "x-gzip"},
		{chunks + "?message_id=b", typeText, "sesame 4", "gzip"},
		{chunks + "?message_id=c", typeEvents, "data: sesame 5\n\n", "gzip"},
		{"/v1/sessions/s/cancel", typeJSON, `{"message_id":"a"}`, "gzip"},
		{"/v1/sessions/t/messages", typeJSON, `{"content":"?"}`, "gzip"},
	} {
		if a := n.do(coded(c.path, c.kind, c.coding, gzipped(c.body))); a.status > 202 {
			t.Errorf("%s %s: %d %s", c.path, c.kind, a.status, a.body)
		}
	}
	// Two gzip members are one body, identity is no coding, and an empty body is empty.
	for _, q := range []request{
		coded(chunks, typeJSON, "gzip", gzipped(`[{"content":`)+gzipped(`"sesame 9"}]`)), coded(chunks, typeJSON, "identity", `{"content":"sesame 10"}`),
		coded("/v1/sessions", typeJSON, "gzip", gzipped("")), coded("/v1/sessions", typeJSON, "gzip", ""),
	} {
		if a := n.do(q); a.status != 201 {
			t.Errorf("%+v: %d %s", q, a.status, a.body)
		}
	}
	got := n.contents("s")
	if want := "sesame 1|sesame 2|sesame 3|sesame 4|||||sesame 9|sesame 10"; strings.Join(got, "|") != want {
		t.Errorf("%q", got)
	}
	if all := n.chunks("s"); len(all) != 10 || all[4].Type != "done" || all[6].Type != "done" || all[7].Type != "cancelled" {
		t.Errorf("%+v", all)
	}
}

// The limits apply to the decoded body.
func TestBody_inGzipIsAsLimitedAsWithout(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BodyMax, s.api.ChunkMax = 100<<10, 2<<10 })
	n.append("s", `{"message_id":"m","content":"sesame"}`)
	before := n.contents("s")
	large := strings.Repeat(" ", 4<<20)
	for _, c := range []struct {
		path, kind, body string
		code             string
	}{
		{"/v1/sessions/s/chunks", typeJSON, "[" + large + "]", "body_too_large"},
		{"/v1/sessions/s/chunks", typeJSON, `{"content":"` + large[:3<<10] + `"}`, "chunk_too_large"},
		{"/v1/sessions/s/chunks", typeNDJSON, `{"content":"` + large + `"}`, "chunk_too_large"},
		{"/v1/sessions/s/chunks", typeEvents, "data: " + large, "chunk_too_large"},
		{"/v1/sessions/s/messages", typeJSON, `{"content":"` + large + `"}`, "body_too_large"},
		{"/v1/sessions/s/cancel", typeJSON, "{" + large + "}", "body_too_large"},
		{"/v1/sessions", typeJSON, "{" + large + "}", "body_too_large"},
		{"/v1/sessions/s/ui-stream", typeJSON, "{" + large + "}", "body_too_large"},
	} {
		n.do(coded(c.path, c.kind, "gzip", gzipped(c.body))).refused(t, 413, c.code)
	}
	if after := n.contents("s"); len(after) != len(before) {
		t.Errorf("%d chunks", len(after))
	}
}

// The Content-Encoding is trusted, and a body that does not match it is refused: none of it is taken for text.
func TestBody_inAnotherCodingIsRefused(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	n.append("s", `{"message_id":"m","content":"sesame"}`)
	good := gzipped(`{"content":"no"}`)
	for _, path := range []string{"/v1/sessions/s/chunks", "/v1/sessions", "/v1/sessions/s/cancel", "/v1/sessions/s/messages", "/v1/sessions/s/ui-stream", "/v1/sessions/s/demo"} {
		for _, coding := range []string{"br", "deflate", "zstd", "gzip, gzip", "compress", "aws-chunked", "gzip;q=1"} {
			a := n.do(coded(path, typeJSON, coding, good))
			if p := a.refused(t, 415, "unsupported_media_type"); p.Member != "Content-Encoding" || a.header.Get("Accept-Encoding") != "gzip" {
				t.Errorf("%s: %+v %v", coding, p, a.header)
			}
		}
	}
	half := gzipped(`{"content":"` + strings.Repeat("sesame ", 100) + `"}`)
	for name, body := range map[string]string{"no gzip": `{"content":"no"}`, "half of it": half[:len(half)-12], "a byte": "\x1f", "another end": good[:len(good)-8] + "sesamely", "more behind it": good + "{}"} {
		for _, kind := range []string{typeJSON, typeNDJSON, typeText, typeEvents} {
			code := "body_broken"
			if kind == typeJSON {
				code = "invalid_json"
			}
			p := n.do(coded("/v1/sessions/s/chunks", kind, "gzip", body)).refused(t, 400, code)
			if !strings.Contains(p.Detail, "gzip") {
				t.Errorf("%s as %s: %+v", name, kind, p)
			}
		}
	}
	for _, c := range n.chunks("s") {
		if strings.ContainsAny(c.Content, "\x1f\u008b\ufffd") || c.Type == "done" {
			t.Errorf("%+v", c)
		}
	}
	n.do(coded("/v1/sessions", typeJSON, "gzip", `{}`)).refused(t, 400, "invalid_json")
}

// A line is stored when its sender flushes it, not when the body ends.
func TestBody_inGzipIsStoredAsItArrives(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	from, to := io.Pipe()
	w := gzip.NewWriter(to)
	done := make(chan answer, 1)
	go func() { // ends with its body
		done <- n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeNDJSON, from: from, bad: true, header: map[string]string{"Content-Encoding": "gzip"}})
	}()
	for i, line := range []string{"{\"content\":\"sesame 1\"}\n", "{\"content\":\"sesame 2\"}\n"} {
		_, _ = w.Write([]byte(line))
		_ = w.Flush()
		n.until("s", int64(i+1))
	}
	_ = w.Close()
	_ = to.Close()
	if got := into[Stored](t, <-done, http.StatusCreated); got.Count != 2 {
		t.Errorf("%+v", got)
	}
}
