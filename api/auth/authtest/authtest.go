// Package authtest makes tokens for tests of several packages.
package authtest

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Issuer has a secret, and a file that contains it.
type Issuer struct {
	File   string
	secret []byte
}

// New makes an issuer with a new secret.
func New(t testing.TB) *Issuer {
	t.Helper()
	dir, err := os.MkdirTemp("", "issuer-") // the test's own directory contains its name, which may have a comma
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	i := &Issuer{File: filepath.Join(dir, "secret"), secret: []byte(rand.Text() + rand.Text())}
	if err := os.WriteFile(i.File, append(i.secret, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

// Source returns the value for -auth.
func (i *Issuer) Source() string { return "secret:" + i.File }

// May is what a token grants: the sessions, or patterns of them, for each action.
type May map[string][]string

// Token makes a token that is valid for the given time.
func (i *Issuer) Token(life time.Duration, may May) string {
	return i.Sign(jwt.MapClaims{"exp": float64(time.Now().Add(life).UnixMilli()) / 1000, "sub": "somebody", "gapless": may})
}

// Sign makes a token with any claims.
func (i *Issuer) Sign(claims jwt.MapClaims) string {
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(i.secret)
	if err != nil {
		panic(err) // the claims cannot be expressed in JSON
	}
	return token
}
