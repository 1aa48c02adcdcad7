package openai

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"gapless/api/model"
	"gapless/sse"
	"gapless/store"
)

// mostText limits what a fold keeps of a response, in bytes. -model-answer-max limits a model's answer, but others may
// append to the message, too.
const mostText = 4 << 20

// freeText is how many bytes a fold keeps without reserving memory. After that it reserves growth bytes at a time.
const freeText, growth = 16 << 10, 64 << 10

// Fold makes a response, and its events, from the chunks of a log. It starts at the response's first chunk.
type Fold struct {
	session, message string
	seq              int64
	// After leaves out the events up to this number. The chunks up to Known contain all those events.
	After, Known int64
	// Grow, if not nil, reserves memory for text. If it returns false, the fold stops, and is not Over.
	Grow func(bytes int) bool

	number int64 // of the next event
	begun  bool
	begin  Begin
	at     int64 // when it began, in milliseconds
	status string
	fault  map[string]any // error
	why    map[string]any // incomplete_details
	usage  any
	items  []*item
	open   *item // the item to which text is added
	size   int   // of the text it keeps, in bytes
	taken  int   // the memory reserved for it, in bytes
}

// NewFold returns a fold of the response that ID names with the same arguments. By default it makes every event.
func NewFold(session, message string, seq int64) *Fold {
	return &Fold{session: session, message: message, seq: seq, After: -1, status: "in_progress"}
}

// Quiet makes the fold produce no events, for use with Response only. It returns f.
func (f *Fold) Quiet() *Fold { f.After = math.MaxInt64; return f }

// Begun returns how the response began, and reports whether it has.
func (f *Fold) Begun() (Begin, bool) { return f.begin, f.begun }

// Over reports whether the response has ended.
func (f *Fold) Over() bool { return f.status != "in_progress" }

// item is an item of output.
type item struct {
	kind                      string // text, refusal, reasoning, call
	id, callID, name, callKey string
	index                     int
	text                      []byte
	over                      bool
}

// object returns the item in its current state.
func (i *item) object(status string, empty bool) map[string]any {
	text := string(i.text)
	if i.over {
		status = "completed"
	}
	if i.kind == "call" {
		return map[string]any{"type": "function_call", "id": i.id, "call_id": i.callID, "name": i.name, "arguments": text, "status": status}
	}
	content := []any{}
	if !empty {
		content = append(content, i.part(text))
	}
	if i.kind == "reasoning" {
		return map[string]any{"type": "reasoning", "id": i.id, "summary": []any{}, "content": content, "status": status}
	}
	return map[string]any{"type": "message", "id": i.id, "role": "assistant", "content": content, "status": status}
}

// part returns the item's content.
func (i *item) part(text string) map[string]any {
	switch i.kind {
	case "refusal":
		return map[string]any{"type": "refusal", "refusal": text}
	case "reasoning":
		return map[string]any{"type": "reasoning_text", "text": text}
	}
	return map[string]any{"type": "output_text", "text": text, "annotations": []any{}, "logprobs": []any{}}
}

// names are the prefixes of the names of the events for an item's text.
var names = map[string]string{"text": "response.output_text", "refusal": "response.refusal", "reasoning": "response.reasoning_text", "call": "response.function_call_arguments"}

// Events is an sse.Ask.Fold.
func (f *Fold) Events(b, events []byte, ended bool) (out []byte, over bool) {
	for seq, chunk := range sse.Chunks(events) {
		if b, over = f.Chunk(b, seq, chunk); over {
			return b, true
		}
	}
	if ended {
		return f.fail(b, "the conversation was ended before the response was"), true
	}
	return b, false
}

// Chunk appends the events that a chunk causes. over means that nothing more follows.
func (f *Fold) Chunk(b []byte, seq int64, chunk []byte) (out []byte, over bool) {
	if f.Known > 0 && seq > f.Known && f.After >= f.number && f.After != math.MaxInt64 {
		return f.lost(b), true
	}
	if seq < f.seq || f.begun && !strings.Contains(string(chunk), f.message) {
		return b, false
	}
	s := store.ParseSaid(chunk)
	if !f.begun {
		if s.Type != TypeResponse || s.MessageID != f.message || seq != f.seq || json.Unmarshal(s.Data, &f.begin) != nil {
			return f.lost(b), true
		}
		f.begun, f.at = true, s.Time
		b = f.emit(b, "response.created", map[string]any{"response": f.Response()})
		return f.emit(b, "response.in_progress", map[string]any{"response": f.Response()}), false
	}
	if s.MessageID != f.message {
		return b, false
	}
	if f.size += len(s.Content) + len(s.Data); f.size > mostText {
		return f.fail(b, fmt.Sprintf("the response is larger than %d bytes", mostText)), true
	}
	for ; f.Grow != nil && f.size > f.taken+freeText; f.taken += growth {
		if !f.Grow(growth) {
			return b, true
		}
	}
	switch {
	case s.Content == "":
	case s.Type == store.TypeReasoning:
		b = f.say(b, "reasoning", s.Content)
	case s.Refusal:
		b = f.say(b, "refusal", s.Content)
	default:
		b = f.say(b, "text", s.Content)
	}
	if s.Type == "tool_calls" {
		b = f.calls(b, s.Data)
	}
	switch {
	case s.Type == store.TypeFailed:
		return f.fail(b, cmp.Or(s.Detail, s.Reason, "the answer failed")), true
	case s.Type == store.TypeCancelled:
		f.status = "cancelled"
		return f.end(b, "response.incomplete"), true // there is no event for cancelled
	case s.Type == store.TypeDone || s.Complete:
		for _, i := range f.items {
			b = f.close(b, i)
		}
		f.usage = usage(s.Usage)
		f.status = "completed"
		if reason := map[string]string{"length": "max_output_tokens", "content_filter": "content_filter"}[s.FinishReason]; reason != "" {
			f.status, f.why = "incomplete", map[string]any{"reason": reason}
		}
		return f.end(b, "response."+f.status), true
	}
	return b, false
}

// say adds text to the open item of this kind, or to a new one.
func (f *Fold) say(b []byte, kind, text string) []byte {
	if f.open == nil || f.open.kind != kind {
		b = f.add(f.close(b, f.open), &item{kind: kind})
		f.open = f.items[len(f.items)-1]
	}
	return f.delta(b, f.open, text)
}

// calls adds pieces of tool calls. Pieces are joined by index, and by the id that comes first.
func (f *Fold) calls(b []byte, data jsontext.Value) []byte {
	pieces := model.Calls(json.RawMessage(data))
	if len(pieces) == 0 {
		return b
	}
	b = f.close(b, f.open)
	f.open = nil
	for _, p := range pieces {
		var of *item
		for _, i := range f.items {
			if i.kind == "call" && i.callKey == string(p.Index) && (p.ID == "" || i.callID == p.ID) {
				of = i
			}
		}
		if of == nil {
			of = &item{kind: "call", callID: p.ID, name: p.Name, callKey: string(p.Index)}
			if of.callID == "" {
				of.callID = CallPrefix(f.message) + strconv.Itoa(len(f.items))
			}
			b = f.add(b, of)
		}
		if p.Arguments != "" {
			b = f.delta(b, of, p.Arguments)
		}
	}
	return b
}

// CallPrefix is what the ids of a message's calls begin with that the service gave no id.
func CallPrefix(message string) string { return "call_" + strings.ReplaceAll(message, "-", "") + "_" }

func (f *Fold) hex() string { return strings.ReplaceAll(f.message, "-", "") }

func (f *Fold) add(b []byte, i *item) []byte {
	i.index = len(f.items)
	prefix := map[string]string{"call": "fc", "reasoning": "rs"}[i.kind]
	i.id = fmt.Sprintf("%s_%s_%d", cmp.Or(prefix, "msg"), f.hex(), i.index)
	f.items = append(f.items, i)
	b = f.emit(b, "response.output_item.added", map[string]any{"output_index": i.index, "item": i.object("in_progress", true)})
	if i.kind == "call" {
		return b
	}
	return f.of(b, "response.content_part.added", i, map[string]any{"part": i.part("")})
}

func (f *Fold) delta(b []byte, i *item, text string) []byte {
	i.text = append(i.text, text...)
	m := map[string]any{"delta": text}
	if i.kind == "text" {
		m["logprobs"] = []any{}
	}
	return f.of(b, names[i.kind]+".delta", i, m)
}

// close emits the events that say that an item is complete.
func (f *Fold) close(b []byte, i *item) []byte {
	if i == nil || i.over {
		return b
	}
	i.over = true
	text := string(i.text)
	switch m := map[string]any{"text": text}; i.kind {
	case "call":
		b = f.of(b, names["call"]+".done", i, map[string]any{"arguments": text, "name": i.name})
	case "refusal":
		b = f.of(b, names["refusal"]+".done", i, map[string]any{"refusal": text})
	case "text":
		m["logprobs"] = []any{}
		fallthrough
	default:
		b = f.of(b, names[i.kind]+".done", i, m)
	}
	if i.kind != "call" {
		b = f.of(b, "response.content_part.done", i, map[string]any{"part": i.part(text)})
	}
	return f.emit(b, "response.output_item.done", map[string]any{"output_index": i.index, "item": i.object("completed", false)})
}

// of emits an event of an item.
func (f *Fold) of(b []byte, name string, i *item, m map[string]any) []byte {
	m["item_id"], m["output_index"] = i.id, i.index
	if i.kind != "call" {
		m["content_index"] = 0
	}
	return f.emit(b, name, m)
}

func (f *Fold) emit(b []byte, name string, m map[string]any) []byte {
	number := f.number
	if f.number++; number <= f.After {
		return b
	}
	m["type"], m["sequence_number"] = name, number
	text, err := json.Marshal(m)
	if err != nil { // a foreign producer may accept JSON that this library refuses
		text, _ = json.Marshal(map[string]any{"type": "error", "sequence_number": number, "code": "server_error", "message": "the response cannot be read", "param": nil})
	}
	return append(append(append(append(append(b, "event: "...), name...), "\ndata: "...), text...), "\n\n"...)
}

func (f *Fold) fail(b []byte, message string) []byte {
	f.status, f.fault = "failed", map[string]any{"code": "server_error", "message": message}
	return f.end(b, "response.failed")
}

func (f *Fold) end(b []byte, name string) []byte {
	b = f.emit(b, name, map[string]any{"response": f.Response()})
	if f.After >= f.number && f.After != math.MaxInt64 {
		return f.lost(b)
	}
	return b
}

// lost tells a client that it has events which Redis has lost, or that the response no longer exists.
func (f *Fold) lost(b []byte) []byte {
	f.status = cmp.Or(map[string]string{"in_progress": "failed"}[f.status], f.status)
	f.number = max(f.number, f.After+1)
	if f.After == math.MaxInt64 {
		return b
	}
	return f.emit(b, "error", map[string]any{"code": "server_error", "param": nil, "message": "a part of the response was lost: retrieve it again from its start"})
}

// Response returns the response object as of the chunks so far.
func (f *Fold) Response() map[string]any {
	output := []any{}
	for _, i := range f.items {
		status := "in_progress"
		if f.Over() {
			status = "incomplete"
		}
		output = append(output, i.object(status, false))
	}
	r := map[string]any{
		"background": false, "instructions": nil, "max_output_tokens": nil, "metadata": map[string]any{}, "model": "", "parallel_tool_calls": true,
		"previous_response_id": nil, "reasoning": map[string]any{"effort": nil, "summary": nil}, "service_tier": "default", "temperature": nil, "text": map[string]any{"format": map[string]any{"type": "text"}},
		"tool_choice": "auto", "tools": []any{}, "top_p": nil,
	}
	for name, value := range f.begin.Echo {
		r[name] = value
	}
	r["id"], r["object"], r["created_at"], r["status"] = ID(f.session, f.message, f.seq), "response", f.at/1000, f.status
	r["conversation"], r["store"], r["truncation"] = map[string]any{"id": f.session}, true, "disabled"
	r["output"], r["usage"], r["error"], r["incomplete_details"] = output, f.usage, nil, nil
	if f.fault != nil {
		r["error"] = f.fault
	}
	if f.why != nil {
		r["incomplete_details"] = f.why
	}
	return r
}

// usage converts what an answer cost to the form of the Responses API.
func usage(value jsontext.Value) any {
	var u struct {
		Prompt     int `json:"prompt_tokens"`
		Completion int `json:"completion_tokens"`
		Total      int `json:"total_tokens"`
		In         struct {
			Cached int `json:"cached_tokens"`
		} `json:"prompt_tokens_details"`
		Out struct {
			Reasoning int `json:"reasoning_tokens"`
		} `json:"completion_tokens_details"`
	}
	if value == nil || json.Unmarshal(value, &u) != nil {
		return nil
	}
	return map[string]any{"input_tokens": u.Prompt, "input_tokens_details": map[string]any{"cached_tokens": u.In.Cached}, "output_tokens": u.Completion,
		"output_tokens_details": map[string]any{"reasoning_tokens": u.Out.Reasoning}, "total_tokens": u.Total}
}

// InputItem returns the item of input that a chunk contains, or nil if it contains none.
func InputItem(chunk []byte) map[string]any {
	var c struct {
		Type, Role, Content string
		Message             string `json:"message_id"`
		Call                string `json:"tool_call_id"`
		Data                []struct {
			ID       string
			Function struct{ Name, Arguments string }
		}
	}
	if json.Unmarshal(chunk, &c) != nil {
		return nil
	}
	id := strings.ReplaceAll(c.Message, "-", "")
	switch {
	case len(c.Data) > 0:
		return map[string]any{"type": "function_call", "id": "fc_" + id, "call_id": c.Data[0].ID, "name": c.Data[0].Function.Name, "arguments": c.Data[0].Function.Arguments, "status": "completed"}
	case c.Role == "tool":
		return map[string]any{"type": "function_call_output", "id": "fco_" + id, "call_id": c.Call, "output": c.Content, "status": "completed"}
	case c.Type == store.TypeMessage:
		kind := "input_text"
		part := map[string]any{"type": kind, "text": c.Content}
		if c.Role == "assistant" {
			part = map[string]any{"type": "output_text", "text": c.Content, "annotations": []any{}}
		}
		return map[string]any{"type": "message", "id": "msg_" + id, "role": c.Role, "status": "completed", "content": []any{part}}
	}
	return nil
}
