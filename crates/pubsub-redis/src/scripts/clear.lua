-- Forgets what a stream holds, and what its groups have pending that nobody holds. KEYS: the stream. ARGV: the consumer that stands for
-- nobody. Returns the id given last.
if redis.call('EXISTS', KEYS[1]) == 0 then return '0-0' end
redis.call('XTRIM', KEYS[1], 'MAXLEN', 0)
for _, raw in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = raw[2]
  repeat
    local page = redis.call('XPENDING', KEYS[1], group, '-', '+', 1000, ARGV[1])
    for _, pending in ipairs(page) do redis.call('XACK', KEYS[1], group, pending[1]) end
  until #page < 1000
end
local raw, last = redis.call('XINFO', 'STREAM', KEYS[1]), '0-0'
for i = 1, #raw, 2 do
  if raw[i] == 'last-generated-id' then last = raw[i + 1] end
end
-- What it lost deliberately is no loss: groups have read it all.
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  redis.call('XGROUP', 'SETID', KEYS[1], group[2], '$')
end
return last
