package api

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"

	"gapless/sse"
	"gapless/store"
)

// The demo lets the page show why this server exists. It can disturb a connection. It also has the viewer that
// first reads and then subscribes, which the page shows next to ours. A server with a real model has none of it.

// demo holds the naive viewers of this node, by the names of their connections. The hub holds all other viewers.
type demo struct {
	mu    sync.Mutex
	naive map[string]naiveViewer
}

// naiveViewer is a naive viewer's connection.
type naiveViewer struct {
	session string
	cut     func()
}

// show makes a naive viewer known until hide is called.
func (d *demo) show(connection string, n naiveViewer) (hide func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.naive[connection] = n
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.naive, connection)
	}
}

// find returns a function that cuts a naive viewer of a session, or nil if no such connection exists.
func (d *demo) find(session, connection string) (cut func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := d.naive[connection]; n.session == session {
		return n.cut
	}
	return nil
}

// slowPause is the pause after each chunk of a slowed connection: four chunks a second, while the demo's model says
// twenty words.
const slowPause = 250 * time.Millisecond

// disturb cuts a connection, or slows it down. Its caller may read the session, and knows the connection's name from
// welcome or from the response header.
func (a *API) disturb(c echo.Context) error {
	if err := checkJSON(c); err != nil {
		return err
	}
	body, err := a.readBody(c, a.atMost(c, smallBody))
	if err != nil {
		return err
	}
	members, err := readStrings(body, "connection", "do")
	if err != nil {
		return err
	}
	v, cut := a.hub.Viewer(session(c), members["connection"]), a.demo.find(session(c), members["connection"])
	if v != nil {
		cut = func() { v.Leave(sse.Cut) }
	}
	if cut == nil {
		return &Problem{Status: http.StatusNotFound, Code: "connection_not_found", Member: "/connection",
			Detail: "unknown connection: it may have ended, or belong to another node"}
	}
	pause := time.Duration(0)
	switch members["do"] {
	case "cut":
		cut()
	case "slow":
		pause = slowPause
		fallthrough
	case "quick":
		if v != nil { // a naive viewer always has the same speed
			v.Slow(pause)
		}
	default:
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "/do", Detail: "do must be cut, slow or quick"}
	}
	return c.NoContent(http.StatusNoContent)
}

// naivePart is how much of the history is read and sent at once, in bytes. naiveCost is a naive viewer's size in
// memory: the part as it is read and as it is sent, and the messages received but not sent (naiveHeard).
const (
	naivePart  = 32 << 10
	naiveHeard = 64 << 10
	naiveCost  = 3*naivePart + naiveHeard
)

// maxGap is the maximum time between the two steps of a naive viewer, in ms.
const maxGap = 2000

// readFirst is the kind of viewer that this server replaces: it reads the history, sends it, and then subscribes.
// Messages published in between are lost without notice. The time in between is normally some milliseconds. The caller
// can stretch it, to show the loss without waiting for bad luck.
func (a *API) readFirst(c echo.Context) error {
	gap := 0
	if text := c.QueryParam("gap"); text != "" {
		var err error
		if gap, err = strconv.Atoi(text); err != nil || gap < 0 || gap > maxGap {
			return invalid("gap", fmt.Sprintf("gap must be a number of milliseconds from 0 to %d", maxGap))
		}
	}
	id, caller := strings.Clone(session(c)), a.caller(c)
	if err := a.limits.Naive.Take(caller, 1); err != nil {
		return err
	}
	defer a.limits.Naive.Give(caller, 1)
	if err := out(c).take(caller, naiveCost); err != nil {
		return err
	}
	ctx, cut := context.WithCancel(c.Request().Context())
	defer cut()
	defer context.AfterFunc(a.draining, cut)()
	if g := a.grant(c); !g.Expires.IsZero() {
		defer time.AfterFunc(time.Until(g.Expires), cut).Stop()
	}
	page, err := a.logs.Read(ctx, id, 1, naivePart, 1000)
	if err != nil {
		return err
	}
	connection, err := newConnection(c)
	if err != nil {
		return err
	}
	defer a.demo.show(connection, naiveViewer{id, cut})()
	h := c.Response().Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-cache, no-transform")
	h.Set("X-Accel-Buffering", "no")
	c.Response().WriteHeader(http.StatusOK)
	if c.Request().Method == http.MethodHead {
		return nil
	}
	a.log.LogAttrs(ctx, slog.LevelInfo, "naive viewer begins", slog.String("session", id), slog.String("connection", connection), slog.Int64("last", page.Last))

	to := c.Response().Writer
	ctl := http.NewResponseController(to)
	say := func(text string) error {
		if _, err := io.WriteString(to, text); err != nil { // in pieces, each with its own deadline
			return err
		}
		if err := ctl.Flush(); err != nil {
			return err
		}
		return ctl.SetWriteDeadline(time.Time{}) // a deadline that passes in silence ends an HTTP/2 stream
	}
	err = say(fmt.Sprintf(":\nevent: welcome\ndata: {\"type\":\"welcome\",\"connection\":%q,\"last_seq\":%d}\n\n", connection, page.Last))
	for last := page.Last; err == nil && len(page.Elements) > 0; {
		var history strings.Builder
		for i, element := range page.Elements {
			if seq := page.From + int64(i); seq <= last { // LRANGE 0 -1 would not have returned later chunks
				event, _ := store.AppendElement([]byte("data: "), seq, element)
				history.Write(append(event, "\n\n"...))
			}
		}
		if err = say(history.String()); err != nil || page.Next() > last {
			break
		}
		page, err = a.logs.Read(ctx, id, page.Next(), naivePart, 1000)
	}
	if err == nil {
		select {
		case <-time.After(time.Duration(gap) * time.Millisecond):
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err == nil {
		heard := make(chan string, 1024)
		var waits atomic.Int64 // bytes in it
		go func() {            // ended by cut; only it sends on the channel
			defer close(heard)
			tell := func(text string) {
				if waits.Load()+int64(len(text)) > naiveHeard { // messages beyond that are lost, too
					return
				}
				select {
				case heard <- text:
					waits.Add(int64(len(text)))
				default:
				}
			}
			_ = a.logs.Overhear(ctx, id,
				func() { tell("event: subscribed\ndata: {\"type\":\"subscribed\"}\n\n") },
				func(payload string) {
					if payload != store.Hint && !strings.ContainsAny(payload, "\r\n") {
						tell("data: " + payload + "\n\n")
					}
				})
		}()
		for text := range heard {
			waits.Add(-int64(len(text)))
			if err == nil {
				if err = say(text); err != nil {
					cut()
				}
			}
		}
	}
	a.log.LogAttrs(context.Background(), slog.LevelInfo, "naive viewer ends", slog.String("session", id), slog.String("connection", connection))
	panic(http.ErrAbortHandler) // like our streams: the client must reconnect
}
