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
  hint_begun()
  return reply('ok')
end

if not log then return { 'absent' } end

if ARGV[7] == 'delete' then
  if log.deleted then return reply('ok') end
  redis.call('DEL', history, session)
  -- What stays: where the numbers have got to, so that they go on, and that an upload which got one of
  -- them does not write into what comes after.
  redis.call('HSET', session, 'epoch', log.epoch, 'base', int(log.last), 'last_seen', int(log.last), 'mark', '',
    'former', int(log.former), 'removed', int(log.last), 'deleted', int(now()))
  redis.call('PEXPIRE', session, ARGV[3])
  hint()
  return reply('ok')
end

-- renew: compare and set, so that of several nodes that notice, one does it. The others may have given
-- out higher numbers than that one knew of: a cursor among those means another log as well.
local given = tonumber(ARGV[9])
if log.epoch == ARGV[8] and not log.deleted then
  begin(math.max(log.last, given))
elseif given > log.former then
  log.former = given
  redis.call('HSET', session, 'former', int(given))
end
seen()
keep()
hint_begun()
return reply('ok')
