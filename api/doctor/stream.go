package doctor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// stream is a connection to the session's stream, with the time of everything that came on it.
type stream struct {
	asked time.Time
	stop  context.CancelFunc
	done  chan struct{}

	mu       sync.Mutex
	changed  chan struct{} // closed when one of the following changes
	response *http.Response
	marks    []mark
	ended    time.Time
	err      error // why the response ended
}

// mark is an event or a comment.
type mark struct {
	at      time.Time
	name    string // of the event; ":" for a comment
	id      int64
	Node    string `json:"node"`
	Seq, TS int64
}

// view begins a stream, after chunk after if that is above 0. The caller must call close.
func (d *doctor) view(ctx context.Context, client *http.Client, after int64, header ...string) *stream {
	s := &stream{asked: time.Now(), done: make(chan struct{}), changed: make(chan struct{})}
	ctx, s.stop = context.WithCancel(ctx)
	r := d.request(ctx, "GET", d.path("/stream"), nil)
	r.Header.Set("Accept", "text/event-stream")
	r.Header.Set("Accept-Encoding", "identity")
	if after > 0 {
		r.Header.Set("Last-Event-ID", strconv.FormatInt(after, 10))
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1]) // #nosec G602 -- they come in pairs
	}
	go func() { // ends with the response, which close ends; close waits for it
		defer close(s.done)
		err := s.read(client, r)
		s.note(func() { s.err, s.ended = err, time.Now() })
	}()
	return s
}

func (s *stream) close() {
	s.stop()
	<-s.done
}

func (s *stream) note(what func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	what()
	close(s.changed)
	s.changed = make(chan struct{})
}

var errNoStream = errors.New("it is no event stream")

func (s *stream) read(client *http.Client, r *http.Request) error {
	response, err := client.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	s.note(func() { s.response = response })
	if kind := response.Header.Get("Content-Type"); response.StatusCode != http.StatusOK || !strings.HasPrefix(kind, "text/event-stream") {
		body, _ := io.ReadAll(io.LimitReader(response.Body, 300))
		return fmt.Errorf("%w: %s, %s %q", errNoStream, response.Status, kind, body)
	}
	if response.Header.Get("Content-Encoding") != "" {
		return nil // it cannot be read
	}
	var m mark
	var data string
	for lines := bufio.NewReaderSize(response.Body, 64<<10); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		field, value, _ := strings.Cut(strings.TrimRight(line, "\r\n"), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case field == "" && strings.HasPrefix(line, ":"):
			now := mark{at: time.Now(), name: ":"}
			s.note(func() { s.marks = append(s.marks, now) })
		case field == "event":
			m.name = value
		case field == "data":
			data += value
		case field == "id":
			m.id, _ = strconv.ParseInt(value, 10, 64)
		case field == "" && data != "":
			_ = json.Unmarshal([]byte(data), &m) // missing members are found later
			m.at = time.Now()
			event := m
			s.note(func() { s.marks = append(s.marks, event) })
			m, data = mark{}, ""
		}
	}
}

// until waits until is returns true. It returns false if that takes longer than most, or if the
// stream ends first. The stream's mu is held while is runs.
func (s *stream) until(ctx context.Context, most time.Duration, is func() bool) bool {
	late := time.After(most)
	for {
		s.mu.Lock()
		good, over, changed := is(), !s.ended.IsZero(), s.changed
		s.mu.Unlock()
		if good || over {
			return good
		}
		select {
		case <-changed:
		case <-late:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// chunk returns the mark of a chunk. mu is held.
func (s *stream) chunk(seq int64) (m mark, came bool) {
	for _, m := range s.marks {
		if m.id == seq && m.name == "" {
			return m, true
		}
	}
	return mark{}, false
}

// came waits for a chunk.
func (s *stream) came(ctx context.Context, seq int64, most time.Duration) bool {
	return s.until(ctx, most, func() bool { _, ok := s.chunk(seq); return ok })
}

// named returns the first event with a name. mu is held.
func (s *stream) named(name string) (m mark, came bool) {
	for _, m := range s.marks {
		if m.name == name {
			return m, true
		}
	}
	return mark{}, false
}

// look calls at with mu held.
func (s *stream) look(at func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at()
}
