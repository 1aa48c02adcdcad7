package store

import "sync"

// memory is what a node remembers of logs: the epoch, the highest number that this node acknowledged or delivered, and
// the mark of that number. The mark tells its chunk from another one that may later have the number. Every script gets
// what its caller's node remembers (log.lua: compare_memory). So a script notices a log that is shorter or different
// after a failover or a restart, even if nobody was viewing it, and gives it a new epoch.
//
// Numbers only grow, also from one epoch to the next, so the entry with the highest number wins.
//
// The memory is limited to two generations. When the newer is full, the older is forgotten. An entry that is used moves
// to the newer one.
type memory struct {
	mu           sync.Mutex
	newer, older map[string]remembered
}

// remembered is what a node remembers of one log. If last is zero, it is empty.
type remembered struct {
	epoch string
	last  int64
	mark  string
}

// memorySize is the number of logs in a generation. A node remembers at least that many of the logs that it used last,
// and at most twice as many. 50,000 take about 10 MB.
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

// note remembers r, unless memory has a higher number.
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

// set remembers r. mu must be held.
func (m *memory) set(session string, r remembered) {
	if _, ok := m.newer[session]; !ok && len(m.newer) >= memorySize || m.newer == nil {
		m.newer, m.older = map[string]remembered{}, m.newer
	}
	m.newer[session] = r
}
