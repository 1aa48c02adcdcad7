package doctor

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"gapless/api/client"
)

// Commands are the subcommands that check a server. Each returns its exit code: 0 if all is well, 1
// if not, 2 for wrong usage.
var Commands = map[string]func(ctx context.Context, args []string, env func(string) (string, bool)) int{
	"doctor": examine,
	"live":   check("/healthz"),
	"ready":  check("/readyz"),
}

// examine runs gapless doctor.
func examine(ctx context.Context, args []string, env func(string) (string, bool)) int {
	cfg := DefaultConfig()
	fs := flag.NewFlagSet("gapless doctor", flag.ContinueOnError)
	fs.StringVar(&cfg.Origin, "origin", "", "an `origin` whose pages use the server, such as https://chat.example: examines CORS")
	fs.DurationVar(&cfg.Idle, "idle", cfg.Idle, "how long to listen in silence: longer than -heartbeat; two minutes find most idle time-outs")
	access := client.Flags(fs, "read and write any session, and admin them, to delete its own")
	asJSON := fs.Bool("json", false, "print one JSON object: {\"ok\": …, \"findings\": […]}")
	fs.SetOutput(os.Stderr)
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "gapless doctor [flags] URL appends to a session of its own through the URL that users call,\nand says whether it streams, and what to do where it does not. It exits with 0 when all is well,\n1 when it found a problem, 2 when it was called in a wrong way.")
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
	let, err := access(env)
	cfg.Access = let
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}

	report := struct {
		OK       bool      `json:"ok"`
		Findings []Finding `json:"findings"`
	}{OK: true}
	if !*asJSON {
		fmt.Println("gapless doctor looks at", cfg.URL)
		cfg.Progress = func(text string) { fmt.Fprintln(os.Stderr, "  …", text) }
	}
	Examine(ctx, cfg, func(f Finding) {
		report.OK = report.OK && f.OK
		report.Findings = append(report.Findings, f)
		switch {
		case *asJSON:
		case f.OK:
			fmt.Printf("ok       %s: %s\n", f.Check, f.Found)
		default:
			fmt.Printf("PROBLEM  %s: %s\n         remedy: %s\n", f.Check, f.Found, f.Remedy)
		}
	})
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "interrupted")
		return 1
	}
	if *asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		if err := e.Encode(report); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	if !report.OK {
		return 1
	}
	return 0
}

// check runs gapless live URL or gapless ready URL, for containers, which have no curl. It keeps
// the URL's query: ?for=writes also checks whether the node accepts appends.
func check(path string) func(context.Context, []string, func(string) (string, bool)) int {
	return func(ctx context.Context, args []string, _ func(string) (string, bool)) int {
		var at *url.URL
		var err error
		if len(args) == 1 {
			at, err = url.Parse(args[0])
		}
		if at == nil || err != nil || at.Host == "" {
			fmt.Fprintln(os.Stderr, "it takes one argument, the URL of a node, such as http://127.0.0.1:8080, or http://127.0.0.1:8080?for=writes for ready")
			return 2
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, "GET", at.JoinPath(path).String(), nil) // #nosec G125 -- the path is ours
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		client := &http.Client{}
		if ip := net.ParseIP(at.Hostname()); at.Hostname() == "localhost" || ip != nil && ip.IsLoopback() { // there the certificate is for other names, and nobody is in between
			client.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}} // #nosec G402 -- on loopback alone
		}
		response, err := client.Do(r)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			var why struct{ Code, Detail string }
			_ = json.NewDecoder(io.LimitReader(response.Body, 64<<10)).Decode(&why) // a proxy's response has another form
			fmt.Fprintln(os.Stderr, strings.TrimSpace(response.Status+" "+why.Code+" "+why.Detail))
			return 1
		}
		return 0
	}
}
