package web_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"
)

// faulty stands before a node, and changes the events of its streams. change returns what is sent instead of an event, with the empty
// line at its end.
func faulty(t *testing.T, n *node, change func(event string) string) string {
	t.Helper()
	target, err := url.Parse(n.url(""))
	if err != nil {
		t.Fatal(err)
	}
	var copies sync.WaitGroup
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ModifyResponse: func(res *http.Response) error {
			if !strings.HasSuffix(res.Request.URL.Path, "/stream") || res.StatusCode != http.StatusOK {
				return nil
			}
			from := res.Body
			r, w := io.Pipe()
			res.Body = r
			copies.Go(func() { // ends with either side's connection
				defer from.Close()
				event, lines := "", bufio.NewReader(from)
				for {
					line, err := lines.ReadString('\n')
					if event += line; line == "\n" {
						_, err = io.WriteString(w, change(event))
						event = ""
					}
					if err != nil {
						_ = w.CloseWithError(err)
						return
					}
				}
			})
			return nil
		},
	}
	s := httptest.NewServer(proxy)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
		copies.Wait()
	})
	return s.URL
}

// has reports whether an event is chunk seq.
func has(event string, seq int) bool {
	return strings.Contains(event, fmt.Sprintf("data: {\"seq\":%d,", seq))
}

// The client says whether what it was given is the server's log: what a faulty server or proxy left out, repeated, swapped or changed is found.
func TestVerify_findsWhatIsNotTheServersLog(t *testing.T) {
	t.Parallel()
	n := start(t)
	for _, word := range []string{"a", " word", ", é", " 😀", " the", " the", " end"} {
		n.post(t, "/v1/sessions/short/chunks", map[string]string{"content": word})
	}
	long := strings.Repeat("x", 60_000)
	for i := range 20 {
		n.post(t, "/v1/sessions/long/chunks", map[string]string{"content": fmt.Sprint(i, long)})
	}
	for _, session := range []string{"short", "long"} {
		n.post(t, "/v1/sessions/"+session+"/chunks", map[string]string{"type": "end"})
	}
	same := func(e string) string { return e }
	instead := func(seq int, text, other string) func(string) string {
		return func(e string) string {
			if has(e, seq) {
				return strings.Replace(e, text, other, 1)
			}
			return e
		}
	}
	for _, c := range []struct {
		name, session string
		change        func(event string) string
		wrong         string // what the difference says; empty: there is none
		chunks        int
	}{
		{"nothing is wrong", "short", same, "", 8},
		{"nothing is wrong, and there are several parts", "long", same, "", 21},
		{"left out", "short", func(e string) string {
			if has(e, 3) {
				return ""
			}
			return e
		}, "chunks 1 to 8", 8},
		{"repeated in another's place", "short", instead(4, " 😀", ", é"), "chunks 1 to 8", 8},
		{"swapped", "short", func(e string) string { return instead(1, `"a"`, `" word"`)(instead(2, `" word"`, `"a"`)(e)) }, "chunks 1 to 8", 8},
		{"changed", "short", instead(2, " word", " ward"), "chunks 1 to 8", 8},
		{"changed in the third part", "long", instead(13, "12xxx", "12xxy"), "chunks 11 to 15", 21},
		{"changed in the last part", "long", instead(21, `"ts":`, `"ts":1`), "chunks 21 to 21", 21},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			sum := sha256.New()
			at := faulty(t, n, func(e string) string {
				e = c.change(e)
				if _, data, ok := strings.Cut(e, "data: "); ok && strings.HasPrefix(data, `{"seq":`) {
					line, _, _ := strings.Cut(data, "\n")
					sum.Write([]byte(line + "\n"))
				}
				return e
			})
			r := followed(t, at+"/v1/sessions/"+c.session+"/stream", "fetch", map[string]any{"verify": true})
			r.until("state", "ended")
			r.call("verify")
			var found struct {
				OK         bool  `json:"ok"`
				Complete   bool  `json:"complete"`
				First      int64 `json:"first_seq"`
				Last       int64 `json:"last_seq"`
				Count      int   `json:"count"`
				Difference struct {
					Detail string `json:"detail"`
				} `json:"difference"`
				Parts []struct {
					SHA256 string `json:"sha256"`
				} `json:"parts"`
			}
			eventually(t, "it says", func() bool {
				r.mu.Lock()
				defer r.mu.Unlock()
				for _, line := range r.lines {
					if line[0] == "answer" {
						text, err := json.Marshal(line[1])
						return err == nil && json.Unmarshal(text, &found) == nil
					}
				}
				return false
			})
			if !strings.Contains(found.Difference.Detail, c.wrong) || found.OK != (c.wrong == "") || found.Complete != found.OK {
				t.Errorf("%+v", found)
			}
			if found.OK && (found.Count != c.chunks || found.First != 1 || found.Last != int64(c.chunks)) {
				t.Errorf("%+v", found)
			}
			if c.name == "nothing is wrong" && (len(found.Parts) != 1 || found.Parts[0].SHA256 != hex.EncodeToString(sum.Sum(nil))) {
				t.Errorf("%+v, and %x was received", found, sum.Sum(nil))
			}
		})
	}
}

// What came as a snapshot, and what is not kept, is not verified; and it is said why nothing can be.
func TestVerify_saysWhatItDoesNotCover(t *testing.T) {
	t.Parallel()
	n := start(t)
	n.post(t, "/v1/sessions/s/chunks", []map[string]string{{"content": "a"}, {"content": "b"}})
	r := followed(t, n.url("/v1/sessions/s/stream"), "fetch", map[string]any{"verify": true, "snapshot": true})
	r.until("seq", 2)
	n.post(t, "/v1/sessions/s/chunks", map[string]string{"content": "c"})
	r.until("seq", 3)
	r.call("verify")
	eventually(t, "it says", func() bool { return strings.Contains(strings.Join(r.said(), "\n"), "answer map[") })
	if said := strings.Join(r.said(), "\n"); !strings.Contains(said, "complete:false count:1 ") || !strings.Contains(said, "first_seq:3 last_seq:3 ok:true") {
		t.Error(said)
	}
	without := followed(t, n.url("/v1/sessions/s/stream"), "fetch", nil)
	without.until("seq", 3)
	without.call("verify")
	eventually(t, "it says", func() bool { return strings.Contains(strings.Join(without.said(), "\n"), "TypeError") })
	n.post(t, "/v1/sessions/s/chunks", map[string]string{"content": "d"})
	r.until("seq", 4)
}

// The page verifies the answer that it asked for, and anything else when it is told to. It says what it found in plain words.
func TestVerify_thePageSaysThatAnAnswerIsComplete(t *testing.T) {
	t.Parallel()
	w := world{browser: chromium(t), node: start(t)}
	digest := func(session string) (d struct {
		Count  int    `json:"count"`
		SHA256 string `json:"sha256"`
	}) {
		res, err := http.Get(w.node.url("/v1/sessions/" + session + "/digest"))
		if err == nil {
			err = json.NewDecoder(res.Body).Decode(&d)
			_ = res.Body.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	const said = `document.getElementById('verified').innerText`
	for _, l := range looks {
		t.Run(l.String(), func(t *testing.T) {
			session := "verified-" + l.String()
			p := l.open(t, w, w.node.url("/?session="+session))
			p.until(`gapless.state === 'live'`)
			p.ask("Explain Server-Sent Events with a small example.")
			p.until(said + `.startsWith('Complete')`)
			d := digest(session)
			if got, want := p.text("verified"), fmt.Sprintf("Complete: %d chunks, verified", d.Count); got != want || d.Count < 20 || p.text("digest") != d.SHA256 {
				t.Errorf("it says %q, digest %s; the server has %+v", got, p.text("digest"), d)
			}
			p.shoot("verified-" + l.String())
			p.do("reload", chromedp.Reload())
			p.until(`gapless.state === 'live' && document.getElementById('verify').checkVisibility()`)
			p.press("#verify")
			p.until(said + fmt.Sprintf(` === 'Complete: %d chunks, all of them in one snapshot'`, d.Count))
		})
	}
	at := faulty(t, w.node, func(e string) string {
		if has(e, 9) {
			return strings.Replace(e, `"content":"`, `"content":"not `, 1)
		}
		return e
	})
	p := looks[0].open(t, w, at+"/?session=changed")
	p.until(`gapless.state === 'live'`)
	p.ask("Explain Server-Sent Events with a small example.")
	p.until(said + `.startsWith('Not what the server has')`)
	if d := digest("changed"); p.text("verified") != fmt.Sprintf("Not what the server has: the server's chunks 1 to %d are others. Reload the page", d.Count) {
		t.Errorf("it says %q of %+v", p.text("verified"), d)
	}
	p.shoot("verified-wrong")
}
