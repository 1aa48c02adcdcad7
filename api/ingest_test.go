package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"gapless/store"
	"gapless/store/storetest"
)

// pieces returns text in pieces of the given sizes, which repeat.
type pieces struct {
	text  []byte
	sizes []byte
	i     int
	end   error
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.text) == 0 {
		return 0, p.end
	}
	n := len(p.text)
	if len(p.sizes) > 0 {
		n = min(1+int(p.sizes[p.i%len(p.sizes)]), n)
		p.i++
	}
	n = copy(b, p.text[:n])
	p.text = p.text[n:]
	return n, nil
}

// drained returns all chunks that a source makes.
func drained(src source) (all []store.Chunk, err error) {
	for {
		chunks, err := src.next()
		all = append(all, chunks...)
		if err != nil {
			return all, err
		}
	}
}

// saidBy returns the joined contents of chunks.
func saidBy(t testing.TB, chunks []store.Chunk) (all string) {
	t.Helper()
	for _, c := range chunks {
		var v struct{ Content string }
		if err := json.Unmarshal([]byte("{"+c.Members()), &v); err != nil || !utf8.ValidString(v.Content) || v.Content == "" {
			t.Fatalf("%q (%v)", c.Members(), err)
		}
		all += v.Content
	}
	return all
}

func newTextSource(from io.Reader, limit int) *text {
	return &text{body: body{from: from, most: limit + 1024}, fill: store.Fill{MessageID: "m"}, limit: limit}
}

// A text equals its joined chunks, however it arrives.
func FuzzText(f *testing.F) {
	for _, s := range []string{"a", "Grüße, 世界 🍞!", "\xff", "a\xc3", "a\xc3\xc3", "\xf0\x9f\x8d\x9e", "\xf0\x9f\x8d", "\xed\xa0\x80", "\xc0\x80x", "\x00\x01\"\\"} {
		f.Add([]byte(s), []byte{0})
		f.Add([]byte(s), []byte{1, 2})
	}
	f.Fuzz(func(t *testing.T, stream, sizes []byte) {
		chunks, err := drained(newTextSource(&pieces{text: stream, sizes: sizes, end: io.EOF}, store.Overhead+256))
		want := string(stream)
		if !utf8.Valid(stream) {
			want = want[:firstBad(stream)]
			bad, ok := errors.AsType[*store.ChunkError](err)
			if !ok || bad.Code != "invalid_utf8" || !strings.HasSuffix(bad.Detail, fmt.Sprintf(" at byte %d", len(want))) {
				t.Fatalf("%q: %v", stream, err)
			}
		} else if err != io.EOF {
			t.Fatalf("%q: %v", stream, err)
		}
		if got := saidBy(t, chunks); got != want {
			t.Fatalf("%q in pieces of %v: %q", stream, sizes, got)
		}
	})
}

func TestText_isCutAtEveryByteAndNeverInACharacter(t *testing.T) {
	const s = "a¢€🍞\u2028é"
	for cut := range len(s) + 1 {
		for _, r := range []io.Reader{
			io.MultiReader(strings.NewReader(s[:cut]), strings.NewReader(s[cut:])),
			iotest.OneByteReader(strings.NewReader(s)), iotest.DataErrReader(strings.NewReader(s)), iotest.HalfReader(strings.NewReader(s)),
		} {
			chunks, err := drained(newTextSource(r, 64<<10))
			if got := saidBy(t, chunks); got != s || err != io.EOF {
				t.Errorf("cut at %d: %q (%v)", cut, got, err)
			}
		}
	}
}

// The part of a broken body that arrived whole is stored, and half a character is not an error of the text.
func TestText_thatBreaksOffKeepsWhatCameWhole(t *testing.T) {
	chunks, err := drained(newTextSource(&pieces{text: []byte("ab\xc3"), end: io.ErrUnexpectedEOF}, 64<<10))
	if got := saidBy(t, chunks); got != "ab" || !errors.Is(err, errBroken) {
		t.Errorf("%q (%v)", got, err)
	}
}

// Lines are recognised however they arrive.
func FuzzLines(f *testing.F) {
	for _, s := range []string{"{}\n{}\n", "{}\r\n\n\n{\"a\":1}", "{}\nnope\n{}", "\n", "{", "{}\n\n{}"} {
		f.Add([]byte(s), []byte{0})
		f.Add([]byte(s), []byte{3, 1})
	}
	f.Fuzz(func(t *testing.T, stream, sizes []byte) {
		var want []string
		var wrong bool
		for line := range bytes.SplitSeq(stream, []byte{'\n'}) {
			if len(bytes.TrimSpace(line)) == 0 {
				continue
			}
			c, err := store.ParseChunk(line, store.Fill{}, 64<<10)
			if wrong = err != nil; wrong {
				break
			}
			want = append(want, c.Members())
		}
		src := &lines{body: body{from: &pieces{text: stream, sizes: sizes, end: io.EOF}, most: 64<<10 + 1024}, limit: 64 << 10}
		chunks, err := drained(src)
		var got []string
		for _, c := range chunks {
			got = append(got, c.Members())
		}
		if !slices.Equal(got, want) || (err == io.EOF) == wrong {
			t.Fatalf("%q in pieces of %v: %q (%v), wanted %q", stream, sizes, got, err, want)
		}
	})
}

// An endless body takes no more memory than a chunk may.
func TestBody_withoutAnEndIsBounded(t *testing.T) {
	endless := readerFunc(func(p []byte) (int, error) {
		for i := range p {
			p[i] = 'x'
		}
		return len(p), nil
	})
	const limit = 8 << 10
	for name, src := range map[string]source{
		"lines":  &lines{body: body{from: endless, most: limit}, limit: limit},
		"events": &events{body: body{from: endless, most: limit}, limit: limit},
	} {
		chunks, err := src.next()
		if tooLarge, ok := errors.AsType[*store.ChunkError](err); !ok || tooLarge.Code != "chunk_too_large" || len(chunks) > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	src := newTextSource(endless, limit)
	for range 1000 {
		if chunks, err := src.next(); err != nil || len(chunks) == 0 {
			t.Fatal(err)
		}
	}
	if len(src.buf) > limit+1024 {
		t.Error(len(src.buf))
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func (n *node) chunks(session string) []chunk {
	n.t.Helper()
	return decoded(n.t, n.page(session, "?limit=1000").Chunks)
}

func (n *node) postText(session, query, body string, header map[string]string) answer {
	n.t.Helper()
	return n.do(request{method: "POST", path: "/v1/sessions/" + session + "/chunks" + query, kind: typeText, body: body, header: header})
}

func TestText_becomesAMessageThatItsCleanEndEnds(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	got := into[Stored](t, n.postText("s", "", "sesame", nil), 201)
	all := n.chunks("s")
	if got.Count != 2 || got.First != 1 || got.Last != 2 || got.MessageID == "" || len(all) != 2 ||
		all[0] != (chunk{Seq: 1, Type: "delta", Message: got.MessageID, Content: "sesame"}) || all[1] != (chunk{Seq: 2, Type: "done", Message: got.MessageID}) {
		t.Errorf("%+v %+v", got, all)
	}
	got = into[Stored](t, n.postText("t", "?message_id=m&role=narrator", "", map[string]string{"Stream-Closed": "true"}), 201)
	all = n.chunks("t")
	if got.Count != 2 || got.MessageID != "m" || len(all) != 2 || all[0] != (chunk{Seq: 1, Type: "done", Message: "m", Role: "narrator"}) || all[1] != (chunk{Seq: 2, Type: "end"}) {
		t.Errorf("%+v %+v", got, all)
	}
	p := n.postText("u", "?message_id=m", "sesame\xff", nil).refused(t, 400, "invalid_utf8")
	if p.Stored == nil || p.Stored.Count != 1 || p.Chunk != nil {
		t.Errorf("%+v", p)
	}
	if all := n.chunks("u"); len(all) != 1 || all[0].Content != "sesame" {
		t.Errorf("%+v", all)
	}
	n.do(request{method: "POST", path: "/v1/sessions/u/chunks", kind: "text/plain; charset=latin1", body: "x", bad: true}).refused(t, 415, "unsupported_media_type")
	if a := n.do(request{method: "POST", path: "/v1/sessions/v/chunks", kind: "text/plain; charset=UTF-8", body: "x"}); a.status != 201 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// babel returns about n bytes in many scripts.
func babel(n int) string {
	var b strings.Builder
	for words := []string{"Xin chào thế giới, ", "đường phố Hà Nội ", "你好，世界。", "繁體字 ", "🍞👩‍👩‍👧‍👦🇻🇳 ", "line\nbreak\r\n", "\"quoted\\\" ", "\u2028\u0000\u001f"}; b.Len() < n; {
		b.WriteString(words[rand.IntN(len(words))])
	}
	return b.String()
}

func TestText_aMegabyteInPiecesOfOneToSevenBytes(t *testing.T) {
	t.Parallel()
	n := serve(t, on(storetest.Redis(t)))
	text := babel(1 << 20)
	r, w := io.Pipe()
	go func() { // ends with the text
		for rest := text; rest != ""; {
			k := min(1+rand.IntN(7), len(rest))
			if _, err := io.WriteString(w, rest[:k]); err != nil {
				return
			}
			rest = rest[k:]
		}
		w.Close()
	}()
	got := into[Stored](t, n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeText, from: r}), 201)
	if said := strings.Join(n.contents("s"), ""); said != text {
		t.Errorf("%d bytes instead of %d", len(said), len(text))
	}
	if p := n.page("s", "?limit=1"); p.Last != got.Last || int64(got.Count) != p.Last {
		t.Errorf("%+v %+v", got, p)
	}
}

func TestText_isAnnouncedAsItArrives(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	v := n.watch("s", "")
	v.welcome()
	r, w := io.Pipe()
	q := n.new(request{method: "POST", path: "/v1/sessions/s/chunks?message_id=m", kind: typeText, from: r})
	done := make(chan answer, 1)
	go func() {
		a, err := n.send(q)
		if err != nil {
			t.Error(err)
		}
		done <- a
	}()
	for i, piece := range []string{"sesame", " 1", "é"} {
		io.WriteString(w, piece)
		if e := v.next(); e.id != int64(i+1) || e.Content != piece || e.Message != "m" {
			t.Fatalf("%+v", e)
		}
	}
	w.Close()
	if e := v.next(); e.Type != "done" || e.Message != "m" {
		t.Errorf("%+v", e)
	}
	into[Stored](t, within(t, "the answer", done), 201)
}

func (n *node) postEvents(session, query, body string) answer {
	n.t.Helper()
	return n.do(request{method: "POST", path: "/v1/sessions/" + session + "/chunks" + query, kind: typeEvents, body: body})
}

func TestEvents_areKeptToTheByte(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	got := into[Stored](t, n.postEvents("s", "?message_id=m&role=assistant", "\uFEFF: hello\r\nevent: message_start\r\ndata: {\"a\" : 1}\r\n\r\ndata:  two\ndata\ndata: lines \n\nid: 7\nretry: 5\n\ndata: [DONE]\n\n"), 201)
	if got.Count != 4 || got.MessageID != "m" {
		t.Errorf("%+v", got)
	}
	var said []string
	for _, c := range n.page("s", "").Chunks {
		_, members, _ := strings.Cut(string(c), `,"type"`)
		said = append(said, members)
	}
	want := []string{
		`:"delta","message_id":"m","role":"assistant","event":"message_start","raw":"{\"a\" : 1}"}`,
		`:"delta","message_id":"m","role":"assistant","raw":" two\n\nlines "}`,
		`:"delta","message_id":"m","role":"assistant","raw":"[DONE]"}`,
		`:"done"}`,
	}
	if !slices.Equal(said, want) {
		t.Errorf("%q", said)
	}
	for _, c := range []struct {
		body   string
		status int
		code   string
		chunk  int
	}{
		{"data: sesame\n\ndata: torn", 400, "torn_event", -1},
		{"data: sesame\n\nevent: torn\n", 400, "torn_event", -1},
		{"data: sesame\n\ndata: \xff\n\n", 400, "invalid_utf8", 1},
		{"data: sesame\n\ndata: " + strings.Repeat("x", 66<<10) + "\n\n", 413, "chunk_too_large", 1},
		{"data: sesame\n\n" + strings.Repeat("data: "+strings.Repeat("x", 33<<10)+"\n", 2) + "\n", 413, "chunk_too_large", 1},
		{"data: sesame\n\ndata: " + strings.Repeat("\x01", 20<<10) + "\n\n", 413, "chunk_too_large", 1},
	} {
		s := fmt.Sprint("bad", rand.Int())
		p := n.postEvents(s, "", c.body).refused(t, c.status, c.code)
		if p.Stored == nil || p.Stored.Count != 1 || p.Stored.MessageID == "" || c.chunk >= 0 && (p.Chunk == nil || *p.Chunk != c.chunk) {
			t.Errorf("%.20q: %+v", c.body, p)
		}
		if got := n.page(s, "").Chunks; len(got) < 1 || !strings.HasSuffix(string(got[0]), `"raw":"sesame"}`) || strings.Contains(string(got[len(got)-1]), "done") {
			t.Errorf("%q", got)
		}
	}
	// A chunk that cannot come from a stream is no event.
	for _, body := range []string{`{"event":"a\nb","raw":"x"}`, `{"raw":"a\rb"}`, `{"event":"\r"}`} {
		n.do(request{method: "POST", path: "/v1/sessions/s/chunks", kind: typeJSON, body: body, bad: true}).refused(t, 400, "invalid_chunk")
	}
}

// The error message of a service is often no event stream. It must not count as a complete answer.
func TestEvents_bodyWithoutAnEventIsRefused(t *testing.T) {
	t.Parallel()
	n := serve(t, nil)
	for i, body := range []string{
		"<html>\n<body>502 Bad Gateway</body>\n</html>\n", "<html>502</html>", `{"error":{"message":"overloaded"}}`, `{"error":"no"}` + "\n", "",
		"\n\n", ": keep-alive\n\n", "retry: 5\n\nid: 7\n\n", "\uFEFF", "upstream connect error\r\n\r\n", "event: ping\n\n", "datum: x\n\n",
	} {
		for _, q := range []request{
			{path: "?message_id=m", body: body}, {body: body},
			{path: "?message_id=m", from: struct{ io.Reader }{strings.NewReader(body)}}, // its length is unknown
		} {
			s := fmt.Sprint("none", i)
			q.method, q.path, q.kind, q.bad = "POST", "/v1/sessions/"+s+"/chunks"+q.path, typeEvents, true
			q.header = map[string]string{"Stream-Closed": "true"}
			if p := n.do(q).refused(t, 400, "no_event"); p.Stored != nil {
				t.Errorf("%q: %+v", body, p)
			}
			if a := n.get("/v1/sessions/" + s + "/chunks"); a.status == 200 && len(into[pageJSON](t, a, 200).Chunks) > 0 {
				t.Errorf("%q: %s", body, a.body)
			}
		}
	}
	for _, body := range []string{"data: torn", "data: torn\n", "event: torn\n", "event: torn\ndata: torn\n", "dat"} {
		if a := n.postEvents("torn", "", body); a.status != 400 {
			t.Errorf("%q: %d %s", body, a.status, a.body)
		}
	}
	// A producer that has sent all of its events may send only the end.
	post := func(body string, number int64) answer {
		return n.do(request{method: "POST", path: "/v1/sessions/s/chunks?message_id=m", kind: typeEvents, body: body, bad: true, header: numbers("p", 0, number)})
	}
	post("data: a\n\ndata: torn", 0).refused(t, 400, "torn_event")
	if got := into[Stored](t, post("", 1), 201); got.Count != 1 || n.chunks("s")[1].Type != "done" {
		t.Errorf("%+v", got)
	}
	post("", 0).refused(t, 400, "no_event")
}

func TestRaw_givesWhatWasIngestedAndNothingElse(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.sse.Window = 2000 })
	const stream = "event: message_start\ndata: {\"type\":\"message_start\"}\n\ndata: two\ndata: lines\n\ndata: [DONE]\n\n"
	n.append("s", `[{"content":"sesame"},{"type":"message","content":"sesame"}]`)
	into[Stored](t, n.postEvents("s", "?message_id=m", stream), 201) // 3, 4, 5; done is 6
	n.append("s", `{"content":"sesame"}`)
	view := func(query string, header map[string]string) (answer, string) {
		a := n.do(request{method: "GET", path: "/v1/sessions/s/stream?format=raw" + query, header: header})
		text := string(a.body)
		if a.status == 200 {
			begin, rest, ok := strings.Cut(text, "\n")
			var ms int
			if _, err := fmt.Sscanf(rest, "retry: %d\n", &ms); begin != ":" || !ok || err != nil || ms < 500 {
				t.Errorf("it begins with %q", text)
			}
			_, text, _ = strings.Cut(rest, "\n")
		}
		return a, text
	}
	const want = "event: message_start\ndata: {\"type\":\"message_start\"}\nid: 3\n\ndata: two\ndata: lines\nid: 4\n\ndata: [DONE]\nid: 5\n\n"
	if a, got := view("&until=done", nil); a.status != 200 || got != want {
		t.Errorf("%d %q", a.status, got)
	}
	if a, got := view("&until=done&after=3", nil); a.status != 200 || !strings.HasSuffix(want, got) || !strings.HasPrefix(got, "data: two") {
		t.Errorf("%d %q", a.status, got)
	}
	n.append("s", `{"type":"end"}`) // 8
	if a, got := view("", nil); a.status != 200 || got != want {
		t.Errorf("%d %q", a.status, got)
	}
	for _, last := range []string{"5", "6", "8"} {
		if a, _ := view("", map[string]string{"Last-Event-ID": last}); a.status != 204 {
			t.Errorf("behind %s: %d", last, a.status)
		}
	}
	if a, got := view("", map[string]string{"Last-Event-ID": "4"}); a.status != 200 || got != "data: [DONE]\nid: 5\n\n" {
		t.Errorf("%d %q", a.status, got)
	}
	if a, _ := view("&after=latest", nil); a.status != 204 {
		t.Error(a.status)
	}
	for _, last := range []string{"9", "x"} {
		a, _ := view("", map[string]string{"Last-Event-ID": last})
		a.refused(t, 410, "cursor_outside")
	}
	n.do(request{method: "GET", path: "/v1/sessions/none/stream?format=raw&after=3"}).refused(t, 410, "cursor_outside")
}

// A long log without events has ended for a raw viewer, too. A log with an event at its end has not.
func TestRaw_ofALongLogThatHasEnded(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.sse.Window = 4000 })
	many := "[" + strings.Repeat(`{"content":"sesame"},`, 999)
	for s, last := range map[string]string{"without": `{"data":0}`, "with": `{"raw":"x"}`} {
		n.append(s, many+`{"data":0}]`)
		n.append(s, many+last+"]")
		n.append(s, `{"type":"end"}`)
		want := map[string]int{"without": 204, "with": 200}[s]
		a := n.get("/v1/sessions/" + s + "/stream?format=raw")
		if a.status != want || want == 200 && !strings.HasSuffix(string(a.body), "\ndata: x\nid: 2000\n\n") {
			t.Errorf("%s: %d %.100q", s, a.status, a.body)
		}
	}
}

// A trimmed cursor is reported before the first event, and breaks off a viewer under way.
func TestRaw_cursorThatIsTrimmedIs410(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.store.HistoryMax, s.sse.Window = 5, 0 })
	n.append("s", "["+strings.Repeat(`{"raw":"x"},`, 9)+`{"raw":"x"}]`)
	n.do(request{method: "GET", path: "/v1/sessions/s/stream?format=raw", header: map[string]string{"Last-Event-ID": "3"}}).refused(t, 410, "cursor_outside")
	v := n.open(request{path: "/v1/sessions/s/stream?format=raw&after=5"})
	if v.status != 200 {
		t.Fatal(v.status)
	}
	head := make([]byte, len(":\nretry: 1234\ndata: x\nid: 6\n\n"))
	if _, err := io.ReadFull(v.body, head); err != nil || !strings.HasSuffix(string(head), "data: x\nid: 6\n\n") {
		t.Fatalf("%q %v", head, err)
	}
	if a := n.do(request{method: "DELETE", path: "/v1/sessions/s"}); a.status != 204 {
		t.Fatal(a.status)
	}
	if rest, err := io.ReadAll(v.body); err != nil || strings.Contains(string(rest), "reset") {
		t.Errorf("%q %v", rest, err) // a clean end: the session was deleted
	}
	if a := n.get("/v1/sessions/s/stream?format=raw"); a.status != http.StatusNoContent {
		t.Error(a.status)
	}
}
