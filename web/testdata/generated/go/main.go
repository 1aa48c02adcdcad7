// What a program does with the client that oapi-codegen makes of openapi.yaml: each call, typed.
// It is given the server's URL, and ends with 1 and a word at the first that is not as it should be.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"client/gapless"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	err := use(ctx, os.Args[1])
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("all calls work")
}

func use(ctx context.Context, server string) error {
	c, err := gapless.NewClientWithResponses(server)
	if err != nil {
		return err
	}
	const session = "generated-go"

	created, err := c.CreateSessionWithResponse(ctx, gapless.NewSession{Id: new(session)})
	if err != nil || created.JSON201 == nil || created.JSON201.Id != session || created.Headers201.Location != "/v1/sessions/"+session {
		return fmt.Errorf("create: %v %+v", err, created)
	}

	var chunks gapless.NewChunks
	one := gapless.NewChunk{MessageId: new("m1"), Role: new("assistant"), Content: new("Tea "), AdditionalProperties: map[string]any{"trace": "4bf92f35"}}
	if err := chunks.FromNewChunkList(gapless.NewChunkList{one, {MessageId: new("m1"), Content: new("is ready.")}}); err != nil {
		return err
	}
	appended, err := c.AppendChunksWithResponse(ctx, session, nil, chunks)
	if err != nil || appended.JSON201 == nil || appended.JSON201.Count != 2 || appended.JSON201.LastSeq != 2 {
		return fmt.Errorf("append JSON: %v %+v", err, appended)
	}
	lines := `{"message_id":"m1","content":" At"}` + "\n" + `{"message_id":"m1","content":" last."}` + "\n"
	numbers := &gapless.AppendChunksParams{ProducerId: new("generated"), ProducerEpoch: new(int64(0)), ProducerChunk: new(int64(0))}
	appended, err = c.AppendChunksWithBodyWithResponse(ctx, session, numbers, "application/x-ndjson", strings.NewReader(lines))
	if err != nil || appended.JSON201 == nil || appended.JSON201.FirstSeq != 3 || appended.JSON201.Count != 2 {
		return fmt.Errorf("append NDJSON: %v %+v", err, appended)
	}
	again, err := c.AppendChunksWithBodyWithResponse(ctx, session, numbers, "application/x-ndjson", strings.NewReader(lines))
	if err != nil || again.JSON200 == nil || *again.JSON200 != *appended.JSON201 {
		return fmt.Errorf("append again: %v %+v", err, again)
	}
	text, err := c.AppendChunksWithTextBodyWithResponse(ctx, session, &gapless.AppendChunksParams{MessageId: new("m2")}, "Grüße aus Huế")
	if err != nil || text.JSON201 == nil || text.JSON201.Count != 2 || *text.JSON201.MessageId != "m2" { // with its done
		return fmt.Errorf("append text: %v %+v", err, text)
	}

	page, err := c.ReadChunksWithResponse(ctx, session, &gapless.ReadChunksParams{After: new(int64(0)), Limit: new(int32(1))})
	if err != nil || page.JSON200 == nil || page.JSON200.LastSeq != 6 || len(page.JSON200.Chunks) != 1 {
		return fmt.Errorf("page: %v %+v", err, page)
	}
	if first := page.JSON200.Chunks[0]; *first.Content != "Tea " || *first.Seq != 1 || first.AdditionalProperties["trace"] != "4bf92f35" {
		return fmt.Errorf("page: %+v", first)
	}

	stopped, err := c.CancelWithResponse(ctx, session, gapless.Cancel{MessageId: new("m1")})
	if err != nil || stopped.JSON200 == nil || stopped.JSON200.Count != 1 || stopped.JSON200.MessageIds[0] != "m1" {
		return fmt.Errorf("cancel: %v %+v", err, stopped)
	}
	late, err := c.AppendChunksWithResponse(ctx, session, &gapless.AppendChunksParams{MessageId: new("m1")}, chunks)
	if err != nil || late.ApplicationproblemJSON409 == nil || late.ApplicationproblemJSON409.Code != gapless.ErrorCodeMessageCancelled {
		return fmt.Errorf("append to what is cancelled: %v %+v", err, late)
	}

	asked, err := c.AskWithResponse(ctx, session, gapless.Question{Content: "How long does tea steep?"})
	if err != nil || asked.JSON202 == nil {
		return fmt.Errorf("ask: %v %+v", err, asked)
	}
	// From behind the cancelled chunk on: the question, and the answer as it comes.
	said, err := follow(ctx, c, session, stopped.JSON200.LastSeq, asked.JSON202.ReplyMessageId)
	if err != nil || said == "" {
		return fmt.Errorf("stream: %q, %v", said, err)
	}

	deleted, err := c.DeleteSessionWithResponse(ctx, session)
	if err != nil || deleted.StatusCode() != http.StatusNoContent {
		return fmt.Errorf("delete: %v %+v", err, deleted)
	}
	gone, err := c.GetSessionWithResponse(ctx, session)
	if err != nil || gone.ApplicationproblemJSON404 == nil || gone.ApplicationproblemJSON404.Code != gapless.ErrorCodeSessionNotFound {
		return fmt.Errorf("get what is deleted: %v %+v", err, gone)
	}
	contract, err := c.GetContractWithResponse(ctx)
	if err != nil || contract.StatusCode() != http.StatusOK {
		return fmt.Errorf("contract: %v", err)
	}
	return nil
}

// follow reads a message from the stream, to its end: the client's plain call gives the response
// while it is under way, and the contract's types are those of the events' data.
func follow(ctx context.Context, c *gapless.ClientWithResponses, session string, after int64, message string) (said string, err error) {
	response, err := c.StreamChunks(ctx, session, &gapless.StreamChunksParams{After: new(fmt.Sprint(after)), Until: new(gapless.StreamChunksParamsUntil("done"))})
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	var event gapless.EventData
	name := ""
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		field, value, _ := strings.Cut(lines.Text(), ": ")
		switch field {
		case "event":
			name = value
			continue
		case "data":
			if err := json.Unmarshal([]byte(value), &event); err != nil {
				return "", err
			}
		case "":
			name = ""
			continue
		default:
			continue
		}
		if name == "welcome" {
			welcome, err := event.AsWelcomeEvent()
			if err != nil || welcome.Session != session || welcome.Cursor != after {
				return "", fmt.Errorf("%+v %v", welcome, err)
			}
			continue
		}
		chunk, err := event.AsChunk()
		if err != nil {
			return "", err
		}
		if chunk.MessageId == nil || *chunk.MessageId != message {
			continue
		}
		if *chunk.Type == "done" {
			return said, nil
		}
		said += *chunk.Content
	}
	return "", fmt.Errorf("the stream ended before its message: %q", said)
}
