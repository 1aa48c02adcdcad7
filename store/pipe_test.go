package store_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gapless/store"
	"gapless/store/storetest"
)

// While Redis is silent, a few commands are on their way, whose outcome is not known; those
// that wait behind them were surely not executed, and are not later.
func TestPipe_whatWaitsBehindASilentRedisIsSurelyNotStored(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis, c.Timeout = redis.URL(), 500*time.Millisecond })
	mustAppend(t, s, "s", delta("first"))
	redis.Signal(syscall.SIGSTOP)
	const count = 20
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			_, errs[i] = s.Append(t.Context(), "s", store.Batch{Chunks: []store.Chunk{delta(fmt.Sprint("chunk", i))}})
		})
	}
	wg.Wait()
	redis.Signal(syscall.SIGCONT)
	list := strings.Join(redis.LRange(t.Context(), "chat:history:s", 0, -1).Val(), "\n")
	var away, unknown int
	for i, err := range errs {
		switch stored := strings.Contains(list, fmt.Sprintf("chunk%d\"", i)); {
		case errors.Is(err, store.ErrAway):
			if away++; stored {
				t.Errorf("chunk %d was surely not stored, and is in the list", i)
			}
		case errors.Is(err, store.ErrOutcomeUnknown):
			unknown++
		default:
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	if away == 0 || unknown == 0 || unknown > 4 {
		t.Errorf("%d were surely not stored, of %d it is not known", away, unknown)
	}
	mustAppend(t, s, "s", delta("last"))
}

// Appends that come together go together: Redis is written to far less often than they are many. Each
// one is executed once, and gets the answer that is its own.
func TestPipe_manyGoTogether(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	const sessions, each = 50, 40
	var wg sync.WaitGroup
	for i := range sessions {
		wg.Go(func() {
			id := fmt.Sprint("s", i)
			for k := range int64(each) {
				a, err := s.Append(t.Context(), id, store.Batch{Chunks: []store.Chunk{delta(fmt.Sprint(i, " ", k))}})
				if err != nil || a.First != k+1 || a.Last != k+1 {
					t.Errorf("%s, chunk %d: %+v, %v", id, k+1, a, err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i := range sessions {
		for k, got := range contents(t, s, fmt.Sprint("s", i)) {
			if got != fmt.Sprint(i, " ", k) {
				t.Errorf("session %d, chunk %d says %s", i, k+1, got)
			}
		}
	}
	info := redis.Info(t.Context(), "stats").Val()
	var reads int
	if _, after, ok := strings.Cut(info, "total_reads_processed:"); ok {
		_, _ = fmt.Sscanf(after, "%d", &reads)
	}
	t.Logf("%d appends in %d reads of Redis", sessions*each, reads)
	if reads == 0 || reads > sessions*each/2 {
		t.Errorf("%d reads for %d appends", reads, sessions*each)
	}
}

// A connection that breaks takes a whole batch along: none of it is executed twice.
func TestPipe_aBatchThatBreaksIsNotRepeated(t *testing.T) {
	redis := storetest.Redis(t)
	s := open(t, func(c *store.Config) { c.Redis = redis.URL() })
	stop := make(chan struct{})
	var wg, killing sync.WaitGroup
	killing.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				_ = redis.ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err()
			}
		}
	})
	var mu sync.Mutex
	acknowledged := map[string]bool{}
	unknown := 0
	for i := range 30 {
		wg.Go(func() {
			for k := range 100 {
				text := fmt.Sprintf("%d.%d.", i, k)
				_, err := s.Append(t.Context(), fmt.Sprint("s", i), store.Batch{Chunks: []store.Chunk{delta(text)}})
				mu.Lock()
				if err == nil {
					acknowledged[text] = true
				} else if errors.Is(err, store.ErrOutcomeUnknown) {
					unknown++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	close(stop)
	killing.Wait()
	times := map[string]int{}
	for i := range 30 {
		for _, text := range contents(t, s, fmt.Sprint("s", i)) {
			times[text]++
		}
	}
	for text, n := range times {
		if n > 1 {
			t.Errorf("%s is there %d times", text, n)
		}
	}
	for text := range acknowledged {
		if times[text] != 1 {
			t.Errorf("%s was acknowledged, and is there %d times", text, times[text])
		}
	}
	t.Logf("%d acknowledged, %d unknown", len(acknowledged), unknown)
	if unknown == 0 {
		t.Error("no connection broke under an append")
	}
}

// Replies that came before the connection broke are kept: what they acknowledge is not
// called unknown, however many commands were behind them.
func TestPipe_repliesBeforeTheBreakAreKept(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const reply = "*12\r\n$2\r\nok\r\n$1\r\ne\r\n$1\r\n0\r\n$1\r\n1\r\n$1\r\n0\r\n:0\r\n:0\r\n$0\r\n\r\n$0\r\n\r\n$1\r\n1\r\n$1\r\n1\r\n:1\r\n"
	var waiting, replied atomic.Int64
	release := make(chan struct{}) // closed when the first ones are to be answered
	go func() {                    // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection: the store's
				defer c.Close()
				in := bufio.NewReader(c)
				for n := 0; ; {
					line, err := in.ReadString('\n')
					var parts int
					if _, bad := fmt.Sscanf(line, "*%d", &parts); err != nil || bad != nil {
						return
					}
					var name string
					for i := range parts {
						var size int
						line, _ := in.ReadString('\n')
						_, _ = fmt.Sscanf(line, "$%d", &size)
						word := make([]byte, size+2)
						_, _ = io.ReadFull(in, word)
						if i == 0 {
							name = strings.ToLower(string(word[:size]))
						}
					}
					if name != "evalsha" {
						_, _ = io.WriteString(c, "-ERR unknown command\r\n")
						continue
					}
					if n++; n == 1 {
						waiting.Add(1)
						<-release
					}
					replied.Add(1)
					_, _ = io.WriteString(c, reply)
					if n == 2 { // among the first of a batch: what is behind it gets none
						_ = c.(*net.TCPConn).CloseWrite()
						_, _ = io.Copy(io.Discard, in) // else its replies might be lost, too
						return
					}
				}
			}()
		}
	}()
	s := open(t, func(c *store.Config) { c.Redis = "redis://" + l.Addr().String() })
	const count = 12
	errs := make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			_, errs[i] = s.Append(t.Context(), fmt.Sprint("s", i), store.Batch{Chunks: []store.Chunk{delta("x")}})
		})
		for i < 2 && waiting.Load() < int64(i+1) { // two are on their way, the others wait
			time.Sleep(time.Millisecond)
		}
	}
	time.Sleep(50 * time.Millisecond)
	close(release)
	wg.Wait()
	acknowledged := 0
	for _, err := range errs {
		if err == nil {
			acknowledged++
		} else if !errors.Is(err, store.ErrOutcomeUnknown) {
			t.Error(err)
		}
	}
	if acknowledged != int(replied.Load()) || acknowledged < 3 || acknowledged == count {
		t.Errorf("%d were acknowledged, and %d had their reply", acknowledged, replied.Load())
	}
}
