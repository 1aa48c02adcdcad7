// Vulncheck holds this module, and what it is built with, against Go's database of known
// vulnerabilities, by govulncheck, and fails on one that the code can reach.
//
// The database is vuln.go.dev; where that cannot be reached, the one that its sources
// make, which the Go module proxy has (golang.org/x/vulndb), some days older. Where neither can be
// reached nothing is held against anything, and that is said aloud; with VULNCHECK=required
// it is an error.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/version"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// What is known, and no danger here. An entry that is not found any more has to go.
var accepted = map[string]string{
	"GO-2026-6872": "echo's rate limiter trusts X-Forwarded-For: it is not used, and api sets its own IPExtractor",
	"GO-2026-6875": "echo's reverse proxy forwards X-Real-IP: it is not used",
}

const tool = "golang.org/x/vuln/cmd/govulncheck@v1.9.0"

func main() {
	dir, err := os.MkdirTemp("", "vulncheck-")
	if err == nil {
		err = check(dir)
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check(dir string) error {
	db, err := database(dir)
	if err != nil {
		if os.Getenv("VULNCHECK") == "required" {
			return fmt.Errorf("no database of vulnerabilities: %w", err)
		}
		fmt.Println("NOT CHECKED for known vulnerabilities: neither vuln.go.dev nor the module proxy can be reached:", err)
		return nil
	}
	out, err := run("", "go", "run", tool, "-db", db, "-format", "json", "./...")
	if err != nil {
		return fmt.Errorf("govulncheck: %w", err)
	}
	runs, fixed, err := read(out)
	if err != nil {
		return err
	}
	return judge(runs, fixed)
}

// database is a URL of one.
func database(dir string) (string, error) {
	const public = "https://vuln.go.dev"
	client := &http.Client{Timeout: 10 * time.Second}
	answer, err := client.Get(public + "/index/db.json")
	if err == nil {
		_ = answer.Body.Close()
		if answer.StatusCode == http.StatusOK {
			fmt.Println("database:", public)
			return public, nil
		}
		err = fmt.Errorf("%s: %s", public, answer.Status)
	}
	out, failed := run("", "go", "mod", "download", "-json", "golang.org/x/vulndb@latest")
	var module struct{ Dir, Version string }
	if failed == nil {
		failed = json.Unmarshal(out, &module)
	}
	if failed != nil {
		return "", errors.Join(err, failed)
	}
	fmt.Println("database: made of golang.org/x/vulndb", module.Version)
	made := filepath.Join(dir, "db")
	_, failed = run(module.Dir, "go", "run", "./cmd/indexdb", "-vulns", filepath.Join("data", "osv"), "-out", made)
	return "file://" + made, failed
}

func run(dir, name string, args ...string) ([]byte, error) {
	c := exec.Command(name, args...)
	c.Dir = dir
	var failure bytes.Buffer
	c.Stderr = &failure
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, failure.String())
	}
	return out, err
}

// read answers which Go was looked at, and of what the code can reach by which version it is mended, if by any.
func read(out []byte) (runs string, fixed map[string]string, err error) {
	fixed = map[string]string{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var message struct {
			Config *struct {
				GoVersion string `json:"go_version"`
			}
			Finding *struct {
				OSV   string `json:"osv"`
				Fixed string `json:"fixed_version"`
				Trace []struct{ Module, Function string }
			}
		}
		switch err := dec.Decode(&message); {
		case err == io.EOF:
			return runs, fixed, nil
		case err != nil:
			return "", nil, fmt.Errorf("what govulncheck says: %w", err)
		}
		if message.Config != nil {
			runs = message.Config.GoVersion
		}
		if f := message.Finding; f != nil && len(f.Trace) > 0 && f.Trace[0].Function != "" {
			fixed[f.OSV] = strings.TrimSpace(f.Trace[0].Module + " " + f.Fixed)
		}
	}
}

// judge fails on what is in the modules, and not accepted. What is in this machine's Go is not of this
// repository: it is said, and required of those who release (VULNCHECK=required).
func judge(runs string, fixed map[string]string) error {
	var errs []error
	var ofGo []string
	newest := runs
	for id, by := range fixed {
		module, mended, _ := strings.Cut(by, " ")
		switch {
		case module == "stdlib":
			ofGo = append(ofGo, id)
			if v := "go" + strings.TrimPrefix(mended, "v"); version.Compare(v, newest) > 0 {
				newest = v
			}
		case accepted[id] == "":
			errs = append(errs, fmt.Errorf("https://pkg.go.dev/vuln/%s can be reached, in %s, mended by %q", id, module, mended))
		}
	}
	for id, why := range accepted {
		if fixed[id] == "" {
			errs = append(errs, fmt.Errorf("%s is not found any more: take it off the list (%s)", id, why))
		} else {
			fmt.Printf("%s: %s\n", id, why)
		}
	}
	if len(ofGo) > 0 {
		slices.Sort(ofGo)
		said := fmt.Sprintf("this machine's %s has %d known vulnerabilities that can be reached; build with %s or later: %s", runs, len(ofGo), newest, strings.Join(ofGo, " "))
		if os.Getenv("VULNCHECK") == "required" {
			errs = append(errs, errors.New(said))
		} else {
			fmt.Println("WARNING:", said)
		}
	}
	return errors.Join(errs...)
}
