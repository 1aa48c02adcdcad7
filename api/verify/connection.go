package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"gapless/sse"
)

// ending is why a connection ended.
type ending int

const (
	over     ending = iota // everything has come, or something is wrong with it
	cut                    // by us
	broken                 // by others
	stalled                // a chunk that is in the log does not come
	replaced               // the log is another one: it must be followed from the start
	refused                // for good
)

// message is an event, with its id.
type message struct {
	sse.Event
	id string
}

// eventMost is the largest event that is read, in bytes.
const eventMost = 256 << 20

// connection opens the stream after the last chunk that came, and takes what it sends. It cuts the connection after most
// chunks, unless that is 0. toEnd means that the log will end.
func (v *verifier) connection(ctx context.Context, most int64, toEnd bool) (ending, error) {
	ctx, stop := context.WithCancel(ctx)
	header := http.Header{"Accept": {"text/event-stream"}, "Cache-Control": {"no-store"}}
	if v.after > 0 {
		header.Set("Last-Event-ID", strconv.FormatInt(v.after, 10))
	}
	late := time.AfterFunc(v.Patience, stop) // a header that does not come breaks the connection, too
	res, err := v.send(ctx, "/stream", header)
	late.Stop()
	if err != nil {
		stop()
		return broken, err
	}
	defer res.Body.Close()
	defer stop()
	switch {
	case res.StatusCode == http.StatusNoContent:
		return v.nothing(res)
	case passing(res.StatusCode):
		return broken, refusal(res)
	case res.StatusCode != http.StatusOK || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/event-stream"):
		return refused, refusal(res)
	}

	events, failed := make(chan message), make(chan error, 1)
	go func() { failed <- read(ctx, res, events) }() // ends with ctx
	defer func() {
		if failed != nil {
			stop()
			<-failed
		}
	}()
	quiet := time.NewTimer(v.Patience) // since the last chunk
	defer quiet.Stop()
	var settled <-chan time.Time
	for taken := int64(0); ; {
		if settled == nil && (v.faulty || !toEnd && v.after >= v.target) {
			settled = time.After(v.Settle)
		}
		select {
		case m := <-events:
			chunk, why, err := v.event(m)
			if err != nil || why != over {
				return why, err
			}
			if v.deleted {
				return over, nil
			}
			if !chunk {
				continue
			}
			quiet.Reset(v.Patience)
			if taken++; taken == most && settled == nil && !v.faulty {
				return cut, nil
			}
		case <-settled:
			return over, nil
		case <-quiet.C:
			if v.after < v.target {
				return stalled, fmt.Errorf("no chunk came within %v (-patience), and the log has chunks up to %d", v.Patience, v.target)
			}
			quiet.Reset(v.Patience)
		case err := <-failed:
			failed = nil
			if refused := res.Header.Get("Gapless-Refused"); refused != "" {
				err = errors.New(refused)
			}
			return broken, err
		case <-ctx.Done():
			return broken, ctx.Err()
		}
	}
}

// nothing handles 204: nothing follows the cursor.
func (v *verifier) nothing(res *http.Response) (ending, error) {
	epoch := res.Header.Get("Gapless-Epoch")
	if v.deleted = res.Header.Get("Gapless-Reason") == "deleted"; v.deleted {
		return over, nil
	}
	if v.result.Epoch != "" && epoch != "" && epoch != v.result.Epoch {
		v.forget("")
		return replaced, nil
	}
	v.result.Epoch, v.result.Ended = epoch, true
	return over, nil
}

// event takes an event, and reports whether it is a chunk. The connection must end unless it returns over.
func (v *verifier) event(m message) (chunk bool, why ending, err error) {
	var said struct {
		Epoch  string `json:"epoch"`
		Reason string `json:"reason"`
	}
	switch m.Name {
	case "welcome", "reset":
		if err := json.Unmarshal([]byte(m.Data), &said); err != nil {
			return false, refused, fmt.Errorf("the data of a %s event is not JSON: %w", m.Name, err)
		}
	case "", "message":
		seq, err := strconv.ParseInt(m.id, 10, 64)
		if err != nil || seq < 1 {
			return false, refused, fmt.Errorf("an event has the id %.40q, which is not a chunk's number: it came after chunk %d", m.id, v.after)
		}
		v.take(seq, m.Data)
		return true, over, nil
	default: // expired, after which the server ends the stream, or one that we did not ask for
		return false, over, nil
	}
	switch {
	case m.Name == "reset" && said.Reason == "deleted":
		v.deleted = true
	case m.Name == "reset":
		seq, err := strconv.ParseInt(m.id, 10, 64)
		if err != nil || seq < 0 {
			return false, refused, fmt.Errorf("a reset has the id %.40q, which is not a number", m.id)
		}
		v.forget(said.Epoch)
		v.after = seq
	case v.result.Epoch == "" || said.Epoch == "":
		v.result.Epoch += said.Epoch
	case said.Epoch != v.result.Epoch:
		v.forget("")
		return false, replaced, nil
	}
	return false, over, nil
}

// read sends the events of a response until it ends.
func read(ctx context.Context, res *http.Response, to chan<- message) error {
	parser := sse.Parser{AnyBytes: true, IDs: true}
	var arrived []byte
	buffer := make([]byte, 32<<10)
	for {
		n, broke := res.Body.Read(buffer)
		arrived = append(arrived, buffer[:n]...)
		for {
			e, rest, ok, err := parser.Next(arrived, eventMost)
			if err != nil {
				return fmt.Errorf("%w: it has more than %d bytes", err, eventMost)
			}
			if arrived = rest; !ok {
				break
			}
			select {
			case to <- message{e, parser.ID()}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		arrived = append([]byte(nil), arrived...) // the rest is short: do not keep what came before it
		if broke != nil {
			return broke
		}
	}
}
