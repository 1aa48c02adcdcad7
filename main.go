// Gapless streams AI answers to browsers by Server-Sent Events and never loses, doubles
// or reorders a chunk. See README.md.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/dustin/go-humanize"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"gapless/api"
	"gapless/api/auth"
	"gapless/api/cli"
	"gapless/api/limit"
	"gapless/api/model"
	"gapless/api/traces"
	"gapless/sse"
	"gapless/store"
	"gapless/web"
)

//go:embed openapi.yaml
var contract []byte

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	args := os.Args[1:]
	if len(args) > 0 {
		if run := cli.Commands()[args[0]]; run != nil {
			code := run(ctx, args[1:], os.LookupEnv)
			stop()
			os.Exit(code)
		}
		switch args[0] {
		case "serve":
			args = args[1:]
		case "help", "version":
			args = []string{"-" + args[0]}
		}
	}
	cfg, err := parse(args, os.LookupEnv)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := run(ctx, cfg); err != nil {
		cfg.log.Error("gapless failed", slog.Any("err", err))
		os.Exit(1)
	}
}

// config is what flags and environment say.
type config struct {
	listen  string
	tlsCert string
	tlsKey  string
	h2c     bool
	open    bool // to everybody who can connect
	metrics string
	pprof   string
	drain   time.Duration
	idle    time.Duration // of connections that wait for a request
	header  time.Duration // that a request's header, or a handshake, may take
	store   store.Config
	sse     sse.Config
	api     api.Config
	auth    auth.Config
	traces  traces.Config
	demo    bool // answers questions, and no model
	model   model.Config
	log     *slog.Logger
}

// parse reads flags, and for those that are not given their environment variables, and
// reports all mistakes together.
func parse(args []string, env func(string) (string, bool)) (config, error) {
	cfg := config{store: store.DefaultConfig(), sse: sse.DefaultConfig(), api: api.DefaultConfig(), auth: auth.DefaultConfig(), model: model.DefaultConfig()}
	host, _ := os.Hostname()
	var hosts, origins, proxies, modelName, logFormat string
	var level slog.Level
	var calls bool // the demo's

	fs := flag.NewFlagSet("gapless", flag.ContinueOnError)
	fs.StringVar(&cfg.listen, "listen", "127.0.0.1:8080", "`address` to listen on: on loopback, unless -auth says who may do what")
	fs.StringVar(&cfg.tlsCert, "tls-cert", "", "`file` of the certificate, and of those that lead to its authority: serves https and HTTP/2; a new one is taken without a restart")
	fs.StringVar(&cfg.tlsKey, "tls-key", "", "`file` of its private key")
	fs.BoolVar(&cfg.h2c, "h2c", false, "take HTTP/2 without TLS, too, from proxies that speak it with prior knowledge")
	fs.StringVar(&hosts, "hosts", "", "`names` by which browsers may call a server on loopback, beside localhost and addresses; commas between")
	fs.StringVar(&cfg.auth.Source, "auth", "", "whose tokens are taken: `secret:FILE`[,FILE…] of 32 bytes or more each for HS256, or the https://… URL of a JWKS for RS256, ES256 and EdDSA; none: everybody may do everything")
	fs.StringVar(&cfg.auth.Issuer, "auth-issuer", "", "the `iss` that tokens must have; none: it is not looked at")
	fs.StringVar(&cfg.auth.Audience, "auth-audience", "", "the `aud` that tokens must have; none: it is not looked at")
	fs.StringVar(&cfg.auth.Claim, "auth-claim", cfg.auth.Claim, "`name` of the claim that says what a token's holder may do")
	fs.StringVar(&cfg.auth.Cookie, "auth-cookie", "", "`name` of a cookie that may hold the token, where there is no Authorization header; none: no cookie may")
	fs.BoolVar(&cfg.open, "insecure-open", false, "listen on other addresses than loopback although there is no -auth: whoever can connect may read, write and delete everything")
	fs.StringVar(&origins, "cors-origins", "", "`origins` whose pages may call the API, with credentials, such as https://chat.example; commas between")
	fs.StringVar(&cfg.sse.Node, "node", host, "this node's `name`, as viewers and logs are told it")
	fs.DurationVar(&cfg.drain, "drain", 10*time.Second, "how long a stop may take: viewers are sent to other nodes spread over it")

	fs.StringVar(&cfg.store.Redis, "redis", cfg.store.Redis, "`URL`: redis://…, redis+sentinel://…/master, redis+cluster://…, with rediss for TLS; or embedded: in this process, in memory, for one node")
	fs.StringVar(&cfg.store.Prefix, "prefix", cfg.store.Prefix, "`text` that starts every key and every channel in Redis: deployments that share a Redis, also in different databases, need different ones")
	fs.StringVar(&cfg.store.RedisCA, "redis-ca", "", "`file` of the certificates that vouch for a rediss:// server, instead of the system's")
	fs.StringVar(&cfg.store.RedisCert, "redis-cert", "", "`file` of the certificate by which Redis knows this node")
	fs.StringVar(&cfg.store.RedisKey, "redis-key", "", "`file` of its private key")
	fs.IntVar(&cfg.store.WaitReplicas, "wait-replicas", 0, "how many replicas must have an append before it is acknowledged")
	fs.DurationVar(&cfg.store.WaitTimeout, "wait-timeout", cfg.store.WaitTimeout, "how long they may take; after that the outcome is unknown")
	fs.DurationVar(&cfg.store.HistoryTTL, "history-ttl", cfg.store.HistoryTTL, "how long a log is kept after its last use: one that is viewed is in use")
	fs.IntVar(&cfg.store.HistoryMax, "history-max", cfg.store.HistoryMax, "how many chunks of a log are kept")
	bytesVar(fs, &cfg.store.HistoryBytes, "history-bytes", "how many `bytes` of a log's chunks are kept; 0: all that -history-max allows")
	fs.DurationVar(&cfg.store.Grace, "grace", cfg.store.Grace, "how long a message outlives the upload that it came from: one whose connection broke and that has producer numbers, or whose node died")
	fs.StringVar(&cfg.store.HistoryOrder, "history-order", cfg.store.HistoryOrder, "which end of the list foreign producers push to: oldest-first (RPUSH) or newest-first (LPUSH)")

	fs.DurationVar(&cfg.sse.Heartbeat, "heartbeat", cfg.sse.Heartbeat, "longest silence on a stream")
	fs.DurationVar(&cfg.sse.Reconcile, "reconcile", cfg.sse.Reconcile, "how often a watched log is read even if nothing is announced: the longest delay of a chunk while Redis serves")
	fs.DurationVar(&cfg.sse.Linger, "linger", cfg.sse.Linger, "how long a log stays in memory after its last viewer left")
	fs.DurationVar(&cfg.sse.WriteTimeout, "write-timeout", cfg.sse.WriteTimeout, "how long a viewer's socket may take nothing; of other responses at most 45s")
	bytesVar(fs, &cfg.sse.Window, "window", "how many `bytes` of events a log keeps in memory")
	bytesVar(fs, &cfg.sse.WindowTotal, "window-total", "how many `bytes` all logs keep in memory")
	bytesVar(fs, &cfg.sse.SnapshotMax, "snapshot-max", "how many `bytes` a snapshot may have: the rest of a longer log comes as chunks; 0: none is given")
	bytesVar(fs, &cfg.api.ChunkMax, "chunk-max", "the largest event that a chunk may make in a stream, in `bytes`")

	limits := &cfg.api.Limits
	fs.StringVar(&proxies, "trusted-proxies", "", "`addresses` and ranges of proxies whose X-Forwarded-For says who the client is, such as 10.0.0.0/8; commas between")
	fs.IntVar(&limits.Connections, "connections", limits.Connections, "how many connections the node has at most; 0: as many as its file descriptors allow")
	fs.IntVar(&limits.CallerConnections, "caller-connections", limits.CallerConnections, "how many of them an address has that is no trusted proxy; of IPv6, a /64. For this limit and the others, 0 is none")
	fs.IntVar(&limits.Strangers, "strangers", limits.Strangers, "with -auth, how many connections the node has on which no token was shown yet")
	fs.IntVar(&limits.CallerStrangers, "caller-strangers", limits.CallerStrangers, "how many of them an address has")
	bytesVar(fs, &limits.StrangerBytes, "stranger-bytes", "how many `bytes` a second are read from those of an address, and ten times as many at once")
	fs.IntVar(&limits.Viewers, "viewers", limits.Viewers, "how many viewers the node has")
	fs.IntVar(&limits.CallerViewers, "caller-viewers", limits.CallerViewers, "how many of them a caller has: a token's subject, or else an address")
	fs.IntVar(&limits.Uploads, "uploads", limits.Uploads, "how many uploads the node has under way")
	fs.IntVar(&limits.CallerUploads, "caller-uploads", limits.CallerUploads, "how many of them a caller has")
	fs.IntVar(&limits.Answers, "answers", limits.Answers, "how many answers of the model the node has under way")
	fs.IntVar(&limits.CallerAnswers, "caller-answers", limits.CallerAnswers, "how many of them a caller has")
	bytesVar(fs, &limits.Bodies, "bodies", "how many `bytes` of memory large JSON bodies take on the node, each three times its length")
	bytesVar(fs, &limits.CallerBodies, "caller-bodies", "how many `bytes` of them a caller has")
	bytesVar(fs, &limits.Responses, "responses", "how many `bytes` of memory calls under way take on the node, viewers and uploads apart: 64 KiB each, and pages what they hold")
	bytesVar(fs, &limits.CallerResponses, "caller-responses", "how many `bytes` of them an address has")
	fs.IntVar(&limits.Naive, "naive", limits.Naive, "how many naive viewers of the demo the node has")
	fs.IntVar(&limits.CallerNaive, "caller-naive", limits.CallerNaive, "how many of them a caller has")
	fs.IntVar(&limits.CallerCalls, "caller-calls", limits.CallerCalls, "how many calls a caller makes in a second, and ten times as many at once")
	fs.IntVar(&limits.CallerAppends, "caller-appends", limits.CallerAppends, "how many chunks of up to a KiB a caller appends in a second, and ten times as many at once")
	bytesVar(fs, &limits.CallerStored, "caller-stored", "how many `bytes` of chunks a caller stores in a day, and as many at once")
	fs.IntVar(&limits.CallerSessions, "caller-sessions", limits.CallerSessions, "how many sessions a caller makes in a second, and ten times as many at once")
	fs.IntVar(&limits.CallerTickets, "caller-tickets", limits.CallerTickets, "how many tickets a caller makes in a second, and ten times as many at once")
	fs.IntVar(&cfg.sse.Feeds, "feeds", cfg.sse.Feeds, "how many logs are watched at once")
	fs.IntVar(&cfg.store.NamesMax, "session-names", cfg.store.NamesMax, "how many messages and producers a session may have")
	bytesVar(fs, &cfg.api.BodyMax, "body-max", "the largest JSON body, in `bytes`")
	fs.IntVar(&cfg.api.BatchMax, "batch-max", cfg.api.BatchMax, "how many chunks an array may have")
	bytesVar(fs, &cfg.api.BatchBytes, "batch-bytes", "how many `bytes` the chunks of an array may have together, if they are several")
	bytesVar(fs, &cfg.api.URLMax, "url-max", "the longest URL, in `bytes`")
	bytesVar(fs, &cfg.api.HeaderMax, "header-max", "the largest header of a request, in `bytes`")
	fs.DurationVar(&cfg.header, "header-timeout", 10*time.Second, "how long a request's header, or a TLS handshake, may take: more than a bad mobile network needs")
	fs.DurationVar(&cfg.api.BodyTimeout, "body-timeout", cfg.api.BodyTimeout, "how long 64 KiB of a JSON body, or all of a shorter one, may take")
	fs.DurationVar(&cfg.idle, "idle-timeout", 2*time.Minute, "how long a connection is kept that waits for a request: longer than proxies keep theirs")

	fs.BoolVar(&cfg.sse.Plain, "plain", false, "leave viewers' connections to the HTTP server, instead of taking them over where HTTP/1.1 allows it: slower, for comparison")
	fs.StringVar(&cfg.metrics, "metrics", "", "another `address` at which /metrics is served, and nothing else, without a token: for Prometheus, and not for strangers")
	fs.StringVar(&cfg.pprof, "pprof", "", "`address` on loopback at which profiles are served (/debug/pprof/); none by default")

	fs.BoolVar(&calls, "demo", false, "serve the calls by which the page cuts connections and shows a viewer that loses chunks, with -model demo; by default only on loopback without -auth")
	fs.StringVar(&modelName, "model", "demo", "what answers questions: demo, which has a few texts; or openai, which -model-url implies: a service that speaks the chat-completions API")
	fs.StringVar(&cfg.model.URL, "model-url", "", "`URL` of its API, in front of /chat/completions, such as https://api.openai.com/v1; its key comes from the environment variable "+model.KeyVariable+", and is no flag")
	fs.StringVar(&cfg.model.Name, "model-name", "", "`name` of the model there")
	fs.StringVar(&cfg.model.Options, "model-options", "", "further members of each request, a `JSON` object such as {\"temperature\":0.2}; null takes one out")
	fs.DurationVar(&cfg.model.Timeout, "model-timeout", cfg.model.Timeout, "how long the model may be silent before its first word")
	fs.DurationVar(&cfg.model.Stall, "model-stall", cfg.model.Stall, "how long it may be silent between two words")
	bytesVar(fs, &cfg.api.ContextMax, "model-context", "how much of a conversation is sent along with a question, in `bytes` of text: its newest messages")
	bytesVar(fs, &cfg.api.AnswerMax, "model-answer-max", "the longest answer, in `bytes` of text")
	showVersion := fs.Bool("version", false, "print the version and end")
	fs.TextVar(&level, "log-level", slog.LevelInfo, "`level`: debug, info, warn, error")
	fs.StringVar(&logFormat, "log-format", "text", "text or json")
	fs.Usage = func() { cli.Help(fs.Output(), fs) }

	var errs []error
	fs.SetOutput(io.Discard) // it would print the usage behind each mistake
	for {
		err := fs.Parse(args)
		if args = fs.Args(); err == nil {
			break
		}
		if errors.Is(err, flag.ErrHelp) {
			fs.SetOutput(os.Stdout)
			fs.Usage()
			return cfg, err
		}
		mistake := err.Error()
		if broken(cfg.store.Redis, append([]string{mistake}, args...)) {
			err = errQuote
		}
		hint := "gapless help shows all flags"
		if _, name, ok := strings.Cut(mistake, "provided but not defined: -"); ok && err != errQuote {
			if near := cli.Nearest(name, cli.Names(fs)); near != "" {
				hint = "did you mean -" + near + "?"
			}
		}
		errs = append(errs, fmt.Errorf("%w (%s)", err, hint))
		if strings.Contains(mistake, "not defined") && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			args = args[1:] // its value
		}
	}
	if *showVersion {
		of, from := build()
		fmt.Println("gapless", of, from, runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
		return cfg, flag.ErrHelp
	}
	if fs.NArg() > 0 && broken(cfg.store.Redis, fs.Args()) {
		errs = append(errs, errQuote)
	} else if fs.NArg() > 0 {
		hint := "gapless help shows commands and flags"
		if near := cli.Nearest(fs.Arg(0), append(slices.Collect(maps.Keys(cli.Commands())), "serve", "help", "version")); near != "" && near != fs.Arg(0) {
			hint = "did you mean gapless " + near + "?"
		}
		errs = append(errs, fmt.Errorf("unexpected argument %q (%s)", fs.Arg(0), hint))
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	fs.VisitAll(func(f *flag.Flag) {
		name := cli.Variable(f.Name)
		if value, ok := env(name); ok && !given[f.Name] {
			given[f.Name] = true
			if err := f.Value.Set(value); err != nil {
				errs = append(errs, fmt.Errorf("%s: %q: %w", name, value, err))
			}
		}
	})

	var handler slog.Handler
	switch logFormat {
	case "text":
		handler = slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})
	case "json":
		handler = slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})
	default:
		errs = append(errs, fmt.Errorf("-log-format: %q is neither text nor json", logFormat))
	}
	if len(errs) == 0 {
		cfg.log = slog.New(handler)
		for _, line := range cli.Unknown(os.Environ(), fs, model.KeyVariable, "GAPLESS_TOKEN") {
			cfg.log.Warn(line)
		}
	}
	if _, byEnv := env("GAPLESS_MODEL"); cfg.model.URL != "" && !given["model"] && !byEnv {
		modelName = "openai"
	}
	cfg.model.Key, _ = env(model.KeyVariable)
	switch cfg.demo = modelName == "demo"; modelName {
	case "openai":
		errs = append(errs, cfg.model.Validate())
	case "demo":
		if cfg.model.URL != "" {
			errs = append(errs, errors.New("-model-url: -model demo asks nobody: leave one of them out"))
		}
	default:
		errs = append(errs, fmt.Errorf("-model: %q is neither demo nor openai", modelName))
	}
	if cfg.drain < 0 {
		errs = append(errs, fmt.Errorf("-drain: %v is less than nothing", cfg.drain))
	}
	if (cfg.tlsCert == "") != (cfg.tlsKey == "") {
		errs = append(errs, errors.New("-tls-cert, -tls-key: give both or none: a certificate is of no use without its key"))
	}
	if cfg.h2c && cfg.tlsCert != "" {
		errs = append(errs, errors.New("-h2c: with -tls-cert HTTP/2 is negotiated by TLS: leave out one of them"))
	}
	address, _, err := net.SplitHostPort(cfg.listen)
	if err != nil {
		errs = append(errs, fmt.Errorf("-listen: %w", err))
	}
	if _, _, err := net.SplitHostPort(cfg.metrics); cfg.metrics != "" && err != nil {
		errs = append(errs, fmt.Errorf("-metrics: %w", err))
	}
	if host, _, err := net.SplitHostPort(cfg.pprof); cfg.pprof != "" && (err != nil || !isLoopback(host)) {
		errs = append(errs, fmt.Errorf("-pprof: %q is no address and port on loopback: profiles tell much, so they are for this machine alone", cfg.pprof))
	}
	switch {
	case hosts != "":
		cfg.api.Hosts = strings.Split(strings.ToLower(hosts), ",")
	case !isLoopback(address):
		cfg.api.Hosts = nil // reachable by more names than can be known here
	}
	switch open := err == nil && !isLoopback(address); {
	case cfg.auth.Source != "" && cfg.open:
		errs = append(errs, errors.New("-insecure-open: with -auth nothing is open: leave one of them out"))
	case open && cfg.auth.Source == "" && !cfg.open:
		errs = append(errs, fmt.Errorf("-listen: %s can be reached by others, who could read, write and delete everything: say whose tokens are taken with -auth, or listen on 127.0.0.1 behind something that asks (-insecure-open lets everybody in)", cfg.listen))
	}
	// Who sets a limit of callers means it. Else addresses on loopback are this machine's own, and
	// mostly a proxy's, which all its clients share.
	limits.Addresses = !isLoopback(address) || proxies != ""
	for name := range given {
		limits.Addresses = limits.Addresses || strings.HasPrefix(name, "caller-")
	}
	if proxies != "" {
		all, err := limit.ParseProxies(proxies)
		limits.TrustedProxies, errs = all, append(errs, err)
	}
	for name, d := range map[string]time.Duration{"-header-timeout": cfg.header, "-idle-timeout": cfg.idle} {
		if d < 100*time.Millisecond {
			errs = append(errs, fmt.Errorf("%s: %v is less than 100ms", name, d))
		}
	}
	if origins != "" {
		cfg.api.Origins = strings.Split(origins, ",")
	}
	if cfg.api.Look = cfg.sse.Reconcile; cfg.store.Grace < 3*cfg.api.Look {
		errs = append(errs, fmt.Errorf("-grace: %v is less than three times -reconcile, %v: a node that is well must have the time to say so", cfg.store.Grace, cfg.sse.Reconcile))
	}
	switch local := isLoopback(address) && cfg.auth.Source == ""; {
	case calls && !cfg.demo:
		errs = append(errs, errors.New("-demo: the demo's calls are for the demo's model: leave it out, or take -model demo"))
	case given["demo"]:
		cfg.api.Demo = calls
	default:
		cfg.api.Demo = cfg.demo && local
	}
	cfg.sse.Kept = cfg.store.HistoryTTL
	// Responses that are no streams are small: who takes nothing of one is not there.
	cfg.api.WriteTimeout, limits.Tokens = min(cfg.sse.WriteTimeout, cfg.api.WriteTimeout), cfg.auth.Source != ""
	limits.WriteTimeout = cfg.sse.WriteTimeout
	cfg.store.Logger, cfg.sse.Logger, cfg.api.Logger, cfg.auth.Logger, limits.Logger, cfg.model.Logger = cfg.log, cfg.log, cfg.log, cfg.log, cfg.log, cfg.log
	version, _ := build()
	cfg.traces = traces.Config{Node: cfg.sse.Node, Version: version, Logger: cfg.log}
	if cfg.traces.On, err = traces.Wanted(env); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, cfg.store.Validate(), cfg.sse.Validate(), cfg.api.Validate(), cfg.auth.Validate())
	return cfg, errors.Join(errs...)
}

var errQuote = errors.New("-redis: an argument that is not shown follows the URL and is no flag: quote the URL, and escape a space in it as %20")

// broken reports whether a password may go on after a -redis URL, in other arguments: these have the @ that follows a
// password, or the URL cannot be read and has the colon before one.
func broken(redis string, rest []string) bool {
	c := store.DefaultConfig()
	c.Redis = redis
	_, host, _ := strings.Cut(redis, "://")
	return redis != store.Embedded && strings.Contains(strings.Join(rest, " "), "@") || c.Validate() != nil && strings.Contains(host, ":")
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// aside serves what is not for users at an address of its own, which a flag has named, until stop is called.
func aside(cfg config, flag, address string, handler http.Handler) (stop func(), err error) {
	if address == "" {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s (%s): %w", address, flag, err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 8 << 10,
		WriteTimeout: time.Minute, // a profile takes half a minute
		ErrorLog:     slog.NewLogLogger(cfg.log.Handler(), slog.LevelDebug)}
	go func() { _ = server.Serve(listener) }() // ended by stop
	cfg.log.Info("gapless serves aside", slog.String("flag", flag), slog.String("at", "http://"+listener.Addr().String()))
	return func() { _ = server.Close() }, nil
}

// profiles are for this machine alone: no page of a browser can call them by a name of its own
// (DNS rebinding).
func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/cmdline", http.NotFound) // it may hold a password
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil || !isLoopback(host) {
			http.Error(w, "profiles are served to loopback alone", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// run serves until ctx ends, and then stops in the order that loses nothing: not ready,
// viewers, requests, store.
func run(ctx context.Context, cfg config) error {
	listener, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return fmt.Errorf("listen on %s (-listen): %w", cfg.listen, err)
	}
	var secret *api.Certificate
	scheme := "http"
	if cfg.tlsCert != "" {
		if secret, err = api.OpenCertificate(cfg.tlsCert, cfg.tlsKey, cfg.log); err != nil {
			return errors.Join(err, listener.Close())
		}
		scheme = "https"
	}
	stop, err := aside(cfg, "-pprof", cfg.pprof, profiles())
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	defer stop()
	tracer, err := traces.Open(ctx, cfg.traces)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	if tracer != nil { // else there is nothing of it on any way
		cfg.store.Instrument, cfg.sse.Tracer, cfg.api.Tracer = tracer.Redis, tracer, tracer
	}
	logs, err := store.Open(cfg.store)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	// The heap stays within nine tenths of what the container may have (GOMEMLIMIT, if that
	// is not set): better to collect more often than to be killed.
	if _, err := memlimit.Set(memlimit.WithProvider(memlimit.FromCgroup)); err != nil {
		cfg.log.Debug("no limit of memory was set", slog.Any("err", err))
	}
	if cfg.auth.Source != "" {
		tokens, err := auth.Open(cfg.auth)
		if err != nil {
			logs.Close()
			return errors.Join(err, listener.Close())
		}
		defer tokens.Close()
		cfg.api.Auth = tokens
	}
	returned := sse.NewReturned(listener.Addr())
	cfg.sse.Back, returned.Idle = returned.Back, cfg.idle
	hub := sse.NewHub(cfg.sse, logs)
	var answers model.Model = model.NewDemo()
	if !cfg.demo {
		answers = model.NewOpenAI(cfg.model)
	}
	handler := api.New(cfg.api, logs, hub, answers, web.Files, contract, metrics(logs, hub))
	stopMetrics, err := aside(cfg, "-metrics", cfg.metrics, handler.Metrics())
	if err != nil {
		hub.Close()
		logs.Close()
		return errors.Join(err, listener.Close())
	}
	defer stopMetrics()
	server := newServer(cfg, tracer.Handler(handler), secret)
	if cfg.store.Redis == store.Embedded {
		if os.Getenv("GOGC") == "" { // the logs are in this heap: less of it is kept free for garbage
			debug.SetGCPercent(50)
		}
		cfg.log.Warn("redis is embedded: in this process's memory, for one node, gone when it stops; -redis redis://… keeps logs and serves many nodes")
	}
	if cfg.open {
		cfg.log.Warn("-insecure-open: whoever can connect may read, write and delete every session; -auth says who may do what", slog.String("listen", cfg.listen))
	}
	page := scheme + "://" + listener.Addr().String() + "/"
	cfg.log.Info("gapless serves", slog.String("page", page), slog.String("node", cfg.sse.Node))
	if terminal, err := os.Stdout.Stat(); err == nil && terminal.Mode()&os.ModeCharDevice != 0 {
		fmt.Print(cli.Welcome(page, cfg.store.Redis == store.Embedded))
	}

	var begun time.Time // the end
	failed := make(chan error, 1)
	bounded := handler.Listener(listener)
	if secret == nil { // connections with TLS are not taken over
		go func() { _ = server.Serve(returned) }() // ended by Shutdown or Close
	}
	go func() { // ended by Shutdown or Close; waited for below
		if secret != nil {
			failed <- server.ServeTLS(bounded, "", "")
		} else {
			failed <- server.Serve(bounded)
		}
	}()
	select {
	case err = <-failed:
		err, begun = fmt.Errorf("serve: %w", err), time.Now()
	case <-ctx.Done():
		begun = time.Now()
		err = drain(cfg, handler, hub, server, failed)
	}
	closed := make(chan struct{})
	go func() { // waited for, but not for longer than the drain time: a silent Redis holds up nobody
		hub.Close()
		logs.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(cfg.drain * 4 / 100):
	}
	rest, cancel := context.WithDeadline(context.Background(), begun.Add(cfg.drain))
	defer cancel()
	if lost := tracer.Close(rest); lost != nil {
		cfg.log.Warn("the last traces were not sent", slog.Any("err", lost))
	}
	return err
}

// newServer is the HTTP server, with TLS where there is a certificate.
func newServer(cfg config, handler http.Handler, secret *api.Certificate) *http.Server {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(cfg.h2c)
	server := &http.Server{
		Handler:           handler,
		ConnContext:       sse.WithConn,
		ReadHeaderTimeout: cfg.header,
		// It is a body's: uploads lift it, and bodies that go on move it (api).
		ReadTimeout: max(cfg.api.BodyTimeout, cfg.header),
		IdleTimeout: cfg.idle,
		// It is for what is answered without a word of the API, too: that moves it with each piece of a response, and streams and
		// uploads lift it.
		WriteTimeout: cfg.api.WriteTimeout,
		// What is a little longer than the API allows is read, to be answered in words.
		MaxHeaderBytes: cfg.api.URLMax + cfg.api.HeaderMax,
		ConnState:      limit.State,
		ErrorLog:       slog.NewLogLogger(cfg.log.Handler(), slog.LevelDebug),
		Protocols:      protocols,
		HTTP2: &http.HTTP2Config{
			// Tabs and widgets of one browser share a connection; a proxy opens another one when it
			// has so many.
			MaxConcurrentStreams: 100,
			// A stream has the write timeout of its own. This is for a connection that takes
			// nothing at all, in which the end of a stream cannot be said either.
			WriteByteTimeout: cfg.api.WriteTimeout,
		},
	}
	if secret != nil {
		server.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: secret.Get}
		// Who was here once over https is not lured to http (RFC 6797). A year, as browsers'
		// own lists ask for; other names below this one are others' affair.
		server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Strict-Transport-Security", "max-age=31536000")
			handler.ServeHTTP(w, r)
		})
	}
	return server
}

// metrics is what /metrics serves: what the packages say of themselves, the runtime, and
// which build this is.
func metrics(logs *store.Store, hub *sse.Hub) *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(logs.Metrics()...)
	registry.MustRegister(hub.Metrics()...)
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	of, from := build()
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "gapless_build_info", Help: "1, of the build that runs."}, []string{"version", "revision", "go"})
	info.WithLabelValues(of, from, runtime.Version()).Set(1)
	registry.MustRegister(info)
	return registry
}

// version and commit are stamped by deploy/release.sh (-X main.version=…). Go itself knows them of what
// is built in a clone of the repository.
var version, commit string

// build is which one runs: its version, and the commit that it was made from.
func build() (of, from string) {
	of, from = version, commit
	if info, ok := debug.ReadBuildInfo(); ok {
		of = cmp.Or(of, info.Main.Version)
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				from = cmp.Or(from, s.Value)
			}
		}
	}
	return cmp.Or(of, "unknown"), cmp.Or(from, "unknown")
}

// drain ends everything within the drain time. Viewers leave spread over its first part,
// in which calls are still served, so that none fails that was sent before its sender saw
// that the node is not ready; what is under way may finish; then uploads are told to go
// elsewhere, and answers of the model end as failed.
func drain(cfg config, handler *api.API, hub *sse.Hub, server *http.Server, failed <-chan error) error {
	cfg.log.Info("gapless drains", slog.Duration("within", cfg.drain))
	begun := time.Now()
	until := func(percent time.Duration) (context.Context, context.CancelFunc) {
		return context.WithDeadline(context.Background(), begun.Add(cfg.drain*percent/100))
	}
	handler.Drain()
	hub.Drain(cfg.drain * 60 / 100)
	calls, cancel := until(60)
	defer cancel()
	handler.Quiet(calls, cfg.drain/10)

	soft, cancel := until(80)
	defer cancel()
	handler.Wait(soft)
	_ = server.Shutdown(soft)

	hard, cancel := until(95)
	defer cancel()
	handler.End()
	handler.Wait(hard)
	err := server.Shutdown(hard)
	if err != nil {
		cfg.log.Warn("requests were broken off: the drain time is over", slog.Any("err", err))
		err = server.Close()
	}
	<-failed
	cfg.log.Info("gapless has drained", slog.Duration("took", time.Since(begun)))
	return err
}

// bytesVar is a flag for an amount of bytes, such as 64KiB.
func bytesVar(fs *flag.FlagSet, p *int, name, usage string) {
	fs.Var((*byteSize)(p), name, usage)
}

type byteSize int

func (b *byteSize) String() string {
	return strings.ReplaceAll(humanize.IBytes(uint64(max(*b, 0))), " ", "")
}

func (b *byteSize) Set(text string) error {
	n, err := humanize.ParseBytes(text)
	if err != nil || n > 1<<40 {
		return fmt.Errorf("an amount of bytes is a number and KiB, MiB or GiB, up to 1024GiB")
	}
	*b = byteSize(n)
	return nil
}
