package test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// guides returns the README and the files of docs/.
func guides(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob("docs/*.md")
	if err != nil || len(all) < 10 {
		t.Fatalf("%d files in docs (%v)", len(all), err)
	}
	return append(all, "README.md")
}

// blocks returns the contents of a file's code blocks of a language.
func blocks(t *testing.T, file, language string) (all []string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllSubmatch(text, -1) {
		all = append(all, string(found[1]))
	}
	return all
}

// Each sh block of the documentation runs, in order, exactly as written: none fails, and none hangs. (Commands that
// need a model's key, or a Redis on its usual port, are text blocks.)
func TestDocs_everyCommandRuns(t *testing.T) {
	t.Parallel()
	for _, file := range guides(t) {
		commands := blocks(t, file, "sh")
		if len(commands) == 0 {
			continue
		}
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			n := start(t)
			dir := t.TempDir()
			if err := os.Symlink(binary, filepath.Join(dir, "gapless")); err != nil {
				t.Fatal(err)
			}
			script := "curl() { command curl -sS --fail-with-body \"$@\"; echo; }\n" + strings.Join(commands, "\n")
			script = strings.ReplaceAll(script, "127.0.0.1:8080", n.addr)
			script = strings.ReplaceAll(script, "127.0.0.1:8090", free(t))
			cmd := exec.CommandContext(deadline(t), "bash", "-euo", "pipefail", "-c", script)
			cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// free returns an address on which nobody listens.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// The README's back ends, in Python and in Node, upload an answer, and all of it is stored.
func TestDocs_backEndsOfTheReadme(t *testing.T) {
	t.Parallel()
	n := start(t)
	host, port, _ := net.SplitHostPort(n.addr)
	python := blocks(t, "README.md", "python")
	js := blocks(t, "README.md", "js")
	if len(python) != 1 || len(js) != 2 {
		t.Fatalf("the README has %d blocks of Python and %d of JavaScript", len(python), len(js))
	}
	node := strings.ReplaceAll(js[1], "127.0.0.1:8080", n.addr) +
		"\nasync function* words() { yield 'Said '; yield 'without '; yield 'a gap.'; }\nconsole.log((await upload('node', words())).status)\n"
	for name, cmd := range map[string]*exec.Cmd{
		"python": exec.CommandContext(deadline(t), "/usr/bin/python3", "-c", strings.Replace(python[0], `"127.0.0.1", 8080`, `"`+host+`", `+port, 1)),
		"node":   exec.CommandContext(deadline(t), "node", "--input-type=module", "-e", node),
	} {
		out, err := cmd.CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "201" {
			t.Errorf("%s: %v %s", name, err, out)
			continue
		}
		a := n.get("/v1/sessions/" + name + "/chunks")
		var said strings.Builder
		for _, found := range regexp.MustCompile(`"content":"([^"]*)"`).FindAllStringSubmatch(a.body, -1) {
			said.WriteString(found[1])
		}
		if said.String() != "Said without a gap." || !strings.Contains(a.body, `"type":"done"`) {
			t.Errorf("%s: %s", name, a.body)
		}
	}
}

// docs/configuration.md documents every flag, with its default, and no other.
func TestDocs_everyFlagIsExplained(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`-[^|]*) \\| ([^|]*)\\|").FindAllStringSubmatch(string(page), -1) {
		defaults := strings.Split(strings.TrimSpace(row[2]), ", ")
		for i, name := range regexp.MustCompile("`-([a-z0-9-]+)`").FindAllStringSubmatch(row[1], -1) {
			explained[name[1]] = defaults[min(i, len(defaults)-1)]
		}
	}
	_, help := program(t, nil, "-help")
	flags := regexp.MustCompile(`(?m)^  -([a-z0-9-]+)\b[^\n]*((?:\n[ \t]+[^-\s][^\n]*)*)`).FindAllStringSubmatch(help, -1)
	if len(flags) < 40 {
		t.Fatalf("%d flags in -help", len(flags))
	}
	for _, f := range flags {
		name := f[1]
		said, ok := explained[name]
		delete(explained, name)
		if !ok {
			t.Errorf("-%s is not in docs/configuration.md", name)
			continue
		}
		value := regexp.MustCompile(`\(default "?([^")]*)"?\)`).FindStringSubmatch(f[2])
		if value == nil || !strings.HasPrefix(said, "`") { // it has no default, or one described in words
			continue
		}
		plain := func(s string) string {
			s = strings.TrimSuffix(strings.TrimSuffix(strings.ReplaceAll(strings.ReplaceAll(strings.ToLower(s), " ", ""), ".0", ""), "0s"), "0m")
			if s == "" {
				return "0"
			}
			return s
		}
		if want, _, _ := strings.Cut(strings.Trim(said, "`"), "`"); plain(want) != plain(value[1]) {
			t.Errorf("-%s: the default is %s, docs/configuration.md says %s", name, value[1], said)
		}
	}
	delete(explained, "help")
	for name := range explained {
		t.Errorf("docs/configuration.md has -%s, and the program has not", name)
	}
}
