package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"gapless/api/model"
)

// shortened returns the turns of a conversation, as "role: text" with long texts shortened.
func shortened(turns []model.Turn) (all []string) {
	for _, t := range turns {
		all = append(all, fmt.Sprintf("%s: %.60s", t.Role, t.Content))
	}
	return all
}

// fill appends chunks that others follow, 500 at a time.
func (n *node) fill(session string, count int, chunk string) {
	n.t.Helper()
	for ; count > 0; count -= 500 {
		n.append(session, "["+strings.TrimSuffix(strings.Repeat(chunk+",", min(count, 500)), ",")+"]")
	}
}

// A message has the role of its first chunk, as GET …/messages says, whichever of its chunks has text.
func TestConversation_aMessageHasTheRoleOfItsFirstChunk(t *testing.T) {
	t.Parallel()
	m := &spoken{}
	n := serve(t, func(s *setup) { s.model = m })
	n.append("s", `[{"message_id":"u","role":"user"},{"message_id":"u","content":"My name is "},{"message_id":"u","role":"assistant","content":"Ann."},
		{"message_id":"i","role":"system","content":""},{"message_id":"i","content":"Be brief."},{"message_id":"a","type":"reasoning","content":"Hm"},{"message_id":"a","role":"user","content":"Hello Ann."}]`)
	n.ask("s", "Who am I?")
	want := []string{"system: Be brief.", "user: My name is Ann.", "assistant: Hello Ann.", "user: Who am I?"}
	if got := shortened(m.last(t, 1)); !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

// Reading has boundaries. No message is cut in half by them, and instructions are there, whole.
func TestConversation_noMessageIsCutByABoundaryOfReading(t *testing.T) {
	t.Parallel()
	many := func(count int, chunk string) (all []string) {
		for i := range count {
			all = append(all, strings.ReplaceAll(chunk, "%d", fmt.Sprint(i)))
		}
		return all
	}
	rules := many(120, `{"message_id":"sys","role":"system","content":"rule%d. "}`)
	both := many(60, `{"message_id":"A","content":"A%d "},{"message_id":"B","content":"B%d "}`)
	const filler = `{"role":"tool","content":"y"}`
	isWhole := func(text, piece string, count int) bool {
		return strings.TrimSpace(text) == strings.TrimSpace(strings.Join(many(count, piece), ""))
	}
	for name, c := range map[string]struct {
		context int
		do      func(n *node)
		check   func(c []model.Turn) bool
	}{
		"instructions under long turns": {256 << 10, func(n *node) {
			n.append("s", "["+strings.Join(rules[:40], ",")+"]")
			for i := range 10 {
				n.append("s", fmt.Sprintf(`[{"type":"message","message_id":"u%[1]d","role":"user","content":"%[2]s"},{"message_id":"a%[1]d","content":"%[2]s"},{"type":"done","message_id":"a%[1]d"}]`, i, strings.Repeat("u", 15_000)))
			}
		}, func(c []model.Turn) bool { return c[0].Role == "system" && isWhole(c[0].Content, "rule%d. ", 40) }},
		"instructions of many chunks at the beginning of a long log": {1000, func(n *node) {
			n.append("s", "["+strings.Join(rules, ",")+"]")
			n.fill("s", contextChunks+1500, filler)
		}, func(c []model.Turn) bool { return c[0].Role == "system" && isWhole(c[0].Content, "rule%d. ", 120) }},
		"instructions between whose chunks others are": {1000, func(n *node) {
			n.append("s", "["+strings.Join(rules[:1], ",")+"]")
			n.fill("s", 1900, filler)
			n.append("s", "["+strings.Join(rules[1:], ",")+"]")
			n.fill("s", contextChunks+1500, filler)
		}, func(c []model.Turn) bool { return c[0].Role == "system" && isWhole(c[0].Content, "rule%d. ", 120) }},
		"instructions at the beginning of a later epoch": {1000, func(n *node) {
			n.append("s", `{"content":"former"}`)
			n.do(request{method: "DELETE", path: "/v1/sessions/s"})
			n.append("s", "["+strings.Join(rules, ",")+"]")
			n.fill("s", contextChunks+1500, filler)
		}, func(c []model.Turn) bool { return c[0].Role == "system" && isWhole(c[0].Content, "rule%d. ", 120) }},
		"instructions across the boundary of reading": {1000, func(n *node) {
			n.fill("s", 2000, filler)
			n.append("s", "["+strings.Join(rules, ",")+"]")
			n.fill("s", contextChunks+900, filler)
		}, func(c []model.Turn) bool { return c[0].Role == "user" }},
		"answers that stream at once, in a short log": {256 << 10, func(n *node) {
			n.append("s", `{"type":"message","message_id":"u0","role":"user","content":"first"}`)
			n.append("s", "["+strings.Join(both[:20], ",")+"]")
			n.append("s", `{"type":"message","message_id":"u1","role":"user","content":"second"}`)
			n.append("s", "["+strings.Join(both[20:], ",")+"]")
		}, func(c []model.Turn) bool {
			a, b, _ := strings.Cut(c[1].Content, "\n\n")
			return len(c) == 3 && c[0].Content == "first" && isWhole(a, "A%d ", 60) && isWhole(b, "B%d ", 60) && c[2].Content == "second\n\nWhy?"
		}},
		"answers that stream at once, longer than the context": {300, func(n *node) {
			n.append("s", `{"type":"message","message_id":"u0","role":"user","content":"first"}`)
			n.append("s", "["+strings.Join(both[:20], ",")+"]")
			n.append("s", `{"type":"message","message_id":"u1","role":"user","content":"second"}`)
			n.append("s", "["+strings.Join(both[20:], ",")+"]")
		}, func(c []model.Turn) bool { return reflect.DeepEqual(shortened(c), []string{"user: second\n\nWhy?"}) }},
		"answers that stream at once, across the boundary of reading": {256 << 10, func(n *node) {
			n.fill("s", 500, filler)
			n.append("s", "["+strings.Join(many(60, `{"message_id":"A","content":"A%d "},{"type":"message","role":"user","content":"u"},{"message_id":"B","content":"B%d "}`), ",")+"]")
			n.fill("s", contextMargin, filler)
			n.append("s", `[{"type":"message","message_id":"u1","role":"user","content":"second"},{"message_id":"C","content":"answer"}]`)
			n.fill("s", contextChunks-69, filler) // the boundary is a chunk of A: B begins after a user's message
		}, func(c []model.Turn) bool {
			return len(c) == 3 && strings.HasSuffix(c[0].Content, "u\n\nsecond") && c[1].Content == "answer" && c[2].Content == "Why?"
		}},
		"neighbours that are joined": {4096, func(n *node) {
			n.fill("s", 900, `{"type":"message","role":"user","content":"ok "}`)
		}, func(c []model.Turn) bool {
			return len(c) == 1 && len(c[0].Content) <= 4096 && len(c[0].Content) > 4000 && strings.HasSuffix(c[0].Content, "ok \n\nWhy?")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := &spoken{}
			n := serve(t, func(s *setup) { s.model, s.api.ContextMax, s.api.Limits.CallerAppends = m, c.context, 1<<30 })
			c.do(n)
			n.ask("s", "Why?")
			if got := m.last(t, 1); !c.check(got) {
				t.Errorf("%q", shortened(got))
			}
		})
	}
}

// What a client sends is brought into the order that services accept, and nothing of it is lost that has a place there.
func TestConversation_ofAResponseIsInOrder(t *testing.T) {
	t.Parallel()
	asked := make(chan []sentTurn, 1)
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var sent struct{ Messages []sentTurn }
		if err := json.NewDecoder(r.Body).Decode(&sent); err != nil {
			t.Error(err)
		}
		asked <- sent.Messages
		w.Header().Set("Content-Type", typeEvents)
		fmt.Fprint(w, "data: {\"choices\":[{\"delta\":{\"content\":\"fine\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n")
	}))
	t.Cleanup(service.Close)
	cfg := model.DefaultConfig()
	cfg.URL, cfg.Name = service.URL, "m"
	n := serve(t, func(s *setup) { s.model, s.api.ContextMax = model.NewOpenAI(cfg), 2000 })
	call := func(id, arguments string) string {
		return fmt.Sprintf(`{"type":"function_call","call_id":%q,"name":"f","arguments":%q}`, id, arguments)
	}
	result := func(id, output string) string {
		return fmt.Sprintf(`{"type":"function_call_output","call_id":%q,"output":%q}`, id, output)
	}
	user, assistant := func(text string) string { return `{"role":"user","content":"` + text + `"}` }, func(text string) string { return `{"role":"assistant","content":"` + text + `"}` }
	list := func(items ...string) string { return "[" + strings.Join(items, ",") + "]" }
	large := strings.Repeat("z", 1990)
	called := `[{"type":"message","role":"user","content":"q"},{"message_id":"x","type":"tool_calls","data":[{"index":0,"id":"k1","function":{"name":"f","arguments":"{}"}},{"index":1,"id":"k2","function":{"name":"f"}}]},{"message_id":"x","type":"done"},
		{"type":"message","role":"tool","tool_call_id":"k1","content":"R"}`

	for i, c := range []struct{ before, input, want string }{
		{"", list(user("a"), user("b"), assistant("c"), `{"role":"developer","content":"brief"}`, user("d")), "system(be kind|brief) user(a|b) assistant(c) user(d)"},
		{"", list(user("a"), assistant("let me see"), call("1", `{"x":1}`), call("2", ""), result("2", "R2"), result("1", "")), `user(a) assistant(let me see)1{"x":1}2{} tool()1 tool(R2)2`},
		{"", list(user("a"), call("1", "{}"), user("b"), result("1", "R")), `user(a|b) assistant()1{} tool(R)1`},
		{"", list(result("1", "too early"), user("a"), call("1", "{}"), result("1", "R"), result("1", "again"), result("9", "unknown"), user("b")), `user(a|b) assistant()1{} tool(R)1`},
		{"", list(user("a"), call("1", "{}"), result("1", "R"), call("1", `{"y":2}`), result("1", "S"), call("3", "{}"), user("b")), `user(a|b) assistant()1{} tool(R)1 assistant()1{"y":2} tool(S)1`},
		{"", list(user("a"), call("1", `{"x`), result("1", "no JSON"), user("b")), `user(a|b) assistant()1{"invalid":"{\"x"} tool(no JSON)1`},
		// What was asked last is sent whole, with the call that it has the result of.
		{`[{"type":"message","role":"user","content":"old"},{"message_id":"x","content":"reply"},{"type":"message","role":"user","content":"q"},{"message_id":"01990b6c-7d1e-7c3a-8a51-5d0f6e2b9a10","type":"tool_calls","data":[{"index":0,"id":"c","function":{"name":"f","arguments":"{}"}}]}]`,
			list(result("c", large), user("b")), "user(q|b) assistant()c{} tool(" + large + ")c"},
		{`[{"type":"message","role":"user","content":"q"},{"message_id":"01990b6c-7d1e-7c3a-8a51-5d0f6e2b9a10","type":"tool_calls","data":[{"index":0,"function":{"name":"f","arguments":"{}"}}]}]`,
			list(result("call_01990b6c7d1e7c3a8a515d0f6e2b9a10_0", "R")), "user(q) assistant()call_01990b6c7d1e7c3a8a515d0f6e2b9a10_0{} tool(R)call_01990b6c7d1e7c3a8a515d0f6e2b9a10_0"},
		{`[{"type":"message","role":"user","content":"quite old"},{"message_id":"x","content":"` + large + `"},{"type":"message","role":"user","content":"r"},{"message_id":"y","content":"reply"}]`, list(user("b")), "user(r) assistant(reply) user(b)"},
		{`[{"type":"message","role":"user","content":"q"},{"message_id":"x","content":"I call"},{"message_id":"x","type":"tool_calls","data":[{"index":0,"id":"c","function":{"name":"f","arguments":"{\"a"}}]},{"message_id":"x","type":"failed"}]`, list(user("b")), "user(q) assistant(I call) user(b)"},
		{`[{"type":"message","role":"user","content":"q"},{"message_id":"x","type":"failed"}]`, list(user("b")), "user(q|b)"},
		// The result of an earlier call is the end, whatever followed the call: the answer to its first result failed, or did not begin; or it had two calls.
		{called + `,{"message_id":"y","content":"half"},{"message_id":"y","type":"failed"}]`, list(result("k1", "again")), "user(q) assistant(half)k1{} tool(again)k1"},
		{called + `,{"message_id":"y","type":"cancelled"}]`, list(user("b")), "user(q|b) assistant()k1{} tool(R)k1"},
		{called + `,{"message_id":"y","content":"ok"}]`, list(result("k2", "S")), "user(q) assistant(ok)k1{}k2{} tool(R)k1 tool(S)k2"},
		{called + `,{"message_id":"y","content":"` + large + `"},{"type":"message","role":"user","content":"r"},{"message_id":"z","content":"` + large + `"}]`, list(result("k2", "S")), "user(r) assistant(" + large + ")k1{}k2{} tool(R)k1 tool(S)k2"},
	} {
		session, instructions := fmt.Sprint("s", i), ""
		if c.before != "" {
			n.append(session, c.before)
		}
		if i == 0 {
			instructions = `"instructions":"be kind",`
		}
		n.created(t, `{`+instructions+`"conversation":"`+session+`","input":`+c.input+`}`)
		var got []string
		for _, m := range <-asked {
			var one strings.Builder
			fmt.Fprintf(&one, "%s(%s)%s", m.Role, strings.ReplaceAll(m.Content, "\n\n", "|"), m.Call)
			for _, c := range m.Calls {
				one.WriteString(c.ID + c.Function.Arguments)
			}
			got = append(got, one.String())
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%.300s\nis told as %.300q\nand not  %.300q", c.input, strings.Join(got, " "), c.want)
		}
	}
}
