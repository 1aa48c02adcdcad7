package api

import (
	"html"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var guidePages = os.DirFS("../docs")

func TestGuide_everyPageIsServedLikeTheOtherPages(t *testing.T) {
	t.Parallel()
	n := serve(t, func(s *setup) { s.api.Guide = guidePages })
	names, err := fs.Glob(guidePages, "*.md")
	if err != nil || len(names) < 10 {
		t.Fatalf("%q, %v", names, err)
	}
	n.client = n.server.Client() // the contract does not include the parts of /docs
	index := n.get("/docs/guide")
	reference := n.get("/docs")
	for _, name := range names {
		text, err := fs.ReadFile(guidePages, name)
		if err != nil {
			t.Fatal(err)
		}
		path := "/docs/guide/" + strings.TrimSuffix(name, ".md")
		if name == "README.md" {
			path = "/docs/guide"
		} else if link := `<a href="` + path + `">`; !strings.Contains(string(index.body), link) {
			t.Errorf("the index has no %s", link)
		}
		page := n.get(path)
		if page.status != 200 || !strings.Contains(html.UnescapeString(string(page.body)), string(text)) || strings.Contains(string(page.body), "{{title}}") {
			t.Errorf("%s: %d %.300s", path, page.status, page.body)
		}
		for header := range reference.header {
			if !slices.Contains([]string{"Date", "Content-Length", "Etag"}, header) && !slices.Equal(page.header[header], reference.header[header]) {
				t.Errorf("%s: %s is %q, and at /docs %q", path, header, page.header[header], reference.header[header])
			}
		}
		if head := n.do(request{method: "HEAD", path: path}); head.status != 200 || len(head.body) != 0 || head.header.Get("ETag") != page.header.Get("ETag") {
			t.Errorf("HEAD %s: %d %v", path, head.status, head.header)
		}
		if same := n.do(request{method: "GET", path: path, header: map[string]string{"If-None-Match": page.header.Get("ETag")}}); same.status != 304 {
			t.Errorf("%s again: %d", path, same.status)
		}
	}
}

// Links between pages also work on a platform that shows the files themselves.
func TestGuide_linksLeadToPagesAndFilesThatExist(t *testing.T) {
	t.Parallel()
	names, err := fs.Glob(guidePages, "*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(guidePages, name)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`).FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat("../docs/" + link[1]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
