package api

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"gapless/api/apitest"
)

// theContract is openapi.yaml. The requests and responses of these tests are checked against it.
var theContract = sync.OnceValue(func() *apitest.Contract {
	text, err := os.ReadFile("../openapi.yaml")
	if err != nil {
		panic(err)
	}
	return apitest.New(text)
})

// cannotFail lists operations for which no test can cause a 500: they call nothing else, or handle errors in a better
// way. The contract lists 500 for them all the same, for unforeseen faults.
var cannotFail = map[string]bool{"getHealth": true, "getReadiness": true, "getContract": true, "getMetrics": true, "getPage": true, "getAdminPage": true, "getClient": true, "getClientTypes": true, "getDocs": true, "disturb": true, "streamChunks": true}

func TestContract_isAValidDocument(t *testing.T) {
	if err := theContract().Valid(); err != nil {
		t.Error(err)
	}
}

var parameter = regexp.MustCompile(`:(\w+)`)

func TestContract_listsEveryRouteAndNoOther(t *testing.T) {
	n := serve(t, nil)
	c := theContract()
	served := map[string]bool{}
	for _, r := range n.api.echo.Routes() {
		path := parameter.ReplaceAllString(r.Path, "{$1}")
		if slices.Contains(pageFiles(t), strings.TrimPrefix(path, "/")) && !strings.HasPrefix(path, "/gapless.") || strings.HasPrefix(path, "/docs/") {
			continue // a part of the page, or of the reference
		}
		served[r.Method+" "+path] = true
	}
	for route := range maps.Clone(served) { // HEAD is the same call, and the contract lists it once
		if path, head := strings.CutPrefix(route, "HEAD "); head && served["GET "+path] {
			delete(served, route)
		}
	}
	listed := map[string]bool{}
	for path, item := range c.Model.Paths.PathItems.FromOldest() {
		for method := range item.GetOperations().FromOldest() {
			listed[strings.ToUpper(method)+" "+path] = true
		}
	}
	for route := range served {
		if !listed[route] {
			t.Errorf("%s is served and not listed", route)
		}
	}
	for route := range listed {
		if !served[route] {
			t.Errorf("%s is listed and not served", route)
		}
	}
}

func TestContract_hasEveryCodeInItsTable(t *testing.T) {
	c := theContract()
	table := map[string]bool{}
	for _, node := range c.Schema("ErrorCode").Enum {
		table[node.Value] = false
	}
	used := map[string]bool{"not_found": true, "method_not_allowed": true}
	for _, o := range c.Listed() {
		if o.Code != "" {
			used[o.Code] = true
		}
	}
	for code := range used {
		if _, ok := table[code]; !ok {
			t.Errorf("%s is not in ErrorCode", code)
		}
	}
	for code := range table {
		if !used[code] {
			t.Errorf("%s is in ErrorCode, and in no operation", code)
		}
	}
}

// Each example is named after its code, and an enum next to the $ref lists the codes for programs. OpenAPI 3.1 allows
// siblings of $ref. Validators respect them, and generators ignore them, so that they make one type of problem, not one
// per status.
func TestContract_namesTheCodesOfEachStatus(t *testing.T) {
	for _, o := range theContract().Responses() {
		if want := o.Examples; !slices.Equal(o.Codes, want) {
			t.Errorf("%s: its schema has the codes %v, its examples %v", o.Name, o.Codes, want)
		}
	}
}

// The document's examples match its schemas.
func TestContract_examplesAreOfTheirSchemas(t *testing.T) {
	c := theContract()
	count := 0
	for _, e := range c.Examples() {
		count++
		c.HoldsIn(t, e.Where, e.Schema, e.JSON)
		if strings.Contains(e.Where, "problem+json") {
			c.Holds(t, "Problem", e.JSON)
		}
	}
	if count < 100 {
		t.Errorf("%d examples: not all are found", count)
	}
}

// The server accepts the document's example requests.
func TestContract_exampleRequestsAreAnswered(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.model = says("Yes.") })
	c := theContract()
	for path, item := range c.Model.Paths.PathItems.FromOldest() {
		for method, op := range item.GetOperations().FromOldest() {
			if op.RequestBody == nil {
				continue
			}
			for kind, media := range op.RequestBody.Content.FromOldest() {
				for name, e := range media.Examples.FromOldest() {
					t.Run(op.OperationId+" "+name, func(t *testing.T) {
						session := op.OperationId + name
						n.append(session, `{"message_id":"m1","content":"sesame"}`) // some requests continue it, and cancel stops it
						n.api.demo.show("01990b6c-7d1e-7c3a-8a51-5d0f6e2b9a10", naiveViewer{session, func() {}})
						body := apitest.JSON(e.Value)
						if kind != typeJSON {
							var text string
							if err := json.Unmarshal(body, &text); err != nil {
								t.Fatal(err)
							}
							body = []byte(text)
						}
						a := n.do(request{method: strings.ToUpper(method), path: strings.ReplaceAll(path, "{id}", session), kind: kind, body: string(body)})
						if a.status/100 != 2 {
							t.Errorf("%d %s", a.status, a.body)
						}
					})
				}
			}
		}
	}
}

// The checker must be able to fail, or the rest of this package proves nothing.
func TestContract_checkerNoticesWhatIsNotListed(t *testing.T) {
	problem := func(status int, code string) (int, string, string) {
		return status, "application/problem+json", fmt.Sprintf(`{"title":"T","status":%d,"detail":"d","code":%q}`, status, code)
	}
	usual := http.Header{"X-Content-Type-Options": {"nosniff"}, "Cross-Origin-Resource-Policy": {"same-origin"}}
	const page = `{"epoch":"e","first_seq":1,"last_seq":1,"ended":false,"from_seq":1,"chunks":[{"content":"a"}]}`
	for _, c := range []struct {
		name, method, path, send string
		answer                   func() (int, string, string)
		ok                       bool
		change                   func(http.Header)
	}{
		{"a page", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 200, typeJSON, page }, true, nil},
		{"a page without from_seq", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) {
			return 200, typeJSON, strings.Replace(page, `"from_seq":1,`, "", 1)
		}, false, nil},
		{"a page whose number is text", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) {
			return 200, typeJSON, strings.Replace(page, `"first_seq":1`, `"first_seq":"1"`, 1)
		}, false, nil},
		{"a bad parameter", "GET", "/v1/sessions/s/chunks?limit=0", "", func() (int, string, string) { return 200, typeJSON, page }, false, nil},
		{"a bad body", "POST", "/v1/sessions/s/messages", `{"contents":"a"}`, func() (int, string, string) {
			return 202, typeJSON, `{"message_id":"a","reply_message_id":"b"}`
		}, false, nil},
		{"a status", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 418, typeJSON, page }, false, nil},
		{"an error that is no problem", "GET", "/v1/sessions/s", "", func() (int, string, string) { return 404, "text/plain", "no" }, false, nil},
		{"a code", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(404, "session_not_found") }, true, nil},
		{"a code of another operation", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(404, "not_found") }, false, nil},
		{"a code of nobody's", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(404, "nothing") }, false, nil},
		{"a missing Retry-After", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(503, "redis_away") }, false, nil},
		{"a route", "GET", "/v1/nothing", "", func() (int, string, string) { return 200, typeJSON, "{}" }, false, nil},
		{"a missing Allow", "PUT", "/v1/sessions/s", "", func() (int, string, string) { return problem(405, "method_not_allowed") }, false, nil},
		{"a header", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 200, typeJSON, page }, false, func(h http.Header) { h.Set("X-Powered-By", "tea") }},
		{"a header of another operation", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 200, typeJSON, page }, false, func(h http.Header) { h.Set("Location", "/") }},
		{"a missing nosniff", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 200, typeJSON, page }, false, func(h http.Header) { h.Del("X-Content-Type-Options") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, kind, body := c.answer()
			r, err := http.NewRequest(c.method, "http://127.0.0.1"+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			if c.send != "" {
				r.Header.Set("Content-Type", typeJSON)
			}
			h := usual.Clone()
			h.Set("Content-Type", kind)
			if c.change != nil {
				c.change(h)
			}
			res := &http.Response{StatusCode: status, Header: h, Request: r}
			judged := &verdict{TB: t}
			theContract().Fresh().Judge(judged, r, []byte(c.send), res, []byte(body))
			if judged.failed == c.ok {
				t.Errorf("found good: %t", !judged.failed)
			}
		})
	}
}

// verdict is a test that should fail.
type verdict struct {
	testing.TB
	failed bool
}

func (v *verdict) Errorf(string, ...any) { v.failed = true }
func (v *verdict) Helper()               {}
