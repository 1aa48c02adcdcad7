-- Every script ends with this file, which runs its callers one by one. An error of one caller, such as a key of another
-- type, does not affect the others.
local replies, next_at = {}, 12
for i = 1, #KEYS / 5 do
  local k = 5 * i
  history, session, channel, index, opens = KEYS[k - 4], KEYS[k - 3], KEYS[k - 2], KEYS[k - 1], KEYS[k]
  log, lost, messages, news, look, note, written = nil, nil, {}, {}, false, nil, false
  memory.epoch, memory.last, memory.mark = ARGV[next_at + 1], tonumber(ARGV[next_at + 2]), ARGV[next_at + 3]
  at = next_at + 4
  count = tonumber(ARGV[at])
  next_at = at + count
  local ok, answer = true, { 'again' }
  if i == 1 or spent < slice then ok, answer = pcall(work) end
  if not ok then answer = { written and 'broken' or 'error', type(answer) == 'table' and answer.err or tostring(answer) } end
  replies[i] = answer
end
-- A replica accepts no writes. Perhaps it was the master until a moment ago. An error for the whole script makes the
-- client drop the connection and dial again. Nothing was done.
local readonly = refusal or unrefreshed
if readonly and readonly:find('READONLY', 1, true) == 1 and ARGV[11] == '0' then return redis.error_reply(readonly) end
return replies
