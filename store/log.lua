-- The log as Redis holds it. Every script begins with this file. One run serves several callers, each with its own log
-- and arguments (run.lua). A script is the function `work`, which begins with `open`, ends with `finish`, and returns
-- its caller's reply.
--
--   KEYS     five for each caller:
--            the history list, the session hash, the live channel,
--            the index: where a producer's numbers are in the log (append.lua),
--            the open messages, by the time at which they expire
--   ARGV[1]  a new random value, for epochs that have to begin
--   ARGV[2]  time to live of the list, ms      ARGV[3]  time to live of the hash, ms
--   ARGV[4]  oldest-first | newest-first: which end of the list producers push to
--   ARGV[5]  PUBLISH | SPUBLISH
--   ARGV[6]  the hint: a message that only says "read the log"
--   ARGV[7]  the channel that names a session whose uploads must check whether they may continue
--   ARGV[8]  how many chunks to keep
--   ARGV[9]  the grace period, ms: how long a message outlives the upload that it came from
--   ARGV[10] how many messages and producers a log may have
--   ARGV[11] 1: a read-only Redis may serve reads; 2: Redis has been read-only for long, and no other can be read
--   ARGV[12] how many bytes of chunks to keep, 0: all
--   and then for each caller: what its node remembers of the log (an epoch, a number, the mark of that number; or
--   empty, 0, empty), the number of its arguments, and the arguments
--
-- Redis does not roll scripts back. So a script tries everything that can fail (a key of another type, a Redis that
-- refuses writes) before its first write. It never reports a failure after the first write as "not done" (run.lua).
local newest_first = ARGV[4] == 'newest-first'

-- The current caller's log. `open` sets log, or leaves it nil if neither hash nor list exists. lost is where a log
-- continues that the caller's node remembers and Redis has lost. messages are the messages read so far. news are the
-- pushed chunks to publish. look means that uploads may have to end. note reports to the caller what Redis refused. The
-- caller's arguments are ARGV[at + 1] to ARGV[at + count].
local history, session, channel, index, opens
local log, lost, messages, news, look, note
local memory = {}
local due_written -- the earliest deadline of a message, as recorded in the hash
local at, count
local written

-- Redis serves no other client while a script runs. So long work is done in slices: a script does one slice, and the
-- next script continues. spent is the cost of this run so far, in units of about a quarter of a microsecond. After a run
-- has spent a slice, its remaining callers must call again (run.lua). slice_of_messages is the number of messages in a
-- slice.
local slice, slice_of_messages, spent = 8000, 250, 0

local function int(n) return string.format('%.0f', n) end

-- write runs a command that changes something.
local function write(...)
  local reply = redis.call(...)
  written = true
  return reply
end

-- write_many is write for any number of arguments, names and values in turn or names alone: unpack is limited.
local function write_many(command, key, all)
  for i = 1, #all, 1000 do write(command, key, unpack(all, i, math.min(i + 999, #all))) end
end

-- writable reports whether Redis accepts writes. Setting an empty part of a nonexistent string changes nothing. But
-- Redis refuses it like any other write if it is full, is a replica, lacks its replicas or its disk, or if the user
-- lacks the permission.
local refusal, unrefreshed
local function writable()
  if refusal == nil then
    local reply = redis.pcall('SETRANGE', channel, 0, '')
    refusal = type(reply) == 'table' and reply.err or false
  end
  return not refusal
end

-- must_write is for calls that intend to change something. They fail before they begin.
local function must_write()
  if not writable() then error({ err = refusal }) end
end

-- publish announces something. An announcement is a hint: a failure is noted and fails nothing else.
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

-- An epoch for the current log. No two logs have the same epoch, and no log has the same epoch twice.
local begun = 0
local function epoch_of(hash)
  return hash:sub(1, 8) .. '-' .. hash:sub(9, 12) .. '-4' .. hash:sub(14, 16) .. '-8' .. hash:sub(18, 20) .. '-' .. hash:sub(21, 32)
end
local function new_epoch()
  begun = begun + 1
  return epoch_of(redis.sha1hex(ARGV[1] .. begun))
end

-- Numbers of two epochs never meet. Every epoch but the first begins after a multiple of a million that is far above
-- every number known to be in use. Another node may have used a few more.
local block, margin = 1000000, 500000
local function next_base(top) return math.ceil((top + margin) / block) * block end
local function block_of(number) return math.floor(number / block) * block end


-- resumed returns the epoch in which a log continues after `base` when Redis has lost all of it. Every node finds the same.
local function resumed(base) return epoch_of(redis.sha1hex(session .. ' ' .. int(base))) end

-- Positions count from the oldest chunk, which is 1. An index that counts from the end to which producers push would
-- change with every push, so each order counts from the other end.
local function range(i, j)
  if not newest_first then return redis.call('LRANGE', history, i - 1, j - 1) end
  local found, out = redis.call('LRANGE', history, -j, -i), {}
  for k = #found, 1, -1 do out[#out + 1] = found[k] end
  return out
end

-- The mark of a position identifies its element. For our own elements it is a hash, because they contain their number
-- and time. Elements of other programs can repeat ("the"), so their mark is the truncated hashes of up to eight
-- elements, from this one backwards. An empty position has no mark.
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

-- matches reports whether a position still has a mark. It returns true if it cannot tell: trimmed elements cannot be
-- compared.
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

-- alike reports whether two marks of one number may belong to the same elements, even if the list no longer contains
-- them.
local function alike(a, b)
  local both = math.min(#a, #b)
  return (#a == 40) == (#b == 40) and a:sub(1, both) == b:sub(1, both)
end

-- The hash holds a message under m:<its id>:
--
--   open                                               it has begun and not ended
--   open <deadline> <length> <token> <producer>        ... and expires at the deadline (ms) without a sign of life
--   late <deadline> <length> <token> <producer>        ... and was asked for a sign of life, for the last time
--   done | failed | cancelled                          a chunk ended it
--   stopped                                            a call cancelled it
--
-- While a message has no chunk, it is new instead of open, or newlate instead of late. length is the requested lease
-- (ms), 0 for none. token names the upload that holds the message; an upload under way is a sign of life. The token is
-- ~ if that upload is gone and its producer may come back, and - if no upload holds the message. producer is the
-- producer of that upload, empty if it has no numbers.
-- Chunks without a message_id belong to no message, so they leave nothing unfinished.
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

-- read_messages reads many messages at once, for callers that then ask for each of them.
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

-- begin_message begins a message, or records that it has a chunk.
local function begin_message(m, has_chunk)
  if not m.open then m.open, m.new, m.changed = true, true, true end
  if m.new and has_chunk then m.new, m.changed = false, true end
end

local function close_message(id, how) messages[id] = { how = how, length = 0, changed = true } end

-- The last part of a lease leaves time to ask once more: during an outage of Redis no client could renew its lease.
local function last_call(length) return math.min(math.floor(length / 5), 5000) end

-- renew moves the deadline, but only if that makes a difference: a long answer does not write for every word.
local function renew(m, length)
  local deadline = now() + length - last_call(length)
  if m.deadline and not m.late and deadline >= m.deadline and deadline - m.deadline < length / 16 then return end
  m.deadline, m.late, m.changed = deadline, false, true
end

-- rest releases an upload's hold. The requested lease stays.
local function rest(m)
  if m.token ~= '-' or m.deadline and m.length == 0 then m.token, m.producer, m.changed = '-', '', true end
  if m.length > 0 then renew(m, m.length) else m.deadline = nil end
end

-- save records the changed messages, and the earliest of their deadlines.
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

-- derived returns the epoch of a log while Redis refuses to record one. Every node and every read derives the same
-- epoch, from the recorded epoch (or from the first element, if none is recorded) and the base.
local function derived(base)
  return epoch_of(redis.sha1hex(session .. ' ' .. (log.recorded or range(1, 1)[1] or '') .. ' ' .. int(base)))
end

-- begin starts an epoch whose numbers continue after `base`; the elements in the list are numbered from there. If a
-- replica lacks something, its master may have it, so that ends no epoch for a while. (A first epoch may begin, because
-- no number was in use before it.)
local function begin(base, epoch)
  if base > 0 and ARGV[11] ~= '2' and not writable() and refusal:find('READONLY', 1, true) == 1 then error({ err = refusal }) end
  log.epoch, log.base, log.former, log.last = epoch or writable() and new_epoch() or derived(base), base, base, base + log.length
  log.created_at = log.created_at or int(now())
  log.learned, log.begun = nil, true
end

-- top is the highest number known to be in use.
local function top() return math.max(log.last_seen, log.last, memory.last) end

-- make creates a log where none exists.
local function make()
  log = { base = 0, last = 0, last_seen = 0, former = 0, length = 0, bytes = 0, deletions = 0 }
  due_written = nil
  if lost then begin(lost.base, lost.epoch) else begin(0) end
end

-- revive turns a deleted session into an empty one, with a new epoch.
local function revive()
  log.deleted, log.created_at, log.revived = false, nil, true
  begin(next_base(top()))
end

-- seen records the last number and its mark, so that the next script can tell this list from another one.
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

-- call_uploads makes the session's uploads check whether they may continue. The live channel ends with the session's
-- id, which contains neither a colon nor a brace.
local function call_uploads() publish('PUBLISH', ARGV[7], (channel:match('([^:{}]+)}?$'))) end

-- refresh extends the log's time to live. A failure does not matter to a read.
local function refresh()
  local reply = redis.pcall('PEXPIRE', history, ARGV[2])
  if type(reply) == 'table' and reply.err then unrefreshed = reply.err end
  redis.pcall('PEXPIRE', session, ARGV[3])
  if log.numbered then redis.pcall('PEXPIRE', index, ARGV[2]) end
end

-- trim removes the oldest chunks beyond the log's limits of number and bytes, at most a slice of them. The newest chunk
-- always stays.
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
  if reply.err then -- the append is stored all the same
    unrefreshed = reply.err
    return
  end
  written = true
  log.base, log.length, log.bytes = log.base + n, log.length - n, log.bytes - size
  spent = spent + 2 * n + size / 128
end

-- finish records everything and publishes last. It does not announce a first epoch: the first chunk does. If Redis
-- refuses writes, a read continues without them.
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
  for i = 1, #elements, 1000 do -- unpack is limited
    write(newest_first and 'LPUSH' or 'RPUSH', history, unpack(elements, i, math.min(i + 999, #elements)))
  end
  spent = spent + 20 * #elements
  log.length, log.last, log.tip = log.length + #elements, log.last + #elements, elements[#elements] or log.tip
end

-- conclude ends messages with chunks that the server makes.
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

-- lapse ends the messages whose deadline has passed, at most a slice of them. Whichever script comes first does it, so
-- no process has to stay alive for it.
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

-- sweep removes the messages of a deleted log from its hash, a slice at a time. It records the epochs of the log's
-- producers, so that a producer that repeats itself does not bring back what was deleted.
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

-- learn finds the messages that the chunks after a number begin or end, and the size of these chunks, which other
-- programs pushed. It handles a slice.
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
          if not messages[id] then cost = cost + 24 end -- it is read and written
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

-- known returns the element at a position, the last one seen, and the length of the list. The list usually ends at that
-- position.
local function known(position)
  if position < 1 then return nil, redis.call('LLEN', history) end
  local found = range(position, position + 1)
  return found[1], #found == 1 and position or redis.call('LLEN', history)
end

-- compare_memory compares the log with what the caller's node remembers: chunks that it acknowledged or delivered. If
-- they are missing, Redis has lost them, and their epoch ends.
local function has_memory()
  if memory.last == log.last_seen and #memory.mark >= mark_length and #log.mark >= mark_length then return alike(memory.mark, log.mark) end
  return log.last >= memory.last and matches(memory.last - log.base, memory.mark)
end

local function compare_memory()
  if memory.last == 0 then return end
  if memory.epoch == log.epoch then
    if not has_memory() then begin(next_base(top())) end
  elseif log.former < memory.last then
    local base = block_of(memory.last)
    if memory.epoch == derived(base) or log.recorded and memory.epoch == resumed(base) then -- it was begun and could not be recorded, or was lost
      begin(base, memory.epoch)
      if not has_memory() then begin(next_base(top())) end
    elseif memory.mark == '-' then -- no number of it was ever used
      begin(memory.last, memory.epoch)
    else
      begin(next_base(top()))
    end
  end
end

-- open reads the log's bounds, and the state of a message if it gets an id. It checks whether the list is still the one
-- that was seen last, and does what is due.
local function open(id)
  local h = redis.call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'former', 'ended',
    'deleted', 'created_at', 'updated_at', 'deletions', 'due', 'numbered', 'learned', 'sweep', 'sized', 'm:' .. (id or ''))
  local base, last_seen = tonumber(h[2] or 0), tonumber(h[3] or 0)
  local tip, length = known(last_seen - base)
  if memory.mark == '-' and memory.epoch == '' then memory.epoch = resumed(memory.last) end -- a viewer knows more (Store.Witness)
  if not h[1] and length == 0 then
    if memory.last > 0 then
      local empty, to = memory.mark == '-', next_base(memory.last)
      lost = { epoch = empty and memory.epoch or resumed(to), base = empty and memory.last or to }
    end
    return
  end
  log = {
    epoch = h[1], recorded = h[1], base = base, last_seen = last_seen, former = tonumber(h[5] or 0), base_seen = base, ended = h[6], deleted = h[7],
    created_at = h[8], updated_at = h[9], deletions = tonumber(h[10] or 0), due = h[11] and tonumber(h[11]), numbered = h[12],
    learned = h[13] and tonumber(h[13]), learned_seen = h[13] and tonumber(h[13]), sweep = h[14],
    bytes = 0, -- the size of the list up to the learned number
    mark = h[4] or '', length = length, last = base + length, tip = false, -- (a table that grows costs as much as a command)
  }
  due_written = log.due
  local bytes, sized_base, sized_last = (h[15] or ''):match('^(%d+) (%d+) (%d+)$')
  if sized_base == h[2] and sized_last == h[3] then log.bytes, log.bytes_seen = tonumber(bytes), tonumber(bytes) end
  if id then messages[id] = parse(h[16]) end
  if not log.epoch then -- another program began the list
    log.epoch = ''
    if memory.last == 0 then begin(0, memory.epoch == derived(0) and memory.epoch or nil) end
  elseif log.deleted then
    log.base, log.last = log.last_seen, log.last_seen
    if log.sweep then sweep() end
    if log.sweep then -- until the sweep is done, the log stays deleted
      length, log.length, log.unfinished = 0, 0, true
    elseif length > 0 then
      revive()
    end
  elseif length == 0 then
    log.base = log.last_seen -- expired: the same log, now empty
  elseif log.last_seen > log.base and not (tip and matches(log.last_seen - log.base, log.mark, tip)) then
    -- Another list has replaced the known one. A read that could not record that may have begun its epoch.
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

-- Every reply begins with a status and what the node has to remember: the epoch, the last number, its mark, and a note
-- of what Redis refused. A mark of - means that no number of the epoch is in use.
local function answer(status, ...)
  if not log then return { status, '', 0, '', note or '', ... } end
  return { status, log.epoch, log.last, log.last == log.former and '-' or log.mark, note or '', ... }
end

local function reply(status, ...)
  return answer(status, log.base, log.former, log.ended and 1 or 0, log.deleted and 1 or 0, log.created_at or '', log.updated_at or '', ...)
end
