package api

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"pgregory.net/rapid"

	"gapless/store"
	"gapless/store/storetest"
)

func numbers(id string, epoch, chunk int64) map[string]string {
	return map[string]string{headerProducerID: id, headerProducerEpoch: fmt.Sprint(epoch), headerProducerChunk: fmt.Sprint(chunk)}
}

// Promise: Once, through HTTP, for every content type.
func TestProducer_aRetryIsAnswered200WithTheNumbersItHas(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for kind, body := range map[string]string{
		typeJSON:   `[{"content":"sesame"},{"content":"sesame 2"}]`,
		typeNDJSON: line("sesame") + line("sesame 2"),
		typeText:   "sesame, Grüße",
		typeEvents: "event: a\ndata: sesame\n\ndata: b\n\n",
	} {
		s := strings.ReplaceAll(kind, "/", "-")
		q := request{method: "POST", path: "/v1/sessions/" + s + "/chunks", kind: kind, body: body, header: numbers("p", 0, 0)}
		q.header["Stream-Closed"] = "true"
		first := into[Stored](t, n.do(q), 201)
		for range 3 {
			again := into[Stored](t, n.do(q), 200)
			again.MessageID = first.MessageID // the server makes a new one
			if again != first {
				t.Errorf("%s: %+v and then %+v", kind, first, again)
			}
		}
		if p := n.page(s, ""); p.Last != first.Last || p.Last != int64(first.Count) || !p.Ended {
			t.Errorf("%s: %+v", kind, p)
		}
	}
}

func TestProducer_whatIsWrongWithItsNumbersIsSaid(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	post := func(kind, body string, header map[string]string) answer {
		return n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: kind, body: body, header: header, bad: true})
	}
	for _, c := range []struct {
		header map[string]string
		member string
	}{
		{map[string]string{headerProducerID: "p"}, headerProducerEpoch},
		{map[string]string{headerProducerEpoch: "0", headerProducerChunk: "0"}, headerProducerID},
		{map[string]string{headerProducerID: "p", headerProducerEpoch: "0"}, headerProducerChunk},
		{map[string]string{headerProducerID: "", headerProducerEpoch: "0", headerProducerChunk: "0"}, headerProducerID},
		{map[string]string{headerProducerID: "a b", headerProducerEpoch: "0", headerProducerChunk: "0"}, headerProducerID},
		{map[string]string{headerProducerID: "é", headerProducerEpoch: "0", headerProducerChunk: "0"}, headerProducerID},
		{map[string]string{headerProducerID: strings.Repeat("p", 129), headerProducerEpoch: "0", headerProducerChunk: "0"}, headerProducerID},
		{map[string]string{headerProducerID: "p", headerProducerEpoch: "-1", headerProducerChunk: "0"}, headerProducerEpoch},
		{map[string]string{headerProducerID: "p", headerProducerEpoch: "0", headerProducerChunk: "01"}, headerProducerChunk},
		{map[string]string{headerProducerID: "p", headerProducerEpoch: "0", headerProducerChunk: "9007199254740992"}, headerProducerChunk},
	} {
		if p := post(typeJSON, "{\"data\":0}", c.header).refused(t, 400, "invalid_parameter"); p.Member != c.member {
			t.Errorf("%v: %+v", c.header, p)
		}
	}
	n.get("/v1/sessions/s").refused(t, 404, "session_not_found")

	a := post(typeJSON, "{\"data\":0}", numbers("p", 2, 1))
	if p := a.refused(t, 409, "producer_gap"); a.header.Get(headerExpectedChunk) != "0" || p.ExpectedChunk == nil || *p.ExpectedChunk != 0 {
		t.Errorf("%+v", p)
	}
	into[Stored](t, post(typeJSON, `[{"content":"sesame"},{"data":0},{"data":0}]`, numbers("p", 2, 0)), 201)
	for _, kind := range []string{typeJSON, typeNDJSON} {
		a = post(kind, "{\"data\":0}", numbers("p", 2, 4))
		if p := a.refused(t, 409, "producer_gap"); a.header.Get(headerExpectedChunk) != "3" || *p.ExpectedChunk != 3 {
			t.Errorf("%+v", p)
		}
		a = post(kind, "{\"data\":0}", numbers("p", 1, 0))
		if p := a.refused(t, 403, "producer_fenced"); a.header.Get(headerProducerEpoch) != "2" || *p.ProducerEpoch != 2 {
			t.Errorf("%+v", p)
		}
		if p := post(kind, "{\"data\":0}\n{\"content\":\"no\"}", numbers("p", 2, 1)); kind == typeNDJSON {
			if p := p.refused(t, 409, "producer_conflict"); p.Chunk == nil || *p.Chunk != 1 || p.Stored == nil || p.Stored.Count != 1 {
				t.Errorf("%+v", p)
			}
		}
	}
	if p := post(typeJSON, `[{"data":0},{"content":"no"}]`, numbers("p", 2, 1)).refused(t, 409, "producer_conflict"); p.Chunk == nil || *p.Chunk != 1 {
		t.Errorf("%+v", p)
	}
	if got := n.page("s", ""); got.Last != 3 {
		t.Errorf("%+v", got)
	}
	// A new epoch counts even without a chunk.
	into[Stored](t, post(typeJSON, `[]`, numbers("p", 3, 0)), 201)
	post(typeJSON, `[]`, numbers("p", 2, 3)).refused(t, 403, "producer_fenced")
}

// A repeated body continues after its known part: text at the byte, even in other pieces.
func TestProducer_anUploadThatComesAgainGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	text := babel(5000)
	for _, cut := range []int{1, 100, 2500} {
		for !utf8.RuneStart(text[cut]) {
			cut++
		}
		s := fmt.Sprint("s", cut)
		path := "/v1/sessions/" + s + "/chunks?message_id=m"
		r, w := io.Pipe()
		go func() { // the connection breaks when all of the part is stored
			_, _ = io.WriteString(w, text[:cut])
			eventually(t, "the part", func() bool {
				a := n.get("/v1/sessions/" + s + "/chunks?limit=1000")
				return a.status == 200 && strings.Join(n.contents(s), "") == text[:cut]
			})
			w.CloseWithError(io.ErrClosedPipe)
		}()
		_, err := n.send(n.new(request{method: "POST", path: path, kind: typeText, from: r, header: numbers("p", 0, 0)}))
		if err == nil {
			t.Fatal("it was answered")
		}
		from := io.MultiReader(&pieces{text: []byte(text), sizes: []byte{1, 7, 200, 30}, end: io.EOF})
		got := into[Stored](t, n.do(request{method: "POST", path: path, kind: typeText, from: from, header: numbers("p", 0, 0)}), 201)
		if said := strings.Join(n.contents(s), ""); said != text {
			t.Errorf("cut at %d: %d bytes instead of %d", cut, len(said), len(text))
		}
		if p := n.page(s, "?limit=1"); got.First != 1 || got.Last != p.Last || int64(got.Count) != p.Last {
			t.Errorf("%+v of %+v", got, p)
		}
		// The rest may follow from any number.
		into[Stored](t, n.do(request{method: "POST", path: path, kind: typeText, body: text[cut:], header: numbers("p", 0, int64(cut))}), 200)
		n.do(request{method: "POST", path: path, kind: typeText, body: text[cut:] + "!", header: numbers("p", 0, int64(cut))}).refused(t, 409, "producer_conflict")
	}
}

// A new epoch fences the old one in the middle of its upload, which gets its response though it is silent.
func TestProducer_aNewEpochEndsTheUploadUnderWayOfTheOld(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	a, b := serve(t, on(redis)), serve(t, on(redis))
	f := a.upload(t, "s", numbers("p", 0, 0))
	f.write(line("sesame 1"))
	eventually(t, "a chunk", func() bool { return b.get("/v1/sessions/s/chunks").status == 200 && b.page("s", "").Last == 1 })
	g := b.upload(t, "s", numbers("p", 1, 0)) // it takes over before its first line
	p := f.result().refused(t, 403, "producer_fenced")
	if *p.ProducerEpoch != 1 || p.Stored == nil || p.Stored.Count != 1 {
		t.Errorf("%+v", p)
	}
	g.write(line("sesame 2"))
	g.w.Close()
	if got := into[Stored](t, g.result(), 201); got.First != 2 || got.Count != 1 {
		t.Errorf("%+v", got)
	}
}

// The server retries if Redis did not reply and a retry is safe.
func TestProducer_lostAnswersOfRedisAreRepeatedByTheServer(t *testing.T) {
	t.Parallel()
	var appends atomic.Int64
	n := serve(t, func(s *setup) {
		s.logs = func(l Logs) Logs {
			return &faulty{Logs: l, append: func(next func() (store.Appended, error)) (store.Appended, error) {
				a, err := next()
				if i := appends.Add(1); err == nil && i%3 != 0 { // stored, but the reply is lost
					return store.Appended{}, store.ErrOutcomeUnknown
				}
				return a, err
			}}
		}
	})
	for i := range int64(5) {
		got := into[Stored](t, n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: fmt.Sprintf(`{"content":"sesame %d"}`, i), header: numbers("p", 0, i)}), 201)
		if got.First != i+1 || got.Count != 1 {
			t.Errorf("%+v", got)
		}
	}
	if got := n.contents("s"); len(got) != 5 {
		t.Errorf("%q", got)
	}
	n.post("/v1/sessions/t/chunks", typeJSON, `{"data":0}`).refused(t, 504, "outcome_unknown") // without numbers a retry is not safe
}

// cutter is a proxy that cuts connections on demand.
type cutter struct {
	l    net.Listener
	to   string
	mode atomic.Int64 // what to do to the next connection
	wg   sync.WaitGroup
}

const (
	passes     = iota
	cutsBefore // the request has arrived in part
	cutsBehind // the request has arrived, its response is lost
	cutsWithin // in the middle of the response
)

func newCutter(t testing.TB, n *node) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{l: l, to: n.server.Listener.Addr().String()}
	c.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mode := c.mode.Load()
			c.wg.Go(func() { c.serve(conn, mode) })
		}
	})
	t.Cleanup(func() { l.Close(); c.wg.Wait() })
	return c
}

func (c *cutter) serve(client net.Conn, mode int64) {
	defer client.Close()
	node, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	defer node.Close()
	deadline := time.Now().Add(patience)
	_, _ = client.SetDeadline(deadline), node.SetDeadline(deadline)
	var up sync.WaitGroup
	up.Go(func() {
		if mode == cutsBefore {
			_, _ = io.CopyN(node, client, 220+rand.Int64N(60))
			node.Close()
			return
		}
		_, _ = io.Copy(node, client)
	})
	switch mode {
	case cutsBehind:
		_, _ = io.CopyN(io.Discard, node, 1)
	case cutsWithin:
		_, _ = io.CopyN(client, node, 1+rand.Int64N(100))
	default:
		_, _ = io.Copy(client, node)
	}
	client.Close()
	node.Close()
	up.Wait()
}

// Retry storms: every request is sent one to three times, to two nodes, and its connection is cut before, during or
// after the response. The log contains each chunk once, in order, at the place that the responses give.
func TestProducer_retryStorms(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	nodes := []*node{serve(t, on(redis)), serve(t, on(redis))}
	cutters := []*cutter{newCutter(t, nodes[0]), newCutter(t, nodes[1])}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		session := fmt.Sprint("storm", run)
		type said struct {
			what  string
			first int64 // the place that a response gave
		}
		producers := map[string][]said{}
		for _, id := range []string{"p", "q"}[:rapid.IntRange(1, 2).Draw(rt, "producers")] {
			producers[id] = nil
		}
		next := map[string]int64{}
		for i := range rapid.IntRange(1, 12).Draw(rt, "requests") {
			id := rapid.SampledFrom(slices.Sorted(keysOf(producers))).Draw(rt, "producer")
			kind := rapid.SampledFrom([]string{typeJSON, typeNDJSON, typeEvents, typeText}).Draw(rt, "kind")
			var words []string
			for k := range rapid.IntRange(1, 4).Draw(rt, "chunks") {
				words = append(words, fmt.Sprintf("sesame %s %d.%d é", id, i, k))
			}
			var body strings.Builder
			number := next[id]
			for k, word := range words {
				switch kind {
				case typeJSON:
					fmt.Fprintf(&body, "%s{\"content\":%q}", map[bool]string{true: "[", false: ","}[k == 0], word)
				case typeNDJSON:
					body.WriteString(line(word))
				case typeEvents:
					fmt.Fprintf(&body, "data: %s\n\n", word)
				case typeText:
					body.WriteString(word)
				}
			}
			switch kind {
			case typeJSON:
				body.WriteString("]")
			case typeText:
				words = []string{body.String()}
				next[id] += int64(body.Len())
			}
			if kind != typeText {
				next[id] += int64(len(words))
			}
			if kind == typeText || kind == typeEvents {
				words, next[id] = append(words, ""), next[id]+1 // done
			}
			times, answered := rapid.IntRange(1, 3).Draw(rt, "times"), int64(0)
			for try := 0; try < times || answered == 0; try++ {
				at := rapid.IntRange(0, 1).Draw(rt, "node")
				mode := int64(passes)
				if try < 8 {
					mode = rapid.Int64Range(passes, cutsWithin).Draw(rt, "cut")
				}
				cutters[at].mode.Store(mode)
				var from io.Reader = strings.NewReader(body.String())
				if rapid.Bool().Draw(rt, "chunked") {
					from = io.MultiReader(from) // its length is not sent
				}
				r, err := http.NewRequest("POST", "http://"+cutters[at].l.Addr().String()+"/v1/sessions/"+session+"/chunks?message_id="+fmt.Sprint(id, i), from)
				if err != nil {
					rt.Fatal(err)
				}
				r.Header.Set("Content-Type", kind)
				for name, value := range numbers(id, 0, number) {
					r.Header.Set(name, value)
				}
				res, err := client.Do(r)
				if err != nil {
					continue
				}
				answer, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil {
					continue
				}
				var s Stored
				if err := json.Unmarshal(answer, &s); err != nil || res.StatusCode != 200 && res.StatusCode != 201 || s.First == 0 || s.Count < len(words) {
					rt.Fatalf("%d %s", res.StatusCode, answer)
				}
				if answered != 0 && answered != s.First {
					rt.Fatalf("it was at %d and is at %d", answered, s.First)
				}
				answered = s.First
			}
			for k, word := range words {
				at := int64(0)
				if k == 0 {
					at = answered
				}
				producers[id] = append(producers[id], said{word, at})
			}
		}
		// The log contains the producers' words, each once, in their order. Words of a text may be in several chunks,
		// because it arrived in parts.
		type element struct {
			seq  int64
			text string
		}
		log := map[string][]element{}
		for _, raw := range nodes[0].page(session, "?limit=1000").Chunks {
			var c struct {
				Seq                int64
				Type, Content, Raw string
				MessageID          string `json:"message_id"`
			}
			if err := json.Unmarshal(raw, &c); err != nil {
				rt.Fatal(err)
			}
			text, owner := c.Content+c.Raw, c.MessageID[:1]
			log[owner] = append(log[owner], element{c.Seq, text})
		}
		for id, all := range producers {
			var want, got strings.Builder
			for _, s := range all {
				want.WriteString(s.what)
				if s.first == 0 || s.what == "" {
					continue
				}
				if i := slices.IndexFunc(log[id], func(e element) bool { return e.seq == s.first }); i >= 0 && !strings.HasPrefix(s.what, log[id][i].text) {
					rt.Fatalf("%q was said to be at %d, where %q is", s.what, s.first, log[id][i].text)
				}
			}
			for _, e := range log[id] {
				got.WriteString(e.text)
			}
			if got.String() != want.String() {
				rt.Fatalf("the log has\n%q of %s instead of\n%q", got.String(), id, want.String())
			}
		}
	})
}

func keysOf[V any](m map[string]V) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// A producer that learns what is missing continues there.
func TestProducer_expectedChunkIsWhereItGoesOn(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	into[Stored](t, n.postText("s", "?message_id=m", "sesam", numbers("p", 0, 0)), 201) // and done, number 5
	a := n.postText("s", "?message_id=n", "x", numbers("p", 0, 9))
	a.refused(t, 409, "producer_gap")
	next, err := strconv.ParseInt(a.header.Get(headerExpectedChunk), 10, 64)
	if err != nil || next != 6 {
		t.Fatal(next, err)
	}
	into[Stored](t, n.postText("s", "?message_id=n", "x", numbers("p", 0, next)), 201)
}

// A chunk with a producer's number costs Redis twice as much, so an array of them may have half as many.
func TestProducer_anArrayHasHalfAsManyNumberedChunks(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.BatchMax = 10 })
	post := func(count int, header map[string]string) answer {
		return n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: many(count), header: header})
	}
	numbered := map[string]string{"Producer-Id": "p", "Producer-Epoch": "0", "Producer-Chunk": "0"}
	into[Stored](t, post(10, nil), 201)
	into[Stored](t, post(5, numbered), 201)
	if p := post(6, numbered).refused(t, 413, "batch_too_large"); p.Limit != 5 {
		t.Errorf("%+v", p)
	}
}
