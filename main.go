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
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
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
	stored := store.DefaultConfig()
	stored.Redis = store.Embedded + ":gapless-data"
	delivery := sse.DefaultConfig()
	delivery.Node, _ = os.Hostname()
	cfg := config{store: stored, sse: delivery, api: api.DefaultConfig(), auth: auth.DefaultConfig(), model: model.DefaultConfig()}
	var hosts, origins, proxies, modelName, logFormat string
	var level slog.Level
	var calls bool // the demo's

	fs := flag.NewFlagSet("gapless", flag.ContinueOnError)
	fs.StringVar(&cfg.listen, "listen", "127.0.0.1:8080", "`address` to listen on; an address other than loopback needs -auth")
	fs.StringVar(&cfg.tlsCert, "tls-cert", "", "`file` with the certificate and its chain; the server then speaks https and HTTP/2, and reloads the file when it changes")
	fs.StringVar(&cfg.tlsKey, "tls-key", "", "`file` with the private key of -tls-cert")
	fs.BoolVar(&cfg.h2c, "h2c", false, "also accept HTTP/2 without TLS, from proxies that use prior knowledge")
	fs.StringVar(&hosts, "hosts", "", "comma-separated `names` under which browsers may call a server on loopback, besides localhost and IP addresses")
	fs.BoolVar(&cfg.open, "insecure-open", false, "listen on addresses other than loopback without -auth: anyone who can connect may read, write and delete everything")
	fs.StringVar(&origins, "cors-origins", "", "comma-separated `origins` whose pages may call the API with credentials, such as https://chat.example")
	fs.DurationVar(&cfg.drain, "drain", 10*time.Second, "how long a shutdown may take; viewers are moved to other nodes during this time")
	fs.StringVar(&proxies, "trusted-proxies", "", "comma-separated `addresses` and ranges of proxies whose X-Forwarded-For is believed, such as 10.0.0.0/8")
	fs.DurationVar(&cfg.header, "header-timeout", 10*time.Second, "how long a request header or a TLS handshake may take")
	fs.DurationVar(&cfg.idle, "idle-timeout", 2*time.Minute, "how long an idle connection is kept; it should be longer than that of the proxies in front")
	fs.StringVar(&cfg.metrics, "metrics", "", "additional `address` that serves only /metrics, without a token; keep it away from strangers")
	fs.StringVar(&cfg.pprof, "pprof", "", "loopback `address` that serves profiles at /debug/pprof/; off by default")
	fs.BoolVar(&calls, "demo", false, "with -model demo, serve the calls by which the page cuts connections and shows a viewer that loses chunks; by default only on loopback without -auth")
	fs.StringVar(&modelName, "model", "demo", "what answers questions: demo, which has a few built-in texts, or openai, a service with the chat-completions API; -model-url implies openai")
	showVersion := fs.Bool("version", false, "print the version and exit")
	fs.TextVar(&level, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn or error")
	fs.StringVar(&logFormat, "log-format", "text", "format of the log: text or json")
	cfg.store.Flags(fs)
	cfg.sse.Flags(fs)
	cfg.api.Flags(fs)
	cfg.auth.Flags(fs)
	cfg.model.Flags(fs)
	fs.Usage = func() { cli.Help(fs.Output(), fs) }

	given, errs := cli.Parse(fs, args, env, func(rest []string) error {
		if broken(cfg.store.Redis, rest) {
			return errQuote
		}
		return nil
	})
	if errs == nil && given == nil {
		return cfg, flag.ErrHelp
	}
	if *showVersion {
		of, from := build()
		fmt.Println("gapless", of, from, runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
		return cfg, flag.ErrHelp
	}

	var handler slog.Handler
	switch logFormat {
	case "text":
		handler = slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})
	case "json":
		handler = slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})
	default:
		errs = append(errs, fmt.Errorf("-log-format: must be text or json (%q)", logFormat))
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
			errs = append(errs, errors.New("-model-url: cannot be combined with -model demo"))
		}
	default:
		errs = append(errs, fmt.Errorf("-model: must be demo or openai (%q)", modelName))
	}
	if cfg.drain < 0 {
		errs = append(errs, fmt.Errorf("-drain: must not be negative (%v)", cfg.drain))
	}
	if (cfg.tlsCert == "") != (cfg.tlsKey == "") {
		errs = append(errs, errors.New("-tls-cert, -tls-key: set both or neither"))
	}
	if cfg.h2c && cfg.tlsCert != "" {
		errs = append(errs, errors.New("-h2c: cannot be combined with -tls-cert, which negotiates HTTP/2 itself"))
	}
	address, _, err := net.SplitHostPort(cfg.listen)
	if err != nil {
		errs = append(errs, fmt.Errorf("-listen: %w", err))
	}
	if _, _, err := net.SplitHostPort(cfg.metrics); cfg.metrics != "" && err != nil {
		errs = append(errs, fmt.Errorf("-metrics: %w", err))
	}
	if host, _, err := net.SplitHostPort(cfg.pprof); cfg.pprof != "" && (err != nil || !isLoopback(host)) {
		errs = append(errs, fmt.Errorf("-pprof: %q is not an address and port on loopback: profiles reveal too much for other machines", cfg.pprof))
	}
	switch {
	case hosts != "":
		cfg.api.Hosts = strings.Split(strings.ToLower(hosts), ",")
	case !isLoopback(address):
		cfg.api.Hosts = nil // reachable by more names than can be known here
	}
	switch open := err == nil && !isLoopback(address); {
	case cfg.auth.Source != "" && cfg.open:
		errs = append(errs, errors.New("-insecure-open: cannot be combined with -auth"))
	case open && cfg.auth.Source == "" && !cfg.open:
		errs = append(errs, fmt.Errorf("-listen: anyone who can reach %s could read, write and delete everything: set -auth, or listen on 127.0.0.1 behind a proxy that authenticates (-insecure-open allows it anyway)", cfg.listen))
	}
	limits := &cfg.api.Limits
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
			errs = append(errs, fmt.Errorf("%s: must be at least 100ms (%v)", name, d))
		}
	}
	if origins != "" {
		cfg.api.Origins = strings.Split(origins, ",")
	}
	if cfg.api.Look = cfg.sse.Reconcile; cfg.store.Grace < 3*cfg.api.Look {
		errs = append(errs, fmt.Errorf("-grace: %v is less than three times -reconcile (%v): a healthy node needs that time to renew its messages", cfg.store.Grace, cfg.sse.Reconcile))
	}
	switch local := isLoopback(address) && cfg.auth.Source == ""; {
	case calls && !cfg.demo:
		errs = append(errs, errors.New("-demo: needs -model demo"))
	case given["demo"]:
		cfg.api.Demo = calls
	default:
		cfg.api.Demo = cfg.demo && local
	}
	dir, embedded := cfg.store.Embedded()
	cfg.api.Forgetful = embedded && dir == ""
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

var errQuote = errors.New("-redis: the URL is followed by an argument that is not a flag (not shown here): quote the URL, and escape a space in it as %20")

// broken reports whether a password may go on after a -redis URL, in other arguments: these have the @ that follows a
// password, or the URL cannot be read and has the colon before one.
func broken(redis string, rest []string) bool {
	c := store.DefaultConfig()
	c.Redis = redis
	_, host, _ := strings.Cut(redis, "://")
	_, embedded := c.Embedded()
	return !embedded && strings.Contains(strings.Join(rest, " "), "@") || c.Validate() != nil && strings.Contains(host, ":")
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
	dir, embedded := cfg.store.Embedded()
	if embedded && os.Getenv("GOGC") == "" { // the logs are in this heap: less of it is kept free for garbage
		debug.SetGCPercent(50)
	}
	data := "in Redis"
	switch {
	case embedded && dir == "":
		data = "in memory: it is lost when this process ends (-redis embedded:DIR keeps it)"
		cfg.log.Warn("redis is embedded, in memory only: everything is lost when this process ends; -redis embedded:DIR keeps it, and -redis redis://… serves many nodes")
	case embedded:
		if whole, err := filepath.Abs(dir); err == nil {
			dir = whole
		}
		data = dir
		cfg.log.Info("redis is embedded, for this one node: what is acknowledged is on disk", slog.String("dir", dir))
	}
	if cfg.open {
		cfg.log.Warn("-insecure-open: whoever can connect may read, write and delete every session; -auth says who may do what", slog.String("listen", cfg.listen))
	}
	page := scheme + "://" + listener.Addr().String() + "/"
	cfg.log.Info("gapless serves", slog.String("page", page), slog.String("node", cfg.sse.Node))
	if terminal, err := os.Stdout.Stat(); err == nil && terminal.Mode()&os.ModeCharDevice != 0 {
		fmt.Print(cli.Welcome(page, data))
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
