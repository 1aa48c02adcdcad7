-- The ordinary append: chunks of one open message, or of none, after a log that is unchanged since its last script and
-- in which nothing is due. Nearly all appends are ordinary, and this takes two thirds of the time of append.lua, which
-- handles every case. If an append is not ordinary, the reply is `other`: nothing was done, and the caller must use
-- append.lua. This script does what append.lua would have done.
--
--   KEYS     four for each caller: the history list, the session hash, the live channel, the index of producers' numbers
--   ARGV[1]  time to live of the list, ms      ARGV[2]  time to live of the hash, ms
--   ARGV[3]  oldest-first | newest-first       ARGV[4]  PUBLISH | SPUBLISH
--   ARGV[5]  how many chunks to keep           ARGV[6]  the grace period, ms
--   ARGV[7]  how many bytes of chunks to keep, 0: all
--   and then for each caller: what its node remembers of the log (an epoch, a number, the mark of that number; or empty,
--   0, empty); the incarnation of the session in which its upload began, or 0 or less; the message; the token of the
--   upload that holds it, or empty; the number of chunks; and the members of each chunk, without the opening brace
local newest_first, call, pcall_redis, sha1hex = ARGV[3] == 'newest-first', redis.call, redis.pcall, redis.sha1hex
local other = { 'other' }
local at, written, compared = nil, nil, {}
local clock, now, stamp -- the time of the run: as a number, as text, and as the ts member of its chunks

local function int(n) return string.format('%.0f', n) end

-- is_held reports whether an upload holds a message, given the message's state, and does not need to renew the deadline
-- yet (log.lua: parse, renew).
local function is_held(text, token)
  local deadline, holder = text:match('^open (%d+) 0 (%S+) $')
  if holder ~= token then return false end
  local grace = tonumber(ARGV[6])
  local gained = clock + grace - math.min(math.floor(grace / 5), 5000) - deadline
  return gained >= 0 and gained < grace / 16
end

local function range(history, i, j)
  if newest_first then return call('LRANGE', history, -j, -i) end
  return call('LRANGE', history, i - 1, j - 1)
end

-- remembers reports whether the log contains what the caller's node remembers of it (log.lua: compare_memory).
local function remembers(history, epoch, base, last, mark)
  local known_epoch, known_last, known_mark = ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3]
  if known_last == 0 or compared[history] then return true end
  if known_epoch ~= epoch or known_last > last then return false end
  local position = known_last - base
  if #known_mark < 16 then return true end
  if known_last == last and #mark >= 16 then return known_mark == mark end
  if position < 1 then return true end
  if #known_mark ~= 40 then return false end -- a mark of several elements
  local found = range(history, position, position)
  return #found == 1 and sha1hex(found[1]) == known_mark
end

-- surplus returns the number of the oldest chunks beyond the log's limits, and their size in bytes (log.lua: trim).
local most, most_bytes = tonumber(ARGV[5]), tonumber(ARGV[7])
local function surplus(history, length, bytes)
  local n, size, step = 0, 0, 1
  local function over()
    return n < length - 1 and (length - n > most or most_bytes > 0 and bytes - size > most_bytes)
  end
  while over() and n < 1000 and size < 1048576 do
    local found = range(history, n + 1, n + step)
    for k = 1, #found do
      if over() then n, size = n + 1, size + #found[newest_first and #found + 1 - k or k] end
    end
    step = math.min(2 * step, 128, math.max(math.floor(262144 * n / size), 1))
  end
  return n, size
end

local function push(history, session, channel, index)
  local life, id, token, count = tonumber(ARGV[at + 4]), ARGV[at + 5], ARGV[at + 6], tonumber(ARGV[at + 7])
  local h
  if id == '' then h = call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'ended', 'deleted', 'deletions', 'due', 'numbered', 'learned', 'sized')
  else h = call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'ended', 'deleted', 'deletions', 'due', 'numbered', 'learned', 'sized', 'm:' .. id) end
  local epoch, base, last, now_life = h[1], tonumber(h[2]), tonumber(h[3]), (h[7] or 0) + 1
  if not epoch or not base or not last or h[5] or h[6] or h[10] or life > 0 and now_life > life then return other end
  if not clock then
    local t = call('TIME')
    clock = t[1] * 1000 + math.floor(t[2] / 1000)
    now = int(clock)
    stamp = ',"ts":' .. now .. ','
  end
  local bytes, sized_base, sized_last = (h[11] or ''):match('^(%d+) (%d+) (%d+)$')
  if sized_base ~= h[2] or sized_last ~= h[3] then return other end
  if h[8] and clock >= tonumber(h[8]) then return other end
  if id ~= '' and not (h[12] and (token == '' and h[12] == 'open' or token ~= '' and is_held(h[12], token))) then return other end

  -- The list must be the one that was seen last, no longer than it was, and contain what the node remembers.
  local length, found = last - base, nil
  if length == 0 then found = call('LRANGE', history, 0, 0) else found = range(history, length, length + 1) end
  if #found ~= math.min(length, 1) or length > 0 and sha1hex(found[1]) ~= h[4] then return other end
  if not remembers(history, epoch, base, last, h[4]) then return other end
  compared[history] = true

  local elements = {}
  for i = 1, count do
    elements[i] = '{"seq":' .. int(last + i) .. stamp .. ARGV[at + 7 + i]
    bytes = bytes + #elements[i]
  end
  call(newest_first and 'LPUSH' or 'RPUSH', history, unpack(elements))
  written = true
  local mark = sha1hex(elements[count])
  local n, size = surplus(history, length + count, bytes)
  if n > 0 then
    local reply
    if newest_first then reply = pcall_redis('LTRIM', history, 0, -1 - n) else reply = pcall_redis('LTRIM', history, n, -1) end
    if reply.err then n, size = 0, 0 -- the append is stored all the same
    else call('HSET', session, 'base', int(base + n)) end
  end
  call('HSET', session, 'last_seen', int(last + count), 'mark', mark, 'updated_at', now, 'sized', int(bytes - size) .. ' ' .. int(base + n) .. ' ' .. int(last + count))
  pcall_redis('PEXPIRE', history, ARGV[1])
  pcall_redis('PEXPIRE', session, ARGV[2])
  if h[9] then pcall_redis('PEXPIRE', index, ARGV[1]) end
  local note = ''
  for i = 1, count do
    local heard = pcall_redis(ARGV[4], channel, elements[i]) -- a hint: its failure fails nothing
    if type(heard) == 'table' and heard.err then note = 'unheard ' .. heard.err end
  end
  return { 'ok', epoch, last + count, mark, note, last + 1, now_life }
end

local replies = {}
at = 7
for i = 1, #KEYS / 4 do
  local k = 4 * i
  written = false
  local ok, reply = pcall(push, KEYS[k - 3], KEYS[k - 2], KEYS[k - 1], KEYS[k])
  if not ok then -- append.lua reports whatever else is wrong before the first write
    reply = written and { 'broken', type(reply) == 'table' and reply.err or tostring(reply) } or other
  end
  replies[i] = reply
  at = at + 7 + ARGV[at + 7]
end
return replies
