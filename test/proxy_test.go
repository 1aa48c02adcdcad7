package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"gapless/store/storetest"
)

// These tests run the real proxies with the configurations in deploy/. Only the addresses and the time for a reload
// differ.

// proxy is a running proxy in front of three nodes.
type proxy struct {
	t      *testing.T
	addr   string
	cmd    *exec.Cmd
	log    buffer
	exited chan struct{}
	reload func()
	ca     string // the file of the authority that issued its certificate
}

// proxies contains a function that runs each proxy.
var proxies = map[string]func(t *testing.T, nodes []string) *proxy{
	"nginx":                       func(t *testing.T, nodes []string) *proxy { return nginx(t, nodes, false) },
	"nginx with TLS, over HTTP/2": func(t *testing.T, nodes []string) *proxy { return nginx(t, nodes, true) },
	"haproxy": func(t *testing.T, nodes []string) *proxy {
		p := &proxy{t: t, addr: freeAddr(t)}
		conf := p.conf("deploy/haproxy/haproxy.cfg", nodes, "bind :80", "bind "+p.addr, "hard-stop-after 30s", "hard-stop-after 1s", "maxconn 20000", "maxconn 2000")
		p.run("haproxy", "-W", "-db", "-f", conf)
		p.reload = func() { p.signal(syscall.SIGUSR2) }
		return p
	},
	"caddy": func(t *testing.T, nodes []string) *proxy {
		p, admin := &proxy{t: t, addr: freeAddr(t)}, freeAddr(t)
		_, port, _ := strings.Cut(p.addr, ":")
		conf := p.conf("deploy/caddy/Caddyfile", nodes, "\n:80 {", "\n:"+port+" {\n\tbind 127.0.0.1", "grace_period 30s", "grace_period 1s\n\tadmin "+admin)
		p.run("caddy", "run", "--config", conf, "--adapter", "caddyfile")
		p.reload = func() {
			cmd := exec.Command("caddy", "reload", "--config", conf, "--adapter", "caddyfile", "--address", admin, "--force")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("reload caddy: %v\n%s", err, out)
			}
		}
		return p
	},
}

func nginx(t *testing.T, nodes []string, secure bool, more ...string) *proxy {
	t.Helper()
	p := &proxy{t: t, addr: freeAddr(t)}
	changes := []string{"worker_shutdown_timeout 30s", "worker_shutdown_timeout 1s", "fail_timeout=5s", "fail_timeout=1s", "listen 80;", "listen " + p.addr + ";",
		"worker_rlimit_nofile 65536;", "worker_rlimit_nofile 4096;", "worker_connections 16384;", "worker_connections 1024;",
		"http {", "http {\naccess_log off;\n" + nginxPaths}
	if secure {
		authority := storetest.NewAuthority(t)
		p.ca = authority.File
		cert, key := authority.Issue("127.0.0.1")
		changes = append(changes, "listen "+p.addr+";", "", "#tls ", "", "listen 443", "listen "+p.addr, "/etc/nginx/tls/tls.crt", cert, "/etc/nginx/tls/tls.key", key)
		w := way{tls: authority.Config(), h2: true}
		w.tls.Certificates = nil
		w.client = &http.Client{Transport: w.transport(&net.Dialer{}), Timeout: exchange}
		ways.Store(p.addr, w)
		t.Cleanup(func() { ways.Delete(p.addr) })
	}
	p.runNginx(p.conf("deploy/nginx/nginx.conf", nodes, append(more, changes...)...))
	return p
}

// nginxPaths makes nginx write into its own directory.
const nginxPaths = "client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;\n"

func (p *proxy) runNginx(conf string) {
	p.run("nginx", "-p", filepath.Dir(conf), "-e", "stderr", "-c", conf, "-g", "daemon off; pid nginx.pid;")
	p.reload = func() { p.signal(syscall.SIGHUP) }
}

func freeAddr(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", storetest.FreePort(t))
}

// conf returns a copy of a file of deploy/ with the nodes' addresses and other changes. Every change must match.
func (p *proxy) conf(file string, nodes []string, changes ...string) string {
	p.t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		p.t.Fatal(err)
	}
	for i, addr := range nodes {
		changes = append(changes, fmt.Sprint("127.0.0.1:", 8081+i), addr)
	}
	text := string(b)
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(text, changes[i]) {
			p.t.Fatalf("%s has no %q", file, changes[i])
		}
		text = strings.ReplaceAll(text, changes[i], changes[i+1])
	}
	file = filepath.Join(p.t.TempDir(), filepath.Base(file))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return file
}

func (p *proxy) run(name string, args ...string) {
	p.t.Helper()
	p.exited = make(chan struct{})
	p.cmd = exec.Command(name, args...)
	dir := p.t.TempDir()
	p.cmd.Dir, p.cmd.Env = dir, append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	if p.cmd.Err != nil { // Debian installs them in a directory that only root searches
		if path := "/usr/sbin/" + name; p.cmd.Path != path {
			p.cmd.Path, p.cmd.Err = path, nil
		}
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := p.cmd.Start(); err != nil {
		p.t.Fatalf("start %s: %v (make test installs it)", name, err)
	}
	go func() { // ends with the process, which cleanup ends
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	p.t.Cleanup(func() {
		p.signal(syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(patience):
			_ = p.cmd.Process.Kill()
			<-p.exited
		}
		if p.t.Failed() {
			log := p.log.String()
			p.t.Logf("log of %s:\n%s", name, log[max(0, len(log)-4<<10):])
		}
	})
}

func (p *proxy) signal(s os.Signal) { _ = p.cmd.Process.Signal(s) }

// front returns the proxy as a node for the tests.
func (p *proxy) front() *node {
	n := &node{t: p.t, addr: p.addr, scheme: "http", http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}, Timeout: exchange}}
	if w, ok := ways.Load(p.addr); ok {
		n.scheme, n.http = w.(way).scheme(), w.(way).client
	}
	eventually(p.t, "the proxy serves", func() bool {
		select {
		case <-p.exited:
			p.t.Fatalf("the proxy ended at once: %s", p.log.String())
		default:
		}
		return n.get("/readyz").status == http.StatusOK
	})
	return n
}

// Behind each proxy, with round robin and without sticky sessions, all promises hold.
func TestProxy_viewersBehindARealOneLoseNothing(t *testing.T) {
	t.Parallel()
	for name, run := range proxies {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := storetest.Redis(t)
			args := []string{"-redis", redis.URL(), "-heartbeat", "200ms"}
			all := nodes(t, 3, redis, args...)
			var addrs []string
			for _, n := range all {
				addrs = append(addrs, n.addr)
			}
			p := run(t, addrs)
			front := p.front()
			t.Run("all comes at once", func(t *testing.T) { atOnce(t, front) })
			t.Run("nodes are killed and drained, the proxy is reloaded", func(t *testing.T) {
				g := gapcheck{nodes: []*node{front}, redis: redis, chunks: gapChunks / 2, produce: bySlowPosts, ended: true, proxied: true}
				g.client.Transport = front.http.Transport
				// Caddy before 2.8 (Debian has 2.6) turns a broken response from a node into a clean end.
				g.patient = name == "caddy"
				g.upset(t, p, all, args...)
				if name != "caddy" { // it responds to one or two calls with 502 during a reload
					defer asking(t, front)()
				}
				g.run(t)
			})
			t.Run("no node is there", func(t *testing.T) {
				for _, n := range all {
					n.kill()
				}
				eventually(t, "streams are told to come back", func() bool {
					a := front.get("/v1/sessions/x/stream")
					return a.status == http.StatusOK && a.header.Get("Content-Type") == "text/event-stream" && a.body == ":\nretry: 2000\n\n"
				})
				if a := front.get("/v1/sessions/x"); a.status/100 != 5 {
					t.Errorf("other calls are answered with %d %s", a.status, a.body)
				}
				if a := front.get("/metrics"); a.status != http.StatusNotFound {
					t.Errorf("strangers see metrics: %d", a.status)
				}
			})
		})
	}
}

// atOnce checks the latency in both directions through a proxy: a viewer sees a line of an upload before the next is
// sent, and heartbeats come if nothing else does.
func atOnce(t *testing.T, front *node) {
	session := newID()
	v := &viewer{session: session}
	ctx, cancel := context.WithCancel(deadline(t))
	wait := background(t, func() { v.connect(ctx, front.addr, nil) })
	eventually(t, "the stream has begun", func() bool { return v.status.Load() == http.StatusOK })
	lines, answered := upload(t, front, session)
	for i := range 5 {
		fmt.Fprintf(lines, "{\"content\":\"%d\"}\n", i)
		eventually(t, "the line is seen", func() bool { return v.seen.Load() == int64(i+1) })
	}
	before := v.beats.Load()
	eventually(t, "heartbeats pass", func() bool { return v.beats.Load() > before+2 })
	_ = lines.(io.Closer).Close()
	if a := <-answered; a.status != http.StatusCreated {
		t.Errorf("the upload: %d %s (%v)", a.status, a.body, a.err)
	}
	cancel()
	wait()
	if v.connections != 1 || len(v.faults) > 0 {
		t.Errorf("%d connections, %v", v.connections, v.faults)
	}
}

// bySlowPosts appends one chunk per request, with retries and numbers, for a few seconds in all.
func bySlowPosts(ctx context.Context, g *gapcheck, session string, count int) (map[int64]string, error) {
	p, acks := numbered{addr: func() string { return g.any().addr }, client: &g.client, session: session}, map[int64]string{}
	for i := 1; i <= count; i++ {
		content := text(session, i)
		b, err := json.Marshal(map[string]string{"content": content})
		if err != nil {
			return acks, err
		}
		s, err := p.post(ctx, "application/json", 1, func() io.Reader { return bytes.NewReader(b) }, i == count)
		if err != nil {
			return acks, err
		}
		acks[s.First] = content
		pause(ctx, rand.N(150*time.Millisecond))
	}
	return acks, nil
}

// asking makes repeatable calls, one after the other. The proxy retries them at another node if necessary, so none of
// them gets an error of the proxy. stop fails the test on an error, or if too few calls were made.
func asking(t *testing.T, front *node) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	calls, failed := 0, map[int]int{}
	wait := background(t, func() {
		for ; ctx.Err() == nil; calls++ {
			if a := front.get("/healthz"); a.err == nil && a.status != http.StatusOK {
				failed[a.status]++
			}
			pause(ctx, 2*time.Millisecond)
		}
	})
	t.Cleanup(cancel)
	return func() {
		cancel()
		if wait(); len(failed) > 0 || calls < 100 {
			t.Errorf("of %d calls, these were answered with an error: %v", calls, failed)
		}
	}
}

// upset repeatedly kills a node, drains another, and reloads the proxy, while viewers are connected.
func (g *gapcheck) upset(t *testing.T, p *proxy, all []*node, args ...string) {
	ctx, cancel := context.WithCancel(t.Context())
	rounds := 0
	again := func(i int) {
		all[i] = launch(t, append(args, "-listen", all[i].addr)...)
		all[i].waitReady()
	}
	wait := background(t, func() {
		for i := 0; ctx.Err() == nil; i = (i + 2) % len(all) {
			pause(ctx, 500*time.Millisecond)
			all[i].kill()
			again(i)
			pause(ctx, 1200*time.Millisecond) // a proxy checks a failed node again after a second
			drained := (i + 1) % len(all)
			all[drained].terminate()
			<-all[drained].exited
			again(drained)
			p.reload()
			pause(ctx, 1200*time.Millisecond)
			rounds++
		}
	})
	g.calm = func() {
		cancel()
		if wait(); rounds < 1 {
			t.Error("nothing has happened")
		}
	}
	t.Cleanup(cancel)
}
