package web_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"gapless/store/storetest"
)

// chat is a chat of the Vercel AI SDK, on a session.
type chat struct {
	done chan struct{}

	mu    sync.Mutex
	lines map[string][]string // what it printed, by topic
	over  string
	err   error
}

// sdks are the versions of the AI SDK that front ends use: 6 and 7.
var sdks = []string{"ai", "ai7"}

// startChat runs a script of the AI SDK; how is ask, resume or stop.
func startChat(t *testing.T, sdk, base, session, how, question string) *chat {
	t.Helper()
	c := &chat{done: make(chan struct{}), lines: map[string][]string{}}
	run := install(t)("ai.mjs", sdk, how, question)
	ctx, cancel := storetest.Watch(t.Context(), t)
	go func() { // ends with ctx; waited for below
		defer close(c.done)
		over, err := run(ctx, base+"/v1/sessions/"+session, func(what, data string) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.lines[what] = append(c.lines[what], data)
		})
		c.over, c.err = over, err
	}()
	t.Cleanup(func() { cancel(); <-c.done })
	return c
}

// has waits until the chat shows so many bytes.
func (c *chat) has(t *testing.T, bytes int) {
	t.Helper()
	eventually(t, fmt.Sprint("the chat shows ", bytes, " bytes"), func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		all := c.lines["bytes"]
		n, _ := strconv.Atoi(append([]string{"0"}, all...)[len(all)])
		return n >= bytes
	})
}

// ends waits for its end, and checks the status and the text of its message.
func (c *chat) ends(t *testing.T, status, message, text string) {
	t.Helper()
	<-c.done // it also ends with the test's patience
	if c.err != nil || c.over != status {
		t.Errorf("the chat ended %q, not %q: %v %q", c.over, status, c.err, c.lines["error"])
	}
	if got := c.lines[message]; message != "" && !slices.Equal(got, []string{text}) {
		t.Errorf("it shows %d bytes, not %d: %.200q", len(strings.Join(got, "")), len(text), got)
	}
}

func TestAISDK_resumesARunningAnswerToTheByteThroughCutsAndADrain(t *testing.T) {
	t.Parallel()
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			t.Parallel()
			testResumesARunningAnswerToTheByteThroughCutsAndADrain(t, sdk)
		})
	}
}

func testResumesARunningAnswerToTheByteThroughCutsAndADrain(t *testing.T, sdk string) {
	redis := storetest.Redis(t)
	args := []string{"-redis", redis.URL(), "-heartbeat", "100ms"}
	a, b := start(t, args...), start(t, args...)
	const session, path = "ui", "/v1/sessions/ui/chunks"
	want := ""
	produce := func(n *node) {
		for _, text := range nasty {
			want += text
			n.post(t, path, []chunk{{MessageID: "m", Content: text}, {MessageID: "other", Role: "user", Content: "not of it"}})
		}
	}
	startChat(t, sdk, "http://"+a.addr, session, "resume", "").ends(t, "ready", "", "") // nothing runs: 204
	a.post(t, path, chunk{Type: "message", MessageID: "q", Role: "user", Content: "?"})
	produce(a)

	line := newProxy(t, a, b)
	line.cuts = []cut{where(`text-delta.*\n\ndata: {"type":"text-de()`)} // cuts the first response in mid-answer
	line.route = func(streams int) int { return min(streams, 1) }
	b.post(t, path, chunk{Type: "done", MessageID: "other"})
	whole := startChat(t, sdk, "http://"+a.addr, session, "resume", "")
	torn := startChat(t, sdk, "http://"+line.l.Addr().String(), session, "resume", "")
	whole.has(t, len(want))
	torn.has(t, len(want))
	for range 3 {
		for _, text := range nasty {
			want += text
			b.post(t, path, chunk{MessageID: "m", Content: text})
		}
		whole.has(t, len(want))
	}
	a.stop() // its chats end with an error
	b.post(t, path, chunk{Type: "done", MessageID: "m"})
	torn.ends(t, "ready", "m", want)
	if streams := line.seen(); len(streams) < 2 || !streams[0].cut {
		t.Errorf("%d responses, and the first was not cut: this proves less than it should", len(streams))
	}
	whole.ends(t, "error", "m", want)
	late := startChat(t, sdk, "http://"+b.addr, session, "resume", "")
	late.ends(t, "ready", "", "")
	// A page begins with messages?format=ui, and a resume adds to it. The answer must be there
	// once.
	for c, want := range map[*chat]string{whole: "user user assistant", torn: "user user assistant", late: "user assistant user"} {
		if got := c.lines["roles"]; !slices.Equal(got, []string{want}) {
			t.Errorf("it has messages of %q, not %q", got, want)
		}
	}
}

func TestAISDK_stopsAnAnswer(t *testing.T) {
	t.Parallel()
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			t.Parallel()
			testStopsAnAnswer(t, sdk)
		})
	}
}

func testStopsAnAnswer(t *testing.T, sdk string) {
	n := start(t)
	const path = "/v1/sessions/ui/chunks"
	n.post(t, path, chunk{MessageID: "a/b 🍞", Content: "half"})
	c := startChat(t, sdk, "http://"+n.addr, "ui", "stop", "")
	c.ends(t, "ready", "a/b 🍞", "half")
	if !slices.Equal(c.lines["stop"], []string{"204"}) {
		t.Errorf("stop was answered %q", c.lines["stop"])
	}
	if all := n.history(t, "ui"); all[len(all)-1].Type != "cancelled" {
		t.Errorf("%+v", all)
	}
}

func TestAISDK_asksAndShowsTheAnswerOrWhyThereIsNone(t *testing.T) {
	t.Parallel()
	for _, sdk := range sdks {
		t.Run(sdk, func(t *testing.T) {
			t.Parallel()
			testAsksAndShowsTheAnswerOrWhyThereIsNone(t, sdk)
		})
	}
}

func testAsksAndShowsTheAnswerOrWhyThereIsNone(t *testing.T, sdk string) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/chat/completions" {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for _, word := range []string{"Hm. ", "Black or green?"} {
			fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"reasoning_content\":%q}}]}\n\n", word)
		}
		for _, word := range []string{"Four ", "minutes 🍵."} {
			fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":%q}}]}\n\n", word)
		}
		fmt.Fprint(w, "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n")
	}))
	t.Cleanup(service.Close)
	n := start(t, "-model-url", service.URL+"/v1", "-model-name", "m")
	c := startChat(t, sdk, "http://"+n.addr, "ui", "ask", "How long does tea steep?")
	c.ends(t, "ready", "", "")
	all := n.history(t, "ui")
	if len(all) != 6 || all[0].Content != "How long does tea steep?" || all[1].Type != "reasoning" || all[5].Type != "done" {
		t.Fatalf("%+v", all)
	}
	c.ends(t, "ready", all[1].MessageID, "Four minutes 🍵.")
	if got := c.lines["reasoning"]; !slices.Equal(got, []string{"done: Hm. Black or green?"}) {
		t.Errorf("it shows as thoughts %q", got)
	}
	if got := c.lines["finish"]; !slices.Equal(got, []string{"false false length"}) {
		t.Errorf("it finished %q", got)
	}
	n = start(t, "-model-url", service.URL+"/elsewhere", "-model-name", "m")
	c = startChat(t, sdk, "http://"+n.addr, "ui", "ask", "And now?")
	c.ends(t, "error", "", "")
	if got := c.lines["error"]; len(got) != 1 || !strings.Contains(got[0], "401") {
		t.Errorf("it says %q", got)
	}
}
