package model

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
)

// The demo answers the page's sample questions, and says for everything else that it cannot.
func TestDemo_answersTheSamplesOfThePage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(filepath.Join("..", "..", "web", "index.html"))
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(page), `<ul id="samples">`)
	list, _, _ = strings.Cut(list, "</ul>")
	asked := regexp.MustCompile(`<button type="button">(.*?)</button>`).FindAllStringSubmatch(list, -1)
	subjects := []string{"two sources", "lighthouse", "EventSource"}
	if len(asked) != len(subjects) {
		t.Fatalf("the page has %d samples", len(asked))
	}
	answer := func(turns ...Turn) (text string, words int) {
		synctest.Test(t, func(t *testing.T) {
			for p, err := range NewDemo().Answer(t.Context(), turns) {
				if err != nil {
					t.Fatal(err)
				}
				text += p.Text
				words++
			}
		})
		return text, words
	}
	seen := map[string]bool{}
	for i, subject := range subjects {
		text, words := answer(Turn{Role: RoleUser, Content: asked[i][1]})
		if seen[text] || !strings.Contains(text, subject) || strings.Contains(text, "no model") || words < 150 {
			t.Errorf("%q is answered in %d words: %s", asked[i][1], words, text)
		}
		seen[text] = true
		if after, _ := answer(Turn{Role: RoleUser, Content: asked[(i+1)%3][1] + "\n\n" + asked[i][1]}); after != text {
			t.Errorf("after a question that was left open, %q is answered: %.80s", asked[i][1], after)
		}
		if !strings.Contains(nothing, asked[i][1]) {
			t.Errorf("the demo does not say that it can answer %q", asked[i][1])
		}
	}
	for _, other := range []string{"", "Why is there a tide?"} {
		if text, words := answer(Turn{Role: RoleUser, Content: other}); !strings.Contains(text, "-model-url") || words < 100 {
			t.Errorf("%q is answered in %d words: %s", other, words, text)
		}
	}
}
