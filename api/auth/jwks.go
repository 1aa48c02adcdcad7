package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

// jwks holds the keys of an issuer (RFC 7517). They are kept while the issuer is unreachable, and
// fetched again periodically. A token with an unknown key causes a fetch at once, because its
// issuer may have just changed keys. Strangers cannot cause more than one fetch per unknownEvery.
// Tokens that arrive during a fetch wait for it, so that a token with a new key is not refused.
type jwks struct {
	held   *held
	ask    jwkset.Storage // fetches
	flight singleflight.Group
	limit  *rate.Limiter
	find   keyfunc.Keyfunc
	quit   context.CancelFunc
	wg     sync.WaitGroup
}

const (
	// refreshEvery is how long a key is accepted after its issuer has withdrawn it.
	refreshEvery = 5 * time.Minute
	unknownEvery = 5 * time.Second
	fetchTimeout = 3 * time.Second
)

var errNoKey = errors.New("no such key")

func openJWKS(source string, log *slog.Logger) (*jwks, error) {
	ctx, quit := context.WithCancel(context.Background())
	j := &jwks{held: &held{MemoryJWKSet: jwkset.NewMemoryStorage()}, limit: rate.NewLimiter(rate.Every(unknownEvery), 1), quit: quit}
	client := &http.Client{
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, TLSHandshakeTimeout: fetchTimeout},
		// A redirect leads to a host that was not verified.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	remote, err := jwkset.NewStorageFromHTTP(source, jwkset.HTTPClientStorageOptions{
		Client: client, Ctx: ctx, HTTPTimeout: fetchTimeout, NoErrorReturnFirstHTTPReq: true, Storage: j.held,
		RefreshErrorHandler: func(_ context.Context, err error) {
			if ctx.Err() != nil {
				return
			}
			if bad, ok := errors.AsType[*url.Error](err); ok { // its text would repeat the URL
				err = bad.Err
			}
			if !j.held.away.Swap(true) {
				log.Warn("the keys of -auth cannot be fetched", slog.Any("err", err), slog.Bool("former_ones_are_kept", j.held.fetched.Load()))
			}
		},
	})
	if err != nil {
		quit()
		return nil, fmt.Errorf("-auth: %w", err)
	}
	j.ask, err = jwkset.NewHTTPClient(jwkset.HTTPClientOptions{ // its limit would make tokens wait: ours refuses them
		HTTPURLs: map[string]jwkset.Storage{source: remote}, RefreshUnknownKID: rate.NewLimiter(rate.Inf, 1), RateLimitWaitMax: fetchTimeout,
	})
	if err == nil {
		j.find, err = keyfunc.New(keyfunc.Options{Ctx: ctx, Storage: lookup{j.held, j}, UseWhitelist: []jwkset.USE{jwkset.UseSig, ""}})
	}
	if err != nil {
		quit()
		return nil, fmt.Errorf("-auth: %w", err)
	}
	j.wg.Go(func() { j.tend(ctx) }) // ended by close
	return j, nil
}

func (j *jwks) close() {
	j.quit()
	j.wg.Wait()
}

// tend fetches the keys periodically.
func (j *jwks) tend(ctx context.Context) {
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			j.fetch()
		case <-ctx.Done():
			return
		}
	}
}

// fetch fetches the keys, unless that was done just now.
func (j *jwks) fetch() {
	_, _, _ = j.flight.Do("", func() (any, error) {
		if j.limit.Allow() {
			_, _ = j.ask.KeyRead(context.Background(), "\x00") // no key has that name, so this fetches them
		}
		return nil, nil
	})
}

func (j *jwks) ready(ctx context.Context) error {
	if !j.held.fetched.Load() {
		j.fetch()
	}
	if !j.held.fetched.Load() {
		return ErrAway
	}
	return ctx.Err()
}

// keyOf returns the key that a token names, or, if it names none, all keys that may be meant.
func (j *jwks) keyOf(t *jwt.Token) (any, error) {
	found, err := j.find.Keyfunc(t)
	if errors.Is(err, ErrAway) {
		return nil, ErrAway
	}
	if err != nil {
		return nil, j.none()
	}
	keys := []jwt.VerificationKey{found}
	if set, ok := found.(jwt.VerificationKeySet); ok {
		keys = set.Keys
	}
	var fit []jwt.VerificationKey
	for _, key := range keys {
		if algorithm(key) == t.Method.Alg() {
			fit = append(fit, key)
		}
	}
	if len(fit) == 0 {
		return nil, j.none()
	}
	return jwt.VerificationKeySet{Keys: fit}, nil
}

// none returns why there is no key. An unreachable issuer may have a key that we have not seen.
func (j *jwks) none() error {
	if j.held.away.Load() {
		return ErrAway
	}
	return errNoKey
}

// algorithm returns the algorithm that a key is for; empty: none here.
func algorithm(key any) string {
	const leastBits = 2048 // RFC 7518, section 3.3
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() >= leastBits {
			return jwt.SigningMethodRS256.Alg()
		}
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return jwt.SigningMethodES256.Alg()
		}
	case ed25519.PublicKey:
		return jwt.SigningMethodEdDSA.Alg()
	}
	return ""
}

// held holds the keys that were fetched last.
type held struct {
	*jwkset.MemoryJWKSet
	fetched atomic.Bool // at least once
	away    atomic.Bool // the last fetch failed
}

// KeyReplaceAll replaces the keys after a fetch.
func (h *held) KeyReplaceAll(ctx context.Context, keys []jwkset.JWK) error {
	err := h.MemoryJWKSet.KeyReplaceAll(ctx, keys)
	h.fetched.Store(true)
	h.away.Store(false)
	return err
}

// lookup finds the keys for tokens. It fetches keys if one is missing.
type lookup struct {
	*held
	jwks *jwks
}

// KeyRead implements jwkset.Storage.
func (l lookup) KeyRead(ctx context.Context, kid string) (jwkset.JWK, error) {
	key, err := l.held.KeyRead(ctx, kid)
	if err != nil {
		// The keys are not fetched again if that just happened for another token. Until the next
		// fetch, tokens with a newer key are refused, for at most unknownEvery.
		l.jwks.fetch()
		key, err = l.held.KeyRead(ctx, kid)
	}
	return key, err
}

// KeyReadAll implements jwkset.Storage.
func (l lookup) KeyReadAll(ctx context.Context) ([]jwkset.JWK, error) {
	if !l.fetched.Load() {
		l.jwks.fetch()
	}
	return l.held.KeyReadAll(ctx)
}
