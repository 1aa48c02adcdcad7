// Package client is what the commands that call a server have in common: a token, trusted certificates, and an HTTP
// client.
package client

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"strings"
)

// Access is how a command is let in, and whom it trusts.
type Access struct {
	// Token is sent as a bearer token, unless it is empty.
	Token string
	// Roots are the trusted certificates; nil: the system's.
	Roots *x509.CertPool
}

// Flags declares -token-file and -ca. may says what the token must allow. The caller calls read after fs.Parse; it
// reports every mistake at once.
func Flags(fs *flag.FlagSet, may string) (read func(env func(string) (string, bool)) (Access, error)) {
	tokenFile := fs.String("token-file", "", "`file` of a bearer token that may "+may+"; or GAPLESS_TOKEN holds it")
	ca := fs.String("ca", "", "`file` of the certificates that vouch for the server, instead of the system's")
	return func(env func(string) (string, bool)) (a Access, err error) {
		var errs []error
		a.Token, _ = env("GAPLESS_TOKEN")
		if *tokenFile != "" {
			b, err := os.ReadFile(*tokenFile)
			if err != nil {
				errs = append(errs, fmt.Errorf("-token-file: %w", err))
			}
			a.Token = string(b)
		}
		if a.Token = strings.TrimSpace(a.Token); strings.ContainsAny(a.Token, "\r\n \t") {
			errs = append(errs, errors.New("-token-file, GAPLESS_TOKEN: a token is one word"))
		}
		if *ca != "" {
			b, err := os.ReadFile(*ca)
			if a.Roots = x509.NewCertPool(); err == nil && !a.Roots.AppendCertsFromPEM(b) {
				err = fmt.Errorf("%s holds no certificate in PEM", *ca)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("-ca: %w", err))
			}
		}
		return a, errors.Join(errs...)
	}
}

// HTTP returns a client with separate connections. It follows no redirect and decodes nothing: responses are examined
// as they come.
func (a Access) HTTP() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			Proxy:              http.ProxyFromEnvironment,
			TLSClientConfig:    &tls.Config{RootCAs: a.Roots, MinVersion: tls.VersionTLS12},
			ForceAttemptHTTP2:  true,
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Authorize adds the token to a request.
func (a Access) Authorize(r *http.Request) {
	if a.Token != "" {
		r.Header.Set("Authorization", "Bearer "+a.Token)
	}
}
