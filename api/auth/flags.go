package auth

import "flag"

// Flags declares the flags of authentication. Their defaults are what c contains.
func (c *Config) Flags(fs *flag.FlagSet) {
	fs.StringVar(&c.Source, "auth", c.Source, "whose tokens are accepted: `secret:FILE`[,FILE…] for HS256 (at least 32 bytes each), or the https://… URL of a JWKS for RS256, ES256 and EdDSA; by default everybody may do everything")
	fs.StringVar(&c.Issuer, "auth-issuer", c.Issuer, "the `iss` that a token must have; by default it is not checked")
	fs.StringVar(&c.Audience, "auth-audience", c.Audience, "the `aud` that a token must have; by default it is not checked")
	fs.StringVar(&c.Claim, "auth-claim", c.Claim, "`name` of the claim that lists what the holder of a token may do")
	fs.StringVar(&c.Cookie, "auth-cookie", c.Cookie, "`name` of a cookie that may carry the token when there is no Authorization header; by default none may")
}
