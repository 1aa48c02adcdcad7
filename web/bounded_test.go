package web_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// readHostile runs testdata/hostile.mjs in node with the page's own files.
func readHostile[T any](t *testing.T, args ...string) (result T) {
	t.Helper()
	dir := t.TempDir()
	for to, from := range map[string]string{"hostile.mjs": "testdata/hostile.mjs", "bounded.mjs": "bounded.js", "marked.mjs": "vendor/marked.js"} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.Replace(string(text), "'/vendor/marked.js'", "'./marked.mjs'", 1))
		if err := os.WriteFile(filepath.Join(dir, to), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), "node", append([]string{filepath.Join(dir, "hostile.mjs")}, args...)...).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := json.Unmarshal(out, &result); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return result
}

type growth struct {
	Name        string
	Once, Twice float64 // ms
}

// quadratic reports whether twice the text takes far more than twice the time.
func (g growth) quadratic() bool { return g.Twice > 3*g.Once+50 }

// A text keeps the page busy only in proportion to its length.
func TestMarkdown_hostileTextsTakeNoLongerThanTheyAreLong(t *testing.T) {
	all := readHostile[[]growth](t, "bounded")
	if len(all) < 20 {
		t.Errorf("%d texts", len(all))
	}
	for _, g := range all {
		if g.quadratic() { // unless the machine was busy
			if g = readHostile[[]growth](t, "bounded", g.Name)[0]; g.quadratic() {
				t.Errorf("%+v", g)
			}
		}
	}
	// This measurement detects what it is meant to detect.
	if g := readHostile[[]growth](t, "unbounded", "an address that never comes", fmt.Sprint(8<<10))[0]; !g.quadratic() {
		t.Errorf("without bounds: %+v", g)
	}
}

// Text that people and models write is read as marked reads it.
func TestMarkdown_usualTextsAreReadWhole(t *testing.T) {
	signed := "https://files.example/a/b.png?X-Amz-Signature=" + strings.Repeat("0123456789abcdef", 60) + "&X-Amz-Date=20260101T000000Z"
	texts := append([]string{
		strings.Repeat("Words, **some of them bold**, `code` and [links](https://example.com/a?b=c) at their end. ", 15),
		"See " + signed + " and [the picture](" + signed + ").",
		strings.Repeat("| a | b | c |\n", 1) + "|---|---|---|\n" + strings.Repeat("| some | `text` | **here** |\n", 200),
		strings.Repeat("- an item with some words\n  - and one of its own\n", 150), strings.Repeat("1. one thing to do\n\n   ```sh\n   make it\n   ```\n\n", 60),
		"```go\n" + strings.Repeat("func f(a, b *int) { *a, *b = *b, *a } // !@#$%^&*()\n", 1000) + "```\n", strings.Repeat("> quoted words\n", 300) + "\n> > twice\n",
		strings.Repeat("# Title\n\nA paragraph of words that somebody may read.\n\n", 300), "a long paragraph " + strings.Repeat("日本語の文章。", 20),
	}, written[:6]...)
	for _, text := range readHostile[[]string](t, "same", string(must(json.Marshal(texts)))) {
		t.Errorf("it is read otherwise: %.200q", text)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
