package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

// What viewers receive from unusual logs: trimmed ones, those of a later epoch, large chunks, logs that are about to
// expire, copies of other logs.

// format=raw without a cursor starts at the first kept chunk, even if that belongs to a later epoch, or others were
// before it. A cursor outside the log is refused.
func TestDelivery_rawBeginsAtTheFirstChunkThatIsKept(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := start(t, "-redis", redis.URL(), "-history-max", "5", "-window", "1KiB")
	upload := func(session, text string) (s stored) {
		a := n.post("/v1/sessions/"+session+"/chunks", "text/event-stream", "data: "+text+" one\n\ndata: "+text+" two\n\n")
		if a.status != http.StatusCreated {
			t.Fatalf("%d %s (%v)", a.status, a.body, a.err)
		}
		decode(t, a.body, &s)
		return s
	}
	raw := func(session, query string) answer {
		return n.get("/v1/sessions/" + session + "/stream?format=raw&until=done" + query)
	}
	events := func(body string) string {
		_, rest, _ := strings.Cut(body, "\n")
		_, rest, _ = strings.Cut(rest, "\n")
		return rest
	}

	another := newID()
	upload(another, "former")
	if a := n.do(deadline(t), "DELETE", "/v1/sessions/"+another, "", nil); a.status != http.StatusNoContent {
		t.Fatal(a.status)
	}
	s := upload(another, "second")
	want := fmt.Sprintf("data: second one\nid: %d\n\ndata: second two\nid: %d\n\n", s.First, s.First+1)
	if a := raw(another, ""); a.status != http.StatusOK || events(a.body) != want {
		t.Errorf("of the second epoch: %d %q, not %q", a.status, a.body, want)
	}
	if a := raw(another, fmt.Sprint("&after=", s.First)); a.status != http.StatusOK || !strings.HasSuffix(want, events(a.body)) || strings.Contains(a.body, "one") {
		t.Errorf("of the second epoch, after its first chunk: %d %q", a.status, a.body)
	}
	if a := raw(another, "&after=9999999"); a.status != http.StatusGone {
		t.Errorf("ahead of it: %d %q", a.status, a.body)
	}

	trimmed := newID()
	for i := range 4 {
		s = upload(trimmed, fmt.Sprint("text", i))
	}
	want = fmt.Sprintf("data: text2 two\nid: %d\n\n", s.First-2) // then the message is done
	if a := raw(trimmed, ""); a.status != http.StatusOK || events(a.body) != want {
		t.Errorf("of a trimmed log: %d %q, not %q", a.status, a.body, want)
	}
	if a := raw(trimmed, "&after=2"); a.status != http.StatusGone {
		t.Errorf("of what was trimmed: %d %q", a.status, a.body)
	}
	var bounds struct {
		First int64 `json:"first_seq"`
	}
	decode(t, n.get("/v1/sessions/"+trimmed).body, &bounds)
	if a := raw(trimmed, fmt.Sprint("&after=", bounds.First-1)); bounds.First < 2 || a.status != http.StatusOK {
		t.Errorf("behind the last that was trimmed, %d: %d %q", bounds.First-1, a.status, a.body)
	}
}

// Chunks that are pushed directly may have any size. Viewers whose connections are taken over get them like all others,
// on one connection.
func TestDelivery_chunksOfAnySize(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	program := plainProgram(t)
	all := []*node{startProgram(t, program, "-redis", redis.URL()), startProgram(t, program, "-redis", redis.URL(), "-plain")}
	ctx, session := deadline(t), newID()
	f := foreign{redis, session, false}
	large := func(megabytes int) string {
		return `{"content":"` + strings.Repeat("0123456789abcdef", megabytes<<16) + `"}`
	}
	var want []string
	push := func(elements ...string) {
		for _, e := range elements {
			if err := f.push(ctx, e); err != nil {
				t.Fatal(err)
			}
			want = append(want, e)
		}
	}
	push(`{"content":"a"}`, large(6), `{"content":"b"}`)
	viewers := make([]*viewer, 4)
	var wg sync.WaitGroup
	for i := range viewers {
		v := &viewer{session: session}
		viewers[i] = v
		wg.Go(func() {
			v.connect(ctx, all[i%2].addr, func(e event) bool {
				return e.id == "5"
			})
		})
	}
	for _, v := range viewers {
		eventually(t, "a viewer has what was there", func() bool { return v.seen.Load() >= 3 })
	}
	push(large(7), `{"content":"c"}`)
	wg.Wait()
	for i, v := range viewers {
		if v.connections != 1 || len(v.resets) > 0 {
			t.Errorf("viewer %d: %d connections, resets %v", i, v.connections, v.resets)
		}
		if len(v.faults) > 0 || len(v.chunks) != len(want) {
			t.Fatalf("viewer %d has %d chunks of %d: %v", i, len(v.chunks), len(want), v.faults)
		}
		for k := range want {
			if v.chunks[k] != want[k] {
				t.Errorf("viewer %d: chunk %d is garbled: %d bytes, not %d", i, k+1, len(v.chunks[k]), len(want[k]))
			}
		}
	}
}

// A full log that grows loses its beginning all the time. A viewer that requests a snapshot gets one, and the chunks
// that follow.
func TestDelivery_snapshotOfAFullLogThatGrows(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := start(t, "-redis", redis.URL(), "-window-total", "0", "-history-max", "500")
	ctx, session := deadline(t), newID()
	n.append(t, session, words(0, 600))
	stop := make(chan struct{})
	produced := background(t, func() {
		for i := 600; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				n.append(t, session, words(i, 1))
			}
		}
	})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			v := &viewer{session: session, query: "?snapshot=1"}
			v.connect(ctx, n.addr, func(event) bool { return v.said != nil && len(v.chunks) > 50 || len(v.resets) > 5 })
			if len(v.faults) > 0 || v.said == nil || len(v.resets) > 3 || len(v.chunks) <= 50 {
				t.Errorf("%v, snapshot %t, %d chunks, resets %v", v.faults, v.said != nil, len(v.chunks), v.resets)
			}
		})
	}
	wg.Wait()
	close(stop)
	produced()
}

// A log with viewers does not expire, even if it would before the node reads it for another reason. A log without
// viewers does, and its numbers continue afterwards.
func TestDelivery_aLogThatIsViewedDoesNotExpire(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"redis": {"-redis", storetest.Redis(t).URL()}, "embedded": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := start(t, append(args, "-history-ttl", "4s", "-reconcile", "10s", "-linger", "0s")...)
			ctx, viewed, alone := deadline(t), newID(), newID()
			n.append(t, viewed, words(1, 3))
			n.append(t, alone, words(1, 3))
			v := &viewer{session: viewed}
			wait := background(t, func() { v.connect(ctx, n.addr, func(e event) bool { return e.id == "4" }) })
			pages := func(session string) (first int64) {
				var page struct {
					First int64 `json:"first_seq"`
				}
				decode(t, n.get("/v1/sessions/"+session+"/chunks?limit=1").body, &page)
				return page.First
			}
			eventually(t, "the log that nobody views expires", func() bool {
				pause(ctx, 6*time.Second) // every check is a use, which extends its life
				return pages(alone) == 4
			})
			if first := pages(viewed); first != 1 {
				t.Errorf("the log that is viewed begins at %d", first)
			}
			n.append(t, viewed, words(4, 1))
			wait()
			if len(v.resets) > 0 || len(v.faults) > 0 || len(v.chunks) != 4 {
				t.Errorf("resets %v, %v, %d chunks", v.resets, v.faults, len(v.chunks))
			}
		})
	}
}

// A list copied from an ended log, or a forged chunk, ends nothing: the session continues for all viewers, and ends
// only when it is ended.
func TestDelivery_aCopiedEndEndsNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := start(t, "-redis", redis.URL())
	ctx, ended, copied, forged := deadline(t), newID(), newID(), newID()
	n.append(t, ended, words(1, 3, `{"type":"end"}`))
	if err := redis.Copy(ctx, "chat:history:"+ended, "chat:history:"+copied, 0, false).Err(); err != nil {
		t.Fatal(err)
	}
	n.append(t, forged, words(1, 3))
	if err := (foreign{redis, forged, false}).push(ctx, `{"seq":4,"ts":1795424741692,"type":"end"}`); err != nil {
		t.Fatal(err)
	}
	for _, session := range []string{copied, forged} {
		var wg sync.WaitGroup
		for _, query := range []string{"", "?snapshot=1", "?until=done", "?snapshot=1&until=done", "?after=4"} {
			v := &viewer{session: session, query: query}
			wg.Go(func() {
				if how := v.connect(ctx, n.addr, nil); how != clean || v.cursor != 6 || len(v.faults) > 0 || v.said != nil && v.said.Ended {
					t.Errorf("%s: it ended by %s at %d: %v", query, how, v.cursor, v.faults)
				}
			})
			eventually(t, "the viewer has all there is", func() bool { return v.seen.Load() >= 4 })
		}
		ui, stop := context.WithCancel(ctx)
		over := make(chan string, 1)
		r, err := http.NewRequestWithContext(ui, "GET", n.url("/v1/sessions/"+session+"/ui-stream"), nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := n.http.Transport.(*bearer).Transport.RoundTrip(r)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatal(response, err)
		}
		defer response.Body.Close()
		go func() { // ended by stop, or by the response's end
			var body strings.Builder
			b := make([]byte, 4096)
			for {
				k, err := response.Body.Read(b)
				if body.Write(b[:k]); err != nil {
					over <- body.String()
					return
				}
			}
		}()
		n.append(t, session, `{"message_id":"m1","content":"sesame"}`)
		n.append(t, session, `{"type":"end"}`)
		wg.Wait()
		if body := <-over; !strings.Contains(body, "sesame") || strings.Count(body, "[DONE]") != 1 || !strings.Contains(body, "was ended before the answer was") {
			t.Errorf("the ui-stream said %s", body)
		}
		stop()
		if a := n.get("/v1/sessions/" + session + "/stream?after=6"); a.status != http.StatusNoContent {
			t.Error(a.status)
		}
		var page struct {
			Chunks []json.RawMessage
		}
		decode(t, n.get("/v1/sessions/"+session+"/chunks").body, &page)
		if len(page.Chunks) != 6 {
			t.Errorf("%d chunks", len(page.Chunks))
		}
	}
}
