// Package model is what answers questions. It knows nothing of logs or HTTP.
package model

import (
	"context"
	"iter"
)

// Turn is one message of a conversation.
type Turn struct{ Role, Content string }

// Model answers.
type Model interface {
	// Answer says the next message of a conversation piece by piece, as it comes. An
	// error is the last thing that it says; an answer whose context ends stops with the
	// context's error.
	Answer(ctx context.Context, conversation []Turn) iter.Seq2[string, error]
}
