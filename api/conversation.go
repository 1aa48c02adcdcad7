package api

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"gapless/api/model"
	"gapless/store"
)

const (
	// contextChunks is how many chunks of the log are looked at for a conversation, the newest
	// ones. 20,000 words, a piece each, are about 3 MB, and 20 ms of Redis at each question.
	contextChunks = 20_000
	contextPage   = 1 << 20 // bytes that are read at once
	// contextRead is after how many bytes of chunks no more are looked at: their texts may be a small part of them.
	contextRead = 16 << 20
	// contextFirst is how many of its first chunks are looked at for instructions, where the log is longer.
	contextFirst = 100
	// instructionsMost bounds instructions, in bytes: they are never left out.
	instructionsMost = 1 << 20
)

// conversation is what was said in a log before chunk number before, and then the question, as also a strict
// service takes it: many refuse, and some models' templates do, what is not in turn.
//
//   - Instructions come first, in one turn. They are never left out.
//   - Then user and assistant take turns, from a user's turn to the question. Neighbours of one role, as an answer
//     leaves them that was stopped before its first word, become one turn.
//   - No turn is blank.
//   - Messages are in the order in which they began, each as far as it got. Of them the newest are sent that fit into
//     Config.ContextMax bytes, each whole.
func (a *API) conversation(ctx context.Context, session string, before int64, question string) ([]model.Turn, error) {
	c := conversation{most: a.cfg.ContextMax, of: map[string]*turn{}}
	all, torn, from, err := a.saidBefore(ctx, session, before)
	if err != nil {
		return nil, err
	}
	if from > 1 {
		p, err := a.readPatiently(ctx, session, 1, contextFirst)
		if err != nil {
			return nil, err
		}
		for i, element := range p.Elements {
			if s := parseSaid([]byte(element)); p.From+int64(i) < from && roleOf(s) == model.RoleSystem {
				c.take(s, false)
			}
		}
		c.current = nil
	}
	for i, s := range all {
		c.take(s, i == torn)
	}
	if c.instructed > instructionsMost {
		return nil, &model.Error{Reason: contextTooLarge, Detail: fmt.Sprintf("the instructions (roles system and developer) in the log are larger than %d bytes: shorten them, or go on in another session", instructionsMost)}
	}
	return c.turns(question), nil
}

// saidBefore reads a log backwards from a chunk: what all chunks say until there is as much as is sent along, and before that
// what instructions say. from is the first chunk that was looked at. torn is the index of a chunk whose message may have begun
// before what was read, or -1.
func (a *API) saidBefore(ctx context.Context, session string, before int64) (all []said, torn int, from int64, err error) {
	parts, whole := [][]said(nil), 0 // whole: so many parts have all chunks
	oldest, former := before, int64(0)
	lowest := max(before-contextChunks, 1)
	from = before
	size, read := 0, 0
	for step := int64(64); from > lowest && read < contextRead; {
		full := size >= a.cfg.ContextMax
		var part []said
		begin, first := max(from-step, lowest), from
		for at := begin; at < from; {
			p, err := a.readPatiently(ctx, session, at, int(from-at))
			if err != nil {
				return nil, -1, 0, err
			}
			if len(p.Elements) == 0 || p.From >= from {
				break // it was trimmed, or is another log by now
			}
			if at == begin {
				first, former = p.From, p.Former
			}
			for _, element := range p.Elements[:min(int64(len(p.Elements)), from-p.From)] {
				s := parseSaid([]byte(element))
				if s.kind != typeToolCalls && s.kind != store.TypeMessage {
					s.data = nil // it is not sent along
				}
				read += len(element)
				if role := roleOf(s); role != model.RoleSystem && role != "" {
					size += len(s.content)
				}
				if !full || roleOf(s) == model.RoleSystem {
					part = append(part, s)
				} else if n := len(part); n == 0 || part[n-1].kind != store.TypeDone {
					part = append(part, said{kind: store.TypeDone}) // what was on either side of it are no neighbours
				}
			}
			at = p.Next()
		}
		parts = append(parts, part)
		step = min(2*step, 4096, max(int64(contextRead-read)*(before-begin)/int64(read+1), 16)) // as many as are likely to fit
		if from = begin; !full {
			whole, oldest = len(parts), first
		}
		if first > begin {
			break // the log begins there
		}
	}
	torn = -1
	for i, part := range slices.Backward(parts) {
		// One that is not known from its first chunk is not known: its beginning may be gone. What an epoch began with has
		// numbers after those of the former one.
		if i == whole-1 && oldest-1 > former {
			torn = len(all)
		}
		all = append(all, part...)
	}
	return all, torn, from, nil
}

// readPatiently reads a page, again while Redis is away: who asks waits anyway.
func (a *API) readPatiently(ctx context.Context, session string, from int64, count int) (store.Page, error) {
	for begun, pause := time.Now(), 20*time.Millisecond; ; pause = min(2*pause, time.Second) {
		p, err := a.logs.Read(ctx, session, from, contextPage, count)
		if err == nil || !store.Away(err) || time.Since(begun) > answerPatience {
			return p, err
		}
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return p, ctx.Err()
		}
	}
}

// conversation collects turns. Memory is bounded by most, by instructionsMost, and by two chunks.
type conversation struct {
	most, size   int
	instructed   int              // bytes of instructions
	instructions []*turn          // all of them,
	all          []*turn          // and of the others those that are kept; oldest first
	of           map[string]*turn // by message; nil: it is not kept
	current      *turn            // of the last chunk, if that had no message_id
}

type turn struct {
	message, role string
	text          []byte
}

// roleOf is whose turn a chunk belongs to; empty: it is none that is sent along.
func roleOf(s said) string {
	switch {
	case s.role == "tool", s.kind == store.TypeReasoning: // an answer to what is not sent along; thinking
		return ""
	case s.role == model.RoleSystem, s.role == "developer":
		return model.RoleSystem
	case s.role == model.RoleUser:
		return model.RoleUser
	}
	return model.RoleAssistant
}

// take takes the next chunk. With torn, nothing of its message is taken.
func (c *conversation) take(s said, torn bool) {
	before := c.current
	c.current = nil
	if torn && s.message != "" && s.kind != store.TypeMessage {
		c.of[s.message] = nil
	}
	role := roleOf(s)
	if role == "" || s.content == "" {
		return
	}
	t, known := c.of[s.message]
	switch {
	case s.message == "": // such chunks have nothing but their neighbours
		if t = before; t == nil || t.role != role {
			t = c.begin("", role)
		}
		c.current = t
	case !known:
		t = c.begin(s.message, role)
		c.of[s.message] = t
	case t == nil:
		return
	}
	if t.role == model.RoleSystem {
		if c.instructed += len(s.content); c.instructed > instructionsMost {
			return // it is not asked
		}
		t.text = append(t.text, s.content...)
		return
	}
	t.text = append(t.text, s.content...)
	for c.size += len(s.content); c.size > c.most && len(c.all) > 0; {
		c.drop()
	}
}

func (c *conversation) begin(message, role string) *turn {
	t := &turn{message: message, role: role}
	if role == model.RoleSystem {
		c.instructions = append(c.instructions, t)
	} else {
		c.all = append(c.all, t)
	}
	return t
}

// drop lets go of the oldest message, and of what is still to come of it.
func (c *conversation) drop() {
	t := c.all[0]
	c.all[0] = nil
	c.all = c.all[1:]
	c.size -= len(t.text)
	if t.text = nil; t.message != "" {
		c.of[t.message] = nil
	}
	if c.current == t {
		c.current = nil
	}
}

// turns is what was collected, and the question.
func (c *conversation) turns(question string) (all []model.Turn) {
	var joined []*turn
	for _, t := range slices.Concat(c.instructions, c.all, []*turn{{role: model.RoleUser, text: []byte(question)}}) {
		last := &turn{role: model.RoleSystem} // so that what an assistant says first, to something that is not kept, is left out
		if len(joined) > 0 {
			last = joined[len(joined)-1]
		}
		switch {
		case len(bytes.TrimSpace(t.text)) == 0, t.role == model.RoleAssistant && last.role == model.RoleSystem:
		case len(joined) > 0 && last.role == t.role:
			last.text = append(append(last.text, "\n\n"...), t.text...)
		default:
			joined = append(joined, t)
		}
	}
	for _, t := range joined {
		all = append(all, model.Turn{Role: t.role, Content: string(t.text)})
	}
	return all
}
