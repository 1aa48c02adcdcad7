package embedded

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	lua "github.com/yuin/gopher-lua"
)

// DamageError says that a file in a directory is damaged or missing.
type DamageError struct {
	File   string
	At     int64 // offset in the file, in bytes
	What   string
	Remedy string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("%s, byte %d: %s; %s", e.File, e.At, e.What, e.Remedy)
}

const (
	remedyRestore = "restore the directory from a copy, or move it away to begin with an empty one"
	remedyCopy    = "copy the directory again, all of it, or while gapless does not run"
)

// openJournal reads the data of a directory into r, and opens the journal there for writing.
func openJournal(dir string, r *Redis) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, remedied(err)
	}
	lock, err := lockDir(dir)
	if errors.Is(err, errInUse) {
		return nil, fmt.Errorf("%s is %w: give each process its own directory, or let them share a redis-server", dir, errInUse)
	}
	if err != nil {
		return nil, remedied(err)
	}
	j := &journal{redis: r, dir: dir, lock: lock, next: 1, wake: make(chan struct{}, 1), hungry: make(chan struct{}, 1), quit: make(chan struct{})}
	if err := j.load(); err != nil {
		return nil, errors.Join(remedied(err), lock.Close())
	}
	r.changes.wanted = true
	j.wg.Go(j.write)    // ended by close
	j.wg.Go(j.keepRoom) // ended by close
	return j, nil
}

var errInUse = errors.New("in use by another process")

// remedied adds to an error of the file system what an operator can do about it.
func remedied(err error) error {
	if _, ok := errors.AsType[*fs.PathError](err); !ok {
		return err
	}
	if isFull(err) {
		return fmt.Errorf("%w: make room on the disk", err)
	}
	return fmt.Errorf("%w: this user must be able to write to the directory and to its files", err)
}

// fileName returns the name of a file of the journal.
func fileName(kind string, number uint64) string { return fmt.Sprintf("%s-%08d", kind, number) }

// parseName parses a name that fileName made.
func parseName(name, kind string) (number uint64, ok bool) {
	number, err := strconv.ParseUint(strings.TrimPrefix(name, kind+"-"), 10, 64)
	return number, err == nil && name == fileName(kind, number)
}

// numbersOf returns the numbers of the files of a kind in the directory, in ascending order.
func numbersOf(dir, kind string) (numbers []uint64, err error) {
	all, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, entry := range all {
		if n, ok := parseName(entry.Name(), kind); ok {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// removeBefore removes the files that a snapshot has made superfluous, and incomplete files.
func removeBefore(dir string, number uint64) error {
	all, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range all {
		name, unfinished := strings.CutSuffix(entry.Name(), ".new")
		for _, kind := range []string{"journal", "snapshot"} {
			if n, ok := parseName(name, kind); ok && (n < number || unfinished) {
				if err := os.Remove(filepath.Join(dir, entry.Name())); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (j *journal) load() error {
	begun := time.Now()
	snapshots, err := numbersOf(j.dir, "snapshot")
	if err != nil {
		return err
	}
	journals, err := numbersOf(j.dir, "journal")
	if err != nil {
		return err
	}
	first, until := uint64(1), uint64(0)
	if n := len(snapshots); n > 0 {
		first = snapshots[n-1]
		if until, err = j.loadSnapshot(first); err != nil {
			return err
		}
	}
	journals = slices.DeleteFunc(journals, func(n uint64) bool { return n < first })
	for i, n := range journals {
		if n != first+uint64(i) {
			return j.missing(first + uint64(i))
		}
		if err := j.loadJournal(n, i == len(journals)-1, len(snapshots) == 0 && i == 0); err != nil {
			return err
		}
	}
	if len(journals) == 0 && len(snapshots) > 0 {
		return j.missing(first)
	}
	if j.next-1 < until {
		return &DamageError{j.path("journal", j.number), j.size, fmt.Sprintf("the file ends with change %d, and the snapshot needs it up to %d", j.next-1, until), remedyCopy}
	}
	if err := removeBefore(j.dir, first); err != nil {
		return err
	}
	if len(journals) == 0 {
		if err := j.create(); err != nil {
			return err
		}
	}
	if n := len(j.redis.keys); n > 0 {
		j.redis.log.Info("the embedded redis has read its directory", slog.String("dir", j.dir), slog.Int("keys", n), slog.Int64("bytes", j.former+j.size+j.base), slog.Duration("took", time.Since(begun)))
	}
	return nil
}

func (j *journal) missing(number uint64) error {
	return &DamageError{j.path("journal", number), 0, "the file is missing", remedyCopy}
}

// create creates the first file.
func (j *journal) create() error {
	path := j.path("journal", 1)
	file, room, err := newJournalFile(path + ".new")
	if err != nil {
		return err
	}
	if file, err = settle(file, path, firstLine("journal", 1, 1)); err == nil {
		err = syncDir(filepath.Dir(filepath.Clean(j.dir))) // the directory may be new as well
	}
	j.file, j.number, j.began, j.size, j.allocated = file, 1, 1, lineSize, room
	return err
}

// reader reads a file frame by frame.
type reader struct {
	file *os.File
	in   *bufio.Reader
	at   int64
	next uint64 // the expected number of the next unit
}

// open opens a file and reads its first line.
func (j *journal) open(kind string, number uint64) (*reader, error) {
	file, err := os.OpenFile(j.path(kind, number), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	f := &reader{file: file, in: bufio.NewReaderSize(file, 1<<20), at: lineSize}
	line := make([]byte, lineSize)
	_, err = io.ReadFull(f.in, line)
	var says string
	var version, n uint64
	if _, failed := fmt.Sscanf(string(line), "gapless %s format %d, number %d, from %d", &says, &version, &n, &f.next); err == nil {
		err = failed
	}
	switch {
	case version > format:
		err = fmt.Errorf("%s has format %d, and this gapless knows those up to %d: use a newer gapless", file.Name(), version, format)
	case err != nil || says != kind+"," || n != number || version == 0:
		err = &DamageError{file.Name(), 0, "the first line is not that of a " + kind, remedyRestore}
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return f, nil
}

// errNoFrame says that no complete frame is at this position.
var errNoFrame = errors.New("no frame")

// frame reads a frame. It returns io.EOF at the end of the file.
func (f *reader) frame() (units []byte, err error) {
	head, err := f.in.Peek(headerSize)
	if len(head) == 0 && errors.Is(err, io.EOF) {
		return nil, io.EOF
	}
	first, length, ok := parseHeader(head)
	if !ok || first != f.next {
		return nil, errNoFrame
	}
	check := binary.LittleEndian.Uint32(head[32:])
	count := binary.LittleEndian.Uint32(head[24:])
	_, _ = f.in.Discard(headerSize)
	var buf bytes.Buffer // grows with the data that exists, whatever the header says
	if _, err := io.CopyN(&buf, f.in, length); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if int64(buf.Len()) < length || crc32.Checksum(buf.Bytes(), castagnoli) != check {
		return nil, errNoFrame
	}
	f.at += headerSize + length
	f.next += uint64(count)
	return buf.Bytes(), nil
}

// parseHeader parses a header, if it is complete and valid.
func parseHeader(head []byte) (first uint64, length int64, ok bool) {
	if len(head) < headerSize || binary.LittleEndian.Uint32(head) != frameMark ||
		crc32.Checksum(head[8:headerSize], castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return 0, 0, false
	}
	return binary.LittleEndian.Uint64(head[8:]), int64(binary.LittleEndian.Uint32(head[28:])), true
}

// each calls f for each command of units.
func each(units []byte, f func(unit int, args []string) error) error {
	for unit := 0; len(units) > 0; unit++ {
		length, w := binary.Uvarint(units)
		data := units[w : w+int(length)]
		units = units[w+int(length):]
		for len(data) > 0 {
			n, w := binary.Uvarint(data)
			data = data[w:]
			args := make([]string, n)
			for i := range args {
				size, w := binary.Uvarint(data)
				args[i] = string(data[w : w+int(size)])
				data = data[w+int(size):]
			}
			if err := f(unit, args); err != nil {
				return err
			}
		}
	}
	return nil
}

// loadSnapshot reads a snapshot, and returns the number of the last unit that the journals must contain.
func (j *journal) loadSnapshot(number uint64) (until uint64, err error) {
	f, err := j.open("snapshot", number)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.file.Close() }()
	j.next, f.next = f.next, 1
	whole := false
	for {
		at := f.at
		units, err := f.frame()
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, errNoFrame) {
			return 0, &DamageError{f.file.Name(), at, "the checksum is wrong, or the file is not complete", remedyRestore}
		}
		if err != nil {
			return 0, err
		}
		err = each(units, func(_ int, args []string) error {
			switch args[0] {
			case "END":
				until, err = strconv.ParseUint(args[1], 10, 64)
				whole = true
				return err
			case "SINCE":
				if k := j.redis.keys[args[1]]; k != nil {
					k.since, err = strconv.ParseUint(args[2], 10, 64)
				}
				return err
			}
			return j.redis.replay(args)
		})
		if err != nil {
			return 0, &DamageError{f.file.Name(), at, err.Error(), remedyRestore}
		}
	}
	if !whole {
		return 0, &DamageError{f.file.Name(), f.at, "the file is not complete", remedyCopy}
	}
	j.base = f.at
	return until, nil
}

// replay executes a command of a journal again.
func (r *Redis) replay(args []string) error {
	if c, ok := commands[args[0]]; !ok || len(args) < c.least {
		return fmt.Errorf("%.20q is not a command of a journal", args[0])
	}
	if t, ok := r.run(args, false).(*lua.LTable); ok {
		if text, failed := t.RawGetString("err").(lua.LString); failed {
			return fmt.Errorf("the command %s cannot be done again: %s", args[0], text)
		}
	}
	return nil
}

// loadJournal reads a journal. Only the last journal may end with a torn frame, which is dropped.
func (j *journal) loadJournal(number uint64, last, first bool) error {
	f, err := j.open("journal", number)
	if err != nil {
		return err
	}
	if first && f.next != 1 {
		return errors.Join(&DamageError{j.path("snapshot", number), 0, "the file is missing", remedyCopy}, f.file.Close())
	}
	if !first && f.next != j.next {
		return errors.Join(&DamageError{f.file.Name(), 0, fmt.Sprintf("the file begins with change %d, and what is before it ends with %d", f.next, j.next-1), remedyCopy}, f.file.Close())
	}
	j.began = f.next
	for {
		at, unit := f.at, f.next
		units, err := f.frame()
		if errors.Is(err, io.EOF) || errors.Is(err, errNoFrame) {
			err = j.ends(f, at, unit, last)
			j.next = unit
			if err != nil || !last {
				j.former += at
				return errors.Join(err, f.file.Close())
			}
			j.file, j.number, j.size = f.file, number, at
			info, err := f.file.Stat()
			if err == nil {
				j.allocated = info.Size()
			}
			return err
		}
		if err != nil {
			return errors.Join(err, f.file.Close())
		}
		err = each(units, func(i int, args []string) error {
			unit := unit + uint64(i)
			if args[0] == "FLUSHALL" {
				maps.DeleteFunc(j.redis.keys, func(_ string, k *key) bool { return k.since < unit })
				return nil
			}
			if len(args) > 1 {
				if k := j.redis.keys[args[1]]; k != nil && k.since >= unit {
					return nil
				}
			}
			return j.redis.replay(args)
		})
		if err != nil {
			return errors.Join(&DamageError{f.file.Name(), at, err.Error(), remedyRestore}, f.file.Close())
		}
	}
}

// mostTorn is how many bytes after the last frame of a file are checked: a torn frame and the room are smaller.
const mostTorn = 1 << 30

// ends checks what follows the last complete frame of a journal: zeros, or a frame that was being written when the
// machine stopped. Such a frame is cut off by the end of the file, or one of its sectors is still zero, and nothing follows it. It was
// not acknowledged, and is dropped. Anything else is damage.
func (j *journal) ends(f *reader, at int64, next uint64, last bool) error {
	rest, err := io.ReadAll(io.NewSectionReader(f.file, at, mostTorn))
	if err != nil {
		return err
	}
	if used := len(bytes.TrimRight(rest, "\x00")); used == 0 {
		if last && len(rest) == 0 { // normally room follows the last record, unless the disk was full
			j.redis.log.Warn("the journal ends without room after its last record: if the file was cut, what came after that is missing", slog.String("file", f.file.Name()), slog.Int64("at", at))
		}
		return nil
	} else if what := damage(rest, at, next); what != "" || !last {
		if what == "" {
			what = "the last record is not complete, and another file follows"
		}
		return &DamageError{f.file.Name(), at, what, remedyRestore}
	} else {
		j.redis.log.Warn("the last record of the journal was torn, and is dropped: a machine that stopped while it was written has not acknowledged it", slog.String("file", f.file.Name()), slog.Int64("at", at), slog.Int("bytes", used))
	}
	if err := f.file.Truncate(at); err != nil {
		return err
	}
	if fill(f.file, at, at+roomStep) != nil { // it is allocated later if the disk has no space now
		_ = f.file.Truncate(at)
	}
	return f.file.Sync()
}

const sectorSize = 512

// damage says what is wrong with the rest of a file, or returns "" if it is a torn frame.
func damage(rest []byte, at int64, next uint64) string {
	for i := 0; ; i++ { // search for a complete frame
		k := bytes.Index(rest[i:], binary.LittleEndian.AppendUint32(nil, frameMark))
		if k < 0 {
			break
		}
		i += k
		head := rest[i:min(i+headerSize, len(rest))]
		first, length, ok := parseHeader(head)
		if ok && first >= next && int64(i)+headerSize+length <= int64(len(rest)) &&
			crc32.Checksum(rest[i+headerSize:i+headerSize+int(length)], castagnoli) == binary.LittleEndian.Uint32(head[32:]) {
			return fmt.Sprintf("the record is damaged, and there is a whole one after it (at byte %d)", at+int64(i))
		}
	}
	end := headerSize
	if _, length, ok := parseHeader(rest[:min(headerSize, len(rest))]); ok {
		end += int(length)
	}
	if end > len(rest) {
		return ""
	}
	for i := 0; i < end; { // aligned as in the file
		n := min(sectorSize-int((at+int64(i))%sectorSize), end-i)
		if len(bytes.TrimRight(rest[i:i+n], "\x00")) == 0 {
			return ""
		}
		i += n
	}
	return "the checksum of the record is wrong"
}
