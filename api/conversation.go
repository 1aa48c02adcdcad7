package api

import (
	"context"
	"math/rand/v2"
	"time"

	"gapless/api/model"
	"gapless/store"
)

const (
	// contextChunks is how many chunks of the log are looked at for a conversation, the newest
	// ones. 20,000 words, a piece each, are about 3 MB, and 20 ms of Redis at each question.
	contextChunks = 20_000
	contextPage   = 1 << 20 // bytes that are read at once
)

// conversation is what was said in a log in front of chunk number before: its messages in the
// order in which they began, each as far as it got, and of these the newest that fit into
// Config.ContextMax bytes.
func (a *API) conversation(ctx context.Context, session string, before int64) ([]model.Turn, error) {
	c := conversation{most: a.cfg.ContextMax, of: map[string]*turn{}}
	from := max(before-contextChunks, 1)
	for from < before {
		p, err := a.readPatiently(ctx, session, from, int(before-from))
		if err != nil {
			return nil, err
		}
		if len(p.Elements) == 0 || p.From >= before {
			break // it was trimmed, or is another log by now
		}
		for i, element := range p.Elements[:min(int64(len(p.Elements)), before-p.From)] {
			// One that is not known from its first chunk is not known: its beginning may be gone. What an epoch
			// began with has numbers behind those of the former one.
			c.take([]byte(element), i == 0 && c.taken == 0 && p.From-1 > p.Former)
		}
		from = p.Next()
	}
	return c.turns(), nil
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

// conversation collects turns. Memory is bounded by most, and by one chunk.
type conversation struct {
	most, size int
	taken      int
	all        []*turn          // those that are kept, oldest first
	of         map[string]*turn // by message; nil: it is not kept
	current    *turn            // of the last chunk, if that had no message_id
}

type turn struct {
	message, role string
	text          []byte
}

// take takes the next chunk. With torn, nothing of its message is taken.
func (c *conversation) take(element []byte, torn bool) {
	c.taken++
	s := parseSaid(element)
	before := c.current
	c.current = nil
	if torn && s.message != "" && s.kind != store.TypeMessage {
		c.of[s.message] = nil
	}
	switch s.role {
	case model.RoleUser, model.RoleSystem:
	case "developer":
		s.role = model.RoleSystem
	case "tool": // an answer to what is not sent along
		return
	default:
		s.role = model.RoleAssistant
	}
	if s.content == "" {
		return
	}
	t, known := c.of[s.message]
	switch {
	case s.message == "": // such chunks have nothing but their neighbours
		if t = before; t == nil || t.role != s.role {
			t = c.begin("", s.role)
		}
		c.current = t
	case !known:
		t = c.begin(s.message, s.role)
		c.of[s.message] = t
	case t == nil:
		return
	}
	t.text = append(t.text, s.content...)
	for c.size += len(s.content); c.size > c.most && len(c.all) > 0; {
		c.drop()
	}
}

func (c *conversation) begin(message, role string) *turn {
	t := &turn{message: message, role: role}
	c.all = append(c.all, t)
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

func (c *conversation) turns() (all []model.Turn) {
	for _, t := range c.all {
		all = append(all, model.Turn{Role: t.role, Content: string(t.text)})
	}
	return all
}
