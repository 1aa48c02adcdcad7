package embedded

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// A list behaves like a slice, wherever it grows and is cut.
func TestList_isAList(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		var l list
		var model []string
		for step := range rapid.IntRange(1, 400).Draw(r, "steps") {
			text := fmt.Sprint(step, strings.Repeat("x", rapid.SampledFrom([]int{0, 1, 20, 200, 2000, 9000}).Draw(r, "size")))
			switch rapid.SampledFrom([]string{"right", "right", "right", "left", "left", "left", "trim"}).Draw(r, "what") {
			case "right":
				l.pushRight(text)
				model = append(model, text)
			case "left":
				l.pushLeft(text)
				model = slices.Insert(model, 0, text)
			case "trim":
				i := rapid.IntRange(0, min(len(model), 20)).Draw(r, "from")
				j := len(model) - rapid.IntRange(0, min(len(model), 20)).Draw(r, "off the end")
				l.trim(i, j)
				model = slices.Clone(model[min(i, max(j, 0)):max(min(i, max(j, 0)), j)])
				if i >= j {
					model = nil
				}
			}
			i := rapid.IntRange(0, len(model)).Draw(r, "i")
			j := rapid.IntRange(i, len(model)).Draw(r, "j")
			var got []string
			l.each(i, j, func(text []byte) { got = append(got, string(text)) })
			if l.length != len(model) || !slices.Equal(got, model[i:j]) {
				r.Fatalf("step %d: of %d texts, not %d, %d to %d are %.60q, not %.60q", step, l.length, len(model), i, j, got, model[i:j])
			}
		}
	})
}

// A sorted set behaves like a sorted slice.
func TestZset_isSorted(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		z := zset{scores: map[string]float64{}}
		model := map[string]float64{}
		for range rapid.IntRange(1, 3).Draw(r, "rounds") {
			for range rapid.IntRange(1, 700).Draw(r, "steps") {
				name := fmt.Sprint(rapid.IntRange(0, 900).Draw(r, "name"))
				if rapid.IntRange(0, 3).Draw(r, "what") == 0 {
					_, has := model[name]
					if z.remove(name) != has {
						r.Fatalf("removing %s: it was there: %t", name, has)
					}
					delete(model, name)
					continue
				}
				score := float64(rapid.IntRange(0, 3).Draw(r, "score"))
				z.set(name, score)
				model[name] = score
			}
			var want, got []member
			for name, score := range model {
				want = append(want, member{score, name})
			}
			slices.SortFunc(want, compareMembers)
			for p := z.index(0); ; p = z.next(p) {
				m, ok := z.at(p)
				if !ok {
					break
				}
				got = append(got, m)
			}
			if !slices.Equal(got, want) {
				r.Fatalf("%v, not %v", got, want)
			}
			if n := len(want); n > 0 {
				if m, _ := z.at(z.index(n / 2)); m != want[n/2] {
					r.Fatalf("number %d is %v, not %v", n/2, m, want[n/2])
				}
			}
		}
	})
}
