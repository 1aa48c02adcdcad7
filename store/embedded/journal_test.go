package embedded

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	lua "github.com/yuin/gopher-lua"
)

// said is the log output of a Redis.
type said struct {
	mu sync.Mutex
	bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Buffer.Write(p)
}

func (s *said) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.String()
}

func mustOpen(t testing.TB, dir string) (*Redis, *said) {
	t.Helper()
	s := &said{}
	r, err := Open(dir, slog.New(slog.NewTextHandler(s, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	return r, s
}

func mustClose(t testing.TB, r *Redis) {
	t.Helper()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// do executes a command, and waits until its changes are on disk.
func do(t testing.TB, r *Redis, line string) string {
	t.Helper()
	text, err := try(r, strings.Fields(line)...)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func try(r *Redis, args ...string) (string, error) {
	replies, kept := r.execute([][]string{args})
	return string(reply(nil, replies[0])), kept.wait()
}

// dataset returns all contents of a Redis.
func dataset(r *Redis) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begin()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(r.keys)) {
		k := r.find(name)
		if k == nil || k.deadline != 0 && k.deadline < r.now+60_000 { // it may be gone a moment later
			continue
		}
		fmt.Fprintf(&b, "%s:", name)
		switch v := k.value.(type) {
		case *list:
			v.each(0, v.length, func(text []byte) { fmt.Fprintf(&b, " %.40s", text) })
		case map[string]string:
			for _, f := range slices.Sorted(maps.Keys(v)) {
				fmt.Fprintf(&b, " %s=%s", f, v[f])
			}
		case *zset:
			for p := v.index(0); ; p = v.next(p) {
				m, ok := v.at(p)
				if !ok {
					break
				}
				fmt.Fprintf(&b, " %s=%v", m.name, m.score)
			}
		case string:
			b.WriteString(v)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// randomly changes one of a few keys.
func randomly(t testing.TB, r *Redis, i int) {
	k, text := rand.IntN(8), strings.Repeat("x", rand.IntN(300))
	lines := []string{
		"RPUSH l%d %d" + text, "RPUSH l%d %d" + text, "RPUSH l%d a b c %d", "LPUSH l%d %d" + text, "LTRIM l%d 3 -2", "HSET h%d f%d 1 g 2", "HSET h%d f %d", "HDEL h%d g f%d",
		"ZADD z%d %d m", "ZADD z%d 1 m%d", "ZREM z%d m%d m", "SET s%d %d", "SETRANGE s%d 3 a%d", "DEL l%d", "DEL h%d x%d", "PEXPIRE l%d 900000", "PEXPIRE h%d 1", "FLUSHALL",
	}
	line := lines[rand.IntN(len(lines))]
	if line == "FLUSHALL" && rand.IntN(50) > 0 {
		return
	}
	if n := strings.Count(line, "%d"); n == 2 {
		line = fmt.Sprintf(line, k, i)
	} else if n == 1 {
		line = fmt.Sprintf(line, k)
	}
	do(t, r, line)
}

// without returns the lines of a that are not in b.
func without(a, b string) string {
	lines := strings.Split(b, "\n")
	return strings.Join(slices.DeleteFunc(strings.Split(a, "\n"), func(line string) bool { return slices.Contains(lines, line) }), "\n")
}

func lower(t *testing.T, least int64) {
	former := rewriteLeast
	rewriteLeast = least
	t.Cleanup(func() { rewriteLeast = former })
}

// Everything acknowledged exists after a restart, whatever happened and however often the journal was rewritten.
func TestJournal_whatWasAcknowledgedIsThereAgain(t *testing.T) {
	lower(t, 2<<10)
	dir := t.TempDir()
	rewritten := 0
	for round := range 15 {
		r, s := mustOpen(t, dir)
		for i := range 200 {
			randomly(t, r, i)
		}
		want := dataset(r)
		mustClose(t, r)
		rewritten += strings.Count(s.text(), "was rewritten")
		if strings.Contains(s.text(), "WARN") {
			t.Error(s.text())
		}
		r, _ = mustOpen(t, dir)
		if got := dataset(r); got != want {
			t.Fatalf("round %d: there is\n%s, not\n%s", round, without(got, want), without(want, got))
		}
		mustClose(t, r)
	}
	if rewritten == 0 {
		t.Error("the journal was never rewritten")
	}
	if all, _ := os.ReadDir(dir); len(all) > 5 {
		t.Errorf("files are left: %v", all)
	}
}

// A copy made while a Redis works is the dataset of some moment after the copy began, or it is refused.
func TestJournal_aCopyIsUsableOrRefused(t *testing.T) {
	lower(t, 16<<10)
	dir := t.TempDir()
	r, _ := mustOpen(t, dir)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { // two lists grow together and are cut together
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			n := fmt.Sprint(i)
			_, kept := r.execute([][]string{{"RPUSH", "a", n}, {"RPUSH", "b", n}, {"LTRIM", "a", "-50", "-1"}, {"LTRIM", "b", "-50", "-1"}, {"HSET", "n", "n", n}})
			if i%8 == 0 {
				_ = kept.wait()
			}
		}
	})
	usable, refused := 0, 0
	for range 25 {
		to := t.TempDir()
		all, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, entry := range all {
			p, err := os.ReadFile(filepath.Join(dir, entry.Name()))
			if err == nil {
				err = os.WriteFile(filepath.Join(to, entry.Name()), p, 0o600)
			}
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		c, err := Open(to, slog.New(slog.DiscardHandler))
		if err != nil {
			if damage := (*DamageError)(nil); !errors.As(err, &damage) {
				t.Fatal(err)
			}
			refused++
			continue
		}
		usable++
		a, b, n := do(t, c, "LRANGE a 0 -1"), do(t, c, "LRANGE b 0 -1"), do(t, c, "HGET n n")
		if last := do(t, c, "LRANGE a -1 -1"); a != b || a != "*0\r\n" && !strings.HasSuffix(last, n) {
			t.Errorf("of one instant:\n%q\n%q\n%q", a, b, n)
		}
		mustClose(t, c)
	}
	close(stop)
	wg.Wait()
	mustClose(t, r)
	if t.Logf("%d usable, %d refused", usable, refused); usable == 0 {
		t.Error("none was usable")
	}
}

// journalOf makes a directory whose journal has frames of one command each, and returns where each frame ends.
func journalOf(t *testing.T, n int) (dir, path string, ends []int64) {
	dir = filepath.Join(t.TempDir(), "data")
	r, _ := mustOpen(t, dir)
	for i := range n {
		do(t, r, fmt.Sprint("RPUSH l ", i, strings.Repeat("x", 700)))
		ends = append(ends, r.journal.size)
	}
	mustClose(t, r)
	return dir, filepath.Join(dir, "journal-00000001"), ends
}

// A torn last record is dropped and logged, whether the file ends in it or a part of it never reached the disk.
func TestJournal_aTornRecordIsDropped(t *testing.T) {
	dir, path, ends := journalOf(t, 3)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	from, to := ends[1], ends[2]
	torn := map[string][]byte{}
	for range 40 {
		cut := from + 1 + rand.Int64N(to-from-1)
		torn[fmt.Sprint("the file ends at byte ", cut)] = whole[:cut]
		if cut -= cut % sectorSize; cut > from { // a disk writes whole sectors
			torn[fmt.Sprint("zeros from byte ", cut)] = append(slices.Clone(whole[:cut]), make([]byte, len(whole)-int(cut))...)
		}
	}
	hole := slices.Clone(whole)
	clear(hole[(from+511)/512*512 : (from+511)/512*512+512])
	torn["a sector is missing"] = hole
	for name, p := range torn {
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		r, s := mustOpen(t, dir)
		if got := do(t, r, "LLEN l"); got != ":2\r\n" || !strings.Contains(s.text(), "torn") {
			t.Errorf("%s: LLEN is %q; log: %s", name, got, s.text())
		}
		do(t, r, "RPUSH l more")
		mustClose(t, r)
		r, s = mustOpen(t, dir)
		if got := do(t, r, "LLEN l"); got != ":3\r\n" || strings.Contains(s.text(), "torn") {
			t.Errorf("%s, after one more: LLEN is %q; log: %s", name, got, s.text())
		}
		mustClose(t, r)
	}
}

// Other damage is an error that names the place. Nothing is dropped silently, and the file is not changed.
func TestJournal_damageIsAnError(t *testing.T) {
	dir, path, ends := journalOf(t, 4)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(name string, p []byte, words ...string) {
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Open(dir, slog.New(slog.DiscardHandler))
		if err == nil {
			t.Errorf("%s: it was opened", name)
			mustClose(t, r)
			return
		}
		for _, word := range append(words, filepath.Base(path)) {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q is not in: %v", name, word, err)
			}
		}
		if now, _ := os.ReadFile(path); !bytes.Equal(now, p) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	for range 60 {
		p := slices.Clone(whole)
		at := rand.Int64N(ends[3])
		if p[at] ^= 1 << rand.IntN(8); at < lineSize && string(p[:len("gapless journal, format 1, number 1, from 1")]) == string(whole[:len("gapless journal, format 1, number 1, from 1")]) {
			continue // a space that pads the line
		}
		refused(fmt.Sprint("a bit of byte ", at), p)
	}
	p := slices.Clone(whole)
	clear(p[ends[0]:ends[1]])
	refused("a record of zeros", p, fmt.Sprint("byte ", ends[0]), "whole one after it", "restore")
	refused("a newer format", append([]byte("gapless journal, format 2, number 1, from 1"), whole[43:]...), "format 2", "newer gapless")
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, filepath.Join(dir, "journal-00000002")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a missing file: %v", err)
	}
}

// Two processes never share a directory, and no other user can read it.
func TestJournal_aDirectoryIsOnesOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "data")
	r, _ := mustOpen(t, dir)
	if _, err := Open(dir, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a second one: %v", err)
	}
	do(t, r, "SET a b")
	mustClose(t, r)
	r, _ = mustOpen(t, dir)
	mustClose(t, r)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", info.Mode(), err)
	}
	all, _ := os.ReadDir(dir)
	for _, entry := range all {
		if info, err := entry.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", entry.Name(), info.Mode(), err)
		}
	}
}

// Keys also expire across a restart, and a key that was created since then does not expire with the old one.
func TestJournal_expiryGoesOn(t *testing.T) {
	dir := t.TempDir()
	r, _ := mustOpen(t, dir)
	do(t, r, "RPUSH l old")
	do(t, r, "PEXPIRE l 1")
	do(t, r, "SET soon x")
	do(t, r, "PEXPIRE soon 40")
	do(t, r, "SET later x")
	do(t, r, "PEXPIRE later 100000")
	for do(t, r, "EXISTS l") != ":0\r\n" {
		time.Sleep(time.Millisecond)
	}
	do(t, r, "RPUSH l new")
	mustClose(t, r)
	time.Sleep(50 * time.Millisecond)
	r, _ = mustOpen(t, dir)
	defer mustClose(t, r)
	if got := do(t, r, "LRANGE l 0 -1"); got != "*1\r\n$3\r\nnew\r\n" {
		t.Errorf("the list is %q", got)
	}
	if got := do(t, r, "EXISTS soon later"); got != ":1\r\n" {
		t.Errorf("EXISTS is %q", got)
	}
	var ms int
	if _, _ = fmt.Sscanf(do(t, r, "PTTL later"), ":%d", &ms); ms < 90_000 || ms > 100_000 {
		t.Errorf("it lives for %d ms", ms)
	}
}

// Nothing is sent before it is on disk: no reply, no announcement, and no reply to another reader.
func TestJournal_nothingLeavesBeforeItIsOnDisk(t *testing.T) {
	r, _ := mustOpen(t, t.TempDir())
	defer mustClose(t, r)
	conn, err := r.Dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<10)
	if _, err := conn.Read(buf); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock() // holds the batch back
	r.begin()
	for _, args := range [][]string{{"SET", "a", "b"}, {"PUBLISH", "c", "news"}} {
		r.run(args, false)
	}
	kept := r.end()
	r.begin()
	if v := r.run([]string{"GET", "a"}, false); v != lua.LString("b") {
		t.Errorf("GET: %v", v)
	}
	if read := r.end(); read != kept {
		t.Error("a read does not wait for what it has read")
	}
	for c := range r.conns {
		c.mu.Lock()
		if len(c.pending) > 0 {
			t.Errorf("%q left", c.pending)
		}
		c.mu.Unlock()
	}
	r.mu.Unlock()
	if err := kept.wait(); err != nil {
		t.Fatal(err)
	}
	n, err := conn.Read(buf)
	if err != nil || !strings.Contains(string(buf[:n]), "news") {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

// A machine that stops may keep any part of what was not yet synced. Everything acknowledged is still there.
func TestJournal_cutWithinWhatWasNotSynced(t *testing.T) {
	lower(t, 256<<10)
	dir := t.TempDir()
	r, _ := mustOpen(t, dir)
	var stop sync.WaitGroup
	quit := make(chan struct{})
	var acknowledged [8]atomic.Int64
	for i := range acknowledged {
		stop.Go(func() {
			for n := int64(1); ; n++ {
				select {
				case <-quit:
					return
				default:
				}
				if _, err := try(r, "RPUSH", fmt.Sprint("l", i), fmt.Sprint(n), strings.Repeat("x", rand.IntN(2000))); err != nil {
					t.Error(err)
					return
				}
				acknowledged[i].Store(n)
				if n%500 == 0 {
					_, _ = try(r, "LTRIM", fmt.Sprint("l", i), "-2", "-1")
				}
			}
		})
	}
	cuts := 0
	for range 40 {
		to := t.TempDir()
		r.mu.Lock()
		size, synced, number := r.journal.size, r.journal.size, r.journal.number
		if b := r.journal.flying; b != nil {
			synced -= headerSize + int64(len(b.units))
		}
		var least [len(acknowledged)]int64
		for i := range least {
			least[i] = acknowledged[i].Load()
		}
		all, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		cut := synced + rand.Int64N(size-synced+1)
		if cut < size {
			cuts++
		}
		for _, entry := range all {
			p, err := os.ReadFile(filepath.Join(dir, entry.Name()))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			if entry.Name() == filepath.Base(r.journal.path("journal", number)) {
				p = p[:cut]
			}
			if err == nil && !strings.HasSuffix(entry.Name(), ".new") {
				if err := os.WriteFile(filepath.Join(to, entry.Name()), p, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		r.mu.Unlock()
		c, _ := mustOpen(t, to)
		for i := range least {
			got := strings.Split(do(t, c, fmt.Sprintf("LRANGE l%d -2 -2", i)), "\r\n")
			var n int64
			if len(got) > 2 {
				_, _ = fmt.Sscan(got[2], &n)
			}
			if n < least[i] {
				t.Errorf("%d were acknowledged, and %d are there", least[i], n)
			}
		}
		mustClose(t, c)
		if t.Failed() {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(quit)
	stop.Wait()
	mustClose(t, r)
	if cuts == 0 {
		t.Error("nothing was ever cut")
	}
}

// After a disk error the Redis stops serving: what was not written is neither acknowledged nor read. A restart reads what was written.
func TestJournal_aDiskThatFails(t *testing.T) {
	dir := t.TempDir()
	r, s := mustOpen(t, dir)
	do(t, r, "SET a 1")
	r.mu.Lock()
	_ = r.journal.file.Close()
	r.mu.Unlock()
	if reply, err := try(r, "SET", "a", "2"); err == nil {
		t.Errorf("it is acknowledged: %q", reply)
	}
	for _, line := range []string{"SET a 3", "GET a"} {
		if got := do(t, r, line); !strings.HasPrefix(got, "-MISCONF ") {
			t.Errorf("%s: %q", line, got)
		}
	}
	if !strings.Contains(s.text(), "remedy") {
		t.Errorf("the log says: %s", s.text())
	}
	if err := r.Close(); err == nil {
		t.Error("it is closed as if nothing had been")
	}
	r, _ = mustOpen(t, dir)
	defer mustClose(t, r)
	if got := do(t, r, "GET a"); got != "$1\r\n1\r\n" {
		t.Errorf("after a restart: %q", got)
	}
}
