package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// journal keeps a dataset in a directory:
//
//	journal-<n>          the changes, in order
//	snapshot-<n>         the dataset when journal-<n> began, or later (snapshot.go)
//	*.new                files that are not complete yet
//
// A unit is what one command, one transaction or one run of a script changed: its changing commands, each with its arguments.
// Units are numbered. All waiting units are written to the file together, as one frame, which is on disk before the next frame is
// written. So only the last frame can be torn. A file begins with a line of text, and has zeros after its last frame. This space is
// allocated in advance, so that a full disk refuses a command before the command has changed anything.
//
// The journal contains commands, not calls of scripts. So the result of reading it does not depend on the version of a script, on
// random choices or on the clock, and reading is fast. Nothing expires while a journal is read, because it records what expired.
type journal struct {
	redis  *Redis
	dir    string
	lock   *os.File
	wake   chan struct{} // for write: units are waiting
	hungry chan struct{} // for keepRoom: little room is left
	quit   chan struct{}
	wg     sync.WaitGroup

	growing sync.Mutex // held while a file is extended or replaced

	// Guarded by redis.mu:
	file      *os.File
	number    uint64 // n of the file
	began     uint64 // the number of its first unit
	size      int64  // where the next frame goes
	allocated int64  // the length of the file
	next      uint64 // the number of the next unit
	pending   *batch // units waiting to be written
	flying    *batch // units that are being written
	failure   error  // why nothing can be written any more
	fullSince time.Time
	successor *successor
	former    int64 // bytes of earlier journals that the last snapshot does not cover
	base      int64 // bytes of the last snapshot
	rewriting bool
	retry     time.Time // when to retry a snapshot
}

// batch is a group of units that are written to disk together.
type batch struct {
	first uint64
	time  int64
	units []byte
	count uint32
	eager bool      // a reply waits for it
	news  []message // to be delivered once it is on disk
	done  chan struct{}
	err   error // set before done is closed
}

// wait waits until the batch is on disk. A nil batch is on disk already.
func (b *batch) wait() error {
	if b == nil {
		return nil
	}
	<-b.done
	return b.err
}

// changes collects the commands of a unit.
type changes struct {
	wanted bool // a journal exists
	eager  bool // must be on disk before any reply or message
	data   []byte
}

func (c *changes) reset() { c.data, c.eager = c.data[:0], false }

// add adds a command.
func (c *changes) add(name string, args ...string) {
	if c.wanted {
		c.eager = true
		c.write(name, args)
	}
}

func (c *changes) addMany(name, key string, rest []string) {
	if c.wanted {
		c.add(name, append([]string{key}, rest...)...)
	}
}

// addLazily adds a command that no reply has to wait for.
func (c *changes) addLazily(name string, args ...string) {
	if c.wanted {
		c.write(name, args)
	}
}

func (c *changes) write(name string, args []string) {
	c.data = binary.AppendUvarint(c.data, uint64(len(args)+1))
	c.data = appendText(c.data, name)
	for _, arg := range args {
		c.data = appendText(c.data, arg)
	}
}

func appendText(to []byte, text string) []byte {
	return append(binary.AppendUvarint(to, uint64(len(text))), text...)
}

// A frame is a header and units, each preceded by its length. All numbers are little-endian.
//
//	0  mark         4   frameMark
//	4  check        4   CRC-32C of the rest of the header
//	8  first        8   the number of its first unit
//	16 time         8   ms: when that unit was added
//	24 count        4   number of units
//	28 length       4   size of all units, in bytes
//	32 check        4   CRC-32C of the units
const (
	frameMark  = 0x1e5a71a9
	headerSize = 36
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (b *batch) frame() []byte {
	f := make([]byte, headerSize, headerSize+len(b.units))
	binary.LittleEndian.PutUint32(f, frameMark)
	binary.LittleEndian.PutUint64(f[8:], b.first)
	binary.LittleEndian.PutUint64(f[16:], uint64(b.time))
	binary.LittleEndian.PutUint32(f[24:], b.count)
	binary.LittleEndian.PutUint32(f[28:], uint32(len(b.units)))
	binary.LittleEndian.PutUint32(f[32:], crc32.Checksum(b.units, castagnoli))
	binary.LittleEndian.PutUint32(f[4:], crc32.Checksum(f[8:], castagnoli))
	return append(f, b.units...)
}

func (b *batch) add(unit []byte) {
	b.units = append(binary.AppendUvarint(b.units, uint64(len(unit))), unit...)
	b.count++
}

// The first line of a file says what the file is. It is padded with spaces.
const (
	format   = 1
	lineSize = 80
)

func firstLine(kind string, number, from uint64) []byte {
	return fmt.Appendf(nil, "%-*s\n", lineSize-1, fmt.Sprintf("gapless %s, format %d, number %d, from %d", kind, format, number, from))
}

// Sizes of the room that is allocated in a file in advance, in bytes.
const (
	roomStep    = 4 << 20 // a file is extended by this
	roomLeast   = 2 << 20 // when less than this is left
	roomOfRun   = 1 << 20 // what a run needs, in addition to twice its arguments
	roomSparing = 64 << 10
	roomLazily  = 256 << 10 // with less, changes that no reply waits for are not written
	roomScarce  = 256 << 10 // what a file begins with on a nearly full disk
)

const (
	// fullEvery is how long to wait before trying a full disk again.
	fullEvery = time.Second
	// fullFor is how long a disk counts as full after it was.
	fullFor = time.Minute
)

// room returns how many bytes of room are left. redis.mu is held.
func (j *journal) room() int64 {
	room := j.allocated - j.size
	if j.pending != nil {
		room -= int64(len(j.pending.units)) + headerSize
	}
	return room
}

// roomFor returns how much room commands need, so that their changes can certainly be written. redis.mu is held.
func (j *journal) roomFor(commands [][]string) (need int64) {
	for _, args := range commands {
		for _, arg := range args {
			need += 2 * int64(len(arg))
		}
	}
	if j.redis.sparing(commands) {
		return need + roomSparing
	}
	return need + roomOfRun
}

var (
	refusedFull   = failure("OOM command not allowed: there is no room on the disk for the journal of the embedded redis")
	refusedBroken = failure("MISCONF the embedded redis could not write its journal")
)

// makeRoom makes room for commands, if it is missing.
func (r *Redis) makeRoom(commands [][]string) {
	r.mu.Lock()
	need := r.journal.roomFor(commands)
	missing := r.journal.room() < need
	r.mu.Unlock()
	if missing {
		r.journal.grow(need)
	}
}

// grow makes room, unless the disk was full just now.
func (j *journal) grow(need int64) {
	j.growing.Lock()
	defer j.growing.Unlock()
	j.redis.mu.Lock()
	file, from, missing, tried := j.file, j.allocated, need-j.room(), time.Since(j.fullSince) < fullEvery
	j.redis.mu.Unlock()
	if missing <= 0 || tried {
		return
	}
	steps := []int64{max(missing, roomStep)}
	if missing <= roomScarce { // commands that free space need little
		steps = append(steps, roomScarce)
	}
	var err error
	for _, step := range steps {
		if err = fill(file, from, from+step); err == nil {
			j.redis.mu.Lock()
			defer j.redis.mu.Unlock()
			j.allocated = from + step
			return
		}
		_ = file.Truncate(from)
	}
	j.redis.mu.Lock()
	defer j.redis.mu.Unlock()
	if j.fullSince.IsZero() || time.Since(j.fullSince) > time.Minute {
		j.redis.log.Warn("no room for the journal of the embedded redis", slog.String("dir", j.dir), slog.Any("err", err))
	}
	j.fullSince = time.Now()
}

// fill extends a file so that the space is really allocated. (Tests replace it.)
var fill = func(file *os.File, from, to int64) error {
	zeros := make([]byte, 1<<20)
	for at := from; at < to; at += int64(len(zeros)) {
		if _, err := file.WriteAt(zeros[:min(int64(len(zeros)), to-at)], at); err != nil {
			return err
		}
	}
	return file.Sync()
}

// keepRoom extends files before the room is needed.
func (j *journal) keepRoom() {
	for {
		select {
		case <-j.hungry:
			j.grow(roomLeast)
		case <-j.quit:
			return
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// add takes over the changes, and the messages published with them. It returns the batch to wait for before the replies, so that
// nobody learns of a change that is not on disk. redis.mu is held.
func (j *journal) add(now int64, c *changes, news []message) *batch {
	if j.failure != nil {
		return nil
	}
	if len(c.data) > 0 {
		if j.pending == nil {
			j.pending = &batch{first: j.next, time: now, done: make(chan struct{})}
		}
		j.pending.add(c.data)
		j.next++
	}
	if c.eager && !j.pending.eager {
		j.pending.eager = true
		signal(j.wake)
	}
	if j.room() < roomLeast && time.Since(j.fullSince) >= fullEvery {
		signal(j.hungry)
	}
	var last *batch
	switch {
	case j.pending != nil && j.pending.eager:
		last = j.pending
	case j.flying != nil && j.flying.eager:
		last = j.flying
	default:
		j.redis.deliver(news)
		return nil
	}
	last.news = append(last.news, news...)
	return last
}

// flush makes write write all waiting units, even if no reply waits for them.
func (j *journal) flush() { signal(j.wake) }

// write writes waiting units until the journal is closed.
func (j *journal) write() {
	r := j.redis
	for open := true; open; {
		select {
		case <-j.wake:
		case <-j.quit:
			open = false // write one last time
		}
		r.mu.Lock()
		successor := j.successor
		j.successor = nil
		r.mu.Unlock()
		if successor != nil {
			successor.done <- j.change(successor)
		}
		for j.writeBatch() {
			j.rewriteIfDue()
		}
		j.rewriteIfDue()
	}
}

// writeBatch writes the waiting units, and reports whether there were any.
func (j *journal) writeBatch() bool {
	r := j.redis
	r.mu.Lock()
	b, file, at := j.pending, j.file, j.size
	if b == nil {
		r.mu.Unlock()
		return false
	}
	frame := b.frame()
	j.pending, j.flying, j.size = nil, b, at+int64(len(frame))
	j.allocated = max(j.allocated, j.size)
	r.mu.Unlock()

	err := writeAll(file, frame, at)
	if err == nil {
		err = syncData(file)
	}

	r.mu.Lock()
	if j.flying = nil; err != nil {
		// The dataset is ahead of the disk, and the disk's contents are unknown. So nothing more is written, acknowledged or read.
		j.failure = fmt.Errorf("write %s: %w", file.Name(), err)
		r.log.Error("the embedded redis cannot write its journal: it serves no more", slog.Any("err", j.failure), slog.String("remedy", "mend the disk, then start again"))
		b.err = j.failure
	} else {
		r.deliver(b.news)
	}
	r.mu.Unlock()
	close(b.done)
	return true
}

// writeAll writes a frame. If the disk is full, it retries for a while; usually the room was allocated in advance.
func writeAll(file *os.File, frame []byte, at int64) (err error) {
	for range 20 {
		if _, err = file.WriteAt(frame, at); !isFull(err) {
			break
		}
		time.Sleep(fullEvery)
	}
	return err
}

// close writes the waiting units, closes the files and unlocks the directory.
func (j *journal) close() error {
	close(j.quit)
	j.wg.Wait()
	return errors.Join(j.failure, j.file.Close(), j.lock.Close())
}

func (j *journal) path(kind string, number uint64) string {
	return filepath.Join(j.dir, fileName(kind, number))
}
