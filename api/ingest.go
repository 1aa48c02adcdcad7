package api

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"unicode/utf8"

	"gapless/sse"
	"gapless/store"
)

// batchMost is the maximum number of chunks in one script call.
const batchMost = 256

// source makes chunks of a body while it arrives.
type source interface {
	// next waits for a chunk, and returns all chunks that have arrived. An error follows them: io.EOF at the body's
	// end, errBroken if it ended early, or what is wrong with the next chunk.
	next() ([]store.Chunk, error)
}

var errBroken = errors.New("the body ended early")

// body holds what has arrived of a body and was not taken yet. Its buffer grows up to the size that one chunk may need.
// While it is full, nothing is read.
type body struct {
	from       io.Reader
	most       int
	buf        []byte
	start, end int
	eager      bool  // the last read filled the buffer
	err        error // what follows the bytes: io.EOF or errBroken
}

var errFull = errors.New("the buffer is full")

func (b *body) arrived() []byte { return b.buf[b.start:b.end] }

func (b *body) take(n int) { b.start += n }

// more waits for more bytes, or for the body's end. The error is errFull if the buffer already holds b.most bytes.
func (b *body) more() error {
	if b.start > 0 && (b.start == b.end || b.end == len(b.buf)) {
		b.end = copy(b.buf, b.arrived())
		b.start = 0
	}
	if b.end == len(b.buf) && len(b.buf) >= b.most {
		return errFull
	}
	if (b.end == len(b.buf) || b.eager) && len(b.buf) < b.most {
		// Double the buffer, for a long line, or for a sender that is faster than we read.
		grown := make([]byte, min(max(4<<10, 2*len(b.buf)), b.most))
		copy(grown, b.buf[:b.end])
		b.buf = grown
	}
	n, err := b.from.Read(b.buf[b.end:])
	b.end += n
	b.eager = b.end == len(b.buf)
	switch {
	case err == io.EOF:
		b.err = err
	case err != nil:
		b.err = fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}

// lines makes a chunk of each line.
type lines struct {
	body
	fill    store.Fill
	limit   int
	scanned int // bytes that are known to contain no end of a line
}

func (s *lines) next() (chunks []store.Chunk, err error) {
	for {
		for len(chunks) < batchMost {
			line, ok := s.line()
			if !ok {
				break
			}
			if len(bytes.TrimSpace(line)) == 0 {
				continue
			}
			chunk, err := store.ParseChunk(line, s.fill, s.limit)
			if err != nil {
				return chunks, err
			}
			chunks = append(chunks, chunk)
		}
		switch {
		case len(chunks) == batchMost:
			return chunks, nil
		case s.err != nil:
			return chunks, s.err
		case len(chunks) > 0:
			return chunks, nil // the next line is incomplete: append what is here now
		}
		if s.more() == errFull {
			return nil, &store.ChunkError{Code: "chunk_too_large", Limit: s.limit, Detail: fmt.Sprintf("a line has more than %d bytes (-chunk-max)", s.limit)}
		}
	}
}

// line takes a line. The last line may lack its end, unless the body ended early.
func (s *lines) line() (line []byte, ok bool) {
	arrived := s.arrived()
	if i := bytes.IndexByte(arrived[s.scanned:], '\n'); i >= 0 {
		line = arrived[:s.scanned+i]
		s.take(len(line) + 1)
		s.scanned = 0
		return line, true
	}
	if s.err == io.EOF && len(arrived) > 0 {
		s.take(len(arrived))
		s.scanned = 0
		return arrived, true
	}
	s.scanned = len(arrived)
	return nil, false
}

// text makes chunks of text as it arrives, and never cuts a character.
type text struct {
	body
	fill  store.Fill
	limit int
	taken int64 // bytes
}

func (s *text) next() (chunks []store.Chunk, err error) {
	for {
		arrived := s.arrived()
		whole := arrived[:wholeRunes(arrived)]
		good := whole
		if !utf8.Valid(whole) {
			good = whole[:firstBad(whole)]
		}
		if len(good) > 0 {
			if chunks, err = store.NewTexts(string(good), s.fill, s.limit); err != nil {
				return nil, err
			}
			s.take(len(good))
			s.taken += int64(len(good))
		}
		switch {
		case len(good) < len(whole), s.err == io.EOF && len(whole) < len(arrived):
			return chunks, &store.ChunkError{Code: "invalid_utf8", Detail: fmt.Sprintf("the text is not valid UTF-8 at byte %d", s.taken)}
		case s.err != nil:
			return chunks, s.err
		case len(chunks) > 0:
			return chunks, nil
		}
		_ = s.more() // at most three bytes are left, so the buffer is not full
	}
}

// wholeRunes returns how many bytes of b precede an incomplete last character.
func wholeRunes(b []byte) int {
	for i := len(b) - 1; i >= max(0, len(b)-utf8.UTFMax+1); i-- {
		if utf8.RuneStart(b[i]) {
			if !utf8.FullRune(b[i:]) {
				return i
			}
			break
		}
	}
	return len(b)
}

func firstBad(b []byte) int {
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n <= 1 {
			return i
		}
		i += n
	}
	return len(b)
}

// events makes a chunk of each event of an event stream.
type events struct {
	body
	parser sse.Parser
	fill   store.Fill
	limit  int
	some   bool // this body, or one that it continues, has contained an event
}

func (s *events) next() (chunks []store.Chunk, err error) {
	for {
		for len(chunks) < batchMost {
			arrived := s.arrived()
			event, rest, ok, err := s.parser.Next(arrived, s.limit)
			s.take(len(arrived) - len(rest))
			switch {
			case errors.Is(err, sse.ErrNotUTF8):
				return chunks, &store.ChunkError{Code: "invalid_utf8", Detail: err.Error()}
			case err != nil:
				return chunks, s.tooLarge("an event")
			}
			if !ok {
				break
			}
			chunk, err := store.NewEvent(event.Name, event.Data, s.fill, s.limit)
			if err != nil {
				return chunks, err
			}
			chunks = append(chunks, chunk)
			s.some = true
		}
		switch {
		case len(chunks) == batchMost:
			return chunks, nil
		case s.err == io.EOF && !s.some && !s.begun():
			return nil, &Problem{Status: http.StatusBadRequest, Code: "no_event",
				Detail: "the body contains no event: perhaps it is an error page, or the error message of a service. Nothing was stored"}
		case s.err == io.EOF && s.parser.Torn(s.arrived()):
			return chunks, &Problem{Status: http.StatusBadRequest, Code: "torn_event",
				Detail: "the body ended inside an event: the empty line after it is missing. The events before it were stored", cause: errBroken}
		case s.err != nil:
			return chunks, s.err
		case len(chunks) > 0:
			return chunks, nil
		}
		if s.more() == errFull {
			return nil, s.tooLarge("a line")
		}
	}
}

// begun reports whether the body has ended inside its first event.
func (s *events) begun() bool {
	rest := s.arrived()
	return s.parser.Torn(nil) || bytes.HasPrefix(rest, []byte("data")) || bytes.HasPrefix(rest, []byte("event"))
}

func (s *events) tooLarge(what string) error {
	return &store.ChunkError{Code: "chunk_too_large", Limit: s.limit, Detail: fmt.Sprintf("%s has more than %d bytes (-chunk-max)", what, s.limit)}
}
