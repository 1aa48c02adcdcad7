package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// A ticket lets a page's EventSource in, which can send no header and has no cookie of another
// domain. It stands in a URL, and URLs are written down: in proxies' logs, in histories, on
// screens. So it is worth as little as can be.
//
// It opens one grant, to read one session, and only within TicketLife. EventSource comes back
// with the same URL whenever its connection breaks, and may never have read the first response:
// so "used once" cannot mean one request. It means one grant: the URL works again while the
// grant lives, which is renewed while a connection stands, and lapses TicketLife after the last
// one has gone. There is one connection at a time: the newest takes the place of the former,
// since a former one of the same page may be half dead for minutes, unknown to anybody. Whoever
// learns the URL after that finds it spent. Whoever learns it earlier and uses it puts the page
// out of its place, which shows, and the page puts them out when it comes back; nothing tells the
// two apart that a network change would not change as well.
//
// The grant never outlives the token that it was made by. Redis keeps the ticket's hash alone,
// under which nobody can come in, and one script decides, so that of two nodes that are asked at
// once there is one after the other. A ticket that Redis has lost is spent; a connection that
// stands keeps its grant, and brings it back.

// TicketLife is how long a ticket waits to be used, and its grant for a connection to come
// back: a minute is a tunnel, or a page that is slow to load.
const TicketLife = time.Minute

// ErrTicketSpent says that a ticket opens nothing: it was never made, was not used in time, is
// another session's, or its grant has lapsed.
var ErrTicketSpent = errors.New("the ticket is spent")

// ErrTicketReplaced says that another connection has come in with a ticket.
var ErrTicketReplaced = errors.New("another connection has come in with the ticket")

// TicketName is what a ticket is called in Redis: it tells nobody the ticket.
func TicketName(ticket string) string {
	sum := sha256.Sum256([]byte(ticket))
	return hex.EncodeToString(sum[:])
}

// MakeTicket makes a ticket of this name good for a session. until is when its grant ends at
// the latest; zero: never. ErrAway: it may not be good for anything.
func (s *Store) MakeTicket(ctx context.Context, name, session string, until time.Time) error {
	_, err := s.ticket(ctx, "make", name, session, "", until)
	return err
}

// EnterTicket lets a connection in, in place of any former one, and says until when; zero:
// for ever. Errors: ErrTicketSpent, ErrAway.
func (s *Store) EnterTicket(ctx context.Context, name, session, connection string) (until time.Time, err error) {
	r, err := s.ticket(ctx, "enter", name, session, connection, time.Time{})
	if err != nil {
		return time.Time{}, err
	}
	until = r.until(1)
	if r.err == nil && !until.IsZero() && !time.Now().Before(until) {
		return time.Time{}, ErrTicketSpent
	}
	return until, r.err
}

// RenewTicket keeps the grant of a connection that stands. Errors: ErrTicketReplaced, ErrAway.
func (s *Store) RenewTicket(ctx context.Context, name, session, connection string, until time.Time) error {
	_, err := s.ticket(ctx, "renew", name, session, connection, until)
	return err
}

// ListenTickets subscribes l to the names of tickets with which another connection has come
// in, perhaps: RenewTicket tells. There is one such Listener.
func (s *Store) ListenTickets(l Listener) (stop func()) {
	return s.ears.listenWide(s.cfg.Prefix+tickets, l)
}

func (s *Store) ticket(ctx context.Context, what, name, session, connection string, until time.Time) (r *replyFields, err error) {
	ms := int64(0)
	if !until.IsZero() {
		ms = until.UnixMilli()
	}
	begun := time.Now()
	send := func(which int) (*redis.Cmd, error) {
		cmd, _, err := s.sendScript(ctx, which, []any{"evalsha", s.scripts[which].sha, 1, s.cfg.Prefix + "ticket:" + name,
			what, session, connection, ms, TicketLife.Milliseconds(), begun.UnixMilli(), s.cfg.Prefix + tickets, name}, s.send)
		s.elsewhere(err)
		return cmd, classify(err)
	}
	cmd, err := send(scriptTicket)
	if Why(err) == RedisFull { // they are small, and soon gone
		if other, failed := send(scriptTicketFull); failed == nil {
			cmd, err = other, nil
		}
	}
	s.metrics.ran(scriptTicket, begun, err)
	s.refusals.note(ctx, err)
	if errors.Is(err, ErrOutcomeUnknown) { // to do any of it again does no harm
		err = fmt.Errorf("%w: %v", ErrAway, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s ticket of %s: %w", what, session, err)
	}
	reply, _ := cmd.Val().([]any)
	switch r = fields(reply); r.status() {
	case "ok":
		return r, nil
	case "spent":
		return nil, ErrTicketSpent
	case "replaced":
		return nil, ErrTicketReplaced
	}
	return nil, fmt.Errorf("%s ticket of %s: status %q: %w", what, session, r.status(), errReply)
}

// until is a time of which 0 means never.
func (r *replyFields) until(i int) time.Time {
	ms := r.int(i)
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
