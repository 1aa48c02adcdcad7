package model

import (
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// What is read of an event is looked for name by name, and what has another shape than the one that is
// looked for is as if it were not there: services add members, and change those that others use.

// members is an object; nil: the value is none.
type members map[string]json.RawMessage

func object(value json.RawMessage) (m members) {
	_ = json.Unmarshal(value, &m)
	return m
}

func list(value json.RawMessage) (l []json.RawMessage) {
	_ = json.Unmarshal(value, &l)
	return l
}

func text(value json.RawMessage) (s string) {
	_ = json.Unmarshal(value, &s)
	return s
}

func number(value json.RawMessage) (n int) {
	_ = json.Unmarshal(value, &n)
	return n
}

// means says whether a value says something.
func means(value json.RawMessage) bool {
	switch string(value) {
	case "", "null", "false", "0", `""`, "{}", "[]":
		return false
	}
	return true
}

// texts reads what is said in a stream of deltas.
type texts struct {
	source string            // the member that thinking comes in
	torn   map[string]string // by member: the first half of a character, as it stands in JSON
	call   string            // the id of the last call of a tool that has no index
	calls  int               // how many of those there are
}

// thinking are the members that thinking comes in. Services may send the same in several of them: the
// first that has any counts.
var thinking = []string{"reasoning_content", "reasoning", "reasoning_details"}

// pieces is what a delta says, in the order in which it is shown.
func (t *texts) pieces(delta members) (all []Piece) {
	for _, name := range thinking {
		if t.source == "" || t.source == name {
			if all = t.parts(name, delta[name], Piece{Reasoning: true}, 0); len(all) > 0 {
				t.source = name
				break
			}
		}
	}
	google := object(object(delta["extra_content"])["google"])
	all = append(all, t.parts("content", delta["content"], Piece{Reasoning: string(google["thought"]) == "true"}, 0)...)
	all = append(all, t.parts("refusal", delta["refusal"], Piece{Refusal: true}, 0)...)
	if calls := t.toolCalls(list(delta["tool_calls"])); calls != nil {
		all = append(all, Piece{ToolCalls: calls})
	}
	return all
}

// parts reads what is a text, a part, or a list of parts. as says what kind of text it is, unless a part says
// more.
func (t *texts) parts(name string, value json.RawMessage, as Piece, depth int) (all []Piece) {
	const deepest = 8
	if depth > deepest || len(value) == 0 {
		return nil
	}
	switch value[0] {
	case '"':
		if as.Text = t.join(name, value); as.Text != "" {
			all = append(all, as)
		}
	case '[':
		for _, part := range list(value) {
			all = append(all, t.parts(name, part, as, depth+1)...)
		}
	case '{': // {"type":"text","text":…}, {"type":"thinking","thinking":[…]}, {"type":"reasoning.summary","summary":…}
		part := object(value)
		for _, member := range []string{"text", "thinking", "summary", "refusal"} {
			if part[member] == nil {
				continue
			}
			if as.Refusal = as.Refusal || member == "refusal"; member == "thinking" || text(part["type"]) == "thinking" {
				as.Reasoning, name = true, "thinking"
			}
			return t.parts(name, part[member], as, depth+1)
		}
	}
	return all
}

// toolCalls reads calls of tools, or the next pieces of them. Gemini leaves their indexes out, by which
// pieces are joined. What is no JSON that every reader reads is left out of a call.
func (t *texts) toolCalls(calls []json.RawMessage) json.RawMessage {
	var all []members
	for _, value := range calls {
		call := object(value)
		if call == nil {
			continue
		}
		function := object(call["function"])
		if index := call["index"]; index == nil || strconv.Itoa(number(index)) != string(index) {
			if id := text(call["id"]); t.calls == 0 || id != "" && id != t.call || id == "" && text(function["name"]) != "" {
				t.call = id
				t.calls++
			}
			call["index"] = json.RawMessage(strconv.Itoa(t.calls - 1))
		}
		if arguments := function["arguments"]; len(arguments) > 0 && arguments[0] == '"' {
			function["arguments"], _ = json.Marshal(t.join("call "+string(call["index"]), arguments))
			call["function"], _ = json.Marshal(function)
		}
		for name, value := range call {
			if !jsontext.Value(value).IsValid() {
				delete(call, name)
			}
		}
		all = append(all, call)
	}
	if all == nil {
		return nil
	}
	joined, _ := json.Marshal(all)
	return joined
}

// Call is a call of a tool, or a piece of one: its Arguments are joined by Index.
type Call struct {
	Index                     json.RawMessage
	ID, Type, Name, Arguments string
}

// Calls reads Piece.ToolCalls.
func Calls(calls json.RawMessage) (all []Call) {
	for _, value := range list(calls) {
		call := object(value)
		function := object(call["function"])
		c := Call{call["index"], text(call["id"]), text(call["type"]), text(function["name"]), string(function["arguments"])}
		if strings.HasPrefix(c.Arguments, `"`) { // some services send them as an object
			c.Arguments = text(function["arguments"])
		}
		all = append(all, c)
	}
	return all
}

// join decodes a text of JSON, from the half character on that the one before it ended with. One that this text
// ends with waits for the next: half of a surrogate pair, or of a character in UTF-8.
func (t *texts) join(name string, value json.RawMessage) (s string) {
	inside := t.torn[name] + string(value[1:len(value)-1])
	at := tornAt(inside)
	if t.torn == nil {
		t.torn = map[string]string{}
	}
	if t.torn[name] = inside[at:]; at == len(inside) {
		delete(t.torn, name)
	}
	return text(json.RawMessage(`"` + inside[:at] + `"`))
}

// tornAt is where the half character begins with which a text ends, as it stands in JSON; its length: it ends
// with none.
func tornAt(inside string) int {
	if at := len(inside) - len(`\ud83d`); at >= 0 && inside[at:at+2] == `\u` {
		slashes := at - len(strings.TrimRight(inside[:at], `\`))
		if unit, err := strconv.ParseUint(inside[at+2:], 16, 16); err == nil && 0xD800 <= unit && unit < 0xDC00 && slashes%2 == 0 {
			return at
		}
	}
	for at := len(inside) - 1; at >= max(len(inside)-utf8.UTFMax, 0); at-- {
		if utf8.RuneStart(inside[at]) {
			if !utf8.FullRuneInString(inside[at:]) {
				return at
			}
			break
		}
	}
	return len(inside)
}
