package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
)

// Appended says where chunks went. Others may append in between two calls, never
// inside one: First to Last are all ours.
type Appended struct {
	Epoch       string
	First, Last int64
}

// Append adds chunks to the log of a session, which is made if need be: all of them,
// or, with an error, none. after is the last number that a former Append of the same
// upload was given, or 0: when the session was deleted since, the error is
// ErrSessionDeleted, also if it was made anew.
//
// Other errors: *RefusedError with ErrSessionEnded or *MessageEndedError in it, ErrAway
// (surely nothing was stored), ErrOutcomeUnknown.
func (s *Store) Append(ctx context.Context, session string, after int64, chunks []Chunk) (Appended, error) {
	args := make([]any, 0, 2+3*len(chunks))
	args = append(args, s.cfg.HistoryMax, after)
	for _, c := range chunks {
		args = append(args, c.messageID, c.ends, c.members)
	}
	reply, err := s.run(ctx, scriptAppend, session, args...)
	if err != nil {
		return Appended{}, fmt.Errorf("append to %s: %w", session, err)
	}
	var a Appended
	switch r := fields(reply); r.status() {
	case "ok":
		a = Appended{r.text(1), r.int(9), r.int(10)}
		return a, r.err
	case "session_ended":
		return a, errors.Join(r.err, &RefusedError{Index: int(r.int(9)), Err: ErrSessionEnded})
	case "session_deleted":
		return a, ErrSessionDeleted
	case "message_ended":
		ended := &MessageEndedError{r.text(10), r.text(11)}
		return a, errors.Join(r.err, &RefusedError{Index: int(r.int(9)), Err: ended})
	default:
		return a, fmt.Errorf("append to %s: status %q: %w", session, r.status(), errReply)
	}
}

// replyFields reads a script's reply, whose numbers come as text or as integers, and
// keeps the first mistake.
type replyFields struct {
	all []any
	err error
}

func fields(reply []any) *replyFields { return &replyFields{all: reply} }

func (r *replyFields) status() string { return r.text(0) }

func (r *replyFields) at(i int) any {
	if i >= len(r.all) {
		r.err = fmt.Errorf("field %d is missing: %w", i, errReply)
		return nil
	}
	return r.all[i]
}

func (r *replyFields) text(i int) string {
	s, _ := r.at(i).(string)
	return s
}

func (r *replyFields) int(i int) int64 {
	switch v := r.at(i).(type) {
	case int64:
		return v
	case string:
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			r.err = fmt.Errorf("field %d: %w", i, errors.Join(err, errReply))
		}
		return n
	}
	return 0
}
