package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"gapless/store/storetest"
)

// What an operator sees of the program: its metrics are true, and the dashboard and the alert rules use metrics that
// exist, correctly. The referee is Prometheus itself.

const (
	dashboardFile = "deploy/grafana/gapless.json"
	alertsFile    = "deploy/prometheus/alerts.yml"
)

// tool returns the path of a program of Prometheus.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is not installed: make test installs it (%v)", name, err)
	}
	return path
}

// metricsOf holds the metrics of a node, by series as written: name{label="value",…}.
type metricsOf map[string]float64

// scrape reads /metrics. It also returns the names of the metric families.
func (n *node) scrape(t testing.TB) (all metricsOf, families []string) {
	t.Helper()
	a := n.get("/metrics")
	if a.status != http.StatusOK {
		t.Fatalf("metrics: %d (%v)", a.status, a.err)
	}
	all = metricsOf{}
	for line := range strings.Lines(a.body) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			families = append(families, strings.Fields(name)[0])
		}
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			t.Fatalf("metrics: %q: %v", line, err)
		}
		all[line[:i]] = value
	}
	return all, families
}

// labels returns the values of each label of a metric.
func (m metricsOf) labels(name string) map[string][]string {
	all := map[string][]string{}
	for series := range m {
		metric, rest, _ := strings.Cut(series, "{")
		if metric != name {
			continue
		}
		for _, l := range matcher.FindAllStringSubmatch(rest, -1) {
			all[l[1]] = append(all[l[1]], l[3])
		}
	}
	return all
}

func (m metricsOf) has(name string) bool {
	_, plain := m[name]
	return plain || len(m.labels(name)) > 0
}

var (
	matcher   = regexp.MustCompile(`(\w+)(=~|!~|!=|=)"([^"]*)"`)
	selector  = regexp.MustCompile(`(\w+)\{([^}]*)\}`)
	metric    = regexp.MustCompile(`\b(gapless|go|process|promhttp)_\w+|\bup\b`)
	grouping  = regexp.MustCompile(`\b(?:by|on) \(([^)]*)\)`)
	quoted    = regexp.MustCompile(`"[^"]*"`)
	legend    = regexp.MustCompile(`\{\{ *(?:\$labels\.)?(\w+) *\}\}`)
	alertName = regexp.MustCompile(`(?m)^ *- alert: (\w+)$`)
)

// prometheusAdds are the labels that a scrape adds.
var prometheusAdds = []string{"instance", "job"}

// exists returns the parts of an expression that do not exist in a scrape.
func (m metricsOf) exists(expr string) (missing []string) {
	bare := quoted.ReplaceAllString(expr, `""`)
	names := metric.FindAllString(bare, -1)
	if len(names) == 0 {
		return []string{"any metric"}
	}
	known := slices.Clone(prometheusAdds)
	for _, name := range names {
		if name != "up" && !m.has(name) {
			missing = append(missing, name)
		}
		known = slices.AppendSeq(known, maps.Keys(m.labels(name)))
	}
	for _, s := range selector.FindAllStringSubmatch(expr, -1) {
		values := m.labels(s[1])
		for _, l := range matcher.FindAllStringSubmatch(s[2], -1) {
			if slices.Contains(prometheusAdds, l[1]) {
				continue
			}
			wanted := []string{l[3]}
			if strings.HasSuffix(l[2], "~") {
				wanted = strings.Split(l[3], "|")
			}
			for _, value := range wanted {
				if !slices.Contains(values[l[1]], value) {
					missing = append(missing, fmt.Sprintf("%s{%s=%q}", s[1], l[1], value))
				}
			}
		}
	}
	for _, g := range grouping.FindAllStringSubmatch(expr, -1) {
		for label := range strings.SplitSeq(g[1], ",") {
			if label = strings.TrimSpace(label); !slices.Contains(known, label) {
				missing = append(missing, "label "+label)
			}
		}
	}
	return missing
}

// dashboard holds the parts of a Grafana dashboard that these tests use.
type dashboard struct {
	UID, Title    string
	SchemaVersion int
	Panels        []panel
	Templating    struct {
		List []struct{ Name, Type, Definition string }
	}
	Annotations struct {
		List []struct {
			Expr       string
			Datasource datasource
		}
	}
}

type datasource struct{ Type, UID string }

type panel struct {
	ID                       int
	Type, Title, Description string
	Datasource               datasource
	GridPos                  struct{ H, W, X, Y int }
	FieldConfig              struct{ Defaults struct{ Unit string } }
	Targets                  []struct {
		RefID, Expr, LegendFormat string
		Datasource                datasource
	}
	Panels []panel
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// plain returns an expression as Grafana sends it, for all nodes and a short range.
func plain(expr string) string {
	return strings.NewReplacer("$instance", ".*", "$__rate_interval", "10s", "$__range", "10s").Replace(expr)
}

// queries returns all expressions of the dashboard.
func (d dashboard) queries() (all []string) {
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			all = append(all, q.Expr)
		}
	}
	for _, a := range d.Annotations.List {
		if a.Expr != "" {
			all = append(all, a.Expr)
		}
	}
	for _, v := range d.Templating.List {
		if v.Definition != "" {
			all = append(all, v.Definition)
		}
	}
	return all
}

func TestMetrics_theDashboardIsWellMade(t *testing.T) {
	t.Parallel()
	d := readDashboard(t)
	if d.UID == "" || d.Title == "" || d.SchemaVersion < 38 {
		t.Errorf("uid %q, title %q, schema %d", d.UID, d.Title, d.SchemaVersion)
	}
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name+" "+v.Type)
	}
	if !slices.Equal(variables, []string{"datasource datasource", "instance query"}) {
		t.Errorf("variables: %q", variables)
	}
	ours := datasource{"prometheus", "${datasource}"}
	for _, a := range d.Annotations.List {
		if a.Expr != "" && a.Datasource != ours {
			t.Errorf("annotation %s: datasource %v", a.Expr, a.Datasource)
		}
	}
	units := []string{"none", "short", "s", "bytes", "cps", "ops", "reqps"}
	ids, titles, taken := map[int]bool{}, map[string]bool{}, map[[2]int]string{}
	section := ""
	for _, p := range d.Panels {
		if p.Type == "row" {
			section = p.Title
		}
		if title := section + "/" + p.Type + "/" + p.Title; ids[p.ID] || p.ID <= 0 || titles[title] || p.Title == "" {
			t.Errorf("panel %d, %q: there is another one", p.ID, title)
		} else {
			ids[p.ID], titles[title] = true, true
		}
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.Y < 0 || g.X+g.W > 24 {
			t.Errorf("%s: no place: %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, ok := taken[[2]int{x, y}]; ok {
					t.Fatalf("%s lies on %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			if len(p.Panels) > 0 {
				t.Errorf("row %s is collapsed: these tests do not look into it", p.Title)
			}
			continue
		}
		if len(p.Description) < 20 || p.Datasource != ours || !slices.Contains(units, p.FieldConfig.Defaults.Unit) || len(p.Targets) == 0 {
			t.Errorf("%s: description %q, datasource %v, unit %q, %d queries", p.Title, p.Description, p.Datasource, p.FieldConfig.Defaults.Unit, len(p.Targets))
		}
		refs := map[string]bool{}
		for _, q := range p.Targets {
			if q.Datasource != ours || refs[q.RefID] || q.RefID == "" || !strings.Contains(q.Expr, `{instance=~"$instance"`) {
				t.Errorf("%s: query %+v", p.Title, q)
			}
			refs[q.RefID] = true
		}
	}
}

// expressions returns the expressions of the alert rules, by alert, as Prometheus parses them.
func (p *prom) expressions(t *testing.T) map[string]string {
	t.Helper()
	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Query, Health, LastError string }
		}
	}
	p.ask(t, "rules", nil, &rules)
	all := map[string]string{}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			all[r.Name] = r.Query
			if r.Health == "err" {
				t.Errorf("alert %s: %s", r.Name, r.LastError)
			}
		}
	}
	return all
}

// promtool runs promtool, which must succeed without any complaint.
func promtool(t *testing.T, input string, args ...string) string {
	t.Helper()
	cmd := exec.Command(tool(t, "promtool"), args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestMetrics_theRulesFireWhenTheyShouldAndOnlyThen(t *testing.T) {
	t.Parallel()
	promtool(t, "", "check", "rules", "--lint=all", "--lint-fatal", alertsFile)
	tests := strings.TrimSuffix(alertsFile, ".yml") + "_test.yml"
	promtool(t, "", "test", "rules", tests)
	rules, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	shown, err := os.ReadFile(tests)
	if err != nil {
		t.Fatal(err)
	}
	all := alertName.FindAllStringSubmatch(string(rules), -1)
	if len(all) == 0 {
		t.Fatal("no rules")
	}
	for _, m := range all {
		if !strings.Contains(string(shown), fmt.Sprintf("alertname=%q", m[1])) {
			t.Errorf("no test shows %s firing", m[1])
		}
	}
	for rule := range strings.SplitSeq(string(rules), "- alert: ") {
		if name, _, _ := strings.Cut(rule, "\n"); !strings.HasPrefix(name, "#") {
			for _, part := range []string{"severity: ", "summary: ", "description: "} {
				if !strings.Contains(rule, part) {
					t.Errorf("%s has no %s", name, part)
				}
			}
		}
	}
}

// prom is a Prometheus that scrapes nodes, with the alert rules.
type prom struct{ url string }

func startProm(t *testing.T, of ...*node) *prom {
	t.Helper()
	path := tool(t, "prometheus")
	dir := t.TempDir()
	rules, err := filepath.Abs(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, n := range of {
		targets = append(targets, strconv.Quote(n.addr))
	}
	config := fmt.Sprintf("global: { scrape_interval: 500ms, evaluation_interval: 500ms }\nrule_files: [%q]\n"+
		"scrape_configs:\n  - { job_name: gapless, static_configs: [{ targets: [%s] }] }\n", rules, strings.Join(targets, ", "))
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprint("127.0.0.1:", storetest.FreePort(t))
	cmd := exec.Command(path, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr, "--log.level=warn")
	var out buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("log of prometheus:\n%s", out.String())
		}
	})
	p := &prom{"http://" + addr + "/api/v1/"}
	eventually(t, "prometheus has scraped the nodes", func() bool {
		var r result
		return p.try("query", url.Values{"query": {"count(up == 1)"}}, &r) == nil && len(r.Result) == 1 && r.Result[0].value() == strconv.Itoa(len(of))
	})
	return p
}

type result struct{ Result []series }

type series struct {
	Metric map[string]string
	Value  [2]any
}

// value returns the result of an instant query.
func (s series) value() string { return fmt.Sprint(s.Value[1]) }

func (p *prom) try(call string, query url.Values, into any) error {
	response, err := http.Get(p.url + call + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: into}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s", answer.Error)
	}
	return nil
}

func (p *prom) ask(t *testing.T, call string, query url.Values, into any) {
	t.Helper()
	if err := p.try(call, query, into); err != nil {
		t.Errorf("prometheus, %s %s: %v", call, query.Get("query"), err)
	}
}

// A real Prometheus scrapes the program, and runs the queries of the dashboard.
func TestMetrics_dashboardAndAlertsSpeakOfWhatExists(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-node", "n1")[0]
	prometheus := startProm(t, n)
	ctx := deadline(t)
	session := newID()
	n.append(t, session, words(1, 5))
	v := &viewer{session: session}
	ctx, cancel := context.WithCancel(ctx)
	wait := background(t, func() { v.follow(ctx, at(n.addr), nil) })
	defer wait()
	defer cancel()
	eventually(t, "the viewer is live", func() bool { return v.seen.Load() == 5 })
	n.append(t, session, words(6, 5))

	if out := promtool(t, n.get("/metrics").body, "check", "metrics"); out != "" {
		t.Errorf("promtool check metrics: %s", out)
	}

	d := readDashboard(t)
	alerts := prometheus.expressions(t)
	rules, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	if want := len(alertName.FindAllString(string(rules), -1)); len(alerts) != want {
		t.Errorf("prometheus knows %d alerts of %d", len(alerts), want)
	}
	all, families := n.scrape(t)
	for _, q := range d.queries() {
		if missing := all.exists(q); len(missing) > 0 {
			t.Errorf("the dashboard asks %s: there is no %s", q, missing)
		}
	}
	for name, expr := range alerts {
		if missing := all.exists(expr); len(missing) > 0 {
			t.Errorf("alert %s asks %s: there is no %s", name, expr, missing)
		}
	}
	looked := map[string]bool{}
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			for _, name := range metric.FindAllString(quoted.ReplaceAllString(q.Expr, ""), -1) {
				looked[name] = true
				for _, suffix := range []string{"_bucket", "_sum", "_count"} {
					looked[strings.TrimSuffix(name, suffix)] = true
				}
			}
		}
	}
	for _, name := range families {
		if strings.HasPrefix(name, "gapless_") && !looked[name] {
			t.Errorf("nobody looks at %s", name)
		}
	}

	for _, p := range d.Panels {
		for _, q := range p.Targets {
			var r result
			eventually(t, p.Title+" shows something: "+q.Expr, func() bool {
				prometheus.ask(t, "query", url.Values{"query": {plain(q.Expr)}}, &r)
				return len(r.Result) > 0 || t.Failed()
			})
			for _, series := range r.Result {
				for _, l := range legend.FindAllStringSubmatch(q.LegendFormat, -1) {
					if series.Metric[l[1]] == "" {
						t.Errorf("%s: %s has no label %s for its legend", p.Title, q.Expr, l[1])
					}
				}
			}
		}
	}
	for _, a := range d.Annotations.List {
		if a.Expr != "" {
			prometheus.ask(t, "query", url.Values{"query": {plain(a.Expr)}}, &result{})
		}
	}
	var firing struct {
		Alerts []struct{ Labels map[string]string }
	}
	if prometheus.ask(t, "alerts", nil, &firing); len(firing.Alerts) > 0 {
		t.Errorf("all is well, and there are alerts: %v", firing.Alerts)
	}

	// If Redis is dead, the alert fires through the whole path, from metrics to rules.
	redis.Kill()
	eventually(t, "GaplessRedisAway comes up", func() bool {
		var up struct {
			Alerts []struct{ Labels, Annotations map[string]string }
		}
		prometheus.ask(t, "alerts", nil, &up)
		for _, a := range up.Alerts {
			if a.Labels["alertname"] == "GaplessRedisAway" {
				if a.Labels["instance"] != n.addr || !strings.Contains(a.Annotations["summary"], n.addr) {
					t.Errorf("the alert says %v, %v", a.Labels, a.Annotations)
				}
				return true
			}
		}
		return t.Failed()
	})
}

// ledger holds how much the metrics of a node must have grown since its beginning.
type ledger struct {
	t     *testing.T
	n     *node
	begun metricsOf
	want  metricsOf
	loose []string // series that are no longer counted exactly
}

func newLedger(t *testing.T, n *node) *ledger {
	l := &ledger{t: t, n: n, want: metricsOf{}}
	l.begun, _ = n.scrape(t)
	return l
}

// add expects growth. A falling gauge grows by a negative amount.
func (l *ledger) add(by metricsOf) {
	for series, n := range by {
		l.want["gapless_"+series] += n
	}
}

// wrong returns every counter and gauge with an unexpected value, including those that should not have changed.
func (l *ledger) wrong() (all []string) {
	now, _ := l.n.scrape(l.t)
	for series := range l.want {
		if _, ok := now[series]; !ok {
			all = append(all, series+" does not exist")
		}
	}
	for series, value := range now {
		name, _, _ := strings.Cut(series, "{")
		switch {
		case !strings.HasPrefix(name, "gapless_"), strings.HasSuffix(name, "_bucket"), strings.HasSuffix(name, "_sum"),
			name == "gapless_connections", // the client decides
			name == "gapless_window_bytes", name == "gapless_build_info", name == "gapless_redis_seconds_count",
			slices.Contains(l.loose, series), strings.Contains(series, `route="/metrics"`):
			continue
		}
		if grown := value - l.begun[series]; grown != l.want[series] {
			all = append(all, fmt.Sprintf("%s: %v, not %v", series, grown, l.want[series]))
		}
	}
	slices.Sort(all)
	return all
}

// check waits until all values are as expected.
func (l *ledger) check(after string) {
	l.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		wrong := l.wrong()
		if len(wrong) == 0 {
			return
		}
		if time.Now().After(end) {
			l.t.Fatalf("after %s:\n%s", after, strings.Join(wrong, "\n"))
		}
	}
}

// Each event is counted once, in the right series, and in no other.
func TestMetrics_tellTheTruth(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	// Without periodic reads every read has a known reason.
	n := nodes(t, 1, redis, "-reconcile", "1h", "-grace", "3h", "-linger", "5m")[0]
	ctx := deadline(t)
	s := newID()
	post := func(status int) string {
		return fmt.Sprintf(`http_requests_total{method="POST",route="/v1/sessions/:id/chunks",status="%d"}`, status)
	}
	stream := func(status int) string {
		return fmt.Sprintf(`http_requests_total{method="GET",route="/v1/sessions/:id/stream",status="%d"}`, status)
	}
	const feedReads = `history_reads_total{by="feed"}`
	l := newLedger(t, n)
	l.check("nothing")

	n.append(t, s, words(1, 5))
	l.add(metricsOf{"chunks_appended_total": 5, post(201): 1})
	l.check("an append of five chunks")

	two := []*viewer{{session: s}, {session: s}}
	back := make(chan struct{})
	var waits []func()
	for i, v := range two {
		stop := func(event) bool { return false }
		if i == 0 { // it is cut after chunk 25, and reconnects by itself
			stop = func(event) bool { return v.cursor == 25 && v.connections == 1 }
		}
		waits = append(waits, background(t, func() {
			v.connect(ctx, n.addr, stop)
			if i > 0 {
				return
			}
			select {
			case <-back:
				v.connect(ctx, n.addr, nil)
			case <-ctx.Done():
			}
		}))
	}
	seen := func(cursor int64) {
		t.Helper()
		for _, v := range two {
			eventually(t, fmt.Sprint("viewers have seen ", cursor), func() bool { return v.seen.Load() == cursor })
		}
	}
	seen(5)
	l.add(metricsOf{"streams_begun_total": 2, "chunks_delivered_total": 10, feedReads: 1, "viewers": 2, "feeds": 1, "subscriptions": 1})
	l.check("two viewers of five chunks")

	for i := range 20 {
		n.append(t, s, words(6+i, 1))
		seen(int64(6 + i))
	}
	l.add(metricsOf{"chunks_appended_total": 20, post(201): 20, "live_chunks_total": 20, "chunks_delivered_total": 40,
		"first_live_seconds_count": 1, "live_write_seconds_count": 2}) // one in sixteen, for each viewer
	// The viewer whose stream was cut is gone.
	l.add(metricsOf{`streams_ended_total{cause="gone"}`: 1, stream(0): 1, "viewers": -1})
	l.check("twenty live chunks, and a connection that breaks")

	n.append(t, s, words(26, 1))
	l.add(metricsOf{"chunks_appended_total": 1, post(201): 1, "live_chunks_total": 1, "chunks_delivered_total": 1})
	l.check("a chunk while it is away")
	close(back)
	seen(26)
	l.add(metricsOf{"streams_begun_total": 1, "streams_resumed_total": 1, "viewers": 1, "chunks_delivered_total": 1})
	l.check("a reconnect with Last-Event-ID")

	unannounced := func(seq int64) {
		t.Helper()
		if err := redis.RPush(ctx, "chat:history:"+s, storetest.Element(seq, "unannounced")).Err(); err != nil {
			t.Fatal(err)
		}
	}
	unannounced(27)
	n.append(t, s, words(28, 1)) // its number reveals the missing one
	seen(28)
	l.add(metricsOf{"chunks_appended_total": 1, post(201): 1, "gaps_found_total": 1, "gaps_repaired_total": 1, feedReads: 1, "chunks_delivered_total": 4})
	l.check("a gap")

	unannounced(29)
	killed, err := redis.ClientKillByFilter(ctx, "TYPE", "pubsub").Result()
	if err != nil || killed == 0 {
		t.Fatalf("CLIENT KILL: %d, %v", killed, err)
	}
	seen(29)
	l.add(metricsOf{"pubsub_lost_total": float64(killed), "gaps_found_total": 1, "gaps_repaired_total": 1, feedReads: 1, "chunks_delivered_total": 2})
	l.check("a Pub/Sub connection that is killed")

	glance := func(v *viewer, until func(event) bool) {
		t.Helper()
		if how := v.connect(ctx, n.addr, until); how != cut {
			t.Errorf("a viewer of %s ended %s", v.session, how)
		}
		for _, f := range v.faults {
			t.Error(f)
		}
	}
	short := metricsOf{"streams_begun_total": 1, `streams_ended_total{cause="gone"}`: 1, stream(0): 1}
	u := &viewer{session: s, parser: parser{lastID: "what", id: "what"}}
	glance(u, func(event) bool { return u.cursor == 29 })
	l.add(short)
	l.add(metricsOf{`resets_total{reason="unknown"}`: 1, "chunks_delivered_total": 29})
	l.check("a viewer with an id that is no number")
	u = &viewer{session: s, parser: parser{lastID: "99", id: "99"}, cursor: 99}
	glance(u, func(event) bool { return u.cursor == 29 })
	l.add(short)
	l.add(metricsOf{"streams_resumed_total": 1, `resets_total{reason="ahead"}`: 1, feedReads: 1, "chunks_delivered_total": 29})
	l.check("a viewer whose cursor is beyond the log")

	trimmed := newID()
	n.append(t, trimmed, words(1, 5))
	redis.Del(ctx, "chat:history:"+trimmed)
	u = &viewer{session: trimmed, parser: parser{lastID: "2", id: "2"}, cursor: 2}
	glance(u, func(e event) bool { return e.name == "reset" })
	l.add(short)
	l.add(metricsOf{"chunks_appended_total": 5, post(201): 1, "streams_resumed_total": 1, `resets_total{reason="trimmed"}`: 1,
		feedReads: 2, "feeds": 1, "subscriptions": 1})
	// Its cursor is before the window, so the log is read once more before the reset.
	l.check("a viewer of a list that has expired")

	// A response that says that nothing follows is a stream that ends, too.
	over := newID()
	n.append(t, over, words(1, 2, `{"type":"done","message_id":"m1"}`, `{"type":"end"}`))
	u = &viewer{session: over}
	if how := u.connect(ctx, n.addr, nil); how != clean {
		t.Errorf("a viewer of a log that has ended: %s", how)
	}
	if how := u.connect(ctx, n.addr, nil); how != nothing {
		t.Errorf("a viewer that has its end: %s", how)
	}
	u = &viewer{session: over, query: "?until=done"}
	if how := u.connect(ctx, n.addr, nil); how != clean {
		t.Errorf("a viewer until done: %s", how)
	}
	if a := n.get("/v1/sessions/" + over + "/stream?format=raw&after=99"); a.status != http.StatusGone {
		t.Errorf("a raw viewer that is outside: %d", a.status)
	}
	l.add(metricsOf{"chunks_appended_total": 4, post(201): 1, "streams_begun_total": 4, "streams_resumed_total": 2, "chunks_delivered_total": 4 + 3,
		`streams_ended_total{cause="ended"}`: 2, `streams_ended_total{cause="done"}`: 1, `streams_ended_total{cause="outside"}`: 1,
		stream(200): 2, stream(204): 1, stream(410): 1, "feeds": 1, "subscriptions": 1})
	l.loose = append(l.loose, "gapless_"+feedReads) // an ended log is read once more for each viewer, or for several at once
	l.check("viewers of a log that has ended")

	numbered := func() {
		r, err := http.NewRequestWithContext(ctx, "POST", n.url("/v1/sessions/"+over+"p/chunks"), strings.NewReader(words(1, 2)))
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{"Content-Type": "application/json", "Producer-Id": "p", "Producer-Epoch": "0", "Producer-Chunk": "0"} {
			r.Header.Set(name, value)
		}
		response, err := n.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
	}
	numbered()
	numbered()
	l.add(metricsOf{"chunks_appended_total": 2, "chunks_known_total": 2, post(201): 1, post(200): 1})
	l.check("an append that is repeated with its numbers")

	body, producer := io.Pipe()
	uploaded := make(chan answer, 1)
	go func() { // ends with the body, which ends below
		uploaded <- n.do(ctx, "POST", "/v1/sessions/"+newID()+"/chunks?message_id=m", "application/x-ndjson", body)
	}()
	fmt.Fprintln(producer, `{"content":"a"}`)
	l.add(metricsOf{"chunks_appended_total": 1, "uploads": 1, "subscriptions": 1})
	l.check("an upload that is under way")
	fmt.Fprintln(producer, `{"type":"done"}`)
	_ = producer.Close()
	if a := <-uploaded; a.status != http.StatusCreated {
		t.Errorf("the upload: %d %s (%v)", a.status, a.body, a.err)
	}
	l.add(metricsOf{"chunks_appended_total": 1, post(201): 1, "uploads": -1, "subscriptions": -1})
	l.check("its end")

	// A request that a check refuses before routing counts as well.
	r, err := http.NewRequestWithContext(ctx, "POST", n.url("/v1/sessions"), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Origin", "https://elsewhere.example")
	if response, err := n.http.Do(r); err != nil || response.Body.Close() != nil || response.StatusCode != http.StatusForbidden {
		t.Errorf("a page of another origin: %v, %v", response, err)
	}
	r, err = http.NewRequestWithContext(ctx, "GET", n.url("/healthz"), nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = "elsewhere.example"
	if response, err := n.http.Do(r); err != nil || response.Body.Close() != nil || response.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("a host that is none of ours: %v, %v", response, err)
	}
	n.get("/nothing")
	l.add(metricsOf{`http_requests_total{method="POST",route="none",status="403"}`: 1, `http_requests_total{method="GET",route="none",status="421"}`: 1,
		`http_requests_total{method="GET",route="none",status="404"}`: 1})
	l.check("requests that are refused at the door")

	redis.FlushAll(ctx)
	n.append(t, s, words(1, 1))
	for _, v := range two {
		eventually(t, "viewers are reset", func() bool { return v.seen.Load() == 1_000_001 })
	}
	l.add(metricsOf{"chunks_appended_total": 1, post(201): 1, "logs_rewritten_total": 1, `resets_total{reason="epoch"}`: 2, "chunks_delivered_total": 2})
	l.check("a flush of Redis, and a log that begins again")

	if a := n.do(ctx, "DELETE", "/v1/sessions/"+s, "", nil); a.status != http.StatusNoContent {
		t.Errorf("delete: %d %s", a.status, a.body)
	}
	for _, wait := range waits {
		wait()
	}
	l.add(metricsOf{`http_requests_total{method="DELETE",route="/v1/sessions/:id",status="204"}`: 1, `resets_total{reason="deleted"}`: 2,
		`streams_ended_total{cause="deleted"}`: 2, stream(200): 2, "viewers": -2})
	l.check("a session that is deleted")
	for _, v := range two {
		for _, f := range v.faults {
			t.Error(f)
		}
	}

	// Errors, by kind.
	if err := redis.Set(ctx, "chat:history:"+s+"x", "another program's", 0).Err(); err != nil {
		t.Fatal(err)
	}
	const fault = `gapless_redis_errors_total{kind="fault",script="read"}`
	l.loose = append(l.loose, fault) // retried again and again
	u = &viewer{session: s + "x"}
	stuck, cancel := context.WithCancel(ctx)
	wait := background(t, func() { u.connect(stuck, n.addr, nil) })
	eventually(t, "a fault is counted", func() bool { all, _ := n.scrape(t); return all[fault] > 0 })
	cancel()
	wait()
	redis.Del(ctx, "chat:history:"+s+"x")
	l.add(short) // its feed ends after a read that finds no log
	l.check("a key of another type")

	redis.Signal(syscall.SIGSTOP)
	a := n.post("/v1/sessions/"+newID()+"/chunks", "application/json", `{"data":0}`)
	redis.Signal(syscall.SIGCONT)
	if a.status != http.StatusGatewayTimeout {
		t.Fatalf("an append to a Redis that is silent: %d %s", a.status, a.body)
	}
	l.loose = append(l.loose, `gapless_chunks_appended_total`) // the outcome is unknown
	l.add(metricsOf{post(504): 1, `redis_errors_total{kind="unknown",script="append"}`: 1})
	l.check("an append without an answer")

	redis.Kill()
	var was string
	eventually(t, "an append surely fails", func() bool { // the first ones may still have a connection
		a := n.post("/v1/sessions/"+newID()+"/chunks", "application/json", `{"data":0}`)
		was = a.body
		return a.status == http.StatusServiceUnavailable
	})
	all, _ := n.scrape(t)
	if all[`gapless_redis_errors_total{kind="away",script="append"}`] != 1 || all[`gapless_`+post(503)] != 1 {
		t.Errorf("a Redis that is away is not counted once: %s", was)
	}
}

// Gauges of live objects return to zero.
func TestMetrics_gaugesReturnToZero(t *testing.T) {
	t.Parallel()
	redis := storetest.Redis(t)
	n := nodes(t, 1, redis, "-linger", "0s", "-reconcile", "200ms")[0]
	gauges := []string{"gapless_viewers", "gapless_feeds", "gapless_window_bytes", "gapless_subscriptions", "gapless_uploads", "gapless_answers"}
	is := func(ok func(value float64) bool) func() bool {
		return func() bool {
			all, _ := n.scrape(t)
			for _, g := range gauges {
				if value, there := all[g]; !there || !ok(value) {
					return false
				}
			}
			return true
		}
	}
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	session := newID()
	v := &viewer{session: session}
	wait := background(t, func() { v.follow(ctx, at(n.addr), nil) })
	if a := n.post("/v1/sessions/"+session+"/messages", "application/json", `{"content":"Tell me something long"}`); a.status != http.StatusAccepted {
		t.Fatalf("a question: %d %s", a.status, a.body)
	}
	eventually(t, "all are above zero", is(func(value float64) bool { return value > 0 }))
	cancel()
	wait()
	eventually(t, "all are zero", is(func(value float64) bool { return value == 0 }))
	if all, _ := n.scrape(t); all["gapless_slowest_viewer_lag_chunks"] != 0 {
		t.Error("nobody views, and somebody is behind")
	}
}

// A viewer that does not read counts as behind, and one that is cut as slow.
func TestMetrics_aSlowViewerShows(t *testing.T) {
	t.Parallel()
	n := start(t, "-write-timeout", "3s")
	session := newID()
	large(t, n, session, "")
	v := &viewer{session: session}
	v.dialer.Control = smallReceiveBuffer
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	stalled := make(chan struct{})
	wait := background(t, func() {
		v.raw(ctx, n.addr, func([]byte) bool {
			select {
			case <-stalled:
			case <-ctx.Done():
			}
			return false
		})
	})
	eventually(t, "it shows as behind", func() bool {
		all, _ := n.scrape(t)
		return all["gapless_slowest_viewer_lag_chunks"] > 0
	})
	eventually(t, "it is cut, as slow", func() bool {
		all, _ := n.scrape(t)
		return all[`gapless_streams_ended_total{cause="slow"}`] == 1 && all["gapless_slowest_viewer_lag_chunks"] == 0 && all["gapless_viewers"] == 0
	})
	close(stalled)
	wait()
}

func TestMetrics_aDrainShows(t *testing.T) {
	t.Parallel()
	n := start(t, "-drain", "15s")
	session := newID()
	n.append(t, session, words(1, 3))
	ctx := deadline(t)
	const count = 20
	for range count {
		v := &viewer{session: session}
		background(t, func() { v.connect(ctx, n.addr, nil) })
		eventually(t, "the viewer is live", func() bool { return v.seen.Load() == 3 })
	}
	if all, _ := n.scrape(t); all["gapless_draining"] != 0 || all["gapless_viewers"] != count {
		t.Errorf("before: draining %v, %v viewers", all["gapless_draining"], all["gapless_viewers"])
	}
	n.terminate()
	eventually(t, "it drains, and some have been sent away", func() bool {
		all, _ := n.scrape(t)
		gone := all[`gapless_streams_ended_total{cause="shutdown"}`]
		return all["gapless_draining"] == 1 && gone > 0 && gone < count
	})
}
