-- Creates or deletes a session, begins a new epoch, cancels messages, or lists the open ones. Its first argument:
-- create | delete | renew | cancel | open. renew also gets the epoch to end and the highest number used in it. cancel
-- gets a message, or an empty text for a slice of all open messages. open gets the position where the last slice ended,
-- 0 for the first.
--
-- The replies to delete, cancel and open end with whether there is more to do, or with the next position.
local function work()
  local what = argument(1)
  must_write()
  open()
  if log and (log.learned or log.unfinished and what ~= 'delete') then
    finish()
    return answer('again')
  end
  if what == 'create' then
    if log and not log.deleted then
      finish()
      return reply('exists')
    end
    if log then revive() else make() end
    finish()
    return reply('ok')
  end

  if not log then return answer('absent') end

  if what == 'delete' then
    if log.deleted then return reply('ok', log.sweep and 1 or 0) end
    -- The hash keeps the last number, so that numbers continue. It keeps the count of deletions, so that an upload from
    -- before does not write into the next log. And it keeps the producers (log.lua: sweep).
    -- The tombstone comes first: a script that fails after it has lost nothing that it needs.
    log.deleted, log.sweep = int(now()), '0'
    write('HSET', session, 'epoch', log.epoch, 'base', int(log.last), 'last_seen', int(log.last), 'mark', '',
      'former', int(log.former), 'deletions', int(log.deletions + 1), 'deleted', log.deleted, 'sweep', log.sweep)
    if type(redis.pcall('UNLINK', history, index, opens)) == 'table' then write('DEL', history, index, opens) end -- UNLINK needs its own permission
    write('HDEL', session, 'created_at', 'updated_at', 'ended', 'due', 'numbered', 'learned', 'sized')
    sweep()
    redis.pcall('PEXPIRE', session, ARGV[3])
    publish(ARGV[5], channel, ARGV[6])
    call_uploads()
    return reply('ok', log.sweep and 1 or 0)
  end

  if what == 'cancel' then
    if log.deleted then return answer('absent') end
    local ids, id, status, more = {}, argument(2), 'ok', 0
    if id == '' then
      save() -- so that the set contains the messages just learned
      local found, stale = log.ended and {} or redis.call('ZRANGE', opens, 0, slice_of_messages - 1), {}
      read_messages(found)
      for _, one in ipairs(found) do
        if message(one).open then ids[#ids + 1] = one else stale[#stale + 1] = one end
      end
      write_many('ZREM', opens, stale)
      if #found == slice_of_messages then more = 1 end
    else
      local m = message(id)
      if m.how and m.how ~= 'stopped' and m.how ~= 'cancelled' then status = 'message_ended'
      elseif not m.how and not m.open then status = 'message_unknown'
      elseif m.open and log.ended then status = 'session_ended'
      elseif m.open then ids[1] = id end
    end
    local head, how = log.last, id ~= '' and message(id).how or ''
    if #ids > 0 then
      conclude(ids, 'cancelled', 'stopped', '')
      look = true
    end
    finish()
    return reply(status, head + 1, head + #ids, ids, how, more)
  end

  if what == 'open' then
    if log.deleted then return answer('absent') end
    save() -- as above
    -- A scan finds every message that stays open, whatever else happens between its slices.
    local found = log.ended and { '0', {} } or redis.call('ZSCAN', opens, argument(2), 'COUNT', 2 * slice_of_messages)
    local some, ids = {}, {}
    for i = 1, #found[2], 2 do some[#some + 1] = found[2][i] end
    read_messages(some)
    spent = spent + 13 * #some
    for _, one in ipairs(some) do
      if message(one).open then ids[#ids + 1] = one end
    end
    finish()
    return reply('ok', ids, found[1])
  end

  -- renew compares and sets, so that only one of several nodes does it.
  if log.epoch == argument(2) and not log.deleted then begin(next_base(math.max(top(), tonumber(argument(3))))) end
  finish()
  return reply('ok')
end
