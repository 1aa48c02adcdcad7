package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// Listed is a session with its bounds after its last script.
type Listed struct {
	ID string
	Bounds
}

// scanned is how many keys Redis checks in one SCAN: about a millisecond's work.
const scanned = 1000

// Sessions returns up to count sessions whose ids begin with prefix and come after another id, in the order of their
// bytes. It changes nothing, and does not extend a log's life.
//
// Redis has no index of sessions, so Sessions reads the names of all keys. A list that another program pushed to counts
// as a session once it has been read or written here.
func (s *Store) Sessions(ctx context.Context, prefix, after string, count int) ([]Listed, error) {
	var all []Listed
	for len(all) < count {
		ids, err := s.names(ctx, prefix, after, count)
		if err != nil {
			return nil, fmt.Errorf("list sessions: %w", certain(classify(err)))
		}
		if len(ids) == 0 {
			break
		}
		found, err := s.listed(ctx, ids)
		if err != nil {
			return nil, fmt.Errorf("list sessions: %w", certain(classify(err)))
		}
		all, after = append(all, found...), ids[len(ids)-1]
	}
	return all[:min(count, len(all))], nil
}

// names returns the ids of the first count keys. Some may belong to deleted sessions.
func (s *Store) names(ctx context.Context, prefix, after string, count int) (ids []string, err error) {
	start, end, _ := strings.Cut(s.key("session", "\n"), "\n")
	match := start + prefix + "*" // neither contains a pattern character
	var mu sync.Mutex
	scan := func(ctx context.Context, c redis.Cmdable) error {
		for cursor := uint64(0); ; {
			keys, next, err := c.Scan(ctx, cursor, match, scanned).Result()
			if err != nil {
				return err
			}
			mu.Lock()
			for _, key := range keys {
				if id := strings.TrimSuffix(strings.TrimPrefix(key, start), end); id > after {
					ids = append(ids, id)
				}
			}
			if len(ids) > 2*count+scanned || next == 0 {
				slices.Sort(ids)
				ids = slices.Compact(ids) // SCAN may return a key twice
				ids = ids[:min(count, len(ids))]
			}
			mu.Unlock()
			if cursor = next; cursor == 0 {
				return nil
			}
		}
	}
	if cluster, ok := s.rdb.(*redis.ClusterClient); ok {
		err = cluster.ForEachMaster(ctx, func(ctx context.Context, c *redis.Client) error { return scan(ctx, c) })
	} else {
		err = scan(ctx, s.rdb)
	}
	return ids, err
}

// listed reads the bounds of those sessions that exist.
func (s *Store) listed(ctx context.Context, ids []string) (found []Listed, err error) {
	hashes, lengths := make([]*redis.SliceCmd, len(ids)), make([]*redis.IntCmd, len(ids))
	_, err = s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for i, id := range ids {
			hashes[i] = p.HMGet(ctx, s.key("session", id), "epoch", "base", "last_seen", "ended", "created_at", "updated_at", "deleted")
			lengths[i] = p.LLen(ctx, s.key("history", id))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, id := range ids {
		f := hashes[i].Val()
		number := func(k int) int64 {
			text, _ := f[k].(string)
			n, _ := strconv.ParseInt(text, 10, 64)
			return n
		}
		epoch, _ := f[0].(string)
		if epoch == "" || f[4] == nil || f[6] != nil {
			continue
		}
		b := Bounds{Epoch: epoch, First: number(1) + 1, Last: number(1) + lengths[i].Val(), Ended: f[3] != nil}
		if lengths[i].Val() == 0 { // it has expired, or nothing was appended yet
			b.Last = max(number(1), number(2))
			b.First = b.Last + 1
		}
		b.CreatedAt, b.UpdatedAt = time.UnixMilli(number(4)).UTC(), time.UnixMilli(number(5)).UTC()
		found = append(found, Listed{id, b})
	}
	return found, nil
}
