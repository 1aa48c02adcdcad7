package api

import (
	"fmt"
	"html"
	"io/fs"
	"path"
	"regexp"
	"strings"
)

var (
	guideTitle = regexp.MustCompile(`(?m)^# (.+)$`)
	guideLink  = regexp.MustCompile(`(?m)^- \[([^\]]+)\]\(([\w-]+)\.md\)`)
)

// guide serves docs/*.md of the repository: README.md, which is the index, at /docs/guide, and each other page at
// /docs/guide/NAME. frame is the page around them. The browser renders the Markdown (docs/guide.js).
func (a *API) guide(pages fs.FS, frame string) {
	index, err := fs.ReadFile(pages, "README.md")
	if err != nil {
		panic(err) // it is in the binary
	}
	var list strings.Builder
	list.WriteString("<ul>")
	for _, link := range guideLink.FindAllStringSubmatch(string(index), -1) {
		fmt.Fprintf(&list, `<li><a href="/docs/guide/%s">%s</a></li>`, link[2], html.EscapeString(link[1]))
	}
	list.WriteString("</ul>")
	names, err := fs.Glob(pages, "*.md")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for _, name := range names {
		text, err := fs.ReadFile(pages, name)
		if err != nil {
			panic(err) // it is in the binary
		}
		title := "Guide"
		if found := guideTitle.FindSubmatch(text); found != nil {
			title = string(found[1])
		}
		page := strings.NewReplacer("{{title}}", html.EscapeString(title), "{{pages}}", list.String(), "{{text}}", html.EscapeString(string(text))).Replace(frame)
		at := path.Join("/docs/guide", strings.TrimSuffix(name, ".md"))
		if name == "README.md" {
			at = "/docs/guide"
		}
		a.get(at, doc("guide.html", docsPolicy, []byte(page)))
	}
}
