package api

import (
	"encoding/json"
	"errors"
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

// strict returns the error of the strictest services for a conversation: the templates of Mistral's and Google's
// models, Amazon's Bedrock, Perplexity.
func strict(turns []model.Turn) error {
	want := []string{model.RoleUser}
	for i, t := range turns {
		switch {
		case i == 0 && t.Role == model.RoleSystem:
		case !slices.Contains(want, t.Role):
			return fmt.Errorf("turn %d is %s, not %s", i, t.Role, want)
		case t.Role == model.RoleUser:
			want = []string{model.RoleAssistant}
		default:
			want = []string{model.RoleUser}
		}
		if strings.TrimSpace(t.Content) == "" {
			return fmt.Errorf("turn %d is blank", i)
		}
	}
	if len(turns) == 0 || turns[len(turns)-1].Role != model.RoleUser {
		return errors.New("the last turn is not the user's")
	}
	return nil
}

// Promise: no service refuses a conversation, whatever happened to the answers in it.
func TestMessages_theStrictestServiceRefusesNoConversation(t *testing.T) {
	t.Parallel()
	var asked, refused atomic.Int64
	words := make(chan struct{}) // an answer that does not end by itself
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var sent struct{ Messages []model.Turn }
		if err := json.NewDecoder(r.Body).Decode(&sent); err != nil {
			t.Error(err)
		}
		asked.Add(1)
		question := sent.Messages[len(sent.Messages)-1].Content
		if err := strict(sent.Messages); err != nil {
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
		case "":
			say("content", "Green tea.")
		}
		switch how {
		case "hang", "silent":
			select {
			case <-words:
			case <-r.Context().Done():
			}
		case "half", "broken":
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
					`{"role":"tool","content":"9"}`, `{"content":"` + strings.Repeat("x", 700) + `"}`, `{"role":"user","content":""}`,
				}[random.IntN(7)])
			}
			how := []string{"", "", "blank", "long", "half", "broken", "hang", "silent", "nothing"}[random.IntN(9)]
			a := n.ask(session, "What tea"+instructed+"?/"+how)
			if how == "hang" || how == "silent" {
				last := n.page(session, "").Last
				eventually(t, "something is said", func() bool { return n.page(session, "?limit=1").Last >= last })
				n.post("/v1/sessions/"+session+"/messages/"+a.ReplyID+"/stop", "", "")
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

func contents(turns []model.Turn) (all []string) {
	for _, t := range turns {
		all = append(all, t.Content)
	}
	return all
}
