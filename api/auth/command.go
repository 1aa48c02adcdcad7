package auth

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Commands are the subcommands of the program that make and check tokens. Each returns its exit
// status: 0 for success, 1 for a token that is not accepted, 2 for wrong usage.
var Commands = map[string]func(ctx context.Context, args []string, env func(string) (string, bool)) int{
	"secret": func(_ context.Context, args []string, _ func(string) (string, bool)) int {
		return secret(args, os.Stdout, os.Stderr)
	},
	"token": func(_ context.Context, args []string, _ func(string) (string, bool)) int {
		return token(args, os.Stdout, os.Stderr)
	},
}

// secret prints a new secret for HS256: 32 random bytes in hexadecimal.
func secret(args []string, out, problems io.Writer) int {
	if len(args) > 0 {
		fmt.Fprintln(problems, "usage: gapless secret > FILE\n\nPrints a new random secret for -auth secret:FILE. Keep the file readable for the server only (umask 077).")
		return 2
	}
	b := make([]byte, leastSecret)
	_, _ = rand.Read(b) // never fails
	fmt.Fprintln(out, hex.EncodeToString(b))
	return 0
}

const usageText = `usage: gapless token -secret FILE -ttl 1h [-sub NAME] [-read SESSIONS] [-write SESSIONS] [-ask SESSIONS] [-cancel SESSIONS] [-admin SESSIONS]
       gapless token -secret FILE -check TOKEN

Makes a token for a server that runs with -auth secret:FILE, or says what a token allows. SESSIONS is one pattern, or several
with commas between them; * stands for any text: 'chat-*'.

`

// token makes or checks a token.
func token(args []string, out, problems io.Writer) int {
	cfg := DefaultConfig()
	fs := flag.NewFlagSet("gapless token", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	file := fs.String("secret", "", "`file` of the secret, as in -auth secret:FILE")
	check := fs.String("check", "", "a `token`: print what it allows, or why it is not accepted; - reads it from the standard input")
	subject := fs.String("sub", "", "`name` of the holder, which limits and logs use")
	life := fs.Duration("ttl", 0, "how long the token is valid, such as 15m")
	fs.StringVar(&cfg.Claim, "claim", cfg.Claim, "`name` of the claim, as in -auth-claim")
	fs.StringVar(&cfg.Issuer, "issuer", "", "iss, as in -auth-issuer")
	fs.StringVar(&cfg.Audience, "audience", "", "aud, as in -auth-audience")
	patterns := map[Action]*string{}
	for a := Read; a < actions; a++ {
		patterns[a] = fs.String(a.String(), "", "`sessions` that the token may "+a.String())
	}
	usage := func(w io.Writer) {
		fmt.Fprint(w, usageText)
		fs.SetOutput(w)
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		usage(out)
		return 0
	} else if err != nil {
		fmt.Fprintf(problems, "gapless token: %v (-help shows all flags)\n", err)
		return 2
	}
	var errs []error
	if fs.NArg() > 0 {
		errs = append(errs, fmt.Errorf("unexpected argument %q", fs.Arg(0)))
	}
	if *file == "" {
		errs = append(errs, errors.New("-secret: name the file of the secret; gapless secret > FILE makes one"))
	} else {
		cfg.Source = "secret:" + *file
		errs = append(errs, cfg.Validate())
	}
	may := map[string][]string{}
	for a, text := range patterns {
		if *text != "" {
			may[a.String()] = strings.Split(*text, ",")
			if slices.ContainsFunc(may[a.String()], func(p string) bool { return p == "" || strings.ContainsAny(p, " \t/") }) {
				errs = append(errs, fmt.Errorf("-%s: %q contains a pattern that matches no session id", a, *text))
			}
		}
	}
	switch {
	case *check == "" && *life <= 0:
		errs = append(errs, errors.New("-ttl: missing; it is how long the token is valid, such as -ttl 15m"))
	case *check == "" && len(may) == 0:
		errs = append(errs, errors.New("-read, -write, -ask, -cancel, -admin: at least one is needed; a token without them allows nothing"))
	case *check != "" && (*life != 0 || len(may) > 0 || *subject != ""):
		errs = append(errs, errors.New("-check: accepts only -secret"))
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(problems, err)
		return 2
	}
	a, err := Open(cfg)
	if err != nil {
		fmt.Fprintln(problems, err)
		return 2
	}
	defer a.Close()
	if *check != "" {
		return a.tell(*check, out, problems)
	}
	secrets, err := readSecrets(*file)
	if err != nil {
		fmt.Fprintln(problems, err)
		return 2
	}
	claims := jwt.MapClaims{"exp": time.Now().Add(*life).Unix(), "iat": time.Now().Unix(), cfg.Claim: may}
	for name, value := range map[string]string{"sub": *subject, "iss": cfg.Issuer, "aud": cfg.Audience} {
		if value != "" {
			claims[name] = value
		}
	}
	made, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(secrets[0])
	if err == nil {
		_, err = a.Read(made) // a pattern may be wrong
	}
	if err != nil {
		fmt.Fprintln(problems, err)
		return 2
	}
	fmt.Fprintln(out, made)
	return 0
}

// tell prints what a token allows.
func (a *Auth) tell(token string, out, problems io.Writer) int {
	if token == "-" {
		b, err := io.ReadAll(io.LimitReader(os.Stdin, mostToken+1))
		if err != nil {
			fmt.Fprintln(problems, err)
			return 2
		}
		token = string(b)
	}
	g, err := a.Read(strings.TrimSpace(token))
	if err != nil {
		fmt.Fprintln(problems, err)
		return 1
	}
	fmt.Fprintf(out, "subject  %s\nexpires  %s, in %v\n", g.Subject, stamp(g.Expires), time.Until(g.Expires).Round(time.Second))
	nothing := true
	for action := Read; action < actions; action++ {
		if len(g.may[action]) > 0 {
			fmt.Fprintf(out, "%-7s  %s\n", action, strings.Join(g.may[action], ", "))
			nothing = false
		}
	}
	if nothing {
		fmt.Fprintf(out, "nothing  it has no claim %s, or an empty one\n", a.cfg.Claim)
	}
	return 0
}
