package sse

import (
	"slices"
	"sort"
	"sync"

	"gapless/store"
)

// page is older chunks of a log as events: what no window has any more, read for a viewer
// that is further back.
type page struct {
	store.Bounds
	memory
	feed         *feed
	newer, older *page // in the order of use
}

func (p *page) base() int64 { return p.First - 1 }

// has says whether the page knows what comes behind cursor.
func (p *page) has(cursor int64) bool { return p.firstSeq() <= cursor+1 && cursor+1 < p.nextSeq() }

// pages are those that were used last, of all logs, within a number of bytes. Viewers of
// a log share them, and keep none: one that is stalled in a write keeps only the segment
// that it is writing. A page that is gone is read again.
type pages struct {
	mu             sync.Mutex
	budget, size   int
	newest, oldest *page
	of             map[*feed][]*page // by their first number
}

// find is the page of f's log, in an epoch, that knows what comes behind cursor.
func (c *pages) find(f *feed, epoch string, cursor int64) *page {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.of[f]
	i := sort.Search(len(all), func(i int) bool { return all[i].firstSeq() > cursor+1 }) - 1
	if i < 0 || all[i].Epoch != epoch || !all[i].has(cursor) {
		return nil
	}
	c.unlink(all[i])
	c.link(all[i])
	return all[i]
}

// put keeps a page, and lets go of those that were not used for longest.
func (c *pages) put(p *page) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.of[p.feed]
	i := sort.Search(len(all), func(i int) bool { return all[i].firstSeq() >= p.firstSeq() })
	if i < len(all) && all[i].firstSeq() == p.firstSeq() { // one that is shorter, or of another epoch
		c.remove(all[i])
		all = c.of[p.feed]
	}
	c.of[p.feed] = slices.Insert(all, i, p)
	c.link(p)
	for c.size += p.size; c.size > c.budget && c.oldest != nil; {
		c.remove(c.oldest)
	}
}

// drop lets go of all pages of a feed.
func (c *pages) drop(f *feed) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.of[f]) > 0 {
		c.remove(c.of[f][0])
	}
}

func (c *pages) remove(p *page) {
	c.unlink(p)
	c.size -= p.size
	all := c.of[p.feed]
	if i := slices.Index(all, p); i >= 0 {
		all = slices.Delete(all, i, i+1)
	}
	if len(all) == 0 {
		delete(c.of, p.feed)
	} else {
		c.of[p.feed] = all
	}
}

func (c *pages) link(p *page) {
	p.older, p.newer = c.newest, nil
	if c.newest != nil {
		c.newest.newer = p
	} else {
		c.oldest = p
	}
	c.newest = p
}

func (c *pages) unlink(p *page) {
	if p.newer != nil {
		p.newer.older = p.older
	} else {
		c.newest = p.older
	}
	if p.older != nil {
		p.older.newer = p.newer
	} else {
		c.oldest = p.newer
	}
	p.newer, p.older = nil, nil
}

// bytes is how much all of them are.
func (c *pages) bytes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size
}
