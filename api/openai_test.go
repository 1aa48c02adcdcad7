package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"gapless/api/auth"
	"gapless/api/auth/authtest"
	"gapless/api/limit"
	"gapless/api/model"
	"gapless/api/openai"
	"gapless/sse"
	"gapless/store"
	"gapless/store/storetest"
)

// created creates a response in the background.
func (n *node) created(t *testing.T, body string) map[string]any {
	t.Helper()
	return into[map[string]any](t, n.post("/openai/v1/responses", typeJSON, body), 200)
}

// events reads a stream of a response to its end, which must be clean.
func (n *node) events(t *testing.T, q request) (all []string) {
	t.Helper()
	res, err := n.client.Do(n.new(q))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("%s: %d %v %s", q.path, res.StatusCode, err, body)
	}
	return eventsOf(t, body)
}

func eventsOf(t *testing.T, body []byte) (all []string) {
	t.Helper()
	var parser sse.Parser
	for {
		e, rest, ok, err := parser.Next(body, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return all
		}
		body = rest
		var event struct {
			Type string
			N    *int `json:"sequence_number"`
		}
		if err := json.Unmarshal([]byte(e.Data), &event); err != nil || event.Type != e.Name || event.N == nil {
			t.Fatalf("%q %q: %v", e.Name, e.Data, err)
		}
		all = append(all, e.Data)
	}
}

// kinds returns the types of events, with consecutive repeats once.
func kinds(t *testing.T, all []string) string {
	t.Helper()
	var out []string
	for _, one := range all {
		var e struct{ Type string }
		if err := json.Unmarshal([]byte(one), &e); err != nil {
			t.Fatal(err)
		}
		if kind := strings.TrimPrefix(e.Type, "response."); len(out) == 0 || out[len(out)-1] != kind {
			out = append(out, kind)
		}
	}
	return strings.Join(out, " ")
}

// Promise: resumable. An event has the same number on every node, during the response and after it. The response that is retrieved as
// a whole equals the sum of its events.
func TestResponse_hasItsEventsFromEveryNumberAtEveryNode(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	m := newPaced()
	a, b := serve(t, func(s *setup) { on(redis)(s); s.model = m }), serve(t, on(redis))
	r := a.created(t, `{"model":"x","input":"`+secret+`","background":true,"conversation":"s","metadata":{"a":"b"}}`)
	id, _ := r["id"].(string)
	if r["status"] != "in_progress" || !reflect.DeepEqual(r["conversation"], map[string]any{"id": "s"}) || r["model"] != "x" {
		t.Fatalf("%v", r)
	}
	path := "/openai/v1/responses/" + id
	m.say(t, "Hm")
	m.say(t, " \u2028🍞")
	eventually(t, "words", func() bool { return b.page("s", "").Last > 3 })
	a.append("s", `{"message_id":"other","content":"not of it"}`)
	var wg sync.WaitGroup
	during := make([][]string, 6)
	for i := range during { // events 0 to 5 exist by now
		res, err := []*node{a, b}[i%2].client.Do(a.new(request{method: "GET", path: path + fmt.Sprint("?stream=true&starting_after=", i)}))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { // ends with the response
			defer res.Body.Close()
			body, _ := io.ReadAll(res.Body)
			during[i] = eventsOf(t, body)
		})
	}
	m.say(t, "!")
	close(m.steps)
	all := b.events(t, request{method: "GET", path: path + "?stream=true"})
	wg.Wait()
	if got := kinds(t, all); got != "created in_progress output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done completed" {
		t.Fatalf("%s", got)
	}
	for i, got := range during {
		if !reflect.DeepEqual(got, all[i+1:]) {
			t.Errorf("after %d, during: %q", i, got)
		}
	}
	for i := range all {
		got := []*node{a, b}[i%2].events(t, request{method: "GET", path: path + fmt.Sprint("?stream=true&starting_after=", i)})
		if len(got) != len(all)-i-1 || len(got) > 0 && !reflect.DeepEqual(got, all[i+1:]) {
			t.Errorf("after %d, after the end: %q", i, got)
		}
	}
	var last struct{ Response map[string]any }
	if err := json.Unmarshal([]byte(all[len(all)-1]), &last); err != nil {
		t.Fatal(err)
	}
	if whole := into[map[string]any](t, a.get(path+"?stream=false"), 200); !reflect.DeepEqual(whole, last.Response) || whole["status"] != "completed" {
		t.Errorf("%v\n%v", whole, last.Response)
	}
	// openai-go requests a stream in a body.
	if got := b.events(t, request{method: "GET", path: path + "?starting_after=4", body: `{"stream":true}`, bad: true}); !reflect.DeepEqual(got, all[5:]) {
		t.Errorf("%q", got)
	}
	b.do(request{method: "GET", path: path, body: `{"stream":5}`, bad: true}).refused(t, 400, "invalid_json")
	// Lost events are reported.
	if got := kinds(t, b.events(t, request{method: "GET", path: path + "?stream=true&starting_after=99"})); got != "error" {
		t.Errorf("%s", got)
	}
	if a := b.do(request{method: "HEAD", path: path + "?stream=true"}); a.status != 200 {
		t.Errorf("%d", a.status)
	}
}

func TestResponse_withoutAStreamIsWaitedFor(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	r := n.created(t, `{"input":[{"role":"user","content":[{"type":"input_text","text":"`+secret+`"}]}],"store":true}`)
	text, _ := json.Marshal(r["output"])
	if r["status"] != "completed" || !strings.Contains(string(text), "Yes, "+secret+".") {
		t.Errorf("%v", r)
	}
}

// A question with tools reaches the service in the form of chat completions, and the model's tool calls come back.
func TestResponse_passesToolsOnAndBack(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var asked []map[string]any
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		_ = json.NewDecoder(r.Body).Decode(&body)
		mu.Lock()
		asked = append(asked, body)
		first := len(asked) == 1
		mu.Unlock()
		w.Header().Set("Content-Type", typeEvents)
		if first {
			for _, delta := range []string{`{"reasoning_content":"Hm"}`, `{"content":"Let me see"}`, `{"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"tea","arguments":""}}]}`,
				`{"tool_calls":[{"index":0,"function":{"arguments":"{\"kind\":"}}]}`, `{"tool_calls":[{"index":0,"function":{"arguments":"\"green\"}"}}]}`} {
				fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"delta\":%s}]}\n\n", delta)
			}
			fmt.Fprint(w, "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"tool_calls\"}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7}}\n\ndata: [DONE]\n\n")
			return
		}
		fmt.Fprint(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"80 degrees\"}}]}\n\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"refusal\":\"No more\"},\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n")
	}))
	t.Cleanup(service.Close)
	cfg := model.DefaultConfig()
	cfg.URL, cfg.Name = service.URL+"/v1", "davinci"
	n := serve(t, func(s *setup) { s.model = model.NewOpenAI(cfg) })
	const tools = `"model":"gpt","instructions":"be brief","temperature":0,"tool_choice":{"type":"function","name":"tea"},"reasoning":{"effort":"low"},"max_output_tokens":9,"text":{"format":{"type":"json_object"}},
		"tools":[{"type":"function","name":"tea","description":null,"parameters":{"type":"object"},"strict":true}]`
	first := n.events(t, request{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: `{"stream":true,"input":"` + secret + `",` + tools + `}`})
	if got := kinds(t, first); got != "created in_progress output_item.added content_part.added reasoning_text.delta reasoning_text.done content_part.done output_item.done "+
		"output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done output_item.added function_call_arguments.delta function_call_arguments.done output_item.done completed" {
		t.Errorf("%s", got)
	}
	var last struct {
		Response struct {
			ID     string
			Output []map[string]any
			Usage  map[string]any
		}
	}
	if err := json.Unmarshal([]byte(first[len(first)-1]), &last); err != nil {
		t.Fatal(err)
	}
	if call := last.Response.Output[2]; call["call_id"] != "call_1" || call["arguments"] != `{"kind":"green"}` || call["name"] != "tea" || last.Response.Usage["input_tokens"] != 3.0 {
		t.Errorf("%+v", last)
	}
	body := `{"background":false,"previous_response_id":"` + last.Response.ID + `","input":[{"type":"function_call_output","call_id":"call_1","output":"80"}]}`
	r := n.created(t, body)
	if text, _ := json.Marshal(r["output"]); r["status"] != "incomplete" || !strings.Contains(string(text), "80 degrees") || !strings.Contains(string(text), `"refusal":"No more"`) {
		t.Errorf("%v", r)
	}
	want := []string{`{"content":"be brief","role":"system"}`, `{"content":"` + secret + `","role":"user"}`}
	said := func(i int) (out []string) {
		for _, m := range asked[i]["messages"].([]any) {
			b, _ := json.Marshal(m)
			out = append(out, string(b))
		}
		return out
	}
	if got := said(0); !reflect.DeepEqual(got, want) || asked[0]["model"] != "gpt" || asked[0]["max_completion_tokens"] != 9.0 || asked[0]["reasoning_effort"] != "low" {
		t.Errorf("%v", asked[0])
	}
	for name, want := range map[string]string{"tools": `[{"function":{"name":"tea","parameters":{"type":"object"},"strict":true},"type":"function"}]`, "tool_choice": `{"function":{"name":"tea"},"type":"function"}`, "response_format": `{"type":"json_object"}`} {
		if got, _ := json.Marshal(asked[0][name]); string(got) != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	want = []string{want[1], `{"content":"Let me see","role":"assistant","tool_calls":[{"function":{"arguments":"{\"kind\":\"green\"}","name":"tea"},"id":"call_1","type":"function"}]}`, `{"content":"80","role":"tool","tool_call_id":"call_1"}`}
	if got := said(1); !reflect.DeepEqual(got, want) || asked[1]["model"] != "davinci" {
		t.Errorf("%q", got)
	}
	// Branches are not supported, and the error says so.
	if p := n.post("/openai/v1/responses", typeJSON, body).refused(t, 400, "unsupported_parameter"); p.Member != "previous_response_id" {
		t.Errorf("%+v", p)
	}
	// A client may send everything again, and gets a new conversation.
	n.created(t, `{"input":[{"role":"user","content":"`+secret+`"},{"type":"reasoning","id":"rs_1","summary":[]},{"type":"message","role":"assistant","content":[{"type":"output_text","text":"Let me see"}]},
		{"type":"function_call","call_id":"call_1","name":"tea","arguments":"{\"kind\":\"green\"}"},{"type":"function_call_output","call_id":"call_1","output":[{"type":"input_text","text":"80"}]}]}`)
	if got := said(2); !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestResponse_isCancelledTwiceListedAndDeleted(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	r := n.created(t, `{"background":true,"input":[{"role":"system","content":"be brief"},{"role":"assistant","content":"Hi"},{"role":"user","content":"`+secret+`"},
		{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"c","output":"42"}]}`)
	path := fmt.Sprint("/openai/v1/responses/", r["id"])
	m.say(t, "half")
	eventually(t, "a word", func() bool { return strings.Contains(string(n.get(path).body), "half") })
	n.post("/openai/v1/responses", typeJSON, fmt.Sprintf(`{"input":"x","previous_response_id":%q}`, r["id"])).refused(t, 400, "invalid_value")
	var last answer
	for range 2 {
		last = n.do(request{method: "POST", path: path + "/cancel"})
		if got := into[map[string]any](t, last, 200); got["status"] != "cancelled" {
			t.Errorf("%v", got)
		}
	}
	if got := n.get(path); !bytes.Equal(got.body, last.body) {
		t.Errorf("%s\n%s", got.body, last.body)
	}
	if got := kinds(t, n.events(t, request{method: "GET", path: path + "?stream=true&starting_after=4"})); got != "incomplete" {
		t.Errorf("%s", got)
	}
	type list struct {
		Data []struct{ ID, Type string }
		More bool `json:"has_more"`
	}
	kindsOf := func(query string) (out string, l list) {
		l = into[list](t, n.get(path+"/input_items"+query), 200)
		for _, item := range l.Data {
			out += item.Type + " "
		}
		return out, l
	}
	all, l := kindsOf("?order=asc")
	if all != "message message message function_call function_call_output " || l.More {
		t.Errorf("%s", all)
	}
	if some, more := kindsOf("?order=desc&limit=2&after=" + l.Data[4].ID); some != "function_call message " || !more.More {
		t.Errorf("%s %+v", some, more)
	}
	n.get(path+"/input_items?after=x").refused(t, 400, "invalid_parameter")
	n.do(request{method: "GET", path: path + "/input_items?limit=0", bad: true}).refused(t, 400, "invalid_parameter")
	n.do(request{method: "GET", path: path + "/input_items?include=x", bad: true}).refused(t, 400, "unsupported_parameter")
	for _, bad := range []string{"?stream=maybe", "?include=x", "?stream=true&starting_after=x", "?stream=true&starting_after="} {
		if a := n.do(request{method: "GET", path: path + bad, bad: true}); a.status != 400 {
			t.Errorf("%s: %d %s", bad, a.status, a.body)
		}
	}
	n.do(request{method: "DELETE", path: path})
	n.get(path).refused(t, 404, "response_not_found")
	n.get(path+"/input_items").refused(t, 404, "response_not_found")
	n.do(request{method: "POST", path: path + "/cancel"}).refused(t, 404, "response_not_found")
	n.do(request{method: "DELETE", path: path}).refused(t, 404, "response_not_found")
	// A response of a conversation is not deleted alone.
	r = n.created(t, `{"background":true,"input":"`+secret+`","conversation":{"id":"s"}}`)
	n.do(request{method: "DELETE", path: fmt.Sprint("/openai/v1/responses/", r["id"])}).refused(t, 400, "unsupported_parameter")
	for _, none := range []string{"resp_1", "x", "resp_01990b6c7d1e7c3a8a515d0f6e2b9a10_01_s", "resp_01990b6c7d1e7c3a8a515d0f6e2b9a10_1_", "resp_01990b6c7d1e7c3a8a515d0f6e2b9a10_1_s"} {
		n.get("/openai/v1/responses/"+none).refused(t, 404, "response_not_found")
	}
}

// Nothing in a request is ignored.
func TestResponse_whatIsNotSupportedIsNamed(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.ChunkMax, s.api.BatchBytes = 2<<10, 3<<10 })
	for body, c := range map[string]struct{ code, param string }{
		`[]`: {"invalid_json", ""}, `{}`: {"missing_required_parameter", "input"}, `{"input":"x","store":false}`: {"unsupported_parameter", "store"},
		`{"input":"x","max_tool_calls":3}`: {"unsupported_parameter", "max_tool_calls"}, `{"input":"x","tools":[{"type":"web_search"}]}`: {"unsupported_parameter", "tools[0].type"},
		`{"input":"x","tools":[{"type":"function","name":"f","x":1}]}`: {"unsupported_parameter", "tools[0].x"}, `{"input":"x","tools":{}}`: {"invalid_value", "tools"},
		`{"input":[{"role":"user","content":[{"type":"input_image","image_url":"x"}]}]}`: {"unsupported_parameter", "input[0].content[0].type"},
		`{"input":[{"type":"item_reference","id":"x"}]}`:                                 {"unsupported_parameter", "input[0].type"}, `{"input":[{"role":"tool","content":"x"}]}`: {"invalid_value", "input[0].role"},
		`{"input":[{"role":"user","content":5}]}`: {"invalid_value", "input[0].content"}, `{"input":[{"role":5,"content":"x"}]}`: {"invalid_value", "input[0].role"}, `{"input":" "}`: {"invalid_value", "input"},
		`{"input":[]}`: {"missing_required_parameter", "input"}, `{"input":5}`: {"invalid_value", "input"}, `{"input":[{"type":"function_call","name":"f"}]}`: {"invalid_value", "input[0]"},
		`{"input":[{"type":"function_call_output","output":"x"}]}`: {"invalid_value", "input[0].call_id"}, `{"input":"x","model":5}`: {"invalid_value", "model"},
		`{"input":"x","truncation":"auto"}`: {"unsupported_parameter", "truncation"}, `{"input":"x","include":["y"]}`: {"unsupported_parameter", "include"}, `{"input":"x","text":{"verbosity":"low"}}`: {"unsupported_parameter", "text.verbosity"},
		`{"input":"x","text":{"format":{"type":"grammar"}}}`: {"unsupported_parameter", "text.format.type"}, `{"input":"x","reasoning":{"summary":"auto"}}`: {"unsupported_parameter", "reasoning.summary"},
		`{"input":"x","tool_choice":{"type":"mcp"}}`: {"unsupported_parameter", "tool_choice"}, `{"input":"x","stream":"yes"}`: {"invalid_value", "stream"}, `{"input":"x","conversation":5}`: {"invalid_value", "conversation"},
		`{"input":"x","conversation":"a/b"}`: {"invalid_session_id", "conversation"}, `{"input":"x","metadata":5}`: {"invalid_value", "metadata"}, `{"input":"x","instructions":5}`: {"invalid_value", "instructions"},
		`{"input":"x","conversation":"s","previous_response_id":"y"}`: {"invalid_value", "previous_response_id"}, `{"input":"x","top_logprobs":3}`: {"unsupported_parameter", "top_logprobs"}, `{"input":"x","stream_options":{"include_obfuscation":true}}`: {"unsupported_parameter", "stream_options"},
		`{"input":"x","previous_response_id":5}`: {"invalid_value", "previous_response_id"},
		"{\"input\":\"a\xffb\"}":                 {"invalid_json", ""}, `{"input":"a\ud800b"}`: {"invalid_json", ""}, `{"input":"x","input":"y"}`: {"invalid_json", ""}, `{"input":[{"role":"user","role":"user","content":"x"}]}`: {"invalid_json", ""},
		`{"input":"x","temperature":"x"}`: {"invalid_value", "temperature"}, `{"input":"x","top_p":[1]}`: {"invalid_value", "top_p"}, `{"input":"x","max_output_tokens":-5}`: {"invalid_value", "max_output_tokens"},
		`{"input":"x","text":5}`: {"invalid_value", "text"}, `{"input":"x","reasoning":5}`: {"invalid_value", "reasoning"}, `{"input":"x","tool_choice":7}`: {"invalid_value", "tool_choice"},
		`{"input":"x","tools":[{"type":"function"}]}`: {"invalid_value", "tools[0].name"}, `{"input":"x","parallel_tool_calls":"x"}`: {"invalid_value", "parallel_tool_calls"},
		`{"input":"x","user":5}`: {"invalid_value", "user"}, `{"input":"x","service_tier":1}`: {"invalid_value", "service_tier"}, `{"input":"x","model":""}`: {"invalid_value", "model"},
	} {
		p := n.do(request{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: body, bad: true}).refused(t, 400, c.code)
		if p.Member != c.param {
			t.Errorf("%s: %+v", body, p)
		}
	}
	if p := n.post("/openai/v1/responses", typeJSON, `{"input":"x","previous_response_id":"resp_x"}`).refused(t, 404, "response_not_found"); p.Member != "previous_response_id" {
		t.Errorf("%+v", p)
	}
	n.post("/openai/v1/responses", typeJSON, `{"input":"`+strings.Repeat("x", 2500)+`"}`).refused(t, 413, "content_too_large")
	n.post("/openai/v1/responses", typeJSON, `{"input":[{"role":"user","content":"`+strings.Repeat("x", 1500)+`"},{"role":"user","content":"`+strings.Repeat("x", 1500)+`"}]}`).refused(t, 413, "content_too_large")
	for _, path := range []string{"/openai/v1/responses", "/openai/v1/chat/completions"} {
		n.do(request{method: "POST", path: path, kind: typeText, body: "x", bad: true}).refused(t, 415, "unsupported_media_type")
		n.do(request{method: "POST", path: path, kind: typeJSON, body: strings.Repeat(" ", 9<<20), bad: true}).refused(t, 413, "body_too_large")
	}
	n.append("over", `{"type":"end"}`)
	n.post("/openai/v1/responses", typeJSON, `{"input":"x","conversation":"over"}`).refused(t, 409, "session_ended")
	if keys := n.do(request{method: "GET", path: "/v1/sessions/s"}); keys.status != 404 {
		t.Errorf("%d", keys.status)
	}
}

// A stream that cannot continue is broken off, so that an SDK's caller retries.
func TestResponse_streamBreaksOffAndFailuresAreSaid(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	id := fmt.Sprint(n.created(t, `{"background":true,"input":"`+secret+`","conversation":"s"}`)["id"])
	res, err := n.client.Do(n.new(request{method: "GET", path: "/openai/v1/responses/" + id + "?stream=true"}))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	n.append("s", `{"type":"end"}`)
	if body, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(body), "response.failed") {
		t.Errorf("%v %s", err, body)
	}
	id = fmt.Sprint(n.created(t, `{"background":true,"input":"`+secret+`","conversation":"t"}`)["id"])
	if res, err = n.client.Do(n.new(request{method: "GET", path: "/openai/v1/responses/" + id + "?stream=true"})); err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	n.api.Drain()
	n.hub.Drain(0)
	if _, err := io.ReadAll(res.Body); err == nil {
		t.Error("it ended cleanly")
	}
	n.get("/openai/v1/responses/"+id+"?stream=true").refused(t, 503, "draining")
	n.post("/openai/v1/responses", typeJSON, `{"input":"x","stream":true}`).refused(t, 503, "draining")
}

// A stream keeps its text while it lasts. The text counts among bodies, and a stream without room for it is broken off.
func TestResponse_textOfAStreamIsBounded(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.model = says(strings.Repeat(secret, 10_000)) })
	id := fmt.Sprint(n.created(t, `{"input":"`+secret+`"}`)["id"])
	stream := request{method: "GET", path: "/openai/v1/responses/" + id + "?stream=true"}
	if got := kinds(t, n.events(t, stream)); !strings.HasSuffix(got, "completed") {
		t.Errorf("%s", got)
	}
	eventually(t, "its memory is given back", func() bool { return n.api.limits.Bodies.Taken() == 0 })
	full := n.api.limits.Caller(n.new(request{path: "/"}))
	if err := n.api.limits.Bodies.Take(full, n.api.cfg.Limits.Bodies); err != nil {
		t.Fatal(err)
	}
	res, err := n.client.Do(n.new(stream))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); err == nil || strings.Contains(string(body), "completed") {
		t.Errorf("%v %d bytes", err, len(body))
	}
}

// Promise: byte for byte. Chat completions return the service's response, whatever it contains, and record its stream.
func TestCompletions_areTheServicesOwnToTheByte(t *testing.T) {
	t.Parallel()
	const events = ": hello\n\nid: 1\nevent: x\ndata: {\"choices\":[{\"delta\":{\"content\":\"🍞\"}}]}\n\ndata:{\"choices\":[]}\r\n\r\ndata: [DONE]\n\n"
	const notText = "data: a\n\ndata: \xff\n\ndata: [DONE]\n\n"
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		switch {
		case r.Header.Get("Authorization") != "Bearer ours":
			t.Errorf("%v", r.Header)
		case strings.Contains(string(body), "not text"):
			w.Header().Set("Content-Type", typeEvents)
			_, _ = io.WriteString(w, notText)
		case strings.Contains(string(body), "stream"):
			w.Header().Set("Content-Type", typeEvents)
			for i := range len(events) {
				_, _ = io.WriteString(w, events[i:i+1])
				_ = http.NewResponseController(w).Flush()
			}
		case strings.Contains(string(body), "fail"):
			w.Header().Set("Retry-After", "7")
			w.Header().Set("Content-Type", typeJSON)
			w.WriteHeader(http.StatusTooManyRequests)
			_, _ = io.WriteString(w, `{"error":{"message":"slow down","type":"t","param":null,"code":"c"}}`)
		default:
			w.Header().Set("Content-Type", typeJSON)
			_, _ = w.Write(body)
		}
	}))
	cfg := model.DefaultConfig()
	cfg.URL, cfg.Name, cfg.Key = service.URL+"/v1", "davinci", "ours"
	n := serve(t, func(s *setup) { s.model, s.api.Limits.Answers = model.NewOpenAI(cfg), 1 })
	post := func(body string) answer {
		return n.do(bearing(request{method: "POST", path: "/openai/v1/chat/completions", kind: typeJSON, body: body}, "theirs"))
	}
	if a := post(`{ "x" : 1.0 }`); a.status != 200 || string(a.body) != `{ "x" : 1.0 }` || a.header.Get("Gapless-Session") != "" {
		t.Errorf("%d %s %v", a.status, a.body, a.header)
	}
	if a := post(`{"x":"fail"}`); a.status != 429 || a.header.Get("Retry-After") != "7" || !strings.Contains(string(a.body), "slow down") {
		t.Errorf("%d %s %v", a.status, a.body, a.header)
	}
	a := post(`{"stream":true}`)
	if id := a.header.Get("Gapless-Session"); string(a.body) != "" || id == "" { // the checking transport does not read streams
		res, err := n.client.Do(n.new(request{method: "POST", path: "/openai/v1/chat/completions", kind: typeJSON, body: `{"stream":true}`}))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil || string(body) != events {
			t.Errorf("%v %q", err, body)
		}
		id = res.Header.Get("Gapless-Session")
		all := n.chunks(id)
		if len(all) != 4 || all[3].Type != "done" {
			t.Errorf("%+v", all)
		}
		// What cannot be recorded comes to the byte, too, and its message fails.
		if res, err = n.client.Do(n.new(request{method: "POST", path: "/openai/v1/chat/completions", kind: typeJSON, body: `{"not text":true}`})); err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err = io.ReadAll(res.Body)
		if all := n.chunks(res.Header.Get("Gapless-Session")); err != nil || string(body) != notText || len(all) != 2 || all[1].Type != "failed" {
			t.Errorf("%v %q %+v", err, body, all)
		}
	}
	service.Close()
	post(`{}`).refused(t, 502, "model_failed")
	busy, err := n.api.limits.Answers, error(nil)
	if err = busy.Take(n.api.limits.Caller(n.new(request{path: "/"})), 1); err != nil {
		t.Fatal(err)
	}
	post(`{}`).refused(t, 429, "model_busy")
	n.api.Drain()
	post(`{}`).refused(t, 503, "draining")
	serve(t, nil).post("/openai/v1/chat/completions", typeJSON, `{}`).refused(t, 400, "unsupported_parameter")
}

// broken is a model whose service fails for an unknown reason.
type broken struct{ model.Model }

func (broken) Pass(context.Context, []byte) (*http.Response, error) {
	return nil, errors.New("a fault")
}

// A fault, and a Redis that is away, are reported in the form that OpenAI's clients read.
func TestResponse_errorsHaveOpenAIsForm(t *testing.T) {
	t.Parallel()
	var f *faulty
	n := serve(t, func(s *setup) { s.errors = true; s.logs = func(l Logs) Logs { f = &faulty{Logs: l}; return f } })
	f.fail(errors.New("a fault"))
	a := n.get(oneResponse)
	a.refused(t, 500, "internal")
	if want := `{"error":{"message":"unexpected error: the server's log has the details","type":"server_error","param":null,"code":"internal"}}`; string(a.body) != want || a.header.Get("Content-Type") != typeJSON {
		t.Errorf("%s %v", a.body, a.header)
	}
	faulty := serve(t, func(s *setup) { s.errors, s.model = true, broken{s.model} })
	faulty.post("/openai/v1/chat/completions", typeJSON, `{}`).refused(t, 500, "internal")
	f.fail(fmt.Errorf("read: %w", store.ErrAway))
	if a := n.get(oneResponse); a.status != 503 || a.header.Get("Retry-After") == "" {
		t.Errorf("%d %v", a.status, a.header)
	}
}

// A caller that may ask, but not read, learns nothing about the response that it names: not whether it exists, nor whether it is over.
func TestResponse_aPreviousOneIsLookedAtOnlyByWhoMayRead(t *testing.T) {
	t.Parallel()
	n, issuer := locked(t, nil)
	may := authtest.May{"ask": {"s"}, "read": {"s"}}
	first := n.do(bearing(request{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: `{"input":"x","conversation":"s"}`}, issuer.Token(time.Hour, may)))
	id := into[struct{ ID string }](t, first, 200).ID
	absent := openai.ID("s", uuid.NewString(), 1)
	for _, previous := range []string{id, absent, "resp_x"} {
		q := request{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: `{"input":"x","previous_response_id":"` + previous + `"}`}
		n.do(bearing(q, issuer.Token(time.Hour, authtest.May{"ask": {"s"}}))).refused(t, 403, "forbidden")
	}
}

// Whatever id or session is named, a token for one session reaches no other.
func FuzzOpenAIAccess(f *testing.F) {
	const uid = "01990b6c7d1e7c3a8a515d0f6e2b9a10"
	f.Add("resp_"+uid+"_1_theirs", "theirs", byte(0))
	f.Add("resp_"+uid+"_1_mine_1_theirs", "mine/../theirs", byte(1))
	f.Add("resp_"+uid+"_2_mine", "MINE", byte(2))
	f.Add("..%2f..", "mine\x00", byte(3))
	f.Add("", "", byte(5))
	var logs *reached
	n, issuer := locked(f, func(s *setup, _ *auth.Config) {
		s.logs = func(l Logs) Logs { logs = &reached{Logs: l}; return logs }
		s.api.Limits = limit.Config{Logger: s.api.Logger}
	})
	all := issuer.Token(time.Hour, authtest.May{"read": {"mine"}, "ask": {"mine"}, "write": {"mine"}, "cancel": {"mine"}, "admin": {"mine"}})
	f.Fuzz(func(t *testing.T, id, session string, which byte) {
		path := "/openai/v1/responses/" + url.PathEscape(id)
		conversation, _ := json.Marshal(session)
		previous, _ := json.Marshal(id)
		q := []request{
			{method: "GET", path: path}, {method: "GET", path: path + "?stream=true"}, {method: "POST", path: path + "/cancel"}, {method: "DELETE", path: path}, {method: "GET", path: path + "/input_items"},
			{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: `{"input":"x","background":true,"conversation":` + string(conversation) + `}`},
			{method: "POST", path: "/openai/v1/responses", kind: typeJSON, body: `{"input":"x","background":true,"previous_response_id":` + string(previous) + `}`},
			{method: "GET", path: "/v1/sessions/mine/ui-stream/" + url.PathEscape(session) + "/stream"},
			{method: "GET", path: "/v1/sessions/" + url.PathEscape(session) + "/ui-stream/m/stream"},
			{method: "POST", path: "/openai/v1/chat/completions", kind: typeJSON, body: `{"messages":[]}`},
		}[which%10]
		r, err := http.NewRequest(q.method, "http://127.0.0.1"+q.path, strings.NewReader(q.body))
		if err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // a stream would continue
		defer cancel()
		r = r.WithContext(ctx)
		r.Header.Set("Authorization", "Bearer "+all)
		r.Header.Set("Content-Type", q.kind)
		w := httptest.NewRecorder()
		func() {
			defer func() { // breaking off a stream panics
				if why := recover(); why != nil && why != http.ErrAbortHandler {
					panic(why)
				}
			}()
			n.api.ServeHTTP(w, r)
		}()
		if other := logs.other("mine"); other != "" {
			t.Errorf("%s %s %s reached session %q: %d", q.method, q.path, q.body, other, w.Code)
		}
	})
}

// reached records the sessions for which the store was called.
type reached struct {
	Logs
	mu  sync.Mutex
	all map[string]bool
}

func (l *reached) see(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[string]bool{}
	}
	l.all[id] = true
}

// other returns a session other than id for which the store was called, or "".
func (l *reached) other(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for other := range l.all {
		if other != id {
			return other
		}
	}
	return ""
}

func (l *reached) Append(ctx context.Context, id string, b store.Batch) (store.Appended, error) {
	l.see(id)
	return l.Logs.Append(ctx, id, b)
}

func (l *reached) Cancel(ctx context.Context, id, m string) (store.Cancelled, error) {
	l.see(id)
	return l.Logs.Cancel(ctx, id, m)
}

func (l *reached) Open(ctx context.Context, id string) (store.Bounds, []string, error) {
	l.see(id)
	return l.Logs.Open(ctx, id)
}

func (l *reached) Read(ctx context.Context, id string, from int64, bytes, count int) (store.Page, error) {
	l.see(id)
	return l.Logs.Read(ctx, id, from, bytes, count)
}

func (l *reached) Delete(ctx context.Context, id string) error {
	l.see(id)
	return l.Logs.Delete(ctx, id)
}
