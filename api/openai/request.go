// Package openai translates between the OpenAI Responses API and chunks. A response is a message of a log, and a conversation is a
// session. An event's sequence_number depends on the chunks alone, so that every node sends the same. The package keeps no state.
//
// It refuses what it does not support by name (Error), and ignores nothing in a request.
package openai

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"

	"gapless/store"
)

// TypeResponse is the type of the first chunk of a response. Its data is a Begin.
const TypeResponse = "response"

// Begin is the data of a response's first chunk.
type Begin struct {
	Inputs int                        `json:"inputs"` // how many chunks before it are its input
	Alone  bool                       `json:"alone"`  // the session was made for this response
	Echo   map[string]json.RawMessage `json:"echo"`   // what the response repeats from the request
}

// Error says what in a request is wrong or not supported.
type Error struct{ Param, Code, Message string }

func (e *Error) Error() string { return e.Message }

func unsupported(param, detail string) *Error {
	name, _, _ := strings.Cut(param, ":") // param may contain the value
	return &Error{name, "unsupported_parameter", fmt.Sprintf("%s is not supported here%s", param, detail)}
}

func wrong(param, what string) *Error {
	return &Error{param, "invalid_value", fmt.Sprintf("%s must be %s", param, what)}
}

// ID returns the id of the response that is a session's message and begins with chunk number seq.
func ID(session, message string, seq int64) string {
	return "resp_" + strings.ReplaceAll(message, "-", "") + "_" + strconv.FormatInt(seq, 10) + "_" + session
}

// ParseID parses an id that ID made.
func ParseID(id string) (session, message string, seq int64, ok bool) {
	parts := strings.SplitN(id, "_", 4)
	if len(parts) != 4 || parts[0] != "resp" || len(parts[1]) != 32 {
		return "", "", 0, false
	}
	u, err := uuid.Parse(parts[1])
	seq, bad := strconv.ParseInt(parts[2], 10, 64)
	session, message = parts[3], u.String()
	return session, message, seq, err == nil && bad == nil && seq > 0 && ID(session, message, seq) == id
}

// Request is the body of POST /responses.
type Request struct {
	Stream, Background bool
	Conversation       string // a session; empty: none
	Previous           string // a response; empty: none
	Instructions       string
	Input              []Item
	Service            map[string]json.RawMessage // members that the model's service receives next to the messages
	Echo               map[string]json.RawMessage
}

// Item is an item of input.
type Item struct {
	Type, Role, Content     string // Content is a message's text, or the output of a function_call_output
	CallID, Name, Arguments string // function_call, and CallID of function_call_output
}

// passed are the members that the model's service receives: the service's name for each, and what its value must be.
var passed = map[string]struct{ as, kind string }{
	"model": {"model", "text"}, "temperature": {"temperature", "a number"}, "top_p": {"top_p", "a number"},
	"max_output_tokens": {"max_completion_tokens", "a whole number above 0"}, "parallel_tool_calls": {"parallel_tool_calls", "true or false"},
	"user": {"user", "text"}, "safety_identifier": {"safety_identifier", "text"}, "prompt_cache_key": {"prompt_cache_key", "text"}, "service_tier": {"service_tier", "text"},
}

// is reports whether a value is of a kind of passed.
func is(kind string, value jsontext.Value) bool {
	switch kind {
	case "text":
		return value.Kind() == '"' && len(value) > len(`""`)
	case "a number":
		return value.Kind() == '0'
	case "a whole number above 0":
		n, err := strconv.ParseInt(string(value), 10, 64)
		return err == nil && n > 0
	}
	return value.Kind() == 't' || value.Kind() == 'f'
}

// Parse parses a request. Its errors are of type *Error.
func Parse(body []byte) (*Request, error) {
	var members map[string]json.RawMessage
	// The standard library would accept duplicate members, and replace invalid UTF-8.
	if !jsontext.Value(body).IsValid() || json.Unmarshal(body, &members) != nil || members == nil {
		return nil, &Error{"", "invalid_json", "the body must be one JSON object in UTF-8 without duplicate members"}
	}
	r := &Request{Service: map[string]json.RawMessage{}, Echo: map[string]json.RawMessage{}}
	names := make([]string, 0, len(members))
	for name := range members {
		names = append(names, name)
	}
	slices.Sort(names) // so that the same request gets the same error
	for _, name := range names {
		value := members[name]
		if string(value) == "null" {
			continue
		}
		if err := r.member(name, value); err != nil {
			return nil, err
		}
	}
	if r.Conversation != "" && r.Previous != "" {
		return nil, &Error{"previous_response_id", "invalid_value", "previous_response_id and conversation exclude each other: leave one of them out"}
	}
	if len(r.Input) == 0 {
		return nil, &Error{"input", "missing_required_parameter", "input is missing: text, or an array of items"}
	}
	continues := r.Conversation != "" || r.Previous != ""
	if !slices.ContainsFunc(r.Input, func(i Item) bool { return i.Role == "user" || i.Type == "function_call_output" && continues }) {
		return nil, wrong("input", "a user's message, or in a conversation the output of a function_call")
	}
	return r, nil
}

func (r *Request) member(name string, value json.RawMessage) error {
	var text string
	isText := json.Unmarshal(value, &text) == nil
	object := map[string]json.RawMessage{}
	isObject := json.Unmarshal(value, &object) == nil
	if to, ok := passed[name]; ok {
		if !is(to.kind, jsontext.Value(value)) {
			return wrong(name, to.kind)
		}
		r.Service[to.as], r.Echo[name] = value, value
		return nil
	}
	switch name {
	case "input":
		return r.input(value)
	case "instructions":
		if r.Instructions = text; !isText {
			return wrong(name, "text")
		}
		r.Echo[name] = value
	case "stream", "background", "store":
		var yes bool
		if json.Unmarshal(value, &yes) != nil {
			return wrong(name, "true or false")
		}
		switch {
		case name == "stream":
			r.Stream = yes
		case name == "background":
			r.Background, r.Echo[name] = yes, value
		case !yes:
			return unsupported("store: false", ": every response is in a log")
		}
	case "conversation":
		if isObject {
			_ = json.Unmarshal(object["id"], &text)
		}
		if r.Conversation = text; text == "" {
			return wrong(name, "a session's id, or an object with it as id")
		}
	case "previous_response_id":
		if r.Previous = text; !isText {
			return wrong(name, "a response's id")
		}
		r.Echo[name] = value
	case "metadata":
		if !isObject {
			return wrong(name, "an object")
		}
		r.Echo[name] = value
	case "tools":
		return r.tools(value)
	case "tool_choice":
		if !isText && !isObject {
			return wrong(name, "text, or an object")
		}
		r.Echo[name] = value
		if isObject {
			if string(object["type"]) != `"function"` || object["name"] == nil {
				return unsupported(name, " but as text, or for a function")
			}
			value, _ = json.Marshal(map[string]any{"type": "function", "function": map[string]any{"name": object["name"]}})
		}
		r.Service[name] = value
	case "text":
		if !isObject {
			return wrong(name, "an object")
		}
		return r.format(value, object)
	case "reasoning":
		if !isObject {
			return wrong(name, "an object")
		}
		for member, v := range object {
			if string(v) == "null" {
				continue
			} else if member != "effort" {
				return unsupported("reasoning."+member, "")
			}
			r.Service["reasoning_effort"] = v
		}
		r.Echo[name] = value
	case "include":
		if string(value) != "[]" {
			return unsupported(name, "")
		}
	case "truncation":
		if text != "disabled" {
			return unsupported("truncation: "+string(value), ": only disabled is")
		}
	case "stream_options":
		if v, ok := object["include_obfuscation"]; !isObject || len(object) > 1 || ok && string(v) != "false" {
			return unsupported(name, " but as {\"include_obfuscation\": false}")
		}
	case "top_logprobs":
		if string(value) != "0" {
			return unsupported(name, "")
		}
	default:
		return unsupported(name, "")
	}
	return nil
}

// tools passes functions on, in the form of chat completions.
func (r *Request) tools(value json.RawMessage) error {
	var tools []map[string]json.RawMessage
	if json.Unmarshal(value, &tools) != nil {
		return wrong("tools", "an array of objects")
	}
	all := []any{}
	for i, tool := range tools {
		var kind string
		if _ = json.Unmarshal(tool["type"], &kind); kind != "function" {
			return unsupported(fmt.Sprintf("tools[%d].type: %s", i, tool["type"]), ": only function is")
		}
		function := map[string]json.RawMessage{}
		for name, v := range tool {
			switch name {
			case "type":
			case "name", "description", "parameters", "strict":
				if string(v) != "null" {
					function[name] = v
				}
			default:
				return unsupported(fmt.Sprintf("tools[%d].%s", i, name), "")
			}
		}
		if !is("text", jsontext.Value(function["name"])) {
			return wrong(fmt.Sprintf("tools[%d].name", i), "text")
		}
		all = append(all, map[string]any{"type": "function", "function": function})
	}
	r.Echo["tools"] = value
	if len(all) > 0 {
		r.Service["tools"], _ = json.Marshal(all)
	}
	return nil
}

// format passes text.format on, in the form of chat completions.
func (r *Request) format(value json.RawMessage, text map[string]json.RawMessage) error {
	for name, v := range text {
		if string(v) == "null" {
			continue
		}
		var format map[string]json.RawMessage
		if name != "format" || json.Unmarshal(v, &format) != nil {
			return unsupported("text."+name, "")
		}
		switch string(format["type"]) {
		case `"text"`:
		case `"json_object"`:
			r.Service["response_format"] = v
		case `"json_schema"`:
			delete(format, "type")
			r.Service["response_format"], _ = json.Marshal(map[string]any{"type": "json_schema", "json_schema": format})
		default:
			return unsupported("text.format.type", " with this value")
		}
	}
	r.Echo["text"] = value
	return nil
}

func (r *Request) input(value json.RawMessage) error {
	if bytes.HasPrefix(value, []byte{'"'}) {
		text := ""
		_ = json.Unmarshal(value, &text)
		r.Input = []Item{{Type: "message", Role: "user", Content: text}}
		return notBlank(text, "input")
	}
	var items []map[string]json.RawMessage
	if json.Unmarshal(value, &items) != nil {
		return wrong("input", "text, or an array of items")
	}
	for i, members := range items {
		item, err := readItem(fmt.Sprintf("input[%d]", i), members)
		if err != nil {
			return err
		}
		if item.Type != "reasoning" { // a model's reasoning is not sent along
			r.Input = append(r.Input, item)
		}
	}
	return nil
}

func notBlank(text, param string) error {
	if strings.TrimSpace(text) == "" {
		return wrong(param, "text that is not blank")
	}
	return nil
}

func readItem(param string, members map[string]json.RawMessage) (item Item, err error) {
	item.Type = "message"
	for name, to := range map[string]*string{"type": &item.Type, "role": &item.Role, "call_id": &item.CallID, "name": &item.Name, "arguments": &item.Arguments} {
		if v, ok := members[name]; ok && string(v) != "null" && json.Unmarshal(v, to) != nil {
			return item, wrong(param+"."+name, "text")
		}
	}
	switch item.Type {
	case "message":
		if !slices.Contains([]string{"user", "assistant", "system", "developer"}, item.Role) {
			return item, wrong(param+".role", "user, assistant, system or developer")
		}
		if item.Content, err = readText(param+".content", members["content"]); err == nil && item.Role == "user" {
			err = notBlank(item.Content, param+".content")
		}
	case "function_call":
		if item.CallID == "" || item.Name == "" {
			return item, wrong(param, "a function_call with call_id and name")
		}
	case "function_call_output":
		if item.CallID == "" {
			return item, wrong(param+".call_id", "text")
		}
		item.Content, err = readText(param+".output", members["output"])
	case "reasoning":
	default:
		return item, unsupported(param+".type: "+item.Type, "")
	}
	return item, err
}

// readText reads text, or parts that are text.
func readText(param string, value json.RawMessage) (text string, err error) {
	if json.Unmarshal(value, &text) == nil && value != nil {
		return text, nil
	}
	var parts []struct{ Type, Text, Refusal string }
	if json.Unmarshal(value, &parts) != nil || value == nil {
		return "", wrong(param, "text, or an array of parts")
	}
	for i, p := range parts {
		if p.Type != "input_text" && p.Type != "output_text" && p.Type != "refusal" {
			return "", unsupported(fmt.Sprintf("%s[%d].type: %s", param, i, p.Type), ": only text is")
		}
		text += p.Text + p.Refusal
	}
	return text, nil
}

// Chunks returns the chunks that a request appends: its input, and the beginning of the response.
func (r *Request) Chunks(reply string, alone bool) (all []store.Chunk, err error) {
	for _, item := range r.Input {
		id, err := uuid.NewV7()
		if err != nil {
			return nil, err
		}
		c := store.NewChunk(store.TypeMessage, id.String(), item.Role, item.Content)
		switch item.Type {
		case "function_call":
			data, _ := json.Marshal([]any{map[string]any{"index": 0, "id": item.CallID, "type": "function", "function": map[string]any{"name": item.Name, "arguments": item.Arguments}}})
			if c, err = store.NewChunk(store.TypeMessage, id.String(), "assistant", "").WithJSON("data", data); err != nil {
				return nil, err
			}
		case "function_call_output":
			c = store.NewChunk(store.TypeMessage, id.String(), "tool", item.Content).With("tool_call_id", item.CallID)
		}
		all = append(all, c)
	}
	data, err := json.Marshal(Begin{len(all), alone, r.Echo})
	if err != nil {
		return nil, err
	}
	c, err := store.NewChunk(TypeResponse, reply, "assistant", "").WithJSON("data", data)
	return append(all, c), err
}
