package embedded

import (
	"encoding/binary"
	"slices"
	"sort"
)

// list is a list of texts. It grows and is cut at both ends; nothing in the middle ever changes. The texts stand
// one after another in blocks without pointers, so a million texts need little more memory than their bytes, and
// cost the garbage collector nothing.
type list struct {
	blocks []*block // from left to right
	length int
}

// block is up to blockBytes of texts, each preceded by its length. Texts are added at the end of data. If the block grows to the
// left, the end of data is its left end: data begins with the rightmost text.
type block struct {
	first int64 // the place of its leftmost text; places have meaning only relative to each other
	n     int
	left  bool
	off   int // offset in data: what was cut from the end that does not grow
	data  []byte
}

const (
	blockBytes = 4 << 10
	blockTexts = 128
)

func (l *list) pushRight(text string) {
	var b *block
	place := int64(0)
	if n := len(l.blocks); n > 0 {
		b = l.blocks[n-1]
		place = b.first + int64(b.n)
	}
	if b == nil || b.left || !b.fits(text) {
		b = newBlock(b, text)
		b.first = place
		l.blocks = append(l.blocks, b)
	}
	b.add(text)
	l.length++
}

func (l *list) pushLeft(text string) {
	var b *block
	place := int64(0)
	if len(l.blocks) > 0 {
		b = l.blocks[0]
		place = b.first
	}
	if b == nil || !b.left || !b.fits(text) {
		b = newBlock(b, text)
		b.first, b.left = place, true
		if cap(l.blocks) == len(l.blocks) { // keep free capacity for the front as well: one copy serves many blocks
			grown := make([]*block, len(l.blocks), 2*len(l.blocks)+1)
			copy(grown, l.blocks)
			l.blocks = grown
		}
		l.blocks = slices.Insert(l.blocks, 0, b)
	}
	b.add(text)
	b.first--
	l.length++
}

// newBlock makes a block next to another one. A list that has filled one block probably fills the next one, too.
func newBlock(former *block, text string) *block {
	need := len(text) + binary.MaxVarintLen32
	size := min(max(4*need, 64), blockBytes)
	if former != nil {
		size = blockBytes
	}
	return &block{data: make([]byte, 0, max(size, need))}
}

func (b *block) fits(text string) bool {
	return b.n < blockTexts && len(b.data)+len(text)+binary.MaxVarintLen32 <= blockBytes
}

func (b *block) add(text string) {
	if need := len(b.data) + len(text) + binary.MaxVarintLen32; need > cap(b.data) {
		grown := make([]byte, len(b.data), max(min(2*cap(b.data), blockBytes), need))
		copy(grown, b.data)
		b.data = grown
	}
	b.data = append(binary.AppendUvarint(b.data, uint64(len(text))), text...)
	b.n++
}

// skip returns the offset after the first n texts of data.
func skip(data []byte, n int) int {
	at := 0
	for range n {
		size, w := binary.Uvarint(data[at:])
		at += w + int(size)
	}
	return at
}

// each calls f for the texts i to j-1 of the block, from left to right.
func (b *block) each(i, j int, f func(text []byte)) {
	from, to := i, j
	if b.left {
		from, to = b.n-j, b.n-i
	}
	data := b.data[b.off:]
	data = data[skip(data, from):]
	texts := make([][]byte, 0, 16)
	for range to - from {
		size, w := binary.Uvarint(data)
		text := data[w : w+int(size)]
		data = data[w+int(size):]
		if !b.left {
			f(text)
		} else {
			texts = append(texts, text)
		}
	}
	for _, text := range slices.Backward(texts) {
		f(text)
	}
}

// each calls f for the texts at positions i to j-1 (0 is the leftmost), from left to right.
func (l *list) each(i, j int, f func(text []byte)) {
	if i >= j {
		return
	}
	from := l.blocks[0].first + int64(i)
	to := from + int64(j-i)
	k := sort.Search(len(l.blocks), func(k int) bool { return l.blocks[k].first > from }) - 1
	for ; k < len(l.blocks) && l.blocks[k].first < to; k++ {
		b := l.blocks[k]
		b.each(int(max(from-b.first, 0)), int(min(to-b.first, int64(b.n))), f)
	}
}

// trim keeps the texts at positions i to j-1.
func (l *list) trim(i, j int) {
	if i >= j {
		*l = list{}
		return
	}
	for i > 0 {
		b := l.blocks[0]
		if b.n > i {
			b.cut(i, b.left)
			b.first += int64(i)
			l.length -= i
			break
		}
		i, j, l.length = i-b.n, j-b.n, l.length-b.n
		l.blocks[0] = nil
		l.blocks = l.blocks[1:]
		if i == 0 {
			break
		}
	}
	for l.length > j-i {
		last := len(l.blocks) - 1
		b := l.blocks[last]
		if surplus := l.length - (j - i); b.n > surplus {
			b.cut(surplus, !b.left)
			l.length -= surplus
			break
		}
		l.length -= b.n
		l.blocks[last] = nil
		l.blocks = l.blocks[:last]
	}
}

// cut removes n texts, either at the growing end or at the other one.
func (b *block) cut(n int, growing bool) {
	data := b.data[b.off:]
	if growing {
		b.data = b.data[: b.off+skip(data, b.n-n) : b.off+skip(data, b.n-n)] // what was cut may still be read by a snapshot
	} else {
		b.off += skip(data, n)
	}
	b.n -= n
}
