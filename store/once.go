package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// known is what the log contains of a producer's numbers, beginning with a batch's first.
type known struct {
	epoch string
	life  int64
	runs  []run
	end   int64 // the number after the last run
}

// run is a sequence of chunks of a log that have consecutive numbers of a producer (append.lua).
type run struct {
	number, seq int64
	text        bool // each chunk uses one number per byte
	filled      int  // how many bytes of each chunk's members the server added
}

func parseKnown(r *replyFields) (*known, error) {
	k := &known{epoch: r.text(1), life: r.int(8), end: r.int(5)}
	members, _ := r.at(6).([]any)
	for _, m := range members {
		text, _ := m.(string)
		run, err := parseRun(text)
		if err != nil {
			return nil, err
		}
		k.runs = append(k.runs, run)
	}
	if text := r.text(7); text != "" {
		behind, err := parseRun(text)
		if err != nil {
			return nil, err
		}
		k.end = behind.number
	}
	return k, nil
}

func parseRun(member string) (r run, err error) {
	f := strings.Fields(member)
	if len(f) != 5 {
		return r, fmt.Errorf("run %q: %w", member, errReply)
	}
	var errs [3]error
	r.number, errs[0] = strconv.ParseInt(f[1], 10, 64)
	r.seq, errs[1] = strconv.ParseInt(f[2], 10, 64)
	r.text = f[3] == "t"
	r.filled, errs[2] = strconv.Atoi(f[4])
	return r, errors.Join(errs[:]...)
}

// at returns the run that contains a number, and the number after the run. ok is false if the index does not go back so
// far.
func (k *known) at(number int64) (r run, end int64, ok bool) {
	end = k.end
	for i := len(k.runs) - 1; i >= 0; i-- {
		if k.runs[i].number <= number {
			return k.runs[i], end, true
		}
		end = k.runs[i].number
	}
	return run{}, end, false
}

// compare compares the log with a batch, as posted, and removes from the batch what the log contains. It returns how
// many of the batch's chunks these are, and where they are in the log. It does not compare what was trimmed.
//
// The reads need not be of one instant, because a log does not change under its numbers.
func (s *Store) compare(ctx context.Context, session string, b *Batch, k *known) (taken int, found Appended, err error) {
	c := comparison{batch: b, elements: elements{store: s, ctx: ctx, session: session, epoch: k.epoch}, number: b.Producer.Number}
	to := c.number
	for _, chunk := range b.Chunks {
		to += chunk.Numbers()
	}
	for to = min(to, k.end); c.number < to; {
		r, end, ok := k.at(c.number)
		end = min(end, to)
		switch {
		case !ok:
			c.pass(end)
		case r.text:
			err = c.text(r, end)
		default:
			err = c.chunks(r, end)
		}
		if err != nil {
			return 0, Appended{}, err
		}
	}
	b.Chunks, b.Producer.Number = b.Chunks[c.i:], c.number
	if c.off > 0 {
		b.Chunks = slices.Clone(b.Chunks) // the caller owns the old slice
		rest := b.Chunks[0]
		b.Chunks[0] = newText(rest.text[c.off:], rest.fill)
	}
	return c.i, c.found, nil
}

// comparison advances through a batch and the log.
type comparison struct {
	batch    *Batch
	elements elements
	number   int64 // the next number to compare
	i, off   int   // its chunk in the batch, and its byte offset there
	found    Appended
}

// advance passes n numbers, or fewer at the end of a chunk. It returns how many numbers it passed.
func (c *comparison) advance(n int64) int64 {
	chunk := &c.batch.Chunks[c.i]
	n = min(n, chunk.Numbers()-int64(c.off))
	if c.number, c.off = c.number+n, c.off+int(n); int64(c.off) == chunk.Numbers() {
		c.i, c.off = c.i+1, 0
	}
	return n
}

// pass treats everything up to number to as posted before.
func (c *comparison) pass(to int64) {
	for c.number < to {
		c.advance(to - c.number)
		c.note(0)
	}
}

// note counts chunk seq of the log. 0 means an unknown chunk.
func (c *comparison) note(seq int64) {
	f := &c.found
	if seq != 0 && seq == f.Last {
		return
	}
	if f.Count == 0 {
		f.First = seq
	}
	f.Last = seq
	f.Count++
	f.Known++
}

func (c *comparison) conflict() error {
	return &RefusedError{Index: c.i, Err: ErrProducerConflict}
}

func (c *comparison) chunks(r run, to int64) error {
	for c.number < to {
		seq := r.seq + c.number - r.number
		chunk := &c.batch.Chunks[c.i]
		element, kept, err := c.elements.at(seq)
		if err != nil {
			return err
		}
		if chunk.text != "" || kept && postedOf(element, r.filled) != chunk.posted() {
			return c.conflict()
		}
		c.advance(1)
		c.note(seq)
	}
	return nil
}

// text compares bytes, because the same text may come in other pieces now.
func (c *comparison) text(r run, to int64) error {
	for seq, number := r.seq, r.number; number < to; seq++ {
		element, kept, err := c.elements.at(seq)
		if err != nil {
			return err
		}
		text := contentOf(element)
		if !kept || text == "" { // then the beginnings of the other chunks are unknown too
			c.pass(to)
			return nil
		}
		end := min(number+int64(len(text)), to)
		for c.number < end {
			piece, off := text[c.number-number:end-number], c.off
			chunk := c.batch.Chunks[c.i]
			n := min(len(piece), len(chunk.text)-off)
			if chunk.text == "" || piece[:n] != chunk.text[off:off+n] {
				return c.conflict()
			}
			c.advance(int64(n))
			c.note(seq)
		}
		number += int64(len(text))
	}
	return nil
}

// postedOf returns the posted part of an element of the log. For a Chunk it is Chunk.posted.
func postedOf(element string, filled int) string {
	_, members, _ := strings.Cut(element, `,"ts":`)
	_, members, _ = strings.Cut(members, ",")
	return members[min(filled, len(members)):]
}

func contentOf(element string) string {
	var chunk struct{ Content string }
	_ = json.Unmarshal([]byte(element), &chunk) // an element of another program has no content here
	return chunk.Content
}

// elements reads parts of a log, mostly forwards.
type elements struct {
	store          *Store
	ctx            context.Context
	session, epoch string
	page           Page
}

// at returns the element at seq, if it is kept.
func (e *elements) at(seq int64) (element string, kept bool, err error) {
	if has := e.page.From <= seq && seq < e.page.Next(); !has {
		if e.page.Epoch != "" && seq < e.page.First {
			return "", false, nil // it was trimmed
		}
		const bytes, count = 1 << 20, 256
		if e.page, err = e.store.Read(e.ctx, e.session, seq, bytes, count); err != nil {
			return "", false, err
		}
	}
	if e.page.Epoch != e.epoch || e.page.Deleted || seq < e.page.From || seq >= e.page.Next() {
		return "", false, nil
	}
	return e.page.Elements[seq-e.page.From], true, nil
}
