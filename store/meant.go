package store

import (
	"fmt"
	"slices"
	"strings"

	"github.com/agext/levenshtein"
)

// A chunk of type delta, reasoning or message that says nothing is an empty line in every reader. Nearly always its
// sender used another name for a member, so the error suggests the right one.

// saying contains the members by which a chunk says something.
var saying = map[string]bool{
	"content": true, "data": true, "event": true, "raw": true, "is_complete": true,
	"reason": true, "detail": true, "finish_reason": true, "usage": true, "refusal": true,
}

// otherNames maps other APIs' names for a member, in lower case and without separators, to ours.
var otherNames = map[string]string{
	"text": "content", "txt": "content", "delta": "content", "token": "content", "tokens": "content", "message": "content", "msg": "content", "body": "content",
	"value": "content", "word": "content", "words": "content", "chunk": "content", "answer": "content", "response": "content", "output": "content",
	"outputtext": "content", "completion": "content", "generatedtext": "content", "string": "content", "parts": "content",
	"id": "message_id", "mid": "message_id", "msgid": "message_id", "messageid": "message_id", "messagekey": "message_id",
	"payload": "data", "json": "data", "metadata": "data", "meta": "data", "args": "data", "arguments": "data",
	"kind": "type", "chunktype": "type", "sender": "role", "author": "role", "from": "role", "speaker": "role",
	"complete": "is_complete", "iscomplete": "is_complete", "final": "is_complete", "isfinal": "is_complete", "finished": "is_complete", "done": "is_complete",
	"reasoningcontent": "content", "thinking": "content", "thought": "content",
}

// nothingSaid returns the error for a chunk of type kind whose members, all unknown or none, say nothing.
func nothingSaid(kind string, unknown []string) *ChunkError {
	e := &ChunkError{Code: "invalid_chunk", Detail: fmt.Sprintf(`a chunk of type %q needs "content" or "data"`, kind)}
	if len(unknown) == 0 {
		e.Detail += ": give it one of them"
		return e
	}
	e.Member = "/" + pointer(unknown[0])
	if slices.Contains(unknown, "choices") {
		e.Detail += ": post a model's stream as it is, with Content-Type text/event-stream"
		return e
	}
	var hints []string
	for _, name := range unknown {
		meant := meantBy(name)
		if meant == "" {
			continue
		}
		if len(hints) == 0 || meant == "content" {
			e.Member = "/" + pointer(name)
		}
		hints = append(hints, fmt.Sprintf("%q instead of %q", meant, brief(name)))
	}
	if len(hints) == 0 {
		e.Detail += fmt.Sprintf(`: put %q into "data", or give the chunk a "type" of its own`, brief(unknown[0]))
		return e
	}
	e.Detail += ": did you mean " + strings.Join(hints, ", ") + "?"
	return e
}

// meantBy returns the member that name probably means, or an empty string if it cannot tell.
func meantBy(name string) string {
	if len(name) > 32 {
		return ""
	}
	plain := strings.NewReplacer("_", "", "-", "", " ", "", ".", "").Replace(strings.ToLower(name))
	if meant := otherNames[plain]; meant != "" {
		return meant
	}
	for _, member := range []string{"content", "message_id", "data", "role", "type", "event", "raw", "is_complete"} {
		if written := strings.ReplaceAll(member, "_", ""); plain == written || len(written) > 4 && levenshtein.Distance(plain, written, nil) <= 2 {
			return member
		}
	}
	return ""
}

// brief shortens a name for an error.
func brief(name string) string {
	const most = 40
	if len(name) > most {
		return strings.ToValidUTF8(name[:most], "") + "…"
	}
	return name
}

// pointer returns a name as a part of a JSON pointer (RFC 6901).
func pointer(name string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(brief(name))
}
