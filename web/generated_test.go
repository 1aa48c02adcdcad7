package web_test

import (
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Clients are generated from the contract as a node serves it, by the most used generators, and run
// against that node. A call, a shape or a problem that they cannot express fails to compile.

// oapiCodegen is the generator. .ci/setup, which reads this line, compiles it and fetches what the
// clients need.
const oapiCodegen = "github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2"

// workshop returns a folder with a program of testdata and the contract that a node serves.
func workshop(t *testing.T, n *node, program string) (dir string, run func(name string, args ...string) string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "generated", program))); err != nil {
		t.Fatal(err)
	}
	r, err := http.Get(n.url("/openapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "openapi.yaml"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
}

func TestGenerated_goClientMakesEveryCall(t *testing.T) {
	t.Parallel()
	n := start(t)
	dir, run := workshop(t, n, "go")
	if err := os.Mkdir(filepath.Join(dir, "gapless"), 0o700); err != nil {
		t.Fatal(err)
	}
	run("go", "run", oapiCodegen, "-generate", "types,client", "-package", "gapless", "-o", "gapless/gapless.go", "openapi.yaml")
	run("go", "vet", "./...")
	if out := run("go", "run", ".", n.url("")); out != "all calls work\n" {
		t.Errorf("%q", out)
	}
}

func TestGenerated_typeScriptClientMakesEveryCall(t *testing.T) {
	t.Parallel()
	n := start(t)
	_, run := workshop(t, n, "ts")
	run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--loglevel=error")
	run("node_modules/.bin/openapi-typescript", "openapi.yaml", "-o", "gapless.d.ts")
	run("node_modules/.bin/tsc", "-p", ".")
	if out := run("node", "out/client.js", n.url("")); out != "all calls work\n" {
		t.Errorf("%q", out)
	}
}
