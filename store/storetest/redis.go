// Package storetest holds what tests of several packages need of a store: a real Redis,
// and a log on fake time that fails in every way that a real one can.
package storetest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Server is a redis-server of the test's own, on a free port of loopback.
type Server struct {
	*redis.Client // for what a test does to it by hand

	t    testing.TB
	addr string
	args []string

	mu  sync.Mutex
	cmd *exec.Cmd
	out bytes.Buffer
}

// Redis starts a redis-server that keeps nothing on disk, with further arguments if
// need be, and stops it when the test ends. Its absence fails the test.
func Redis(t testing.TB, args ...string) *Server {
	t.Helper()
	port := FreePort(t)
	s := &Server{t: t, addr: fmt.Sprintf("127.0.0.1:%d", port), args: append([]string{
		"--port", strconv.Itoa(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", t.TempDir(), "--loglevel", "warning",
	}, args...)}
	s.Client = redis.NewClient(&redis.Options{Addr: s.addr, MaxRetries: -1})
	t.Cleanup(func() {
		_ = s.Client.Close()
		s.Kill()
	})
	s.Start()
	return s
}

// URL is what -redis takes.
func (s *Server) URL() string { return "redis://" + s.addr }

// Addr is its address.
func (s *Server) Addr() string { return s.addr }

// Start starts the server, again after Kill, and waits until it answers.
func (s *Server) Start() {
	s.t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		s.t.Fatalf("redis-server is not installed: make test installs it (%v)", err)
	}
	s.mu.Lock()
	s.cmd = exec.Command(path, s.args...)
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	err = s.cmd.Start()
	s.mu.Unlock()
	if err != nil {
		s.t.Fatalf("start redis-server: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for s.Client.Ping(ctx).Err() != nil {
		if ctx.Err() != nil {
			s.t.Fatalf("redis-server does not answer:\n%s", &s.out)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Kill ends the server without letting it save anything.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

// Signal sends a signal, such as SIGSTOP, which makes a peer that is silent.
func (s *Server) Signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.cmd.Process.Signal(sig)
}

// FreePort is a port that nobody listens on.
func FreePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
