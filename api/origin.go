package api

import (
	"context"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// isOrigin reports whether o is an origin as browsers write it: https://chat.example, with a port if it is not the
// scheme's own.
func isOrigin(o string) bool {
	u, err := url.Parse(o)
	return err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != "" && o == u.Scheme+"://"+strings.ToLower(u.Host) && !strings.Contains(o, "*") &&
		(u.Scheme != "https" || u.Port() != "443") && (u.Scheme != "http" || u.Port() != "80")
}

// checkOrigin refuses what another site's page sends in a browser's name: with its cookie, or from within its network.
// Pages of the configured origins may; and no page at all can send a token of its own without a preflight, which only
// those pass. What a page of another origin may not read is served, and the browser keeps it from the page.
func (a *API) checkOrigin() func(r *http.Request) error {
	protection := http.NewCrossOriginProtection()
	for _, origin := range a.cfg.Origins {
		if err := protection.AddTrustedOrigin(origin); err != nil {
			panic(err) // Validate has seen it
		}
	}
	strange := &strangeOrigins{last: map[string]time.Time{}}
	return func(r *http.Request) error {
		err := protection.Check(r)
		if origin := r.Header.Get("Origin"); origin != "" && (err != nil || a.unreadable(r, origin)) && strange.first(origin) {
			remedy := "pages without an origin of their own, such as files, cannot be allowed: serve the page by http or https"
			if isOrigin(origin) {
				remedy = "if its pages may call this server, start it with -cors-origins " + strings.Join(append(slices.Clone(a.cfg.Origins), origin), ",")
			}
			a.log.LogAttrs(context.Background(), slog.LevelWarn, "a page of another origin was refused", slog.String("origin", origin), slog.String("remedy", remedy))
		}
		if err != nil {
			return &Problem{Status: http.StatusForbidden, Code: "cross_origin", Member: "Origin",
				Detail: "pages of another origin may not change anything here: add the origin to -cors-origins"}
		}
		return nil
	}
}

// unreadable reports whether the browser keeps the response to a call from the page that made it.
func (a *API) unreadable(r *http.Request, origin string) bool {
	if !shared(r) || slices.Contains(a.cfg.Origins, origin) || r.Header.Get("Sec-Fetch-Site") == "same-origin" {
		return false
	}
	_, host, _ := strings.Cut(origin, "://")
	return host != r.Host
}

// shared reports whether pages of the configured origins may make this call.
func shared(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/v1/") || isOpenAI(r) }

// strangeOrigins remembers which origins the log has named in the last minute.
type strangeOrigins struct {
	mu   sync.Mutex
	last map[string]time.Time
}

const (
	strangeEvery = time.Minute
	strangeMost  = 100 // origins, and so lines of the log, a minute
	strangeBytes = 300 // longer than any origin: a host has at most 253 bytes
)

// first reports whether the log has not named an origin for a minute, and notes that it does now. While too many others
// are remembered, it says no.
func (s *strangeOrigins) first(origin string) bool {
	if len(origin) > strangeBytes {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if last, ok := s.last[origin]; ok && now.Sub(last) < strangeEvery {
		return false
	}
	if len(s.last) >= strangeMost {
		for o, last := range s.last {
			if now.Sub(last) >= strangeEvery {
				delete(s.last, o)
			}
		}
		if len(s.last) >= strangeMost {
			return false
		}
	}
	s.last[origin] = now
	return true
}
