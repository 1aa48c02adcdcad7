package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Batch is what one Append adds, and on whose behalf.
type Batch struct {
	Chunks   []Chunk
	Producer Producer
	// Life is the Appended.Life of an earlier Append of the same upload, or 0. If the session was deleted since, the
	// error is ErrSessionDeleted, even if the session exists again. With NoNew, Append does not create the session.
	Life int64
	// Lease, if not 0, is the lease of this batch's messages: a message fails after this time without an append that
	// adds to it or names it.
	Lease time.Duration
	// Hold is the state of the upload that holds Messages, its open messages. Token names the upload: one word, unique
	// to it. Without a Hold, Append renews the lease of Messages, or begins them.
	Hold     Hold
	Token    string
	Messages []string
}

// Producer says whose numbers the chunks of a batch have. Without an ID they have none.
type Producer struct {
	ID     string
	Epoch  int64
	Number int64 // of the first chunk; from 0 in each epoch
}

// Hold is the state of an upload.
type Hold string

const (
	HoldNone   Hold = ""       // the batch is not an upload
	HoldOpen   Hold = "open"   // it is under way: a sign of life for its messages, for as long as Config.Grace
	HoldLook   Hold = "look"   // the same, and an error if another caller ended one of them
	HoldClosed Hold = "closed" // it has ended properly
	HoldLeft   Hold = "left"   // it got its response before its end: its producer may continue in another way
	HoldBroken Hold = "broken" // its connection broke: its messages fail, at once or after the grace period
)

// Appended says where the chunks of a batch are in the log.
type Appended struct {
	Epoch string
	// First and Last are the numbers of the batch's first and last chunk. Without producer numbers, all numbers between
	// them belong to the batch. They are 0 if the log contains the chunks' producer numbers, but no longer says which
	// chunks have them.
	First, Last int64
	// Count is the number of the batch's chunks in the log. Known is how many of them were there before.
	Count, Known int
	Life         int64
	Made         bool // Append created the session
}

// NoNew is the Batch.Life of an append to a session that must exist (ErrNotMade).
const NoNew = -1

// Append adds a batch to the log of a session, and creates the session if necessary. It adds all chunks or, with an
// error, none. It does not add chunks again that the log contains under the same producer's numbers.
//
// If a chunk is to blame, the error is a *RefusedError that wraps ErrSessionEnded, *MessageEndedError, *FullError or
// ErrProducerConflict. Otherwise it is ErrSessionEnded, *MessageEndedError, *FullError, ErrSessionDeleted, ErrNotMade,
// *FencedError, *GapError, ErrAway (certainly nothing was stored) or ErrOutcomeUnknown.
func (s *Store) Append(ctx context.Context, session string, b Batch) (Appended, error) {
	a, err := s.appendOnce(ctx, session, b)
	if err == nil {
		s.metrics.appended.Add(float64(a.Count - a.Known))
		s.metrics.known.Add(float64(a.Known))
	}
	return a, err
}

// appendOnce appends the part of b that the log does not contain.
func (s *Store) appendOnce(ctx context.Context, session string, b Batch) (Appended, error) {
	var all Appended
	skipped := 0 // chunks of b that the log already contained
	for {
		a, known, err := s.append(ctx, session, b)
		if err == nil && known != nil {
			var n int
			if n, a, err = s.compare(ctx, session, &b, known); err == nil {
				all.add(a)
				all.Epoch, all.Life = known.epoch, known.life
				skipped += n
				if len(b.Chunks) == 0 && len(b.Messages) == 0 {
					return all, nil
				}
				continue
			}
		}
		if len(b.Chunks) == 0 && all.Known > 0 && over(err) { // stored chunks stay valid, whatever has ended since
			return all, nil
		}
		if refused, ok := errors.AsType[*RefusedError](err); ok {
			refused.Index += skipped
		}
		all.add(a)
		all.Epoch, all.Life, all.Made = a.Epoch, a.Life, a.Made
		return all, err
	}
}

// over reports whether err only means that the log or the message has ended.
func over(err error) bool {
	_, ended := errors.AsType[*MessageEndedError](err)
	return ended || errors.Is(err, ErrSessionEnded)
}

// add appends the chunks after a.
func (a *Appended) add(next Appended) {
	if next.Count == 0 {
		if a.Count == 0 {
			a.First, a.Last = next.First, next.Last
		}
		return
	}
	if a.Count == 0 {
		a.First = next.First
	}
	a.Last = next.Last
	a.Count += next.Count
	a.Known += next.Known
}

// append makes one call of a script. It uses append.lua unless push.lua can handle the batch.
func (s *Store) append(ctx context.Context, session string, b Batch) (Appended, *known, error) {
	size := 0
	for _, c := range b.Chunks {
		size += len(c.members) + chunkCost
	}
	wait := s.cfg.WaitReplicas > 0 && len(b.Chunks) > 0
	which, reply, err := scriptPush, []any{other}, error(nil)
	if b.ordinary() && !s.thorough {
		reply, err = s.run(ctx, which, session, size, wait, b.pushed()...)
	}
	for err == nil && (reply[0] == other || reply[0] == again) {
		if reply[0] == again && ctx.Err() != nil {
			return Appended{}, nil, fmt.Errorf("append to %s: %w: %w", session, ErrAway, ctx.Err())
		}
		which = scriptAppend
		reply, err = s.run(ctx, which, session, size, wait, b.arguments()...)
	}
	if err != nil {
		return Appended{}, nil, fmt.Errorf("append to %s: %w", session, err)
	}
	r := fields(reply)
	refused := func(err error) error {
		if i := r.int(5); i >= 0 {
			err = &RefusedError{Index: int(i), Err: err}
		}
		return errors.Join(r.err, err)
	}
	switch r.status() {
	case "ok":
		a := Appended{Epoch: r.text(1), First: r.int(5), Count: len(b.Chunks), Life: r.int(6), Made: which == scriptAppend && r.int(7) == 1}
		a.Last = a.First + int64(a.Count) - 1
		return a, nil, r.err
	case "nothing":
		last := r.int(5)
		return Appended{Epoch: r.text(1), First: last + 1, Last: last}, nil, r.err
	case "producer_known":
		k, err := parseKnown(r)
		return Appended{}, k, errors.Join(r.err, err)
	case "producer_fenced":
		return Appended{}, nil, errors.Join(r.err, &FencedError{Epoch: r.int(5)})
	case "producer_gap":
		return Appended{}, nil, errors.Join(r.err, &GapError{Expected: r.int(5)})
	case "session_ended":
		return Appended{}, nil, refused(ErrSessionEnded)
	case "session_deleted":
		return Appended{}, nil, ErrSessionDeleted
	case "session_full":
		return Appended{}, nil, refused(&FullError{Most: s.cfg.NamesMax})
	case "not_made":
		return Appended{}, nil, ErrNotMade
	case "message_ended":
		return Appended{}, nil, refused(&MessageEndedError{r.text(6), r.text(7)})
	default:
		return Appended{}, nil, fmt.Errorf("append to %s: status %q: %w", session, r.status(), errReply)
	}
}

func (b Batch) token() string {
	if b.Token == "" {
		return "-"
	}
	return b.Token
}

// other is the reply of push.lua to an append that it leaves to append.lua.
const other = "other"

// again is the reply of a script that has done a slice of work that must come first, or that has not had its turn yet
// (log.lua: slice, run.lua).
const again = "again"

// ordinary reports whether push.lua can handle the batch: only chunks of one message, or of none, that leave it open;
// no producer numbers, no lease, no other held message.
func (b Batch) ordinary() bool {
	if len(b.Chunks) == 0 || len(b.Chunks) > pushMost || b.Producer.ID != "" || b.Lease != 0 || b.Hold != HoldNone && b.Hold != HoldOpen {
		return false
	}
	id := b.Chunks[0].messageID
	for _, c := range b.Chunks {
		if c.kind != "" || c.messageID != id {
			return false
		}
	}
	if b.Hold == HoldNone || id == "" {
		return len(b.Messages) == 0
	}
	return len(b.Messages) == 1 && b.Messages[0] == id
}

// pushMost is the most chunks that push.lua gets: it unpacks them in one call, which Lua limits.
const pushMost = 256

// pushed returns the arguments for push.lua.
func (b Batch) pushed() []any {
	token := ""
	if len(b.Messages) > 0 {
		token = b.token()
	}
	args := make([]any, 0, 4+len(b.Chunks))
	args = append(args, b.Life, b.Chunks[0].messageID, token, len(b.Chunks))
	for _, c := range b.Chunks {
		args = append(args, c.members)
	}
	return args
}

// arguments returns the arguments for append.lua.
func (b Batch) arguments() []any {
	args := make([]any, 0, 8+len(b.Messages)+6*len(b.Chunks))
	if b.Life == 0 && b.Producer.ID == "" && b.Lease == 0 && b.Hold == HoldNone && len(b.Messages) == 0 {
		args = append(args, 0)
	} else {
		p := b.Producer
		args = append(args, 7+len(b.Messages), b.Life, p.ID, p.Epoch, p.Number, b.Lease.Milliseconds(), string(b.Hold), b.token())
		for _, m := range b.Messages {
			args = append(args, m)
		}
	}
	for _, c := range b.Chunks {
		args = append(args, c.messageID, c.kind, c.members)
		if b.Producer.ID != "" {
			form := "c"
			if c.text != "" {
				form = "t"
			}
			args = append(args, c.Numbers(), c.filled, form)
		}
	}
	return args
}

// replyFields reads a script's reply, whose numbers are text or integers. It keeps the first error.
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
