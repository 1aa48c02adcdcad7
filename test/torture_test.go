package test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2/client"

	"gapless/api/auth/authtest"
	"gapless/store/storetest"
)

// The fault test runs nodes and a Redis, producers and viewers, with random faults from a seed. It records every
// viewer's history and every acknowledged append, and checks them against the promises, by name.
//
//	make torture                          some minutes of faults, and the table
//	make soak                             ten minutes of a few hundred sessions, no faults, memory
//	go test -run TestTorture -v -count=1 ./test -torture.for 3m -torture.seed 7 -torture.tls -torture.auth
//
// A seed determines the faults and their order. The machine determines what they hit.
var (
	tortureFor      = flag.Duration("torture.for", 12*time.Second, "how long the fault test lasts")
	tortureSeed     = flag.Uint64("torture.seed", 0, "what its faults follow from; 0: any")
	tortureNodes    = flag.Int("torture.nodes", 3, "how many nodes it has")
	tortureSessions = flag.Int("torture.sessions", 12, "how many sessions are under way at a time")
	torturePace     = flag.Duration("torture.pace", 20*time.Millisecond, "the longest pause between a producer's chunks")
	tortureTLS      = flag.Bool("torture.tls", false, "everything goes over TLS and HTTP/2")
	tortureEmbedded = flag.Bool("torture.embedded", false, "one node, with the embedded Redis on disk, instead of several on a redis-server")
	tortureAuth     = flag.Bool("torture.auth", false, "everybody has to show a token")
	tortureFaults   = flag.Bool("torture.faults", true, "whether anything happens; without, nodes are the plain program, and their memory is told")
)

// toxiproxyServer is compiled by .ci/setup, which reads this line.
const toxiproxyServer = "github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0"

// toxiproxies starts the proxy between all other programs, which does to connections what networks do.
func toxiproxies(t *testing.T) *toxiproxy.Client {
	t.Helper()
	dir := t.TempDir()
	install := exec.Command("go", "install", toxiproxyServer)
	install.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=")
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("install toxiproxy: %v\n%s", err, out)
	}
	port := fmt.Sprint(storetest.FreePort(t))
	cmd := exec.Command(filepath.Join(dir, "server"), "-host", "127.0.0.1", "-port", port)
	cmd.Env = append(os.Environ(), "LOG_LEVEL=fatal")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	client := toxiproxy.NewClient("127.0.0.1:" + port)
	eventually(t, "toxiproxy answers", func() bool { _, err := client.Proxies(); return err == nil })
	return client
}

// torture is one run.
type torture struct {
	*gapcheck
	t     *testing.T
	rand  *rand.Rand // for the faults
	seed  uint64
	dir   string             // of the embedded Redis; empty: there is a redis-server
	flags []string           // of each node
	token string             // admits every client; empty if none is needed
	links []*toxiproxy.Proxy // between each node and Redis; nil: it is embedded
	doors []*toxiproxy.Proxy // between its clients and each node
	addrs []string           // addresses of the doors

	faults map[string]int
	mu     sync.Mutex
	ended  []*tale
	memory []int // of all nodes, in bytes, every ten seconds
}

// tale records what happened to one session.
type tale struct {
	session  string
	said     []string         // the producer's contents, in order
	acks     map[int64]string // acknowledged contents by number
	viewers  []*viewer
	finished bool
	slowest  time.Duration // from the producer's end until the last viewer had everything
}

func TestTorture(t *testing.T) {
	seed := *tortureSeed
	if seed == 0 {
		seed = rand.Uint64N(1_000_000) + 1
	}
	tt := &torture{
		// A fault may swallow a request, which then never gets a response.
		gapcheck: &gapcheck{client: http.Client{Timeout: 10*time.Second + 50**torturePace}},
		t:        t, seed: seed, rand: rand.New(rand.NewPCG(seed, 1)), faults: map[string]int{},
	}
	count := *tortureNodes
	if *tortureEmbedded {
		count, tt.dir = 1, filepath.Join(t.TempDir(), "data")
		tt.flags = []string{"-history-bytes", "1MiB", "-caller-stored", "0", "-caller-appends", "0"} // for the ballast; no session is as long
	} else {
		// Redis keeps what it acknowledged without help: everything is on disk before it replies.
		tt.redis = storetest.Redis(t, "--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0")
	}
	if *tortureTLS {
		cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
		tt.flags = append(tt.flags, "-tls-cert", cert, "-tls-key", key)
	}
	if *tortureAuth {
		issuer := authtest.New(t)
		tt.flags = append(tt.flags, "-auth", issuer.Source())
		tt.token = token(issuer, 24*time.Hour, authtest.May{"admin": {"*"}})
	}
	proxies := toxiproxies(t)
	proxy := func(name, to string) *toxiproxy.Proxy {
		p, err := proxies.CreateProxy(name, fmt.Sprintf("127.0.0.1:%d", storetest.FreePort(t)), to)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for i := range count {
		if tt.redis != nil {
			tt.links = append(tt.links, proxy(fmt.Sprint("redis", i+1), tt.redis.Addr()))
		}
		program := binary
		if !*tortureFaults {
			program = plainProgram(t)
		}
		n := launchProgram(t, program, tt.args(i)...)
		n.token = tt.token
		tt.nodes = append(tt.nodes, n)
		door := proxy(fmt.Sprint("node", i+1), n.addr)
		tt.doors, tt.addrs = append(tt.doors, door), append(tt.addrs, door.Listen)
		transport := http.DefaultTransport.(*http.Transport)
		if w, ok := ways.Load(n.addr); ok {
			ways.Store(door.Listen, w)
			transport = w.(way).client.Transport.(*http.Transport)
		}
		tt.client.Transport = &bearer{transport, n}
	}
	for _, n := range tt.nodes {
		n.waitReady()
	}
	t.Logf("torture: seed %d, %v, %d nodes, %d sessions at a time", seed, *tortureFor, count, *tortureSessions)

	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	over := time.Now().Add(*tortureFor)
	var wg sync.WaitGroup
	for range *tortureSessions {
		wg.Go(func() {
			for time.Now().Before(over) && ctx.Err() == nil {
				tt.session(ctx)
			}
		})
	}
	calm := make(chan struct{})
	wg.Go(func() {
		if *tortureFaults {
			tt.plague(ctx, over)
		} else {
			pause(ctx, time.Until(over))
		}
		close(calm)
	})
	for at := time.NewTicker(10 * time.Second); ; { // a long run shows its progress
		select {
		case <-at.C:
			tt.mu.Lock()
			if !*tortureFaults {
				bytes := 0
				for _, n := range tt.nodes {
					bytes += rss(t, n.cmd.Process.Pid)
				}
				tt.memory = append(tt.memory, bytes)
			}
			fmt.Fprintf(os.Stderr, "torture: %v left, %d sessions done, %d faults\n", time.Until(over).Round(time.Second), len(tt.ended), tt.count())
			tt.mu.Unlock()
			continue
		case <-calm:
			at.Stop()
		}
		break
	}
	wg.Wait()
	tt.judge()
}

func (tt *torture) args(i int, more ...string) []string {
	url := "embedded:" + tt.dir
	if tt.redis != nil {
		url = "redis://" + tt.links[i].Listen
	}
	return append([]string{"-redis", url, "-node", fmt.Sprint("n", i+1), "-drain", "1s"}, append(slices.Clone(tt.flags), more...)...)
}

// count returns the number of faults. mu must be held.
func (tt *torture) count() (n int) {
	for _, times := range tt.faults {
		n += times
	}
	return n
}

func (tt *torture) door() string { return tt.addrs[rand.IntN(len(tt.addrs))] }

// session runs one log from its first chunk to its end.
func (tt *torture) session(ctx context.Context) {
	s := &tale{session: newID(), acks: map[int64]string{}}
	var wg sync.WaitGroup
	for i := range 3 {
		v := &viewer{session: s.session, token: tt.token, glue: i == 1}
		s.viewers = append(s.viewers, v)
		wg.Go(func() {
			pause(ctx, rand.N(300*time.Millisecond))
			v.follow(ctx, tt.door, func(event) bool { return false })
		})
	}
	// Some viewers also cut their own connections.
	restless := &viewer{session: s.session, token: tt.token}
	s.viewers = append(s.viewers, restless)
	wg.Go(func() {
		for !restless.over && ctx.Err() == nil {
			if how := restless.connect(ctx, tt.door(), func(event) bool { return rand.IntN(30) == 0 }); how == refused || how == aborted {
				pause(ctx, 10*time.Millisecond)
			}
		}
	})
	count := 60 + rand.IntN(200)
	err := tt.produce(ctx, s, count)
	if err != nil && ctx.Err() == nil {
		tt.t.Errorf("produce %s: %v", s.session, err)
	}
	begun := time.Now()
	if err != nil { // no viewer will see an end
		tt.t.Logf("%s was not finished", s.session)
	}
	wg.Wait()
	s.finished, s.slowest = err == nil, time.Since(begun)
	tt.mu.Lock()
	tt.ended = append(tt.ended, s)
	tt.mu.Unlock()
}

// produce appends count chunks, by posts and uploads with numbers, and ends the log. It retries what is not
// acknowledged, at any node.
func (tt *torture) produce(ctx context.Context, s *tale, count int) error {
	p := numbered{addr: tt.door, client: &tt.client, session: s.session}
	for i := 1; i <= count; {
		part := 1
		upload := rand.IntN(3) == 0
		if upload {
			part = min(count-i+1, 5+rand.IntN(40))
		}
		var lines []string
		for k := range part {
			content := text(s.session, i+k)
			b, err := json.Marshal(map[string]string{"content": content})
			if err != nil {
				return err
			}
			s.said, lines = append(s.said, content), append(lines, string(b))
		}
		kind, body := "application/json", func() io.Reader { return strings.NewReader(lines[0]) }
		if upload {
			kind, body = "application/x-ndjson", func() io.Reader {
				r, w := io.Pipe()
				go func() { // ends with the body, which the request closes
					for _, line := range lines {
						if _, err := io.WriteString(w, line+"\n"); err != nil {
							return
						}
						pause(ctx, rand.N(*torturePace))
					}
					_ = w.Close()
				}()
				return r
			}
		}
		stored, err := p.post(ctx, kind, part, body, i+part > count)
		if err != nil {
			return err
		}
		for k := range part {
			s.acks[stored.First+int64(k)] = s.said[i+k-1]
		}
		i += part
		pause(ctx, rand.N(*torturePace))
	}
	return nil
}

// plague causes one fault after the other in nodes, Redis and the network, until the time is over. Then it repairs
// everything.
func (tt *torture) plague(ctx context.Context, over time.Time) {
	all := map[string]func(){
		"node killed":  func() { tt.restart(func(n *node) { n.kill() }) },
		"node drained": func() { tt.restart(func(n *node) { n.terminate(); <-n.exited }) },
		"node paused":  func() { tt.freeze(tt.node(tt.rand.IntN(len(tt.nodes)))) },
		"redis killed": func() { tt.redis.Kill(); pause(ctx, tt.time(500)); tt.redis.Start() },
		"redis paused": func() { tt.redis.Signal(syscall.SIGSTOP); pause(ctx, tt.time(1500)); tt.redis.Signal(syscall.SIGCONT) },
		"redis client pause": func() {
			tt.redis.Do(ctx, "CLIENT", "PAUSE", tt.time(1500).Milliseconds(), "ALL")
			pause(ctx, time.Second)
		},
		"pub/sub killed": func() { tt.redis.ClientKillByFilter(ctx, "TYPE", "pubsub") },
		"redis link black": func() {
			tt.toxic(tt.links[tt.rand.IntN(len(tt.links))], black, toxiproxy.Attributes{"timeout": 0}, tt.time(3000))
		},
		"redis link slow": func() {
			tt.toxic(tt.links[tt.rand.IntN(len(tt.links))], "latency", toxiproxy.Attributes{"latency": 60, "jitter": 50}, tt.time(1500))
		},
		"clients' link slow": func() {
			tt.toxic(tt.doors[tt.rand.IntN(len(tt.doors))], "bandwidth", toxiproxy.Attributes{"rate": 20}, tt.time(1500))
		},
		"clients' link black": func() {
			tt.toxic(tt.doors[tt.rand.IntN(len(tt.doors))], black, toxiproxy.Attributes{"timeout": 0}, tt.time(1500))
		},
		"clients' link broken": func() { tt.cut(tt.doors[tt.rand.IntN(len(tt.doors))]) },
		"redis link broken":    func() { tt.cut(tt.links[tt.rand.IntN(len(tt.links))]) },
	}
	if tt.redis == nil {
		maps.DeleteFunc(all, func(name string, _ func()) bool {
			return strings.Contains(name, "redis") || strings.Contains(name, "pub/sub")
		})
		all["node killed while it rewrites its journal"] = func() { tt.restart(func(n *node) { tt.ballast(ctx, n); n.kill() }) }
	}
	names := slices.Sorted(maps.Keys(all))
	for order := []string(nil); time.Now().Before(over) && ctx.Err() == nil; {
		if len(order) == 0 { // every fault once, in random order, before any comes again
			order = slices.Clone(names)
			tt.rand.Shuffle(len(order), func(i, k int) { order[i], order[k] = order[k], order[i] })
		}
		name := order[0]
		order = order[1:]
		tt.mu.Lock()
		tt.faults[name]++
		tt.mu.Unlock()
		all[name]()
		pause(ctx, tt.time(400))
	}
}

// time returns a random time of at most most ms, from the seed.
func (tt *torture) time(most int) time.Duration {
	return time.Duration(1+tt.rand.IntN(most)) * time.Millisecond
}

// restart ends a node in some way and starts it again at its address.
func (tt *torture) restart(end func(*node)) {
	i := tt.rand.IntN(len(tt.nodes))
	old := tt.node(i)
	end(old)
	again := launch(tt.t, tt.args(i, "-listen", old.addr)...)
	again.token = tt.token
	tt.mu.Lock()
	defer tt.mu.Unlock()
	tt.gapcheck.mu.Lock()
	tt.nodes[i] = again
	tt.gapcheck.mu.Unlock()
}

// ballast makes a node's journal worth rewriting, and returns at some moment while it is rewritten.
func (tt *torture) ballast(ctx context.Context, n *node) {
	chunk := `{"content":"` + strings.Repeat("b", 60_000) + `"}`
	body := "[" + strings.Repeat(chunk+",", 7) + chunk + "]"
	for range 80 { // 38 MB
		n.do(ctx, "POST", "/v1/sessions/ballast/chunks", "application/json", strings.NewReader(body))
	}
	pause(ctx, tt.time(50))
}

// history returns the log that is left.
func (tt *torture) history(session string) []string {
	if tt.redis != nil {
		return history(tt.t, tt.redis, session)
	}
	return tt.node(0).pages(tt.t, session)
}

func (tt *torture) freeze(n *node) {
	_ = n.cmd.Process.Signal(syscall.SIGSTOP)
	pause(tt.t.Context(), tt.time(1500))
	_ = n.cmd.Process.Signal(syscall.SIGCONT)
}

// toxic adds a toxic to a proxy's connections for a while, in both directions.
func (tt *torture) toxic(p *toxiproxy.Proxy, kind string, attributes toxiproxy.Attributes, d time.Duration) {
	for _, stream := range []string{"upstream", "downstream"} {
		if _, err := p.AddToxic(stream, kind, stream, 1, attributes); err != nil {
			tt.t.Errorf("%s: %v", kind, err)
		}
	}
	pause(tt.t.Context(), d)
	if kind == black { // what was sent meanwhile is lost, so no connection may continue
		tt.cut(p)
	}
	for _, stream := range []string{"upstream", "downstream"} {
		if err := p.RemoveToxic(stream); err != nil {
			tt.t.Errorf("%s: %v", kind, err)
		}
	}
}

// black keeps connections open, but lets nothing through.
const black = "timeout"

// cut breaks a proxy's connections. It accepts new ones.
func (tt *torture) cut(p *toxiproxy.Proxy) {
	if err := p.Disable(); err != nil {
		tt.t.Errorf("disable %s: %v", p.Name, err)
	}
	for range 200 {
		if p.Enable() == nil {
			return
		}
		time.Sleep(10 * time.Millisecond) // its port is not free yet
	}
	tt.t.Errorf("the proxy of %s does not start", p.Name)
}

// judge checks the records against the promises.
func (tt *torture) judge() {
	t := tt.t
	type verdict struct {
		name, checked string
		count, bad    int
	}
	var ordered, complete, durable, once, resumable, ends verdict
	ordered.name, ordered.checked = "Ordered, Unique", "chunks that viewers were given"
	complete.name, complete.checked = "Complete", "viewers, against the list in Redis"
	durable.name, durable.checked = "Durable", "acknowledged chunks"
	once.name, once.checked = "Once", "chunks that producers said"
	resumable.name, resumable.checked = "Resumable", "connections"
	ends.name, ends.checked = "Ends", "viewers of ended logs"
	var slowest time.Duration
	resets, chunks := 0, 0
	for _, s := range tt.ended {
		list := tt.history(s.session)
		chunks += len(list)
		contents := map[string]int{}
		at := make([]string, len(list))
		for i, element := range list {
			var c struct{ Type, Content string }
			if err := json.Unmarshal([]byte(element), &c); err != nil {
				t.Errorf("%s: %v: %s", s.session, err, element)
			}
			at[i] = c.Content
			if c.Type == "delta" {
				contents[c.Content]++
			}
		}
		for seq, content := range s.acks {
			durable.count++
			if seq < 1 || seq > int64(len(at)) || at[seq-1] != content {
				durable.bad++
			}
		}
		if s.finished {
			for _, content := range s.said {
				once.count++
				if contents[content] != 1 {
					once.bad++
				}
			}
			if len(contents) != len(s.said) {
				once.bad++
			}
		}
		for _, v := range s.viewers {
			ordered.count += len(v.chunks)
			ordered.bad += len(v.faults)
			for _, f := range v.faults {
				t.Errorf("viewer of %s: %s", s.session, f)
			}
			complete.count++
			if !slices.Equal(v.chunks, list) {
				complete.bad++
				t.Errorf("viewer of %s has %d chunks, the list %d", s.session, len(v.chunks), len(list))
			}
			resumable.count += v.connections
			for i, w := range v.welcomes {
				if i > 0 && w.Cursor < v.welcomes[i-1].Cursor {
					resumable.bad++
				}
			}
			resets += len(v.resets)
			ends.count++
			if !v.over {
				ends.bad++
			}
		}
		slowest = max(slowest, s.slowest)
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\nseed %d, %v, %d nodes: %d sessions, %d chunks in their logs, %d resets\n\n", tt.seed, *tortureFor, len(tt.nodes), len(tt.ended), chunks, resets)
	fmt.Fprintln(w, "promise\tchecked\t\tviolations")
	for _, v := range []verdict{ordered, complete, durable, once, resumable, ends} {
		fmt.Fprintf(w, "%s\t%d\t%s\t%d\n", v.name, v.count, v.checked, v.bad)
		if v.bad > 0 {
			t.Errorf("%s: %d violations", v.name, v.bad)
		}
		if v.count == 0 {
			t.Errorf("%s: nothing was checked", v.name)
		}
	}
	if third := len(tt.memory) / 3; third > 0 {
		middle := func(part []int) int { slices.Sort(part); return part[len(part)/2] >> 20 }
		fmt.Fprintf(w, "\nmemory of the nodes: %d MiB in the second third, %d MiB in the last\n", middle(tt.memory[third:2*third]), middle(tt.memory[2*third:]))
	}
	fmt.Fprintln(w, "\nfault\ttimes")
	for _, name := range slices.Sorted(maps.Keys(tt.faults)) {
		fmt.Fprintf(w, "%s\t%d\n", name, tt.faults[name])
	}
	fmt.Fprintf(w, "\nthe longest time from a producer's end to a viewer's: %v\n", slowest.Round(time.Millisecond))
	w.Flush()
	t.Log(b.String())
	if resets > 0 {
		t.Errorf("%d resets: Redis lost nothing", resets)
	}
}
