// Package cli is the command line around the server's flags: subcommands, help, and messages about
// mistakes.
package cli

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/agext/levenshtein"

	"gapless/api/auth"
	"gapless/api/doctor"
	"gapless/api/verify"
)

// Commands returns the subcommands other than serve, by name. Each returns its exit status.
func Commands() map[string]func(ctx context.Context, args []string, env func(string) (string, bool)) int {
	all := maps.Clone(doctor.Commands)
	maps.Copy(all, auth.Commands)
	maps.Copy(all, verify.Commands)
	return all
}

// usage is the first part of the help.
const usage = `Gapless streams AI answers by Server-Sent Events and never loses, duplicates or reorders a chunk.

usage:
  gapless [serve] [flags]      serve
  gapless doctor [flags] URL   find out why a server does not stream
  gapless verify [flags] URL   follow a stream through cuts, and check that all of it came
  gapless secret               print a new secret for -auth secret:FILE
  gapless token [flags]        make a token, or check one
  gapless live URL             exit with 0 if the server is alive
  gapless ready URL            exit with 0 if the server is ready (URL?for=writes: also for appends)
  gapless version              print the version
  gapless help                 print this text

"gapless COMMAND -help" explains a command. Each flag of serve is also an environment variable: -history-ttl is
GAPLESS_HISTORY_TTL. A flag wins over its variable.
`

// Welcome returns what a server prints on a terminal when it has started. page is its address, with a slash at the
// end, and data says where the data is.
func Welcome(page, data string) string {
	return fmt.Sprintf(`
  page   %[1]s
  API    %[1]sdocs
  try    curl -N %[1]sv1/sessions/demo/stream
  data   %[2]s

`, page, data)
}

// group is a part of the help.
type group struct {
	title string
	flags []string
}

// groups are the parts of the help, in order.
var groups = []group{
	{"Listening", []string{"listen", "tls-cert", "tls-key", "h2c", "hosts", "trusted-proxies", "cors-origins", "metrics", "pprof", "node"}},
	{"Access", []string{"auth", "auth-issuer", "auth-audience", "auth-claim", "auth-cookie", "insecure-open"}},
	{"Redis", []string{"redis", "prefix", "redis-ca", "redis-cert", "redis-key", "wait-replicas", "wait-timeout"}},
	{"Logs of sessions", []string{"history-ttl", "history-max", "history-bytes", "history-order", "chunk-max", "grace"}},
	{"Delivery", []string{"heartbeat", "reconcile", "linger", "write-timeout", "window", "window-total", "snapshot-max", "drain", "plain"}},
	{"Models", []string{"model", "model-url", "model-name", "model-options", "model-timeout", "model-stall", "model-context", "model-answer-max", "demo"}},
	{"Limits (0: none)", []string{"connections", "caller-connections", "strangers", "caller-strangers", "stranger-bytes", "responses", "caller-responses", "viewers", "caller-viewers", "feeds", "uploads", "caller-uploads", "answers", "caller-answers",
		"bodies", "caller-bodies", "naive", "caller-naive", "caller-calls", "caller-appends", "caller-stored", "caller-sessions", "caller-tickets", "session-names", "body-max", "batch-max", "batch-bytes", "url-max", "header-max",
		"header-timeout", "body-timeout", "idle-timeout"}},
	{"Logging", []string{"log-level", "log-format", "version"}},
}

// Help prints the help of the flags of fs. Flags that are in no group come last.
func Help(w io.Writer, fs *flag.FlagSet) {
	fmt.Fprint(w, usage)
	var rest []string
	fs.VisitAll(func(f *flag.Flag) {
		if !slices.ContainsFunc(groups, func(g group) bool { return slices.Contains(g.flags, f.Name) }) {
			rest = append(rest, f.Name)
		}
	})
	for _, g := range append(slices.Clip(groups), group{"Other", rest}) {
		part := flag.NewFlagSet("", flag.ContinueOnError)
		part.SetOutput(w)
		some := false
		for _, name := range g.flags {
			if f := fs.Lookup(name); f != nil {
				part.Var(f.Value, f.Name, f.Usage)
				part.Lookup(name).DefValue = f.DefValue
				some = true
			}
		}
		if some {
			fmt.Fprintf(w, "\n%s:\n", g.title)
			part.PrintDefaults()
		}
	}
}

// Parse reads flags from arguments, and those that are not given from their environment variables (Variable). It returns which flags are
// given, and every mistake, with a hint. If it returns nothing, -help was given, and the help was printed. If explain recognizes the
// arguments that follow a mistake, its error is returned instead: they may contain a secret.
func Parse(fs *flag.FlagSet, args []string, env func(string) (string, bool), explain func(rest []string) error) (given map[string]bool, errs []error) {
	fs.SetOutput(io.Discard) // it would print the usage after each mistake
	for {
		err := fs.Parse(args)
		if args = fs.Args(); err == nil {
			break
		}
		if errors.Is(err, flag.ErrHelp) {
			fs.SetOutput(os.Stdout)
			fs.Usage()
			return nil, nil
		}
		err, unknown := mistake(fs, err)
		if unknown && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			args = args[1:] // its value
		}
		if explained := explain(append([]string{err.Error()}, fs.Args()...)); explained != nil {
			err = explained
		}
		errs = append(errs, err)
	}
	given = map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if fs.NArg() > 0 {
		errs = append(errs, unexpected(fs.Args(), explain))
	}
	fs.VisitAll(func(f *flag.Flag) {
		name := Variable(f.Name)
		if value, ok := env(name); ok && !given[f.Name] {
			given[f.Name] = true
			if err := f.Value.Set(value); err != nil {
				errs = append(errs, wrongValue(f, name, value, err))
			}
		}
	})
	return given, errs
}

// mistake returns err, which is flag.FlagSet.Parse's, in words that say what to do. unknown means that there is no such flag.
func mistake(fs *flag.FlagSet, err error) (said error, unknown bool) {
	text := err.Error()
	if _, name, ok := strings.Cut(text, "provided but not defined: -"); ok {
		hint := "gapless help shows all flags"
		if near := cmp.Or(others[name], Nearest(name, Names(fs))); near != "" {
			hint = "did you mean -" + near + "?"
		}
		return fmt.Errorf("there is no flag -%s (%s)", name, hint), true
	}
	if m := invalid.FindStringSubmatch(text); m != nil {
		if f := fs.Lookup(m[2]); f != nil {
			if value, quoted := strconv.Unquote(m[1]); quoted == nil {
				return wrongValue(f, "-"+f.Name, value, errors.New(m[3])), false
			}
		}
	}
	return fmt.Errorf("%w (gapless help shows all flags)", err), false
}

var invalid = regexp.MustCompile(`(?s)^invalid (?:boolean )?value (".*") for (?:flag )?-([\w-]+): (.*)$`)

// others are flags of other servers, and what they are called here.
var others = map[string]string{
	"port": "listen", "p": "listen", "addr": "listen", "address": "listen", "bind": "listen", "host": "listen", "http": "listen",
	"dir": "redis", "data": "redis", "data-dir": "redis", "redis-url": "redis", "redis-addr": "redis", "db": "redis", "url": "redis",
	"cert": "tls-cert", "key": "tls-key", "cors": "cors-origins", "origin": "cors-origins", "secret": "auth", "token": "auth", "jwks": "auth",
	"v": "version", "verbose": "log-level", "debug": "log-level", "ttl": "history-ttl", "timeout": "write-timeout", "api-key": "model-url", "openai": "model-url",
}

// wrongValue returns what is wrong with the value of f, which is given as name: -flag or VARIABLE. f has its default again, so that nothing else is said of it.
func wrongValue(f *flag.Flag, name, value string, err error) error {
	_ = f.Value.Set(f.DefValue)
	var get any
	if g, ok := f.Value.(flag.Getter); ok {
		get = g.Get()
	}
	switch get.(type) {
	case time.Duration:
		example := "15s"
		if _, number := strconv.ParseFloat(value, 64); number == nil {
			example = value + "s"
		}
		return fmt.Errorf("%s: %q is not a duration, such as %s, 2m or 500ms", name, value, example)
	case int:
		return fmt.Errorf("%s: %q is not a whole number", name, value)
	case *slog.Level:
		return fmt.Errorf("%s: %q is not debug, info, warn or error", name, value)
	case bool:
		return fmt.Errorf("%s: %q is neither true nor false", name, value)
	}
	return fmt.Errorf("%s: %q: %w", name, value, err)
}

// unexpected returns the error for arguments that are no flags.
func unexpected(args []string, explain func(rest []string) error) error {
	if err := explain(args); err != nil {
		return err
	}
	hint := "gapless help shows commands and flags"
	if near := Nearest(args[0], append(slices.Collect(maps.Keys(Commands())), "serve", "help", "version")); near != "" && near != args[0] {
		hint = "did you mean gapless " + near + "?"
	}
	return fmt.Errorf("unexpected argument %q (%s)", args[0], hint)
}

// Nearest returns the one of names that is most similar to name, or "" if none is similar.
func Nearest(name string, names []string) string {
	best, least := "", len(name)/3+2
	for _, other := range names {
		if d := levenshtein.Distance(name, other, nil); d < least {
			best, least = other, d
		}
	}
	return best
}

// Names returns the names of the flags of fs.
func Names(fs *flag.FlagSet) (names []string) {
	fs.VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	return names
}

// Variable is the environment variable of a flag.
func Variable(flag string) string {
	return "GAPLESS_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Unknown returns a line for each variable in environ, which is in the form of os.Environ, that
// begins with GAPLESS_ and is neither a flag's variable nor one of others.
func Unknown(environ []string, fs *flag.FlagSet, others ...string) (lines []string) {
	var known []string
	for _, name := range Names(fs) {
		known = append(known, Variable(name))
	}
	known = append(known, others...)
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		if !strings.HasPrefix(name, "GAPLESS_") || slices.Contains(known, name) {
			continue
		}
		line := "unknown environment variable " + name
		if near := Nearest(name, known); near != "" {
			line += ": did you mean " + near + "?"
		}
		lines = append(lines, line)
	}
	return lines
}
