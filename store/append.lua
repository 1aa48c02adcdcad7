-- Checks, numbers, pushes, trims, refreshes and publishes chunks: all of them, or none. Its arguments:
--
--   the number of arguments in the following group (0: an append without any of them), and the group:
--     the incarnation of the session in which the upload began, or 0; an upload does not continue in a deleted
--       session; -1: do not create the session
--     the producer's id, or empty; its epoch; its number for the first chunk
--     the requested lease (ms), or 0
--     the state of the upload that holds the messages: open (it continues), look (it continues if it is allowed
--       to), closed (it has ended), left (it got its response before its end), broken (its connection failed);
--       empty for an append that is not an upload
--     the upload's token
--     the messages that it holds
--   and then for each chunk: the message it belongs to; what it does (empty, or its type: message, done,
--   failed, cancelled, end); its members as text, without the opening brace; and for a producer with numbers:
--   how many numbers it uses; how many bytes of the members the server added; c, or t if it uses one number per byte
local skip, stride, chunks
local life, producer, epoch, number, lease, hold, token, held, is_held
local none, grace = {}, tonumber(ARGV[9])

local function take_arguments()
  skip, stride = 1 + tonumber(argument(1)), 3
  life, producer, epoch, number, lease, hold, token, held, is_held = 0, '', 0, 0, 0, '', '-', none, none
  if skip > 1 then
    life, producer, epoch, number = tonumber(argument(2)), argument(3), tonumber(argument(4)), tonumber(argument(5))
    lease, hold, token, held = tonumber(argument(6)), argument(7), argument(8), {}
    for k = 9, skip do held[k - 8] = argument(k) end
  end
  if producer ~= '' then stride = 6 end
  if #held > 0 then
    is_held = {}
    for _, id in ipairs(held) do is_held[id] = true end
  end
  chunks = (count - skip) / stride
end

local function field(i, k) return ARGV[at + skip + (i - 1) * stride + k] end

local function refuse(...)
  if log then finish() end
  return answer(...)
end

-- A producer's numbers are consecutive within each of its epochs. p:<id> is
--
--   <epoch> <the next number> <seq of its newest chunk> <seq of the first of its newest run> <c|t> <filled>
--
-- A run is a sequence of similar chunks in the log whose producer numbers are consecutive too. It is a member of the
-- sorted set at KEYS[4]:
--
--   <id> <number of the first, 16 digits> <its seq> <c|t> <filled>
--
-- The order of the set finds a number without a scan. Runs of text are short, because the place of a number in them is
-- unknown.
-- d:<id> is the epoch of a producer whose session was deleted.
--
-- has_room reports whether the log may have another message or producer, and counts it. The hash has a dozen fields
-- besides messages and producers.
local room
local function has_room()
  room = (room or tonumber(ARGV[10]) + 12 - redis.call('HLEN', session)) - 1
  return room >= 0
end

local position, behind
local function place(n) return producer .. ' ' .. string.format('%016.0f', n) end

-- locate finds the producer's position, and refuses numbers that do not continue from there.
local function locate(runs)
  local text = log and redis.call('HGET', session, 'p:' .. producer)
  local gone = log and log.deletions > 0 and redis.call('HGET', session, 'd:' .. producer)
  if gone and epoch <= tonumber(gone) then return refuse('session_deleted') end
  if text then
    local e, n, seq, first, form, filled = text:match('^(%d+) (%d+) (%d+) (%d+) (%l) (%d+)$')
    position = { text = text, epoch = tonumber(e), next = tonumber(n), seq = tonumber(seq), first = tonumber(first), form = form, filled = filled }
  end
  if position and runs == 0 then position.first = 0 end -- the index expired with the list
  if position and epoch < position.epoch then return refuse('producer_fenced', int(position.epoch)) end
  if not position or epoch > position.epoch then
    if number > 0 then return refuse('producer_gap', '0') end
    position = { text = text, epoch = epoch, next = 0, seq = 0, first = 0, form = 'c', filled = '0', fresh = true, fences = position ~= nil }
  elseif number > position.next then
    return refuse('producer_gap', int(position.next))
  elseif number < position.next and chunks == 0 then
    behind = true -- it repeats stored chunks, so it does not matter what has ended since
  elseif number < position.next then
    local to = number
    for i = 1, chunks do to = to + tonumber(field(i, 4)) end
    to = math.min(to, position.next)
    local from = redis.call('ZREVRANGEBYLEX', index, '(' .. place(number) .. '!', '[' .. producer .. ' ', 'LIMIT', 0, 1)
    local found = redis.call('ZRANGEBYLEX', index, '[' .. (from[1] or producer .. ' '), '(' .. place(to - 1) .. '!', 'LIMIT', 0, 1000)
    local next_run = found[1] and redis.call('ZRANGEBYLEX', index, '(' .. found[#found], '(' .. producer .. '!', 'LIMIT', 0, 1)
    return refuse('producer_known', int(position.next), found, next_run and next_run[1] or '', log.deletions + 1)
  end
end

-- advance records the producer's new position. The producer's chunks are those after head. The script calls it before
-- it pushes them, and calls retreat if the push fails: a script that fails halfway never leaves chunks that a retry
-- would store again.
local function advance(head)
  local seq, runs = head, {}
  position.runs = runs
  if position.fresh then write('ZREMRANGEBYLEX', index, '[' .. producer .. ' ', '(' .. producer .. '!') end
  if position.fences then look = true end
  for i = 1, chunks do
    local filled, form = field(i, 5), field(i, 6)
    seq = seq + 1
    if form ~= position.form or filled ~= position.filled or seq ~= position.seq + 1 or position.first == 0 or
        form == 't' and seq - position.first >= 64 then
      runs[#runs + 1], runs[#runs + 2] = 0, place(number) .. ' ' .. int(seq) .. ' ' .. form .. ' ' .. filled
      position.first, position.form, position.filled = seq, form, filled
    end
    position.seq, number = seq, number + tonumber(field(i, 4))
  end
  write_many('ZADD', index, runs)
  if chunks > 0 then position.next = number end
  write('HSET', session, 'p:' .. producer, int(position.epoch) .. ' ' .. int(position.next) .. ' ' ..
    int(position.seq) .. ' ' .. int(position.first) .. ' ' .. position.form .. ' ' .. position.filled)
  if not log.numbered then
    log.numbered = '1'
    write('HSET', session, 'numbered', '1')
  end
  if position.fresh and log.deletions > 0 then write('HDEL', session, 'd:' .. producer) end
  -- Removes runs whose chunks are all trimmed. Producers never end, so this checks random runs of all producers: about
  -- three times as many as were added. It reads neighbours together, because a run ends where the next one begins. It
  -- reads them backwards, so that first runs are found as often as others.
  local added, stretch, gone = #runs / 2, 24, {}
  if log.base > 0 and added > 0 then
    for _, start in ipairs(redis.call('ZRANDMEMBER', index, math.ceil((2 + 3 * added) / stretch))) do
      local owner, from
      for _, run in ipairs(redis.call('ZREVRANGEBYLEX', index, '[' .. start, '-', 'LIMIT', 0, stretch)) do
        local former, first = run:match('^(%S+) %d+ (%d+)')
        if owner == former and tonumber(from) <= log.base + 1 then gone[#gone + 1] = run end
        owner, from = former, first
      end
    end
    write_many('ZREM', index, gone)
  end
end

-- retreat undoes advance, as far as Redis allows.
local function retreat()
  for i = 2, #position.runs, 2 do redis.pcall('ZREM', index, position.runs[i]) end
  if position.text then redis.pcall('HSET', session, 'p:' .. producer, position.text)
  else redis.pcall('HDEL', session, 'p:' .. producer) end
end

-- hear updates a message's lease after a sign of life. It does not change the upload that holds the message, nor the
-- grace period granted to an absent producer. A producer that is back needs no grace.
local function hear(id, has_chunk)
  local m = message(id)
  begin_message(m, has_chunk)
  if lease > 0 and m.length ~= lease then m.length, m.changed, m.deadline = lease, true, nil end
  if is_held[id] and hold ~= '' then return end -- hear_all handles the upload's own messages
  local back = m.producer == producer
  if m.token == '-' or m.token == '~' and back then
    rest(m)
  elseif back and producer ~= '' then
    -- The producer's numbers show that its upload is gone, though the upload may not know yet. If it continues, it
    -- holds the message again.
    m.token, m.changed = '~', true
    renew(m, math.max(m.length, grace))
  elseif m.length > 0 then
    renew(m, math.max(m.length, grace))
  end
end

-- hear_all updates messages after their chunks, and after a change of the upload that holds them.
local function hear_all()
  for i = 1, chunks do
    local id, kind = field(i, 1), field(i, 2)
    if id == '' or kind == 'end' then
      -- It belongs to no message.
    elseif kind == '' or kind == 'message' and message(id).open then
      hear(id, true)
    elseif kind ~= 'message' then
      close_message(id, kind)
    end
  end

  local lost = {}
  for _, id in ipairs(log.ended and {} or held) do
    local m = message(id)
    local ours = m.token == token or m.token == '~' and m.producer == producer
    if m.how then
      -- It has ended.
    elseif hold == '' then
      if lease > 0 or m.length > 0 then hear(id) end
    elseif hold == 'open' or hold == 'look' then
      -- A producer's newest upload holds the message. An upload of another producer holds it only if no other upload
      -- does. An upload that repeats stored chunks does not reopen it.
      if m.open or not behind then
        hear(id)
        if ours or m.token == '-' or m.producer == producer and hold == 'open' then
          if m.token ~= token then m.token, m.producer, m.changed = token, producer, true end
          renew(m, math.max(m.length, grace))
        end
      end
    elseif not m.open or not ours and m.token ~= '-' then
      -- Another upload decides.
    elseif hold == 'closed' then
      rest(m)
      if m.new and m.length == 0 then m.dropped, m.changed = true, true end
    elseif hold == 'left' and m.new then
      m.dropped, m.changed = true, true
    elseif hold == 'left' or producer ~= '' then
      m.token, m.producer, m.changed = '~', producer, true
      renew(m, math.max(m.length, grace))
    elseif m.length > 0 then
      rest(m)
    elseif ours then
      lost[#lost + 1] = id
    end
  end
  if #lost > 0 then lose(lost) end
end

local function work()
  must_write()
  take_arguments()
  position, behind, room = nil, false, nil
  local runs = producer ~= '' and redis.call('ZCARD', index) -- fails if the key has another type
  local first = chunks > 0 and field(1, 1)
  open(first ~= '' and first or nil)
  if log and (log.learned or log.unfinished) then return refuse('again') end -- which messages have ended is still unknown
  if log and life > 0 and log.deletions + 1 > life then return refuse('session_deleted') end
  if producer ~= '' then
    local refusal = locate(runs)
    if refusal then return refusal end
  end

  if chunks > 2 then
    local ids = {}
    for i = 1, chunks do
      if field(i, 1) ~= '' and field(i, 2) ~= 'end' then ids[#ids + 1] = field(i, 1) end
    end
    read_messages(ids)
  end
  local ended, over, writes = log and not log.deleted and log.ended, nil, #held > 0 or lease > 0 or log and log.learned
  if position and position.fresh and not position.fences and not has_room() then return refuse('session_full', -1) end
  for i = 1, chunks do
    if ended then return refuse('session_ended', i - 1) end
    local id, kind = field(i, 1), field(i, 2)
    if id ~= '' and kind ~= 'end' then
      local m = message(id)
      local how = over and over[id] or m.how
      if how then return refuse('message_ended', i - 1, id, how) end
      if not m.open and not m.named and kind ~= 'message' then
        m.named = true
        if not has_room() then return refuse('session_full', i - 1) end
      end
      if kind ~= '' and kind ~= 'message' then
        over = over or {}
        over[id] = kind
      end
      writes = writes or kind ~= '' or m.deadline or not m.open
    end
    ended = kind == 'end'
  end
  if writes then redis.call('ZCARD', opens) end -- fails if the key has another type
  if chunks == 0 and not behind and (hold == '' or hold == 'look') then
    if ended and (hold == 'look' or #held > 0) then return refuse('session_ended', -1) end
    for _, id in ipairs(held) do
      local how = message(id).how
      if how and (hold == '' or how ~= 'done') then return refuse('message_ended', -1, id, how) end
    end
  end
  if hold == 'open' or hold == 'look' or lease > 0 then
    for _, id in ipairs(behind and none or held) do
      local m = message(id)
      if not m.how and not m.open and not m.named and not has_room() then return refuse('session_full', -1) end
    end
  end

  local made = not log or log.deleted
  if made then
    -- Naming a message creates no session unless the call changes the message.
    if chunks == 0 and producer == '' and hold == '' and lease == 0 then return refuse('nothing', log and log.last or 0) end
    if life < 0 then return refuse('not_made') end
    if log then revive() else make() end
  end
  -- From here on the script refuses nothing.

  local head, members = log.last, {}
  for i = 1, chunks do members[i] = field(i, 3) end
  local pushed, failure = pcall(function()
    if position then advance(head) end
    add(members)
  end)
  if not pushed then
    if position then retreat() end
    error(failure)
  end
  if ended and not log.ended then
    log.ended, look = int(log.last), true
    write('HSET', session, 'ended', log.ended)
  end
  if #held > 0 or next(messages) then hear_all() end
  finish()
  return answer('ok', head + 1, log.deletions + 1, made and 1 or 0)
end
