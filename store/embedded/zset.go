package embedded

import (
	"cmp"
	"slices"
	"sort"
)

// zset is a sorted set: members by score, and those with equal scores by their bytes. They are stored in short slices, so that one of
// a hundred thousand members can be added without moving all the others.
type zset struct {
	scores map[string]float64
	parts  [][]member // none is empty
}

type member struct {
	score float64
	name  string
}

const partMost = 256

func compareMembers(a, b member) int {
	return cmp.Or(cmp.Compare(a.score, b.score), cmp.Compare(a.name, b.name))
}

// place is the position of a member, or where it would be: the index of its part, and the index in it.
type place struct{ part, i int }

// search returns the place of the first member for which after is true. after must be false for all members before it.
func (z *zset) search(after func(member) bool) place {
	part := sort.Search(len(z.parts), func(k int) bool { return after(z.parts[k][len(z.parts[k])-1]) })
	if part == len(z.parts) {
		return place{part, 0}
	}
	return place{part, sort.Search(len(z.parts[part]), func(i int) bool { return after(z.parts[part][i]) })}
}

func (z *zset) placeOf(m member) place {
	return z.search(func(other member) bool { return compareMembers(other, m) >= 0 })
}

// at returns the member at a place, and reports whether one is there.
func (z *zset) at(p place) (member, bool) {
	if p.part < 0 || p.part >= len(z.parts) {
		return member{}, false
	}
	return z.parts[p.part][p.i], true
}

func (z *zset) next(p place) place {
	if p.i++; p.i == len(z.parts[p.part]) {
		return place{p.part + 1, 0}
	}
	return p
}

func (z *zset) previous(p place) place {
	if p.i--; p.i >= 0 {
		return p
	}
	if p.part--; p.part < 0 {
		return place{-1, 0}
	}
	return place{p.part, len(z.parts[p.part]) - 1}
}

// index returns the place of the member that n members precede.
func (z *zset) index(n int) place {
	for part, all := range z.parts {
		if n < len(all) {
			return place{part, n}
		}
		n -= len(all)
	}
	return place{len(z.parts), 0}
}

// set adds a member, or changes its score. It reports whether anything changed, and whether the member was added.
func (z *zset) set(name string, score float64) (changed, added bool) {
	former, has := z.scores[name]
	if has && former == score {
		return false, false
	}
	if has {
		z.drop(member{former, name})
	}
	m := member{score, name}
	z.scores[name] = score
	switch p := z.placeOf(m); {
	case len(z.parts) == 0:
		z.parts = [][]member{{m}}
	case p.part == len(z.parts): // after all other members
		p.part--
		z.insert(p.part, len(z.parts[p.part]), m)
	default:
		z.insert(p.part, p.i, m)
	}
	return true, !has
}

func (z *zset) insert(part, i int, m member) {
	all := slices.Insert(z.parts[part], i, m)
	z.parts[part] = all
	if len(all) > partMost {
		half := len(all) / 2
		if i == len(all)-1 { // members that arrive in order leave full parts
			half = len(all) - 1
		}
		z.parts[part] = slices.Clip(all[:half])
		z.parts = slices.Insert(z.parts, part+1, slices.Clone(all[half:]))
	}
}

func (z *zset) remove(name string) bool {
	score, has := z.scores[name]
	if has {
		delete(z.scores, name)
		z.drop(member{score, name})
	}
	return has
}

func (z *zset) drop(m member) {
	p := z.placeOf(m)
	if z.parts[p.part] = slices.Delete(z.parts[p.part], p.i, p.i+1); len(z.parts[p.part]) == 0 {
		z.parts = slices.Delete(z.parts, p.part, p.part+1)
	}
}
