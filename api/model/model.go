// Package model is what answers questions. It knows nothing of logs or HTTP servers.
package model

import (
	"context"
	"encoding/json"
	"iter"
)

// Turn is one message of a conversation.
type Turn struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// The roles of turns.
const (
	RoleUser      = "user"
	RoleAssistant = "assistant"
	RoleSystem    = "system"
)

// Piece is a piece of an answer. All but one of its members are empty in most.
type Piece struct {
	Text      string
	Reasoning bool // Text is what the model thinks aloud
	Refusal   bool // Text is why the model does not answer
	// ToolCalls are what came of calls of tools: an array as the chat-completions API streams it.
	// Each call has its index, by which its arguments are joined.
	ToolCalls json.RawMessage
	// Finish is why the answer ended (stop, length, …), and Usage what it cost, an object as the
	// service sent it. They are in the last piece, if they came.
	Finish string
	Usage  json.RawMessage
}

// Model answers.
type Model interface {
	// Answer says the next message of a conversation piece by piece, as it comes. An
	// error is the last thing that it says, an *Error where others may be told why; an answer
	// whose context ends stops with the context's error.
	Answer(ctx context.Context, conversation []Turn) iter.Seq2[Piece, error]
}

// Error is why a model did not answer, or not to the end, as everybody may know it: it holds
// nothing of what the model's service said.
type Error struct {
	Reason string // stable
	Detail string // for people
	Cause  error  // for the log; nil: there is no more to say
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
	Unauthorized = "model_unauthorized" // the service does not know the key, or forbids its use
	NotFound     = "model_not_found"    // it has no such model, or nothing at this URL
	Rejected     = "model_rejected"     // it does not take the request, or answers with something else than events
	RateLimited  = "model_rate_limited" // it was asked too much
	Unavailable  = "model_unavailable"  // it cannot be reached, or cannot answer now
	Timeout      = "model_timeout"      // it said nothing for too long
	Broken       = "model_broken"       // its answer broke off, is none that could be read, or has too much that is no word
	Empty        = "model_empty"        // it said nothing at all
)

type moreKey struct{}

// With is a context in which a model's service is asked with these members of the request, in place of its own. A model that
// has no service takes no notice of them.
func With(ctx context.Context, members map[string]json.RawMessage) context.Context {
	return context.WithValue(ctx, moreKey{}, members)
}

func more(ctx context.Context) map[string]json.RawMessage {
	members, _ := ctx.Value(moreKey{}).(map[string]json.RawMessage)
	return members
}
