package sse

import (
	"slices"
	"sort"
	"sync"

	"gapless/store"
)

// page holds older chunks of a log as events. It is read for a viewer that needs chunks which are
// no longer in the window.
type page struct {
	store.Bounds
	memory
	feed         *feed
	newer, older *page // in order of use
}

func (p *page) base() int64 { return p.First - 1 }

// has reports whether the page contains the chunk after cursor.
func (p *page) has(cursor int64) bool { return p.firstSeq() <= cursor+1 && cursor+1 < p.nextSeq() }

// pages caches the last used pages of all logs, within a number of bytes. Viewers of a log share
// pages and hold none: a viewer that is stalled in a write holds only the segment that it writes. A
// page that was dropped is read again.
type pages struct {
	mu             sync.Mutex
	budget, size   int
	newest, oldest *page
	of             map[*feed][]*page // by their first number
}

// find returns the page of f's log, in an epoch, that contains the chunk after cursor, or nil.
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

// put adds a page, and drops the least recently used ones.
func (c *pages) put(p *page) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.of[p.feed]
	i := sort.Search(len(all), func(i int) bool { return all[i].firstSeq() >= p.firstSeq() })
	if i < len(all) && all[i].firstSeq() == p.firstSeq() { // it is shorter, or of another epoch
		c.remove(all[i])
		all = c.of[p.feed]
	}
	c.of[p.feed] = slices.Insert(all, i, p)
	c.link(p)
	for c.size += p.size; c.size > c.budget && c.oldest != nil; {
		c.remove(c.oldest)
	}
}

// drop drops all pages of a feed.
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

// bytes returns the size of all pages.
func (c *pages) bytes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size
}
