-- What is known of a topic. KEYS: the stream. ARGV: the consumer that stands for nobody, and a group if only that one matters.
-- Returns: the server's time (ms), how many entries there are, and for each group: its name, how many are pending, how many of them
-- nobody holds, how many are unread (or nothing, if it cannot be known, and then whether there are any), the oldest that is pending
-- or unread, and its consumers.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if redis.call('EXISTS', KEYS[1]) == 0 then return {now, 0, {}} end
local groups = {}
for _, raw in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local of = {}
  for i = 1, #raw, 2 do of[raw[i]] = raw[i + 1] end
  if not ARGV[2] or ARGV[2] == of['name'] then
    local consumers, free = {}, 0
    for _, one in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], of['name'])) do
      local consumer = {}
      for i = 1, #one, 2 do consumer[one[i]] = one[i + 1] end
      if consumer['name'] == ARGV[1] then free = consumer['pending'] else consumers[#consumers + 1] = consumer['name'] end
    end
    local pending = redis.call('XPENDING', KEYS[1], of['name'])
    local unread = redis.call('XRANGE', KEYS[1], '(' .. of['last-delivered-id'], '+', 'COUNT', 1)
    local oldest = pending[2] or (unread[1] and unread[1][1]) or false
    local lag = of['lag']
    if not unread[1] then lag = 0 elseif not lag or lag == 0 then lag = -1 end
    groups[#groups + 1] = {of['name'], of['pending'], free, lag, oldest, consumers}
  end
end
return {now, redis.call('XLEN', KEYS[1]), groups}
