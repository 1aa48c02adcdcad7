package store

import "sync"

// memory is what a node remembers of logs: of each the epoch, the highest number that this node acknowledged or gave
// out, and the mark of that number, which tells what stood there from what may stand there later. Every script is told what
// its caller's node remembers (log.lua: compare_memory). So a log that comes back shorter, or other, from a failover or a
// restart is noticed, also when nobody views it at that moment, and gets a new epoch.
//
// Numbers only grow, also from one epoch to the next, so what is remembered is what has the highest number.
//
// It is bounded: two generations, of which the older is forgotten when the newer is full. What is used moves to the
// newer one.
type memory struct {
	mu           sync.Mutex
	newer, older map[string]remembered
}

// remembered is what a node remembers of one log. A zero last: nothing.
type remembered struct {
	epoch string
	last  int64
	mark  string
}

// memorySize is how many logs a generation has: a node remembers at least as many of those that it used last, and at most twice as
// many. 50,000 are some 10 MB.
const memorySize = 50_000

func (m *memory) get(session string) remembered {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.newer[session]
	if !ok {
		if r, ok = m.older[session]; ok {
			m.set(session, r)
		}
	}
	return r
}

// note remembers r, unless a higher number is remembered.
func (m *memory) note(session string, r remembered) {
	if r.last == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	known, ok := m.newer[session]
	if !ok {
		known = m.older[session]
	}
	if r.last > known.last || r.last == known.last && r.mark != "" {
		m.set(session, r)
	}
}

// set is called with mu held.
func (m *memory) set(session string, r remembered) {
	if _, ok := m.newer[session]; !ok && len(m.newer) >= memorySize || m.newer == nil {
		m.newer, m.older = map[string]remembered{}, m.newer
	}
	m.newer[session] = r
}
