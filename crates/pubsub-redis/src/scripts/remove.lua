-- Removes entries, and what groups have pending of them that nobody holds. KEYS: the stream. ARGV: the consumer that stands for nobody,
-- ids. Returns how many were removed.
local removed = 0
for i = 2, #ARGV do
  if redis.call('XDEL', KEYS[1], ARGV[i]) == 1 then removed = removed + 1 end
end
if removed > 0 then
  for _, raw in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    for i = 2, #ARGV do
      local pending = redis.call('XPENDING', KEYS[1], raw[2], ARGV[i], ARGV[i], 1)[1]
      if pending and pending[2] == ARGV[1] then redis.call('XACK', KEYS[1], raw[2], ARGV[i]) end
    end
  end
end
return removed
