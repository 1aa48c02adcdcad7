package store_test

import (
	"errors"
	"fmt"
	"testing"

	"gapless/store"
	"gapless/store/storetest"
)

// A permission is revoked, so that scripts fail halfway. A chunk with a producer number is stored once, however often
// it is sent, even after the permission is granted again. A log that could not be deleted is unchanged.
func TestRights_aScriptThatFailsHalfwayStoresNothingTwiceAndDestroysNothing(t *testing.T) {
	for _, right := range []string{"hset", "zadd", "hdel", "time", "rpush", "pexpire", "zremrangebylex"} {
		t.Run(right, func(t *testing.T) {
			r := storetest.Redis(t)
			user := []string{"ACL", "SETUSER", "half", "on", ">s3same", "~*", "&*", "+@all"}
			doLine(t, r, user)
			s := open(t, func(cfg *store.Config) { cfg.Redis = as(r, "half") })
			for i := range 3 {
				mustAppend(t, s, "old", delta(fmt.Sprint(i)))
			}
			numbered := store.Batch{Chunks: []store.Chunk{of("m")}, Producer: store.Producer{ID: "p"}}
			if _, err := s.Append(t.Context(), "s", numbered); err != nil {
				t.Fatal(err)
			}
			mustAppend(t, s, "s", delta("between"))
			numbered.Chunks, numbered.Producer.Number = []store.Chunk{of("n")}, 1
			doLine(t, r, append(user, "-"+right))
			for range 3 {
				_, _ = s.Append(t.Context(), "s", numbered)
			}
			deleted := s.Delete(t.Context(), "old")
			if n := r.LLen(t.Context(), "chat:history:s").Val(); n > 3 {
				t.Errorf("without the right there are %d chunks", n)
			}
			doLine(t, r, user)
			// The remains of the attempt do not count as the chunk's position, because other chunks come before it now.
			before := r.LLen(t.Context(), "chat:history:s").Val()
			for range 9 {
				eventually(t, "it takes chunks again", func() bool {
					_, err := s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta("x")}})
					return err == nil
				})
			}
			stored, err := s.Append(t.Context(), "s", numbered)
			if n := r.LLen(t.Context(), "chat:history:s").Val(); err != nil || n != 12 {
				t.Errorf("there are %d chunks (%v)", n, err)
			}
			known, err := s.Append(t.Context(), "s", numbered)
			if err != nil || known.Known != 1 || known.First != stored.First || before == 2 && known.First != 12 {
				t.Errorf("it is stored as %+v, and known as %+v (%v)", stored, known, err)
			}
			other := open(t, func(cfg *store.Config) { cfg.Redis = as(r, "half") }) // it remembers nothing
			b, err := other.Describe(t.Context(), "old")
			gone := errors.Is(err, store.ErrNotFound)
			if err != nil && !gone || deleted == nil && !gone || !gone && (b.First != 1 || b.Last != 3) {
				t.Errorf("a log is %+v (%v), and to delete it said %v", b, err, deleted)
			}

			if a := mustAppend(t, other, "old", delta("new")); gone && a.First != 1_000_001 {
				t.Errorf("after the deletion it goes on at %d", a.First)
			}
		})
	}
}
