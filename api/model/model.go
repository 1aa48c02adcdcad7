// Package model answers questions. It knows nothing of logs or HTTP servers.
package model

import (
	"context"
	"encoding/json"
	"iter"
)

// Turn is one message of a conversation.
type Turn struct {
	Role       string     `json:"role"`
	Content    string     `json:"content"`
	ToolCalls  []ToolCall `json:"tool_calls,omitempty"`   // of an assistant; their results follow
	ToolCallID string     `json:"tool_call_id,omitempty"` // of role tool: the call whose result this is
}

// ToolCall is a whole call of a tool, in the form of the chat-completions API.
type ToolCall struct {
	ID       string `json:"id"`
	Type     string `json:"type"` // function
	Function struct {
		Name      string `json:"name"`
		Arguments string `json:"arguments"` // valid JSON
	} `json:"function"`
}

// The roles of turns.
const (
	RoleUser      = "user"
	RoleAssistant = "assistant"
	RoleSystem    = "system"
	RoleTool      = "tool"
)

// Piece is a piece of an answer. Usually only one of its members is set.
type Piece struct {
	Text      string
	Reasoning bool // Text is reasoning
	Refusal   bool // Text says why the model refuses to answer
	// ToolCalls is an array of tool calls, in the form that the chat-completions API streams. Each
	// call has an index, and arguments with the same index are joined.
	ToolCalls json.RawMessage
	// Finish is why the answer ended (stop, length, …). Usage is its cost, an object as the service
	// sent it. They are in the last piece, if the service sent them.
	Finish string
	Usage  json.RawMessage
}

// Model answers questions.
type Model interface {
	// Answer yields the next message of a conversation piece by piece, as it comes. An error is the
	// last thing that it yields. The error is an *Error if others may see the reason, or the
	// context's error if the context ended.
	Answer(ctx context.Context, conversation []Turn) iter.Seq2[Piece, error]
}

// Error is why a model did not answer, or not to the end, in a form that everybody may see: it
// contains nothing that the model's service said.
type Error struct {
	Reason string // stable
	Detail string // for people
	Cause  error  // for the log; nil: unknown
}

func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Detail + ": " + e.Cause.Error()
	}
	return e.Detail
}

func (e *Error) Unwrap() error { return e.Cause }

// The reasons of an Error.
const (
	Unauthorized = "model_unauthorized" // the service does not accept the key, or forbids its use
	NotFound     = "model_not_found"    // the service has no such model, or nothing at this URL
	Rejected     = "model_rejected"     // the service does not accept the request, or does not respond with events
	RateLimited  = "model_rate_limited" // too many requests
	Unavailable  = "model_unavailable"  // the service cannot be reached, or cannot answer now
	Timeout      = "model_timeout"      // the service was silent for too long
	Broken       = "model_broken"       // the answer broke off, cannot be read, or is too large without a word
	Empty        = "model_empty"        // the model said nothing at all
)

type moreKey struct{}

// With returns a context whose members replace those of the request to a model's service. A model without a
// service ignores them.
func With(ctx context.Context, members map[string]json.RawMessage) context.Context {
	return context.WithValue(ctx, moreKey{}, members)
}

func more(ctx context.Context) map[string]json.RawMessage {
	members, _ := ctx.Value(moreKey{}).(map[string]json.RawMessage)
	return members
}
