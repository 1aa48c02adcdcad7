package api

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"gapless/api/model"
	"gapless/sse"
	"gapless/store"
)

const (
	// contextChunks is how many of the log's newest chunks are read for a conversation. 20,000 words, one chunk each,
	// are about 3 MB, and take 20 ms of Redis for each question.
	contextChunks = 20_000
	contextPage   = 1 << 20 // bytes of one read
	// contextRead is the maximum size of the chunks that are read, in bytes. Their texts may be a small part of that.
	contextRead = 16 << 20
	// contextFirst is how many of a longer log's first chunks are searched for instructions.
	contextFirst = 100
	// instructionsMost limits the size of instructions in bytes, because they are never left out.
	instructionsMost = 1 << 20
)

// conversation returns what was said in a log before chunk number before, followed by the question. The result suits
// strict services: many of them, and the templates of some models, refuse turns that do not alternate.
//
//   - Instructions come first, in one turn. They are never left out.
//   - Then user and assistant alternate, from a user's turn to the question. Neighbours of one role become one turn. An
//     answer that was stopped before its first word leaves such neighbours.
//   - No turn is blank.
//   - Messages are in the order in which they began, each as far as it got. The newest messages are included, each
//     whole, as many as fit into Config.ContextMax bytes.
func (a *API) conversation(ctx context.Context, session string, before int64, question string) ([]model.Turn, error) {
	said, torn, err := a.saidBefore(ctx, session, before, false)
	if err != nil {
		return nil, err
	}
	m := sse.NewMessages(sse.MessagesAsk{Only: func(id string) bool { return id == "" || id != torn }})
	for _, one := range said {
		m.Add(one.seq, one.element)
	}
	var instructions, others []model.Turn
	instructed, size := 0, 0
	for i, head := range m.Heads() {
		t := model.Turn{Role: roleOf(head.Role), Content: m.Content(i)}
		if t.Role == model.RoleSystem {
			instructions, instructed = append(instructions, t), instructed+len(t.Content)
		} else {
			others, size = append(others, t), size+len(t.Content)
		}
	}
	if instructed > instructionsMost {
		return nil, &model.Error{Reason: contextTooLarge, Detail: fmt.Sprintf("the instructions (roles system and developer) in the log are larger than %d bytes: shorten them, or continue in another session", instructionsMost)}
	}
	for size > a.cfg.ContextMax {
		size -= len(others[0].Content)
		others = others[1:]
	}
	return inTurn(slices.Concat(instructions, others, []model.Turn{{Role: model.RoleUser, Content: question}})), nil
}

// saying is an element with text for the conversation.
type saying struct {
	seq     int64
	element string
}

// saidBefore reads a log backwards from a chunk. It returns the texts of the newest chunks until they fill the context,
// and only instructions from the chunks before. torn is a message that may have begun before the newest chunks.
//
// With tools, it also returns calls of tools and their results.
func (a *API) saidBefore(ctx context.Context, session string, before int64, tools bool) (all []saying, torn string, err error) {
	var parts [][]saying
	lowest := max(before-contextChunks, 1)
	from, size, read := before, 0, 0
	for step := int64(64); from > lowest && read < contextRead; {
		p, err := a.readRange(ctx, session, max(from-step, lowest), from)
		if err != nil {
			return nil, "", err
		}
		full := size >= a.cfg.ContextMax
		part, said, bytes := sayings(p, full, tools)
		parts, size, read = append(parts, part), size+said, read+bytes
		if !full {
			if torn = ""; p.From-1 > p.Former && len(p.Elements) > 0 { // the first numbers of an epoch follow those of the former one
				torn = begunBefore(p.Elements[0])
			}
		}
		if asked := max(from-step, lowest); p.From > asked || len(p.Elements) == 0 {
			from = 1
			break // the log begins there, or was replaced
		}
		step = min(2*step, 4096, max(int64(contextRead-read)*step/int64(bytes+1), 16)) // as many as are likely to fit
		from = p.From
	}
	if from > 1 {
		p, err := a.readRange(ctx, session, 1, min(from, 1+contextFirst))
		if err != nil {
			return nil, "", err
		}
		part, _, _ := sayings(p, true, tools)
		parts = append(parts, part)
	}
	slices.Reverse(parts)
	return slices.Concat(parts...), torn, nil
}

// sayings returns the sayings of a page, their size in the conversation, and the size of the page, both in bytes.
func sayings(p store.Page, onlyInstructions, tools bool) (all []saying, said, bytes int) {
	for i, element := range p.Elements {
		s := store.ParseSaid([]byte(element))
		bytes += len(element)
		role := roleOf(s.Role)
		tool := tools && (s.Role == "tool" || s.Data != nil && (s.Type == typeToolCalls || s.Type == store.TypeMessage))
		if !tool && (role == "" || s.Content == "" || s.Type == store.TypeReasoning) {
			continue
		}
		if role != model.RoleSystem {
			said += len(s.Content)
		}
		if role == model.RoleSystem || !onlyInstructions {
			all = append(all, saying{p.From + int64(i), element})
		}
	}
	return all, said, bytes
}

// begunBefore returns the message of a chunk if the chunk may not be its first, or else an empty string.
func begunBefore(element string) string {
	if s := store.ParseSaid([]byte(element)); s.Type != store.TypeMessage {
		return s.MessageID
	}
	return ""
}

// readRange returns the chunks of a log from number from up to, but not including, before, as far as they are kept.
func (a *API) readRange(ctx context.Context, session string, from, before int64) (all store.Page, err error) {
	all.From = from
	for at := from; at < before; {
		p, err := a.readPatiently(ctx, session, at, int(before-at))
		if err != nil {
			return all, err
		}
		if len(p.Elements) == 0 || p.From >= before || at > from && p.From != at {
			break // it was trimmed, or the log was replaced
		}
		if at == from {
			all.Bounds, all.From = p.Bounds, p.From
		}
		all.Elements = append(all.Elements, p.Elements[:min(int64(len(p.Elements)), before-p.From)]...)
		at = p.Next()
	}
	return all, nil
}

// readPatiently reads a page, and retries while Redis is away: the caller waits anyway.
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

// roleOf maps the role of a message to the role of a turn. It is empty if the message is not sent, such as the result
// of a tool.
func roleOf(role string) string {
	switch role {
	case "tool":
		return ""
	case model.RoleSystem, "developer":
		return model.RoleSystem
	case model.RoleUser:
		return model.RoleUser
	}
	return model.RoleAssistant
}

// inTurn makes the roles alternate. It leaves out blank turns, and an answer whose question is missing.
func inTurn(all []model.Turn) (turns []model.Turn) {
	for _, t := range all {
		last := model.RoleSystem
		if len(turns) > 0 {
			last = turns[len(turns)-1].Role
		}
		switch {
		case strings.TrimSpace(t.Content) == "", t.Role == model.RoleAssistant && last == model.RoleSystem:
		case len(turns) > 0 && last == t.Role:
			turns[len(turns)-1].Content += "\n\n" + t.Content
		default:
			turns = append(turns, t)
		}
	}
	return turns
}
