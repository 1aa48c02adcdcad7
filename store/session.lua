-- Makes, deletes, begins anew, cancels, and tells what is open. Its arguments: create | delete | renew | cancel | open; of renew then the epoch
-- that is to end and the highest number that was given out in it; of cancel a message, or nothing for a slice of all that
-- are open; of open where the former slice has ended, 0 for the first.
--
-- delete, cancel and open say at the end of their replies whether there is more to do, or where it goes on.
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
    -- What stays: where the numbers have got to, so that they go on; how often this has happened, so that an upload from
    -- before it does not write into what comes after; and which producers there were (log.lua: sweep).
    -- The tombstone comes first: a script that fails after it has lost nothing that it would need.
    log.deleted, log.sweep = int(now()), '0'
    write('HSET', session, 'epoch', log.epoch, 'base', int(log.last), 'last_seen', int(log.last), 'mark', '',
      'former', int(log.former), 'deletions', int(log.deletions + 1), 'deleted', log.deleted, 'sweep', log.sweep)
    if type(redis.pcall('UNLINK', history, index, opens)) == 'table' then write('DEL', history, index, opens) end -- a right of its own
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
      save() -- so that the set has those that were learnt just now
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
    -- A scan misses none that is open all the while, whatever else happens between its slices.
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

  -- renew: compare and set, so that of several nodes that notice, one does it.
  if log.epoch == argument(2) and not log.deleted then begin(next_base(math.max(top(), tonumber(argument(3))))) end
  finish()
  return reply('ok')
end
