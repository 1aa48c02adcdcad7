package test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// The load generator of the scenarios (bench_linux_test.go) is one thread of a separate process. It owns the
// sockets of all viewers and publishers, with one epoll, so that an event costs it little besides the kernel's read. It
// reads its task as JSON from standard input, and writes its observations as JSON to standard output.
//
// Each message contains its number in its session, from 0, and when it was due, after a byte that occurs nowhere else
// in a stream. So the server's numbers do not count, and tally finds a viewer that missed a message, or saw one twice
// or late.

func init() { roles["load"] = loadRole }

// load is the generator's task.
type load struct {
	Do       string // live, idle, catchUp or http2
	TLS      bool   // http2: over TLS
	Addr     string
	Session  string // prefix of the sessions' names
	Sessions int
	Viewers  int   // of each session
	History  int   // messages of each session before its viewers come
	Keeper   bool  // catchUp: each session has a viewer from before its first message
	Servers  []int // the processes whose CPU counts; for the first one memory counts, too

	// live: each session gets Rate messages a second. At 0 the next message comes as soon as fewer than Flight are
	// missing from some viewer (without viewers: as soon as the previous one got its response).
	Rate    float64
	Flight  int
	Uploads bool // each session's messages are lines of one upload, not separate requests
	// Warm is how long it runs before the measurement, and For how long the measurement takes.
	Warm, For time.Duration
}

// outcome contains the generator's observations.
type outcome struct {
	// Messages that viewers got, and acknowledged publishes, during the measurement.
	Delivered, Published int
	Seconds              float64 // duration of the measurement
	CPU                  float64 // used by the servers in it, in seconds
	Foreign              float64 // used by unrelated processes and by the machine's host
	Own                  float64 // used by the generator
	Memory               int     // idle: how much the first server grew with all viewers, in bytes

	// Latency from when a message was due until a viewer had it, in ms, for a Rate above 0.
	P50, P99 float64
	// Took is how long the viewers of each session needed for its history, in ms (catchUp).
	Took []float64

	// All messages sent and received, at any time.
	Said, Got int
	faults
	Refused int // requests with a 503 response: the load was too high
}

// faults must stay zero.
type faults struct {
	Lost, Doubled, Reordered int
	Broken                   int // connections that ended
}

func (f *faults) add(g faults) {
	f.Lost += g.Lost
	f.Doubled += g.Doubled
	f.Reordered += g.Reordered
	f.Broken += g.Broken
}

func (f faults) String() string {
	text := fmt.Sprintf("%d/%d/%d", f.Lost, f.Doubled, f.Reordered)
	if f.Broken > 0 {
		text += fmt.Sprintf(", %d broken", f.Broken)
	}
	return text
}

// tally compares what a viewer got with the numbers 0, 1, 2, …
type tally struct {
	next    int          // the next expected number
	missing map[int]bool // lower numbers that have not come
	got     int
	doubled int
	late    int
}

func (t *tally) take(number int) {
	switch {
	case number == t.next:
		t.next++
		t.got++
	case number > t.next:
		if t.missing == nil {
			t.missing = map[int]bool{}
		}
		for ; t.next < number; t.next++ {
			t.missing[t.next] = true
		}
		t.next++
		t.got++
	case t.missing[number]:
		delete(t.missing, number)
		t.late++
		t.got++
	default:
		t.doubled++
	}
}

// faults returns what is wrong after said messages.
func (t *tally) faults(said int) faults {
	return faults{Lost: max(0, said-t.got), Doubled: t.doubled, Reordered: t.late}
}

// A message is the mark, its number and when it was due (in ns of the generator's clock), both in hexadecimal, and
// padding up to 100 bytes.
const (
	mark        = '~'
	markBytes   = 1 + 8 + 16
	messageSize = 100
)

var padding = strings.Repeat("x", messageSize-markBytes)

func message(b []byte, number int, due time.Duration) []byte {
	b = append(b, `{"content":"`...)
	b = append(b, mark)
	b = appendHex(b, uint64(number), 8)
	b = appendHex(b, uint64(due), 16)
	b = append(b, padding...)
	return append(b, `"}`...)
}

func appendHex(b []byte, v uint64, digits int) []byte {
	for i := digits - 1; i >= 0; i-- {
		b = append(b, "0123456789abcdef"[v>>(4*i)&15])
	}
	return b
}

func parseHex(b []byte) (v uint64) {
	for _, c := range b {
		if c >= 'a' {
			c -= 'a' - '0' - 10
		}
		v = v<<4 | uint64(c-'0')
	}
	return v
}

// marks finds the messages in a response. It removes the HTTP framing, in whatever pieces the bytes come.
type marks struct {
	open  bool // the status was 200
	ended bool
	body  bool
	line  []byte // the received part of a header, or of a size
	left  int    // rest of the HTTP chunk, with the line end after it
	part  []byte // the received part of a mark
}

// take reports whether the response continues.
func (m *marks) take(b []byte, message func(number int, due time.Duration)) bool {
	for len(b) > 0 {
		if m.left > 0 {
			n := min(m.left, len(b))
			m.text(b[:max(0, min(n, m.left-2))], message)
			m.left -= n
			b = b[n:]
			continue
		}
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			m.line = append(m.line, b...)
			return true
		}
		if len(m.line) > 0 {
			line = append(m.line, line...)
		}
		m.line, b = m.line[:0], rest
		line = bytes.TrimSuffix(line, []byte("\r"))
		switch {
		case m.body:
			size, err := strconv.ParseUint(string(line), 16, 31)
			if err != nil || size == 0 {
				m.ended = true
				return false
			}
			m.left = int(size) + 2
		case len(line) == 0:
			m.body = true
			if !m.open {
				m.ended = true
				return false
			}
		case bytes.HasPrefix(line, []byte("HTTP/1.1 200")):
			m.open = true
		}
	}
	return true
}

func (m *marks) text(b []byte, message func(number int, due time.Duration)) {
	found := func(b []byte) { message(int(parseHex(b[1:9])), time.Duration(parseHex(b[9:markBytes]))) }
	if len(m.part) > 0 {
		n := min(markBytes-len(m.part), len(b))
		m.part, b = append(m.part, b[:n]...), b[n:]
		if len(m.part) < markBytes {
			return
		}
		found(m.part)
		m.part = m.part[:0]
	}
	for {
		i := bytes.IndexByte(b, mark)
		if i < 0 {
			return
		}
		if len(b)-i < markBytes {
			m.part = append(m.part, b[i:]...)
			return
		}
		found(b[i : i+markBytes])
		b = b[i+markBytes:]
	}
}

// watcher is a viewer's connection.
type watcher struct {
	marks
	tally
	session int
	counted bool // its response has begun, and is counted
}

// publisher is a connection for sending messages, one request after the other.
type publisher struct {
	fd     int
	upload bool // it is one request, with one message per line
	open   bool // the request of an upload has begun
	busy   bool
	answer []byte
	asked  int   // the session of the request under way
	queue  []due // what waits for its turn
}

// due is a message to send.
type due struct {
	session int
	at      time.Duration
}

// generator is the thread.
type generator struct {
	load
	begun        time.Time
	epoll, timer int
	armed        time.Duration // when the timer wakes, if it has not yet
	events       [512]unix.EpollEvent
	in           [256 << 10]byte
	out, body    []byte
	addr         unix.SockaddrInet4

	watchers   map[int]*watcher // by descriptor
	publishers map[int]*publisher
	all        []*publisher // in their order
	said       []int        // by session
	gone       []*watcher   // their connections are closed

	publishing, recording bool
	start                 time.Duration // of the messages at a rate
	planned               int           // messages at a rate that have been queued
	opened                int           // viewers whose response has begun
	sent, delivered       int
	acknowledged          int
	latencies             []time.Duration
	refused, broken       int
	err                   error
}

// loadRole is the process.
func loadRole([]string) {
	runtime.LockOSThread()
	debug.SetGCPercent(400)
	var l load
	if err := json.NewDecoder(os.Stdin).Decode(&l); err != nil {
		fatal("load: read what to do", err)
	}
	o, err := l.run()
	if err != nil {
		fatal("load", err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(o); err != nil {
		fatal("load: say what was seen", err)
	}
}

func fatal(what string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
	os.Exit(1)
}

func (l load) run() (outcome, error) {
	to, err := net.ResolveTCPAddr("tcp4", l.Addr)
	if err != nil {
		return outcome{}, err
	}
	if !to.IP.IsLoopback() {
		return outcome{}, fmt.Errorf("%s is not on loopback: the generator stays on its machine", l.Addr)
	}
	g := &generator{load: l, begun: time.Now(), watchers: map[int]*watcher{}, publishers: map[int]*publisher{}, said: make([]int, l.Sessions)}
	g.addr.Port = to.Port
	copy(g.addr.Addr[:], to.IP.To4())
	if g.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return outcome{}, err
	}
	if g.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return outcome{}, err
	}
	if err := g.listen(g.timer); err != nil {
		return outcome{}, err
	}
	var o outcome
	switch l.Do {
	case "live":
		o, err = g.live()
	case "idle":
		o, err = g.idle()
	case "catchUp":
		o, err = g.catchUp()
	case "http2":
		o, err = g.http2()
	default:
		err = fmt.Errorf("%q is neither live, idle, catchUp nor http2", l.Do)
	}
	for _, w := range g.watchers {
		g.gone = append(g.gone, w)
	}
	for _, w := range g.gone {
		o.faults.add(w.faults(g.said[w.session]))
		o.Got += w.got
	}
	for _, n := range g.said {
		o.Said += n
	}
	o.Refused, o.Broken = g.refused, g.broken
	return o, cmp.Or(err, g.err)
}

func (g *generator) clock() time.Duration { return time.Since(g.begun) }

func (g *generator) name(session int) string { return g.Session + "-" + strconv.Itoa(session) }

func (g *generator) listen(fd int) error {
	return unix.EpollCtl(g.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

// dial connects and sends the beginning of a request. On loopback neither blocks.
func (g *generator) dial(head string) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	// A reset on close leaves no port in TIME_WAIT.
	err = errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.Connect(fd, &g.addr),
	)
	if err == nil && head != "" {
		_, err = unix.Write(fd, []byte(head))
	}
	if err = errors.Join(err, unix.SetNonblock(fd, true), g.listen(fd)); err != nil {
		_ = unix.Close(fd)
		return 0, fmt.Errorf("connect to %s: %w", g.Addr, err)
	}
	return fd, nil
}

func (g *generator) watch(session int) (*watcher, error) {
	fd, err := g.dial("GET /v1/sessions/" + g.name(session) + "/stream HTTP/1.1\r\nHost: " + g.Addr + "\r\nAccept: text/event-stream\r\n\r\n")
	if err != nil {
		return nil, err
	}
	w := &watcher{session: session}
	g.watchers[fd] = w
	return w, nil
}

// attach connects every session's viewers, only a few ahead of the responses.
func (g *generator) attach() error {
	for n := range g.Sessions * g.Viewers {
		if _, err := g.watch(n % g.Sessions); err != nil {
			return err
		}
		if !g.until(20*time.Second, func() bool { return n-g.opened < 64 }) {
			break
		}
	}
	if want := g.Sessions * g.Viewers; !g.until(20*time.Second, func() bool { return g.opened == want }) {
		return fmt.Errorf("%d of %d viewers were answered", g.opened, want)
	}
	return nil
}

// fill gives a session its history, in requests of a thousand messages.
func (g *generator) fill(session int) error {
	for g.said[session] < g.History {
		var lines []byte
		until := min(g.History, g.said[session]+1000)
		for n := g.said[session]; n < until; n++ {
			lines = append(message(lines, n, g.clock()), '\n')
		}
		response, err := http.Post("http://"+g.Addr+"/v1/sessions/"+g.name(session)+"/chunks", "application/x-ndjson", bytes.NewReader(lines))
		if err != nil {
			return fmt.Errorf("fill a session: %w", err)
		}
		_ = response.Body.Close()
		if response.StatusCode/100 != 2 {
			return fmt.Errorf("fill a session: %s", response.Status)
		}
		g.said[session] = until
	}
	return nil
}

// until works until ok returns true, or most has passed.
func (g *generator) until(most time.Duration, ok func() bool) bool {
	for end := g.clock() + most; ; {
		wake := g.publish(end)
		if ok() {
			return true
		}
		if g.err != nil || g.clock() >= end {
			return false
		}
		g.wait(wake)
	}
}

// calm is until, for as long as messages come: after an overload they come late.
func (g *generator) calm(ok func() bool) {
	for before := -1; !g.until(5*time.Second, ok) && g.delivered > before; {
		before = g.delivered
	}
}

func (g *generator) pass(d time.Duration) { g.until(d, func() bool { return false }) }

// wait waits for sockets until a deadline, and serves them.
func (g *generator) wait(late time.Duration) {
	if late != g.armed {
		rest := max(late-g.clock(), 1) // 0 would mean for ever
		if err := unix.TimerfdSettime(g.timer, 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(int64(rest))}, nil); err != nil {
			g.err = cmp.Or(g.err, err)
			return
		}
		g.armed = late
	}
	g.serve(-1)
}

func (g *generator) serve(timeout int) {
	n, err := unix.EpollWait(g.epoll, g.events[:], timeout)
	if err != nil && err != unix.EINTR {
		g.err = cmp.Or(g.err, err)
	}
	for i := range max(n, 0) {
		fd := int(g.events[i].Fd)
		if w := g.watchers[fd]; w != nil {
			g.see(fd, w)
		} else if p := g.publishers[fd]; p != nil {
			g.answered(p)
		} else if fd == g.timer {
			_, _ = unix.Read(fd, g.in[:8]) // it only wakes this thread
			g.armed = 0
		}
	}
}

// see reads what a viewer received.
func (g *generator) see(fd int, w *watcher) {
	for {
		n, err := unix.Read(fd, g.in[:])
		if err == unix.EAGAIN || err == unix.EINTR {
			return
		}
		now := g.clock()
		goes := err == nil && n > 0 && w.marks.take(g.in[:n], func(number int, due time.Duration) {
			w.tally.take(number)
			g.delivered++
			if g.recording {
				g.latencies = append(g.latencies, now-due)
			}
		})
		if w.open && !w.counted {
			w.counted = true
			g.opened++
		}
		if !goes {
			g.broken++
			g.leave(fd, w)
			return
		}
		if n < len(g.in) {
			return
		}
	}
}

func (g *generator) leave(fd int, w *watcher) {
	_ = unix.Close(fd)
	delete(g.watchers, fd)
	g.gone = append(g.gone, w)
}

// publish sends what is due and allowed. It returns when the next message is due, or end.
func (g *generator) publish(end time.Duration) (wake time.Duration) {
	if !g.publishing {
		return end
	}
	if g.Rate == 0 {
		for i, p := range g.all {
			for !p.busy && (g.Viewers == 0 || g.delivered >= (g.sent-g.Flight+1)*g.Viewers) && g.err == nil {
				g.send(p, due{i, g.clock()})
			}
		}
		return end
	}
	for now := g.clock(); ; g.planned++ {
		at := g.start + time.Duration(float64(g.planned)*float64(time.Second)/(g.Rate*float64(g.Sessions)))
		if at > now {
			return min(at, end)
		}
		session := g.planned % g.Sessions
		p := g.all[session%len(g.all)]
		if p.busy {
			p.queue = append(p.queue, due{session, at})
		} else {
			g.send(p, due{session, at})
		}
	}
}

// send sends the session's next message.
func (g *generator) send(p *publisher, d due) {
	g.body = message(g.body[:0], g.said[d.session], d.at)
	body := g.body
	g.out = g.out[:0]
	if p.upload {
		if !p.open {
			p.open = true
			g.out = fmt.Appendf(g.out, "POST /v1/sessions/%s/chunks HTTP/1.1\r\nHost: %s\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n", g.name(d.session), g.Addr)
		}
		g.out = strconv.AppendInt(g.out, int64(len(body)+1), 16)
		g.out = append(append(append(g.out, "\r\n"...), body...), "\n\r\n"...)
	} else {
		g.out = append(g.out, "POST /v1/sessions/"...)
		g.out = strconv.AppendInt(append(append(g.out, g.Session...), '-'), int64(d.session), 10)
		g.out = append(append(g.out, "/chunks HTTP/1.1\r\nHost: "...), g.Addr...)
		g.out = append(g.out, "\r\nContent-Type: application/json\r\nContent-Length: "...)
		g.out = strconv.AppendInt(g.out, int64(len(body)), 10)
		g.out = append(append(g.out, "\r\n\r\n"...), body...)
		p.busy, p.asked = true, d.session
	}
	n, err := unix.Write(p.fd, g.out)
	switch {
	case err == unix.EAGAIN && p.upload: // the socket accepts nothing: the load was too high
		g.refused++
	case err != nil || n < len(g.out):
		g.err = cmp.Or(g.err, fmt.Errorf("publish: %d of %d bytes were sent (%v)", max(n, 0), len(g.out), err))
	default:
		g.said[d.session]++
		g.sent++
	}
}

// answered reads the response to a request, and sends the next waiting one.
func (g *generator) answered(p *publisher) {
	n, err := unix.Read(p.fd, g.in[:])
	if err == unix.EAGAIN || err == unix.EINTR {
		return
	}
	if p.answer = append(p.answer, g.in[:max(n, 0)]...); n <= 0 || p.upload {
		g.err = cmp.Or(g.err, fmt.Errorf("a publisher's connection ended (%v): %.300q", err, p.answer))
		return
	}
	status, size, whole := head(p.answer)
	if !whole || len(p.answer) < size {
		return
	}
	p.busy = false
	switch {
	case status/100 == 2:
		g.acknowledged++
	case status == http.StatusServiceUnavailable: // surely not stored
		g.refused++
		g.said[p.asked]--
		g.sent--
	default:
		g.err = cmp.Or(g.err, fmt.Errorf("publish: %.300q", p.answer))
	}
	p.answer = p.answer[:0]
	if len(p.queue) > 0 && g.publishing {
		next := p.queue[0]
		p.queue = p.queue[1:]
		g.send(p, next)
	}
}

// head reads the beginning of a response, and the size of the whole response. whole is true if all headers are there.
func head(answer []byte) (status, size int, whole bool) {
	end := bytes.Index(answer, []byte("\r\n\r\n"))
	if end < len("HTTP/1.1 200") {
		return 0, 0, false
	}
	size = end + 4
	status, _ = strconv.Atoi(string(answer[9:12]))
	if _, rest, found := bytes.Cut(answer[:end+2], []byte("Content-Length: ")); found {
		length, _, _ := bytes.Cut(rest, []byte("\r\n"))
		n, _ := strconv.Atoi(string(length))
		size += n
	}
	return status, size, true
}

// usage is what was used up to a moment, in seconds of CPU.
type usage struct {
	at                    time.Duration
	servers, own, foreign float64
	published, delivered  int
	memory                int // of the first server, in bytes
}

func (g *generator) usage() (u usage, err error) {
	cpu := func(pid int) (float64, int) {
		p, failed := procfs.NewProc(pid)
		stat, failed2 := p.Stat()
		err = errors.Join(err, failed, failed2)
		return stat.CPUTime(), stat.ResidentMemory()
	}
	u.at, u.published, u.delivered = g.clock(), g.acknowledged, g.delivered
	if g.Uploads {
		u.published = g.sent
	}
	for i, pid := range g.Servers {
		used, memory := cpu(pid)
		if u.servers += used; i == 0 {
			u.memory = memory
		}
	}
	own, _ := cpu(os.Getpid())
	parent, _ := cpu(os.Getppid())
	u.own = own
	fs, failed := procfs.NewDefaultFS()
	stat, failed2 := fs.Stat()
	t := stat.CPUTotal
	u.foreign = t.User + t.Nice + t.System + t.IRQ + t.SoftIRQ + t.Steal - parent - own - u.servers
	return u, errors.Join(err, failed, failed2)
}

// measure records what was used during d.
func (g *generator) measure(o *outcome, d time.Duration) error {
	a, err := g.usage()
	if err != nil {
		return err
	}
	g.recording = g.Rate > 0
	g.pass(d)
	g.recording = false
	b, err := g.usage()
	o.Seconds = (b.at - a.at).Seconds()
	o.CPU, o.Own, o.Foreign = b.servers-a.servers, b.own-a.own, max(0, b.foreign-a.foreign)
	o.Published, o.Delivered = b.published-a.published, b.delivered-a.delivered
	return err
}

// live measures viewers that are connected before the messages come.
func (g *generator) live() (o outcome, err error) {
	for session := range g.Sessions {
		if err := g.fill(session); err != nil {
			return o, err
		}
	}
	if err := g.attach(); err != nil {
		return o, err
	}
	publishers := min(16, g.Sessions)
	if g.Uploads {
		publishers = g.Sessions
	}
	for range publishers {
		fd, err := g.dial("")
		if err != nil {
			return o, err
		}
		p := &publisher{fd: fd, upload: g.Uploads}
		g.publishers[fd], g.all = p, append(g.all, p)
	}
	g.pass(300 * time.Millisecond)
	g.publishing, g.start = true, g.clock()
	g.pass(g.Warm)
	if err := g.measure(&o, g.For); err != nil {
		return o, err
	}
	g.publishing = false
	all := func() bool {
		said := 0
		for _, n := range g.said {
			said += n
		}
		return g.delivered >= said*g.Viewers && !slices.ContainsFunc(g.all, func(p *publisher) bool { return p.busy })
	}
	g.calm(all)
	slices.Sort(g.latencies)
	o.P50, o.P99 = ms(quantile(g.latencies, .5)), ms(quantile(g.latencies, .99))
	return o, nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns a quantile of sorted values, or zero if there are none.
func quantile[T any](sorted []T, q float64) (v T) {
	if len(sorted) == 0 {
		return v
	}
	return sorted[min(len(sorted)-1, int(math.Floor(q*float64(len(sorted)))))]
}

// idle measures viewers that receive nothing.
func (g *generator) idle() (o outcome, err error) {
	before, err := g.usage()
	if err != nil {
		return o, err
	}
	if err := g.attach(); err != nil {
		return o, err
	}
	if err := g.measure(&o, g.For); err != nil {
		return o, err
	}
	after, err := g.usage()
	o.Memory = after.memory - before.memory
	return o, err
}

// catchUp measures viewers that connect all at once, at the start of a history, one session after the other.
func (g *generator) catchUp() (o outcome, err error) {
	for session := range g.Sessions {
		var all []*watcher
		whole := func() bool {
			return !slices.ContainsFunc(all, func(w *watcher) bool { return w.got < g.History })
		}
		if g.Keeper {
			w, err := g.watch(session)
			if err != nil {
				return o, err
			}
			all = append(all, w)
			g.until(20*time.Second, func() bool { return w.open })
		}
		if err := g.fill(session); err != nil {
			return o, err
		}
		g.calm(whole)
		g.pass(300 * time.Millisecond)
		begun := g.clock()
		for i := range g.Viewers {
			w, err := g.watch(session)
			if err != nil {
				return o, err
			}
			if all = append(all, w); i%16 == 15 {
				g.serve(0)
			}
		}
		g.calm(whole)
		o.Took = append(o.Took, ms(g.clock()-begun))
		g.pass(50 * time.Millisecond) // nothing comes twice
		for fd, w := range g.watchers {
			g.leave(fd, w)
		}
	}
	return o, nil
}
