package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/api/model"
	"gapless/store"
)

const (
	roleUser      = model.RoleUser
	roleAssistant = model.RoleAssistant
)

// Reasons why an answer fails, besides those of model.Error.
const (
	modelFailed     = "model_failed" // the model does not give a reason
	answerTooLarge  = "answer_too_large"
	contextTooLarge = "context_too_large"
	nothingAsked    = "nothing_asked"
	failedShutdown  = "shutdown"
	failedRedis     = "redis_away"
)

// answerPatience is how long an answer waits for a Redis that is away.
const answerPatience = time.Minute

// exchange is an accepted question: its message and its place in the log, and the message of the answer.
type exchange struct {
	question, reply string
	seq             int64  // the number of the question, or of the last chunk of it,
	epoch           string // in this log

	done chan struct{} // closed when the answer is over
}

// asking is what a question consists of.
type asking struct {
	session string
	reply   string // the message of the answer
	chunks  []store.Chunk
	member  string // where in the request they stand
	// turns is what the model is asked, once chunk number seq, the last of them, is in the log.
	turns func(ctx context.Context, seq int64) (context.Context, []model.Turn, error)
}

// ask appends the user's message and makes the model answer into the same log.
func (a *API) ask(c echo.Context) error {
	if err := checkJSON(c); err != nil {
		return err
	}
	body, err := a.readBody(c, a.atMost(c, 6*a.cfg.ChunkMax+1024)) // JSON may need six bytes for one
	if err != nil {
		return err
	}
	members, err := readStrings(body, "content")
	if err != nil {
		return err
	}
	if strings.TrimSpace(members["content"]) == "" {
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_content", Member: "/content", Detail: "content is missing or blank: it is the question"}
	}
	x, err := a.begin(c, members["content"], "/content")
	if err != nil {
		return err
	}
	return c.JSON(http.StatusAccepted, struct {
		MessageID string `json:"message_id"`
		ReplyID   string `json:"reply_message_id"`
	}{x.question, x.reply})
}

// begin appends a question and makes the model answer it. Errors name member, which contains the question in the
// request.
func (a *API) begin(c echo.Context, content, member string) (x exchange, err error) {
	for _, id := range []*string{&x.question, &x.reply} {
		made, err := uuid.NewV7()
		if err != nil {
			return x, err
		}
		*id = made.String()
	}
	id := session(c)
	asked := x.question
	x, err = a.put(c, asking{id, x.reply, []store.Chunk{store.NewChunk(store.TypeMessage, asked, roleUser, content)}, member,
		func(ctx context.Context, seq int64) (context.Context, []model.Turn, error) {
			turns, err := a.conversation(ctx, question{session: id, first: seq, last: seq})
			return ctx, turns, err
		}})
	x.question = asked
	return x, err
}

// put appends a question, and has the model answer it.
func (a *API) put(c echo.Context, q asking) (x exchange, err error) {
	x.reply, x.done = q.reply, make(chan struct{})
	a.answers.add() // before checking whether all must end: ending waits for the answers that are counted
	begun := false
	defer func() {
		if !begun {
			a.answers.done()
		}
	}()
	if a.ending.Err() != nil {
		return x, errDraining
	}
	for _, chunk := range q.chunks {
		if chunk.Size() > a.cfg.ChunkMax {
			return x, &Problem{Status: http.StatusRequestEntityTooLarge, Code: "content_too_large", Member: q.member, Limit: a.cfg.ChunkMax,
				Detail: "the question is too long for one chunk (-chunk-max)"}
		}
	}
	caller := a.caller(c)
	if err := a.limits.Answers.Take(caller, 1); err != nil {
		p := *problemOf(err)
		p.Status, p.Code = http.StatusTooManyRequests, "model_busy"
		return x, &p
	}
	// The answer is an upload of this node. It has numbers, so that a retry is safe if it may have been stored. It is
	// held, so that it ends if the node dies. Its message begins with the question, so it can be cancelled before its
	// first word.
	u := a.newUpload(c.Request().Context(), q.session, caller, store.Producer{ID: x.reply}, 0, 0)
	u.held = []string{x.reply}
	u.begin()
	err = u.mayStore(q.chunks)
	if err == nil {
		err = u.append(q.chunks, store.HoldOpen)
	}
	if err != nil {
		u.end()
		a.limits.Answers.Give(caller, 1)
		return x, err
	}
	x.seq, x.epoch = u.stored.Last, u.stored.Epoch
	u.patience = answerPatience
	begun = true
	go func() { // ends with the answer, by End or by a cancel; a client that disconnects does not end it
		defer a.answers.done()
		defer a.limits.Answers.Give(caller, 1)
		defer u.end()
		defer close(x.done)
		a.answer(u, x, q)
	}()
	return x, nil
}

// underway counts answers. A WaitGroup cannot be waited for while others begin.
type underway struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n becomes 0
}

func (u *underway) add() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n++; u.n == 1 {
		u.none = make(chan struct{})
	}
}

func (u *underway) done() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n--; u.n == 0 {
		close(u.none)
	}
}

// wait waits until no answer is under way, or ctx ends.
func (u *underway) wait(ctx context.Context) {
	u.mu.Lock()
	n, none := u.n, u.none
	u.mu.Unlock()
	if n == 0 {
		return
	}
	select {
	case <-none:
	case <-ctx.Done():
	}
}

// answer appends what the model says, as it comes, and how it ended.
func (a *API) answer(u *upload, x exchange, q asking) {
	log := a.log.With(slog.String("session", u.session), slog.String("message_id", x.reply))
	log.Info("answer begins")
	last, err := a.transcribe(u, x, q)
	if cause := context.Cause(u.ctx); err != nil && cause != nil {
		err = cause
	}
	if over(err) {
		log.Info("answer ends", slog.Any("err", err))
		return
	}
	if err != nil {
		reason, detail := modelFailed, ""
		if e, ok := errors.AsType[*model.Error](err); ok {
			reason, detail = e.Reason, e.Detail
			log.Warn("model failed", slog.String("reason", reason), slog.Any("err", err)) // an alert reports it if it persists
		} else if errors.Is(err, errDraining) {
			reason = failedShutdown
		} else if store.Away(err) {
			reason = failedRedis
		} else {
			log.Error("model failed", slog.Any("err", err))
		}
		a.metrics.failed(reason)
		if last = store.NewFailed(x.reply, roleAssistant, reason); detail != "" {
			last = last.With("detail", detail)
		}
	}
	if err := u.append([]store.Chunk{last}, store.HoldClosed); err != nil && !over(err) {
		level := slog.LevelError
		if store.Away(err) { // a Redis that is away or refuses is logged once for all; the message's lease ends the message instead
			level = slog.LevelDebug
		}
		log.LogAttrs(context.Background(), level, "answer is left without its end", slog.Any("err", err))
		return
	}
	log.Info("answer ends")
}

// piecesMost is how many pieces of the model may wait. Pieces that arrive during an append share the next one. When
// this many wait, the model must wait.
const piecesMost = 256

// transcribe appends what the model says, and returns the chunk that ends it.
func (a *API) transcribe(u *upload, x exchange, q asking) (done store.Chunk, err error) {
	done = store.NewChunk(store.TypeDone, x.reply, roleAssistant, "")
	asked, turns, err := q.turns(u.ctx, x.seq)
	if err != nil {
		return done, err
	}
	type word struct {
		piece model.Piece
		err   error
	}
	begun := time.Now()
	ctx, stop := context.WithCancel(asked)
	words := make(chan word, piecesMost)
	var unsaid error // why the rest is not in words, after words is closed
	var wg sync.WaitGroup
	wg.Go(func() { // ended by stop, and waited for
		defer close(words)
		for piece, err := range a.pieces(ctx, turns) {
			select {
			case words <- word{piece, err}:
				continue
			default:
			}
			select {
			case words <- word{piece, err}:
			case <-ctx.Done():
				unsaid = ctx.Err()
				return
			}
		}
	})
	defer wg.Wait()
	defer stop()

	size, mute := 0, true
	for first := range words {
		if mute && first.err == nil {
			a.metrics.begun.Observe(time.Since(begun).Seconds())
			mute = false
		}
		var chunks []store.Chunk
		for w := first; ; w = <-words {
			var more []store.Chunk
			if err = w.err; err == nil {
				more, done = a.chunks(x.reply, w.piece, done)
			}
			size += len(w.piece.Text) + len(w.piece.ToolCalls)
			for _, c := range more {
				if c.Size() > a.cfg.ChunkMax {
					err = &model.Error{Reason: model.Broken, Detail: "the model sent something that is too long for one chunk (-chunk-max)"}
				}
			}
			if size > a.cfg.AnswerMax {
				err = &model.Error{Reason: answerTooLarge, Detail: fmt.Sprintf("the answer is larger than %d bytes (-model-answer-max)", a.cfg.AnswerMax)}
			}
			if err != nil {
				break
			}
			if chunks = append(chunks, more...); len(words) == 0 || len(chunks) >= piecesMost {
				break
			}
		}
		if len(chunks) > 0 {
			if failed := u.append(chunks, store.HoldOpen); failed != nil {
				return done, failed
			}
		}
		if err != nil {
			return done, err
		}
	}
	return done, unsaid
}

// chunks returns the chunks for a piece of an answer: usually one, more if it is too long, and none if it belongs to
// the end. It also returns the updated done.
func (a *API) chunks(reply string, p model.Piece, done store.Chunk) (all []store.Chunk, _ store.Chunk) {
	kind := store.TypeDelta
	if p.Reasoning {
		kind = store.TypeReasoning
	}
	for text := range cut(p.Text, a.cfg.ChunkMax) {
		c := store.NewChunk(kind, reply, roleAssistant, text)
		if p.Refusal {
			c, _ = c.WithJSON("refusal", []byte("true"))
		}
		all = append(all, c)
	}
	if p.ToolCalls != nil {
		c, bad := store.NewChunk(typeToolCalls, reply, roleAssistant, "").WithJSON("data", p.ToolCalls)
		if bad == nil && c.Size() <= a.cfg.ChunkMax {
			all = append(all, c)
		} else {
			all = append(all, a.splitCalls(reply, p.ToolCalls)...)
		}
	}
	if p.Finish != "" {
		const most = 64 // the reason is a word
		finish := []byte(p.Finish[:min(len(p.Finish), most)])
		done = done.With("finish_reason", string(finish[:wholeRunes(finish)]))
	}
	if p.Usage != nil && len(p.Usage) < 4<<10 {
		done, _ = done.WithJSON("usage", p.Usage) // or is left out
	}
	return all, done
}

const typeToolCalls = "tool_calls"

// splitCalls splits tool calls that do not fit into one chunk, as services that stream them do. First comes a call's id
// and name, then pieces of its arguments. The program that executes the call joins them by index. It omits members that
// the chat completions API does not have.
func (a *API) splitCalls(reply string, calls []byte) (all []store.Chunk) {
	type function struct {
		Name      string `json:"name,omitempty"`
		Arguments string `json:"arguments"`
	}
	type call struct {
		Index    json.RawMessage `json:"index"`
		ID       string          `json:"id,omitempty"`
		Type     string          `json:"type,omitempty"`
		Function function        `json:"function"`
	}
	add := func(c call) {
		data, _ := json.Marshal([]call{c})
		chunk, _ := store.NewChunk(typeToolCalls, reply, roleAssistant, "").WithJSON("data", data)
		all = append(all, chunk)
	}
	for _, whole := range model.Calls(calls) {
		add(call{Index: whole.Index, ID: whole.ID, Type: whole.Type, Function: function{Name: whole.Name}})
		for arguments := range cut(whole.Arguments, a.cfg.ChunkMax) {
			add(call{Index: whole.Index, Function: function{Arguments: arguments}})
		}
	}
	return all
}

// cut yields a text in pieces that fit into a chunk even if all of it must be escaped. It cuts no character.
func cut(text string, limit int) iter.Seq[string] {
	most := max((limit-store.Overhead-192)/6, utf8.UTFMax)
	return func(yield func(string) bool) {
		for len(text) > most {
			at := most
			for at > most-utf8.UTFMax && !utf8.RuneStart(text[at]) {
				at--
			}
			if !yield(text[:at]) {
				return
			}
			text = text[at:]
		}
		if text != "" {
			yield(text)
		}
	}
}

// pieces yields what the model says. A panic of the model becomes an error, so it does not crash the server.
func (a *API) pieces(ctx context.Context, conversation []model.Turn) iter.Seq2[model.Piece, error] {
	return func(yield func(model.Piece, error) bool) {
		ours := false // the running code is not the model's
		defer func() {
			if r := recover(); r != nil && ours {
				panic(r)
			} else if r != nil {
				yield(model.Piece{}, fmt.Errorf("the model panicked: %v\n%s", r, debug.Stack()))
			}
		}()
		for piece, err := range a.model.Answer(ctx, conversation) {
			ours = true
			if !yield(piece, err) {
				return
			}
			ours = false
		}
	}
}

// over reports whether the rest of an answer is no longer wanted.
func over(err error) bool {
	_, ended := errors.AsType[*store.MessageEndedError](err)
	_, fenced := errors.AsType[*store.FencedError](err)
	return ended || fenced || errors.Is(err, store.ErrSessionEnded) || errors.Is(err, store.ErrSessionDeleted)
}

// cancelledJSON says what a cancel has ended.
type cancelledJSON struct {
	Stored
	Messages []string `json:"message_ids"`
}

// cancel ends a message, or all unfinished messages.
func (a *API) cancel(c echo.Context) error {
	body, err := a.readBody(c, a.atMost(c, smallBody))
	if err != nil {
		return err
	}
	var message string
	if len(body) > 0 {
		if err := checkJSON(c); err != nil {
			return err
		}
		members, err := readStrings(body, "message_id")
		if err != nil {
			return err
		}
		var given bool
		if message, given = members["message_id"]; given && (message == "" || len(message) > store.MaxMessageID) {
			return &Problem{Status: http.StatusBadRequest, Code: "invalid_parameter", Member: "/message_id", Limit: store.MaxMessageID,
				Detail: fmt.Sprintf("message_id must be text of 1 to %d bytes; leave it out to cancel every unfinished message", store.MaxMessageID)}
		}
	}
	begun := time.Now()
	done, err := a.logs.Cancel(c.Request().Context(), session(c), message)
	if ended, ok := errors.AsType[*store.MessageEndedError](err); ok {
		p := *problemOf(err)
		p.Detail = ended.Error() + ": nothing is left to cancel"
		return &p
	}
	if err != nil {
		return err
	}
	if a.cfg.Tracer != nil && len(done.Messages) > 0 {
		a.cfg.Tracer.Appended(c.Request().Context(), session(c), done.Epoch, done.First, done.Last, begun)
	}
	answer := cancelledJSON{Stored: Stored{Epoch: done.Epoch, First: done.First, Last: done.Last, Count: len(done.Messages)}, Messages: done.Messages}
	if answer.Messages == nil {
		answer.Messages = []string{}
	}
	return c.JSON(http.StatusOK, answer)
}
