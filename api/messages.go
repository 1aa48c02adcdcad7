package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
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
	body, err := a.readBody(c)
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
	select {
	case a.places <- struct{}{}:
	default:
		return &Problem{Status: http.StatusTooManyRequests, Code: "model_busy", Limit: a.cfg.Answers,
			Detail: "too many answers are under way on this node: try again", retryAfter: 1}
	}
	u := upload{api: a, session: session(c)}
	if err := u.append(c.Request().Context(), []store.Chunk{chunk}); err != nil {
		<-a.places
		return err
	}
	a.answers.Go(func() { // ends with the answer, or by End; nobody's disconnect ends it
		defer func() { <-a.places }()
		a.answer(&u, reply.String(), []model.Turn{{Role: roleUser, Content: content}})
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
	for piece, err := range a.model.Answer(a.ending, conversation) {
		if err == nil {
			err = a.say(u, store.NewChunk(store.TypeDelta, reply, roleAssistant, piece))
		} else if a.ending.Err() == nil {
			log.Error("model failed", slog.Any("err", err))
		}
		if over(err) {
			log.Info("answer ends", slog.Any("err", err))
			return
		}
		if err != nil {
			reason := "model_failed"
			if a.ending.Err() != nil {
				reason = "shutdown"
			} else if store.Away(err) {
				reason = "redis_away"
			}
			last = store.NewFailed(reply, roleAssistant, reason)
			break
		}
	}
	if err := a.say(u, last); err != nil && !over(err) {
		log.Error("answer is left without its end", slog.Any("err", err))
		return
	}
	log.Info("answer ends")
}

// over says whether nobody wants the rest of an answer.
func over(err error) bool {
	_, ended := errors.AsType[*store.MessageEndedError](err)
	return ended || errors.Is(err, store.ErrSessionEnded) || errors.Is(err, store.ErrSessionDeleted)
}

// say appends one chunk, and while Redis is away waits for it. What may have been
// stored is not repeated.
func (a *API) say(u *upload, chunk store.Chunk) error {
	const patience = time.Minute
	for begin, pause := time.Now(), 50*time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		err := u.append(context.Background(), []store.Chunk{chunk})
		if !errors.Is(err, store.ErrAway) || time.Since(begin) > patience {
			return err
		}
		select {
		case <-time.After(pause):
		case <-a.ending.Done():
			return err
		}
	}
}
