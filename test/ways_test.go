package test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"

	"gapless/store/storetest"
)

// way is how the tests connect to a node: over HTTP/1.1 or HTTP/2, with TLS or without.
type way struct {
	tls *tls.Config // nil: without
	h2  bool
	// client uses one connection for all requests, if the protocol allows it.
	client *http.Client
}

// ways holds the way of each node that does not use plain HTTP/1.1, by address.
var ways sync.Map

// overHTTP1 is an argument for launch, not for the program: use HTTP/1.1, although the node has TLS.
const overHTTP1 = "over HTTP/1.1"

// everyWay runs a test over connections that are taken over, over those that are not, and over TLS and HTTP/2. The
// promises are the same.
func everyWay(t *testing.T, run func(t *testing.T, args ...string)) {
	t.Helper()
	t.Parallel()
	cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
	for name, args := range map[string][]string{
		"taken over":        nil,
		"plain":             {"-plain"},
		"HTTP/1.1 over TLS": {"-tls-cert", cert, "-tls-key", key, overHTTP1},
		"HTTP/2 over TLS":   {"-tls-cert", cert, "-tls-key", key},
		"h2c":               {"-h2c"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, args...)
		})
	}
}

// wayOf returns the way to a node with these arguments, and the arguments for the program.
func wayOf(t testing.TB, args []string) (way, []string) {
	t.Helper()
	w := way{h2: slices.Contains(args, "-h2c")}
	if i := slices.Index(args, "-tls-cert"); i >= 0 {
		text, err := os.ReadFile(args[i+1])
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(text) // trusting the certificate itself needs no authority
		w.tls = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
		w.h2 = !slices.Contains(args, overHTTP1)
	}
	w.client = &http.Client{Transport: w.transport(&net.Dialer{}), Timeout: exchange}
	return w, slices.DeleteFunc(slices.Clone(args), func(a string) bool { return a == overHTTP1 })
}

func (w way) scheme() string {
	if w.tls != nil {
		return "https"
	}
	return "http"
}

func schemeAt(addr string) string {
	if w, ok := ways.Load(addr); ok {
		return w.(way).scheme()
	}
	return "http"
}

// transport returns a transport with its own connections. If the dialer limits the kernel's buffer for a viewer that
// does not read, the transport buffers little, too.
func (w way) transport(dialer *net.Dialer) *http.Transport {
	p := &http.Protocols{}
	p.SetHTTP1(!w.h2)
	p.SetHTTP2(w.h2 && w.tls != nil)
	p.SetUnencryptedHTTP2(w.h2 && w.tls == nil)
	t := &http.Transport{DialContext: dialer.DialContext, TLSClientConfig: w.tls, Protocols: p, MaxIdleConnsPerHost: 64, DisableCompression: true}
	if dialer.Control != nil {
		t.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10}
	}
	return t
}

// ask makes a viewer's request, on its own connection unless HTTP/2 shares it. done releases it.
func (w way) ask(ctx context.Context, v *viewer, addr string) (response *http.Response, done func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	transport := w.client.Transport.(*http.Transport)
	mine := v.dialer.Control != nil || !w.h2
	if mine {
		transport = w.transport(&v.dialer)
	}
	done = func() {
		cancel()
		if mine {
			transport.CloseIdleConnections()
		}
	}
	r, err := http.NewRequestWithContext(ctx, "GET", w.scheme()+"://"+addr+"/v1/sessions/"+v.session+"/stream"+v.query, nil)
	if err == nil {
		if v.lastID != "" {
			r.Header.Set("Last-Event-ID", v.lastID)
		}
		if v.token != "" {
			r.Header.Set("Authorization", "Bearer "+v.token)
		}
		response, err = transport.RoundTrip(r)
	}
	if err == nil && (response.ProtoMajor == 2) != w.h2 {
		v.fault("it was answered over %s", response.Proto)
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return response, done, nil
}

// askPlainly is ask in plain HTTP/1.1, byte for byte.
func (v *viewer) askPlainly(ctx context.Context, addr string) (response *http.Response, done func(cut bool), err error) {
	conn, err := v.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	done = func(cut bool) {
		if cut {
			_ = conn.(*net.TCPConn).SetLinger(0)
		}
		stop()
		_ = conn.Close()
	}
	if _, err = io.WriteString(conn, v.request(addr)); err == nil {
		response, err = http.ReadResponse(bufio.NewReader(conn), nil)
	}
	if err != nil {
		done(false)
		return nil, nil, err
	}
	return response, done, nil
}

// stream begins the response, over the node's way.
func (v *viewer) stream(ctx context.Context, addr string) (response *http.Response, done func(cut bool), err error) {
	w, ok := ways.Load(addr)
	if !ok {
		return v.askPlainly(ctx, addr)
	}
	response, end, err := w.(way).ask(ctx, v, addr)
	return response, func(bool) { end() }, err
}
