package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The command line works as people expect: commands before flags, and a hint at what was meant.
func TestCommandLine_understandsWordsAndSaysWhatWasMeant(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args string
		code int
		says []string
	}{
		{"help", 0, []string{"usage:", "Limits", "  -redis URL", "gapless token"}},
		{"-help", 0, []string{"usage:"}},
		{"serve -help", 0, []string{"usage:"}},
		{"version", 0, []string{"gapless ", "go1."}},
		{"token -help", 0, []string{"usage: gapless token", "-check"}},
		{"secret x", 2, []string{"usage: gapless secret"}},
		{"help token", 0, []string{"usage: gapless token"}},
		{"help serve", 0, []string{"  -redis URL"}},
		{"doctor", 2, []string{"URL"}},
		{"verify", 2, []string{"URL"}},
		{"verify -help", 0, []string{"usage: gapless verify", "-until-end"}},
		{"docter http://127.0.0.1", 2, []string{`"docter"`, "did you mean gapless doctor?"}},
		{"serv", 2, []string{"did you mean gapless serve?"}},
		{"run", 2, []string{`"run"`, "gapless help"}},
		{"serve now", 2, []string{`"now"`}},
		{"-histroy-ttl 1h", 2, []string{"-histroy-ttl", "did you mean -history-ttl?"}},
		{"-port 80", 2, []string{"-port", "did you mean -listen?"}},
		{"-nonsense 80", 2, []string{"-nonsense", "gapless help"}},
		{"-window lots", 2, []string{"-window", "lots", "KiB"}},
		{"-listen 8080", 2, []string{"127.0.0.1:8080"}},
		{"-metrics 9090", 2, []string{"127.0.0.1:9090"}},
		{"-heartbeat 15", 2, []string{`-heartbeat: "15" is not a duration, such as 15s`}},
		{"-history-max 1e6", 2, []string{`-history-max: "1e6" is not a whole number`}},
		{"-h2c=maybe", 2, []string{`-h2c: "maybe" is neither true nor false`}},
		{"-log-level verbose", 2, []string{`-log-level: "verbose"`, "debug, info, warn or error"}},
	} {
		code, out := program(t, nil, strings.Fields(c.args)...)
		if code != c.code {
			t.Errorf("%s: exit status %d\n%s", c.args, code, out)
		}
		if lines := strings.Count(out, "\n"); code == 2 && lines > 1 && strings.HasPrefix(c.args, "-") {
			t.Errorf("%s is one mistake, and answered by %d:\n%s", c.args, lines, out)
		}
		for _, text := range c.says {
			if !strings.Contains(out, text) {
				t.Errorf("%s does not say %q:\n%s", c.args, text, out)
			}
		}
	}
	mistyped := filepath.Join(t.TempDir(), "mistyped")
	if err := os.WriteFile(mistyped, []byte("#!/bin/sh\nGAPLESS_LISTN=127.0.0.1:1 exec '"+binary+"' \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	n := startProgram(t, mistyped)
	if log := n.log.String(); !strings.Contains(log, "GAPLESS_LISTN: did you mean GAPLESS_LISTEN?") {
		t.Errorf("an unknown variable is not told of:\n%s", log)
	}
	_, help := program(t, nil, "help")
	if strings.Contains(help, "\nOther:\n") {
		t.Error("a flag is in no group of the help")
	}
}
