-- Adds events of a publisher that does not know whether they were added before: those that were are found, the others are added.
-- KEYS: the stream. ARGV: the publisher, how long ago at most they may have been added (ms), the number of options for XADD, those,
-- then a number and an event each, in order. Returns their ids.
local publisher, options = ARGV[1], tonumber(ARGV[3])
local at = 4 + options
local first, wanted = tonumber(ARGV[at]), {}
for i = at, #ARGV, 2 do wanted[ARGV[i]] = true end

-- Newest first, until something of ours is older than what is looked for, or everything is.
local time = redis.call('TIME')
local floor = tonumber(time[1]) * 1000 - tonumber(ARGV[2])
local found, from = {}, '+'
repeat
  local page, done = redis.call('XREVRANGE', KEYS[1], from, '-', 'COUNT', 500), false
  for _, entry in ipairs(page) do
    local fields, p, n = entry[2], nil, nil
    for i = 1, #fields, 2 do
      if fields[i] == 'p' then p = fields[i + 1] elseif fields[i] == 'n' then n = fields[i + 1] end
    end
    if p == publisher then
      if wanted[n] then found[n] = entry[1] elseif n and tonumber(n) and tonumber(n) < first then done = true; break end
    end
    if tonumber(string.match(entry[1], '^%d+')) < floor then done = true; break end
    from = '(' .. entry[1]
  end
until done or #page < 500

local ids = {}
for i = at, #ARGV, 2 do
  local number, id = ARGV[i], found[ARGV[i]]
  if not id then
    local add = {'XADD', KEYS[1]}
    for j = 4, 3 + options do add[#add + 1] = ARGV[j] end
    for _, part in ipairs({'*', 'event', ARGV[i + 1], 'p', publisher, 'n', number}) do add[#add + 1] = part end
    id = redis.call(unpack(add))
  end
  ids[#ids + 1] = id
end
return ids
