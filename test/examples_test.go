package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gapless/store/storetest"
)

// Each example appends an answer while the node that it talks to is killed, and gapless.py follows it: nothing is lost
// or duplicated.
func TestExamples_surviveANodeThatIsKilled(t *testing.T) {
	t.Parallel()
	goExample := filepath.Join(t.TempDir(), "example")
	if out, err := exec.CommandContext(deadline(t), "go", "build", "-o", goExample, "./examples/go").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	words := func(t *testing.T, format string) *exec.Cmd { // a program that prints words, as a model does
		t.Helper()
		return exec.CommandContext(deadline(t), "bash", "-c", "for i in $(seq 0 59); do printf '"+format+"' $i; sleep 0.03; done")
	}
	for name, begin := range map[string]func(t *testing.T, servers string) (wait func() error){
		"python": func(t *testing.T, servers string) func() error {
			producer := exec.CommandContext(deadline(t), "/usr/bin/python3", "examples/python/gapless.py", "append", servers, "s")
			said := words(t, `word%d \n`)
			var err error
			if producer.Stdin, err = said.StdoutPipe(); err != nil {
				t.Fatal(err)
			}
			return began(t, said, producer)
		},
		"fastapi": func(t *testing.T, servers string) func() error {
			at := free(t)
			_, port, _ := strings.Cut(at, ":")
			app := exec.CommandContext(deadline(t), "/usr/bin/python3", "-m", "uvicorn", "--app-dir", "examples/python", "app:app", "--port", port)
			app.Env = append(os.Environ(), "GAPLESS_NODES="+servers, "PYTHONDONTWRITEBYTECODE=1")
			if err := app.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = app.Process.Kill(); _ = app.Wait() })
			eventually(t, "the back end takes a question", func() bool {
				r, err := http.Post("http://"+at+"/ask/s?question=Why", "", nil)
				if err != nil {
					return false
				}
				defer r.Body.Close()
				_, _ = io.Copy(io.Discard, r.Body)
				return r.StatusCode == http.StatusAccepted
			})
			return func() error { return nil }
		},
		"node": func(t *testing.T, servers string) func() error {
			return began(t, exec.CommandContext(deadline(t), "node", "examples/node/answer.mjs", servers, "s"))
		},
		"go": func(t *testing.T, servers string) func() error {
			return began(t, exec.CommandContext(deadline(t), goExample, servers, "s"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := storetest.Redis(t)
			all := nodes(t, 2, redis)
			servers := all[0].url("") + "," + all[1].url("")
			viewer := exec.CommandContext(deadline(t), "/usr/bin/python3", "examples/python/gapless.py", "follow", servers, "s")
			var said buffer
			viewer.Stdout, viewer.Stderr = &said, &said
			watched := began(t, viewer)
			wait := begin(t, servers)
			eventually(t, "it is in the middle", func() bool { return strings.Count(said.String(), "word") > 15 })
			all[0].kill()
			if err := wait(); err != nil {
				t.Error(err)
			}
			eventually(t, "the answer is done", func() bool { return strings.Contains(said.String(), `"done"`) })
			if name == "fastapi" { // its session continues
				all[1].append(t, "s", `{"type":"end"}`)
			}
			if err := watched(); err != nil {
				t.Errorf("%v\n%s", err, said.String())
			}
			seq, text := 0, ""
			for line := range strings.Lines(said.String()) {
				var c struct {
					Seq     int
					Type    string
					Content string
				}
				if err := json.Unmarshal([]byte(line), &c); err != nil || c.Seq != seq+1 {
					t.Fatalf("after %d came %s (%v)", seq, line, err)
				}
				seq = c.Seq
				if c.Type == "delta" {
					text += strings.TrimSpace(c.Content) + " "
				}
			}
			var want strings.Builder
			for i := range 60 {
				want.WriteString(fmt.Sprintf("word%d ", i))
			}
			if text != want.String() {
				t.Errorf("it said %q", text)
			}
		})
	}
}

// began starts programs, and returns a function that waits for them.
func began(t *testing.T, all ...*exec.Cmd) (wait func() error) {
	t.Helper()
	for _, cmd := range all {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, cmd := range all {
			_ = cmd.Process.Kill()
		}
	})
	return func() error {
		for _, cmd := range all {
			if err := cmd.Wait(); err != nil {
				return fmt.Errorf("%s: %w", cmd.Args[0], err)
			}
			storetest.Moved(t)
		}
		return nil
	}
}
