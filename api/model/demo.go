package model

import (
	"context"
	"hash/fnv"
	"iter"
	"strings"
	"time"
)

// Demo answers every question with one of a few texts, without a network, at the pace
// of a language model.
type Demo struct {
	// Pace is the time from one word to the next.
	Pace time.Duration
}

// NewDemo is the demo at about twenty words a second.
func NewDemo() Demo { return Demo{50 * time.Millisecond} }

// Answer implements Model. The same question gets the same text.
func (d Demo) Answer(ctx context.Context, conversation []Turn) iter.Seq2[Piece, error] {
	h := fnv.New32a()
	if len(conversation) > 0 {
		_, _ = h.Write([]byte(conversation[len(conversation)-1].Content))
	}
	text := canned[h.Sum32()%uint32(len(canned))]
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

var canned = []string{
	`A lighthouse keeper writes down every ship that passes, one line each, with a number in the margin. The numbers run on from page to page, and that is the whole trick: if somebody tears out a page, the next reader sees 42 behind 38 and knows that three lines are missing, which three, and whom to ask for them.

Streams of text can be kept the same way. Each piece gets the next number when it is written down, not when it is sent. Whoever reads remembers only the last number that arrived. When the connection breaks, on a train or in a lift, the reader comes back and says a single thing: I have everything up to 38. The answer continues with 39, no matter which server is asked, and no matter what was lost on the way.

What one does not need is a perfect messenger. The messenger may stumble, repeat himself or fall asleep; the book does not. It is enough that a glance into the book tells what the messenger left out.`,

	`Bread is patience with flour in it. Mix five hundred grams of flour with three hundred and fifty grams of water, ten grams of salt and three grams of dry yeast, until no dry spot is left, and then do nothing for half a day. Time kneads better than hands do: the proteins find each other by themselves once they are wet.

Fold the dough twice, shape it without pressing the air out, and let it rest once more while the oven gets as hot as it can. A heavy pot with a lid, heated along with the oven, keeps the steam around the loaf; the crust stays soft for long enough to rise, and becomes glassy afterwards. Thirty minutes with the lid, fifteen without.

Then comes the hard part. The loaf sings while it cools: the crust cracks very softly as it shrinks. If you cut it now it will be gummy inside, because the starch has not set. Wait an hour. „Ein Brot muss man ausreden lassen“, says a baker's proverb that I may have made up: one should let a loaf finish speaking. 🍞`,

	`A stream loses words in the moment between two steps. The server **reads the history**, sends it, and only then **subscribes** to what is new:

1. It reads chunks 1 to 6.
2. Chunk 7 is published. Nobody listens yet.
3. It subscribes, and hears 8, 9 and all the rest.

Nothing tells the reader that 7 is missing. The remedy is a *log with numbers*: a viewer is a cursor, and there is one question, "what comes after my cursor?"

` + "```js\nconst source = new EventSource('/v1/sessions/tea/stream');\nsource.onmessage = (e) => {\n  console.log(e.lastEventId, JSON.parse(e.data).content);\n};\n```" + `

That is all a page needs. When the connection breaks, the browser comes back by itself and says how far it got:

| it sends | it gets |
|---|---|
| ` + "`Last-Event-ID: 6`" + ` | 7, 8, 9, … |
| nothing | 1, 2, 3, … |

> A notification may be lost. The log may not.

So press *Cut connection* while this grows, reload the page, or open four tabs of it: every one of them shows every word, once and in order.`,
}
