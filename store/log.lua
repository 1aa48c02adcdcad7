-- The log as Redis holds it: what every script begins with. One run serves several callers, each with a log and
-- arguments of its own (run.lua): a script is the function `work`, which begins with `open`, ends with `finish`, and
-- returns its caller's reply.
--
--   KEYS     five for each caller:
--            the history list, the session hash, the live channel,
--            which of a producer's numbers are where in the log (append.lua),
--            the messages that are open, by the time at which they end by themselves
--   ARGV[1]  something new and random, for epochs that have to begin
--   ARGV[2]  time to live of the list, ms      ARGV[3]  time to live of the hash, ms
--   ARGV[4]  oldest-first | newest-first: which end of the list producers push to
--   ARGV[5]  PUBLISH | SPUBLISH
--   ARGV[6]  the hint: a message that only says "read the log"
--   ARGV[7]  the channel on which a session is named whose uploads have to look whether they may go on
--   ARGV[8]  how many chunks to keep
--   ARGV[9]  the grace, ms: how long a message outlives the upload that it came from
--   ARGV[10] how many messages and producers a log may have
--   ARGV[11] 1: reads may be served by a Redis that is read-only; 2: it has been so for long, and nothing else can be read
--   ARGV[12] how many bytes of chunks to keep, 0: all
--   and then for each caller: what its node remembers of the log (an epoch, a number, the mark of that number; or
--   nothing, 0, nothing), how many arguments it has, and they
--
-- Scripts are not rolled back. So everything that can fail (a key of another type, a Redis that refuses writes) is tried
-- before anything is written, and what fails after the first write is never told as "not done" (run.lua).
local newest_first = ARGV[4] == 'newest-first'

-- The log at hand. log is what `open` found; nil when there is neither hash nor list. lost is where a log goes on that
-- the caller's node remembers and Redis has lost. messages are those that were looked at, news is what was pushed and is
-- to be published; look says that uploads may have to end. note tells the caller what was refused. Its arguments are
-- ARGV[at + 1] to ARGV[at + count].
local history, session, channel, index, opens
local log, lost, messages, news, look, note
local memory = {}
local due_written -- the earliest of its deadlines, as it is written down
local at, count
local written

-- Redis serves nobody else while a script runs. So what may be much is done in slices: a script does one, and the next
-- script goes on. spent is what this run has cost so far, in steps of about a quarter of a microsecond. A caller whose
-- run has spent a slice is asked to come again (run.lua). slice_of_messages is how many messages a slice has.
local slice, slice_of_messages, spent = 8000, 250, 0

local function int(n) return string.format('%.0f', n) end

-- write is a command that changes something.
local function write(...)
  local reply = redis.call(...)
  written = true
  return reply
end

-- write_many is write with any number of arguments, names and values in turn or names alone: unpack has limits.
local function write_many(command, key, all)
  for i = 1, #all, 1000 do write(command, key, unpack(all, i, math.min(i + 999, #all))) end
end

-- writable reports whether Redis takes writes. To set an empty part of a text that does not exist changes nothing, and
-- is refused like any other write: by a full Redis, a replica, one without its replicas or its disk, and for want of rights.
local refusal, unrefreshed
local function writable()
  if refusal == nil then
    local reply = redis.pcall('SETRANGE', channel, 0, '')
    refusal = type(reply) == 'table' and reply.err or false
  end
  return not refusal
end

-- must_write is for calls that mean to change something: they fail before they begin.
local function must_write()
  if not writable() then error({ err = refusal }) end
end

-- publish announces something. An announcement is a hint: its failure is told, and fails nothing.
local function publish(command, to, message)
  local reply = redis.pcall(command, to, message)
  if type(reply) == 'table' and reply.err then note = 'unheard ' .. reply.err end
end

local clock
local function now()
  if not clock then
    local t = redis.call('TIME')
    clock = t[1] * 1000 + math.floor(t[2] / 1000)
  end
  return clock
end

-- An epoch of the log at hand: no two logs have the same, nor has one it twice.
local begun = 0
local function epoch_of(hash)
  return hash:sub(1, 8) .. '-' .. hash:sub(9, 12) .. '-4' .. hash:sub(14, 16) .. '-8' .. hash:sub(18, 20) .. '-' .. hash:sub(21, 32)
end
local function new_epoch()
  begun = begun + 1
  return epoch_of(redis.sha1hex(ARGV[1] .. begun))
end

-- Numbers of two epochs never meet: every epoch but the first begins right after a multiple of a million that is far
-- above everything known to have been given out. Another node may have given out a little more.
local block, margin = 1000000, 500000
local function next_base(top) return math.ceil((top + margin) / block) * block end
local function block_of(number) return math.floor(number / block) * block end

-- Chunks are addressed by position, 1 for the oldest. An index from the end that producers push to
-- would move under a pushed element, so each order counts from the other end.
local function range(i, j)
  if not newest_first then return redis.call('LRANGE', history, i - 1, j - 1) end
  local found, out = redis.call('LRANGE', history, -j, -i), {}
  for k = #found, 1, -1 do out[#out + 1] = found[k] end
  return out
end

-- The mark of a position is what tells its element from another one: its hash, if it is one of ours, which says its number
-- and its time. Elements of other programs repeat ("the"), so there it is the hashes of up to eight, from that one
-- backwards, cut short. Nothing stands there: no mark.
local mark_length = 16
local function ours(element) return element:find('^{"seq":[1-9]%d*,"ts":') ~= nil end

local function mark(position)
  if position < 1 then return '' end
  if position == log.length and log.tip then return redis.sha1hex(log.tip) end
  local found, parts = range(math.max(position - 7, 1), position), {}
  local tip = found[#found]
  if not tip or #found < math.min(position, 8) then return '' end
  if ours(tip) then return redis.sha1hex(tip) end
  for k = #found, 1, -1 do parts[#parts + 1] = redis.sha1hex(found[k]):sub(1, mark_length) end
  return table.concat(parts)
end

-- matches reports whether a position still has a mark, as far as it can be told: what was trimmed cannot be compared.
local function matches(position, text, tip)
  if position < 1 or #text < mark_length then return true end
  if #text == 40 then
    tip = tip or range(position, position)[1]
    return tip and redis.sha1hex(tip) == text
  end
  local found = range(math.max(position - #text / mark_length + 1, 1), position)
  for k = 0, math.min(#text / mark_length, position) - 1 do
    local element = found[#found - k]
    if not element or redis.sha1hex(element):sub(1, mark_length) ~= text:sub(k * mark_length + 1, (k + 1) * mark_length) then return false end
  end
  return true
end

-- alike reports whether two marks of one number may be of the same elements: also when these are no longer in the list.
local function alike(a, b)
  local both = math.min(#a, #b)
  return (#a == 40) == (#b == 40) and a:sub(1, both) == b:sub(1, both)
end

-- A message is what the hash has under m:<its id>:
--
--   open                                               it has begun and not ended
--   open <deadline> <length> <token> <producer>        ... and ends by itself at the deadline (ms) if nobody is heard of
--   late <deadline> <length> <token> <producer>        ... which has been asked for a sign of life, for the last time
--   done | failed | cancelled                          a chunk ended it
--   stopped                                            the call to cancel it did
--
-- and new instead of open, newlate instead of late, while it has no chunk. length is the lease that was asked
-- for (ms), 0 for none. token names the upload that holds the message: while it is under way, that is a sign of
-- life. It is ~ when that upload is gone and its producer may come back, - when there is none. producer is whose
-- upload that is, empty for one without numbers.
-- Chunks without a message_id belong to no message: nothing of them is left unfinished.
local function parse(text)
  if not text then return { length = 0, token = '-', producer = '' } end
  local word, deadline, length, token, producer = text:match('^(%l+) (%d+) (%d+) (%S+) (.*)$')
  word = word or text
  if word ~= 'open' and word ~= 'late' and word ~= 'new' and word ~= 'newlate' then return { how = text, length = 0 } end
  return {
    open = true, new = word:sub(1, 3) == 'new', late = word:sub(-4) == 'late', deadline = deadline and tonumber(deadline),
    length = tonumber(length or 0), token = token or '-', producer = producer or '',
  }
end

local function message(id)
  if not messages[id] then messages[id] = parse(redis.call('HGET', session, 'm:' .. id)) end
  return messages[id]
end

-- read_messages reads many messages at once, for those who ask for each of them then.
local function read_messages(ids)
  local names, unread, taken = {}, {}, {}
  for _, id in ipairs(ids) do
    if not messages[id] and not taken[id] then
      taken[id] = true
      names[#names + 1], unread[#unread + 1] = 'm:' .. id, id
    end
  end
  for i = 1, #names, 1000 do
    local found = redis.call('HMGET', session, unpack(names, i, math.min(i + 999, #names)))
    for k = 1, #found do messages[unread[i + k - 1]] = parse(found[k]) end
  end
  spent = spent + 4 * #names
end

-- begin_message begins a message, or says that one has a chunk.
local function begin_message(m, has_chunk)
  if not m.open then m.open, m.new, m.changed = true, true, true end
  if m.new and has_chunk then m.new, m.changed = false, true end
end

local function close_message(id, how) messages[id] = { how = how, length = 0, changed = true } end

-- The last part of a lease is for asking once more: after an outage of Redis nobody could renew one.
local function last_call(length) return math.min(math.floor(length / 5), 5000) end

-- renew moves the deadline on. Not for every word of an answer: only when that makes a difference.
local function renew(m, length)
  local deadline = now() + length - last_call(length)
  if m.deadline and not m.late and deadline >= m.deadline and deadline - m.deadline < length / 16 then return end
  m.deadline, m.late, m.changed = deadline, false, true
end

-- rest lets go of an upload's hold: what stays is the lease that was asked for.
local function rest(m)
  if m.token ~= '-' or m.deadline and m.length == 0 then m.token, m.producer, m.changed = '-', '', true end
  if m.length > 0 then renew(m, m.length) else m.deadline = nil end
end

-- save writes down what became of messages, and the earliest of their deadlines.
local function save()
  local due, states, gone, opened, closed = log.due, {}, {}, {}, {}
  for id, m in pairs(messages) do
    if m.changed and (m.how or m.dropped) then
      closed[#closed + 1] = id
      if m.how then states[#states + 1], states[#states + 2] = 'm:' .. id, m.how else gone[#gone + 1] = 'm:' .. id end
    elseif m.changed then
      local text = m.new and 'new' or 'open'
      if m.late then text = m.new and 'newlate' or 'late' end
      if m.deadline then
        text = text .. ' ' .. int(m.deadline) .. ' ' .. int(m.length) .. ' ' .. m.token .. ' ' .. m.producer
        due = math.min(due or m.deadline, m.deadline)
      end
      states[#states + 1], states[#states + 2] = 'm:' .. id, text
      opened[#opened + 1], opened[#opened + 2] = m.deadline and int(m.deadline) or '+inf', id
    end
    m.changed = false
  end
  write_many('ZREM', opens, closed)
  write_many('HDEL', session, gone)
  write_many('HSET', session, states)
  write_many('ZADD', opens, opened)
  spent = spent + 8 * (#closed + #opened / 2)
  if #opened > 0 then write('PEXPIRE', opens, ARGV[3]) end
  if log.lapsed then
    local first = redis.call('ZRANGE', opens, 0, 0, 'WITHSCORES')
    due = first[2] and first[2] ~= 'inf' and tonumber(first[2]) or nil
  end
  if due == due_written then return end
  if due then write('HSET', session, 'due', int(due)) else write('HDEL', session, 'due') end
end

-- derived is the epoch that a log has when Redis refuses to write one down: every node and every read derives the same,
-- from the epoch that is written down (or from the first element, if none is) and the base.
local function derived(base)
  return epoch_of(redis.sha1hex(session .. ' ' .. (log.recorded or range(1, 1)[1] or '') .. ' ' .. int(base)))
end

-- begin starts an epoch whose numbers go on after `base`: whatever is in the list is numbered from there. What a replica
-- lacks, its master may have: that ends no epoch, for a while. (Of a first one nothing was given out.)
local function begin(base, epoch)
  if base > 0 and ARGV[11] ~= '2' and not writable() and refusal:find('READONLY', 1, true) == 1 then error({ err = refusal }) end
  log.epoch, log.base, log.former, log.last = epoch or writable() and new_epoch() or derived(base), base, base, base + log.length
  log.created_at = log.created_at or int(now())
  log.learned, log.begun = nil, true
end

-- top is the highest number known to have been given out.
local function top() return math.max(log.last_seen, log.last, memory.last) end

-- make begins a log where there is nothing.
local function make()
  log = { base = 0, last = 0, last_seen = 0, former = 0, length = 0, bytes = 0, deletions = 0 }
  due_written = nil
  if lost then begin(lost.base, lost.epoch) else begin(0) end
end

-- revive makes a deleted session an empty one again, with an epoch of its own.
local function revive()
  log.deleted, log.created_at, log.revived = false, nil, true
  begin(next_base(top()))
end

-- seen writes down how far the log goes and what stands there, so that the next script can tell this
-- list from another one.
local function seen()
  if log.last_seen == log.last and log.base == log.base_seen and not log.begun and log.learned == log.learned_seen and
    log.bytes == log.bytes_seen then return end
  local sized = int(log.bytes) .. ' ' .. int(log.base) .. ' ' .. int(log.last)
  if log.last_seen ~= log.last or not log.updated_at then log.updated_at = int(now()) end
  if log.begun then
    if log.revived then write('HDEL', session, 'deleted') end
    write('HSET', session, 'epoch', log.epoch, 'base', int(log.base), 'former', int(log.former), 'created_at', log.created_at,
      'last_seen', int(log.last), 'mark', log.mark, 'updated_at', log.updated_at, 'sized', sized)
  else
    write('HSET', session, 'base', int(log.base), 'last_seen', int(log.last), 'mark', log.mark, 'updated_at', log.updated_at, 'sized', sized)
  end
  if log.learned then write('HSET', session, 'learned', int(log.learned))
  elseif log.learned_seen then write('HDEL', session, 'learned') end
end

-- call_uploads has the session's uploads check whether they may go on. The live channel ends with the session's id, which
-- has neither a colon nor a brace.
local function call_uploads() publish('PUBLISH', ARGV[7], (channel:match('([^:{}]+)}?$'))) end

-- refresh has the log live on. That is tried: a log can be read without it.
local function refresh()
  local reply = redis.pcall('PEXPIRE', history, ARGV[2])
  if type(reply) == 'table' and reply.err then unrefreshed = reply.err end
  redis.pcall('PEXPIRE', session, ARGV[3])
  if log.numbered then redis.pcall('PEXPIRE', index, ARGV[2]) end
end

-- trim takes away the oldest chunks that are more than a log keeps, by number or by bytes: of many, a slice. The newest one
-- stays, whatever it is.
local function trim()
  local most, most_bytes, n, size, step = tonumber(ARGV[8]), tonumber(ARGV[12]), 0, 0, 1
  local function over()
    return n < log.length - 1 and (log.length - n > most or most_bytes > 0 and log.bytes - size > most_bytes)
  end
  while over() and n < 1000 and size < 1048576 do
    for _, element in ipairs(range(n + 1, n + step)) do
      if over() then n, size = n + 1, size + #element end
    end
    step = math.min(2 * step, 128, math.max(math.floor(262144 * n / size), 1))
  end
  if n == 0 then return end
  local reply
  if newest_first then reply = redis.pcall('LTRIM', history, 0, -1 - n) else reply = redis.pcall('LTRIM', history, n, -1) end
  if reply.err then -- what was appended is stored all the same
    unrefreshed = reply.err
    return
  end
  written = true
  log.base, log.length, log.bytes = log.base + n, log.length - n, log.bytes - size
  spent = spent + 2 * n + size / 128
end

-- finish writes down all there is to know, and publishes last. A first epoch needs no telling: its first
-- chunk does. Where Redis refuses writes, a read goes on without.
local function finish()
  local over = log.length > tonumber(ARGV[8]) or tonumber(ARGV[12]) > 0 and log.bytes > tonumber(ARGV[12])
  if over and not log.learned and writable() then trim() end
  if log.last ~= log.last_seen or log.begun then log.mark = mark(log.last - log.base) end
  local changed = log.last ~= log.last_seen or log.base ~= log.base_seen or log.begun or log.learned ~= log.learned_seen or
    log.bytes ~= log.bytes_seen or log.lapsed or next(messages)
  local recorded = changed and writable()
  if recorded then
    save()
    seen()
  end
  refresh()
  if recorded and log.begun and log.former > 0 then publish(ARGV[5], channel, ARGV[6]) end
  for i = 1, #news do publish(ARGV[5], channel, news[i]) end
  if look then call_uploads() end
  if refusal or unrefreshed then note = 'refused ' .. (refusal or unrefreshed) end
end

-- add numbers and pushes chunks, given as text without the opening brace.
local function add(members)
  local head, ts, elements = log.last, ',"ts":' .. int(now()) .. ',', {}
  for i = 1, #members do
    elements[i] = '{"seq":' .. int(head + i) .. ts .. members[i]
    news[#news + 1] = elements[i]
    log.bytes = log.bytes + #elements[i]
  end
  for i = 1, #elements, 1000 do -- unpack has limits
    write(newest_first and 'LPUSH' or 'RPUSH', history, unpack(elements, i, math.min(i + 999, #elements)))
  end
  spent = spent + 20 * #elements
  log.length, log.last, log.tip = log.length + #elements, log.last + #elements, elements[#elements] or log.tip
end

-- conclude ends messages by a chunk of the server's own.
local function conclude(ids, kind, how, more)
  local members = {}
  table.sort(ids)
  for i, id in ipairs(ids) do
    members[i] = '"type":"' .. kind .. '","message_id":' .. cjson.encode(id) .. more .. '}'
    close_message(id, how)
  end
  add(members)
end

local function lose(ids) conclude(ids, 'failed', 'failed', ',"reason":"producer_lost"') end

-- lapse ends the messages whose deadline is past, or a slice of them. Whichever script comes first does it, so that nobody
-- needs to be alive for it.
local function lapse()
  local lost, stale = {}, {}
  local ids = redis.call('ZRANGEBYSCORE', opens, '-inf', int(now()), 'LIMIT', 0, slice_of_messages)
  read_messages(ids)
  for _, id in ipairs(ids) do
    local m = message(id)
    if not m.open then
      stale[#stale + 1] = id
    elseif not m.deadline or m.deadline > now() then
      m.changed = true
    elseif m.late then
      lost[#lost + 1] = id
    else
      local length = math.max(m.length, m.token ~= '-' and tonumber(ARGV[9]) or 0)
      m.late, m.changed, m.deadline = true, true, now() + last_call(length)
    end
  end
  write_many('ZREM', opens, stale)
  log.lapsed, look, log.unfinished = true, true, #ids == slice_of_messages
  if #lost > 0 then lose(lost) end
end

-- sweep takes away what the hash of a deleted log has of messages, a slice of it, and keeps of its producers which there
-- were, so that one that repeats itself does not bring back what was deleted.
local function sweep()
  if not writable() then return end
  local found = redis.call('HSCAN', session, log.sweep, 'COUNT', 2 * slice_of_messages)
  local gone, kept = {}, {}
  for i = 1, #found[2], 2 do
    local kind, id = found[2][i]:match('^([mp]):(.*)$')
    if kind then gone[#gone + 1] = found[2][i] end
    if kind == 'p' then kept[#kept + 1], kept[#kept + 2] = 'd:' .. id, found[2][i + 1]:match('^%d+') end
  end
  write_many('HDEL', session, gone)
  write_many('HSET', session, kept)
  log.sweep = found[1] ~= '0' and found[1] or nil
  if log.sweep then write('HSET', session, 'sweep', log.sweep) else write('HDEL', session, 'sweep') end
  spent = spent + 8 * #found[2]
end

-- learn finds out which messages the chunks after a number begin or end, and how many bytes they are: other programs pushed
-- them. It learns a slice.
local function learn(after)
  local cost, step, i = 0, 16, after - log.base + 1
  while i <= log.length and cost < slice do
    local size = 0
    local elements = range(i, math.min(i + step - 1, log.length))
    if #elements == 0 then break end
    for _, element in ipairs(elements) do
      size = size + #element
      if element:find('message_id', 1, true) or element:find('\\u', 1, true) then
        cost = cost + 10 + #element / 16
        local ok, chunk = pcall(cjson.decode, element)
        local id = ok and type(chunk) == 'table' and chunk.message_id
        if type(id) == 'string' and id ~= '' then
          if not messages[id] then cost = cost + 24 end -- it is read, and written
          local kind, m = chunk.type, message(id)
          if kind == 'done' or kind == 'failed' or kind == 'cancelled' then
            if not m.how then close_message(id, kind) end
          elseif chunk.is_complete == true then
            if not m.how then close_message(id, 'done') end
          elseif kind ~= 'message' and not m.how then
            begin_message(m, true)
          end
        end
      end
    end
    i, cost, log.bytes = i + #elements, cost + #elements + size / 256, log.bytes + size
    step = math.max(1, math.min(1000, math.floor((slice - cost) / (#elements + size / 256) * #elements / 2)))
  end
  log.learned = i <= log.length and log.base + i - 1 or nil
  spent = spent + cost
end

-- known reads the element at a position, the last one that was seen, and how long the list is: mostly that is
-- where it ends.
local function known(position)
  if position < 1 then return nil, redis.call('LLEN', history) end
  local found = range(position, position + 1)
  return found[1], #found == 1 and position or redis.call('LLEN', history)
end

-- compare_memory holds the log against what the caller's node remembers: chunks that it acknowledged, or gave out. If
-- they are not there, Redis has lost them, and the epoch ends in which their numbers meant something.
local function has_memory()
  if memory.last == log.last_seen and #memory.mark >= mark_length and #log.mark >= mark_length then return alike(memory.mark, log.mark) end
  return log.last >= memory.last and matches(memory.last - log.base, memory.mark)
end

local function compare_memory()
  if memory.last == 0 then return end
  if memory.epoch == log.epoch then
    if not has_memory() then begin(next_base(top())) end
  elseif log.former < memory.last then
    if derived(block_of(memory.last)) == memory.epoch then -- it was begun by a read that could not write it down
      begin(block_of(memory.last), memory.epoch)
      if not has_memory() then begin(next_base(top())) end
    elseif memory.mark == '-' then -- nothing was ever given out in it
      begin(memory.last, memory.epoch)
    else
      begin(next_base(top()))
    end
  end
end

-- open reads the log's bounds, and a message's state if it is told one, finds out whether the list is still the one
-- that was seen last, and does what is due.
local function open(id)
  local h = redis.call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'former', 'ended',
    'deleted', 'created_at', 'updated_at', 'deletions', 'due', 'numbered', 'learned', 'sweep', 'sized', 'm:' .. (id or ''))
  local base, last_seen = tonumber(h[2] or 0), tonumber(h[3] or 0)
  local tip, length = known(last_seen - base)
  if not h[1] and length == 0 then
    if memory.last > 0 then
      local empty, to = memory.mark == '-', next_base(memory.last)
      lost = { epoch = empty and memory.epoch or epoch_of(redis.sha1hex(session .. ' ' .. memory.epoch .. ' ' .. int(to))), base = empty and memory.last or to }
    end
    return
  end
  log = {
    epoch = h[1], recorded = h[1], base = base, last_seen = last_seen, former = tonumber(h[5] or 0), base_seen = base, ended = h[6], deleted = h[7],
    created_at = h[8], updated_at = h[9], deletions = tonumber(h[10] or 0), due = h[11] and tonumber(h[11]), numbered = h[12],
    learned = h[13] and tonumber(h[13]), learned_seen = h[13] and tonumber(h[13]), sweep = h[14],
    bytes = 0, -- what the list has up to the number that it was learned to
    mark = h[4] or '', length = length, last = base + length, tip = false, -- (a table that grows costs as much as a command)
  }
  due_written = log.due
  local bytes, sized_base, sized_last = (h[15] or ''):match('^(%d+) (%d+) (%d+)$')
  if sized_base == h[2] and sized_last == h[3] then log.bytes, log.bytes_seen = tonumber(bytes), tonumber(bytes) end
  if id then messages[id] = parse(h[16]) end
  if not log.epoch then -- a list that another program began
    log.epoch = ''
    if memory.last == 0 then begin(0, memory.epoch == derived(0) and memory.epoch or nil) end
  elseif log.deleted then
    log.base, log.last = log.last_seen, log.last_seen
    if log.sweep then sweep() end
    if log.sweep then -- until that is done, it stays deleted
      length, log.length, log.unfinished = 0, 0, true
    elseif length > 0 then
      revive()
    end
  elseif length == 0 then
    log.base = log.last_seen -- expired: the same log, with nothing of it left
  elseif log.last_seen > log.base and not (tip and matches(log.last_seen - log.base, log.mark, tip)) then
    -- Another list stands where the known one stood. A read that could not write that down may have begun its epoch.
    if memory.last > 0 and derived(block_of(memory.last)) == memory.epoch then begin(block_of(memory.last), memory.epoch)
    else begin(next_base(top())) end
  end
  log.last = log.base + length
  if not log.deleted then compare_memory() end
  local after = math.max(log.learned or log.last_seen, log.base)
  if log.begun or length > 0 and not log.bytes_seen then after, log.bytes = log.base, 0 end
  if length == 0 then log.bytes = 0 end
  if log.last > after then learn(after) end
  if log.due and not log.ended and now() >= log.due and writable() then lapse() end
end

local function argument(k) return ARGV[at + k] end

-- Every reply begins with a status and what the node is to remember: the epoch, the last number, its mark; and a note of
-- what Redis has refused meanwhile. A mark of - says that the epoch has given out nothing yet.
local function answer(status, ...)
  if not log then return { status, '', 0, '', note or '', ... } end
  return { status, log.epoch, log.last, log.last == log.former and '-' or log.mark, note or '', ... }
end

local function reply(status, ...)
  return answer(status, log.base, log.former, log.ended and 1 or 0, log.deleted and 1 or 0, log.created_at or '', log.updated_at or '', ...)
end
