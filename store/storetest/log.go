package storetest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"gapless/store"
)

// Log is one session's log in memory, with a Pub/Sub under the test's control. The test delivers, doubles, reorders or
// drops each message, and decides when each read returns and which instant of the log it sees. It is for tests on fake
// time of code that reads a store.Store.
type Log struct {
	// Held makes Read wait for Snapshot and Reply.
	Held bool

	mu       sync.Mutex
	epoch    string
	base     int64
	former   int64
	elements []string
	ended    bool

	listener store.Listener
	acked    bool
	messages []string // published and not delivered yet
	reads    []*read  // reads that have not returned yet
	count    int
}

type read struct {
	from         int64
	bytes, count int
	page         *store.Page // nil before the snapshot
	reply        chan struct{}
}

// Element returns chunk seq as the append script writes it.
func Element(seq int64, text string) string {
	return fmt.Sprintf(`{"seq":%d,"ts":1795424741692,"type":"delta","content":%q}`, seq, text)
}

// Push adds an element to the list, as RPUSH does.
func (l *Log) Push(element string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch == "" {
		l.epoch = "e1"
	}
	l.elements = append(l.elements, element)
}

// Publish announces an element. It is lost unless the subscription was acknowledged.
func (l *Log) Publish(element string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.acked {
		l.messages = append(l.messages, element)
	}
}

// Append numbers, pushes and publishes, as the append script does.
func (l *Log) Append(text string) {
	l.mu.Lock()
	seq := l.base + int64(len(l.elements)) + 1
	l.mu.Unlock()
	element := Element(seq, text)
	l.Push(element)
	l.Publish(element)
}

// Trim drops the oldest n elements.
func (l *Log) Trim(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.base, l.elements = l.base+int64(n), l.elements[n:]
}

// Replace replaces the elements of the list without notice, as a failover does.
func (l *Log) Replace(elements ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.elements = elements
}

// Hold makes reads wait from now on.
func (l *Log) Hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.Held = true
}

// End ends the log after its current elements.
func (l *Log) End() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
}

// Ack acknowledges the subscription, for the first time or again.
func (l *Log) Ack() {
	l.mu.Lock()
	l.acked = true
	listener := l.listener
	l.mu.Unlock()
	if listener != nil {
		listener.Resync()
	}
}

// Disconnect loses the subscription and its messages under way.
func (l *Log) Disconnect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked, l.messages = false, nil
}

// Listening reports whether the log has a listener.
func (l *Log) Listening() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.listener != nil
}

// Acked reports whether the subscription was acknowledged.
func (l *Log) Acked() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked
}

// Messages returns how many messages are under way.
func (l *Log) Messages() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.messages)
}

// Deliver delivers message i of those under way.
func (l *Log) Deliver(i int) {
	message, listener := l.take(i)
	listener.Live(message)
}

// Drop loses message i of those under way.
func (l *Log) Drop(i int) { l.take(i) }

// Double makes message i of those under way arrive twice.
func (l *Log) Double(i int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.messages = slices.Insert(l.messages, i, l.messages[i])
}

func (l *Log) take(i int) (string, store.Listener) {
	l.mu.Lock()
	defer l.mu.Unlock()
	message := l.messages[i]
	l.messages = slices.Delete(l.messages, i, i+1)
	return message, l.listener
}

// Asked reports whether a read waits for its snapshot.
func (l *Log) Asked() bool { return l.waiting(false) != nil }

// Taken reports whether a read waits for its reply.
func (l *Log) Taken() bool { return l.waiting(true) != nil }

func (l *Log) waiting(taken bool) *read {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.reads {
		if (r.page != nil) == taken {
			return r
		}
	}
	return nil
}

// Snapshot sets the instant at which the oldest waiting read sees the log.
func (l *Log) Snapshot() {
	r := l.waiting(false)
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.page(r.from, r.bytes, r.count)
	r.page = &p
}

// Reply completes the oldest read that has its snapshot.
func (l *Log) Reply() { close(l.waiting(true).reply) }

// ReplyNewest completes the newest read, which has its snapshot. It overtakes others.
func (l *Log) ReplyNewest() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.reads[len(l.reads)-1].reply)
}

// Release completes all reads at once from now on.
func (l *Log) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.Held = false
	for _, r := range l.reads {
		if r.page == nil {
			p := l.page(r.from, r.bytes, r.count)
			r.page = &p
		}
		select {
		case <-r.reply:
		default:
			close(r.reply)
		}
	}
}

// Reads returns how many reads were made.
func (l *Log) Reads() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

// Contents returns the data of the log's events as viewers receive it, and the number of the first.
func (l *Log) Contents() (first int64, elements []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.base + 1, slices.Clone(l.elements)
}

func (l *Log) page(from int64, bytes, count int) store.Page {
	last := l.base + int64(len(l.elements))
	p := store.Page{Bounds: store.Bounds{Epoch: l.epoch, First: l.base + 1, Last: last, Former: l.former, Ended: l.ended}}
	if from == store.Newest {
		from = last + 1
		for size := 0; from > l.base+1 && int(last+1-from) < count; from-- {
			if size += len(l.elements[from-l.base-2]); size > bytes && from <= last {
				break
			}
		}
	}
	p.From = max(from, l.base+1)
	for seq, size := p.From, 0; seq <= last && len(p.Elements) < count; seq++ {
		element := l.elements[seq-l.base-1]
		if size += len(element); size > bytes && len(p.Elements) > 0 {
			break
		}
		p.Elements = append(p.Elements, strings.Clone(element))
	}
	return p
}

// Read implements the method of store.Store.
func (l *Log) Read(ctx context.Context, _ string, from int64, bytes, count int) (store.Page, error) {
	l.mu.Lock()
	l.count++
	if !l.Held {
		defer l.mu.Unlock()
		return l.page(from, bytes, count), nil
	}
	r := &read{from: from, bytes: bytes, count: count, reply: make(chan struct{})}
	l.reads = append(l.reads, r)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.reads = slices.DeleteFunc(l.reads, func(other *read) bool { return other == r })
	}()
	select {
	case <-r.reply:
		return *r.page, nil
	case <-ctx.Done():
		return store.Page{}, fmt.Errorf("%w: %w", store.ErrOutcomeUnknown, ctx.Err())
	}
}

// Renew implements the method of store.Store.
func (l *Log) Renew(_ context.Context, _, epoch string, last int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch == epoch {
		l.epoch += "'"
		l.base = NextBase(max(l.base+int64(len(l.elements)), last))
		l.former = l.base
	}
	return nil
}

// NextBase returns the number after which an epoch begins if numbers up to top were in use. It is the first multiple
// of a million that is at least half a million higher (log.lua: next_base).
func NextBase(top int64) int64 { return (top + 500_000 + 999_999) / 1_000_000 * 1_000_000 }

// Given implements the method of store.Store. The log in memory forgets nothing.
func (l *Log) Given(string, string, int64) {}

// Witness implements the method of store.Store.
func (l *Log) Witness(string, int64) {}

// ReplacedAt implements the method of store.Store. The log in memory has no server.
func (l *Log) ReplacedAt() int64 { return 0 }

// Listen implements the method of store.Store.
func (l *Log) Listen(_ string, listener store.Listener) func() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listener = listener
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.listener, l.acked = nil, false
	}
}
