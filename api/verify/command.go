package verify

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"

	"gapless/api/client"
)

// Commands are the subcommands that verify. Each returns its exit code: 0 if what came is the log, 1 if not, 2 for
// wrong usage.
var Commands = map[string]func(ctx context.Context, args []string, env func(string) (string, bool)) int{"verify": run}

const usage = `usage: gapless verify [flags] URL

URL is http://HOST/v1/sessions/ID or its stream. The command follows the stream from the start, drops its connection at
random chunks, resumes with Last-Event-ID, and compares what it received with the server's digest. It prints one line: that everything
came, or the first chunk that is missing, doubled, out of order or different.
It exits with 0 if everything came, with 1 if something differs or could not be checked, and with 2 for wrong usage.

`

// run runs gapless verify.
func run(ctx context.Context, args []string, env func(string) (string, bool)) int {
	cfg := DefaultConfig()
	fs := flag.NewFlagSet("gapless verify", flag.ContinueOnError)
	fs.IntVar(&cfg.Cuts, "cuts", cfg.Cuts, "how often to drop the connection and resume")
	fs.BoolVar(&cfg.UntilEnd, "until-end", false, "follow until the log has ended, instead of to the last chunk that is there now")
	fs.DurationVar(&cfg.Patience, "patience", cfg.Patience, "how long a chunk that is in the log may take to arrive")
	asJSON := fs.Bool("json", false, "print one JSON object: {\"complete\": …, \"count\": …, \"sha256\": …, \"differs\": …}")
	access := client.Flags(fs, "read the session")
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		fs.PrintDefaults()
	}
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	}
	var errs []error
	if fs.NArg() != 1 {
		errs = append(errs, errors.New("give one URL, after all flags"))
	} else if u, err := url.Parse(fs.Arg(0)); err != nil {
		errs = append(errs, fmt.Errorf("URL: %w", err))
	} else {
		cfg.URL = u
		errs = append(errs, cfg.Validate())
	}
	var err error
	cfg.Access, err = access(env)
	if err := errors.Join(append(errs, err)...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	result, err := Verify(ctx, cfg)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "interrupted")
		return 1
	case err != nil:
		fmt.Fprintln(os.Stderr, "not verified:", err)
		return 1
	case *asJSON:
		e := json.NewEncoder(os.Stdout)
		e.SetEscapeHTML(false)
		if err := e.Encode(result); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	default:
		fmt.Println(result)
	}
	if !result.Complete {
		return 1
	}
	return 0
}
