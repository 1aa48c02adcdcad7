package test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// SECURITY.md names the tests that prove its claims, and docs/faults.md those that hold what was repaired. They exist, and every row of these tables
// names one, except that of the linters.
func TestSecurity_theTestsThatItNamesExist(t *testing.T) {
	security, err := os.ReadFile("SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	faults, err := os.ReadFile("docs/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	_, found, _ := strings.Cut(string(faults), "## What was found")
	there := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	err = filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		code, err := os.ReadFile(path)
		for _, found := range function.FindAllSubmatch(code, -1) {
			there[string(found[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)\\w+)`")
	rows := 0
	for line := range strings.Lines(string(security) + found) {
		names := named.FindAllStringSubmatch(line, -1)
		for _, name := range names {
			if !there[name[1]] {
				t.Errorf("there is no test %s", name[1])
			}
		}
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| who | wants") || strings.HasPrefix(line, "| fault | found by") {
			continue
		}
		if rows++; len(names) == 0 && !strings.Contains(line, "`make lint`") {
			t.Errorf("no test shows this: %s", line)
		}
	}
	if rows < 70 {
		t.Errorf("there are %d rows: is it the table?", rows)
	}
}
