package store

import (
	"context"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// servers recognizes when Redis was restarted, or another server has taken its place: each process of Redis has its own run_id. After that,
// chunks may be missing. Every new connection asks, so no command reaches a restarted Redis before this is known.
type servers struct {
	replacedAt atomic.Int64 // in milliseconds since 1970; 0: never
	denied     atomic.Bool  // the user lacks the right to INFO

	mu    sync.Mutex
	known map[string]string // run_id by address; one that Sentinels name has always the same
}

var runID = regexp.MustCompile(`(?m)^run_id:([0-9a-f]+)`)

// connected implements redis.Options.OnConnect. It never fails: if the connection is bad, the next command finds out.
func (s *servers) connected(ctx context.Context, c *redis.Conn) error {
	if s.denied.Load() {
		return nil
	}
	info, err := c.Info(ctx, "server").Result()
	if redis.IsPermissionError(err) {
		s.denied.Store(true)
	}
	found := runID.FindStringSubmatch(info)
	if found == nil || strings.Contains(info, "redis_mode:sentinel") {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := s.known[c.String()]; was != "" && was != found[1] {
		s.replacedAt.Store(time.Now().UnixMilli())
	}
	if s.known == nil {
		s.known = map[string]string{}
	}
	s.known[c.String()] = found[1]
	return nil
}
