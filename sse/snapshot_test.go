package sse

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

// said is a snapshot as a client reads it.
type said struct {
	Type     string
	Epoch    string
	First    int64 `json:"first_seq"`
	Last     int64 `json:"last_seq"`
	Ended    bool
	Messages []saidMessage
}

type saidMessage struct {
	ID      string `json:"message_id,omitempty"`
	Role    string
	Content string
	Thought string `json:"reasoning,omitempty"`
	Millis  int64  `json:"reasoning_ms,omitempty"`
	Status  string
	Done    bool
	Reason  string
	First   int64 `json:"first_seq"`
	Last    int64 `json:"last_seq"`
	Chunks  []map[string]any
}

func parseSaid(data string) (*said, error) {
	s := &said{}
	if err := json.Unmarshal([]byte(data), s); err != nil {
		return nil, fmt.Errorf("%w in %s", err, data)
	}
	if s.Type != "snapshot" || strings.ContainsAny(data, "\r\n") {
		return nil, fmt.Errorf("%s is no snapshot", data)
	}
	return s, nil
}

// check compares the snapshot with chunks, which it reads as a page does.
func (s *said) check(elements []string) error {
	var want []*saidMessage
	by := map[string]*saidMessage{}
	over := map[*saidMessage]bool{}
	began := map[*saidMessage]int64{} // when it began to think
	var neighbour *saidMessage
	ended := false
	for i, element := range elements {
		seq := s.First + int64(i)
		data := []byte(encoded(seq, element))
		chunk := map[string]any{}
		if err := json.Unmarshal(data, &chunk); err != nil {
			return err
		}
		text := func(name string) string { t, _ := chunk[name].(string); return t }
		kind, id, role, content := text("type"), text("message_id"), text("role"), text("content")
		if _, is := chunk["type"].(string); !is {
			kind = "delta"
		}
		if role == "" {
			role = "assistant"
		}
		more := false
		for name, value := range chunk {
			switch _, isText := value.(string); name {
			case "seq", "ts", "is_complete":
			case "type", "message_id", "role", "content", "reason":
				more = more || !isText
			default:
				more = true
			}
		}
		ends := chunk["is_complete"] == true
		status := "streaming"
		if ends || kind == "message" {
			status = "done"
		}
		switch kind {
		case "delta", "message", "reasoning":
		case "done", "failed", "cancelled":
			status, ends = kind, true
		case "end":
			if strings.HasPrefix(element, fmt.Sprintf(`{"seq":%d,"ts":`, seq)) {
				if ended = true; id == "" && content == "" && !more {
					continue
				}
			} else {
				more = true
			}
		default:
			more = true
		}
		m := by[id]
		if id == "" {
			m = neighbour
			if m != nil && (m.Status != "streaming" || m.Role != role) {
				m = nil
			}
			if m == nil && content == "" && !more {
				neighbour = nil
				continue
			}
		}
		if m == nil {
			m = &saidMessage{ID: id, Role: role, First: seq}
			want = append(want, m)
			if id != "" {
				by[id] = m
			}
		}
		if neighbour = nil; id == "" {
			neighbour = m
		}
		m.Last = seq
		if kind != "reasoning" {
			m.Content += content
		} else if m.Thought += content; content != "" {
			if ts, _ := chunk["ts"].(float64); ts > 0 {
				if began[m] == 0 {
					began[m] = int64(ts)
				}
				m.Millis = max(m.Millis, int64(ts)-began[m])
			}
		}
		if text("reason") != "" {
			m.Reason = text("reason")
		}
		if more {
			m.Chunks = append(m.Chunks, chunk)
		}
		if !over[m] {
			m.Status, over[m] = status, ends
			m.Done = status != "streaming"
		}
	}
	got := make([]*saidMessage, len(s.Messages))
	for i := range s.Messages {
		got[i] = &s.Messages[i]
	}
	if len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) || s.Ended && !ended {
		g, _ := json.Marshal(got)
		w, _ := json.Marshal(want)
		return fmt.Errorf("the snapshot says (ended %v)\n%s\nthe chunks %d to %d say (ended %v)\n%s", s.Ended, g, s.First, s.Last, ended, w)
	}
	return nil
}

func conversation(log *storetest.Log) {
	for _, e := range []string{
		`{"seq":1,"ts":1,"type":"message","message_id":"q","role":"user","content":"Why?"}`,
		`{"seq":2,"ts":2,"type":"delta","message_id":"a","role":"assistant","content":"Be\ncau\u0073e"}`,
		`{"seq":3,"ts":3,"type":"delta","message_id":"b","role":"tool","content":"","data":{"n":1}}`,
		`{"seq":4,"ts":4,"type":"delta","message_id":"a","content":" \"so\""}`,
		`{"seq":5,"ts":5,"type":"failed","message_id":"a","reason":"producer_lost"}`,
		`loose`,
	} {
		log.Push(e)
	}
}

// This test compares the event byte by byte.
func TestSnapshot_isWrittenLikeThis(t *testing.T) {
	for _, window := range []int{0, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			conversation(log)
			cfg := testConfig()
			cfg.Window = window
			h := started(t, cfg, log)
			w := now(t, h, log, Ask{Snapshot: true})
			log.Append("more")
			log.Deliver(0)
			synctest.Wait()
			_, got, _ := strings.Cut(string(w.bytes()), "\n\n") // welcome
			if want := `event: snapshot
data: {"type":"snapshot","epoch":"e1","first_seq":1,"last_seq":6,"ended":false,"messages":[` +
				`{"message_id":"q","role":"user","content":"Why?","status":"done","done":true,"first_seq":1,"last_seq":1},` +
				`{"message_id":"a","role":"assistant","content":"Be\ncau\u0073e \"so\"","status":"failed","done":true,"reason":"producer_lost","first_seq":2,"last_seq":5},` +
				`{"message_id":"b","role":"tool","content":"","status":"streaming","done":false,"first_seq":3,"last_seq":3,"chunks":[{"seq":3,"ts":3,"type":"delta","message_id":"b","role":"tool","content":"","data":{"n":1}}]},` +
				`{"role":"assistant","content":"loose","status":"streaming","done":false,"first_seq":6,"last_seq":6,"chunks":[{"seq":6,"type":"foreign","content":"loose"}]}]}
id: 6

data: {"seq":7,"ts":1795424741692,"type":"delta","content":"more"}
id: 7

`; got != want {
				t.Errorf("%s\nnot\n%s", got, want)
			}
			w.leave()
		})
	}
}

// Reasoning is not part of a message's content, and its duration is given.
func TestSnapshot_keepsThinkingApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for _, e := range []string{
			`{"seq":1,"ts":1000,"type":"reasoning","message_id":"a","content":"Hm, \u0022"}`,
			`{"seq":2,"ts":13500,"type":"reasoning","message_id":"a","content":"tea."}`,
			`{"seq":3,"ts":14000,"type":"delta","message_id":"a","content":"Green"}`,
		} {
			log.Push(e)
		}
		w := now(t, started(t, testConfig(), log), log, Ask{Snapshot: true})
		if got, want := string(w.bytes()), `{"role":"assistant","content":"Green","reasoning":"Hm, \u0022tea.","reasoning_ms":12500,"status":"streaming"`; !strings.Contains(strings.Replace(got, `"message_id":"a",`, "", 1), want) {
			t.Errorf("%s\nhas no\n%s", got, want)
		}
		w.leave()
	})
}

// Only a viewer that has nothing gets a snapshot: at cursor 0, and after a reset.
func TestSnapshot_onlyForWhoHasNothing(t *testing.T) {
	for name, c := range map[string]struct {
		ask  Ask
		log  func(l *storetest.Log)
		want string
	}{
		"at the start":       {Ask{}, nil, "welcome 0, snapshot 4"},
		"inside":             {Ask{Cursor: 2}, nil, "welcome 2, chunk 3, chunk 4"},
		"at the edge":        {Ask{Cursor: 4}, nil, "welcome 4"},
		"latest":             {Ask{Cursor: Latest}, nil, "welcome 4"},
		"ahead":              {Ask{Cursor: 9}, nil, "welcome 9, reset 0, snapshot 4"},
		"unknown":            {Ask{Unknown: true}, nil, "welcome 0, reset 0, snapshot 4"},
		"trimmed":            {Ask{}, func(l *storetest.Log) { l.Trim(3) }, "welcome 0, reset 3, snapshot 4"},
		"all trimmed":        {Ask{Cursor: 3}, func(l *storetest.Log) { l.Trim(4) }, "welcome 3, reset 4"},
		"ended":              {Ask{}, func(l *storetest.Log) { l.End() }, "welcome 0, snapshot 4"},
		"raw has no room":    {Ask{Raw: true}, nil, ""},
		"until done, inside": {Ask{UntilDone: true}, func(l *storetest.Log) { l.Push(`{"type":"done"}`) }, "welcome 0, snapshot 5"},
		"until done":         {Ask{UntilDone: true}, nil, "welcome 0, snapshot 4"},
	} {
		for _, window := range []int{0, 1 << 20} {
			t.Run(fmt.Sprint(name, "/", window), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					log := &storetest.Log{}
					for range 4 {
						log.Append("x")
					}
					if c.log != nil {
						c.log(log)
					}
					cfg := testConfig()
					cfg.Window = window
					c.ask.Snapshot = !c.ask.Raw
					w := now(t, started(t, cfg, log), log, c.ask)
					if got := names(w.events()); got != c.want {
						t.Errorf("%s, not %s", got, c.want)
					}
					over := name == "ended" || name == "until done, inside"
					select {
					case cause := <-w.done:
						if !over || !cause.Clean() {
							t.Error(cause)
						}
					default:
						if over {
							t.Error("the response did not end")
						}
						w.leave()
					}
				})
			})
		}
	}
}

// Content that comes while the log is empty, or live, comes as chunks.
func TestSnapshot_whatComesLiveIsChunks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		w := now(t, started(t, testConfig(), log), log, Ask{Snapshot: true})
		log.Append("a")
		log.Deliver(0)
		synctest.Wait()
		if got := names(w.events()); got != "welcome 0, chunk 1" {
			t.Error(got)
		}
		log.Replace(storetest.Element(1, "b"), storetest.Element(2, "c")) // a failover
		time.Sleep(2 * testConfig().Reconcile)
		synctest.Wait()
		first, list := log.Contents()
		if got, want := names(w.events()), fmt.Sprintf("welcome 0, chunk 1, reset %d, snapshot %d", first-1, first+1); got != want {
			t.Errorf("%s, not %s", got, want)
		}
		if err := w.check(first, list); err != nil {
			t.Error(err)
		}
		w.leave()
	})
}

func elements(rt *rapid.T) []string {
	member := rapid.SampledFrom([]string{
		`"type":"delta"`, `"type":"message"`, `"type":"done"`, `"type":"failed"`, `"type":"cancelled"`, `"type":"end"`, `"type":"tool"`, `"type":7`, `"type":"reasoning"`,
		`"message_id":"a"`, `"message_id":"\u0061"`, `"message_id":"b"`, `"message_id":""`, `"message_id":["a"]`,
		`"role":"user"`, `"role":"assistant"`, `"role":""`, `"content":"x\"\\\u00e4 "`, `"content":"ä€😀"`, `"content":""`, `"content":{"t":1}`,
		`"reason":"why"`, `"is_complete":true`, `"is_complete":false`, `"data":[1,{"k":"v"}]`, `"ts":5`, `"ts":-9`, `"ts":"7"`, `"seq":1`,
	})
	one := rapid.Custom(func(rt *rapid.T) string {
		if rapid.IntRange(0, 9).Draw(rt, "kind") == 0 {
			return rapid.SampledFrom([]string{"text", "[1]", `{"content":"torn`, ""}).Draw(rt, "foreign")
		}
		members := rapid.SliceOfNDistinct(member, 0, 5, func(m string) string { return strings.SplitN(m, ":", 2)[0] }).Draw(rt, "members")
		return strings.Join(members, ",")
	})
	all := rapid.SliceOfN(one, 0, 40).Draw(rt, "chunks")
	for i, e := range all {
		if e == "text" || strings.HasPrefix(e, "[") || strings.HasPrefix(e, "{") {
			continue
		}
		if rapid.Bool().Draw(rt, "ours") {
			var head strings.Builder
			head.WriteString(fmt.Sprintf(`"seq":%d,"ts":%d`, i+1, 1_000*i))
			for m := range strings.SplitSeq(e, ",") {
				if m != "" && !strings.HasPrefix(m, `"ts"`) && !strings.HasPrefix(m, `"seq"`) {
					head.WriteString("," + m)
				}
			}
			e = head.String()
		}
		all[i] = "{" + e + "}"
	}
	return all
}

// With any window and any limit, snapshot and chunks together equal the log, even for a viewer that
// is cut off after any event.
func TestSnapshot_saysWhatTheChunksSay(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		all := elements(rt)
		late := rapid.IntRange(0, len(all)).Draw(rt, "late")
		window := rapid.SampledFrom([]int{0, 1, 300, 1 << 20}).Draw(rt, "window")
		most := rapid.SampledFrom([]int{0, 500, 1000, 3000, 1 << 20}).Draw(rt, "most")
		cut := rapid.IntRange(0, 3).Draw(rt, "cut behind")
		var failure error
		synctest.Test(t, func(t *testing.T) {
			log := &storetest.Log{}
			cfg := testConfig()
			cfg.Window, cfg.SnapshotMax = window, most
			h := NewHub(cfg, log)
			defer h.Close()
			for _, e := range all[:late] {
				log.Push(e)
			}
			first := now(t, h, log, Ask{Snapshot: true})
			first.leave()
			events := first.events()
			v := &watcher{}
			if failure = v.take(events[:min(cut, len(events))]); failure != nil {
				return
			}
			for _, e := range all[late:] {
				log.Push(e)
			}
			again := watch(t, h, Ask{Session: "s", Snapshot: true, Cursor: v.cursor})
			again.screen, again.seen = v.screen, 0
			time.Sleep(2 * h.cfg.Reconcile)
			synctest.Wait()
			failure = again.check(1, all)
			if n := len(all); failure == nil && n > 0 && again.cursor != int64(n) {
				failure = fmt.Errorf("the viewer is at %d of %d: %s", again.cursor, n, names(again.events()))
			}
			if most == 1<<20 && failure == nil && late > 0 && cut != 1 && names(first.events()) != fmt.Sprint("welcome 0, snapshot ", late) {
				failure = fmt.Errorf("not one event: %s", names(first.events()))
			}
			for _, e := range first.events() {
				if size := len(e.data); e.name == "snapshot" && size > most && failure == nil {
					failure = fmt.Errorf("a snapshot of %d bytes, and %d are the most: %s", size, most, e.data)
				}
			}
			again.leave()
		})
		if failure != nil {
			rt.Fatal(failure)
		}
	})
}

// The log is trimmed while it is folded, and the feed does not know.
func TestSnapshot_trimmedMeanwhile_isReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for i := range 400 {
			log.Append(fmt.Sprint(strings.Repeat("x", 10_000), i))
		}
		cfg := testConfig()
		cfg.Window, cfg.SnapshotMax = 0, 64<<20
		h := started(t, cfg, log)
		now(t, h, log, Ask{Cursor: Latest}).leave() // now the feed knows the log, and nobody has read it
		log.Hold()
		w := watch(t, h, Ask{Session: "s", Snapshot: true})
		pages := 0
		for ; pages < 2; pages++ { // each of a MiB
			synctest.Wait()
			log.Snapshot()
			log.Reply()
		}
		synctest.Wait()
		log.Trim(350)
		log.Snapshot()
		log.Reply()
		log.Release()
		time.Sleep(2 * cfg.Reconcile)
		synctest.Wait()
		if err := w.take(w.events()); err != nil {
			t.Error(err)
		}
		from, list := log.Contents()
		if err := w.check(from, list); err != nil {
			t.Error(err)
		}
		if got := names(w.events()); got != "welcome 0, reset 350, snapshot 400" {
			t.Error(got)
		}
		w.leave()
	})
}

// The log is trimmed while it is folded, and the feed knows. The snapshot contains what was there,
// and kept chunks continue it.
func TestSnapshot_feedIsTrimmedMeanwhile_goesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for i := range 20 {
			log.Append(fmt.Sprint("word ", i))
		}
		cfg := testConfig()
		cfg.Window = 0
		h := started(t, cfg, log)
		now(t, h, log, Ask{Cursor: Latest}).leave()
		log.Hold()
		w := watch(t, h, Ask{Session: "s", Snapshot: true})
		synctest.Wait()
		log.Snapshot() // the page of the fold
		log.Trim(15)
		log.Ack() // a doubt
		synctest.Wait()
		log.Snapshot() // the feed's
		log.ReplyNewest()
		synctest.Wait()
		log.Release()
		synctest.Wait()
		if got := names(w.events()); got != "welcome 0, snapshot 20" {
			t.Error(got)
		}
		if err := w.check(log.Contents()); err != nil {
			t.Error(err)
		}
		w.leave()
	})
}

// delayed is a log whose reads return late, with the state from when they began.
type delayed struct {
	*storetest.Log
	by time.Duration
}

func (d delayed) Read(ctx context.Context, session string, from int64, bytes, count int) (store.Page, error) {
	p, err := d.Log.Read(ctx, session, from, bytes, count)
	time.Sleep(d.by)
	return p, err
}

// A log that is full and grows is trimmed all the time, even between the moment when a node learns
// its beginning and the moment when it is folded. A viewer still gets a snapshot, and then what
// comes.
func TestSnapshot_ofAFullLogThatGrows(t *testing.T) {
	for _, c := range []struct {
		window, total int
		late          time.Duration // how long a read takes
		heard         bool          // the chunks are announced
		max           int           // the size limit of a snapshot's chunks
	}{
		{0, 0, 0, true, 4 << 20}, {0, 0, 0, false, 4 << 20}, {0, 0, 50 * time.Millisecond, true, 4 << 20}, {0, 0, 50 * time.Millisecond, false, 4 << 20},
		{1 << 20, 1 << 20, 50 * time.Millisecond, true, 4 << 20}, {1000, 1 << 20, 50 * time.Millisecond, true, 4 << 20}, {0, 0, 50 * time.Millisecond, true, 20_000}, {0, 0, 50 * time.Millisecond, true, 0}, {0, 0, 50 * time.Millisecond, false, 0}, {1000, 1 << 20, 50 * time.Millisecond, true, 0},
	} {
		t.Run(fmt.Sprintf("%+v", c), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := &storetest.Log{}
				const full = 500
				for range full {
					log.Append("x")
				}
				cfg := testConfig()
				cfg.Window, cfg.WindowTotal, cfg.SnapshotMax = c.window, c.total, c.max
				h := NewHub(cfg, delayed{log, c.late})
				defer h.Close()
				stop := make(chan struct{})
				var wg sync.WaitGroup
				wg.Go(func() {
					for {
						select {
						case <-time.After(20 * time.Millisecond):
						case <-stop:
							return
						}
						log.Append("y")
						log.Trim(1)
						if log.Messages() > 0 && c.heard {
							log.Deliver(0)
						} else if log.Messages() > 0 {
							log.Drop(0)
						}
					}
				})
				most := 1 // resets
				if c.max == 0 {
					most = 3 // no snapshot says where it begins
				}
				stay := watch(t, h, Ask{Session: "s", Cursor: Latest})
				time.Sleep(time.Second)
				log.Ack()
				for range 10 {
					time.Sleep(1700 * time.Millisecond)
					w := watch(t, h, Ask{Session: "s", Snapshot: true})
					time.Sleep(10 * time.Second)
					if err := w.take(w.events()); err != nil {
						t.Fatal(err)
					}
					first, list := log.Contents()
					if last := first + int64(len(list)) - 1; (w.said != nil) != (c.max > 0) || len(w.resets) > most || w.cursor < last-150 {
						t.Errorf("snapshot %t, resets %v, at %d of %d: %.200s", w.said != nil, w.resets, w.cursor, last, names(w.events()))
					}
					w.leave()
				}
				stay.leave()
				close(stop)
				wg.Wait()
			})
		})
	}
}

// However many viewers come at once, the log is read and folded once, and what is kept of it is
// dropped.
func TestSnapshot_isSharedAndLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		for i := range 2000 {
			log.Append(fmt.Sprint("word ", i))
		}
		cfg := testConfig()
		cfg.Window, cfg.WindowTotal = 0, 64<<20
		h := started(t, cfg, log)
		stay := now(t, h, log, Ask{Cursor: 2000})
		before := log.Reads()
		var all []*watcher
		for range 100 {
			all = append(all, watch(t, h, Ask{Session: "s", Snapshot: true}))
		}
		synctest.Wait()
		if reads := log.Reads() - before; reads > 2 {
			t.Errorf("%d reads for a hundred viewers", reads)
		}
		_, list := log.Contents()
		for _, w := range all {
			if got := names(w.events()); got != "welcome 0, snapshot 2000" {
				t.Fatal(got)
			}
			if err := w.check(1, list); err != nil {
				t.Fatal(err)
			}
			w.leave()
		}
		if n := sum(t, h, "gapless_snapshots_total"); n != 100 {
			t.Error(n, "snapshots")
		}
		held := h.snapshots.bytes()
		if held == 0 || held > 1<<20 {
			t.Errorf("%d bytes are held", held)
		}
		reads := log.Reads()
		log.Append("one more")
		log.Deliver(0)
		synctest.Wait()
		w := watch(t, h, Ask{Session: "s", Snapshot: true})
		synctest.Wait()
		if got := names(w.events()); got != "welcome 0, snapshot 2001" || log.Reads() > reads+1 {
			t.Error(got, log.Reads()-reads)
		}
		time.Sleep(2 * cfg.Linger)
		synctest.Wait()
		if n := h.snapshots.bytes(); n != 0 {
			t.Errorf("%d bytes are held for nobody", n)
		}
		w.leave() // it had its snapshot long ago
		stay.leave()
	})
}

// Viewers that take nothing hold their snapshots, up to a limit. Further viewers get chunks.
func TestSnapshot_memoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &storetest.Log{}
		log.Append(strings.Repeat("x", 60_000))
		cfg := testConfig()
		cfg.SnapshotMax, cfg.WindowTotal = 100_000, 1<<20
		h := started(t, cfg, log)
		var all []*watcher
		stall := make(chan struct{})
		for i := range 10 { // each at another edge: none is shared
			v, err := h.View(Ask{Session: "s", Snapshot: true})
			if err != nil {
				t.Fatal(err)
			}
			to := &sink{taken: takenOver}
			to.stall, to.free = stall, 10_000
			all = append(all, view(t, h, v, to))
			synctest.Wait()
			if i == 0 {
				log.Ack()
				synctest.Wait()
			}
			log.Append("y")
			log.Deliver(0)
			synctest.Wait()
			if held, most := h.snapshots.bytes(), max(cfg.WindowTotal/8, 2*cfg.SnapshotMax); held > most {
				t.Errorf("%d bytes are held, of %d", held, most)
			}
		}
		close(stall)
		time.Sleep(time.Second)
		synctest.Wait()
		_, list := log.Contents()
		snapshots := 0
		for _, w := range all {
			if err := w.check(1, list); err != nil {
				t.Error(err)
			}
			snapshots += strings.Count(names(w.events()), "snapshot")
			w.leave()
		}
		if snapshots == 0 || snapshots == len(all) {
			t.Errorf("%d of %d were given a snapshot", snapshots, len(all))
		}
		time.Sleep(2 * cfg.Linger)
		synctest.Wait()
		if n := h.snapshots.bytes(); n != 0 {
			t.Errorf("%d bytes are held for nobody", n)
		}
	})
}

func BenchmarkSnapshot_ofTenThousandWords(b *testing.B) {
	m := newMemory(1)
	for i := range 10_000 {
		m.append(storetest.Element(int64(i+1), "word "), all)
	}
	b.ReportAllocs()
	for b.Loop() {
		f := newFold("e", 0)
		for f.last < 10_000 {
			events, _, _, _ := m.after(f.last, 10_000, false)
			f.take(events, 1<<30)
		}
		b.SetBytes(int64(len(f.snapshot(false).event)))
	}
}
