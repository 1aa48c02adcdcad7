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

// A journal grows with every change. When most of it is history, the dataset is written to a snapshot, and
// the journals before it are removed.
//
// Commands continue meanwhile. First the journal continues in a new file. Then the keys are written, a few at a time, each
// in its current state, together with the number of the last unit. On loading, the new journal's changes to a key are skipped up to
// that number. The snapshot ends with the number of the last unit at that time. It is useless with a journal
// that does not reach that unit, such as a copy that was made earlier.

// rewriteLeast is the least number of bytes by which the journals outgrow the snapshot before a rewrite.
var rewriteLeast int64 = 32 << 20

// successor is the file in which a journal will continue.
type successor struct {
	file *os.File
	room int64 // the length of the file
	done chan error
}

// rewriteIfDue starts a snapshot if it is time for one.
func (j *journal) rewriteIfDue() {
	j.redis.mu.Lock()
	defer j.redis.mu.Unlock()
	if j.due() {
		j.wg.Go(j.rewrite)
	}
}

// full reports whether the disk was recently full. redis.mu is held.
func (j *journal) full() bool { return !j.fullSince.IsZero() && time.Since(j.fullSince) < fullFor }

// due reports whether it is time for a snapshot, and marks one as begun if so. redis.mu is held.
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
	// retryRewrite is the pause before another snapshot after a failure.
	retryRewrite = 30 * time.Second
	// retryFull is the pause before another check whether a snapshot would free space on a full disk.
	retryFull = 5 * time.Second
)

var (
	errStopped  = errors.New("the embedded redis stops")
	errNotWorth = errors.New("most of the journal is still needed")
)

// squeeze makes space on a full disk for a snapshot, if one is worth it and fits. It gives back the journal's room, except for what
// commands that free space need.
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
	return errors.Join(fill(file, 0, size+size/8+roomScarce+lineSize), file.Close(), os.Remove(snapshot)) // including room for the new journal
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
	if errors.Is(err, errNotWorth) || isFull(err) { // that the disk is full has been logged
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
	number := j.number + 1 // only tryRewrite changes it
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

// newJournalFile creates a file with room, but without its first line. It returns the length of the file.
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

// settle gives a new file its first line and its name. It closes the file meanwhile, because Windows cannot rename an open file.
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
	if err != nil { // the journal does not continue there
		return nil, errors.Join(err, os.Remove(path))
	}
	return file, nil
}

// change makes the journal continue in another file. Only write calls it, so no frame is being written.
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

// snapshotSlice is how many keys are copied in one hold of the lock.
const snapshotSlice = 64

// writeSnapshot writes the dataset to a file while the dataset changes.
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
		err = last.wait() // the journal must reach as far as the snapshot says
	}
	return size, err
}

// writeDataset writes the dataset as snapshot number. If last is not nil, it is set to the batch that must be on disk for the snapshot to be usable.
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

// frozen is a copy of a key at one moment.
type frozen struct {
	name     string
	since    uint64
	deadline int64
	blocks   []block  // of a list: the texts in a block never change, even if more are added
	fields   []string // of a hash: names and values alternate
	members  []string // of a sorted set: scores and names alternate
	text     *string
}

// freeze copies a key. It is fast, because the lock is held.
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
	next uint64 // the number of the next unit; a snapshot's units begin at 1
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
