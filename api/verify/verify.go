// Package verify follows a session's stream as a client does, and proves that it received the log.
//
// It cuts its own connection at random chunks and resumes with Last-Event-ID. It keeps a number and a hash of each
// chunk, in the order of arrival. Then it compares them with the server's digest of the same chunks, which is made from
// the log and not from the stream. If the two differ, it reads the log in pages and names the first difference.
//
// It does not prove that the log holds what a producer sent, and it cannot compare chunks that were trimmed before it
// had read them all.
package verify

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"gapless/api/client"
)

// Config says what to verify, and how patiently.
type Config struct {
	client.Access
	// URL is the session's, …/v1/sessions/ID, or its stream's.
	URL *url.URL
	// Cuts is how often to drop the connection. A short log has fewer chunks to do it at.
	Cuts int
	// UntilEnd means to follow until the log has ended, and not only to the last chunk that was there at the start.
	UntilEnd bool
	// Patience is how long a chunk that is in the log may take to arrive.
	Patience time.Duration
	// Settle is how long to read on after the last chunk, or after a fault, for what is doubled or late.
	Settle time.Duration
	// Retry is the pause after a connection that failed. It doubles with each failure in a row.
	Retry time.Duration
}

// DefaultConfig returns the defaults of the flags.
func DefaultConfig() Config {
	return Config{Cuts: 3, Patience: 20 * time.Second, Settle: 250 * time.Millisecond, Retry: 250 * time.Millisecond}
}

var sessionPath = regexp.MustCompile(`^(.*/v1/sessions/[^/]+?)(/stream)?/?$`)

// Validate reports every mistake at once.
func (c Config) Validate() error {
	var errs []error
	switch u := c.URL; {
	case u == nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		errs = append(errs, errors.New("URL: give the address of a session or its stream, such as http://127.0.0.1:8080/v1/sessions/demo/stream"))
	case !sessionPath.MatchString(u.EscapedPath()):
		errs = append(errs, fmt.Errorf("URL: %s is not a session's path: it must end with /v1/sessions/ID or /v1/sessions/ID/stream", u.EscapedPath()))
	case u.RawQuery != "":
		errs = append(errs, fmt.Errorf("URL: remove ?%s: the whole log is verified", u.RawQuery))
	}
	if c.Cuts < 0 {
		errs = append(errs, fmt.Errorf("-cuts: must not be negative (%d)", c.Cuts))
	}
	if c.Patience <= 0 {
		errs = append(errs, fmt.Errorf("-patience: must be positive (%v)", c.Patience))
	}
	return errors.Join(errs...)
}

// Result is what was received, and whether it is the log.
type Result struct {
	Complete bool   `json:"complete"`
	Count    int64  `json:"count"` // of chunks received since the last reset
	First    int64  `json:"first_seq,omitzero"`
	Last     int64  `json:"last_seq,omitzero"`
	SHA256   string `json:"sha256"`           // of what was received
	Epoch    string `json:"epoch"`            // of the log
	Ended    bool   `json:"ended"`            // the log has ended, and nothing follows
	Cuts     int    `json:"cuts"`             // made by us
	Breaks   int    `json:"breaks,omitzero"`  // made by others
	Resets   int    `json:"resets,omitzero"`  // everything before was discarded
	Trimmed  int64  `json:"trimmed,omitzero"` // chunks that were received, and trimmed before they could be compared
	Differs  string `json:"differs,omitzero"` // the first difference
}

// String returns one line for people.
func (r Result) String() string {
	if !r.Complete {
		return "DIFFERS: " + r.Differs
	}
	s := fmt.Sprintf("complete: %s, %s", number(r.Count, "chunk"), number(int64(r.Cuts), "cut"))
	if r.Breaks > 0 {
		s += ", " + number(int64(r.Breaks), "other break")
	}
	if r.Resets > 0 {
		s += ", " + number(int64(r.Resets), "reset")
	}
	s += ", sha256 " + r.SHA256
	if r.Trimmed > 0 {
		s += fmt.Sprintf(" (%s could not be compared: the log no longer has them)", number(r.Trimmed, "chunk"))
	}
	return s
}

func number(n int64, of string) string {
	if n == 1 {
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}

// Verify follows the stream and compares. An error means that it could not find out.
func Verify(ctx context.Context, cfg Config) (Result, error) {
	v := &verifier{Config: cfg, client: cfg.HTTP()}
	defer v.client.CloseIdleConnections()
	v.session = cfg.URL.Scheme + "://" + cfg.URL.Host + sessionPath.FindStringSubmatch(cfg.URL.EscapedPath())[1]
	v.forget("")
	v.result.Resets = 0
	for range 3 { // a log may be replaced after it was followed
		if err := v.follow(ctx); err != nil {
			return v.result, err
		}
		again, err := v.compare(ctx)
		if err != nil {
			return v.result, err
		}
		if !again {
			v.result.Complete = v.result.Differs == ""
			return v.result, nil
		}
		v.forget("")
	}
	return v.result, errors.New("the log was replaced each time that it had been followed: try again when nobody deletes it")
}

// arrival is a chunk that came.
type arrival struct {
	seq int64
	sum [sha256.Size]byte // of its data
}

type verifier struct {
	Config
	client  *http.Client
	session string // the session's URL
	result  Result

	all     []arrival // since the last reset, in the order of arrival
	hash    hash.Hash // of their data
	after   int64     // the last event id; 0: none
	faulty  bool      // a chunk came that does not follow the one before
	target  int64     // the last chunk that must come
	deleted bool
}

// forget discards everything that came.
func (v *verifier) forget(epoch string) {
	v.result.Epoch = epoch
	v.result.Resets++
	v.all, v.hash, v.after, v.faulty = nil, sha256.New(), 0, false
}

func (v *verifier) take(seq int64, data string) {
	if n := len(v.all); n > 0 && seq != v.all[n-1].seq+1 {
		v.faulty = true
	}
	v.after = seq
	v.all = append(v.all, arrival{seq, sha256.Sum256([]byte(data))})
	_, _ = io.WriteString(v.hash, data+"\n") // never fails
}

// follow follows the stream until the log has ended, or until what was there at the start has come, or until something
// is wrong.
func (v *verifier) follow(ctx context.Context) error {
	v.target, v.deleted, v.result.Ended = 0, false, false
	var log struct {
		Epoch string `json:"epoch"`
		Last  int64  `json:"last_seq"`
		Ended bool   `json:"ended"`
	}
	switch status, err := v.get(ctx, "", &log); {
	case status == http.StatusNotFound && v.UntilEnd: // it may begin later
	case err != nil:
		return err
	}
	v.target = log.Last
	toEnd := v.UntilEnd || log.Ended
	for failures, resets := 0, v.result.Resets; ; {
		if v.result.Resets > resets+20 {
			return errors.New("the stream was reset more than 20 times: try again when the log changes less")
		}
		left := max(v.target-v.after, 0)
		most := int64(0) // chunks to take from this connection before it is cut
		if cuts := int64(v.Cuts - v.result.Cuts); cuts > 0 {
			span := max(left/(cuts+1), 1)
			if left == 0 {
				span = 16
			}
			most = 1 + rand.Int64N(span) // #nosec G404 -- no secret
		}
		came := len(v.all)
		why, err := v.connection(ctx, most, toEnd)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if len(v.all) != came {
			failures = 0
		}
		switch why {
		case over:
			return nil
		case refused:
			return err
		case cut:
			v.result.Cuts++
		case replaced: // asked again at once
		case stalled, broken:
			if v.faulty || why == stalled && failures > 0 {
				return nil
			}
			if !errors.Is(err, io.EOF) { // otherwise the stream has ended as it should
				v.result.Breaks++
			}
			if len(v.all) == came {
				if failures++; failures > 8 {
					return fmt.Errorf("the stream failed %d times in a row: %w", failures, err)
				}
			}
			if err := pause(ctx, min(v.Retry<<max(failures-1, 0), 10*time.Second)); err != nil {
				return err
			}
		}
	}
}

// digest is the server's.
type digest struct {
	Epoch  string `json:"epoch"`
	First  int64  `json:"first_seq"`
	Last   int64  `json:"last_seq"`
	Count  int64  `json:"count"`
	SHA256 string `json:"sha256"`
}

// compare compares what came with the log. It returns true if that is another log by now.
func (v *verifier) compare(ctx context.Context) (again bool, err error) {
	r := &v.result
	r.Count, r.First, r.Last, r.SHA256 = int64(len(v.all)), 0, 0, hex.EncodeToString(v.hash.Sum(nil))
	if v.deleted {
		return false, errors.New("the session was deleted while it was followed")
	}
	if len(v.all) > 0 {
		r.First, r.Last = v.all[0].seq, v.all[0].seq
		for _, a := range v.all {
			r.Last = max(r.Last, a.seq)
		}
	}
	if r.Differs = v.disorder(ctx); r.Differs != "" {
		return false, nil
	}
	query := ""
	if !r.Ended { // more may have come since
		query = fmt.Sprintf("?last=%d", max(r.Last, v.target, 1))
	}
	var d digest
	status, err := v.get(ctx, "/digest"+query, &d)
	if status == http.StatusNotFound && len(v.all) == 0 && v.target == 0 {
		return false, nil // nothing was said, and there is nothing
	}
	if err != nil {
		return false, err
	}
	if r.Epoch == "" {
		r.Epoch = d.Epoch
	}
	switch {
	case d.Epoch != r.Epoch:
		return true, nil
	case len(v.all) == 0 && d.Count > 0:
		r.Differs = fmt.Sprintf("chunks %d to %d are missing: the log has them, and the stream sent none", d.First, d.Last)
	case len(v.all) == 0:
	case d.Last > r.Last:
		r.Differs = fmt.Sprintf("%s missing at the end: the log goes on to %d, and the stream stopped after %d", chunks(r.Last+1, d.Last), d.Last, r.Last)
	case d.Last < r.Last:
		r.Differs = fmt.Sprintf("the stream sent chunk %d, and the log ends with %d", r.Last, d.Last)
	case d.First < r.First && d.Count > 0:
		r.Differs = fmt.Sprintf("%s missing at the start: the log begins with %d, and the stream with %d", chunks(d.First, r.First-1), d.First, r.First)
	case d.First > r.First:
		r.Trimmed = min(d.First, r.Last+1) - r.First
		r.Differs, err = v.difference(ctx, d.First)
	case d.SHA256 != r.SHA256:
		if r.Differs, err = v.difference(ctx, d.First); r.Differs == "" && err == nil {
			r.Differs = fmt.Sprintf("the digest of %s is %s, and that of what came is %s, but every chunk is as its page has it: the server contradicts itself", chunks(d.First, d.Last), d.SHA256, r.SHA256)
		}
	}
	return false, err
}

func chunks(from, to int64) string {
	if from == to {
		return fmt.Sprintf("chunk %d is", from)
	}
	return fmt.Sprintf("chunks %d to %d are", from, to)
}

// disorder returns the first number that is not one more than the one before it, and what is wrong with it.
func (v *verifier) disorder(ctx context.Context) string {
	seen := map[int64]bool{}
	for i, a := range v.all {
		want := a.seq
		if i > 0 {
			want = v.all[i-1].seq + 1
		}
		switch {
		case seen[a.seq]:
			return fmt.Sprintf("chunk %d came twice: again after chunk %d", a.seq, v.all[i-1].seq)
		case a.seq < want:
			return fmt.Sprintf("out of order: chunk %d came after chunk %d", a.seq, v.all[i-1].seq)
		case a.seq > want:
			for _, later := range v.all[i:] {
				if later.seq >= want && later.seq < a.seq {
					return fmt.Sprintf("out of order: chunk %d came before chunk %d", a.seq, later.seq)
				}
			}
			has := "the log has it"
			if p, err := v.page(ctx, want-1, 1); err != nil || p.From != want || len(p.Chunks) == 0 {
				has = "the log has not shown it, either"
			}
			return fmt.Sprintf("%s missing: chunk %d came after chunk %d, and %s", chunks(want, a.seq-1), a.seq, want-1, has)
		}
		seen[a.seq] = true
	}
	return ""
}

// difference returns the first chunk, from a number on, whose data is not that of the log. The numbers of what came are
// consecutive.
func (v *verifier) difference(ctx context.Context, from int64) (string, error) {
	for from <= v.result.Last {
		p, err := v.page(ctx, from-1, 1000)
		if err != nil {
			return "", err
		}
		if p.Epoch != v.result.Epoch || len(p.Chunks) == 0 {
			return "", errors.New("the log was replaced while it was compared: try again when nobody deletes it")
		}
		for i, text := range p.Chunks {
			seq := p.From + int64(i)
			if seq > v.result.Last {
				break
			}
			if sha256.Sum256(text) != v.all[seq-v.result.First].sum {
				return fmt.Sprintf("chunk %d came with another text: the log has %s", seq, short(text)), nil
			}
		}
		from = p.From + int64(len(p.Chunks))
	}
	return "", nil
}

func short(text []byte) string {
	const most = 120
	s := strings.ToValidUTF8(string(text[:min(len(text), most)]), "\uFFFD")
	if len(text) > most {
		s += "…"
	}
	return s
}

type page struct {
	Epoch  string            `json:"epoch"`
	From   int64             `json:"from_seq"`
	Chunks []json.RawMessage `json:"chunks"`
}

func (v *verifier) page(ctx context.Context, after int64, limit int) (p page, err error) {
	_, err = v.get(ctx, fmt.Sprintf("/chunks?after=%d&limit=%d", after, limit), &p)
	return p, err
}

// get reads JSON. It waits for a server that is away or busy.
func (v *verifier) get(ctx context.Context, path string, into any) (status int, err error) {
	for try := range 6 {
		if try > 0 {
			if err := pause(ctx, v.Retry<<(try-1)); err != nil {
				return 0, err
			}
		}
		var res *http.Response
		if res, err = v.send(ctx, path, nil); err != nil {
			continue
		}
		if res.StatusCode != http.StatusOK {
			err = refusal(res)
			_ = res.Body.Close()
			if passing(res.StatusCode) {
				continue
			}
			return res.StatusCode, err
		}
		err = json.NewDecoder(res.Body).Decode(into)
		_ = res.Body.Close()
		if err == nil {
			return http.StatusOK, nil
		}
		err = fmt.Errorf("GET %s returned no JSON: %w", res.Request.URL, err)
	}
	return 0, err
}

// passing reports whether a status is that of a server, or a proxy, that may do better in a moment.
func passing(status int) bool { return status >= 500 || status == http.StatusTooManyRequests }

func (v *verifier) send(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, "GET", v.session+path, nil)
	if err != nil {
		return nil, err
	}
	if header != nil {
		r.Header = header
	}
	r.Header.Set("Accept-Encoding", "identity")
	v.Authorize(r)
	return v.client.Do(r)
}

// refusal returns an error for a status that is not expected.
func refusal(res *http.Response) error {
	var why struct{ Code, Detail string }
	body, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	text := strings.TrimSpace(string(body[:min(len(body), 300)]))
	if json.Unmarshal(body, &why) == nil && why.Detail != "" {
		text = why.Detail
	}
	if res.StatusCode == http.StatusUnauthorized {
		text += " (-token-file, or the environment variable GAPLESS_TOKEN)"
	}
	return fmt.Errorf("GET %s: %s: %s", res.Request.URL, res.Status, text)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
