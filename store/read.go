package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// Bounds are what one instant knew of a log.
type Bounds struct {
	Epoch string // empty: there is no such session
	// First and Last bound what is kept; when nothing is, First is Last+1.
	First, Last int64
	// Former is the number after which this epoch began: a cursor below it means another log. No chunk ever had it.
	Former               int64
	Ended, Deleted       bool
	CreatedAt, UpdatedAt time.Time
}

// Exists reports whether there is such a session: not one that was deleted, nor one that this node remembers and Redis has lost.
func (b Bounds) Exists() bool { return b.Epoch != "" && !b.Deleted && !b.CreatedAt.IsZero() }

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
// (0: only the bounds); of many, fewer may be answered than would fit. There is more when Page.Next() <= Page.Last.
//
// The log of a session that does not exist has an empty Epoch, and reading it makes
// nothing. ErrAway means away, never empty.
func (s *Store) Read(ctx context.Context, session string, from int64, bytes, count int) (Page, error) {
	p, err := s.readSlice(ctx, session, from, bytes, count)
	size := 0
	for _, element := range p.Elements {
		size += len(element)
	}
	// What follows is of one instant with it as long as the epoch is the same: a log does not change under its numbers.
	for n := len(p.Elements); err == nil && n > 0 && from != Newest && p.Next() <= p.Last && size < bytes && len(p.Elements) < count; {
		// (Between two slices others have their turn.)
		var next Page
		if next, err = s.readSlice(ctx, session, p.Next(), bytes-size, count-len(p.Elements)); err != nil {
			break
		}
		if n = len(next.Elements); next.Epoch != p.Epoch || next.From != p.Next() || next.Deleted {
			break
		}
		for i, element := range next.Elements {
			if size += len(element); size > bytes || next.From+int64(i) > p.Last {
				next.Elements, size = next.Elements[:i], bytes
				break
			}
		}
		p.Elements = append(p.Elements, next.Elements...)
	}
	err = certain(err)
	if err != nil {
		return Page{}, fmt.Errorf("read log %s: %w", session, err)
	}
	return p, nil
}

// readSlice reads as much of a page as Redis can give without others having to wait for long.
func (s *Store) readSlice(ctx context.Context, session string, from int64, bytes, count int) (Page, error) {
	alone := 0
	if bytes >= aloneLeast {
		alone = aloneMost
	}
	p, size, err := s.read(ctx, session, from, bytes, count, alone)
	if err == nil && size > 0 {
		var ok bool
		if p, ok, err = s.readAlone(ctx, session, p, size, bytes, count); err == nil && !ok {
			p, _, err = s.read(ctx, session, from, bytes, count, 0)
		}
	}
	return p, err
}

// A page of aloneLeast bytes, or more, is read by LRANGE alone if all of the list has no more bytes than aloneMost. That reads
// aloneSlice bytes at once, or somewhat more: the elements are not all alike, but all of them are aloneMost. The script reads no more
// than sliceMost. Each takes Redis a few milliseconds.
const (
	aloneLeast = largeRead
	aloneMost  = 8 << 20
	aloneSlice = 1 << 20
	sliceMost  = 256 << 10
)

// read asks the script. Where it answers that the elements are to be read without it, that is where they
// begin, and size is how many bytes the list has; else size is 0.
func (s *Store) read(ctx context.Context, session string, from int64, bytes, count, alone int) (p Page, size int64, failed error) {
	wanted := bytes
	bytes = min(bytes, sliceMost)
	var reply []any
	for reply == nil || reply[0] == again {
		if reply != nil && ctx.Err() != nil {
			return p, 0, fmt.Errorf("%w: %w", ErrAway, ctx.Err())
		}
		var err error
		if reply, err = s.run(ctx, scriptRead, session, wanted, false, from, bytes, count, alone); err != nil {
			return p, 0, err
		}
	}
	r := fields(reply)
	if r.status() == "absent" {
		return Page{Bounds: Bounds{First: 1}, From: 1}, 0, nil
	}
	p = Page{Bounds: r.bounds(), From: r.int(11)}
	if r.status() == "large" {
		size = r.int(12)
		return p, size, r.err
	}
	parts, ok := r.at(12).([]any)
	if r.err != nil || !ok || r.status() != "ok" && r.status() != "lost" {
		return p, 0, fmt.Errorf("%v: %w", r.err, errReply)
	}
	for _, part := range parts {
		elements, _ := part.([]any)
		p.Elements = slices.Grow(p.Elements, len(elements))
		for _, e := range elements {
			element, _ := e.(string)
			p.Elements = append(p.Elements, element)
		}
	}
	return p, 0, nil
}

// readAlone reads the bounds and, in the same transaction, what stands where p begins, of a list that has so
// many bytes. It is not ok when that was trimmed, or is gone, since p.
func (s *Store) readAlone(ctx context.Context, session string, p Page, size int64, bytes, count int) (page Page, ok bool, failed error) {
	begun := time.Now()
	defer func() { s.metrics.ran(scriptRead, begun, failed) }()
	length := p.Last - p.First + 1
	n := min(int64(min(bytes, aloneSlice))*length/size, p.Last-p.From+1, int64(count))
	from, to := p.From-p.First, p.From-p.First+max(n, 1)-1 // as LRANGE counts, from the end that is not pushed to
	if s.cfg.HistoryOrder == NewestFirst {
		from, to = -1-to, -1-from
	}
	argv, err := s.argv(scriptRead, []*call{{session: session, args: []any{p.From, 0, 0, 0}}})
	if err != nil {
		return p, false, err
	}
	if err := s.large.enter(ctx, callerOf(ctx, session)); err != nil {
		return p, false, classify(err)
	}
	defer s.large.leave()
	bounds := redis.NewCmd(ctx, argv...)
	var list *redis.StringSliceCmd
	_, err = s.rdb.TxPipelined(ctx, func(tx redis.Pipeliner) error {
		list = tx.LRange(ctx, s.key("history", session), from, to)
		return tx.Process(ctx, bounds)
	})
	if reply := redis.Error(nil); errors.As(err, &reply) || errors.Is(err, errStale) {
		return p, false, nil // the script is not known any more, or a command is not allowed: the script that does it all says why
	}
	if err != nil {
		return p, false, classify(err)
	}
	replies, err := bounds.Slice()
	if err != nil || len(replies) != 1 {
		return p, false, fmt.Errorf("%v: %w", err, errReply)
	}
	reply, _ := replies[0].([]any)
	r := fields(reply)
	if len(reply) == 0 || r.status() != "ok" {
		return p, false, nil // the script says why
	}
	page = Page{Bounds: r.bounds(), From: p.From, Elements: list.Val()}
	if r.err != nil {
		return p, false, fmt.Errorf("%v: %w", r.err, errReply)
	}
	if page.First != p.First { // what stands there has another number
		return p, false, nil
	}
	if s.cfg.HistoryOrder == NewestFirst {
		slices.Reverse(page.Elements)
	}
	total := 0
	for i, element := range page.Elements {
		if total += len(element); total > bytes && i > 0 {
			page.Elements = slices.Clip(page.Elements[:i])
			break
		}
	}
	return page, true, nil
}

func (r *replyFields) bounds() Bounds {
	return Bounds{
		Epoch: r.text(1), First: r.int(5) + 1, Last: r.int(2), Former: r.int(6),
		Ended: r.int(7) != 0, Deleted: r.int(8) != 0, CreatedAt: r.time(9), UpdatedAt: r.time(10),
	}
}

func (r *replyFields) time(i int) time.Time {
	ms, err := strconv.ParseInt(r.text(i), 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

// certain is the error of a call whose outcome nobody needs to know, since it can be made again.
func certain(err error) error {
	if half, ok := errors.AsType[*HalfDoneError](err); ok {
		return classify(scriptError(half.Text))
	}
	if errors.Is(err, ErrOutcomeUnknown) {
		return fmt.Errorf("%w: %v", ErrAway, err)
	}
	return err
}
