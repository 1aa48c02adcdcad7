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

// Reasons why an answer fails, beside those of model.Error.
const (
	modelFailed     = "model_failed" // in a way that it does not say
	answerTooLarge  = "answer_too_large"
	contextTooLarge = "context_too_large"
	failedShutdown  = "shutdown"
	failedRedis     = "redis_away"
)

// answerPatience is how long an answer waits for a Redis that is away.
const answerPatience = time.Minute

// exchange is a question that was taken: its message and where it is in the log, and the
// message of the answer.
type exchange struct {
	question, reply string
	seq             int64  // the question's number,
	epoch           string // in this log
}

// ask appends the user's message and has the model answer into the same log.
func (a *API) ask(c echo.Context) error {
	if err := checkJSON(c); err != nil {
		return err
	}
	body, err := a.readBody(c, a.atMost(c, 6*a.cfg.ChunkMax+1024)) // JSON may have six bytes for one
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

// begin appends a question, which stands in the request at member, and has the model answer it.
func (a *API) begin(c echo.Context, content, member string) (x exchange, err error) {
	a.answers.add() // before it is looked whether all have to end: whoever has them end waits for those that are counted
	begun := false
	defer func() {
		if !begun {
			a.answers.done()
		}
	}()
	if a.ending.Err() != nil {
		return x, errDraining
	}
	for _, id := range []*string{&x.question, &x.reply} {
		made, err := uuid.NewV7()
		if err != nil {
			return x, err
		}
		*id = made.String()
	}
	chunk := store.NewChunk(store.TypeMessage, x.question, roleUser, content)
	if chunk.Size() > a.cfg.ChunkMax {
		return x, &Problem{Status: http.StatusRequestEntityTooLarge, Code: "content_too_large", Member: member, Limit: a.cfg.ChunkMax,
			Detail: "the question is too long for one chunk (-chunk-max)"}
	}
	caller := a.caller(c)
	if err := a.limits.Answers.Take(caller, 1); err != nil {
		p := *problemOf(err)
		p.Status, p.Code = http.StatusTooManyRequests, "model_busy"
		return x, &p
	}
	// The answer is an upload of this node's own: numbered, so that what may have been
	// stored can be sent again, and held, so that it ends when the node dies. Its message
	// begins with the question: it can be cancelled before its first word.
	u := a.newUpload(c.Request().Context(), session(c), caller, store.Producer{ID: x.reply}, 0, 0)
	u.held = []string{x.reply}
	u.begin()
	asked := []store.Chunk{chunk}
	err = u.mayStore(asked)
	if err == nil {
		err = u.append(asked, store.HoldOpen)
	}
	if err != nil {
		u.end()
		a.limits.Answers.Give(caller, 1)
		return x, err
	}
	x.seq, x.epoch = u.stored.Last, u.stored.Epoch
	u.patience = answerPatience
	begun = true
	go func() { // ends with the answer, or by End or a cancel; nobody's disconnect ends it
		defer a.answers.done()
		defer a.limits.Answers.Give(caller, 1)
		defer u.end()
		a.answer(u, x, content)
	}()
	return x, nil
}

// underway counts answers. A WaitGroup could not be waited for while others begin.
type underway struct {
	mu   sync.Mutex
	n    int
	none chan struct{} // closed when n has become 0
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

// wait waits, until ctx ends, for a moment in which there is none.
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
func (a *API) answer(u *upload, x exchange, question string) {
	log := a.log.With(slog.String("session", u.session), slog.String("message_id", x.reply))
	log.Info("answer begins")
	last, err := a.transcribe(u, x, question)
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
			log.Warn("model failed", slog.String("reason", reason), slog.Any("err", err)) // an alert tells if it goes on
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
		if store.Away(err) { // that Redis is away, or refuses, is said once for all; the message's lease runs out instead
			level = slog.LevelDebug
		}
		log.LogAttrs(context.Background(), level, "answer is left without its end", slog.Any("err", err))
		return
	}
	log.Info("answer ends")
}

// What the model has said while an append was under way shares the next one. When so many
// pieces wait, the model has to.
const piecesMost = 256

// transcribe appends what the model says, and answers the chunk that ends it.
func (a *API) transcribe(u *upload, x exchange, question string) (done store.Chunk, err error) {
	done = store.NewChunk(store.TypeDone, x.reply, roleAssistant, "")
	turns, err := a.conversation(u.ctx, u.session, x.seq, question)
	if err != nil {
		return done, err
	}
	type word struct {
		piece model.Piece
		err   error
	}
	begun := time.Now()
	ctx, stop := context.WithCancel(u.ctx)
	words := make(chan word, piecesMost)
	var unsaid error // why the rest is not in words, once that is closed
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

// chunks is a piece of an answer as chunks: one, unless it is too long for one, and none for
// what belongs to the end of it.
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
		const most = 64 // it is a word
		done = done.With("finish_reason", p.Finish[:min(len(p.Finish), most)])
	}
	if p.Usage != nil && len(p.Usage) < 4<<10 {
		done, _ = done.WithJSON("usage", p.Usage) // or goes without
	}
	return all, done
}

const typeToolCalls = "tool_calls"

// splitCalls is calls of tools that do not fit into one chunk, in several, as services stream them too: first
// a call's id and name, then pieces of its arguments, which whoever executes it joins by index. Members that
// the API of chat completions does not have are left out.
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

// cut is a text in pieces that fit into a chunk, however much of them has to be escaped. It
// cuts no character.
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

// pieces is what the model says. One that panics has failed, and the server has not.
func (a *API) pieces(ctx context.Context, conversation []model.Turn) iter.Seq2[model.Piece, error] {
	return func(yield func(model.Piece, error) bool) {
		ours := false // what runs is not the model
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

// over says whether nobody wants the rest of an answer.
func over(err error) bool {
	_, ended := errors.AsType[*store.MessageEndedError](err)
	_, fenced := errors.AsType[*store.FencedError](err)
	return ended || fenced || errors.Is(err, store.ErrSessionEnded) || errors.Is(err, store.ErrSessionDeleted)
}

// cancelledJSON is what a cancel has ended.
type cancelledJSON struct {
	Stored
	Messages []string `json:"message_ids"`
}

// cancel ends a message, or all that are unfinished.
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
