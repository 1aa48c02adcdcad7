package web_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gapless/store/storetest"
)

// runOpenAI runs a script with a major of OpenAI's Node client to its end.
func runOpenAI(t *testing.T, script, base string, args ...string) (lines map[string][]string, over string) {
	t.Helper()
	ctx, cancel := storetest.Watch(t.Context(), t)
	defer cancel()
	var mu sync.Mutex
	lines = map[string][]string{}
	over, err := install(t)(script, args...)(ctx, base+"/openai/v1", func(what, data string) {
		mu.Lock()
		defer mu.Unlock()
		lines[what] = append(lines[what], data)
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines, over
}

// cutResponses cuts the streams of responses at random bytes, all but the first 2,000, in which a response gets its id; the service pauses
// between words.
func cutResponses(t *testing.T, cuts int) (line *cutter, b *node, text string) {
	t.Helper()
	service, text := wordy(t, 120, func(ctx context.Context, _ int) {
		select {
		case <-time.After(2 * time.Millisecond): // the model's pace
		case <-ctx.Done():
		}
	})
	redis := storetest.Redis(t)
	args := []string{"-redis", redis.URL(), "-model-url", service.URL + "/v1", "-model-name", "m", "-heartbeat", "50ms"}
	a, b := start(t, args...), start(t, args...)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	return newCutter(t, []*node{a, b}, func(request int) (at int, clean bool) {
		switch {
		case request > cuts:
			return -1, false
		case request == 0:
			return 2500, false
		}
		return r.IntN(1500), request%2 == 0
	}), b, text
}

// OpenAI's own clients get each event once, from wherever they were cut off, at either node, and what their helpers make of the events is the whole.
func TestOpenAI_nodesClientHasEveryEventOnceThroughCuts(t *testing.T) {
	t.Parallel()
	for _, sdk := range []string{"openai", "openai7"} {
		for _, how := range []string{"background", "foreground"} {
			t.Run(sdk+" "+how, func(t *testing.T) {
				t.Parallel()
				line, b, text := cutResponses(t, 30)
				lines, over := runOpenAI(t, "responses.mjs", line.URL, sdk, how, "Why is there a tide?", b.url("/openai/v1"))
				if over != "completed" || !slices.Equal(lines["text"], []string{text}) {
					t.Errorf("%s: %.300q", over, lines["text"])
				}
				if line.count() < 10 {
					t.Errorf("%d cuts: this proves less than it should", line.count())
				}
			})
		}
	}
}

// The Go client does the same. It is in a module of its own.
func TestOpenAI_gosClientHasEveryEventOnceThroughCuts(t *testing.T) {
	t.Parallel()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(filepath.Join("testdata", "openai"))); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(to, "client")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir, build.Env = to, append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	line, b, text := cutResponses(t, 30)
	ctx, cancel := storetest.Watch(t.Context(), t)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, line.URL+"/openai/v1", b.url("/openai/v1"), "Why is there a tide?").CombinedOutput() // #nosec G204 -- it was built just now
	if err != nil || !strings.HasSuffix(string(out), text) {
		t.Errorf("%v: %.600s", err, out)
	}
	if line.count() < 10 {
		t.Errorf("%d cuts: this proves less than it should", line.count())
	}
}

// The wire that openai-python has, by Python's standard library.
func TestOpenAI_pythonsWireHasEveryEventOnceThroughCuts(t *testing.T) {
	t.Parallel()
	line, b, text := cutResponses(t, 30)
	ctx, cancel := storetest.Watch(t.Context(), t)
	defer cancel()
	cmd := exec.CommandContext(ctx, "python3", filepath.Join("..", "examples", "python", "responses.py"), line.URL+"/openai/v1", "Why is there a tide?")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if out, err := cmd.Output(); err != nil || string(out) != text+"\n" {
		t.Errorf("%v: %.600s\n%s", err, out, &stderr)
	}
	_ = b
	if line.count() < 10 {
		t.Errorf("%d cuts: this proves less than it should", line.count())
	}
}

// Chat completions are the service's own, to the byte: words, calls of tools, usage, and errors before and in the middle. A session has them again.
func TestOpenAI_chatCompletionsAreTheServicesOwn(t *testing.T) {
	t.Parallel()
	all := map[string]string{"whole": `{"id":"x", "choices":[{"index":0,"message":{"role":"assistant","content":"4 min"},"finish_reason":"stop"}],"usage":{"total_tokens":7}}`}
	for _, rec := range recordings(t) {
		if strings.HasPrefix(rec.name, "openai") {
			all[rec.name] = string(rec.stream)
		}
	}
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		for name, said := range all {
			if !bytes.Contains(body, []byte(strconv.Quote(name))) {
				continue
			}
			w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
			if name == "whole" {
				w.Header().Set("Content-Type", "application/json")
			}
			for piece := range slices.Chunk([]byte(said), 7) {
				_, _ = w.Write(piece)
				_ = http.NewResponseController(w).Flush()
			}
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"error":{"message":"no such model","type":"invalid_request_error","param":"model","code":"model_not_found"}}`)
	}))
	t.Cleanup(service.Close)
	n := start(t, "-model-url", service.URL+"/v1", "-model-name", "m")
	for name, said := range all {
		lines, over := runOpenAI(t, "completions.mjs", "http://"+n.addr, "openai7", name)
		got := ""
		if over != "complete" { // it aborts what it reads
			res, err := http.Post(n.url("/openai/v1/chat/completions"), "application/json", strings.NewReader(`{"model":`+strconv.Quote(name)+`,"stream":true}`))
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			got = string(b)
		} else if len(lines["bytes"]) == 1 {
			b, _ := base64.StdEncoding.DecodeString(lines["bytes"][0])
			got = string(b)
		}
		if got != said {
			t.Errorf("%s: %q\nand not\n%q", name, got, said)
		}
		if strings.HasSuffix(name, "error") != (over != "complete") {
			t.Errorf("%s: %s %q", name, over, lines["error"])
		}
		if name == "whole" || over != "complete" {
			continue
		}
		again, err := show(t.Context(), n.url("/v1/sessions/"+lines["session"][0]+raw), make(chan struct{}, 1<<10))
		if want := parse(said); err != nil || len(parse(again)) != len(want) {
			t.Errorf("%s, once more: %v %q", name, err, again)
		}
	}
	lines, _ := runOpenAI(t, "completions.mjs", "http://"+n.addr, "openai", "none")
	if got := lines["error"]; len(got) != 1 || got[0] != "404 no such model" && !strings.HasPrefix(got[0], "404 404 no such model") {
		t.Errorf("%q", got)
	}
}
