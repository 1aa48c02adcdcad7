package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"gapless/store/storetest"
)

// modelKey is the key in the program's environment, which must stay secret.
const modelKey = "sk-of-the-tests"

// modelService implements the chat completions API, with the words that a test sends.
type modelService struct {
	*httptest.Server
	words chan string   // an empty word finishes the answer
	asked chan []string // roles and contents of each request
	gone  chan time.Time
}

func startModel(t *testing.T) *modelService {
	t.Helper()
	m := &modelService{words: make(chan string), asked: make(chan []string, 8), gone: make(chan time.Time, 8)}
	m.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var sent struct {
			Model    string
			Messages []struct{ Role, Content string }
		}
		body, _ := io.ReadAll(r.Body)
		if json.Unmarshal(body, &sent) != nil || sent.Model != "m" || r.Header.Get("Authorization") != "Bearer "+modelKey {
			t.Errorf("the model was asked %s %s", r.URL, body)
		}
		var said []string
		for _, message := range sent.Messages {
			said = append(said, message.Role+": "+message.Content)
		}
		m.asked <- said
		w.Header().Set("Content-Type", "text/event-stream")
		ctl := http.NewResponseController(w)
		_ = ctl.Flush()
		for {
			select {
			case word := <-m.words:
				if word == "" {
					fmt.Fprint(w, `data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`+"\n\ndata: [DONE]\n\n")
					return
				}
				fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":%q}}]}\n\n", word)
				_ = ctl.Flush()
			case <-r.Context().Done():
				m.gone <- time.Now()
				return
			}
		}
	}))
	t.Cleanup(m.Close)
	return m
}

func (m *modelService) say(t *testing.T, words ...string) {
	t.Helper()
	for _, word := range words {
		select {
		case m.words <- word:
		case <-time.After(patience):
			t.Fatalf("nobody takes %q of the model", word)
		}
	}
}

// ask asks a question. It returns the reply's message and what the model received.
func (m *modelService) ask(t *testing.T, n *node, session, question string) (reply string, told []string) {
	t.Helper()
	a := n.post("/v1/sessions/"+session+"/messages", "application/json", fmt.Sprintf(`{"content":%q}`, question))
	if a.status != http.StatusAccepted {
		t.Fatalf("ask: %d %s (%v)", a.status, a.body, a.err)
	}
	var asked struct {
		Reply string `json:"reply_message_id"`
	}
	decode(t, a.body, &asked)
	select {
	case told = <-m.asked:
	case <-time.After(patience):
		t.Fatal("the model is not asked")
	}
	return asked.Reply, told
}

// ends returns the chunks that end a message.
func ends(t *testing.T, all []string, message string) (found []string) {
	t.Helper()
	for _, element := range all {
		var c struct {
			Type      string
			Reason    string
			MessageID string `json:"message_id"`
		}
		decode(t, element, &c)
		if c.MessageID == message && slices.Contains([]string{"done", "failed", "cancelled"}, c.Type) {
			found = append(found, strings.TrimSpace(c.Type+" "+c.Reason))
		}
	}
	return found
}

func TestModel_answersAcrossNodesUntilItIsDoneCancelledDrainedOrKilled(t *testing.T) {
	t.Setenv("GAPLESS_MODEL_KEY", modelKey)
	redis := storetest.Redis(t)
	m := startModel(t)
	all := nodes(t, 3, redis, "-model-url", m.URL+"/v1", "-model-name", "m", "-reconcile", "200ms", "-grace", "2s")
	a, b := all[0], all[1]
	session := newID()
	until := func(what string, n *node, seq int64) {
		t.Helper()
		eventually(t, what, func() bool { return len(n.pages(t, session)) >= int(seq) })
	}

	reply, told := m.ask(t, a, session, "first?")
	if !slices.Equal(told, []string{"user: first?"}) {
		t.Errorf("the model was told %q", told)
	}
	ctx, leave := context.WithCancel(deadline(t))
	v := &viewer{session: session} // any viewer may leave
	wait := background(t, func() { v.connect(ctx, a.addr, nil) })
	m.say(t, "one ", "two")
	until("two words", b, 3)
	leave()
	wait()
	m.say(t, " three", "")
	until("an answer", b, 5)
	if got := ends(t, b.pages(t, session), reply); !slices.Equal(got, []string{"done"}) {
		t.Errorf("the answer ended %q", got)
	}

	// A cancel on another node reaches the service at once.
	reply, told = m.ask(t, a, session, "second?")
	if !slices.Equal(told, []string{"user: first?", "assistant: one two three", "user: second?"}) {
		t.Errorf("the model was told %q", told)
	}
	m.say(t, "half")
	until("half an answer", b, 7)
	begun := time.Now()
	if c := b.post("/v1/sessions/"+session+"/messages/"+reply+"/stop", "", ""); c.status != http.StatusNoContent {
		t.Fatalf("stop: %d %s", c.status, c.body)
	}
	select {
	case at := <-m.gone:
		if took := at.Sub(begun); took > slack/2 {
			t.Errorf("the service was left waiting for %v", took)
		}
	case <-time.After(patience):
		t.Fatal("the service is still asked")
	}
	if got := ends(t, b.pages(t, session), reply); !slices.Equal(got, []string{"cancelled"}) {
		t.Errorf("the answer ended %q", got)
	}

	// A drained node says why the answer failed.
	reply, _ = m.ask(t, all[2], session, "third?")
	m.say(t, "half")
	all[2].exits(t, time.Second)
	<-m.gone
	if got := ends(t, b.pages(t, session), reply); !slices.Equal(got, []string{"failed shutdown"}) {
		t.Errorf("the answer ended %q", got)
	}

	// If a node is killed, another one reports it, once.
	before := len(b.pages(t, session))
	reply, _ = m.ask(t, a, session, "fourth?")
	m.say(t, "half")
	until("half an answer", b, int64(before+2))
	a.kill()
	<-m.gone
	ctx, leave = context.WithCancel(deadline(t))
	defer leave()
	v = &viewer{session: session}
	wait = background(t, func() { v.connect(ctx, b.addr, nil) })
	until("the end of the answer", b, int64(before+3))
	leave()
	wait()
	if got := ends(t, b.pages(t, session), reply); !slices.Equal(got, []string{"failed producer_lost"}) {
		t.Errorf("the answer ended %q", got)
	}
	for _, n := range all {
		if strings.Contains(n.log.String(), modelKey) || strings.Contains(n.log.String(), "half") {
			t.Error("the key, or what the model said, is in a log")
		}
	}
}

// The service repeats the key wherever it can. The key appears nowhere else: in no log, response, metric, or request to
// another host.
func TestModel_theKeyIsForItsServiceAlone(t *testing.T) {
	t.Setenv("GAPLESS_MODEL_KEY", modelKey)
	plant(modelKey)
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("another host is asked: %s %s %q", r.Method, r.URL, r.Header)
	}))
	defer other.Close()
	broken := map[string]struct {
		reason string
		turn   func(w http.ResponseWriter, r *http.Request)
	}{
		"refused": {"model_unauthorized", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", r.Header.Get("Authorization"))
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintf(w, `{"error":{"message":"Incorrect API key provided: %s"}}`, modelKey)
		}},
		"redirected": {"model_rejected", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, strings.Replace(other.URL, "127.0.0.1", "localhost", 1)+"/"+modelKey, http.StatusTemporaryRedirect)
		}},
		"no HTTP": {"model_unavailable", func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			fmt.Fprintf(conn, "%s\r\n\r\n", modelKey)
			_ = conn.Close()
		}},
		"plain text": {"model_rejected", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, modelKey) }},
		"an error in it": {"model_broken", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprintf(w, "data: {\"choices\":[{\"delta\":{\"content\":\"half\"}}]}\n\ndata: {\"error\":{\"message\":%q}}\n\n", modelKey)
		}},
		"a stall": {"model_timeout", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\"half\"}}]}\n\n: "+modelKey+"\n\n")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}},
	}
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		for name, c := range broken { // name is the question
			if strings.Contains(string(body), name) {
				c.turn(w, r)
			}
		}
	}))
	defer service.Close()
	all := nodes(t, 2, storetest.Redis(t), "-model-url", service.URL+"/v1?key="+modelKey, "-model-name", "m", "-model-stall", "2s", "-model-timeout", "1m")
	var said strings.Builder
	for name, c := range broken {
		session := newID()
		ui := all[0].post("/v1/sessions/"+session+"/ui-stream", "application/json", fmt.Sprintf(`{"messages":[{"role":"user","parts":[{"type":"text","text":%q}]}]}`, name))
		if !strings.Contains(ui.body, `"errorText"`) {
			t.Errorf("%s: the front end is told %d %s", name, ui.status, ui.body)
		}
		said.WriteString(ui.body)
		log := all[1].pages(t, session)
		last := log[len(log)-1]
		if !strings.Contains(last, `"type":"failed"`) || !strings.Contains(last, `"reason":"`+c.reason+`"`) {
			t.Errorf("%s: %s", name, last)
		}
		said.WriteString(strings.Join(log, ""))
	}
	for _, path := range []string{"/metrics", "/v1/sessions/s/messages", "/v1/none"} {
		said.WriteString(all[0].get(path).body)
	}
	if strings.Contains(said.String(), modelKey) || !strings.Contains(said.String(), `gapless_model_errors_total{reason="model_unauthorized"} 1`) {
		t.Errorf("the key is told, or the failures are not: %s", said.String())
	}
}

// A stop works while the question waits for its next try, which then does not happen.
func TestModel_isStoppedBetweenTwoTries(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("Retry-After", "20") // the longest supported wait
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer service.Close()
	all := nodes(t, 2, storetest.Redis(t), "-model-url", service.URL, "-model-name", "m")
	session := newID()
	a := all[0].post("/v1/sessions/"+session+"/messages", "application/json", `{"content":"why?"}`)
	var x struct {
		Reply string `json:"reply_message_id"`
	}
	decode(t, a.body, &x)
	waits := func() bool { return strings.Contains(all[0].log.String(), "the model is asked again") }
	eventually(t, "the first try is over", waits)
	begun := time.Now()
	if c := all[1].post("/v1/sessions/"+session+"/messages/"+x.Reply+"/stop", "", ""); c.status != http.StatusNoContent {
		t.Fatalf("stop: %d %s", c.status, c.body)
	}
	eventually(t, "the answer is over", func() bool { return strings.Contains(all[0].log.String(), "answer ends") })
	if took := time.Since(begun); took > slack/2 || asked.Load() != 1 {
		t.Errorf("it took %v, and the service was asked %d times", took, asked.Load())
	}
	if got := ends(t, all[1].pages(t, session), x.Reply); !slices.Equal(got, []string{"cancelled"}) {
		t.Errorf("the answer ended %q", got)
	}
}

// If a proxy is needed, the environment names it, as for other programs.
func TestModel_isReachedThroughTheProxyOfTheEnvironment(t *testing.T) {
	const password = "pass-of-the-proxy"
	plant(modelKey, password)
	var asked atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, pass, _ := (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth(); user != "me" || pass != password ||
			r.RequestURI != "http://model.example/v1/chat/completions" || r.Header.Get("Authorization") != "Bearer "+modelKey {
			t.Errorf("the proxy is asked %s %q", r.RequestURI, r.Header)
		}
		if asked.Add(1) > 1 {
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\"yes\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
	}))
	defer proxy.Close()
	t.Setenv("GAPLESS_MODEL_KEY", modelKey)
	t.Setenv("HTTP_PROXY", strings.Replace(proxy.URL, "http://", "http://me:"+password+"@", 1))
	t.Setenv("NO_PROXY", "")
	n := start(t, "-model-url", "http://model.example/v1", "-model-name", "m")
	for _, want := range []string{`"type":"done"`, `"reason":"model_rejected"`, `"reason":"model_unavailable"`} {
		session := newID()
		n.post("/v1/sessions/"+session+"/messages", "application/json", `{"content":"why?"}`)
		eventually(t, want, func() bool { return strings.Contains(strings.Join(n.pages(t, session), ""), want) })
		if asked.Load() == 2 {
			proxy.Close() // after that no proxy exists
		}
	}
}

func TestModel_mistakesInItsFlagsAreReportedTogether(t *testing.T) {
	t.Parallel()
	reported(t, []string{"GAPLESS_MODEL_KEY=sk two words"}, []string{
		"-model-url", "https://me:secret@model.example/v1", "-model-options", "[]", "-model-timeout", "0s", "-model-stall", "-1s",
		"-model-context", "-1", "-model-answer-max", "0",
	}, []string{"-model-url", "-model-name", "-model-options", "-model-timeout", "-model-stall", "-model-context", "-model-answer-max", "GAPLESS_MODEL_KEY"})
	reported(t, nil, []string{"-model", "openai"}, []string{"-model-url", "-model-name"})
	reported(t, nil, []string{"-model", "demo", "-model-url", "https://model.example/v1"}, []string{"-model-url"})
	if _, out := program(t, []string{"GAPLESS_MODEL_KEY=sk two words"}, "-model-url", "https://me:secret@model.example/v1"); strings.Contains(out, "secret") || strings.Contains(out, "two words") {
		t.Errorf("a secret is told: %s", out)
	}
}
