// Package storetest helps tests of several packages that use a store. It starts real Redis servers as they run in
// production, and provides a log on fake time that fails in every way that a real one can. It also defines how long
// tests wait (Patience).
package storetest

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Server is the test's own redis-server, on a free port of loopback.
type Server struct {
	*redis.Client // for direct commands of the test

	t    testing.TB
	addr string
	args []string
	ping func(ctx context.Context) error // checks whether it replies

	mu  sync.Mutex
	cmd *exec.Cmd
	out bytes.Buffer
}

// Redis starts a redis-server that keeps nothing on disk, with optional further arguments, and stops it when the test
// ends. It fails the test if redis-server is not installed.
func Redis(t testing.TB, args ...string) *Server {
	t.Helper()
	return redisAt(t, FreePort(t), nil, args...)
}

// redisAt starts a redis-server on a port. security is the client's configuration for a server over TLS.
func redisAt(t testing.TB, port int, security *tls.Config, args ...string) *Server {
	t.Helper()
	if testing.Short() {
		t.Skip("it needs a redis-server: -short starts no programs")
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	own := []string{"--port", strconv.Itoa(port)}
	if security != nil {
		own = []string{"--port", "0", "--tls-port", strconv.Itoa(port)}
	}
	s := &Server{t: t, addr: addr, args: append(append(own,
		"--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", t.TempDir(), "--loglevel", "warning"), args...)}
	opt := &redis.Options{Addr: addr, MaxRetries: -1, TLSConfig: security}
	for i, arg := range args {
		if arg == "--requirepass" {
			opt.Password = args[i+1]
		}
	}
	opt.ReadTimeout, opt.WriteTimeout = Patience, Patience // the machine may be busy
	s.Client = redis.NewClient(opt)
	s.ping = func(ctx context.Context) error { return s.Client.Ping(ctx).Err() }
	t.Cleanup(func() {
		_ = s.Client.Close()
		s.Kill()
	})
	s.Start()
	return s
}

// URL returns the value for -redis.
func (s *Server) URL() string { return "redis://" + s.addr }

// Addr returns the server's address.
func (s *Server) Addr() string { return s.addr }

// Start starts the server, or restarts it after Kill, and waits until it replies.
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
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for s.ping(ctx) != nil {
		if ctx.Err() != nil {
			s.t.Fatalf("redis-server does not answer:\n%s", &s.out)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// StartAsReplica starts an old master as a replica of the new one. (If it started empty, and as a master for a moment,
// it would accept writes.)
func (s *Server) StartAsReplica(of *Server) {
	s.t.Helper()
	_, port, _ := strings.Cut(of.addr, ":")
	s.args = append(s.args, "--replicaof", "127.0.0.1 "+port)
	s.Start()
	synced(s.t, s)
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

// Signal sends a signal, such as SIGSTOP, which makes the server silent.
func (s *Server) Signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(sig)
	}
}

// FreePort returns a port on which nobody listens. The port that a Cluster's servers add for each other is free, too.
func FreePort(t testing.TB) int {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
		if port > 65535-busOffset {
			port -= busOffset
			if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
				continue
			}
			_ = l.Close()
		}
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+busOffset)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("there is no free port")
	return 0
}

const busOffset = 10000

// Watched is a master with replicas, and the Sentinels that watch it.
type Watched struct {
	t         testing.TB
	Servers   []*Server // the first one is the master at first
	Sentinels []*Server
}

// Sentinel starts a master, a replica and three Sentinels.
func Sentinel(t testing.TB, args ...string) *Watched {
	t.Helper()
	w := &Watched{t: t}
	master := Redis(t, args...)
	_, port, _ := strings.Cut(master.addr, ":")
	w.Servers = []*Server{master, Redis(t, append(args, "--replicaof", "127.0.0.1 "+port, "--repl-diskless-sync-delay", "0")...)}
	w.Synced()
	for range 3 {
		at := FreePort(t)
		file := filepath.Join(t.TempDir(), "sentinel.conf")
		conf := fmt.Sprintf("port %d\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 %s 2\nsentinel down-after-milliseconds main 500\n"+
			"sentinel failover-timeout main 3000\nsentinel parallel-syncs main 1\n", at, port)
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
		s := &Server{t: t, addr: fmt.Sprintf("127.0.0.1:%d", at), args: []string{file, "--sentinel"}}
		s.Client = redis.NewClient(&redis.Options{Addr: s.addr, MaxRetries: -1, ReadTimeout: Patience, WriteTimeout: Patience})
		s.ping = func(ctx context.Context) error { return s.Client.Ping(ctx).Err() }
		t.Cleanup(func() { _ = s.Client.Close(); s.Kill() })
		s.Start()
		w.Sentinels = append(w.Sentinels, s)
	}
	w.wait("the Sentinels know each other", func(ctx context.Context) bool {
		for _, s := range w.Sentinels {
			info, err := s.Client.Do(ctx, "SENTINEL", "CKQUORUM", "main").Text()
			if err != nil || !strings.HasPrefix(info, "OK 3 ") {
				return false
			}
			state, err := s.Client.Do(ctx, "SENTINEL", "REPLICAS", "main").Slice()
			if err != nil || len(state) != len(w.Servers)-1 {
				return false
			}
		}
		return true
	})
	return w
}

// URL returns the value for -redis.
func (w *Watched) URL() string {
	var all []string
	for _, s := range w.Sentinels {
		all = append(all, s.addr)
	}
	return "redis+sentinel://" + strings.Join(all, ",") + "/main"
}

// Master returns the server that the Sentinels consider the master.
func (w *Watched) Master() *Server {
	w.t.Helper()
	var master *Server
	w.wait("there is a master", func(ctx context.Context) bool {
		at, err := w.Sentinels[0].Client.Do(ctx, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main").StringSlice()
		for _, s := range w.Servers {
			if err == nil && len(at) == 2 && s.addr == at[0]+":"+at[1] {
				master = s
			}
		}
		return master != nil
	})
	return master
}

// Synced waits until the replicas have all data of the first server.
func (w *Watched) Synced() {
	w.t.Helper()
	for _, s := range w.Servers[1:] {
		synced(w.t, s)
	}
}

func synced(t testing.TB, replica *Server) {
	t.Helper()
	waitFor(t, "the replica is in step", func(ctx context.Context) bool {
		info, err := replica.Client.Info(ctx, "replication").Result()
		return err == nil && strings.Contains(info, "master_link_status:up")
	})
}

func (w *Watched) wait(what string, ok func(ctx context.Context) bool) {
	w.t.Helper()
	waitFor(w.t, what, ok)
}

func waitFor(t testing.TB, what string, ok func(ctx context.Context) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for !ok(ctx) {
		if ctx.Err() != nil {
			t.Fatal("waited in vain: ", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Clustered is a Redis Cluster of three masters with one replica each.
type Clustered struct {
	*redis.ClusterClient
	t       testing.TB
	Servers []*Server // three masters, then their replicas, at first
}

// Cluster starts a Redis Cluster.
func Cluster(t testing.TB, args ...string) *Clustered {
	t.Helper()
	c := &Clustered{t: t}
	var addrs []string
	for range 6 {
		port := FreePort(t)
		s := redisAt(t, port, nil, append(args, "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
			"--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0")...)
		c.Servers, addrs = append(c.Servers, s), append(addrs, s.addr)
	}
	out, err := exec.Command("redis-cli", append(append([]string{"--cluster", "create"}, addrs...), "--cluster-replicas", "1", "--cluster-yes")...).CombinedOutput()
	if err != nil {
		t.Fatalf("make the cluster: %v\n%s", err, out)
	}
	c.ClusterClient = redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs, MaxRetries: -1})
	t.Cleanup(func() { _ = c.ClusterClient.Close() })
	waitFor(t, "the cluster is well", func(ctx context.Context) bool {
		for _, s := range c.Servers {
			info, err := s.Client.ClusterInfo(ctx).Result()
			if err != nil || !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, "cluster_slots_ok:16384") {
				return false
			}
			nodes, err := s.Client.ClusterNodes(ctx).Result()
			if err != nil || strings.Count(nodes, "slave") != 3 {
				return false
			}
		}
		return true
	})
	for _, s := range c.Servers {
		if info, err := s.Client.Info(t.Context(), "replication").Result(); err == nil && strings.Contains(info, "role:slave") {
			synced(t, s)
		}
	}
	return c
}

// URL returns the value for -redis.
func (c *Clustered) URL() string {
	var all []string
	for _, s := range c.Servers {
		all = append(all, s.addr)
	}
	return "redis+cluster://" + strings.Join(all[:3], ",")
}

// At returns the server at an address.
func (c *Clustered) At(addr string) *Server {
	for _, s := range c.Servers {
		if s.addr == addr {
			return s
		}
	}
	c.t.Fatalf("there is no server at %s", addr)
	return nil
}

// MasterOf returns the server that has a key's slot now.
func (c *Clustered) MasterOf(key string) *Server {
	c.t.Helper()
	var found *Server
	waitFor(c.t, "the slot has a master", func(ctx context.Context) bool {
		slot, err := c.anyone(ctx).ClusterKeySlot(ctx, key).Result()
		if err != nil {
			return false
		}
		shards, err := c.anyone(ctx).ClusterShards(ctx).Result()
		if err != nil {
			return false
		}
		for _, shard := range shards {
			if !slices.ContainsFunc(shard.Slots, func(r redis.SlotRange) bool { return r.Start <= slot && slot <= r.End }) {
				continue
			}
			for _, n := range shard.Nodes {
				if n.Role == "master" && n.Health == "online" {
					found = c.At(fmt.Sprintf("%s:%d", n.IP, n.Port))
				}
			}
		}
		return found != nil
	})
	return found
}

func (c *Clustered) anyone(ctx context.Context) *redis.Client {
	for _, s := range c.Servers {
		if s.Client.Ping(ctx).Err() == nil {
			return s.Client
		}
	}
	return c.Servers[0].Client
}

// Move moves a key's slot to another master, as resharding does.
func (c *Clustered) Move(key string) {
	c.t.Helper()
	from := c.MasterOf(key)
	var to *Server
	for _, s := range c.Servers[:3] {
		if s != from {
			to = s
		}
	}
	ctx := c.t.Context()
	slot := int(from.Client.ClusterKeySlot(ctx, key).Val())
	id := func(s *Server) string { return s.Client.Do(ctx, "CLUSTER", "MYID").String()[len("CLUSTER MYID: "):] }
	_, port, _ := strings.Cut(to.addr, ":")
	must := func(err error) {
		c.t.Helper()
		if err != nil {
			c.t.Fatalf("move slot %d: %v", slot, err)
		}
	}
	must(to.Client.Do(ctx, "CLUSTER", "SETSLOT", slot, "IMPORTING", id(from)).Err())
	must(from.Client.Do(ctx, "CLUSTER", "SETSLOT", slot, "MIGRATING", id(to)).Err())
	for {
		keys, err := from.Client.ClusterGetKeysInSlot(ctx, slot, 10).Result()
		must(err)
		if len(keys) == 0 {
			break
		}
		for _, k := range keys { // one by one, so that a session is in two places for a while
			must(from.Client.Migrate(ctx, "127.0.0.1", port, k, 0, Patience).Err())
			time.Sleep(5 * time.Millisecond)
		}
	}
	must(to.Client.Do(ctx, "CLUSTER", "SETSLOT", slot, "NODE", id(to)).Err())
	must(from.Client.Do(ctx, "CLUSTER", "SETSLOT", slot, "NODE", id(to)).Err())
	for _, s := range c.Servers[:3] {
		_ = s.Client.Do(ctx, "CLUSTER", "SETSLOT", slot, "NODE", id(to)).Err()
	}
}
