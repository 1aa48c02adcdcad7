package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// A probe checks whether Redis can be read and accepts writes, and tries the permissions of its user. PING proves
// neither: it succeeds on a demoted master, and fails while a full disk stops only writes.
//
// The read is the script that reads logs. The writes are the commands of the scripts, sent after MULTI. When Redis
// queues a command, it checks permissions, memory, replicas and disk exactly as when it executes it. DISCARD then drops
// the commands, so nothing is written.

const (
	// probeEvery is the minimum time between two probes, however often /readyz is called.
	probeEvery = 500 * time.Millisecond
	// refusedProbe is how often the node itself probes Redis while Redis refuses something.
	refusedProbe = time.Second
	probeTimeout = time.Second
)

// probes holds the last probe.
type probes struct {
	turn    chan struct{} // held by the probing goroutine
	at      time.Time
	err     error
	missing []string    // permissions that its user does not have
	simple  atomic.Bool // its user may not do what try does
}

// Probe reports whether Redis can be read, and updates Writes. Calls in quick succession share one result.
func (s *Store) Probe(ctx context.Context) error {
	p := &s.probes
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return &AwayError{Code: RedisAway, Err: ctx.Err()}
	}
	if p.at.IsZero() || time.Since(p.at) >= probeEvery {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTimeout) // other callers share the result
		defer cancel()
		p.err = s.probe(ctx)
		p.at = time.Now()
	}
	return p.err
}

// probe probes each master. Its error is nil if one of them can be read.
func (s *Store) probe(ctx context.Context) error {
	ids := s.probed(ctx)
	reads, writes := make([]error, len(ids)), make([]error, len(ids))
	missing := make([][]string, len(ids))
	var wg sync.WaitGroup
	for i, id := range ids {
		wg.Go(func() {
			c := &call{session: id, args: []any{1, 0, 0, 0}}
			s.exec(ctx, scriptRead, []*call{c})
			if reads[i] = classify(c.err); reads[i] != nil {
				s.refusals.note(context.WithoutCancel(ctx), reads[i]) // a timeout says something, too
			} else {
				s.refusals.answered()
			}
			if s.cfg.Redis != Embedded && (reads[i] == nil || Why(reads[i]) == RedisDenied) { // find the missing permission
				missing[i], writes[i] = s.try(ctx, id)
			}
		})
	}
	wg.Wait()
	s.lacks(slices.Concat(missing...))
	if !slices.ContainsFunc(reads, func(err error) bool { return err == nil }) {
		return fmt.Errorf("probe redis: %w", reads[0])
	}
	for _, err := range writes {
		if err != nil {
			s.refusals.note(ctx, err)
			return nil
		}
	}
	if !slices.ContainsFunc(reads, func(err error) bool { return err != nil }) {
		s.refusals.accepted()
	}
	return nil
}

// probed returns session ids that no client can have, one for each master.
func (s *Store) probed(ctx context.Context) []string {
	const id = "!probe"
	if !s.clustered {
		return []string{id}
	}
	var ids, masters []string
	for i := range 64 {
		one := fmt.Sprint(id, i)
		master, err := s.master(ctx, s.key("session", one))
		if err == nil && !slices.Contains(masters, master.Options().Addr) {
			ids, masters = append(ids, one), append(masters, master.Options().Addr)
		}
	}
	if len(ids) == 0 {
		return []string{id}
	}
	return ids
}

// The commands that the user of -redis needs, each with arguments that make it harmless. A name that begins with @
// stands for a key or a channel.
var (
	rightsToWrite = []string{
		"EVALSHA 0 1 @session", "EVAL return 1 @session", "TIME",
		"HGET @session f", "HMGET @session f", "HSCAN @session 0", "HLEN @session", "HSET @session f v", "HDEL @session f",
		"LLEN @history", "LRANGE @history 0 0", "LTRIM @history 0 -1", "LPUSH @history v", "RPUSH @history v",
		"ZADD @messages XX 1 m", "ZADD @producers XX 1 m", "ZCARD @messages", "ZRANDMEMBER @producers", "ZRANGE @messages 0 0", "ZRANGEBYLEX @producers - +", "ZRANGEBYSCORE @messages 0 0",
		"ZREM @messages m", "ZSCAN @messages 0", "ZREMRANGEBYLEX @producers - (0", "ZREVRANGEBYLEX @producers + -",
		"PEXPIRE @session 1", "DEL @session", "UNLINK @session", "SETRANGE @stream 0 v", "HSET @ticket f v", "MULTI", "EXEC", "DISCARD",
	}
	rightsToHint    = []string{"PUBLISH @stream v", "PUBLISH @uploads v", "PUBLISH @tickets v", "PING", "SCAN 0 COUNT 1", "INFO server", "SUBSCRIBE @stream @uploads @tickets", "UNSUBSCRIBE @stream"}
	rightsOfMasters = []string{"SPUBLISH @stream v", "SSUBSCRIBE @stream", "SUNSUBSCRIBE @stream"} // of a Cluster
)

// try queues the commands of the scripts for a session. It returns the missing permissions, in the syntax of ACL
// SETUSER, and why Redis would refuse writes.
func (s *Store) try(ctx context.Context, id string) (missing []string, refusal error) {
	for {
		// Each pooled connection from before a failover is found once, as in sendScript.
		if missing, refusal = s.tryOnce(ctx, id); !errors.Is(refusal, errStale) {
			return missing, refusal
		}
	}
}

func (s *Store) tryOnce(ctx context.Context, id string) (missing []string, refusal error) {
	master, err := s.master(ctx, s.key("session", id))
	if err != nil {
		return nil, classify(fmt.Errorf("%w: %w", errNoMaster, err))
	}
	if s.probes.simple.Load() { // the missing permissions are known by then
		return s.probes.missing, classify(master.SetRange(ctx, s.key("stream", id), 0, "").Err())
	}
	c := master.Conn()
	defer c.Close()
	if err := classify(c.Do(ctx, "multi").Err()); err != nil {
		if !strings.Contains(err.Error(), "NOPERM") {
			return nil, err
		}
		s.probes.simple.Store(true)
		_, refusal = s.tryOnce(ctx, id)
		return []string{"+multi"}, refusal
	}
	pipe := c.Pipeline()
	queue := func(lines []string) (cmds []*redis.Cmd) {
		for _, line := range lines {
			if fields := strings.Fields(line); fields[0] != "MULTI" && fields[0] != "EXEC" && fields[0] != "DISCARD" {
				cmds = append(cmds, pipe.Do(ctx, s.queued(id, fields)...))
			}
		}
		return cmds
	}
	writes := queue(rightsToWrite)
	if s.cfg.WaitReplicas > 0 {
		writes = append(writes, queue([]string{"WAIT 0 1"})...)
	}
	hints := queue(rightsToHint)
	if s.clustered {
		hints = append(hints, queue(rightsOfMasters)...)
	}
	discard := pipe.Do(ctx, "discard")
	_, _ = pipe.Exec(ctx)
	if err := discard.Err(); err != nil { // the connection is still in the transaction
		s.dials.spoil()
		if strings.Contains(err.Error(), "NOPERM") {
			s.probes.simple.Store(true)
			missing = append(missing, "+discard")
		}
	}
	for i, cmd := range append(writes, hints...) {
		err := classify(cmd.Err())
		if err != nil && !errors.As(err, new(redis.Error)) {
			return s.probes.missing, err // the connection broke
		}
		if code := Why(err); code == RedisDenied || errors.Is(err, ErrOutcomeUnknown) {
			missing = append(missing, s.lack(cmd, err))
		}
		if i < len(writes) && refusal == nil && Why(err) != "" {
			refusal = err
		}
	}
	return missing, refusal
}

// queued returns a command of the lists of permissions, for a session.
func (s *Store) queued(id string, fields []string) []any {
	argv := make([]any, 0, len(fields)+1)
	for i, f := range fields {
		switch {
		case i == 2 && fields[0] == "EVAL": // its text contains a space
			argv[1] = "return 1"
			argv = append(argv, 1)
		case f == "@uploads":
			argv = append(argv, s.cfg.Prefix+uploads)
		case f == "@tickets":
			argv = append(argv, s.cfg.Prefix+tickets)
		case f[0] == '@':
			argv = append(argv, s.key(f[1:], id))
		default:
			argv = append(argv, f)
		}
	}
	return argv
}

// lack names the permission that is missing after a command was denied.
func (s *Store) lack(cmd *redis.Cmd, err error) string {
	text := err.Error()
	switch {
	case strings.Contains(text, "channel"):
		return "&" + s.cfg.Prefix + "*"
	case strings.Contains(text, "key"):
		return "~" + s.cfg.Prefix + "*"
	}
	return "+" + cmd.Name()
}

// lacks logs which permissions are missing, whenever that changes. Only the probing goroutine may call it.
func (s *Store) lacks(missing []string) {
	slices.Sort(missing)
	missing = slices.Compact(missing)
	if slices.Equal(missing, s.probes.missing) {
		return
	}
	s.probes.missing = missing
	if len(missing) == 0 {
		s.log.LogAttrs(context.Background(), slog.LevelInfo, "the user of -redis has the rights that it needs", slog.String("redis", s.refusals.at))
		return
	}
	s.log.LogAttrs(context.Background(), slog.LevelWarn, "the user of -redis lacks rights that it needs", slog.String("redis", s.refusals.at),
		slog.String("missing", strings.Join(missing, " ")), slog.String("remedy", "ACL SETUSER, with the whole line of docs/redis.md, ACL SETUSER"))
}

// watch probes Redis at the start, and while Redis refuses something. So the node notices the end of a refusal even if
// nobody appends.
func (s *Store) watch(ctx context.Context) {
	_ = s.Probe(ctx) // it notes its result itself
	for {
		select {
		case <-s.refusals.wake:
		case <-ctx.Done():
			return
		}
		for !s.refusals.well.Load() {
			select {
			case <-time.After(refusedProbe):
			case <-ctx.Done():
				return
			}
			_ = s.Probe(ctx)
		}
	}
}
