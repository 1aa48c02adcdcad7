package api

import (
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
)

// A long conversation costs little: only its last message is kept, whatever the shape of the others.
func TestUI_onlyTheLastMessageIsKept(t *testing.T) {
	t.Parallel()
	for name, other := range map[string]string{
		"many messages": `{"role":"user","parts":[]},`, "many parts": `{"role":"user","parts":[` + strings.Repeat(`{},`, 1000) + `{}]},`,
		"many names": `{"metadata":{` + names(500) + `},"role":"user","parts":[]},`, "no messages": `[[[[]]]],5,null,`,
	} {
		last := `{"role":"user","parts":[{"type":"text","text":"se"},{"text":"same","type":"text"}]}]}`
		n := (4 << 20) / len(other)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		text, member, err := uiQuestion(io.MultiReader(strings.NewReader(`{"messages":[`), &repeated{text: other, times: n}, strings.NewReader(last)))
		runtime.ReadMemStats(&after)
		if err != nil || text != "sesame" || !strings.HasSuffix(member, "/parts") {
			t.Errorf("%s: %q at %s, %v", name, text, member, err)
		}
		if live := int64(after.HeapInuse) - int64(before.HeapInuse); live > 64<<20 { // other tests allocate meanwhile
			t.Errorf("%s: %d bytes", name, live)
		}
	}
}

// names returns n members with different names.
func names(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `"n%d":0,`, i)
	}
	return strings.TrimSuffix(b.String(), ",")
}

// repeated reads as a text many times.
type repeated struct {
	text  string
	times int
	at    int
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.times == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.text[r.at:])
	if r.at += n; r.at == len(r.text) {
		r.at = 0
		r.times--
	}
	return n, nil
}

func TestUI_whatCanBeReadInTwoWaysIsRefused(t *testing.T) {
	t.Parallel()
	const part = `{"type":"text","text":"a"}`
	for _, body := range []string{
		`{"messages":[{"role":"user","role":"user","parts":[` + part + `]}]}`, `{"messages":[{"role":"user","parts":[` + part + `],"parts":[]}]}`,
		`{"messages":[{"role":"user","parts":[{"type":"text","text":"a","text":"b"}]}]}`, `{"messages":[{"role":"user","parts":[` + part + `]}]} {}`,
		`[]`, `{"messages":{}}`, `{"messages":[{"role":"user","parts":[` + part + `]}]`, `{"messages":[{"role":5}]}`, `{`, `{"messages":[`, "{\"messages\":[{\"role\":\"\xff\"}]}",
	} {
		if text, _, err := uiQuestion(strings.NewReader(body)); err == nil {
			t.Errorf("%s asks %q", body, text)
		}
	}
}
