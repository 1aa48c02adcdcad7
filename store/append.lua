-- Checks, numbers, pushes, trims, refreshes and publishes chunks: all of them, or none.
--
--   ARGV[11]  which life of the session the upload began in, or 0: a deleted one is not gone on with
--   ARGV[12]  the producer's id, or nothing      ARGV[13]  its epoch      ARGV[14]  its number of the first chunk
--   ARGV[15]  the lease (ms) that is asked for, or 0
--   ARGV[16]  what becomes of the messages that the upload holds: open (it goes on), look (the same, and may
--             it?), closed (it has ended), broken (its connection has); nothing for what is no upload
--   ARGV[17]  how many those are; then each of them
--   and then for each chunk: the message it belongs to; what it does (nothing, or its type: message, done,
--   failed, cancelled, end); its members as text, without the opening brace; and for a producer with numbers:
--   how many numbers it takes; how many bytes of the members were filled in; c, or t if it takes a number a byte
open()
local producer, lease, hold, stride = ARGV[12], tonumber(ARGV[15]), ARGV[16], 3
if producer ~= '' then stride = 6 end
local held, skip = {}, 17 + tonumber(ARGV[17])
for i = 18, skip do held[#held + 1] = ARGV[i] end
local chunks = (#ARGV - skip) / stride
local function field(i, k) return ARGV[skip + (i - 1) * stride + k] end

local function refuse(status, ...)
  if not log then return { status, '', '0', '0', '0', 0, 0, '', '', ... } end
  finish()
  return reply(status, ...)
end

local life = tonumber(ARGV[11])
if log and life > 0 and log.deletions + 1 > life then return refuse('session_deleted') end

-- A producer's numbers go on without a hole in each of its epochs. p:<id> is
--
--   <epoch> <the next number> <seq of its newest chunk> <seq of the first of its newest run> <c|t> <filled>
--
-- and a run is consecutive chunks of the log whose numbers are consecutive as well, all alike: a member of the
-- sorted set at KEYS[4], in the order of
--
--   <id> <number of the first, 16 digits> <its seq> <c|t> <filled>
--
-- in which a number is found without a scan. Runs of text are short, since a number's place in them is not known.
local function place(number) return producer .. ' ' .. string.format('%016.0f', number) end
local position, behind
if producer ~= '' then
  local epoch, number = tonumber(ARGV[13]), tonumber(ARGV[14])
  local text = log and redis.call('HGET', session, 'p:' .. producer)
  if text then
    local e, n, seq, first, form, filled = text:match('^(%d+) (%d+) (%d+) (%d+) (%l) (%d+)$')
    position = { epoch = tonumber(e), next = tonumber(n), seq = tonumber(seq), first = tonumber(first), form = form, filled = filled }
  end
  if position and epoch < position.epoch then return refuse('producer_fenced', int(position.epoch)) end
  if not position or epoch > position.epoch then
    if number > 0 then return refuse('producer_gap', '0') end
    position = { epoch = epoch, next = 0, seq = 0, first = 0, form = 'c', filled = '0', fresh = true, fences = position ~= nil }
  elseif number > position.next then
    return refuse('producer_gap', int(position.next))
  elseif number < position.next and chunks == 0 then
    behind = true -- it sends again what is known: no matter what has ended since
  elseif number < position.next then
    local to = number
    for i = 1, chunks do to = to + tonumber(field(i, 4)) end
    to = math.min(to, position.next)
    local from = redis.call('ZREVRANGEBYLEX', index, '(' .. place(number) .. '!', '[' .. producer .. ' ', 'LIMIT', 0, 1)
    local runs = redis.call('ZRANGEBYLEX', index, '[' .. (from[1] or producer .. ' '), '(' .. place(to - 1) .. '!', 'LIMIT', 0, 1000)
    local next_run = runs[1] and redis.call('ZRANGEBYLEX', index, '(' .. runs[#runs], '(' .. producer .. '!', 'LIMIT', 0, 1)
    return refuse('producer_known', int(position.next), runs, next_run and next_run[1] or '', log.deletions + 1)
  end
  redis.call('ZCARD', index) -- fails on a key of another type, in time
end

local ended, over = log and not log.deleted and log.ended, {}
for i = 1, chunks do
  if ended then return refuse('session_ended', i - 1) end
  local id, kind = field(i, 1), field(i, 2)
  if id ~= '' then
    local how = over[id] or message(id).how
    if how then return refuse('message_ended', i - 1, id, how) end
    if kind ~= '' and kind ~= 'message' and kind ~= 'end' then over[id] = kind end
  end
  ended = kind == 'end'
end
if chunks == 0 and not behind and (hold == '' or hold == 'look') then
  if ended and #held > 0 then return refuse('session_ended', -1) end
  for _, id in ipairs(held) do
    local how = message(id).how
    if how and (hold == '' or how ~= 'done') then return refuse('message_ended', -1, id, how) end
  end
end

-- Nothing is refused any more.
if not log then
  make()
elseif log.deleted then
  revive()
end

local members, head = {}, log.last
for i = 1, chunks do members[i] = field(i, 3) end
add(members)
if ended and not log.ended then
  log.ended, look = int(log.last), true
  redis.call('HSET', session, 'ended', log.ended)
end

if position then
  local number, seq = tonumber(ARGV[14]), head
  if position.fresh then redis.call('ZREMRANGEBYLEX', index, '[' .. producer .. ' ', '(' .. producer .. '!') end
  if position.fences then look = true end
  for i = 1, chunks do
    local filled, form = field(i, 5), field(i, 6)
    seq = seq + 1
    if form ~= position.form or filled ~= position.filled or seq ~= position.seq + 1 or position.first == 0 or
        form == 't' and seq - position.first >= 64 then
      redis.call('ZADD', index, 0, place(number) .. ' ' .. int(seq) .. ' ' .. form .. ' ' .. filled)
      position.first, position.form, position.filled = seq, form, filled
    end
    position.seq, number = seq, number + tonumber(field(i, 4))
  end
  if chunks > 0 then position.next = number end
  redis.call('HSET', session, 'p:' .. producer, int(position.epoch) .. ' ' .. int(position.next) .. ' ' ..
    int(position.seq) .. ' ' .. int(position.first) .. ' ' .. position.form .. ' ' .. position.filled)
  if not log.numbered then
    log.numbered = '1'
    redis.call('HSET', session, 'numbered', '1')
  end
  for _ = 1, log.base > 0 and 8 or 0 do -- runs whose chunks are all gone
    local two = redis.call('ZRANGEBYLEX', index, '[' .. producer .. ' ', '(' .. producer .. '!', 'LIMIT', 0, 2)
    if not two[2] or tonumber(two[2]:match('^%S+ %d+ (%d+)')) > log.base + 1 then break end
    redis.call('ZREM', index, two[1])
  end
end

-- What becomes of a message's lease. Another's upload under way, or the grace that it left, is not touched.
local grace, holder, is_held = tonumber(ARGV[9]), '=' .. producer, {}
for _, id in ipairs(held) do is_held[id] = true end
local function hear(id)
  local m = message(id)
  if not m.open then begin_message(m) end
  if lease > 0 then m.length, m.changed = lease, true end
  if is_held[id] and hold ~= '' then return end -- the upload says what becomes of it
  local ours = producer ~= '' and m.holder == holder
  if m.deadline and m.holder ~= '' and not ours then
    if m.length > 0 then renew(m, math.max(m.length, grace)) end
  else
    rest(m)
  end
end

for i = 1, chunks do
  local id, kind = field(i, 1), field(i, 2)
  if id == '' or kind == 'end' then
    -- It is of no message.
  elseif kind == '' or kind == 'message' and message(id).open then
    hear(id)
  elseif kind ~= 'message' then
    close_message(id, kind)
  end
end

local lost = {}
for _, id in ipairs(log.ended and {} or held) do
  local m = message(id)
  local ours = m.holder == holder
  if m.how then
    -- It has ended.
  elseif hold == '' then
    if lease > 0 or m.length > 0 then hear(id) end
  elseif hold == 'open' or hold == 'look' then
    hear(id)
    m.holder = holder
    renew(m, math.max(m.length, grace))
  elseif hold == 'closed' then
    if m.open and (ours or (m.holder or '') == '') then rest(m) end
  elseif ours and producer ~= '' then
    renew(m, math.max(m.length, grace))
  elseif ours and m.length > 0 then
    rest(m)
  elseif ours then
    lost[#lost + 1] = id
  end
end
if #lost > 0 then lose(lost) end
finish()
return reply('ok', int(head + 1), int(head + chunks), log.deletions + 1)
