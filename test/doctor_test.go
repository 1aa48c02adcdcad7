package test

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"gapless/api/doctor"
	"gapless/store/storetest"
)

// diagnosis is the output of gapless doctor, as JSON.
type diagnosis struct {
	OK       bool
	Findings []doctor.Finding
	code     int
}

func diagnose(t *testing.T, args ...string) (d diagnosis) {
	t.Helper()
	code, out := program(t, nil, append([]string{"doctor", "-json"}, args...)...)
	decode(t, out, &d)
	if d.code = code; d.OK != (code == 0) {
		t.Errorf("the exit code is %d: %s", code, out)
	}
	return d
}

// only fails unless exactly one check found a problem, with these texts.
func (d diagnosis) only(t *testing.T, check, found, remedy string) {
	t.Helper()
	said := false
	for _, f := range d.Findings {
		switch {
		case f.OK && f.Remedy != "":
			t.Errorf("%s is well, and has the remedy %q", f.Check, f.Remedy)
		case f.OK:
		case f.Check == check:
			if said = true; !regexp.MustCompile(found).MatchString(f.Found) || !strings.Contains(f.Remedy, remedy) {
				t.Errorf("%s: %s\n%s", f.Check, f.Found, f.Remedy)
			}
		default:
			t.Errorf("%s was to be well: %s", f.Check, f.Found)
		}
	}
	if !said && check != "" {
		t.Errorf("%s found nothing: %+v", check, d.Findings)
	}
	if d.OK != (check == "") {
		t.Errorf("ok is %v", d.OK)
	}
}

func (d diagnosis) well(t *testing.T) { t.Helper(); d.only(t, "", "", "") }

// about returns what a check found.
func (d diagnosis) about(t *testing.T, check string) string {
	t.Helper()
	for _, f := range d.Findings {
		if f.Check == check {
			return f.Found
		}
	}
	t.Errorf("nothing is said about %s", check)
	return ""
}

func TestDoctor_findsNothingWrongWithANodeAndLeavesNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-heartbeat", "300ms")[0]
	d := diagnose(t, "-idle", "1s", "http://"+n.addr)
	d.well(t)
	for check, said := range map[string]string{"reach": "HTTP/1.1", "silence": "heartbeats", "resume": "node n1", "HTTP/2": "six streams"} {
		if got := d.about(t, check); !strings.Contains(got, said) {
			t.Errorf("%s: %s", check, got)
		}
	}
	if left := keys(t, redis, "chat:history:*"); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}

func TestDoctor_findsNothingWrongBehindNginx(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	var addrs []string
	for _, n := range nodes(t, 3, redis, "-heartbeat", "300ms") {
		addrs = append(addrs, n.addr)
	}
	for name, secure := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := nginx(t, addrs, secure)
			front := p.front()
			args := []string{"-idle", "1s"}
			if secure {
				args = append(args, "-ca", p.ca)
			}
			d := diagnose(t, append(args, front.url(""))...)
			d.well(t)
			if got := d.about(t, "reach"); !strings.Contains(got, name) {
				t.Errorf("reach: %s", got)
			}
			if got := d.about(t, "resume"); !strings.Contains(got, "3 nodes: n1, n2, n3") {
				t.Errorf("resume: %s", got)
			}
			if got := d.about(t, "HTTP/2"); secure && !strings.Contains(got, "20 streams share") {
				t.Errorf("HTTP/2: %s", got)
			}
		})
	}
}

// Each case is a common nginx configuration. The doctor names the problem and its remedy, and blames nothing else.
func TestDoctor_namesWhatIsWrongWithAnNginxAndTheRemedy(t *testing.T) {
	t.Parallel()
	n := start(t, "-heartbeat", "1500ms")
	const cors = "\n        add_header Access-Control-Allow-Origin https://page.example always;\n        add_header Vary Origin always;\n" +
		"        add_header Access-Control-Allow-Methods 'GET, POST, DELETE' always;\n" +
		"        add_header Access-Control-Allow-Headers 'last-event-id, authorization, content-type, producer-id, producer-epoch, producer-chunk' always;\n" +
		"        if ($request_method = OPTIONS) { return 204; }\n"
	for name, c := range map[string]struct {
		secure       bool
		changes      []string
		args         []string
		check, found string
		remedy       string
	}{
		"a compressed stream": {
			changes: []string{"gzip                    off;", "gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any;"},
			check:   "compression", found: `compressed.*gzip`, remedy: "gzip off",
		},
		"uploads that are buffered": {
			changes: []string{"proxy_request_buffering off;", "proxy_request_buffering on;"},
			check:   "uploads", found: `not stored within 1s`, remedy: "proxy_request_buffering off",
		},
		"a short read timeout": {
			changes: []string{"proxy_read_timeout    90s;", "proxy_read_timeout 1s;"},
			check:   "silence", found: `cut after [1-9](\.\d)?s without a byte`, remedy: "proxy_read_timeout",
		},
		"a short body timeout": {
			changes: []string{"client_body_timeout   1h;", "client_body_timeout 1s;"},
			check:   "silent upload", found: `said nothing`, remedy: "client_body_timeout",
		},
		"a cursor that is dropped": {
			changes: []string{"proxy_http_version 1.1;", "proxy_http_version 1.1; proxy_set_header Last-Event-ID '';"},
			check:   "resume", found: `from the start`, remedy: "Last-Event-ID",
		},
		"TLS without HTTP/2": {
			secure: true, changes: []string{"ssl http2;", "ssl;"},
			check: "HTTP/2", found: `HTTP/1.1 was negotiated`, remedy: "http2",
		},
		"no CORS": {
			args:  []string{"-origin", "https://page.example"},
			check: "CORS", found: `the preflight of GET /stream.*the stream has Access-Control-Allow-Origin \[\]`, remedy: "origins",
		},
		"CORS for another origin": {
			args: []string{"-origin", "https://other.example"}, changes: []string{"listen 80;", "listen 80;" + cors},
			check: "CORS", found: `Access-Control-Allow-Origin \["https://page.example"\]`, remedy: "origins",
		},
		"CORS as it should be": {
			args: []string{"-origin", "https://page.example"}, changes: []string{"listen 80;", "listen 80;" + cors},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := nginx(t, []string{n.addr, n.addr, n.addr}, c.secure, c.changes...)
			if w, ok := ways.Load(p.addr); ok && c.secure {
				w := w.(way)
				w.h2 = false
				w.client = &http.Client{Transport: w.transport(&net.Dialer{})}
				ways.Store(p.addr, w)
			}
			front := p.front()
			if c.secure {
				c.args = append(c.args, "-ca", p.ca)
			}
			diagnose(t, append(append(c.args, "-idle", "3s"), front.url(""))...).only(t, c.check, c.found, c.remedy)
		})
	}
}

// A buffering proxy delays everything: the first bytes, the events, and those after a cursor.
func TestDoctor_findsABufferAndSaysForHowLongItHolds(t *testing.T) {
	t.Parallel()
	n := start(t, "-heartbeat", "300ms")
	p := nginx(t, []string{n.addr, n.addr, n.addr}, false,
		"proxy_buffering         off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;", "proxy_http_version 1.1;", "proxy_http_version 1.0;")
	d := diagnose(t, "-idle", "1s", p.front().url(""))
	for check, found := range map[string]string{
		"first bytes": `none have come within 1s`,
		"events":      `5 of 5 events were held back, the longest for \d+(\.\d)?s: until 512 KiB more had followed`,
	} {
		if got := d.about(t, check); !regexp.MustCompile(found).MatchString(got) {
			t.Errorf("%s: %s", check, got)
		}
	}
	for _, f := range d.Findings {
		if f.Check == "events" && (f.OK || !strings.Contains(f.Remedy, "proxy_buffering off")) {
			t.Errorf("%+v", f)
		}
		if f.Check == "uploads" && !strings.Contains(f.Remedy, "proxy_http_version 1.1") { // with 1.0 nginx buffers request bodies, too
			t.Errorf("%+v", f)
		}
	}
	if d.code != 1 {
		t.Errorf("the exit code is %d", d.code)
	}
}

func TestDoctor_findsNodesThatDoNotShareTheirRedis(t *testing.T) {
	t.Parallel()
	p := nginx(t, []string{start(t).addr, start(t).addr, start(t).addr}, false)
	d := diagnose(t, "-idle", "1s", p.front().url(""))
	d.only(t, "nodes", "do not reach the same log", "-redis")
}

func TestDoctor_findsAClockThatIsWrong(t *testing.T) {
	t.Parallel()
	n := start(t, "-heartbeat", "300ms")
	to := &url.URL{Scheme: "http", Host: n.addr}
	past := httptest.NewServer(&httputil.ReverseProxy{
		FlushInterval: -1,
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(to) },
		ModifyResponse: func(r *http.Response) error {
			r.Body = older{r.Body}
			return nil
		},
	})
	t.Cleanup(past.Close)
	diagnose(t, "-idle", "1s", past.URL).only(t, "clock", "differs from this one by -", "NTP")
}

// older changes the times of all chunks to many years ago.
type older struct{ io.ReadCloser }

func (o older) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	copy(p, bytes.ReplaceAll(p[:n], []byte(`"ts":1`), []byte(`"ts": `))) // twelve of thirteen digits: about 1990
	return n, err
}

func TestDoctor_saysWhyAServerCannotBeReached(t *testing.T) {
	t.Parallel()
	n := start(t)
	cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
	secure := start(t, "-tls-cert", cert, "-tls-key", key)
	moved := httptest.NewServer(http.RedirectHandler("https://elsewhere.example/", http.StatusMovedPermanently))
	t.Cleanup(moved.Close)
	for at, said := range map[string][2]string{
		"http://" + freeAddr(t):       {"refused", "nothing listens there"},
		"https://" + n.addr:           {"HTTP response to HTTPS client", "speaks no TLS"},
		"https://" + secure.addr:      {"unknown authority", "-ca"},
		"http://" + n.addr + "/below": {"404", "the part in front of /v1"},
		moved.URL:                     {"301", "call https://elsewhere.example/ instead"},
		"http://no-such-name.invalid": {"cannot be reached", "the name"},
	} {
		diagnose(t, at).only(t, "reach", said[0], said[1])
	}
}

func TestDoctor_isCalledInAWrongWay(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{}, {"ftp://x"}, {"not a url"}, {"http://x", "http://y"}, {"-idle", "0s", "http://x"}, {"-origin", "https://x/path", "http://x"},
		{"-token-file", "nowhere", "http://x"}, {"-ca", "nowhere", "http://x"}, {"-nonsense", "http://x"},
	} {
		if code, out := program(t, nil, append([]string{"doctor"}, args...)...); code != 2 || out == "" {
			t.Errorf("%q: exit code %d: %s", args, code, out)
		}
	}
}

func TestDoctor_speaksToPeopleAndSendsItsToken(t *testing.T) {
	t.Parallel()
	const token = "planted-token"
	n := start(t, "-heartbeat", "300ms")
	to := &url.URL{Scheme: "http", Host: n.addr}
	guard := httptest.NewServer(&httputil.ReverseProxy{FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) {
		if r.SetURL(to); r.In.Header.Get("Authorization") != "Bearer "+token {
			r.Out.URL.Path = "/none"
		}
	}})
	t.Cleanup(guard.Close)
	code, out := program(t, []string{"GAPLESS_TOKEN=" + token}, "doctor", "-idle", "1s", guard.URL)
	if code != 0 || !strings.Contains(out, "ok       reach: ") || !strings.Contains(out, "listening in silence") || strings.Contains(out, token) {
		t.Errorf("exit code %d: %s", code, out)
	}
	if code, out = program(t, nil, "doctor", guard.URL); code != 1 || !strings.Contains(out, "PROBLEM  reach: ") || !strings.Contains(out, "         remedy: ") {
		t.Errorf("without a token: exit code %d: %s", code, out)
	}
}

func TestReady_andLiveSayWhetherANodeIs(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis)[0]
	if code, out := program(t, nil, "ready", "http://"+n.addr); code != 0 {
		t.Errorf("of a ready one: exit code %d: %s", code, out)
	}
	redis.Kill()
	eventually(t, "the node asks Redis again", func() bool { return n.get("/readyz").status == http.StatusServiceUnavailable }) // its result is up to half a second old
	if code, out := program(t, nil, "ready", "http://"+n.addr); code != 1 || !strings.Contains(out, "503") {
		t.Errorf("without Redis: exit code %d: %s", code, out)
	}
	cert, key := storetest.NewAuthority(t).Issue("chat.example")
	secure := launch(t, "-tls-cert", cert, "-tls-key", key).addr
	if code, out := program(t, nil, "ready", "https://"+secure); code != 0 {
		t.Errorf("of one with a certificate for other names: exit code %d: %s", code, out)
	}
	if code, out := program(t, nil, "live", "http://"+n.addr); code != 0 {
		t.Errorf("it lives without Redis: exit code %d: %s", code, out)
	}
	for _, args := range [][]string{{"ready"}, {"ready", "localhost"}, {"ready", "http://x", "http://y"}} {
		if code, out := program(t, nil, args...); code != 2 {
			t.Errorf("%q: exit code %d: %s", args, code, out)
		}
	}
}
