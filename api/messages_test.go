package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"gapless/api/model"
	"gapless/store"
	"gapless/store/storetest"
)

type asked struct {
	MessageID string `json:"message_id"`
	ReplyID   string `json:"reply_message_id"`
}

func (n *node) ask(session, content string) asked {
	n.t.Helper()
	return into[asked](n.t, n.post("/v1/sessions/"+session+"/messages", typeJSON, fmt.Sprintf(`{"content":%q}`, content)), 202)
}

// talk reads a message's chunks from a stream, up to the one that ends it.
func (s *stream) talk(after int64) (all []chunk) {
	s.t.Helper()
	for {
		e := s.next()
		if e.name != "" || e.id != after+1 || e.Seq != e.id {
			s.t.Fatalf("%+v instead of chunk %d", e, after+1)
		}
		all = append(all, e.chunk)
		after = e.id
		if e.Type != "delta" && e.Type != "message" {
			return all
		}
	}
}

func TestMessages_questionThenAnswerWordByWordThenDone(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.model = model.Demo{Pace: 500 * time.Microsecond} })
	v := n.watch("s", "")
	v.welcome()
	const question = "Open \"sesame\"\n\U0001f35e \u2028 </script>"
	a := n.ask("s", question)
	for _, id := range []string{a.MessageID, a.ReplyID} {
		if u, err := uuid.Parse(id); err != nil || u.Version() != 7 {
			t.Errorf("id %q", id)
		}
	}
	if a.MessageID == a.ReplyID {
		t.Error("question and answer have one id")
	}
	all := v.talk(0)
	if want := (chunk{1, "message", a.MessageID, "user", question, ""}); all[0] != want {
		t.Errorf("%+v, not %+v", all[0], want)
	}
	var text, want strings.Builder
	for piece, err := range (model.Demo{Pace: time.Microsecond}).Answer(t.Context(), []model.Turn{{Role: "user", Content: question}}) {
		if err != nil {
			t.Fatal(err)
		}
		want.WriteString(piece.Text)
	}
	deltas := all[1 : len(all)-1]
	for _, c := range deltas {
		if c.Type != "delta" || c.Message != a.ReplyID || c.Role != "assistant" || c.Content == "" {
			t.Errorf("%+v", c)
		}
		text.WriteString(c.Content)
	}
	if text.String() != want.String() || len(deltas) < 50 {
		t.Errorf("%d deltas say %q, the model %q", len(deltas), text.String(), want.String())
	}
	if last := all[len(all)-1]; last.Type != "done" || last.Message != a.ReplyID || last.Role != "assistant" {
		t.Errorf("%+v", last)
	}
	// The answer has ended, so nobody can add to it. The session continues.
	n.post("/v1/sessions/s/chunks", typeJSON, `{"message_id":"`+a.ReplyID+`"}`).refused(t, 409, "message_ended")
	n.ask("s", secret)
}

// paced is a model that says one piece per step, and reports how it ended.
type paced struct {
	steps chan string
	ended chan string // over: its context ended; said: steps was closed
	err   error       // follows the last step
}

func newPaced() *paced { return &paced{steps: make(chan string), ended: make(chan string, 10_000)} }

func (p *paced) Answer(ctx context.Context, _ []model.Turn) iter.Seq2[model.Piece, error] {
	return func(yield func(model.Piece, error) bool) {
		for {
			select {
			case piece, ok := <-p.steps:
				if !ok {
					if p.err != nil {
						yield(model.Piece{}, p.err)
					}
					p.ended <- "said"
					return
				}
				if !yield(model.Piece{Text: piece}, nil) {
					p.ended <- "over"
					return
				}
			case <-ctx.Done():
				yield(model.Piece{}, ctx.Err())
				p.ended <- "over"
				return
			}
		}
	}
}

func (p *paced) say(t *testing.T, piece string) {
	t.Helper()
	select {
	case p.steps <- piece:
	case <-time.After(patience):
		t.Fatal("the model is not asked for more")
	}
}

func TestMessages_answerStopsWhenNobodyWantsTheRest(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		stop func(n *node, a asked)
		word bool // it stops at its next word, or else at once, while it is silent
	}{
		"the session ends":       {func(n *node, _ asked) { n.append("s", `{"type":"end"}`) }, false},
		"the session is deleted": {func(n *node, _ asked) { n.do(request{method: "DELETE", path: "/v1/sessions/s"}) }, false},
		"deleted and begun anew": {func(n *node, _ asked) {
			n.do(request{method: "DELETE", path: "/v1/sessions/s"})
			n.append("s", `{"data":0}`)
		}, false},
		"all are cancelled": {func(n *node, _ asked) { n.post("/v1/sessions/s/cancel", "", "") }, false},
		"the message is cancelled": {func(n *node, a asked) {
			n.post("/v1/sessions/s/cancel", typeJSON, `{"message_id":"`+a.ReplyID+`"}`)
		}, false},
		"another ends the message": {func(n *node, a asked) { n.append("s", `{"type":"cancelled","message_id":"`+a.ReplyID+`"}`) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newPaced()
			n := serve(t, func(s *setup) { s.model = m })
			a := n.ask("s", secret)
			m.say(t, "sesame 1")
			eventually(t, "a delta", func() bool { return n.page("s", "").Last == 2 })
			c.stop(n, a)
			last := func() int64 {
				if r := n.get("/v1/sessions/s/chunks"); r.status == 200 {
					return into[pageJSON](t, r, 200).Last
				}
				return 0
			}
			before := last()
			if c.word {
				select {
				case m.steps <- "sesame 2":
				case how := <-m.ended: // on a slow machine it has ended before that
					m.ended <- how
				}
			}
			if how := within(t, "the model's end", m.ended); how != "over" {
				t.Errorf("the model ended: %s", how)
			}
			eventually(t, "the end in the log", func() bool { return strings.Contains(n.log.String(), "answer ends") })
			if after := last(); after != before {
				t.Errorf("last was %d and is %d", before, after)
			}
		})
	}
}

func TestMessages_answerUnderWayEndsAsFailedWhenTheNodeStops(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	v := n.watch("s", "")
	v.welcome()
	a := n.ask("s", secret)
	m.say(t, "sesame 1")
	v.take(0, 2)
	n.api.Drain() // an answer under way may finish
	m.say(t, "sesame 2")
	v.take(2, 1)
	n.api.End()
	if how := within(t, "the model's end", m.ended); how != "over" {
		t.Errorf("the model ended: %s", how)
	}
	all := v.talk(3)
	if last := all[0]; last.Type != "failed" || last.Reason != "shutdown" || last.Message != a.ReplyID || last.Role != "assistant" {
		t.Errorf("%+v", last)
	}
	n.api.Wait(t.Context())
	n.post("/v1/sessions/s/messages", typeJSON, `{"content":"sesame"}`).refused(t, 503, "draining")
}

func TestMessages_modelThatFailsEndsItsMessage(t *testing.T) {
	t.Parallel()
	m := newPaced()
	m.err = errors.New("out of words")
	n := serve(t, func(s *setup) { s.model, s.errors = m, true })
	v := n.watch("s", "?until=done")
	v.welcome()
	a := n.ask("s", secret)
	m.say(t, "sesame 1")
	close(m.steps)
	all := v.talk(0)
	if last := all[len(all)-1]; last.Type != "failed" || last.Reason != "model_failed" || last.Message != a.ReplyID || len(all) != 3 {
		t.Errorf("%+v", all)
	}
	v.end(true)
}

func TestMessages_tooManyAnswersAreRefusedAndStoreNothing(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model, s.api.Limits.Answers = m, 2 })
	n.ask("s", secret)
	n.ask("t", secret)
	a := n.post("/v1/sessions/u/messages", typeJSON, `{"content":"sesame"}`)
	if p := a.refused(t, 429, "model_busy"); p.Limit != 2 || a.header.Get("Retry-After") == "" {
		t.Errorf("%+v", p)
	}
	n.get("/v1/sessions/u").refused(t, 404, "session_not_found")
	close(m.steps)
	eventually(t, "a place", func() bool {
		return n.post("/v1/sessions/u/messages", typeJSON, `{"content":"sesame"}`).status == 202
	})
	// A refused question frees its place.
	n.append("over", `{"type":"end"}`)
	for range 3 {
		n.post("/v1/sessions/over/messages", typeJSON, `{"content":"sesame"}`).refused(t, 409, "session_ended")
	}
	eventually(t, "a place", func() bool {
		return n.post("/v1/sessions/u/messages", typeJSON, `{"content":"sesame"}`).status == 202
	})
}

func TestMessages_answerGoesOnWithoutTheOneWhoAsked(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	n.ask("s", secret)
	v := n.watch("s", "")
	v.welcome()
	v.take(0, 1)
	v.stop()
	eventually(t, "no viewer", func() bool { return into[sessionJSON](t, n.get("/v1/sessions/s"), 200).Viewers == 0 })
	m.say(t, "sesame 1")
	m.say(t, "sesame 2")
	close(m.steps)
	eventually(t, "done", func() bool { return n.page("s", "").Last == 4 })
	if got := n.contents("s"); !slices.Equal(got, []string{secret, "sesame 1", "sesame 2", ""}) {
		t.Errorf("%q", got)
	}
}

func TestMessages_answerWaitsForARedisThatIsAwayAndSaysNothingTwice(t *testing.T) {
	t.Parallel()
	var appends atomic.Int64
	fail := map[int64]error{}
	for i := range int64(3) {
		fail[2+i] = store.ErrAway // the first piece, three times
	}
	fail[6] = store.ErrOutcomeUnknown // the second piece, which is stored
	m := newPaced()
	n := serve(t, func(s *setup) {
		s.model = m
		s.logs = func(l Logs) Logs {
			return &faulty{Logs: l, append: func(next func() (store.Appended, error)) (store.Appended, error) {
				switch err := fail[appends.Add(1)]; err {
				case store.ErrOutcomeUnknown:
					_, _ = next()
					return store.Appended{}, err
				case nil:
					return next()
				default:
					return store.Appended{}, err
				}
			}}
		}
	})
	v := n.watch("s", "?until=done")
	v.welcome()
	n.ask("s", secret)
	for i := range int64(3) {
		m.say(t, fmt.Sprint("sesame ", i+1))
		eventually(t, "the piece", func() bool { return n.page("s", "").Last == i+2 }) // so that each has its own append
	}
	close(m.steps)
	all := v.talk(0)
	var said []string
	for _, c := range all[1 : len(all)-1] {
		said = append(said, c.Content)
	}
	if !slices.Equal(said, []string{"sesame 1", "sesame 2", "sesame 3"}) {
		t.Errorf("%q", said)
	}
	if last := all[len(all)-1]; last.Type != "done" {
		t.Errorf("%+v", last)
	}
}

// spoken records the conversations that a model gets.
type spoken struct {
	mu   sync.Mutex
	told [][]model.Turn
}

func (s *spoken) Answer(_ context.Context, c []model.Turn) iter.Seq2[model.Piece, error] {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, c)
	return func(yield func(model.Piece, error) bool) {
		_ = yield(model.Piece{Text: "sesame "}, nil) && yield(model.Piece{Text: "opens"}, nil)
	}
}

// last returns the last conversation, after a number of calls.
func (s *spoken) last(t *testing.T, times int) (c []model.Turn) {
	t.Helper()
	eventually(t, "the model is asked", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.told) == times {
			c = s.told[times-1]
		}
		return len(s.told) == times
	})
	return c
}

func TestMessages_conversationIsSentAlongAsFarAsItGot(t *testing.T) {
	t.Parallel()
	m := &spoken{}
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { on(redis)(s); s.model = m })
	n.ask("s", "sesame?")
	eventually(t, "an answer", func() bool { return n.page("s", "").Last == 4 })
	n.append("s", `[{"message_id":"a","role":"assistant","content":"half "},{"role":"developer","content":"be brief"},
		{"message_id":"f","role":"assistant","type":"failed","reason":"model_empty"},{"role":"tool","content":"9"},
		{"message_id":"e","type":"delta","raw":"{}"},{"message_id":"a","type":"reasoning","content":"hm"},{"message_id":"blank","content":" \n"},{"content":"no"},{"content":"body"},{"message_id":"a","content":"of it"},{"message_id":"a","type":"cancelled"}]`)
	redis.RPush(t.Context(), "chat:history:s", `{"message_id": "x", "Content": "no", "content": "foreign", "role": 7}`, "no JSON", `["no chunk"]`)
	n.ask("s", "and now?")
	want := []model.Turn{{Role: "system", Content: "be brief"}, {Role: "user", Content: "sesame?"},
		{Role: "assistant", Content: "sesame opens\n\nhalf of it\n\nnobody\n\nforeign"}, {Role: "user", Content: "and now?"}}
	if got := m.last(t, 2); !reflect.DeepEqual(got, want) {
		t.Errorf("the model was told\n%q\nand not\n%q", got, want)
	}
}

// The first chunk after a deletion has a high number, and no chunk before it.
func TestMessages_conversationBeginsWithItsEpoch(t *testing.T) {
	t.Parallel()
	m := &spoken{}
	n := serve(t, func(s *setup) { s.model = m })
	n.append("s", `{"content":"former"}`)
	if a := n.do(request{method: "DELETE", path: "/v1/sessions/s"}); a.status != 204 {
		t.Fatalf("%+v", a)
	}
	n.append("s", `[{"message_id":"q","role":"user","content":"remember 42"},{"message_id":"q","type":"done"}]`)
	n.ask("s", "sesame?")
	if got, want := m.last(t, 1), []model.Turn{{Role: "user", Content: "remember 42\n\nsesame?"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestMessages_conversationIsBoundedAndItsMessagesAreWhole(t *testing.T) {
	t.Parallel()
	m := &spoken{}
	n := serve(t, func(s *setup) { s.model, s.api.ContextMax, s.store.HistoryMax = m, 100, 20 })
	text := strings.Repeat("x", 40)
	n.append("s", `[{"message_id":"1","role":"user","content":"`+text+`"},{"message_id":"2","role":"user","content":"`+text+`"},{"message_id":"3","content":"`+text+`"},{"message_id":"1","content":"late"}]`)
	n.ask("s", "sesame?")
	want := []model.Turn{{Role: "user", Content: text}, {Role: "assistant", Content: text}, {Role: "user", Content: "sesame?"}}
	if got := m.last(t, 1); !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
	// A message whose beginning was trimmed is left out, and so is one that is too long by itself.
	eventually(t, "an answer", func() bool { return n.page("s", "").Last == 8 })
	for i, more := range []string{"", `{"message_id":"5","content":"` + text + text + text + `"}`} {
		for range 25 {
			n.append("s", fmt.Sprintf(`{"message_id":"4-%d","role":"user","content":"y"}`, i))
		}
		if more != "" {
			n.append("s", more)
		}
		n.append("s", fmt.Sprintf(`[{"message_id":"6-%d","role":"user","content":"short"},{"message_id":"7-%d","content":"of it"}]`, i, i))
		before := n.page("s", "").Last
		n.ask("s", "sesame?")
		want = []model.Turn{{Role: "user", Content: "short"}, {Role: "assistant", Content: "of it"}, {Role: "user", Content: "sesame?"}}
		if got := m.last(t, 2+i); !reflect.DeepEqual(got, want) {
			t.Errorf("%q", got)
		}
		eventually(t, "an answer", func() bool { return n.page("s", "").Last == before+4 })
	}
}

// reading counts the bytes of chunks that are read.
type reading struct {
	Logs
	bytes atomic.Int64
}

func (r *reading) Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error) {
	p, err := r.Logs.Read(ctx, session, from, bytes, count)
	for _, element := range p.Elements {
		r.bytes.Add(int64(len(element)))
	}
	return p, err
}

// A question reads the log backwards, only as far as the context needs, and not beyond a limit if chunks are large.
func TestMessages_aQuestionReadsNoMoreThanItNeeds(t *testing.T) {
	t.Parallel()
	m := &spoken{}
	var logs *reading
	n := serve(t, func(s *setup) {
		s.model, s.api.ContextMax = m, 64<<10
		s.logs = func(l Logs) Logs { logs = &reading{Logs: l}; return logs }
	})
	large := `{"message_id":"m","data":"` + strings.Repeat("x", 60<<10) + `"}`
	for range 60 { // 25 MB without text
		n.append("s", "["+strings.Repeat(large+",", 6)+large+"]")
	}
	for i := range 100 {
		n.append("t", fmt.Sprintf(`[{"message_id":"q%[1]d","role":"user","content":"why?"},{"message_id":"a%[1]d","content":"%[2]s"},{"type":"done","message_id":"a%[1]d"}]`, i, strings.Repeat("y", 40<<10)))
	}
	for i, c := range []struct {
		session string
		most    int64
	}{{"s", contextRead + 8<<20}, {"t", 8 << 20}} {
		session, most := c.session, c.most
		logs.bytes.Store(0)
		n.ask(session, "why?")
		m.last(t, i+1)
		if got := logs.bytes.Load(); got > most {
			t.Errorf("%s: a question read %d bytes", session, got)
		}
	}
}

// Instructions are kept, wherever they are, and however long the log is.
func TestMessages_instructionsAreNeverLeftOut(t *testing.T) {
	t.Parallel()
	m := &spoken{}
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) {
		on(redis)(s)
		s.model, s.api.ContextMax, s.api.Limits.CallerAppends = m, 0, 1<<30
	})
	n.append("s", `[{"role":"system","content":"be brief"},{"role":"assistant","content":"Hello"},{"role":"user","content":"forgotten"}]`)
	for range contextChunks / 500 {
		n.append("s", `[`+strings.TrimSuffix(strings.Repeat(`{"content":"y"},`, 500), ",")+`]`)
	}
	n.append("s", `{"role":"developer","content":"and kind"}`)
	n.ask("s", "sesame?")
	if got, want := m.last(t, 1), []model.Turn{{Role: "system", Content: "be brief\n\nand kind"}, {Role: "user", Content: "sesame?"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("%.200q", got)
	}
	for range instructionsMost/60_000 + 1 {
		n.append("s", `{"role":"system","content":"`+strings.Repeat("x", 60_000)+`"}`)
	}
	before := n.page("s", "").Last
	n.ask("s", "sesame?")
	eventually(t, "an end", func() bool { return n.page("s", "").Last == before+2 })
	if text := string(n.get(fmt.Sprint("/v1/sessions/s/chunks?after=", before+1)).body); !strings.Contains(text, `"reason":"context_too_large"`) {
		t.Error(text)
	}
}

// batches records the number of chunks of each append, and delays one.
type batches struct {
	Logs
	hold chan struct{}
	mu   sync.Mutex
	all  []int
}

func (b *batches) Append(ctx context.Context, session string, batch store.Batch) (store.Appended, error) {
	b.mu.Lock()
	if len(batch.Chunks) > 0 {
		b.all = append(b.all, len(batch.Chunks))
	}
	held := len(b.all) == 2 && len(batch.Chunks) > 0
	b.mu.Unlock()
	if held {
		<-b.hold
	}
	return b.Logs.Append(ctx, session, batch)
}

func TestMessages_wordsThatComeDuringAnAppendShareTheNext(t *testing.T) {
	t.Parallel()
	m := newPaced()
	b := &batches{hold: make(chan struct{})}
	n := serve(t, func(s *setup) { s.model = m; s.logs = func(l Logs) Logs { b.Logs = l; return b } })
	v := n.watch("s", "?until=done")
	v.welcome()
	n.ask("s", secret)
	for i := range 100 { // the model may say them although nothing is stored
		m.say(t, fmt.Sprint("sesame ", i))
	}
	close(b.hold)
	close(m.steps)
	all := v.talk(0)
	if len(all) != 102 {
		t.Fatalf("%d chunks", len(all))
	}
	for i, c := range all[1:101] { // each piece is a chunk
		if c.Content != fmt.Sprint("sesame ", i) {
			t.Fatalf("%d: %+v", i, c)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.all) > 6 {
		t.Errorf("there were appends of %d chunks", b.all)
	}
}

// failing is a model that says pieces, and then fails if err is not nil.
func failing(err error, pieces ...model.Piece) model.Model {
	return answers(func(context.Context, []model.Turn) iter.Seq2[model.Piece, error] {
		return func(yield func(model.Piece, error) bool) {
			for _, p := range pieces {
				if !yield(p, nil) {
					return
				}
			}
			if err != nil {
				yield(model.Piece{}, err)
			}
		}
	})
}

func TestMessages_whatAModelSaysBesideItsTextIsKept(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("\x00\U0001f35e", 4000)
	n := serve(t, func(s *setup) {
		s.api.ChunkMax = 4 << 10
		s.model = failing(nil, model.Piece{Text: "sesame"}, model.Piece{Text: "not that", Refusal: true}, model.Piece{ToolCalls: []byte("[{\"id\":\n1}]")},
			model.Piece{Text: long}, model.Piece{Finish: strings.Repeat("a", 63) + "é"}, model.Piece{Usage: []byte(`{"total_tokens":7}`)})
	})
	v := n.watch("s", "?until=done")
	v.welcome()
	n.ask("s", secret)
	var all []map[string]any
	for {
		e := v.next()
		var c map[string]any
		if err := json.Unmarshal([]byte(e.data), &c); err != nil {
			t.Fatal(err)
		}
		if all = append(all, c); c["type"] == "done" {
			break
		}
	}
	var text strings.Builder
	for _, c := range all[4 : len(all)-1] {
		text.WriteString(c["content"].(string))
	}
	if text.String() != long || len(all) < 8 {
		t.Errorf("a long piece came as %d chunks of %d bytes, not of %d", len(all)-5, text.Len(), len(long))
	}
	if c := all[2]; c["refusal"] != true || c["content"] != "not that" || c["type"] != "delta" {
		t.Errorf("%v", c)
	}
	if c := all[3]; c["type"] != "tool_calls" || fmt.Sprint(c["data"]) != "[map[id:1]]" {
		t.Errorf("%v", c)
	}
	if c := all[len(all)-1]; c["finish_reason"] != strings.Repeat("a", 63) || fmt.Sprint(c["usage"]) != "map[total_tokens:7]" {
		t.Errorf("%v", c)
	}
}

func TestMessages_thinkingIsOfATypeOfItsOwn(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("\x00\U0001f35e", 4000)
	n := serve(t, func(s *setup) {
		s.api.ChunkMax = 4 << 10
		s.model = failing(nil, model.Piece{Text: "hm", Reasoning: true}, model.Piece{Text: long, Reasoning: true}, model.Piece{Text: "sesame"})
	})
	n.ask("s", secret)
	var thought strings.Builder
	eventually(t, "done", func() bool { all := n.chunks("s"); return all[len(all)-1].Type == "done" })
	for _, c := range n.chunks("s")[1:] {
		switch c.Type {
		case "reasoning":
			thought.WriteString(c.Content)
		case "delta":
			if c.Content != "sesame" {
				t.Errorf("%+v", c)
			}
		}
		if c.Role != "assistant" || c.Message == "" {
			t.Errorf("%+v", c)
		}
	}
	if thought.String() != "hm"+long {
		t.Errorf("%d bytes of thinking, not %d", thought.Len(), len("hm"+long))
	}
}

// A program that executes a call joins its arguments by index. Those of a large call come in several chunks.
func TestMessages_largeCallsOfToolsAreSplit(t *testing.T) {
	t.Parallel()
	arguments := map[string]string{"0": `{"text":"` + strings.Repeat("tea 🍵 <\\\" ", 20_000) + `"}`, "1": "{}", "2": `{"n":1}`}
	quoted := func(text string) string { b, _ := json.Marshal(text); return string(b) }
	n := serve(t, func(s *setup) {
		s.api.AnswerMax = 2 << 20
		s.model = failing(nil, model.Piece{ToolCalls: []byte(`[{"index":0,"id":"a","type":"function","function":{"name":"f","arguments":` + quoted(arguments["0"]) + `},"extra_content":{}},
			{"index":1,"id":"b","type":"function","function":{"name":"g","arguments":"{}"}},{"index":2,"id":"c","function":{"name":"h","arguments":{"n":1}}}]`)})
	})
	n.ask("s", secret)
	eventually(t, "done", func() bool { all := n.chunks("s"); return all[len(all)-1].Type == "done" })
	got, names := map[string]string{}, map[string]string{}
	for _, raw := range n.page("s", "?limit=1000").Chunks {
		var c struct{ Data json.RawMessage }
		if err := json.Unmarshal(raw, &c); err != nil {
			t.Fatal(err)
		}
		for _, call := range model.Calls(c.Data) {
			got[string(call.Index)] += call.Arguments
			names[string(call.Index)] += call.ID + call.Name
		}
	}
	if !maps.Equal(got, arguments) || !maps.Equal(names, map[string]string{"0": "af", "1": "bg", "2": "ch"}) {
		t.Errorf("%v: %d bytes of arguments, not %d", names, len(got["0"]), len(arguments["0"]))
	}
}

func TestMessages_failureSaysWhatEverybodyMayKnow(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		model          model.Model
		reason, detail string
	}{
		"its own":   {failing(&model.Error{Reason: model.RateLimited, Detail: "too much"}), model.RateLimited, "too much"},
		"too large": {failing(nil, model.Piece{Text: strings.Repeat("x", 600)}, model.Piece{Text: strings.Repeat("x", 600)}), answerTooLarge, "-model-answer-max"},
		"thoughts":  {failing(nil, model.Piece{Text: strings.Repeat("x", 600)}, model.Piece{Reasoning: true, Text: strings.Repeat("x", 600)}), answerTooLarge, "-model-answer-max"},
		"too long":  {failing(nil, model.Piece{ToolCalls: []byte(`[{"id":"` + strings.Repeat("x", 900) + `"}]`)}), model.Broken, "-chunk-max"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := serve(t, func(s *setup) { s.model, s.api.AnswerMax, s.api.ChunkMax = c.model, 1000, store.Overhead+800 })
			v := n.watch("s", "?until=done")
			v.welcome()
			n.ask("s", secret)
			var last struct{ Type, Reason, Detail string }
			for last.Type != "failed" {
				if err := json.Unmarshal([]byte(v.next().data), &last); err != nil {
					t.Fatal(err)
				}
			}
			if last.Reason != c.reason || !strings.Contains(last.Detail, c.detail) {
				t.Errorf("%+v", last)
			}
			if text := string(n.get("/metrics").body); !strings.Contains(text, `gapless_model_errors_total{reason="`+c.reason+`"} 1`) {
				t.Error("it is not counted")
			}
		})
	}
}

func TestMessages_badQuestionsAreRefusedAndStoreNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := serve(t, func(s *setup) { s.store.Redis, s.api.ChunkMax, s.api.BodyMax = redis.URL(), 2<<10, 10<<10 })
	long := strings.Repeat("x", 4<<10)
	for _, c := range []struct {
		kind, body   string
		status       int
		code, member string
		limit        int
	}{
		{typeJSON, ``, 400, "invalid_json", "", 0},
		{typeJSON, `{"content":`, 400, "invalid_json", "", 0},
		{typeJSON, `["sesame"]`, 400, "invalid_json", "", 0},
		{typeJSON, `{"content":"a"} x`, 400, "invalid_json", "", 0},
		{typeJSON, `{"content":"a","content":"b"}`, 400, "invalid_json", "", 0},
		{typeJSON, "{\"content\":\"\xff\"}", 400, "invalid_json", "", 0},
		{typeJSON, `{"content":5}`, 400, "invalid_json", "/content", 0},
		{typeJSON, `{"content":null}`, 400, "invalid_json", "/content", 0},
		{typeJSON, `{"contents":"a"}`, 400, "invalid_json", "/contents", 0},
		{typeJSON, `{"content":"a","role":"system"}`, 400, "invalid_json", "/role", 0},
		{typeJSON, `{}`, 400, "invalid_content", "/content", 0},
		{typeJSON, `{"content":""}`, 400, "invalid_content", "/content", 0},
		{typeJSON, `{"content":" \n\u00a0"}`, 400, "invalid_content", "/content", 0},
		{"text/plain", `sesame`, 415, "unsupported_media_type", "Content-Type", 0},
		{"", `{"content":"sesame"}`, 415, "unsupported_media_type", "Content-Type", 0},
		{typeNDJSON, `{"content":"sesame"}`, 415, "unsupported_media_type", "Content-Type", 0},
		{typeJSON, `{"content":"` + long + `"}`, 413, "content_too_large", "/content", 2 << 10},
		{typeJSON, `{"content":"` + long + long + long + `"}`, 413, "body_too_large", "", 10 << 10},
	} {
		p := n.do(request{method: "POST", path: "/v1/sessions/s/messages", kind: c.kind, body: c.body, bad: true}).refused(t, c.status, c.code)
		if p.Member != c.member || p.Limit != c.limit {
			t.Errorf("%.60s: %+v", c.body, p)
		}
	}
	if keys := redis.Keys(t.Context(), "*").Val(); len(keys) > 0 {
		t.Errorf("there are keys now: %q", keys)
	}
}

// The node stops while callers keep asking: there is no race, and every accepted question's answer has its end.
func TestMessages_askedWhileTheNodeStopsHaveTheirEnd(t *testing.T) {
	t.Parallel()
	m := newPaced()
	n := serve(t, func(s *setup) { s.model = m })
	const people = 4
	done := make(chan []asked, people)
	for i := range people {
		go func() { // ended by the first refusal
			var all []asked
			for {
				a, err := n.send(n.new(request{method: "POST", path: fmt.Sprintf("/v1/sessions/s%d/messages", i), kind: typeJSON, body: `{"content":"sesame"}`}))
				if err != nil || a.status != 202 {
					if err != nil || a.status != 503 && a.status != 429 {
						t.Errorf("%d %s %v", a.status, a.body, err)
					}
					if a.status != 429 {
						done <- all
						return
					}
					continue
				}
				all = append(all, into[asked](t, a, 202))
			}
		}()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	n.api.Drain()
	n.api.Wait(ctx)
	n.api.End()
	for range people {
		within(t, "a refusal", done)
	}
	n.api.Wait(t.Context())
	for i := range people {
		s := fmt.Sprint("s", i)
		if n.get("/v1/sessions/"+s).status != 200 {
			continue
		}
		var questions, ends int
		for after := int64(0); ; {
			p := n.page(s, fmt.Sprintf("?limit=1000&after=%d", after))
			for _, c := range decoded(t, p.Chunks) {
				switch c.Type {
				case "message":
					questions++
				case "failed":
					ends++
				}
			}
			if after = p.From + int64(len(p.Chunks)) - 1; after >= p.Last {
				break
			}
		}
		if questions != ends {
			t.Errorf("%s: %d questions, %d answers have an end", s, questions, ends)
		}
	}
}
