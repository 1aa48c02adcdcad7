package test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"gapless/api/auth/authtest"
)

// program runs the program to its end, which must come by itself.
func program(t *testing.T, env []string, args ...string) (code int, output string) {
	t.Helper()
	cmd := exec.CommandContext(deadline(t), binary, args...)
	cmd.Dir = t.TempDir()
	cmd.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0"), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

func TestStart_theFirstStartIsQuickWritesOnlyItsDataAndListensNowhereElse(t *testing.T) {
	t.Parallel()
	n := start(t)
	took := time.Since(n.begun)
	t.Logf("ready after %v", took) // under 1 s when it runs alone, without the race detector
	if took > slack {
		t.Errorf("ready only after %v", took)
	}
	session := newID() // use everything that could open something
	n.append(t, session, words(1, 3, `{"type":"end"}`))
	v := &viewer{session: session}
	v.follow(deadline(t), at(n.addr), nil)
	v.check(t, n.pages(t, session))
	if got := listening(t, n.cmd.Process.Pid); !slices.Equal(got, []string{n.addr}) {
		t.Errorf("the program listens on %v, and not only on %s", got, n.addr)
	}
	n.terminate()
	<-n.exited
	err := filepath.WalkDir(n.cmd.Dir, func(path string, _ fs.DirEntry, err error) error {
		if path != n.cmd.Dir && !strings.HasPrefix(path, filepath.Join(n.cmd.Dir, "gapless-data")) {
			t.Errorf("the program wrote %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// listening returns the addresses on which a process accepts connections or packets (proc(5)).
func listening(t *testing.T, pid int) (addrs []string) {
	t.Helper()
	mine := map[string]bool{}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("no file descriptors of %d: %v", pid, err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "socket:[") {
			mine[strings.Trim(strings.TrimPrefix(to, "socket:"), "[]")] = true
		}
	}
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6"} {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, proto))
		if err != nil {
			continue // no IPv6 here
		}
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line)
			if len(f) < 10 || !mine[f[9]] || strings.HasPrefix(proto, "tcp") && f[3] != "0A" {
				continue
			}
			ip, port, _ := strings.Cut(f[1], ":")
			if b, err := hex.DecodeString(ip); err == nil && len(b) == 4 {
				var p int
				_, _ = fmt.Sscanf(port, "%X", &p)
				addrs = append(addrs, fmt.Sprintf("%d.%d.%d.%d:%d", b[3], b[2], b[1], b[0], p))
				continue
			}
			addrs = append(addrs, proto+" "+f[1])
		}
	}
	unix, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/unix", pid))
	for line := range strings.Lines(string(unix)) {
		if f := strings.Fields(line); len(f) >= 7 && mine[f[6]] && f[3] == "00010000" {
			addrs = append(addrs, "unix "+strings.Join(f[7:], " "))
		}
	}
	return addrs
}

func TestStart_helpShowsEveryFlagWithItsDefault(t *testing.T) {
	t.Parallel()
	code, help := program(t, nil, "-help")
	if code != 0 {
		t.Errorf("-help exits with %d", code)
	}
	for name, value := range map[string]string{
		"listen": `"?127\.0\.0\.1:8080"?`, "redis": `"?embedded:gapless-data"?`, "prefix": `"?chat:"?`, "history-ttl": "24h(0m0s)?", "history-max": "100000", "history-order": `"?oldest-first"?`,
		"chunk-max": "64 ?KiB", "heartbeat": "15s", "reconcile": "2s", "window": "256 ?KiB", "window-total": "256 ?MiB", "write-timeout": "2m(0s)?",
		"linger": "10s", "drain": "10s", "log-level": "(?i)info", "log-format": `"?text"?`, "model": `"?demo"?`,
		"auth-claim": `"?gapless"?`,
	} {
		if !regexp.MustCompile(`(?m)^  -` + name + `\b[^\n]*(\n[ \t]+[^-\s][^\n]*)*\(default ` + value + `\)`).MatchString(help) {
			t.Errorf("-help does not show -%s with its default %s", name, value)
		}
	}
	if !strings.Contains(help, "GAPLESS_") {
		t.Error("-help does not tell of the environment variables")
	}
	if t.Failed() {
		t.Log(help)
	}
}

// reported runs the program with mistakes, and checks that its output names each of them.
func reported(t *testing.T, env, args, mistakes []string) {
	t.Helper()
	code, out := program(t, env, args...)
	if code == 0 {
		t.Errorf("the program ran with %v %v", env, args)
	}
	for _, m := range mistakes {
		if !strings.Contains(out, m) {
			t.Errorf("%s is not reported", m)
		}
	}
	if t.Failed() {
		t.Logf("exit code %d\n%s", code, out)
	}
}

func TestStart_allMistakesOfMeaningAreReportedTogether(t *testing.T) {
	t.Parallel()
	reported(t, []string{"GAPLESS_LINGER=-1s", "GAPLESS_WINDOW=lots"}, []string{
		"-listen", "nowhere", "-redis", "http://localhost", "-history-ttl", "1ms", "-history-max", "0", "-history-order", "sideways", "-chunk-max", "3B", "-prefix", "{a}",
		"-heartbeat", "0s", "-reconcile", "-1s", "-write-timeout", "0s", "-drain", "-1s", "-model", "oracle", "-log-format", "xml",
		"-auth", "secret:/no/such/file", "-auth-claim", "", "-auth-cookie", "a b", "-cors-origins", "https://a.example/,*", "-insecure-open", "extra",
	}, []string{
		"-auth", "/no/such/file", "-auth-claim", "-auth-cookie", "https://a.example/", `"*"`, "-insecure-open",
		"-listen", "-redis", "-prefix", "-history-ttl", "-history-max", "-history-order", "-chunk-max", "-heartbeat", "-reconcile", "-write-timeout", "-drain",
		"-model", "-log-format", "-linger", "GAPLESS_WINDOW", `"extra"`,
	})
}

func TestStart_allMistakesOfFormAreReportedTogether(t *testing.T) {
	t.Parallel()
	reported(t, []string{"GAPLESS_HISTORY_MAX=many"}, []string{
		"-heartbeat", "soon", "-window", "lots", "-log-level", "shout", "-history-order", "sideways", "-nonsense", "1",
	}, []string{"-heartbeat", "-window", "-log-level", "-history-order", "-nonsense", "GAPLESS_HISTORY_MAX"})
}

func TestStart_environmentVariablesSetWhatFlagsDoNot(t *testing.T) {
	t.Setenv("GAPLESS_NODE", "from-the-environment")
	t.Setenv("GAPLESS_HISTORY_MAX", "3")
	t.Setenv("GAPLESS_HEARTBEAT", "50ms")
	t.Setenv("GAPLESS_LOG_FORMAT", "json")
	n := start(t, "-log-format", "text", "-history-max", "4") // flags take precedence
	session := newID()
	n.append(t, session, words(1, 6))
	v := &viewer{session: session}
	v.connect(deadline(t), n.addr, func(event) bool { return v.cursor == 6 })
	if w := v.welcomes[0]; w.Node != "from-the-environment" || w.First != 3 {
		t.Errorf("welcome: %+v", w)
	}
	beats := &viewer{session: session, query: "?after=6"}
	beats.raw(deadline(t), n.addr, func(b []byte) bool {
		return beats.feed(b, func(event) bool { return true }) && beats.comments < 4
	})
}

func TestStart_anAddressThatIsTakenIsAnErrorThatNamesIt(t *testing.T) {
	t.Parallel()
	n := start(t)
	code, out := program(t, nil, "-listen", n.addr)
	if code == 0 || !strings.Contains(out, n.addr) {
		t.Errorf("exit code %d: %s", code, out)
	}
}

func TestStart_healthPageAndContractAreServed(t *testing.T) {
	t.Parallel()
	n := start(t)
	for path, kind := range map[string]string{"/healthz": "application/json", "/readyz": "application/json", "/openapi.yaml": "application/yaml", "/docs": "text/html", "/": "text/html"} {
		a := n.get(path)
		if a.status != http.StatusOK || !strings.HasPrefix(a.header.Get("Content-Type"), kind) || a.body == "" {
			t.Errorf("%s: %d %s", path, a.status, a.header.Get("Content-Type"))
		}
	}
	if b := n.get("/readyz").body; strings.Contains(b, "memory") {
		t.Errorf("a node on disk says %s", b)
	}
	if b := start(t, "-redis", "embedded").get("/readyz").body; !strings.Contains(b, `"data":"memory"`) {
		t.Errorf("a node in memory says %s", b)
	}
	if n.get("/openapi.yaml").body != string(contract()) {
		t.Error("/openapi.yaml is not openapi.yaml")
	}
}

func TestStart_aSessionIsMadeDescribedAndDeleted(t *testing.T) {
	t.Parallel()
	n := start(t)
	var made, again, described struct {
		ID, Epoch string
		First     int64 `json:"first_seq"`
		Last      int64 `json:"last_seq"`
		Ended     bool
		Viewers   int
	}
	a := n.post("/v1/sessions", "application/json", `{}`)
	decode(t, a.body, &made)
	if a.status != http.StatusCreated || a.header.Get("Location") != "/v1/sessions/"+made.ID || len(made.ID) != 36 || made.First != 1 || made.Last != 0 {
		t.Errorf("made: %d %v %s", a.status, a.header, a.body)
	}
	a = n.post("/v1/sessions", "application/json", `{"id":"`+made.ID+`"}`)
	decode(t, a.body, &again)
	if a.status != http.StatusOK || again.Epoch != made.Epoch {
		t.Errorf("made again: %d %s", a.status, a.body)
	}
	n.append(t, made.ID, words(1, 2))
	ctx, cancel := context.WithCancel(deadline(t))
	v := &viewer{session: made.ID}
	wait := background(t, func() { v.connect(ctx, n.addr, nil) })
	eventually(t, "the viewer has both", func() bool { return v.seen.Load() == 2 })
	decode(t, n.get("/v1/sessions/"+made.ID).body, &described)
	if described.Last != 2 || described.Viewers != 1 || described.Ended {
		t.Errorf("described: %+v", described)
	}
	cancel()
	wait()
	eventually(t, "the viewer is counted out", func() bool {
		decode(t, n.get("/v1/sessions/"+made.ID).body, &described)
		return described.Viewers == 0
	})
	if a := n.do(deadline(t), "DELETE", "/v1/sessions/"+made.ID, "", nil); a.status/100 != 2 {
		t.Errorf("delete: %d %s", a.status, a.body)
	}
	if a := n.get("/v1/sessions/" + made.ID); a.status != http.StatusNotFound {
		t.Errorf("a deleted one: %d", a.status)
	}
}

// If the URL was not quoted, a password that contains a space becomes several arguments.
func TestStart_noArgumentIsRepeatedThatMayBeAPartOfAPassword(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"-redis", "redis://:12", "s3same@h:6379"}, {"-redis", "redis://:12", "-s3same@h:6379"}, {"-redis", "redis://:12", "-s3same", "x@h"},
		{"-redis", "redis://us", "er:s3same@h"}, {"-redis", "redis://us", "-er:s3same@h"}, {"--redis=redis://:ab", "-s3same=x@h", "-drain", "1s"}, {"-redis=redis://:ab", "s3same", "x@h"}, {"-redis", "redis://u:ab/s3same@h"},
	} {
		if code, out := program(t, nil, args...); code != 2 || strings.Contains(out, "s3same") || !strings.Contains(out, "-redis: ") {
			t.Errorf("%q: %d %s", args, code, out)
		}
	}
	if code, out := program(t, []string{"GAPLESS_REDIS=redis://u:12#s3same@h"}); code != 2 || strings.Contains(out, "s3same") || !strings.Contains(out, "%23") {
		t.Errorf("GAPLESS_REDIS: %d %s", code, out)
	}
	if code, out := program(t, nil, "-redis", "redis://h", "-histroy-ttl", "1h"); code != 2 || !strings.Contains(out, "-histroy-ttl") {
		t.Errorf("a mistyped flag is not named: %d %s", code, out)
	}
}

// The demo's calls exist where they were requested, or where nobody else can call.
func TestStart_demoIsServedWhereItWasAskedFor(t *testing.T) {
	t.Parallel()
	issuer := authtest.New(t)
	for _, c := range []struct {
		args   []string
		served bool
	}{{nil, true}, {[]string{"-auth", issuer.Source()}, false}, {[]string{"-auth", issuer.Source(), "-demo"}, true}, {[]string{"-demo=false"}, false}} {
		n := start(t, c.args...)
		// Without a token the status is 401 if the call exists, and 404 if it does not.
		res, err := http.Get(n.url("/v1/sessions/s/demo/naive?gap=x")) // the contract is that of a server with the demo
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if (res.StatusCode != 404) != c.served {
			t.Errorf("%q: %d", c.args, res.StatusCode)
		}
	}
	reported(t, nil, []string{"-demo", "-model-url", "https://model.example/v1", "-model-name", "m"}, []string{"-demo: needs -model demo"})
}
