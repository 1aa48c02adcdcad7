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

// A ticket admits a page's EventSource, which can send no header and has no cookie of another domain. The ticket is in
// a URL, and URLs are recorded: in proxies' logs, in histories, on screens. So a ticket is worth as little as possible.
//
// A ticket opens one grant, to read one session, and only within TicketLife. EventSource reconnects with the same URL
// whenever its connection breaks, and may never have read the first response. So "used once" cannot mean one request.
// It means one grant: the URL works again while the grant lives. A standing connection renews the grant, and the grant
// lapses TicketLife after the last connection has gone. Only one connection exists at a time. The newest replaces the
// earlier one, because an earlier connection of the same page may be half dead for minutes without anybody noticing.
// Anyone who learns the URL after that finds it spent. Anyone who learns it earlier and uses it displaces the page, and
// the user notices. The page displaces them when it reconnects. Nothing tells the two apart that a network change would
// not change as well.
//
// The grant never outlives the token with which it was made. Redis stores only the ticket's hash, which admits nobody.
// One script decides, so two nodes that are asked at once are served one after the other. A ticket that Redis has lost
// is spent. A standing connection keeps its grant, and restores it.

// TicketLife is how long a ticket may remain unused, and how long its grant waits for a connection to come back. A
// minute covers a tunnel, or a page that loads slowly.
const TicketLife = time.Minute

// ErrTicketSpent means that a ticket admits nobody: it was never made, was not used in time, belongs to another
// session, or its grant has lapsed.
var ErrTicketSpent = errors.New("the ticket is spent")

// ErrTicketReplaced means that another connection has entered with the ticket.
var ErrTicketReplaced = errors.New("another connection has come in with the ticket")

// TicketName returns the name of a ticket in Redis, which does not reveal the ticket.
func TicketName(ticket string) string {
	sum := sha256.Sum256([]byte(ticket))
	return hex.EncodeToString(sum[:])
}

// MakeTicket makes a ticket of this name good for a session. until is when its grant ends at the latest, or zero for
// never. After ErrAway the ticket may be good for nothing.
func (s *Store) MakeTicket(ctx context.Context, name, session string, until time.Time) error {
	_, err := s.ticket(ctx, "make", name, session, "", until)
	return err
}

// EnterTicket admits a connection, in place of any earlier one, and returns when its grant ends, or zero for never. The
// errors are ErrTicketSpent and ErrAway.
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

// RenewTicket renews the grant of a standing connection. The errors are ErrTicketReplaced and ErrAway.
func (s *Store) RenewTicket(ctx context.Context, name, session, connection string, until time.Time) error {
	_, err := s.ticket(ctx, "renew", name, session, connection, until)
	return err
}

// ListenTickets subscribes l to the names of tickets with which another connection may have entered. RenewTicket tells
// whether it has. Only one such Listener exists.
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
	if Why(err) == RedisFull { // tickets are small and short-lived
		if other, failed := send(scriptTicketFull); failed == nil {
			cmd, err = other, nil
		}
	}
	s.metrics.ran(scriptTicket, begun, err)
	s.refusals.note(ctx, err)
	if errors.Is(err, ErrOutcomeUnknown) { // every call is safe to repeat
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

// until returns the time in a field, in which 0 means never.
func (r *replyFields) until(i int) time.Time {
	ms := r.int(i)
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
