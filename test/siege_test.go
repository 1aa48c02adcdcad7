//go:build linux

package test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha1" // #nosec G505 -- it is how Redis names scripts
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
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

	"github.com/golang-jwt/jwt/v5"
	"github.com/prometheus/procfs"

	"gapless/api/auth/authtest"
	"gapless/store/storetest"
)

// In the siege, one caller does its worst (siege_attacks_test.go), next to a neighbour that appends and follows. The node
// is the built program with the default limits, and with the memory settings that the shipped files give a node of 512 MiB.
// Its Redis has the shipped maxmemory. Each attack meets a new node and a new Redis, so that it causes all the memory they use.
// Attackers and the neighbour are separate processes. The attackers yield to all others, as if they were on other machines.
//
//	make siege                          every attack, and the table
//	make siege FOR=2m ONLY='window|files'       the attacks whose names match, two minutes each
//
// TestSiege_short gives each attack a moment. It checks memory and refusals. Times are meaningful only on an idle machine.
var (
	siegeFor  = flag.Duration("siege.for", 20*time.Second, "how long each attack of BenchmarkSiege lasts")
	siegeOnly = flag.String("siege.only", "", "a regular expression that the names of the attacks match; empty: all")
)

// The most memory that an attack may cost a node, in MiB: by callers without a token, with a token that may read, and with
// a token that may write.
const (
	stranger = 256
	reader   = 384
	writer   = 460
)

// closedWithin is how long a connection without progress may stay open.
const closedWithin = time.Minute

// assault is the outcome of one attack.
type assault struct {
	attack    siegeAttack
	peak      int            // RSS of the node, MiB
	slowest   time.Duration  // the longest call of Redis,
	script    string         // its name,
	over      int            // and how many calls took more than 10 ms
	neighbour neighbourFound // what the neighbour saw
	said      map[string]int // the responses to the attacker
	refused   map[string]int // what the node refused, by limit
	kept      time.Duration  // how long the attacker kept a connection without progress
}

// shippedMemory returns the environment that deploy/systemd sets for a node of 512 MiB.
func shippedMemory(t testing.TB) []string {
	t.Helper()
	unit, err := os.ReadFile("deploy/systemd/gapless.service")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, found := range regexp.MustCompile(`(?m)^Environment=(\S+)$`).FindAllSubmatch(unit, -1) {
		all = append(all, string(found[1]))
	}
	if !slices.ContainsFunc(all, func(v string) bool { return strings.HasPrefix(v, "GOMEMLIMIT=") }) || !bytes.Contains(unit, []byte("\nMemoryMax=512M\n")) {
		t.Fatalf("the unit limits no memory: %q", all)
	}
	return all
}

// besieged is a node as shipped, with the tokens of its callers.
type besieged struct {
	t     testing.TB
	redis *storetest.Server
	node  *node
	order siegeOrder // the attacker's task
	good  string     // the neighbour's token
	long  time.Duration
}

func besiege(t testing.TB, a siegeAttack, long time.Duration, small bool) *besieged {
	t.Helper()
	issuer := authtest.New(t)
	sign := func(subject string, may authtest.May) string {
		text := issuer.Sign(jwt.MapClaims{"exp": time.Now().Add(time.Hour).Unix(), "sub": subject, "gapless": may})
		plant(text)
		return text
	}
	args := append([]string{"--maxmemory", "1gb", "--maxmemory-policy", "noeviction", "--slowlog-log-slower-than", "1000", "--slowlog-max-len", "100000"}, a.redis...)
	b := &besieged{t: t, redis: storetest.Redis(t, args...)}
	script := filepath.Join(t.TempDir(), "shipped")
	text := "#!/bin/sh\nexec env " + strings.Join(shippedMemory(t), " ") + " '" + plainProgram(t) + "' \"$@\"\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	// On loopback, addresses distinguish callers only if a limit per caller is given. This one is the default.
	flags := []string{"-redis", b.redis.URL(), "-auth", issuer.Source(), "-log-level", "info", "-caller-connections", "1000"}
	if a.tls {
		cert, key := storetest.NewAuthority(t).Issue("127.0.0.1")
		flags = append(flags, "-tls-cert", cert, "-tls-key", key)
	}
	b.node = startProgram(t, script, append(flags, a.node...)...)
	b.good = sign("neighbour", authtest.May{"admin": {"good-*"}})
	b.node.token = sign("operator", authtest.May{"admin": {"*"}})
	b.order = siegeOrder{Attack: a.name, Addr: b.node.addr, TLS: a.tls, Small: small, Said: a.said}
	b.long = long
	switch a.most {
	case reader:
		b.order.Token = sign("evil", authtest.May{"read": {"evil-*"}})
	case writer:
		b.order.Token = sign("evil", authtest.May{"read": {"evil-*"}, "write": {"evil-*"}, "ask": {"evil-*"}, "cancel": {"evil-*"}, "admin": {"evil-*"}})
	}
	if a.prepare != nil {
		a.prepare(b)
	}
	return b
}

// launchRole starts a role of this program, and waits until the role has begun. wait ends it if stop is set, and reads its findings.
func launchRole(ctx context.Context, role string, nice int, order any) (wait func(stop bool, found any) error, err error) {
	what, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var wrong bytes.Buffer
	cmd := exec.CommandContext(ctx, self, role)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(what), &wrong
	said, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, cmd.Process.Pid, nice) // its threads are created later
	from := bufio.NewReader(said)
	if _, err := from.ReadString('\n'); err != nil {
		return nil, fmt.Errorf("%s: %w, %w: %s", role, err, cmd.Wait(), &wrong)
	}
	return func(stop bool, found any) error {
		if stop {
			_ = cmd.Process.Signal(syscall.SIGTERM)
		}
		read := json.NewDecoder(from).Decode(found)
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%s: %w: %s", role, err, wrong.Bytes()[:min(wrong.Len(), 4<<10)])
		}
		return read
	}, nil
}

// assault runs one attack until the neighbour has finished and the node has refused what it must refuse.
func (b *besieged) assault(a siegeAttack) assault {
	b.t.Helper()
	b.redis.Do(b.t.Context(), "slowlog", "reset")
	found := assault{attack: a}
	ctx, cancel := context.WithTimeout(b.t.Context(), b.long+5*patience)
	defer cancel()
	attacked, err := launchRole(ctx, "attacker", 19, b.order)
	if err != nil {
		b.t.Fatal(err)
	}
	lived, err := launchRole(ctx, "neighbour", 0, neighbourOrder{Addr: b.node.addr, TLS: b.order.TLS, Token: b.good, For: b.long})
	if err == nil {
		err = lived(false, &found.neighbour)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	eventually(b.t, "the node refuses what it has to", func() bool {
		found.refused = b.refused()
		return !slices.ContainsFunc(a.refused, func(limit string) bool { return found.refused[limit] == 0 })
	})
	var outcome siegeOutcome
	if err := attacked(true, &outcome); err != nil {
		b.t.Fatal(err)
	}
	found.said, found.kept = outcome.Said, outcome.Kept
	found.peak = b.peak()
	found.slowest, found.script, found.over = b.slowest()
	found.refused = b.refused()
	return found
}

// refused returns how often the node refused something, by limit.
func (b *besieged) refused() map[string]int {
	b.t.Helper()
	all := map[string]int{}
	metrics, _ := b.node.scrape(b.t)
	for name, value := range metrics {
		if limit, ok := strings.CutPrefix(name, `gapless_refused_total{limit="`); ok && value > 0 {
			all[strings.TrimSuffix(limit, `"}`)] = int(value)
		}
	}
	return all
}

// peak returns the most memory that the node has used, in MiB.
func (b *besieged) peak() int {
	b.t.Helper()
	proc, err := procfs.NewProc(b.node.cmd.Process.Pid)
	if err != nil {
		b.t.Fatal(err)
	}
	status, err := proc.NewStatus()
	if err != nil {
		b.t.Fatal(err)
	}
	return int(status.VmHWM >> 20)
}

// slowest returns the longest call of Redis, and how many calls took more than 10 ms.
func (b *besieged) slowest() (longest time.Duration, script string, over int) {
	b.t.Helper()
	all, err := b.redis.SlowLogGet(b.t.Context(), -1).Result()
	if err != nil {
		b.t.Fatal(err)
	}
	names := scriptNames(b.t)
	for _, one := range all {
		name := strings.ToLower(one.Args[0])
		switch {
		case name == "slowlog" || name == "info": // made by the test
			continue
		case name == "evalsha":
			name = cmp.Or(names[one.Args[1]], "a script")
		}
		if one.Duration > 10*time.Millisecond {
			over++
		}
		if one.Duration > longest {
			longest, script = one.Duration, name
		}
	}
	return longest, script, over
}

// scriptNames maps the hashes of the store's scripts to the names of the files from which they are assembled.
func scriptNames(t testing.TB) map[string]string {
	t.Helper()
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join("store", name+".lua"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	names := map[string]string{}
	for _, name := range []string{"push", "append", "read", "session", "ticket"} {
		for _, text := range []string{read(name), read("log") + read(name) + read("run")} {
			for _, flags := range []string{"", "#!lua flags=allow-oom\n"} {
				sum := sha1.Sum([]byte(flags + text)) // #nosec G401
				names[hex.EncodeToString(sum[:])] = name
			}
		}
	}
	return names
}

// judge returns what is wrong with memory and refusals.
func (f assault) judge() (wrong []string) {
	if f.peak > f.attack.most {
		wrong = append(wrong, fmt.Sprintf("the node has had %d MiB, of %d", f.peak, f.attack.most))
	}
	if f.kept > closedWithin+5*time.Second {
		wrong = append(wrong, fmt.Sprintf("a connection without progress was kept for %v", f.kept))
	}
	if n := f.neighbour; n.Got < n.Stored || n.Refused > 0 {
		wrong = append(wrong, fmt.Sprintf("the neighbour has %d of its %d chunks, and was refused %d times (%s)", n.Got, n.Stored, n.Refused, n.Why))
	}
	for _, answer := range f.attack.said {
		if f.said[answer] == 0 {
			wrong = append(wrong, fmt.Sprintf("nobody was answered %s: %v", answer, f.said))
		}
	}
	return wrong
}

// why summarises what was refused.
func (f assault) why() string {
	var all []string
	for _, limit := range slices.Sorted(maps.Keys(f.refused)) {
		all = append(all, fmt.Sprintf("`-%s` %d", limit, f.refused[limit]))
	}
	kinds := slices.SortedFunc(maps.Keys(f.said), func(a, b string) int { return f.said[b] - f.said[a] })
	for _, kind := range kinds {
		if len(all) < 4 && (kind[0] == '4' || kind[0] == '5') {
			all = append(all, fmt.Sprintf("%s %d", kind, f.said[kind]))
		}
	}
	return cmp.Or(strings.Join(all, ", "), "nothing")
}

// chosen returns the attacks that match -siege.only.
func chosen() []siegeAttack {
	only := regexp.MustCompile(*siegeOnly)
	return slices.DeleteFunc(slices.Clone(siegeAttacks), func(a siegeAttack) bool { return !only.MatchString(a.name) })
}

// BenchmarkSiege runs each attack for long, and prints the table.
func BenchmarkSiege(b *testing.B) {
	calm := siegeAttack{name: "nothing", most: writer, run: func(a *attacker) { <-a.ctx.Done() }}
	var all []assault
	for i, a := range append([]siegeAttack{calm}, chosen()...) {
		fmt.Fprintf(os.Stderr, "%s %d of %d: %s\n", time.Now().Format(time.TimeOnly), i, len(chosen()), a.name)
		b.Run(a.name, func(b *testing.B) {
			long := max(a.least, *siegeFor)
			found := besiege(b, a, long, false).assault(a)
			for _, wrong := range found.judge() {
				b.Errorf("%s: %s", a.name, wrong)
			}
			fmt.Fprintf(os.Stderr, "         %s\n         %v\n", found.row(), found.said)
			all = append(all, found)
		})
	}
	fmt.Printf("\n%v an attack, %d attacks.\n\n", *siegeFor, len(all)-1)
	fmt.Println("| attack | caller | node, MiB | longest Redis call, ms | neighbour p50, ms | p99, ms | refused |\n|---|---|---|---|---|---|---|")
	for _, f := range all {
		fmt.Println(f.row())
	}
	fmt.Println()
}

// row returns a line of the table.
func (f assault) row() string {
	ms := func(d time.Duration) string { return strconv.FormatFloat(float64(d.Microseconds())/1000, 'f', 1, 64) }
	who := map[int]string{stranger: "no token", reader: "reads", writer: "writes"}[f.attack.most]
	if f.attack.who != "" {
		who = f.attack.who
	}
	redis := ms(f.slowest) + " " + f.script
	if f.over > 1 {
		redis += fmt.Sprintf(" (%d over 10)", f.over)
	}
	if f.slowest == 0 {
		redis = "< 1"
	}
	return fmt.Sprintf("| %s | %s | %d | %s | %s | %s | %s |", f.attack.name, who, f.peak, redis, ms(f.neighbour.P50), ms(f.neighbour.P99), f.why())
}

// Whatever a caller does, the node's memory stays within its limit, the caller's excess is refused, and
// nothing of its neighbour's is refused.
func TestSiege_short(t *testing.T) {
	if len(siegeAttacks) < 20 {
		t.Fatalf("%d attacks", len(siegeAttacks))
	}
	for _, a := range chosen() {
		if a.long {
			continue
		}
		t.Run(strings.ReplaceAll(a.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			begun := time.Now()
			found := besiege(t, a, time.Second, true).assault(a)
			for _, wrong := range found.judge() {
				t.Error(wrong)
			}
			t.Logf("%v: %s %v", time.Since(begun).Round(time.Millisecond), found.row(), found.said)
			storetest.Moved(t)
		})
	}
}

func init() { roles["neighbour"] = neighbourRole }
