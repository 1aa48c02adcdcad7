-- Makes, deletes, and begins anew.
--
--   ARGV[7]  create | delete | renew
--   ARGV[8]  renew: the epoch that is to end      ARGV[9]  renew: the highest number that was given out in it
open()
if ARGV[7] == 'create' then
  if log and not log.deleted then
    seen()
    keep()
    return reply('exists')
  end
  if log then
    revive()
  else
    log = { base = 0, last = 0, last_seen = 0, former = 0, length = 0 }
    begin(0)
  end
  seen()
  keep()
  hint()
  return reply('ok')
end

if not log then return { 'absent' } end

if ARGV[7] == 'delete' then
  if log.deleted then return reply('ok') end
  redis.call('DEL', history, session)
  -- What stays: where the numbers have got to, and which epoch is dead, so that an upload that began in
  -- it does not write into the next one.
  redis.call('HSET', session, 'epoch', log.epoch, 'base', int(log.last), 'last_seen', int(log.last), 'mark', '',
    'former', int(log.former), 'removed', log.epoch, 'deleted', int(now()))
  redis.call('PEXPIRE', session, ARGV[3])
  hint()
  return reply('ok')
end

-- renew: compare and set, so that of several nodes that notice, one does it.
if log.epoch == ARGV[8] and not log.deleted then
  begin(math.max(log.last, tonumber(ARGV[9])))
end
seen()
keep()
if log.begun then hint() end
return reply('ok')
