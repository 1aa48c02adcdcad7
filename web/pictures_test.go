package web_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// pictures are the README's: pictures/<name>.webp, each with a text file of the words on it.
var pictures = []struct {
	name string
	look
	begun, told func(*tab) // called when some of the answer is there, and when all of it is
}{
	{"on-a-phone", look{390, 844, "dark", true}, func(*tab) {}, func(*tab) {}},
}

// -update makes them. The current page must show the same words, or they are out of date.
func TestPage_screenshots(t *testing.T) {
	t.Parallel()
	w := world{browser: chromium(t), node: start(t)}
	readme, err := os.ReadFile(filepath.Join("..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	// These are the model's words that make a good picture. Then the answer stands still.
	const sample = "Explain Server-Sent Events with a small example."
	w.node.post(t, "/v1/sessions/sample/messages", map[string]string{"content": sample})
	eventually(t, "the model has answered", func() bool { all := w.node.history(t, "sample"); return all[len(all)-1].Type == "done" })
	said := w.node.history(t, "sample")[:130]
	for _, c := range pictures {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			session := "picture-" + c.name
			p := c.open(t, w, w.node.url("/?session="+session))
			p.until(`gapless.state === 'live' && !document.getElementById('empty').hidden && !document.getElementById('demo').hidden`)
			half := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { // ends with the words
				for i, c := range said {
					c.Seq = 0
					w.node.post(t, "/v1/sessions/"+session+"/chunks", c)
					if i == 50 {
						close(half)
					}
					<-time.After(50 * time.Millisecond) // the model's pace
				}
			})
			t.Cleanup(wg.Wait)
			<-half
			c.begun(p)
			wg.Wait()
			p.until(fmt.Sprintf(`gapless.seq === %d`, len(said)))
			c.told(p)
			p.run(`window.drawn = false; requestAnimationFrame(() => requestAnimationFrame(() => { drawn = true; }))`)
			p.until(`drawn`)
			file := filepath.Join("pictures", c.name)
			words := p.words()
			if *update {
				quality := int64(80)
				shot, err := chromedp.Call(p.ctx, page.CaptureScreenshot, page.CaptureScreenshotParams{Format: "webp", Quality: &quality})
				if err != nil {
					t.Fatal(err)
				}
				for name, text := range map[string][]byte{file + ".webp": shot.Data, file + ".txt": []byte(words)} {
					if err := os.WriteFile(name, text, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			picture, err := os.ReadFile(file + ".webp")
			if err != nil || !bytes.HasPrefix(picture, []byte("RIFF")) || len(picture) > 150<<10 {
				t.Errorf("the picture has %d bytes (%v)", len(picture), err)
			}
			if then, err := os.ReadFile(file + ".txt"); err != nil || string(then) != words {
				t.Errorf("the picture is out of date (go test ./web -run TestPage_screenshots -update): on it is\n%s\n(%v), and today\n%s", then, err, words)
			}
			if !strings.Contains(string(readme), "web/pictures/"+c.name+".webp") {
				t.Error("the README does not show it")
			}
		})
	}
}

// words returns what the page shows, without what differs from time to time.
func (p *tab) words() string {
	p.t.Helper()
	all := eval[[]string](p, `Array.from(document.querySelectorAll('h1, h2, h3, button, a.button, label, dt, #legend li, .side-label, #state, #form small'))
		.filter((e) => e.checkVisibility({ visibilityProperty: true }) && e.getBoundingClientRect().width > 1)
		.map((e) => e.localName + ' ' + (e.querySelector('.range') ? e.firstChild.data : e.innerText).replace(/\s+/g, ' ').trim())`)
	text := strings.Join(all, "\n") + "\n"
	text = regexp.MustCompile(`(?s)#? lost now, \d+ in all`).ReplaceAllString(text, " lost")
	return regexp.MustCompile(`\d+`).ReplaceAllString(text, "#")
}
