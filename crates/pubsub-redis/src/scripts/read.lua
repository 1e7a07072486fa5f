-- Reads what is new for a group, and says how much of it was trimmed away before it was read, where that can be known.
-- KEYS: the stream. ARGV: group, consumer, how many. Returns: how many were lost, and the entries.
local group, consumer, count = ARGV[1], ARGV[2], ARGV[3]
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
local raw, info = redis.call('XINFO', 'STREAM', KEYS[1]), {}
for i = 1, #raw, 2 do info[raw[i]] = raw[i + 1] end
local lost = 0
if info['max-deleted-entry-id'] == '0-0' then
  for _, one in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local of = {}
    for i = 1, #one, 2 do of[one[i]] = one[i + 1] end
    if of['name'] == group and of['entries-read'] then
      local trimmed = info['entries-added'] - info['length']
      lost = math.max(0, trimmed - of['entries-read'])
      if lost > 0 then
        -- The server counts on from what was read, and would count the loss again and again.
        redis.call('XGROUP', 'SETID', KEYS[1], group, of['last-delivered-id'], 'ENTRIESREAD', trimmed)
      end
    end
  end
end
local read = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', count, 'STREAMS', KEYS[1], '>')
return {lost, read and read[1][2] or {}}
