-- A ticket: which session it admits to, and which connection uses its one grant.
--
--   KEYS[1]  the ticket, a hash: session, until (ms; 0: never), connection (once it has been used)
--   ARGV[1]  make | enter | renew
--   ARGV[2]  the session
--   ARGV[3]  the connection that enters, or renews
--   ARGV[4]  make, renew: when the ticket expires, ms; 0: never
--   ARGV[5]  how long it is kept, ms, while no connection enters or renews
--   ARGV[6]  the time now, ms, by the node's clock, like the expiry of tokens
--   ARGV[7]  the channel that announces a second entry
--   ARGV[8]  the ticket's name on that channel
local ticket, session, connection, now = KEYS[1], ARGV[2], ARGV[3], tonumber(ARGV[6])

local function keep(till)
  local life = tonumber(ARGV[5])
  if till > 0 then life = math.min(life, till - now) end
  if life > 0 then redis.call('PEXPIRE', ticket, string.format('%.0f', life)) else redis.call('DEL', ticket) end
end

if ARGV[1] == 'make' then
  redis.call('HSET', ticket, 'session', session, 'until', ARGV[4])
  keep(tonumber(ARGV[4]))
  return { 'ok' }
end

local held = redis.call('HMGET', ticket, 'session', 'until', 'connection')

if ARGV[1] == 'enter' then
  if held[1] ~= session then return { 'spent' } end
  redis.call('HSET', ticket, 'connection', connection)
  keep(tonumber(held[2]))
  if held[3] then redis.call('PUBLISH', ARGV[7], ARGV[8]) end
  return { 'ok', held[2] }
end

-- renew: a ticket that is gone while its connection stands was lost with Redis, or was not renewed during an outage.
-- The first connection to come back gets it again.
if held[3] and held[3] ~= connection then return { 'replaced' } end
if not held[3] then redis.call('HSET', ticket, 'session', session, 'until', ARGV[4], 'connection', connection) end
keep(tonumber(ARGV[4]))
return { 'ok' }
