package sse

import (
	"bytes"
	"slices"
	"sort"
	"time"

	"gapless/store"
)

// window is what a node knows of a log at one moment: its bounds, and its newest chunks as event
// bytes. A published window never changes, so viewers read it without a lock.
//
// A window shares its bytes with the next. Growing appends after what older windows can see, in the
// spare capacity of the last segment. Only the feed does it, and only to the newest window.
type window struct {
	store.Bounds
	read uint64 // the number of the read that it comes from; 0: nothing was read yet
	memory
	tip  string        // the element at Last, to compare at the next read; empty: unknown
	next chan struct{} // closed when a newer window exists

	arrived time.Time // when its newest chunk came live; zero: it came by a read
}

func (w *window) known() bool  { return w.read > 0 }
func (w *window) absent() bool { return w.Epoch == "" }

// base returns the number before the first chunk that is kept.
func (w *window) base() int64 { return w.First - 1 }

// sameBounds reports whether w and other look the same to a viewer, apart from their chunks.
func (w *window) sameBounds(other *window) bool {
	return w.Epoch == other.Epoch && w.First == other.First && w.Last == other.Last && w.Former == other.Former &&
		w.Ended == other.Ended && w.Deleted == other.Deleted
}

// with returns w with one more chunk, within limit bytes of memory.
func (w *window) with(element string, limit int) *window {
	n := *w
	n.next = make(chan struct{})
	n.arrived = time.Now()
	n.Last++
	n.memory.append(element, limit)
	n.tip = element
	return &n
}

// memory holds the event bytes of consecutive chunks, in segments. A segment is what one write
// takes, and all that a stalled viewer can keep from being freed.
type memory struct {
	full []segment // never changed in place, except by appending
	tail segment   // the segment that grows
	size int       // bytes of events

	lastStop int64 // the newest number that ends a message or claims to end the log, in memory or not
}

// segment holds events one after the other.
type segment struct {
	first int64    // the number of the first event
	buf   []byte   //
	ends  []uint32 // where each event ends in buf
	stops []int64  // the numbers of the events that end a message
}

// segmentSize is the most that one write takes. A writer that gives a socket larger pieces cannot
// tell a slow reader from a dead one.
const segmentSize = 16 << 10

func newMemory(next int64) memory { return memory{tail: segment{first: next}} }

// nextSeq returns the number of the next event to be appended.
func (m *memory) nextSeq() int64 { return m.tail.first + int64(len(m.tail.ends)) }

// firstSeq returns the number of the oldest event in memory.
func (m *memory) firstSeq() int64 {
	if len(m.full) > 0 {
		return m.full[0].first
	}
	return m.tail.first
}

// append adds a chunk and drops the oldest segments beyond limit bytes.
func (m *memory) append(element string, limit int) { m.appendFirst([]string{element}, limit) }

// appendFirst appends chunks[0]. The other chunks only help to size the segment.
func (m *memory) appendFirst(chunks []string, limit int) {
	element := chunks[0]
	seq, target := m.nextSeq(), min(segmentSize, limit/8)
	// An event that is certain to fit is encoded at its final place. Otherwise it opens a segment.
	room := eventRoom(element)
	if len(m.tail.ends) > 0 && len(m.tail.buf)+room > target {
		m.full = append(m.full, m.tail)
		m.tail = segment{first: seq}
	}
	t := &m.tail
	if cap(t.buf)-len(t.buf) < room {
		count, coming := 0, len(t.buf)
		for ; count < len(chunks) && coming < target; count++ {
			coming += eventRoom(chunks[count])
		}
		grown := make([]byte, len(t.buf), max(min(max(2*cap(t.buf), coming, 512), target), len(t.buf)+room))
		copy(grown, t.buf)
		t.buf, t.ends = grown, slices.Grow(t.ends, count)
	}
	before := len(t.buf)
	var ends store.Ending
	t.buf, ends = appendEvent(t.buf, seq, element)
	t.ends = append(t.ends, uint32(len(t.buf)))
	if ends != 0 {
		m.lastStop = seq
	}
	if ends&store.EndsMessage != 0 {
		t.stops = append(t.stops, seq)
	}
	m.size += len(t.buf) - before
	m.shrink(limit)
}

// eventRoom returns the largest size in bytes of a chunk's event, whatever number the element has.
// An element that is not an object may need more.
func eventRoom(element string) int {
	return len(element) + len("data: \nid: 9007199254740991\n\n") + len("9007199254740991")
}

// shrink drops the oldest segments beyond limit bytes.
func (m *memory) shrink(limit int) {
	drop := 0
	for m.size > limit && drop < len(m.full) {
		m.size -= len(m.full[drop].buf)
		drop++
	}
	if drop > 0 { // a copy: older windows read the old slice, and it would keep the dropped segments
		m.full = slices.Clone(m.full[drop:])
	}
	if m.size > limit {
		stop := m.lastStop
		*m = newMemory(m.nextSeq())
		m.lastStop = stop
	}
}

// after returns the events after cursor, up to number upto or the end of their segment, and the
// number of the last of them. With stop, it returns them up to the first that ends a message. ok
// reports whether memory goes back that far. No events and ok mean that none follow.
func (m *memory) after(cursor, upto int64, stop bool) (events []byte, last int64, stopped, ok bool) {
	if cursor+1 < m.firstSeq() {
		return nil, cursor, false, false
	}
	s := &m.tail
	if cursor+1 < s.first {
		s = &m.full[sort.Search(len(m.full), func(i int) bool { return m.full[i].first > cursor+1 })-1]
	}
	from, to := int(cursor+1-s.first), int(min(int64(len(s.ends)), upto+1-s.first))
	if from >= to {
		return nil, cursor, false, true
	}
	if stop {
		if i, _ := slices.BinarySearch(s.stops, cursor+1); i < len(s.stops) && s.stops[i] <= upto {
			to, stopped = int(s.stops[i]-s.first)+1, true
		}
	}
	return s.buf[s.start(from):s.ends[to-1]], s.first + int64(to) - 1, stopped, true
}

func (s *segment) start(i int) uint32 {
	if i == 0 {
		return 0
	}
	return s.ends[i-1]
}

// holds reports whether event seq is in memory, and whether it is the event that element makes.
func (m *memory) holds(seq int64, element string) (known, same bool) {
	events, _, _, ok := m.after(seq-1, seq, false)
	if !ok || len(events) == 0 {
		return false, false
	}
	want, _ := appendEvent(nil, seq, element)
	return true, bytes.Equal(events, want)
}
