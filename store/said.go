package store

import (
	"encoding/json"

	"github.com/go-json-experiment/json/jsontext"
)

// Said holds the known members of a chunk. In other programs' chunks they may have any types; a member of an unexpected
// type is left empty.
type Said struct {
	Type, MessageID, Role, Content string
	Reason, Detail, FinishReason   string
	ToolCallID                     string // the call, if this is the result of a tool
	Complete, Refusal              bool
	Time                           int64 // in milliseconds
	Data, Usage                    jsontext.Value
}

// ParseSaid parses a chunk or an element of the list.
func ParseSaid(chunk []byte) (s Said) {
	EachMember(chunk, func(name string, value jsontext.Value) {
		switch name {
		case "type":
			s.Type = Text(value)
		case "message_id":
			s.MessageID = Text(value)
		case "role":
			s.Role = Text(value)
		case "content":
			s.Content = Text(value)
		case "reason":
			s.Reason = Text(value)
		case "detail":
			s.Detail = Text(value)
		case "finish_reason":
			s.FinishReason = Text(value)
		case "tool_call_id":
			s.ToolCallID = Text(value)
		case "is_complete":
			s.Complete = value.Kind() == 't'
		case "refusal":
			s.Refusal = value.Kind() == 't'
		case "ts":
			_ = json.Unmarshal(value, &s.Time)
		case "data":
			s.Data = value.Clone()
		case "usage":
			s.Usage = value.Clone()
		}
	})
	return s
}
