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

// Bounds describes a log at one instant.
type Bounds struct {
	Epoch string // empty: the session does not exist
	// First and Last are the bounds of the kept chunks. If none are kept, First is Last+1.
	First, Last int64
	// Former is the number after which this epoch began. A cursor below it belongs to another log. No chunk ever had
	// this number.
	Former               int64
	Ended, Deleted       bool
	CreatedAt, UpdatedAt time.Time
}

// Exists reports whether the session exists. It is false for a deleted session, and for a session that this node
// remembers and Redis has lost.
func (b Bounds) Exists() bool { return b.Epoch != "" && !b.Deleted && !b.CreatedAt.IsZero() }

// Page is a sequence of consecutive chunks of a log, with the log's bounds at the instant of the read.
type Page struct {
	Bounds
	From     int64    // the number of the first element
	Elements []string // as they are in the list
}

// Next returns the number after the page.
func (p Page) Next() int64 { return p.From + int64(len(p.Elements)) }

// Newest makes Read return the end of the log.
const Newest = 0

// Read returns the chunks of a log beginning with number from, as far as they are kept, or the Newest. It returns as
// many as fit into the given number of bytes, but at least one, and at most count (0: only the bounds). It may return
// fewer than would fit. More follow if Page.Next() <= Page.Last.
//
// If the session does not exist, the Epoch is empty, and Read creates nothing. An unreachable Redis is always ErrAway,
// never an empty log.
func (s *Store) Read(ctx context.Context, session string, from int64, bytes, count int) (Page, error) {
	p, err := s.readSlice(ctx, session, from, bytes, count)
	size := 0
	for _, element := range p.Elements {
		size += len(element)
	}
	// Within one epoch the slices belong together, because a log does not change under its numbers.
	for n := len(p.Elements); err == nil && n > 0 && from != Newest && p.Next() <= p.Last && size < bytes && len(p.Elements) < count; {
		// Other callers get their turn between two slices.
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

// readSlice reads as much of a page as Redis can return without making others wait for long.
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

// LRANGE alone reads a page of at least aloneLeast bytes, if the list has at most aloneMost bytes. It reads about
// aloneSlice bytes at once. It may read more, because the elements differ in size, but never more than aloneMost. The
// script reads at most sliceMost. Each read takes Redis a few milliseconds.
const (
	aloneLeast = largeRead
	aloneMost  = 8 << 20
	aloneSlice = 1 << 20
	sliceMost  = 256 << 10
)

// read calls the script. The script may reply that the elements should be read without it. Then p begins where they begin,
// and size is the size of the list in bytes. Otherwise size is 0.
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

// readAlone reads, in one transaction, the bounds of a list of size bytes and the elements where p begins. ok is false
// if these have been trimmed, or are gone, since p.
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
		return p, false, nil // Redis forgot the script, or denies a command: the script that does it all says why
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
	if page.First != p.First { // the elements there have other numbers now
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

// certain converts the error of a call that is safe to repeat, so that its outcome does not matter.
func certain(err error) error {
	if half, ok := errors.AsType[*HalfDoneError](err); ok {
		return classify(scriptError(half.Text))
	}
	if errors.Is(err, ErrOutcomeUnknown) {
		return fmt.Errorf("%w: %v", ErrAway, err)
	}
	return err
}
