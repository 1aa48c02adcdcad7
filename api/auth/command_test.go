package auth

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// run runs a command as a shell does.
func run(command func([]string, *bytes.Buffer, *bytes.Buffer) int, args ...string) (code int, out, problems string) {
	var o, p bytes.Buffer
	code = command(args, &o, &p)
	return code, strings.TrimSpace(o.String()), p.String()
}

func makeToken(args []string, out, problems *bytes.Buffer) int  { return token(args, out, problems) }
func makeSecret(args []string, out, problems *bytes.Buffer) int { return secret(args, out, problems) }

func TestCommands_aTokenThatIsMadeIsAcceptedAndToldOf(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	code, made, _ := run(makeSecret)
	if code != 0 || len(made) != 64 {
		t.Fatalf("secret: %d %q", code, made)
	}
	if _, again, _ := run(makeSecret); again == made {
		t.Error("two secrets are equal")
	}
	if err := os.WriteFile(file, []byte(made+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, text, problems := run(makeToken, "-secret", file, "-sub", "ann", "-read", "chat-*,demo", "-ask", "chat-7", "-ttl", "1h")
	if code != 0 {
		t.Fatalf("token: %d %s", code, problems)
	}
	a, err := Open(Config{Source: "secret:" + file, Claim: "gapless"})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	g, err := a.Read(text)
	if err != nil || g.Subject != "ann" || !g.May(Read, "chat-1") || !g.May(Read, "demo") || !g.May(Ask, "chat-7") || g.May(Ask, "chat-8") || g.May(Write, "demo") {
		t.Errorf("%+v %v", g, err)
	}
	code, told, _ := run(makeToken, "-secret", file, "-check", text)
	if code != 0 || !strings.Contains(told, "subject  ann") || !strings.Contains(told, "read     chat-*, demo") || !strings.Contains(told, "ask      chat-7") || strings.Contains(told, "write") {
		t.Errorf("%d\n%s", code, told)
	}
	for _, c := range []struct {
		code int
		args []string
		says string
	}{
		{1, []string{"-secret", file, "-check", text[:len(text)-3]}, "token"},
		{1, []string{"-secret", file, "-check", "sesame"}, "three parts"},
		{2, []string{"-secret", file, "-read", "x"}, "-ttl"},
		{2, []string{"-secret", file, "-ttl", "1h"}, "allows nothing"},
		{2, []string{"-read", "x", "-ttl", "1h"}, "gapless secret"},
		{2, []string{"-secret", file + "x", "-read", "x", "-ttl", "1h"}, "no such file"},
		{2, []string{"-secret", file, "-read", "x", "-ttl", "soon"}, "-ttl"},
		{2, []string{"-secret", file, "-check", text, "-read", "x"}, "-check"},
		{2, []string{"-secret", file, "-read", "x", "-ttl", "1h", "more"}, "more"},
		{2, []string{"-secret", file, "-read", "a b", "-ttl", "1h"}, "pattern"},
	} {
		if code, out, problems := run(makeToken, c.args...); code != c.code || !strings.Contains(problems, c.says) || out != "" {
			t.Errorf("%q: %d %q %q", c.args, code, out, problems)
		}
	}
	if code, help, _ := run(makeToken, "-help"); code != 0 || !strings.Contains(help, "-secret") || !strings.Contains(help, "usage:") {
		t.Errorf("help: %d %s", code, help)
	}
}
