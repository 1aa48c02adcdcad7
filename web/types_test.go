package web_test

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write gapless.d.ts as it follows from gapless.js")

// gapless.js contains the types as JSDoc, and they are checked there. The declarations are
// generated from them, for programs in TypeScript.
func TestTypes_areSoundAndTheDeclarationsFollowFromThem(t *testing.T) {
	t.Parallel()
	from, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	// This is a separate folder, because the results are written next to the module that other
	// tests use.
	to := t.TempDir()
	for _, name := range []string{"gapless.js", "react.js", "consumer.ts", "package.json", "tsconfig.json"} {
		text, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tsc := func(args ...string) {
		t.Helper()
		cmd := exec.Command("node", append([]string{filepath.Join(from, "node_modules", "typescript", "bin", "tsc")}, args...)...)
		cmd.Dir = to
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tsc: %v\n%s", err, out)
		}
	}
	if err := os.Symlink(filepath.Join(from, "node_modules"), filepath.Join(to, "node_modules")); err != nil { // for React's types
		t.Fatal(err)
	}
	tsc("-p", ".")
	for _, name := range []string{"gapless", "react"} {
		made, err := os.ReadFile(filepath.Join(to, "types", name+".d.ts"))
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(name+".d.ts", made, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		kept, err := os.ReadFile(name + ".d.ts")
		if err != nil || !bytes.Equal(kept, made) {
			t.Fatalf("%s.d.ts is not what follows from %[1]s.js (%v): go test ./web -run TestTypes -update", name, err)
		}
	}

	// A consumer reads what is served: the declarations, without the module.
	if err := os.Rename(filepath.Join(to, "types", "gapless.d.ts"), filepath.Join(to, "gapless.d.ts")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(to, "gapless.js")); err != nil {
		t.Fatal(err)
	}
	tsc("--ignoreConfig", "--strict", "--noEmit", "--exactOptionalPropertyTypes", "--target", "es2022", "--module", "nodenext", "--lib", "es2023,dom,dom.iterable", "consumer.ts")
}
