package model

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"time"

	"gapless/sse"
)

// The bounds on what a service sends. What it says itself is bounded by those who take it.
const (
	// eventMost bounds an event, in bytes: a word needs some hundred.
	eventMost = 1 << 20
	// muteMost bounds what comes without anything said, in bytes.
	muteMost = 64 << 20
	// muteLongest bounds how long a service may be alive (it sends comments, as OpenRouter and DeepSeek do
	// while a model is busy) and say nothing.
	muteLongest = time.Hour
	// afterwards is how long after the end of an answer its cost, or [DONE], may come.
	afterwards = 5 * time.Second
	// ending is how long the end of the response may come after [DONE].
	ending = 100 * time.Millisecond
)

// stage is how far an answer is. Services differ in how they say that one has ended, and some say it too
// early. So an answer goes through stages, and how its stream ends decides what it was:
//
//	          is said    a finish          silence    the response  the connection
//	stage     again      is said           too long   ends          breaks
//	open      open       claimed/finished  timeout    broken        broken
//	claimed   open       claimed/finished  timeout    complete      broken
//	finished  open       finished          complete   complete      complete
//	done      -          -                 -          -             -          complete at once
//
// "Said" is text, thinking, refusal or a call of a tool. What is said after a finish takes it back. The event
// [DONE] leads from every stage to done; an error anywhere (a member error, also of a choice or of its
// delta, a finish that means failure, an event named error, an event that cannot be read) is a failure in
// every stage. A complete answer in which nothing but thinking was said is empty, which is a failure, too.
//
// A finish is a finish_reason that is text, and neither empty nor "null" nor "none". On an event that says
// only thinking it means nothing: some services say "stop" there. Others say it in each event. So a finish
// is no more than a claim, which [DONE] or the clean end of the response has to confirm,
//   - before anything was said,
//   - on an event that says something, unless something was said before in an event without a finish, and
//   - once a finish was taken back.
//
// Silence is that no byte comes: a comment, or an event without a meaning, is a sign of life. Only after a
// finish nothing but an event is: there it is the cost that is waited for.
type stage int

const (
	open stage = iota
	claimed
	finished
	done
)

// failing are the finishes that mean failure.
var failing = map[string]bool{"error": true, "abort": true, "aborted": true, "cancelled": true, "insufficient_system_resource": true}

// answer is an answer as far as it came.
type answer struct {
	texts

	stage   stage
	spoken  bool // something was said, though it be thinking
	words   bool // something else was said than thinking
	sparing bool // some of it came in events without a finish
	wrong   bool // a finish was taken back
	finish  string
	usage   json.RawMessage // some services say it in each event: the last one counts
}

// take takes an event, and returns what it says.
func (a *answer) take(e sse.Event) (all []Piece, err error) {
	if e.Name == "error" {
		return nil, errSaid
	}
	for rest := strings.TrimSpace(e.Data); rest != ""; rest = strings.TrimSpace(rest) {
		switch {
		case strings.HasPrefix(rest, "[DONE]"):
			a.stage = done
			return all, nil
		case rest[0] == ':': // a comment in the wrong place
			_, rest, _ = strings.Cut(rest, "\n")
		default: // one value; several where a service leaves out the blank lines between events
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
	if means(event["error"]) || means(groq["error"]) || text(event["object"]) == "error" || text(event["type"]) == "error" {
		return nil, errSaid
	}
	for _, usage := range []json.RawMessage{groq["usage"], event["usage"]} {
		if object(usage) != nil {
			a.usage = usage
		}
	}
	for _, value := range list(event["choices"]) {
		choice := object(value)
		if number(choice["index"]) > 0 { // there is one, unless the options ask for more
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

// move is what a choice of an event does to the stage: what it says, and its finish.
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

// complete says whether the answer was, where its stream ended: err is nil after [DONE], or why nothing more came.
func (a *answer) complete(err error, clean bool) error {
	switch {
	case a.stage == done, a.stage == finished, a.stage == claimed && clean:
		if !a.words {
			return errEmpty
		}
		return nil
	case errors.Is(err, io.EOF):
		return errShort
	}
	return err
}

// stream is a response, event by event.
type stream struct {
	body   io.Reader
	parser sse.Parser
	rest   []byte // what has arrived, and is no event yet
	err    error  // nothing more arrives
	torn   bool   // the event that follows has no blank line after it: the response ended there
	mute   int    // bytes since anything was said
	buf    [8 << 10]byte
}

// next is the next event. alive is called whenever something has arrived. What a response ends with is an
// event, too, if only its blank line is missing: most clients take it as one.
func (s *stream) next(alive func()) (e sse.Event, err error) {
	for {
		var whole bool
		e, s.rest, whole, err = s.parser.Next(s.rest, eventMost)
		switch {
		case err != nil, len(s.rest) > eventMost, s.mute > muteMost:
			return e, errLarge
		case whole:
			return e, nil
		case errors.Is(s.err, io.EOF) && !s.torn:
			s.torn, s.rest = true, append(s.rest, "\n\n"...)
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

// attempt asks once. stopped says that nobody wants the rest.
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

	s := &stream{body: res.Body, parser: sse.Parser{AnyBytes: true}}
	var a answer
	last := time.Now() // that something was said
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
		watch.Stop() // not while others take what it has said
		said, err := a.take(e)
		for _, p := range said {
			if !yield(p) {
				return nil, true
			}
		}
		if err != nil && !(s.torn && errors.Is(err, errJSON)) {
			return err, false
		}
		if len(said) > 0 {
			s.mute, last = 0, time.Now()
		}
	}
	if a.stage == done { // a connection is good for the next answer when this one was read to its end
		watch.Reset(ending)
		_, _ = res.Body.Read(make([]byte, 1))
	}
	if errors.Is(err, errLarge) {
		return err, false
	}
	// Without a length, and without chunks, a connection that breaks looks like the end.
	framed := res.ProtoMajor > 1 || res.ContentLength >= 0 || len(res.TransferEncoding) > 0 || res.Uncompressed
	if failed := a.complete(why(err), framed && errors.Is(err, io.EOF)); failed != nil {
		return failed, false
	}
	return nil, (a.finish != "" || a.usage != nil) && !yield(Piece{Finish: a.finish, Usage: a.usage})
}
