package model

import (
	"context"
	"iter"
	"strings"
	"time"
)

// Demo answers without a network, at the pace of a language model. It answers the page's sample
// questions, and says for every other question that it is not a model.
type Demo struct {
	// Pace is the time from one word to the next.
	Pace time.Duration
}

// NewDemo returns a demo that writes about twenty words a second.
func NewDemo() Demo { return Demo{50 * time.Millisecond} }

// Answer implements Model. The same question gets the same text.
func (d Demo) Answer(ctx context.Context, conversation []Turn) iter.Seq2[Piece, error] {
	question := ""
	if len(conversation) > 0 {
		question = strings.ToLower(conversation[len(conversation)-1].Content)
	}
	text := answerOf(question)
	return func(yield func(Piece, error) bool) {
		tick := time.NewTicker(d.Pace)
		defer tick.Stop()
		for _, word := range strings.SplitAfter(text, " ") {
			select {
			case <-tick.C:
			case <-ctx.Done():
				yield(Piece{}, ctx.Err())
				return
			}
			if !yield(Piece{Text: word}, nil) {
				return
			}
		}
	}
}

// answerOf returns the text for a question. The subject that is named last counts, because earlier
// questions may come before it.
func answerOf(question string) string {
	text, at := nothing, -1
	for _, k := range samples {
		if found := strings.LastIndex(question, k.subject); found > at {
			text, at = k.text, found
		}
	}
	return text
}

const nothing = `There is **no model** behind this server yet, so I cannot answer that: I am a demo, and have a text for each of three questions only.

To connect a model, start Gapless with a service that speaks the chat-completions API. Its key comes from the environment:

` + "```sh\nGAPLESS_MODEL_KEY=sk-… gapless -model-url https://api.openai.com/v1 -model-name gpt-4.1-mini\ngapless -model-url http://127.0.0.1:11434/v1 -model-name llama3.2\n```" + `

Until then, ask me one of these:

- Why do streamed answers lose words when a page is reloaded?
- Tell me a long story about a lighthouse keeper who counts ships.
- Explain Server-Sent Events with a small example.

All else here is as it would be with a model: this text is stored word by word, every tab shows it, and it survives a reload, a cut connection and the death of a node.`

var samples = []struct{ subject, text string }{
	{"lose words", `Because the server has **two sources** for one answer, and changes from one to the other in the middle of it.

When you reload, the page has nothing. The server reads what was said so far from the history, sends it, and then subscribes to what is new. Between those two steps a moment passes, and the model does not wait:

1. The server reads the history: chunks 1 to 40.
2. The model says chunk 41. It is published to those who have subscribed. You have not, yet.
3. The server subscribes, and you hear 42, 43 and all the rest.

Nothing tells you that 41 is missing. It is in the history, but you have read that already; it was published, but you did not listen yet. The order "subscribe first, then read" only turns the loss around: now 41 comes twice, or in the wrong place.

The remedy is to have **one source**. Every chunk gets a number when it is stored. A viewer is no more than a cursor, the number of the last chunk that it has, and there is a single question: *what comes after my cursor?* A notification only says "look again". It may be lost, doubled or late; the log may not.

Try it: reload this page while I speak, or press *Cut connection* in the inspector. Then turn on the *naive viewer*, which does it the old way, and see what is missing there.`},
	{"lighthouse", `On a rock two miles from the harbour stood a lighthouse, and in it lived a keeper called Maren, who counted ships.

She wrote each of them into a book: a number, the hour, and what she saw. *1, six in the morning, a brig with torn sails. 2, noon, the mail boat.* Her mother had kept the book before her, and her grandmother before that, and not one number was missing. People in the town smiled about it. "What is it good for?" asked the baker, who sent her bread with the Tuesday boat. "I do not know yet," said Maren.

In November a storm came that lasted three days. The windows were white with salt, and she saw nothing but her own lamp. Still she climbed the stairs each hour and listened. When a horn sounded out there, she wrote: *4017, a horn, northwest. 4018, a horn, nearer.* On the third night she fell asleep over the page. She woke with the pen in her hand, and did not know whether she had slept a minute or an hour.

In the morning a boat came from the harbour. The harbour master had a list of his own, of the ships that had arrived. "We have 4017," he said, "and 4019, which came in at dawn without a mast. Do you have anything between them?" Maren looked into the book. There it was, in a hand so tired that she hardly knew it as hers: *4018, a horn, nearer. Then a bell. Then nothing.*

"Then one is still out there," said the harbour master, and turned the boat around.

They found her before evening, on the sand bank behind the rock: a small schooner, on her side, with nine people on the mast and a dog. The cook rang the ship's bell with a ladle, as he had done all night.

After that nobody smiled about the book. The baker came to see it for himself, and read for a long time. "It is only numbers," he said at last. "Yes," said Maren. "That is how I know when one is missing."

She wrote until she was old. When her eyes grew weak, her niece read the sea for her, and when the light was made electric and the keeper was sent home, the niece took the book along and kept it on the quay. It is kept to this day. If you ask there for any ship, they open it, run a finger down the margin, and tell you; and if you come back a year later, and say the last number that you have heard, they begin with the one after it. 🚢`},
	{"server-sent", `**Server-Sent Events** are one HTTP response that does not end: the server writes an event whenever there is something to say, and the browser hands each one to the page. On the wire an event is ` + "`data: {\"content\":\"Tea \"}`, `id: 7`" + ` and a blank line:

1. *data* is the text of the event.
2. *id* is its number, which the browser remembers.
3. A line that begins with a colon is a comment: it keeps the connection alive.

In the page this is all that it takes:

` + "```js\nconst source = new EventSource('/v1/sessions/tea/stream');\nsource.onmessage = (e) => {\n  console.log(e.lastEventId, JSON.parse(e.data).content);\n};\n```" + `

When the connection breaks, the browser comes back by itself after a moment, and says how far it got:

| it sends | it gets |
|---|---|
| ` + "`Last-Event-ID: 6`" + ` | 7, 8, 9, … |
| nothing | 1, 2, 3, … |

> The number makes it gapless. But only if the server keeps a log of what it has sent, and reads on from there.

So press *Cut connection* while this grows, reload the page, or open four tabs of it: every one of them shows every word, once and in order.`},
}
