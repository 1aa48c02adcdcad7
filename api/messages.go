package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"gapless/api/model"
	"gapless/store"
)

const (
	roleUser      = "user"
	roleAssistant = "assistant"
)

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
	content := members["content"]
	if content == "" {
		return &Problem{Status: http.StatusBadRequest, Code: "invalid_content", Member: "/content", Detail: "content, the question, is missing or empty"}
	}
	if a.ending.Err() != nil {
		return errDraining
	}
	question, err := uuid.NewV7()
	if err != nil {
		return err
	}
	reply, err := uuid.NewV7()
	if err != nil {
		return err
	}
	chunk := store.NewChunk(store.TypeMessage, question.String(), roleUser, content)
	if chunk.Size() > a.cfg.ChunkMax {
		return &Problem{Status: http.StatusRequestEntityTooLarge, Code: "content_too_large", Member: "/content", Limit: a.cfg.ChunkMax,
			Detail: "the question is longer than one chunk may be (-chunk-max)"}
	}
	caller := a.caller(c)
	if err := a.limits.Answers.Take(caller, 1); err != nil {
		p := *problemOf(err)
		p.Status, p.Code = http.StatusTooManyRequests, "model_busy"
		return &p
	}
	// The answer is an upload of this node's own: numbered, so that what may have been
	// stored can be sent again, and held, so that it ends when the node dies. Its message
	// begins with the question: it can be cancelled before its first word.
	u := a.newUpload(c.Request().Context(), session(c), caller, store.Producer{ID: reply.String()}, 0, 0)
	u.held = []string{reply.String()}
	u.begin()
	if err := u.append([]store.Chunk{chunk}, store.HoldOpen); err != nil {
		u.end()
		a.limits.Answers.Give(caller, 1)
		return err
	}
	u.patience = time.Minute
	a.answers.Go(func() { // ends with the answer, or by End or a cancel; nobody's disconnect ends it
		defer a.limits.Answers.Give(caller, 1)
		defer u.end()
		a.answer(u, reply.String(), []model.Turn{{Role: roleUser, Content: content}})
	})
	return c.JSON(http.StatusAccepted, struct {
		MessageID string `json:"message_id"`
		ReplyID   string `json:"reply_message_id"`
	}{question.String(), reply.String()})
}

// answer appends what the model says, piece by piece, and how it ended.
func (a *API) answer(u *upload, reply string, conversation []model.Turn) {
	log := a.log.With(slog.String("session", u.session), slog.String("message_id", reply))
	log.Info("answer begins")
	last := store.NewChunk(store.TypeDone, reply, roleAssistant, "")
	for piece, err := range a.pieces(u.ctx, conversation) {
		if err == nil {
			err = u.append([]store.Chunk{store.NewChunk(store.TypeDelta, reply, roleAssistant, piece)}, store.HoldOpen)
		} else if cause := context.Cause(u.ctx); cause != nil {
			err = cause
		} else {
			log.Error("model failed", slog.Any("err", err))
		}
		if over(err) {
			log.Info("answer ends", slog.Any("err", err))
			return
		}
		if err != nil {
			reason := "model_failed"
			if errors.Is(context.Cause(u.ctx), errDraining) {
				reason = "shutdown"
			} else if store.Away(err) {
				reason = "redis_away"
			}
			last = store.NewFailed(reply, roleAssistant, reason)
			break
		}
	}
	if err := u.append([]store.Chunk{last}, store.HoldClosed); err != nil && !over(err) {
		log.Error("answer is left without its end", slog.Any("err", err))
		return
	}
	log.Info("answer ends")
}

// pieces is what the model says. One that panics has failed, and the server has not.
func (a *API) pieces(ctx context.Context, conversation []model.Turn) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		ours := false // what runs is not the model
		defer func() {
			if r := recover(); r != nil && ours {
				panic(r)
			} else if r != nil {
				yield("", fmt.Errorf("the model panicked: %v\n%s", r, debug.Stack()))
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
				Detail: fmt.Sprintf("message_id is text of 1 to %d bytes: leave it out to cancel every unfinished message", store.MaxMessageID)}
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
