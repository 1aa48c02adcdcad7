package sse

import "sync/atomic"

// Tracer follows chunks (traces.Traces). Config.Tracer is nil if chunks are not traced.
type Tracer interface {
	// Arrived reports that a chunk has come to this node, live or by a read. It returns a function
	// to call when a viewer's socket has the chunk, or nil if the chunk is not followed. It does
	// not block.
	Arrived(session, epoch string, seq int64, live bool) (wrote func(connection string))
}

// followed holds the newest chunks of a feed that are followed, oldest first. It never changes: one
// more chunk makes a new one.
type followed []*onItsWay

// onItsWay is a chunk that waits for its viewers.
type onItsWay struct {
	seq   int64
	left  atomic.Int32 // how many more viewers are reported
	wrote func(connection string)
}

// The first few viewers of a chunk are reported: the thousandth adds nothing. The last few chunks
// of a log wait for viewers: a viewer that gets an older chunk is catching up.
const (
	followedViewers = 8
	followedChunks  = 64
	foundMost       = 1024 // at most this many chunks of one read are traced: after a long absence of Redis there are more
)

// follow reports to the tracer the chunks after from in w, which is not published yet. mu is held.
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

// told reports that the viewer has the chunks after from, up to to. It does not report chunks that
// were there before the viewer came.
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
