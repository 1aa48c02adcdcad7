package store

import (
	"context"
	"net"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// embedded is a Redis inside this process, so that one command runs everything and
// there is one code path for storage. It keeps nothing on disk and listens nowhere:
// connections are pipes.
type embedded struct{ redis *miniredis.Miniredis }

func openEmbedded() *embedded {
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true) // expiry follows the clock
	return &embedded{m}
}

func (e *embedded) dial(context.Context, string, string) (net.Conn, error) { return e.redis.Dial() }

func (e *embedded) close() { e.redis.Close() }

// Asking whether a server announces maintenance costs a command at each connect.
var noMaintNotifications = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
