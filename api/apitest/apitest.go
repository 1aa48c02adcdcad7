// Package apitest checks traffic against openapi.yaml, for the tests of several packages.
package apitest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	yaml "github.com/pb33f/go-yaml"
	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	"github.com/pb33f/libopenapi-validator/content"
	validation "github.com/pb33f/libopenapi-validator/errors"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	"github.com/pb33f/libopenapi/datamodel/high/base"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"
	"github.com/pb33f/libopenapi/orderedmap"

	"gapless/web"
)

// Contract is openapi.yaml, with a record of what the tests have seen of it. Everything that the tests and
// the server exchange is checked against it (Transport).
type Contract struct {
	Text      []byte
	Model     *v3.Document
	validator validator.Validator
	schemas   schema_validation.SchemaValidator
	checks    *sync.Mutex // a validator compiles a schema when it first uses it, and changes the model meanwhile

	mu    sync.Mutex
	seen  map[Outcome]bool
	forms map[form]bool
}

// Outcome is a response that the document lists: an operation, a status, and, for a
// problem, its code.
type Outcome struct{ Operation, Status, Code string }

func (o Outcome) String() string {
	return strings.TrimSpace(o.Operation + " " + o.Status + " " + o.Code)
}

// New parses a contract. It panics if the text is not a valid document.
func New(text []byte) *Contract {
	doc, err := libopenapi.NewDocument(text)
	if err != nil {
		panic(err)
	}
	model, err := doc.BuildV3Model()
	if err != nil {
		panic(err)
	}
	options := []config.Option{config.WithFormatAssertions(), config.WithBodyDecoder("application/x-ndjson", content.TextDecoder())}
	v, errs := validator.NewValidator(doc, options...)
	if len(errs) > 0 {
		panic(errs)
	}
	return &Contract{
		Text: text, Model: &model.Model, validator: v,
		schemas: schema_validation.NewSchemaValidator(options...), checks: &sync.Mutex{}, seen: map[Outcome]bool{}, forms: map[form]bool{},
	}
}

// Fresh returns the same contract, with nothing seen.
func (c *Contract) Fresh() *Contract {
	return &Contract{Text: c.Text, Model: c.Model, validator: c.validator, schemas: c.schemas, checks: c.checks, seen: map[Outcome]bool{}, forms: map[form]bool{}}
}

// Valid returns what is wrong with the document itself, or nil.
func (c *Contract) Valid() error {
	c.checks.Lock()
	defer c.checks.Unlock()
	if ok, errs := c.validator.ValidateDocument(); !ok {
		return errors.New(explain(errs))
	}
	return nil
}

// Route returns the template and the operations that the document has for an escaped path.
func (c *Contract) Route(path string) (template string, operations map[string]*v3.Operation) {
	parts := strings.Split(path, "/")
	for found, item := range c.Model.Paths.PathItems.FromOldest() {
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

// codes returns the codes of the problems that an operation lists under a status. It has an example of each.
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

// Listed returns every Outcome in the document.
func (c *Contract) Listed() (all []Outcome) {
	for _, item := range c.Model.Paths.PathItems.FromOldest() {
		for _, op := range item.GetOperations().FromOldest() {
			for status := range op.Responses.Codes.FromOldest() {
				problems := codes(op, status)
				for _, code := range problems {
					all = append(all, Outcome{op.OperationId, status, code})
				}
				if problems == nil {
					all = append(all, Outcome{op.OperationId, status, ""})
				}
			}
		}
	}
	return all
}

// Unseen returns what the document lists and no test has caused: an outcome, or an
// example whose form no response had. excused reports whether an outcome may be missing.
func (c *Contract) Unseen(excused func(Outcome) bool) (missing []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range c.Listed() {
		switch {
		case excused(o):
		case !c.seen[o]:
			missing = append(missing, o.String())
		default:
			missing = append(missing, c.unreal(o)...)
		}
	}
	return missing
}

// Schema returns the component schema with a name.
func (c *Contract) Schema(name string) *base.Schema {
	proxy := c.Model.Components.Schemas.GetOrZero(name)
	if proxy == nil {
		panic("openapi.yaml has no schema " + name)
	}
	return proxy.Schema()
}

// Holds checks JSON against a component schema.
func (c *Contract) Holds(t testing.TB, schema string, data []byte) {
	t.Helper()
	c.HoldsIn(t, schema, c.Schema(schema), data)
}

// HoldsIn checks JSON against a schema of the document.
func (c *Contract) HoldsIn(t testing.TB, where string, schema *base.Schema, data []byte) {
	t.Helper()
	c.checks.Lock()
	defer c.checks.Unlock()
	if ok, errs := c.schemas.ValidateSchemaBytes(schema, data); !ok {
		t.Errorf("no %s: %s\n%s", where, data, explain(errs))
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

// Transport returns a transport that fails the test on everything that the contract does not list: a
// route, a status, a code or a header. It also fails on a member of a wrong type and on a missing header.
func (c *Contract) Transport(t testing.TB, base http.RoundTripper) http.RoundTripper {
	return &checked{c, t, base}
}

type checked struct {
	c    *Contract
	t    testing.TB
	base http.RoundTripper
}

type badKey struct{}

// Bad returns the context of an intentionally bad request: only its response is checked.
func Bad(ctx context.Context) context.Context { return context.WithValue(ctx, badKey{}, true) }

// RoundTrip implements http.RoundTripper.
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
	body, err := Whole(res)
	if err != nil {
		return nil, err
	}
	c.c.Judge(c.t, r, whole(r, sent), res, body)
	return res, nil
}

// Whole reads the body of a response, and leaves it to be read again, including its error. It reads
// nothing of a stream.
func Whole(res *http.Response) ([]byte, error) {
	if kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")); kind == "text/event-stream" {
		return nil, nil
	}
	body, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	again := io.Reader(bytes.NewReader(body))
	if err != nil {
		again = io.MultiReader(again, iotest.ErrReader(err))
		err = fmt.Errorf("read the answer's body: %w", err)
	}
	res.Body = io.NopCloser(again)
	return body, err
}

// whole returns the body of a request. Not all of it may have been sent when the response came. If the body
// cannot be had again, whole returns the part that was sent.
func whole(r *http.Request, sent *recorder) []byte {
	if r.GetBody != nil {
		if again, err := r.GetBody(); err == nil {
			text, _ := io.ReadAll(again)
			return text
		}
	}
	return sent.bytes()
}

// recorder records what was sent of a body. The transport reads it in its own goroutine.
type recorder struct {
	from io.ReadCloser
	mu   sync.Mutex
	sent []byte
}

// Read implements io.Reader.
func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = append(r.sent, p[:n]...)
	return n, err
}

// Close implements io.Closer.
func (r *recorder) Close() error { return r.from.Close() }

func (r *recorder) bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.sent)
}

// Judge checks a request and its response against the document.
func (c *Contract) Judge(t testing.TB, r *http.Request, sent []byte, res *http.Response, body []byte) {
	t.Helper()
	what := fmt.Sprintf("%s %s -> %d", r.Method, r.URL.RequestURI(), res.StatusCode)
	template, operations := c.Route(r.URL.EscapedPath())
	if operations["GET"] != nil { // the document lists HEAD once, for all of them
		operations["HEAD"] = operations["GET"]
	}
	op := operations[r.Method]
	status := strconv.Itoa(res.StatusCode)

	var p problem
	isProblem := res.StatusCode >= 400
	if isProblem {
		got := res.Header.Get("Content-Type")
		openai := strings.HasPrefix(r.URL.Path, "/openai/")
		if openai && got == "application/json" {
			got = "application/problem+json"
		}
		if res.StatusCode == http.StatusRequestHeaderFieldsTooLarge && strings.HasPrefix(got, "text/plain") {
			return // net/http sends this one itself, as the contract says
		}
		if got != "application/problem+json" {
			t.Errorf("%s: Content-Type %q: %.200s", what, got, body)
			return
		}
		if r.Method != http.MethodHead {
			if openai {
				c.Holds(t, "OpenAIError", body)
				p = problem{Title: "an error", Status: res.StatusCode}
				var e struct {
					Error struct{ Message, Code string }
				}
				_ = json.Unmarshal(body, &e)
				if p.Detail = e.Error.Message; op == nil {
					p.Code = e.Error.Code // for an operation the contract lists only the statuses
				}
			} else {
				c.Holds(t, "Problem", body)
			}
			if err := json.Unmarshal(body, &p); err != nil && !openai || p.Status != res.StatusCode || p.Title == "" || p.Detail == "" {
				t.Errorf("%s: %s (%v)", what, body, err)
			}
		}
	}

	if operations == nil && (r.Method == http.MethodGet || r.Method == http.MethodHead) && !isProblem && partOfThePage(r.URL.Path) {
		return
	}
	c.headers(t, what, op, status, res.Header)

	// Responses that belong to no operation.
	switch {
	case p.Code == "host_not_allowed" && op == nil:
		return
	case operations == nil && res.StatusCode == 404 && (p.Code == "not_found" || r.Method == http.MethodHead):
		c.see(Outcome{"", status, p.Code}, nil)
		return
	case op == nil && operations != nil && (res.StatusCode == 405 || r.Method == http.MethodOptions && res.StatusCode == 204):
		if p.Code != "method_not_allowed" && r.Method != http.MethodHead && res.StatusCode == 405 {
			t.Errorf("%s: code %q", what, p.Code)
		}
		c.see(Outcome{"", status, p.Code}, nil)
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
		if again.Method == http.MethodHead {
			again.Method = http.MethodGet
		}
		again.Body, again.ContentLength = http.NoBody, 0
		if len(sent) > 0 {
			again.Body, again.ContentLength = io.NopCloser(bytes.NewReader(sent)), int64(len(sent))
		}
		if ok, errs := c.validator.ValidateHttpRequestSync(again); !ok {
			t.Errorf("%s: the request is none of the contract's:\n%s", what, explain(errs))
		}
	}
	if r.Method == http.MethodHead {
		if len(body) > 0 {
			t.Errorf("%s: it has a body: %.200s", what, body)
		}
		if op.Responses.Codes.GetOrZero(status) == nil {
			t.Errorf("%s: the contract lists no such status", what)
		}
		return
	}
	seen := &http.Response{StatusCode: res.StatusCode, Header: res.Header, Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)), Request: r}
	if ok, errs := c.validator.ValidateHttpResponse(r, seen); !ok {
		t.Errorf("%s: the answer is none of the contract's: %.300s\n%s", what, body, explain(errs))
	}
	if op.Responses.Codes.GetOrZero(status) == nil {
		t.Errorf("%s: the contract lists no such status", what)
	}
	if isProblem && p.Code != "" && !slices.Contains(codes(op, status), p.Code) {
		t.Errorf("%s: the contract does not list %q there", what, p.Code)
	}
	c.see(Outcome{op.OperationId, status, p.Code}, body)
}

func (c *Contract) see(o Outcome, body []byte) {
	f := formOf(o, body)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen[o] = true
	c.forms[f] = true
}

// form is what an example and a real response must have in common: the names of the members,
// and the detail of a problem without its names and numbers. Operations share the examples of
// problems.
type form struct {
	Outcome
	members, detail string
}

var names = regexp.MustCompile(`"[^"]*"|'.'|[0-9][0-9A-Za-z:.-]*`)

func formOf(o Outcome, body []byte) form {
	var members map[string]any
	_ = json.Unmarshal(body, &members) // a body that is not an object has no members
	detail, _ := members["detail"].(string)
	if o.Code != "" {
		o.Operation = ""
	}
	return form{o, strings.Join(slices.Sorted(maps.Keys(members)), " "), names.ReplaceAllString(detail, "_")}
}

// unreal returns the examples of an outcome that resemble no real response.
func (c *Contract) unreal(o Outcome) (missing []string) {
	for _, e := range c.examples(o) {
		if f := formOf(o, e.text); !c.forms[f] {
			missing = append(missing, fmt.Sprintf("%s as the example %s has it: %q with %s", o, e.name, f.detail, f.members))
			for seen := range c.forms {
				if seen.Outcome == f.Outcome {
					missing = append(missing, fmt.Sprintf("  it is %q with %s", seen.detail, seen.members))
				}
			}
		}
	}
	return missing
}

type example struct {
	name string
	text []byte // JSON
}

// examples returns the document's examples of an outcome that are JSON.
func (c *Contract) examples(o Outcome) (all []example) {
	for _, item := range c.Model.Paths.PathItems.FromOldest() {
		for _, op := range item.GetOperations().FromOldest() {
			if op.OperationId != o.Operation {
				continue
			}
			for kind, media := range op.Responses.Codes.GetOrZero(o.Status).Content.FromOldest() {
				for name, e := range media.Examples.FromOldest() {
					if !strings.HasSuffix(kind, "json") || o.Code != "" && name != o.Code {
						continue
					}
					all = append(all, example{name, JSON(e.Value)})
				}
			}
		}
	}
	return all
}

// Listing is what the document lists of problems under one status of an operation.
type Listing struct {
	Name            string
	Codes, Examples []string // from its schema, and from its examples
}

// Responses returns all responses in the document that are problems.
func (c *Contract) Responses() (all []Listing) {
	for _, item := range c.Model.Paths.PathItems.FromOldest() {
		for _, op := range item.GetOperations().FromOldest() {
			for status := range op.Responses.Codes.FromOldest() {
				if problems := codes(op, status); problems != nil {
					l := Listing{Name: op.OperationId + " " + status, Examples: problems}
					media := op.Responses.Codes.GetOrZero(status).Content.GetOrZero("application/problem+json")
					if own := codeOf(media.Schema); own != nil {
						for _, node := range own.Enum {
							l.Codes = append(l.Codes, node.Value)
						}
					}
					all = append(all, l)
				}
			}
		}
	}
	return all
}

// codeOf returns the schema of the member code that stands next to a schema's $ref, or nil.
func codeOf(proxy *base.SchemaProxy) *base.Schema {
	code := proxy.Schema().Properties.GetOrZero("code")
	if code == nil {
		return nil
	}
	return code.Schema()
}

// Example is an example in the document, of a JSON body or of a parameter.
type Example struct {
	Where  string
	Schema *base.Schema
	JSON   []byte
}

// Examples returns all of them.
func (c *Contract) Examples() (all []Example) {
	body := func(where string, bodies *orderedmap.Map[string, *v3.MediaType]) {
		for kind, media := range bodies.FromOldest() {
			for name, e := range media.Examples.FromOldest() {
				all = append(all, Example{fmt.Sprint(where, " ", kind, " ", name), media.Schema.Schema(), JSON(e.Value)})
			}
		}
	}
	for path, item := range c.Model.Paths.PathItems.FromOldest() {
		for method, op := range item.GetOperations().FromOldest() {
			where := method + " " + path
			for _, p := range append(item.Parameters, op.Parameters...) {
				if p.Example != nil {
					all = append(all, Example{where + " " + p.Name, p.Schema.Schema(), JSON(p.Example)})
				}
				for name, e := range p.Examples.FromOldest() {
					all = append(all, Example{where + " " + p.Name + " " + name, p.Schema.Schema(), JSON(e.Value)})
				}
			}
			if op.RequestBody != nil {
				body(where, op.RequestBody.Content)
			}
			for status, res := range op.Responses.Codes.FromOldest() {
				body(where+" "+status, res.Content)
				for name, h := range res.Headers.FromOldest() {
					if h.Example != nil {
						all = append(all, Example{where + " " + status + " " + name, h.Schema.Schema(), JSON(h.Example)})
					}
				}
			}
		}
	}
	return all
}

// JSON returns a node of the document as JSON.
func JSON(node *yaml.Node) []byte {
	var value any
	if err := node.Decode(&value); err != nil {
		panic(err)
	}
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return text
}

// headers checks a response's headers against those that its status lists, and against the table of headers
// that every response may have.
func (c *Contract) headers(t testing.TB, what string, op *v3.Operation, status string, h http.Header) {
	t.Helper()
	for _, name := range []string{"X-Content-Type-Options", "Cross-Origin-Resource-Policy"} {
		if h.Get(name) == "" {
			t.Errorf("%s: %s is missing", what, name)
		}
	}
	listed := c.everywhere()
	if op != nil {
		if res := op.Responses.Codes.GetOrZero(status); res != nil {
			for name := range res.Headers.KeysFromOldest() {
				listed[http.CanonicalHeaderKey(name)] = true
			}
		}
	}
	for name := range h {
		if !listed[name] {
			t.Errorf("%s: the contract does not list the header %s there", what, name)
		}
	}
}

var headerRow = regexp.MustCompile("(?m)^\\| (`[A-Za-z-]+`(?:, `[A-Za-z-]+`)*) \\|")

// everywhere returns the headers that the document's section on headers names.
func (c *Contract) everywhere() map[string]bool {
	_, section, _ := strings.Cut(c.Model.Info.Description, "### Headers\n")
	section, _, _ = strings.Cut(section, "\n### ")
	all := map[string]bool{}
	for _, row := range headerRow.FindAllStringSubmatch(section, -1) {
		for name := range strings.SplitSeq(row[1], ", ") {
			all[http.CanonicalHeaderKey(strings.Trim(name, "`"))] = true
		}
	}
	return all
}

// partOfThePage reports whether a path is a script or a style of the page or of the API
// reference. The contract does not list their names.
func partOfThePage(path string) bool {
	for _, name := range []string{path[1:], path[1:] + ".gz"} {
		if stat, err := fs.Stat(web.Files, name); err == nil && !stat.IsDir() {
			return true
		}
	}
	return path == "/docs/guide" || strings.HasPrefix(path, "/docs/guide/")
}

// problem holds the members of every problem.
type problem struct {
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Code   string `json:"code"`
}
