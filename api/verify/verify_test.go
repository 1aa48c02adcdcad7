package verify

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func text(seq int) string {
	return fmt.Sprintf(`{"seq":%d,"ts":1,"type":"delta","content":"word %[1]d"}`, seq)
}

// event is what the fake sends of a chunk.
type event struct {
	seq  int
	text string
}

const count = 40 // chunks of the fake's log

// fake serves a log of count chunks that has ended, or not. Its stream after a cursor is what sent returns for the honest one.
func fake(t *testing.T, ended bool, sent func(after int, honest []event) []event) Config {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/sessions/s", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"epoch":"e","first_seq":1,"last_seq":%d,"ended":%t}`, count, ended)
	})
	mux.HandleFunc("GET /v1/sessions/s/digest", func(w http.ResponseWriter, r *http.Request) {
		last, err := strconv.Atoi(r.URL.Query().Get("last"))
		if err != nil || last > count {
			last = count
		}
		h := sha256.New()
		for seq := 1; seq <= last; seq++ {
			_, _ = io.WriteString(h, text(seq)+"\n")
		}
		_, _ = fmt.Fprintf(w, `{"epoch":"e","first_seq":1,"last_seq":%d,"count":%[1]d,"sha256":%q}`, last, hex.EncodeToString(h.Sum(nil)))
	})
	mux.HandleFunc("GET /v1/sessions/s/chunks", func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.Atoi(r.URL.Query().Get("after"))
		var all []string
		for seq := after + 1; seq <= count && seq <= after+7; seq++ {
			all = append(all, text(seq))
		}
		_, _ = fmt.Fprintf(w, `{"epoch":"e","from_seq":%d,"chunks":[%s]}`, after+1, strings.Join(all, ","))
	})
	mux.HandleFunc("GET /v1/sessions/s/stream", func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.Atoi(r.Header.Get("Last-Event-ID"))
		var events []event
		for seq := after + 1; seq <= count; seq++ {
			events = append(events, event{seq, text(seq)})
		}
		if events = sent(after, events); len(events) == 0 && ended {
			w.Header().Set("Gapless-Epoch", "e")
			w.Header().Set("Gapless-Reason", "ended")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = fmt.Fprintf(w, ":\nevent: welcome\ndata: {\"epoch\":\"e\"}\nid: %d\n\n", after)
		for _, e := range events {
			_, _ = fmt.Fprintf(w, "data: %s\nid: %d\n\n", e.text, e.seq)
		}
		_ = http.NewResponseController(w).Flush()
		if !ended {
			<-r.Context().Done()
		}
	})
	server := httptest.NewServer(mux)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	cfg := DefaultConfig()
	cfg.Patience, cfg.Retry = time.Second, time.Millisecond
	var err error
	if cfg.URL, err = url.Parse(server.URL + "/v1/sessions/s/stream"); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestVerify_namesTheFirstDifference(t *testing.T) {
	t.Parallel()
	// at returns the index of a chunk, or -1.
	at := func(events []event, seq int) int {
		return slices.IndexFunc(events, func(e event) bool { return e.seq == seq })
	}
	for name, c := range map[string]struct {
		sent func(after int, events []event) []event
		says string
	}{
		"nothing": {func(_ int, events []event) []event { return events }, ""},
		"one is left out": {func(_ int, events []event) []event {
			return slices.DeleteFunc(events, func(e event) bool { return e.seq == 17 })
		}, "chunk 17 is missing: chunk 18 came after chunk 16, and the log has it"},
		"several are left out": {func(_ int, events []event) []event {
			return slices.DeleteFunc(events, func(e event) bool { return e.seq == 17 || e.seq == 18 })
		}, "chunks 17 to 18 are missing"},
		"the first is left out": {func(_ int, events []event) []event {
			return slices.DeleteFunc(events, func(e event) bool { return e.seq == 1 })
		}, "chunk 1 is missing at the start"},
		"the last is left out": {func(_ int, events []event) []event {
			return slices.DeleteFunc(events, func(e event) bool { return e.seq == count })
		}, "chunk 40 is missing at the end"},
		"one is repeated": {func(after int, events []event) []event {
			if i := at(events, 17); i >= 0 || after == 17 { // also if the connection was cut between the two
				events = slices.Insert(events, i+1, event{17, text(17)})
			}
			return events
		}, "chunk 17 came twice"},
		"the last is repeated": {func(_ int, events []event) []event {
			if i := at(events, count); i >= 0 {
				events = append(events, events[i])
			}
			return events
		}, "chunk 40 came twice"},
		"an older one is repeated": {func(after int, events []event) []event {
			if i := at(events, 17); i >= 0 || after == 17 {
				events = slices.Insert(events, i+1, event{3, text(3)})
			}
			return events
		}, "chunk 3 came twice: again after chunk 17"},
		"one is repeated after a cut": {func(after int, events []event) []event {
			if after > 0 && after < count {
				events = slices.Insert(events, 0, event{after, text(after)})
			}
			return events
		}, "came twice"},
		"two are swapped": {func(_ int, events []event) []event {
			if i := at(events, 17); i >= 0 && i+1 < len(events) {
				events[i], events[i+1] = events[i+1], events[i]
			}
			return events
		}, "out of order: chunk 18 came before chunk 17"},
		"one is changed": {func(_ int, events []event) []event {
			if i := at(events, 17); i >= 0 {
				events[i].text = strings.Replace(events[i].text, "word", "w0rd", 1)
			}
			return events
		}, `chunk 17 came with another text: the log has {"seq":17,`},
		"one has another's text": {func(_ int, events []event) []event {
			if i := at(events, 31); i >= 0 {
				events[i].text = text(30)
			}
			return events
		}, `chunk 31 came with another text`},
		"one is too many": {func(_ int, events []event) []event {
			if at(events, count) >= 0 {
				events = append(events, event{count + 1, text(count + 1)})
			}
			return events
		}, "the stream sent chunk 41, and the log ends with 40"},
	} {
		for _, ended := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, ended %t", name, ended), func(t *testing.T) {
				t.Parallel()
				result, err := Verify(t.Context(), fake(t, ended, c.sent))
				if err != nil || result.Complete != (c.says == "") || !strings.Contains(result.Differs, c.says) {
					t.Errorf("%s (%v)", result, err)
				}
				if result.Complete && (result.Cuts != 3 || result.Count != count || !strings.HasPrefix(result.String(), "complete: 40 chunks, 3 cuts, sha256 "+result.SHA256)) {
					t.Errorf("%s: %+v", result, result)
				}
			})
		}
	}
}

func TestVerify_saysWhatItCannotFindOut(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	cfg := DefaultConfig()
	cfg.URL, _ = url.Parse(server.URL + "/v1/sessions/s")
	if _, err := Verify(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "404") {
		t.Error(err)
	}
	for _, bad := range []string{"x", "http://h", "http://h/v1/sessions/", "http://h/v1/sessions/s/chunks", "ftp://h/v1/sessions/s", "http://h/v1/sessions/s/stream?after=3"} {
		if cfg.URL, _ = url.Parse(bad); cfg.Validate() == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}
