-- Returns the bounds of the log and some of its chunks, all of one instant. The first argument is the first number
-- wanted, or 0 for the newest chunks that fit. The second is the maximum size of the chunks in bytes (read.go:
-- sliceMost), though the script always returns one chunk. The third is the maximum number of chunks, 0 for only the
-- bounds. The reply contains the chunks in parts, as they were read: copying them would cost as much again.
--
-- A chunk that passes through Lua costs Redis six times as much as one that does not. So if many chunks are wanted, and
-- the list is not larger than the fourth argument, the reply is only where they begin, and the size of the list in
-- bytes. The caller then reads bounds and chunks in one transaction.
--
-- Waiting for a session creates no keys: if the session does not exist, nothing is written. Reading needs no write: if
-- Redis refuses one, the reply says so and is otherwise the same.
local function work()
  open()
  if not log then
    -- Redis has lost the log. The next append continues it elsewhere, and viewers must know that now.
    if not lost then return answer('absent') end
    return { 'lost', lost.epoch, lost.base, '-', '', lost.base, lost.base, 0, 0, '', '', lost.base + 1, {} }
  end
  finish()
  if log.unfinished and not log.deleted then return answer('again') end

  local from, bytes, most = tonumber(argument(1)), tonumber(argument(2)), tonumber(argument(3))
  local newest = from == 0 -- then parts are read from the end backwards
  local first = newest and log.length + 1 or math.max(from - log.base, 1)
  local last = newest and log.length or first - 1
  if not newest and not log.learned and log.bytes <= tonumber(argument(4)) and math.min(most, log.length - last) >= 1000 then
    return reply('large', log.base + first, log.bytes)
  end
  local taken, size, step, parts = 0, 0, 8, {} -- the size of the chunks is not known yet
  while taken < most and (size < bytes or taken == 0) and (newest and first > 1 or not newest and last < log.length) do
    step = math.min(step, most - taken)
    local part
    if newest then part = range(math.max(first - step, 1), first - 1) else part = range(last + 1, math.min(last + step, log.length)) end
    local fit, length = 0, #part
    for k = 1, length do
      size = size + #part[newest and length + 1 - k or k]
      if size > bytes and taken + k > 1 then break end
      fit = k
    end
    if newest then
      for k = 1, fit < length and fit or 0 do part[k] = part[length - fit + k] end
      table.insert(parts, 1, part)
      first = first - fit
    else
      table.insert(parts, part)
      last = last + fit
    end
    for k = length, fit + 1, -1 do part[k] = nil end
    taken = taken + fit
    if fit < length or length < step then break end
    step = math.min(4 * step, math.max(math.floor((bytes - size) * taken / math.max(size, 1)), 1)) -- as many as may fit
  end
  spent = spent + size / 128 + taken
  return reply('ok', log.base + first, parts)
end
