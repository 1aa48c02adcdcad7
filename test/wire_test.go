package test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gapless/store/storetest"
)

// socket is a TCP connection on which a test writes HTTP by hand.
type socket struct {
	t *testing.T
	net.Conn
	in *bufio.Reader
}

// unhurried is a connection whose reads and writes fail after patience without progress. Heartbeats are no progress.
type unhurried struct{ net.Conn }

func (u unhurried) Read(b []byte) (int, error) {
	n, err := u.Conn.Read(b)
	if len(bytes.Trim(b[:n], "2:\r\n")) > 0 {
		u.more()
	}
	return n, err
}

func (u unhurried) Write(b []byte) (int, error) {
	u.more()
	return u.Conn.Write(b)
}

func (u unhurried) more() { _ = u.SetDeadline(time.Now().Add(patience)) }

func dial(t *testing.T, addr, request string) *socket {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	conn = unhurried{conn}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	return &socket{t, conn, bufio.NewReader(conn)}
}

// line reads a line of the header, or of chunked framing.
func (s *socket) line() string {
	s.t.Helper()
	line, err := s.in.ReadString('\n')
	if err != nil {
		s.t.Fatalf("after %q: %v", line, err)
	}
	return strings.TrimSuffix(line, "\r\n")
}

// head reads the status line and the headers.
func (s *socket) head() (status string, h http.Header) {
	s.t.Helper()
	status, h = s.line(), http.Header{}
	for line := s.line(); line != ""; line = s.line() {
		name, value, _ := strings.Cut(line, ": ")
		h.Add(name, value)
	}
	return status, h
}

// piece reads one HTTP chunk; the last one is empty.
func (s *socket) piece() string {
	s.t.Helper()
	var size int
	if _, err := fmt.Sscanf(s.line(), "%x", &size); err != nil {
		s.t.Fatalf("size of an HTTP chunk: %v", err)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(s.in, b); err != nil {
		s.t.Fatal(err)
	}
	if end := s.line(); end != "" {
		s.t.Fatalf("behind an HTTP chunk: %q", end)
	}
	return string(b)
}

// until reads HTTP chunks until their text has the given length, or the body has ended.
func (s *socket) until(length int) (text string) {
	s.t.Helper()
	for len(text) < length {
		p := s.piece()
		if p == "" {
			break
		}
		text += p
	}
	return text
}

func streamRequest(session, query, proto string, headers ...string) string {
	return "GET /v1/sessions/" + session + "/stream" + query + " HTTP/" + proto + "\r\nHost: localhost\r\n" + strings.Join(append(headers, "\r\n"), "")
}

const welcomeBlock = `event: welcome\ndata: \{"type":"welcome","session":"%s","epoch":"[0-9a-f-]{36}","first_seq":%d,"last_seq":%d,"cursor":%d,"node":"n1","connection":"[0-9a-f-]{36}"\}\nretry: [1-9][0-9]{2,3}\nid: %d\n\n`

func matches(t *testing.T, got, pattern string) {
	t.Helper()
	if !regexp.MustCompile("^(?s:" + pattern + ")$").MatchString(got) {
		t.Errorf("got\n%q\nwhich does not match\n%s", got, pattern)
	}
}

// asEvents returns elements of the list as they are on the wire.
func asEvents(list []string, from int) string {
	var b strings.Builder
	for i, element := range list {
		fmt.Fprintf(&b, "data: %s\nid: %d\n\n", element, from+i)
	}
	return b.String()
}

func TestWire_aWholeStreamIsAsTheDesignSaysToTheByte(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	session := newID()
	n.append(t, session, `[{"content":" a\nb: 🍞 \u0000</script>"},{"type":"x","data":{"a":[1,2.50,1e3]},"own":null},{"type":"done","message_id":"m1"},{"type":"end"}]`)
	list := history(t, redis, session)

	s := dial(t, n.addr, streamRequest(session, "", "1.1"))
	status, h := s.head()
	if status != "HTTP/1.1 200 OK" {
		t.Errorf("status line %q", status)
	}
	for name, want := range map[string]string{
		"Content-Type": "text/event-stream", "Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no", "Incremental": "?1",
		"Transfer-Encoding": "chunked", "Content-Length": "", "Content-Encoding": "", "Connection": "", // close would turn a break into a clean end
	} {
		if got := h.Get(name); got != want {
			t.Errorf("header %s is %q, not %q", name, got, want)
		}
	}
	if first := s.piece(); first != ":\n" {
		t.Errorf("the first bytes are %q", first)
	}
	body := s.until(1 << 20)
	matches(t, body, fmt.Sprintf(welcomeBlock, session, 1, 4, 0, 0)+regexp.QuoteMeta(asEvents(list, 1)))
	matches(t, list[0], `\{"seq":1,"ts":[0-9]{13},"type":"delta","content":" a\\nb: 🍞 \\u0000</script>"\}`)

	s = dial(t, n.addr, streamRequest(session, "", "1.1", "Last-Event-ID: 2\r\n"))
	s.head()
	matches(t, s.until(1<<20), ":\n"+fmt.Sprintf(welcomeBlock, session, 1, 4, 2, 2)+regexp.QuoteMeta(asEvents(list[2:], 3)))

	// Nothing follows the end, and nothing ever will.
	for _, r := range []string{
		streamRequest(session, "", "1.1", "Last-Event-ID: 4\r\n"), streamRequest(session, "?after=4", "1.1"),
		streamRequest(session, "?after=latest", "1.1"), streamRequest(session, "?lastEventId=4", "1.1"),
	} {
		s := dial(t, n.addr, r)
		if status, h := s.head(); status != "HTTP/1.1 204 No Content" || h.Get("Content-Type") != "" {
			t.Errorf("after the end: %q, %v", status, h)
		}
	}
}

func TestWire_theHeaderWinsOverTheAddressAndEmptyIsAbsent(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	session := newID()
	n.append(t, session, words(1, 9, `{"type":"end"}`))
	for _, c := range []struct {
		query, header string
		cursor        int
	}{
		{"", "", 0}, {"?after=", "Last-Event-ID: \r\n", 0}, {"?after=0", "", 0}, {"?after=3", "", 3}, {"?after=3", "Last-Event-ID: 5\r\n", 5},
		{"?after=3&lastEventId=4", "", 4}, {"?lastEventId=4", "Last-Event-ID: 5\r\n", 5}, {"?after=9", "Last-Event-ID: 0\r\n", 0},
	} {
		s := dial(t, n.addr, streamRequest(session, c.query, "1.1", c.header))
		s.head()
		matches(t, s.until(1<<20), ":\n"+fmt.Sprintf(welcomeBlock, session, 1, 10, c.cursor, c.cursor)+
			regexp.QuoteMeta(asEvents(history(t, redis, session)[c.cursor:], c.cursor+1)))
	}
}

func TestWire_foreignElementsAreSentAsTheyAreOrAsText(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	f := foreign{redis: redis, session: newID()}
	raw := []string{
		`{"content":"as it is", "seq": 77}`, `plain text`, "two\nlines", `{"broken":`, "{\"a\":\n1}", `[1]`, "bad \xff utf-8", ``, `{"a":1} {"b":2}`,
		`{"is_complete":true}`,
	}
	if err := f.push(deadline(t), raw...); err != nil {
		t.Fatal(err)
	}
	s := dial(t, n.addr, streamRequest(f.session, "?until=done", "1.1"))
	s.head()
	as := func(seq int, text string) string {
		return fmt.Sprintf(`{"seq":%d,"type":"foreign","content":%s}`, seq, text)
	}
	want := asEvents([]string{
		raw[0], as(2, `"plain text"`), as(3, `"two\nlines"`), as(4, `"{\"broken\":"`), as(5, `"{\"a\":\n1}"`), as(6, `"[1]"`), as(7, "\"bad \uFFFD utf-8\""), as(8, `""`),
		as(9, `"{\"a\":1} {\"b\":2}"`), raw[9],
	}, 1)
	matches(t, s.until(1<<20), ":\n"+fmt.Sprintf(welcomeBlock, f.session, 1, 10, 0, 0)+regexp.QuoteMeta(want))
}

func TestWire_liveChunksAreTheSameBytesAndHeartbeatsAreNoEvents(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-heartbeat", "200ms")[0]
	session := newID()
	n.append(t, session, words(1, 2))
	s := dial(t, n.addr, streamRequest(session, "?after=2", "1.1"))
	s.head()
	body := s.until(3)
	for !strings.HasSuffix(body, "\n\n") {
		body += s.piece()
	}
	matches(t, body, ":\n"+fmt.Sprintf(welcomeBlock, session, 1, 2, 2, 2))
	begun := time.Now()
	for range 4 {
		if beat := s.piece(); beat != ":\n" {
			t.Errorf("a heartbeat is %q", beat)
		}
	}
	if took := time.Since(begun); took < 600*time.Millisecond {
		t.Errorf("four heartbeats in %v, with -heartbeat 200ms", took)
	}
	n.append(t, session, words(3, 1))
	var live string
	for live = s.piece(); live == ":\n"; live = s.piece() {
	}
	if want := asEvents(history(t, redis, session)[2:], 3); live != want {
		t.Errorf("the live chunk is %q, not %q", live, want)
	}
}

func TestWire_terminationAbortsAndDoesNotEnd(t *testing.T) {
	t.Parallel()
	n := start(t, "-node", "n1")
	session := newID()
	n.append(t, session, words(1, 2))
	chunked := []*socket{ // the second as from a proxy that keeps no connection
		dial(t, n.addr, streamRequest(session, "", "1.1")), dial(t, n.addr, streamRequest(session, "", "1.1", "Connection: close\r\n")),
	}
	for _, s := range chunked {
		if _, h := s.head(); h.Get("Transfer-Encoding") != "chunked" {
			t.Errorf("HTTP/1.1 is answered with %v", h)
		}
		for text := ""; strings.Count(text, "\nid: ") < 3; text += s.piece() {
		}
	}
	plain := dial(t, n.addr, streamRequest(session, "", "1.0"))
	status, h := plain.head()
	if h.Get("Transfer-Encoding") != "" || !strings.HasSuffix(status, " 200 OK") {
		t.Errorf("HTTP/1.0 is answered with %q %v", status, h)
	}
	for text := ""; strings.Count(text, "\nid: ") < 3; text += plain.line() + "\n" {
	}
	n.terminate()
	for _, s := range chunked {
		if rest, err := io.ReadAll(httputil.NewChunkedReader(s.in)); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("HTTP/1.1: %q, %v: a clean end", rest, err)
		}
	}
	if rest, err := io.ReadAll(plain.in); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("HTTP/1.0: %q, %v: not told from a clean end", rest, err)
	}
}

func TestWire_http10EndsWithTheConnection(t *testing.T) {
	t.Parallel()
	n := start(t, "-node", "n1")
	session := newID()
	n.append(t, session, words(1, 2, `{"type":"end"}`))
	s := dial(t, n.addr, streamRequest(session, "", "1.0"))
	s.head()
	body, err := io.ReadAll(s.in)
	if err != nil {
		t.Errorf("the end is not clean: %v", err)
	}
	matches(t, string(body), ":\n"+fmt.Sprintf(welcomeBlock, session, 1, 3, 0, 0)+regexp.QuoteMeta(asEvents(n.pages(t, session), 1)))
}

func TestWire_untilDoneEndsBehindTheNextEndOfAMessage(t *testing.T) {
	t.Parallel()
	n := start(t, "-node", "n1")
	for _, ending := range []string{`{"type":"done","message_id":"m1"}`, `{"type":"failed","message_id":"m1"}`, `{"type":"cancelled","message_id":"m1"}`, `{"type":"end"}`, `{"is_complete":true}`} {
		session := newID()
		n.append(t, session, words(1, 2, ending))
		if ending != `{"type":"end"}` {
			n.append(t, session, `{"content":"of another message"}`)
		}
		s := dial(t, n.addr, streamRequest(session, "?until=done", "1.1"))
		s.head()
		body := s.until(1 << 20) // up to a clean end
		if want := asEvents(n.pages(t, session)[:3], 1); !strings.HasSuffix(body, "id: 0\n\n"+want) {
			t.Errorf("until %s:\n got %q\nwant %q", ending, body, want)
		}
	}
	session := newID() // live, and from after an earlier end
	n.append(t, session, words(1, 1, `{"type":"done","message_id":"m1"}`))
	s := dial(t, n.addr, streamRequest(session, "?until=done&after=2", "1.1"))
	s.head()
	s.until(3)
	n.append(t, session, `[{"message_id":"m2","content":"x"},{"message_id":"m2","type":"done"},{"message_id":"m3","content":"y"}]`)
	if body := s.until(1 << 20); !strings.HasSuffix(body, asEvents(n.pages(t, session)[2:4], 3)) {
		t.Errorf("live: %q", body)
	}
}

func TestWire_afterLatestBeginsWithTheNextChunk(t *testing.T) {
	t.Parallel()
	n := start(t)
	session := newID()
	n.append(t, session, words(1, 5))
	v := &viewer{session: session, query: "?after=latest"}
	v.connect(deadline(t), n.addr, func(e event) bool {
		if e.name == "welcome" {
			n.append(t, session, words(6, 2))
		}
		return v.cursor == 7
	})
	v.chunks = slices.Insert(v.chunks, 0, n.pages(t, session)[:5]...)
	for i, f := range v.faults { // the requested jump
		if f == "lost: 6 came after 0" {
			v.faults = slices.Delete(v.faults, i, i+1)
			break
		}
	}
	v.check(t, n.pages(t, session))
	if v.welcomes[0].Cursor != 5 {
		t.Errorf("welcome says cursor %d", v.welcomes[0].Cursor)
	}
}

func TestWire_aSessionThatDoesNotExistIsWaitedForAndMakesNoKeys(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-heartbeat", "50ms", "-reconcile", "100ms")[0]
	ctx := deadline(t)
	byPost, byPush := &viewer{session: newID()}, &viewer{session: newID()}
	var wg sync.WaitGroup
	for _, v := range []*viewer{byPost, byPush} {
		wg.Go(func() { v.follow(ctx, at(n.addr), func(event) bool { return v.cursor == 3 }) })
	}
	for _, v := range []*viewer{byPost, byPush} { // after several reads
		eventually(t, "the viewer is held", func() bool { return v.beats.Load() >= 10 })
	}
	if made := keys(t, redis, "*"); len(made) > 0 {
		t.Errorf("waiting made %v", made)
	}
	if a := n.get("/v1/sessions/" + byPost.session); a.status != http.StatusNotFound {
		t.Errorf("the session is %d %s", a.status, a.body)
	}
	n.append(t, byPost.session, words(1, 3))
	f := foreign{redis: redis, session: byPush.session}
	for i := range 3 {
		if err := f.say(ctx, foreignChunk(i), time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	for _, v := range []*viewer{byPost, byPush} {
		v.check(t, history(t, redis, v.session))
		v.unreset(t)
		if len(v.welcomes) != 1 || v.welcomes[0].Cursor != 0 {
			t.Errorf("welcomes: %+v", v.welcomes)
		}
	}
}

// tricky is a log whose bytes are hard to parse, because they look like the wire format.
var tricky = `[{"content":"data: {}\n\nid: 99\n\nevent: reset\n"},{"content":":"},{"content":""},{"content":"id: 1"},{"content":"\ud83c\udf5e 🍞 é"},` +
	`{"type":"reset","content":"not one of ours"},{"content":"\\n\\n\r\n"},{"content":"retry: 0\n"},{"type":"end"}]`

func TestWire_cutsAtEveryByteNeverYieldATornEvent(t *testing.T) {
	t.Parallel()
	n := start(t)
	ctx := deadline(t)
	session := newID()
	n.append(t, session, tricky)
	want := n.pages(t, session)
	for _, c := range []struct {
		query string
		glue  bool
	}{{"", false}, {"", true}, {"?snapshot=1", false}, {"?snapshot=1", true}} {
		length := 0
		(&viewer{session: session, query: c.query}).raw(ctx, n.addr, func(b []byte) bool { length += len(b); return true })
		for at := range length {
			v := &viewer{session: session, query: c.query, glue: c.glue}
			v.cutAt(ctx, n.addr, at)
			v.follow(ctx, func() string { return n.addr }, nil)
			if v.check(t, want); t.Failed() {
				t.Fatalf("cut behind %d bytes of %d: %+v", at, length, c)
			}
			v.unreset(t)
		}
	}
}

// cutAt makes a connection that ends after a number of bytes of the body.
func (v *viewer) cutAt(ctx context.Context, addr string, at int) ending {
	v.nextConnection(v.glue)
	return v.raw(ctx, addr, func(b []byte) bool {
		b = b[:min(len(b), at)]
		at -= len(b)
		v.feed(b, func(e event) bool { v.take(e); return true })
		return at > 0
	})
}

func TestWire_manyCutsInARowNeverYieldATornEvent(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		redis := storetest.Redis(t)
		both := nodes(t, 2, redis, args...)
		ctx := deadline(t)
		session := newID()
		for range 8 {
			both[0].append(t, session, strings.Replace(tricky, `,{"type":"end"}`, "", 1))
		}
		both[0].append(t, session, `{"type":"end"}`)
		want := history(t, redis, session)
		for i := range 12 {
			v := &viewer{session: session, glue: i%2 == 0}
			for !v.over && ctx.Err() == nil {
				switch v.cutAt(ctx, both[rand.IntN(2)].addr, 1+rand.IntN(900)) {
				case clean, nothing:
					v.over = true
				}
			}
			v.check(t, want)
			v.unreset(t)
		}
	})
}

// resetBlock is a reset on the wire, from one cursor to another.
func resetBlock(reason string, from, to, first, last int) string {
	return fmt.Sprintf(`event: reset\ndata: \{"type":"reset","reason":"%s","epoch":"[0-9a-f-]{36}","cursor":%d,"first_seq":%d,"last_seq":%d\}\nid: %d\n\n`, reason, from, first, last, to)
}

func TestWire_aCursorThatTheLogDoesNotHaveIsReset(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-history-max", "6")[0]
	short, long, gone := newID(), newID(), newID()
	n.append(t, short, words(1, 4, `{"type":"end"}`))
	n.append(t, long, words(1, 9, `{"type":"end"}`)) // 5..10 are kept
	for _, c := range []struct {
		name, session, id string
		cursor            int // in welcome
		reset             string
		first, last       int
		from              int // first of the chunks that follow
	}{
		{"ahead", short, "99", 99, resetBlock("ahead", 99, 0, 1, 5), 1, 5, 1},
		{"ahead by one", short, "6", 6, resetBlock("ahead", 6, 0, 1, 5), 1, 5, 1},
		{"as far ahead as can be", short, "9999999999999999", 9999999999999999, resetBlock("ahead", 9999999999999999, 0, 1, 5), 1, 5, 1},
		{"unknown", short, "abc", 0, resetBlock("unknown", 0, 0, 1, 5), 1, 5, 1},
		{"unknown: negative", short, "-1", 0, resetBlock("unknown", 0, 0, 1, 5), 1, 5, 1},
		{"unknown: leading zero", short, "03", 0, resetBlock("unknown", 0, 0, 1, 5), 1, 5, 1},
		{"unknown: 17 digits", short, "10000000000000000", 0, resetBlock("unknown", 0, 0, 1, 5), 1, 5, 1},
		{"unknown, in a trimmed log", long, "abc", 0, resetBlock("unknown", 0, 4, 5, 10), 5, 10, 5},
		{"trimmed", long, "2", 2, resetBlock("trimmed", 2, 4, 5, 10), 5, 10, 5},
		{"trimmed, from the start", long, "", 0, resetBlock("trimmed", 0, 4, 5, 10), 5, 10, 5},
		{"not trimmed: the first that is wanted is kept", long, "4", 4, "", 5, 10, 5},
		{"ahead, in a trimmed log", long, "11", 11, resetBlock("ahead", 11, 4, 5, 10), 5, 10, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			header := ""
			if c.id != "" {
				header = "Last-Event-ID: " + c.id + "\r\n"
			}
			s := dial(t, n.addr, streamRequest(c.session, "", "1.1", header))
			s.head()
			list := history(t, redis, c.session)
			matches(t, s.until(1<<20), ":\n"+fmt.Sprintf(welcomeBlock, c.session, c.first, c.last, c.cursor, c.cursor)+c.reset+
				regexp.QuoteMeta(asEvents(list[c.from-c.first:], c.from)))
		})
	}
	t.Run("ahead, on a session that does not exist", func(t *testing.T) {
		v := &viewer{session: gone, parser: parser{id: "7", lastID: "7"}, cursor: 7}
		v.follow(deadline(t), at(n.addr), func(e event) bool {
			if e.name == "reset" {
				if made := keys(t, redis, "*"+gone); len(made) > 0 {
					t.Errorf("keys were made: %v", made)
				}
				n.append(t, gone, words(1, 3))
			}
			return v.cursor == 3
		})
		v.check(t, history(t, redis, gone))
		if len(v.resets) == 0 || v.resets[0].Reason != "ahead" || v.resets[0].Cursor != 7 {
			t.Errorf("resets: %+v", v.resets)
		}
	})
}

// upset lets something happen to a log of five chunks after a live viewer has received all of it. The viewer leaves
// when done returns true after a later event.
func upset(t *testing.T, n *node, v *viewer, happens func(), done func() bool) ending {
	t.Helper()
	happened := false
	return v.connect(deadline(t), n.addr, func(event) bool {
		if !happened && v.cursor == 5 {
			happened = true
			happens()
		}
		return happened && done()
	})
}

func (v *viewer) reasons() (all []string) {
	for _, r := range v.resets {
		all = append(all, r.Reason)
	}
	return all
}

func TestWire_aDeletedSessionResetsItsViewersAndEndsThem(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis)
	session := newID()
	both[0].append(t, session, words(1, 5))
	v := &viewer{session: session}
	how := upset(t, both[0], v, func() {
		if a := both[1].do(deadline(t), "DELETE", "/v1/sessions/"+session, "", nil); a.status/100 != 2 {
			t.Errorf("delete: %d %s", a.status, a.body)
		}
	}, func() bool { return false })
	if how != clean || !slices.Equal(v.reasons(), []string{"deleted"}) {
		t.Errorf("the viewer ended %s, with resets %+v", how, v.resets)
	}
	for _, n := range both {
		for _, id := range []string{"", "5", "3", "abc"} {
			again := &viewer{session: session, parser: parser{lastID: id}}
			if how := again.connect(deadline(t), n.addr, nil); how != nothing {
				t.Errorf("a later viewer with id %q ended %s", id, how)
			}
		}
	}
}

// A node that still remembers the tombstone must not turn a viewer of the new log away for good.
func TestWire_aDeletedSessionThatBeginsAnewOnAnotherNodeIsViewedFromThere(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	both := nodes(t, 2, redis)
	ctx := deadline(t)
	for range 20 {
		session := newID()
		epoch := both[0].append(t, session, words(1, 5)).Epoch
		v := &viewer{session: session}
		upset(t, both[0], v, func() { // n1 knows of the deletion when its viewer has ended
			if a := both[1].do(ctx, "DELETE", "/v1/sessions/"+session, "", nil); a.status/100 != 2 {
				t.Errorf("delete: %d %s", a.status, a.body)
			}
		}, func() bool { return false })
		s := both[1].append(t, session, words(1, 2))
		if s.First != 1_000_001 || s.Epoch == epoch {
			t.Errorf("the next append is %+v, behind 5 in epoch %s", s, epoch)
		}
		late := &viewer{session: session, parser: parser{id: "5", lastID: "5"}, cursor: 5}
		late.follow(ctx, at(both[0].addr), func(event) bool { return late.cursor == 1_000_002 })
		late.check(t, history(t, redis, session))
		if late.over {
			t.Fatal("the viewer was sent away for good")
		}
		if !slices.Equal(late.reasons(), []string{"epoch"}) {
			t.Errorf("resets: %+v", late.resets)
		}
	}
}

func TestWire_flushallResetsLiveViewersAndGivesThemTheNewLog(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-reconcile", "200ms")[0]
	for _, c := range []struct {
		name string
		then func(session string)
		last int64
	}{
		{"and the log begins anew later", nil, 3},
		{"and a shorter log follows at once", func(s string) { n.append(t, s, words(100, 3)) }, 3},
		{"and an equally long log follows at once", func(s string) { n.append(t, s, words(100, 5)) }, 5},
		{"and a longer log follows at once", func(s string) { n.append(t, s, words(100, 8)) }, 8},
	} {
		t.Run(c.name, func(t *testing.T) {
			session := newID()
			n.append(t, session, words(1, 5))
			v := &viewer{session: session}
			upset(t, n, v, func() {
				if err := redis.FlushAll(deadline(t)).Err(); err != nil {
					t.Error(err)
				}
				if c.then != nil {
					c.then(session)
				}
			}, func() bool {
				if c.then == nil && len(v.resets) == 1 && v.cursor == 1_000_000 {
					n.append(t, session, words(1, 3))
				}
				return len(v.resets) > 0 && v.cursor == 1_000_000+c.last
			})
			v.check(t, history(t, redis, session))
			if !slices.Equal(v.reasons(), []string{"epoch"}) {
				t.Errorf("resets: %+v", v.resets)
			}
		})
	}
}

func TestWire_aListThatWasReplacedIsAnotherEpoch(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-reconcile", "200ms")[0]
	for _, length := range []int{3, 5, 8} {
		t.Run(fmt.Sprintf("by one of %d", length), func(t *testing.T) {
			ctx := deadline(t)
			f := foreign{redis: redis, session: newID()}
			n.append(t, f.session, words(1, 5))
			var other []string
			for i := range length {
				other = append(other, foreignChunk(100+i))
			}
			live := &viewer{session: f.session}
			upset(t, n, live, func() {
				tx := redis.TxPipeline()
				tx.Del(ctx, "chat:history:"+f.session)
				for _, o := range other {
					tx.RPush(ctx, "chat:history:"+f.session, o)
				}
				if _, err := tx.Exec(ctx); err != nil {
					t.Error(err)
				}
			}, func() bool { return live.cursor == int64(1_000_000+length) })
			late := &viewer{session: f.session, parser: parser{id: "5", lastID: "5"}, cursor: 5}
			late.follow(ctx, at(n.addr), func(event) bool { return late.cursor == int64(1_000_000+length) })
			for _, v := range []*viewer{live, late} {
				v.check(t, other)
				if !slices.Equal(v.reasons(), []string{"epoch"}) {
					t.Errorf("resets: %+v", v.resets)
				}
			}
			if a, b := live.welcomes[0].Epoch, late.welcomes[0].Epoch; a == b {
				t.Errorf("both epochs are %s", a)
			}
		})
	}
}

func TestWire_anExpiredListKeepsItsNumbers(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-reconcile", "200ms")[0]
	session := newID()
	epoch := n.append(t, session, words(1, 5)).Epoch
	if err := redis.Del(deadline(t), "chat:history:"+session).Err(); err != nil {
		t.Fatal(err)
	}
	if s := n.append(t, session, words(6, 2)); s.First != 6 || s.Epoch != epoch {
		t.Errorf("the append behind 5 is %+v", s)
	}
	for id, reasons := range map[string][]string{"5": nil, "4": {"trimmed"}} {
		v := &viewer{session: session, parser: parser{id: id, lastID: id}, cursor: int64(id[0] - '0')}
		v.follow(deadline(t), at(n.addr), func(event) bool { return v.cursor == 7 })
		v.check(t, history(t, redis, session))
		if !slices.Equal(v.reasons(), reasons) {
			t.Errorf("resets from %s: %+v", id, v.resets)
		}
	}
}

// A page of another origin must reach nothing. Neither must a name that an attacker points to loopback.
func TestWire_otherOriginsAndOtherHostsAreRefused(t *testing.T) {
	t.Parallel()
	n := start(t)
	session := newID()
	for _, c := range []struct {
		name, request string
		status        string
	}{
		{"a name that points here", "GET /v1/sessions/x HTTP/1.1\r\nHost: evil.example\r\n\r\n", "4"},
		{"a stream by that name", "GET /v1/sessions/x/stream HTTP/1.1\r\nHost: evil.example:" + n.addr[strings.LastIndex(n.addr, ":")+1:] + "\r\n\r\n", "4"},
		{"localhost", "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", "200"},
		{"a form of another page", "POST /v1/sessions/" + session + "/chunks HTTP/1.1\r\nHost: " + n.addr +
			"\r\nOrigin: http://evil.example\r\nSec-Fetch-Site: cross-site\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{\"data\":0}", "403"},
		{"this page", "POST /v1/sessions/" + session + "/chunks HTTP/1.1\r\nHost: " + n.addr +
			"\r\nOrigin: http://" + n.addr + "\r\nSec-Fetch-Site: same-origin\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{\"data\":0}", "201"},
	} {
		s := dial(t, n.addr, c.request)
		if status, _ := s.head(); !strings.HasPrefix(status, "HTTP/1.1 "+c.status) {
			t.Errorf("%s: %s", c.name, status)
		}
	}
	if got := n.pages(t, session); len(got) != 1 {
		t.Errorf("stored: %q", got)
	}
}

// A log of 3 MB arrives in writes of at most 16 KiB.
func TestWire_writesAreAtMost16KiB(t *testing.T) {
	t.Parallel()
	n := start(t)
	session := newID()
	for i := range 6 {
		n.append(t, session, fmt.Sprintf(`[{"content":"%s"},{"content":"%d"},{"content":"%s"}]`, strings.Repeat("a", 60_000), i, strings.Repeat("b", 9_000)))
	}
	n.append(t, session, `{"type":"end"}`)
	s := dial(t, n.addr, streamRequest(session, "", "1.1"))
	s.head()
	var all bytes.Buffer
	for {
		p := s.piece()
		if p == "" {
			break
		}
		if len(p) > 16<<10 {
			t.Fatalf("a write of %d bytes", len(p))
		}
		all.WriteString(p)
	}
	if want := asEvents(n.pages(t, session), 1); !strings.HasSuffix(all.String(), "id: 0\n\n"+want) {
		t.Error("the events are not those of the log")
	}
}
