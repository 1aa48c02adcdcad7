package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// Create creates a session, and reports whether it did. A deleted session gets a new epoch, and its numbers continue.
func (s *Store) Create(ctx context.Context, session string) (b Bounds, created bool, err error) {
	return s.session(ctx, session, "create")
}

// Describe returns a session's bounds. The error is ErrNotFound if the session does not exist or was deleted.
func (s *Store) Describe(ctx context.Context, session string) (Bounds, error) {
	p, err := s.Read(ctx, session, 1, 0, 0)
	if err != nil {
		return Bounds{}, err
	}
	if !p.Exists() {
		return Bounds{}, ErrNotFound
	}
	return p.Bounds, nil
}

// Delete removes the log and leaves a tombstone. The error is ErrNotFound if the session never existed.
func (s *Store) Delete(ctx context.Context, session string) error {
	reply, err := s.runSession(ctx, session, s.cfg.WaitReplicas > 0, "delete")
	if err != nil {
		return fmt.Errorf("delete session %s: %w", session, err)
	}
	r := fields(reply)
	if r.status() == "absent" {
		return ErrNotFound
	}
	for r.err == nil && r.int(11) == 1 {
		// The session is deleted. The rest of a large one is removed in slices. If that breaks off, the next call for
		// the session continues (log.lua: sweep).
		reply, err := s.runSession(ctx, session, false, "delete")
		if err != nil {
			break
		}
		if r = fields(reply); r.status() == "absent" {
			break
		}
	}
	return r.err
}

// Renew ends an epoch in which numbers up to last are in use, because the log in Redis is not the one that they belong
// to. The list gets new numbers, in an epoch whose numbers are far higher. If the epoch has ended already, Renew
// changes nothing.
func (s *Store) Renew(ctx context.Context, session, epoch string, last int64) error {
	_, _, err := s.session(ctx, session, "renew", epoch, last)
	return err
}

// Cancelled says which messages a Cancel has ended, and where their chunks are.
type Cancelled struct {
	Epoch       string
	First, Last int64
	Messages    []string
}

// Cancel ends a message or, if message is empty, all unfinished messages. After the cancelled chunk the log accepts no
// chunk of that message. Cancelling again changes nothing.
//
// The errors are ErrNotFound, ErrMessageUnknown, *MessageEndedError (the message has ended by itself) and
// ErrSessionEnded.
func (s *Store) Cancel(ctx context.Context, session, message string) (Cancelled, error) {
	var all Cancelled
	for {
		c, more, err := s.cancel(ctx, session, message)
		if len(all.Messages) == 0 {
			all.Epoch, all.First = c.Epoch, c.First
		}
		if len(all.Messages) == 0 || len(c.Messages) > 0 {
			all.Last = c.Last
		}
		all.Messages = append(all.Messages, c.Messages...)
		if err != nil && len(all.Messages) > 0 && !errors.Is(err, ErrOutcomeUnknown) {
			err = fmt.Errorf("%w: some of the messages are cancelled: %w", ErrOutcomeUnknown, err)
		}
		if err != nil || !more {
			return all, err
		}
	}
}

// cancel ends a message, or a slice of all unfinished messages, and reports whether more may follow.
func (s *Store) cancel(ctx context.Context, session, message string) (c Cancelled, more bool, failed error) {
	reply, err := s.runSession(ctx, session, s.cfg.WaitReplicas > 0, "cancel", message)
	if err != nil {
		return c, false, fmt.Errorf("cancel in session %s: %w", session, err)
	}
	r := fields(reply)
	switch r.status() {
	case "ok":
		c = Cancelled{Epoch: r.text(1), First: r.int(11), Last: r.int(12)}
		ids, _ := r.at(13).([]any)
		for _, id := range ids {
			text, _ := id.(string)
			c.Messages = append(c.Messages, text)
		}
		return c, r.int(15) == 1, r.err
	case "absent":
		return c, false, ErrNotFound
	case "message_unknown":
		return c, false, ErrMessageUnknown
	case "message_ended":
		return c, false, &MessageEndedError{message, r.text(14)}
	case "session_ended":
		return c, false, ErrSessionEnded
	default:
		return c, false, fmt.Errorf("cancel in session %s: status %q: %w", session, r.status(), errReply)
	}
}

// Open returns the unfinished messages, in no particular order, and the log's bounds. It reads in slices: a message
// that begins or ends meanwhile may or may not be included. The error is ErrNotFound if the session does not exist.
func (s *Store) Open(ctx context.Context, session string) (b Bounds, ids []string, failed error) {
	found := map[string]struct{}{} // slices may overlap
	for cursor := "0"; ; {
		reply, err := s.runSession(ctx, session, false, "open", cursor)
		if err = certain(err); err != nil { // any other call would change the same
			return Bounds{}, nil, fmt.Errorf("open messages of session %s: %w", session, err)
		}
		r := fields(reply)
		if r.status() == "absent" {
			return Bounds{}, nil, ErrNotFound
		}
		if b.Epoch == "" {
			b = r.bounds()
		}
		all, ok := r.at(11).([]any)
		cursor = r.text(12)
		if r.err != nil || !ok {
			return b, nil, fmt.Errorf("open messages of session %s: %v: %w", session, r.err, errReply)
		}
		for _, id := range all {
			text, _ := id.(string)
			found[text] = struct{}{}
		}
		if cursor == "0" {
			return b, slices.Collect(maps.Keys(found)), nil
		}
	}
}

// runSession runs the session script until it knows the log and has had its turn (log.lua: slice). When Redis is full,
// cancel and delete still work.
func (s *Store) runSession(ctx context.Context, session string, wait bool, args ...any) (reply []any, err error) {
	which := scriptSession
	var full error
	for {
		reply, err = s.run(ctx, which, session, 0, wait, args...)
		if Why(err) == RedisFull && which == scriptSession && (args[0] == "cancel" || args[0] == "delete") {
			which, full = scriptSessionFull, err
			continue
		}
		if err != nil && full != nil && !errors.Is(err, ErrOutcomeUnknown) { // this version of Redis cannot do that
			return nil, full
		}
		if err != nil || reply[0] != again {
			return reply, err
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrAway, err)
		}
	}
}

func (s *Store) session(ctx context.Context, session, what string, args ...any) (Bounds, bool, error) {
	reply, err := s.runSession(ctx, session, s.cfg.WaitReplicas > 0, append([]any{what}, args...)...)
	if err != nil {
		return Bounds{}, false, fmt.Errorf("%s session %s: %w", what, session, err)
	}
	r := fields(reply)
	if r.status() == "absent" {
		return Bounds{}, false, ErrNotFound
	}
	b := r.bounds()
	if r.err != nil {
		return b, false, fmt.Errorf("%s session %s: %w", what, session, r.err)
	}
	return b, r.status() == "ok", nil
}
