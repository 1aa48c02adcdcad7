// Package cli is the command line around the server's flags: subcommands, help, and messages about
// mistakes.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

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
		mistake := err.Error()
		explained := explain(append([]string{mistake}, args...))
		if explained != nil {
			err = explained
		}
		hint := "gapless help shows all flags"
		if _, name, ok := strings.Cut(mistake, "provided but not defined: -"); ok && explained == nil {
			if near := Nearest(name, Names(fs)); near != "" {
				hint = "did you mean -" + near + "?"
			}
		}
		errs = append(errs, fmt.Errorf("%w (%s)", err, hint))
		if strings.Contains(mistake, "not defined") && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			args = args[1:] // its value
		}
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
				errs = append(errs, fmt.Errorf("%s: %q: %w", name, value, err))
			}
		}
	})
	return given, errs
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
