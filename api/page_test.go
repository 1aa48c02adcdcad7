package api

import (
	"bytes"
	"io"
	"io/fs"
	"net/http"
	"strings"
	"testing"

	"gapless/web"
)

func TestPage_isServedUnderAPolicyThatAllowsOnlyItsOwnParts(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	page := n.get("/")
	if want, _ := fs.ReadFile(web.Files, "index.html"); page.status != 200 || !bytes.Equal(page.body, want) {
		t.Fatalf("%d %.100s", page.status, page.body)
	}
	directives := map[string]string{}
	for part := range strings.SplitSeq(page.header.Get("Content-Security-Policy"), ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), " ")
		directives[name] = value
	}
	for name, want := range map[string]string{
		"default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'", "frame-ancestors": "'none'", "base-uri": "'none'", "form-action": "'self'",
	} {
		if directives[name] != want {
			t.Errorf("%s is %q", name, directives[name])
		}
	}
	for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"} {
		if got := page.header.Get(name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
	types := map[string]string{".js": "text/javascript", ".ts": "application/typescript", ".css": "text/css", ".svg": "image/svg+xml"}
	for _, name := range pageFiles(t) {
		if name == "index.html" {
			continue
		}
		res, err := http.Get(n.server.URL + "/" + name) // the contract does not include the page's own parts
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		want, _ := fs.ReadFile(web.Files, name)
		kind, _, _ := strings.Cut(res.Header.Get("Content-Type"), ";")
		if res.StatusCode != 200 || !bytes.Equal(body, want) || kind != types[name[strings.LastIndex(name, "."):]] {
			t.Errorf("%s: %d %s", name, res.StatusCode, kind)
		}
		if got := res.Header.Get("Access-Control-Allow-Origin"); (got == "*") != strings.HasPrefix(name, "gapless.") {
			t.Errorf("%s may be read by %q", name, got)
		}
		if res.Header.Get("Content-Security-Policy") == "" || res.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s has no policy: %v", name, res.Header)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestPage_ofAdministratorsIsServedAsThePageIs(t *testing.T) {
	t.Parallel()
	n, _ := locked(t, nil) // the page is open: it asks for a token
	page, admin := n.get("/").header, n.get("/admin")
	if want, _ := fs.ReadFile(web.Files, "admin.html"); admin.status != 200 || !bytes.Equal(admin.body, want) {
		t.Errorf("%d %.100s", admin.status, admin.body)
	}
	for _, name := range []string{"Content-Type", "Content-Security-Policy", "Cross-Origin-Opener-Policy", "Permissions-Policy", "Referrer-Policy", "Cache-Control", "X-Content-Type-Options"} {
		if got, want := admin.header.Get(name), page.Get(name); got != want || got == "" {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
	head := n.do(request{method: "HEAD", path: "/admin"})
	if etag := admin.header.Get("ETag"); head.status != 200 || len(head.body) > 0 || etag == "" || head.header.Get("ETag") != etag {
		t.Errorf("HEAD: %d %v", head.status, head.header)
	}
	if a := n.do(request{method: "POST", path: "/admin"}); a.status != 405 {
		t.Errorf("POST: %d", a.status)
	}
	n.get("/admin.html").refused(t, 404, "not_found")
}

// The contract includes the client, unlike the page's own parts.
func TestClient_isServedToPagesOfAnyOrigin(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for _, name := range []string{"gapless.js", "gapless.d.ts"} {
		want, err := fs.ReadFile(web.Files, name)
		if a := n.do(request{method: "GET", path: "/" + name, header: map[string]string{"Origin": "https://elsewhere.example"}}); err != nil ||
			a.status != 200 || !bytes.Equal(a.body, want) || a.header.Get("Access-Control-Allow-Origin") != "*" {
			t.Errorf("%s: %d, %d bytes, %v (%v)", name, a.status, len(a.body), a.header, err)
		}
	}
}

func TestDocs_areServedUnderAPolicyThatAllowsOnlyTheirOwnParts(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	docs := n.get("/docs")
	want, _ := fs.ReadFile(web.Files, "docs/index.html")
	if docs.status != 200 || !bytes.Equal(docs.body, want) || docs.header.Get("ETag") == "" {
		t.Fatalf("%d %v %.100s", docs.status, docs.header, docs.body)
	}
	for _, name := range []string{"/docs", "/docs/docs.js", "/docs/docs.css", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/swagger-ui.LICENSE.txt"} {
		part := n.get(name)
		if part.status != 200 || len(part.body) == 0 {
			t.Errorf("%s: %d", name, part.status)
		}
		policy := part.header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ") || strings.Contains(policy, "unsafe") || strings.Contains(policy, "http") {
			t.Errorf("%s: %s", name, policy)
		}
	}
}

func TestContract_isServedToTheByte(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	a := n.get("/openapi.yaml")
	if a.status != 200 || !bytes.Equal(a.body, theContract().Text) || a.header.Get("Content-Type") != "application/yaml" {
		t.Errorf("%d %s, %d bytes", a.status, a.header.Get("Content-Type"), len(a.body))
	}
}

// Every node of these tests checks its log for the secret when its test ends. Here the secret is wherever a client
// could put it.
func TestLog_neverHasWhatPeopleSay(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	const s = "/v1/sessions/s"
	for _, q := range []request{
		{method: "POST", path: s + "/chunks", kind: typeJSON, body: `{"content":"sesame"}`},
		{method: "POST", path: s + "/chunks", kind: typeJSON, body: `{"content":sesame}`},
		{method: "POST", path: s + "/chunks", kind: typeJSON, body: `{"sesame":1,"sesame":2}`},
		{method: "POST", path: s + "/chunks", kind: typeJSON, body: `[{"type":5,"content":"sesame"}]`},
		{method: "POST", path: s + "/chunks", kind: typeNDJSON, body: "sesame\n"},
		{method: "POST", path: s + "/chunks", kind: "text/plain", body: "sesame"},
		{method: "POST", path: s + "/chunks", kind: "text/sesame", body: "sesame"},
		{method: "POST", path: s + "/chunks?role=sesame&message_id=sesame", kind: typeJSON, body: `{"type":"done"}`},
		{method: "POST", path: s + "/chunks?role=sesame&message_id=sesame", kind: typeJSON, body: `{"content":"sesame"}`},
		{method: "POST", path: s + "/messages", kind: typeJSON, body: `{"content":"sesame"}`},
		{method: "POST", path: s + "/messages", kind: typeJSON, body: `{"sesame":"sesame"}`},
		{method: "POST", path: "/v1/sessions", kind: typeJSON, body: `{"sesame":"sesame"}`},
		{method: "GET", path: s + "/stream?after=sesame"},
		{method: "GET", path: s + "/stream?after=99&until=done", header: map[string]string{"Last-Event-ID": "sesame"}},
		{method: "DELETE", path: s},
	} {
		q.bad = true
		n.do(q)
	}
	eventually(t, "the log of a viewer", func() bool { return strings.Contains(n.log.String(), "viewer ends") })
}
