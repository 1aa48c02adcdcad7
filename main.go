// Gapless streams AI answers to browsers by Server-Sent Events and never loses, doubles
// or reorders a chunk. See README.md.
package main

import (
	"cmp"
	"context"
	"embed"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"gapless/api"
	"gapless/api/auth"
	"gapless/api/cli"
	"gapless/api/model"
	"gapless/api/server"
	"gapless/api/traces"
	"gapless/sse"
	"gapless/store"
	"gapless/web"
)

//go:embed openapi.yaml
var contract []byte

//go:embed docs/*.md
var docs embed.FS

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	args := os.Args[1:]
	if len(args) > 1 && args[0] == "help" { // help COMMAND is COMMAND -help
		args = []string{args[1], "-help"}
	}
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
	server server.Config
	store  store.Config
	sse    sse.Config
	api    api.Config
	auth   auth.Config
	model  model.Config
	traces traces.Config
	log    *slog.Logger
}

// parse reads flags, and for those that are not given their environment variables, and reports all mistakes together.
func parse(args []string, env func(string) (string, bool)) (config, error) {
	cfg := config{server: server.DefaultConfig(), store: store.DefaultConfig(), sse: sse.DefaultConfig(), api: api.DefaultConfig(), auth: auth.DefaultConfig(), model: model.DefaultConfig()}
	cfg.store.Redis = store.Embedded + ":gapless-data"
	cfg.sse.Node, _ = os.Hostname()

	fs := flag.NewFlagSet("gapless", flag.ContinueOnError)
	var level slog.Level
	var logFormat string
	showVersion := fs.Bool("version", false, "print the version and exit")
	fs.TextVar(&level, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn or error")
	fs.StringVar(&logFormat, "log-format", "text", "format of the log: text or json")
	cfg.server.Flags(fs)
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
	version, commit := build()
	if *showVersion {
		fmt.Println("gapless", version, commit, runtime.Version(), runtime.GOOS+"/"+runtime.GOARCH)
		return cfg, flag.ErrHelp
	}
	switch logFormat {
	case "text":
		cfg.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	case "json":
		cfg.log = slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	default:
		errs = append(errs, fmt.Errorf("-log-format: must be text or json (%q)", logFormat))
	}
	if len(errs) == 0 {
		for _, line := range cli.Unknown(os.Environ(), fs, model.KeyVariable, "GAPLESS_TOKEN") {
			cfg.log.Warn(line)
		}
	}

	cfg.model.Key, _ = env(model.KeyVariable)
	if cfg.model.URL != "" && !given["model"] {
		cfg.model.Kind = "openai"
	}
	local, demo, limits := cfg.server.Loopback(), cfg.model.Kind == "demo", &cfg.api.Limits
	switch {
	case !given["demo"]:
		cfg.api.Demo = demo && local && cfg.auth.Source == ""
	case cfg.api.Demo && !demo:
		errs = append(errs, errors.New("-demo: needs -model demo"))
	}
	if !local && len(cfg.api.Hosts) == 0 {
		cfg.api.Hosts = nil // reachable by more names than can be known here
	}
	// On loopback, the address is usually a proxy's, which all its clients share. But a limit of callers that somebody has set is
	// meant.
	limits.Addresses = !local || len(limits.TrustedProxies) > 0
	for name := range given {
		limits.Addresses = limits.Addresses || strings.HasPrefix(name, "caller-")
	}
	limits.Tokens = cfg.auth.Source != ""
	// Responses other than streams are small: a client that accepts nothing of one is gone.
	cfg.api.WriteTimeout, limits.WriteTimeout = min(cfg.sse.WriteTimeout, cfg.api.WriteTimeout), cfg.sse.WriteTimeout
	if cfg.api.Look = cfg.sse.Reconcile; cfg.store.Grace < 3*cfg.api.Look {
		errs = append(errs, fmt.Errorf("-grace: %v is less than three times -reconcile (%v): a healthy node needs that time to renew its messages", cfg.store.Grace, cfg.sse.Reconcile))
	}
	dir, embedded := cfg.store.Embedded()
	cfg.api.Forgetful = embedded && dir == ""
	cfg.sse.Kept = cfg.store.HistoryTTL
	for _, logger := range []**slog.Logger{&cfg.server.Logger, &cfg.store.Logger, &cfg.sse.Logger, &cfg.api.Logger, &cfg.auth.Logger, &limits.Logger, &cfg.model.Logger} {
		*logger = cfg.log
	}
	on, err := traces.Wanted(env)
	cfg.traces = traces.Config{On: on, Node: cfg.sse.Node, Version: version, Logger: cfg.log}
	errs = append(errs, err, cfg.server.Validate(limits.Tokens), cfg.store.Validate(), cfg.sse.Validate(), cfg.api.Validate(), cfg.auth.Validate(), cfg.model.Validate())
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

// run serves until ctx ends.
func run(ctx context.Context, cfg config) error {
	s, err := server.Open(cfg.server)
	if err != nil {
		return err
	}
	defer s.Close()
	tracer, err := traces.Open(ctx, cfg.traces)
	if err != nil {
		return err
	}
	if tracer != nil { // a nil one would be no nil interface
		cfg.store.Instrument, cfg.sse.Tracer, cfg.api.Tracer = tracer.Redis, tracer, tracer
	}
	logs, err := store.Open(cfg.store)
	if err != nil {
		return err
	}
	// The heap stays within nine tenths of what the container may have (GOMEMLIMIT, if that
	// is not set): better to collect more often than to be killed.
	if _, err := memlimit.Set(memlimit.WithProvider(memlimit.FromCgroup)); err != nil {
		cfg.log.Debug("no limit of memory was set", slog.Any("err", err))
	}
	if _, embedded := cfg.store.Embedded(); embedded && os.Getenv("GOGC") == "" { // the logs are in this heap: less of it is kept free for garbage
		debug.SetGCPercent(50)
	}
	if cfg.auth.Source != "" {
		tokens, err := auth.Open(cfg.auth)
		if err != nil {
			logs.Close()
			return err
		}
		defer tokens.Close()
		cfg.api.Auth = tokens
	}
	cfg.sse.Back = s.Back
	hub := sse.NewHub(cfg.sse, logs)
	if cfg.api.Guide, err = fs.Sub(docs, "docs"); err != nil {
		panic(err) // the name is a constant
	}
	handler := api.New(cfg.api, logs, hub, model.Open(cfg.model), web.Files, contract, metrics(logs, hub))
	return s.Serve(ctx, server.Node{API: handler, Config: cfg.api, Hub: hub, Logs: logs, Traces: tracer}, func() { welcome(cfg, s.Page()) })
}

// welcome says where page and data are.
func welcome(cfg config, page string) {
	dir, embedded := cfg.store.Embedded()
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
	if cfg.server.Open {
		cfg.log.Warn("-insecure-open: whoever can connect may read, write and delete every session; -auth says who may do what", slog.String("listen", cfg.server.Listen))
	}
	cfg.log.Info("gapless serves", slog.String("page", page), slog.String("node", cfg.sse.Node))
	if terminal, err := os.Stdout.Stat(); err == nil && terminal.Mode()&os.ModeCharDevice != 0 {
		fmt.Print(cli.Welcome(page, data))
	}
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
