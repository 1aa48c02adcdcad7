-- Checks, numbers, pushes, trims, refreshes and publishes chunks: all of them, or none.
--
--   ARGV[7]  how many chunks to keep
--   ARGV[8]  the last number that this upload was given, or 0: a log that was deleted since is not its own
--   ARGV[9]  and up, three for each chunk: the message it belongs to, what it ends (nothing, or its
--            type: done, failed, cancelled, end), and its members as text, without the opening brace
open()
local chunks, after = (#ARGV - 8) / 3, tonumber(ARGV[8])
if log and after > 0 and (log.deleted or after <= log.removed) then return reply('session_deleted') end

local function refuse(status, ...)
  if not log then return { status, '', '0', '0', '0', 0, 0, '', '', ... } end
  seen()
  keep()
  return reply(status, ...)
end
local ended, finished = log and not log.deleted and log.ended, {}
for i = 1, chunks do
  if ended then return refuse('session_ended', i - 1) end
  local message, ends = ARGV[6 + 3 * i], ARGV[7 + 3 * i]
  if message ~= '' then
    local how = finished[message] or redis.call('HGET', session, 'm:' .. message)
    if how then return refuse('message_ended', i - 1, message, how) end
    if ends ~= '' and ends ~= 'end' then finished[message] = ends end
  end
  ended = ends == 'end'
end

if not log then
  log = { base = 0, last = 0, last_seen = 0, former = 0, length = 0 }
  begin(0)
elseif log.deleted then
  revive()
end
hint_begun()

local push = newest_first and 'LPUSH' or 'RPUSH'
local head, ts, elements = log.last, int(now()), {}
for i = 1, chunks do
  elements[i] = '{"seq":' .. int(head + i) .. ',"ts":' .. ts .. ',' .. ARGV[8 + 3 * i]
end
for i = 1, chunks, 1000 do
  redis.call(push, history, unpack(elements, i, math.min(i + 999, chunks)))
end
log.length, log.last = log.length + chunks, log.last + chunks
local excess = log.length - tonumber(ARGV[7])
if excess > 0 then
  if newest_first then redis.call('LTRIM', history, 0, -1 - excess)
  else redis.call('LTRIM', history, excess, -1) end
  log.base, log.length = log.base + excess, log.length - excess
end
if ended and not log.ended then
  log.ended = int(log.last)
  redis.call('HSET', session, 'ended', log.ended)
end
for message, how in pairs(finished) do redis.call('HSET', session, 'm:' .. message, how) end
seen()
keep()
for i = 1, chunks do redis.call(ARGV[5], channel, elements[i]) end
return reply('ok', int(head + 1), int(head + chunks))
