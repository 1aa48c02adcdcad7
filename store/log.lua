-- The part that every script begins with: the log as Redis holds it.
--
--   KEYS[1]  the history list      KEYS[2]  the session hash      KEYS[3]  the live channel
--   ARGV[1]  an epoch, to be used if a new one has to begin
--   ARGV[2]  time to live of the list, ms      ARGV[3]  time to live of the hash, ms
--   ARGV[4]  oldest-first | newest-first: which end of the list producers push to
--   ARGV[5]  PUBLISH | SPUBLISH
--   ARGV[6]  the hint: a message that only says "read the log"
--   ARGV[7]  and up: what the script itself takes
--
-- Scripts are not rolled back, so everything that can fail (a key of another type) is read before
-- anything is written.
local history, session, channel = KEYS[1], KEYS[2], KEYS[3]
local newest_first = ARGV[4] == 'newest-first'

-- log is what `open` found; nil when there is neither hash nor list.
local log = nil

local function int(n) return string.format('%.0f', n) end

local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
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
  local found = range(position, position)
  return found[1] and redis.sha1hex(found[1]) or ''
end

local function keep()
  redis.call('PEXPIRE', history, ARGV[2])
  redis.call('PEXPIRE', session, ARGV[3])
end

local function hint() redis.call(ARGV[5], channel, ARGV[6]) end

-- hint_begun tells those who follow a former epoch that it has ended. A first epoch needs no telling: its
-- first chunk does.
local function hint_begun()
  if log.begun and log.former > 0 then hint() end
end

-- begin starts an epoch whose numbers go on after `base`: whatever is in the list is numbered from there.
local function begin(base)
  log.epoch, log.base, log.former, log.last = ARGV[1], base, base, base + log.length
  redis.call('HSET', session, 'epoch', log.epoch, 'base', int(base), 'former', int(base))
  if not log.created_at then
    log.created_at = int(now())
    redis.call('HSET', session, 'created_at', log.created_at)
  end
  log.begun = true
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
  redis.call('HSET', session, 'base', int(log.base), 'last_seen', int(log.last),
    'mark', mark(log.last - log.base), 'updated_at', log.updated_at)
end

-- open reads the log's bounds, and finds out whether the list is still the one that was seen last.
local function open()
  local h = redis.call('HMGET', session, 'epoch', 'base', 'last_seen', 'mark', 'former', 'ended',
    'deleted', 'created_at', 'updated_at', 'removed')
  local length = redis.call('LLEN', history)
  if not h[1] and length == 0 then return end
  log = {
    epoch = h[1], base = tonumber(h[2] or 0), last_seen = tonumber(h[3] or 0), former = tonumber(h[5] or 0),
    base_seen = tonumber(h[2] or 0), ended = h[6], deleted = h[7], created_at = h[8], updated_at = h[9], removed = tonumber(h[10] or 0), length = length,
  }
  if not h[1] then
    begin(log.base) -- a list that a foreign producer began
  elseif log.deleted then
    log.base = log.last_seen
    if length > 0 then revive() end
  elseif length == 0 then
    log.base = log.last_seen -- expired: the same log, with nothing of it left
  elseif log.last_seen > log.base and
      (log.last_seen - log.base > length or mark(log.last_seen - log.base) ~= h[4]) then
    begin(log.last_seen) -- another list stands where the known one stood
  end
  log.last = log.base + length
end

local function reply(status, ...)
  return { status, log.epoch, int(log.base), int(log.last), int(log.former), log.ended and 1 or 0,
    log.deleted and 1 or 0, log.created_at or '', log.updated_at or '', ... }
end
