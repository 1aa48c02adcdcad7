package embedded

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"

	lua "github.com/yuin/gopher-lua"
)

// conn is the server's end of a connection. Writing to it never waits for the client. A pipe has no buffer, so a client that
// writes a command while a reply is on its way would otherwise wait forever, and everybody else with it.
type conn struct {
	net.Conn
	redis    *Redis
	channels map[string]struct{} // the channels it subscribed to; guarded by redis.mu
	queued   [][]string          // commands since MULTI
	multi    bool
	broken   bool // the transaction contains an unknown command: none of it is executed

	wake chan struct{}
	done chan struct{}
	once sync.Once

	mu      sync.Mutex
	pending []byte
	spare   []byte // reused by flush
}

func newConn(r *Redis, end net.Conn) *conn {
	return &conn{Conn: end, redis: r, channels: map[string]struct{}{}, wake: make(chan struct{}, 1), done: make(chan struct{})}
}

// Close closes the connection. It may be called more than once.
func (c *conn) Close() error {
	c.once.Do(func() { close(c.done) })
	return c.Conn.Close()
}

// send adds to the output that flush writes.
func (c *conn) send(write func(to []byte) []byte) {
	c.mu.Lock()
	c.pending = write(c.pending)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// push sends texts that are not a reply.
func (c *conn) push(texts ...string) {
	c.send(func(to []byte) []byte {
		to = header(to, '*', len(texts))
		for _, text := range texts {
			to = bulk(to, text)
		}
		return to
	})
}

func (c *conn) flush() {
	for {
		select {
		case <-c.wake:
		case <-c.done:
			return
		}
		c.mu.Lock()
		p := c.pending
		c.pending, c.spare = c.spare[:0], nil
		c.mu.Unlock()
		if _, err := c.Conn.Write(p); err != nil {
			return
		}
		if cap(p) <= 1<<20 {
			c.mu.Lock()
			c.spare = p
			c.mu.Unlock()
		}
	}
}

// serve executes the commands that arrive, one after another, until the connection ends.
func (c *conn) serve() {
	defer func() {
		_ = c.Close()
		c.redis.mu.Lock()
		defer c.redis.mu.Unlock()
		for channel := range c.channels {
			c.leave(channel)
		}
		delete(c.redis.conns, c)
	}()
	in := bufio.NewReaderSize(c.Conn, 32<<10)
	for {
		args, err := readCommand(in)
		if err != nil {
			if errors.Is(err, errProtocol) {
				c.send(func(to []byte) []byte { return reply(to, failure("ERR %v", err)) })
			}
			return
		}
		if err := c.execute(args); err != nil {
			return // the outcome is unknown
		}
	}
}

func (c *conn) execute(args []string) error {
	name := strings.ToUpper(args[0])
	switch name {
	case "MULTI":
		c.multi, c.broken, c.queued = true, false, nil
		return c.answer(okReply)
	case "DISCARD":
		c.multi, c.queued = false, nil
		return c.answer(okReply)
	case "EXEC":
		commands, broken := c.queued, c.broken
		c.multi, c.queued = false, nil
		if broken {
			return c.answer(failure("EXECABORT Transaction discarded because of previous errors."))
		}
		replies, kept := c.redis.execute(commands)
		if err := kept.wait(); err != nil {
			return err
		}
		c.send(func(to []byte) []byte {
			to = header(to, '*', len(replies))
			for _, r := range replies {
				to = reply(to, r)
			}
			return to
		})
		return nil
	case "SUBSCRIBE", "UNSUBSCRIBE":
		c.subscribe(name == "SUBSCRIBE", args[1:])
		return nil
	case "PING":
		if len(c.channels) > 0 { // a subscriber gets it in another form
			c.push("pong", strings.Join(args[1:], ""))
			return nil
		}
	}
	if c.multi {
		if !known(name) {
			c.broken = true
			return c.answer(failure("ERR unknown command '%s'", args[0]))
		}
		c.queued = append(c.queued, args)
		return c.answer(status("QUEUED"))
	}
	replies, kept := c.redis.execute([][]string{args})
	if err := kept.wait(); err != nil {
		return err
	}
	return c.answer(replies[0])
}

func (c *conn) answer(v lua.LValue) error {
	c.send(func(to []byte) []byte { return reply(to, v) })
	return nil
}

// subscribe subscribes to channels, or unsubscribes from them.
func (c *conn) subscribe(begin bool, channels []string) {
	r := c.redis
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, channel := range channels {
		kind := "subscribe"
		if begin {
			c.channels[channel] = struct{}{}
			if r.heard[channel] == nil {
				r.heard[channel] = map[*conn]struct{}{}
			}
			r.heard[channel][c] = struct{}{}
		} else {
			kind = "unsubscribe"
			c.leave(channel)
		}
		n := len(c.channels)
		c.send(func(to []byte) []byte {
			return header(bulk(bulk(header(to, '*', 3), kind), channel), ':', n)
		})
	}
}

// leave unsubscribes from a channel. redis.mu is held.
func (c *conn) leave(channel string) {
	delete(c.channels, channel)
	if all := c.redis.heard[channel]; all != nil {
		if delete(all, c); len(all) == 0 {
			delete(c.redis.heard, channel)
		}
	}
}

// The protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/

var errProtocol = errors.New("protocol error")

const (
	mostArguments = 1 << 20
	mostBytes     = 512 << 20
)

func readCommand(in *bufio.Reader) ([]string, error) {
	n, err := readLength(in, '*', mostArguments)
	if err != nil {
		return nil, err
	}
	if n < 1 {
		return nil, errProtocol
	}
	args := make([]string, n)
	for i := range args {
		size, err := readLength(in, '$', mostBytes)
		if err != nil {
			return nil, err
		}
		text := make([]byte, size)
		if _, err := io.ReadFull(in, text); err != nil {
			return nil, err
		}
		if _, err := in.Discard(2); err != nil {
			return nil, err
		}
		args[i] = string(text)
	}
	return args, nil
}

func readLength(in *bufio.Reader, kind byte, most int) (int, error) {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return 0, err
	}
	if len(line) < 3 || line[0] != kind {
		return 0, errProtocol
	}
	n := 0
	for _, c := range line[1 : len(line)-2] {
		if c < '0' || c > '9' || n > most {
			return 0, errProtocol
		}
		n = 10*n + int(c-'0')
	}
	if n > most {
		return 0, fmt.Errorf("%w: too long", errProtocol)
	}
	return n, nil
}

func header(to []byte, kind byte, n int) []byte {
	return append(strconv.AppendInt(append(to, kind), int64(n), 10), "\r\n"...)
}

func bulk(to []byte, text string) []byte {
	return append(append(header(to, '$', len(text)), text...), "\r\n"...)
}

// reply appends the reply that Redis would make from a Lua value.
func reply(to []byte, v lua.LValue) []byte {
	switch v := v.(type) {
	case lua.LString:
		return bulk(to, string(v))
	case lua.LNumber:
		return header(to, ':', int(v))
	case lua.LBool:
		if v {
			return header(to, ':', 1)
		}
	case *lua.LTable:
		if text, ok := v.RawGetString("err").(lua.LString); ok {
			return append(append(append(to, '-'), oneLine(string(text))...), "\r\n"...)
		}
		if text, ok := v.RawGetString("ok").(lua.LString); ok {
			return append(append(append(to, '+'), text...), "\r\n"...)
		}
		n := 0
		for v.RawGetInt(n+1) != lua.LNil {
			n++
		}
		to = header(to, '*', n)
		for i := range n {
			to = reply(to, v.RawGetInt(i+1))
		}
		return to
	}
	return append(to, "$-1\r\n"...)
}
