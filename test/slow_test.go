package test

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gapless/store/storetest"
)

const largeCount = 24

// large appends that many chunks of 60 KB, and an end: more than all buffers between the node and a viewer hold.
func large(t *testing.T, n *node, session string, end string) {
	t.Helper()
	for i := range largeCount / 3 {
		chunk := func(k int) string { return fmt.Sprintf(`{"content":"%d %s"}`, 3*i+k, strings.Repeat("x", 60_000)) }
		n.append(t, session, "["+chunk(1)+","+chunk(2)+","+chunk(3)+"]")
	}
	if end != "" {
		n.append(t, session, end)
	}
}

func TestSlow_aViewerThatTakesNothingIsCutAndComesBackForTheRest(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, append(args, "-write-timeout", "500ms")...)
		ctx := deadline(t)
		session := newID()
		large(t, n, session, `{"type":"end"}`)
		v := &viewer{session: session, dialer: net.Dialer{Control: smallReceiveBuffer}}
		waited := false
		v.nextConnection(false)
		how := v.raw(ctx, n.addr, func(b []byte) bool {
			if !waited {
				waited = true
				other := &viewer{session: session} // it is not affected
				other.follow(ctx, at(n.addr), nil)
				other.check(t, n.pages(t, session))
				eventually(t, "the viewer is cut", func() bool { return strings.Contains(n.log.String(), "cause=slow") })
			}
			return v.feed(b, func(e event) bool { v.take(e); return true })
		})
		if how != aborted || v.cursor > largeCount {
			t.Errorf("the viewer ended %s, at %d", how, v.cursor)
		}
		v.dialer = net.Dialer{}
		v.follow(ctx, at(n.addr), nil)
		v.check(t, n.pages(t, session))
		v.unreset(t)
	})
}

func TestSlow_aViewerThatIsSlowAndTakesSomethingIsNotCut(t *testing.T) {
	everyWay(t, func(t *testing.T, args ...string) {
		n := start(t, append(args, "-write-timeout", "2s")...)
		ctx := deadline(t)
		session := newID()
		large(t, n, session, `{"type":"end"}`)
		v := &viewer{session: session, dialer: net.Dialer{Control: smallReceiveBuffer}}
		v.nextConnection(false)
		begun := time.Now()
		how := v.raw(ctx, n.addr, func(b []byte) bool {
			time.Sleep(25 * time.Millisecond) // a slow reader, of at most 8 KB at a time
			return v.feed(b, func(e event) bool { v.take(e); return true })
		})
		if how != clean {
			t.Errorf("the viewer ended %s, at %d", how, v.cursor)
		}
		if took := time.Since(begun); took < 4*time.Second {
			t.Errorf("it took only %v: the viewer was not slow", took)
		}
		v.check(t, n.pages(t, session))
	})
}

// A viewer that reads a little now and then gets everything, on one connection, and delays no other.
func TestSlow_oneBesideManyFastOnesDelaysNone(t *testing.T) {
	t.Parallel()
	n := start(t, "-write-timeout", "1m")
	ctx := deadline(t)
	session := newID()
	const count = 400
	body := strings.Repeat("x", 1000)
	slow := &viewer{session: session, dialer: net.Dialer{Control: smallReceiveBuffer}}
	slow.nextConnection(false)
	var took atomic.Int64
	others := make(chan struct{}) // closed when they have everything
	ended := background(t, func() {
		how := slow.raw(ctx, n.addr, func(b []byte) bool {
			took.Add(int64(len(b)))
			select {
			case <-others:
			case <-time.After(time.Duration(len(b)) * time.Second / (1 << 9)): // half a KiB a second, however long the others take
			}
			return slow.feed(b, func(e event) bool { slow.take(e); return true })
		})
		if how != clean {
			t.Errorf("the slow viewer ended %s, at %d", how, slow.cursor)
		}
	})
	fast := make([]*viewer, 200)
	var wg sync.WaitGroup
	for i := range fast {
		fast[i] = &viewer{session: session}
		wg.Go(func() { fast[i].follow(ctx, at(n.addr), nil) })
	}
	for _, v := range fast {
		eventually(t, "the viewer is there", func() bool { return v.status.Load() == http.StatusOK })
	}
	for i := range count {
		n.append(t, session, fmt.Sprintf(`{"content":"%d %s"}`, i, body))
	}
	n.append(t, session, `{"type":"end"}`)
	wg.Wait()
	close(others)
	if took.Load() > count*1000/2 {
		t.Errorf("the slow viewer has %d bytes already: it was not slow", took.Load())
	}
	ended()
	for _, v := range append(fast, slow) {
		v.check(t, n.pages(t, session))
		v.unreset(t)
	}
}

// A thousand viewers stop reading, while their session continues. The node grows by less than 64 MiB, and a viewer next
// to them gets everything. The test only logs how late its chunks are with and without the others: benchmarks judge
// times.
func TestSlow_aThousandViewersThatTakeNothingCostLittle(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := startProgram(t, plainProgram(t), "-redis", redis.URL(), "-write-timeout", "1h")
	ctx := deadline(t)
	chunk := func(at time.Time) string {
		return fmt.Sprintf(`{"content":"%d %s"}`, at.UnixNano(), strings.Repeat("x", 1000))
	}
	run := func(session string, count int) (p99 time.Duration) {
		v := &viewer{session: session}
		var late []time.Duration
		begun := time.Now()
		wait := background(t, func() {
			v.follow(ctx, at(n.addr), func(e event) bool {
				var c struct{ Content string }
				var said int64
				if json.Unmarshal([]byte(e.data), &c) == nil {
					if _, err := fmt.Sscanf(c.Content, "%d ", &said); err == nil && time.Unix(0, said).After(begun) {
						late = append(late, time.Since(time.Unix(0, said)))
					}
				}
				return false
			})
		})
		lines, answered := upload(t, n, session)
		for i := range count {
			if _, err := io.WriteString(lines, chunk(time.Now())+"\n"); err != nil {
				t.Fatal(err)
			}
			if i%4 == 3 {
				time.Sleep(time.Millisecond)
			}
		}
		_ = lines.(io.Closer).Close()
		if a := <-answered; a.status != http.StatusCreated {
			t.Fatalf("%d %s (%v)", a.status, a.body, a.err)
		}
		n.append(t, session, `{"type":"end"}`)
		wait()
		v.check(t, history(t, redis, session))
		v.unreset(t)
		slices.Sort(late)
		return late[len(late)*99/100]
	}
	count := *stalledChunks
	alone := run(newID(), count)
	session := newID()
	n.append(t, session, words(1, 1))
	before := rss(t, n.cmd.Process.Pid)
	for range 1000 {
		stalled(t, n, session)
	}
	begun := rss(t, n.cmd.Process.Pid)
	for range 30 { // fills their sockets
		n.append(t, session, "["+strings.Repeat(chunk(time.Now())+",", 9)+chunk(time.Now())+"]")
	}
	for given := -1.0; ; time.Sleep(200 * time.Millisecond) {
		m, _ := n.scrape(t)
		if now := m["gapless_chunks_delivered_total"]; now == given {
			break
		} else {
			given = now
		}
	}
	beside := run(session, count)
	after := rss(t, n.cmd.Process.Pid)
	t.Logf("1,000 viewers that take nothing, %d chunks of 1 KiB: %d KiB more when they came, %d KiB more behind all; p99 of one that reads: %v, alone %v",
		count, (begun-before)>>10, (after-before)>>10, beside, alone)
	if grown := after - before; grown > 64<<20 {
		t.Errorf("the node has %d KiB more", grown>>10)
	}
}

var stalledChunks = flag.Int("stalled.chunks", 8_000, "how many chunks a viewer gets beside a thousand that take nothing")

// Viewers that come and go leave no goroutine, no subscription and no memory.
func TestViewers_tenThousandThatComeAndGoLeaveNothing(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := startProgram(t, plainProgram(t), "-redis", redis.URL(), "-linger", "100ms", "-heartbeat", "10m") // no write notices a departure
	all := make([]string, 100)
	for i := range all {
		all[i] = newID()
		n.append(t, all[i], words(1, 20))
	}
	// wave connects a number of viewers, waits until each has received a live chunk, and disconnects them.
	wave := func(count int) {
		var wg sync.WaitGroup
		places := make(chan struct{}, 200)
		for i := range count {
			places <- struct{}{}
			wg.Go(func() {
				v := &viewer{session: all[i%len(all)]}
				v.connect(deadline(t), n.addr, func(event) bool { return v.cursor >= 20 })
				if len(v.faults) > 0 || v.cursor < 20 {
					t.Errorf("%d: %v", v.cursor, v.faults)
				}
				<-places
			})
		}
		wg.Wait()
	}
	quiet := func() (m metricsOf) {
		eventually(t, "all have left", func() bool {
			m, _ = n.scrape(t)
			return m["gapless_viewers"] == 0 && m["gapless_feeds"] == 0 && m["gapless_subscriptions"] == 0
		})
		eventually(t, "goroutines have ended", func() bool {
			now, _ := n.scrape(t)
			settled := now["go_goroutines"] >= m["go_goroutines"]
			m = now
			return settled
		})
		return m
	}
	wave(1000) // fills pools, once
	before, memory := quiet(), rss(t, n.cmd.Process.Pid)
	wave(10_000)
	after, grown := quiet(), rss(t, n.cmd.Process.Pid)-memory
	t.Logf("goroutines %.0f, then %.0f; %d KiB more", before["go_goroutines"], after["go_goroutines"], grown>>10)
	if after["go_goroutines"] > before["go_goroutines"]+10 {
		t.Errorf("%.0f goroutines are left, %.0f were there", after["go_goroutines"], before["go_goroutines"])
	}
	if after["gapless_window_bytes"] > 0 {
		t.Errorf("windows have %.0f bytes", after["gapless_window_bytes"])
	}
	if grown > 24<<20 {
		t.Errorf("the node has %d KiB more", grown>>10)
	}
	if channels := redis.PubSubChannels(t.Context(), "chat:stream:*").Val(); len(channels) > 0 {
		t.Errorf("%d channels are subscribed", len(channels))
	}
}

// smallReceiveBuffer makes the kernel buffer little for a viewer that does not read.
func smallReceiveBuffer(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10) })
}
