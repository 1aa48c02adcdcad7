package auth

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/time/rate"

	"gapless/api/auth/authtest"
)

// issuer publishes keys, and may be unreachable.
type issuer struct {
	*httptest.Server
	asked  atomic.Int64
	away   atomic.Bool
	slowly chan struct{} // if not nil, no request gets a response until it is closed

	mu   sync.Mutex
	keys []byte
}

func newIssuer(t *testing.T) *issuer {
	i := &issuer{}
	i.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.asked.Add(1)
		i.mu.Lock()
		keys, slowly := i.keys, i.slowly
		i.mu.Unlock()
		if slowly != nil {
			<-slowly
		}
		switch {
		case i.away.Load():
			http.Error(w, "away", http.StatusServiceUnavailable)
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/keys", http.StatusFound)
		default:
			_, _ = w.Write(keys)
		}
	}))
	t.Cleanup(i.Close)
	return i
}

// publish replaces the keys with the public part of each key.
func (i *issuer) publish(t *testing.T, keys map[string]any, options ...func(*jwkset.JWKOptions)) {
	t.Helper()
	all := jwkset.NewMemoryStorage()
	for kid, key := range keys {
		o := jwkset.JWKOptions{Marshal: jwkset.JWKMarshalOptions{Private: true}, Metadata: jwkset.JWKMetadataOptions{KID: kid}}
		for _, option := range options {
			option(&o)
		}
		jwk, err := jwkset.NewJWKFromKey(key, o)
		if err == nil {
			err = all.KeyWrite(t.Context(), jwk)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := all.JSONWithOptions(t.Context(), jwkset.JWKMarshalOptions{Private: true}, jwkset.JWKValidateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = text
}

func (i *issuer) open(t *testing.T) *Auth {
	t.Helper()
	return open(t, func(c *Config) { c.Source = i.URL + "/keys" })
}

func sign(t *testing.T, method jwt.SigningMethod, kid string, key any) string {
	t.Helper()
	token := jwt.NewWithClaims(method, jwt.MapClaims{"exp": time.Now().Unix() + 60, "gapless": authtest.May{"read": {"s"}}})
	if kid != "" {
		token.Header["kid"] = kid
	}
	text, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func taken(t *testing.T, a *Auth, token string) {
	t.Helper()
	if g, err := a.Read(token); err != nil || !g.May(Read, "s") {
		t.Errorf("not taken: %v", err)
	}
}

func edKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rsaKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// often fetches keys for unknown names as often as tokens ask for them.
func often(a *Auth) *Auth {
	a.jwks.limit.SetLimit(rate.Inf)
	return a
}

func TestJWKS_theKeySaysTheAlgorithm(t *testing.T) {
	i := newIssuer(t)
	rs, es, es384, ed := rsaKey(t), ecKey(t, elliptic.P256()), ecKey(t, elliptic.P384()), edKey(t)
	shared := []byte(strings.Repeat("sesame", 8))
	i.publish(t, map[string]any{"rs": &rs.PublicKey, "es": &es.PublicKey, "es384": &es384.PublicKey, "ed": ed.Public(), "oct": shared})
	a := often(i.open(t))
	for _, kid := range []bool{true, false} { // a token without a kid may be signed by any of them
		name := func(n string) string {
			if kid {
				return n
			}
			return ""
		}
		taken(t, a, sign(t, jwt.SigningMethodRS256, name("rs"), rs))
		taken(t, a, sign(t, jwt.SigningMethodES256, name("es"), es))
		taken(t, a, sign(t, jwt.SigningMethodEdDSA, name("ed"), ed))
		refused(t, a, sign(t, jwt.SigningMethodRS512, name("rs"), rs), "not signed")
		refused(t, a, sign(t, jwt.SigningMethodPS256, name("rs"), rs), "not signed")
		refused(t, a, sign(t, jwt.SigningMethodES384, name("es384"), es384), "not signed")
		refused(t, a, sign(t, jwt.SigningMethodHS256, name("oct"), shared), "not signed")
	}
	refused(t, a, sign(t, jwt.SigningMethodRS256, "es", rs), "not in the server's key set")
	refused(t, a, sign(t, jwt.SigningMethodEdDSA, "es", ed), "not in the server's key set")
	refused(t, a, sign(t, jwt.SigningMethodEdDSA, "ed", edKey(t)), "not signed")

	// A public key is no secret: HS256 by the bytes of the public key, in all forms.
	der, err := x509.MarshalPKIXPublicKey(&rs.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	armoured := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	for _, secret := range [][]byte{der, armoured, bytes.TrimSpace(armoured), rs.N.Bytes(), x509.MarshalPKCS1PublicKey(&rs.PublicKey), []byte(ed.Public().(ed25519.PublicKey)), i.keys} {
		for _, kid := range []string{"rs", "ed", ""} {
			refused(t, a, sign(t, jwt.SigningMethodHS256, kid, secret), "not signed")
		}
	}
}

func TestJWKS_keysForEncryptionSignNothing(t *testing.T) {
	i := newIssuer(t)
	es := ecKey(t, elliptic.P256())
	i.publish(t, map[string]any{"k": &es.PublicKey}, func(o *jwkset.JWKOptions) { o.Metadata.USE = jwkset.UseEnc })
	refused(t, i.open(t), sign(t, jwt.SigningMethodES256, "k", es), "not in the server's key set")
}

func TestJWKS_aNewKeyIsFetchedAndOldOnesAreForgotten(t *testing.T) {
	i := newIssuer(t)
	former, next := edKey(t), edKey(t)
	i.publish(t, map[string]any{"1": former.Public()})
	a := often(i.open(t))
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "1", former))
	i.publish(t, map[string]any{"2": next.Public()})
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "2", next))
	refused(t, a, sign(t, jwt.SigningMethodEdDSA, "1", former), "not in the server's key set")
}

// All tokens with a new key wait for the first one's fetch.
func TestJWKS_aNewKeyIsFetchedOnceForAllWhoCome(t *testing.T) {
	i := newIssuer(t)
	former, next := edKey(t), edKey(t)
	i.publish(t, map[string]any{"1": former.Public()})
	a := i.open(t)
	i.publish(t, map[string]any{"1": former.Public(), "2": next.Public()})
	gate := make(chan struct{})
	i.mu.Lock()
	i.slowly = gate
	i.mu.Unlock()
	token := sign(t, jwt.SigningMethodEdDSA, "2", next)
	asked := i.asked.Load()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { taken(t, a, token) })
	}
	for i.asked.Load() == asked {
		time.Sleep(time.Millisecond)
	}
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "1", former)) // a known key waits for nothing
	close(gate)
	wg.Wait()
	if n := i.asked.Load() - asked; n != 1 {
		t.Errorf("the issuer was asked %d times", n)
	}
}

func TestJWKS_strangersCannotHaveTheIssuerAskedMuch(t *testing.T) {
	i := newIssuer(t)
	key := edKey(t)
	i.publish(t, map[string]any{"1": key.Public()})
	a := i.open(t)
	begun := time.Now()
	for _, kid := range []string{"../1", "' OR 1=1 --", "http://127.0.0.1:1/keys", "\x00", "1 ", strings.Repeat("k", 1000)} {
		for range 20 {
			_, err := a.Read(sign(t, jwt.SigningMethodEdDSA, kid, key))
			if bad, ok := errors.AsType[*InvalidError](err); !ok || !strings.Contains(bad.Detail, "not in the server's key set") {
				t.Errorf("not refused: %v", err)
			}
		}
	}
	if n, most := i.asked.Load(), 2+int64(time.Since(begun)/unknownEvery); n > most {
		t.Errorf("the issuer was asked %d times in %v", n, time.Since(begun))
	}
	if took := time.Since(begun); took > unknownEvery {
		t.Errorf("120 tokens were held for %v", took)
	}
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "1", key))
	// Nor can they cause a token to be refused for long whose key is newer than the fetched ones.
	next := edKey(t)
	i.publish(t, map[string]any{"1": key.Public(), "2": next.Public()})
	taken(t, often(a), sign(t, jwt.SigningMethodEdDSA, "2", next))
}

func TestJWKS_anOutageIsSurvived(t *testing.T) {
	i := newIssuer(t)
	key, next := edKey(t), edKey(t)
	i.publish(t, map[string]any{"1": key.Public()})
	var log bytes.Buffer
	a := often(open(t, func(c *Config) {
		c.Source, c.Logger = i.URL+"/keys?sesame", slog.New(slog.NewTextHandler(&log, nil))
	}))
	i.away.Store(true)
	a.jwks.fetch()
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "1", key))
	if err := a.Ready(t.Context()); err != nil {
		t.Errorf("with keys it is not ready: %v", err)
	}
	// A token with an unknown key may still be the issuer's.
	if _, err := a.Read(sign(t, jwt.SigningMethodEdDSA, "2", next)); !errors.Is(err, ErrAway) {
		t.Errorf("a new key, while it is away: %v", err)
	}
	i.publish(t, map[string]any{"1": key.Public(), "2": next.Public()})
	i.away.Store(false)
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "2", next))
	refused(t, a, sign(t, jwt.SigningMethodEdDSA, "3", next), "not in the server's key set")
	if text := log.String(); strings.Count(text, "cannot be fetched") != 1 || strings.Contains(text, "sesame") {
		t.Errorf("the log says %s", text)
	}
}

func TestJWKS_anOutageAtTheStartIsSurvived(t *testing.T) {
	i := newIssuer(t)
	key := edKey(t)
	i.publish(t, map[string]any{"1": key.Public()})
	i.away.Store(true)
	a := often(i.open(t))
	for _, kid := range []string{"1", ""} {
		if _, err := a.Read(sign(t, jwt.SigningMethodEdDSA, kid, key)); !errors.Is(err, ErrAway) {
			t.Errorf("kid %q: %v", kid, err)
		}
	}
	if err := a.Ready(t.Context()); !errors.Is(err, ErrAway) {
		t.Errorf("without keys it is ready: %v", err)
	}
	i.away.Store(false)
	if err := a.Ready(context.Background()); err != nil {
		t.Errorf("it does not become ready: %v", err)
	}
	taken(t, a, sign(t, jwt.SigningMethodEdDSA, "", key))
}

func TestJWKS_isFetchedFromNowhereElse(t *testing.T) {
	i := newIssuer(t)
	key := edKey(t)
	i.publish(t, map[string]any{"1": key.Public()})
	a := open(t, func(c *Config) { c.Source = i.URL + "/moved" })
	if _, err := a.Read(sign(t, jwt.SigningMethodEdDSA, "1", key)); !errors.Is(err, ErrAway) {
		t.Errorf("a redirect was followed: %v", err)
	}
	// Nor are keys fetched from where a token says.
	other := newIssuer(t)
	evil := edKey(t)
	other.publish(t, map[string]any{"1": evil.Public()})
	b := often(i.open(t))
	token := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{"exp": time.Now().Unix() + 60, "gapless": authtest.May{"admin": {"*"}}})
	token.Header["kid"], token.Header["jku"], token.Header["x5u"] = "1", other.URL, other.URL
	token.Header["jwk"] = map[string]string{"kty": "OKP", "crv": "Ed25519", "x": fmt.Sprintf("%x", []byte(evil.Public().(ed25519.PublicKey)))}
	text, err := token.SignedString(crypto.Signer(evil))
	if err != nil {
		t.Fatal(err)
	}
	refused(t, b, text, "not signed")
	if n := other.asked.Load(); n != 0 {
		t.Errorf("the token's own place was asked %d times", n)
	}
}
