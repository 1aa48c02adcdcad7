package model

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"time"

	"gapless/sse"
)

// Limits on what a service sends. The text itself is limited by its readers.
const (
	// eventMost limits an event, in bytes. A word needs some hundred.
	eventMost = 1 << 20
	// muteMost limits the bytes that come without any content.
	muteMost = 64 << 20
	// muteLongest limits how long a service may stay alive without content. OpenRouter and DeepSeek
	// send comments while a model is busy.
	muteLongest = time.Hour
	// afterwards is how long we wait, after an answer has ended, for its usage or for [DONE].
	afterwards = 5 * time.Second
	// ending is how long we wait for the end of the response after [DONE].
	ending = 100 * time.Millisecond
)

// stage is the progress of an answer. Services differ in how they show that one has ended, and some
// show it too early. So an answer goes through stages, and its stage when the stream ends decides
// the result:
//
//	          is said    a finish          silence    the response  the connection  any of the three,
//	stage     again      is said           too long   ends          breaks          inside an event
//	open      open       claimed/finished  timeout    broken        broken          timeout/broken
//	claimed   open       claimed/finished  timeout    complete      broken          timeout/broken
//	finished  open       finished          complete   complete      complete        timeout/broken
//	done      -          -                 -          -             -               -  (complete at once)
//
// "Said" means text, reasoning, a refusal or a tool call. What is said after a finish revokes it.
// The event [DONE] leads from every stage to done. An error is a failure in every stage. It is a member
// error (also of a choice or of its delta), a finish that means failure, an event named error, even
// without data, an event without choices that has the message or the code of an error (bare), or an
// event that cannot be read. A complete answer with only reasoning is empty, which is a failure,
// too.
//
// An event whose blank line is missing when nothing more comes is the event that it is if it is
// whole by itself: [DONE], or readable JSON. Otherwise the stream ended inside an event, which may
// have said anything. Blanks and a comment are no event.
//
// A finish is a finish_reason that is text, and neither empty nor "null" nor "none". It is ignored
// on an event with only reasoning: some services send "stop" there. Other services send it in each
// event. So a finish is only a claim, which [DONE] or the clean end of the response must confirm,
//   - before anything was said,
//   - on an event that says something, unless something was said before in an event without a finish, and
//   - once a finish was revoked.
//
// Silence means that no byte comes: a comment, or an event without a meaning, is a sign of life.
// After a finish, only an event is, because only the usage is awaited.
type stage int

const (
	open stage = iota
	claimed
	finished
	done
)

// failing holds the finishes that mean failure.
var failing = map[string]bool{"error": true, "server_error": true, "network_error": true, "timeout": true, "failed": true, "abort": true, "aborted": true,
	"cancelled": true, "canceled": true, "insufficient_system_resource": true}

// answer is the answer so far.
type answer struct {
	texts

	stage   stage
	spoken  bool // something was said, perhaps only reasoning
	words   bool // something other than reasoning was said
	sparing bool // some words came in events without a finish
	wrong   bool // a finish was revoked
	finish  string
	usage   json.RawMessage // some services send it in each event: the last one counts
}

// take takes an event, and returns its content.
func (a *answer) take(e sse.Event) (all []Piece, err error) {
	if strings.EqualFold(strings.TrimSpace(e.Name), "error") {
		return nil, errSaid
	}
	for rest := strings.TrimSpace(e.Data); rest != ""; rest = strings.TrimSpace(rest) {
		switch {
		case strings.HasPrefix(rest, "[DONE]"):
			a.stage = done
			return all, nil
		case rest[0] == ':': // a comment in the wrong place
			_, rest, _ = strings.Cut(rest, "\n")
		default: // one value, or several if a service omits the blank lines between events
			var value json.RawMessage
			d := json.NewDecoder(strings.NewReader(rest))
			if err := d.Decode(&value); err != nil {
				return all, errJSON
			}
			rest = rest[d.InputOffset():]
			more, err := a.read(object(value))
			if all = append(all, more...); err != nil {
				return all, err
			}
		}
	}
	return all, nil
}

// read reads the object of an event.
func (a *answer) read(event members) (all []Piece, err error) {
	groq := object(event["x_groq"])
	choices := list(event["choices"])
	if means(event["error"]) || means(groq["error"]) || text(event["object"]) == "error" || text(event["type"]) == "error" || len(choices) == 0 && bare(event) {
		return nil, errSaid
	}
	for _, usage := range []json.RawMessage{groq["usage"], event["usage"]} {
		if object(usage) != nil {
			a.usage = strict(usage)
		}
	}
	for _, value := range choices {
		choice := object(value)
		if index, _ := number(choice["index"]); index > 0 { // there is only one, unless the options ask for more
			continue
		}
		delta := object(choice["delta"])
		if means(choice["error"]) || means(delta["error"]) {
			return all, errSaid
		}
		said := a.pieces(delta)
		all = append(all, said...)
		if err := a.move(said, text(choice["finish_reason"])); err != nil {
			return all, err
		}
	}
	return all, nil
}

// bare reports whether an event without choices is an error: some gateways send what they caught as
// the whole event, {"message":"Internal error","code":500}, {"detail":[…]} or {"success":false}. A code that is 0, or
// that means success, is no error, whatever its message says.
func bare(event members) bool {
	fails, succeeds, says := false, false, false
	for name, value := range event {
		switch name = strings.ToLower(name); name {
		case "code", "status", "status_code", "error_code":
			n, err := strconv.ParseFloat(strings.TrimSpace(strings.Trim(string(value), `"`)), 64)
			success := n == 0 || n >= 200 && n < 300
			fails = fails || err == nil && !success
			succeeds = succeeds || err == nil && success
			says = says || err != nil && name != "status" && means(value)
		case "message", "detail", "errors", "error", "fault":
			says = says || means(value)
		case "success":
			fails = fails || string(value) == "false"
		}
	}
	return fails || says && !succeeds
}

// move updates the stage for a choice of an event, which has content and a finish.
func (a *answer) move(said []Piece, finish string) error {
	words := false
	for _, p := range said {
		words = words || !p.Reasoning
	}
	if len(said) > 0 && a.stage != open {
		a.stage, a.finish, a.wrong = open, "", true
	}
	before := a.sparing
	name := strings.ToLower(strings.TrimSpace(finish))
	none := name == "" || name == "null" || name == "none"
	a.spoken = a.spoken || len(said) > 0
	a.words = a.words || words
	a.sparing = a.sparing || words && none
	switch {
	case none:
	case failing[name]:
		return errSaid
	case len(said) > 0 && !words:
	case !a.spoken, words && !before, a.wrong:
		a.stage, a.finish = max(a.stage, claimed), finish
	default:
		a.stage, a.finish = finished, finish
	}
	return nil
}

// complete returns nil if the answer was complete when its stream ended. err is nil after [DONE],
// or the reason why nothing more came. torn says that the stream ended inside an event.
func (a *answer) complete(err error, clean, torn bool) error {
	switch {
	case a.stage == done, !torn && (a.stage == finished || a.stage == claimed && clean):
		if !a.words {
			return errEmpty
		}
		return nil
	case errors.Is(err, io.EOF):
		return errShort
	}
	return err
}

// stream reads a response, event by event.
type stream struct {
	body   io.Reader
	parser sse.Parser
	rest   []byte // bytes that have arrived, and are no whole event yet
	err    error  // why nothing more arrives
	ended  bool   // the rest was closed, because nothing more arrives
	torn   bool   // it ended inside an event
	mute   int    // bytes since the last content
	buf    [8 << 10]byte
}

// next returns the next event. alive is called whenever bytes arrive. When nothing more arrives, the
// event that has begun is returned without its blank line, and is torn until somebody has read it.
func (s *stream) next(alive func()) (e sse.Event, err error) {
	for {
		var whole bool
		e, s.rest, whole, err = s.parser.Next(s.rest, eventMost)
		switch {
		case err != nil, len(s.rest) > eventMost, s.mute > muteMost:
			return e, errLarge
		case whole:
			return e, nil
		case s.err != nil && !s.ended:
			s.ended, s.torn = true, s.parser.Torn(bytes.TrimSpace(s.rest))
			s.rest = append(s.rest, "\n\n"...)
			continue
		case s.err != nil:
			return e, s.err
		}
		var n int
		if n, s.err = s.body.Read(s.buf[:]); n > 0 {
			alive()
		}
		s.mute += n
		s.rest = append(s.rest, s.buf[:n]...)
	}
}

// attempt sends a question once. stopped means that the caller does not want the rest.
func (o *OpenAI) attempt(ctx context.Context, request []byte, yield func(Piece) bool) (failed error, stopped bool) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(o.cfg.Timeout, func() { cancel(errSilent) })
	defer watch.Stop()
	why := func(err error) error {
		if context.Cause(ctx) == errSilent {
			return errSilent
		}
		return err
	}
	res, err := o.send(ctx, request)
	if err != nil {
		return why(err), false
	}
	defer res.Body.Close()

	s := &stream{body: res.Body, parser: sse.Parser{AnyBytes: true, NameAlone: true}}
	var a answer
	last := time.Now() // when something was last said
	patience := func() time.Duration {
		wait := o.cfg.Timeout
		if a.words {
			wait = o.cfg.Stall
		}
		if a.stage == finished {
			wait = min(wait, afterwards)
		}
		return max(min(wait, time.Until(last.Add(muteLongest))), 0)
	}
	for a.stage != done {
		watch.Reset(patience())
		var e sse.Event
		if e, err = s.next(func() {
			if a.stage != finished {
				watch.Reset(patience())
			}
		}); err != nil {
			break
		}
		watch.Stop() // no timeout while the caller handles the content
		said, err := a.take(e)
		for _, p := range said {
			if !yield(p) {
				return nil, true
			}
		}
		switch {
		case s.torn && errors.Is(err, errJSON): // complete says what that means
		case err != nil:
			return err, false
		default:
			s.torn = s.torn && strings.TrimSpace(e.Data) == ""
		}
		if len(said) > 0 {
			s.mute, last = 0, time.Now()
		}
	}
	if a.stage == done { // a connection can be reused only if the response was read to its end
		watch.Reset(ending)
		_, _ = res.Body.Read(make([]byte, 1))
	}
	if errors.Is(err, errLarge) {
		return err, false
	}
	// Without a length or chunks, a broken connection looks like the end.
	framed := res.ProtoMajor > 1 || res.ContentLength >= 0 || len(res.TransferEncoding) > 0 || res.Uncompressed
	if failed := a.complete(why(err), framed && errors.Is(err, io.EOF), s.torn); failed != nil {
		return failed, false
	}
	return nil, (a.finish != "" || a.usage != nil) && !yield(Piece{Finish: a.finish, Usage: a.usage})
}
