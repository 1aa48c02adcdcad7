package sse

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// stage is one run of the two nodes.
type stage struct {
	t       *testing.T
	model   *storetest.Model
	nodes   [2]*stageNode
	clients []*client
	made    int    // number of chunks made, so that no two of ours are equal
	fault   *fault // the first fault

	losses   int                     // how often the log may have lost something
	regained bool                    // the log may have got something back
	recorded map[told]bool           // the chunks that the hash knows of
	epoch    string                  // the epoch that the hash had last
	looked   map[*storetest.Node]int // how many scripts each node had run when the log last lost something, or got an epoch
}

// fault is a broken promise.
type fault struct{ kind, says string }

func (f *fault) String() string { return f.kind + ": " + f.says }

func (s *stage) fail(kind, format string, args ...any) {
	if s.fault == nil && !strings.Contains(*explorerIgnore, kind) {
		s.fault = &fault{kind, fmt.Sprintf(format, args...)}
	}
}

// Kinds of faults.
const (
	faultSilent = "silent difference" // a viewer shows something else than the log, and got no notice
	faultReset  = "needless reset"    // there are more resets than losses
	faultWaits  = "waits"             // all is quiet, and the viewer lacks a part of the log
	faultNumber = "number"            // a chunk is out of order
	faultSeq    = "seq"               // a chunk contains another number than its id
	faultOver   = "ended wrongly"     // by a 204, or in the middle of the log
)

type stageNode struct {
	*storetest.Node
	name  string
	hub   *Hub
	knows map[told]bool // what it acknowledged or gave out since it was started
}

// told is a chunk that a viewer has received or that was acknowledged.
type told struct {
	epoch string
	seq   int64
	word  string
}

// client is a viewer as its user sees it: what it shows, and its cursor.
type client struct {
	name   string
	node   *stageNode // nil: not connected
	sink   *sink
	viewer *Viewer
	seen   int
	gone   chan parting

	epoch  string
	cursor int64
	from   int64 // the number of the first word
	shows  []told
	owed   int   // losses for which it was not reset
	ahead  bool  // it was reset by a node that did not know of the loss: a node that does may reset it once more
	over   Cause // why it does not reconnect
}

// parting describes how a response ended, and the log at that moment.
type parting struct {
	cause Cause
	begun bool
	log   logged
}

// logged is the state of the log: its bounds and its chunks, with those that have expired since its
// epoch began.
type logged struct {
	store.Bounds
	all map[int64]string
}

const stageClients = 2

func explorerConfig() Config {
	c := testConfig()
	c.Reconcile, c.Heartbeat, c.Linger = time.Hour, 100*time.Hour, 1000*time.Hour // only when the explorer triggers them
	return c
}

func newStage(t *testing.T, forgetful bool) *stage {
	s := &stage{t: t, model: &storetest.Model{Forgetful: forgetful}, recorded: map[told]bool{}}
	for i, name := range []string{"A", "B"} {
		s.nodes[i] = &stageNode{name: name}
		s.start(s.nodes[i])
	}
	for i := range stageClients {
		s.clients = append(s.clients, &client{name: strconv.Itoa(i), from: 1})
	}
	return s
}

// start starts a node. Its hub, which costs most of a short run, is made when a viewer comes.
func (s *stage) start(n *stageNode) { n.Node, n.knows, n.hub = s.model.Node(), map[told]bool{}, nil }

func (s *stage) stop() {
	for _, n := range s.nodes {
		n.close()
	}
}

func (n *stageNode) close() {
	if n.hub != nil {
		n.hub.Close()
	}
}

func (n *stageNode) feed() *feed {
	if n.hub == nil {
		return nil
	}
	n.hub.mu.Lock()
	defer n.hub.mu.Unlock()
	return n.hub.feeds["s"]
}

// word returns the content of a chunk without its number.
func word(chunk string) string {
	if i := strings.Index(chunk, `"ts":`); i >= 0 {
		chunk = chunk[i:]
	}
	return strings.TrimSuffix(chunk, "}")
}

// log returns the current log.
func (s *stage) log() logged {
	b, start, whole := s.model.Log()
	l := logged{b, map[int64]string{}}
	for i, element := range whole {
		l.all[start+int64(i)+1] = word(element)
	}
	return l
}

// has reports whether the log contains k, or contained it until it expired.
func (l logged) has(k told) bool {
	word, known := l.all[k.seq]
	return l.Epoch == k.epoch && known && (word == k.word || word == "")
}

// losing runs do, by which the log may lose chunks.
func (s *stage) losing(do func()) {
	do()
	s.losses++
	for _, c := range s.clients { // a client that comes later may need a reset, too, from a node that notices later
		c.owed++
	}
	s.unseen()
}

// unseen notes that no node has seen the log as it is now.
func (s *stage) unseen() {
	s.looked = map[*storetest.Node]int{}
	for _, n := range s.nodes {
		s.looked[n.Node] = n.Calls()
	}
}

// record notes which chunks the hash knows of.
func (s *stage) record() {
	l, keys := s.log(), s.model.Keys()
	epoch := ""
	if keys.Hash == nil {
		s.recorded = map[told]bool{}
	} else {
		epoch = keys.Hash[0]
		seen, _ := strconv.ParseInt(keys.Hash[2], 10, 64)
		for seq := l.First; seq <= min(l.Last, seen) && l.Epoch == epoch; seq++ {
			s.recorded[told{epoch, seq, l.all[seq]}] = true
		}
	}
	if epoch == s.epoch {
		return
	}
	for _, c := range s.clients {
		if c.ahead { // a node that knows more has noticed, too
			c.owed, c.ahead = c.owed+1, false
		}
	}
	s.epoch = epoch
	s.unseen()
}

// excused reports whether no node could know that what a viewer received is no longer true. This is
// the only exception of promise 8. The hash that knew of it is gone, or is an earlier one. And each
// node that acknowledged or gave out a lost chunk of the same epoch has restarted since, or has not
// seen the log since. (When such a node sees the log, it begins a new epoch, and all viewers get a
// reset.)
func (s *stage) excused(k told) bool {
	l := s.log()
	gone := func(known map[told]bool) bool {
		for other := range known {
			if other.epoch == k.epoch && !l.has(other) {
				return true
			}
		}
		return false
	}
	for _, n := range s.nodes {
		if n.Calls() != s.looked[n.Node] && (gone(n.knows) || gone(s.recorded)) {
			return false
		}
	}
	return true
}

// judge compares what a client shows with the log. The client is connected and all is quiet, unless
// it is over.
func (s *stage) judge(c *client, l logged) {
	for _, k := range c.shows {
		was, known := l.all[k.seq]
		if k.seq > l.Last || was == k.word || known && was == "" || k.seq < l.First && k.epoch == l.Epoch {
			continue // the log has no chunk to compare, or an equal one
		}
		if !s.excused(k) {
			s.fail(faultSilent, "viewer %s shows %s as chunk %d, and the log has %q there", c.name, k.word, k.seq, was)
		}
		return
	}
	switch {
	case c.over == "" && c.epoch != l.Epoch && c.epoch != "" && l.Epoch != "":
		s.fail(faultSilent, "viewer %s was told epoch %s, and the log's is %s", c.name, c.epoch, l.Epoch)
	case c.cursor < l.Last:
		s.fail(faultWaits, "viewer %s has chunks up to %d, and the log goes to %d", c.name, c.cursor, l.Last)
	case c.cursor > l.Last && (len(c.shows) > 0 || l.Epoch != ""):
		s.fail(faultWaits, "viewer %s has chunks up to %d, and the log only goes to %d", c.name, c.cursor, l.Last)
	case c.from > l.First && !s.regained && c.epoch == l.Epoch:
		s.fail(faultWaits, "viewer %s begins with %d, and the log with %d", c.name, c.from, l.First)
	case c.over == Ended && !l.Ended:
		s.fail(faultOver, "viewer %s was told that the log has ended", c.name)
	case c.over == "" && (l.Ended || l.Deleted):
		s.fail(faultWaits, "viewer %s still waits: %+v", c.name, l.Bounds)
	}
}

// connect lets a client view the log at a node, with its cursor.
func (s *stage) connect(c *client, n *stageNode) {
	if n.hub == nil {
		n.hub = NewHub(explorerConfig(), n.Node)
	}
	v, err := n.hub.View(Ask{Session: "s", Cursor: c.cursor})
	if err != nil {
		s.t.Fatal(err)
	}
	c.node, c.viewer, c.seen, c.gone = n, v, 0, make(chan parting, 1)
	c.sink = &sink{taken: takenOver, room: 1 << 30}
	if takenOver {
		begun := false
		n.hub.sit(v, c.sink, []byte{}, nil, time.Minute, Told{func() { begun = true }, func(cause Cause, _ bool) { c.gone <- parting{cause, begun, s.log()} }})
		return
	}
	connectPlainly(s, c, n.hub, v)
}

// leave cuts a client off.
func (s *stage) leave(c *client) {
	c.sink.leave()
	synctest.Wait()
	s.drain(c)
}

// drain reads what a client has received.
func (s *stage) drain(c *client) {
	if c.node == nil {
		return
	}
	events, _ := parse(c.sink.bytes())
	for ; c.seen < len(events); c.seen++ {
		s.take(c, events[c.seen], c.seen == 0)
	}
	select {
	case p := <-c.gone:
		s.parted(c, p)
	default:
	}
}

func (s *stage) parted(c *client, p parting) {
	n := c.node
	c.node, c.viewer = nil, nil
	switch {
	case p.cause == Gone, p.cause == Shutdown:
	case p.cause == Ended:
		c.over = Ended
		s.judge(c, p.log)
	case p.cause == Deleted:
		c.over = Deleted
		if !p.log.Deleted && !p.begun {
			s.fail(faultOver, "viewer %s was told at node %s that the log was deleted, and it is there", c.name, n.name)
		}
	default:
		s.fail(faultOver, "viewer %s ended by %s at node %s", c.name, p.cause, n.name)
	}
}

// take handles an event as a client does.
func (s *stage) take(c *client, e event, first bool) {
	id, err := strconv.ParseInt(e.id, 10, 64)
	if err != nil {
		s.fail(faultNumber, "viewer %s: event %+v", c.name, e)
		return
	}
	switch e.name {
	case "welcome":
		var w welcome
		if err := json.Unmarshal([]byte(e.data), &w); err != nil || !first || id != c.cursor {
			s.fail(faultNumber, "viewer %s has chunks up to %d: %+v", c.name, c.cursor, e)
		}
		c.epoch = w.Epoch
	case "reset":
		var r reset
		if err := json.Unmarshal([]byte(e.data), &r); err != nil || r.Cursor != c.cursor {
			s.fail(faultNumber, "viewer %s has chunks up to %d: %+v", c.name, c.cursor, e)
		}
		if len(c.shows) > 0 { // a reset that removes nothing is invisible
			c.owed--
		}
		// A node that does not know of a loss can only see that the log is too short for this
		// viewer.
		c.ahead = r.Reason == resetAhead
		if c.owed < 0 {
			s.fail(faultReset, "viewer %s has chunks up to %d: %+v", c.name, c.cursor, e)
		}
		c.epoch, c.cursor, c.from, c.shows = r.Epoch, id, id+1, nil
	case "":
		if id != c.cursor+1 {
			s.fail(faultNumber, "viewer %s has chunks up to %d: %+v", c.name, c.cursor, e)
		}
		if seq, ours := store.Number(e.data); ours && seq != id {
			s.fail(faultSeq, "viewer %s: %+v", c.name, e)
		}
		if c.epoch == "" { // it came before the log existed
			c.epoch = c.viewer.epoch
		}
		k := told{c.epoch, id, word(e.data)}
		c.cursor, c.shows = id, append(c.shows, k)
		c.node.knows[k] = true
	default:
		s.fail(faultNumber, "viewer %s: %+v", c.name, e)
	}
}

// acknowledged notes what a node has acknowledged as stored.
func (s *stage) acknowledged(n *stageNode, a store.Appended, err error) {
	if err == nil {
		n.knows[told{a.Epoch, a.Last, s.log().all[a.Last]}] = true
	}
}

// settle lets everything happen that happens at once.
func (s *stage) settle() {
	synctest.Wait()
	s.record()
	for _, c := range s.clients {
		s.drain(c)
	}
}

// quiet lets everything happen that is outstanding, and judges. Then every client reconnects to
// each node, twice.
func (s *stage) quiet() {
	wait := func() {
		for range 10 { // until every node has seen the current log
			before := s.epoch
			time.Sleep(2 * time.Hour) // two reads
			if s.settle(); s.epoch == before {
				return
			}
		}
		s.fail(faultWaits, "the log begins one epoch after the other")
	}
	judge := func() {
		for _, c := range s.clients {
			if c.node != nil {
				s.judge(c, s.log())
			}
		}
	}
	for _, n := range s.nodes {
		if n.Down() {
			n.Resync()
			s.settle()
		}
	}
	wait()
	judge()
	late := false
	for _, n := range s.nodes {
		for len(n.Waiting()) > 0 {
			late = true
			n.Deliver(false)
			synctest.Wait()
		}
	}
	if late {
		s.settle()
		wait()
		judge()
	}
	// Every connection breaks and is made again, at either node.
	present := slices.Clone(s.clients)
	var back []*client
	for _, c := range append(present, &client{name: "new", from: 1, owed: s.losses}) {
		if c.over != "" || c.name != "new" && c.node == nil && c.cursor == 0 { // which is the same as new
			continue
		}
		for i, n := range s.nodes {
			again := *c
			again.name, again.shows, again.node = fmt.Sprint(c.name, " back at ", n.name), slices.Clone(c.shows), nil
			s.clients, back = append(s.clients, &again), append(back, &again)
			s.connect(&again, s.nodes[i])
			s.settle()
		}
	}
	wait()
	judge()
	// Now everything is known, so another round must change nothing.
	for i, c := range back {
		if c.node == nil || s.fault != nil {
			continue
		}
		c.owed = 0
		s.leave(c)
		s.connect(c, s.nodes[i%2])
		s.settle()
		if c.node != nil {
			s.judge(c, s.log())
		}
	}
}

// String describes the stage.
func (s *stage) String() string {
	b := new(strings.Builder)
	fmt.Fprintf(b, "\tkeys %q\n", s.model.State()[0])
	for _, n := range s.nodes {
		fmt.Fprintf(b, "\tnode %s remembers %s, down %t, waiting %q", n.name, n.Memory(), n.Down(), n.Waiting())
		if f := n.feed(); f != nil {
			w := f.window.Load()
			fmt.Fprintf(b, ", window %s first %d last %d former %d ended %t deleted %t, in memory from %d, tip %q",
				w.Epoch, w.First, w.Last, w.Former, w.Ended, w.Deleted, w.firstSeq(), w.tip)
		}
		fmt.Fprintln(b)
	}
	for _, c := range s.clients {
		at := "nowhere"
		if c.node != nil {
			at = c.node.name
		}
		fmt.Fprintf(b, "\tviewer %s at %s %s: epoch %s, up to %d, shows %v\n", c.name, at, c.over, c.epoch, c.cursor, c.shows)
	}
	return b.String()
}
