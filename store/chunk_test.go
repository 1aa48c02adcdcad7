package store_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"

	"gapless/store"
)

func TestParseChunk_saysWhatIsWrong(t *testing.T) {
	const limit = 64 << 10
	for _, c := range []struct{ text, code, member string }{
		{``, "invalid_json", ""},
		{`{`, "invalid_json", ""},
		{`{"a":1}x`, "invalid_json", ""},
		{`{"a":1} {"b":2}`, "invalid_json", ""},
		{`{"a":01}`, "invalid_json", ""},
		{`{"a":"` + "\x01" + `"}`, "invalid_json", "/a"},
		{`{"a":"\ud800"}`, "invalid_json", "/a"},
		{"{\"a\":\"\xff\"}", "invalid_utf8", ""},
		{`[]`, "invalid_chunk", ""},
		{`"text"`, "invalid_chunk", ""},
		{`null`, "invalid_chunk", ""},
		{`{"a":1,"a":2}`, "duplicate_member", "/a"},
		{`{"a":1,"\u0061":2}`, "duplicate_member", "/a"},
		{`{"data":{"x":1,"x":1}}`, "duplicate_member", "/data/x"},
		{`{"seq":1}`, "reserved_member", "/seq"},
		{`{"\u0073eq":1}`, "reserved_member", "/seq"},
		{`{"t\u0073":1}`, "reserved_member", "/ts"},
		{`{"type":1}`, "invalid_chunk", "/type"},
		{`{"type":""}`, "invalid_chunk", "/type"},
		{`{"content":null}`, "invalid_chunk", "/content"},
		{`{"message_id":7}`, "invalid_chunk", "/message_id"},
		{`{"message_id":"` + strings.Repeat("x", 257) + `"}`, "invalid_chunk", "/message_id"},
		{`{"content":"` + strings.Repeat("x", limit) + `"}`, "chunk_too_large", ""},
	} {
		_, err := store.ParseChunk([]byte(c.text), store.Fill{}, limit)
		e, ok := errors.AsType[*store.ChunkError](err)
		if !ok || e.Code != c.code || e.Member != c.member || e.Detail == "" {
			t.Errorf("%.60s: %+v", c.text, err)
		}
	}
}

// stored returns a chunk as the append script writes it.
func stored(t testing.TB, text string, fill store.Fill) string {
	t.Helper()
	c, err := store.ParseChunk([]byte(text), fill, 64<<10)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	s := open(t, nil)
	mustAppend(t, s, "s", c)
	return mustRead(t, s, "s", 1, lots, lots).Elements[0]
}

func TestParseChunk_keepsWhatWasPosted(t *testing.T) {
	for _, c := range []struct {
		text string
		fill store.Fill
		want string
	}{
		{`{}`, store.Fill{Role: "user"}, `"type":"delta","role":"user"}`},
		{" { } \n", store.Fill{MessageID: "m"}, `"type":"delta","message_id":"m"}`},
		{`{"message_id":"m"}`, store.Fill{}, `"type":"delta","message_id":"m"}`},
		{`{"content":"","text":"b"}`, store.Fill{}, `"type":"delta","content":"","text":"b"}`},
		{`{"type":"tool_call","text":"b"}`, store.Fill{}, `"type":"tool_call","text":"b"}`},
		{`{"type":"done","text":"b"}`, store.Fill{}, `"type":"done","text":"b"}`},
		{`{"content":"a"}`, store.Fill{}, `"type":"delta","content":"a"}`},
		{`{"raw":"","Seq":1,"x":1e300,"y":12345678901234567890}`, store.Fill{}, `"type":"delta","raw":"","Seq":1,"x":1e300,"y":12345678901234567890}`},
		{"{\n \"content\": \"a\\u00e9\\n\",\r\n\t\"data\": [1, 2]\n}", store.Fill{}, `"type":"delta","content":"a\u00e9\n","data":[1,2]}`},
		{`{"type":"done"}`, store.Fill{MessageID: "m", Role: `r"`}, `"message_id":"m","role":"r\"","type":"done"}`},
		{`{"message_id":"x","role":"u"}`, store.Fill{MessageID: "m", Role: "r"}, `"type":"delta","message_id":"x","role":"u"}`},
	} {
		got := stored(t, c.text, c.fill)
		if _, rest, _ := strings.Cut(got, `,"ts":`); !strings.HasPrefix(got, `{"seq":1,"ts":`) || rest[strings.IndexByte(rest, ',')+1:] != c.want {
			t.Errorf("%q became %s", c.text, got)
		}
	}
}

// A chunk that says nothing is an error, which names the probable mistake.
func TestParseChunk_refusesWhatSaysNothingAndSaysWhatWasMeant(t *testing.T) {
	for _, c := range []struct {
		text           string
		member, detail string // the part of the detail that must be there
	}{
		{`{}`, "", `give it one of them`},
		{`{"type":"delta"}`, "", `of type "delta"`},
		{`{"text":"hi","messageId":"m"}`, "/text", `did you mean "content" instead of "text", "message_id" instead of "messageId"?`},
		{`{"messageId":"m","delta":"hi"}`, "/delta", `"message_id" instead of "messageId", "content" instead of "delta"?`},
		{`{"message_id":"m","text":"hi"}`, "/text", `"content" instead of "text"`},
		{`{"message_id":"m","role":"assistant","message":"hi"}`, "/message", `"content" instead of "message"`},
		{`{"type":"delta","Content":"hi"}`, "/Content", `"content" instead of "Content"`},
		{`{"type":"message","role":"user","parts":[{"type":"text","text":"hi"}]}`, "/parts", `of type "message"`},
		{`{"type":"reasoning","thinking":"hm"}`, "/thinking", `of type "reasoning"`},
		{`{"contnet":"hi"}`, "/contnet", `"content" instead of "contnet"`},
		{`{"conten":"hi"}`, "/conten", `"content" instead of "conten"`},
		{`{"contennt":"hi"}`, "/contennt", `"content" instead of "contennt"`},
		{`{"CONTENT":"hi","message-id":"m"}`, "/CONTENT", `"message_id" instead of "message-id"`},
		{`{"payload":{}}`, "/payload", `"data" instead of "payload"`},
		{`{"t\u0065xt":"hi"}`, "/text", `"content" instead of "text"`},
		{`{"progress":50}`, "/progress", `put "progress" into "data", or give the chunk a "type" of its own`},
		{`{"a/b~":1}`, "/a~1b~0", `put "a/b~" into "data"`},
		{`{"id":"c","object":"chat.completion.chunk","choices":[{"delta":{"content":"hi"}}]}`, "/id", `text/event-stream`},
	} {
		_, err := store.ParseChunk([]byte(c.text), store.Fill{}, lots)
		e, ok := errors.AsType[*store.ChunkError](err)
		if !ok || e.Code != "invalid_chunk" || e.Member != c.member || !strings.Contains(e.Detail, c.detail) {
			t.Errorf("%s: %+v", c.text, err)
		}
	}
	_, err := store.ParseChunk([]byte(`{"`+strings.Repeat("x", 5000)+`":1}`), store.Fill{}, lots)
	if e, ok := errors.AsType[*store.ChunkError](err); !ok || len(e.Detail) > 300 || len(e.Member) > 100 {
		t.Errorf("%.400v", err)
	}
}

// Every posted text is either refused or becomes one line of JSON that contains its number and every member once.
func FuzzParseChunk(f *testing.F) {
	for _, s := range []string{`{}`, `{"content":"a"}`, `{"type":"end","x":[1,{"y":null}]}`, "{\n}", `{"a":"\u2028"}`, `{"\u0073eq":1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := store.ParseChunk(text, store.Fill{MessageID: "m"}, 1<<20)
		if err != nil {
			return
		}
		element := `{"seq":1,"ts":2,` + c.Members()
		if strings.ContainsAny(element, "\r\n") || !utf8.ValidString(element) || !json.Valid([]byte(element)) {
			t.Fatalf("%q became %q", text, element)
		}
		if seq, ours := store.Number(element); seq != 1 || !ours {
			t.Fatal(element)
		}
		var posted, kept map[string]json.RawMessage
		if json.Unmarshal(text, &posted) != nil || json.Unmarshal([]byte(element), &kept) != nil {
			t.Fatalf("%q became %q", text, element)
		}
		for name := range posted {
			if _, ok := kept[name]; !ok {
				t.Fatalf("member %q is lost", name)
			}
		}
	})
}

func TestNumber(t *testing.T) {
	for text, want := range map[string]int64{
		`{"seq":7,"ts":1,"x":1}`:           7,
		`{"seq":9999999999999999,"ts":1}`:  9999999999999999,
		`{"seq":07,"ts":1}`:                0,
		`{"seq":0,"ts":1}`:                 0,
		`{"seq":-7,"ts":1}`:                0,
		`{"seq":7, "ts":1}`:                0,
		` {"seq":7,"ts":1}`:                0,
		`{"seq":99999999999999999,"ts":1}`: 0,
		`{"seq":7,"x":1}`:                  0,
		`{"seq":"7","ts":1}`:               0,
		`{"seq":7.0,"ts":1}`:               0,
		``:                                 0,
	} {
		if got, ours := store.Number(text); got != want && ours || ours != (want > 0) {
			t.Errorf("%s: %d, %t", text, got, ours)
		}
	}
}

func TestAppendElement_whateverIsInTheListIsAChunk(t *testing.T) {
	for _, c := range []struct{ element, want string }{
		{`{"a":1}`, `{"a":1}`},
		{`{"a":1,"a":2}`, `{"a":1,"a":2}`},
		{`{"a":1} `, `{"a":1} `},
		{``, `{"seq":5,"type":"foreign","content":""}`},
		{`text`, `{"seq":5,"type":"foreign","content":"text"}`},
		{`[1]`, `{"seq":5,"type":"foreign","content":"[1]"}`},
		{"{\n\"a\":1}", `{"seq":5,"type":"foreign","content":"{\n\"a\":1}"}`},
		{"{\r\"a\":1}", `{"seq":5,"type":"foreign","content":"{\r\"a\":1}"}`},
		{"\xff", `{"seq":5,"type":"foreign","content":"` + "\uFFFD" + `"}`},
		{"{\"a\":\"\xff\"}", `{"seq":5,"type":"foreign","content":"{\"a\":\"` + "\uFFFD" + `\"}"}`},
		{"id: 9\n\ndata: x", `{"seq":5,"type":"foreign","content":"id: 9\n\ndata: x"}`},
		// As the append script writes them: seq is their current number.
		{`{"seq":5,"ts":1,"a":"é"}`, `{"seq":5,"ts":1,"a":"é"}`},
		{`{"seq":1234567,"ts":1,"a":"é"}`, `{"seq":5,"ts":1,"a":"é"}`},
		{`{"seq":1,"ts":1,"seq":9,"data":{"seq":1}}`, `{"seq":5,"ts":1,"seq":9,"data":{"seq":1}}`},
		// As other programs write them: seq means nothing.
		{`{"seq":7,"a":1}`, `{"seq":7,"a":1}`},
		{`{"seq": 7,"ts":1}`, `{"seq": 7,"ts":1}`},
		{`{"ts":1,"seq":7}`, `{"ts":1,"seq":7}`},
		{`{"seq":"7","ts":1}`, `{"seq":"7","ts":1}`},
		{`{"seq":7,"ts":1`, `{"seq":5,"type":"foreign","content":"{\"seq\":7,\"ts\":1"}`},
	} {
		if got, _ := store.AppendElement(nil, 5, c.element); string(got) != c.want {
			t.Errorf("%q became %s", c.element, got)
		}
	}
}

// Promise: seq in the data equals the event's id, whatever it was when the chunk was written. Nothing else changes.
func TestAppendElement_saysItsNumber(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		number := rapid.Int64Range(1, 9999999999999999)
		wrote, reads := number.Draw(t, "wrote"), number.Draw(t, "reads")
		members := fmt.Sprintf(`,"ts":%d,"type":"delta","content":%q,"seq2":%d}`, number.Draw(t, "ts"), rapid.StringMatching(`[ -~]{0,40}`).Draw(t, "text"), wrote)
		element := fmt.Sprintf(`{"seq":%d`, wrote) + members
		before := []byte("data: ")
		got, _ := store.AppendElement(before, reads, element)
		if want := fmt.Sprintf(`data: {"seq":%d`, reads) + members; string(got) != want && json.Valid([]byte(element)) {
			t.Fatalf("%s as %d is %s", element, reads, got)
		}
	})
}

func TestEnds(t *testing.T) {
	for text, want := range map[string]bool{
		`{"type":"done"}`:                      true,
		`{"x":{},"type":"end"}`:                true,
		`{"t\u0079pe":"d\u006fne"}`:            true,
		`{"type":"cancelled"}`:                 true,
		`{"type":"failed"}`:                    true,
		`{"is_complete": true}`:                true,
		`{"is_complete":false}`:                false,
		`{"is_complete":"true"}`:               false,
		`{"type":"delta","content":"done"}`:    false,
		`{"data":{"type":"done"}}`:             false,
		`{"Type":"done"}`:                      false,
		`{"type":"delta","content":"\"end\""}`: false,
	} {
		if got := store.Ends([]byte(text)) != 0; got != want {
			t.Errorf("%s: %t", text, got)
		}
	}
}

var elements = flag.Int("elements", 20_000, "how many elements at random are read as others read them")

// For every text in a list, valid JSON and endings are recognised exactly as an ordinary JSON parser does.
func TestElement_isReadAsAnybodyReadsIt(t *testing.T) {
	parts := []string{
		"{", "}", "[", "]", ":", ",", `"`, `\`, `\u`, `\ud800`, `\u00e9`, "é", "\xff", "done", "end", "true", "null", "1", "-", ".", "e5", "0", " ", "\t", "\n", "\x01",
		`"a":1`, `"type":"done"`, `"type":"end"`, `"type":"delta"`, `"type":"failed"`, `"typ\u0065":"cancelled"`, `"is_complete":true`, `"is_complete":false`, `{"a":1}`, "01", "1.",
		`"content":"a text that is longer than sixteen bytes"`, `"content":"te\"xt\\ and \n more of it\/"`, `"content":"naïve – 🍞 and so on, for a while"`, `"n":null`,
	}
	valid, ended := 0, 0
	for range *elements {
		b := []byte{'{'}
		for range rand.IntN(8) {
			b = append(b, parts[rand.IntN(len(parts))]...)
			if rand.IntN(2) == 0 {
				b = append(b, ',')
			}
		}
		if b = bytes.TrimSuffix(b, []byte{','}); rand.IntN(4) > 0 {
			b = append(b, '}')
		}
		if rand.IntN(3) == 0 {
			b[rand.IntN(len(b))] = byte(rand.IntN(256))
		}
		isChunk := b[0] == '{' && json.Valid(b) && utf8.Valid(b) && !strings.ContainsAny(string(b), "\r\n")
		got, gotEnds := store.AppendElement(nil, 1, string(b))
		if (string(got) == string(b)) != isChunk {
			t.Fatalf("%q becomes %q", b, got)
		}
		if !isChunk {
			continue
		}
		valid++
		ends := false
		dec := json.NewDecoder(strings.NewReader(string(b)))
		dec.UseNumber()
		_, _ = dec.Token()
		for dec.More() {
			name, _ := dec.Token()
			var value any
			if err := dec.Decode(&value); err != nil {
				t.Fatal(err)
			}
			switch value {
			case "done", "failed", "cancelled", "end":
				ends = ends || name == "type"
			case true:
				ends = ends || name == "is_complete"
			}
		}
		if (store.Ends(b) != 0) != ends || (gotEnds != 0) != ends || store.Ends(b) != gotEnds {
			t.Fatalf("%s: %v", b, !ends)
		}
		if ends {
			ended++
		}
	}
	if valid < *elements/200 || ended < *elements/2000 {
		t.Fatalf("%d of them were JSON, and %d ended something", valid, ended)
	}
}

func TestChunk_withMoreMembersIsStillOneLine(t *testing.T) {
	c, err := store.NewChunk(store.TypeDone, "m", "", "").With("why", "a\n\"b\"").WithJSON("usage", []byte("{\n\"n\": 1 }"))
	if got, want := c.Members(), `"type":"done","message_id":"m","why":"a\n\"b\"","usage":{"n":1}}`; got != want || err != nil || !c.Ends() {
		t.Errorf("%s %v", got, err)
	}
	for _, bad := range []string{"", "{", "1 2", `{"a":1,"a":2}`, "\"\xff\"", `"\ud800"`, strings.Repeat("[", store.MaxDepth) + strings.Repeat("]", store.MaxDepth)} {
		if same, err := c.WithJSON("data", []byte(bad)); err == nil || same.Members() != c.Members() {
			t.Errorf("%q was taken: %s", bad, same.Members())
		}
	}
}

// Numbers are kept as written if every JSON reader can read them. Other numbers are refused: some readers take them for
// infinity or zero, or fail.
func TestParseChunk_refusesNumbersThatOthersCannotRead(t *testing.T) {
	long := strings.Repeat("9", 5000)
	for number, ok := range map[string]bool{
		"0": true, "-0": true, "0e0": true, "-0.000e-500": true, "1e308": true, "-1.7e308": true, "5e-324": true, "9007199254740993": true, "12345678901234567890": true,
		"1" + strings.Repeat("0", 308): true, "0." + strings.Repeat("1", 900): true,
		"1e999": false, "-1E+999": false, "1e309": false, "1" + strings.Repeat("0", 309): false, long: false, "-" + long: false, "0." + long: false,
		"1e-999": false, "0.1e-400": false, "1e99999999999999999999": false, "1e-99999999999999999999": false,
	} {
		for _, text := range []string{`{"content":"","x":` + number + `}`, `{"data":{"a":[1,"\\\"",` + number + `]}}`, `{"content":"","x":"\"` + number + `"}`} {
			_, err := store.ParseChunk([]byte(text), store.Fill{}, 64<<10)
			if want := ok || strings.HasSuffix(text, `"}`); (err == nil) != want {
				t.Errorf("%.60s: %v", text, err)
			}
			if bad, is := errors.AsType[*store.ChunkError](err); err != nil && (!is || bad.Code != "invalid_chunk" || bad.Member == "") {
				t.Errorf("%.60s: %#v", text, err)
			}
		}
		if _, err := store.NewChunk("x", "", "", "").WithJSON("data", []byte("["+number+"]")); (err == nil) != ok {
			t.Errorf("with %.60s: %v", number, err)
		}
	}
}
