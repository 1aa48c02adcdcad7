package model

import (
	"bytes"
	"cmp"
	"encoding/json"
	"math"
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

// number returns a whole number that is not negative: 1, "1" or 1.0.
func number(value json.RawMessage) (n int, ok bool) {
	f, err := strconv.ParseFloat(strings.TrimSpace(strings.Trim(string(value), `"`)), 64)
	const most = 1 << 31
	if err != nil || f != math.Trunc(f) || !(f >= 0 && f < most) {
		return 0, false
	}
	return int(f), true
}

// means reports whether a value is present and not empty.
func means(value json.RawMessage) bool {
	value = bytes.TrimSpace(value)
	if len(value) == 0 {
		return false
	}
	switch value[0] {
	case '{':
		return len(object(value)) > 0
	case '[':
		return len(list(value)) > 0
	case '"':
		return strings.TrimSpace(text(value)) != ""
	}
	n, err := strconv.ParseFloat(string(value), 64)
	return string(value) != "null" && string(value) != "false" && (err != nil || n != 0)
}

// strict returns a value in a form that every JSON parser accepts: of duplicate names the last one
// counts, and what is no UTF-8 is replaced.
func strict(value json.RawMessage) json.RawMessage {
	if jsontext.Value(value).IsValid() {
		return value
	}
	d := json.NewDecoder(bytes.NewReader(value))
	d.UseNumber() // not rounded
	var v any
	if d.Decode(&v) != nil {
		return json.RawMessage("null")
	}
	value, _ = json.Marshal(v)
	return value
}

// texts reads the content of a stream of deltas.
type texts struct {
	torn    map[string]string // by member: the first half of a character, in its JSON form
	thought strings.Builder   // all reasoning
	calls   []*call           // all tool calls
	last    *call             // the last one of which a piece came
}

// thinking lists the members that may contain reasoning. A service may use another one in each
// event. In one event, the same text in several of them counts once.
var thinking = []string{"reasoning_content", "reasoning", "reasoning_text", "thinking", repeats}

// repeats is the member in which OpenRouter repeats all reasoning, with a signature, after it has
// come elsewhere.
const repeats = "reasoning_details"

// reasoning returns the reasoning of a delta.
func (t *texts) reasoning(delta members) (all []Piece) {
	before := t.thought.String()
	said := map[string]bool{}
	for _, name := range thinking {
		pieces, whole := t.parts(name, delta[name], Piece{Reasoning: true}, 0), ""
		for _, p := range pieces {
			whole += p.Text
		}
		if whole == "" || said[whole] || name == repeats && whole == before {
			continue
		}
		said[whole] = true
		all = append(all, pieces...)
		t.thought.WriteString(whole)
	}
	return all
}

// pieces returns the content of a delta, in display order.
func (t *texts) pieces(delta members) (all []Piece) {
	all = t.reasoning(delta)
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
		for _, member := range []string{"text", "thinking", "summary", "refusal", "content"} {
			if part[member] == nil || member == "content" && !as.Reasoning { // in a text it may be what a tool said
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

// call is a tool call that has begun.
type call struct {
	index    int // ours
	given    int // the service's, or -1
	id, name string
}

// of returns the call to which a piece belongs. alone says that the event has no other piece.
//
// A piece belongs to the call with its index. The index may be a number or the text of one. A piece
// with an index of another shape, or without one, belongs to the call with its id. If it has no id
// either, it begins a call if it has a name; otherwise it belongs to the call at its position in
// the event, or to the last call if it is alone. An index that comes again with a name and another
// id begins another call, and so does an id that comes again with another name: some services give
// every call the same.
func (t *texts) of(piece members, position int, alone bool) *call {
	id, name := text(piece["id"]), text(object(piece["function"])["name"])
	given, ok := number(piece["index"])
	if !ok {
		given = -1
	}
	another := func(c *call) bool {
		if ok {
			return name != "" && id != "" && c.id != "" && id != c.id
		}
		return name != "" && c.name != "" && name != c.name
	}
	var found *call
	for _, c := range t.calls {
		if ok && c.given == given || !ok && id != "" && c.id == id {
			found = c // the latest
		}
	}
	switch {
	case ok, id != "", name != "":
	case alone:
		found = t.last
	case position < len(t.calls):
		found = t.calls[position]
	}
	if found != nil && another(found) {
		found = nil
	}
	if found == nil {
		found = &call{index: given, given: given}
		for _, c := range t.calls {
			if !ok || c.index == given {
				found.index = -1
			}
		}
		if found.index < 0 {
			for _, c := range t.calls {
				found.index = max(found.index, c.index)
			}
			found.index++
		}
		t.calls = append(t.calls, found)
	}
	found.id, found.name = cmp.Or(found.id, id), cmp.Or(found.name, name)
	t.last = found
	return found
}

// toolCalls reads tool calls, or the next pieces of them. Each gets the index by which the pieces
// are joined, and arguments that are text. It has no values that some parsers refuse.
func (t *texts) toolCalls(values []json.RawMessage) json.RawMessage {
	var pieces []members
	for _, value := range values {
		if piece := object(value); piece != nil {
			pieces = append(pieces, piece)
		}
	}
	if pieces == nil {
		return nil
	}
	for i, piece := range pieces {
		c := t.of(piece, i, len(pieces) == 1)
		piece["index"] = json.RawMessage(strconv.Itoa(c.index))
		if text(piece["id"]) != "" { // of each piece another one: the first counts
			piece["id"], _ = json.Marshal(c.id)
		}
		if function := object(piece["function"]); function != nil {
			if arguments, ok := argumentsOf(function); !ok {
				delete(function, "arguments")
			} else if arguments[0] == '"' {
				function["arguments"], _ = json.Marshal(t.join("call "+string(piece["index"]), arguments))
			} else {
				function["arguments"], _ = json.Marshal(string(arguments))
			}
			piece["function"], _ = json.Marshal(function)
		}
		for name, value := range piece {
			piece[name] = strict(value)
		}
	}
	joined, _ := json.Marshal(pieces)
	return joined
}

// argumentsOf returns the arguments of a function: usually a text, and of some services an object.
// null is none.
func argumentsOf(function members) (arguments json.RawMessage, ok bool) {
	arguments = function["arguments"]
	return arguments, len(arguments) > 0 && string(arguments) != "null"
}

// Call is a tool call, or a piece of one. Pieces with the same Index are joined by their Arguments.
type Call struct {
	Index                     json.RawMessage // a number
	ID, Type, Name, Arguments string
}

// Calls parses Piece.ToolCalls, and what producers append in this form. An index may be a number or
// the text of one. In place of one of another shape, or of none, stands the position.
func Calls(calls json.RawMessage) (all []Call) {
	for i, value := range list(calls) {
		call := object(value)
		function := object(call["function"])
		c := Call{call["index"], text(call["id"]), text(call["type"]), text(function["name"]), ""}
		index, ok := number(c.Index)
		if !ok {
			index = i
		}
		c.Index = json.RawMessage(strconv.Itoa(index))
		if arguments, ok := argumentsOf(function); ok {
			if c.Arguments = string(arguments); arguments[0] == '"' {
				c.Arguments = text(arguments)
			}
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
