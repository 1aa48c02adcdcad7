package api

import (
	"github.com/go-json-experiment/json/jsontext"

	"gapless/store"
)

// said holds the known members of a chunk. Chunks of other programs may have any types, and a member of an unexpected
// type is empty.
type said struct {
	kind, message, role, content string
	reason, detail, finish       string
	toolCall                     string // of an answer of a tool, the call
	complete                     bool
	data                         jsontext.Value
}

func parseSaid(chunk []byte) (s said) {
	store.EachMember(chunk, func(name string, value jsontext.Value) {
		switch name {
		case "type":
			s.kind = store.Text(value)
		case "message_id":
			s.message = store.Text(value)
		case "role":
			s.role = store.Text(value)
		case "content":
			s.content = store.Text(value)
		case "reason":
			s.reason = store.Text(value)
		case "detail":
			s.detail = store.Text(value)
		case "tool_call_id":
			s.toolCall = store.Text(value)
		case "finish_reason":
			s.finish = store.Text(value)
		case "is_complete":
			s.complete = value.Kind() == 't'
		case "data":
			s.data = value.Clone()
		}
	})
	return s
}
