package embedded

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// A journal grows with all that ever happened. When most of that is history, the dataset is written down as a snapshot, and
// the journals before it are removed.
//
// Commands go on meanwhile. First the journal goes on in a new file. Then the keys are written down, a few at a time, each
// as it is at that moment, with the number of the last unit. Who reads that again skips what the new journal says of a key up to
// this number. At the end stands the number of the last unit at that time: the snapshot is of no use with a journal
// that does not go so far, such as a copy of it that was made earlier.

// rewriteLeast is how much longer than the snapshot the journals become.
var rewriteLeast int64 = 32 << 20

// successor is a file that a journal is to go on in.
type successor struct {
	file *os.File
	room int64 // how long it is
	done chan error
}

// rewriteIfDue begins a snapshot when it is time for one.
func (j *journal) rewriteIfDue() {
	j.redis.mu.Lock()
	defer j.redis.mu.Unlock()
	if j.due() {
		j.wg.Go(j.rewrite)
	}
}

// full reports whether the disk was full a moment ago. redis.mu is held.
func (j *journal) full() bool { return !j.fullSince.IsZero() && time.Since(j.fullSince) < fullFor }

// due reports whether it is time for a snapshot, and says that one begins. redis.mu is held.
func (j *journal) due() bool {
	grown := j.former + j.size - j.base
	if j.rewriting || j.failure != nil || time.Now().Before(j.retry) {
		return false
	}
	if (grown < rewriteLeast || j.former+j.size < 2*j.base) && !j.full() {
		return false
	}
	select {
	case <-j.quit:
		return false
	default:
	}
	j.rewriting = true
	return true
}

const (
	// retryRewrite is how long after a failure a snapshot is tried again.
	retryRewrite = 30 * time.Second
	// retryFull is how often a full disk is checked for whether a snapshot would free space.
	retryFull = 5 * time.Second
)

var (
	errStopped  = errors.New("the embedded redis stops")
	errNotWorth = errors.New("most of the journal is still needed")
)

// squeeze makes space on a full disk for a snapshot, if one is worth it and fits: it gives back the room of the journal, but for what
// commands need that free space.
func (j *journal) squeeze(snapshot string) error {
	size, err := j.writeDataset(io.Discard, 0, nil)
	if err != nil {
		return err
	}
	j.growing.Lock()
	defer j.growing.Unlock()
	j.redis.mu.Lock()
	worth := 2*size <= j.former+j.size+j.base
	if surplus := j.room() - roomScarce; worth && surplus > 0 {
		j.allocated -= surplus
		err = j.file.Truncate(j.allocated)
	}
	j.redis.mu.Unlock()
	if !worth {
		return errNotWorth
	}
	file, failed := os.OpenFile(snapshot, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	return errors.Join(fill(file, 0, size+size/8+roomScarce+lineSize), file.Close(), os.Remove(snapshot)) // and room for the new journal
}

func (j *journal) rewrite() {
	begun := time.Now()
	size, err := j.tryRewrite()
	j.redis.mu.Lock()
	defer j.redis.mu.Unlock()
	j.rewriting = false
	if errors.Is(err, errStopped) {
		return
	}
	if errors.Is(err, errNotWorth) || isFull(err) { // that the disk is full has been said
		j.retry = time.Now().Add(retryFull)
		return
	}
	if err != nil {
		j.retry = time.Now().Add(retryRewrite)
		j.redis.log.Warn("the journal of the embedded redis could not be rewritten", slog.String("dir", j.dir), slog.Any("err", err))
		return
	}
	j.redis.log.Debug("the journal of the embedded redis was rewritten", slog.Int64("bytes", size), slog.Duration("took", time.Since(begun)))
}

func (j *journal) tryRewrite() (size int64, err error) {
	number := j.number + 1 // only rewrite changes it
	path := j.path("snapshot", number)
	j.redis.mu.Lock()
	full := j.full()
	j.redis.mu.Unlock()
	if full {
		if err := j.squeeze(path + ".new"); err != nil {
			return 0, err
		}
	}
	file, room, err := newJournalFile(j.path("journal", number) + ".new")
	if err != nil {
		return 0, err
	}
	s := &successor{file, room, make(chan error, 1)}
	j.redis.mu.Lock()
	j.successor = s
	j.redis.mu.Unlock()
	signal(j.wake)
	select {
	case err = <-s.done:
	case <-j.quit:
		j.redis.mu.Lock()
		taken := j.successor != s
		if !taken {
			j.successor, err = nil, errStopped
		}
		j.redis.mu.Unlock()
		if taken {
			err = <-s.done
		}
	}
	if err != nil {
		_ = file.Close()
		_ = os.Remove(file.Name())
		return 0, err
	}
	size, err = j.writeSnapshot(path+".new", number)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = syncDir(j.dir)
	}
	if err != nil {
		_ = os.Remove(path + ".new")
		return 0, err
	}
	j.redis.mu.Lock()
	j.former, j.base = 0, size
	j.redis.mu.Unlock()
	return size, removeBefore(j.dir, number)
}

// newJournalFile makes a file that has no line yet, but room. It returns how long the file is.
func newJournalFile(path string) (file *os.File, room int64, err error) {
	if file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
		return nil, 0, err
	}
	for _, room = range []int64{roomStep, roomScarce} {
		if err = fill(file, 0, room); err == nil {
			return file, room, nil
		}
		_ = file.Truncate(0)
	}
	return nil, 0, errors.Join(err, file.Close(), os.Remove(path))
}

// settle gives a new file its first line and its name. The file is closed meanwhile: Windows renames no file that is open.
func settle(file *os.File, path string, line []byte) (*os.File, error) {
	_, err := file.WriteAt(line, 0)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return nil, err
	}
	err = syncDir(filepath.Dir(path))
	if err == nil {
		file, err = os.OpenFile(path, os.O_RDWR, 0)
	}
	if err != nil { // the journal does not go on there
		return nil, errors.Join(err, os.Remove(path))
	}
	return file, nil
}

// change has the journal go on in another file. Only write calls it: so no frame is under way.
func (j *journal) change(s *successor) error {
	j.growing.Lock()
	defer j.growing.Unlock()
	r := j.redis
	r.mu.Lock()
	from, number, former, size := j.next, j.number+1, j.file, j.size
	if j.pending != nil {
		from = j.pending.first
	}
	r.mu.Unlock()
	file, err := settle(s.file, j.path("journal", number), firstLine("journal", number, from))
	if err != nil {
		return err
	}
	r.mu.Lock()
	j.file, j.number, j.began, j.former = file, number, from, j.former+size
	j.size, j.allocated = lineSize, s.room
	r.mu.Unlock()
	_ = former.Truncate(size)
	_ = former.Close()
	return nil
}

// snapshotSlice is how many keys are looked at under the lock.
const snapshotSlice = 64

// writeSnapshot writes the dataset to a file, while it changes.
func (j *journal) writeSnapshot(path string, number uint64) (size int64, err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	var last *batch
	size, err = j.writeDataset(file, number, &last)
	if err == nil {
		err = file.Sync()
	}
	if err == nil {
		err = last.wait() // the journal goes as far as the snapshot says
	}
	return size, err
}

// writeDataset writes the dataset, as snapshot number. If last is not nil, it is set to what has to be on disk for the snapshot to be of use.
func (j *journal) writeDataset(to io.Writer, number uint64, last **batch) (size int64, err error) {
	w := &snapshotWriter{to: bufio.NewWriterSize(to, 1<<20), next: 1}
	r := j.redis
	r.mu.Lock()
	w.write(firstLine("snapshot", number, j.began))
	n := 0
	var some []frozen
	for name, k := range r.keys {
		some = append(some, freeze(name, k, j.next-1))
		if n++; n%snapshotSlice > 0 {
			continue
		}
		r.mu.Unlock()
		for _, f := range some {
			f.write(w)
		}
		some = some[:0]
		stop := false
		select {
		case <-j.quit:
			stop = true
		default:
		}
		r.mu.Lock()
		if stop || w.err != nil {
			break
		}
	}
	until := j.next - 1
	if last != nil {
		if *last = j.flying; j.pending != nil {
			j.pending.eager = true
			*last = j.pending
		}
		signal(j.wake)
	}
	r.mu.Unlock()
	for _, f := range some {
		f.write(w)
	}
	select {
	case <-j.quit:
		return 0, errStopped
	default:
	}
	w.command("END", strconv.FormatUint(until, 10))
	w.flush()
	if w.err == nil {
		w.err = w.to.Flush()
	}
	return w.size, w.err
}

// frozen is a key as it was at one moment.
type frozen struct {
	name     string
	since    uint64
	deadline int64
	blocks   []block  // of a list: what is in a block stays, whatever comes after it
	fields   []string // of a hash: names and values in turn
	members  []string // of a sorted set: scores and names in turn
	text     *string
}

// freeze is fast: it is called under the lock.
func freeze(name string, k *key, since uint64) frozen {
	f := frozen{name: name, since: since, deadline: k.deadline}
	switch v := k.value.(type) {
	case *list:
		f.blocks = make([]block, len(v.blocks))
		for i, b := range v.blocks {
			f.blocks[i] = *b
		}
	case map[string]string:
		f.fields = make([]string, 0, 2*len(v))
		for name, text := range v {
			f.fields = append(f.fields, name, text)
		}
	case *zset:
		f.members = make([]string, 0, 2*len(v.scores))
		for name, score := range v.scores {
			f.members = append(f.members, formatScore(score), name)
		}
	case string:
		f.text = &v
	}
	return f
}

func (f frozen) write(w *snapshotWriter) {
	for _, b := range f.blocks {
		texts := make([]string, 0, b.n)
		b.each(0, b.n, func(text []byte) { texts = append(texts, string(text)) })
		w.command("RPUSH", append([]string{f.name}, texts...)...)
	}
	for all := f.fields; len(all) > 0; {
		n := min(len(all), 256)
		w.command("HSET", append([]string{f.name}, all[:n]...)...)
		all = all[n:]
	}
	for all := f.members; len(all) > 0; {
		n := min(len(all), 256)
		w.command("ZADD", append([]string{f.name}, all[:n]...)...)
		all = all[n:]
	}
	if f.text != nil {
		w.command("SET", f.name, *f.text)
	}
	if f.deadline != 0 {
		w.command("PEXPIREAT", f.name, strconv.FormatInt(f.deadline, 10))
	}
	w.command("SINCE", f.name, strconv.FormatUint(f.since, 10))
}

// snapshotWriter writes commands in frames.
type snapshotWriter struct {
	to   *bufio.Writer
	next uint64 // the number of the next unit: a snapshot's begin at 1
	b    *batch
	size int64
	err  error
}

func (w *snapshotWriter) command(name string, args ...string) {
	if w.b == nil {
		w.b = &batch{first: w.next}
	}
	c := changes{wanted: true}
	c.write(name, args)
	w.b.add(c.data)
	w.next++
	if len(w.b.units) > 256<<10 {
		w.flush()
	}
}

func (w *snapshotWriter) flush() {
	if w.b != nil {
		w.write(w.b.frame())
		w.b = nil
	}
}

func (w *snapshotWriter) write(p []byte) {
	if w.err == nil {
		_, w.err = w.to.Write(p)
		w.size += int64(len(p))
	}
}
