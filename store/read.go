package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// Bounds are what one instant knew of a log.
type Bounds struct {
	Epoch string // empty: there is no such session
	// First and Last bound what is kept; when nothing is, First is Last+1.
	First, Last int64
	// Former is the highest number of earlier epochs: a cursor up to it means another log.
	Former               int64
	Ended, Deleted       bool
	CreatedAt, UpdatedAt time.Time
}

// Page is consecutive chunks of a log, and its bounds at the instant they were read.
type Page struct {
	Bounds
	From     int64    // the number of the first element
	Elements []string // as they are in the list
}

// Next is the number behind the page.
func (p Page) Next() int64 { return p.From + int64(len(p.Elements)) }

// Newest asks Read for the end of the log.
const Newest = 0

// Read answers the chunks from number from on (those that are kept), or the Newest:
// as many as fit into the given number of bytes, but one at least, and at most count
// (0: only the bounds). There is more when Page.Next() <= Page.Last.
//
// The log of a session that does not exist has an empty Epoch, and reading it makes
// nothing. ErrAway means away, never empty.
func (s *Store) Read(ctx context.Context, session string, from int64, bytes, count int) (Page, error) {
	reply, err := s.run(ctx, scriptRead, session, bytes, false, from, bytes, count)
	if errors.Is(err, ErrOutcomeUnknown) { // a read has no outcome to be in doubt of
		err = fmt.Errorf("%w: %v", ErrAway, err)
	}
	if err != nil {
		return Page{}, fmt.Errorf("read log %s: %w", session, err)
	}
	r := fields(reply)
	if r.status() == "absent" {
		return Page{Bounds: Bounds{First: 1}, From: 1}, nil
	}
	p := Page{Bounds: r.bounds(), From: r.int(9)}
	parts, ok := r.at(10).([]any)
	if r.err != nil || !ok || r.status() != "ok" {
		return Page{}, fmt.Errorf("read log %s: %v: %w", session, r.err, errReply)
	}
	for _, part := range parts {
		elements, _ := part.([]any)
		p.Elements = slices.Grow(p.Elements, len(elements))
		for _, e := range elements {
			element, _ := e.(string)
			p.Elements = append(p.Elements, element)
		}
	}
	return p, nil
}

func (r *replyFields) bounds() Bounds {
	return Bounds{
		Epoch: r.text(1), First: r.int(2) + 1, Last: r.int(3), Former: r.int(4),
		Ended: r.int(5) != 0, Deleted: r.int(6) != 0, CreatedAt: r.time(7), UpdatedAt: r.time(8),
	}
}

func (r *replyFields) time(i int) time.Time {
	ms, err := strconv.ParseInt(r.text(i), 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
