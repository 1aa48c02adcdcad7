-- What every script ends with: its callers one by one. A mistake of one, such as a key of another type, is its own.
local replies, next_at = {}, 10
for i = 1, #KEYS / 5 do
  local k = 5 * i
  history, session, channel, index, opens = KEYS[k - 4], KEYS[k - 3], KEYS[k - 2], KEYS[k - 1], KEYS[k]
  log, messages, news, look = nil, {}, {}, false
  at = next_at + 1
  count = tonumber(ARGV[at])
  next_at = at + count
  local ok, answer = pcall(work)
  if not ok then answer = { 'error', type(answer) == 'table' and answer.err or tostring(answer) } end
  replies[i] = answer
end
return replies
