package test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// release runs deploy/release.sh in a directory. It returns the binary and its SHA256SUMS.
func release(t *testing.T, source string, env ...string) (binary, sums string) {
	t.Helper()
	out := t.TempDir()
	cmd := exec.CommandContext(t.Context(), filepath.Join(source, "deploy", "release.sh"), out)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), append(env, "VERSION=v1.2.3", "COMMIT=c0ffee", "PLATFORMS=linux/amd64")...)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	text, err := os.ReadFile(filepath.Join(out, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(out, "gapless-v1.2.3-linux-amd64"), string(text)
}

// The second build is at another place, without a compiler cache, and with flags in the environment that would change
// it. make test runs it separately, because such a build takes long, and leaves little of the machine to other tests.
func TestRelease_twoBuildsAreEqualAndSayTheirVersion(t *testing.T) {
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	err = filepath.WalkDir(here, func(path string, entry fs.DirEntry, err error) error {
		to := filepath.Join(other, strings.TrimPrefix(path, here))
		switch {
		case err != nil:
			return err
		case entry.Name() == ".git" || entry.Name() == "node_modules":
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		case entry.IsDir():
			return os.MkdirAll(to, 0o700)
		case !entry.Type().IsRegular():
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		return os.WriteFile(to, text, info.Mode())
	})
	if err != nil {
		t.Fatal(err)
	}
	built, first := release(t, here)
	_, second := release(t, other, "GOCACHE="+t.TempDir(), "GOAMD64=v2")
	if first != second || !strings.Contains(first, "gapless-v1.2.3-linux-amd64") {
		t.Errorf("%s%s", first, second)
	}
	said, err := exec.CommandContext(t.Context(), built, "-version").Output()
	if err != nil || !strings.HasPrefix(string(said), "gapless v1.2.3 c0ffee go1.") {
		t.Errorf("it says %q (%v)", said, err)
	}
}
