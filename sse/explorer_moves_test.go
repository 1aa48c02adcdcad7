package sse

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
)

// move is something that may happen next.
type move struct {
	name string
	rare bool // only played at random: other moves do the same, or there would be too many
	can  func(s *stage) bool
	do   func(s *stage)
}

// moves lists all moves.
var moves = allMoves()

func allMoves() (all []move) {
	add := func(name string, can func(s *stage) bool, do func(s *stage)) {
		all = append(all, move{name, false, can, do})
	}
	rare := func(name string, can func(s *stage) bool, do func(s *stage)) {
		all = append(all, move{name, true, can, do})
	}
	always := func(*stage) bool { return true }
	for i, name := range []string{"A", "B"} {
		ended := func(s *stage) bool { l := s.log(); return l.Ended && !l.Deleted }
		add("append "+name, func(s *stage) bool { return !ended(s) }, func(s *stage) {
			s.made++
			a, err := s.nodes[i].Append(fmt.Sprint("c", s.made))
			s.acknowledged(s.nodes[i], a, err)
		})
		add("end "+name, func(s *stage) bool { return !ended(s) }, func(s *stage) {
			a, err := s.nodes[i].End()
			s.acknowledged(s.nodes[i], a, err)
		})
		add("delete "+name, func(s *stage) bool { l := s.log(); return l.Epoch != "" && !l.Deleted }, func(s *stage) {
			s.losing(func() { _ = s.nodes[i].Delete() })
		})
		add("make "+name, func(s *stage) bool { return s.log().Deleted }, func(s *stage) { s.nodes[i].Create() })
		waiting := func(s *stage) bool { return len(s.nodes[i].Waiting()) > 0 }
		add("hear "+name, waiting, func(s *stage) { s.nodes[i].Deliver(false) })
		add("double "+name, waiting, func(s *stage) { s.nodes[i].Deliver(true) })
		add("miss "+name, waiting, func(s *stage) { s.nodes[i].Lose() })
		watched := func(s *stage) bool { return s.nodes[i].feed() != nil }
		add("resync "+name, func(s *stage) bool { return watched(s) && s.nodes[i].Down() }, func(s *stage) { s.nodes[i].Resync() })
		rare("break "+name, func(s *stage) bool { return watched(s) && !s.nodes[i].Down() }, func(s *stage) { s.nodes[i].Resync() })
		add("read "+name, watched, func(s *stage) {
			f := s.nodes[i].feed()
			f.mu.Lock()
			defer f.mu.Unlock()
			f.routine = !f.pending && !f.busy
			f.ask()
		})
		add("fade "+name, func(s *stage) bool { return watched(s) && s.nodes[i].hub.Viewers("s") == 0 }, func(s *stage) {
			s.nodes[i].hub.forget(s.nodes[i].feed())
		})
		add("restart "+name, func(s *stage) bool { return s.nodes[i].Calls() > 0 || watched(s) }, func(s *stage) {
			n := s.nodes[i]
			n.close()
			for _, c := range s.clients {
				s.drain(c)
			}
			n.Node.Close()
			s.start(n)
		})
		for c := range stageClients {
			add(fmt.Sprint("view ", c, " ", name), func(s *stage) bool {
				new := c > 0 && s.clients[c].cursor == 0 && s.clients[c-1].cursor == 0 && s.clients[c-1].node == nil // they are equal
				return s.clients[c].node == nil && s.clients[c].over == "" && !new
			}, func(s *stage) {
				s.connect(s.clients[c], s.nodes[i])
			})
		}
	}
	for c := range stageClients {
		add(fmt.Sprint("leave ", c), func(s *stage) bool { return s.clients[c].node != nil }, func(s *stage) { s.leave(s.clients[c]) })
	}
	for n := range 2 {
		add(fmt.Sprint("push f", n), always, func(s *stage) { s.model.Push(fmt.Sprintf(`{"content":"f%d"}`, n)) })
	}
	for n, add := range []func(string, func(*stage) bool, func(*stage)){add, rare, rare} {
		add(fmt.Sprint("fail ", n+1), func(s *stage) bool { return s.model.Behind() > n }, func(s *stage) {
			s.losing(func() { s.model.Fail(n + 1) })
			s.regained, s.recorded = true, map[told]bool{}
		})
		add(fmt.Sprint("cut ", n+1), func(s *stage) bool { return len(s.model.Keys().List) > n }, func(s *stage) { s.losing(func() { s.model.Cut(n + 1) }) })
	}
	add("flush", func(s *stage) bool { return s.model.Keys().Hash != nil || s.model.Keys().List != nil }, func(s *stage) { s.losing(s.model.Flush) })
	add("expire", func(s *stage) bool { return s.model.Keys().List != nil }, func(s *stage) { s.losing(s.model.Expire) })
	rare("unhash", func(s *stage) bool { return s.model.Keys().Hash != nil }, func(s *stage) {
		s.losing(s.model.Unhash)
		s.regained = true
	})
	return all
}

// state returns a hash of everything that the future depends on. States that differ only in the
// names of nodes, viewers, epochs and texts have the same hash.
func (s *stage) state() [2]uint64 {
	var least []byte
	for _, nodes := range [][2]int{{0, 1}, {1, 0}} {
		for _, first := range []int{0, 1} {
			b := s.append(nil, nodes, first)
			if b = renamed(b); least == nil || bytes.Compare(b, least) < 0 {
				least = b
			}
		}
	}
	return [2]uint64{maphash.Bytes(stateSeeds[0], least), maphash.Bytes(stateSeeds[1], least)}
}

var stateSeeds = [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}

func (s *stage) append(b []byte, nodes [2]int, first int) []byte {
	keys := s.model.State()
	b = fmt.Append(b, keys[:min(len(keys), 3)]) // no failover goes back further here
	for _, i := range nodes {
		n := s.nodes[i]
		b = fmt.Append(b, "\nnode ", n.Down(), n.Waiting(), n.Memory())
		f := n.feed()
		if f == nil {
			continue
		}
		f.mu.Lock()
		w := f.window.Load()
		b = fmt.Append(b, f.done >= f.trust, f.sure-w.Last, f.want > w.Last, f.broken, !f.short.IsZero(), f.suspect, f.pending, w.known(), w.Bounds.Epoch,
			w.First, w.Last, w.Former, w.Ended, w.Deleted, w.firstSeq())
		for seq := w.firstSeq(); seq <= w.Last; seq++ {
			event, _, _, _ := w.after(seq-1, seq, false)
			b = append(b, event...)
		}
		for _, word := range []string{"f0", "f1"} {
			b = fmt.Append(b, " ", word, f.foreign[maphash.String(hashSeed, `{"content":"`+word+`"}`)])
		}
		f.mu.Unlock()
		for j := range s.clients {
			c := s.clients[(first+j)%len(s.clients)]
			if c.node == n {
				b = fmt.Append(b, " has ", j, c.viewer.joined, c.viewer.epoch)
			}
		}
	}
	for j := range s.clients {
		c := s.clients[(first+j)%len(s.clients)]
		b = fmt.Append(b, "\nclient ", c.epoch, c.cursor, c.from, c.shows, min(c.owed, 2), c.ahead, c.over)
	}
	for _, i := range nodes {
		b = strconv.AppendBool(b, s.nodes[i].Calls() == s.looked[s.nodes[i].Node])
	}
	// Of the facts that a node knows, only those matter that a client shows, or may be shown.
	b = fmt.Append(b, "\nknown ", s.regained)
	l := s.log()
	for _, known := range []map[told]bool{s.nodes[nodes[0]].knows, s.nodes[nodes[1]].knows, s.recorded} {
		b = append(b, '\n')
		for _, k := range sorted(known) {
			matters := k.epoch == l.Epoch || k.epoch == s.epoch
			for _, c := range s.clients {
				matters = matters || slices.ContainsFunc(c.shows, func(other told) bool { return other.epoch == k.epoch })
			}
			if matters {
				b = fmt.Append(b, k)
			}
		}
	}
	return b
}

func sorted(set map[told]bool) []told {
	all := make([]told, 0, len(set))
	for k := range set {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b told) int {
		if a.seq != b.seq {
			return int(a.seq - b.seq)
		}
		return strings.Compare(a.epoch+a.word, b.epoch+b.word)
	})
	return all
}

// renamed numbers epochs (e1), texts (c1, f1) and times in the order in which they occur.
func renamed(b []byte) []byte {
	var names [][]byte
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); {
		j := i
		for j < len(b) && isName(b[j]) {
			j++
		}
		if j == i {
			out = append(out, b[i])
			i++
			continue
		}
		name := b[i:j]
		i = j
		if isTime := len(name) == 13 && name[0] == '1'; !isTime && (len(name) < 2 || name[0] != 'e' && name[0] != 'c' && name[0] != 'f' || name[1] > '9') {
			out = append(out, name...)
			continue
		}
		at := slices.IndexFunc(names, func(other []byte) bool { return bytes.Equal(other, name) })
		if at < 0 {
			at = len(names)
			names = append(names, name)
		}
		out = append(out, '$', byte(at))
	}
	return out
}

func isName(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
