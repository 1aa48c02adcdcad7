package sse

import (
	"flag"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The explorer drives two nodes over one log through every order of what may happen to them
// (moves). There are appends and direct pushes. Announcements are late, doubled or lost. Redis
// loses its newest changes, or one of its keys, or both. Feeds end; nodes restart and forget.
// Viewers come with what they have, and go. Logs end, are deleted and are made again. After each
// order, the explorer lets everything come to rest. Then every viewer must show the log, number by
// number and text by text, and each loss may have reset each viewer once. stage.excused is the only
// exception that the contract allows.
//
// The hubs, feeds and viewers are real, on fake time. The log is storetest.Model, which a test
// compares with the scripts.
//
//	make torture                       all of it, for as long as the fault test lasts
//	go test ./sse -run TestExplorer -v -args -explorer.deeper 1 -explorer.for 10m -explorer.seed 7
//	go test ./sse -run TestExplorer_trace -v -args -explorer.trace 'append A, view 0 A, flush'
var (
	explorerDeeper = flag.Int("explorer.deeper", 0, "how many moves deeper than usual the explorer plays every order")
	explorerFor    = flag.Duration("explorer.for", 2*time.Second, "how long the explorer plays longer orders at random")
	explorerSeed   = flag.Uint64("explorer.seed", 0, "what these follow from; 0: any")
	explorerTrace  = flag.String("explorer.trace", "", "an order that TestExplorer_trace plays, and tells of")
	explorerIgnore = flag.String("explorer.ignore", "", "kinds of faults that the explorer ignores, to see others")
	explorerFaults = flag.Int("explorer.faults", 1, "after how many faults the explorer gives up")
)

// scopes lists sets of moves of which every order is played, to a depth. Smaller sets go deeper.
// Two viewers and two equal nodes take part.
var scopes = []struct {
	name, moves string
	depth       int
}{
	{"everything", `.`, scopeDepth - 3},
	{"appends", `^(append|view 0 A|leave 0|fade A|restart A|fail|flush)`, scopeDepth},
	{"pushes", `^(push|view 0 A|leave 0|read A|resync A|fail|expire|cut)`, scopeDepth},
	{"announcements", `^(append A|push f0|view 0 A|hear A|double A|miss A|resync A|fail|flush)`, scopeDepth},
	{"nodes", `^(append|view 0|view 1 B|restart|fail|resync)`, scopeDepth},
	{"ends", `^(append A|end B|delete A|make B|view 0 A|leave 0|hear A|flush)`, scopeDepth},
}

// found is an order of moves, by their indexes in moves, and the fault that it shows.
type found struct {
	trace []byte
	fault *fault
}

func (f found) String() string { return "\n\t" + traceText(f.trace) + "\n\t" + f.fault.String() }

func traceText(trace []byte) string {
	names := make([]string, len(trace))
	for i, m := range trace {
		names[i] = moves[m].name
	}
	return strings.Join(names, ", ")
}

// reached is a state: how it was reached, and what may happen next.
type reached struct{ trace, next []byte }

// next returns the moves that may happen next.
func (s *stage) next(among *regexp.Regexp) (next []byte) {
	for i, m := range moves {
		if !m.rare && among.MatchString(m.name) && m.can(s) {
			next = append(next, byte(i))
		}
	}
	return next
}

// everyOrder plays all orders of moves up to a depth, breadth first, so that the first trace found
// is the shortest. It does not continue from a state that it has seen before, nor from a fault.
func everyOrder(t *testing.T, among string, depth int, forgetful bool, most int) (faults []found, states, played int) {
	re := regexp.MustCompile(among)
	seen := map[[2]uint64]bool{}
	level := []reached{{}}
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, forgetful)
		defer s.stop()
		level[0].next = s.next(re)
	})
	for range depth {
		var below []reached
		for _, r := range level {
			for _, m := range r.next {
				trace := append(slices.Clip(r.trace), m)
				synctest.Test(t, func(t *testing.T) {
					s := newStage(t, forgetful)
					defer s.stop()
					for _, m := range trace {
						moves[m].do(s)
						s.settle()
					}
					played++
					var next []byte
					if s.fault == nil {
						state := s.state()
						if seen[state] {
							return
						}
						seen[state] = true
						next = s.next(re)
						s.quiet()
					}
					if s.fault != nil {
						faults = append(faults, found{trace, s.fault})
					} else {
						below = append(below, reached{trace, next})
					}
				})
				if len(faults) == most {
					return faults, len(seen), played
				}
			}
		}
		level = below
	}
	return faults, len(seen), played
}

// playTrace plays a trace, lets everything come to rest, and returns the fault that it shows. ok is
// false if a move is impossible. told is called after each move.
func playTrace(t *testing.T, trace []byte, told func(name string, s *stage)) (f *fault, ok bool) {
	ok = true
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, false)
		defer s.stop()
		for _, m := range trace {
			if !moves[m].can(s) {
				ok = false
				return
			}
			moves[m].do(s)
			s.settle()
			told(moves[m].name, s)
			if s.fault != nil {
				break
			}
		}
		if s.fault == nil {
			s.quiet()
			told("at rest", s)
		}
		f = s.fault
	})
	return f, ok
}

func silently(string, *stage) {}

// shrunk returns f without the moves that its fault does not need.
func shrunk(t *testing.T, f found) found {
	for i := 0; i < len(f.trace); {
		less := slices.Concat(f.trace[:i], f.trace[i+1:])
		if g, ok := playTrace(t, less, silently); ok && g != nil && g.kind == f.fault.kind {
			f, i = found{less, g}, 0
		} else {
			i++
		}
	}
	return f
}

// parseTrace parses the text form of a trace.
func parseTrace(t *testing.T, text string) (trace []byte) {
	t.Helper()
	for name := range strings.SplitSeq(text, ", ") {
		i := slices.IndexFunc(moves, func(m move) bool { return m.name == name })
		if i < 0 {
			t.Fatalf("no move is called %q", name)
		}
		trace = append(trace, byte(i))
	}
	return trace
}

// Promises: Ordered, Unique, Complete; Resumable; A hint is only a hint; Ends; Said aloud.
func TestExplorer_everyOrder(t *testing.T) {
	if !takenOver { // like most viewers' connections; the other kind comes at random
		return
	}
	for _, scope := range scopes {
		t.Run(scope.name, func(t *testing.T) {
			begun := time.Now()
			depth := scope.depth + *explorerDeeper
			if testing.Short() {
				depth -= 2
			}
			faults, states, played := everyOrder(t, scope.moves, depth, false, *explorerFaults)
			for _, f := range faults {
				t.Error(f)
			}
			t.Logf("depth %d: %d states by %d orders, %v", depth, states, played, time.Since(begun).Round(time.Millisecond))
		})
	}
}

// This test plays the same at random, with longer orders.
func TestExplorer_atRandom(t *testing.T) {
	seed := *explorerSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	rnd := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // to be repeatable
	orders, made, faults := 0, 0, 0
	for begun := time.Now(); time.Since(begun) < *explorerFor && faults < *explorerFaults; orders++ {
		var f found
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t, false)
			defer s.stop()
			for range 1 + rnd.IntN(40) {
				m := rnd.IntN(len(moves))
				for !moves[m].can(s) {
					m = rnd.IntN(len(moves))
				}
				f.trace = append(f.trace, byte(m))
				moves[m].do(s)
				made++
				if s.settle(); s.fault != nil {
					break
				}
			}
			if s.fault == nil {
				s.quiet()
			}
			f.fault = s.fault
		})
		if f.fault != nil {
			faults++
			t.Error(shrunk(t, f))
		}
	}
	t.Logf("seed %d: %d orders, %d moves", seed, orders, made)
}

// This is the control: if nodes remember nothing, the explorer must find a loss without a reset.
func TestControl_nodesThatForget_areFound(t *testing.T) {
	faults, _, played := everyOrder(t, `^(append|view 0 B|restart B|fail)`, 5, true, 1)
	if len(faults) == 0 || faults[0].fault.kind != faultSilent {
		t.Fatalf("%d orders show nothing: %v", played, faults)
	}
	t.Logf("as expected: %v", faults[0])
}

// These are faults of this program that outsiders and the explorer found, as shortest traces.
func TestExplorer_traces(t *testing.T) {
	for name, trace := range map[string]string{
		"lost while nobody viewed it":                     "append A, append A, view 0 A, leave 0, fade A, fail 1, append A",
		"noticed by a node that knew less":                "append A, append A, view 0 A, append B, view 1 B, restart B, fail 2",
		"regrown to the cursor, and ended":                "append A, view 0 A, leave 0, flush, end A",
		"regrown, and come back to again and again":       "push f0, view 0 A, flush, push f0",
		"made again, and come back to again and again":    "push f0, delete A, make A",
		"an equal text stands at the cursor":              "push f0, push f1, view 0 A, expire, push f1, push f1",
		"an equal text stands at the cursor, and a chunk": "append A, push f0, push f1, view 0 A, fail 3, push f1, push f1",
		"what was numbered before":                        "append A, append A, cut 1",
		"announced late, in a log that is lost":           "view 0 A, append B, hear A, flush, append B, flush",
		"a window of an epoch that is over":               "view 0 B, append B, flush, push f1, read B, unhash, leave 0, view 0 A, restart A, view 0 B",
	} {
		t.Run(name, func(t *testing.T) {
			if f, ok := playTrace(t, parseTrace(t, trace), silently); !ok || f != nil {
				t.Fatalf("%s: %v", trace, f)
			}
		})
	}
}

func TestExplorer_trace(t *testing.T) {
	if *explorerTrace != "" {
		f, ok := playTrace(t, parseTrace(t, *explorerTrace), func(name string, s *stage) { t.Logf("%s\n%s", name, s) })
		t.Log(f, ok)
	}
}
