package cli

import (
	"flag"
	"strings"
	"testing"
)

func TestNearest_isWhatWasMeant(t *testing.T) {
	names := []string{"history-ttl", "history-max", "history-order", "heartbeat", "redis", "redis-ca", "redis-key", "listen", "auth", "h2c"}
	for typed, meant := range map[string]string{
		"histroy-ttl": "history-ttl", "history_max": "history-max", "hearbeat": "heartbeat", "lisen": "listen", "reddis": "redis", "aut": "auth",
		"nonsense": "", "x": "", "port": "",
	} {
		if got := Nearest(typed, names); got != meant {
			t.Errorf("%s: %q, not %q", typed, got, meant)
		}
	}
}

func TestUnknown_namesTheVariableThatWasMeant(t *testing.T) {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.String("history-ttl", "", "")
	got := Unknown([]string{"PATH=/", "GAPLESS_HISTORY_TTL=1h", "GAPLESS_HISTORY_TLL=1h", "GAPLESS_MODEL_KEY=k", "GAPLESS_XYZZY=1"}, fs, "GAPLESS_MODEL_KEY")
	if len(got) != 2 || !strings.Contains(got[0], "GAPLESS_HISTORY_TLL: did you mean GAPLESS_HISTORY_TTL?") || !strings.HasSuffix(got[1], "GAPLESS_XYZZY") {
		t.Errorf("%q", got)
	}
}

func TestHelp_hasEachFlagOnceAndNoGroupNamesOneThatIsNot(t *testing.T) {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	seen := map[string]bool{}
	for _, g := range groups {
		for _, name := range g.flags {
			if seen[name] {
				t.Fatalf("-%s is in two groups", name)
			}
			seen[name] = true
			fs.String(name, "default-of-"+name, "what "+name+" does")
		}
	}
	fs.String("new-one", "", "in no group")
	var b strings.Builder
	Help(&b, fs)
	for name := range seen {
		if strings.Count(b.String(), "\n  -"+name+" ") != 1 || !strings.Contains(b.String(), "(default \"default-of-"+name+"\")") {
			t.Errorf("-%s is not there once, with its default", name)
		}
	}
	if !strings.Contains(b.String(), "Other:\n  -new-one") {
		t.Error("a flag in no group is left out")
	}
}

func TestWelcome_saysWhereEverythingIs(t *testing.T) {
	text := Welcome("http://127.0.0.1:8080/", "in a directory")
	for _, part := range []string{"page   http://127.0.0.1:8080/\n", "http://127.0.0.1:8080/docs\n", "curl -N http://127.0.0.1:8080/v1/sessions/demo/stream\n", "data   in a directory\n"} {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in %s", part, text)
		}
	}
}
