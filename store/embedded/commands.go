package embedded

import (
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"strconv"
	"strings"

	lua "github.com/yuin/gopher-lua"
)

// A reply is the Lua value that a script sees: a number, a string, false for nil, or a table. A table with the field ok is a status,
// and one with err is an error.

// command is a command of Redis. args[0] is its name.
type command struct {
	run   func(r *Redis, args []string) lua.LValue
	least int  // the minimum number of arguments, including the name
	space bool // may take space, and is refused if none is left
}

var commands map[string]command

func init() { // at run time, to break the cycle: commands run scripts, which run commands
	commands = map[string]command{
		"PING": {ping, 1, false}, "TIME": {timeNow, 1, false}, "EVAL": {eval, 3, false}, "EVALSHA": {evalSHA, 3, false}, "PUBLISH": {publish, 3, false},

		"DEL": {del, 2, false}, "UNLINK": {del, 2, false}, "EXISTS": {exists, 2, false}, "TYPE": {typeOf, 2, false}, "KEYS": {keysLike, 2, false}, "SCAN": {scanKeys, 2, false}, "FLUSHALL": {flushAll, 1, false},
		"PEXPIRE": {pexpire, 3, false}, "PEXPIREAT": {pexpireAt, 3, false}, "PTTL": {pttl, 2, false}, "TTL": {ttl, 2, false},

		"GET": {get, 2, false}, "SET": {set, 3, true}, "SETRANGE": {setRange, 4, true},
		"LLEN": {llen, 2, false}, "LRANGE": {lrange, 4, false}, "LTRIM": {ltrim, 4, false}, "LPUSH": {push, 3, true}, "RPUSH": {push, 3, true},
		"HGET": {hget, 3, false}, "HMGET": {hmget, 3, false}, "HGETALL": {hgetAll, 2, false}, "HLEN": {hlen, 2, false}, "HSCAN": {hscan, 3, false},
		"HSET": {hset, 4, true}, "HDEL": {hdel, 3, false},
		"ZADD": {zadd, 4, true}, "ZREM": {zrem, 3, false}, "ZCARD": {zcard, 2, false}, "ZSCAN": {zscan, 3, false}, "ZRANGE": {zrange, 4, false},
		"ZRANGEBYSCORE": {zrangeByScore, 4, false}, "ZRANGEBYLEX": {zrangeByLex, 4, false}, "ZREVRANGEBYLEX": {zrangeByLex, 4, false},
		"ZREMRANGEBYLEX": {zremRangeByLex, 4, false}, "ZRANDMEMBER": {zrandMember, 2, false},
	}
}

// run executes a command. r.mu is held.
func (r *Redis) run(args []string, inScript bool) lua.LValue {
	c, ok := commands[args[0]]
	if !ok {
		c, ok = commands[strings.ToUpper(args[0])]
	}
	switch {
	case !ok:
		return failure("ERR unknown command '%s'", args[0])
	case len(args) < c.least:
		return failure("ERR wrong number of arguments for '%s' command", strings.ToLower(args[0]))
	case c.space && r.refusal != nil:
		return r.refusal
	case inScript && args[0][0] == 'E' && c.least == 3: // EVAL, EVALSHA
		return failure("ERR This Redis command is not allowed from script")
	}
	return c.run(r, args)
}

// known reports whether a command exists, so that a transaction may contain it.
func known(name string) bool {
	_, ok := commands[strings.ToUpper(name)]
	return ok
}

var okReply = status("OK")

func status(text string) lua.LValue {
	t := &lua.LTable{}
	t.RawSetString("ok", lua.LString(text))
	return t
}

func failure(format string, args ...any) lua.LValue {
	t := &lua.LTable{}
	t.RawSetString("err", lua.LString(fmt.Sprintf(format, args...)))
	return t
}

var (
	wrongType  = failure("WRONGTYPE Operation against a key holding the wrong kind of value")
	notInteger = failure("ERR value is not an integer or out of range")
	notFloat   = failure("ERR value is not a valid float")
	syntax     = failure("ERR syntax error")
)

func integer(n int) lua.LValue { return lua.LNumber(n) }

// texts returns a reply of several strings.
func (r *Redis) texts(all []string) *lua.LTable {
	t := r.lua.CreateTable(len(all), 0)
	for _, text := range all {
		t.Append(lua.LString(text))
	}
	return t
}

// valueOf returns the value of a name, which must be a T. The error is a reply.
func valueOf[T any](r *Redis, name string) (k *key, value T, err lua.LValue) {
	if k = r.find(name); k == nil {
		return nil, value, nil
	}
	value, ok := k.value.(T)
	if !ok {
		return nil, value, wrongType
	}
	return k, value, nil
}

func ping(r *Redis, args []string) lua.LValue {
	if len(args) > 1 {
		return lua.LString(args[1])
	}
	return status("PONG")
}

func timeNow(r *Redis, _ []string) lua.LValue {
	return r.texts([]string{strconv.FormatInt(r.now/1000, 10), strconv.FormatInt(r.now%1000*1000, 10)})
}

func publish(r *Redis, args []string) lua.LValue {
	r.news = append(r.news, message{args[1], args[2]})
	return integer(len(r.heard[args[1]]))
}

// Keys.

func del(r *Redis, args []string) lua.LValue {
	n := 0
	for _, name := range args[1:] {
		if r.find(name) != nil {
			r.remove(name)
			n++
		}
	}
	return integer(n)
}

func exists(r *Redis, args []string) lua.LValue {
	n := 0
	for _, name := range args[1:] {
		if r.find(name) != nil {
			n++
		}
	}
	return integer(n)
}

func typeOf(r *Redis, args []string) lua.LValue {
	k := r.find(args[1])
	if k == nil {
		return status("none")
	}
	switch k.value.(type) {
	case *list:
		return status("list")
	case map[string]string:
		return status("hash")
	case *zset:
		return status("zset")
	}
	return status("string")
}

func keysLike(r *Redis, args []string) lua.LValue { return r.namesLike(args[1]) }

// scanKeys returns all names at once. That takes a hundredth of a second per hundred thousand names.
func scanKeys(r *Redis, args []string) lua.LValue {
	pattern := "*"
	for i := 2; i+1 < len(args); i += 2 {
		if strings.EqualFold(args[i], "MATCH") {
			pattern = args[i+1]
		}
	}
	names := r.namesLike(pattern)
	if _, ok := names.RawGetString("err").(lua.LString); ok {
		return names
	}
	t := r.lua.CreateTable(2, 0)
	t.Append(lua.LString("0"))
	t.Append(names)
	return t
}

// namesLike returns the names that match a pattern. It supports only patterns with a single star, at the end.
func (r *Redis) namesLike(pattern string) *lua.LTable {
	prefix, ok := strings.CutSuffix(pattern, "*")
	if !ok || strings.ContainsAny(prefix, `*?[]\`) {
		return failure("ERR a pattern is the beginning of names and a star here").(*lua.LTable)
	}
	var names []string
	for name, k := range r.keys {
		if strings.HasPrefix(name, prefix) && (k.deadline == 0 || k.deadline > r.now) {
			names = append(names, name)
		}
	}
	return r.texts(names)
}

func flushAll(r *Redis, args []string) lua.LValue {
	clear(r.keys)
	clear(r.expiry)
	r.changes.add("FLUSHALL")
	return okReply
}

func pexpire(r *Redis, args []string) lua.LValue {
	life, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return notInteger
	}
	return r.setDeadline(args[1], r.now+life)
}

func pexpireAt(r *Redis, args []string) lua.LValue {
	deadline, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return notInteger
	}
	return r.setDeadline(args[1], deadline)
}

func (r *Redis) setDeadline(name string, deadline int64) lua.LValue {
	k := r.find(name)
	switch {
	case k == nil:
		return integer(0)
	case deadline <= r.now:
		r.remove(name)
	default:
		r.expireAt(name, k, deadline)
	}
	return integer(1)
}

func pttl(r *Redis, args []string) lua.LValue {
	switch k := r.find(args[1]); {
	case k == nil:
		return integer(-2)
	case k.deadline == 0:
		return integer(-1)
	default:
		return lua.LNumber(k.deadline - r.now)
	}
}

func ttl(r *Redis, args []string) lua.LValue {
	if ms := pttl(r, args).(lua.LNumber); ms > 0 {
		return lua.LNumber(math.Round(float64(ms) / 1000))
	} else {
		return ms
	}
}

// Strings.

func get(r *Redis, args []string) lua.LValue {
	k, text, err := valueOf[string](r, args[1])
	switch {
	case err != nil:
		return err
	case k == nil:
		return lua.LFalse
	}
	return lua.LString(text)
}

func set(r *Redis, args []string) lua.LValue {
	if len(args) != 3 {
		return syntax
	}
	r.make(args[1], args[2])
	r.changes.add("SET", args[1:]...)
	return okReply
}

func setRange(r *Redis, args []string) lua.LValue {
	offset, failed := strconv.Atoi(args[2])
	if failed != nil || offset < 0 || offset+len(args[3]) > 512<<20 {
		return notInteger
	}
	k, text, err := valueOf[string](r, args[1])
	if err != nil || args[3] == "" {
		if err != nil {
			return err
		}
		return integer(len(text))
	}
	value := append([]byte(text), make([]byte, max(offset+len(args[3])-len(text), 0))...)
	copy(value[offset:], args[3])
	if k == nil {
		k = r.make(args[1], nil)
	}
	k.value = string(value)
	r.changes.add("SETRANGE", args[1:]...)
	return integer(len(value))
}

// Lists.

func llen(r *Redis, args []string) lua.LValue {
	k, l, err := valueOf[*list](r, args[1])
	switch {
	case err != nil:
		return err
	case k == nil:
		return integer(0)
	}
	return integer(l.length)
}

// bounds converts two position arguments, of which negative ones count from the end, to the range from i to before j.
func bounds(from, to string, length int) (i, j int, err lua.LValue) {
	i, failed := strconv.Atoi(from)
	j, also := strconv.Atoi(to)
	if failed != nil || also != nil {
		return 0, 0, notInteger
	}
	if i < 0 {
		i = max(i+length, 0)
	}
	if j < 0 {
		j += length
	}
	j = min(j, length-1) + 1
	if i >= j {
		return 0, 0, nil
	}
	return i, j, nil
}

func lrange(r *Redis, args []string) lua.LValue {
	k, l, err := valueOf[*list](r, args[1])
	if err != nil {
		return err
	}
	length := 0
	if k != nil {
		length = l.length
	}
	i, j, err := bounds(args[2], args[3], length)
	if err != nil {
		return err
	}
	t := r.lua.CreateTable(j-i, 0)
	if i < j {
		l.each(i, j, func(text []byte) { t.Append(lua.LString(text)) })
	}
	return t
}

func ltrim(r *Redis, args []string) lua.LValue {
	k, l, err := valueOf[*list](r, args[1])
	if err != nil {
		return err
	}
	if k == nil {
		return okReply
	}
	i, j, err := bounds(args[2], args[3], l.length)
	switch {
	case err != nil:
		return err
	case i == j:
		r.remove(args[1])
	case j-i < l.length:
		l.trim(i, j)
		r.changes.add("LTRIM", args[1:]...)
	}
	return okReply
}

func push(r *Redis, args []string) lua.LValue {
	k, l, err := valueOf[*list](r, args[1])
	if err != nil {
		return err
	}
	if k == nil {
		l = &list{}
		r.make(args[1], l)
	}
	right := args[0] == "RPUSH" || strings.EqualFold(args[0], "RPUSH")
	for _, text := range args[2:] {
		if right {
			l.pushRight(text)
		} else {
			l.pushLeft(text)
		}
	}
	if right {
		r.changes.add("RPUSH", args[1:]...)
	} else {
		r.changes.add("LPUSH", args[1:]...)
	}
	return integer(l.length)
}

// Hashes.

func hget(r *Redis, args []string) lua.LValue {
	_, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	if text, ok := h[args[2]]; ok {
		return lua.LString(text)
	}
	return lua.LFalse
}

func hmget(r *Redis, args []string) lua.LValue {
	_, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	t := r.lua.CreateTable(len(args)-2, 0)
	for _, name := range args[2:] {
		if text, ok := h[name]; ok {
			t.Append(lua.LString(text))
		} else {
			t.Append(lua.LFalse)
		}
	}
	return t
}

func hgetAll(r *Redis, args []string) lua.LValue {
	_, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	t := r.lua.CreateTable(2*len(h), 0)
	for name, text := range h {
		t.Append(lua.LString(name))
		t.Append(lua.LString(text))
	}
	return t
}

func hlen(r *Redis, args []string) lua.LValue {
	_, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	return integer(len(h))
}

func hset(r *Redis, args []string) lua.LValue {
	if len(args)%2 != 0 {
		return failure("ERR wrong number of arguments for 'hset' command")
	}
	k, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	if k == nil {
		h = map[string]string{}
		r.make(args[1], h)
	}
	former := len(h)
	for i := 2; i < len(args); i += 2 {
		h[args[i]] = args[i+1]
	}
	r.changes.add("HSET", args[1:]...)
	return integer(len(h) - former)
}

func hdel(r *Redis, args []string) lua.LValue {
	k, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	former := len(h)
	for _, name := range args[2:] {
		delete(h, name)
	}
	n := former - len(h)
	switch {
	case k != nil && len(h) == 0:
		r.remove(args[1])
	case n > 0:
		r.changes.add("HDEL", args[1:]...)
	}
	return integer(n)
}

// scan returns some names of a map, in the order of their hashes. The cursor is the hash at which to continue, so a scan misses
// no name that exists throughout. It returns about count names.
func scan[V any](r *Redis, all map[string]V, args []string, text func(V) string) lua.LValue {
	cursor, err := strconv.ParseUint(args[2], 10, 64)
	if err != nil {
		return failure("ERR invalid cursor")
	}
	count := 10
	if len(args) > 3 {
		if len(args) != 5 || !strings.EqualFold(args[3], "COUNT") {
			return syntax
		}
		if count, err = strconv.Atoi(args[4]); err != nil || count < 1 {
			return syntax
		}
	}
	type hashed struct {
		hash uint64
		name string
	}
	found := make([]hashed, 0, len(all))
	for name := range all {
		h := fnv.New32a()
		_, _ = h.Write([]byte(name))
		if hash := uint64(h.Sum32()) + 1; hash >= cursor { // 0 is both the beginning and the end
			found = append(found, hashed{hash, name})
		}
	}
	next := uint64(0)
	if len(found) > count {
		slices.SortFunc(found, func(a, b hashed) int { return int(int64(a.hash) - int64(b.hash)) })
		n := count
		for n < len(found) && found[n].hash == found[n-1].hash {
			n++
		}
		if n < len(found) {
			next = found[n].hash
		}
		found = found[:n]
	}
	names := r.lua.CreateTable(2*len(found), 0)
	for _, one := range found {
		names.Append(lua.LString(one.name))
		names.Append(lua.LString(text(all[one.name])))
	}
	t := r.lua.CreateTable(2, 0)
	t.Append(lua.LString(strconv.FormatUint(next, 10)))
	t.Append(names)
	return t
}

func hscan(r *Redis, args []string) lua.LValue {
	_, h, err := valueOf[map[string]string](r, args[1])
	if err != nil {
		return err
	}
	return scan(r, h, args, func(text string) string { return text })
}

// Sorted sets.

func (r *Redis) zset(name string) (*zset, lua.LValue) {
	k, z, err := valueOf[*zset](r, name)
	if k == nil && err == nil {
		z = &zset{}
	}
	return z, err
}

func formatScore(score float64) string {
	switch {
	case math.IsInf(score, 1):
		return "inf"
	case math.IsInf(score, -1):
		return "-inf"
	}
	return strconv.FormatFloat(score, 'g', 17, 64)
}

func parseScore(text string) (float64, bool) {
	score, err := strconv.ParseFloat(text, 64)
	return score, err == nil && !math.IsNaN(score)
}

func zadd(r *Redis, args []string) lua.LValue {
	if len(args)%2 != 0 {
		return syntax
	}
	k, z, err := valueOf[*zset](r, args[1])
	if err != nil {
		return err
	}
	for i := 2; i < len(args); i += 2 {
		if _, ok := parseScore(args[i]); !ok {
			return notFloat
		}
	}
	if k == nil {
		z = &zset{scores: map[string]float64{}}
		r.make(args[1], z)
	}
	n, some := 0, false
	for i := 2; i < len(args); i += 2 {
		score, _ := parseScore(args[i])
		changed, added := z.set(args[i+1], score)
		some = some || changed
		if added {
			n++
		}
	}
	if some {
		r.changes.add("ZADD", args[1:]...)
	}
	return integer(n)
}

func zrem(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	return r.zremove(args[1], z, args[2:])
}

func (r *Redis) zremove(name string, z *zset, members []string) lua.LValue {
	n := 0
	for _, one := range members {
		if z.remove(one) {
			n++
		}
	}
	switch {
	case n > 0 && len(z.scores) == 0:
		r.remove(name)
	case n > 0:
		r.changes.addMany("ZREM", name, members)
	}
	return integer(n)
}

func zcard(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	return integer(len(z.scores))
}

func zscan(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	return scan(r, z.scores, args, formatScore)
}

func zrange(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	scored := len(args) == 5 && strings.EqualFold(args[4], "WITHSCORES")
	if len(args) > 4 && !scored {
		return syntax
	}
	i, j, err := bounds(args[2], args[3], len(z.scores))
	if err != nil {
		return err
	}
	t := r.lua.CreateTable(j-i, 0)
	for p := z.index(i); i < j; i, p = i+1, z.next(p) {
		m, _ := z.at(p)
		t.Append(lua.LString(m.name))
		if scored {
			t.Append(lua.LString(formatScore(m.score)))
		}
	}
	return t
}

// limit parses LIMIT offset count at the end of the arguments, if present.
func limit(args []string) (offset, count int, err lua.LValue) {
	if len(args) == 4 {
		return 0, math.MaxInt, nil
	}
	if len(args) != 7 || !strings.EqualFold(args[4], "LIMIT") {
		return 0, 0, syntax
	}
	offset, failed := strconv.Atoi(args[5])
	count, also := strconv.Atoi(args[6])
	if failed != nil || also != nil {
		return 0, 0, notInteger
	}
	if count < 0 {
		count = math.MaxInt
	}
	return offset, count, nil
}

func zrangeByScore(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	offset, count, err := limit(args)
	if err != nil {
		return err
	}
	least, from, ok := scoreBound(args[2])
	most, to, also := scoreBound(args[3])
	if !ok || !also {
		return failure("ERR min or max is not a float")
	}
	t := r.lua.CreateTable(0, 0)
	p := z.search(func(m member) bool { return m.score > least || from && m.score == least })
	for ; count > 0; p = z.next(p) {
		m, ok := z.at(p)
		if !ok || m.score > most || !to && m.score == most {
			break
		}
		if offset > 0 {
			offset--
			continue
		}
		t.Append(lua.LString(m.name))
		count--
	}
	return t
}

// scoreBound parses a bound of scores, and returns whether it is inclusive.
func scoreBound(text string) (score float64, within, ok bool) {
	text, without := strings.CutPrefix(text, "(")
	score, ok = parseScore(text)
	return score, !without, ok
}

// lexBound parses a bound of members with equal scores. after reports whether a member is after the bound. A member that
// equals the bound counts as after an inclusive lower bound, and as after an exclusive upper one.
func lexBound(text string, lowest bool) (after func(member) bool, ok bool) {
	switch {
	case text == "-":
		return func(member) bool { return true }, true
	case text == "+":
		return func(member) bool { return false }, true
	case strings.HasPrefix(text, "[") == lowest && (text[:min(len(text), 1)] == "[" || text[:min(len(text), 1)] == "("):
		return func(m member) bool { return m.name >= text[1:] }, true
	case strings.HasPrefix(text, "[") || strings.HasPrefix(text, "("):
		return func(m member) bool { return m.name > text[1:] }, true
	}
	return nil, false
}

// lexRange returns the range of places from the first member not below least to before the first member above most.
func (z *zset) lexRange(least, most string) (from, to place, err lua.LValue) {
	after, ok := lexBound(least, true)
	above, also := lexBound(most, false)
	if !ok || !also {
		return from, to, failure("ERR min or max not valid string range item")
	}
	return z.search(after), z.search(above), nil
}

func before(a, b place) bool { return a.part < b.part || a.part == b.part && a.i < b.i }

func zrangeByLex(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	offset, count, err := limit(args)
	if err != nil {
		return err
	}
	backwards := len(args[0]) == len("ZREVRANGEBYLEX")
	least, most := args[2], args[3]
	if backwards {
		least, most = most, least
	}
	from, to, err := z.lexRange(least, most)
	if err != nil {
		return err
	}
	t := r.lua.CreateTable(0, 0)
	p, step := from, z.next
	if backwards {
		p, step = z.previous(to), z.previous
	}
	for ; count > 0 && !before(p, from) && before(p, to); p = step(p) {
		if offset > 0 {
			offset--
			continue
		}
		m, _ := z.at(p)
		t.Append(lua.LString(m.name))
		count--
	}
	return t
}

func zremRangeByLex(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	from, to, err := z.lexRange(args[2], args[3])
	if err != nil {
		return err
	}
	var members []string
	for p := from; before(p, to); p = z.next(p) {
		m, _ := z.at(p)
		members = append(members, m.name)
	}
	return r.zremove(args[1], z, members)
}

func zrandMember(r *Redis, args []string) lua.LValue {
	z, err := r.zset(args[1])
	if err != nil {
		return err
	}
	n, all := 1, len(z.scores)
	if len(args) > 2 {
		var failed error
		if n, failed = strconv.Atoi(args[2]); failed != nil || n < 0 {
			return notInteger
		}
	}
	n = min(n, all)
	chosen := map[int]struct{}{}
	for len(chosen) < n { // n is small, or includes everything in a small set
		chosen[rand.IntN(all)] = struct{}{}
	}
	places := make([]int, 0, n)
	for i := range chosen {
		places = append(places, i)
	}
	sort.Ints(places)
	t := r.lua.CreateTable(n, 0)
	for _, i := range places {
		m, _ := z.at(z.index(i))
		t.Append(lua.LString(m.name))
	}
	if len(args) == 2 {
		if n == 0 {
			return lua.LFalse
		}
		return t.RawGetInt(1)
	}
	return t
}
