// Package embedded is a Redis inside this process: as much of one as the scripts of package store, and its client, use.
//
// The scripts are compiled once and run in one Lua state that is kept. Their commands work directly on the dataset, under its
// lock, so that a script is one instant, as it is in Redis. Each command does what Redis does, and answers what Redis answers:
// the tests of package store play random steps to both. Connections are pipes in memory that speak the protocol of Redis; nothing
// listens anywhere.
//
// With a directory, the dataset survives (journal.go). What a command or a script changed is written to a file as one unit, and
// is on disk before its reply leaves, before what it published is heard, and before anybody reads it.
package embedded

import (
	"context"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	lua "github.com/yuin/gopher-lua"
)

// Redis is one dataset. Its methods may be called from many goroutines.
type Redis struct {
	journal *journal // nil: nothing is kept on disk
	log     *slog.Logger
	quit    context.CancelFunc
	wg      sync.WaitGroup // the goroutines of connections, and the one that expires keys

	mu      sync.Mutex // guards what follows. Whoever holds it does not wait for a disk or for a client
	now     int64      // ms: when the command, or the script, that runs now began
	keys    map[string]*key
	expiry  map[int64][]string // which keys to look at in which second
	changes changes            // of what runs now
	refusal lua.LValue         // what commands that take space are told; nil: they may
	news    []message          // that it published
	heard   map[string]map[*conn]struct{}
	lua     *lua.LState
	scripts map[string]script // by their names
	args    []string          // of a command of a script; used again
	conns   map[*conn]struct{}
	closed  bool
}

// key is what the dataset has under a name.
type key struct {
	value    any    // *list, map[string]string, *zset or string
	deadline int64  // ms: when it expires; 0: never
	recorded int64  // the deadline that is in the journal
	second   int64  // when expire looks at it; 0: never
	since    uint64 // while the journal is read: a snapshot has what was done to it up to this unit
}

// message is something that was published.
type message struct{ channel, text string }

// Open makes a Redis that is empty, or has what is kept in a directory. An empty dir is none: it keeps everything in memory only.
func Open(dir string, log *slog.Logger) (*Redis, error) {
	r := &Redis{
		log: log, keys: map[string]*key{}, expiry: map[int64][]string{}, heard: map[string]map[*conn]struct{}{},
		scripts: map[string]script{}, conns: map[*conn]struct{}{},
	}
	r.lua = r.newState()
	if dir != "" {
		var err error
		if r.journal, err = openJournal(dir, r); err != nil {
			r.lua.Close()
			return nil, err
		}
		r.mu.Lock()
		r.begin()
		for name := range r.keys { // some have expired meanwhile
			r.find(name)
		}
		r.end()
		r.mu.Unlock()
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.quit = cancel
	r.wg.Go(func() { r.expire(ctx) }) // ended by Close
	return r, nil
}

// Close ends all connections. What was acknowledged is on disk before that.
func (r *Redis) Close() error {
	r.quit()
	r.mu.Lock()
	r.closed = true
	for c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.wg.Wait()
	if r.journal == nil {
		return nil
	}
	return r.journal.close()
}

// Dial makes a connection.
func (r *Redis) Dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, net.ErrClosed
	}
	c := newConn(r, server)
	r.conns[c] = struct{}{}
	r.wg.Go(c.serve) // ended by Close of either end
	r.wg.Go(c.flush) // as well
	return client, nil
}

// execute runs commands as one instant, and calls done with their replies when they may be known. It returns what is to be
// waited for before that.
func (r *Redis) execute(commands [][]string) (replies []lua.LValue, kept *batch) {
	if r.journal != nil {
		r.makeRoom(commands)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begin()
	replies = make([]lua.LValue, len(commands))
	r.refusal = nil
	if j := r.journal; j != nil && j.failure != nil {
		for i := range replies {
			replies[i] = refusedBroken
		}
		return replies, nil
	} else if j != nil && j.room() < j.roomFor(commands) {
		r.refusal = refusedFull
	}
	for i, args := range commands {
		replies[i] = r.run(args, false)
	}
	return replies, r.end()
}

// begin begins what is one instant. r.mu is held.
func (r *Redis) begin() {
	r.now = time.Now().UnixMilli()
	r.changes.reset()
}

// end hands what was changed to the journal, and what was published to those who listen, once it may be known. It returns
// what the replies have to wait for; nil is nothing. r.mu is held.
func (r *Redis) end() *batch {
	news := r.news
	r.news = nil
	if r.journal == nil {
		r.deliver(news)
		return nil
	}
	return r.journal.add(r.now, &r.changes, news)
}

// deliver hands messages to those who listen. r.mu is held.
func (r *Redis) deliver(news []message) {
	for _, m := range news {
		for c := range r.heard[m.channel] {
			c.push("message", m.channel, m.text)
		}
	}
}

// find returns what is under a name, if it has not expired. r.mu is held.
func (r *Redis) find(name string) *key {
	k := r.keys[name]
	if k != nil && k.deadline != 0 && k.deadline <= r.now {
		delete(r.keys, name)
		r.changes.addLazily("DEL", name) // so that a journal says when that was
		return nil
	}
	return k
}

// remove takes away what is under a name.
func (r *Redis) remove(name string) {
	delete(r.keys, name)
	r.changes.add("DEL", name)
}

// make puts something new under a name.
func (r *Redis) make(name string, value any) *key {
	k := &key{value: value}
	r.keys[name] = k
	return k
}

// expireAt gives what is under a name a deadline.
func (r *Redis) expireAt(name string, k *key, deadline int64) {
	k.deadline = deadline
	if second := deadline/1000 + 1; k.second == 0 || second < k.second {
		k.second = second
		r.expiry[second] = append(r.expiry[second], name)
	}
	// Each read and each append moves the deadline. A journal is told when that makes a difference: after a restart a key
	// may expire a hundredth of its life too early.
	life := deadline - r.now
	if r.journal == nil {
		k.recorded = deadline
	} else if (deadline < k.recorded || deadline-k.recorded > life/100) && r.journal.room() > roomLazily {
		k.recorded = deadline
		r.changes.addLazily("PEXPIREAT", name, strconv.FormatInt(deadline, 10))
	}
}

// expire takes away what has expired and nobody asks for.
func (r *Redis) expire(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	last := time.Now().Unix()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for now := time.Now().Unix(); last < now; last++ {
			for r.expireSome(last) {
				if ctx.Err() != nil {
					return
				}
			}
		}
		if r.journal != nil {
			r.journal.flush()
		}
	}
}

// expireSome looks at some keys of a second, or of one before it, and reports whether there are more.
func (r *Redis) expireSome(second int64) (more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begin()
	defer r.end()
	names := r.expiry[second]
	some := names[:min(len(names), 1000)]
	for _, name := range some {
		k := r.keys[name]
		if k == nil || k.second != second {
			continue
		}
		k.second = 0
		if k = r.find(name); k != nil && k.deadline != 0 {
			k.second = max(k.deadline/1000+1, second+1)
			r.expiry[k.second] = append(r.expiry[k.second], name)
		}
	}
	if len(some) < len(names) {
		r.expiry[second] = names[len(some):]
		return true
	}
	delete(r.expiry, second)
	return false
}
