package model

import (
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Members of an event are looked up by name. A value of an unexpected type counts as missing:
// services add members, and change those that others use.

// members holds the members of an object; nil: the value is not an object.
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

// means reports whether a value is present and not empty.
func means(value json.RawMessage) bool {
	switch string(value) {
	case "", "null", "false", "0", `""`, "{}", "[]":
		return false
	}
	return true
}

// texts reads the content of a stream of deltas.
type texts struct {
	source string            // the member that contains the reasoning
	torn   map[string]string // by member: the first half of a character, in its JSON form
	call   string            // the id of the last tool call without an index
	calls  int               // how many tool calls had none
}

// thinking lists the members that may contain reasoning. Services may send the same text in several
// of them: the first that is not empty counts.
var thinking = []string{"reasoning_content", "reasoning", "reasoning_details"}

// pieces returns the content of a delta, in display order.
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

// parts reads a text, a part, or a list of parts. as is the kind of text, unless a part says
// otherwise.
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

// toolCalls reads tool calls, or the next pieces of them. It adds the indexes that Gemini omits,
// because they are needed to join the pieces. It removes members that are not valid JSON for every
// parser.
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

// Call is a tool call, or a piece of one. Pieces with the same Index are joined by their Arguments.
type Call struct {
	Index                     json.RawMessage
	ID, Type, Name, Arguments string
}

// Calls parses Piece.ToolCalls.
func Calls(calls json.RawMessage) (all []Call) {
	for _, value := range list(calls) {
		call := object(value)
		function := object(call["function"])
		c := Call{call["index"], text(call["id"]), text(call["type"]), text(function["name"]), string(function["arguments"])}
		if strings.HasPrefix(c.Arguments, `"`) { // some services send an object
			c.Arguments = text(function["arguments"])
		}
		all = append(all, c)
	}
	return all
}

// join decodes a JSON text, which begins with the half character that the previous text ended with.
// A half character at its end waits for the next text: half of a surrogate pair, or of a UTF-8
// sequence.
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

// tornAt returns where the half character at the end of a JSON text begins, or the text's length if
// there is none.
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
