-- Says how much a group loses of what it has not read, where that can be known, and that it is told: it is not counted again.
-- Goes before a read in one transaction. KEYS: the stream. ARGV: the group. Returns how many were lost.
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
local raw, info = redis.call('XINFO', 'STREAM', KEYS[1]), {}
for i = 1, #raw, 2 do info[raw[i]] = raw[i + 1] end
if info['max-deleted-entry-id'] ~= '0-0' then return 0 end
for _, one in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local of = {}
  for i = 1, #one, 2 do of[one[i]] = one[i + 1] end
  if of['name'] == ARGV[1] and of['entries-read'] then
    local trimmed = info['entries-added'] - info['length']
    local lost = math.max(0, trimmed - of['entries-read'])
    if lost > 0 then
      -- The server counts on from what was read, and would count the loss again and again.
      redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], of['last-delivered-id'], 'ENTRIESREAD', trimmed)
    end
    return lost
  end
end
return 0
