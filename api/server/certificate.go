package server

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Certificate is a certificate and its key in two files that other programs replace: certbot, cert-manager, a
// Kubernetes secret (which swaps symbolic links). A handshake reads the files again once in a while and compares their
// contents, so it does not matter how they were replaced. If the new pair is bad or half replaced, the current one
// stays in use.
type Certificate struct {
	certFile, keyFile string
	Every             time.Duration // minimum time between two checks of the files
	log               *slog.Logger

	mu     sync.Mutex
	looked time.Time
	text   [2][]byte // contents of both files, from which pair was made
	pair   *tls.Certificate
	failed string // why the last check changed nothing; it is logged once
}

// OpenCertificate reads both files, which must be valid at the start.
func OpenCertificate(certFile, keyFile string, log *slog.Logger) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, Every: 5 * time.Second, log: log}
	if _, err := c.load(); err != nil {
		return nil, fmt.Errorf("read the certificate (-tls-cert, -tls-key): %w", err)
	}
	c.looked = time.Now()
	return c, nil
}

// Get implements tls.Config.GetCertificate.
func (c *Certificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < c.Every {
		return c.pair, nil
	}
	c.looked = time.Now()
	changed, err := c.load()
	switch {
	case err != nil && err.Error() != c.failed:
		c.failed = err.Error()
		c.log.Error("the new certificate is not used, the former one still is", slog.Any("err", err), slog.Time("valid_until", c.pair.Leaf.NotAfter))
	case err == nil && changed:
		c.failed = ""
		c.log.Info("the certificate was replaced", slog.Time("valid_until", c.pair.Leaf.NotAfter))
	}
	return c.pair, nil
}

// load reads the files, and replaces the pair if they have changed. mu must be held, unless c is not shared yet.
func (c *Certificate) load() (changed bool, err error) {
	cert, err := os.ReadFile(c.certFile)
	if err != nil {
		return false, err
	}
	key, err := os.ReadFile(c.keyFile)
	if err != nil {
		return false, err
	}
	if c.pair != nil && bytes.Equal(cert, c.text[0]) && bytes.Equal(key, c.text[1]) {
		c.failed = ""
		return false, nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return false, fmt.Errorf("%s and %s: %w", c.certFile, c.keyFile, err)
	}
	c.text, c.pair = [2][]byte{cert, key}, &pair
	return true, nil
}
