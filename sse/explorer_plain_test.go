package sse

import (
	"context"
	"net/http"
	"time"
)

// connectPlainly runs a client's handler in a goroutine, as for a connection that is not taken
// over.
func connectPlainly(s *stage, c *client, h *Hub, v *Viewer) {
	ctx, cut := context.WithCancel(context.Background())
	c.sink.gone = cut
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	gone := c.gone
	go func() { // ended by cut, the end of the log, or the hub
		defer cut()
		defer v.Close()
		if cause := v.Over(ctx, time.Minute); cause != "" {
			gone <- parting{cause, false, s.log()}
			return
		}
		out := h.NewWriter(c.sink, r)
		cause := v.Serve(ctx, out)
		out.leaveQuietly()
		gone <- parting{cause, true, s.log()}
	}()
}
