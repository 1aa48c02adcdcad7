-- The bounds of the log and chunks of it, all of one instant.
--
--   ARGV[11]  the first number wanted; 0: the newest that fit
--   ARGV[12]  how many bytes of chunks to answer at most: but one chunk at least
--   ARGV[13]  how many chunks at most; 0: only the bounds
--
-- Waiting for a session creates no keys: where there is nothing, nothing is written.
open()
if not log then return { 'absent' } end
finish()

local from, bytes, count = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
local first, last = math.max(from - log.base, 1), log.length
if from == 0 then
  -- Size from the newest backwards, in steps that grow, then take that many.
  local size, step, fit = 0, 32, 0
  first = last + 1
  while first > 1 and fit >= 0 and last - first + 1 < count do
    local part = range(math.max(first - step, 1), first - 1)
    for i = #part, 1, -1 do
      size = size + #part[i]
      if (size > bytes and first <= last) or last - first + 1 >= count then fit = -1 break end
      first = first - 1
    end
    step = step * 2
  end
  return reply('ok', int(log.base + first), range(first, last))
end

local chunks, size, position, step = {}, 0, first, 32
while position <= last and size < bytes and #chunks < count do
  local part = range(position, math.min(position + step, last + 1) - 1)
  for i = 1, #part do
    size = size + #part[i]
    if (size > bytes and #chunks > 0) or #chunks >= count then position = last break end
    chunks[#chunks + 1] = part[i]
  end
  position, step = position + #part, step * 2
end
return reply('ok', int(log.base + first), chunks)
