package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	"github.com/pb33f/libopenapi-validator/content"
	validation "github.com/pb33f/libopenapi-validator/errors"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	"github.com/pb33f/libopenapi/datamodel/high/base"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
)

// contract is openapi.yaml, and what of it the tests have seen happen. Whatever goes
// between the tests and the server is held against it (checked).
type contract struct {
	text      []byte
	model     *v3.Document
	validator validator.Validator
	schemas   schema_validation.SchemaValidator
	checks    *sync.Mutex // the validators compile a schema when it is first used, and change the model meanwhile

	mu   sync.Mutex
	seen map[outcome]bool
}

// outcome is an answer that the document lists: an operation, a status, and for a
// problem its code.
type outcome struct{ operation, status, code string }

func (o outcome) String() string {
	return strings.TrimSpace(o.operation + " " + o.status + " " + o.code)
}

var theContract = sync.OnceValue(func() *contract {
	text, err := os.ReadFile("../openapi.yaml")
	if err != nil {
		panic(err)
	}
	doc, err := libopenapi.NewDocument(text)
	if err != nil {
		panic(err)
	}
	model, err := doc.BuildV3Model()
	if err != nil {
		panic(err)
	}
	options := []config.Option{config.WithFormatAssertions(), config.WithBodyDecoder(typeNDJSON, content.TextDecoder())}
	v, errs := validator.NewValidator(doc, options...)
	if len(errs) > 0 {
		panic(errs)
	}
	return &contract{
		text: text, model: &model.Model, validator: v,
		schemas: schema_validation.NewSchemaValidator(options...), checks: &sync.Mutex{}, seen: map[outcome]bool{},
	}
})

// route finds what the document has for an escaped path: its template and its operations.
func (c *contract) route(path string) (template string, operations map[string]*v3.Operation) {
	parts := strings.Split(path, "/")
	for found, item := range c.model.Paths.PathItems.FromOldest() {
		pattern := strings.Split(found, "/")
		if slices.EqualFunc(pattern, parts, func(a, b string) bool { return a == b || strings.HasPrefix(a, "{") && b != "" }) &&
			(operations == nil || !strings.Contains(found, "{")) {
			template, operations = found, map[string]*v3.Operation{}
			for method, op := range item.GetOperations().FromOldest() {
				operations[strings.ToUpper(method)] = op
			}
		}
	}
	return template, operations
}

// codes are the problems that an operation lists under a status: it has an example of each.
func codes(op *v3.Operation, status string) []string {
	res := op.Responses.Codes.GetOrZero(status)
	if res == nil || res.Content == nil {
		return nil
	}
	media := res.Content.GetOrZero("application/problem+json")
	if media == nil {
		return nil
	}
	return slices.Collect(media.Examples.KeysFromOldest())
}

// listed is every outcome that the document knows.
func (c *contract) listed() (all []outcome) {
	for _, item := range c.model.Paths.PathItems.FromOldest() {
		for _, op := range item.GetOperations().FromOldest() {
			for status := range op.Responses.Codes.FromOldest() {
				problems := codes(op, status)
				for _, code := range problems {
					all = append(all, outcome{op.OperationId, status, code})
				}
				if problems == nil {
					all = append(all, outcome{op.OperationId, status, ""})
				}
			}
		}
	}
	return all
}

// unseen is what the document lists and no test has brought about.
func (c *contract) unseen() (missing []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range c.listed() {
		if c.seen[o] || o.code == "internal" && cannotFail[o.operation] {
			continue
		}
		missing = append(missing, o.String())
	}
	return missing
}

// cannotFail are operations for which no test knows how to make a 500 happen: they ask
// nobody, or answer trouble with something better. The document lists it all the same,
// as the answer to a fault that nobody has thought of.
var cannotFail = map[string]bool{"getHealth": true, "getReadiness": true, "getContract": true, "getMetrics": true, "getPage": true, "getClient": true, "getClientTypes": true, "streamChunks": true}

func (c *contract) schema(name string) *base.Schema {
	proxy := c.model.Components.Schemas.GetOrZero(name)
	if proxy == nil {
		panic("openapi.yaml has no schema " + name)
	}
	return proxy.Schema()
}

// holds checks JSON against a component schema.
func (c *contract) holds(t testing.TB, schema string, data []byte) {
	t.Helper()
	c.checks.Lock()
	defer c.checks.Unlock()
	if ok, errs := c.schemas.ValidateSchemaBytes(c.schema(schema), data); !ok {
		t.Errorf("no %s: %s\n%s", schema, data, explain(errs))
	}
}

func explain(errs []*validation.ValidationError) string {
	var b strings.Builder
	for _, e := range errs {
		fmt.Fprintf(&b, "  %s: %s\n", e.Message, e.Reason)
		for _, s := range e.SchemaValidationErrors {
			fmt.Fprintf(&b, "    %s %s\n", s.FieldPath, s.Reason)
		}
	}
	return b.String()
}

// checked is a transport that fails the test on whatever the contract does not list: a
// route, a status, a code, a member of a wrong type, a header that is missing.
type checked struct {
	t    testing.TB
	base http.RoundTripper
}

type badKey struct{}

// RoundTrip implements http.RoundTripper. A request whose context has badKey is meant to
// be bad: only what it is answered is checked.
func (c *checked) RoundTrip(r *http.Request) (*http.Response, error) {
	sent := &recorder{}
	if r.Body != nil {
		sent.from = r.Body
		r = r.Clone(r.Context())
		r.Body = sent
	}
	res, err := c.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	var body []byte
	if kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")); kind != "text/event-stream" {
		body, err = io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil {
			return nil, fmt.Errorf("read the answer's body: %w", err)
		}
		res.Body = io.NopCloser(bytes.NewReader(body))
	}
	theContract().judge(c.t, r, whole(r, sent), res, body)
	return res, nil
}

// whole is a request's body, of which not all need have gone when the answer came. Of one that
// cannot be had again it is what was sent.
func whole(r *http.Request, sent *recorder) []byte {
	if r.GetBody != nil {
		if again, err := r.GetBody(); err == nil {
			text, _ := io.ReadAll(again)
			return text
		}
	}
	return sent.bytes()
}

// recorder keeps what was sent of a body. It is read from the transport's goroutine.
type recorder struct {
	from io.ReadCloser
	mu   sync.Mutex
	sent []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = append(r.sent, p[:n]...)
	return n, err
}

func (r *recorder) Close() error { return r.from.Close() }

func (r *recorder) bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.sent)
}

// judge holds one request and its answer against the document.
func (c *contract) judge(t testing.TB, r *http.Request, sent []byte, res *http.Response, body []byte) {
	t.Helper()
	what := fmt.Sprintf("%s %s -> %d", r.Method, r.URL.RequestURI(), res.StatusCode)
	template, operations := c.route(r.URL.EscapedPath())
	op := operations[r.Method]
	status := strconv.Itoa(res.StatusCode)

	var p Problem
	isProblem := res.StatusCode >= 400
	if isProblem {
		if got := res.Header.Get("Content-Type"); got != "application/problem+json" {
			t.Errorf("%s: Content-Type %q: %.200s", what, got, body)
			return
		}
		if r.Method != http.MethodHead {
			c.holds(t, "Problem", body)
			if err := json.Unmarshal(body, &p); err != nil || p.Status != res.StatusCode || p.Title == "" || p.Detail == "" {
				t.Errorf("%s: %s (%v)", what, body, err)
			}
		}
	}

	// What belongs to no operation.
	switch {
	case p.Code == "host_not_allowed" && op == nil:
		return
	case operations == nil && res.StatusCode == 404 && (p.Code == "not_found" || r.Method == http.MethodHead):
		c.see(outcome{"", status, p.Code})
		return
	case op == nil && operations != nil && (res.StatusCode == 405 || r.Method == http.MethodOptions && res.StatusCode == 204):
		if p.Code != "method_not_allowed" && r.Method != http.MethodHead && res.StatusCode == 405 {
			t.Errorf("%s: code %q", what, p.Code)
		}
		c.see(outcome{"", status, p.Code})
		want := append(slices.Collect(maps.Keys(operations)), http.MethodOptions)
		got := strings.Split(strings.ReplaceAll(res.Header.Get("Allow"), " ", ""), ",")
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: Allow names %v, the contract has %v", what, got, want)
		}
		return
	case op == nil:
		t.Errorf("%s %q: the contract has no such operation (%s)", what, p.Code, template)
		return
	}

	c.checks.Lock()
	defer c.checks.Unlock()
	if r.Context().Value(badKey{}) == nil {
		again := r.Clone(r.Context())
		again.Body, again.ContentLength = http.NoBody, 0
		if len(sent) > 0 {
			again.Body, again.ContentLength = io.NopCloser(bytes.NewReader(sent)), int64(len(sent))
		}
		if ok, errs := c.validator.ValidateHttpRequestSync(again); !ok {
			t.Errorf("%s: the request is none of the contract's:\n%s", what, explain(errs))
		}
	}
	seen := &http.Response{StatusCode: res.StatusCode, Header: res.Header, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)), Request: r}
	if ok, errs := c.validator.ValidateHttpResponse(r, seen); !ok {
		t.Errorf("%s: the answer is none of the contract's: %.300s\n%s", what, body, explain(errs))
	}
	if op.Responses.Codes.GetOrZero(status) == nil {
		t.Errorf("%s: the contract lists no such status", what)
	}
	if isProblem && !slices.Contains(codes(op, status), p.Code) {
		t.Errorf("%s: the contract does not list %q there", what, p.Code)
	}
	c.see(outcome{op.OperationId, status, p.Code})
}

func (c *contract) see(o outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[o] = true
}

func TestContract_isAValidDocument(t *testing.T) {
	if ok, errs := theContract().validator.ValidateDocument(); !ok {
		t.Error(explain(errs))
	}
}

var parameter = regexp.MustCompile(`:(\w+)`)

func TestContract_listsEveryRouteAndNoOther(t *testing.T) {
	n := serve(t, nil)
	c := theContract()
	served := map[string]bool{}
	for _, r := range n.api.echo.Routes() {
		path := parameter.ReplaceAllString(r.Path, "{$1}")
		if slices.Contains(pageFiles(t), strings.TrimPrefix(path, "/")) && !strings.HasPrefix(path, "/gapless.") {
			continue // a part of the page
		}
		served[r.Method+" "+path] = true
	}
	listed := map[string]bool{}
	for path, item := range c.model.Paths.PathItems.FromOldest() {
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
	for _, node := range c.schema("ErrorCode").Enum {
		table[node.Value] = false
	}
	used := map[string]bool{"not_found": true, "method_not_allowed": true}
	for _, o := range c.listed() {
		if o.code != "" {
			used[o.code] = true
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

// The checker must be able to fail, or the rest of this package shows nothing.
func TestContract_checkerNoticesWhatIsNotListed(t *testing.T) {
	problem := func(status int, code string) (int, string, string) {
		return status, "application/problem+json", fmt.Sprintf(`{"title":"T","status":%d,"detail":"d","code":%q}`, status, code)
	}
	const page = `{"epoch":"e","first_seq":1,"last_seq":1,"ended":false,"from_seq":1,"chunks":[{"content":"a"}]}`
	for _, c := range []struct {
		name, method, path, send string
		answer                   func() (int, string, string)
		ok                       bool
	}{
		{"a page", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 200, typeJSON, page }, true},
		{"a page without from_seq", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) {
			return 200, typeJSON, strings.Replace(page, `"from_seq":1,`, "", 1)
		}, false},
		{"a page whose number is text", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) {
			return 200, typeJSON, strings.Replace(page, `"first_seq":1`, `"first_seq":"1"`, 1)
		}, false},
		{"a bad parameter", "GET", "/v1/sessions/s/chunks?limit=0", "", func() (int, string, string) { return 200, typeJSON, page }, false},
		{"a bad body", "POST", "/v1/sessions/s/messages", `{"contents":"a"}`, func() (int, string, string) {
			return 202, typeJSON, `{"message_id":"a","reply_message_id":"b"}`
		}, false},
		{"a status", "GET", "/v1/sessions/s/chunks", "", func() (int, string, string) { return 418, typeJSON, page }, false},
		{"an error that is no problem", "GET", "/v1/sessions/s", "", func() (int, string, string) { return 404, "text/plain", "no" }, false},
		{"a code", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(404, "session_not_found") }, true},
		{"a code of another operation", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(404, "not_found") }, false},
		{"a code of nobody's", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(404, "nothing") }, false},
		{"a missing Retry-After", "GET", "/v1/sessions/s", "", func() (int, string, string) { return problem(503, "redis_away") }, false},
		{"a route", "GET", "/v1/nothing", "", func() (int, string, string) { return 200, typeJSON, "{}" }, false},
		{"a missing Allow", "PUT", "/v1/sessions/s", "", func() (int, string, string) { return problem(405, "method_not_allowed") }, false},
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
			res := &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {kind}}, Request: r}
			judged := &verdict{TB: t}
			it := theContract()
			fresh := &contract{text: it.text, model: it.model, validator: it.validator, schemas: it.schemas, checks: it.checks, seen: map[outcome]bool{}}
			fresh.judge(judged, r, []byte(c.send), res, []byte(body))
			if judged.failed == c.ok {
				t.Errorf("found good: %t", !judged.failed)
			}
		})
	}
}

// verdict is a test whose failure is what is wanted.
type verdict struct {
	testing.TB
	failed bool
}

func (v *verdict) Errorf(string, ...any) { v.failed = true }
func (v *verdict) Helper()               {}
