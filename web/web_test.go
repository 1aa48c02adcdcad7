package web

import (
	"io/fs"
	"regexp"
	"strings"
	"testing"
)

func TestFiles_holdWhatThePageNames(t *testing.T) {
	named := regexp.MustCompile(`(?:href|src)="/([^"]+)"|from '/([^']+)'`)
	for _, file := range []string{"index.html", "admin.html", "404.html", "app.js", "gapless.js"} {
		text, err := fs.ReadFile(Files, file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(string(text), -1) {
			if m[1] == "docs/guide" || m[1] == "admin" { // the API makes the one of docs/, and serves admin.html as the other
				continue
			}
			if _, err := fs.Stat(Files, m[1]+m[2]); err != nil {
				t.Errorf("%s names a file that is not there: %v", file, err)
			}
		}
	}
}

// The page's Content-Security-Policy would block these without a visible error.
func TestPage_hasNothingInline(t *testing.T) {
	for _, name := range []string{"index.html", "admin.html", "404.html"} {
		page, err := fs.ReadFile(Files, name)
		if err != nil {
			t.Fatal(err)
		}
		for _, inline := range []string{"<script>", "<style", " style=", " onclick=", "javascript:"} {
			if strings.Contains(string(page), inline) {
				t.Errorf("%s has an inline %q", name, inline)
			}
		}
	}
}
