-- Makes, deletes, begins anew, cancels, and tells what is open. Its arguments: create | delete | renew | cancel | open; of renew then the epoch
-- that is to end and the highest number that was given out in it; of cancel a message, or nothing for all that are open.
local function work()
  local what = argument(1)
  must_write()
  open()
  if log and log.learned then
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
    if log.deleted then return reply('ok') end
    -- What stays: where the numbers have got to, so that they go on; how often this has happened, so that an
    -- upload from before it does not write into what comes after; and which producers there were, so that one
    -- that repeats itself does not bring back what was deleted.
    local gone, all = {}, redis.call('HGETALL', session)
    for i = 1, #all, 2 do
      local kind, id = all[i]:match('^([pd]:)(.*)$')
      if kind then gone[#gone + 1] = { id, kind == 'p:' and all[i + 1]:match('^%d+') or all[i + 1] } end
    end
    write('DEL', history, session, index, opens)
    for _, producer in ipairs(gone) do write('HSET', session, 'd:' .. producer[1], producer[2]) end
    write('HSET', session, 'epoch', log.epoch, 'base', int(log.last), 'last_seen', int(log.last), 'mark', '',
      'former', int(log.former), 'deletions', int(log.deletions + 1), 'deleted', int(now()))
    redis.pcall('PEXPIRE', session, ARGV[3])
    publish(ARGV[5], channel, ARGV[6])
    call_uploads()
    return reply('ok')
  end

  if what == 'cancel' then
    if log.deleted then return answer('absent') end
    local ids, id, status = {}, argument(2), 'ok'
    if id == '' then
      save() -- so that the set has those that were learnt just now
      for _, one in ipairs(log.ended and {} or redis.call('ZRANGE', opens, 0, -1)) do
        if message(one).open then ids[#ids + 1] = one end
      end
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
    return reply(status, head + 1, head + #ids, ids, how)
  end

  if what == 'open' then
    if log.deleted then return answer('absent') end
    save() -- as above
    local ids = {}
    for _, one in ipairs(log.ended and {} or redis.call('ZRANGE', opens, 0, -1)) do
      if message(one).open then ids[#ids + 1] = one end
    end
    finish()
    return reply('ok', ids)
  end

  -- renew: compare and set, so that of several nodes that notice, one does it.
  if log.epoch == argument(2) and not log.deleted then begin(next_base(math.max(top(), tonumber(argument(3))))) end
  finish()
  return reply('ok')
end
