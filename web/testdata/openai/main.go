// Command client asks by OpenAI's Go client, unchanged, follows the events, and where the connection breaks retrieves the rest by their number.
// It prints the text, once each event came once and the whole agrees.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/packages/ssestream"
	"github.com/openai/openai-go/v3/responses"
)

func main() {
	if err := run(context.Background(), os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, base, direct, question string) error {
	client := openai.NewClient(option.WithBaseURL(base), option.WithAPIKey("none"), option.WithMaxRetries(5))
	at := openai.NewClient(option.WithBaseURL(direct), option.WithAPIKey("none"))
	id, text, last := "", "", int64(-1)
	var ended *responses.Response
	take := func(stream *ssestream.Stream[responses.ResponseStreamEventUnion]) error {
		defer stream.Close()
		for stream.Next() {
			e := stream.Current()
			if e.SequenceNumber != last+1 {
				return fmt.Errorf("after %d came %d", last, e.SequenceNumber)
			}
			last = e.SequenceNumber
			switch e := e.AsAny().(type) {
			case responses.ResponseCreatedEvent:
				id = e.Response.ID
			case responses.ResponseTextDeltaEvent:
				text += e.Delta
			case responses.ResponseCompletedEvent:
				ended = &e.Response
			}
		}
		return nil // a connection that broke is one to resume
	}
	asked := responses.ResponseNewParams{Model: "demo", Input: responses.ResponseNewParamsInputUnion{OfString: openai.String(question)}, Background: openai.Bool(true)}
	if err := take(client.Responses.NewStreaming(ctx, asked)); err != nil {
		return err
	}
	for ended == nil {
		if id == "" {
			return fmt.Errorf("cut before its id")
		}
		if err := take(client.Responses.GetStreaming(ctx, id, responses.ResponseGetParams{StartingAfter: openai.Int(last)})); err != nil {
			return err
		}
	}
	whole, err := at.Responses.Get(ctx, id, responses.ResponseGetParams{})
	if err != nil {
		return err
	}
	var a, b any
	_ = json.Unmarshal([]byte(whole.RawJSON()), &a)
	_ = json.Unmarshal([]byte(ended.RawJSON()), &b)
	if x, y := fmt.Sprint(a), fmt.Sprint(b); x != y || whole.OutputText() != text {
		return fmt.Errorf("they differ: %s\n%s\n%q", x, y, text)
	}
	for n := int64(0); n <= last; n += 1 + last/20 {
		next := n + 1
		stream := at.Responses.GetStreaming(ctx, id, responses.ResponseGetParams{StartingAfter: openai.Int(n)})
		for ; stream.Next(); next++ {
			if got := stream.Current().SequenceNumber; got != next {
				return fmt.Errorf("after %d: %d instead of %d", n, got, next)
			}
		}
		if stream.Err() != nil || next != last+1 {
			return fmt.Errorf("after %d: %d, %w", n, next, stream.Err())
		}
	}
	for range 2 {
		if r, err := at.Responses.Cancel(ctx, id); err != nil || r.Status != "completed" {
			return fmt.Errorf("cancel: %w", err)
		}
	}
	items, err := at.Responses.InputItems.List(ctx, id, responses.InputItemListParams{})
	if err != nil || len(items.Data) != 1 {
		return fmt.Errorf("input: %v, %w", items, err)
	}
	if err := at.Responses.Delete(ctx, id); err != nil {
		return err
	}
	if _, err := at.Responses.Get(ctx, id, responses.ResponseGetParams{}); err == nil {
		return fmt.Errorf("it was deleted, and is there")
	}
	fmt.Print(text)
	return nil
}
