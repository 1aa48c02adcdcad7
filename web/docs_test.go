package web_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"gapless/web"
)

// expand opens an operation of the reference with the keyboard, and returns its selector.
func (p *tab) expand(tag, id string) string {
	p.t.Helper()
	at := fmt.Sprintf("#operations-%s-%s", tag, id)
	p.until(`document.querySelector('` + at + ` .opblock-summary-control') !== null`)
	p.run(`document.querySelector('` + at + ` .opblock-summary-control').focus()`)
	p.do("press Enter", chromedp.KeyEvent("\r"))
	p.until(`document.querySelector('` + at + ` .execute') !== null`)
	return at
}

// execute sends the request, and returns the response that is shown.
func (p *tab) execute(at string) (status, body string) {
	p.t.Helper()
	const live = ` .live-responses-table .response `
	p.until(`document.querySelector('` + at + ` .loading-container') === null`)
	if eval[bool](p, `document.querySelector('`+at+` .btn-clear') !== null`) {
		p.press(at + ` .btn-clear`) // the previous response
		p.until(`document.querySelector('` + at + live + `') === null`)
	}
	p.press(at + ` .execute`)
	p.until(`document.querySelector('` + at + live + `.response-col_status') !== null`)
	return eval[string](p, `document.querySelector('`+at+live+`.response-col_status').innerText.trim()`),
		eval[string](p, `document.querySelector('`+at+live+`.highlight-code')?.innerText ?? ''`)
}

// The tab fails the test if its policy blocks something.
func TestDocs_callsAreTriedOutAndNothingComesFromElsewhere(t *testing.T) {
	t.Parallel()
	n := start(t)
	p := open(t, chromium(t), n.url("/docs"))

	at := p.expand("sessions", "createSession")
	if status, body := p.execute(at); status != "201" || !strings.Contains(body, `"id": "tea-for-two"`) {
		t.Errorf("a session: %s %s", status, body)
	}
	at = p.expand("chunks", "appendChunks")
	if status, body := p.execute(at); status != "201" || !strings.Contains(body, `"count": 1`) {
		t.Errorf("a chunk: %s %s", status, body)
	}
	at = p.expand("chunks", "readChunks")
	if status, body := p.execute(at); status != "200" || !strings.Contains(body, `"content": "Tea "`) {
		t.Errorf("a page: %s %s", status, body)
	}
	at = p.expand("chunks", "streamChunks")
	if status, body := p.execute(at); status != "200" || !strings.Contains(body, `"content":"Tea "`) || !strings.Contains(body, "stops reading after 5 s") {
		t.Errorf("a stream that goes on: %s %s", status, body)
	}
	n.post(t, "/v1/sessions/tea-for-two/chunks", chunk{Type: "done", MessageID: "m1"})
	if status, body := p.execute(at); status != "200" || !strings.Contains(body, `"type":"done"`) || strings.Contains(body, "stops reading") {
		t.Errorf("a stream whose message is done: %s %s", status, body)
	}
	for _, url := range eval[[]string](p, `performance.getEntriesByType('resource').map(e => e.name)`) {
		if !strings.HasPrefix(url, n.url("/")) && !strings.HasPrefix(url, "data:") {
			t.Errorf("it asked for %s", url)
		}
	}

	// Wide and narrow, light and dark (go test -artifacts keeps the pictures).
	for _, light := range []string{"light", "dark"} {
		media := emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: light}}}
		if _, err := chromedp.Call(p.ctx, emulation.SetEmulatedMedia, media); err != nil {
			t.Fatal(err)
		}
		p.until(fmt.Sprintf(`document.documentElement.classList.contains('dark-mode') === %t`, light == "dark"))
		for _, width := range []int64{1280, 390} {
			p.do("set the width", chromedp.EmulateViewport(width, 900))
			p.until(fmt.Sprintf(`innerWidth === %d`, width))
			if got := eval[int64](p, `document.documentElement.scrollWidth`); got > width {
				t.Errorf("%s: %d pixels wide where there are %d: %s", light, got, width, eval[string](p, wide))
			}
			for what, script := range map[string]string{"top": `scrollTo(0, 0)`, "call": `document.querySelector('#operations-chunks-readChunks').scrollIntoView()`,
				"answer": `document.querySelector('#operations-chunks-readChunks .live-responses-table').scrollIntoView()`} {
				p.run(script + `; window.painted = false; requestAnimationFrame(() => requestAnimationFrame(() => painted = true))`)
				p.until(`painted`)
				png, err := chromedp.Run(p.ctx, chromedp.CaptureScreenshot())
				if err == nil {
					err = os.WriteFile(filepath.Join(t.ArtifactDir(), fmt.Sprintf("docs-%s-%d-%s.png", what, width, light)), png, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// wide names elements that extend beyond the window, and are in nothing that scrolls.
const wide = `[...document.querySelectorAll('body *')].filter(e => {
	if (e.getBoundingClientRect().right <= innerWidth) return false;
	for (let a = e; a; a = a.parentElement) if (getComputedStyle(a).overflowX !== 'visible') return false;
	return true;
}).map(e => e.tagName + '.' + e.className).slice(0, 9).join(', ')`

// swaggerUI is the published package that /docs is made of, and is kept unchanged. .ci/setup reads
// this line.
const swaggerUI = "swagger-ui-dist@5.35.0"

func TestDocs_areMadeOfWhatWasPublished(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pack := exec.CommandContext(t.Context(), "npm", "pack", "--ignore-scripts", "--loglevel=error", "--prefer-offline", swaggerUI)
	pack.Dir = dir
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("npm pack: %v\n%s", err, out)
	}
	archives, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil || len(archives) != 1 {
		t.Fatalf("npm pack made %v (%v)", archives, err)
	}
	if out, err := exec.CommandContext(t.Context(), "tar", "-xzf", archives[0], "-C", dir, "--strip-components=1").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	for kept, published := range map[string]string{
		"swagger-ui-bundle.js.gz":          "swagger-ui-bundle.js",
		"swagger-ui-bundle.js.LICENSE.txt": "swagger-ui-bundle.js.LICENSE.txt",
		"swagger-ui.css.gz":                "swagger-ui.css",
		"swagger-ui.LICENSE.txt":           "LICENSE",
		"swagger-ui.NOTICE.txt":            "NOTICE",
	} {
		want, err := os.ReadFile(filepath.Join(dir, published))
		if err != nil {
			t.Fatal(err)
		}
		got, err := web.Files.ReadFile("docs/" + kept)
		if err == nil && strings.HasSuffix(kept, ".gz") {
			got, err = gunzip(got)
		}
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not %s of %s (%v)", kept, published, swaggerUI, err)
		}
	}
}

func gunzip(packed []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func TestDocs_comeCompressedToWhoTakesIt(t *testing.T) {
	t.Parallel()
	n := start(t)
	packed, err := web.Files.ReadFile("docs/swagger-ui-bundle.js.gz")
	if err != nil {
		t.Fatal(err)
	}
	plain, err := gunzip(packed)
	if err != nil {
		t.Fatal(err)
	}
	get := func(accept, etag string) (*http.Response, []byte) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, n.url("/docs/swagger-ui-bundle.js"), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept-Encoding", accept)
		r.Header.Set("If-None-Match", etag)
		res, err := http.DefaultTransport.RoundTrip(r) // a client would decompress it
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, body
	}
	tags := map[string]bool{}
	for accept, takes := range map[string]bool{"gzip": true, "br, GZIP;q=0.5": true, "": false, "identity": false, "br": false, "gzip;q=0": false, "gzip; q=0.000": false} {
		res, body := get(accept, "")
		want, encoding := plain, ""
		if takes {
			want, encoding = packed, "gzip"
		}
		if !bytes.Equal(body, want) || res.Header.Get("Content-Encoding") != encoding || res.Header.Get("Vary") != "Accept-Encoding" || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/javascript") {
			t.Errorf("Accept-Encoding %q: %d bytes, %v", accept, len(body), res.Header)
		}
		tags[res.Header.Get("ETag")] = true
		if again, body := get(accept, res.Header.Get("ETag")); again.StatusCode != http.StatusNotModified || len(body) > 0 {
			t.Errorf("Accept-Encoding %q, asked again: %d", accept, again.StatusCode)
		}
	}
	if len(tags) != 2 {
		t.Errorf("two sets of bytes have the tags %v", tags)
	}
}
