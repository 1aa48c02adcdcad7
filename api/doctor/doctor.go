// Package doctor finds out, from a client's position, why a Gapless behind proxies does not stream,
// and says what to do.
//
// It uses only the public API: it makes its own session, appends to it, views it, and deletes it.
// It measures the way between here and the nodes: an event is late if it comes long after its
// append was acknowledged. It reports only what it saw. It cannot know which of several proxies is
// to blame.
package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"gapless/api/client"
)

// Config describes what to examine, and how patiently.
type Config struct {
	// URL is the server's address for its users; the API is at /v1 below it.
	URL *url.URL
	client.Access
	// Origin is another origin whose pages use the server. Empty: CORS is not examined.
	Origin string
	// Idle is how long to listen in silence. It must be longer than a heartbeat, 15 s by default.
	Idle time.Duration
	// Late is when an event counts as late. A second is ten times what distance explains.
	Late time.Duration
	// Patience is how long to wait for a late event.
	Patience time.Duration
	// Progress is called with what the doctor waits for.
	Progress func(text string)
}

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{Idle: 20 * time.Second, Late: time.Second, Patience: 8 * time.Second, Progress: func(string) {}}
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	if c.URL == nil || c.URL.Host == "" || c.URL.Scheme != "http" && c.URL.Scheme != "https" {
		errs = append(errs, errors.New("URL: give the address that users call, with http:// or https://"))
	}
	if o, err := url.Parse(c.Origin); c.Origin != "" && (err != nil || o.Host == "" || o.Scheme+"://"+o.Host != c.Origin) {
		errs = append(errs, fmt.Errorf("-origin: %q is none: an origin is a scheme and a host, such as https://chat.example, and nothing behind it", c.Origin))
	}
	if c.Idle <= 0 {
		errs = append(errs, fmt.Errorf("-idle: %v is no time to listen", c.Idle))
	}
	return errors.Join(errs...)
}

// Finding is the result of one check.
type Finding struct {
	Check  string `json:"check"`
	OK     bool   `json:"ok"`
	Found  string `json:"found"`
	Remedy string `json:"remedy,omitzero"` // what to do, if not OK
}

// Examine makes all checks, and passes each finding to found at once. It ends early if nothing
// works.
func Examine(ctx context.Context, cfg Config, found func(Finding)) {
	d := &doctor{Config: cfg, found: func(f Finding) {
		if ctx.Err() == nil { // otherwise it is not the server's fault
			found(f)
		}
	}}
	d.client = d.HTTP()
	defer d.client.CloseIdleConnections()
	if !d.reach(ctx) {
		return
	}
	defer d.leave()
	if !d.events(ctx) {
		return
	}
	d.compression(ctx)
	d.upload(ctx)
	d.silence(ctx)
	d.resume(ctx)
	d.protocol(ctx)
	if cfg.Origin != "" {
		d.cors(ctx)
	}
}

type doctor struct {
	Config
	found   func(Finding)
	client  *http.Client // for calls, on reused connections
	session string       // the doctor's own session
	last    int64        // its last chunk
	filled  bool         // much was appended to fill a buffer
	proto   string       // the server's protocol
}

func (d *doctor) ok(check, format string, args ...any) {
	d.found(Finding{Check: check, OK: true, Found: fmt.Sprintf(format, args...)})
}

func (d *doctor) problem(check, found, remedy string) { d.found(Finding{check, false, found, remedy}) }

func (d *doctor) request(ctx context.Context, method, path string, body io.Reader) *http.Request {
	path, query, _ := strings.Cut(path, "?")
	at := d.URL.JoinPath(path) // #nosec G125 -- the path is ours
	at.RawQuery = query
	r, err := http.NewRequestWithContext(ctx, method, at.String(), body)
	if err != nil {
		panic(err) // method and path are constants, and the URL was parsed
	}
	d.Authorize(r)
	return r
}

// call makes a call with a JSON body, and reads the whole response.
func (d *doctor) call(ctx context.Context, method, path, body string) (response *http.Response, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.Patience)
	defer cancel()
	r := d.request(ctx, method, path, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if response, err = d.client.Do(r); err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return response, answer, err
}

func (d *doctor) path(call string) string { return "/v1/sessions/" + d.session + call }

// append appends, and returns when that was acknowledged.
func (d *doctor) append(ctx context.Context, body string) (last int64, acked time.Time, err error) {
	response, answer, err := d.call(ctx, "POST", d.path("/chunks"), body)
	acked = time.Now()
	if err != nil {
		return 0, acked, err
	}
	var stored struct {
		Last int64 `json:"last_seq"`
	}
	if response.StatusCode != http.StatusCreated || json.Unmarshal(answer, &stored) != nil {
		return 0, acked, fmt.Errorf("POST %s was answered with %s: %.300s", d.path("/chunks"), response.Status, answer)
	}
	d.last = stored.Last
	return stored.Last, acked, nil
}

// fill appends more than the buffers of proxies hold, so that they release their contents.
func (d *doctor) fill(ctx context.Context) {
	if !d.filled {
		d.filled = true
		chunk := `{"content":"` + strings.Repeat("x", 32<<10) + `"}`
		for range 2 { // servers limit the size of an array
			_, _, _ = d.append(ctx, "["+strings.Repeat(chunk+",", 7)+chunk+"]")
		}
	}
}

const fillSize = "512 KiB"

// reach makes the session.
func (d *doctor) reach(ctx context.Context) bool {
	const check = "reach"
	begun := time.Now()
	response, answer, err := d.call(ctx, "POST", "/v1/sessions", "{}")
	if err != nil {
		d.problem(check, fmt.Sprintf("%s cannot be reached: %v", d.URL, err), whyNot(err))
		return false
	}
	var made struct{ ID string }
	if err := json.Unmarshal(answer, &made); err != nil || made.ID == "" || response.StatusCode/100 != 2 {
		d.problem(check, fmt.Sprintf("POST %s was answered with %s: %.300s", response.Request.URL, response.Status, bytes.TrimSpace(answer)), whyStatus(response))
		return false
	}
	d.session, d.proto = made.ID, response.Proto
	d.ok(check, "the server answers after %v, over %s", round(time.Since(begun)), response.Proto)
	return true
}

func whyNot(err error) string {
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var header tls.RecordHeaderError
	switch {
	case errors.As(err, &authority):
		return "the certificate's authority is not known here: serve the certificates that lead to it, too (fullchain.pem), or name your own authority's file with -ca"
	case errors.As(err, &name):
		return "the certificate is for other names: call the server by one of them, or have one made for this one"
	case errors.As(err, &invalid):
		return "renew the certificate, and look at the clocks on both sides"
	case errors.As(err, &header), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "this port speaks no TLS: call it by http://, or give the server -tls-cert and -tls-key"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there: is the server or the proxy running, and is -listen an address that is reachable from here?"
	case errors.Is(err, context.DeadlineExceeded):
		return "look for a firewall that drops packets, and for a proxy whose servers are all down"
	}
	return "look at the name and the port, and at what is between here and there"
}

func whyStatus(r *http.Response) string {
	switch r.StatusCode {
	case http.StatusUnauthorized:
		return "the server wants a token: -token-file, or the environment variable GAPLESS_TOKEN"
	case http.StatusForbidden:
		return "the token may not make sessions: the doctor needs one that may read and write sessions of any name"
	case http.StatusMisdirectedRequest:
		return "the server listens on loopback and does not know that it is called by this name: give it -hosts " + r.Request.URL.Hostname()
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		return "the API is not below this URL: give the part in front of /v1, and look whether the proxy passes all paths and methods on"
	case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return "call " + r.Header.Get("Location") + " instead: viewers must not be redirected, some come back to the wrong address"
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return "the proxy has no node, the nodes have no Redis, or Redis refuses writes: look at /readyz?for=writes of each"
	}
	return "look at the server's log, and at the proxy's"
}

// leave deletes the session.
func (d *doctor) leave() {
	response, answer, err := d.call(context.Background(), "DELETE", d.path(""), "")
	if err == nil && response.StatusCode == http.StatusForbidden && d.Token != "" {
		d.ok("delete", "the token may not delete the session %s, which goes by itself (-history-ttl)", d.session)
		return
	}
	if err == nil && response.StatusCode/100 != 2 && response.StatusCode != http.StatusNotFound {
		err = fmt.Errorf("%s: %.300s", response.Status, answer)
	}
	if err != nil {
		d.problem("delete", fmt.Sprintf("the session %s could not be deleted: %v", d.session, err), "let the proxy pass DELETE on; what is left goes by itself (-history-ttl)")
	}
}

// round rounds a duration for people.
func round(t time.Duration) time.Duration {
	if t > 10*time.Second {
		return t.Round(time.Second)
	}
	if t > time.Second {
		return t.Round(100 * time.Millisecond)
	}
	return t.Round(time.Millisecond)
}
