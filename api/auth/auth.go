// Package auth decides who may do what. It reads a credential, a JWT (RFC 7519), into a Grant. A
// Grant reports whether an action on a session is allowed.
//
// The rules are few and easy to remember:
//
//   - The kind of key decides the algorithm, never the token. Secrets are for HS256. A key of a JWKS
//     is for RS256, ES256 or EdDSA, according to its type.
//   - A token says when it expires. Until then, anyone who holds it may do what it grants. There is
//     no list of revoked tokens: issue short-lived ones.
//   - Whatever could be read in two ways is refused: a duplicate name, a header that must be
//     understood (crit), an unknown action.
//   - An error describes what is wrong with a token only if that is visible without the key, or if
//     the token's signature is valid.
//
// The issuer is not asked again after its token was accepted.
package auth

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/golang-jwt/jwt/v5"
)

// Config describes whose tokens are accepted.
type Config struct {
	// Source is the location of the keys: "secret:FILE[,FILE…]" or the URL of a JWKS. Empty: there
	// is no authentication, and everybody may do everything.
	Source string
	// Issuer and Audience are the required iss and aud; empty: not checked.
	Issuer, Audience string
	// Claim is the name of the claim that contains what a token allows.
	Claim string
	// Cookie is the name of a cookie that may contain the token; empty: none may.
	Cookie string

	Logger *slog.Logger
}

// DefaultConfig returns the defaults of the flags. The claim has the server's name, because a token
// may be for other services as well.
func DefaultConfig() Config {
	return Config{Claim: "gapless", Logger: slog.New(slog.DiscardHandler)}
}

const (
	// leastSecret is the length of HS256's output (RFC 7518, section 3.2), in bytes.
	leastSecret = 32
	// mostToken is longer than any token of an honest issuer, and fast to parse, in bytes.
	mostToken = 8 << 10
	// leeway is how far an issuer's clock may be ahead of ours.
	leeway = 10 * time.Second
	// farthest is 9999-12-31: a later time is a mistake, and overflows somewhere.
	farthest = 253402300799
)

const sourceForms = "secret:FILE[,FILE…] or https://…"

// Validate reports every mistake at once. It reads the files.
func (c Config) Validate() error {
	var errs []error
	if c.Source == "" {
		for flag, value := range map[string]string{"-auth-issuer": c.Issuer, "-auth-audience": c.Audience, "-auth-cookie": c.Cookie} {
			if value != "" {
				errs = append(errs, fmt.Errorf("%s needs -auth", flag))
			}
		}
		return errors.Join(errs...)
	}
	if files, ok := strings.CutPrefix(c.Source, "secret:"); ok {
		_, err := readSecrets(files)
		errs = append(errs, err)
	} else {
		errs = append(errs, checkURL(c.Source))
	}
	if c.Claim == "" {
		errs = append(errs, errors.New("-auth-claim: must not be empty; leave it out for gapless"))
	}
	if c.Cookie != "" && (&http.Cookie{Name: c.Cookie, Value: "v"}).Valid() != nil { // #nosec G124 -- no cookie is set: only its name is checked
		errs = append(errs, fmt.Errorf("-auth-cookie: %q is no name of a cookie", c.Cookie))
	}
	return errors.Join(errs...)
}

func readSecrets(files string) (secrets []jwt.VerificationKey, err error) {
	var errs []error
	for file := range strings.SplitSeq(files, ",") {
		secret, err := os.ReadFile(file)         // #nosec G304 -- the operator names it
		secret = bytes.TrimRight(secret, "\r\n") // an editor or echo adds them
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("-auth: secret: %w", err))
		case len(secret) < leastSecret:
			errs = append(errs, fmt.Errorf("-auth: the secret in %s has %d bytes, less than %d: make one with gapless secret", file, len(secret), leastSecret))
		}
		secrets = append(secrets, secret)
	}
	return secrets, errors.Join(errs...)
}

// checkURL requires that keys come from the named host: anyone who can change them can make tokens.
func checkURL(source string) error {
	u, err := url.Parse(source)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return fmt.Errorf("-auth: it is %s", sourceForms)
	case u.User != nil:
		return errors.New("-auth: a JWKS is public: leave user and password out of its URL")
	case u.Scheme == "http":
		ip := net.ParseIP(u.Hostname())
		if u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return fmt.Errorf("-auth: http is for loopback only, since who changes the keys on their way can make tokens: it is %s", sourceForms)
		}
	}
	return nil
}

// ErrAway means that a token cannot be verified now, because the keys cannot be fetched.
var ErrAway = errors.New("the keys by which tokens are verified cannot be fetched")

// InvalidError refuses a credential. Its text tells the sender what is wrong, and what to do. It
// contains nothing of the token that was not signed.
type InvalidError struct{ Detail string }

func (e *InvalidError) Error() string { return e.Detail }

func invalid(format string, args ...any) error {
	return &InvalidError{fmt.Sprintf(format, args...)}
}

// Auth verifies tokens. Its methods are safe for concurrent use.
type Auth struct {
	cfg    Config
	parser *jwt.Parser
	keys   jwt.Keyfunc
	jwks   *jwks // nil: the keys are secrets
}

// Open reads the secrets, or fetches the keys. If keys cannot be fetched now, they are fetched
// later. The caller must call Close.
func Open(cfg Config) (*Auth, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Auth{cfg: cfg}
	methods := []string{jwt.SigningMethodHS256.Alg()}
	if files, ok := strings.CutPrefix(cfg.Source, "secret:"); ok {
		secrets, err := readSecrets(files)
		if err != nil {
			return nil, err
		}
		a.keys = func(*jwt.Token) (any, error) { return jwt.VerificationKeySet{Keys: secrets}, nil }
	} else {
		methods = []string{jwt.SigningMethodRS256.Alg(), jwt.SigningMethodES256.Alg(), jwt.SigningMethodEdDSA.Alg()}
		var err error
		if a.jwks, err = openJWKS(cfg.Source, cfg.Logger); err != nil {
			return nil, err
		}
		a.keys = a.jwks.keyOf
	}
	options := []jwt.ParserOption{jwt.WithValidMethods(methods), jwt.WithStrictDecoding(), jwt.WithExpirationRequired(), jwt.WithIssuedAt(), jwt.WithLeeway(leeway)}
	if cfg.Issuer != "" {
		options = append(options, jwt.WithIssuer(cfg.Issuer))
	}
	if cfg.Audience != "" {
		options = append(options, jwt.WithAudience(cfg.Audience))
	}
	a.parser = jwt.NewParser(options...)
	return a, nil
}

// Close stops the refreshing of keys.
func (a *Auth) Close() {
	if a.jwks != nil {
		a.jwks.close()
	}
}

// Cookie returns the name of the cookie that may contain a token; empty: none may.
func (a *Auth) Cookie() string { return a.cfg.Cookie }

// Claim returns the name of the claim that contains what a token allows.
func (a *Auth) Claim() string { return a.cfg.Claim }

// Ready returns nil if tokens can be verified. It returns ErrAway until the keys were first fetched.
func (a *Auth) Ready(ctx context.Context) error {
	if a.jwks == nil {
		return nil
	}
	return a.jwks.ready(ctx)
}

// Read verifies a token, and returns what it grants. Errors: *InvalidError, ErrAway.
func (a *Auth) Read(token string) (Grant, error) {
	if len(token) > mostToken {
		return Grant{}, invalid("the token has more than %d bytes", mostToken)
	}
	if err := checkForm(token); err != nil {
		return Grant{}, err
	}
	claims := jwt.MapClaims{}
	if _, err := a.parser.ParseWithClaims(token, claims, a.keys); err != nil {
		return Grant{}, a.explain(claims, err)
	}
	expires, err := claims.GetExpirationTime()
	if err != nil || expires.Unix() > farthest {
		return Grant{}, invalid("the token's exp is not a time: it must be a number of seconds since 1970")
	}
	if !time.Now().Before(expires.Time) { // the leeway is for clocks that are ahead, not for expired tokens
		return Grant{}, expired(expires.Time)
	}
	g := Grant{Expires: expires.Time}
	if g.Subject, err = claims.GetSubject(); err != nil {
		return Grant{}, invalid("the token's sub is not text")
	}
	if g.may, err = readClaim(a.cfg.Claim, claims[a.cfg.Claim]); err != nil {
		return Grant{}, err
	}
	return g, nil
}

// checkForm checks what the library would accept. Its JSON parser takes the last of two equal
// names, while another parser of the same token may take the first.
func checkForm(token string) error {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return invalid("this is no token: a JWT has three parts, with dots between them")
	}
	for i, name := range []string{"header", "claims"} {
		text, err := base64.RawURLEncoding.Strict().DecodeString(parts[i])
		if value := jsontext.Value(text); err != nil || !value.IsValid() || value.Kind() != '{' {
			return invalid("this is no token: its %s are not one JSON object in base64url, in UTF-8, with no name twice", name)
		}
		if i == 0 {
			if err := checkHeader(text); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkHeader refuses extensions that must be understood (RFC 7515, section 4.1.11), and a kid that
// is not text. It ignores other members that name keys (jku, x5u, jwk).
func checkHeader(text []byte) error {
	dec := jsontext.NewDecoder(bytes.NewReader(text))
	_, _ = dec.ReadToken() // it is an object
	for dec.PeekKind() == '"' {
		name, err := dec.ReadToken()
		if err != nil {
			return err
		}
		member := name.String()
		kind := dec.PeekKind()
		if member == "crit" {
			return invalid("the token's header has crit: there is nothing that could be critical here")
		}
		if member == "kid" && kind != '"' {
			return invalid("the token's kid is not text")
		}
		if err := dec.SkipValue(); err != nil {
			return err
		}
	}
	return nil
}

// explain returns what is wrong. It uses the claims only if the signature was valid: the library
// checks them after it.
func (a *Auth) explain(claims jwt.MapClaims, err error) error {
	switch {
	case errors.Is(err, ErrAway):
		return err
	case errors.Is(err, jwt.ErrTokenMalformed), errors.Is(err, jwt.ErrTokenUnverifiable) && !errors.Is(err, errNoKey):
		return invalid("this is no token that can be verified: a JWT signed by %s is", a.algorithms())
	case errors.Is(err, errNoKey):
		return invalid("the token is signed by a key that is not in the server's key set (kid): get one from the issuer that -auth names")
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return invalid("the token is not signed by a key of this server's (%s), or was changed on its way: get one from the issuer that -auth names", a.algorithms())
	case errors.Is(err, jwt.ErrTokenExpired):
		if at, err := claims.GetExpirationTime(); err == nil && at != nil {
			return expired(at.Time)
		}
	case errors.Is(err, jwt.ErrTokenNotValidYet):
		if at, err := claims.GetNotBefore(); err == nil && at != nil {
			return invalid("the token is not valid before %s (nbf); it is %s here", stamp(at.Time), stamp(time.Now()))
		}
	case errors.Is(err, jwt.ErrTokenUsedBeforeIssued):
		if at, err := claims.GetIssuedAt(); err == nil && at != nil {
			return invalid("the token is from the future: it was issued at %s (iat), and it is %s here: look at the clocks", stamp(at.Time), stamp(time.Now()))
		}
	case errors.Is(err, jwt.ErrTokenInvalidAudience):
		aud, _ := claims.GetAudience()
		return invalid("the token is for another audience: its aud is %.200q, and here it has to have %q", []string(aud), a.cfg.Audience)
	case errors.Is(err, jwt.ErrTokenInvalidIssuer):
		iss, _ := claims.GetIssuer()
		return invalid("the token is by another issuer: its iss is %.200q, and here it has to be %q", iss, a.cfg.Issuer)
	case errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return invalid("the token lacks a claim: exp%s", a.required())
	}
	return invalid("the token's claims are not what RFC 7519 says: exp, nbf and iat are numbers, sub and iss text, aud text or an array of it")
}

func (a *Auth) algorithms() string {
	if a.jwks == nil {
		return "HS256"
	}
	return "RS256, ES256 or EdDSA"
}

func (a *Auth) required() (text string) {
	if a.cfg.Issuer != "" {
		text += fmt.Sprintf(", iss (%q)", a.cfg.Issuer)
	}
	if a.cfg.Audience != "" {
		text += fmt.Sprintf(", aud (%q)", a.cfg.Audience)
	}
	return text + " have to be there"
}

func expired(at time.Time) error {
	return invalid("the token expired at %s, %v ago (exp): get a new one from its issuer", stamp(at), time.Since(at).Round(time.Second))
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
