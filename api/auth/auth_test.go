package auth

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"gapless/api/auth/authtest"
)

func open(t *testing.T, change func(*Config)) *Auth {
	t.Helper()
	cfg := DefaultConfig()
	change(&cfg)
	a, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

// refused fails unless a token is refused with an error that says why.
func refused(t *testing.T, a *Auth, token, why string) {
	t.Helper()
	g, err := a.Read(token)
	bad, ok := errors.AsType[*InvalidError](err)
	if !ok || !strings.Contains(bad.Detail, why) {
		t.Errorf("not refused because of %q: %v", why, err)
	}
	for action := Read; action < actions; action++ {
		if g.May(action, "s") {
			t.Errorf("it may %v all the same", action)
		}
	}
}

func b64(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

// raw signs any header and claims, without changing a byte.
func raw(t *testing.T, i *authtest.Issuer, header, claims string) string {
	t.Helper()
	secret, err := os.ReadFile(i.File)
	if err != nil {
		t.Fatal(err)
	}
	text := b64(header) + "." + b64(claims)
	sum := hmac.New(sha256.New, bytes.TrimSpace(secret))
	sum.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(sum.Sum(nil))
}

func TestRead_answersWhatATokenGrants(t *testing.T) {
	i := authtest.New(t)
	a := open(t, func(c *Config) { c.Source, c.Issuer, c.Audience = i.Source(), "login", "streams" })
	expires := time.Now().Add(time.Hour).Truncate(time.Second)
	g, err := a.Read(i.Sign(jwt.MapClaims{
		"exp": expires.Unix(), "iat": time.Now().Add(leeway / 2).Unix(), "nbf": time.Now().Add(leeway / 2).Unix(), "iss": "login", "aud": []string{"x", "streams"}, "sub": "ann",
		"gapless": authtest.May{"read": {"chat-*", "s"}, "ask": {"chat-7"}, "admin": {"own-*-x"}},
	}))
	if err != nil || g.Subject != "ann" || !g.Expires.Equal(expires) {
		t.Fatalf("%+v: %v", g, err)
	}
	for _, c := range []struct {
		action  Action
		session string
		may     bool
	}{
		{Read, "chat-", true}, {Read, "chat-9", true}, {Read, "s", true}, {Read, "ss", false}, {Read, "chat", false}, {Read, "CHAT-9", false}, {Read, "my-chat-9", false},
		{Write, "chat-9", false}, {Ask, "chat-7", true}, {Ask, "chat-77", false}, {Cancel, "chat-7", false},
		{Admin, "own-1-x", true}, {Write, "own--x", true}, {Cancel, "own-x", false}, {Admin, "chat-7", false},
		{Read, All, false}, {Admin, All, false}, {0, "s", false}, {actions, "s", false}, {-1, "s", false}, {Read, "", false},
	} {
		if g.May(c.action, c.session) != c.may {
			t.Errorf("may %v %q: %t", c.action, c.session, !c.may)
		}
	}
	if none, err := a.Read(i.Sign(jwt.MapClaims{"exp": expires.Unix(), "iss": "login", "aud": "streams"})); err != nil || none.May(Read, "s") {
		t.Errorf("without the claim: %v", err)
	}
	if !Everything().May(Admin, All) || !Everything().May(Read, "s") {
		t.Error("everything is not everything")
	}
	if g := Viewing("s", expires); !g.May(Read, "s") || g.May(Read, "t") || g.May(Write, "s") || g.May(Admin, "s") {
		t.Error("viewing one is not that")
	}
}

func TestRead_refusesWhatIsNoTokenOfIts(t *testing.T) {
	i, other := authtest.New(t), authtest.New(t)
	a := open(t, func(c *Config) { c.Source, c.Issuer, c.Audience = i.Source(), "login", "streams" })
	now := time.Now().Unix()
	claims := func(change jwt.MapClaims) jwt.MapClaims {
		all := jwt.MapClaims{"exp": now + 60, "iss": "login", "aud": "streams", "gapless": authtest.May{"admin": {"*"}}}
		for name, value := range change {
			if all[name] = value; value == nil {
				delete(all, name)
			}
		}
		return all
	}
	if _, err := a.Read(i.Sign(claims(nil))); err != nil {
		t.Fatalf("a good one: %v", err)
	}
	good := i.Sign(claims(nil))
	parts := strings.Split(good, ".")
	none, err := jwt.NewWithClaims(jwt.SigningMethodNone, claims(nil)).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	const body = `{"exp":9999999999,"iss":"login","aud":"streams","gapless":{"admin":["*"]}}`
	if _, err := a.Read(raw(t, i, `{"alg":"HS256"}`, body)); err != nil {
		t.Fatalf("a good one by hand: %v", err)
	}
	flipped := []byte(parts[2])
	if flipped[0] == 'A' { // either character is base64url
		flipped[0] = 'B'
	} else {
		flipped[0] = 'A'
	}
	for name, c := range map[string]struct{ token, why string }{
		"nothing":                    {"", "no token"},
		"text":                       {"sesame", "three parts"},
		"two parts":                  {parts[0] + "." + parts[1], "three parts"},
		"four parts":                 {good + ".x", "three parts"},
		"alg none":                   {none, "not signed"},
		"alg None":                   {b64(`{"alg":"None"}`) + "." + parts[1] + ".", "JWT signed by HS256"},
		"no alg":                     {raw(t, i, `{}`, body), "JWT signed by HS256"},
		"alg is a number":            {raw(t, i, `{"alg":256}`, body), "JWT signed by HS256"},
		"alg HS512":                  {raw(t, i, `{"alg":"HS512"}`, body), "not signed"},
		"alg RS256":                  {raw(t, i, `{"alg":"RS256"}`, body), "not signed"},
		"no signature":               {parts[0] + "." + parts[1] + ".", "not signed"},
		"another signature":          {parts[0] + "." + parts[1] + "." + string(flipped), "not signed"},
		"other claims":               {parts[0] + "." + b64(body) + "." + parts[2], "not signed"},
		"another key":                {other.Sign(claims(nil)), "not signed"},
		"another key, and expired":   {other.Sign(claims(jwt.MapClaims{"exp": now - 60})), "not signed"},
		"expired":                    {i.Sign(claims(jwt.MapClaims{"exp": now - 60})), "expired at " + time.Unix(now-60, 0).UTC().Format(time.RFC3339)},
		"expired just now":           {i.Sign(claims(jwt.MapClaims{"exp": now - 1})), "expired"},
		"no exp":                     {i.Sign(claims(jwt.MapClaims{"exp": nil})), "exp"},
		"exp null":                   {raw(t, i, `{"alg":"HS256"}`, `{"exp":null,"iss":"login","aud":"streams"}`), "RFC 7519"},
		"exp 0":                      {i.Sign(claims(jwt.MapClaims{"exp": 0})), "exp"},
		"exp below 0":                {i.Sign(claims(jwt.MapClaims{"exp": -5})), "expired"},
		"exp text":                   {i.Sign(claims(jwt.MapClaims{"exp": fmt.Sprint(now + 60)})), "RFC 7519"},
		"exp in milliseconds":        {i.Sign(claims(jwt.MapClaims{"exp": (now + 60) * 1000})), "exp is not a time"},
		"exp 1e300":                  {raw(t, i, `{"alg":"HS256"}`, strings.Replace(body, "9999999999", "1e300", 1)), "exp"},
		"not yet":                    {i.Sign(claims(jwt.MapClaims{"nbf": now + 60})), "not valid before"},
		"from the future":            {i.Sign(claims(jwt.MapClaims{"iat": now + 60})), "from the future"},
		"another audience":           {i.Sign(claims(jwt.MapClaims{"aud": "shop"})), `its aud is ["shop"]`},
		"no audience":                {i.Sign(claims(jwt.MapClaims{"aud": nil})), `aud ("streams")`},
		"audiences of other kinds":   {i.Sign(claims(jwt.MapClaims{"aud": []any{"streams", 5}})), "RFC 7519"},
		"another issuer":             {i.Sign(claims(jwt.MapClaims{"iss": "evil"})), `its iss is "evil"`},
		"issuer in other letters":    {i.Sign(claims(jwt.MapClaims{"iss": "LOGIN"})), "another issuer"},
		"no issuer":                  {i.Sign(claims(jwt.MapClaims{"iss": nil})), `iss ("login")`},
		"sub is no text":             {i.Sign(claims(jwt.MapClaims{"sub": 5})), "sub"},
		"huge":                       {i.Sign(claims(jwt.MapClaims{"x": strings.Repeat("x", mostToken)})), fmt.Sprint(mostToken)},
		"exp twice":                  {raw(t, i, `{"alg":"HS256"}`, `{"exp":1,`+body[1:]), "no name twice"},
		"the claim twice":            {raw(t, i, `{"alg":"HS256"}`, `{"gapless":{},`+body[1:]), "no name twice"},
		"exp twice, once escaped":    {raw(t, i, `{"alg":"HS256"}`, `{"\u0065xp":1,`+body[1:]), "no name twice"},
		"read twice":                 {raw(t, i, `{"alg":"HS256"}`, `{"exp":9999999999,"gapless":{"read":[],"read":["*"]}}`), "no name twice"},
		"alg twice":                  {raw(t, i, `{"alg":"none","alg":"HS256"}`, body), "no name twice"},
		"crit":                       {raw(t, i, `{"alg":"HS256","crit":["exp"]}`, body), "crit"},
		"crit null":                  {raw(t, i, `{"alg":"HS256","crit":null}`, body), "crit"},
		"crit, escaped":              {raw(t, i, `{"alg":"HS256","\u0063rit":["b64"],"b64":false}`, body), "crit"},
		"kid is a number":            {raw(t, i, `{"alg":"HS256","kid":5}`, body), "kid is not text"},
		"kid is an object":           {raw(t, i, `{"alg":"HS256","kid":{"a":["b"]}}`, body), "kid is not text"},
		"header is an array":         {raw(t, i, `["HS256"]`, body), "header"},
		"claims are text":            {raw(t, i, `{"alg":"HS256"}`, `"exp"`), "claims"},
		"text behind the claims":     {raw(t, i, `{"alg":"HS256"}`, body+"{}"), "claims"},
		"no UTF-8":                   {raw(t, i, `{"alg":"HS256"}`, strings.Replace(body, "login", "log\xffin", 1)), "UTF-8"},
		"padding":                    {parts[0] + "." + parts[1] + "=." + parts[2], "base64url"},
		"a line break":               {parts[0] + "\n." + parts[1] + "." + parts[2], "not signed"},
		"the claim is text":          {i.Sign(claims(jwt.MapClaims{"gapless": "*"})), "no object"},
		"the claim is an array":      {i.Sign(claims(jwt.MapClaims{"gapless": []string{"*"}})), "no object"},
		"the claim is true":          {i.Sign(claims(jwt.MapClaims{"gapless": true})), "no object"},
		"an action that is none":     {i.Sign(claims(jwt.MapClaims{"gapless": authtest.May{"raed": {"*"}}})), `the member "raed"`},
		"an action without a name":   {i.Sign(claims(jwt.MapClaims{"gapless": authtest.May{"": {"*"}}})), `the member ""`},
		"an action in other letters": {i.Sign(claims(jwt.MapClaims{"gapless": authtest.May{"Read": {"*"}}})), `the member "Read"`},
		"an action that is text":     {i.Sign(claims(jwt.MapClaims{"gapless": map[string]string{"read": "*"}})), "no array"},
		"a pattern that is none":     {i.Sign(claims(jwt.MapClaims{"gapless": map[string]any{"read": []any{"a", 5}}})), "other than text"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, a, c.token, c.why) })
	}
}

// A kid is only a name among the keys, and is ignored for secrets.
func TestRead_kidOpensNoOtherPlace(t *testing.T) {
	i := authtest.New(t)
	a := open(t, func(c *Config) { c.Source = i.Source() })
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kid := range []string{"/dev/null", empty, "../../../../dev/null", "' UNION SELECT 'x", "http://127.0.0.1/key", "\x00", strings.Repeat("k", 1000)} {
		for _, secret := range []string{"", "x", "\x00"} {
			token := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"exp": time.Now().Unix() + 60, "gapless": authtest.May{"admin": {"*"}}})
			token.Header["kid"], token.Header["jku"], token.Header["x5u"] = kid, kid, kid
			text, err := token.SignedString([]byte(secret))
			if err != nil {
				t.Fatal(err)
			}
			refused(t, a, text, "not signed")
		}
	}
}

func TestRead_takesSeveralSecrets(t *testing.T) {
	former, next := authtest.New(t), authtest.New(t)
	a := open(t, func(c *Config) { c.Source = former.Source() + "," + next.File })
	for _, i := range []*authtest.Issuer{former, next} {
		if g, err := a.Read(i.Token(time.Minute, authtest.May{"read": {"s"}})); err != nil || !g.May(Read, "s") {
			t.Error(err)
		}
	}
	refused(t, a, authtest.New(t).Token(time.Minute, authtest.May{"read": {"s"}}), "not signed")
}

func TestRead_looksAtTheClaimOfItsConfiguration(t *testing.T) {
	i := authtest.New(t)
	a := open(t, func(c *Config) { c.Source, c.Claim = i.Source(), "https://example.com/streams" })
	g, err := a.Read(i.Sign(jwt.MapClaims{"exp": time.Now().Unix() + 60, "gapless": authtest.May{"admin": {"*"}}, "https://example.com/streams": authtest.May{"read": {"s"}}}))
	if err != nil || !g.May(Read, "s") || g.May(Write, "s") {
		t.Error(err)
	}
}

func TestConfig_reportsAllMistakesTogether(t *testing.T) {
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, []byte("open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for source, parts := range map[string][]string{
		"":                                {"-auth-issuer", "-auth-audience", "-auth-cookie"},
		"secret:" + short + ",/no/such":   {"11 bytes", "32", "gapless secret", "/no/such", "-auth-claim", "-auth-cookie"},
		"secret:":                         {"-auth: secret"},
		"file.txt":                        {"https://"},
		"ftp://example.com/keys":          {"https://"},
		"https://":                        {"https://"},
		"http://example.com/keys":         {"loopback"},
		"https://ann:sesame@example.com/": {"user and password"},
	} {
		c := DefaultConfig()
		c.Source, c.Issuer, c.Audience, c.Claim, c.Cookie = source, "i", "a", "", "a b"
		err := c.Validate()
		for _, part := range parts {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%q: %q is not in %v", source, part, err)
			}
		}
		if err != nil && strings.Contains(err.Error(), "sesame") {
			t.Errorf("a secret is told: %v", err)
		}
	}
	for _, source := range []string{"https://login.example/keys", "http://127.0.0.1:8000/keys", "http://[::1]/", "http://localhost/"} {
		c := DefaultConfig()
		if c.Source = source; c.Validate() != nil {
			t.Errorf("%s: %v", source, c.Validate())
		}
	}
}

// model is the decision in ten lines, with regular expressions for patterns.
func model(may map[string][]string, action, session string) bool {
	for _, name := range []string{action, "admin"} {
		for _, pattern := range may[name] {
			text := strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `.*`)
			if slices.Contains([]string{"read", "write", "ask", "cancel", "admin"}, action) && regexp.MustCompile(`^(?s:`+text+`)$`).MatchString(session) {
				return true
			}
		}
	}
	return false
}

func FuzzMay(f *testing.F) {
	f.Add("chat-*", "s", "*-x", byte(1), "chat-7")
	f.Add("**a*b*", "", "a*a*a*a", byte(5), "aaaaaaaaab")
	f.Add("*", "", "", byte(0), "s")
	f.Add("a*", "", "a", byte(9), "")
	f.Fuzz(func(t *testing.T, read, write, admin string, which byte, session string) {
		if len(read)+len(write)+len(admin)+len(session) > 1000 || strings.Contains(session, "*") {
			return
		}
		for _, text := range []string{read, write, admin, session} {
			if strings.ToValidUTF8(text, "") != text { // a token's text is valid UTF-8
				return
			}
		}
		may := map[string][]string{"read": {read}, "write": {write, read}, "admin": {admin}}
		g := Grant{may: [actions][]string{Read: may["read"], Write: may["write"], Admin: may["admin"]}}
		action := Action(which % 8)
		name := ""
		if action < actions {
			name = action.String()
		}
		if got, want := g.May(action, session), model(may, name, session); got != want {
			t.Errorf("may %v %q with %q: %t", action, session, may, got)
		}
	})
}

// Whatever is sent, it grants nothing and breaks nothing.
func FuzzRead(f *testing.F) {
	file := filepath.Join(f.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(rand.Text()+rand.Text()), 0o600); err != nil {
		f.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.Source = "secret:" + file
	a, err := Open(cfg)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b64(`{"alg":"none"}`) + "." + b64(`{"exp":9999999999,"gapless":{"admin":["*"]}}`) + ".")
	f.Add(b64(`{"alg":"HS256","kid":"a"}`) + "." + b64(`{"exp":1e400}`) + ".AAAA")
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, token string) {
		if g, err := a.Read(token); err == nil || g.May(Read, "s") {
			t.Errorf("%q was taken", token)
		}
	})
}
