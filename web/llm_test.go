package web_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	tmaxmax "github.com/tmaxmax/go-sse"

	"gapless/store/storetest"
)

// curl pipes the streams of AI services into a session as text/event-stream. They are read with
// format=raw: by curl, by the services' own clients, and over connections that break. The readers
// must get what they would have got from the service.

// recorded is a stream in the form that an AI service documents, with a text of ours
// (testdata/llm).
type recorded struct {
	name   string // begins with the service's name
	stream string
	events []event // by the reference, parse
}

func recordings(t *testing.T) (all []recorded) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "llm", "*.sse"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%d streams, %v", len(files), err)
	}
	for _, file := range files {
		stream, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, recorded{strings.TrimSuffix(filepath.Base(file), ".sse"), string(stream), parse(string(stream))})
	}
	return all
}

var lineEnds = strings.NewReplacer("\r\n", "\n", "\r", "\n")

// parse is the reference: it applies the standard to a complete stream. It shares nothing with the
// server's parser. An event has the id of its own block.
func parse(stream string) (events []event) {
	lines := strings.Split(lineEnds.Replace(strings.TrimPrefix(stream, "\uFEFF")), "\n")
	var e event
	var data []string
	for _, line := range lines[:len(lines)-1] { // a line without an end is no line
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "":
			if e.data = strings.Join(data, "\n"); data != nil {
				events = append(events, e)
			}
			e, data = event{}, nil
		case field == "event":
			e.name = value
		case field == "data":
			data = append(data, value)
		case field == "id":
			e.id = value
		}
	}
	return events
}

// unnumbered returns events without their ids.
func unnumbered(events []event) []event {
	bare := slices.Clone(events)
	for i := range bare {
		bare[i].id = ""
	}
	return bare
}

// The recordings contain what they are for, whatever an editor or Git did to them. The reference
// agrees with a third-party parser.
func TestRecordings_haveWhatIsHardInThem(t *testing.T) {
	t.Parallel()
	all := map[string]string{}
	for _, rec := range recordings(t) {
		all[rec.name] = rec.stream
		var theirs []event
		for e, err := range tmaxmax.Read(strings.NewReader(rec.stream), nil) {
			if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) { // if the last line has no end
				t.Errorf("%s: %v", rec.name, err)
			}
			if e.Data != "" {
				theirs = append(theirs, event{name: e.Type, data: e.Data})
			}
		}
		if ours := unnumbered(rec.events); !slices.Equal(ours, theirs) {
			t.Errorf("%s: the reference reads\n%q\nand not\n%q", rec.name, ours, theirs)
		}
	}
	for name, parts := range map[string][]string{
		"openai-text":  {"\n\n: ", `"delta":{"role":"assistant","content":""`, `" the"`, `緑茶`, `🍵`, `\u00fc`, `\ud83e\uded6`, `\"`, `\\`, `\/`, `\r\n`, `"choices":[],"usage":{`, "\n\ndata: [DONE]\n\n"},
		"openai-tools": {"\r\n\r\ndata: ", `"tool_calls":[{"index":1,`, `\\u83ca`, `\\\"`, `für`},
		"openai-accent": {
			"\uFEFFdata:{", "\ndata:{", "\ndata:  {", "} \n\n", "\nid: ", "\nretry: ", "\nevent:chunk\n", "\ndata\n", "\ndata:\n", "\ndata:\t{",
			"\n: a comment in the middle of an event\n", "\u2028", "\u0085", "\n\n\n\n", "\n: bye",
		},
		"openai-error":    {`data: {"error":{`},
		"anthropic-text":  {"event: message_start\n", "event: content_block_start\n", "event: ping\n", `"text_delta"`, "event: content_block_stop\n", "event: message_delta\n", "event: message_stop\n", "\n: ", `🫖`},
		"anthropic-tools": {"\r\n\r\nevent: ", `"thinking_delta"`, `"signature_delta"`, `"text_delta"`, `"input_json_delta","partial_json":""`, `\\\"`},
		"anthropic-error": {"event: error\n"},
	} {
		for _, part := range parts {
			if !strings.Contains(all[name], part) {
				t.Errorf("%s has no %q", name, part)
			}
		}
		if crlf := strings.HasSuffix(name, "-tools"); crlf != strings.Contains(all[name], "\r") || crlf && strings.Count(all[name], "\r\n") != strings.Count(all[name], "\n") {
			t.Errorf("%s has the wrong line ends", name)
		}
	}
}

// pace is called after each piece that a service sends, with all that it has sent. It returns when
// the next piece may be sent; false: never.
type pace func(ctx context.Context, sent string) bool

func slowly(ctx context.Context, _ string) bool {
	select {
	case <-time.After(time.Millisecond): // so that pieces mostly travel alone
		return true
	case <-ctx.Done():
		return false
	}
}

// service is an AI service. It responds to a POST with a stream, in pieces that end anywhere. A
// client that breaks off cannot get the rest.
func service(t *testing.T, stream string, pace pace) (url string) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("the service's seed is %d", seed)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); r.Method != http.MethodPost || !bytes.Contains(body, []byte(`"stream":true`)) {
			http.Error(w, "POST what you want to have streamed", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		random := rand.New(rand.NewPCG(seed, 0))
		for rest := stream; rest != ""; {
			n := min(1+random.IntN(60), len(rest))
			_, err := io.WriteString(w, rest[:n])
			if err = errors.Join(err, http.NewResponseController(w).Flush()); err != nil {
				return
			}
			if rest = rest[n:]; !pace(r.Context(), strings.TrimSuffix(stream, rest)) {
				panic(http.ErrAbortHandler)
			}
		}
	}))
	t.Cleanup(server.Close) // when its readers have gone
	return server.URL
}

// inStep is a pace: nothing more is sent until everything sent is shown at the other end.
type inStep struct {
	t     *testing.T
	shows func(events []event) int // returns how many of them are shown
	shown chan struct{}
	seen  int
}

func newInStep(t *testing.T, shows func(events []event) int) *inStep {
	return &inStep{t: t, shows: shows, shown: make(chan struct{}, 1<<10)}
}

func (s *inStep) pace(ctx context.Context, sent string) bool {
	for want := s.shows(parse(sent)); s.seen < want; s.seen++ {
		select {
		case <-s.shown:
			storetest.Moved(s.t)
		case <-ctx.Done():
			return false
		case <-time.After(patience):
			s.t.Errorf("waited %v in vain until number %d of what was uploaded is shown", patience, s.seen+1)
			return false
		}
	}
	return slowly(ctx, sent)
}

// upload begins what a user of the README types:
//
//	curl -sN $LLM/chat/completions -H 'Content-Type: application/json' -d '{"stream":true,…}' |
//	  curl -X POST -T - -H 'Content-Type: text/event-stream' "$S/chunks?message_id=m3"
//
// It returns a function that waits until everything is acknowledged: the events, and the done that
// ends their message.
func upload(t *testing.T, service, session string, events int) (acknowledged func()) {
	t.Helper()
	ctx, cancel := storetest.Watch(t.Context(), t)
	get := exec.CommandContext(ctx, "curl", "-sN", service+"/chat/completions", "-H", "Content-Type: application/json", "-d", `{"stream":true}`)
	post := exec.CommandContext(ctx, "curl", "-sS", "-X", "POST", "-T", "-", "-H", "Content-Type: text/event-stream", session+"/chunks?message_id=m3")
	var out, stderr bytes.Buffer
	post.Stdout, post.Stderr = &out, &stderr
	pipe, err := get.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	post.Stdin = pipe
	var started []*exec.Cmd
	t.Cleanup(func() {
		cancel()
		for _, cmd := range started {
			_ = cmd.Wait()
		}
	})
	for _, cmd := range []*exec.Cmd{get, post} {
		if err := cmd.Start(); err != nil {
			t.Fatalf("start curl, which make test installs: %v", err)
		}
		started = append(started, cmd)
	}
	_ = pipe.Close() // curl has it now
	return func() {
		t.Helper()
		started = nil
		if err := errors.Join(get.Wait(), post.Wait()); err != nil {
			t.Errorf("curl | curl: %v\n%s%s", err, &out, &stderr)
		}
		var answer struct{ Count int }
		if err := json.Unmarshal(out.Bytes(), &answer); err != nil || answer.Count != events+1 {
			t.Errorf("of %d events and a done, the upload's answer says %s", events, &out)
		}
	}
}

// raw returns the URL of a session's raw stream, up to the end of the answer.
const raw = "/stream?format=raw&until=done"

// show acts as a user who watches a stream with curl, until it ends. It passes each complete event
// to shown.
func show(ctx context.Context, url string, shown chan<- struct{}) (string, error) {
	cmd := curl(ctx, url, "--fail")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return "", err
	}
	var all []byte
	for told, buf := 0, make([]byte, 4<<10); ; {
		n, err := out.Read(buf)
		if all = append(all, buf[:n]...); len(bytes.Trim(buf[:n], ":\n")) > 0 { // more than heartbeats
			storetest.MovedIn(ctx)
		}
		for events := len(parse(string(all))); told < events; told++ {
			shown <- struct{}{}
		}
		if err != nil {
			return string(all), cmd.Wait()
		}
	}
}

// isRaw checks that a response contains only events, each with an id, and nothing else that a
// client would have to understand.
func isRaw(t *testing.T, response string, want []event) {
	t.Helper()
	got := parse(response)
	sameEvents(t, got, want)
	lines := map[string]int{}
	for line := range strings.SplitSeq(response, "\n") {
		field, value, _ := strings.Cut(line, ":")
		if field == "" && value != "" {
			t.Errorf("there is a comment with a text: %q", line)
		}
		lines[field]++
	}
	named, data := 0, 0
	for _, e := range want {
		if e.name != "" {
			named++
		}
		data += 1 + strings.Count(e.data, "\n")
	}
	if lines["event"] != named || lines["data"] != data || lines["id"] != len(want) || lines["retry"] > 1 {
		t.Errorf("there should be %d lines of event, %d of data and %d of id, and they are %v:\n%s", named, data, len(want), lines, response)
	}
	delete(lines, "")
	for _, field := range []string{"event", "data", "id", "retry"} {
		delete(lines, field)
	}
	if len(lines) > 0 {
		t.Errorf("there are lines of other fields: %v", lines)
	}
}

// sameEvents checks names and data, byte by byte, and that the ids are rising numbers.
func sameEvents(t *testing.T, got, want []event) {
	t.Helper()
	last := int64(0)
	for i, e := range got {
		if i >= len(want) {
			break
		}
		if e.name != want[i].name || e.data != want[i].data {
			t.Errorf("event %d is\n%q %q, not\n%q %q", i, e.name, e.data, want[i].name, want[i].data)
		}
		id, err := strconv.ParseInt(e.id, 10, 64)
		if err != nil || id <= last {
			t.Errorf("event %d has id %q, behind %d", i, e.id, last)
		}
		last = id
	}
	if len(got) != len(want) {
		t.Errorf("there are %d events, not %d", len(got), len(want))
	}
}

// Others append to the session all the time, next to the answer. A raw stream contains nothing of
// that, and nothing else of our wire format.
func TestRaw_isWhatTheServiceStreamedWhileItIsUploadedAndAfterwards(t *testing.T) {
	t.Parallel()
	n := start(t, "-heartbeat", "50ms")
	for _, rec := range recordings(t) {
		t.Run(rec.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := storetest.Watch(t.Context(), t)
			defer cancel()
			path := "/v1/sessions/" + rec.name
			other := func() {
				n.post(t, path+"/chunks", []chunk{{Type: "message", Role: "user", Content: "Tea?"}, {Type: "note", MessageID: "other", Content: "data: x\n\n"}})
			}
			step := newInStep(t, func(events []event) int { return len(events) })
			noted := 0
			from := service(t, rec.stream, func(ctx context.Context, sent string) bool {
				if events := len(parse(sent)); events >= noted+4 {
					noted = events
					other()
				}
				return step.pace(ctx, sent)
			})

			other()
			var live string
			var err error
			done := make(chan struct{})
			go func() { // ends with ctx; waited for below
				defer close(done)
				live, err = show(ctx, n.url(path+raw), step.shown)
			}()
			defer func() {
				cancel()
				<-done
			}()
			upload(t, from, n.url(path), len(rec.events))()
			<-done
			if err != nil {
				t.Errorf("curl: %v", err)
			}
			isRaw(t, live, rec.events)

			other()
			after, err := show(ctx, n.url(path+raw), make(chan struct{}, 1<<10))
			if err != nil {
				t.Errorf("curl: %v", err)
			}
			isRaw(t, after, rec.events)
			if a, b := parse(live), parse(after); !slices.Equal(a, b) {
				t.Errorf("afterwards it has other ids: %q, and live %q", b, a)
			}
			if log := n.history(t, rec.name); len(log) < len(rec.events)+5 {
				t.Errorf("the log has only %d chunks: this proves less than it should", len(log))
			}
		})
	}
}

// reading is what a service's own client makes of a stream: the objects that it returns, then their
// accumulated result, and how it ended.
type reading struct {
	rows [][2]string
	over string
}

// read returns what the client should make of these events, as the service documents them.
func (rec recorded) read(t *testing.T, events []event) reading {
	t.Helper()
	var r reading
	var names []string
	texts := map[string]string{}
	add := func(name, text string) {
		if _, ok := texts[name]; !ok {
			names = append(names, name)
		}
		texts[name] += text
	}
	r.over = "complete"
	for _, e := range events {
		if e.data == "[DONE]" {
			break
		}
		if e.name == "ping" {
			continue
		}
		var o struct {
			Error   struct{ Type string }
			Choices []struct {
				Delta struct {
					Content   string
					ToolCalls []struct {
						Index    int
						Function struct{ Name, Arguments string }
					} `json:"tool_calls"`
				}
			}
			Type         string
			Index        int
			ContentBlock struct{ Type, Name string } `json:"content_block"`
			Delta        struct {
				Type, Text, Thinking string
				PartialJSON          string `json:"partial_json"`
			}
		}
		if err := json.Unmarshal([]byte(e.data), &o); err != nil {
			t.Fatalf("%s: %q: %v", rec.name, e.data, err)
		}
		if o.Error.Type != "" {
			r.over = o.Error.Type
			break
		}
		r.rows = append(r.rows, [2]string{"object", e.data})
		for _, c := range o.Choices {
			if c.Delta.Content != "" {
				add("content", c.Delta.Content)
			}
			for _, call := range c.Delta.ToolCalls {
				if call.Function.Name != "" {
					add(fmt.Sprint("tool ", call.Index), call.Function.Name)
				}
				add(fmt.Sprint("arguments ", call.Index), call.Function.Arguments)
			}
		}
		if o.ContentBlock.Type == "tool_use" {
			add(fmt.Sprint("tool ", o.Index), o.ContentBlock.Name)
		}
		switch o.Delta.Type {
		case "text_delta":
			add("content", o.Delta.Text)
		case "thinking_delta":
			add("thinking", o.Delta.Thinking)
		case "input_json_delta":
			add(fmt.Sprint("arguments ", o.Index), o.Delta.PartialJSON)
		}
	}
	for _, name := range names {
		r.rows = append(r.rows, [2]string{name, texts[name]})
	}
	return r
}

// objects returns how many of the rows are objects.
func (r reading) objects() int {
	n := 0
	for _, row := range r.rows {
		if row[0] == "object" {
			n++
		}
	}
	return n
}

// is checks a reading: objects by value, everything else byte by byte.
func (r reading) is(t *testing.T, what string, want reading) {
	t.Helper()
	if r.over != want.over {
		t.Errorf("%s: it ended by %q, not %q", what, r.over, want.over)
	}
	if len(r.rows) != len(want.rows) {
		t.Errorf("%s: there are %d rows, not %d:\n%q", what, len(r.rows), len(want.rows), r.rows)
		return
	}
	for i, got := range r.rows {
		want := want.rows[i]
		same := got == want
		if got[0] == "object" && want[0] == "object" {
			var a, b any
			err := errors.Join(json.Unmarshal([]byte(got[1]), &a), json.Unmarshal([]byte(want[1]), &b))
			same = err == nil && reflect.DeepEqual(a, b)
		}
		if !same {
			t.Errorf("%s: row %d is\n%q, not\n%q", what, i, got, want)
		}
	}
}

// reader runs the client of the recording's service with a URL, which it uses as how says
// (testdata/clients/llm.mjs). It passes each object to shown.
func (rec recorded) reader(scripts func(script string, args ...string) runner, how string) func(ctx context.Context, url string, shown chan<- struct{}) (reading, error) {
	name, _, _ := strings.Cut(rec.name, "-")
	run := scripts(name+".mjs", how)
	return func(ctx context.Context, url string, shown chan<- struct{}) (r reading, err error) {
		r.over, err = run(ctx, url, func(kind, text string) {
			r.rows = append(r.rows, [2]string{kind, text})
			if kind == "object" {
				shown <- struct{}{}
			}
		})
		return r, err
	}
}

// The services' official clients get the same from a raw stream as from the service itself.
func TestRaw_isReadByTheServicesOwnClientsLikeTheService(t *testing.T) {
	t.Parallel()
	scripts := install(t)
	n := start(t, "-heartbeat", "50ms")
	for _, rec := range recordings(t) {
		t.Run(rec.name, func(t *testing.T) { // one at a time: Node slows down what runs next to it
			ctx, cancel := storetest.Watch(t.Context(), t)
			defer cancel()
			want := rec.read(t, rec.events)
			if text := want.rows[len(want.rows)-1]; text[0] == "object" || text[1] == "" {
				t.Fatalf("there is no text in it: %q", want.rows)
			}
			path := "/v1/sessions/" + rec.name
			n.post(t, path+"/chunks", chunk{Type: "message", Role: "user", Content: "Tea?"})
			never := make(chan struct{}, 1<<10)

			direct, err := rec.reader(scripts, "service")(ctx, service(t, rec.stream, slowly), never)
			if err != nil {
				t.Error(err)
			}
			direct.is(t, "from the service", want)

			step := newInStep(t, func(events []event) int { return rec.read(t, events).objects() })
			var live reading
			done := make(chan struct{})
			go func() { // ends with ctx; waited for below
				defer close(done)
				live, err = rec.reader(scripts, "stream")(ctx, n.url(path+raw), step.shown)
			}()
			defer func() {
				cancel()
				<-done
			}()
			upload(t, service(t, rec.stream, step.pace), n.url(path), len(rec.events))()
			<-done
			if err != nil {
				t.Error(err)
			}
			live.is(t, "live", want)

			after, err := rec.reader(scripts, "stream")(ctx, n.url(path+raw), never)
			if err != nil {
				t.Error(err)
			}
			after.is(t, "afterwards", want)
		})
	}
}

// follow is the usual loop around a raw stream. Whole events count, and the rest is requested,
// until a response ends cleanly.
func follow(ctx context.Context, url string) (events []event, err error) {
	client := httpClient()
	defer client.CloseIdleConnections()
	for cursor := ""; ; {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return events, err
		}
		if cursor != "" {
			r.Header.Set("Last-Event-ID", cursor)
		}
		var body []byte
		response, err := client.Do(r)
		if err == nil {
			body, err = io.ReadAll(response.Body)
			_ = response.Body.Close()
			if response.StatusCode != http.StatusOK {
				return events, fmt.Errorf("%s behind %q: %s", response.Status, cursor, body)
			}
		}
		for _, e := range parse(string(body)) {
			events = append(events, e)
			cursor = e.id
		}
		if err == nil || ctx.Err() != nil {
			return events, err
		}
	}
}

// within cuts at one of the first bytes.
func within(r *rand.Rand, most int) cut {
	at := r.IntN(most)
	return func(body []byte) int {
		if len(body) < at {
			return -1
		}
		return at
	}
}

// Unlike a service's own stream, ours continues at any node, after a cut at any byte.
func TestRaw_goesOnWhereItWasCutAtAnyByteWhichTheServiceCannot(t *testing.T) {
	t.Parallel()
	scripts := install(t)
	redis := storetest.Redis(t)
	args := []string{"-redis", redis.URL(), "-heartbeat", "50ms"}
	a, b := start(t, args...), start(t, args...)
	for _, rec := range recordings(t) {
		t.Run(rec.name, func(t *testing.T) {
			ctx, cancel := storetest.Watch(t.Context(), t)
			defer cancel()
			seed := rand.Uint64()
			t.Logf("the cuts' seed is %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			path := "/v1/sessions/" + rec.name
			// through returns a way to the nodes, in turn, with the first connections cut.
			through := func(cuts ...cut) *proxy {
				line := newProxy(t, a, b)
				line.mu.Lock()
				defer line.mu.Unlock()
				line.cuts = cuts
				line.route = func(streams int) int { return streams % 2 }
				return line
			}
			// hard returns cuts at the places that are easy to get wrong, and then anywhere.
			hard := func() []cut {
				cuts := []cut{where(`\n()data: `), where(`data: ()`), where(`\nid: ()`), where(`\nid: \d+\n()\n`), where(`\nid: \d+\n\n()`)}
				for range 100 {
					cuts = append(cuts, within(random, max(500, len(rec.stream)/5)))
				}
				return cuts
			}
			check := func(what string, line *proxy, got []event, err error, least int) {
				t.Helper()
				cuts, torn := 0, 0
				for i, s := range line.seen() {
					if s.cut {
						cuts++
					}
					if s.torn() {
						torn++
					}
					if s.node != i%2 {
						t.Errorf("%s: request %d came to node %d", what, i, s.node)
					}
				}
				t.Logf("%s: %d cuts, %d in the middle of an event", what, cuts, torn)
				if cuts < least || least > 1 && torn == 0 {
					t.Errorf("%s: this proves less than it should", what)
				}
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
				sameEvents(t, got, rec.events)
			}

			line := through(hard()...)
			var live []event
			var err error
			done := make(chan struct{})
			go func() { // ends with ctx; waited for below
				defer close(done)
				live, err = follow(ctx, line.url(path+raw))
			}()
			defer func() {
				cancel()
				<-done
			}()
			upload(t, service(t, rec.stream, slowly), a.url(path), len(rec.events))()
			<-done
			if check("live", line, live, err, 6); len(live) != len(rec.events) {
				return
			}

			for range 5 {
				line = through(hard()...)
				after, err := follow(ctx, line.url(path+raw))
				check("afterwards", line, after, err, 6)
			}

			line = through(where(regexp.QuoteMeta("id: "+live[len(live)-1].id+"\n\n") + `()`))
			last, err := follow(ctx, line.url(path+raw))
			check("behind the last event", line, last, err, 1)

			// This is the service's own client, with a fetch that resumes.
			want := rec.read(t, rec.events)
			line = through(hard()...)
			resumed, err := rec.reader(scripts, "resumed")(ctx, line.url(path+raw), make(chan struct{}, 1<<10))
			check("the service's client", line, live, err, 6)
			resumed.is(t, "the service's client", want)

			// This is the control: without resuming, it gets a part at best, and fails.
			line = through(where(regexp.QuoteMeta("id: "+live[1].id+"\n\n") + `(?s:.)()`))
			part, err := rec.reader(scripts, "stream")(ctx, line.url(path+raw), make(chan struct{}, 1<<10))
			if err != nil {
				t.Error(err)
			}
			if part.over != "terminated" && part.over != "Connection error." || part.objects() >= want.objects() {
				t.Errorf("cut, and not resumed, its client ended by %q, with %d objects of %d", part.over, part.objects(), want.objects())
			}
		})
	}
}
