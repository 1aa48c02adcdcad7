// Package server is the process around the API: its sockets, TLS, what is served at addresses of its own, and the order in which
// a node stops.
package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"gapless/api"
	"gapless/api/limit"
	"gapless/api/traces"
	"gapless/sse"
	"gapless/store"
)

// Server has a node's sockets.
type Server struct {
	cfg         Config
	log         *slog.Logger
	listener    net.Listener
	returned    *sse.Returned
	certificate *Certificate // nil: plain HTTP
	profiles    net.Listener // nil: none
	metrics     net.Listener
}

// Open listens, and reads the certificate. Nothing is served until Serve. The caller must call Close.
func Open(cfg Config) (*Server, error) {
	s := &Server{cfg: cfg, log: cfg.Logger}
	if err := s.open(); err != nil {
		s.Close()
		return nil, err
	}
	s.returned = sse.NewReturned(s.listener.Addr())
	s.returned.Idle = cfg.Idle
	return s, nil
}

func (s *Server) open() (err error) {
	for _, l := range []struct {
		to            *net.Listener
		address, flag string
	}{{&s.listener, s.cfg.Listen, "-listen"}, {&s.profiles, s.cfg.Profiles, "-pprof"}, {&s.metrics, s.cfg.Metrics, "-metrics"}} {
		if l.address == "" {
			continue
		}
		if *l.to, err = net.Listen("tcp", l.address); err != nil {
			return fmt.Errorf("listen on %s (%s): %w", l.address, l.flag, err)
		}
	}
	if s.cfg.TLSCert != "" {
		s.certificate, err = OpenCertificate(s.cfg.TLSCert, s.cfg.TLSKey, s.log)
	}
	return err
}

// Close closes the sockets.
func (s *Server) Close() {
	for _, l := range []net.Listener{s.listener, s.profiles, s.metrics} {
		if l != nil {
			_ = l.Close() // it may be closed already
		}
	}
}

// Page returns the address of the page, with a slash at its end.
func (s *Server) Page() string {
	if s.certificate != nil {
		return "https://" + s.listener.Addr().String() + "/"
	}
	return "http://" + s.listener.Addr().String() + "/"
}

// Back is for sse.Config: it takes back connections that a hub had taken over.
func (s *Server) Back(c net.Conn, read []byte) { s.returned.Back(c, read) }

// Node is what a server serves, and what it stops at the end.
type Node struct {
	API    *api.API
	Config api.Config // that API has
	Hub    *sse.Hub
	Logs   *store.Store
	Traces *traces.Traces // nil: none
}

// Serve serves n until ctx ends, and then stops it in the order that loses nothing: not ready, viewers, calls, store. It calls
// begun when it serves.
func (s *Server) Serve(ctx context.Context, n Node, begun func()) (err error) {
	defer s.aside("-pprof", s.profiles, profiles())()
	defer s.aside("-metrics", s.metrics, n.API.Metrics())()
	server := s.http(n)
	bounded := n.API.Listener(s.listener)
	failed := make(chan error, 1)
	go func() { // ended by Shutdown or Close; waited for below
		if s.certificate != nil {
			failed <- server.ServeTLS(bounded, "", "")
			return
		}
		go func() { _ = server.Serve(s.returned) }() // ended by Shutdown or Close; connections with TLS are not taken over
		failed <- server.Serve(bounded)
	}()
	begun()
	var d drain
	select {
	case err = <-failed:
		d = s.drain()
		err = fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
		d = s.drain()
		err = d.calls(n, server)
		<-failed
		s.log.Info("gapless has drained", slog.Duration("took", time.Since(d.begun)))
	}
	d.rest(n)
	return err
}

// drain is a shutdown. Its steps end at a part of the drain time.
type drain struct {
	*Server
	begun time.Time
}

// Percent of the drain time.
const (
	viewersLeave = 60  // viewers leave, spread over this time; calls are still served
	callsEnd     = 80  // what is under way may finish
	answersEnd   = 95  // uploads are told to go elsewhere, answers of the model end as failed
	storeCloses  = 4   // after that: a silent Redis holds up nobody
	tracesEnd    = 100 // the last traces are sent
)

func (s *Server) drain() drain { return drain{s, time.Now()} }

func (d drain) until(percent time.Duration) (context.Context, context.CancelFunc) {
	return context.WithDeadline(context.Background(), d.begun.Add(d.cfg.Drain*percent/100))
}

// calls ends viewers and calls. While viewers leave, calls are served, so that none fails that was sent before its sender saw
// that the node is not ready.
func (d drain) calls(n Node, server *http.Server) error {
	d.log.Info("gapless drains", slog.Duration("within", d.cfg.Drain))
	n.API.Drain()
	n.Hub.Drain(d.cfg.Drain * viewersLeave / 100)
	leave, cancel := d.until(viewersLeave)
	defer cancel()
	n.API.Quiet(leave, d.cfg.Drain/10)

	soft, cancel := d.until(callsEnd)
	defer cancel()
	n.API.Wait(soft)
	_ = server.Shutdown(soft)

	hard, cancel := d.until(answersEnd)
	defer cancel()
	n.API.End()
	n.API.Wait(hard)
	err := server.Shutdown(hard)
	if err != nil {
		d.log.Warn("requests were broken off: the drain time is over", slog.Any("err", err))
		err = server.Close()
	}
	return err
}

// rest closes what the calls have used.
func (d drain) rest(n Node) {
	closed := make(chan struct{})
	go func() { // waited for below, for a while
		n.Hub.Close()
		n.Logs.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(d.cfg.Drain * storeCloses / 100):
	}
	last, cancel := d.until(tracesEnd)
	defer cancel()
	if lost := n.Traces.Close(last); lost != nil {
		d.log.Warn("the last traces were not sent", slog.Any("err", lost))
	}
}

// http returns the HTTP server for the API.
func (s *Server) http(n Node) *http.Server {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(s.cfg.H2C)
	handler := n.Traces.Handler(n.API)
	server := &http.Server{
		Handler:           handler,
		ConnContext:       sse.WithConn,
		ReadHeaderTimeout: s.cfg.HeaderTimeout,
		// This is for bodies: uploads remove it, and bodies that make progress move it (api).
		ReadTimeout: max(n.Config.BodyTimeout, s.cfg.HeaderTimeout),
		IdleTimeout: s.cfg.Idle,
		// This is also for responses that the API knows nothing of. The API moves it with each piece of a response; streams and
		// uploads remove it.
		WriteTimeout: n.Config.WriteTimeout,
		// A header that is a little longer than the API allows is read, so that the refusal can say so.
		MaxHeaderBytes: n.Config.URLMax + n.Config.HeaderMax,
		ConnState:      limit.State,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		Protocols:      protocols,
		HTTP2: &http.HTTP2Config{
			// The tabs and widgets of a browser share a connection. A proxy that needs more streams opens another one.
			MaxConcurrentStreams: 100,
			// Each stream has a write timeout. This one is for a connection that accepts nothing at all, on which not even the
			// end of a stream can be sent.
			WriteByteTimeout: n.Config.WriteTimeout,
		},
	}
	if s.certificate != nil {
		server.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.certificate.Get}
		// Browsers that have been here over https do not use http again (RFC 6797). Browsers' own lists ask for a year. Other
		// names under this one are not ours.
		server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Strict-Transport-Security", "max-age=31536000")
			handler.ServeHTTP(w, r)
		})
	}
	return server
}

// aside serves handler, which is not for users, on l, until stop is called. If l is nil, it does nothing.
func (s *Server) aside(flag string, l net.Listener, handler http.Handler) (stop func()) {
	if l == nil {
		return func() {}
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 8 << 10,
		WriteTimeout: time.Minute, // a profile takes half a minute
		ErrorLog:     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	go func() { _ = server.Serve(l) }() // ended by stop
	s.log.Info("gapless serves aside", slog.String("flag", flag), slog.String("at", "http://"+l.Addr().String()))
	return func() { _ = server.Close() }
}

// profiles serves profiles to this machine only: no page in a browser can reach them by another name (DNS rebinding).
func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/cmdline", http.NotFound) // it may contain a password
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !loopback(r.Host) {
			http.Error(w, "profiles are only served to loopback", http.StatusMisdirectedRequest)
			return
		}
		mux.ServeHTTP(w, r)
	})
}
