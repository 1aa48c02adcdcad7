package api

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"gapless/api/model"
)

// sentTurn is a message as a service reads it.
type sentTurn struct {
	Role, Content string
	Calls         []struct {
		ID       string
		Function struct{ Name, Arguments string }
	} `json:"tool_calls"`
	Call string `json:"tool_call_id"`
}

// strict returns the error of the strictest services for a conversation: the templates of Mistral's and Google's
// models, Amazon's Bedrock, Perplexity.
func strict(turns []sentTurn) error {
	last, open := model.RoleSystem, map[string]bool{}
	for i, t := range turns {
		switch {
		case i == 0 && t.Role == model.RoleSystem:
		case t.Role == model.RoleTool && !open[t.Call]:
			return fmt.Errorf("turn %d is the result of no call", i)
		case t.Role != model.RoleTool && len(open) > 0:
			return fmt.Errorf("turn %d follows calls without results", i)
		case t.Role == model.RoleUser && last == model.RoleTool:
			return fmt.Errorf("turn %d is a user's after the result of a tool", i)
		case t.Role == last, t.Role == model.RoleSystem, last == model.RoleSystem && t.Role != model.RoleUser:
			if t.Role != model.RoleTool {
				return fmt.Errorf("turn %d is %s after %s", i, t.Role, last)
			}
		}
		last = t.Role
		delete(open, t.Call)
		for _, c := range t.Calls {
			if open[c.ID] = true; t.Role != model.RoleAssistant || !json.Valid([]byte(c.Function.Arguments)) {
				return fmt.Errorf("turn %d has the call %v", i, c)
			}
		}
		if strings.TrimSpace(t.Content) == "" && t.Role != model.RoleTool && t.Calls == nil {
			return fmt.Errorf("turn %d is blank", i)
		}
	}
	if len(open) > 0 || last != model.RoleUser && last != model.RoleTool {
		return fmt.Errorf("the last turn is of role %s, with %d calls without results", last, len(open))
	}
	return nil
}

// Promise: no service refuses a conversation, whatever happened to the answers in it.
func TestMessages_theStrictestServiceRefusesNoConversation(t *testing.T) {
	t.Parallel()
	for name, asOpenAI := range map[string]bool{"messages": false, "responses": true} {
		t.Run(name, func(t *testing.T) { t.Parallel(); refusesNothing(t, asOpenAI) })
	}
}

func refusesNothing(t *testing.T, asOpenAI bool) {
	t.Helper()
	var asked, refused atomic.Int64
	words := make(chan struct{}) // an answer that does not end by itself
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var sent struct{ Messages []sentTurn }
		if err := json.NewDecoder(r.Body).Decode(&sent); err != nil {
			t.Error(err)
		}
		asked.Add(1)
		if len(sent.Messages) == 0 {
			t.Error("nothing is sent")
			return
		}
		question := sent.Messages[len(sent.Messages)-1].Content
		err, size := strict(sent.Messages), 0
		for _, m := range sent.Messages {
			if m.Role != model.RoleSystem {
				size += len(m.Content)
			}
		}
		if size > 600 && !strings.Contains(question, "called") { // a call is sent with the result that is asked about
			err = fmt.Errorf("%d bytes are sent", size)
		}
		if err != nil {
			refused.Add(1)
			t.Errorf("%v in %q", err, sent.Messages)
			http.Error(w, "", http.StatusBadRequest)
			return
		}
		if strings.Contains(strings.Join(contents(sent.Messages), ""), "be brief") != strings.Contains(question, "instructed") {
			t.Errorf("instructions are left out of %q", sent.Messages)
		}
		say := func(member, text string) {
			fmt.Fprintf(w, "data: {\"choices\":[{\"delta\":{%q:%q}}]}\n\n", member, text)
			_ = http.NewResponseController(w).Flush()
		}
		w.Header().Set("Content-Type", "text/event-stream")
		how := question[strings.LastIndex(question, "/")+1:]
		say("reasoning", "Hm.")
		switch how {
		case "blank":
			say("content", " \n")
		case "long":
			say("content", strings.Repeat("word ", 50))
		case "half", "hang":
			say("content", "half of ")
		case "cut", "called", "uncalled": // uncalled: nobody sends the result
			say("content", "I call.")
			arguments := map[string]string{"cut": `{"a`}[how]
			fmt.Fprintf(w, "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0,\"id\":\"c\",\"function\":{\"name\":\"f\",\"arguments\":%q}}]}}]}\n\n", arguments)
		case "":
			say("content", "Green tea.")
		}
		switch how {
		case "hang", "silent":
			select {
			case <-words:
			case <-r.Context().Done():
			}
		case "half", "broken", "cut":
			panic(http.ErrAbortHandler)
		default:
			fmt.Fprint(w, "data: [DONE]\n\n")
		}
	}))
	defer service.Close()
	defer close(words)
	cfg := model.DefaultConfig()
	cfg.URL, cfg.Name = service.URL, "m"
	n := serve(t, func(s *setup) {
		s.model, s.api.ContextMax = model.NewOpenAI(cfg), 600
		s.errors = true
	})
	ask := func(session, question string) (stop func()) {
		if !asOpenAI {
			a := n.ask(session, question)
			return func() { n.post("/v1/sessions/"+session+"/messages/"+a.ReplyID+"/stop", "", "") }
		}
		input := fmt.Sprintf(`{"role":"user","content":%q}`, question)
		if strings.HasSuffix(question, "/called") {
			input = `{"type":"function_call_output","call_id":"c","output":""},{"type":"function_call_output","call_id":"none","output":"9"},` + input + `,
				{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"c","output":` + fmt.Sprintf("%q", question) + `}`
		}
		id := n.created(t, `{"background":true,"conversation":"`+session+`","input":[`+input+`]}`)["id"]
		return func() { n.post(fmt.Sprint("/openai/v1/responses/", id, "/cancel"), "", "") }
	}
	seed := rand.Uint64()
	t.Logf("the seed is %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range 50 {
		session, instructed := fmt.Sprint("s", i), ""
		for range 1 + random.IntN(5) {
			if random.IntN(5) == 0 {
				n.append(session, `{"role":"system","content":"be brief"}`)
				instructed = " instructed"
			}
			if random.IntN(4) == 0 { // chunks of other programs
				n.append(session, []string{
					`{"role":"assistant","content":"Hello! What may I do?"}`, `{"role":"user","content":"left unanswered"}`, `{"message_id":"m","content":"   "}`,
					`[{"message_id":"n","role":"user","content":"a"},{"message_id":"o","content":"b"},{"message_id":"n","content":"c"}]`,
					`[{"message_id":"r","role":"user"},{"message_id":"r","content":"role first"},{"message_id":"b","role":"system","content":""}]`,
					`{"role":"tool","content":"9"}`, `{"content":"` + strings.Repeat("x", 700) + `"}`, `{"role":"user","content":""}`,
				}[random.IntN(8)])
			}
			how := []string{"", "", "blank", "long", "half", "broken", "hang", "silent", "nothing", "cut", "called", "uncalled"}[random.IntN(12)]
			stop := ask(session, "What tea"+instructed+"?/"+how)
			if how == "hang" || how == "silent" {
				last := n.page(session, "").Last
				eventually(t, "something is said", func() bool { return n.page(session, "?limit=1").Last >= last })
				stop()
			}
			eventually(t, "the end of "+how, func() bool {
				all := decoded(t, n.page(session, fmt.Sprint("?after=", max(n.page(session, "?limit=1").Last-1, 0))).Chunks)
				return slices.Contains([]string{"done", "failed", "cancelled"}, all[len(all)-1].Type)
			})
		}
	}
	if asked.Load() < 50 || refused.Load() > 0 {
		t.Errorf("%d were asked, and %d refused", asked.Load(), refused.Load())
	}
}

func contents(turns []sentTurn) (all []string) {
	for _, t := range turns {
		all = append(all, t.Content)
	}
	return all
}
