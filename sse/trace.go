package sse

import "sync/atomic"

// Tracer follows chunks (traces.Traces). Config.Tracer is nil where nobody does.
type Tracer interface {
	// Arrived says that a chunk has come to this node, live or by a read. It answers what is
	// to be called when a viewer's socket has it, or nil if this chunk is not followed. It does not wait.
	Arrived(session, epoch string, seq int64, live bool) (wrote func(connection string))
}

// followed is the newest chunks of a feed that are followed, oldest first. It does not
// change: with one more there is another one.
type followed []*onItsWay

// onItsWay is a chunk that waits for its viewers.
type onItsWay struct {
	seq   int64
	left  atomic.Int32 // how many more viewers are told of
	wrote func(connection string)
}

// Of one chunk the first few viewers are told of: the thousandth says no more. Of one log so
// many chunks wait for theirs: what is older than that, a viewer catches up on.
const (
	followedViewers = 8
	followedChunks  = 64
	foundMost       = 1024 // are told of that one read has found: after a long absence of Redis there are more
)

// follow tells the tracer of the chunks behind from in w, which is not published yet. mu is held.
func (f *feed) follow(w *window, from int64, live bool) {
	tracer := f.hub.cfg.Tracer
	if tracer == nil {
		return
	}
	var all followed
	if old := f.followed.Load(); old != nil {
		all = *old
	}
	for seq := max(from+1, w.First, w.Last-foundMost+1); seq <= w.Last; seq++ {
		wrote := tracer.Arrived(f.session, w.Epoch, seq, live)
		if wrote == nil {
			continue
		}
		c := &onItsWay{seq: seq, wrote: wrote}
		c.left.Store(followedViewers)
		all = all[max(0, len(all)+1-followedChunks):]
		all = append(all[:len(all):len(all)], c)
	}
	f.followed.Store(&all)
}

// told says that the viewer has chunks behind from, up to to. What was there before it came is
// no news, however late it is given.
func (v *Viewer) told(from, to int64) {
	all := v.feed.followed.Load()
	if all == nil {
		return
	}
	for _, c := range *all {
		if c.seq > max(from, v.joinedAt) && c.seq <= to && c.left.Add(-1) >= 0 {
			c.wrote(v.Connection)
		}
	}
}
