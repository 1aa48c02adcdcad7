-- The ordinary append: chunks of one message that is open, or of none, behind a log that is as its last script left
-- it and in which nothing is due. Nearly all are, and this takes two thirds of the time of append.lua, which knows
-- every case. What is not ordinary is answered `other`: nothing was done, and append.lua is to do it. What is done
-- here is what append.lua would have done.
--
--   KEYS     four for each caller: the history list, the session hash, the live channel, the index of producers' numbers
--   ARGV[1]  time to live of the list, ms      ARGV[2]  time to live of the hash, ms
--   ARGV[3]  oldest-first | newest-first       ARGV[4]  PUBLISH | SPUBLISH
--   ARGV[5]  how many chunks to keep           ARGV[6]  the grace, ms
--   and then for each caller: what its node remembers of the log (an epoch, a number, the mark of that number; or nothing, 0,
--   nothing); which life of the session its upload began in, or 0 or less; the message; the token by which an upload holds
--   it, or nothing; how many chunks; and of each its members, without the opening brace
local newest_first, call, pcall_redis, sha1hex = ARGV[3] == 'newest-first', redis.call, redis.pcall, redis.sha1hex
local other = { 'other' }
local at, written, compared = nil, nil, {}
local clock, now, stamp -- the time of the run, as a number, as text, and as its chunks say it

local function int(n) return string.format('%.0f', n) end

-- is_held reports whether an upload holds a message, by what the hash has of it, and need not say so again (log.lua:
-- parse, renew).
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

-- remembers reports whether the log has what the caller's node remembers of it (log.lua: compare_memory).
local function remembers(history, epoch, base, last, mark)
  local known_epoch, known_last, known_mark = ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3]
  if known_last == 0 or compared[history] then return true end
  if known_epoch ~= epoch or known_last > last then return false end
  local position = known_last - base
  if #known_mark < 16 then return true end
  if known_last == last and #mark >= 16 then return known_mark == mark end
  if position < 1 then return true end
  if #known_mark ~= 40 then return false end -- of several elements
  local found = range(history, position, position)
  return #found == 1 and sha1hex(found[1]) == known_mark
end

local function push(history, session, channel, index)
  local life, id, token, count = tonumber(ARGV[at + 4]), ARGV[at + 5], ARGV[at + 6], tonumber(ARGV[at + 7])
  local h
  if id == '' then h = call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'ended', 'deleted', 'deletions', 'due', 'numbered', 'learned')
  else h = call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'ended', 'deleted', 'deletions', 'due', 'numbered', 'learned', 'm:' .. id) end
  local epoch, base, last, now_life = h[1], tonumber(h[2]), tonumber(h[3]), (h[7] or 0) + 1
  if not epoch or not base or not last or h[5] or h[6] or h[10] or life > 0 and now_life > life then return other end
  if not clock then
    local t = call('TIME')
    clock = t[1] * 1000 + math.floor(t[2] / 1000)
    now = int(clock)
    stamp = ',"ts":' .. now .. ','
  end
  if h[8] and clock >= tonumber(h[8]) then return other end
  if id ~= '' and not (h[11] and (token == '' and h[11] == 'open' or token ~= '' and is_held(h[11], token))) then return other end

  -- The list has to be the one that was seen last, and no longer than it was, and to have what the node remembers.
  local length, found = last - base, nil
  if length == 0 then found = call('LRANGE', history, 0, 0) else found = range(history, length, length + 1) end
  if #found ~= math.min(length, 1) or length > 0 and sha1hex(found[1]) ~= h[4] then return other end
  if not remembers(history, epoch, base, last, h[4]) then return other end
  compared[history] = true

  local elements = {}
  for i = 1, count do elements[i] = '{"seq":' .. int(last + i) .. stamp .. ARGV[at + 7 + i] end
  call(newest_first and 'LPUSH' or 'RPUSH', history, unpack(elements))
  written = true
  local mark = sha1hex(elements[count])
  call('HSET', session, 'last_seen', int(last + count), 'mark', mark, 'updated_at', now)
  local excess = length + count - tonumber(ARGV[5])
  if excess > 0 then
    if newest_first then call('LTRIM', history, 0, -1 - excess) else call('LTRIM', history, excess, -1) end
    call('HSET', session, 'base', int(base + excess))
  end
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
at = 6
for i = 1, #KEYS / 4 do
  local k = 4 * i
  written = false
  local ok, reply = pcall(push, KEYS[k - 3], KEYS[k - 2], KEYS[k - 1], KEYS[k])
  if not ok then -- what else can be wrong before the first write is for append.lua to tell
    reply = written and { 'broken', type(reply) == 'table' and reply.err or tostring(reply) } or other
  end
  replies[i] = reply
  at = at + 7 + ARGV[at + 7]
end
return replies
