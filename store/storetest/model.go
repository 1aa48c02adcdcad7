package storetest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"gapless/store"
)

// Model is a model in Go of one session in Redis, and of what the scripts do with it: their arithmetic of epochs,
// numbers, marks and what nodes remember. It does not include messages, producers and leases. A test compares the model
// with the scripts step by step, so what a test shows on the model is true of the scripts.
//
// A Node is one node's handle on the session. It has its own announcements, which a test delivers, doubles or loses.
// The model's other methods are events of a Redis. Another program pushes, a replica that lacks the newest changes
// takes over, or one or both of the keys are lost.
type Model struct {
	// Max is how many chunks are kept; 0 keeps all.
	Max int
	// Forgetful makes nodes tell the scripts nothing of what they remember: then losses must be detected otherwise.
	Forgetful bool

	mu         sync.Mutex
	keys       keys
	past       []keys // before each change, the newest last: what a replica may still have
	nodes      []*Node
	epochs     int
	after      map[int64]string // epochs in which lost ones continue, by the number after which they begin
	clock      int64
	replacedAt int64 // when a server that lags took over, in milliseconds since 1970
}

// Replicas is the maximum number of changes that a replica may lag.
const Replicas = 8

// keys holds the contents of Redis. Its parts never change in place, so keys of an earlier moment stay as they were.
type keys struct {
	list []string // oldest first
	hash *hash    // nil: it does not exist

	// No script knows these, but the checks need them. gone has what has expired or was trimmed in this epoch, from number
	// start+1 on (empty: unknown). seen is the list as the last script left it.
	start      int64
	gone, seen []string
}

// hash is chat:session:<id>.
type hash struct {
	epoch                  string
	base, lastSeen, former int64
	mark                   string
	ended, deleted         bool
}

// memory is what a node remembers: the reply with the highest number.
type memory struct {
	epoch string
	last  int64
	mark  string
}

// nothingYet is the mark of an epoch of which no number is in use.
const nothingYet = "-"

func (m *memory) note(other memory) {
	if other.last > m.last || other.last == m.last && other.last > 0 && other.mark != "" {
		*m = other
	}
}

// script is one run of a script for a node. Its methods are named after the functions of log.lua.
type script struct {
	m      *Model
	memory memory // of its node
	keys
	h     hash
	last  int64
	begun bool
	lost  *lost
	news  []string
}

// lost is where a log continues that the node remembers and Redis has lost.
type lost struct {
	epoch string
	base  int64
}

// open reads the log's bounds, and checks whether the list is still the last one seen and contains what the node
// remembers. It returns false if neither hash nor list exists.
func (s *script) open() bool {
	s.keys = s.m.keys
	if s.hash == nil && len(s.list) == 0 {
		if s.memory.mark == nothingYet {
			s.lost = &lost{s.memory.epoch, s.memory.last}
		} else if s.memory.last > 0 {
			base := NextBase(s.memory.last)
			s.lost = &lost{s.m.resumed(base), base}
		}
		return false
	}
	if s.hash != nil {
		s.h = *s.hash
	}
	h := &s.h
	s.last = h.base + int64(len(s.list))
	switch {
	case s.hash == nil: // another program began the list
		if s.memory.last == 0 {
			s.begin(0)
		}
	case h.deleted:
		h.base, s.last = h.lastSeen, h.lastSeen
		if len(s.list) > 0 {
			s.revive()
		}
	case len(s.list) == 0:
		h.base = h.lastSeen // expired: the same log, now empty
		s.gone = slices.Concat(s.gone, s.seen, make([]string, h.base-s.start))[:h.base-s.start]
	case h.lastSeen > h.base && !s.matches(h.lastSeen, h.mark):
		s.begin(NextBase(s.top())) // another list has replaced the known one
	}
	s.last = h.base + int64(len(s.list))
	if !h.deleted {
		s.compareMemory()
	}
	return true
}

// compareMemory compares the log with what the node remembers: chunks that it acknowledged or delivered. If they are
// missing, Redis has lost them, and their epoch ends.
func (s *script) compareMemory() {
	has := func(m memory) bool {
		return s.last >= m.last && s.matches(m.last, m.mark) && (m.last != s.h.lastSeen || alike(m.mark, s.h.mark))
	}
	block := s.memory.last / 1_000_000 * 1_000_000
	switch m := s.memory; {
	case m.last == 0:
	case m.epoch == s.h.epoch:
		if !has(m) {
			s.begin(NextBase(s.top()))
		}
	case s.h.former >= m.last: // this epoch began after it
	case s.hash != nil && m.epoch == s.m.after[block]: // the epoch in which it continued when it was lost
		s.begin(block)
		if s.h.epoch = m.epoch; !has(m) {
			s.begin(NextBase(s.top()))
		}
	case m.mark == nothingYet:
		s.begin(m.last)
		s.h.epoch = m.epoch
	default:
		s.begin(NextBase(s.top()))
	}
}

// alike reports whether two marks of one number may belong to the same elements, even if the list no longer contains
// them.
func alike(a, b string) bool {
	if a == "" || b == "" || a == nothingYet || b == nothingYet {
		return true
	}
	_, ours := store.Number(a)
	if _, both := store.Number(b); ours || both {
		return a == b
	}
	one, other := strings.Split(a, "\n"), strings.Split(b, "\n")
	n := min(len(one), len(other))
	return slices.Equal(one[:n], other[:n])
}

// top returns the highest number known to be in use.
func (s *script) top() int64 { return max(s.h.lastSeen, s.last, s.memory.last) }

// markMost is the maximum number of elements that a mark covers if other programs pushed them.
const markMost = 8

// mark identifies the elements at the log's end. If the last element is ours, it is that element, because no two of ours
// are equal. Otherwise it is up to eight elements, from the last one backwards. (The scripts store their hashes.)
func (s *script) mark() string {
	n := len(s.list)
	if n == 0 {
		return ""
	}
	if _, ours := store.Number(s.list[n-1]); ours {
		return s.list[n-1]
	}
	elements := slices.Clone(s.list[max(n-markMost, 0):])
	slices.Reverse(elements)
	return strings.Join(elements, "\n")
}

// matches reports whether a number still has a mark. It returns true if it cannot tell: trimmed elements cannot be
// compared.
func (s *script) matches(number int64, mark string) bool {
	at := int(number - s.h.base - 1)
	if at < 0 || mark == "" || mark == nothingYet {
		return true
	}
	for element := range strings.SplitSeq(mark, "\n") {
		if at >= len(s.list) || s.list[at] != element {
			return false
		}
		if at--; at < 0 {
			break
		}
	}
	return true
}

// begin starts an epoch whose numbers continue after base. The elements in the list are numbered from there.
func (s *script) begin(base int64) {
	s.m.epochs++
	s.h.epoch, s.h.base, s.h.former = fmt.Sprint("e", s.m.epochs), base, base
	s.last = base + int64(len(s.list))
	s.begun = true
	s.start, s.gone, s.seen = base, nil, nil
}

// make creates a log where none exists.
func (s *script) make() {
	s.h = hash{}
	if s.lost == nil {
		s.begin(0)
		return
	}
	s.begin(s.lost.base)
	s.h.epoch = s.lost.epoch
}

// revive turns a deleted session into an empty one, with its own epoch.
func (s *script) revive() {
	s.h.deleted = false
	s.begin(NextBase(s.top()))
}

// add numbers and pushes a chunk, given without the opening brace.
func (s *script) add(members string) {
	s.last++
	s.m.clock++ // so that no two elements are equal
	element := fmt.Sprintf(`{"seq":%d,"ts":%d,%s`, s.last, 1795424741692+s.m.clock, members)
	s.list = append(slices.Clip(s.list), element)
	s.news = append(s.news, element)
}

// finish trims, records the last number and its mark, and publishes.
func (s *script) finish() {
	if excess := len(s.list) - s.m.Max; s.m.Max > 0 && excess > 0 {
		s.gone = slices.Concat(s.gone, s.list[:excess])
		s.list, s.h.base = s.list[excess:], s.h.base+int64(excess)
	}
	if s.last != s.h.lastSeen || s.begun {
		s.h.lastSeen, s.h.mark = s.last, s.mark()
	}
	h := s.h
	s.hash, s.seen = &h, s.list
	s.m.change(s.keys)
	if s.begun && s.h.former > 0 {
		s.m.publish(store.Hint)
	}
	for _, element := range s.news {
		s.m.publish(element)
	}
}

func (s *script) bounds() store.Bounds {
	return store.Bounds{Epoch: s.h.epoch, First: s.h.base + 1, Last: s.last, Former: s.h.former, Ended: s.h.ended, Deleted: s.h.deleted}
}

// told returns what a reply tells the node to remember.
func (s *script) told() memory {
	if s.last == s.h.former {
		return memory{s.h.epoch, s.last, nothingYet}
	}
	return memory{s.h.epoch, s.last, s.h.mark}
}

// resumed returns the epoch in which a log continues after base when Redis has lost all of it. It is the same for all nodes. mu must be
// held.
func (m *Model) resumed(base int64) string {
	if m.after[base] == "" {
		m.epochs++
		if m.after == nil {
			m.after = map[int64]string{}
		}
		m.after[base] = fmt.Sprint("e", m.epochs)
	}
	return m.after[base]
}

// change replaces the keys, if they differ. mu must be held.
func (m *Model) change(k keys) {
	old := m.keys
	if m.keys = k; slices.Equal(old.list, k.list) && (old.hash == nil) == (k.hash == nil) && (k.hash == nil || *old.hash == *k.hash) {
		return
	}
	m.past = append(m.past, old)
	if len(m.past) > Replicas {
		m.past = m.past[1:]
	}
}

// publish announces something to all nodes with a subscription. mu must be held.
func (m *Model) publish(message string) {
	for _, n := range m.nodes {
		if n.listener != nil && !n.down {
			n.waiting = append(n.waiting, message)
		}
	}
}

// Push adds an element to the list and announces it, as another program does.
func (m *Model) Push(element string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.keys
	k.list = append(slices.Clip(k.list), element)
	m.change(k)
	m.publish(element)
}

// Fail makes a replica take over that lacks the newest n changes. Every subscription is lost until Resync.
func (m *Model) Fail(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keys, m.past = m.past[len(m.past)-n], m.past[:len(m.past)-n]
	m.replacedAt = time.Now().UnixMilli()
	for _, n := range m.nodes {
		n.waiting, n.down = nil, true
	}
}

// Behind returns how many changes a replica may lack.
func (m *Model) Behind() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.past)
}

// Flush deletes both keys.
func (m *Model) Flush() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.change(keys{})
}

// Expire deletes the list, as its time to live does.
func (m *Model) Expire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.keys
	k.list = nil
	m.change(k)
}

// Unhash deletes the hash.
func (m *Model) Unhash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.keys
	k.hash = nil
	m.change(k)
}

// Cut deletes the newest n elements of the list.
func (m *Model) Cut(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := m.keys
	k.list = k.list[:len(k.list)-n]
	m.change(k)
}

// Log returns the current log for checks: its bounds, and all elements of its epoch from number start+1 on, even
// expired ones, as far as they are known. It is what a read would see, and changes nothing.
func (m *Model) Log() (b store.Bounds, start int64, whole []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	epochs := m.epochs
	defer func() { m.epochs = epochs }()
	s := script{m: m} // for a node that remembers nothing
	if !s.open() {
		return store.Bounds{First: 1}, 0, nil
	}
	return s.bounds(), s.start, slices.Concat(s.gone, s.list)
}

// Keys holds the contents of Redis for comparisons: the list, oldest first, and of the hash epoch, base, last_seen,
// former, ended, deleted and mark, or nothing.
type Keys struct{ List, Hash []string }

// Keys returns the current contents of Redis.
func (m *Model) Keys() Keys {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := Keys{List: m.keys.list}
	if h := m.keys.hash; h != nil {
		k.Hash = strings.Fields(fmt.Sprint(h.epoch, " ", h.base, " ", h.lastSeen, " ", h.former, " ", h.ended, " ", h.deleted))
		k.Hash = append(k.Hash, h.mark)
	}
	return k
}

// State returns the keys and, newest first, what replicas may still have of them, as text for comparisons.
func (m *Model) State() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := []string{m.keys.String()}
	for _, k := range slices.Backward(m.past) {
		all = append(all, k.String())
	}
	return all
}

func (k keys) String() string {
	s := fmt.Sprint(k.list, k.start, k.gone, k.seen)
	if k.hash != nil {
		s += fmt.Sprint(*k.hash)
	}
	return s
}

// Node is one node's handle on the session: what a hub needs, and the calls of the API. It remembers what a real node
// remembers.
type Node struct {
	m        *Model
	memory   memory
	listener store.Listener
	down     bool     // the subscription is lost
	waiting  []string // published and not delivered yet
	calls    int
}

// run runs a script for the node, which remembers its reply.
func (n *Node) run(do func(s *script, known bool)) {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	n.calls++
	s := &script{m: n.m}
	if !n.m.Forgetful {
		s.memory = n.memory
	}
	do(s, s.open())
	n.memory.note(s.told())
}

// Node returns a new node that remembers nothing.
func (m *Model) Node() *Node {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := &Node{m: m}
	m.nodes = append(m.nodes, n)
	return n
}

// Close ends a node, which gets no more announcements.
func (n *Node) Close() {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	n.m.nodes = slices.DeleteFunc(n.m.nodes, func(other *Node) bool { return other == n })
}

// Calls returns how many scripts the node has run.
func (n *Node) Calls() int {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	return n.calls
}

// Memory returns what the node remembers, as text for comparisons.
func (n *Node) Memory() string {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	return fmt.Sprint(n.memory)
}

// Down reports whether the node's subscription is lost.
func (n *Node) Down() bool {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	return n.down
}

// Waiting returns the announcements under way.
func (n *Node) Waiting() []string {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	return slices.Clone(n.waiting)
}

// Deliver delivers the oldest announcement. If twice is set, it arrives again later.
func (n *Node) Deliver(twice bool) {
	n.m.mu.Lock()
	message, listener := n.waiting[0], n.listener
	if !twice {
		n.waiting = n.waiting[1:]
	}
	n.m.mu.Unlock()
	if listener != nil {
		listener.Live(message)
	}
}

// Lose loses all announcements under way.
func (n *Node) Lose() {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	n.waiting = nil
}

// Resync loses the subscription, if any, with its announcements under way, and then restores it.
func (n *Node) Resync() {
	n.m.mu.Lock()
	n.waiting, n.down = nil, false
	listener := n.listener
	n.m.mu.Unlock()
	if listener != nil {
		listener.Resync()
	}
}

// Listen implements the method of store.Store. The subscription is acknowledged at once, if the node has a connection.
func (n *Node) Listen(_ string, l store.Listener) func() {
	n.m.mu.Lock()
	n.listener, n.waiting = l, nil
	down := n.down
	n.m.mu.Unlock()
	if !down {
		l.Resync()
	}
	return func() {
		n.m.mu.Lock()
		defer n.m.mu.Unlock()
		if n.listener == l {
			n.listener, n.waiting = nil, nil
		}
	}
}

// Append appends a piece of text: append.lua.
func (n *Node) Append(text string) (store.Appended, error) {
	return n.append(fmt.Sprintf(`"type":"delta","content":%q}`, text), false)
}

// End ends the log.
func (n *Node) End() (store.Appended, error) { return n.append(`"type":"end"}`, true) }

func (n *Node) append(members string, ends bool) (a store.Appended, err error) {
	n.run(func(s *script, known bool) {
		switch {
		case !known:
			s.make()
		case s.h.deleted:
			s.revive()
		case s.h.ended:
			s.finish()
			err = store.ErrSessionEnded
			return
		}
		s.add(members)
		s.h.ended = s.h.ended || ends
		s.finish()
		a = store.Appended{Epoch: s.h.epoch, First: s.last, Last: s.last, Count: 1, Made: !known}
	})
	return a, err
}

// Read implements the method of store.Store, as read.lua does.
func (n *Node) Read(_ context.Context, _ string, from int64, bytes, count int) (p store.Page, err error) {
	n.run(func(s *script, known bool) {
		switch {
		case !known && s.lost == nil:
			p = store.Page{Bounds: store.Bounds{First: 1}, From: 1}
			return
		case !known: // the next append continues the log elsewhere, and viewers must know that now
			s.h = hash{epoch: s.lost.epoch, base: s.lost.base, lastSeen: s.lost.base, former: s.lost.base}
			s.last = s.lost.base
		default:
			s.finish()
		}
		p = s.page(from, bytes, count)
	})
	return p, nil
}

// page returns as many elements as fit.
func (s *script) page(from int64, bytes, count int) store.Page {
	p := store.Page{Bounds: s.bounds()}
	if from == store.Newest {
		size := 0
		for from = p.Last + 1; from >= p.First+1 && int(p.Last+1-from) < count; from-- {
			if size += len(s.list[from-p.First-1]); size > bytes && from <= p.Last {
				break
			}
		}
	}
	p.From = max(from, p.First)
	for seq, size := p.From, 0; seq <= p.Last && len(p.Elements) < count; seq++ {
		element := s.list[seq-p.First]
		if size += len(element); size > bytes && len(p.Elements) > 0 {
			break
		}
		p.Elements = append(p.Elements, element)
	}
	return p
}

// Create implements the method of store.Store, as session.lua does, like the next two.
func (n *Node) Create() (b store.Bounds, created bool) {
	n.run(func(s *script, known bool) {
		switch {
		case !known:
			s.make()
			created = true
		case s.h.deleted:
			s.revive()
			created = true
		}
		s.finish()
		b = s.bounds()
	})
	return b, created
}

// Delete implements the method of store.Store.
func (n *Node) Delete() (err error) {
	n.run(func(s *script, known bool) {
		switch {
		case !known:
			err = store.ErrNotFound
			return
		case s.h.deleted:
			return
		}
		mark := s.h.mark
		s.h.base, s.h.lastSeen, s.h.mark, s.h.ended, s.h.deleted = s.last, s.last, "", false, true
		s.list, s.gone, s.start, s.begun = nil, nil, s.last, false
		s.finish()
		s.m.publish(store.Hint)
		s.h.mark = mark // the reply contains it
	})
	return err
}

// Renew implements the method of store.Store.
func (n *Node) Renew(_ context.Context, _, epoch string, last int64) (err error) {
	n.run(func(s *script, known bool) {
		if !known {
			err = store.ErrNotFound
			return
		}
		if s.h.epoch == epoch && !s.h.deleted {
			s.begin(NextBase(max(s.top(), last)))
		}
		s.finish()
	})
	return err
}

// Given implements the method of store.Store.
func (n *Node) Given(_, epoch string, last int64) {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	n.memory.note(memory{epoch: epoch, last: last})
}

// Witness implements the method of store.Store.
func (n *Node) Witness(_ string, last int64) {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	to := NextBase(last)
	n.memory.note(memory{epoch: n.m.resumed(to), last: to, mark: nothingYet})
}

// ReplacedAt implements the method of store.Store.
func (n *Node) ReplacedAt() int64 {
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	return n.m.replacedAt
}
