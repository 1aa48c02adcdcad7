package web_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// packed packs web/ as npm does, and installs the package in a new folder, next to React.
func packed(t *testing.T) (to string) {
	t.Helper()
	to = t.TempDir()
	if err := os.CopyFS(to, os.DirFS(filepath.Join("testdata", "react"))); err != nil {
		t.Fatal(err)
	}
	npm := func(at string, args ...string) []byte {
		t.Helper()
		cmd := exec.Command("npm", append(args, "--ignore-scripts", "--legacy-peer-deps", "--prefer-offline", "--loglevel=error")...)
		cmd.Dir = at
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("npm %s: %v\n%s%s", args[0], err, out, &stderr)
		}
		return out
	}
	npm(to, "ci", "--no-audit", "--no-fund")
	var packs []struct {
		Filename string
		Version  string
		Files    []struct{ Path string }
	}
	if err := json.Unmarshal(npm(".", "pack", "--json", "--pack-destination", to), &packs); err != nil || len(packs) != 1 {
		t.Fatalf("%d packages (%v)", len(packs), err)
	}
	var files []string
	for _, f := range packs[0].Files {
		files = append(files, f.Path)
	}
	slices.Sort(files)
	if want := []string{"LICENSE", "README.md", "gapless.d.ts", "gapless.js", "package.json", "react.d.ts", "react.js"}; !slices.Equal(files, want) {
		t.Errorf("the package has %q, not %q", files, want)
	}
	contract, err := os.ReadFile(filepath.Join("..", "openapi.yaml"))
	if version := regexp.MustCompile(`(?m)^  version: (.+)$`).FindSubmatch(contract); err != nil || version == nil || string(version[1]) != packs[0].Version {
		t.Errorf("the package has version %s, the contract %s (%v)", packs[0].Version, version, err)
	}
	npm(to, "install", "--no-audit", "--no-fund", "./"+packs[0].Filename)
	return to
}

// What npm packs can be installed and used: in Node, with React, and with TypeScript.
func TestPackage_isInstalledAndUsed(t *testing.T) {
	t.Parallel()
	to := packed(t)
	license, err := os.ReadFile(filepath.Join("..", "LICENSE"))
	if packed, err2 := os.ReadFile("LICENSE"); err != nil || err2 != nil || !bytes.Equal(license, packed) {
		t.Errorf("web/LICENSE is not LICENSE (%v, %v)", err, err2)
	}

	// The example is JSX, which TypeScript translates.
	example := filepath.Join("..", "examples", "react", "Chat.jsx")
	text, err := os.ReadFile(example)
	if err != nil || strings.Count(string(text), "\n") > 15 {
		t.Errorf("%s has %d lines (%v)", example, strings.Count(string(text), "\n"), err)
	}
	consumer := `import { follow, type State } from 'gapless';
import { useGapless } from 'gapless/react';
export function Chat() {
	const { messages, state, seq, ask, stop, restart } = useGapless('s', { server: 'https://chat.example', headers: { A: 'b' }, onEnd: (why) => console.log(why) });
	const s: State = state;
	const texts: string[] = messages.map((m) => m.content + m.status + (m.reasoning ?? ''));
	const n: number = seq;
	const asked: Promise<{ reply_message_id: string }> = ask('Why?');
	stop(); stop('m'); restart();
	useGapless(undefined); useGapless(null);
	// @ts-expect-error There is no such setting.
	useGapless('s', { onChunks() {} });
	// @ts-expect-error It is text.
	ask(5);
	return [s, texts, n, asked, follow];
}
`
	for name, text := range map[string][]byte{"Chat.jsx": text, "consumer.ts": []byte(consumer)} {
		if err := os.WriteFile(filepath.Join(to, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tsc := func(args ...string) {
		t.Helper()
		cmd := exec.Command("node", append([]string{filepath.Join("node_modules", "typescript", "bin", "tsc"), "--ignoreConfig", "--target", "es2022", "--module", "nodenext", "--lib", "es2023,dom,dom.iterable"}, args...)...)
		cmd.Dir = to
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tsc: %v\n%s", err, out)
		}
	}
	tsc("--strict", "--noEmit", "--exactOptionalPropertyTypes", "consumer.ts")
	tsc("--allowJs", "--jsx", "react-jsx", "--outDir", "made", "Chat.jsx")

	// A component shows an answer that is cut in the middle, and whose connection comes back.
	n := start(t)
	line := newProxy(t, n)
	line.mu.Lock()
	line.cuts = []cut{where(`word 20 ()`), where(`word 40 ()`)}
	line.mu.Unlock()
	cmd := exec.Command("node", "render.mjs", line.url(""), "s")
	cmd.Dir = to
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	shown := json.NewDecoder(out)
	type rendered struct {
		State    string
		Messages []string
	}
	next := func() (r rendered) { // fails when nothing else is shown any more
		t.Helper()
		kill := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		if err := shown.Decode(&r); err != nil {
			t.Fatalf("%v\n%s", err, &stderr)
		}
		return r
	}
	for r := next(); r.State != "live"; r = next() {
		if len(r.Messages) > 0 {
			t.Errorf("at first it shows %q", r.Messages)
		}
	}
	want := []string{"user: Why?", "assistant: ", "tool: one two "}
	said := []chunk{{Type: "message", MessageID: "q", Role: "user", Content: "Why?"}}
	for i := range 60 {
		said = append(said, chunk{MessageID: "a", Content: fmt.Sprintf("word %d ", i)})
		want[1] += said[len(said)-1].Content
	}
	said = append(said, chunk{Role: "tool", Content: "one "}, chunk{Role: "tool", Content: "two "}, chunk{Type: "done", MessageID: "a"})
	for _, c := range said {
		n.post(t, "/v1/sessions/s/chunks", c)
	}
	var last rendered
	for last = next(); !slices.Equal(last.Messages, want) || last.State != "live"; last = next() {
	}
	if got := len(line.seen()); got != 3 {
		t.Errorf("%d streams, not 3", got)
	}
	n.post(t, "/v1/sessions/s/chunks", chunk{Type: "end"})
	for last = next(); last.State != "ended"; last = next() {
	}
	if !slices.Equal(last.Messages, want) {
		t.Errorf("it ends with %q", last.Messages)
	}
	if err := cmd.Wait(); err != nil { // unmounted, nothing keeps the program running
		t.Errorf("%v\n%s", err, &stderr)
	}
}
