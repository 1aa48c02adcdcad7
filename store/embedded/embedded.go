// Package embedded is a Redis inside this process. It implements what the scripts and the client of package store use.
//
// The scripts are compiled once and run in one Lua state. Their commands work directly on the dataset, under its
// lock, so a script is one instant, as in Redis. Each command does what Redis does, and returns what Redis returns:
// the tests of package store send random steps to both. Connections are in-memory pipes that speak the protocol of Redis; nothing
// listens on a network.
//
// With a directory, the dataset survives (journal.go). What a command or a script changed is written to a file as one unit. The unit
// is on disk before its reply is sent, before its messages are delivered, and before anybody can read the change.
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

// Redis is one dataset. Its methods are safe for concurrent use.
type Redis struct {
	journal *journal // nil: nothing is kept on disk
	log     *slog.Logger
	quit    context.CancelFunc
	wg      sync.WaitGroup // the goroutines of connections, and the one that expires keys

	mu      sync.Mutex // guards the fields below. Its holder never waits for a disk or a client
	now     int64      // in ms: when the current command or script began
	keys    map[string]*key
	expiry  map[int64][]string // by second, the names of the keys to check then
	changes changes            // of the current command or script
	refusal lua.LValue         // the reply to commands that take space; nil: they are allowed
	news    []message          // published by the current command or script
	heard   map[string]map[*conn]struct{}
	lua     *lua.LState
	scripts map[string]script // by SHA-1
	args    []string          // arguments of a script's command; reused
	conns   map[*conn]struct{}
	closed  bool
}

// key is the value and the deadline of a name in the dataset.
type key struct {
	value    any    // *list, map[string]string, *zset or string
	deadline int64  // in ms: when the key expires; 0: never
	recorded int64  // the deadline in the journal
	second   int64  // when expire checks the key; 0: never
	since    uint64 // used while the journal is read: the snapshot contains the key's changes up to this unit
}

// message is a published message.
type message struct{ channel, text string }

// Open opens the Redis that a directory holds, or an empty one. If dir is empty, everything is kept in memory only.
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
		for name := range r.keys { // some have expired since
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

// Close ends all connections. Everything that was acknowledged is on disk when it returns.
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

// Dial makes a connection. It ignores the network and the address.
func (r *Redis) Dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, net.ErrClosed
	}
	c := newConn(r, server)
	r.conns[c] = struct{}{}
	r.wg.Go(c.serve) // ends when either end is closed
	r.wg.Go(c.flush) // ends when either end is closed
	return client, nil
}

// execute runs commands as one instant. It returns their replies and the batch to wait for before sending them; nil: none.
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

// begin begins an instant. r.mu is held.
func (r *Redis) begin() {
	r.now = time.Now().UnixMilli()
	r.changes.reset()
}

// end ends an instant. It hands the changes to the journal, and delivers what was published as soon as that is allowed. It returns
// the batch that the replies must wait for; nil: none. r.mu is held.
func (r *Redis) end() *batch {
	news := r.news
	r.news = nil
	if r.journal == nil {
		r.deliver(news)
		return nil
	}
	return r.journal.add(r.now, &r.changes, news)
}

// deliver sends messages to their subscribers. r.mu is held.
func (r *Redis) deliver(news []message) {
	for _, m := range news {
		for c := range r.heard[m.channel] {
			c.push("message", m.channel, m.text)
		}
	}
}

// find returns the key with a name, or nil if it does not exist or has expired. r.mu is held.
func (r *Redis) find(name string) *key {
	k := r.keys[name]
	if k != nil && k.deadline != 0 && k.deadline <= r.now {
		delete(r.keys, name)
		r.changes.addLazily("DEL", name) // so that the journal records when it expired
		return nil
	}
	return k
}

// remove deletes the key with a name.
func (r *Redis) remove(name string) {
	delete(r.keys, name)
	r.changes.add("DEL", name)
}

// make adds a key with a name, or replaces it.
func (r *Redis) make(name string, value any) *key {
	k := &key{value: value}
	r.keys[name] = k
	return k
}

// expireAt sets the deadline of a key.
func (r *Redis) expireAt(name string, k *key, deadline int64) {
	k.deadline = deadline
	if second := deadline/1000 + 1; k.second == 0 || second < k.second {
		k.second = second
		r.expiry[second] = append(r.expiry[second], name)
	}
	// Each read and each append moves the deadline. The journal records a move only if it makes a difference: after a restart, a key
	// may expire too early by a hundredth of its life.
	life := deadline - r.now
	if r.journal == nil {
		k.recorded = deadline
	} else if (deadline < k.recorded || deadline-k.recorded > life/100) && r.journal.room() > roomLazily {
		k.recorded = deadline
		r.changes.addLazily("PEXPIREAT", name, strconv.FormatInt(deadline, 10))
	}
}

// expire deletes expired keys that no command asks for.
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

// expireSome checks some keys that are due in a second, and reports whether more are due then.
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
