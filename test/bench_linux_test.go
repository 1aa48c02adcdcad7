package test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"gapless/store/storetest"
)

// The scenarios measure how fast the built program is, next to a floor that does only the unavoidable work
// (bench_floor_linux_test.go). Machines differ, and so do their hours, so what counts is the ratio of the two,
// which are measured in turn. Server and Redis run on one core, the load generator (bench_load_linux_test.go) on
// another. Each figure is a median of a few runs. Every viewer checks every message: a message that is lost, doubled or
// out of order fails the run.
//
//	make bench                         the benchmarks of the packages, all scenarios, and the table
//	make bench RUNS=1 ONLY=fanout      the scenarios whose name contains fanout, once
//
// Connections over HTTP/2 and TLS cannot be taken over. Their figures are next to the others, without a goal.
var scenarioRuns = flag.Int("scenarios.runs", 3, "how often each scenario is measured; its figure is the median")

// scenariosOn is where ours keeps its logs in the scenarios. The floor is on a redis-server, always.
var scenariosOn = flag.String("scenarios.on", "redis", "where ours keeps its logs: redis, aof (a redis-server with appendfsync always), embedded, or disk (embedded:DIR)")

// scenario is a situation, and what is measured in it.
type scenario struct {
	name     string
	args     []string // of the server
	oursOnly bool     // the floor does not take part
	run      func(r *rig) []float64
	rows     []row // the rows of run's result, in this order
}

// row is a line of the table.
type row struct {
	title, unit string
	goal        goal
}

// goal is the target of a figure. It is printed, and fails nothing: only lost messages do.
type goal struct {
	text    string
	met     func(floor, ours float64) bool
	ofFloor bool // it needs the floor's figure
}

func atLeast(part float64) goal {
	return goal{fmt.Sprintf("≥ %g × F", part), func(floor, ours float64) bool { return ours >= part*floor }, true}
}

func atMost(part float64) goal {
	return goal{fmt.Sprintf("≤ %g × F", part), func(floor, ours float64) bool { return ours <= part*floor }, true}
}

func upTo(most float64) goal {
	return goal{fmt.Sprintf("≤ %g", most), func(_, ours float64) bool { return ours <= most }, false}
}

var flat = goal{"0.8 to 1.2", func(_, ours float64) bool { return ours >= 0.8 && ours <= 1.2 }, false}

const (
	perCPU = "thousand events a CPU-second"
	each   = "µs of CPU an event"
	times  = "times"
)

var scenarios = []scenario{
	{name: "fanout-one", run: fanOut(1), rows: []row{{"fan-out to 1,000 viewers, one message in flight", perCPU, atLeast(0.95)}}},
	{name: "fanout-many", run: fanOut(64), rows: []row{{"the same, up to 64 in flight", perCPU, atLeast(1)}}},
	{name: "http2", args: []string{"-h2c"}, oursOnly: true, run: fanOutHTTP2, rows: []row{
		{"fan-out to 1,000 viewers over HTTP/2 (h2c), one in flight", perCPU, goal{}},
		{"the same with TLS", perCPU, goal{}},
		{"the same over HTTP/1.1 in the plain way (-plain)", perCPU, goal{}},
	}},
	{name: "latency", run: func(r *rig) []float64 { o := r.load(hundred(r)); return []float64{o.P50, o.P99} }, rows: []row{
		{"100 viewers at 100 messages a second, p50", "ms", goal{}},
		{"p99", "ms", atMost(1.2)},
	}},
	{name: "idle-sessions", run: func(r *rig) []float64 { return idle(r, r.few(10_000), 1) }, rows: []row{{"memory a viewer, idle: 10,000 sessions × 1", "KB", upTo(7)}}},
	{name: "idle-viewers", run: func(r *rig) []float64 { return idle(r, 1, r.few(10_000)) }, rows: []row{{"one session × 10,000", "KB", upTo(6)}}},
	{name: "sessions", run: sessionsWithin, rows: []row{
		{"sessions at 20 chunks a second each, p99 < 100 ms: a POST a chunk", "sessions", atLeast(0.9)},
		{"an upload a session (F: a POST a chunk)", "sessions", atLeast(3)},
	}},
	{name: "resume-warm", args: []string{"-window", "64MiB"}, run: resume(5, true), rows: []row{{"a viewer gets 50,000 chunks from memory", "ms", upTo(12)}}},
	{name: "resume-cold", oursOnly: true, run: resume(3, false), rows: []row{{"from Redis", "ms", upTo(30)}}},
	{name: "storm", args: []string{"-reconcile", "10s"}, run: storm, rows: []row{
		{"1,000 viewers at once, 500 chunks each, of a log not yet in memory (F: in memory)", "ms", atMost(2)},
		{"reads of the log for that", "reads", upTo(1)},
	}},
	{name: "publish", run: publish, rows: []row{{"appends by POST, 16 at once, each to its session", "thousand a second", atLeast(0.8)}}},
	{name: "kill", oursOnly: true, run: kill, rows: []row{
		{"100 viewers at 100 a second, CLIENT KILL TYPE pubsub each second: p50 with it ÷ without", times, upTo(1.2)},
		{"p99", "ms", upTo(2000)}, // -reconcile
	}},
	{name: "growth-viewers", run: growthInViewers, rows: []row{
		{"fan-out, one in flight, to 100 viewers", each, goal{}},
		{"to 1,000", each, goal{}},
		{"to 10,000", each, goal{}},
		{"10,000 ÷ 100", times, flat},
	}},
	{name: "growth-log", run: growthInLog, rows: []row{
		{"append to a log of 100 chunks", "µs of CPU", goal{}},
		{"of 50,000", "µs of CPU", goal{}},
		{"50,000 ÷ 100", times, flat},
	}},
}

func fanOut(flight int) func(r *rig) []float64 {
	return func(r *rig) []float64 {
		o := r.load(load{Do: "live", Sessions: 1, Viewers: r.few(1000), Flight: flight, Warm: r.long(500 * time.Millisecond), For: r.long(3 * time.Second)})
		return []float64{ratio(float64(o.Delivered)/1000, o.CPU)}
	}
}

func fanOutHTTP2(r *rig) (all []float64) {
	cert, key := storetest.NewAuthority(r.t).Issue("127.0.0.1")
	for _, way := range []struct {
		do   string
		tls  bool
		args []string
	}{{"http2", false, []string{"-h2c"}}, {"http2", true, []string{"-tls-cert", cert, "-tls-key", key}}, {"live", false, []string{"-plain"}}} {
		r.args = way.args
		r.restart()
		o := r.load(load{Do: way.do, TLS: way.tls, Sessions: 1, Viewers: r.few(1000), Flight: 1, Warm: r.long(500 * time.Millisecond), For: r.long(3 * time.Second)})
		all = append(all, ratio(float64(o.Delivered)/1000, o.CPU))
	}
	return all
}

func hundred(r *rig) load {
	return load{Do: "live", Sessions: 1, Viewers: r.few(100), Rate: 100, Warm: r.long(time.Second), For: r.long(6 * time.Second)}
}

func idle(r *rig, sessions, viewers int) []float64 {
	o := r.load(load{Do: "idle", Sessions: sessions, Viewers: viewers, For: r.long(2 * time.Second)})
	return []float64{float64(o.Memory) / 1000 / float64(sessions*viewers)}
}

func sessionsWithin(r *rig) []float64 {
	posts := r.mostSessions(false)
	if r.floor {
		return []float64{posts, posts}
	}
	return []float64{posts, r.mostSessions(true)}
}

// mostSessions searches for the most sessions whose p99 is below 100 ms. It doubles their number until that fails, and
// then halves the step until it is below a twentieth.
func (r *rig) mostSessions(uploads bool) float64 {
	once := func(n int) (enough, disturbed bool) {
		r.restart() // former sessions have a cost for a while
		o, err := r.try(load{Do: "live", Sessions: n, Viewers: 1, Rate: 20, Uploads: uploads, Warm: r.long(time.Second), For: r.long(2 * time.Second)})
		if err != nil {
			r.progress("%d sessions: %v", n, err)
			if r.small { // each of so few must be served
				r.t.Fail()
			}
			return false, false
		}
		part := ratio(float64(o.Delivered), 20*float64(n)*o.Seconds)
		r.progress("%d sessions, uploads %v: p99 %.1f ms, %.0f %% of the messages in time, %d refused", n, uploads, o.P99, 100*part, o.Refused)
		return o.P99 < 100 && part > 0.97 && o.Refused == 0, o.disturbed()
	}
	try := func(n int) bool {
		enough, disturbed := once(n)
		if !enough && disturbed && !r.small {
			enough, _ = once(n)
		}
		return enough
	}
	good, bad, most := 0, r.few(500), 8000 // an upload and a viewer per session are two descriptors on each side
	if r.small {
		most = bad
	}
	for good < most && try(bad) {
		good, bad = bad, 2*bad
	}
	for good < most && bad-good > max(1, good/20) {
		if n := (good + bad) / 2; try(n) {
			good = n
		} else {
			bad = n
		}
	}
	return float64(good)
}

func resume(sessions int, warm bool) func(r *rig) []float64 {
	return func(r *rig) []float64 {
		o := r.load(load{Do: "catchUp", Sessions: sessions, Viewers: 1, History: r.few(50_000), Keeper: warm})
		return []float64{median(o.Took)}
	}
}

func storm(r *rig) []float64 {
	reads := func() (n float64) {
		if !r.floor {
			all, _ := r.node.scrape(r.t)
			n = all[`gapless_history_reads_total{by="feed"}`] + all[`gapless_history_reads_total{by="viewer"}`]
		}
		return n
	}
	const sessions = 3
	before := reads()
	o := r.load(load{Do: "catchUp", Sessions: sessions, Viewers: r.few(1000), History: r.few(500), Keeper: r.floor})
	if r.floor {
		return []float64{median(o.Took), math.NaN()}
	}
	return []float64{median(o.Took), (reads() - before) / sessions}
}

func publish(r *rig) []float64 {
	o := r.load(load{Do: "live", Sessions: 16, Warm: r.long(time.Second), For: r.long(3 * time.Second)})
	return []float64{ratio(float64(o.Published)/1000, o.Seconds)}
}

func kill(r *rig) []float64 {
	calm := r.load(hundred(r))
	stop, killed := make(chan struct{}), int64(0)
	var wg sync.WaitGroup
	wg.Go(func() {
		for each := time.NewTicker(r.long(time.Second)); ; {
			select {
			case <-each.C:
				n, err := r.redis.ClientKillByFilter(r.t.Context(), "TYPE", "pubsub").Result()
				if err != nil {
					r.t.Errorf("CLIENT KILL: %v", err)
				}
				killed += n
			case <-stop:
				each.Stop()
				return
			}
		}
	})
	o := r.load(hundred(r))
	close(stop)
	if wg.Wait(); killed == 0 {
		r.t.Error("no connection was killed")
	}
	return []float64{ratio(o.P50, calm.P50), o.P99}
}

func growthInViewers(r *rig) (all []float64) {
	for _, viewers := range []int{100, 1000, 10_000} {
		r.restart()
		o := r.load(load{Do: "live", Sessions: 1, Viewers: r.few(viewers), Flight: 1, Warm: r.long(500 * time.Millisecond), For: r.long(2 * time.Second)})
		all = append(all, ratio(1e6*o.CPU, float64(o.Delivered)))
	}
	return append(all, ratio(all[2], all[0]))
}

func growthInLog(r *rig) (all []float64) {
	for _, chunks := range []int{100, 50_000} {
		r.restart()
		o := r.load(load{Do: "live", Sessions: 1, History: r.few(chunks), Warm: r.long(200 * time.Millisecond), For: r.long(time.Second)})
		all = append(all, ratio(1e6*o.CPU, float64(o.Published)))
	}
	return append(all, ratio(all[1], all[0]))
}

func ratio(a, b float64) float64 {
	if b == 0 {
		return math.NaN()
	}
	return a / b
}

// median returns the median, or 0 if all is empty.
func median(all []float64) float64 {
	if len(all) == 0 {
		return 0
	}
	all = slices.Sorted(slices.Values(all))
	return (all[(len(all)-1)/2] + all[len(all)/2]) / 2
}

// rig is a server with its Redis, for measurements.
type rig struct {
	t     testing.TB
	floor bool
	small bool // a short test that everything works: with few viewers, on any core
	args  []string
	cores [2]int // of the server and its Redis, and of the generator

	redis *storetest.Server
	node  *node
	loads int

	faults  // of all loads
	checked int
	others  float64 // the most of a core that other processes took, where that disturbed
	limited bool    // by the generator
}

func newRig(t testing.TB, floor, small bool, args ...string) *rig {
	t.Helper()
	r := &rig{t: t, floor: floor, small: small, args: args}
	if !small {
		var all unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			t.Fatal(err)
		}
		if all.Count() < 2 {
			t.Fatal("the scenarios need two cores: one for server and Redis, one for the load")
		}
		for core := len(all)*64 - 1; core >= 0; core-- {
			if all.IsSet(core) {
				r.cores = [2]int{core, max(r.cores[1], core)}
			}
		}
	}
	var durable []string
	if *scenariosOn == "aof" && !floor {
		durable = []string{"--appendonly", "yes", "--appendfsync", "always"}
	}
	r.pinned(0, func() { r.redis = storetest.Redis(t, durable...) })
	r.launch()
	return r
}

func (r *rig) launch() {
	r.t.Helper()
	program, args := binary, append([]string{"-redis", r.redis.URL()}, r.args...)
	switch {
	case r.floor:
	case *scenariosOn == "embedded":
		args[1] = "embedded"
	case *scenariosOn == "disk":
		args[1] = "embedded:" + r.t.TempDir()
	}
	switch {
	case r.floor:
		program, args = self(r.t), append(args, "floor")
	case !r.small:
		program = plainProgram(r.t)
	}
	r.pinned(0, func() { r.node = startProgram(r.t, program, args...) })
}

// restart restarts the server with an empty Redis.
func (r *rig) restart() {
	r.t.Helper()
	r.node.terminate()
	<-r.node.exited
	if err := r.redis.FlushAll(r.t.Context()).Err(); err != nil {
		r.t.Fatal(err)
	}
	r.launch()
}

// few returns n, or a hundredth of it in a test.
func (r *rig) few(n int) int {
	if r.small {
		return max(2, n/100)
	}
	return n
}

// progress logs the progress of a long scenario.
func (r *rig) progress(format string, args ...any) {
	if r.small {
		r.t.Logf(format, args...)
	} else {
		fmt.Fprintf(os.Stderr, "  "+format+"\n", args...)
	}
}

// long returns d, or a moment in a test.
func (r *rig) long(d time.Duration) time.Duration {
	if r.small {
		return d / 30
	}
	return d
}

// pinned runs start, which starts a process, on one core. The process inherits the core.
func (r *rig) pinned(i int, start func()) {
	if r.small {
		start()
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, one unix.CPUSet
	one.Set(r.cores[i])
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		r.t.Fatal(err)
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = unix.SchedSetaffinity(0, &before) }()
	start()
}

func self(t testing.TB) string {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func (r *rig) load(l load) outcome {
	r.t.Helper()
	o, err := r.try(l)
	if err != nil {
		r.t.Fatal(err)
	}
	return o
}

// disturbed reports whether other processes took so much that the figures are unreliable.
func (o outcome) disturbed() bool { return o.Foreign > 0.05*o.Seconds }

// try runs the generator against the server, and records what the table needs.
func (r *rig) try(l load) (o outcome, err error) {
	redis, err := r.redis.InfoMap(r.t.Context(), "server").Result()
	if err != nil {
		return o, err
	}
	pid, err := strconv.Atoi(redis["Server"]["process_id"])
	if err != nil {
		return o, err
	}
	r.loads++
	l.Addr, l.Session, l.Servers = r.node.addr, fmt.Sprint("load", r.loads), []int{r.node.cmd.Process.Pid, pid}
	what, err := json.Marshal(l)
	if err != nil {
		return o, err
	}
	var said, wrong bytes.Buffer
	cmd := exec.CommandContext(r.t.Context(), self(r.t), "load")
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(what), &said, &wrong
	r.pinned(1, func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return o, fmt.Errorf("%w: %s", err, &wrong)
	}
	if err := json.Unmarshal(said.Bytes(), &o); err != nil {
		return o, err
	}
	r.faults.add(o.faults)
	r.checked += o.Got
	if o.faults != (faults{}) {
		r.t.Errorf("%s, %d sessions × %d viewers: lost/doubled/out of order: %v", l.Do, l.Sessions, l.Viewers, o.faults)
	}
	if l.Do != "idle" && o.Said == 0 {
		r.t.Errorf("%s, %d sessions × %d viewers: nothing was said", l.Do, l.Sessions, l.Viewers)
	}
	if o.disturbed() {
		r.others = max(r.others, o.Foreign/o.Seconds)
	}
	if own := ratio(o.Own, o.Seconds); own > 0.97 && l.Viewers == 0 { // CPU per event stays correct then, appends per second do not
		r.limited = true
	}
	return o, nil
}

// line is the result of a row.
type line struct {
	row
	scenario    string
	floor, ours []float64 // one figure per run
	faults
	notes []string
}

func BenchmarkScenarios(b *testing.B) {
	var lines []*line
	checked := 0
	for _, s := range scenarios {
		var all []*line
		for _, row := range s.rows {
			all = append(all, &line{row: row, scenario: s.name})
		}
		b.Run(s.name, func(b *testing.B) {
			for run := range *scenarioRuns {
				for _, who := range []string{"floor", "ours"} {
					if who == "floor" && s.oursOnly {
						continue
					}
					b.Run(fmt.Sprint(who, run+1), func(b *testing.B) {
						r := newRig(b, who == "floor", false, s.args...)
						values := s.run(r)
						checked += r.checked
						b.ReportMetric(0, "ns/op") // means nothing here
						for i, value := range values {
							l := all[i]
							l.faults.add(r.faults)
							if math.IsNaN(value) {
								continue
							}
							if r.floor {
								l.floor = append(l.floor, value)
							} else {
								l.ours = append(l.ours, value)
							}
							b.ReportMetric(value, fmt.Sprintf("%d:%s", i+1, strings.ReplaceAll(s.rows[i].unit, " ", "-")))
						}
						if r.others > 0 {
							all[0].notes = append(all[0].notes, fmt.Sprintf("other processes took up to %.0f %% of a core in run %d of %s", 100*r.others, run+1, who))
						}
						if r.limited {
							all[0].notes = append(all[0].notes, fmt.Sprintf("the generator was the limit in run %d of %s", run+1, who))
						}
					})
				}
			}
		})
		lines = append(lines, all...)
	}
	printTable(os.Stdout, lines, checked)
}

// printTable prints the table as Markdown.
func printTable(w io.Writer, lines []*line, checked int) {
	fmt.Fprintf(w, "\nMedians of %d; F is the floor. Server and Redis on one core, the load on another; %s, %s/%s.\n", *scenarioRuns, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	fmt.Fprintf(w, "%d events were checked, of both. Lost, doubled and out of order must be 0; absolute goals are for a machine whose F is as in the records.\n\n", checked)
	fmt.Fprintln(w, "| scenario | | unit | F | ours | ratio | goal | | lost/doubled/out of order |\n|---|---|---|---|---|---|---|---|---|")
	var notes strings.Builder
	for _, l := range lines {
		if len(l.ours) == 0 {
			continue
		}
		floor, ours, part, met := "", median(l.ours), "", ""
		f := median(l.floor)
		if len(l.floor) > 0 && f > 0 {
			floor, part = short(f), fmt.Sprintf("%.2f", ours/f)
		}
		if l.goal.met != nil && (f > 0 || !l.goal.ofFloor) {
			switch met = "missed"; {
			case l.faults != (faults{}):
				met = "faulty"
			case l.goal.met(f, ours):
				met = "met"
			}
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s | %s | %v |\n", l.scenario, l.title, l.unit, floor, short(ours), part, l.goal.text, met, l.faults)
		for _, note := range l.notes {
			fmt.Fprintf(&notes, "%s: %s\n", l.scenario, note)
		}
	}
	if notes.Len() > 0 {
		fmt.Fprintf(w, "\nDisturbed, so look again:\n%s", &notes)
	}
	fmt.Fprintln(w)
}

// short formats a figure with three significant digits.
func short(v float64) string {
	if v == 0 || math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.*f", 2-int(math.Floor(math.Log10(math.Abs(v)))), v)
}

// The scenarios in small, so that none of them rots: nothing is lost, and each returns its rows.
func TestScenarios_loseNothingInSmall(t *testing.T) {
	t.Parallel()
	for _, floor := range []bool{true, false} {
		t.Run(map[bool]string{true: "floor", false: "ours"}[floor], func(t *testing.T) {
			t.Parallel()
			r := newRig(t, floor, true, "-window", "64MiB", "-reconcile", "10s")
			for _, s := range scenarios {
				if floor && s.oursOnly {
					continue
				}
				begun, before := time.Now(), r.checked
				if values := s.run(r); len(values) != len(s.rows) {
					t.Errorf("%s answers %v, and has %d rows", s.name, values, len(s.rows))
				}
				t.Logf("%s: %d events, %v", s.name, r.checked-before, time.Since(begun))
				if r.faults != (faults{}) {
					return // the others would wait for what is lost, too
				}
				if viewersGetSomething := !strings.HasPrefix(s.name, "idle-") && s.name != "publish" && s.name != "growth-log"; viewersGetSomething && r.checked == before {
					t.Errorf("%s: no viewer got anything", s.name)
				}
			}
		})
	}
}

// The generator notices a server that loses, doubles and reorders messages, wherever its bytes are cut.
func TestScenarios_theGeneratorSeesWhatIsLostDoubledAndReordered(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		numbers []int
		said    int
		want    faults
	}{
		"all there":                    {[]int{0, 1, 2, 3}, 4, faults{}},
		"lost in the middle":           {[]int{0, 1, 3}, 4, faults{Lost: 1}},
		"lost at the end":              {[]int{0, 1}, 4, faults{Lost: 2}},
		"lost at the beginning":        {[]int{2, 3}, 4, faults{Lost: 2}},
		"nothing came":                 {nil, 4, faults{Lost: 4}},
		"doubled":                      {[]int{0, 1, 1, 2, 3, 0}, 4, faults{Doubled: 2}},
		"reordered":                    {[]int{0, 2, 1, 3}, 4, faults{Reordered: 1}},
		"reordered, and doubled":       {[]int{0, 2, 1, 1, 3}, 4, faults{Doubled: 1, Reordered: 1}},
		"one lost, another one is new": {[]int{0, 0, 2, 3}, 4, faults{Lost: 1, Doubled: 1}},
	} {
		var stream []byte
		stream = append(stream, floorHead...)
		for i, n := range c.numbers {
			event := fmt.Sprintf("data: %s\nid: %d\n\n", message(nil, n, 0), i+1)
			stream = fmt.Appendf(stream, "%x\r\n%s\r\n", len(event)/2, event[:len(event)/2]) // cut as a server may cut it
			stream = fmt.Appendf(stream, "%x\r\n%s\r\n", len(event)-len(event)/2, event[len(event)/2:])
		}
		for size := 1; size <= len(stream); size += 1 + size/8 {
			var w watcher
			for part := range slices.Chunk(stream, size) {
				if !w.marks.take(part, func(number int, _ time.Duration) { w.tally.take(number) }) {
					t.Fatalf("%s: the stream ended", name)
				}
			}
			if got := w.faults(c.said); got != c.want {
				t.Errorf("%s, in pieces of %d: %+v, want %+v", name, size, got, c.want)
			}
		}
	}
}
