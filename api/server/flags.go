package server

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"time"
)

// Config is where a node listens, and how long connections and a shutdown may take.
type Config struct {
	// Listen is the address of the API and the page.
	Listen string
	// TLSCert and TLSKey are files (Certificate). Without them, Listen speaks plain HTTP.
	TLSCert, TLSKey string
	// H2C accepts HTTP/2 without TLS, too.
	H2C bool
	// Open means that everybody who can connect may do everything, also from other machines.
	Open bool
	// Metrics and Profiles are further addresses, for /metrics and for profiles. Empty: none.
	Metrics, Profiles string
	// Drain is how long a shutdown may take.
	Drain time.Duration
	// Idle is how long a connection without a request is kept.
	Idle time.Duration
	// HeaderTimeout is how long the header of a request, or a TLS handshake, may take.
	HeaderTimeout time.Duration

	Logger *slog.Logger
}

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{Listen: "127.0.0.1:8080", Drain: 10 * time.Second, Idle: 2 * time.Minute, HeaderTimeout: 10 * time.Second, Logger: slog.New(slog.DiscardHandler)}
}

// Flags declares the flags of the server. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.StringVar(&c.Listen, "listen", c.Listen, "`address` to listen on; an address other than loopback needs -auth")
	fs.StringVar(&c.TLSCert, "tls-cert", c.TLSCert, "`file` with the certificate and its chain; the server then speaks https and HTTP/2, and reloads the file when it changes")
	fs.StringVar(&c.TLSKey, "tls-key", c.TLSKey, "`file` with the private key of -tls-cert")
	fs.BoolVar(&c.H2C, "h2c", c.H2C, "also accept HTTP/2 without TLS, from proxies that use prior knowledge")
	fs.BoolVar(&c.Open, "insecure-open", c.Open, "listen on addresses other than loopback without -auth: anyone who can connect may read, write and delete everything")
	fs.StringVar(&c.Metrics, "metrics", c.Metrics, "additional `address` that serves only /metrics, without a token; keep it away from strangers")
	fs.StringVar(&c.Profiles, "pprof", c.Profiles, "loopback `address` that serves profiles at /debug/pprof/; off by default")
	fs.DurationVar(&c.Drain, "drain", c.Drain, "how long a shutdown may take; viewers are moved to other nodes during this time")
	fs.DurationVar(&c.Idle, "idle-timeout", c.Idle, "how long an idle connection is kept; it should be longer than that of the proxies in front")
	fs.DurationVar(&c.HeaderTimeout, "header-timeout", c.HeaderTimeout, "how long a request header or a TLS handshake may take")
}

// Validate reports every mistake at once. auth says whether callers must show a token.
func (c Config) Validate(auth bool) error {
	var errs []error
	if c.Drain < 0 {
		errs = append(errs, fmt.Errorf("-drain: must not be negative (%v)", c.Drain))
	}
	if c.HeaderTimeout < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("-header-timeout: must be at least 100ms (%v)", c.HeaderTimeout))
	}
	if c.Idle < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("-idle-timeout: must be at least 100ms (%v)", c.Idle))
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		errs = append(errs, errors.New("-tls-cert, -tls-key: set both or neither"))
	}
	if c.H2C && c.TLSCert != "" {
		errs = append(errs, errors.New("-h2c: cannot be combined with -tls-cert, which negotiates HTTP/2 itself"))
	}
	_, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		errs = append(errs, notAnAddress("-listen", c.Listen, "127.0.0.1:8080"))
	}
	switch {
	case auth && c.Open:
		errs = append(errs, errors.New("-insecure-open: cannot be combined with -auth"))
	case err == nil && !c.Loopback() && !auth && !c.Open:
		errs = append(errs, fmt.Errorf("-listen: anyone who can reach %s could read, write and delete everything: set -auth, or listen on 127.0.0.1 behind a proxy that authenticates (-insecure-open allows it anyway)", c.Listen))
	}
	if _, _, err := net.SplitHostPort(cmp.Or(c.Metrics, ":0")); err != nil {
		errs = append(errs, notAnAddress("-metrics", c.Metrics, "127.0.0.1:9090"))
	}
	if c.Profiles != "" && !loopback(c.Profiles) {
		errs = append(errs, fmt.Errorf("-pprof: %q is not an address and port on loopback: profiles reveal too much for other machines", c.Profiles))
	}
	return errors.Join(errs...)
}

func notAnAddress(flag, value, example string) error {
	if _, err := strconv.ParseUint(value, 10, 16); err == nil { // only a port
		example = "127.0.0.1:" + value
	}
	return fmt.Errorf("%s: %q is not an address and port, such as %s", flag, value, example)
}

// Loopback reports whether only this machine can connect.
func (c Config) Loopback() bool { return loopback(c.Listen) }

// loopback reports whether address, a host and a port, is on loopback.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}
