package web_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// shoot shows the tab in light and dark, wide and narrow. It fails if something extends beyond the window (go test
// -artifacts keeps the pictures).
func (p *tab) shoot(name string) {
	p.t.Helper()
	for _, light := range []string{"light", "dark"} {
		media := emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: light}}}
		if _, err := chromedp.Call(p.ctx, emulation.SetEmulatedMedia, media); err != nil {
			p.t.Fatal(err)
		}
		p.until(fmt.Sprintf(`matchMedia('(prefers-color-scheme: %s)').matches`, light))
		for _, width := range []int64{1280, 390} {
			p.do("set the width", chromedp.EmulateViewport(width, 900))
			p.until(fmt.Sprintf(`innerWidth === %d`, width))
			if got := eval[int64](p, `document.documentElement.scrollWidth`); got > width {
				p.t.Errorf("%s: %d pixels wide where there are %d: %s", light, got, width, eval[string](p, wide))
			}
			p.run(`window.painted = false; requestAnimationFrame(() => requestAnimationFrame(() => painted = true))`)
			p.until(`painted`)
			png, err := chromedp.Run(p.ctx, chromedp.CaptureScreenshot())
			if err == nil {
				err = os.WriteFile(filepath.Join(p.t.ArtifactDir(), fmt.Sprintf("%s-%d-%s.png", name, width, light)), png, 0o600)
			}
			if err != nil {
				p.t.Fatal(err)
			}
		}
	}
}

func TestGuide_everyLinkLeadsToItsPageAndHeading(t *testing.T) {
	t.Parallel()
	n := start(t)
	p := open(t, chromium(t), n.url("/docs/guide"))
	p.until(`document.querySelector('#guide h1')?.innerText === 'Guide'`)
	pages := eval[[]string](p, `[...document.querySelectorAll('nav a')].map(a => a.href)`)
	if len(pages) < 10 {
		t.Fatalf("the pages: %q", pages)
	}
	p.shoot("guide-index")
	there, links := []string{n.url("/docs"), n.url("/openapi.yaml"), n.url("/"), n.url("/docs/guide")}, map[string]string{}
	for _, page := range append(pages, n.url("/docs/guide")) {
		p.do("open "+page, chromedp.Navigate(page))
		p.until(`document.querySelector('#guide h1') !== null`)
		there = append(there, page)
		for _, id := range eval[[]string](p, `[...document.querySelectorAll('#guide [id]')].map(e => e.id)`) {
			there = append(there, page+"#"+id)
		}
		for _, link := range eval[[]string](p, `[...document.querySelectorAll('a')].map(a => a.href)`) {
			links[link] = page
		}
	}
	for link, page := range links {
		if strings.HasPrefix(link, n.url("/")) && !slices.Contains(there, link) {
			t.Errorf("%s links to %s", page, link)
		}
	}

	p.do("open an anchor", chromedp.Navigate(n.url("/docs/guide/producers#exactly-once")))
	p.until(`Math.abs(document.getElementById('exactly-once')?.getBoundingClientRect().top) < 200`)
	p.do("open a page with tables", chromedp.Navigate(n.url("/docs/guide/redis")))
	p.until(`document.querySelector('#guide table') !== null`)
	if current := eval[string](p, `document.querySelector('nav [aria-current]').textContent + document.title`); current != "RedisGapless: Redis" {
		t.Errorf("the page is called %q", current)
	}
	if md := eval[string](p, `document.querySelector('#guide').innerText`); strings.Contains(md, "](") || strings.Contains(md, "## ") {
		t.Error("Markdown is left")
	}
	p.shoot("guide-redis")
	if got := n.out.String(); strings.Contains(got, "level=ERROR") {
		t.Error(got)
	}
}
