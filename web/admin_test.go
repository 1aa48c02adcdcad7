package web_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"gapless/api/auth/authtest"
)

const (
	rows    = `[...document.querySelectorAll('#rows tr')].map((r) => [...r.cells].slice(0, 4).map((c) => c.innerText).join(' ')).join()`
	figures = `Object.fromEntries([...document.querySelectorAll('#figures div')].map((d) => [d.children[0].innerText, d.children[1].innerText]))`
)

func TestAdmin_showsTheSessionsAndTheNode(t *testing.T) {
	t.Parallel()
	n := start(t)
	for i := range 52 {
		n.post(t, fmt.Sprintf("/v1/sessions/chat-%02d/chunks", i), chunk{Content: "sesame"})
	}
	n.post(t, "/v1/sessions/"+strings.Repeat("x", 128)+"/chunks", []chunk{{Content: "sesame"}, {Type: "end"}})
	stream, err := http.Get(n.url("/v1/sessions/chat-00/stream?after=99")) // of a number that is not there: a reset
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Body.Close()

	p := open(t, chromium(t), n.url("/admin"))
	p.until(rows + `.startsWith('chat-00 1 1 no,chat-01 0 1 no,') && document.querySelectorAll('#rows tr').length === 50`)
	p.until(`(({ Viewers, Feeds, 'Resets: ahead': ahead, 'Gaps found': found, 'Gaps repaired': repaired }) => [Viewers, Feeds, ahead, found, repaired].join())(` + figures + `) === '1,1,1,0,0'`)
	if !eval[bool](p, `new Date(document.querySelector('#rows time').dateTime) > Date.now() - 3600000 && document.getElementById('refused').hidden`) {
		t.Error("the time of the last change is missing, or something was refused")
	}
	p.run(`document.getElementById('next').click(); document.getElementById('next').click()`) // twice goes on once
	p.until(rows + ` === 'chat-50 0 1 no,chat-51 0 1 no,` + strings.Repeat("x", 128) + ` 0 2 yes' && document.getElementById('next').disabled`)
	p.shoot("admin")
	p.press("#back")
	p.until(rows + `.startsWith('chat-00') && document.getElementById('back').disabled`)

	for prefix, want := range map[string]string{"chat-51": "chat-51 0 1 no", "none": "No session begins with this."} {
		p.run(fmt.Sprintf(`document.getElementById('prefix').value = %q; document.getElementById('filter').requestSubmit()`, prefix))
		p.until(fmt.Sprintf(rows+` === %q`, want))
	}
	p.run(`document.getElementById('prefix').value = 'a b'; document.getElementById('filter').requestSubmit()`)
	p.until(`document.getElementById('refused-text').innerText.startsWith('prefix must be') && document.getElementById('prefix').checkVisibility()`)
	if strings.Contains(eval[string](p, `document.documentElement.outerHTML`), "sesame") {
		t.Error("it shows what was said")
	}
}

// Whatever the server refuses, the page says why, and asks for another token.
func TestAdmin_asksForATokenThatIsEnough(t *testing.T) {
	t.Parallel()
	issuer := authtest.New(t)
	n := start(t, "-auth", issuer.Source())
	p := open(t, chromium(t), n.url("/admin"))
	refused := func(title, text string) {
		t.Helper()
		p.until(fmt.Sprintf(`document.getElementById('refused-title').innerText === %q && document.getElementById('refused-text').innerText.includes(%q)`, title, text))
		if !eval[bool](p, `document.activeElement.id === 'token' && !document.getElementById('node').checkVisibility() && !document.getElementById('list').checkVisibility()`) {
			t.Errorf("%s: no token can be pasted, or something is shown", title)
		}
	}
	paste := func(token string) {
		p.run(fmt.Sprintf(`document.getElementById('token').value = %q; document.getElementById('login').requestSubmit()`, token))
	}
	refused("A token is needed", "administrators only")
	p.shoot("admin-401")
	paste("sesame")
	refused("The token was not accepted", "token")
	paste(issuer.Token(time.Hour, authtest.May{"read": {"*"}, "admin": {"chat-*"}}))
	refused("This page is not open to you", "does not allow admin on all sessions")
	paste(issuer.Token(time.Hour, authtest.May{"admin": {"*"}}))
	p.until(rows + ` === 'There are no sessions.' && document.getElementById('refused').hidden && ` + figures + `.Viewers === '0'`)
	if eval[string](p, `document.getElementById('token').value + location.search`) != "" {
		t.Error("the token stays in the page")
	}
}
