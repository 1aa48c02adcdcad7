package api

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"gapless/api/auth"
	"gapless/sse"
	"gapless/store"
)

// ticketJSON is a ticket as its holder sees it, once.
type ticketJSON struct {
	Ticket    string    `json:"ticket"`
	ExpiresAt time.Time `json:"expires_at"` // if it is not used by then
	URL       string    `json:"url"`        // of the stream, relative to the server's URL
}

// createTicket makes a ticket for the session's stream. The store explains tickets (ticket.go).
func (a *API) createTicket(c echo.Context) error {
	if err := a.limits.Tickets.Take(a.caller(c), 1); err != nil {
		return err
	}
	id, g := session(c), a.grant(c)
	ticket := rand.Text()
	expires := time.Now().Add(store.TicketLife).UTC()
	if !g.Expires.IsZero() && g.Expires.Before(expires) {
		expires = g.Expires.UTC()
	}
	if err := a.logs.MakeTicket(c.Request().Context(), store.TicketName(ticket), id, g.Expires); err != nil {
		return err
	}
	c.Response().Header().Set("Cache-Control", "no-store")
	return c.JSON(http.StatusCreated, ticketJSON{ticket, expires, "/v1/sessions/" + id + "/stream?ticket=" + ticket})
}

// enter admits a connection with its ticket. The caller must end the admission with the response.
func (a *API) enter(ctx context.Context, ticket, id, connection string) (auth.Grant, *admission, error) {
	m := &admission{tickets: a.tickets, name: store.TicketName(ticket), session: strings.Clone(id), connection: connection}
	m.timer = time.AfterFunc(renewEvery, m.renew) // stopped by end
	a.tickets.add(m)                              // first, so that it hears of a connection that replaces it
	until, err := a.logs.EnterTicket(ctx, m.name, id, connection)
	if errors.Is(err, store.ErrTicketSpent) {
		err = &Problem{Status: http.StatusUnauthorized, Code: "ticket_spent", Member: "ticket", challenge: `Bearer realm="gapless"`,
			Detail: "the ticket was used before, has expired, or is for another session: get a new one with POST /v1/sessions/{id}/tickets"}
	}
	if err != nil {
		m.end()
		return auth.Grant{}, nil, err
	}
	m.begin(until)
	return auth.Viewing(m.session, until), m, nil
}

// admission is a connection that a ticket has admitted. It renews the grant while the connection stands.
type admission struct {
	tickets                   *tickets
	name, session, connection string
	timer                     *time.Timer

	mu       sync.Mutex
	until    time.Time
	begun    bool // Redis has admitted it
	doubtful bool // a notification came before that
	replaced bool
	over     bool
	viewer   *sse.Viewer
}

// renewEvery leaves most of the grant's life to a connection that breaks, and leaves time for a retry.
const renewEvery = store.TicketLife / 4

func (m *admission) begin(until time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.begun, m.until = true, until
	if m.doubtful {
		m.timer.Reset(0)
	}
}

// view sets the viewer that must leave when another connection enters.
func (m *admission) view(v *sse.Viewer) {
	m.mu.Lock()
	m.viewer = v
	replaced := m.replaced
	m.mu.Unlock()
	if replaced {
		v.Leave(sse.Replaced)
	}
}

// renew renews the grant, or finds that another connection has it. If Redis is away, a standing connection stays. renew
// returns within Redis's timeouts, and blocks nobody.
func (m *admission) renew() {
	m.mu.Lock()
	m.doubtful = !m.begun
	idle, until := !m.begun || m.over || m.replaced, m.until
	m.mu.Unlock()
	if idle {
		return
	}
	err := m.tickets.logs.RenewTicket(context.Background(), m.name, m.session, m.connection, until)
	if !errors.Is(err, store.ErrTicketReplaced) {
		m.timer.Reset(renewEvery*3/4 + mathrand.N(renewEvery/2)) // #nosec G404 -- no secret: it spreads times
		return
	}
	m.mu.Lock()
	m.replaced = true
	v := m.viewer
	m.mu.Unlock()
	if v != nil {
		v.Leave(sse.Replaced)
	}
}

// end ends m with its response.
func (m *admission) end() {
	m.mu.Lock()
	m.over = true
	m.mu.Unlock()
	m.timer.Stop()
	m.tickets.remove(m)
}

// tickets holds the connections of this node that tickets have admitted. After the first one, it listens for other
// connections that enter.
type tickets struct {
	logs   Logs
	listen sync.Once

	mu  sync.Mutex
	all map[string]map[*admission]struct{} // by the ticket's name
}

func (t *tickets) add(m *admission) {
	t.listen.Do(func() { t.logs.ListenTickets(t) }) // the store's Close ends it
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all[m.name] == nil {
		t.all[m.name] = map[*admission]struct{}{}
	}
	t.all[m.name][m] = struct{}{}
}

func (t *tickets) remove(m *admission) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if delete(t.all[m.name], m); len(t.all[m.name]) == 0 {
		delete(t.all, m.name)
	}
}

// Live implements store.Listener: a connection has entered with a ticket. Redis knows which connection it replaced.
func (t *tickets) Live(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for m := range t.all[name] {
		m.timer.Reset(0)
	}
}

// Resync implements store.Listener: names may have been missed. The renewals are spread over time.
func (t *tickets) Resync() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, all := range t.all {
		for m := range all {
			m.timer.Reset(mathrand.N(time.Second)) // #nosec G404 -- no secret: it spreads times
		}
	}
}
