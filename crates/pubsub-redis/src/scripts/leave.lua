-- Removes consumers of a group that hold nothing. KEYS: the stream. ARGV: group, how long they must have been idle (ms), consumers; or
-- all of the group's if none is named. Returns how many were removed.
local found = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if found.err then return 0 end
local named, removed = {}, 0
for i = 3, #ARGV do named[ARGV[i]] = true end
for _, raw in ipairs(found) do
  local of = {}
  for i = 1, #raw, 2 do of[raw[i]] = raw[i + 1] end
  if of['pending'] == 0 and of['idle'] >= tonumber(ARGV[2]) and (#ARGV < 3 or named[of['name']]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], of['name'])
    removed = removed + 1
  end
end
return removed
