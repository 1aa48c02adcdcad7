package auth

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Action is something that can be done to a session.
type Action int

// The actions. The zero Action is not an action, and is never allowed.
const (
	Read   Action = iota + 1 // the session, its chunks, its stream; tickets for that
	Write                    // make it, append to it, end it
	Ask                      // the model
	Cancel                   // messages
	Admin                    // delete it; implies all of the others
	actions
)

var names = [actions]string{Read: "read", Write: "write", Ask: "ask", Cancel: "cancel", Admin: "admin"}

func (a Action) String() string { return names[a] }

// All stands for all sessions. Only the pattern * allows something on it.
const All = "*"

// Grant describes what a credential allows, and until when.
type Grant struct {
	Subject string    // the holder's name, from its issuer; may be empty
	Expires time.Time // when the grant ends; zero: never
	may     [actions][]string
}

// Everything returns the grant of everybody if there is no authentication.
func Everything() Grant { return Grant{may: [actions][]string{Admin: {All}}} }

// Viewing returns a grant to read one session.
func Viewing(session string, expires time.Time) Grant {
	return Grant{Expires: expires, may: [actions][]string{Read: {session}}}
}

// May reports whether the grant allows an action on a session, whose id must not contain *. It
// ignores Expires.
func (g Grant) May(a Action, session string) bool {
	if a < Read || a >= actions {
		return false
	}
	fits := func(pattern string) bool { return match(pattern, session) }
	return slices.ContainsFunc(g.may[a], fits) || slices.ContainsFunc(g.may[Admin], fits)
}

// match reports whether text matches pattern, in which each * stands for any text. It backtracks
// only to the last *, which is enough, so that no pattern takes long.
func match(pattern, text string) bool {
	p, t := 0, 0
	star, resume := -1, 0 // the position after the last *, and the first byte of text that it has not taken
	for t < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			p++
			star, resume = p, t
		case p < len(pattern) && pattern[p] == text[t]:
			p, t = p+1, t+1
		case star >= 0:
			resume++
			p, t = star, resume
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// readClaim parses what a token allows: {"read":["chat-*"],"write":["chat-7"]}. Without the claim
// it allows nothing.
func readClaim(claim string, value any) (may [actions][]string, err error) {
	if value == nil {
		return may, nil
	}
	bad := func(what string) ([actions][]string, error) {
		return may, invalid("the token's claim %q %s: it is an object such as {\"read\":[\"chat-*\"],\"ask\":[\"chat-7\"]} with members %s, each an array of session ids in which * stands for any text",
			claim, what, strings.Join(names[Read:], ", "))
	}
	object, ok := value.(map[string]any)
	if !ok {
		return bad("is no object")
	}
	for name, value := range object {
		action := slices.Index(names[:], name)
		if action < int(Read) {
			return bad(fmt.Sprintf("has the member %.40q", name))
		}
		patterns, ok := value.([]any)
		if !ok {
			return bad("has a member " + name + " that is no array")
		}
		for _, p := range patterns {
			pattern, ok := p.(string)
			if !ok {
				return bad("has a member " + name + " that contains something other than text")
			}
			may[action] = append(may[action], pattern)
		}
	}
	return may, nil
}
