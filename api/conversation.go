package api

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"gapless/api/model"
	"gapless/api/openai"
	"gapless/sse"
	"gapless/store"
)

const (
	// contextChunks is how many of the log's newest chunks are read for a conversation. 20,000 words, one chunk each,
	// are about 3 MB, and take 20 ms of Redis for each question.
	contextChunks = 20_000
	// contextMargin is how many chunks before those are also read, because they show which messages began earlier.
	contextMargin = 1000
	contextPage   = 1 << 20 // bytes of one read
	// contextRead is the maximum size of the chunks that are read, in bytes. Their texts may be a small part of that.
	contextRead = 16 << 20
	// contextFirst is how many of a longer log's first chunks are searched for instructions.
	contextFirst = 100
	// contextPause is how many chunks may lie between two chunks of instructions that begin there.
	contextPause = 2000
	// instructionsMost limits the size of instructions in bytes, because they are never left out.
	instructionsMost = 1 << 20
)

// question is what a model is asked: chunks of a log, which were appended together.
type question struct {
	session      string
	first, last  int64  // the numbers of the chunks
	instructions string // they precede those in the log
	tools        bool   // whether calls of tools and their results are sent along
}

// said is a message of a conversation.
type said struct {
	model.Turn
	asked bool // it belongs to the question
}

// conversation returns what was said in a log, up to and including the question. The result suits strict services: many
// of them, and the templates of some models, refuse turns that do not alternate.
//
//   - Instructions come first, in one turn. They are never left out.
//   - Then user and assistant alternate, beginning with a user's turn. Neighbours of one role become one turn. An
//     answer that was stopped before its first word leaves such neighbours.
//   - No turn is blank.
//   - A call of a tool is included with its result, which follows it at once, or neither is included. An assistant's turn follows the result, or
//     nothing does.
//   - Messages are in the order in which they began, each whole, as far as it got. The newest are included, as many as
//     fit into Config.ContextMax bytes. The question is always included, from a user's message on.
func (a *API) conversation(ctx context.Context, q question) (turns []model.Turn, err error) {
	m, isWhole, err := a.readSaid(ctx, q.session, q.last+1)
	if err != nil {
		return nil, err
	}
	instructions := join(nil, said{Turn: model.Turn{Role: model.RoleSystem, Content: q.instructions}}, model.RoleSystem)
	var others []said
	for i, head := range m.Heads() {
		one := said{Turn: model.Turn{Role: roleOf(head.Role), Content: m.Content(i)}, asked: head.First >= q.first}
		switch {
		case !isWhole(head), one.Role == model.RoleTool && !q.tools:
		case one.Role == model.RoleSystem:
			instructions = join(instructions, one, model.RoleSystem)
		default:
			if q.tools {
				one.ToolCalls, one.ToolCallID = toolCalls(head.ID, m.More(i))
			}
			others = join(others, one, model.RoleAssistant)
		}
	}
	if len(instructions) > 0 && len(instructions[0].Content) > instructionsMost {
		return nil, &model.Error{Reason: contextTooLarge, Detail: fmt.Sprintf("the instructions (roles system and developer) are larger than %d bytes: shorten them, or continue in another session", instructionsMost)}
	}
	for _, one := range fitting(withResults(others), a.cfg.ContextMax) {
		instructions = join(instructions, one, model.RoleUser, model.RoleAssistant)
	}
	for _, one := range instructions {
		turns = append(turns, one.Turn)
	}
	if n := len(instructions); n == 0 || !slices.ContainsFunc(instructions, func(one said) bool { return one.asked }) || instructions[n-1].Role == model.RoleSystem {
		return nil, &model.Error{Reason: nothingAsked, Detail: "the question has nothing that can be sent: it needs a user's message, or the result of a call that the conversation has"}
	}
	return turns, nil
}

// join appends a message, unless it is blank. If it has one of these roles, and the last message too, they become one.
func join(all []said, one said, roles ...string) []said {
	switch n := len(all); {
	case strings.TrimSpace(one.Content) == "" && one.ToolCalls == nil && one.Role != model.RoleTool:
		return all
	case n > 0 && all[n-1].Role == one.Role && slices.Contains(roles, one.Role):
		last := &all[n-1]
		if last.Content != "" && one.Content != "" {
			last.Content += joint
		}
		last.Content += one.Content
		last.ToolCalls = append(last.ToolCalls, one.ToolCalls...)
		last.asked = last.asked || one.asked
		return all
	}
	return append(all, one)
}

const joint = "\n\n"

// toolCalls returns the calls of tools in chunks of a message, or the call whose result the message is.
func toolCalls(message string, chunks iter.Seq[jsontext.Value]) (all []model.ToolCall, resultOf string) {
	var pieces []model.Call
	for chunk := range chunks {
		s := store.ParseSaid(chunk)
		resultOf += s.ToolCallID
		if s.Type != typeToolCalls && s.Type != store.TypeMessage {
			continue
		}
		for _, piece := range model.Calls(json.RawMessage(s.Data)) {
			at := slices.IndexFunc(pieces, func(c model.Call) bool {
				return string(c.Index) == string(piece.Index) && (piece.ID == "" || piece.ID == c.ID)
			})
			if at < 0 {
				pieces = append(pieces, piece)
			} else {
				pieces[at].Arguments += piece.Arguments
			}
		}
	}
	for _, p := range pieces {
		call := model.ToolCall{ID: p.ID, Type: "function"}
		if call.ID == "" {
			call.ID = openai.CallPrefix(message) // withResults completes it
		}
		call.Function.Name, call.Function.Arguments = p.Name, p.Arguments
		switch {
		case p.Arguments == "":
			call.Function.Arguments = "{}"
		case !json.Valid([]byte(p.Arguments)): // models do that, and services refuse it
			wrapped, _ := json.Marshal(map[string]string{"invalid": p.Arguments})
			call.Function.Arguments = string(wrapped)
		}
		all = append(all, call)
	}
	return all, resultOf
}

// withResults leaves out calls of tools without a result, and results without a call before them. It puts the results
// right after their calls. If the question has the result of an earlier call, the call moves to the end, where services expect it.
func withResults(all []said) (kept []said) {
	results := matchResults(all)
	var late []said
	for _, one := range all {
		if one.Role == model.RoleTool {
			continue
		}
		if one.asked {
			kept, late = joinAll(kept, late), nil
		}
		calls := one.ToolCalls
		one.ToolCalls = nil
		var after []said
		now := one.asked
		for i := range calls {
			if result, ok := results[&calls[i]]; ok {
				one.ToolCalls, after = append(one.ToolCalls, calls[i]), append(after, result)
				now = now || result.asked
			}
		}
		if now && !one.asked {
			late = append(append(late, said{Turn: model.Turn{Role: one.Role, ToolCalls: one.ToolCalls}, asked: true}), after...)
			after, one.ToolCalls = nil, nil
		}
		kept = append(join(kept, one, model.RoleAssistant), after...)
	}
	kept = joinAll(kept, late)
	for i := 1; i < len(kept); i++ {
		at := i // some services accept no user's message after the result of a tool: it goes before the calls
		for kept[i].Role == model.RoleUser && at > 0 && (kept[at-1].Role == model.RoleTool || at < i && kept[at].Role == model.RoleTool) {
			at--
		}
		one := kept[i]
		kept = slices.Insert(slices.Delete(kept, i, i+1), at, one)
	}
	return kept
}

func joinAll(all, more []said) []said {
	for _, one := range more {
		all = join(all, one, model.RoleAssistant)
	}
	return all
}

// matchResults returns the result of each call that has one. If there are several, the first counts, unless the question has a newer one.
func matchResults(all []said) map[*model.ToolCall]said {
	open := map[string][]*model.ToolCall{}
	results := map[*model.ToolCall]said{}
	for _, one := range all {
		for i := range one.ToolCalls {
			switch call := &one.ToolCalls[i]; {
			case call.Function.Name == "": // no service accepts it
			case strings.HasSuffix(call.ID, "_"): // the service gave it no id: its results come in order
				open[call.ID] = append(open[call.ID], call)
			default: // ids may be used again
				open[call.ID] = []*model.ToolCall{call}
			}
		}
		if one.Role != model.RoleTool {
			continue
		}
		id := one.ToolCallID
		if open[id] == nil {
			id = id[:strings.LastIndex(id, "_")+1]
		}
		calls := open[id]
		for len(calls) > 1 && results[calls[0]].ToolCallID != "" && results[calls[0]].ToolCallID != one.ToolCallID {
			calls = calls[1:]
		}
		if len(calls) > 0 && (results[calls[0]].ToolCallID == "" || one.asked && !results[calls[0]].asked) {
			calls[0].ID, results[calls[0]] = one.ToolCallID, one
		}
	}
	return results
}

// fitting returns the newest messages that fit into a number of bytes when neighbours are joined, beginning with a
// user's. The question is always among them.
func fitting(all []said, most int) []said {
	asked := slices.IndexFunc(all, func(one said) bool { return one.asked })
	first, size := len(all), 0
	for i, one := range slices.Backward(all) {
		if size += len(one.Content); i+1 < len(all) && all[i+1].Role == one.Role && one.Role == model.RoleUser {
			size += len(joint)
		}
		for _, call := range one.ToolCalls {
			size += len(call.Function.Name) + len(call.Function.Arguments)
		}
		if size > most && first <= asked {
			break
		}
		if one.Role == model.RoleUser {
			first = i
		}
	}
	return all[first:]
}

// readSaid reads and folds what a conversation needs of a log before a number: the newest chunks, and of a longer log
// also the first ones, until the instructions that begin there are whole. isWhole reports whether a message is complete,
// and wanted.
func (a *API) readSaid(ctx context.Context, session string, before int64) (m *sse.Messages, isWhole func(sse.MessageHead) bool, err error) {
	p, err := a.readBack(ctx, session, before)
	if err != nil {
		return nil, nil, err
	}
	m = sse.NewMessages(sse.MessagesAsk{})
	begin := p.Former + 1 // the first numbers of an epoch follow those of the former one
	trimmed := p.First > begin
	next, unread := begin, p.From
	for read := 0; !trimmed && next < p.From; {
		part, err := a.readRange(ctx, session, next, min(next+contextFirst, p.From))
		if err != nil {
			return nil, nil, err
		}
		if part.From != next || len(part.Elements) == 0 {
			break // it was trimmed, or the log was replaced
		}
		fold(m, part)
		read += bytesOf(part)
		next = part.Next()
		if !slices.ContainsFunc(m.Heads(), func(h sse.MessageHead) bool {
			return roleOf(h.Role) == model.RoleSystem && h.Streaming && h.Last >= part.Next()-contextPause
		}) {
			break
		}
		if read > contextRead {
			unread = part.From
			break
		}
	}
	fold(m, p)
	if next >= p.From { // nothing is missing
		return m, func(sse.MessageHead) bool { return true }, nil
	}
	edge := p.From + min(contextMargin, int64(len(p.Elements))/8+1)
	return m, func(h sse.MessageHead) bool {
		instructions := roleOf(h.Role) == model.RoleSystem
		switch {
		case h.First < p.From:
			return instructions && h.First < begin+contextFirst && (!h.Streaming || h.Last < unread || h.Last >= p.From)
		case h.First >= edge, h.First > p.From && (h.ID == "" || instructions && trimmed):
			return true
		}
		kind := store.ParseSaid([]byte(p.Elements[h.First-p.From])).Type
		return kind == store.TypeMessage || kind == openai.TypeResponse // a message begins with these
	}, nil
}

// fold folds a page in, except elements that are no chunks, which other programs have pushed.
func fold(m *sse.Messages, p store.Page) {
	for i, element := range p.Elements {
		if jsontext.Value(element).Kind() == '{' {
			m.Add(p.From+int64(i), element)
		}
	}
}

func bytesOf(p store.Page) (bytes int) {
	for _, element := range p.Elements {
		bytes += len(element)
	}
	return bytes
}

// readBack returns the chunks in a row before a number, as many as a conversation may need.
func (a *API) readBack(ctx context.Context, session string, before int64) (all store.Page, err error) {
	all.From = before
	var parts [][]string
	lowest := max(before-contextChunks-contextMargin, 1)
	for step, read := int64(64), 0; all.From > lowest && read < contextRead; {
		asked := max(all.From-step, lowest)
		p, err := a.readRange(ctx, session, asked, all.From)
		if err != nil {
			return all, err
		}
		if p.Next() != all.From || len(p.Elements) == 0 {
			break // the log was replaced
		}
		parts, all.Bounds, all.From = append(parts, p.Elements), p.Bounds, p.From
		if p.From > asked {
			break // the log begins there
		}
		bytes := bytesOf(p)
		read += bytes
		step = min(2*step, 4096, max(int64(contextRead-read)*step/int64(bytes+1), 16)) // as many as are likely to fit
	}
	slices.Reverse(parts)
	all.Elements = slices.Concat(parts...)
	return all, nil
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

// roleOf maps the role of a message to the role of a turn.
func roleOf(role string) string {
	switch role {
	case model.RoleTool, model.RoleUser:
		return role
	case model.RoleSystem, "developer":
		return model.RoleSystem
	}
	return model.RoleAssistant
}
