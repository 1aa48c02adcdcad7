package sse

import (
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	gosse "github.com/tmaxmax/go-sse"
)

// parsed returns what a Parser makes of a stream that arrives in pieces of the given sizes, over
// and over.
func parsed(t testing.TB, stream string, sizes []byte) (all []Event, torn bool, err error) {
	t.Helper()
	var p Parser
	var left []byte
	for i := 0; len(stream) > 0; i++ {
		n := len(stream)
		if len(sizes) > 0 {
			n = min(1+int(sizes[i%len(sizes)]), n)
		}
		left = append(left, stream[:n]...)
		stream = stream[n:]
		for {
			e, rest, ok, err := p.Next(left, 1<<20)
			left = slices.Clone(rest)
			if err != nil {
				return all, false, err
			}
			if !ok {
				break
			}
			all = append(all, e)
		}
	}
	return all, p.Torn(left), nil
}

var lineEnd = regexp.MustCompile("\r\n|\n|\r")

// standard is the standard's algorithm, word by word, on a whole stream.
func standard(stream string) (all []Event) {
	lines := lineEnd.Split(strings.TrimPrefix(stream, "\uFEFF"), -1)
	data, name := "", ""
	for _, line := range lines[:len(lines)-1] { // the last line has no end
		if line == "" {
			if data != "" {
				all = append(all, Event{name, strings.TrimSuffix(data, "\n")})
			}
			data, name = "", ""
			continue
		}
		if strings.HasPrefix(line, ":") {
			continue
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "event":
			name = value
		case "data":
			data += value + "\n"
		}
	}
	return all
}

var streams = []string{
	"data: a\n\n", "data: a\r\n\r\n", "data: a\r\rdata: b\r\r", "data:a\ndata: b\ndata:  c\n\n", "data\n\ndata:\n\n", "data: x",
	"data: x\n", "event: e\ndata: [DONE]\n\n", "event: e\n\ndata: b\n\n", ":\n: comment\ndata: a\n:x\n\n", "\uFEFFdata: a\n\n",
	"\uFEFF\uFEFFdata: a\n\n", "id: 7\nretry: 10\ndata: {\"a\":1}\n\n", " data: a\n\n", "Data: a\n\n", "data : a\n\n", "event: a\nevent: b\ndata\n\n",
	"data: \uFEFF\n\n", "data: a\r\n\n", "data: a\n\r\n", "\r\n\r\ndata: é🍞\n\n", "data: a\n\n:tail", "event:\ndata: x\n\n", "data: \x00\n\n", "\xEF\xBB", "\xEF\xBBdata: a\n\n",
}

func TestParser_isTheStandards(t *testing.T) {
	for _, s := range streams {
		want := standard(s)
		for _, sizes := range [][]byte{nil, {0}, {1}, {2, 0}, {6}} {
			got, _, err := parsed(t, s, sizes)
			if err == nil && !slices.Equal(got, want) {
				t.Errorf("%q in pieces of %v: %q instead of %q", s, sizes, got, want)
			}
			if err != nil && utf8.ValidString(s) {
				t.Errorf("%q: %v", s, err)
			}
		}
	}
}

// An event is whole when its empty line is, without the byte after that.
func TestParser_dispatchesAsSoonAsTheEmptyLineIsThere(t *testing.T) {
	for _, s := range []string{"data: a\n\n", "data: a\r\r", "data: a\r\n\r", "data: a\r\n\r\n"} {
		var p Parser
		if e, _, ok, err := p.Next([]byte(s), 100); !ok || err != nil || e.Data != "a" {
			t.Errorf("%q: %v %v", s, ok, err)
		}
	}
}

func TestParser_returnsTheIDThatAClientWouldResumeWith(t *testing.T) {
	p := Parser{IDs: true}
	rest := []byte("data: a\nid: 7\n\ndata: b\n\ndata: c\nid: 8\x00\n\ndata: d\nid\n\n")
	for _, want := range []string{"7", "7", "7", ""} {
		var ok bool
		if _, rest, ok, _ = p.Next(rest, 10); !ok || p.ID() != want {
			t.Errorf("%t: the id is %q, not %q", ok, p.ID(), want)
		}
	}
}

func TestParser_saysWhatIsTorn(t *testing.T) {
	for s, want := range map[string]bool{
		"": false, "data: a\n\n": false, "data: a\n\n\n": false, "data: a\r\n\r\n": false, "data: a\n\n:": false, "data: a\n\n: beat\n": false,
		"data: a\n\nid: 7\n": false, "data: a\n\nretry: 7\n\n": false,
		"data: a": true, "data: a\n": true, "event: a\n": true, "data: a\n\nd": true, "data: a\r": true,
	} {
		if _, torn, err := parsed(t, s, []byte{3}); torn != want || err != nil {
			t.Errorf("%q: torn %t (%v)", s, torn, err)
		}
	}
}

func TestParser_boundsAnEvent(t *testing.T) {
	var p Parser
	s := []byte(strings.Repeat("data: 12345678\n", 10))
	if _, _, ok, err := p.Next(s, 50); ok || !errors.Is(err, ErrTooLarge) {
		t.Error(ok, err)
	}
	p = Parser{}
	if _, _, ok, err := p.Next([]byte("data: 1234\n\n"), 4); !ok || err != nil {
		t.Error(ok, err)
	}
}

// For any bytes in any pieces, the events are the standard's.
func FuzzParser(f *testing.F) {
	for _, s := range streams {
		f.Add([]byte(s), []byte{0})
		f.Add([]byte(s), []byte{2, 5})
	}
	f.Fuzz(func(t *testing.T, stream, sizes []byte) {
		want := standard(string(stream))
		got, _, err := parsed(t, string(stream), sizes)
		if err != nil {
			if !errors.Is(err, ErrNotUTF8) || utf8.Valid(stream) {
				t.Fatal(err)
			}
			want = want[:len(got)]
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%q in pieces of %v: %q instead of %q", stream, sizes, got, want)
		}
	})
}

// Another parser agrees, except that it dispatches events without data.
func TestParser_agreesWithAnother(t *testing.T) {
	for _, s := range streams {
		if strings.Contains(s, "\xEF\xBBd") || strings.HasPrefix(s, "event: e\n\n") {
			continue
		}
		got, torn, err := parsed(t, s, nil)
		var want []Event
		for e, err := range gosse.Read(strings.NewReader(s), nil) {
			if err != nil {
				if !torn && !errors.Is(err, io.EOF) {
					t.Logf("%q: %v", s, err)
				}
				break
			}
			want = append(want, Event{e.Type, e.Data})
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, and another says %q (%v)", s, got, want, err)
		}
	}
}

// What was ingested comes back unchanged.
func FuzzRaw(f *testing.F) {
	f.Add("", "a", int64(1))
	f.Add("message_start", "{\"a\":1}\n[DONE]\n", int64(7))
	f.Add("é", "", int64(1<<53))
	f.Add("a\nb", "x", int64(2))
	f.Add("a", "x\ry", int64(2))
	f.Fuzz(func(t *testing.T, name, data string, seq int64) {
		if seq < 1 || !utf8.ValidString(name) || !utf8.ValidString(data) {
			return
		}
		chunk := `{"seq":1,"ts":2,"type":"delta","event":` + quoted(name) + `,"raw":` + quoted(data) + `}`
		events, _ := appendEvent(nil, 1, `{"content":"not an event"}`)
		events, _ = appendEvent(events, seq, chunk)
		got, torn, err := parsed(t, string(appendRaw(nil, events)), []byte{0})
		want := []Event{{name, data}}
		if strings.ContainsAny(name, "\r\n") || strings.Contains(data, "\r") {
			want = nil // a stream cannot contain it
		}
		if err != nil || torn || !slices.Equal(got, want) {
			t.Fatalf("%q %q: %q, torn %t (%v)", name, data, got, torn, err)
		}
	})
}

func quoted(s string) string {
	b, _ := json.Marshal(s)
	return string(b)
}

// A caller may want an event that has only a name, such as an error.
func TestParser_returnsANameAloneIfItIsAskedTo(t *testing.T) {
	for stream, want := range map[string]string{"event: error\n\n": "error ", "event: error\rdata\r\r": "error ", "event\n\nid: 7\n\ndata: a\n\n": " a", "event: e\ndata: a\n\n": "e a"} {
		p := Parser{NameAlone: true}
		if e, _, ok, err := p.Next([]byte(stream), 99); !ok || err != nil || e.Name+" "+e.Data != want {
			t.Errorf("%q: %q, %v, %v", stream, e, ok, err)
		}
	}
	if e, _, ok, _ := new(Parser).Next([]byte("event: error\n\n"), 99); ok {
		t.Errorf("%q", e)
	}
}
