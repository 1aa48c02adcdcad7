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
--   and then for each caller: how many arguments it has, and they
--
-- Scripts are not rolled back, so everything that can fail (a key of another type) is read before
-- anything is written.
local newest_first = ARGV[4] == 'newest-first'

-- The log at hand. log is what `open` found; nil when there is neither hash nor list. messages are those that were
-- looked at, news is what was pushed and is to be published; look says that uploads may have to end. Its caller's
-- arguments are ARGV[at + 1] to ARGV[at + count].
local history, session, channel, index, opens
local log, messages, news, look
local due_written -- the earliest of its deadlines, as it is written down
local at, count

local function int(n) return string.format('%.0f', n) end

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
local function new_epoch()
  begun = begun + 1
  local hash = redis.sha1hex(ARGV[1] .. begun)
  return hash:sub(1, 8) .. '-' .. hash:sub(9, 12) .. '-4' .. hash:sub(14, 16) .. '-8' .. hash:sub(18, 20) .. '-' .. hash:sub(21, 32)
end

-- Chunks are addressed by position, 1 for the oldest. An index from the end that producers push to
-- would move under a pushed element, so each order counts from the other end.
local function range(i, j)
  if not newest_first then return redis.call('LRANGE', history, i - 1, j - 1) end
  local found, out = redis.call('LRANGE', history, -j, -i), {}
  for k = #found, 1, -1 do out[#out + 1] = found[k] end
  return out
end

local function mark(position)
  if position < 1 then return '' end
  if position == log.length and log.tip then return redis.sha1hex(log.tip) end
  local found = range(position, position)
  return found[1] and redis.sha1hex(found[1]) or ''
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
  local due, added = log.due, false
  for id, m in pairs(messages) do
    if m.changed and (m.how or m.dropped) then
      redis.call('ZREM', opens, id)
      if m.how then redis.call('HSET', session, 'm:' .. id, m.how) else redis.call('HDEL', session, 'm:' .. id) end
    elseif m.changed then
      local text = m.new and 'new' or 'open'
      if m.late then text = m.new and 'newlate' or 'late' end
      if m.deadline then
        text = text .. ' ' .. int(m.deadline) .. ' ' .. int(m.length) .. ' ' .. m.token .. ' ' .. m.producer
        due = math.min(due or m.deadline, m.deadline)
      end
      redis.call('HSET', session, 'm:' .. id, text)
      redis.call('ZADD', opens, m.deadline and int(m.deadline) or '+inf', id)
      added = true
    end
  end
  if added then redis.call('PEXPIRE', opens, ARGV[3]) end
  if log.lapsed then
    local first = redis.call('ZRANGE', opens, 0, 0, 'WITHSCORES')
    due = first[2] and first[2] ~= 'inf' and tonumber(first[2]) or nil
  end
  if due == due_written then return end
  if due then redis.call('HSET', session, 'due', int(due)) else redis.call('HDEL', session, 'due') end
end

-- begin starts an epoch whose numbers go on after `base`: whatever is in the list is numbered from there.
local function begin(base)
  log.epoch, log.base, log.former, log.last = new_epoch(), base, base, base + log.length
  redis.call('HSET', session, 'epoch', log.epoch, 'base', int(base), 'former', int(base))
  if not log.created_at then
    log.created_at = int(now())
    redis.call('HSET', session, 'created_at', log.created_at)
  end
  log.begun = true
end

-- make begins a log where there is nothing.
local function make()
  log = { base = 0, last = 0, last_seen = 0, former = 0, length = 0, deletions = 0 }
  due_written = nil
  begin(0)
end

-- revive makes a deleted session an empty one again, with an epoch of its own.
local function revive()
  redis.call('HDEL', session, 'deleted', 'created_at')
  log.deleted, log.created_at = false, nil
  begin(log.base)
end

-- seen writes down how far the log goes and what stands there, so that the next script can tell this
-- list from another one.
local function seen()
  if log.last_seen == log.last and log.base == log.base_seen and not log.begun then return end
  if log.last_seen ~= log.last or not log.updated_at then log.updated_at = int(now()) end
  redis.call('HSET', session, 'last_seen', int(log.last), 'mark', mark(log.last - log.base), 'updated_at', log.updated_at)
  if log.base ~= log.base_seen then redis.call('HSET', session, 'base', int(log.base)) end
end

-- call_uploads has the session's uploads check whether they may go on. The live channel ends with the session's id, which
-- has neither a colon nor a brace.
local function call_uploads() redis.call('PUBLISH', ARGV[7], (channel:match('([^:{}]+)}?$'))) end

-- finish writes down all there is to know, and publishes last. A first epoch needs no telling: its first
-- chunk does.
local function finish()
  save()
  seen()
  redis.call('PEXPIRE', history, ARGV[2])
  redis.call('PEXPIRE', session, ARGV[3])
  if log.numbered then redis.call('PEXPIRE', index, ARGV[2]) end
  if log.begun and log.former > 0 then redis.call(ARGV[5], channel, ARGV[6]) end
  for i = 1, #news do redis.call(ARGV[5], channel, news[i]) end
  if look then call_uploads() end
end

-- add numbers and pushes chunks, given as text without the opening brace, and trims.
local function add(members)
  local head, ts, elements = log.last, ',"ts":' .. int(now()) .. ',', {}
  for i = 1, #members do
    elements[i] = '{"seq":' .. int(head + i) .. ts .. members[i]
    news[#news + 1] = elements[i]
  end
  for i = 1, #elements, 1000 do -- unpack has limits
    redis.call(newest_first and 'LPUSH' or 'RPUSH', history, unpack(elements, i, math.min(i + 999, #elements)))
  end
  log.length, log.last, log.tip = log.length + #elements, log.last + #elements, elements[#elements] or log.tip
  local excess = log.length - tonumber(ARGV[8])
  if excess > 0 then
    if newest_first then redis.call('LTRIM', history, 0, -1 - excess)
    else redis.call('LTRIM', history, excess, -1) end
    log.base, log.length = log.base + excess, log.length - excess
  end
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

-- lapse ends the messages whose deadline is past. Whichever script comes first does it, so that nobody
-- needs to be alive for it.
local function lapse()
  local lost = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', opens, '-inf', int(now()))) do
    local m = message(id)
    if m.open and m.deadline and m.deadline <= now() then
      if m.late then
        lost[#lost + 1] = id
      else
        local length = math.max(m.length, m.token ~= '-' and tonumber(ARGV[9]) or 0)
        m.late, m.changed, m.deadline = true, true, now() + last_call(length)
      end
    end
  end
  log.lapsed, look = true, true
  if #lost > 0 then lose(lost) end
end

-- learn finds out which messages the chunks from a position on begin or end: other hands pushed them.
local function learn(from)
  log.learned = true
  for i = from, log.length, 1000 do
    for _, element in ipairs(range(i, math.min(i + 999, log.length))) do
      if element:find('message_id', 1, true) or element:find('\\u', 1, true) then
        local ok, chunk = pcall(cjson.decode, element)
        local id = ok and type(chunk) == 'table' and chunk.message_id
        if type(id) == 'string' and id ~= '' then
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
  end
end

-- known reads the element at a position, the last one that was seen, and how long the list is: mostly that is
-- where it ends.
local function known(position)
  if position < 1 then return nil, redis.call('LLEN', history) end
  local found = range(position, position + 1)
  return found[1], #found == 1 and position or redis.call('LLEN', history)
end

-- open reads the log's bounds, and a message's state if it is told one, finds out whether the list is still the one
-- that was seen last, and does what is due.
local function open(id)
  local h = redis.call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'former', 'ended',
    'deleted', 'created_at', 'updated_at', 'deletions', 'due', 'numbered', 'm:' .. (id or ''))
  local base, last_seen = tonumber(h[2] or 0), tonumber(h[3] or 0)
  local tip, length = known(last_seen - base)
  if not h[1] and length == 0 then return end
  log = {
    epoch = h[1], base = base, last_seen = last_seen, former = tonumber(h[5] or 0), base_seen = base, ended = h[6], deleted = h[7],
    created_at = h[8], updated_at = h[9], deletions = tonumber(h[10] or 0), due = h[11] and tonumber(h[11]), numbered = h[12],
    length = length, last = base + length, tip = false, -- (a table that grows costs as much as a command)
  }
  due_written = log.due
  if id then messages[id] = parse(h[13]) end
  if not h[1] then
    begin(log.base) -- a list that a foreign producer began
  elseif log.deleted then
    log.base = log.last_seen
    if length > 0 then revive() end
  elseif length == 0 then
    log.base = log.last_seen -- expired: the same log, with nothing of it left
  elseif log.last_seen > log.base and
      (not tip or redis.sha1hex(tip) ~= h[4]) then
    begin(log.last_seen) -- another list stands where the known one stood
  end
  log.last = log.base + length
  if log.last > log.last_seen then learn(math.max(log.last_seen - log.base, 0) + 1) end
  if log.due and not log.ended and now() >= log.due then lapse() end
end

local function argument(k) return ARGV[at + k] end

local function reply(status, ...)
  return { status, log.epoch, int(log.base), int(log.last), int(log.former), log.ended and 1 or 0,
    log.deleted and 1 or 0, log.created_at or '', log.updated_at or '', ... }
end
